"""Dose and response: does a measure rise or fall with the dose, and where is it best?

Doses are conditions on the same N questions. A line is fitted to each question's own values, so that the spread between
questions, which is most of the spread, does not blur the slope.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike

from nmjax.metrics import paired, stats


def trend(
    doses: ArrayLike,
    values: ArrayLike,
    draws: int = stats.DRAWS,
    seed: int = 0,
    strata: Sequence[object] | None = None,
    level: float = stats.LEVEL,
) -> dict:
    """Slope of a mean over questions against dose: `doses [D]`, all different, and `values [D, N]`.

    Returns {"slope", "interval", "p_value", "monotone"}: the mean of the questions' least-squares slopes (in units of
    the measure per unit of dose), its bootstrap interval over questions (`draws`, `seed`, `strata`, `level`), and the
    sign-flip p-value of slope 0. "monotone" is about the means as they are, in order of dose, noise included: "rising"
    (they never fall), "falling", "flat" or "neither".

    Raises ValueError for fewer than 2 doses, equal ones, or values of another shape.
    """
    x, y = _curve(doses, values)
    slopes = _slope_weights(x) @ (y - y[0])  # [N]; less one dose, so that what none changes is 0 and not rounding
    low, high = stats.mean_interval(slopes, draws, seed, strata, level)
    return {
        "slope": float(slopes.mean()),
        "interval": [float(low), float(high)],
        "p_value": float(paired.sign_flip(slopes, seed=seed)),
        "monotone": _monotone(y.mean(axis=1)[x.argsort()]),
    }


def trend_of_samples(
    doses: ArrayLike,
    estimates: ArrayLike,
    samples: ArrayLike,
    largest_bias: ArrayLike | None = None,
    level: float = stats.LEVEL,
) -> dict:
    """Slope against dose of a measure that is no mean over questions, such as ECE or AUROC.

    `estimates [D]` are its values, `samples [draws, D]` its paired bootstrap draws (`battery.Battery.of`); a draw that
    is NaN at some dose is left out. Returns {"slope", "interval"}, interval None where no draw is left or an estimate
    is NaN, and so slope. For ECE and MCE give `largest_bias [D]`, bounds of the upward bias of each estimate: it
    differs between doses, looks like a slope, and widens the interval by what it can do
    (`stats.bounded_bias_interval`).
    """
    x, y, s = _distinct(doses), np.asarray(estimates, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    if y.shape != x.shape or s.shape[1:] != x.shape:
        raise ValueError(f"estimates has shape {y.shape} and samples {s.shape}; wanted [{len(x)}], [draws, {len(x)}]")
    weights = _slope_weights(x)
    slope, draws = float(weights @ (y - y[0])), (s - s[:, :1]) @ weights
    draws = draws[np.isfinite(draws)]
    if not np.isfinite(slope) or len(draws) == 0:
        return {"slope": slope if np.isfinite(slope) else None, "interval": None}
    if largest_bias is None:
        low, high = map(float, stats.percentile_interval(draws, level))
    else:
        reach = weights * np.asarray(largest_bias, dtype=np.float64)
        low, high = stats.bounded_bias_interval(draws, slope, (reach[reach < 0].sum(), reach[reach > 0].sum()), level)
    return {"slope": slope, "interval": [low, high]}


def peak(
    doses: ArrayLike,
    values: ArrayLike,
    draws: int = stats.DRAWS,
    seed: int = 0,
    strata: Sequence[object] | None = None,
    largest: bool = True,
    level: float = stats.LEVEL,
) -> dict:
    """The dose where a mean over questions is best, and whether it falls off beyond: `doses [D]`, `values [D, N]`.

    Best is largest, or smallest for `largest=False` (NLL). Returns
      "dose": the best one, the smallest of those that tie;
      "doses_in_interval": those that are best, alone or tied, in at least (1 - level) / 2 of the bootstrap draws,
      "dose_interval": the first and the last of them: where the best dose may be for all that these questions say;
      "falls_beyond": whether the largest dose is worse than the best one, "difference" (largest dose minus best dose)
        and its paired "interval". All None where the best dose is the largest.
    The best of D doses looks better than it is. `interval` allows for that: its level is 1 - (1 - level) / (D - 1)
    (Bonferroni), so it holds whichever dose was picked.

    Raises ValueError as `trend`.
    """
    x, y = _curve(doses, values)
    order = x.argsort()
    x, y = x[order], y[order]
    sign, n = (1.0 if largest else -1.0), y.shape[1]

    def best(means: np.ndarray) -> np.ndarray:  # [..., D] -> whether each dose is best, ties to rounding included
        return sign * means >= (sign * means).max(axis=-1, keepdims=True) - 1e-12 * np.abs(means).max()

    share = best(stats.bootstrap(lambda w: w @ y.T / n, n, draws, seed, strata)).mean(axis=0)
    candidates = x[share >= min((1 - level) / 2, share.max())].tolist()
    is_best = best(y.mean(axis=1))
    at = int(is_best.argmax())
    result = {
        "dose": float(x[at]),
        "doses_in_interval": candidates,
        "dose_interval": [candidates[0], candidates[-1]],
        "falls_beyond": None,
        "difference": None,
        "interval": None,
    }
    if at < len(x) - 1:
        together = 1 - (1 - level) / (len(x) - 1)
        low, high = map(float, stats.paired_interval(y[-1], y[at], draws, seed, strata, together))
        worse = not is_best[-1] and (high < 0 if largest else low > 0)
        result |= {"falls_beyond": worse, "difference": float((y[-1] - y[at]).mean()), "interval": [low, high]}
    return result


def _distinct(doses: ArrayLike) -> np.ndarray:
    x = np.asarray(doses, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all() or len(np.unique(x)) < len(x):
        raise ValueError(f"doses is {x.tolist()}; wanted at least 2 finite numbers, all different")
    return x


def _curve(doses: ArrayLike, values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = _distinct(doses), np.asarray(values, dtype=np.float64)
    if y.ndim != 2 or len(y) != len(x):
        raise ValueError(f"values has shape {y.shape}; wanted [{len(x)}, N], one row a dose")
    if not np.isfinite(y).all():
        d, q = np.argwhere(~np.isfinite(y))[0]
        raise ValueError(f"values[{d}, {q}] is {y[d, q]}; wanted finite numbers")
    return x, y


def _slope_weights(x: np.ndarray) -> np.ndarray:
    """Weights [D] whose product with D values is their least-squares slope against `x`."""
    centred = x - x.mean()
    return centred / (centred @ centred)


def _monotone(means: np.ndarray) -> str:
    steps = np.diff(means)
    steps = np.where(np.abs(steps) <= 1e-12 * np.abs(means).max(), 0.0, steps)
    if not steps.any():
        return "flat"
    return "rising" if (steps >= 0).all() else "falling" if (steps <= 0).all() else "neither"
