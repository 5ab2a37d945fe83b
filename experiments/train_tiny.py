"""Trains the bundled model on the bundled world, measures it, and writes it as a Hugging Face folder.

    python -m experiments.train_tiny --output=checkpoints/tiny

A run that is killed goes on from its newest checkpoint under --work when the same command is given again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from optax import contrib
from optax.contrib import MuonDimensionNumbers
from tqdm import tqdm

import models
import nmjax
from experiments.tiny_card import write_card
from experiments.tiny_scores import measure_induction, measure_judgements, measure_questions, training_seconds
from models.config import LlamaConfig
from models.llama import Llama
from nmjax import flags as nm_flags
from nmjax.data.corpus import Windows
from nmjax.data.tokenizer import CONTEXT, SPECIALS, build_tokenizer
from nmjax.data.world import bundled_world, held_out_questions
from nmjax.lm import LanguageModel
from nmjax.training.checkpoint import Checkpoints
from nmjax.training.loop import TrainConfig, language_model_loss, make_schedule, train

FLAGS = flags.FLAGS
flags.DEFINE_string("output", "results/tiny", "folder of the trained model, in Hugging Face format")
flags.DEFINE_string("work", "results/train_tiny", "folder of the training checkpoints")
flags.DEFINE_integer("steps", 1500, "optimizer steps")
flags.DEFINE_integer("decay", 500, "steps at the end in which the learning rate falls")
flags.DEFINE_integer("tokens", 2048, "tokens a step")
flags.DEFINE_integer("layers", 4, "layers")
flags.DEFINE_integer("embed", 128, "width of the residual stream")
flags.DEFINE_float("peak_lr", 3e-3, "learning rate after the warm-up, of embeddings and norms")
flags.DEFINE_float("matrix_lr", 0.02, "learning rate after the warm-up, of kernels (Muon)")
flags.DEFINE_integer("seed", 0, "of the initial weights and of the order of the corpus")
flags.DEFINE_integer("questions", 4000, "held-out questions of the final evaluation")


# What the scores depend on.
_RECIPE = ("steps", "decay", "tokens", "layers", "embed", "peak_lr", "matrix_lr", "seed", "questions")


def model_config(tokenizer, layers: int, embed: int) -> LlamaConfig:
    """A small Llama: heads of 32, two query heads a key/value head, tied embeddings."""
    heads = embed // 32
    return LlamaConfig.from_hf({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": embed,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "head_dim": 32,
        "intermediate_size": 2 * embed,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": "float32",
    })  # fmt: skip


def summed_axes(path) -> int:
    """Over how many leading axes the kernel at `path` sums: two for the attention's output, else one."""
    return 2 if path[-2].key == "o" else 1


def initial_params(module, seed: int) -> dict:
    """Random parameters: embeddings of 0.1, kernels of variance 1 / fan-in, and those that write to the residual stream
    smaller by sqrt(2L), so that at the start the stream holds the tokens and not noise.

    All embeddings share one random vector: queries and keys have no bias, so without it no head could attend by
    position alone. In the tied output it adds the same to every logit.
    """
    params = module.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"]

    def rescale(path, leaf):
        if path[-1].key == "embedding":
            shared = jax.random.normal(jax.random.key(seed + 9), leaf.shape[1:])
            return 0.1 * (leaf / leaf.std() + shared)
        if path[-1].key != "kernel":
            return leaf
        fan_in = np.prod(leaf.shape[: summed_axes(path)])
        if path[-2].key in ("o", "down"):
            fan_in *= 2 * module.config.layers
        return leaf / leaf.std() / np.sqrt(fan_in)

    return attend_to_neighbours(jax.tree_util.tree_map_with_path(rescale, params), module.config)


def attend_to_neighbours(params: dict, config: LlamaConfig, sharpness: float = 10.0) -> dict:
    """Lets the first two heads of layer 0, which share keys and values, start out on the token before and on the token
    itself.

    Copying needs a head that finds where the present token last stood *before* another (Olsson et al. 2022). With one
    value matrix for both, "this token" and "the token before" are written in the same code, so matching the two is a
    small step for any head above: induction forms within 200 steps, where random heads have not begun after thousands,
    or settle for copying from a fixed distance. The heads are free to change.

    Args:
      sharpness: the score of the chosen position, in nats for each of the fast frequencies.
    """
    embedding = np.asarray(params["embed"]["embedding"])
    shared = embedding.mean(0) / np.linalg.norm(embedding.mean(0))
    normed = embedding / np.sqrt((embedding**2).mean(1, keepdims=True))
    angles, _ = config.rope.frequencies(config.head_dim)
    fast = angles > 0.03  # slower ones don't tell neighbours apart
    scale = np.sqrt(sharpness * np.sqrt(config.head_dim)) / (normed @ shared).mean()

    def turned(positions):  # a head that looks `positions` back, if keys are turned by one
        pairs = fast * np.cos(positions * angles), fast * np.sin(positions * angles)
        return scale * np.outer(shared, np.concatenate(pairs))

    attention = params["layers_0"]["attn"]
    q, k, o = (np.array(attention[name]["kernel"]) for name in ("q", "k", "o"))
    k[:, 0] = turned(1)
    q[:, 0], q[:, 1] = turned(0), turned(1)
    o[:2] *= 4  # heard above the token's own embedding
    kernels = {"q": q, "k": k, "o": o}
    attention = attention | {name: {"kernel": jnp.asarray(kernel, jnp.float32)} for name, kernel in kernels.items()}
    return params | {"layers_0": params["layers_0"] | {"attn": attention}}


