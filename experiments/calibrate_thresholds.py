"""Thresholds for the hallucination monitor, calibrated in two passes.

Pass 1 watches the model judge proposed answers whose truth is known: one greedy generation a sample, in batches, every
signal of every step to disk. Pass 2 asks the scores, all thresholds at once: which signal tells hallucinated answers,
in which direction, at which threshold, and whether it says more than the answer's length or the model's own P(No).

    python -m experiments.calibrate_thresholds --n_samples=100
    python -m experiments.calibrate_thresholds --dataset=halueval --tasks=qa,dialogue --model=<folder or hub id>
    python -m experiments.validate_thresholds --calibrated_params=calibrated_params/<file>.json

How many: --n_samples 10-20 for a quick look, 100-200 standard, 500 or more for high precision; --max_tokens 20-30.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments.monitoring.analysis import Choices, calibrate
from experiments.monitoring.output import write_calibration
from experiments.monitoring.study import CALIBRATE, SPLITS, Settings, Study, prepare
from experiments.monitoring.watching import watched, without_signals
from models import checkpoint
from nmjax import flags as nm_flags
from nmjax import paths
from nmjax.report import results


def define_flags() -> None:
    d = Settings()
    flags.DEFINE_string("model", d.model, "Checkpoint: a folder, or a hub id.")
    flags.DEFINE_string("model_name", d.model_name, "How the files' names begin; default: the model's own name.")
    flags.DEFINE_enum("dtype", d.dtype, list(checkpoint.DTYPES), "Converts the weights; default: as stored.")
    flags.DEFINE_string(
        "dataset",
        d.dataset,
        "'bundled', 'halueval', 'truthfulqa', a data set of the hub like pminervini/HaluEval, a file or folder of "
        "HaluEval's, or TruthfulQA's CSV file.",
    )
    flags.DEFINE_list("tasks", d.tasks, "Only these tasks of the data set, such as qa,dialogue.")
    flags.DEFINE_integer(
        "n_samples",
        d.n_samples,
        "Samples from the half of the source rows that is calibrated on: 10-20 for a quick look, 100-200 standard, 500 "
        "or more for high precision.",
        lower_bound=1,
    )
    flags.DEFINE_integer("max_tokens", d.max_tokens, "Tokens generated a sample: 20-30.", lower_bound=1)
    flags.DEFINE_enum(
        "split",
        d.split,
        SPLITS,
        "row: by source row, so that the two answers to a question stay together. published: the study's split of "
        "HaluEval by example, half of whose test examples have their twin in train; to compare with its numbers.",
    )
    flags.DEFINE_bool(
        "allow_missing", d.allow_missing, "Go on without examples of the published split that are absent."
    )
    flags.DEFINE_bool("chat_template", d.chat_template, "Ask in the tokenizer's chat template.")
    flags.DEFINE_list("packs", list(d.packs), "Intervention to run under: a pack, or several composed into one.")
    flags.DEFINE_enum(
        "direction",
        d.direction,
        ["auto", "low", "high"],
        "Which scores are risky; auto: as the calibration samples say; low: the published rule, score <= tau.",
    )
    flags.DEFINE_float("min_recall", d.min_recall, "Share of hallucinated answers that a threshold is to find.")
    flags.DEFINE_enum(
        "tau_grid",
        d.tau_grid,
        ["cuts", "quantiles"],
        "Thresholds to try: every distinct score, or 40 quantiles that flag 60% to 99%.",
    )
    for name in ("tau_start", "tau_stop", "tau_step"):
        flags.DEFINE_float(name, getattr(d, name), "With the other two, an even grid of thresholds of hbar_s.")
    flags.DEFINE_float("max_failed", d.max_failed, "Largest share of failed samples that is calibrated on.")
    flags.DEFINE_integer("seed", d.seed, "Of the split, the sample, the folds and the bootstrap.", lower_bound=0)
    flags.DEFINE_integer("batch_size", d.batch_size, "Samples a batch.", lower_bound=1)
    flags.DEFINE_integer("bootstrap_draws", d.bootstrap_draws, "Of intervals.", lower_bound=100)
    flags.DEFINE_string("output_dir", d.output_dir, "Folder of the results.")
    flags.DEFINE_bool("resume", d.resume, "Go on with a killed run of the same plan; --noresume starts anew.")
    flags.DEFINE_bool("build_missing", d.build_missing, "Build steering vectors that packs need and the model lacks.")


def open_log(study: Study) -> results.JsonlLog:
    """The log of this plan in the output folder, with what an earlier run of it finished, but for the signals."""
    partial = f"{study.name}_{results.content_hash(study.description)[:12]}.partial.jsonl"
    path = pathlib.Path(study.settings.output_dir) / partial
    return results.JsonlLog(path, study.description, study.settings.resume, keep=without_signals)


def choices_of(settings: Settings) -> Choices:
    """What the settings say about pass 2."""
    taus = (settings.tau_start, settings.tau_stop, settings.tau_step)
    return Choices(
        min_recall=settings.min_recall,
        direction=settings.direction,
        tau_grid=settings.tau_grid,
        taus=None if None in taus else taus,  # type: ignore[arg-type]
        draws=settings.bootstrap_draws,
        seed=settings.seed,
    )


def run(study: Study, log: results.JsonlLog) -> list[pathlib.Path]:
    """Both passes; returns the paths written. Raises ValueError where too many samples failed; the log stays."""
    with log:
        samples = watched(study.watcher, log, study.settings.max_failed)
        findings, values = calibrate(samples, choices_of(study.settings))
        return write_calibration(study, samples, findings, values, log)


def main(_: Sequence[str]) -> None:
    paths.enable_compilation_cache()
    settings = nm_flags.filled(Settings)
    try:
        study = prepare(settings)
        run(study, open_log(study))
    except (ValueError, OSError) as error:
        sys.exit(f"{CALIBRATE}: {error}")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
