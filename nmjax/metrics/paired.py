"""Tests of two conditions on the same N questions: the question is the unit, and its difference is what is tested.

Everything takes values of the same questions in the same order, so what the two conditions share (a question is hard
for both) drops out before a test sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import ArrayLike
from scipy.stats import binomtest, false_discovery_control

from nmjax.metrics import stats

SIGN_FLIPS = 10_000
_EXACT_UP_TO = 12  # questions: 4096 sign patterns are fewer than any number of draws worth having
_CHUNK_ELEMENTS = 4_000_000  # signs held at once: 32 MB in float64


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> float:
    """Exact two-sided p-value of equal accuracy, from `correct_a`, `correct_b` [N] of 0 and 1 (or booleans).

    McNemar (1947) with the binomial in place of the chi-square: of the questions that only one side got right, each
    side has as many as the other but for a fair coin. 1.0 where there is no such question.
    """
    a, b = np.asarray(correct_a, dtype=np.float64), np.asarray(correct_b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"correct_a has shape {a.shape} and correct_b {b.shape}; wanted [N] both")
    for name, x in (("correct_a", a), ("correct_b", b)):
        if not np.isin(x, (0, 1)).all():
            raise ValueError(f"{name} holds {x[~np.isin(x, (0, 1))][0]}; wanted 0 and 1")
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def sign_flip(differences: ArrayLike, draws: int = SIGN_FLIPS, seed: int = 0) -> np.ndarray:
    """Two-sided p-value of mean 0 for `differences [N, ...]`, [...] (0-d for one column).

    Were the two conditions exchangeable, each question's difference would as likely have the other sign (Fisher's
    randomisation test). p is the share of sign patterns whose |mean| is at least the one seen: all 2^N of them up to
    N = 12, else `draws` seeded ones and the pattern seen itself, (1 + count) / (1 + draws). Columns share the patterns.
    """
    d = _differences(differences)
    if draws < 1:
        raise ValueError(f"draws is {draws}; wanted at least 1")
    n, columns = len(d), d.reshape(len(d), -1)
    total = columns.sum(axis=0)
    # Patterns that tie with the one seen differ from it by rounding.
    least = np.abs(total) - 1e-12 * np.abs(columns).sum(axis=0)

    def as_extreme(flipped: np.ndarray) -> np.ndarray:  # [R, N] of 0 and 1 -> how many of the R, for each column
        return (np.abs(total - 2.0 * (flipped.astype(np.float64) @ columns)) >= least).sum(axis=0)

    if n <= _EXACT_UP_TO:
        p_value = as_extreme(np.arange(2**n)[:, None] >> np.arange(n) & 1) / 2**n
    else:
        rng, words, count = np.random.default_rng(seed), -(-n // 64), np.ones(columns.shape[1])
        chunk = max(1, _CHUNK_ELEMENTS // n)
        for done in range(0, draws, chunk):
            random = rng.integers(2**64, size=(min(chunk, draws - done), words), dtype=np.uint64)
            count += as_extreme(np.unpackbits(random.view(np.uint8), axis=1, count=n))
        p_value = count / (1 + draws)
    return p_value.reshape(d.shape[1:])


def cohen_dz(differences: ArrayLike) -> float | None:
    """Mean of `differences [N]` in units of their standard deviation (Cohen 1988, d_z, with N - 1 in the variance).

    None where all differences are equal (to rounding): there is no spread to measure by.
    """
    d = _differences(differences)
    if d.ndim != 1 or len(d) < 2:
        raise ValueError(f"differences has shape {d.shape}; wanted [N] with N >= 2")
    sd = d.std(ddof=1)
    return float(d.mean() / sd) if sd > 1e-12 * np.abs(d).max() else None


def _differences(differences: ArrayLike) -> np.ndarray:
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim == 0 or len(d) == 0 or not np.isfinite(d).all():
        raise ValueError(f"differences has shape {d.shape}; wanted finite values, [N] or [N, ...] with N >= 1")
    return d


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, adjusted: calling those below q leaves a share q of false calls at most.

    Benjamini and Hochberg (1995); holds for independent tests and for positively dependent ones. An empty family is
    an empty list.
    """
    return false_discovery_control(p_values, method="bh").tolist() if len(p_values) else []


def adjust(tests: Iterable[dict[str, Any]]) -> None:
    """Adds "p_adjusted" to tests that have a "p_value" and are one family; None where that is None."""
    family = list(tests)
    defined = [test for test in family if test["p_value"] is not None]
    for test in family:
        test["p_adjusted"] = None
    for test, p_value in zip(defined, benjamini_hochberg([test["p_value"] for test in defined]), strict=True):
        test["p_adjusted"] = p_value


def equivalent(
    samples: ArrayLike, margin: float, estimate: float | None = None, bias: tuple[float, float] = (0.0, 0.0)
) -> dict:
    """Is a difference smaller than matters? Two one-sided tests at 5% (Schuirmann 1987), read off the 90% interval.

    `samples [draws]` are bootstrap draws of a paired difference, `margin` > 0 the least difference that matters.
    "equivalent": the interval lies inside (-margin, margin); "different": it lies outside of it altogether, so the
    difference is at least the margin; "undecided": neither, there are too few questions to tell. For a difference of
    ECE or MCE, whose draws are biased, give its `estimate` and `bias` as to `stats.bounded_bias_interval`.

    Returns {"margin", "interval_90": [low, high], "verdict"}.
    """
    if not 0 < margin < np.inf:
        raise ValueError(f"margin is {margin}; wanted a number above 0")
    if estimate is None:
        low, high = map(float, stats.percentile_interval(samples, 0.90))
    else:
        low, high = stats.bounded_bias_interval(samples, estimate, bias, 0.90)
    inside, outside = -margin < low and high < margin, low >= margin or high <= -margin
    verdict = "equivalent" if inside else "different" if outside else "undecided"
    return {"margin": margin, "interval_90": [low, high], "verdict": verdict}
