"""The whole battery of calibration measures for several conditions on the same questions, with honest uncertainty.

Means over questions (accuracy, confidence, Brier, NLL, entropy) have bootstrap percentile intervals, and so have AUROC
and AUPRC. ECE and MCE, whose true value can be 0 while the plug-in value never is, have their values under perfect
calibration and a debiased value instead. Every condition is compared with the baseline within the same bootstrap draws,
and by paired tests whose p-values are adjusted for their number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike
from scipy.special import entr

from nmjax.metrics import calibration, paired, ranking, smooth, stats

MEANS = ("accuracy", "confidence", "overconfidence", "brier_score", "brier_multiclass", "nll", "entropy")
"""Metrics that are means over questions. `brier_score` is the top-label one, as the studies we follow name it."""

BINNED = ("ece", "mce")
RANKED = ("auroc", "auprc")
"""How well confidence tells right answers from wrong ones. Undefined where none is right; AUROC also where all are."""

NAMES = (*MEANS, *BINNED, *RANKED)
"""What is bootstrapped, in the order of `Battery.samples`."""

TESTED = ("accuracy", "brier_score", "nll", "confidence", "entropy")
"""The declared family of tests: these, for every condition but the baseline."""


@dataclasses.dataclass(frozen=True)
class Battery:
    """What was measured of P conditions on N questions.

    `profiles` [P] and `differences` [P] (None for the baseline) are plain dictionaries for JSON, None where undefined;
    `bins` [P] and `bands` [P] are for diagrams. The rest is for more statistics within the same draws, M metrics in the
    order of `NAMES`, NaN where undefined: `estimates` [P, M], bootstrap `samples` [draws, P, M], and `largest_bias`
    [P, M], an upper bound of the estimate's upward bias (0 for all but ECE and MCE). `questions` are the values [P, N]
    that the `MEANS` are means of, by name.
    """

    profiles: list[dict]
    differences: list[dict | None]
    bins: list[calibration.ReliabilityBins]
    bands: list[calibration.ConsistencyBand]
    estimates: np.ndarray
    samples: np.ndarray
    largest_bias: np.ndarray
    questions: dict[str, np.ndarray]

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A metric's estimates [P], samples [draws, P] and largest bias [P], as `trend.trend_of_samples` takes them."""
        m = NAMES.index(name)
        return self.estimates[:, m], self.samples[:, :, m], self.largest_bias[:, m]


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

    A profile holds every metric's value, "intervals" of those that have one (bootstrap draws where AUROC or AUPRC is
    undefined are left out), and the diagram's bins. A difference holds {"difference", "interval"} for each of `NAMES`,
    and "tests" for each of `TESTED`: McNemar's for accuracy, else the sign-flip test with Cohen's d_z as the size of
    the effect; "p_adjusted" is Benjamini and Hochberg's over all "family_size" tests of this call. Intervals are not
    adjusted.

    Args:
      probs: [P, N, C], a distribution over the choices for each condition and question.
      labels: [N], the right choice.
      baseline: the condition that the others are compared with.
      draws, seed, strata: of the bootstrap (`stats.bootstrap_weights`); also draws and seed of the consistency bands,
        and the seed of the sign-flip tests.
      n_bins: bins of the binned metrics and the diagrams, for all but "ece_15".
      level: share that intervals and bands hold.

    Raises ValueError for bad shapes or values, naming the argument.
    """
    p, y = np.asarray(probs), np.asarray(labels)
    if p.ndim != 3:
        raise ValueError(f"probs has shape {p.shape}; wanted [P, N, C]")
    if not 0 <= baseline < len(p):
        raise ValueError(f"baseline is {baseline}; wanted 0 to {len(p) - 1}")
    conditions = [calibration.check_probs(condition, y)[0] for condition in p]
    by_condition = [_per_question(c, y) for c in conditions]
    questions = {name: np.stack([columns[name] for columns in by_condition]) for name in MEANS}
    columns = np.stack([questions[name] for name in MEANS], axis=-1)  # [P, N, means]

    def statistic(weights: np.ndarray) -> np.ndarray:  # [R, N] -> [R, P, M]
        values = [
            [*(weights @ columns[k] / len(y)).T, *calibration.binned_errors(c, y, weights, n_bins),
             ranking.auroc(c, y, weights), ranking.auprc(c, y, weights)]
            for k, c in enumerate(conditions)
        ]  # fmt: skip
        return np.moveaxis(np.asarray(values), -1, 0)

    samples, estimates = stats.bootstrap(statistic, len(y), draws, seed, strata), statistic(np.ones((1, len(y))))[0]
    bins = [calibration.reliability_bins(c, y, n_bins) for c in conditions]
    bands = [calibration.consistency_band(c, n_bins, draws, seed, level) for c in questions["confidence"]]
    fine_bands = [calibration.consistency_band(c, 15, draws, seed, level) for c in questions["confidence"]]
    bias = _largest_bias(estimates, samples, bands)
    tests = _tests(questions, baseline, seed)
    return Battery(
        profiles=[
            _profile(c, y, estimates[k], samples[:, k], bins[k], bands[k], fine_bands[k], n_bins, level)
            for k, c in enumerate(conditions)
        ],
        differences=[
            None if k == baseline else _differences(estimates, samples, bias, k, baseline, level) | tests[k]
            for k in range(len(p))
        ],
        bins=bins,
        bands=bands,
        estimates=estimates,
        samples=samples,
        largest_bias=bias,
        questions=questions,
    )


def _per_question(probs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The values [N] whose means are the `MEANS`, as `nmjax.metrics.calibration` defines them."""
    confidence, correct = calibration.top_label(probs, labels)
    right = np.eye(probs.shape[1])[labels]
    return {
        "accuracy": correct,
        "confidence": confidence,
        "overconfidence": confidence - correct,
        "brier_score": (confidence - correct) ** 2,
        "brier_multiclass": ((probs - right) ** 2).sum(axis=1),
        "nll": -np.log(np.clip((probs * right).sum(axis=1), calibration.NLL_FLOOR, 1.0)),
        "entropy": entr(np.minimum(probs, 1.0)).sum(axis=1),
    }


