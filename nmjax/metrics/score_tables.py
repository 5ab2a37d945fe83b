"""Plain tables of a score against its labels: summary, median check, label by score, and two detectors side by side.

Conventions and checks are those of `nmjax.metrics.detection`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import ArrayLike

from nmjax.metrics import stats
from nmjax.metrics.detection import at_thresholds, check_scores

LABELS = {"hallucinated": True, "right": False}


def cohens_d(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Mean score of the positives less that of the negatives, in units of sqrt((s1^2 + s0^2) / 2).

    s1, s0: the standard deviations by label, with n - 1 (Cohen 1988). None with fewer than two of a label, or where
    neither label's scores differ.
    """
    s, y = check_scores(scores, labels)
    if min(y.sum(), (~y).sum()) < 2:
        return None
    sd = np.sqrt((s[y].var(ddof=1) + s[~y].var(ddof=1)) / 2)
    return float((s[y].mean() - s[~y].mean()) / sd) if sd > 1e-12 * np.abs(s).max() else None


def summary(scores: ArrayLike, labels: ArrayLike) -> dict:
    """{"n", "positives", "rate", "min", "median", "max", "mean", "sd", "by_label", "cohens_d"}.

    "by_label" has "hallucinated" and "right", each {"n", "mean", "sd"}. Standard deviations have n - 1 in the variance
    and are None of fewer than two.
    """
    s, y = check_scores(scores, labels)
    return {
        "positives": int(y.sum()),
        "rate": float(y.mean()),
        "min": float(s.min()),
        "median": float(np.median(s)),
        "max": float(s.max()),
        **_moments(s),
        "by_label": {name: _moments(s[y == label]) for name, label in LABELS.items()},
        "cohens_d": cohens_d(s, y),
    }


def _moments(s: np.ndarray) -> dict:
    return {
        "n": len(s),
        "mean": float(s.mean()) if len(s) else None,
        "sd": float(s.std(ddof=1)) if len(s) > 1 else None,
    }


def median_check(scores: ArrayLike, labels: ArrayLike, direction: str) -> dict:
    """Whether flagging the riskier half finds more than chance: the row of `detection.at_thresholds` at the median.

    With "base_rate", the precision of flagging everything, and "difference", precision less that.
    """
    s, y = check_scores(scores, labels)
    row = at_thresholds(s, y, np.median(s, keepdims=True), direction)[0]
    return row | {"base_rate": float(y.mean()), "difference": row["precision"] - float(y.mean())}


def label_quadrants(scores: ArrayLike, labels: ArrayLike, median: float | None = None, examples: int = 5) -> dict:
    """Label by low (at most `median`, that of the scores by default) or high score, with examples to look at.

    Returns "median" and "hallucinated_low", "hallucinated_high", "right_low", "right_high", each {"count", "indices"}:
    where in `scores` the lowest of the low and the highest of the high are, most extreme first, `examples` at most.
    """
    s, y = check_scores(scores, labels)
    middle = float(np.median(s)) if median is None else float(median)
    ascending = np.argsort(s, kind="stable")
    table: dict = {"median": middle}
    for name, label in LABELS.items():
        low = ascending[(y[ascending] == label) & (s[ascending] <= middle)]
        high = ascending[(y[ascending] == label) & (s[ascending] > middle)][::-1]
        table[f"{name}_low"] = {"count": len(low), "indices": low[:examples].tolist()}
        table[f"{name}_high"] = {"count": len(high), "indices": high[:examples].tolist()}
    return table


def quadrants(a_flags: ArrayLike, b_flags: ArrayLike, labels: ArrayLike, level: float = stats.LEVEL) -> dict:
    """Two detectors' `flags [N]` (booleans) side by side: "neither", "both", "only_a", "only_b".

    Each is {"count", "hallucinated", "rate", "interval"}: how many examples are flagged so, how many of them are
    positive, their share and its Wilson interval (both None of no example). The interval takes examples as
    independent; a question's two answers in the same quadrant make it wider than it need be.
    """
    (a, y), (b, _) = check_scores(a_flags, labels), check_scores(b_flags, labels)
    table = {}
    for name, by_a, by_b in (("neither", 0, 0), ("both", 1, 1), ("only_a", 1, 0), ("only_b", 0, 1)):
        inside = y[(a == by_a) & (b == by_b)]
        found, count = int(inside.sum()), len(inside)
        interval = [float(end) for end in stats.wilson_interval(found, count, level)] if count else None
        rate = found / count if count else None
        table[name] = {"count": count, "hallucinated": found, "rate": rate, "interval": interval}
    return table
