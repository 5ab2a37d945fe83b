"""Calibration of a classifier's probabilities: proper scores, binned errors, debiasing, what chance alone gives.

Means: accuracy, confidence, overconfidence, entropy, Brier, NLL. Binned: ECE and MCE over bins of equal width, ECE over
bins of equal mass, class by class, and split into what is over- and what is underconfident. Errors without bins are in
`nmjax.metrics.smooth`; how well confidence tells right from wrong answers is in `nmjax.metrics.ranking`.

Everything takes `probs [N, C]` (each row a distribution over C choices) and `labels [N]` (the index of the right
choice), as NumPy or JAX arrays, and computes in float64 on the host. *Confidence* is the largest probability of a row,
*prediction* its index (the first one where several tie), *correct* is 1 where the prediction is the label.

Metrics that take `weights [..., N]` return one value for each leading index, so one matrix of bootstrap weights gives
a metric's whole bootstrap distribution in one product (see `nmjax.metrics.stats`).

Bins are half-open on the left, (lo, hi]; a confidence of exactly 0 belongs to the first one. They have equal width
except where a name says equal mass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike
from scipy.special import entr, ndtr

from nmjax.metrics.stats import wilson_interval

NLL_FLOOR = 1e-12
"""A probability of the right choice below this counts as this, so a choice cut to 0 has a finite NLL of 27.6 nats."""

_CHUNK_ELEMENTS = 4_000_000  # simulated outcomes held at once: 32 MB in float64


def check_probs(probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """`probs` as float64 [N, C] and `labels` as int64 [N], after checking that they are what they should be.

    Raises ValueError if the shapes do not match, a probability is not in [0, 1], a row does not sum to 1 (to 1e-4)
    or a label is not an index of a choice.
    """
    p = np.asarray(probs, dtype=np.float64)
    y = np.asarray(labels)
    if p.ndim != 2 or p.shape[0] == 0 or p.shape[1] < 2:
        raise ValueError(f"probs has shape {p.shape}; wanted [N, C] with N >= 1 questions and C >= 2 choices")
    if y.shape != p.shape[:1]:
        raise ValueError(f"labels has shape {y.shape}; wanted [{p.shape[0]}], one label a row of probs {p.shape}")
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"labels has dtype {y.dtype}; wanted integers, the index of the right choice")
    if y.min() < 0 or y.max() >= p.shape[1]:
        row = int(np.flatnonzero((y < 0) | (y >= p.shape[1]))[0])
        raise ValueError(f"labels[{row}] is {y[row]}; wanted 0 to {p.shape[1] - 1}")
    bad = ~(np.isfinite(p) & (p >= 0) & (p <= 1 + 1e-6)).all(axis=1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(f"probs[{row}] is {p[row].tolist()}; wanted finite values in [0, 1]")
    off = np.abs(p.sum(axis=1) - 1)
    if off.max() > 1e-4:
        row = int(off.argmax())
        raise ValueError(f"probs[{row}] sums to {p[row].sum():.6g}; wanted 1")
    return p, y.astype(np.int64)


def top_label(probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Confidence float64 [N] (at most 1) and correctness float64 [N] (0 or 1) of the most probable choice."""
    p, y = check_probs(probs, labels)
    return np.minimum(p.max(axis=1), 1.0), (p.argmax(axis=1) == y).astype(np.float64)


def _mean(values: np.ndarray, weights: ArrayLike | None) -> np.ndarray:
    """Weighted mean over the last axis: `values [N]`, `weights [..., N]` -> [...]; a 0-d array without weights."""
    if weights is None:
        return np.asarray(values.mean())
    w = np.asarray(weights, dtype=np.float64)
    return np.asarray(w @ values / w.sum(axis=-1))


