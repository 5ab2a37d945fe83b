"""The whole battery of calibration measures for several conditions on the same questions, with honest uncertainty.

Means (accuracy, confidence, Brier, NLL) have bootstrap percentile intervals. ECE and MCE, whose true value can be 0 and
whose plug-in value never is, have their distribution under perfect calibration and a debiased value instead. Every
condition is compared with the baseline within the same bootstrap draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike

from nmjax.metrics import calibration, stats

MEANS = {
    "accuracy": calibration.accuracy,
    "confidence": calibration.mean_confidence,
    "overconfidence": calibration.overconfidence,
    "brier_score": calibration.brier_top_label,
    "brier_multiclass": calibration.brier_multiclass,
    "nll": calibration.nll,
}
"""Metrics that are means over questions. `brier_score` is the top-label one, as the studies we follow name it."""

BINNED = ("ece", "mce")


@dataclasses.dataclass(frozen=True)
class Battery:
    """What was measured: `profiles` [P], `differences` [P] (None for the baseline), as plain dictionaries for JSON;
    `bins` [P] and `bands` [P] as arrays for diagrams."""

    profiles: list[dict]
    differences: list[dict | None]
    bins: list[calibration.ReliabilityBins]
    bands: list[calibration.ConsistencyBand]


def measure(
    probs: ArrayLike,
    labels: ArrayLike,
    baseline: int = 0,
    draws: int = stats.DRAWS,
    seed: int = 0,
    strata: Sequence[object] | None = None,
    n_bins: int = 10,
    level: float = stats.LEVEL,
) -> Battery:
    """Measure P conditions on the same N questions.

    Args:
      probs: [P, N, C], a distribution over the choices for each condition and question.
      labels: [N], the right choice.
      baseline: the condition that the others are compared with.
      draws, seed, strata: of the bootstrap (`stats.bootstrap_weights`); also draws and seed of the consistency bands.
      n_bins: equal-width bins of ECE, MCE and the diagrams.
      level: share that intervals and bands hold.

    Raises ValueError for bad shapes or values, naming the argument.
    """
    p, y = np.asarray(probs), np.asarray(labels)
    if p.ndim != 3:
        raise ValueError(f"probs has shape {p.shape}; wanted [P, N, C]")
    if not 0 <= baseline < len(p):
        raise ValueError(f"baseline is {baseline}; wanted 0 to {len(p) - 1}")
    conditions = [calibration.check_probs(condition, y)[0] for condition in p]

    def statistic(weights: np.ndarray) -> np.ndarray:
        columns = [
            [*(metric(c, y, weights) for metric in MEANS.values()), *calibration.binned_errors(c, y, weights, n_bins)]
            for c in conditions
        ]
        return np.moveaxis(np.asarray(columns), -1, 0)

    samples = stats.bootstrap(statistic, len(y), draws, seed, strata)  # [draws, P, metrics]
    values = statistic(np.ones((1, len(y))))[0]  # [P, metrics]
    bins = [calibration.reliability_bins(c, y, n_bins) for c in conditions]
    bands = [
        calibration.consistency_band(calibration.top_label(c, y)[0], n_bins, draws, seed, level) for c in conditions
    ]
    profiles = [
        _profile(c, y, values[k], samples[:, k], bins[k], bands[k], n_bins, level) for k, c in enumerate(conditions)
    ]
    differences = [
        None if k == baseline else _difference(values, samples, k, baseline, bands, level) for k in range(len(p))
    ]
    return Battery(profiles, differences, bins, bands)


def _profile(probs, labels, values, samples, bins, band, n_bins, level) -> dict:
    names = [*MEANS, *BINNED]
    low, high = stats.percentile_interval(samples[:, : len(MEANS)], level)
    return {
        **{name: float(value) for name, value in zip(names, values, strict=True)},
        "num_samples": len(labels),
        "intervals": {name: [float(low[k]), float(high[k])] for k, name in enumerate(MEANS)},
        "interval_level": level,
        "debiased_ece": calibration.debiased_ece(probs, labels, n_bins),
        "debiased_mce": calibration.debiased_mce(probs, labels, n_bins),
        "debiased_l2": calibration.debiased_l2(probs, labels, n_bins),
        "debiased_l2_squared": calibration.debiased_l2_squared(probs, labels, n_bins),
        "under_perfect_calibration": {
            name: {
                "band": list(band.interval(name)),
                "mean": band.mean(name),
                "p_value": band.p_value(name, float(values[names.index(name)])),
            }
            for name in BINNED
        },
        "calibration_bins": {f"bin_{b}": _bin(bins, band, b) for b in range(n_bins)},
    }


def _bin(bins: calibration.ReliabilityBins, band: calibration.ConsistencyBand, b: int) -> dict:
    empty = bins.counts[b] == 0
    return {
        "low": float(bins.edges[b]),
        "high": float(bins.edges[b + 1]),
        "count": int(bins.counts[b]),
        "prop": float(bins.counts[b] / bins.counts.sum()),
        "confidence": None if empty else float(bins.confidence[b]),
        "accuracy": None if empty else float(bins.accuracy[b]),
        "accuracy_if_calibrated": None if empty else [float(band.accuracy_low[b]), float(band.accuracy_high[b])],
    }


def _difference(values, samples, k: int, baseline: int, bands, level: float) -> dict:
    """Condition `k` minus the baseline, for every metric: the difference and its paired interval."""
    result = {}
    for m, name in enumerate([*MEANS, *BINNED]):
        estimate, paired = float(values[k, m] - values[baseline, m]), samples[:, k, m] - samples[:, baseline, m]
        if name in MEANS:
            low, high = map(float, stats.percentile_interval(paired, level))
        else:
            ours, theirs = (_largest_bias(name, values[c, m], samples[:, c, m], bands[c]) for c in (k, baseline))
            low, high = stats.bounded_bias_interval(paired, estimate, (-theirs, ours), level)
        result[name] = {"difference": estimate, "interval": [low, high]}
    return result


def _largest_bias(name: str, value: float, samples: np.ndarray, band: calibration.ConsistencyBand) -> float:
    """Upper bound of the upward bias of a plug-in ECE or MCE.

    It is largest under perfect calibration. For ECE the bootstrap knows better: its draws exceed the estimate by
    sqrt(2) - 1 = 0.41 of the bias there (resampling doubles the variance), and by more of it elsewhere, so three times
    that excess bounds it. The resulting 95% intervals of differences covered the truth in 0.94 to 1.00 of simulated
    studies with N = 100 to 1000, conditions from calibrated to far off; a maximum over bins has no such rule.
    """
    largest = band.mean(name)
    return min(largest, 3 * max(float(samples.mean()) - value, 0.0)) if name == "ece" else largest
