"""Folds keep groups whole, directions flip with the score, combinations find what is there and nothing in noise."""

import json

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from nmjax.metrics import crossfit


def twins(n):
    return np.tile([0, 1], n), np.repeat([f"q{k}" for k in range(n)], 2)


@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(6, 30))
@settings(max_examples=60, deadline=None)
def test_folds_keep_groups_whole_and_are_alike(seed, folds, n_groups):
    rng = np.random.default_rng(seed)
    groups = np.r_[np.arange(n_groups), rng.integers(0, n_groups, 20)]
    labels = rng.integers(0, 2, len(groups))
    fold = crossfit.grouped_folds(groups, labels, folds, seed)
    assert all(len(set(fold[groups == g])) == 1 for g in groups)
    sizes = [len(set(groups[fold == f])) for f in range(folds)]
    assert max(sizes) - min(sizes) <= 1
    alone = crossfit.grouped_folds(np.arange(len(labels)), labels, folds, seed)
    positives = [labels[alone == f].sum() for f in range(folds)]
    assert max(positives) - min(positives) <= 1


def test_folds_are_random_and_seeded():
    labels, groups = twins(50)
    first = crossfit.grouped_folds(groups, labels, seed=1)
    np.testing.assert_array_equal(first, crossfit.grouped_folds(groups, labels, seed=1))
    assert (first != crossfit.grouped_folds(groups, labels, seed=2)).mean() > 0.5
    plain = np.random.default_rng(0).integers(0, 5, 100)
    assert any(len(set(plain[groups == g])) > 1 for g in groups), "folds of examples were meant to split twins"


def test_direction_flips_with_the_score():
    labels, groups = twins(100)
    scores = np.random.default_rng(0).normal(size=200) + 0.8 * labels
    high, low = (crossfit.choose_direction(s, labels, groups) for s in (scores, -scores))
    assert (high["direction"], low["direction"]) == ("high", "low")
    assert high["auroc_raw"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores))
    assert high["auroc_raw"] == pytest.approx(1 - low["auroc_raw"])
    fold = crossfit.grouped_folds(groups, labels)
    by_fold = [sklearn.metrics.roc_auc_score(labels[fold == f], scores[fold == f]) for f in range(5)]
    np.testing.assert_allclose(high["auroc_high_by_fold"], by_fold)
    assert high["agreement"] == low["agreement"] == 1 and high["consistent"] and min(by_fold) > 0.5
    assert high["auroc_crossfit"] == pytest.approx(np.mean(by_fold)) == pytest.approx(low["auroc_crossfit"])


def test_crossfitted_auroc_of_noise_is_no_better_than_chance_where_the_chosen_one_is():
    labels, groups = twins(30)
    found = [
        crossfit.choose_direction(np.random.default_rng([1, k]).normal(size=60), labels, groups) for k in range(200)
    ]
    chosen = [max(f["auroc_raw"], 1 - f["auroc_raw"]) for f in found]
    crossfitted = [f["auroc_crossfit"] for f in found]
    assert np.mean(chosen) > 0.54 and min(chosen) >= 0.5
    assert 0.44 < np.mean(crossfitted) < 0.51 and min(crossfitted) < 0.4
    assert {f["direction"] for f in found} == {"high", "low"} and min(f["agreement"] for f in found) < 0.5


def test_direction_where_folds_hold_one_label_only():
    found = crossfit.choose_direction([1, 2, 3, 4], [0, 0, 0, 1], list("abcd"), folds=2)
    assert found["auroc_crossfit"] is None and found["auroc_raw"] == 1.0 and None in found["auroc_high_by_fold"]
    json.dumps(found, allow_nan=False)


def planted(rng, n):
    """Three signals on unlike scales, of which the last says nothing, and labels of a known model."""
    x = rng.normal(size=(n, 3)) * [0.01, 5.0, 1.0] + [1.0, -30.0, 0.0]
    truth = np.array([150.0, -0.2, 0.0])
    return x, rng.random(n) < expit((x - [1.0, -30.0, 0.0]) @ truth + 0.3), truth


