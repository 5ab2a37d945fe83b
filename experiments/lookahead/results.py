"""What a comparison leaves: the published fields and what was missing in them, to JSON and back."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from experiments.lookahead import config as configuration
from experiments.lookahead.config import ConfidenceExperimentConfig
from nmjax.report import results


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """One model of one seed.

    Attributes:
      final_train_loss, final_eval_loss, best_eval_loss: next-token loss in nats, of the last batch and of held-out text
        (None before the first evaluation).
      loss_history: a dictionary for each evaluation: step, flops (so far), train_loss, lr, eval_loss, perplexity, and
        of a confidence model eval_loss_zeros, _shuffled and _constant (told something else than its own predictions),
        mse, r2, pearson (of predictions and future losses), told_error.
      token_loss_history: loss_lm of every step.
      training_time: seconds, of a share of the time in which all seeds trained.
    """

    model_type: str
    seed: int
    final_train_loss: float
    final_eval_loss: float | None
    final_perplexity: float | None
    best_eval_loss: float | None
    best_perplexity: float | None
    loss_history: list[dict[str, float]]
    token_loss_history: list[float]
    training_time: float


@dataclasses.dataclass(frozen=True)
class ConfidenceTrainingResult(TrainingResult):
    """A confidence model of one seed.

    Attributes:
      confidence_loss_history, total_loss_history: of every step.
      confidence_predictions, actual_future_losses: of every step, the means over its batch.
      held_out_sample: `predicted` and `actual` of some held-out tokens, for a scatter plot.
    """

    confidence_loss_history: list[float] = dataclasses.field(default_factory=list)
    total_loss_history: list[float] = dataclasses.field(default_factory=list)
    confidence_predictions: list[float] = dataclasses.field(default_factory=list)
    actual_future_losses: list[float] = dataclasses.field(default_factory=list)
    held_out_sample: dict[str, list[float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ConfidenceExperimentResults:
    """A whole comparison.

    Attributes:
      standard_model_results, confidence_model_results: a list with one result, by seed as text.
      untold_model_results: of the confidence model that trained alike and was told nothing; may be empty.
      equal_flops_results: of the baseline that trained until it had cost what the confidence model did; may be empty.
      training_time, parameter_counts, flops_per_step: by model.
      data: tokens, documents and hashes.
      findings: what the analysis makes of the held-out tokens; empty in an intermediate file.
      identity: see `nmjax.report.results.run_identity`.
    """

    standard_model_results: dict[str, list[TrainingResult]]
    confidence_model_results: dict[str, list[ConfidenceTrainingResult]]
    config: ConfidenceExperimentConfig
    timestamp: str
    training_time: dict[str, float]
    parameter_counts: dict[str, int] = dataclasses.field(default_factory=dict)
    untold_model_results: dict[str, list[ConfidenceTrainingResult]] = dataclasses.field(default_factory=dict)
    equal_flops_results: dict[str, list[TrainingResult]] = dataclasses.field(default_factory=dict)
    flops_per_step: dict[str, float] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    findings: dict[str, Any] = dataclasses.field(default_factory=dict)
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> ConfidenceExperimentResults:
        """Reads what `to_dict` made. Raises ValueError for fields that are missing or that there are none of."""
        values = dict(_checked(cls, stored))
        values["config"] = configuration.from_dict(stored["config"])
        for name, kind in (
            ("standard_model_results", TrainingResult),
            ("confidence_model_results", ConfidenceTrainingResult),
            ("untold_model_results", ConfidenceTrainingResult),
            ("equal_flops_results", TrainingResult),
        ):
            values[name] = {
                seed: [kind(**_checked(kind, result)) for result in by_seed]
                for seed, by_seed in stored.get(name, {}).items()
            }
        return cls(**values)


def save_results(found: ConfidenceExperimentResults, path: str | pathlib.Path) -> pathlib.Path:
    """Writes a results file, atomically; returns its path."""
    return results.write_json(path, found.to_dict())


def load_results(path: str | pathlib.Path) -> ConfidenceExperimentResults:
    """Reads a results file. Raises FileNotFoundError, or ValueError for anything else than one, naming the file."""
    stored = results.load_json(path)
    try:
        return ConfidenceExperimentResults.from_dict(stored)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of this experiment: {error}") from error


def _checked(kind: type, stored: Any) -> dict[str, Any]:
    if not isinstance(stored, dict):
        raise ValueError(f"wanted the fields of a {kind.__name__}, got {type(stored).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    needed = {name for name, field in fields.items() if field.default_factory is field.default is dataclasses.MISSING}
    if unknown := sorted(stored.keys() - fields.keys()):
        raise ValueError(f"{kind.__name__} has the fields {unknown}; wanted some of {sorted(fields)}")
    if missing := sorted(needed - stored.keys()):
        raise ValueError(f"{kind.__name__} lacks the fields {missing}")
    return stored
