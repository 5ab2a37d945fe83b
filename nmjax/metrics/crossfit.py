"""What is learnt from the labels is judged on other labels: directions and combinations of signals, by grouped folds.

Conventions and checks are those of `nmjax.metrics.detection`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nmjax.metrics import calibration, ranking, stats
from nmjax.metrics.detection import check_groups, check_scores

PENALTY_C = 1.0
"""Inverse strength of the L2 penalty on standardised features: scikit-learn's default, and not tuned. With hundreds of
examples a feature it changes little, while tuning it takes another, inner, grouped cross-validation."""


def grouped_folds(groups: ArrayLike, labels: ArrayLike, folds: int = 5, seed: int = 0) -> np.ndarray:
    """The fold of each example, int [N] in 0..folds-1; a group is never split.

    Groups are dealt out in random order among those with as many positives and as many members, so that the folds are
    alike in both. Raises ValueError unless 2 <= folds <= number of groups.
    """
    y = np.asarray(labels, dtype=bool)
    group = check_groups(groups, len(y))
    size, positives = np.bincount(group), np.bincount(group, y)
    if not 2 <= folds <= len(size):
        raise ValueError(f"folds is {folds} of {len(size)} groups; wanted 2 to {len(size)}")
    order = np.lexsort((np.random.default_rng(seed).permutation(len(size)), size, positives))
    fold = np.empty(len(size), dtype=np.int64)
    fold[order] = np.arange(len(size)) % folds
    return fold[group]


def splits(groups: ArrayLike, labels: ArrayLike, folds: int = 5, seed: int = 0) -> Iterator[tuple]:
    """Each fold of `grouped_folds` once: whether an example is in the others, and whether in it, bool [N] both."""
    fold = grouped_folds(groups, labels, folds, seed)
    for f in range(folds):
        yield fold != f, fold == f


def choose_direction(scores: ArrayLike, labels: ArrayLike, groups: ArrayLike, folds: int = 5, seed: int = 0) -> dict:
    """Whether high or low scores are risky, how sure that is, and what a signal is worth if this must be learnt.

    Returns
      "direction": "high" if the AUROC of all examples is 1/2 or more, else "low";
      "auroc_raw": that AUROC, of the score as it is;
      "auroc_high_by_fold" [folds]: the same within each fold (None where it holds one label only);
      "agreement": the share of these on the same side of 1/2 as `auroc_raw`; "consistent": whether most are;
      "auroc_crossfit": the mean over folds of the AUROC in the direction that the other folds choose. It may be below
        1/2, and of a signal that says nothing it is, slightly (what a fold has too much of the others have too little
        of), while the AUROC in the direction chosen on the same examples never is.

    Raises ValueError where only one label occurs, or as `grouped_folds`.
    """
    s, y = check_scores(scores, labels)
    _check_both(y)
    pairs = np.array([[_auroc(s, y, part) for part in split] for split in splits(groups, y, folds, seed)])
    elsewhere, within = pairs[~np.isnan(pairs).any(axis=1)].T
    raw = _auroc(s, y, np.full(len(y), True))
    by_fold = pairs[:, 1]
    seen = by_fold[~np.isnan(by_fold)]
    agreement = float(np.mean((seen >= 0.5) == (raw >= 0.5))) if len(seen) else None
    return {
        "direction": "high" if raw >= 0.5 else "low",
        "auroc_raw": raw,
        "auroc_high_by_fold": [stats.defined(a) for a in by_fold],
        "agreement": agreement,
        "consistent": None if agreement is None else agreement > 0.5,
        "auroc_crossfit": float(np.where(elsewhere >= 0.5, within, 1 - within).mean()) if len(within) else None,
    }


def combine(
    features: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    names: Sequence[str],
    folds: int = 5,
    seed: int = 0,
    draws: int = stats.DRAWS,
    level: float = stats.LEVEL,
) -> dict:
    """Logistic regression on several signals, judged by the probabilities of examples it was not fitted to.

    Standardising and fitting happen within the other folds, so nothing of a group reaches the model that judges it.
    The intervals are over groups with those models as they are: they leave out that other data would give others.

    Args:
      features: [N, F], finite.
      labels, groups: [N].
      names: [F], of the features.
      draws, level: of the bootstrap intervals.

    Returns
      "weights" (by name) and "intercept" of the model of all examples, for the features as they come: the probability
        is 1 / (1 + exp(-(intercept + sum of weight x feature)));
      "probabilities" [N] out of fold, and of these
      "auroc", "average_precision" ({"value", "interval"}), "brier" (mean squared error, in [0, 1]) and "ece" (10 bins);
      "auroc_in_sample": of the model of all examples on the same ones, to show what fitting flatters;
      "names", "folds", "penalty_c".

    Raises ValueError for other shapes, or where the folds beside one hold a single label.
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] == 0 or x.shape[1] != len(names) or not np.isfinite(x).all():
        raise ValueError(f"features has shape {x.shape}; wanted finite numbers [N, {len(names)}], one column a name")
    _, y = check_scores(x[:, 0], labels)
    group = check_groups(groups, len(y))
    p = np.empty(len(y))
    for others, within in splits(group, y, folds, seed):
        _check_both(y[others])
        p[within] = _fitted(x[others], y[others]).predict_proba(x[within])[:, 1]

    def statistic(weights: np.ndarray) -> np.ndarray:  # [R, N] -> [R, 2]
        ranks = ranking.score_auroc(p, y, weights), ranking.score_average_precision(p, y, weights)
        return np.stack(ranks, axis=-1)

    weights, intercept = fit_logistic(x, y)
    estimates, samples = statistic(np.ones((1, len(y))))[0], stats.cluster_bootstrap(statistic, group, draws, seed)
    auroc, average_precision = (
        {"value": stats.defined(estimates[m]), "interval": stats.defined_interval(samples[:, m], level)} for m in (0, 1)
    )
    return {
        "names": list(names),
        "weights": {name: float(w) for name, w in zip(names, weights, strict=True)},
        "intercept": intercept,
        "probabilities": p.tolist(),
        "auroc": auroc,
        "average_precision": average_precision,
        "brier": float(np.mean((p - y) ** 2)),
        "ece": float(calibration.event_ece(p, y)),
        "auroc_in_sample": float(ranking.score_auroc(x @ weights, y)),
        "folds": folds,
        "penalty_c": PENALTY_C,
    }


def fit_logistic(features: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, float]:
    """Weights [F] and intercept of the logistic regression on `features [N, F]` as they come, penalised as above."""
    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=bool)
    _check_both(y)
    scaler, logistic = _fitted(x, y)
    weights = logistic.coef_[0] / scaler.scale_
    return weights, float(logistic.intercept_[0] - weights @ scaler.mean_)


def _fitted(x: np.ndarray, y: np.ndarray):
    # Newton's method: exact in a few steps, and made for many more examples than features.
    return make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY_C, solver="newton-cholesky")).fit(x, y)


def _auroc(s: np.ndarray, y: np.ndarray, part: np.ndarray) -> float:
    return float(ranking.score_auroc(s[part], y[part]))


def _check_both(y: np.ndarray) -> None:
    if y.all() or not y.any():
        raise ValueError(f"labels are all {int(y[0])} in {len(y)} examples to learn from; wanted both 0 and 1")
