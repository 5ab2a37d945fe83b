"""Two-pass lookahead training: does a language model that hears of its own confidence predict better?

Method. MiniGPT learns to predict the next token. ConfidenceAwareGPT, with the same blocks, the same initial values and
the same batches by seed, learns besides what its loss will be one token later if it follows its own choice, and is told
at every position what it said at the one before. Both are read on held-out documents. Whether the signal helps is asked
of the same trained model, told its own predictions, none, another text's, or a constant; whether the training is worth
its cost is asked against MiniGPT at equal steps and at equal measured FLOPs. Seeds train together and are compared in
pairs.

    python -m experiments.confidence
    python -m experiments.confidence --dataset=roneneldan/TinyStories --vocab_size=4096 --training_steps=2000
    python -m experiments.confidence --preset=published

A run that is killed goes on from its newest checkpoint when the same command is given again.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

import models
from experiments.lookahead.config import (
    FEEDBACKS,
    POSITIONS,
    PRESETS,
    ConfidenceExperimentConfig,
    PretrainingConfig,
    make_config,
)
from experiments.lookahead.data import ConfidenceData, prepare_confidence_data
from experiments.lookahead.output import write
from experiments.lookahead.report import Report
from experiments.lookahead.results import (
    ConfidenceExperimentResults,
    ConfidenceTrainingResult,
    TrainingResult,
    load_results,
    save_results,
)
from experiments.lookahead.study import NAME, Study, Trained
from nmjax import flags as nm_flags
from nmjax import paths
from nmjax.lm import LanguageModel
from nmjax.training import distributed, launch
from nmjax.training.lookahead import two_pass_training_step

__all__ = [
    "ConfidenceAwareExperiment",
    "ConfidenceData",
    "ConfidenceExperimentConfig",
    "ConfidenceExperimentResults",
    "ConfidenceTrainingResult",
    "PretrainingConfig",
    "TrainingResult",
    "load_results",
    "prepare_confidence_data",
    "save_results",
    "two_pass_training_step",
]


class ConfidenceAwareExperiment:
    """The comparison that a configuration describes: `ConfidenceAwareExperiment(config).run()`."""

    def __init__(self, config: ConfidenceExperimentConfig):
        self.config = config

    def run(self, tokenizer: Any = None, *, export: str | None = None, progress: bool = True):
        """Trains, evaluates and writes everything to `config.results_dir`; returns `ConfidenceExperimentResults`.

        Args:
          tokenizer: of transformers; None is the one that the configuration names.
          export: a folder for the trained models, one subfolder a model and seed, for `models.load`.
          progress: shows bars and prints the findings.
        Raises:
          ValueError: data, a tokenizer or a mesh that can't be had or doesn't fit.
        """
        study = Study(self.config, tokenizer, progress)
        found, trained = study.run()
        if not study.writes:  # another process does
            return found
        if export is not None:
            _export(study, trained, pathlib.Path(export))
        written = write(found, pathlib.Path(self.config.results_dir), found.timestamp)
        study.finish()
        if progress:
            print("\n" + Report(found).headline())
            print("Written:\n" + "\n".join(f"  {path}" for path in written))
        return found


def _export(study: Study, trained: dict[str, Trained], folder: pathlib.Path) -> None:
    for name, one in trained.items():
        for r, seed in enumerate(study.config.seeds):
            lm = LanguageModel(one.arm.module, one.replica(r), study.data.tokenizer)
            models.save(lm, folder / f"{name}_{seed}")


def define_flags() -> None:
    d = ConfidenceExperimentConfig()
    flags.DEFINE_enum(
        "preset", "small", list(PRESETS), "What the other flags change; their defaults are those of 'small'."
    )
    flags.DEFINE_string(
        "dataset", d.dataset, "'bundled', a text file or folder, or a hub data set (owner/name:config)."
    )
    flags.DEFINE_integer("documents", d.documents, "At most so many documents.")
    flags.DEFINE_string(
        "tokenizer", d.tokenizer, "'bpe' (trained on the spot), 'bundled', or a folder or hub id: gpt2."
    )
    flags.DEFINE_integer("vocab_size", d.vocab_size, "Tokens of the BPE that is trained on the spot.")
    flags.DEFINE_integer("embed_dim", d.embed_dim, "Width of the residual stream.")
    flags.DEFINE_integer("num_heads", d.num_heads, "Attention heads.")
    flags.DEFINE_integer("num_layers", d.num_layers, "Blocks.")
    flags.DEFINE_integer("max_seq_len", d.max_seq_len, "Tokens of context.")
    flags.DEFINE_float("dropout", d.dropout, "Share that is dropped while training.")
    flags.DEFINE_integer("training_steps", d.training_steps, "Optimizer steps of both models.")
    flags.DEFINE_integer("batch_size", d.batch_size, "Rows a step and seed.")
    flags.DEFINE_integer("accumulate", d.accumulate, "Parts a step's rows are taken in, to need less memory.")
    flags.DEFINE_float("learning_rate", d.learning_rate, "After the warm-up; from there a cosine falls to 0.")
    flags.DEFINE_float("weight_decay", d.weight_decay, "Of AdamW.")
    flags.DEFINE_integer("warmup_steps", d.warmup_steps, "Default: a twentieth of the steps.")
    flags.DEFINE_float("max_grad_norm", d.max_grad_norm, "Clips the global norm of the gradient, the head's apart.")
    flags.DEFINE_list("seeds", [str(seed) for seed in d.seeds], "Replicas, which train together.")
    flags.DEFINE_float("eval_split_ratio", d.eval_split_ratio, "Share of the documents that are held out.")
    flags.DEFINE_integer("eval_interval", d.eval_interval, "Steps between two evaluations; 0: only at the end.")
    flags.DEFINE_integer("eval_batches", d.eval_batches, "Held-out batches of an evaluation.")
    flags.DEFINE_integer("eval_draws", d.eval_draws, "Own choices whose future losses are averaged in an evaluation.")
    flags.DEFINE_float("confidence_alpha", d.confidence_alpha, "Weight of the confidence loss.")
    flags.DEFINE_bool("detach_head", d.detach_head, "The confidence loss trains the head alone.")
    flags.DEFINE_integer("lookahead_steps", d.lookahead_steps, "2: the loss of the token after the next.")
    flags.DEFINE_string(
        "confidence_init_bias", str(d.confidence_init_bias), "What the untrained head says, in nats; 'ln_v': ln V."
    )
    flags.DEFINE_enum("lookahead", d.lookahead, POSITIONS, "Positions of a row with a loss; published: the last.")
    flags.DEFINE_integer("draws", d.draws, "Own choices a position whose future losses are averaged in training.")
    flags.DEFINE_integer("top", d.top, "In place of draws: the so many likeliest choices, weighted by probability.")
    flags.DEFINE_enum(
        "feedback",
        d.feedback,
        FEEDBACKS,
        "What the model is told while it trains: its exact predictions on the row (scan), those of parallel passes "
        "(jacobi), nothing (zeros), or as published those on the batch before (carry).",
    )
    flags.DEFINE_integer("jacobi_passes", d.jacobi_passes, "Of --feedback=jacobi.")
    flags.DEFINE_bool("untold", d.untold, "Also train the confidence model without telling it anything.")
    flags.DEFINE_bool("equal_flops", d.equal_flops, "Also train MiniGPT until it has cost what the other model did.")
    flags.DEFINE_integer("save_interval", d.save_interval, "Steps between two intermediate results files.")
    flags.DEFINE_integer("checkpoint_interval", d.checkpoint_interval, "Steps between two checkpoints.")
    flags.DEFINE_integer("steps_per_call", d.steps_per_call, "Steps a compiled call scans over; 0 chooses.")
    launch.define_flags()
    flags.DEFINE_string("results_dir", d.results_dir, "Folder of the results.")
    flags.DEFINE_string("export", None, "Folder for the trained models, to be read by models.load.")


def config_of_flags() -> ConfidenceExperimentConfig:
    """The preset with what the command line changes. Raises ValueError for a bad value."""
    given = flags.FLAGS
    names = {field.name for field in dataclasses.fields(ConfidenceExperimentConfig)}
    changes: dict[str, Any] = {name: given[name].value for name in names if given[name].present}
    if "seeds" in changes:
        changes["seeds"] = _integers("seeds", changes["seeds"])
    if "confidence_init_bias" in changes:
        changes["confidence_init_bias"] = _initial_bias(changes["confidence_init_bias"])
    return make_config(given.preset, changes)


def _integers(name: str, values: Sequence[str]) -> tuple[int, ...]:
    if wrong := [value for value in values if not value.strip().isdecimal()]:
        raise ValueError(f"{name} holds {wrong[0]!r}, wanted whole numbers from 0")
    return tuple(int(value) for value in values)


def _initial_bias(text: str) -> float | None:
    if text == "ln_v":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"confidence_init_bias={text!r}, wanted a number or 'ln_v'") from error


def main(_: Sequence[str]) -> None:
    paths.enable_compilation_cache()
    try:
        distributed.initialize(nm_flags.filled(launch.Launch))
        config = config_of_flags()
        ConfidenceAwareExperiment(config).run(export=flags.FLAGS.export)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{NAME}: {error}")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
