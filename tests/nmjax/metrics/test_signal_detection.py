"""Signal detection theory against published values, closed forms, scipy and scikit-learn."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from nmjax.metrics import signal_detection, stats
from nmjax.metrics.signal_detection import criterion, d_prime, signal_report

DRAWS = 300


@pytest.mark.parametrize(
    ("tpr", "published"),
    [(0.9766666666666667, 4.316), (0.9366666666666666, 3.854), (1.0, 4.6527), (0.0, 0.0)],
)
def test_clipped_is_as_published(tpr, published):
    """Of 600 steered and 50 unsteered items without a false alarm."""
    assert d_prime(tpr * 600, 600, 0, 50, rule="clipped") == pytest.approx(published, abs=6e-4)


def test_loglinear_adds_half_an_answer_to_each_side():
    hits, alarms = np.array([0, 30, 40]), np.array([0, 5, 20])
    a, b = norm.ppf((hits + 0.5) / 41), norm.ppf((alarms + 0.5) / 21)
    np.testing.assert_allclose(d_prime(hits, 40, alarms, 20), a - b, rtol=1e-12)
    np.testing.assert_allclose(criterion(hits, 40, alarms, 20), -(a + b) / 2, rtol=1e-12)
    assert d_prime(400, 400, 0, 400) > d_prime(40, 40, 0, 40) > 4  # more answers, more evidence


def test_bias_does_not_move_sensitivity():
    """Of an observer of known d' and criterion, with as many answers as it takes to see both."""
    for c in (-0.5, 0.0, 1.0):
        hits, alarms = 1e6 * norm.sf(c - 0.75), 1e6 * norm.sf(c + 0.75)
        for rule in signal_detection.RULES:
            assert d_prime(hits, 1e6, alarms, 1e6, rule) == pytest.approx(1.5, abs=1e-3)
            assert criterion(hits, 1e6, alarms, 1e6, rule) == pytest.approx(c, abs=1e-3)


@pytest.fixture(scope="module")
def asked():
    """40 vectors with 5 items each, which share most of their variance, and 90 inputs; d' is 1."""
    rng = np.random.default_rng(0)
    steered = 1.4 + np.sqrt(0.9) * rng.normal(size=(40, 1)) + np.sqrt(0.1) * rng.normal(size=(40, 5))
    scores = np.concatenate([steered.ravel(), 0.4 + rng.normal(size=90)])
    present = np.repeat([True, False], [200, 90])
    groups = np.concatenate([np.repeat(np.arange(40), 5), np.arange(100, 190)])
    return scores - 0.9, present, groups


def test_report_of_a_detector(asked):
    scores, present, groups = asked
    report = signal_report(*asked, draws=DRAWS)
    yes = scores > 0
    tpr, fpr = yes[present].mean(), yes[~present].mean()
    wanted = {
        "accuracy": (yes == present).mean(),
        "balanced_accuracy": balanced_accuracy_score(present, yes),
        "auroc": roc_auc_score(present, scores),
        "tpr": tpr,
        "fpr": fpr,
        "d_prime_clipped": norm.ppf(tpr) - norm.ppf(fpr),
        "d_prime_loglinear": norm.ppf((200 * tpr + 0.5) / 201) - norm.ppf((90 * fpr + 0.5) / 91),
    }
    for name, value in wanted.items():
        assert report[name]["value"] == pytest.approx(value, abs=1e-12), name
    counts = {"present": 200, "absent": 90, "present_groups": 40, "absent_groups": 90}
    assert {name: report[name] for name in counts} == counts
    assert 0.7 < wanted["d_prime_clipped"] < 1.3


def test_intervals_of_a_report_are_of_draws_within_each_kind(asked):
    """The same draws by hand: every metric on repeated items, with scikit-learn where it has the metric."""
    scores, present, groups = asked
    weights = np.concatenate(list(stats.cluster_bootstrap_weights(groups, DRAWS, 0, present)))
    np.testing.assert_allclose(weights[:, present].sum(1), 200)
    np.testing.assert_allclose(weights[:, ~present].sum(1), 90)
    assert np.ptp(weights[:, :200].reshape(-1, 40, 5), axis=2).max() == 0 and weights.std(axis=0).min() > 0.5
    report = signal_report(*asked, draws=DRAWS)
    aurocs = [roc_auc_score(present, scores, sample_weight=w) for w in weights]
    np.testing.assert_allclose(report["auroc"]["interval"], np.quantile(aurocs, [0.025, 0.975]), atol=1e-9)
    yes = scores > 0
    d = norm.ppf(weights[:, present & yes].sum(1) / 200) - norm.ppf(weights[:, ~present & yes].sum(1) / 90)
    np.testing.assert_allclose(report["d_prime_clipped"]["interval"], np.quantile(d, [0.025, 0.975]), atol=1e-9)


def test_answers_about_one_vector_are_not_independent(asked):
    """The intervals are wider than those that take each answer for itself."""
    scores, present, _ = asked
    report, naive = (signal_report(scores, present, g, draws=DRAWS) for g in (asked[2], np.arange(290)))
    for name in ("tpr", "auroc"):
        wide, narrow = (np.ptp(found[name]["interval"]) for found in (report, naive))
        assert wide > 1.1 * narrow, name
    assert report["fpr"] == naive["fpr"]


def test_a_single_vector_says_nothing_of_others():
    report = signal_report([1.0, 2.0, -1.0, -2.0], [1, 1, 0, 0], ["v", "v", "a", "b"], draws=20)
    assert report["auroc"] == {"value": 1.0, "interval": None}
    low, high = report["tpr"]["interval"]
    assert low < 0.25 and high == 1.0  # as of one answer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: d_prime(1, 2, 0, 2, rule="plain"), "rule is 'plain'"),
        (lambda: d_prime(3, 2, 0, 2), "0 <= yes <= n"),
        (lambda: d_prime(0, 0, 0, 2), "n > 0"),
        (lambda: signal_report([1.0, 2.0], [1, 1], [0, 1]), "present is True for all 2"),
        (lambda: list(stats.cluster_bootstrap_weights([0, 0, 1], 2, 0, [1, 0, 0])), "one label for all of a group"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
