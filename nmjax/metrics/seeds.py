"""A quantity of R runs that differ in their seed alone: its mean, and an interval for the mean over all seeds.

A run is the unit: its tokens say nothing of how another initialisation, or another order of the data, would have done.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import t

from nmjax.metrics import stats

Values = Sequence[float | None] | np.ndarray


def over_seeds(values: Values, level: float = stats.LEVEL) -> dict:
    """{"by_seed" [R], "mean", "interval", "n"} of one value a seed, `values [R]`; n is R.

    "interval" [low, high] is Student's t, mean +- t s / sqrt(R) with R - 1 degrees of freedom: exact where the values
    are normal, and honest about how little three seeds say (t is 4.3 then). It is None for a single seed. Where the
    value of a seed is undefined (None or not finite: a run that diverged), mean and interval are None: those of the
    seeds that went well would flatter.

    Raises ValueError for no seeds or a level that is no share.
    """
    v = np.asarray([np.nan if value is None else value for value in values], dtype=np.float64)
    if v.ndim != 1 or len(v) == 0:
        raise ValueError(f"values has shape {v.shape}; wanted [R], one value a seed, R >= 1")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; wanted a share between 0 and 1")
    defined, n = np.isfinite(v), len(v)
    mean = float(v.mean()) if defined.all() else None
    interval = None
    if mean is not None and n > 1:
        half = float(t.ppf((1 + level) / 2, n - 1) * v.std(ddof=1) / np.sqrt(n))
        interval = [mean - half, mean + half]
    by_seed = [float(value) if known else None for value, known in zip(v, defined, strict=True)]
    return {"by_seed": by_seed, "mean": mean, "interval": interval, "n": n}


def paired_over_seeds(a: Values, b: Values, level: float = stats.LEVEL) -> dict:
    """`over_seeds` of a - b, for `a`, `b` [R] of runs that share, seed by seed, their initialisation and their data.

    What the two sides of a seed share drops out before the spread is measured. Raises ValueError for unlike lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} values and b {len(b)}; wanted one each for every seed")
    pairs = zip(a, b, strict=True)
    return over_seeds([None if x is None or y is None else x - y for x, y in pairs], level)
