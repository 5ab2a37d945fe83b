"""Stated probabilities against frequencies: closed forms, scipy, and brute force over ties."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from nmjax.metrics.stated import ALPHA, FLOOR, TOP, entropy, fit, shared_out


def test_statements_are_shared_out():
    shares, rest = shared_out({"a": 0.5, "b": 0.3})
    assert shares == pytest.approx([0.5, 0.3]) and rest == pytest.approx(0.2)
    shares, rest = shared_out({"a": 1.0, "b": 0.5})  # more than 1: divided by the sum
    assert shares == pytest.approx([2 / 3, 1 / 3]) and rest == 0
    for stated in ({}, {"a": 0.0}, {"a": -0.1, "b": 0.5}):
        with pytest.raises(ValueError, match="stated is .*; wanted probabilities of 0 or more"):
            shared_out(stated)


def test_divergences_are_those_of_scipy():
    rng = np.random.default_rng(0)
    counts, shares = rng.integers(1, 30, (50, 8)), np.array([0.4, 0.2, 0.1, 0.05])
    lumped = np.concatenate([counts[:, :4], counts[:, 4:].sum(1, keepdims=True)], axis=1)
    p = (lumped + ALPHA) / (lumped + ALPHA).sum(1, keepdims=True)
    q = (1 - FLOOR) * np.array([*shares, 0.25]) + FLOOR / 5
    found = fit(counts, shares)
    np.testing.assert_allclose(found["kl_actual_stated"], scipy.stats.entropy(p, q[None], axis=1), atol=1e-12)
    np.testing.assert_allclose(found["kl_stated_actual"], scipy.stats.entropy(q[None], p, axis=1), atol=1e-12)
    np.testing.assert_allclose(entropy(counts), scipy.stats.entropy(counts, base=2, axis=1), atol=1e-12)
    variation = np.abs(lumped / lumped.sum(1, keepdims=True) - np.array([*shares, 0.25])).sum(1) / 2
    np.testing.assert_allclose(found["total_variation"], variation, atol=1e-12)


def test_closed_forms():
    exact = fit([50, 30, 20], [0.5, 0.3, 0.2], alpha=0, floor=0)
    assert exact["kl_actual_stated"] == exact["kl_stated_actual"] == pytest.approx(0) == exact["total_variation"]
    assert exact["top1"] == exact["top5"] == 1
    halves = fit([75, 25], [0.5, 0.5], alpha=0, floor=0)
    assert halves["kl_actual_stated"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert halves["kl_stated_actual"] == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert halves["total_variation"] == pytest.approx(0.25)
    wrong = fit([0] * 5 + [1e9], [0.2] * 5)  # sure of five answers that are never given
    assert wrong["kl_actual_stated"] == pytest.approx(math.log(6 / FLOOR), abs=1e-3)
    assert wrong["total_variation"] == 1 and wrong["top1"] == wrong["top5"] == 0


def top5_by_brute_force(counts, shares):
    """Mean over all orders of the answers, as ties would be broken by."""
    given = [a for a in range(len(counts)) if counts[a]]
    stated = set(sorted(range(len(shares)), key=lambda a: -shares[a])[:TOP])
    places = min(TOP, len(given))
    orders = [sorted(order, key=lambda a: -counts[a])[:places] for order in itertools.permutations(given)]
    return np.mean([len(stated & set(order)) / places for order in orders])


@pytest.mark.parametrize(
    "counts", [[9, 4, 1, 0, 0, 1, 1, 1], [3, 3, 0, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 5, 0, 2], [1, 0, 0, 0, 0, 0, 0, 0]]
)
def test_places_that_tie_are_shared(counts):
    shares = [0.3, 0.25, 0.2, 0.1, 0.05]
    assert fit(counts, shares)["top5"] == pytest.approx(top5_by_brute_force(counts, shares))


def test_ties_of_the_likeliest():
    assert fit([5, 3, 5], [0.4, 0.4])["top1"] == 0.5  # one of the two it may mean is right
    assert fit([5, 3, 5], [0.5, 0.4])["top1"] == 1  # either of the commonest will do
    assert fit([5, 3, 9], [0.5, 0.4])["top1"] == 0


@pytest.mark.parametrize(
    "counts, shares, message",
    [([1, 2], [0.2] * 3, r"shares has shape \(3,\) and counts \(2,\)"), ([1], [1.5], "that sum to 1 at most")]
    + [([0, 0], [0.5], "wanted counts of at least one sample"), ([1, -1], [0.5], "wanted counts")],
)
def test_bad_input_is_named(counts, shares, message):
    with pytest.raises(ValueError, match=message):
        fit(counts, shares)
