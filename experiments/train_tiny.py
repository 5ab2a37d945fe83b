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
from absl import app, flags

from models.config import LlamaConfig
from models.llama import ScannedLlama
from nmjax.data.corpus import Windows
from nmjax.data.questions import format_mmlu
from nmjax.data.tokenizer import CONTEXT, SPECIALS, build_tokenizer
from nmjax.data.world import bundled_world, held_out_questions
from nmjax.training.checkpoint import Checkpoints
from nmjax.training.loop import TrainConfig, next_token_loss, train

FLAGS = flags.FLAGS
flags.DEFINE_string("output", "results/tiny", "folder of the trained model, in Hugging Face format")
flags.DEFINE_string("work", "results/train_tiny", "folder of the training checkpoints")
flags.DEFINE_integer("steps", 5000, "optimizer steps")
flags.DEFINE_integer("batch", 32, "windows a step")
flags.DEFINE_integer("length", 128, "tokens a window")
flags.DEFINE_integer("layers", 6, "layers")
flags.DEFINE_integer("embed", 128, "width of the residual stream")
flags.DEFINE_float("peak_lr", 3e-3, "learning rate after the warm-up")
flags.DEFINE_integer("seed", 0, "of the initial weights and of the order of the corpus")
flags.DEFINE_integer("questions", 4000, "held-out questions of the final evaluation")


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
        "intermediate_size": 32 * round(embed * 2.75 / 32),
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


def initial_params(module, seed: int) -> dict:
    """Random parameters with kernels of variance 1 / fan-in (fan-in: what the kernel sums over), embeddings of 0.02."""
    params = module.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"]

    def rescale(path, leaf):
        names = [key.key for key in path]
        if names[-1] != "kernel":
            return leaf
        summed = leaf.shape[-3:-1] if names[-2] == "o" else leaf.shape[1:2] if "layers" in names else leaf.shape[:1]
        return leaf / leaf.std() / np.sqrt(np.prod(summed))

    return jax.tree_util.tree_map_with_path(rescale, params)


def make_loss(module):
    """Weighted next-token loss of a batch of `Windows`."""

    def loss_fn(params, batch, key):
        del key
        tokens = batch["tokens"]
        hidden = module.apply({"params": params}, tokens[:, :-1])
        logits = module.apply({"params": params}, hidden, method="unembed")
        return next_token_loss(logits, tokens[:, 1:], batch["weights"]), {}

    return loss_fn


class LetterProbe:
    """Accuracy and calibration on held-out questions: the letters' probabilities after 'Answer:', renormalised."""

    def __init__(self, module, tokenizer, n: int, seed: int, batch: int = 250):
        self.questions = held_out_questions(n, seed)
        ids = [tokenizer.encode(format_mmlu(question)) for question in self.questions]
        self.last = np.array([len(row) - 1 for row in ids])
        self.tokens = np.full((n, max(map(len, ids))), tokenizer.pad_token_id, np.int32)
        for row, values in zip(self.tokens, ids, strict=True):
            row[: len(values)] = values
        letters = np.array([tokenizer.encode(f" {letter}", add_special_tokens=False)[0] for letter in "ABCD"])
        self.answers = np.array([question.answer for question in self.questions])
        self.batch = batch

        @jax.jit
        def probabilities(params, tokens, last):
            hidden = module.apply({"params": params}, tokens)[jnp.arange(len(tokens)), last]
            logits = module.apply({"params": params}, hidden[:, None], method="unembed")[:, 0]
            return jax.nn.softmax(logits[:, letters])

        self._probabilities = probabilities

    def __call__(self, params) -> np.ndarray:
        """Probabilities [questions, 4]."""
        parts = np.array_split(np.arange(len(self.tokens)), max(1, len(self.tokens) // self.batch))
        return np.concatenate([self._probabilities(params, self.tokens[part], self.last[part]) for part in parts])


def make_data(tokenizer):
    """The corpus as a Grain dataset of batches by step."""
    windows = Windows(
        world=bundled_world(), tokenizer=tokenizer.backend_tokenizer, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id,
        first_word=len(SPECIALS), vocab=len(tokenizer), steps=FLAGS.steps, batch=FLAGS.batch, length=FLAGS.length, seed=FLAGS.seed,
    )  # fmt: skip
    return grain.MapDataset.source(windows)