def accuracy(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Share of rows whose most probable choice is the label, in [0, 1]."""
    return _mean(top_label(probs, labels)[1], weights)


def mean_confidence(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean of the largest probability, in [1/C, 1]."""
    return _mean(top_label(probs, labels)[0], weights)


def overconfidence(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean confidence minus accuracy, in [-1, 1]: above 0 the model promises more than it keeps."""
    confidence, correct = top_label(probs, labels)
    return _mean(confidence - correct, weights)


def brier_top_label(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean of (confidence - correct)^2, in [0, 1]: the Brier (1950) score of the event 'the prediction is right'."""
    confidence, correct = top_label(probs, labels)
    return _mean((confidence - correct) ** 2, weights)


def brier_multiclass(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean over rows of the sum over choices of (p - y)^2, in [0, 2]: Brier's (1950) original multi-class score."""
    p, y = check_probs(probs, labels)
    return _mean(((p - np.eye(p.shape[1])[y]) ** 2).sum(axis=1), weights)


def nll(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, floor: float = NLL_FLOOR) -> np.ndarray:
    """Mean negative log-likelihood of the right choice in nats; probabilities below `floor` count as `floor`."""
    p, y = check_probs(probs, labels)
    if not 0 < floor < 1:
        raise ValueError(f"floor is {floor}; wanted a probability above 0 and below 1")
    return _mean(-np.log(np.clip(p[np.arange(len(y)), y], floor, 1.0)), weights)


def entropy(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean Shannon entropy of the rows in nats, in [0, log C]; the labels are checked and play no part."""
    p, _ = check_probs(probs, labels)
    return _mean(entr(np.minimum(p, 1.0)).sum(axis=1), weights)


def answers_held_at(
    probs: ArrayLike, labels: ArrayLike, thresholds: Sequence[float] = (0.9, 0.95, 0.99)
) -> list[dict[str, object]]:
    """How many answers are held at each threshold's confidence or above, and the share of them that is right.

    One dictionary a threshold: "threshold", "count", "right" (the share) and "interval", its Wilson 95% [low, high];
    the last two are None where the count is 0.
    """
    confidence, correct = top_label(probs, labels)
    rows: list[dict[str, object]] = []
    for threshold in thresholds:
        held = correct[confidence >= threshold]
        interval = [float(end) for end in wilson_interval(held.sum(), len(held))] if len(held) else None
        right = float(held.mean()) if len(held) else None
        rows.append({"threshold": float(threshold), "count": len(held), "right": right, "interval": interval})
    return rows


# --- Binned metrics ---------------------------------------------------------------------------------------------------


def bin_index(confidence: ArrayLike, n_bins: int = 10) -> np.ndarray:
    """The bin of each confidence, int [N] in 0..n_bins-1: bin b holds (b/n, (b+1)/n], and the first one also 0."""
    if n_bins < 1:
        raise ValueError(f"n_bins is {n_bins}; wanted at least 1")
    edges = np.arange(n_bins + 1) / n_bins  # k/n is the double nearest to each edge; linspace's 0.3 is not 0.3
    c = np.asarray(confidence, dtype=np.float64)
    return np.clip(np.searchsorted(edges, c, side="left") - 1, 0, n_bins - 1)


def equal_mass_index(confidence: ArrayLike, n_bins: int = 10) -> np.ndarray:
    """The equal-mass bin of each confidence, int [N] in 0..n_bins-1: bin b holds those above the b/n quantile of all
    [N] up to and including the (b+1)/n one. Tied confidences share a bin, so bins can be empty."""
    if n_bins < 1:
        raise ValueError(f"n_bins is {n_bins}; wanted at least 1")
    c = np.asarray(confidence, dtype=np.float64)
    smaller = np.searchsorted(np.sort(c), c, side="left")  # at the k/n quantile or below: smaller < k N / n
    return smaller * n_bins // len(c)


def _bin_sums(
    index: np.ndarray, surplus: np.ndarray, weights: ArrayLike | None, n_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weight of each bin and weighted sum of its `surplus [N]` (promised less kept), each [..., n_bins]."""
    if weights is None:
        return np.bincount(index, minlength=n_bins), np.bincount(index, surplus, n_bins)
    member = np.eye(n_bins)[index]  # [N, n_bins]
    sums = np.asarray(weights, dtype=np.float64) @ np.concatenate([member, member * surplus[:, None]], axis=1)
    mass, gap = np.split(sums, 2, axis=-1)
    return mass, gap


def _ece(index: np.ndarray, surplus: np.ndarray, weights: ArrayLike | None, n_bins: int) -> np.ndarray:
    mass, gap = _bin_sums(index, surplus, weights, n_bins)
    return np.asarray(np.abs(gap).sum(axis=-1) / mass.sum(axis=-1))


def binned_errors(
    probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, n_bins: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """ECE and MCE (see `ece` and `mce`) from one pass over the bins."""
    confidence, correct = top_label(probs, labels)
    mass, gap = _bin_sums(bin_index(confidence, n_bins), confidence - correct, weights, n_bins)
    gap = np.abs(gap)
    worst = (gap / np.where(mass > 0, mass, 1.0)).max(axis=-1)
    return np.asarray(gap.sum(axis=-1) / mass.sum(axis=-1)), np.asarray(worst)


def ece(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, n_bins: int = 10) -> np.ndarray:
    """Expected calibration error: sum over bins of (n_b / N) |mean confidence - accuracy| (Naeini et al. 2015).

    The plug-in value: biased upwards, by about 0.06 for 200 perfectly calibrated answers; see `debiased_ece` and
    `consistency_band` before reading a small value as miscalibration.
    """
    return binned_errors(probs, labels, weights, n_bins)[0]


def mce(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, n_bins: int = 10) -> np.ndarray:
    """Maximum calibration error: the largest |mean confidence - accuracy| of a bin that is not empty.

    One answer in a bin is enough to set it; read it beside the counts and its consistency band.
    """
    return binned_errors(probs, labels, weights, n_bins)[1]


def ece_equal_mass(
    probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, n_bins: int = 10
) -> np.ndarray:
    """ECE over bins of equal mass, the adaptive calibration error of the top label (Nguyen and O'Connor 2015).

    The sample alone sets the bins (`equal_mass_index`): weights weigh answers and move none to another bin.
    """
    confidence, correct = top_label(probs, labels)
    return _ece(equal_mass_index(confidence, n_bins), confidence - correct, weights, n_bins)


def event_ece(
    probability: ArrayLike, happened: ArrayLike, weights: ArrayLike | None = None, n_bins: int = 10
) -> np.ndarray:
    """ECE of `probability [N]` as that of an event, against whether it `happened [N]` (0 or 1).

    Unlike `ece`, which bins by the probability of the likelier outcome, this bins by that of the event.
    Raises ValueError for unlike shapes or a probability that is not in [0, 1].
    """
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(happened, dtype=np.float64)
    if p.ndim != 1 or len(p) == 0 or p.shape != y.shape:
        raise ValueError(f"probability has shape {p.shape} and happened {y.shape}; wanted [N] both, N >= 1")
    if not ((p >= 0) & (p <= 1 + 1e-6)).all():
        raise ValueError(f"probability holds {p[~((p >= 0) & (p <= 1 + 1e-6))][0]}; wanted values in [0, 1]")
    return _ece(bin_index(p, n_bins), p - y, weights, n_bins)


def classwise_ece(
    probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, n_bins: int = 10
) -> np.ndarray:
    """Mean over choices c of the ECE of p_c as the probability of 'the label is c' (Kull et al. 2019)."""
    p, y = check_probs(probs, labels)
    choices = range(p.shape[1])
    return np.asarray(np.mean([event_ece(p[:, c], y == c, weights, n_bins) for c in choices], axis=0))


def confidence_split(
    probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, n_bins: int = 10
) -> tuple[np.ndarray, np.ndarray]:
    """ECE in two parts that sum to it: of the bins that promise more than they keep, and of those that promise less."""
    confidence, correct = top_label(probs, labels)
    mass, gap = _bin_sums(bin_index(confidence, n_bins), confidence - correct, weights, n_bins)
    over, under = (np.maximum(part, 0).sum(axis=-1) / mass.sum(axis=-1) for part in (gap, -gap))
    return np.asarray(over), np.asarray(under)


@dataclasses.dataclass(frozen=True)
class ReliabilityBins:
    """A reliability diagram's numbers, each [n_bins] except `edges` [n_bins + 1].

    `confidence` and `accuracy` are NaN where `counts` is 0.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability_bins(probs: ArrayLike, labels: ArrayLike, n_bins: int = 10) -> ReliabilityBins:
    """Number of answers, mean confidence and accuracy of each equal-width bin of confidence."""
    confidence, correct = top_label(probs, labels)
    index = bin_index(confidence, n_bins)
    mass = np.bincount(index, minlength=n_bins)
    conf, right = np.bincount(index, confidence, n_bins), np.bincount(index, correct, n_bins)
    filled = mass > 0
    divisor = np.where(filled, mass, 1.0)
    return ReliabilityBins(
        edges=np.arange(n_bins + 1) / n_bins,
        counts=mass,
        confidence=np.where(filled, conf / divisor, np.nan),
        accuracy=np.where(filled, right / divisor, np.nan),
    )


# --- Debiased values --------------------------------------------------------------------------------------------------


def _filled(bins: ReliabilityBins) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, confidence - accuracy and accuracy of the bins that are not empty."""
    keep = bins.counts > 0
    return bins.counts[keep], (bins.confidence - bins.accuracy)[keep], bins.accuracy[keep]


def debiased_l2_squared(probs: ArrayLike, labels: ArrayLike, n_bins: int = 10) -> float:
    """Debiased squared L2 calibration error: sum_b (n_b/N) [(conf_b - acc_b)^2 - acc_b (1 - acc_b) / (n_b - 1)].

    Kumar, Liang and Ma (2019), 'Verified uncertainty calibration', section 5. Unbiased for the squared error of the
    binned confidences, hence negative about half of the time when they are perfectly calibrated. A bin of one answer
    carries no estimate of its own noise and contributes 0, as in the authors' code.
    """
    counts, gap, acc = _filled(reliability_bins(probs, labels, n_bins))
    noise = acc * (1 - acc) / np.maximum(counts - 1, 1)
    return float((counts / counts.sum() * np.where(counts > 1, gap**2 - noise, 0.0)).sum())


def debiased_l2(probs: ArrayLike, labels: ArrayLike, n_bins: int = 10) -> float:
    """Square root of `debiased_l2_squared`, 0 where that is negative: on the scale of a probability."""
    return float(np.sqrt(max(debiased_l2_squared(probs, labels, n_bins), 0.0)))


def debiased_ece(probs: ArrayLike, labels: ArrayLike, n_bins: int = 10) -> float:
    """ECE less its estimated bias: 2 ECE - sum_b (n_b/N) E|Normal(conf_b - acc_b, acc_b (1 - acc_b) / n_b)|.

    The normal-approximation estimator of Kumar et al. (2019), appendix, with the mean of the folded normal in closed
    form. It removes most of the bias of a value well above 0 and two fifths of it at 0 (the absolute value has no
    unbiased estimator); it can be slightly negative.
    """
    counts, gap, acc = _filled(reliability_bins(probs, labels, n_bins))
    sd = np.sqrt(acc * (1 - acc) / counts)
    z = np.abs(gap) / np.where(sd > 0, sd, 1.0)
    folded = sd * np.sqrt(2 / np.pi) * np.exp(-(z**2) / 2) + np.abs(gap) * (1 - 2 * ndtr(-z))
    expected = np.where(sd > 0, folded, np.abs(gap))
    return float((counts / counts.sum() * (2 * np.abs(gap) - expected)).sum())


def debiased_mce(probs: ArrayLike, labels: ArrayLike, n_bins: int = 10, draws: int = 2000, seed: int = 0) -> float:
    """MCE less its estimated bias, 2 MCE - E[max_b |Normal(conf_b - acc_b, a_b (1 - a_b) / n_b)|].

    As `debiased_ece`, but with Laplace's a_b = (right answers + 1) / (n_b + 2) in the variance: MCE is set by the
    smallest bins, and acc_b (1 - acc_b) is 0 in a bin of one answer. The expectation of the maximum has no closed form
    and is the mean of `draws` seeded draws. Reduces the bias, at 0 by about a third.
    """
    counts, gap, acc = _filled(reliability_bins(probs, labels, n_bins))
    smooth = (acc * counts + 1) / (counts + 2)
    noise = np.random.default_rng(seed).standard_normal((draws, len(counts)))
    resampled = np.abs(gap + noise * np.sqrt(smooth * (1 - smooth) / counts)).max(axis=1)
    return float(2 * np.abs(gap).max() - resampled.mean())


# --- What perfect calibration looks like at this sample size ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ConsistencyBand:
    """The distribution of ECE and MCE were the given confidences perfectly calibrated.

    `ece`, `mce`: simulated values, sorted, [draws]. `accuracy_low`, `accuracy_high` [n_bins]: percentile band of a
    bin's accuracy (NaN in an empty bin). `level`: the share that the bands hold.
    """

    level: float
    ece: np.ndarray
    mce: np.ndarray
    accuracy_low: np.ndarray
    accuracy_high: np.ndarray

    def interval(self, metric: str) -> tuple[float, float]:
        """The central `level` band of "ece" or "mce"."""
        tail = (1 - self.level) / 2
        low, high = np.quantile(self._samples(metric), [tail, 1 - tail])
        return float(low), float(high)

    def mean(self, metric: str) -> float:
        """Mean of "ece" or "mce" under perfect calibration: how large a value noise alone gives."""
        return float(self._samples(metric).mean())

    def p_value(self, metric: str, observed: float) -> float:
        """One-sided Monte-Carlo p-value, (1 + draws at or above `observed`) / (1 + draws)."""
        samples = self._samples(metric)
        at_or_above = len(samples) - int(np.searchsorted(samples, observed * (1 - 1e-12), side="left"))
        return (1 + at_or_above) / (1 + len(samples))

    def _samples(self, metric: str) -> np.ndarray:
        if metric not in ("ece", "mce"):
            raise ValueError(f"metric is {metric!r}; wanted 'ece' or 'mce'")
        return self.ece if metric == "ece" else self.mce


def consistency_band(
    confidence: ArrayLike, n_bins: int = 10, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> ConsistencyBand:
    """Simulate correctness ~ Bernoulli(confidence) and collect ECE, MCE and the accuracy of each bin.

    Consistency resampling of Broecker and Smith (2007), 'Increasing the reliability of reliability diagrams', with the
    confidences kept as they are. `confidence` [N] in [0, 1]; ValueError for other values or fewer than 1 draw.
    """
    c = np.asarray(confidence, dtype=np.float64)
    if c.ndim != 1 or len(c) == 0 or not (np.isfinite(c) & (c >= 0) & (c <= 1)).all():
        raise ValueError(f"confidence has shape {c.shape}; wanted [N] finite values in [0, 1], N >= 1")
    if draws < 1:
        raise ValueError(f"draws is {draws}; wanted at least 1")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; wanted a share between 0 and 1")
    order = np.argsort(bin_index(c, n_bins), kind="stable")
    c = c[order]
    filled, start, counts = np.unique(bin_index(c, n_bins), return_index=True, return_counts=True)
    expected = np.add.reduceat(c, start)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ELEMENTS // len(c))
    right = np.concatenate(
        [
            np.add.reduceat((rng.random((min(chunk, draws - k), len(c))) < c).astype(np.float64), start, axis=1)
            for k in range(0, draws, chunk)
        ]
    )  # [draws, filled bins]
    gap = np.abs(right - expected)
    tail = (1 - level) / 2
    low, high = np.full(n_bins, np.nan), np.full(n_bins, np.nan)
    low[filled], high[filled] = np.quantile(right / counts, [tail, 1 - tail], axis=0)
    return ConsistencyBand(
        level=level,
        ece=np.sort(gap.sum(axis=1) / len(c)),
        mce=np.sort((gap / counts).max(axis=1)),
        accuracy_low=low,
        accuracy_high=high,
    )
