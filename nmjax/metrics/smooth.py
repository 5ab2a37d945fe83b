"""Calibration error without bins: the smooth ECE, for reporting in NumPy and differentiable in JAX.

Błasiok and Nakkiran (2023), 'Smooth ECE: principled reliability diagrams via kernel smoothing'. Each answer's surplus
(confidence - correct) is spread over [0, 1] by a Gaussian kernel about its confidence, reflected at both ends, and the
absolute value of what is there integrated: smECE_s = 1/N integral |sum_i (c_i - y_i) K_s(t, c_i)| dt. It falls with the
bandwidth s, and the smooth ECE is the one value where smECE_s = s, so nothing is left to choose.

A Gaussian reflected at 0 and 1 is the heat kernel between two insulated ends, which damps each cosine by itself:

    K_s(t, c) = 1 + 2 sum_k exp(-(pi k s)^2 / 2) cos(pi k c) cos(pi k t),  k = 1, 2, ..

so both versions sum cosines, with every reflection in them. The authors' package `relplot` (1.0.3) approximates the
same integral: it cuts the kernel off at a distance of 1/2, which shows above bandwidths of 0.15 or so where surpluses
of both signs meet, and counts answers within 0.001 of confidence 0 or 1 by as little as half. Elsewhere the two agree
to its mesh, about 0.001.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike
from scipy.fft import dct
from scipy.optimize import brentq

from nmjax.metrics.calibration import top_label

NARROWEST = 1e-3
"""The smallest bandwidth that the fixed point can be; where smECE is below this already, that is the value."""

_STEPS = 4096  # of the grid on [0, 1]: four to the narrowest bandwidth
_SOFT_POINTS = 512  # cosines, and points of the integral, of the differentiable version


def smooth_ece(probs: ArrayLike, labels: ArrayLike, bandwidth: float | None = None) -> float:
    """Smooth ECE of the top label, in [0, 1]: smECE_s at its fixed point s, or at the `bandwidth` given.

    Raises ValueError for a bandwidth below `NARROWEST`.
    """
    confidence, correct = top_label(probs, labels)
    spectrum = _spectrum(confidence, confidence - correct) / len(confidence)

    def error(s: float) -> float:
        density = np.abs(dct(spectrum * np.exp(-((np.pi * s * np.arange(_STEPS + 1)) ** 2) / 2), type=1))
        return float(np.trapezoid(density, dx=1 / _STEPS))

    if bandwidth is not None:
        if not bandwidth >= NARROWEST:
            raise ValueError(f"bandwidth is {bandwidth}; wanted at least {NARROWEST}")
        return error(bandwidth)
    narrowest = error(NARROWEST)
    if narrowest <= NARROWEST:
        return narrowest
    return float(brentq(lambda s: error(s) - s, NARROWEST, 2.0))  # error is at most 1


def _spectrum(at: np.ndarray, values: np.ndarray) -> np.ndarray:
    """sum_i values_i cos(pi k at_i) for k = 0 .. _STEPS, with each value split between its neighbours on the grid."""
    place = at * _STEPS
    left = np.minimum(place.astype(np.int64), _STEPS - 1)
    share = place - left
    grid = np.bincount(left, (1 - share) * values, _STEPS + 1) + np.bincount(left + 1, share * values, _STEPS + 1)
    grid[[0, -1]] *= 2  # this transform counts its end points once and the others twice
    return dct(grid, type=1) / 2


def soft_ece(confidence: ArrayLike, correct: ArrayLike, bandwidth: ArrayLike) -> jax.Array:
    """smECE at a fixed bandwidth, a scalar that JAX can differentiate with respect to each of its arguments.

    Args:
      confidence: [N] in [0, 1].
      correct: [N], 1 for a right answer and 0 for a wrong one, or any number between.
      bandwidth: 0.01 or more; the grid is too coarse for less.

    Computed in float32, or float64 where an argument has it. Memory: 2 kB an answer, and as much per derivative.
    """
    dtype = jnp.promote_types(jnp.result_type(confidence, correct), jnp.float32)
    c, y, s = (jnp.asarray(x, dtype) for x in (confidence, correct, bandwidth))
    k = jnp.arange(1, _SOFT_POINTS + 1, dtype=dtype)
    t = (jnp.arange(_SOFT_POINTS, dtype=dtype) + 0.5) / _SOFT_POINTS
    surplus = (c - y) / c.shape[0]
    # Accelerators would multiply in fewer bits, and the cosines cancel.
    with jax.default_matmul_precision("highest"):
        spectrum = surplus @ jnp.cos(jnp.pi * c[:, None] * k)
        density = surplus.sum() + 2 * (spectrum * jnp.exp(-((jnp.pi * k * s) ** 2) / 2)) @ jnp.cos(
            jnp.pi * k[:, None] * t
        )
    return jnp.abs(density).mean()
