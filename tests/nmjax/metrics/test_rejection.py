"""The prediction-rejection ratio by hand, by brute force over orders, and at its two ends."""

import itertools
import json

import numpy as np
import pytest

from nmjax.metrics import rejection


def one_by_one(uncertainty, quality, max_rejection=1.0):
    """The ratio with one answer rejected at a time, for uncertainties that differ."""
    n = len(quality)
    rejected = int(max_rejection * n)

    def area(order):  # the most certain first
        return (np.cumsum(quality[order]) / np.arange(1, n + 1))[n - rejected :].mean()

    random = quality.mean()
    return (area(np.argsort(uncertainty)) - random) / (area(np.argsort(-quality)) - random)


def test_by_hand():
    # Kept, most certain first: 1, 1/2, 2/3, 1/2, mean 2/3; oracle 1, 1, 2/3, 1/2, mean 19/24; random 1/2.
    found = rejection.prr([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], draws=20)
    assert found["prr"] == pytest.approx((2 / 3 - 1 / 2) / (19 / 24 - 1 / 2))
    # Rejecting up to half, the first step is the right one: 1/2, 2/3 of both.
    assert rejection.prr([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], draws=20, max_rejection=0.5)["prr"] == pytest.approx(1)


@pytest.mark.parametrize("max_rejection", [1.0, 0.5, 0.3])
def test_any_quality_one_by_one(max_rejection):
    rng = np.random.default_rng(0)
    for n in (7, 20, 101):
        quality, uncertainty = rng.normal(size=n), rng.normal(size=n)
        found = rejection.prr(uncertainty, quality, draws=2, max_rejection=max_rejection)
        assert found["prr"] == pytest.approx(one_by_one(uncertainty, quality, max_rejection), abs=1e-9)


@pytest.mark.parametrize("max_rejection", [1.0, 0.5])
def test_ties_are_the_mean_over_orders(max_rejection):
    uncertainty, quality = np.array([1, 1, 1, 2, 3, 3.0]), np.array([0.2, 1.0, 0.7, 0.1, 0.9, 0.0])
    broken = []
    for order in itertools.permutations(range(6)):
        if (np.diff(uncertainty[list(order)]) >= 0).all():
            broken.append(one_by_one(np.argsort(order), quality, max_rejection))
    assert len(broken) == 12 and np.ptp(broken) > 0.1
    found = rejection.prr(uncertainty, quality, draws=2, max_rejection=max_rejection)
    assert found["prr"] == pytest.approx(np.mean(broken))


def test_ends_and_chance():
    rng = np.random.default_rng(1)
    right = (rng.random(400) < 0.6).astype(float)
    assert rejection.prr(-right, right, draws=50) == {"prr": pytest.approx(1), "interval": [pytest.approx(1)] * 2}
    assert rejection.prr(right, right, draws=2)["prr"] < -0.9
    assert rejection.prr(np.ones(400), right, draws=50)["prr"] == pytest.approx(0, abs=1e-12)
    chance = [rejection.prr(rng.normal(size=400), right, draws=1)["prr"] for _ in range(200)]
    assert np.mean(chance) == pytest.approx(0, abs=0.03) and np.std(chance) > 0.03
    none = rejection.prr([1.0, 2.0, 3.0], [0.1, 0.1, 0.1], draws=5)
    assert none == {"prr": None, "interval": None}
    json.dumps(none, allow_nan=False)


def test_interval_covers_and_widens_with_groups():
    rng = np.random.default_rng(2)

    def sample(n):  # four answers of a question are alike
        ease = np.repeat(rng.normal(size=n), 4)
        right = (ease + 0.3 * rng.normal(size=4 * n) > 0).astype(float)
        return -ease + 2 * np.repeat(rng.normal(size=n), 4), right, np.repeat(np.arange(n), 4)

    uncertainty, right, _ = sample(20_000)
    truth = one_by_one(uncertainty, right)
    covered, ignorant, trials = 0, 0, 120
    for trial in range(trials):
        uncertainty, right, groups = sample(50)
        low, high = rejection.prr(uncertainty, right, groups, draws=200, seed=trial)["interval"]
        covered += low <= truth <= high
        low, high = rejection.prr(uncertainty, right, draws=200, seed=trial)["interval"]
        ignorant += low <= truth <= high
    assert 0.89 < covered / trials and ignorant / trials < 0.8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rejection.prr([1.0, 2.0], [1.0]), r"shape \(2,\) and quality \(1,\)"),
        (lambda: rejection.prr([1.0, np.inf], [1.0, 0.0]), "wanted finite numbers"),
        (lambda: rejection.prr([1.0, 2.0], [1.0, 0.0], max_rejection=0.4), "max_rejection is 0.4 of 2"),
        (lambda: rejection.prr([1.0, 2.0], [1.0, 0.0], max_rejection=1.5), "max_rejection is 1.5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
