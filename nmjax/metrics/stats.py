"""Bootstrap intervals over questions: seeded, stratified by subject, vectorised, paired across conditions.

A bootstrap draw is a vector of weights over the N questions, and a statistic is a function of a matrix of such vectors.
Two conditions measured on the same questions are compared within each draw, so the part of the noise that they share
(a question is hard for both) cancels from the interval of their difference. Where a question gives several examples,
the draws are over groups of them (`cluster_bootstrap`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import ArrayLike
from scipy.special import ndtri

DRAWS = 2000
LEVEL = 0.95
_CHUNK_ELEMENTS = 4_000_000  # weights held at once: 32 MB in float64
_CLUSTER_CHUNK_ELEMENTS = 1_000_000  # fewer: statistics that rank pass over them many times, and 8 MB stay in a cache


def bootstrap_weights(
    n: int, draws: int = DRAWS, seed: int = 0, strata: Sequence[object] | None = None
) -> Iterator[np.ndarray]:
    """Weights of the bootstrap draws over `n` questions, in chunks [R, N] whose R sum to `draws`; rows sum to N.

    From a stratum of size m, m - 1 questions are drawn with replacement and each counts m / (m - 1): the rescaling of
    Rao and Wu (1988), which keeps the variance of a mean unbiased. The plain bootstrap (m of m) understates it by the
    factor (m - 1) / m, which is a half when there are two questions a subject. Strata of one question have no spread
    of their own and are pooled (a lone one joins the smallest other stratum). Without `strata`, all questions form one.
    The draws depend on (n, draws, seed, strata) alone, so statistics that share those are paired.

    Raises ValueError for fewer than 2 questions or 1 draw, or if there is not one stratum label a question.
    """
    if n < 2:
        raise ValueError(f"n is {n}; a bootstrap needs at least 2 questions")
    if draws < 1:
        raise ValueError(f"draws is {draws}; wanted at least 1")
    group = _groups(n, strata)
    order = np.argsort(group, kind="stable")
    _, start, size = np.unique(group[order], return_index=True, return_counts=True)
    stratum = np.repeat(np.arange(len(size)), size - 1)  # the stratum of each question drawn, [N - strata]
    scale = np.empty(n)
    scale[order] = np.repeat(size / (size - 1), size)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_ELEMENTS // n)
    for done in range(0, draws, chunk):
        rows = min(chunk, draws - done)
        picked = order[start[stratum] + rng.integers(0, size[stratum], size=(rows, len(stratum)))]
        flat = (picked + n * np.arange(rows)[:, None]).ravel()
        yield np.bincount(flat, minlength=rows * n).reshape(rows, n) * scale


def _groups(n: int, strata: Sequence[object] | None) -> np.ndarray:
    """A stratum number for each question, [N], with no stratum of a single question."""
    if strata is None:
        return np.zeros(n, dtype=np.int64)
    if len(strata) != n:
        raise ValueError(f"strata has {len(strata)} labels; wanted {n}, one a question")
    names = [str(s) for s in strata]
    _, group, size = np.unique(names, return_inverse=True, return_counts=True)
    alone = size[group] == 1
    if alone.sum() == 1 and len(size) > 1:
        others = np.flatnonzero(size > 1)
        return np.where(alone, others[size[others].argmin()], group)
    return np.where(alone, len(size), group)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    n: int,
    draws: int = DRAWS,
    seed: int = 0,
    strata: Sequence[object] | None = None,
) -> np.ndarray:
    """The bootstrap distribution of `statistic`, [draws, ...].

    `statistic` maps weights [R, N] to values [R, ...]; every metric of `nmjax.metrics.calibration` that takes
    `weights` is one. Arguments and errors as in `bootstrap_weights`.
    """
    return np.concatenate([np.asarray(statistic(w)) for w in bootstrap_weights(n, draws, seed, strata)])


def cluster_bootstrap_weights(
    groups: ArrayLike, draws: int = DRAWS, seed: int = 0, strata: Sequence[object] | None = None
) -> Iterator[np.ndarray]:
    """Weights of the bootstrap draws over the G different `groups [N]`, in chunks [R, N] whose R sum to `draws`.

    What belongs together (a question with its right and with its wrong answer) is drawn together, so its members have
    the same weight in a draw: that of their group in `bootstrap_weights`. Of a single group nothing can be said of the
    spread between groups, and there are no draws: one chunk [0, N]. `strata [N]`: groups are drawn within each of them;
    ValueError where members of a group have different ones.
    """
    _, first, group = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    group = group.ravel()
    n, size = len(group), len(first)
    stratum = None
    if strata is not None:
        label = np.asarray(strata)
        if label.shape != (n,) or (label != label[first][group]).any():
            raise ValueError(f"strata has shape {label.shape}; wanted [{n}], with one label for all of a group")
        stratum = label[first].tolist()
    if size < 2:
        yield np.empty((0, n))
        return
    rows = max(1, _CLUSTER_CHUNK_ELEMENTS // n)
    for weights in bootstrap_weights(size, draws, seed, stratum):
        for done in range(0, len(weights), rows):
            yield weights[done : done + rows, group]


def cluster_bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    groups: ArrayLike,
    draws: int = DRAWS,
    seed: int = 0,
    strata: Sequence[object] | None = None,
) -> np.ndarray:
    """The bootstrap distribution over groups of `statistic`, [draws, ...] ([0, ...] of a single group); see above."""
    return np.concatenate([np.asarray(statistic(w)) for w in cluster_bootstrap_weights(groups, draws, seed, strata)])


def percentile_interval(samples: ArrayLike, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Low and high end of the central `level` share of `samples [draws, ...]`, each [...]."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; wanted a share between 0 and 1")
    tail = (1 - level) / 2
    low, high = np.quantile(np.asarray(samples), [tail, 1 - tail], axis=0)
    return low, high


def defined(value: float | np.ndarray) -> float | None:
    """A number as it stands in a report: None where it is undefined (NaN)."""
    return None if np.isnan(value) else float(value)


def defined_interval(samples: ArrayLike, level: float = LEVEL) -> list[float] | None:
    """Percentile interval [low, high] of the `samples [draws]` that are defined, None where none is."""
    draws = np.asarray(samples)
    draws = draws[~np.isnan(draws)]
    return [float(end) for end in percentile_interval(draws, level)] if len(draws) else None


def mean_interval(
    values: ArrayLike,
    draws: int = DRAWS,
    seed: int = 0,
    strata: Sequence[object] | None = None,
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of the mean over questions: `values [N, ...]` -> low and high, each [...]."""
    v = np.asarray(values, dtype=np.float64)
    samples = bootstrap(lambda w: np.tensordot(w, v, axes=1) / len(v), len(v), draws, seed, strata)
    return percentile_interval(samples, level)


