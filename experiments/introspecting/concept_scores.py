"""Rates with intervals over concepts: whether something is said to be there, and whether the concept is found.

Shares of answers have Wilson's interval for as many answers as the concepts are worth (`signal_detection.share`), which
says something where all answers are alike, too. All else is bootstrapped over concepts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nmjax.metrics import stats
from nmjax.metrics.multiclass import answered
from nmjax.metrics.signal_detection import share

PERMUTATIONS = 10_000


def mean(values: np.ndarray, concept: np.ndarray, draws: int, seed: int) -> dict[str, Any]:
    """{"value", "interval", "n"} of the mean of those values [N] that are not NaN."""
    asked = ~np.isnan(values)
    return _ratio(np.where(asked, values, 0.0), asked, concept, draws, seed) | {"n": int(asked.sum())}


def _ratio(top: np.ndarray, bottom: np.ndarray, concept: np.ndarray, draws: int, seed: int) -> dict[str, Any]:
    def statistic(w: np.ndarray) -> np.ndarray:  # [R, N] -> [R]
        return _divided(w @ top, w @ bottom)

    value = statistic(np.ones((1, len(top))))[0]
    samples = stats.cluster_bootstrap(statistic, concept, draws, seed)
    return {"value": stats.defined(value), "interval": stats.defined_interval(samples)}


def _divided(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=np.asarray(bottom) > 0)


# --- Detection --------------------------------------------------------------------------------------------------------


def _said(says: Sequence[bool | None]) -> tuple[np.ndarray, np.ndarray]:
    """Which answers say that there is something, and which say whether: float [N] both."""
    return np.array([s is True for s in says], float), np.array([s is not None for s in says], float)


def detection(says: Sequence[bool | None], concept: np.ndarray) -> dict[str, Any]:
    """The share that says that there is something, of the answers that say whether; the others are counted apart."""
    yes, clear = _said(says)
    counts = {"yes": int(yes.sum()), "no": int((clear - yes).sum()), "unclear": int((1 - clear).sum())}
    return _share(yes, clear > 0, concept) | counts


def _share(yes: np.ndarray, of: np.ndarray, concept: np.ndarray) -> dict[str, Any]:
    """{"value", "interval"} of the share of `yes` [N] (0 and 1) in the answers that count, `of` [N]."""
    return share(yes[of], concept[of]) if of.any() else {"value": None, "interval": None}


def detection_difference(
    steered: Sequence[bool | None], unsteered: Sequence[bool | None], concept: np.ndarray, draws: int, seed: int
) -> dict[str, Any]:
    """The share under steering less that without it, {"value", "interval"}, over the same draws of concepts."""
    (yes_a, clear_a), (yes_b, clear_b) = _said(steered), _said(unsteered)

    def statistic(w: np.ndarray) -> np.ndarray:
        return _divided(w @ yes_a, w @ clear_a) - _divided(w @ yes_b, w @ clear_b)

    value = statistic(np.ones((1, len(concept))))[0]
    samples = stats.cluster_bootstrap(statistic, concept, draws, seed)
    return {"value": stats.defined(value), "interval": stats.defined_interval(samples)}


# --- Identification ---------------------------------------------------------------------------------------------------


def keywords(
    steered: np.ndarray, unsteered: np.ndarray, concept: np.ndarray, both: np.ndarray, draws: int, seed: int
) -> dict[str, Any]:
    """How often answers name their concept, against how often its word comes up anyway.

    Args:
      steered, unsteered: whether each answer names each concept, [N, C].
      concept: of each row, int [N].
      both: rows in which neither answer is empty [N]; the others are left out.
    Returns:
      own: share of answers that name the row's concept under steering; unsteered: of their twins; others: mean rate of
      the other concepts under steering; difference_to_unsteered, difference_to_others: paired, each with "n"; p_value
      of a rate as high as this, were concepts dealt to the groups of their answers at random.
    """
    rows = np.arange(len(concept))
    blank = np.where(both, 0.0, np.nan)
    own, twin = steered[rows, concept], unsteered[rows, concept]
    others = (steered.sum(axis=1) - own) / (steered.shape[1] - 1)
    columns = {"others": others, "difference_to_unsteered": own - twin, "difference_to_others": own - others}
    found = {name: mean(values + blank, concept, draws, seed) for name, values in columns.items()}
    found |= {"own": _share(own, both, concept), "unsteered": _share(twin, both, concept)}
    return found | {"p_value": permutation_p(steered + blank[:, None], concept, seed)}


def identified(scores: np.ndarray, concept: np.ndarray, draws: int, seed: int) -> dict[str, Any]:
    """How often the concept has the highest of its row's scores [N, C]; NaN rows are unanswered.

    Of what an answer scores less what its unsteered twin does, a judge's liking for some words, and for some places in
    a list, is gone; the answer that is as its twin shares its vote among all.

    {"value", "interval", "n", "unanswered", "p_value"}, see `keywords`.
    """
    shares = most(scores)
    right = shares[np.arange(len(concept)), concept]
    found = mean(right, concept, draws, seed)
    return found | {
        "unanswered": int(np.isnan(right).sum()),
        "p_value": permutation_p(shares, concept, seed),
    }


def permutation_p(shares: np.ndarray, concept: np.ndarray, seed: int) -> float | None:
    """p-value of a mean own share as high as this, were concepts dealt to the groups of rows at random.

    shares: [N, C]; rows with NaN are left out. None if no row is left.
    """
    C, kept = shares.shape[1], ~np.isnan(shares).any(axis=1)
    if not kept.any():
        return None
    sums = np.eye(C)[concept[kept]].T @ shares[kept]  # [C, C]: of each group of rows, each concept
    rng = np.random.default_rng(seed)
    dealt = rng.permuted(np.broadcast_to(np.arange(C), (PERMUTATIONS, C)), axis=1)
    chance = sums[np.arange(C), dealt].sum(axis=1)
    return float((1 + (chance >= np.trace(sums) - 1e-9).sum()) / (1 + PERMUTATIONS))


def chance_of_winning(logprobs: np.ndarray, concept: np.ndarray, options: int) -> np.ndarray:
    """How often the concept has the highest of [N, C] among `options`, over all draws of the others: [N], or NaN.

    Of the C - 1 others, options - 1 are drawn; k of them are above the concept, so it wins with
    binom(C - 1 - k, options - 1) / binom(C - 1, options - 1). Equals win as often as each other.
    """
    C = logprobs.shape[1]
    right = logprobs[np.arange(len(concept)), concept][:, None]
    above, equal = (logprobs > right).sum(axis=1), (logprobs == right).sum(axis=1) - 1
    wins = np.array([math.comb(C - 1 - k, options - 1) for k in range(C)]) / math.comb(C - 1, options - 1)
    found = [np.nan if e < 0 else wins[a : a + e + 1].mean() for a, e in zip(above, equal, strict=True)]  # -1: of NaN
    return np.array(found)


def most(scores: np.ndarray) -> np.ndarray:
    """The share of each concept in the highest of scores [N, C], [N, C]; rows with NaN stay so."""
    shares, known = np.full(scores.shape, np.nan), ~np.isnan(scores).any(axis=1)
    if known.any():
        shares[known] = answered(scores[known])
    return shares


def by_concept(seen: dict[str, Any], above: np.ndarray, C: int) -> list[dict[str, float | None]]:
    """Rates of each concept: named, judged right and chosen, the last two against the unsteered twin."""
    rows = np.arange(len(above))
    steered, concept = seen["steered"], seen["concept"]
    columns = {
        "named": steered["named"][rows, concept],
        "judged": most(steered["judge"] - seen["unsteered"]["judge"])[rows, concept],
        "chosen": above,
    }
    found = []
    for k in range(C):
        own = {name: values[(concept == k) & ~np.isnan(values)] for name, values in columns.items()}
        found.append({name: float(values.mean()) if len(values) else None for name, values in own.items()})
    return found
