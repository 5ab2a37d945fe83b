"""How well a prediction of a model's coming loss is: in nats, in order, as a probability, and against plain rivals.

Everything is about N held-out tokens of one model and takes, on the host in float64:
  `predicted [N]`: the loss that was predicted, nats (the confidence head's output; low is confident);
  `actual [N]`: the loss that came, nats;
  `wrong [N]`: whether the next token was another than the model's most probable one, 0 and 1;
  `entropy [N]` (nats) and `max_prob [N]` of the model's own distribution where the prediction was made: what it knew of
    its uncertainty without being taught to predict;
  `groups [N]`: the chunk of each token. Tokens of a chunk are alike, so chunks are what is resampled, and a fit is
    judged on chunks other than those it was made on (`crossfit.splits`).

Results are plain dictionaries for JSON, None where a measure is undefined. Intervals over runs with different seeds are
in `nmjax.metrics.seeds`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import ArrayLike
from scipy.special import expit
from scipy.stats import linregress, pearsonr, spearmanr

from nmjax.metrics import calibration, crossfit, ranking, stats
from nmjax.metrics.detection import check_groups

COMPARED = ("mse", "r2", "auroc_wrong")
"""The measures whose difference from each rival has an interval."""


def quality(
    predicted: ArrayLike,
    actual: ArrayLike,
    wrong: ArrayLike,
    groups: ArrayLike,
    folds: int = 5,
    seed: int = 0,
    n_bins: int = 10,
) -> dict:
    """Measures of one prediction, all [N]; see the head of this file.

    In nats:
      "mse" (nats squared) and "r2", 1 - mse / variance of the actual losses: 0 is as good as knowing their mean;
      "calibration_slope", "calibration_intercept": least squares of actual on predicted, 1 and 0 if calibrated;
      "reliability": {"predicted", "actual", "counts"}, each [n_bins], the means in bins of equal mass of the prediction
        (equal predictions share a bin, so bins can be empty);
      "reliability_error": the difference between the two means of a bin, without its sign, averaged over tokens.
    In order, whatever the scale:
      "pearson", "spearman": correlation with the actual loss;
      "auroc_wrong": the probability that the prediction is higher where `wrong` than where right; a tie counts half.
    As a probability of the event that the loss is above "median" (that of the actual losses):
      "ece_above_median" (`calibration.event_ece`) and "brier_above_median", its mean squared error. A loss in nats is
      no probability, so a logistic curve makes it one, fitted to the event in the other folds. The ECE tells whether
      such a curve fits and holds elsewhere. A prediction that says nothing can have a small one, too; its Brier score
      is 0.25.
    And "n", the number of tokens.

    Raises ValueError for arrays of unlike shapes, numbers that are not finite, or fewer groups than folds.
    """
    c, f = _columns(predicted=predicted, actual=actual)
    y, group = _check_wrong(wrong, len(f)), check_groups(groups, len(f))
    return _in_nats(c, f, n_bins) | _in_order(c, f, y) | _as_probability(c, f, group, folds, seed)


def baselines(
    actual: ArrayLike,
    wrong: ArrayLike,
    entropy: ArrayLike,
    max_prob: ArrayLike,
    groups: ArrayLike,
    folds: int = 5,
    seed: int = 0,
    n_bins: int = 10,
) -> dict:
    """`quality` of what needs no head: {"constant", "entropy", "max_prob"}, each token predicted by the other folds.

    "constant" is their mean loss, the others their least-squares line of the loss on the entropy or on the largest
    probability. Measures in nats are of these predictions. Those of order and probability do not depend on a line's
    height and slope, and are of the entropy or largest probability itself, with the sign that the other folds' line
    has. Tokens ordered by lines of several folds would be ordered by the lines' heights, too, and these mislead: the
    other folds' mean is low just where a fold's own losses are high. So the constant, which is nothing but height, has
    no calibration slope, and its AUROC is 1/2.

    Raises ValueError as `quality`.
    """
    f, h, m = _columns(actual=actual, entropy=entropy, max_prob=max_prob)
    y, group = _check_wrong(wrong, len(f)), check_groups(groups, len(f))
    found = {
        name: _in_nats(rival.predicted, f, n_bins)
        | _in_order(rival.order, f, y)
        | _as_probability(rival.signal, f, group, folds, seed)
        for name, rival in _rivals(f, h, m, group, folds, seed).items()
    }
    found["constant"] |= {"calibration_slope": None, "calibration_intercept": None}
    return found


def compare_with_baselines(
    predicted: ArrayLike,
    actual: ArrayLike,
    wrong: ArrayLike,
    entropy: ArrayLike,
    max_prob: ArrayLike,
    groups: ArrayLike,
    folds: int = 5,
    seed: int = 0,
    draws: int = stats.DRAWS,
    level: float = stats.LEVEL,
) -> dict:
    """The prediction's measure less each rival's, {rival: {measure: {"difference", "interval"}}}, of one model.

    Rivals are those of `baselines`, measures `COMPARED`: better is below 0 for the MSE and above 0 for the others.
    Intervals are paired and over groups (`stats.cluster_bootstrap`), without the draws in which a measure is undefined.
    They take head and lines as they are, and leave out that another training would give others.

    Raises ValueError as `quality`.
    """
    c, f, h, m = _columns(predicted=predicted, actual=actual, entropy=entropy, max_prob=max_prob)
    y, group = _check_wrong(wrong, len(f)), check_groups(groups, len(f))
    rivals = _rivals(f, h, m, group, folds, seed)
    orders = [c, *(rival.order for rival in rivals.values())]
    errors = np.stack([(p - f) ** 2 for p in (c, *(rival.predicted for rival in rivals.values()))], axis=1)
    centred = (f - f.mean()) * _varies(f)
    moments = np.stack([centred, centred**2], axis=1)

    def measures(weights: np.ndarray) -> np.ndarray:  # [R, N] -> [R, contenders, COMPARED]
        total = weights.sum(axis=1, keepdims=True)
        mse, (mean, square) = weights @ errors / total, (weights @ moments / total).T
        variance = np.broadcast_to((square - mean**2)[:, None], mse.shape)
        r2 = 1 - np.divide(mse, variance, out=np.full(mse.shape, np.nan), where=variance > 1e-12 * square[:, None])
        auroc = np.stack([ranking.score_auroc(order, y, weights) for order in orders], axis=-1)
        return np.stack([mse, r2, auroc], axis=-1)

    values, samples = measures(np.ones((1, len(f))))[0], stats.cluster_bootstrap(measures, group, draws, seed)
    return {
        name: {
            measure: {
                "difference": stats.defined(values[0, k] - values[r, k]),
                "interval": stats.defined_interval(samples[:, 0, k] - samples[:, r, k], level),
            }
            for k, measure in enumerate(COMPARED)
        }
        for r, name in enumerate(rivals, start=1)
    }


# --- Rivals -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Rival:
    """A `signal [N]`, the loss `predicted [N]` from it, and the signal in the direction of the loss, `order [N]`."""

    signal: np.ndarray
    predicted: np.ndarray
    order: np.ndarray


def _rivals(actual, entropy, max_prob, group, folds: int, seed: int) -> dict[str, _Rival]:
    signals = {"constant": np.zeros(len(actual)), "entropy": entropy, "max_prob": max_prob}
    return {name: _fitted_elsewhere(x, actual, group, folds, seed) for name, x in signals.items()}


def _fitted_elsewhere(x: np.ndarray, actual: np.ndarray, group: np.ndarray, folds: int, seed: int) -> _Rival:
    predicted, direction = np.empty(len(x)), np.empty(len(x))
    for others, within in _splits(group, folds, seed):
        slope, intercept = _line(x[others], actual[others]) or (0.0, actual[others].mean())
        predicted[within], direction[within] = intercept + slope * x[within], np.sign(slope)
    return _Rival(x, predicted, direction * (x - x.mean()))


def _splits(group: np.ndarray, folds: int, seed: int):
    return crossfit.splits(group, np.zeros(len(group)), folds, seed)  # the losses have no part in who is in which fold


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float] | None:
    """Slope and intercept of the least-squares line of y on x, None where x is constant."""
    if not _varies(x):
        return None
    fit = linregress(x, y)
    return float(fit.slope), float(fit.intercept)


# --- Measures ---------------------------------------------------------------------------------------------------------


def _in_nats(predicted: np.ndarray, actual: np.ndarray, n_bins: int) -> dict:
    mse = float(np.mean((predicted - actual) ** 2))
    slope, intercept = _line(predicted, actual) or (None, None)
    index = calibration.equal_mass_index(predicted, n_bins)
    counts = np.bincount(index, minlength=n_bins)
    sums = np.stack([np.bincount(index, values, n_bins) for values in (predicted, actual)])
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return {
        "n": len(actual),
        "mse": mse,
        "r2": 1 - mse / float(actual.var()) if _varies(actual) else None,
        "calibration_slope": slope,
        "calibration_intercept": intercept,
        "reliability": {
            "predicted": [stats.defined(mean) for mean in means[0]],
            "actual": [stats.defined(mean) for mean in means[1]],
            "counts": counts.tolist(),
        },
        "reliability_error": float(np.abs(sums[0] - sums[1]).sum() / len(actual)),
    }


def _in_order(order: np.ndarray, actual: np.ndarray, wrong: np.ndarray) -> dict:
    both_vary = _varies(order) and _varies(actual)
    return {
        "pearson": float(pearsonr(order, actual).statistic) if both_vary else None,
        "spearman": float(spearmanr(order, actual).statistic) if both_vary else None,
        "auroc_wrong": stats.defined(ranking.score_auroc(order, wrong)),
    }


def _as_probability(signal: np.ndarray, actual: np.ndarray, group: np.ndarray, folds: int, seed: int) -> dict:
    median = float(np.median(actual))
    above, p = actual > median, np.empty(len(actual))
    result: dict = {"median": median, "ece_above_median": None, "brier_above_median": None}
    for others, within in _splits(group, folds, seed):
        if len(np.unique(above[others])) < 2:
            return result
        if _varies(signal[others]):
            weights, intercept = crossfit.fit_logistic(signal[others, None], above[others])
            p[within] = expit(intercept + weights[0] * signal[within])
        else:
            p[within] = above[others].mean()
    ece, brier = float(calibration.event_ece(p, above)), float(np.mean((p - above) ** 2))
    return result | {"ece_above_median": ece, "brier_above_median": brier}


def _varies(x: np.ndarray) -> bool:
    return bool(np.ptp(x) > 1e-12 * np.abs(x).max())  # more than by rounding


# --- Checks -----------------------------------------------------------------------------------------------------------


def _columns(**named: ArrayLike) -> list[np.ndarray]:
    """The arguments as float64 [N], of one N >= 1 and finite."""
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in named.items()}
    first, n = next(iter(columns)), np.size(next(iter(columns.values())))
    for name, x in columns.items():
        if x.shape != (n,) or n == 0:
            raise ValueError(f"{name} has shape {x.shape}; wanted [N] with N >= 1, as many as {first}, which has {n}")
        if not np.isfinite(x).all():
            at = int(np.flatnonzero(~np.isfinite(x))[0])
            raise ValueError(f"{name}[{at}] is {x[at]}; wanted finite numbers")
    return list(columns.values())


def _check_wrong(wrong: ArrayLike, n: int) -> np.ndarray:
    y = np.asarray(wrong)
    if y.shape != (n,):
        raise ValueError(f"wrong has shape {y.shape}; wanted [{n}], one a token")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"wrong holds {y[~np.isin(y, (0, 1))][0]}; wanted 0 and 1")
    return y.astype(bool)
