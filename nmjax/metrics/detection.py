"""A score as a detector: every threshold at once, the choice of one, and its performance with intervals.

Everything takes `scores [N]` (finite numbers) and `labels [N]` (1 or True for what is to be found: a hallucination),
and computes in float64 on the host. `direction` says which scores are risky: under "high" what scores at least the
threshold is flagged, under "low" what scores at most the threshold. `groups [N]` names the source of each example: a
question that appears with its right and with its wrong answer is one group, and resampling and splitting keep it whole.

What is undefined (the precision of a threshold that flags nothing, the recall where there is nothing to find) is NaN in
arrays and None in dictionaries, which are plain numbers, strings and lists for JSON. How directions, combinations of
signals and honest estimates of both come from folds is in `nmjax.metrics.crossfit`; thresholds that promise a recall
are in `nmjax.metrics.conformal`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import ArrayLike

from nmjax.metrics import ranking, stats

DIRECTIONS = ("high", "low")


def check_scores(scores: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """`scores` as float64 [N] and `labels` as bool [N]; ValueError unless finite numbers and as many of 0 and 1."""
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if s.ndim != 1 or len(s) == 0:
        raise ValueError(f"scores has shape {s.shape}; wanted [N] with N >= 1")
    if not np.isfinite(s).all():
        row = int(np.flatnonzero(~np.isfinite(s))[0])
        raise ValueError(f"scores[{row}] is {s[row]}; wanted finite numbers")
    if y.shape != s.shape:
        raise ValueError(f"labels has shape {y.shape}; wanted [{len(s)}], one label a score")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"labels holds {y[~np.isin(y, (0, 1))][0]}; wanted 0 and 1")
    return s, y.astype(bool)


def check_groups(groups: ArrayLike, n: int) -> np.ndarray:
    """The number of each example's group, int [N] in 0..G-1."""
    g = np.asarray(groups)
    if g.shape != (n,):
        raise ValueError(f"groups has shape {g.shape}; wanted [{n}], one group a score")
    return np.unique(g, return_inverse=True)[1]


def sign(direction: str) -> float:
    """1 for "high" and -1 for "low": what scores are multiplied by so that high is risky."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; wanted one of {DIRECTIONS}")
    return 1.0 if direction == "high" else -1.0


def flags(scores: ArrayLike, tau: float | None, direction: str) -> np.ndarray:
    """Which `scores [...]` the threshold `tau` flags, bool [...]; None flags all."""
    s, towards_risk = np.asarray(scores, dtype=np.float64), sign(direction)
    return np.full(s.shape, True) if tau is None else towards_risk * s >= towards_risk * tau


# --- Every threshold --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Curve:
    """The rule "flag if score >= tau" at every distinct score as tau, highest first; all arrays are [G].

    `tp`, `fp`: how many flagged examples are positive and negative. `recall` is NaN where nothing is positive.
    """

    tau: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    flag_rate: np.ndarray
    tp: np.ndarray
    fp: np.ndarray


def curve(scores: ArrayLike, labels: ArrayLike) -> Curve:
    """Precision, recall, F1 and flag rate at every threshold that makes a difference, for "high is risky"."""
    s, y = check_scores(scores, labels)
    taus = np.unique(s)[::-1]
    tp, fp = _counts(s, y, taus, "high")
    return Curve(taus, *_rates(tp, fp, y), tp, fp)


def at_thresholds(scores: ArrayLike, labels: ArrayLike, taus: ArrayLike, direction: str) -> list[dict]:
    """The rule of `direction` at each of the `taus [T]`, in their order.

    One dictionary a threshold: "tau", "precision" (None if nothing is flagged), "recall" (None if nothing is positive),
    "f1" (None if neither), "flag_rate", and the counts "tp", "fp", "fn", "tn".
    """
    s, y = check_scores(scores, labels)
    cuts = _check_taus(taus)
    tp, fp = _counts(s, y, cuts, direction)
    rates = zip(("precision", "recall", "f1", "flag_rate"), _rates(tp, fp, y), strict=True)
    columns = {"tau": cuts} | dict(rates)
    counts = {"tp": tp, "fp": fp, "fn": y.sum() - tp, "tn": (~y).sum() - fp}
    return [
        {name: stats.defined(column[t]) for name, column in columns.items()}
        | {name: int(column[t]) for name, column in counts.items()}
        for t in range(len(cuts))
    ]


def _check_taus(taus: ArrayLike) -> np.ndarray:
    cuts = np.asarray(taus, dtype=np.float64)
    if cuts.ndim != 1 or not np.isfinite(cuts).all():
        raise ValueError(f"taus is {cuts.tolist()}; wanted [T] finite numbers")
    return cuts


def _counts(s: np.ndarray, y: np.ndarray, taus: np.ndarray, direction: str) -> tuple[np.ndarray, np.ndarray]:
    """How many positives and how many negatives each of the `taus [T]` flags, by bisection of the sorted scores."""
    towards_risk = sign(direction)
    positive, negative = (np.sort(towards_risk * s[kind]) for kind in (y, ~y))
    cuts = towards_risk * taus
    return len(positive) - np.searchsorted(positive, cuts), len(negative) - np.searchsorted(negative, cuts)


def _rates(tp: np.ndarray, fp: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F1 and flag rate, NaN where undefined."""
    flagged, positives = tp + fp, y.sum()
    with np.errstate(invalid="ignore"):
        return tp / flagged, tp / positives, 2 * tp / (flagged + positives), flagged / len(y)


# --- The choice of a threshold ----------------------------------------------------------------------------------------