def make_muon(recipe: TrainConfig, matrix_lr: float) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024, as in optax) for kernels, Adam for embeddings and norms, behind a clip of the gradient.

    It forms the attention circuits and learns rare facts in fewer steps than AdamW. Both rates follow one schedule.
    """
    schedule = make_schedule(recipe)

    def kernels(params):
        def axes(path, leaf):
            if path[-1].key != "kernel":
                return None
            split = summed_axes(path)
            return MuonDimensionNumbers(tuple(range(split)), tuple(range(split, leaf.ndim)))

        return jax.tree_util.tree_map_with_path(axes, params)

    muon = contrib.muon(
        lambda step: schedule(step) * (matrix_lr / recipe.peak_lr),
        weight_decay=recipe.weight_decay,
        adam_learning_rate=schedule,
        adam_b2=recipe.b2,
        muon_weight_dimension_numbers=kernels,
    )
    return optax.chain(optax.clip_by_global_norm(recipe.clip), muon)


def make_windows(tokenizer) -> Windows:
    """The corpus by step."""
    return Windows(
        world=bundled_world(),
        tokenizer=tokenizer.backend_tokenizer,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        first_word=len(SPECIALS),
        vocab=len(tokenizer),
        steps=FLAGS.steps,
        tokens=FLAGS.tokens,
        seed=FLAGS.seed,
    )


def main(argv):
    del argv
    started = time.time()
    tokenizer = build_tokenizer(bundled_world())
    config = model_config(tokenizer, FLAGS.layers, FLAGS.embed)
    module = Llama(config)
    recipe = TrainConfig(
        steps=FLAGS.steps,
        peak_lr=FLAGS.peak_lr,
        end_lr=FLAGS.peak_lr / 100,
        warmup=100,
        decay=FLAGS.decay,
        weight_decay=0.01,
        log_every=200,
        save_every=200,
        seed=FLAGS.seed,
    )
    probe = held_out_questions(500, seed=1)

    def watch(history, params):
        record = history[-1]
        now = LanguageModel(module, params, tokenizer)
        asked, copying = measure_questions(now, probe), measure_induction(now, 16, samples=32)
        tqdm.write(
            f"step {record['step']}: loss {record['loss']:.3f}, held-out accuracy {asked['accuracy']:.3f}, "
            f"ECE {asked['ece']:.3f}, copying {copying['copy_accuracy']:.3f}, "
            f"best induction score {copying['best_score']:.3f}"
        )
        return {
            "accuracy": asked["accuracy"],
            "ece": asked["ece"],
            "copy_accuracy": copying["copy_accuracy"],
            "induction": copying["best_score"],
            "seconds": round(time.time() - started, 1),
        }

    state, history = train(
        language_model_loss(module), initial_params(module, FLAGS.seed),
        grain.MapDataset.source(make_windows(tokenizer)), recipe, optimizer=make_muon(recipe, FLAGS.matrix_lr),
        checkpoints=Checkpoints(FLAGS.work), watch=watch,
    )  # fmt: skip

    models.save(LanguageModel(module, jax.device_get(state.params), tokenizer), FLAGS.output)
    lm = models.load(FLAGS.output)  # what is measured is what was written
    scores = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(lm.params)),
        "vocabulary": len(tokenizer),
        "training_seconds": training_seconds(history),
        "multiple_choice": measure_questions(lm, held_out_questions(FLAGS.questions)),
        "judgements": measure_judgements(lm, 1000),
        "induction": [measure_induction(lm, block) for block in (8, 16, 32, 50)],
    }
    story = nmjax.generate(lm, ["Once upon a time"], max_new_tokens=60, seed=0)
    changed = [FLAGS[name] for name in _RECIPE]
    arguments = " ".join(f"--{flag.name}={flag.value}" for flag in changed if flag.value != flag.default)
    write_card(
        Path(FLAGS.output),
        arguments,
        FLAGS.matrix_lr,
        config,
        recipe,
        make_windows(tokenizer),
        history,
        scores,
        story.full_text[0],
    )
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    nm_flags.run(main)
