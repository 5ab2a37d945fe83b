"""How well stated probabilities of a few answers fit how often they are given.

What a model states covers some answers, what it gives are a hundred samples, so on both sides something is missing:

* Compared are the answers that are stated, and "any other" as one more; of K stated answers that is K + 1 shares. A
  statement leaves for "any other" what it lacks to 1; one that adds up to more than 1 is divided by its sum.
* The frequencies of n samples get additive smoothing, (count + ALPHA) / (n + ALPHA * (K + 1)).
* The statement is mixed with a share FLOOR of the uniform one, so that no divergence is infinite: that of a model which
  is sure of K answers that it never gives is about ln((K + 1) / FLOOR), 6.4 nats for five.

Lumping the unstated makes a divergence smaller than it would be with each on its own, but one that neither the number
of samples nor an arbitrary probability of the unseen decides on.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import ArrayLike
from scipy.special import entr, rel_entr

ALPHA = 0.5  # Jeffreys' prior
FLOOR = 0.01
TOP = 5

MEASURES = ("kl_actual_stated", "kl_stated_actual", "total_variation", "top1", "top5")


def shared_out(stated: Mapping[str, float]) -> tuple[np.ndarray, float]:
    """The stated probabilities [K], summing to at most 1, and what they leave for any other answer.

    Raises ValueError for an empty statement, a negative probability, or one that sums to 0.
    """
    shares = np.array([*stated.values()], np.float64)
    if not (shares >= 0).all() or not 0 < shares.sum() < np.inf:
        raise ValueError(f"stated is {dict(stated)}; wanted probabilities of 0 or more that do not sum to 0")
    shares = shares / max(shares.sum(), 1.0)
    return shares, max(0.0, 1.0 - float(shares.sum()))


def fit(counts: ArrayLike, shares: ArrayLike, alpha: float = ALPHA, floor: float = FLOOR) -> dict[str, np.ndarray]:
    """`MEASURES` by name, each [...], of `counts [..., A]` of samples and the `shares [K]` stated for the first K <= A.

    Counts are of each answer that was stated, then of each other one that was given; they may be fractions.

    * kl_actual_stated, kl_stated_actual: KL(frequencies || statement) and the reverse, in nats, as above.
    * total_variation: half the sum of absolute differences, without smoothing; 0 to 1.
    * top1: whether the likeliest stated answer is the commonest one. Of tied stated ones each is taken with equal
      chance, and any of the tied commonest ones is right.
    * top5: share of the (up to) five commonest answers that are among the five stated likeliest. Where counts tie for
      the last places, those of the tie have equal parts in them.

    Raises ValueError for shapes that do not fit, negative numbers, shares that sum to more than 1, or no samples.
    """
    c, q = np.asarray(counts, np.float64), np.asarray(shares, np.float64)
    K = len(q)
    if q.ndim != 1 or not 1 <= K <= c.shape[-1]:
        raise ValueError(f"shares has shape {q.shape} and counts {c.shape}; wanted [K] and [..., A] with 1 <= K <= A")
    if (q < 0).any() or q.sum() > 1 + 1e-9 or q.sum() <= 0:
        raise ValueError(f"shares is {q.tolist()}; wanted numbers of 0 or more that sum to 1 at most, not to 0")
    n = c.sum(-1)
    if (c < 0).any() or (n <= 0).any():
        raise ValueError("counts has negative numbers or no samples; wanted counts of at least one sample")
    lumped = np.concatenate([c[..., :K], c[..., K:].sum(-1, keepdims=True)], axis=-1)  # [..., K + 1]
    stated = np.append(q, max(0.0, 1.0 - q.sum()))
    p = (lumped + alpha) / (n[..., None] + alpha * (K + 1))
    mixed = (1 - floor) * stated / stated.sum() + floor / (K + 1)
    likeliest = q == q.max()
    first = np.argsort(-q, kind="stable")[:TOP]
    return {
        "kl_actual_stated": rel_entr(p, mixed).sum(-1),
        "kl_stated_actual": rel_entr(mixed, p).sum(-1),
        "total_variation": np.abs(lumped / n[..., None] - stated).sum(-1) / 2,
        "top1": (c == c.max(-1, keepdims=True))[..., :K][..., likeliest].mean(-1),
        "top5": _places(c)[..., first].sum(-1) / np.minimum((c > 0).sum(-1), TOP),
    }


def entropy(counts: ArrayLike) -> np.ndarray:
    """Entropy [...] of the frequencies of `counts [..., A]`, in bits, without smoothing; each has a sample or more."""
    c = np.asarray(counts, np.float64)
    return entr(c / c.sum(-1, keepdims=True)).sum(-1) / np.log(2)


def _places(counts: np.ndarray) -> np.ndarray:
    """Each answer's part in the first `TOP` places by counts [..., A]: 1, 0, or between where counts tie for the last.

    There are no more places than answers that were given at all.
    """
    places = np.minimum((counts > 0).sum(-1, keepdims=True), TOP)
    last = np.take_along_axis(np.sort(counts, axis=-1)[..., ::-1], places - 1, axis=-1)
    above, tied = counts > last, counts == last
    return above + tied * (places - above.sum(-1, keepdims=True)) / tied.sum(-1, keepdims=True)
