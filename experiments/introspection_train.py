"""Trains an adapter to tell what was done to the model: one variant of the introspection study.

Method. A conversation is read while a random direction is added to the residual stream of its tokens, or nothing is; a
question about it is then read undisturbed, from the cache. LoRA adapters on the attention's projections learn to answer
it; the gradient stops at the conversation's keys and values. Controls ask about food, or have labels that say nothing;
all variants of equal sizes have the same number of steps, seed, and order of records.

    python -m experiments.introspection_train --variant=original
    python -m experiments.introspection_train --preset=qwen32b --variant=vague_prompt --mesh=fsdp=4 --batch_size=32

`--preset=tiny` (the default) trains the bundled model in minutes; qwen32b has the published settings. A run that is
killed goes on from its newest checkpoint when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

import models
from experiments.introspecting.training import RESULT, Training
from experiments.introspecting.training_settings import NAME, PRESETS, SCHEDULES, TrainingSettings, make_settings
from models.checkpoint import DTYPES
from nmjax import flags as nm_flags
from nmjax import paths
from nmjax.data.introspection import WORDINGS
from nmjax.report.tables import with_interval
from nmjax.training import distributed, launch
from nmjax.training.introspection import LOSSES


def define_flags() -> None:
    d = TrainingSettings()
    flags.DEFINE_enum("preset", "tiny", list(PRESETS), "What other flags change; their defaults are those of qwen32b.")
    flags.DEFINE_string("model", d.model, "The base: a folder in Hugging Face's format, or an id on the hub.")
    flags.DEFINE_enum("dtype", d.dtype, list(DTYPES), "Of the base's parameters; default: as they are stored.")
    flags.DEFINE_enum("variant", d.variant, list(WORDINGS), "What is asked, and how labels are made.")
    flags.DEFINE_string(
        "data", d.data, "Folder of introspection_data; default: records are drawn, see the flags below."
    )
    flags.DEFINE_string("lists", d.lists, "'bundled', 'tiny' (for the bundled models), or a folder of published lists.")
    flags.DEFINE_integer("data_seed", d.data_seed, "Of the records that are drawn.", lower_bound=0)
    flags.DEFINE_integer("n", d.n, "Records in train, validation and test together.")
    flags.DEFINE_integer("vectors", d.vectors, "Random vectors; the first half is for training.")
    flags.DEFINE_integer("vectors_seed", d.vectors_seed, "Of the vectors themselves.", lower_bound=0)
    flags.DEFINE_list("magnitudes", [f"{m:g}" for m in d.magnitudes], "What a unit vector is multiplied by.")
    flags.DEFINE_float("noise", d.noise, "Share of the negatives with noise in place of a vector.")
    flags.DEFINE_float("systems", d.systems, "Share of the records with another system prompt.")
    flags.DEFINE_integer("sentences", d.sentences, "Of localization_sentence: sentences to choose from.")
    flags.DEFINE_integer("lora_r", d.lora_r, "Rank; default: 16, and 1 for r1_minimal.")
    flags.DEFINE_float("lora_alpha", d.lora_alpha, "Default: twice the rank.")
    flags.DEFINE_list("lora_targets", list(d.lora_targets), "Projections that get an adapter.")
    flags.DEFINE_float("lora_dropout", d.lora_dropout, "Of the adapter's inputs, in both segments.")
    flags.DEFINE_bool("rslora", d.rslora, "Scale by alpha / sqrt(r).")
    flags.DEFINE_enum("loss", d.loss, LOSSES, "pair: among the answers only, as published; full: over the vocabulary.")
    flags.DEFINE_float("kl_to_base", d.kl_to_base, "Weight of what holds the answers' total probability at the base's.")
    flags.DEFINE_integer("segments", d.segments, "2: the conversation in a pass of its own; 1: all in one.")
    flags.DEFINE_integer("steps", d.steps, "Optimizer steps; default: --epochs of the training records.")
    flags.DEFINE_float("epochs", d.epochs, "Where --steps is not given.")
    flags.DEFINE_integer("batch_size", d.batch_size, "Records a step.")
    flags.DEFINE_integer("accumulate", d.accumulate, "Parts a step's records are taken in, to need less memory.")
    flags.DEFINE_float("lr", d.lr, "Learning rate after the warm-up; from there it falls to 0.")
    flags.DEFINE_integer("warmup", d.warmup, "Steps.")
    flags.DEFINE_enum("schedule", d.schedule, SCHEDULES, "How the learning rate falls.")
    flags.DEFINE_float("weight_decay", d.weight_decay, "Of AdamW.")
    flags.DEFINE_float("clip", d.clip, "Largest global norm of the gradient.")
    flags.DEFINE_integer("seed", d.seed, "Of the adapter's start, the order of records and dropout.", lower_bound=0)
    flags.DEFINE_integer("eval_every", d.eval_every, "Steps between two validations.")
    flags.DEFINE_integer("eval_records", d.eval_records, "Of a validation.")
    flags.DEFINE_integer("save_every", d.save_every, "Steps between two checkpoints, each with an adapter.")
    flags.DEFINE_integer("steps_per_call", d.steps_per_call, "Steps a compiled call scans over.")
    launch.define_flags()
    flags.DEFINE_string("output", d.output, "Folder of the results; the variant's name is added.")


def settings_of_flags() -> TrainingSettings:
    """The preset with what the command line changes. Raises ValueError for a bad value."""
    given = flags.FLAGS
    names = [field.name for field in dataclasses.fields(TrainingSettings)]
    changes: dict[str, Any] = {name: given[name].value for name in names if given[name].present}
    if "magnitudes" in changes:
        changes["magnitudes"] = nm_flags.numbers("magnitudes", changes["magnitudes"])
    if "lora_targets" in changes:
        changes["lora_targets"] = tuple(changes["lora_targets"])
    changes["output"] = f"{given.output}/{given.variant}"
    return make_settings(given.preset, changes)


def main(_: Sequence[str]) -> None:
    paths.enable_compilation_cache()
    try:
        mesh = distributed.start(flags.FLAGS.mesh, nm_flags.filled(launch.Launch))
        settings = settings_of_flags()
        lm = models.load(settings.model, settings.dtype, host=True)
        found = Training(settings, lm, mesh).run()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{NAME}: {error}")
    if jax.process_index() > 0:
        return
    best = found["best"]
    print(f"\n{settings.variant}: {found['steps']} steps, {found['trainable']:,} trained numbers")
    for name, result in found["test"].items():
        print(f"  {name}: {with_interval(result['value'], result['interval'])} (n = {result['n']:,})")
    print(f"  best on validation records: accuracy {best['val_accuracy']:.3f} at step {best['step']}")
    print(f"Written: {settings.output}/{{final,best,step_<n>}}, curves.png, {RESULT}")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
