"""What decides a training of the introspection study; the defaults are the published ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from nmjax.data.introspection import WORDINGS
from nmjax.data.introspection_split import SplitConfig
from nmjax.training import lora
from nmjax.training.introspection import IntrospectionLoss
from nmjax.training.loop import TrainConfig

NAME = "introspection_train"
SCHEDULES = ("linear", "cosine")


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """One training; the defaults are the published ones.

    Attributes:
      model, dtype: the base, and the dtype of its parameters; None is as they are stored.
      variant: a key of `nmjax.data.introspection.WORDINGS`.
      data: folder with train.jsonl, val.jsonl and, if it has one, test.jsonl, or None: records are drawn as
        `SplitConfig` says, from `lists`, `data_seed`, `n`, `vectors`, `magnitudes`, `noise`, `systems`, `sentences`.
      vectors_seed: of the unit vectors.
      lora_r: rank; None is 16, and 1 for r1_minimal. lora_alpha: None is twice the rank.
      lora_targets, lora_dropout, rslora: as in `LoraConfig`.
      loss, kl_to_base, segments: as in `IntrospectionLoss`.
      steps: None is `epochs` of the training records. Variants of equal sizes train for equally many.
      batch_size: records a step, in `accumulate` parts.
      lr, warmup, schedule: peak, steps of linear growth, and how it falls to 0 from there.
      seed: of the adapter's start, the order of records and dropout.
      eval_every, eval_records: steps between two validations, and on how many records.
      save_every: steps between two checkpoints, each with an adapter of its own.
      steps_per_call: that one compiled call scans over.
    Raises:
      ValueError: a value out of range.
    """

    model: str = "Qwen/Qwen2.5-Coder-32B-Instruct"
    dtype: str | None = None
    variant: str = "original"
    data: str | None = None
    lists: str = "bundled"
    data_seed: int = 42
    n: int = 10_000
    vectors: int = 200
    vectors_seed: int = 42
    magnitudes: tuple[float, ...] = SplitConfig.magnitudes
    noise: float = SplitConfig.noise
    systems: float = SplitConfig.systems
    sentences: int = SplitConfig.sentences
    lora_r: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    lora_dropout: float = 0.05
    rslora: bool = False
    loss: str = "pair"
    kl_to_base: float = 0.0
    segments: int = 2
    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    warmup: int = 100
    schedule: str = "linear"
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 200
    eval_records: int = 200
    save_every: int = 500
    steps_per_call: int = 1
    mesh: str = ""
    output: str = f"results/{NAME}"

    def __post_init__(self):
        if self.variant not in WORDINGS:
            raise ValueError(f"variant={self.variant!r}, wanted one of {list(WORDINGS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}, wanted one of {list(SCHEDULES)}")
        for name in ("batch_size", "accumulate", "eval_every", "eval_records", "save_every", "steps_per_call"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, wanted 1 or more")
        for name in ("eval_every", "save_every"):
            if getattr(self, name) % self.steps_per_call:
                wanted = f"a multiple of steps_per_call={self.steps_per_call}"
                raise ValueError(f"{name}={getattr(self, name)}, wanted {wanted}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate}, wanted a divisor of batch_size={self.batch_size}")
        for name in ("lr", "epochs", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}, wanted a number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay}, wanted a number of at least 0")
        if self.warmup < 0 or (self.steps is not None and self.steps < 1):
            raise ValueError(f"warmup={self.warmup}, steps={self.steps}, wanted at least 0 and 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}, wanted 0 to 2^32 - 1")
        self.lora, self.objective  # noqa: B018  they check what they are made of

    @property
    def lora(self) -> lora.LoraConfig:
        r = (1 if self.variant == "r1_minimal" else 16) if self.lora_r is None else self.lora_r
        return lora.LoraConfig(r, self.lora_alpha, self.lora_targets, self.rslora, self.lora_dropout)

    @property
    def objective(self) -> IntrospectionLoss:
        return IntrospectionLoss(self.loss, self.kl_to_base, self.segments)

    def recipe(self, records: int) -> TrainConfig:
        """Of the training loop, for so many training records. Raises ValueError for too short a run."""
        steps = self.steps or int(records * self.epochs / self.batch_size)
        steps -= steps % self.steps_per_call
        if steps <= self.warmup:
            raise ValueError(f"steps={steps} (a multiple of steps_per_call), wanted more than warmup={self.warmup}")
        return TrainConfig(
            steps=steps,
            peak_lr=self.lr,
            warmup=self.warmup,
            decay=steps - self.warmup if self.schedule == "linear" else 0,
            weight_decay=self.weight_decay,
            b2=0.999,
            clip=self.clip,
            accumulate=self.accumulate,
            scan=self.steps_per_call,
            log_every=min(self.eval_every, 10),
            watch_every=math.gcd(self.eval_every, self.save_every),
            save_every=self.save_every,
            seed=self.seed,
        )


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": "checkpoints/tiny_instruct",
        "lists": "tiny",
        "magnitudes": (200.0, 400.0, 800.0, 1600.0),
        "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "loss": "full",
        "batch_size": 32,
        "steps": 600,
        "lr": 3e-3,
        "warmup": 60,
        "eval_every": 60,
        "save_every": 300,
        "steps_per_call": 10,
    },
    "qwen32b": {},
}
"""What differs from the published settings. The bundled model's residual stream has norms of 150 to 510."""


def make_settings(preset: str, changes: Mapping[str, Any]) -> TrainingSettings:
    """A preset with changes. Raises ValueError for an unknown preset or a value out of range."""
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}, wanted one of {list(PRESETS)}")
    return TrainingSettings(**{**PRESETS[preset], **changes})
