"""Calibrated thresholds on samples that they have not seen: never re-tuned, and whether the recall was kept.

By default the samples are the other half of the source rows, so that no question that was calibrated on comes again
with its other answer. Directions, weights and thresholds are those of the file.

    python -m experiments.validate_thresholds --calibrated_params=calibrated_params/<file>.json
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments.calibrate_thresholds import choices_of, open_log
from experiments.monitoring.analysis import held_out
from experiments.monitoring.output import load_calibration, write_validation
from experiments.monitoring.study import VALIDATE, Study, ValidationSettings, prepare_validation
from experiments.monitoring.watching import watched
from nmjax import flags as nm_flags
from nmjax import paths
from nmjax.report import results


def define_flags() -> None:
    d = ValidationSettings()
    flags.DEFINE_string("calibrated_params", d.calibrated_params, "File that calibrate_thresholds wrote.")
    flags.DEFINE_string("model", d.model, "Checkpoint: a folder, or a hub id; default: the calibrated one.")
    flags.DEFINE_string("dataset", d.dataset, "As in calibrate_thresholds; default: the other half of the split there.")
    flags.DEFINE_list("tasks", d.tasks, "Only these tasks; default: as calibrated.")
    flags.DEFINE_integer("n_samples", d.n_samples, "Samples of the held-out rows; default: all.", lower_bound=1)
    flags.DEFINE_integer("seed", d.seed, "Which of the held-out rows are drawn; default: as calibrated.", lower_bound=0)
    flags.DEFINE_bool(
        "allow_missing", d.allow_missing, "Go on without examples of the published split that are absent."
    )
    flags.DEFINE_float("max_failed", d.max_failed, "Largest share of failed samples that is validated on.")
    flags.DEFINE_integer("batch_size", d.batch_size, "Samples a batch.", lower_bound=1)
    flags.DEFINE_integer("bootstrap_draws", d.bootstrap_draws, "Of intervals.", lower_bound=100)
    flags.DEFINE_string("output_dir", d.output_dir, "Folder of the results.")
    flags.DEFINE_bool("resume", d.resume, "Go on with a killed run of the same plan; --noresume starts anew.")
    flags.DEFINE_bool("build_missing", d.build_missing, "Build steering vectors that packs need and the model lacks.")


def run(
    study: Study, log: results.JsonlLog, calibrated: Mapping[str, Any], settings: ValidationSettings
) -> list[pathlib.Path]:
    """Watch and measure; returns the paths written. Raises ValueError where too many samples failed; the log stays."""
    with log:
        samples = watched(study.watcher, log, settings.max_failed)
        findings, values = held_out(samples, calibrated, choices_of(study.settings))
        return write_validation(study, samples, findings, values, log, settings)


def main(_: Sequence[str]) -> None:
    paths.enable_compilation_cache()
    settings = nm_flags.filled(ValidationSettings)
    try:
        calibrated = load_calibration(settings.calibrated_params)
        study = prepare_validation(settings, calibrated)
        run(study, open_log(study), calibrated, settings)
    except (ValueError, OSError) as error:
        sys.exit(f"{VALIDATE}: {error}")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
