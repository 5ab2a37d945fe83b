"""Likelihoods of a model's own answers, as answers and as what it says it would answer."""

import numpy as np
import pytest
import scipy.stats

from experiments.introspecting.foretold import commonest, findings


def test_wordings_of_an_answer_are_counted_together():
    samples = [" Cat", " a dog.", " Dog.", " Dog.", " cat ", " Cat", " cow", "...", ""]
    assert commonest(samples, 2) == [" Cat", " Dog."]  # three each; the cat came first
    assert commonest(samples, 5) == [" Cat", " Dog.", " cow"] and commonest(["", "..."], 5) == []


SAMPLES = [*["Cat"] * 3, *["Dog"] * 2, "Fox"]
ANSWERED = {"Cat": 0.4, "Dog": 0.2, "Fox": 0.1, "Owl": 0.3}  # nobody's answer is the owl


def row(foretold, direct=ANSWERED, samples=SAMPLES):
    logs = ({text: None if p is None else np.log(p) for text, p in each.items()} for each in (direct, foretold))
    return dict(zip(("samples", "direct", "foretold"), (samples, *logs), strict=True))


def of(rows, count=3):
    return findings(rows, count, 200, 0)


def test_divergences_are_those_of_the_own_answers_among_themselves():
    foretold = {"Cat": 0.001, "Dog": 0.003, "Fox": 0.002, "Owl": 0.9}
    found = of([{"base": row(foretold)}])
    p, q = [4 / 7, 2 / 7, 1 / 7], [1 / 6, 3 / 6, 2 / 6]
    assert found["matrix"]["base"]["base"] == {"value": pytest.approx(scipy.stats.entropy(p, q)), "interval": None,
                                               "n": 1}  # fmt: skip
    assert found["uniform"]["base"]["value"] == pytest.approx(np.log(3) - scipy.stats.entropy(p))
    assert found["top1"]["base"]["value"] == 0 and found["versus_base"] == {}
    two = of([{"base": row(foretold)}], count=2)
    assert two["matrix"]["base"]["base"]["value"] == pytest.approx(scipy.stats.entropy([2 / 3, 1 / 3], [1 / 4, 3 / 4]))


def test_a_model_that_knows_its_answers_is_told_from_one_that_does_not():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(12):
        direct = dict(zip(ANSWERED, rng.dirichlet(np.ones(4)), strict=True))
        guessed = dict(zip(ANSWERED, rng.dirichlet(np.ones(4)), strict=True))
        near = {text: 0.01 * p * np.exp(0.1 * rng.standard_normal()) for text, p in direct.items()}
        rows.append({"base": row(guessed, direct), "knowing": row(near, direct)})
    found = of(rows)
    assert found["matrix"]["knowing"]["knowing"]["value"] < 0.02 < found["uniform"]["knowing"]["value"]
    assert found["versus_uniform"]["knowing"]["interval"][1] < 0 < found["versus_uniform"]["base"]["interval"][1]
    assert found["versus_base"]["knowing"]["interval"][1] < 0
    assert found["advantage"] == found["versus_base"]  # as both have the same answers
    # So the one foretells the other's, too: it knows the answers, not itself.
    assert found["matrix"]["knowing"]["base"] == found["matrix"]["knowing"]["knowing"]
    assert found["top1"]["knowing"]["value"] > 0.75 > found["top1"]["base"]["value"]


def test_an_advantage_is_over_the_same_answers():
    """Two models that foretell alike, but answer differently: one divergence is less, but nothing is known better."""
    foretold = {"Cat": 0.4, "Dog": 0.2, "Fox": 0.1}
    hard = row(foretold, {"Cat": 0.1, "Dog": 0.2, "Fox": 0.7})
    found = of([{"base": hard, "a": row(foretold)}] * 3)
    assert found["versus_base"]["a"]["value"] < -0.3
    assert found["advantage"]["a"] == {"value": 0, "interval": [0, 0], "n": 3}


def test_what_cannot_be_compared_is_left_out():
    good = row({"Cat": 0.4, "Dog": 0.2, "Fox": 0.1})
    broken = row({"Cat": 0.4, "Dog": None, "Fox": 0.1})
    alone = row({"Cat": 0.4, "Dog": 0.2, "Fox": 0.1}, samples=["Cat"] * 6)
    found = of([{"base": good, "a": good}, {"base": good, "a": broken}, {"base": good, "a": alone}])
    assert found["matrix"]["base"]["base"] == {"value": pytest.approx(0, abs=1e-12), "interval": [0, 0], "n": 3}
    assert found["matrix"]["a"]["a"]["n"] == found["versus_base"]["a"]["n"] == found["advantage"]["a"]["n"] == 1
    nothing = of([{"base": row({}, {}, [""])}])
    assert nothing["matrix"]["base"]["base"] == {"value": None, "interval": None, "n": 0}
