"""The introspection study from data to page: five trainings, the battery, and what becomes of the predictions.

Method. One model learns to detect that its activations were steered, one the same in vague words, one with the least
adapter there is; a control is asked about food, another learns labels that say nothing. All train equally long, with
equal seeds. Then all of them, and the base, are asked the same questions.

    python -m experiments.introspection                              # the bundled model, on two cores
    python -m experiments.introspection --preset=qwen32b --parallel=4    # as published, a training on each of four GPUs

Every stage that is done stays done: the same command goes on where it was killed.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

import models
from experiments import introspection_data, introspection_eval
from experiments.introspecting import evaluation
from experiments.introspecting.report import Report
from experiments.introspecting.training import Training, read_training
from experiments.introspecting.training_settings import PRESETS, TrainingSettings, make_settings
from models.families import read_config
from models.files import find, read_json
from nmjax import flags as nm_flags
from nmjax import paths
from nmjax.data.introspection import WORDINGS
from nmjax.report import results

NAME = "introspection"
VARIANTS = ("original", "vague_prompt", "r1_minimal", "food_control", "flipped_labels")


@dataclasses.dataclass(frozen=True)
class Study:
    """A run of all stages.

    Attributes:
      preset: of the training and of the evaluation.
      variants: to train.
      seed: of the trainings and the battery.
      steps: of each training; None is the preset's.
      parallel: trainings at a time, each in a process of its own, with a GPU of its own where there are any.
      suites: to ask.
      output: gets `data/<variant>`, `adapters/<variant>`, and the battery's files.
    Raises:
      ValueError: a value out of range.
    """

    preset: str = "tiny"
    variants: tuple[str, ...] = VARIANTS
    seed: int = 0
    steps: int | None = None
    parallel: int = 1
    suites: tuple[str, ...] = evaluation.SUITES
    output: str = f"results/{NAME}"

    def __post_init__(self):
        unknown = [variant for variant in self.variants if variant not in WORDINGS]
        if unknown or not self.variants or len(set(self.variants)) < len(self.variants):
            raise ValueError(f"variants={list(self.variants)}, wanted different ones of {list(WORDINGS)}")
        if self.parallel < 1:
            raise ValueError(f"parallel={self.parallel}, wanted 1 or more")
        self.evaluation(), [self.training(variant) for variant in self.variants]  # noqa: B018  they check themselves

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.output)

    def training(self, variant: str) -> TrainingSettings:
        """Of one variant; what differs between variants is what the study compares."""
        changes: dict[str, Any] = {
            "variant": variant,
            "seed": self.seed,
            "data": str(self.folder / "data" / variant),
            "output": str(self.folder / "adapters" / variant),
        }
        return make_settings(self.preset, changes | ({} if self.steps is None else {"steps": self.steps}))

    def evaluation(self) -> evaluation.EvaluationSettings:
        sizes = {name: {"seed": self.seed} for name in self.suites}
        adapters = tuple(f"{v}:{v}={self.folder / 'adapters' / v / 'final'}" for v in self.variants)
        changes = {"adapters": adapters, "suites": self.suites, "sizes": sizes}
        return evaluation.make_settings(self.preset, changes)


def make_data(study: Study, layers: int) -> None:
    """The files of all variants, unless they are there. Raises ValueError for lists that can't be read."""
    for variant in study.variants:
        settings = study.training(variant)
        names = {field.name for field in dataclasses.fields(introspection_data.Settings)}
        drawn = {name: value for name, value in dataclasses.asdict(settings).items() if name in names}
        drawn |= {"seed": settings.data_seed, "layers": layers, "output": settings.data}
        wanted = introspection_data.Settings(**drawn)
        summary = pathlib.Path(wanted.output) / "summary.json"
        if not summary.exists() or results.load_json(summary).get("settings") != results.jsonable(wanted):
            introspection_data.run(wanted)


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES calls them; JAX would take them to tell."""
    if "cpu" in (os.environ.get("JAX_PLATFORMS"), os.environ.get("JAX_PLATFORM_NAME")):
        return []
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        # CUDA's own rule: what follows a number below 0 counts for nothing.
        return list(itertools.takewhile(lambda name: name and name[0] != "-", map(str.strip, chosen.split(","))))
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    return re.findall(r"^GPU (\d+):", listed, re.MULTILINE)


def train_side_by_side(study: Study, progress: bool = True) -> None:
    """Every variant in a process of its own, `study.parallel` at a time.

    Raises ValueError for fewer GPUs than that (but not for none), or where a training failed, with the end of what it
    said; the others are stopped, and go on next time.
    """
    settings = {variant: study.training(variant) for variant in study.variants}
    waiting = [variant for variant, one in settings.items() if read_training(pathlib.Path(one.output)) is None]
    devices = gpus()
    if devices and study.parallel > len(devices):
        raise ValueError(
            f"parallel={study.parallel}, wanted at most {len(devices)}, the number of GPUs (JAX_PLATFORMS=cpu does "
            "without them)"
        )
    running: dict[int, tuple[str, subprocess.Popen]] = {}  # by slot
    total, done = 100 * len(waiting), 0
    with tqdm(total=total, unit="%", desc="training", disable=not progress or not waiting) as bar:
        try:
            while waiting or running:
                for slot in range(study.parallel):
                    if slot not in running and waiting:
                        variant = waiting.pop(0)
                        device = devices[slot] if devices else None
                        running[slot] = variant, _start(settings[variant], device, study.preset)
                time.sleep(1)
                for slot, (variant, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[slot]
                    done += 100
                    if process.returncode:
                        said = _log(settings[variant]).read_text(errors="replace")[-2000:]
                        raise ValueError(f"the training of {variant} failed: {said}")
                now = done + sum(_percent(settings[variant]) for variant, _ in running.values())
                bar.update(max(0, now - bar.n))
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()


def _start(settings: TrainingSettings, device: str | None, preset: str) -> subprocess.Popen:
    """The training as a process that sees this GPU only."""
    command = [sys.executable, "-m", "experiments.introspection_train", f"--preset={preset}"]
    for name, value in dataclasses.asdict(settings).items():
        if value is not None and name != "output":
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            command.append(f"--{name}={text}")
    folder = pathlib.Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    command.append(f"--output={folder.parent}")
    environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    with open(_log(settings), "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _log(settings: TrainingSettings) -> pathlib.Path:
    return pathlib.Path(settings.output) / "training.log"


def _percent(settings: TrainingSettings) -> int:
    """How far a process is, by the bar in its log."""
    found = re.findall(rb"(\d+)%\|", _log(settings).read_bytes()[-4096:])
    return int(found[-1]) if found else 0


def run(study: Study, progress: bool = True) -> tuple[Report, list[pathlib.Path]]:
    """All stages; the report, and what was written. Raises ValueError for what can't be had or doesn't fit."""
    settings = study.evaluation()
    make_data(study, read_config(read_json(find(settings.model) / "config.json")).layers)
    if study.parallel > 1:
        train_side_by_side(study, progress)  # before this process takes a device for itself
    base = models.load(settings.model, settings.dtype, host=True)
    trainings = [Training(study.training(variant), base) for variant in study.variants]  # all are checked first
    for one in trainings:
        one.run(progress)
    return introspection_eval.run(settings, models.load(settings.model, settings.dtype), study.folder, progress)


def define_flags() -> None:
    d = Study()
    flags.DEFINE_enum("preset", d.preset, list(PRESETS), "tiny: the bundled model; qwen32b: as published.")
    flags.DEFINE_list("variants", list(d.variants), "What to train.")
    flags.DEFINE_integer("seed", d.seed, "Of the trainings and the battery.", lower_bound=0)
    flags.DEFINE_integer("steps", d.steps, "Of each training; default: the preset's.")
    flags.DEFINE_integer(
        "parallel", d.parallel, "Trainings at a time, each a process of its own with a GPU of its own."
    )
    flags.DEFINE_list("suites", list(d.suites), "What to ask, see introspection_eval.")
    flags.DEFINE_string("output", d.output, "Folder of the results.")


def main(_: Sequence[str]) -> None:
    paths.enable_compilation_cache()
    try:
        given = nm_flags.filled(Study)
        study = dataclasses.replace(given, variants=tuple(given.variants), suites=tuple(given.suites))
        introspection_eval.announce(*run(study))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{NAME}: {error}")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
