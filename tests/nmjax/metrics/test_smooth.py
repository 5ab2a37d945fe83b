"""Smooth ECE against the sum of reflected Gaussians itself, closed forms, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

from nmjax.metrics import calibration, smooth


def sample(n, seed=0, certain=0):
    """Two choices, overconfident below 0.8 and underconfident above; the first `certain` are held at 1."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.52, 0.999, n)
    confidence[:certain] = 1.0
    correct = rng.random(n) < np.where(confidence < 0.8, confidence - 0.25, confidence + 0.1)
    return np.stack([confidence, 1 - confidence], axis=1), np.where(correct, 0, 1)


def kernel_sum(confidence, correct, bandwidth, points=8000):
    """The integral of |sum of Gaussians about every image of every answer in the mirrors at 0 and 1|, midpoint rule."""
    t = (np.arange(points)[:, None] + 0.5) / points
    kernel = 0.0
    for m in range(-4, 5):
        for image in (2 * m + confidence, 2 * m - confidence):
            kernel = kernel + scipy_stats.norm.pdf(t, image, bandwidth)
    return np.abs(kernel @ (confidence - correct)).mean() / len(confidence)


@pytest.mark.parametrize("bandwidth", [0.01, 0.05, 0.2, 0.8])
@pytest.mark.parametrize("certain", [0, 20])
def test_at_a_bandwidth_it_is_the_sum_of_reflected_gaussians(bandwidth, certain):
    probs, labels = sample(60, certain=certain)
    confidence, correct = calibration.top_label(probs, labels)
    exact = kernel_sum(confidence, correct, bandwidth)
    assert smooth.smooth_ece(probs, labels, bandwidth) == pytest.approx(exact, abs=1e-5)
    assert smooth.soft_ece(confidence, correct, bandwidth) == pytest.approx(exact, abs=1e-4)


def test_the_bandwidth_is_the_fixed_point():
    for n in (1, 30, 3000):
        probs, labels = sample(n, seed=n)
        value = smooth.smooth_ece(probs, labels)
        assert value == pytest.approx(smooth.smooth_ece(probs, labels, value), abs=1e-9)
        bandwidths = [0.01, 0.05, 0.1, 0.3]
        assert np.all(np.diff([smooth.smooth_ece(probs, labels, b) for b in bandwidths]) <= 1e-12)


def test_closed_forms():
    # Surpluses of one sign do not cancel, whatever the bandwidth: the mean one.
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]])
    assert smooth.smooth_ece(probs, [1, 1, 1]) == pytest.approx((0.9 + 0.8 + 0.6) / 3)
    assert smooth.smooth_ece(probs, [0, 0, 0]) == pytest.approx((0.1 + 0.2 + 0.4) / 3)
    # One confidence: only its accuracy counts, as for ECE.
    assert smooth.smooth_ece([[0.8, 0.2]] * 4, [0, 0, 0, 1]) == pytest.approx(0.05)
    for n in (1, 20):
        certain = np.tile([1.0, 0.0], (n, 1))
        assert smooth.smooth_ece(certain, np.zeros(n, int)) == 0
        assert smooth.smooth_ece(certain, np.ones(n, int)) == pytest.approx(1)
    with pytest.raises(ValueError, match="bandwidth is 0.0; wanted at least 0.001"):
        smooth.smooth_ece(probs, [0, 0, 0], 0.0)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 5e-3)])
def test_soft_ece_takes_every_float(dtype, atol):
    confidence, correct = calibration.top_label(*sample(100))
    rounded = jnp.asarray(confidence, dtype)
    value = jax.jit(smooth.soft_ece)(rounded, jnp.asarray(correct, dtype), 0.05)
    assert value.dtype == jnp.float32 and value.shape == ()
    probs = np.stack([np.asarray(rounded, np.float64), 1 - np.asarray(rounded, np.float64)], axis=1)
    assert value == pytest.approx(smooth.smooth_ece(probs, 1 - correct.astype(int), 0.05), abs=1e-5)
    assert value == pytest.approx(smooth.smooth_ece(*sample(100), 0.05), abs=atol)


def test_soft_ece_derivatives_are_finite_differences():
    confidence, correct = calibration.top_label(*sample(50, seed=1))
    rng = np.random.default_rng(0)
    point = (confidence, correct * 0.9 + 0.05, np.float64(0.05))
    still = (np.zeros(50), np.zeros(50), np.float64(0))
    tangents = [
        (rng.normal(size=50), *still[1:]),
        (still[0], rng.normal(size=50), still[2]),
        (*still[:2], np.float64(1)),
        (rng.normal(size=50), rng.normal(size=50), np.float64(0.3)),
    ]
    derivative = jax.jit(lambda point, along: jax.jvp(smooth.soft_ece, point, along)[1])
    single = [derivative(*jax.tree.map(np.float32, (point, along))) for along in tangents]
    with jax.enable_x64(True):
        error = jax.jit(smooth.soft_ece)
        for along, in_single in zip(tangents, single, strict=True):
            ahead, behind = (
                float(error(*(x + e * v for x, v in zip(point, along, strict=True)))) for e in (1e-6, -1e-6)
            )
            exact = float(derivative(point, along))
            assert abs(exact) > 1e-3, "there was meant to be a slope here"
            assert exact == pytest.approx((ahead - behind) / 2e-6, rel=1e-4, abs=1e-7)
            assert in_single.dtype == jnp.float32 and in_single == pytest.approx(exact, rel=1e-3)
        gradient = jax.jit(jax.grad(smooth.soft_ece))(*point)
        assert gradient.dtype == jnp.float64
        np.testing.assert_allclose(gradient @ tangents[0][0], derivative(point, tangents[0]), rtol=1e-9)
