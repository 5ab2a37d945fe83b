"""Choices among C classes: accuracy, balanced accuracy and AUROC against what the classes' frequencies alone give.

`scores [N, C]` are what each class got (log-probabilities, say), `labels [N]` the right one. A model that always gives
the same answer has the share of that class as accuracy, and 1 / C as balanced accuracy: so that is what a signal is
measured against. Equal highest scores share the answer, so scores that are all alike are at chance, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from nmjax.metrics import stats
from nmjax.metrics.ranking import score_auroc

PERMUTATIONS = 2000


def answered(scores: ArrayLike) -> np.ndarray:
    """The share of each class in the answers, float64 [N, C]: 1 for the highest score, less where several are."""
    s = np.asarray(scores, np.float64)
    best = s == s.max(axis=1, keepdims=True)
    return best / best.sum(axis=1, keepdims=True)


def balanced_accuracy(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean over the classes of the share of their members that is answered right, [...] for `weights [..., N]`.

    Classes without weight are left out.
    """
    y = np.asarray(labels)
    right = answered(scores)[np.arange(len(y)), y]
    members = np.eye(np.shape(scores)[1])[y]  # [N, C]
    w = np.ones(len(y)) if weights is None else np.asarray(weights, np.float64)
    sizes = w @ members
    recalls = np.divide((w * right) @ members, sizes, out=np.full(sizes.shape, np.nan), where=sizes > 0)
    return np.nanmean(recalls, axis=-1)


def macro_auroc(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Mean over the classes of the AUROC of their own score against all others, [...]; 1/2 is chance.

    What a class gets in all rows alike does not matter, so a model that always answers the same may still be above 1/2.
    Classes of which all members, or none, have weight are left out.
    """
    s, y = np.asarray(scores, np.float64), np.asarray(labels)
    columns = [score_auroc(s[:, c], y == c, weights) for c in range(s.shape[1])]
    return np.nanmean(np.stack(columns), axis=0)


def permutation_p(scores: ArrayLike, labels: ArrayLike, draws: int = PERMUTATIONS, seed: int = 0) -> float:
    """p-value of a balanced accuracy as high as this, were labels dealt to the rows at random."""
    y = np.asarray(labels)
    shares = answered(scores)
    per_member = shares / np.bincount(y, minlength=shares.shape[1])  # what a row adds to the sum over recalls
    rng = np.random.default_rng(seed)
    seen = per_member[np.arange(len(y)), y].sum()
    dealt = rng.permuted(np.broadcast_to(y, (draws, len(y))), axis=1)
    chance = per_member[np.arange(len(y)), dealt].sum(axis=1)
    return float((1 + (chance >= seen - 1e-12).sum()) / (1 + draws))


def class_report(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike | None = None, draws: int = stats.DRAWS, seed: int = 0
) -> dict[str, Any]:
    """How well scores [N, C] say to which class rows belong, with intervals over `groups [N]` of rows.

    Args:
      labels: int [N] in 0 to C - 1; every class has a member.
      groups: rows that stand or fall together; None = each by itself.
    Returns:
      n, groups (how many), sizes [C], chance (1 / C), prior (accuracy of always answering the most frequent class),
      accuracy, balanced_accuracy and macro_auroc, each {"value", "interval"}, p_value, above_chance (whether the
      interval of the balanced accuracy lies above 1 / C), and confusion [C][C]: how often a class (row) was answered
      as one (column).
    Raises:
      ValueError: shapes that do not fit, scores that are not finite, or a class without members.
    """
    s, y = np.asarray(scores, np.float64), np.asarray(labels)
    if s.ndim != 2 or s.shape[1] < 2 or y.shape != s.shape[:1]:
        raise ValueError(f"scores has shape {s.shape} and labels {y.shape}; wanted [N, C] with C >= 2, and [N]")
    N, C = s.shape
    if not np.isfinite(s).all():
        raise ValueError("scores holds NaN or infinity; wanted finite numbers")
    if y.dtype.kind not in "iu" or set(y.tolist()) != set(range(C)):
        raise ValueError(f"labels holds {sorted(set(y.tolist()))}; wanted each class from 0 to {C - 1}")
    groups = np.arange(N) if groups is None else np.asarray(groups)
    right = answered(s)[np.arange(N), y]

    def statistic(w: np.ndarray) -> np.ndarray:  # [R, N] -> [R, 3]
        accuracy = w @ right / w.sum(axis=-1)
        return np.stack([accuracy, balanced_accuracy(s, y, w), macro_auroc(s, y, w)], axis=-1)

    names = ("accuracy", "balanced_accuracy", "macro_auroc")
    values = statistic(np.ones((1, N)))[0]
    samples = stats.cluster_bootstrap(statistic, groups, draws, seed)
    found: dict[str, dict[str, Any]] = {
        name: {"value": float(values[k]), "interval": stats.defined_interval(samples[:, k])}
        for k, name in enumerate(names)
    }
    sizes = np.bincount(y, minlength=C)
    interval = found["balanced_accuracy"]["interval"]
    return {
        "n": N,
        "groups": len(set(groups.tolist())),
        "sizes": sizes.tolist(),
        "chance": 1 / C,
        "prior": float(sizes.max() / N),
        **found,
        "p_value": permutation_p(s, y, seed=seed),
        "above_chance": interval is not None and interval[0] > 1 / C,
        "confusion": (np.eye(C)[y].T @ answered(s)).tolist(),
    }
