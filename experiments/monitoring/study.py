"""What is watched: settings checked, data sampled by source row, prompts encoded, before any compute."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import nmjax
from experiments import needs
from experiments.monitoring.watching import Watcher
from models import checkpoint
from nmjax.data.halueval import published_split
from nmjax.data.judgements import Judgement, read_judgements, sample_rows, split_by_row
from nmjax.metrics import stats
from nmjax.report import results

CALIBRATE, VALIDATE = "calibrate_thresholds", "validate_thresholds"
STATEMENTS = 2000
"""Statements about the bundled world that a study has to choose from, those about well-known facts first."""
SPLITS = ("row", "published")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags of `calibrate_thresholds` say."""

    model: str = "checkpoints/tiny"
    model_name: str | None = None
    dtype: str | None = None
    dataset: str = "bundled"
    tasks: Sequence[str] | None = None
    n_samples: int = 100
    max_tokens: int = 20
    split: str = "row"
    allow_missing: bool = False
    chat_template: bool = False
    packs: Sequence[str] = ("none",)
    direction: str = "auto"
    min_recall: float = 0.9
    tau_grid: str = "cuts"
    tau_start: float | None = None
    tau_stop: float | None = None
    tau_step: float | None = None
    max_failed: float = 0.0
    seed: int = 42
    batch_size: int = 16
    bootstrap_draws: int = stats.DRAWS
    output_dir: str = "calibrated_params"
    resume: bool = True
    build_missing: bool = True