def paired_interval(
    a: ArrayLike,
    b: ArrayLike,
    draws: int = DRAWS,
    seed: int = 0,
    strata: Sequence[object] | None = None,
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of mean(a) - mean(b) for `a`, `b [N, ...]` measured on the same N questions."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a has shape {first.shape} and b {second.shape}; a paired comparison wants equal shapes")
    return mean_interval(first - second, draws, seed, strata, level)


def wilson_interval(successes: ArrayLike, n: ArrayLike, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Wilson (1927) score interval of a proportion, elementwise; sensible at 0 and 1, and at n = 1. n must be > 0."""
    z = ndtri((1 + level) / 2)
    k, m = np.asarray(successes, dtype=np.float64), np.asarray(n, dtype=np.float64)
    if not ((m > 0) & (k >= 0) & (k <= m)).all():
        raise ValueError(f"successes is {k.tolist()} of n = {m.tolist()}; wanted 0 <= successes <= n and n > 0")
    centre = (k + z**2 / 2) / (m + z**2)
    half = z / (m + z**2) * np.sqrt(k * (m - k) / m + z**2 / 4)
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)


def cluster_wilson_interval(successes: ArrayLike, groups: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """Wilson interval of a proportion from `successes [N]` (0 and 1) that come in G `groups [N]`, where G are drawn.

    The number of independent answers is taken to be p (1 - p) / v, with v the variance of p between groups (Kish 1965,
    section 8.2; its use here: Korn and Graubard 1998), at least G and at most N. So it is the plain interval of N where
    every answer is its own group, and that of G where a group's answers agree, or all do.
    """
    x, group = np.asarray(successes, dtype=np.float64), np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
    if x.ndim != 1 or len(x) == 0 or x.shape != group.shape or not np.isin(x, (0, 1)).all():
        raise ValueError(f"successes has shape {x.shape}, groups {group.shape}; wanted [N] both, successes of 0 and 1")
    n, G, p = len(x), int(group.max()) + 1, x.mean()
    independent = float(G)
    if 0 < p < 1 and G > 1:
        spread = np.bincount(group, x - p)  # [G], sum 0
        variance = G / (G - 1) * (spread**2).sum() / n**2
        independent = float(np.clip(p * (1 - p) / variance, G, n)) if variance > 0 else float(n)
    low, high = wilson_interval(p * independent, independent, level)
    return float(low), float(high)


def bounded_bias_interval(
    samples: ArrayLike, estimate: float, bias: tuple[float, float], level: float = LEVEL
) -> tuple[float, float]:
    """Interval of a quantity whose `estimate` is off by an unknown bias between `bias[0]` and `bias[1]`.

    The bootstrap `samples [draws]` give the spread about their own mean; the bounds on the bias widen it. This is for
    differences of ECE or MCE: each is biased upwards, most where calibration is perfect, so the bias of the difference
    a - b lies between minus b's and plus a's largest bias (at most `ConsistencyBand.mean`). The plain percentile
    interval ignores that the better calibrated side is the more biased one, and covers the true difference as rarely as
    2 times in 10 at N = 1000.
    """
    if not bias[0] <= bias[1]:
        raise ValueError(f"bias is {bias}; wanted (lower, upper) in this order")
    draws = np.asarray(samples, dtype=np.float64)
    low, high = percentile_interval(draws - draws.mean(), level)
    return float(estimate + low - bias[1]), float(estimate + high - bias[0])