def _profile(probs, labels, estimates, samples, bins, band, fine_band, n_bins, level) -> dict:
    over, under = calibration.confidence_split(probs, labels, n_bins=n_bins)
    result = {name: stats.defined(value) for name, value in zip(NAMES, estimates, strict=True)}
    result |= {
        "ece_15": float(calibration.ece(probs, labels, n_bins=15)),
        "ece_equal_mass": float(calibration.ece_equal_mass(probs, labels, n_bins=n_bins)),
        "classwise_ece": float(calibration.classwise_ece(probs, labels, n_bins=n_bins)),
        "smooth_ece": float(smooth.smooth_ece(probs, labels)),
        "overconfident_part": float(over),
        "underconfident_part": float(under),
        "debiased_ece": calibration.debiased_ece(probs, labels, n_bins),
        "debiased_mce": calibration.debiased_mce(probs, labels, n_bins),
        "debiased_l2": calibration.debiased_l2(probs, labels, n_bins),
        "debiased_l2_squared": calibration.debiased_l2_squared(probs, labels, n_bins),
    }
    under_perfect_calibration = {
        name: {"band": list(b.interval(key)), "mean": b.mean(key), "p_value": b.p_value(key, result[name])}
        for name, b, key in (("ece", band, "ece"), ("mce", band, "mce"), ("ece_15", fine_band, "ece"))
    }
    return result | {
        "num_samples": len(labels),
        "interval_level": level,
        "intervals": {n: stats.defined_interval(samples[:, m], level) for m, n in enumerate(NAMES) if n not in BINNED},
        "under_perfect_calibration": under_perfect_calibration,
        "answers_held_at": calibration.answers_held_at(probs, labels),
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


def _differences(estimates, samples, largest_bias, k: int, baseline: int, level: float) -> dict:
    """Condition `k` minus the baseline, for every metric: the difference and its paired interval."""
    result: dict = {}
    for m, name in enumerate(NAMES):
        difference, paired_draws = estimates[k, m] - estimates[baseline, m], samples[:, k, m] - samples[:, baseline, m]
        interval = None if np.isnan(difference) else stats.defined_interval(paired_draws, level)
        if name in BINNED:
            bias = (-largest_bias[baseline, m], largest_bias[k, m])
            interval = list(stats.bounded_bias_interval(paired_draws, difference, bias, level))
        result[name] = {"difference": stats.defined(difference), "interval": interval}
    return result


def _largest_bias(estimates, samples, bands) -> np.ndarray:
    """Upper bounds of the upward bias of the plug-in ECE and MCE, 0 for all other metrics, [P, M].

    It is largest under perfect calibration. For ECE the bootstrap knows better: its draws exceed the estimate by
    sqrt(2) - 1 = 0.41 of the bias there (resampling doubles the variance), and by more of it elsewhere, so three times
    that excess bounds it. The resulting 95% intervals of differences covered the truth in 0.94 to 1.00 of simulated
    studies with N = 100 to 1000, conditions from calibrated to far off; a maximum over bins has no such rule.
    """
    bias = np.zeros_like(estimates)
    e, m = NAMES.index("ece"), NAMES.index("mce")
    excess = np.maximum(samples[:, :, e].mean(axis=0) - estimates[:, e], 0.0)
    bias[:, e] = np.minimum([band.mean("ece") for band in bands], 3 * excess)
    bias[:, m] = [band.mean("mce") for band in bands]
    return bias


def _tests(questions: dict[str, np.ndarray], baseline: int, seed: int) -> list[dict]:
    """The family of paired tests against the baseline, one dictionary a condition, without tests for the baseline."""
    others = [k for k in range(len(questions["accuracy"])) if k != baseline]
    flipped = [name for name in TESTED if name != "accuracy"]
    change = {name: questions[name] - questions[name][baseline] for name in flipped}  # [P, N] each
    p_values = paired.sign_flip(np.stack([change[name].T for name in flipped], axis=1), seed=seed)  # [tests, P]
    tests: list[dict] = [{} for _ in questions["accuracy"]]
    for k in others:
        p_value = paired.mcnemar(questions["accuracy"][k], questions["accuracy"][baseline])
        tests[k] = {"accuracy": {"test": "mcnemar", "p_value": p_value}}
        for name, p_value in zip(flipped, p_values[:, k], strict=True):
            d_z = paired.cohen_dz(change[name][k])
            tests[k][name] = {"test": "sign_flip", "p_value": float(p_value), "d_z": d_z}
    family = [test for k in others for test in tests[k].values()]
    for test, adjusted in zip(family, paired.benjamini_hochberg([t["p_value"] for t in family]), strict=True):
        test["p_adjusted"] = adjusted
    return [{"tests": found, "family_size": len(family)} for found in tests]