@dataclasses.dataclass(frozen=True)
class ValidationSettings:
    """What the flags of `validate_thresholds` say; what is None is as it was when the thresholds were calibrated."""

    calibrated_params: str | None = None
    model: str | None = None
    dataset: str | None = None
    tasks: Sequence[str] | None = None
    n_samples: int | None = None
    seed: int | None = None
    allow_missing: bool = False
    max_failed: float = 0.0
    batch_size: int = 16
    bootstrap_draws: int = stats.DRAWS
    output_dir: str = f"results/{VALIDATE}"
    resume: bool = True
    build_missing: bool = True


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that decides the numbers, ready to run."""

    name: str  # of the experiment
    settings: Settings  # of pass 1: those of the calibration, for a validation too
    model: str
    watcher: Watcher
    data: dict  # how the samples were drawn, and which source rows they are
    description: dict  # a log with another one belongs to another run
    model_hash: str


def prepare(settings: Settings) -> Study:
    """The calibration that the settings ask for. Raises ValueError or OSError for whatever is wrong with them."""
    check(settings)
    pool = read(settings)
    if settings.split == "published":
        judgements, missing = published_split(pool, "train", settings.n_samples, settings.allow_missing)
    else:
        judgements, missing = sample_rows(halves(pool, settings.seed)[0], settings.n_samples, settings.seed), {}
    data = {
        "dataset": settings.dataset,
        "tasks": settings.tasks,
        "split": settings.split,
        "half": 0,
        "split_seed": settings.seed,
        "sample_seed": settings.seed,
        "missing_by_task": missing,
        "ids": [j.id for j in judgements],
        "rows": sorted({row_key(j) for j in judgements}),
    }
    return _study(CALIBRATE, settings, judgements, data)


def prepare_validation(settings: ValidationSettings, calibrated: Mapping[str, Any]) -> Study:
    """The held-out samples for thresholds that were calibrated: by default all of the other half of the same split.

    Raises ValueError for samples whose source row was calibrated on, and as `prepare`.
    """
    before, drawn = calibrated["identity"]["config"], calibrated["data"]
    seed = drawn["sample_seed"] if settings.seed is None else settings.seed
    same = settings.dataset in (None, drawn["dataset"])
    asked = Settings(
        **{
            **before,
            "model": settings.model or before["model"],
            "dataset": settings.dataset or drawn["dataset"],
            "tasks": settings.tasks or (drawn["tasks"] if same else None),
            "allow_missing": settings.allow_missing,
            "max_failed": settings.max_failed,
            "batch_size": settings.batch_size,
            "bootstrap_draws": settings.bootstrap_draws,
            "output_dir": settings.output_dir,
            "resume": settings.resume,
            "build_missing": settings.build_missing,
            "seed": drawn["split_seed"],
        }
    )
    check(asked)
    pool = read(asked)
    if asked.split == "published":
        judgements, missing = published_split(pool, "test", settings.n_samples, settings.allow_missing)
        twice = sorted({j.id for j in judgements} & set(drawn["ids"]))
    else:
        held_out = halves(pool, asked.seed)[1] if same else pool
        judgements, missing = sample_rows(held_out, settings.n_samples, seed), {}
        twice = sorted({row_key(j) for j in judgements} & set(drawn["rows"]))
    if twice:
        raise ValueError(
            f"--dataset={asked.dataset}: {len(twice)} of the source rows, {twice[0]!r} among them, were calibrated on; "
            "wanted others (without --dataset: the other half of the split)"
        )
    data = {
        "dataset": asked.dataset,
        "tasks": asked.tasks,
        "split": asked.split,
        "half": 1 if same else None,
        "split_seed": asked.seed,
        "sample_seed": seed,
        "missing_by_task": missing,
        "ids": [j.id for j in judgements],
        "rows": sorted({row_key(j) for j in judgements}),
        "rows_calibrated_on": len({row_key(j) for j in judgements} & set(drawn["rows"])),
    }
    return _study(VALIDATE, asked, judgements, data)


def check(settings: Settings) -> None:
    """Raises ValueError for numbers that nothing can be done with."""
    if not 0 < settings.min_recall < 1:
        raise ValueError(f"--min_recall={settings.min_recall}; wanted a share between 0 and 1")
    if not 0 <= settings.max_failed < 1:
        raise ValueError(f"--max_failed={settings.max_failed}; wanted a share from 0 to below 1")
    ends = {name: getattr(settings, name) for name in ("tau_start", "tau_stop", "tau_step")}
    given = {name: value for name, value in ends.items() if value is not None}
    if given and (len(given) < 3 or not ends["tau_step"] > 0 or not ends["tau_stop"] >= ends["tau_start"]):
        seen = " ".join(f"--{name}={value}" for name, value in given.items())
        raise ValueError(f"{seen}; wanted --tau_start, --tau_stop not below it and --tau_step above 0, or none of them")


def read(settings: Settings) -> list[Judgement]:
    """All judgements of the data set."""
    return read_judgements(settings.dataset, settings.tasks, settings.seed, STATEMENTS)


def halves(pool: Sequence[Judgement], seed: int) -> list[list[Judgement]]:
    """The half of the source rows that thresholds are calibrated on, and the half that they are validated on."""
    return split_by_row(pool, seed)


def row_key(judgement: Judgement) -> str:
    """Which source row a judgement is of, by its texts: the same from the hub, from a file and from a part of it."""
    shown = results.content_hash(judgement.fields)[:16] if judgement.fields else str(judgement.row)
    return f"{judgement.task} {shown}"


def slug(model: str) -> str:
    """A model's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).strip("-.")


def _study(name: str, settings: Settings, judgements: list[Judgement], data: dict) -> Study:
    folder = checkpoint.find(settings.model)
    lm = checkpoint.load(folder, dtype=settings.dtype)
    if lm.tokenizer is None:
        raise ValueError(f"{settings.model} has no tokenizer; wanted one, prompts are text")
    packs = [nmjax.load_pack(pack) for pack in settings.packs]
    if not packs:
        raise ValueError("--packs is empty; wanted one pack or more, 'none' for none")
    provided = needs.provide(lm, packs, settings.build_missing)
    pack = packs[0] if len(packs) == 1 else nmjax.compose(*packs, name="+".join(settings.packs))
    watcher = Watcher(lm, pack, judgements, settings.max_tokens, settings.chat_template, settings.batch_size)
    model_hash = results.path_hash(folder)
    description = {
        "experiment": name,
        "model": model_hash,
        "dtype": settings.dtype,
        "pack": pack.content_hash(),
        "provided": provided,
        "judgements": results.content_hash([dataclasses.asdict(j) for j in judgements]),
        "num_samples": len(judgements),
        "max_tokens": settings.max_tokens,
        "chat_template": settings.chat_template,
        "batch_size": settings.batch_size,
        "versions": results.versions(),
    }
    return Study(name, settings, slug(settings.model_name or settings.model), watcher, data, description, model_hash)
