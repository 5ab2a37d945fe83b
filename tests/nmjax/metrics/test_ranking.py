"""Ranking metrics against scikit-learn, all orders of tied answers, and repeated rows."""

import itertools

import numpy as np
import pytest
from sklearn import metrics as sk_metrics

from nmjax.metrics import ranking


def sample(n, seed=0, decimals=1):
    """Two choices; the first is the prediction, held at a confidence of few decimals, right more often when higher."""
    rng = np.random.default_rng(seed)
    confidence = np.round(rng.uniform(0.55, 1.0, n), decimals)
    correct = rng.random(n) < confidence
    return np.stack([confidence, 1 - confidence], axis=1), np.where(correct, 0, 1)


@pytest.mark.parametrize("decimals", [1, 9])
def test_areas_are_those_of_scikit_learn_for_every_row_of_weights(decimals):
    probs, labels = sample(150, decimals=decimals)
    confidence, correct = probs[:, 0], labels == 0
    assert (len(np.unique(confidence)) < 10) == (decimals == 1)
    weights = np.random.default_rng(1).random((2, 3, 150)) * np.random.default_rng(2).integers(0, 2, (2, 3, 150))
    for ours, theirs in (
        (ranking.auroc, sk_metrics.roc_auc_score),
        (ranking.auprc, sk_metrics.average_precision_score),
    ):
        assert ours(probs, labels) == pytest.approx(theirs(correct, confidence), abs=1e-12)
        expected = [[theirs(correct, confidence, sample_weight=w) for w in rows] for rows in weights]
        np.testing.assert_allclose(ours(probs, labels, weights), expected, atol=1e-12)


@pytest.mark.parametrize("metric", [ranking.auroc, ranking.auprc, ranking.aurc])
def test_weights_count_repetitions(metric):
    probs, labels = sample(60, seed=3)
    weights = np.random.default_rng(1).integers(0, 4, size=(5, 60))
    repeated = [metric(np.repeat(probs, w, axis=0), np.repeat(labels, w)) for w in weights]
    assert np.ptp(repeated) > 0.01
    np.testing.assert_allclose(metric(probs, labels, weights), repeated, atol=1e-12)
    assert metric(probs, labels) == pytest.approx(metric(probs, labels, np.ones(60)), abs=1e-12)


def test_order_of_rows_does_not_matter():
    probs, labels = sample(40, seed=4)
    order = np.random.default_rng(0).permutation(40)
    for metric in (ranking.auroc, ranking.auprc, ranking.aurc):
        assert metric(probs, labels) == pytest.approx(metric(probs[order], labels[order]), abs=1e-12)


def test_risk_is_the_mean_over_orders_of_tied_answers():
    confidence = np.array([0.9, 0.7, 0.7, 0.7, 0.6, 0.6])
    wrong = np.array([0, 1, 0, 0, 1, 0])
    curves = []
    for order in itertools.permutations(range(6)):
        if (np.diff(confidence[list(order)]) <= 0).all():
            curves.append(np.cumsum(wrong[list(order)]) / np.arange(1, 7))
    assert len(curves) == 12 and np.ptp(curves, axis=0).max() > 0.3
    shuffled = [4, 1, 0, 5, 2, 3]
    probs = np.stack([confidence, 1 - confidence], axis=1)[shuffled]
    coverage, risk = ranking.risk_coverage(probs, wrong[shuffled])
    np.testing.assert_allclose(coverage, np.arange(1, 7) / 6)
    np.testing.assert_allclose(risk, np.mean(curves, axis=0), atol=1e-12)
    assert ranking.aurc(probs, wrong[shuffled]) == pytest.approx(np.mean(curves))


def test_area_under_risk_coverage_is_the_mean_risk():
    for decimals in (1, 9):
        probs, labels = sample(500, seed=5, decimals=decimals)
        coverage, risk = ranking.risk_coverage(probs, labels)
        assert coverage[-1] == 1 and risk[-1] == pytest.approx((labels == 1).mean())
        assert ranking.aurc(probs, labels) == pytest.approx(risk.mean(), abs=1e-12)


def test_one_answer_and_all_right_and_all_wrong():
    for n in (1, 5):
        probs = np.stack([np.linspace(0.9, 0.6, n), 1 - np.linspace(0.9, 0.6, n)], axis=1)
        right, wrong = np.zeros(n, int), np.ones(n, int)
        assert np.isnan(ranking.auroc(probs, right)) and np.isnan(ranking.auroc(probs, wrong))
        assert ranking.auprc(probs, right) == 1 and np.isnan(ranking.auprc(probs, wrong))
        assert ranking.aurc(probs, right) == 0 and ranking.aurc(probs, wrong) == 1
        np.testing.assert_array_equal(ranking.risk_coverage(probs, wrong)[1], np.ones(n))
    # A bootstrap draw that holds one kind only has no AUROC; the other draws do.
    probs, labels = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]], [0, 1, 0]
    np.testing.assert_allclose(ranking.auroc(probs, labels, [[1, 1, 1], [1, 0, 2], [0, 3, 0]]), [0.5, np.nan, np.nan])
    np.testing.assert_allclose(ranking.auprc(probs, labels, [[1, 1, 1], [1, 0, 2], [0, 3, 0]]), [5 / 6, 1, np.nan])
    assert ranking.auroc([[0.7, 0.3]] * 4, [0, 1, 1, 1]) == 0.5
