"""How much quality rises when the uncertain answers are rejected: the prediction-rejection ratio."""

from __future__ import annotations

import numpy as np
from jaxtyping import ArrayLike

from nmjax.metrics import ranking, stats
from nmjax.metrics.detection import check_groups


def prr(
    uncertainty: ArrayLike,
    quality: ArrayLike,
    groups: ArrayLike | None = None,
    draws: int = stats.DRAWS,
    seed: int = 0,
    max_rejection: float = 1.0,
    level: float = stats.LEVEL,
) -> dict:
    """Prediction-rejection ratio (Malinin and Gales 2021): 1 for the best order there is, about 0 for a random one.

    As answers are rejected one by one, most uncertain first, the mean quality of those kept makes a curve. The ratio is
    the area between it and the flat line of random rejection, over the same area where the worst answers go first (the
    oracle). This is the curve of LM-Polygraph (Fadeeva et al. 2023); Malinin and Gales divide by N where it divides by
    the number kept. Where uncertainties tie, the curve is its mean over the orders of the tied answers.

    Args:
      uncertainty: [N], finite; higher is less certain.
      quality: [N], finite; higher is better (1 for right and 0 for wrong answers, or any measure).
      groups: [N], of the bootstrap; without them, each answer is its own.
      max_rejection: the share of the answers that is rejected at most; LM-Polygraph also reports 0.5.

    Returns {"prr", "interval"}, None where all qualities are the same.
    """
    u, q = np.asarray(uncertainty, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    if u.ndim != 1 or len(u) == 0 or q.shape != u.shape or not (np.isfinite(u) & np.isfinite(q)).all():
        raise ValueError(f"uncertainty has shape {u.shape} and quality {q.shape}; wanted finite numbers, [N] both")
    rejected = int(max_rejection * len(u) + 1e-9)
    if not 1 <= rejected <= len(u):
        raise ValueError(f"max_rejection is {max_rejection} of {len(u)}; wanted one answer at least and all at most")
    group = np.arange(len(u)) if groups is None else check_groups(groups, len(u))

    def ratio(weights: np.ndarray) -> np.ndarray:  # [R, N] -> [R]
        share = rejected / len(u)
        area, oracle = (ranking.score_aurc(order, q, weights, share) for order in (-u, q))
        random = weights @ q / weights.sum(axis=1)
        possible = oracle - random > 1e-12 * np.abs(q).max()
        return np.divide(area - random, oracle - random, out=np.full(len(weights), np.nan), where=possible)

    samples = stats.cluster_bootstrap(ratio, group, draws, seed)
    return {
        "prr": stats.defined(ratio(np.ones((1, len(u))))[0]),
        "interval": stats.defined_interval(samples, level),
    }
