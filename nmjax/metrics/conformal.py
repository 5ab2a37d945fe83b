"""A threshold that promises a recall, and whether a recall was met.

A threshold picked for a recall of 0.9 on the examples at hand tends to have less on new ones. The split-conformal
threshold has at least 0.9 on average, for any score and any number of examples.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import ArrayLike
from scipy.stats import binomtest

from nmjax.metrics import stats
from nmjax.metrics.detection import check_scores, sign


def conformal_threshold(scores: ArrayLike, labels: ArrayLike, direction: str, recall: float = 0.9) -> dict:
    """The threshold that flags a new positive with probability `recall` or more (Vovk et al. 2005, split conformal).

    With n1 positives among the calibration examples, it is the k-th smallest of their risks, k = floor((1 - recall)
    (n1 + 1)): the risk of one more positive is as likely to have any rank among the n1 + 1, so with probability
    (n1 + 1 - k) / (n1 + 1) it is no smaller, exactly that where no two risks tie. The probability is over both the
    calibration examples and the new one; the recall of a threshold once set is spread about it as Beta(n1 + 1 - k, k).

    This wants positives that are exchangeable, calibration and new ones alike: the direction and the score come from
    other data, and no question contributes two positives (a question with its right and with its wrong answer
    contributes one).

    Returns "tau" (None: flag everything, as it takes with fewer than recall / (1 - recall) positives, k = 0), "k",
    "positives" n1, "recall" as asked, "guarantee" (n1 + 1 - k) / (n1 + 1), and "note", None or why tau is.
    """
    s, y = check_scores(scores, labels)
    towards_risk = sign(direction)
    if not 0 < recall < 1:
        raise ValueError(f"recall is {recall}; wanted a share between 0 and 1")
    positives = int(y.sum())
    k = int(np.floor((1 - recall) * (positives + 1) + 1e-9))  # (1 - 0.9) * 10 is 0.9999999999999998
    return {
        "tau": float(towards_risk * np.sort(towards_risk * s[y])[k - 1]) if k else None,
        "k": k,
        "positives": positives,
        "recall": recall,
        "guarantee": (positives + 1 - k) / (positives + 1),
        "note": None if k else f"{positives} positives are too few to promise a recall of {recall}: flag everything",
    }


def clopper_pearson(successes: int, n: int, level: float = stats.LEVEL) -> list[float] | None:
    """Exact interval [low, high] of a proportion (Clopper and Pearson 1934), never short of `level`; None for n = 0."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes is {successes} of n = {n}; wanted 0 <= successes <= n")
    if n == 0:
        return None
    interval = binomtest(int(successes), int(n)).proportion_ci(level, method="exact")
    return [float(interval.low), float(interval.high)]


def recall_check(flags: ArrayLike, labels: ArrayLike, target: float, level: float = stats.LEVEL) -> dict:
    """Whether `flags [N]` (booleans) find a share `target` of the positives: by the exact interval, not by the share.

    Returns "recall", its Clopper-Pearson "interval" (both None without positives), "target" and "met": "yes" if the
    interval lies at or above the target, "no" if below, else "undecided": there are too few positives to tell.
    """
    flagged, y = check_scores(flags, labels)
    found, positives = int((flagged[y] > 0).sum()), int(y.sum())
    interval = clopper_pearson(found, positives, level)
    met = "undecided"
    if interval is not None:
        met = "yes" if interval[0] >= target else "no" if interval[1] < target else "undecided"
    return {"recall": found / positives if positives else None, "interval": interval, "target": target, "met": met}
