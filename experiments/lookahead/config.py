"""What a comparison of MiniGPT and ConfidenceAwareGPT is made of: the published fields, and ours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from nmjax.training.loop import TrainConfig

FEEDBACKS = ("jacobi", "scan", "zeros", "carry")
POSITIONS = ("all", "last")


@dataclasses.dataclass(frozen=True)
class PretrainingConfig:
    """Model, data and optimizer. The defaults train in minutes on two CPU cores.

    Attributes:
      vocab_size: tokens of a BPE that is trained on the spot; None where `tokenizer` brings its own.
      max_seq_len: L, the tokens of context.
      training_steps: optimizer steps of both models.
      batch_size: rows a step and seed, in `accumulate` parts.
      warmup_steps: None is a twentieth of the steps.
      eval_split_ratio: share of the documents that are held out.
      eval_interval: steps between two evaluations on `eval_batches` held-out batches; 0 evaluates at the end only.
      dataset: 'bundled', a text file or folder, or a hub data set; at most `documents` documents of it.
      tokenizer: 'bpe', 'bundled', or a folder or hub id such as gpt2.
    """

    vocab_size: int | None = 1024
    embed_dim: int = 64
    num_heads: int = 4
    num_layers: int = 2
    max_seq_len: int = 64
    dropout: float = 0.0
    training_steps: int = 600
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int | None = None
    max_grad_norm: float = 1.0
    eval_split_ratio: float = 0.1
    eval_interval: int = 100
    eval_batches: int = 15
    seeds: tuple[int, ...] = (42, 123, 456)
    dataset: str = "bundled"
    documents: int = 6000
    tokenizer: str = "bpe"

    def __post_init__(self):
        object.__setattr__(self, "seeds", tuple(int(seed) for seed in self.seeds))
        positive = ("embed_dim", "num_heads", "num_layers", "max_seq_len", "training_steps", "batch_size", "accumulate",
                    "eval_batches", "documents")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.max_seq_len < 2:
            raise ValueError(f"max_seq_len must be 2 or more, got {self.max_seq_len}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate must divide batch_size={self.batch_size}, got {self.accumulate}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or more different numbers, got {list(self.seeds)}")
        if not 0 < self.eval_split_ratio < 1:
            raise ValueError(f"eval_split_ratio must be between 0 and 1, got {self.eval_split_ratio}")
        if self.eval_interval < 0:
            raise ValueError(f"eval_interval must be 0 or more, got {self.eval_interval}")
        if self.tokenizer == "bpe" and self.vocab_size is None:
            raise ValueError("vocab_size is None, wanted the size of the BPE that is trained on the spot")


@dataclasses.dataclass(frozen=True)
class ConfidenceExperimentConfig(PretrainingConfig):
    """The comparison.

    Attributes:
      confidence_alpha: weight of the confidence loss beside the next-token loss.
      detach_head: the confidence loss trains the head alone, so that what differs from MiniGPT is the signal. As
        published (False) it trains the whole model, which then predicts the next token far worse.
      lookahead_steps: how far ahead the predicted loss lies; 2 is what there is.
      confidence_init_bias: what the head says untrained, in nats; None is ln V.
      results_dir: folder of the results.
      save_interval: steps between two intermediate results files.
      checkpoint_interval: steps between two checkpoints, from which a killed run goes on.
      lookahead: positions with a loss: 'all', or as published the 'last' of a row. The baseline has the same.
      draws, top: which own choices are looked behind; see `nmjax.training.lookahead.Lookahead`.
      feedback: what the model is told while it trains. 'scan': its exact predictions on the same row; 'jacobi': those
        of `jacobi_passes` parallel passes; 'zeros': nothing; 'carry': as published, what it predicted on the batch
        before, which is about other texts.
      untold: also trains the confidence model without telling it anything, which leaves the signal as the only
        difference.
      equal_flops: also trains the baseline for so many steps that it costs what the confidence model does.
      eval_draws: choices a held-out position for its actual future loss, which is the mean of theirs.
      steps_per_call: steps a compiled call scans over; 0 chooses.
      mesh: such as 'data=2,fsdp=4'; empty for one device.
    """

    confidence_alpha: float = 1.0
    detach_head: bool = True
    lookahead_steps: int = 2
    confidence_init_bias: float | None = 2.0
    results_dir: str = "results/confidence_experiments"
    save_interval: int = 100
    checkpoint_interval: int = 100
    lookahead: str = "all"
    draws: int = 1
    top: int = 0
    feedback: str = "jacobi"
    jacobi_passes: int = 1
    untold: bool = True
    equal_flops: bool = True
    eval_draws: int = 4
    steps_per_call: int = 0
    mesh: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.lookahead_steps != 2:
            raise ValueError(f"lookahead_steps must be 2, got {self.lookahead_steps}")
        for name in ("save_interval", "checkpoint_interval", "draws", "jacobi_passes", "eval_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.top < 0:
            raise ValueError(f"top must be 0 or more, got {self.top}")
        if self.lookahead not in POSITIONS:
            raise ValueError(f"lookahead={self.lookahead!r}, wanted one of {POSITIONS}")
        if self.lookahead == "last" and (self.draws, self.top) != (1, 0):
            raise ValueError(f"draws={self.draws}, top={self.top}: lookahead='last' looks behind one draw")
        if self.feedback not in FEEDBACKS:
            raise ValueError(f"feedback={self.feedback!r}, wanted one of {FEEDBACKS}")
        if self.feedback == "carry" and self.accumulate > 1:
            raise ValueError(f"accumulate={self.accumulate}: feedback='carry' wants 1")
        if self.training_steps % self.scan:
            raise ValueError(
                f"steps_per_call must divide training_steps={self.training_steps}, got {self.steps_per_call}"
            )

    @property
    def warmup(self) -> int:
        return self.training_steps // 20 if self.warmup_steps is None else self.warmup_steps

    @property
    def watch_every(self) -> int:
        """Steps between two moments at which something is evaluated or saved."""
        return math.gcd(self.save_interval, self.eval_interval)

    @property
    def scan(self) -> int:
        """Steps a compiled call runs: what is due in between bounds it, and 25 does for a progress bar."""
        if self.steps_per_call:
            return self.steps_per_call
        whole = math.gcd(self.watch_every, self.checkpoint_interval, self.training_steps)
        return max(size for size in range(1, 26) if whole % size == 0)

    def recipe(self, steps: int) -> TrainConfig:
        """The optimizer's settings for a run of `steps` steps: AdamW under a warm-up and a cosine."""
        return TrainConfig(
            steps=steps,
            peak_lr=self.learning_rate,
            warmup=round(self.warmup * steps / self.training_steps),
            weight_decay=self.weight_decay,
            clip=self.max_grad_norm,
            accumulate=self.accumulate,
            scan=math.gcd(self.scan, steps),
            log_every=1,
            watch_every=self.watch_every,
            save_every=self.checkpoint_interval,
        )


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    # What the published run had; its data were ten web pages, of which none was left to train on.
    "published": {
        "vocab_size": None,
        "tokenizer": "gpt2",
        "dataset": "roneneldan/TinyStories",
        "embed_dim": 256,
        "num_heads": 8,
        "num_layers": 6,
        "max_seq_len": 128,
        "batch_size": 4,
        "training_steps": 1000,
        "dropout": 0.1,
        "learning_rate": 3e-4,
        "detach_head": False,
        "seeds": (42, 123, 456),
    },
}


def make_config(preset: str, changes: dict[str, Any]) -> ConfidenceExperimentConfig:
    """A preset with changes. Raises ValueError for an unknown preset or a bad value."""
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}, wanted one of {list(PRESETS)}")
    return ConfidenceExperimentConfig(**{**PRESETS[preset], **changes})


def from_dict(stored: dict[str, Any]) -> ConfidenceExperimentConfig:
    """A configuration as `dataclasses.asdict` and JSON left it. Raises ValueError for fields there are none of."""
    known = {field.name for field in dataclasses.fields(ConfidenceExperimentConfig)}
    if unknown := sorted(stored.keys() - known):
        raise ValueError(f"config has the fields {unknown}; wanted some of {sorted(known)}")
    values: dict[str, Any] = dict(stored)
    if isinstance(values.get("seeds"), Sequence):
        values["seeds"] = tuple(values["seeds"])
    return ConfidenceExperimentConfig(**values)
