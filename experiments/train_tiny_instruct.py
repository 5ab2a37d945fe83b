"""Tunes the bundled model on a small set of chat demonstrations, compares the two, and writes the new one as a Hugging
Face folder.

    python -m experiments.train_tiny_instruct --output=checkpoints/tiny_instruct

A run that is killed goes on from its newest checkpoint under --work when the same command is given again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import grain
import jax
from absl import flags
from tqdm import tqdm

import models
from experiments.tiny_instruct_card import write_card
from experiments.tiny_scores import (
    measure_chats,
    measure_induction,
    measure_judgements,
    measure_questions,
    training_seconds,
)
from nmjax import flags as nm_flags
from nmjax.data.demonstrations import PackedChats, demonstrations
from nmjax.data.world import bundled_world, held_out_questions
from nmjax.lm import LanguageModel
from nmjax.training.checkpoint import Checkpoints
from nmjax.training.loop import TrainConfig, language_model_loss, train

FLAGS = flags.FLAGS
flags.DEFINE_string("base", "checkpoints/tiny", "the model to tune: a folder, or the name of a bundled checkpoint")
flags.DEFINE_string("output", "results/tiny_instruct", "folder of the tuned model, in Hugging Face format")
flags.DEFINE_string("work", "results/train_tiny_instruct", "folder of the training checkpoints")
flags.DEFINE_integer("demonstrations", 3000, "chats in the training set")
flags.DEFINE_integer("steps", 750, "optimizer steps")
flags.DEFINE_integer("rows", 8, "windows a step")
flags.DEFINE_integer("length", 128, "tokens a window")
flags.DEFINE_float("peak_lr", 2e-3, "learning rate of AdamW after the warm-up")
flags.DEFINE_integer("seed", 0, "of the demonstrations and of their order")
flags.DEFINE_integer("questions", 2000, "held-out questions of the comparison")

# What the scores depend on.
_RECIPE = ("base", "demonstrations", "steps", "rows", "length", "peak_lr", "seed", "questions")


def measure(lm: LanguageModel, questions: int) -> dict:
    """All scores of one model, asked plainly and in chats."""
    asked = held_out_questions(questions)
    return {
        "fingerprint": lm.fingerprint,
        "plain": measure_questions(lm, asked),
        "chat": measure_questions(lm, asked, chat=True),
        "chat_without_cue": measure_questions(lm, asked, chat=True, cue=False),
        "judgements": {"plain": measure_judgements(lm, 1000), "chat": measure_judgements(lm, 1000, chat=True)},
        "chats": measure_chats(lm, asked[:500]),
        "induction": measure_induction(lm, 16),
    }


def main(argv):
    del argv
    started = time.time()
    base = models.load(FLAGS.base)
    shown = demonstrations(bundled_world(), FLAGS.demonstrations, FLAGS.seed)
    data = PackedChats(
        base.tokenizer, [one.chat for one in shown], FLAGS.steps, FLAGS.rows, FLAGS.length, seed=FLAGS.seed
    )
    recipe = TrainConfig(
        steps=FLAGS.steps,
        peak_lr=FLAGS.peak_lr,
        warmup=FLAGS.steps // 20,
        weight_decay=0.0,
        log_every=75,
        save_every=150,
        seed=FLAGS.seed,
    )
    probe = held_out_questions(500, seed=1)

    def watch(history, params):
        record = history[-1]
        asked = measure_questions(LanguageModel(base.module, params, base.tokenizer), probe, chat=True)
        kept = {name: asked[name] for name in ("accuracy", "confidence", "ece")}
        tqdm.write(
            f"step {record['step']}: loss {record['loss']:.3f}, held-out accuracy {kept['accuracy']:.3f}, "
            f"confidence {kept['confidence']:.3f}, ECE {kept['ece']:.3f}"
        )
        return kept | {"seconds": round(time.time() - started, 1)}

    state, history = train(
        language_model_loss(base.module), base.params, grain.MapDataset.source(data), recipe,
        checkpoints=Checkpoints(FLAGS.work), watch=watch,
    )  # fmt: skip

    models.save(LanguageModel(base.module, jax.device_get(state.params), base.tokenizer), FLAGS.output)
    tuned = models.load(FLAGS.output)  # what is measured is what was written
    scores = {
        "training_seconds": training_seconds(history),
        "epochs": data.epochs,
        "base": measure(base, FLAGS.questions),
        "instruct": measure(tuned, FLAGS.questions),
    }
    changed = [FLAGS[name] for name in _RECIPE]
    arguments = " ".join(f"--{flag.name}={flag.value}" for flag in changed if flag.value != flag.default)
    write_card(Path(FLAGS.output), arguments, FLAGS.base, tuned, recipe, data, shown, history, scores)
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    nm_flags.run(main)
