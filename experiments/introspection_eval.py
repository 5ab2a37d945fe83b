"""Asks a model and adapters to it what they know of themselves: the introspection study's battery.

Method. Every subject answers the same items, side by side in a batch. detection: was something done to its activations,
over a grid of vectors, layer ranges and magnitudes; behavior, identity: what it says of itself; self_prediction,
self_calibration: whether it knows what it would say, and how often; concepts: which concept was injected; localization:
where, and how strongly. Differences to the base are taken item by item; the page says what they mean for the study's
predictions.

    python -m experiments.introspection_eval --adapters original=results/introspection_train/original/final
    python -m experiments.introspection_eval --suite=detection,behavior --preset=qwen32b \\
        --adapters original=Jordine/qwen2.5-coder-32b-introspection-r16

What is done is kept: the same command goes on where it was killed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

import models
from experiments.introspecting.evaluation import (
    CLASSES,
    PRESETS,
    SUITES,
    EvaluationSettings,
    make_battery,
    make_settings,
    read_subjects,
)
from experiments.introspecting.report import Report
from models.checkpoint import DTYPES
from nmjax import flags as nm_flags
from nmjax import paths
from nmjax.lm import LanguageModel
from nmjax.report import results

NAME = "introspection_eval"
# Flags that are a field of the suites that have one of that name.
SIZES = {"seed": "Of all draws.", "batch_size": "Rows run together.", "draws": "Of the bootstrap."}


def define_flags() -> None:
    d = EvaluationSettings()
    flags.DEFINE_enum("preset", "tiny", list(PRESETS), "What other flags change; their defaults are those of qwen32b.")
    flags.DEFINE_string("model", d.model, "The base: a folder in Hugging Face's format, or an id on the hub.")
    flags.DEFINE_enum("dtype", d.dtype, list(DTYPES), "Of the base's parameters; default: as they are stored.")
    flags.DEFINE_list("adapters", list(d.adapters), "NAME=FOLDER or NAME:VARIANT=FOLDER each; folders as PEFT writes.")
    flags.DEFINE_list("suite", list(d.suites), f"Of {', '.join(SUITES)}.")
    flags.DEFINE_string("lists", d.lists, "'bundled', 'tiny' (for the bundled models), or a folder of published lists.")
    flags.DEFINE_list("magnitudes", [f"{m:g}" for m in d.magnitudes], "What a unit vector is multiplied by.")
    flags.DEFINE_integer("concept_layer", d.concept_layer, "Block whose output concept vectors are read from.")
    flags.DEFINE_bool("remove_shared", d.remove_shared, "Take the direction that all concepts share out of them.")
    flags.DEFINE_string("tasks", d.tasks, "Folder of self-prediction tasks, or 'bundled'.")
    flags.DEFINE_integer("n_per_task", None, "Self-prediction items of each task.")
    flags.DEFINE_string("judge", d.judge, "A model that judges which concept an answer is about; default: the base.")
    flags.DEFINE_float("margin", None, "Differences of P(Yes) within it count as none.")
    for name, help_text in SIZES.items():
        flags.DEFINE_integer(name, None, f"{help_text} Default: the suite's own.")
    flags.DEFINE_string("output", f"results/{NAME}", "Folder of the results.")


def settings_of_flags() -> EvaluationSettings:
    """The preset with what the command line changes. Raises ValueError for a bad value."""
    given = flags.FLAGS
    names = {field.name for field in dataclasses.fields(EvaluationSettings)} - {"suites", "sizes"}
    changes: dict[str, Any] = {name: given[name].value for name in names if given[name].present}
    if given["suite"].present:
        changes["suites"] = tuple(given.suite)
    if "adapters" in changes:
        changes["adapters"] = tuple(changes["adapters"])
    if "magnitudes" in changes:
        changes["magnitudes"] = nm_flags.numbers("magnitudes", changes["magnitudes"])
    sizes: dict[str, dict[str, Any]] = {name: {} for name in SUITES}
    for name in ("n_per_task", "margin", *SIZES):
        if given[name].value is not None:
            for suite, (_, config) in CLASSES.items():
                if name in {field.name for field in dataclasses.fields(config)}:
                    sizes[suite][name] = given[name].value
    return make_settings(given.preset, changes | {"sizes": sizes})


def run(
    settings: EvaluationSettings, base: LanguageModel, folder: str | pathlib.Path, progress: bool = True
) -> tuple[Report, list[pathlib.Path]]:
    """Asks everything that has not been asked yet; the report, and the paths of what was written, the results last.

    Raises ValueError for adapters, lists, tasks or a judge that can't be had or don't fit.
    """
    folder = pathlib.Path(folder)
    subjects, trainings = read_subjects(settings, base)
    with tqdm(unit="text", desc="concept vectors", disable=not progress, leave=False) as bar:
        battery = make_battery(settings, subjects, folder / "battery", bar.update)
    findings = battery.run(progress)
    seeds = {name: settings.config(name).seed for name in settings.suites}
    hashes = {"model": base.fingerprint, "subjects": subjects.lm.fingerprint}
    config = dataclasses.asdict(settings) | {"adapters": list(subjects.variants), "folders": list(settings.adapters)}
    identity = results.run_identity(NAME, config, seeds, hashes)
    report = Report(findings, trainings, identity)
    return report, write(report, folder)


def write(report: Report, folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a report."""
    stamp = results.timestamp()
    content: Mapping[str, Any] = {
        "verdicts": report.verdicts().items,
        "findings": report.findings,
        "trainings": report.trainings,
        "identity": report.identity,
    }
    written = [results.write_atomic(folder / f"{NAME}_summary_{stamp}.txt", report.text())]
    for name, png in report.pictures().items():
        written.append(results.write_atomic(folder / f"{NAME}_{stamp}_{name}.png", png))
    written.append(results.write_atomic(folder / f"{NAME}_{stamp}.html", report.html()))
    return [*written, results.write_json(folder / f"{NAME}_{stamp}.json", content)]


def main(_: Sequence[str]) -> None:
    paths.enable_compilation_cache()
    try:
        settings = settings_of_flags()
        report, written = run(settings, models.load(settings.model, settings.dtype), flags.FLAGS.output)
    except (ValueError, OSError) as error:
        sys.exit(f"{NAME}: {error}")
    announce(report, written)


def announce(report: Report, written: Sequence[pathlib.Path]) -> None:
    """Prints the verdicts and where all is."""
    print("\n" + report.verdicts().text())
    print("Written:\n" + "\n".join(f"  {path}" for path in written))


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