def tau_grid(
    scores: ArrayLike,
    direction: str,
    start: float | None = None,
    stop: float | None = None,
    step: float | None = None,
) -> np.ndarray:
    """Thresholds to try, float64 [T]: start, start + step, .. stop, or 40 quantiles of the scores if none is given.

    The quantiles are .60, .61, .. .99 for "low" and their mirror images .40, .39, .. .01 for "high", so that the
    thresholds flag 60% to 99% of the scores either way.
    """
    if start is None and stop is None and step is None:
        share = np.linspace(0.60, 0.99, 40)
        return np.quantile(np.asarray(scores, dtype=np.float64), share if sign(direction) < 0 else 1 - share)
    if start is None or stop is None or step is None or not (step > 0 and stop >= start):
        raise ValueError(f"start, stop, step are {start}, {stop}, {step}; wanted stop >= start and step > 0, or none")
    return np.arange(start, stop + step / 2, step)


def best_threshold(
    scores: ArrayLike,
    labels: ArrayLike,
    direction: str,
    min_recall: float = 0.9,
    taus: ArrayLike | None = None,
) -> dict:
    """The threshold of highest precision among those of recall `min_recall` or more, or else the one of best F1.

    Candidates are `taus [T]`, or every distinct score, among which one always has the recall. Of equally good ones that
    with the fewest flags is taken. Returns its row of `at_thresholds` with "min_recall" and "mode",
    "precision_at_recall" or "best_f1". Chosen on these labels, its precision and recall are flattered: see
    `conformal.conformal_threshold`, and measure on others.

    Raises ValueError where no label is positive.
    """
    s, y = check_scores(scores, labels)
    if not y.any():
        raise ValueError("labels holds no 1; wanted at least one, or no threshold has a recall")
    candidates = np.unique(s) if taus is None else _check_taus(taus)
    tp, fp = _counts(s, y, candidates, direction)
    precision, recall, f1, flag_rate = _rates(tp, fp, y)
    enough = (recall >= min_recall) & (flag_rate > 0)
    worth = np.where(enough, precision, -1.0) if enough.any() else f1
    best = np.lexsort((flag_rate, -worth))[0]
    mode = "precision_at_recall" if enough.any() else "best_f1"
    return at_thresholds(s, y, candidates[[best]], direction)[0] | {"min_recall": min_recall, "mode": mode}


# --- Performance ------------------------------------------------------------------------------------------------------


def detection_report(
    scores: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    tau: float | None,
    direction: str,
    draws: int = stats.DRAWS,
    seed: int = 0,
    level: float = stats.LEVEL,
) -> dict:
    """A signal and its threshold, with bootstrap intervals over groups; direction and `tau` come from other data.

    Returns counts "n", "positives", "groups"; "base_rate" (the precision of flagging everything); "direction", "tau"
    (None flags everything), "level"; and {"value", "interval"} for
      "auroc_raw": of the score as it is (below 1/2 where low scores are risky),
      "auroc", "average_precision": in the direction,
      "precision", "recall", "f1", "flag_rate": at the threshold.
    All come from the same draws. An interval leaves out draws in which its value is undefined; it is None where every
    one is, or if there is a single group.
    """
    s, y = check_scores(scores, labels)
    group, risk = check_groups(groups, len(y)), sign(direction) * s
    at_tau = _found_by(flags(s, tau, direction), y)

    def statistic(weights: np.ndarray) -> np.ndarray:  # [R, N] -> [R, 3 + 4]
        auroc = ranking.score_auroc(risk, y, weights)
        average_precision = ranking.score_average_precision(risk, y, weights)
        ranks = np.stack([auroc if direction == "high" else 1 - auroc, auroc, average_precision], axis=-1)
        return np.concatenate([ranks, at_tau(weights)], axis=-1)

    names = ("auroc_raw", "auroc", "average_precision", *_AT_TAU)
    head = {"direction": direction, "tau": None if tau is None else float(tau), "level": level}
    return _counted(y, group) | head | _estimates(names, statistic, group, draws, seed, level)


def flag_report(
    flagged: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    draws: int = stats.DRAWS,
    seed: int = 0,
    level: float = stats.LEVEL,
) -> dict:
    """What `flagged [N]` (booleans) finds: `detection_report` without what needs a score, from the same draws."""
    f, y = check_scores(flagged, labels)
    group = check_groups(groups, len(y))
    found = _estimates(_AT_TAU, _found_by(f > 0, y), group, draws, seed, level)
    return _counted(y, group) | {"level": level} | found


_AT_TAU = ("precision", "recall", "f1", "flag_rate")


def _found_by(flagged: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The rates _AT_TAU of booleans [N], as a function of weights: [R, N] -> [R, 4]."""
    columns = np.stack([flagged & y, flagged, y, np.ones(len(y))], axis=1)

    def statistic(weights: np.ndarray) -> np.ndarray:
        tp, flag_count, positives, total = (weights @ columns).T
        with np.errstate(invalid="ignore"):
            rates = tp / flag_count, tp / positives, 2 * tp / (flag_count + positives), flag_count / total
        return np.stack(rates, axis=-1)

    return statistic


def _counted(y: np.ndarray, group: np.ndarray) -> dict:
    return {"n": len(y), "positives": int(y.sum()), "groups": int(group.max()) + 1, "base_rate": float(y.mean())}


def _estimates(
    names: Sequence[str], statistic: Callable, group: np.ndarray, draws: int, seed: int, level: float
) -> dict:
    """{"value", "interval"} by name of what `statistic` makes of weights [R, N], [R, names]."""
    values = statistic(np.ones((1, len(group))))[0]
    samples = stats.cluster_bootstrap(statistic, group, draws, seed)
    return {
        name: {"value": stats.defined(values[m]), "interval": stats.defined_interval(samples[:, m], level)}
        for m, name in enumerate(names)
    }
