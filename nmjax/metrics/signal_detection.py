"""Yes and no as signal detection theory counts them: sensitivity and bias from two rates, and the report of a detector.

A hit is a "yes" where there is something, a false alarm one where there is nothing. Rates of 0 and 1 have no finite
normal quantile, so they are moved inwards by one of two rules (`RULES`):

    "clipped"    to [.01, .99], as the study of introspection published it: d' ends at 4.6527
    "loglinear"  (yes + 1/2) / (n + 1), Hautus (1995): less biased, and the more answers, the farther it reaches
"""

from __future__ import annotations

import numpy as np
from jaxtyping import ArrayLike
from scipy.special import ndtri

from nmjax.metrics import ranking, stats
from nmjax.metrics.detection import check_groups, check_scores

CLIP = 0.01
RULES = ("clipped", "loglinear")
ESTIMATES = ("accuracy", "balanced_accuracy", "d_prime_clipped", "d_prime_loglinear", "criterion", "auroc")


def rate(yes: ArrayLike, n: ArrayLike, rule: str) -> np.ndarray:
    """The rate of `yes` among `n`, elementwise, moved inwards by the rule; counts need not be whole.

    Raises ValueError for an unknown rule, or counts that are not 0 <= yes <= n with n > 0.
    """
    k, m = np.asarray(yes, dtype=np.float64), np.asarray(n, dtype=np.float64)
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; wanted one of {RULES}")
    if not ((m > 0) & (k >= 0) & (k <= m * (1 + 1e-9))).all():  # sums of weights differ by rounding
        raise ValueError(f"yes is {k.tolist()} of n = {m.tolist()}; wanted 0 <= yes <= n and n > 0")
    return np.clip(k / m, CLIP, 1 - CLIP) if rule == "clipped" else (k + 0.5) / (m + 1)


def d_prime(
    hits: ArrayLike, present: ArrayLike, false_alarms: ArrayLike, absent: ArrayLike, rule: str = "loglinear"
) -> np.ndarray:
    """Sensitivity d' = z(hit rate) - z(false alarm rate), elementwise, z the normal quantile (Green and Swets 1966).

    `hits` of `present` and `false_alarms` of `absent` are counts; errors as in `rate`.
    """
    return ndtri(rate(hits, present, rule)) - ndtri(rate(false_alarms, absent, rule))


def criterion(
    hits: ArrayLike, present: ArrayLike, false_alarms: ArrayLike, absent: ArrayLike, rule: str = "loglinear"
) -> np.ndarray:
    """Bias c = -(z(hit rate) + z(false alarm rate)) / 2: above 0 for one who rather says no. Arguments of `d_prime`."""
    return -(ndtri(rate(hits, present, rule)) + ndtri(rate(false_alarms, absent, rule))) / 2


def signal_report(
    scores: ArrayLike,
    present: ArrayLike,
    groups: ArrayLike,
    threshold: float = 0.0,
    draws: int = stats.DRAWS,
    seed: int = 0,
    level: float = stats.LEVEL,
) -> dict:
    """What "yes if the score is above the threshold" is worth, for `scores [N]`, `present [N]` (0, 1), `groups [N]`.

    A group is what was drawn together (all that was asked about one vector), and is present or absent as a whole;
    intervals come from a bootstrap over groups, among the present and among the absent ones apart. Those of the two
    rates are those of `share`, which say something where all answers are alike, too.

    Returns counts "present", "absent", "present_groups", "absent_groups"; and {"value", "interval"} for "tpr", "fpr"
    (shares of yes) and each of `ESTIMATES`; the criterion is that of the log-linear rates. A bootstrap interval is
    None where a kind has a single group. Raises ValueError unless there are both kinds.
    """
    s, y = check_scores(scores, present)
    group = check_groups(groups, len(y))
    if y.all() or not y.any():
        raise ValueError(f"present is {bool(y[0])} for all {len(y)}; wanted both kinds")
    yes = s > threshold
    counted = np.stack([yes & y, y, yes & ~y, ~y], axis=1).astype(np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:  # [R, N] -> [R, ESTIMATES]
        hits, positives, alarms, negatives = (weights @ counted).T
        return np.stack(
            [
                (hits + negatives - alarms) / (positives + negatives),
                (hits / positives + 1 - alarms / negatives) / 2,
                d_prime(hits, positives, alarms, negatives, "clipped"),
                d_prime(hits, positives, alarms, negatives),
                criterion(hits, positives, alarms, negatives),
                ranking.score_auroc(s, y, weights),
            ],
            axis=-1,
        )

    values = statistic(np.ones((1, len(y))))[0]
    several = all(len(np.unique(group[kind])) > 1 for kind in (y, ~y))
    samples = (
        stats.cluster_bootstrap(statistic, group, draws, seed, strata=y.tolist())
        if several
        else np.empty((0, len(values)))
    )
    estimates = {
        name: {"value": float(values[k]), "interval": stats.defined_interval(samples[:, k], level)}
        for k, name in enumerate(ESTIMATES)
    }
    rates = {name: share(yes[kind], group[kind], level) for name, kind in (("tpr", y), ("fpr", ~y))}
    counts = {
        "present": int(y.sum()),
        "absent": int((~y).sum()),
        "present_groups": len(np.unique(group[y])),
        "absent_groups": len(np.unique(group[~y])),
    }
    return counts | rates | estimates


def share(yes: ArrayLike, groups: ArrayLike, level: float = stats.LEVEL) -> dict:
    """{"value", "interval"} of the share of `yes [N]` (booleans), by `stats.cluster_wilson_interval` over `groups`."""
    said = np.asarray(yes, dtype=bool)
    return {"value": float(said.mean()), "interval": list(stats.cluster_wilson_interval(said, groups, level))}