def test_combination_is_the_penalised_maximum_likelihood_and_finds_what_was_planted():
    x, y, truth = planted(np.random.default_rng(2), 1500)
    found = crossfit.combine(x, y, np.arange(1500), ["a", "b", "c"], draws=50)
    z = (x - x.mean(axis=0)) / x.std(axis=0)

    def objective(w):  # scikit-learn's: half the squared weights of the standardised features plus C times the loss
        logit = z @ w[:3] + w[3]
        return w[:3] @ w[:3] / 2 + crossfit.PENALTY_C * (np.logaddexp(0, logit) - y * logit).sum()

    best = minimize(objective, np.zeros(4), tol=1e-10).x
    weights = np.array(list(found["weights"].values()))
    np.testing.assert_allclose(weights * x.std(axis=0), best[:3], atol=2e-3)
    assert found["intercept"] + weights @ x.mean(axis=0) == pytest.approx(best[3], abs=2e-3)
    np.testing.assert_allclose(weights * x.std(axis=0), truth * [0.01, 5, 1], atol=0.2)
    p = np.array(found["probabilities"])
    assert found["auroc"]["value"] == pytest.approx(sklearn.metrics.roc_auc_score(y, p))
    assert found["average_precision"]["value"] == pytest.approx(sklearn.metrics.average_precision_score(y, p))
    assert found["brier"] == pytest.approx(sklearn.metrics.brier_score_loss(y, p))
    bins = np.ceil(p * 10)
    ece = sum(abs((p - y)[bins == b].sum()) for b in range(1, 11)) / len(y)
    assert found["ece"] == pytest.approx(ece) and ece < 0.06
    single = max(max(a, 1 - a) for a in (sklearn.metrics.roc_auc_score(y, x[:, k]) for k in range(3)))
    low, high = found["auroc"]["interval"]
    assert single < low < found["auroc"]["value"] < high
    json.dumps(found, allow_nan=False)


def test_combination_of_noise_is_worth_nothing_out_of_fold_and_something_in_sample():
    labels, groups = twins(40)
    names = [f"n{k}" for k in range(8)]
    found = [
        crossfit.combine(np.random.default_rng([3, k]).normal(size=(80, 8)), labels, groups, names, draws=2)
        for k in range(20)
    ]
    assert np.mean([f["auroc_in_sample"] for f in found]) > 0.65
    assert 0.45 < np.mean([f["auroc"]["value"] for f in found]) < 0.55


def test_nothing_of_a_question_reaches_the_model_that_judges_it():
    labels, groups = twins(30)
    rng = np.random.default_rng(4)
    features = rng.normal(size=(60, 2)) + labels[:, None]
    swapped = labels.copy()
    swapped[:2] = 1, 0
    before, after = (
        np.array(crossfit.combine(features, y, groups, ["a", "b"], draws=2)["probabilities"]) for y in (labels, swapped)
    )
    fold = crossfit.grouped_folds(groups, labels)
    np.testing.assert_array_equal(fold, crossfit.grouped_folds(groups, swapped))
    np.testing.assert_array_equal(before[fold == fold[0]], after[fold == fold[0]])
    assert np.abs(before - after)[fold != fold[0]].min() > 0


def test_a_constant_feature_has_no_weight():
    labels, groups = twins(20)
    features = np.stack([np.random.default_rng(5).normal(size=40) + labels, np.full(40, 3.0)], axis=1)
    found = crossfit.combine(features, labels, groups, ["signal", "constant"], draws=2)
    assert found["weights"]["constant"] == 0 and found["weights"]["signal"] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crossfit.grouped_folds([1, 1, 2], [0, 1, 1], 3), "folds is 3 of 2 groups; wanted 2 to 2"),
        (lambda: crossfit.choose_direction([1.0, 2.0], [1, 1], [0, 1], 2), "labels are all 1 in 2 examples"),
        (lambda: crossfit.combine([[1.0, 2.0]], [1], [0], ["a"]), r"features has shape \(1, 2\).*\[N, 1\]"),
        (lambda: crossfit.combine([[1.0], [2.0]], [0, 1], [0, 1], ["a"], 2), "labels are all [01] in 1 examples"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
