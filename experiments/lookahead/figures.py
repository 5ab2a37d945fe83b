"""The figures of a comparison, each with its caption and what it shows in words, from a results file alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.lookahead.analysis import OWN
from experiments.lookahead.arms import CONFIDENCE, EQUAL_FLOPS, STANDARD, UNTOLD
from experiments.lookahead.claims import NAMES
from experiments.lookahead.evaluation import TOLD
from experiments.lookahead.results import ConfidenceExperimentResults, TrainingResult
from nmjax.report.plots_prediction import PredictionPanel, prediction_figure
from nmjax.report.plots_training import (
    Curve,
    CurvePanel,
    DifferencePanel,
    block_means,
    costs_figure,
    curves_figure,
    differences_figure,
)
from nmjax.report.tables import number

ARMS = {
    STANDARD: "MiniGPT",
    CONFIDENCE: "ConfidenceAwareGPT",
    UNTOLD: "the same without the signal",
    EQUAL_FLOPS: "MiniGPT, equal FLOPs",
}
"""How the models are printed."""
MOST_SEEDS = 6  # of which a scatter plot is drawn

Figure = tuple[str, bytes, str]  # caption, PNG, what it shows in words


def draw(found: ConfidenceExperimentResults) -> dict[str, Figure]:
    """By short name, those that the results allow: without findings there are curves only."""
    seen = {name for name, results in trained(found).items() if results[0].loss_history}
    figures = {}
    if found.findings:
        figures["differences"] = _differences(found)
    if STANDARD in seen:
        figures["convergence"] = _convergence(found, [name for name in ARMS if name in seen])
    if CONFIDENCE in seen:
        figures["told"] = _told(found)
    if found.findings:
        figures["calibration"] = _calibration(found)
    if CONFIDENCE in seen:
        figures["signal"] = _signal(found)
    if trained(found):
        figures |= {"training": _training(found), "cost": _costs(found)}
    return figures


def trained(found: ConfidenceExperimentResults) -> dict[str, list[TrainingResult]]:
    """By model that has begun to train, the results of its seeds."""
    by_arm: dict[str, Mapping[str, Sequence[TrainingResult]]] = {
        STANDARD: found.standard_model_results,
        CONFIDENCE: found.confidence_model_results,
        UNTOLD: found.untold_model_results,
        EQUAL_FLOPS: found.equal_flops_results,
    }
    return {name: [results[0] for results in by_seed.values()] for name, by_seed in by_arm.items() if by_seed}


def costs(found: ConfidenceExperimentResults, name: str) -> dict[str, float]:
    """What one seed of a model cost, by kind."""
    result, flops = trained(found)[name][0], found.flops_per_step.get(name, 0.0)
    return {
        "parameters": found.parameter_counts.get(name, 0),
        "FLOPs a step": flops,
        "FLOPs in all": flops * len(result.token_loss_history),
        "seconds a seed": result.training_time,
    }


# --- Held-out text ----------------------------------------------------------------------------------------------------


def _curve(found: ConfidenceExperimentResults, arm: str, y: str, x: str = "step", less: str | None = None) -> Curve:
    """What the evaluations of a model say: `y` by `x`, less another of their quantities."""

    def measured(name: str) -> np.ndarray:
        histories = [result.loss_history for result in trained(found)[arm]]
        return np.array([[evaluation[name] for evaluation in history] for history in histories], float)

    return Curve(measured(x)[0], measured(y) - (measured(less) if less else 0))


def _differences(found: ConfidenceExperimentResults) -> Figure:
    f = found.findings["differences"]
    panels = [
        DifferencePanel("against itself, told", {NAMES[name]: f[name] for name in TOLD}),
        DifferencePanel("against the baseline", {NAMES[name]: f[name] for name in f if name not in TOLD}),
    ]
    told = "; ".join(f"{NAMES[name]} {number(f[name]['mean'], 4, sign=True)}" for name in f)
    return (
        "Held-out loss of ConfidenceAwareGPT told its own predictions, less that of each row. Left of the dashed line, "
        "the signal helps. Mind the scales, which differ.",
        differences_figure(panels, "difference in next-token loss, nats", digits=4),
        f"Differences in held-out loss with intervals: {told}",
    )


def _convergence(found: ConfidenceExperimentResults, arms: list[str]) -> Figure:
    panels = [
        CurvePanel(title, {ARMS[name]: _curve(found, name, "eval_loss", x) for name in arms}, label)
        for title, x, label in (
            ("held-out loss, nats", "step", "step"),
            ("the same by computation", "flops", "FLOPs of one seed (G: 10^9, T: 10^12, P: 10^15)"),
        )
    ]
    caption = "Next-token loss on held-out text by step and by floating-point operations. Lines: mean over seeds."
    if EQUAL_FLOPS in arms:
        caption += (
            " The baseline of equal FLOPs trains longer under a learning rate that falls later, so it is no "
            "prolongation of the other."
        )
    return caption, curves_figure(panels), f"Curves of held-out loss of {', '.join(ARMS[name] for name in arms)}"


def _told(found: ConfidenceExperimentResults) -> Figure:
    told = {f"told {NAMES[name]}": f"eval_loss_{name}" for name in TOLD}
    losses = {f"told {NAMES[OWN]}": "eval_loss", **told}
    panels = [
        CurvePanel("held-out loss, nats", {name: _curve(found, CONFIDENCE, y) for name, y in losses.items()}),
        CurvePanel(
            "lost by being told something else, nats",
            {name: _curve(found, CONFIDENCE, y, less="eval_loss") for name, y in told.items()},
            zero=True,
        ),
    ]
    return (
        "The same trained model, told its own predictions or something else. Right: how much higher its loss is than "
        "when it is told its own; above the dashed line, its own predictions help it.",
        curves_figure(panels),
        "Curves of held-out loss of ConfidenceAwareGPT by what it is told",
    )


# --- Its predictions --------------------------------------------------------------------------------------------------


def _calibration(found: ConfidenceExperimentResults) -> Figure:
    models = [model for model, *_ in found.confidence_model_results.values()]
    measured = found.findings["quality"]["head"]["by_seed"]
    panels = [
        PredictionPanel(
            f"seed {model.seed}",
            model.held_out_sample["predicted"],
            model.held_out_sample["actual"],
            quality["reliability"],
        )
        for model, quality in zip(models, measured, strict=True)
    ]
    caption = (
        f"Predicted and actual coming loss. Dots: {len(panels[0].predicted):,} held-out tokens; points: ten bins of "
        f"all {found.findings['tokens']:,}, of equal size, whose number of tokens stands below. On the dashed line, "
        "the prediction is right on average."
    )
    if len(panels) > MOST_SEEDS:
        caption += f" Shown: {MOST_SEEDS} of {len(panels)} seeds."
    return (
        caption,
        prediction_figure(panels[:MOST_SEEDS], "predicted loss, nats", "actual loss, nats"),
        "Scatter of predicted against actual loss with the means of ten bins, one panel a seed",
    )


def _signal(found: ConfidenceExperimentResults) -> Figure:
    error, explained = (_curve(found, CONFIDENCE, y) for y in ("told_error", "r2"))
    panels = [
        CurvePanel("signal in training less exact signal, nats", {ARMS[CONFIDENCE]: error}, zero=True),
        CurvePanel("R squared of the predicted loss, held-out", {ARMS[CONFIDENCE]: explained}, zero=True),
    ]
    at_the_end = float(np.asarray(error.values)[:, -1].mean())
    return (
        "Left: how far the signal that the model trains under is from its exact predictions, without the sign, on "
        f"average over held-out tokens (at the end, {number(at_the_end)}). Right: how much of the coming loss the head "
        "explains; 0 is as good as knowing its mean.",
        curves_figure(panels),
        "Curves of the error of the signal and of R squared of the predictions",
    )


# --- Training ---------------------------------------------------------------------------------------------------------


def _training(found: ConfidenceExperimentResults) -> Figure:
    losses = {
        ARMS[name]: block_means([result.token_loss_history for result in results])
        for name, results in trained(found).items()
    }
    panels = [CurvePanel("next-token loss, nats", losses)]
    models = [model for model, *_ in found.confidence_model_results.values()]
    if models:
        confidence, total, predicted, actual = (
            block_means([getattr(model, name) for model in models])
            for name in (
                "confidence_loss_history",
                "total_loss_history",
                "confidence_predictions",
                "actual_future_losses",
            )
        )
        panels += [
            CurvePanel("confidence loss, nats squared", {ARMS[CONFIDENCE]: confidence}, log=True),
            CurvePanel("total loss", {ARMS[CONFIDENCE]: total}, log=True),
            CurvePanel("coming loss, batch mean, nats", {"predicted": predicted, "actual": actual}),
        ]
    return (
        "Losses on the training batches, means of blocks of steps. The confidence loss is the squared error of the "
        "predicted coming loss; the total is what is minimised.",
        curves_figure(panels),
        f"Curves of training losses: {', '.join(panel.title for panel in panels)}",
    )


def _costs(found: ConfidenceExperimentResults) -> Figure:
    by_arm = {ARMS[name]: costs(found, name) for name in trained(found)}
    kinds = next(iter(by_arm.values()))
    return (
        "What each model cost. Seconds are one seed's share of the time that all seeds trained together.",
        costs_figure({kind: {name: cost[kind] for name, cost in by_arm.items()} for kind in kinds}),
        f"Bars of {', '.join(kinds)} by model",
    )
