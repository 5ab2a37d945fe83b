"""Thresholds against brute force and scikit-learn; the report's intervals by their coverage."""

import json

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from nmjax.metrics import detection, stats


def twins(rng, n, effect=1.0, shared=1.0):
    """Scores, labels and groups of n questions, each with its right and its wrong answer, which share a difficulty."""
    labels, groups = np.tile([0, 1], n), np.repeat(np.arange(n), 2)
    return effect * labels + shared * rng.normal(size=n)[groups] + rng.normal(size=2 * n), labels, groups


def brute_force(scores, labels, tau, direction):
    """The four counts of one threshold, one example at a time."""
    counts = dict.fromkeys(("tp", "fp", "fn", "tn"), 0)
    for score, label in zip(scores, labels, strict=True):
        flagged = score >= tau if direction == "high" else score <= tau
        counts[("t" if flagged == bool(label) else "f") + ("p" if flagged else "n")] += 1
    return counts


SAMPLES = st.lists(st.tuples(st.integers(-3, 4), st.booleans()), min_size=1, max_size=12)
DIRECTION = st.sampled_from(detection.DIRECTIONS)


@given(SAMPLES, DIRECTION, st.lists(st.integers(-5, 5), max_size=5))
@settings(max_examples=150, deadline=None)
def test_thresholds_are_those_of_brute_force(sample, direction, taus):
    scores, labels = np.array([s for s, _ in sample]) / 2, [y for _, y in sample]
    for tau, row in zip(taus, detection.at_thresholds(scores, labels, taus, direction), strict=True):
        c = brute_force(scores, labels, tau, direction)
        assert {name: row[name] for name in c} == c and row["tau"] == tau
        assert row["precision"] == (c["tp"] / (c["tp"] + c["fp"]) if c["tp"] + c["fp"] else None)
        assert row["recall"] == (c["tp"] / (c["tp"] + c["fn"]) if c["tp"] + c["fn"] else None)
        wrong = 2 * c["tp"] + c["fp"] + c["fn"]
        assert row["f1"] == (2 * c["tp"] / wrong if wrong else None)
        assert row["flag_rate"] == (c["tp"] + c["fp"]) / len(labels)
        assert detection.flags(scores, tau, direction).sum() == c["tp"] + c["fp"]
        json.dumps(row, allow_nan=False)


@given(SAMPLES.filter(lambda sample: any(y for _, y in sample)), DIRECTION, st.sampled_from([0.0, 0.5, 0.9, 1.0]))
@settings(max_examples=150, deadline=None)
def test_best_threshold_is_that_of_brute_force(sample, direction, min_recall):
    scores, labels = np.array([s for s, _ in sample]) / 2, np.array([y for _, y in sample])
    rows = [brute_force(scores, labels, tau, direction) for tau in np.unique(scores)]
    able = [(c["tp"] / (c["tp"] + c["fp"]), -c["tp"] - c["fp"]) for c in rows if c["tp"] >= min_recall * labels.sum()]
    best = detection.best_threshold(scores, labels, direction, min_recall)
    assert (best["precision"], -best["tp"] - best["fp"]) == max(able)
    assert best["mode"] == "precision_at_recall" and best["recall"] >= min_recall


def test_best_threshold_of_a_grid_without_the_recall_is_that_of_best_f1():
    scores, labels = np.array([1, 2, 3, 4, 5, 6.0]), np.array([1, 0, 0, 1, 1, 0])
    best = detection.best_threshold(scores, labels, "high", 0.9, taus=[6.5, 6, 4, 4.5, 3.9])
    assert best["mode"] == "best_f1" and best["tau"] == 4 and best["f1"] == pytest.approx(2 / 3)
    best = detection.best_threshold(scores, labels, "high", 0.6, taus=[6.5, 6, 4, 4.5, 3.9, 1])
    assert best["mode"] == "precision_at_recall" and best["tau"] == 4 and best["min_recall"] == 0.6
    nothing = detection.best_threshold(scores, labels, "high", taus=[9.0])
    assert nothing["f1"] == 0 and nothing["precision"] is None and nothing["mode"] == "best_f1"


@pytest.mark.parametrize("decimals", [0, 9])
def test_curve_is_that_of_scikit_learn(decimals):
    scores, labels, _ = twins(np.random.default_rng(0), 100)
    scores = np.round(scores, decimals)
    found = detection.curve(scores, labels)
    precision, recall, tau = sklearn.metrics.precision_recall_curve(labels, scores)
    np.testing.assert_array_equal(found.tau, tau[::-1])
    np.testing.assert_allclose(found.precision, precision[-2::-1])
    np.testing.assert_allclose(found.recall, recall[-2::-1])
    f1 = [sklearn.metrics.f1_score(labels, scores >= cut) for cut in found.tau]
    np.testing.assert_allclose(found.f1, f1)
    np.testing.assert_allclose(found.flag_rate, [(scores >= cut).mean() for cut in found.tau])
    assert found.tp[-1] == found.fp[-1] == 100 and len(found.tau) == len(set(scores))
    assert np.isnan(detection.curve([1.0, 2.0], [0, 0]).recall).all()


def test_grid_mirrors_its_quantiles_and_includes_its_end():
    scores = np.random.default_rng(1).normal(size=10_001)
    low, high = (detection.tau_grid(scores, direction) for direction in ("low", "high"))
    np.testing.assert_allclose(low, np.quantile(scores, [k / 100 for k in range(60, 100)]))
    np.testing.assert_allclose(high, -detection.tau_grid(-scores, "low"))
    for direction, taus in (("low", low), ("high", high)):
        share = [detection.flags(scores, tau, direction).mean() for tau in taus]
        np.testing.assert_allclose(share, np.linspace(0.6, 0.99, 40), atol=2e-4)
    np.testing.assert_allclose(detection.tau_grid(scores, "high", 1.0, 1.3, 0.1), [1.0, 1.1, 1.2, 1.3])


def test_report_is_scikit_learns_and_mirrors_with_the_direction():
    scores, labels, groups = twins(np.random.default_rng(2), 80)
    scores = np.round(scores, 1)
    high = detection.detection_report(scores, labels, groups, 0.5, "high", draws=200)
    flagged = scores >= 0.5
    assert high["auroc"]["value"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores))
    assert high["average_precision"]["value"] == pytest.approx(sklearn.metrics.average_precision_score(labels, scores))
    for name in ("precision", "recall", "f1"):
        assert high[name]["value"] == pytest.approx(getattr(sklearn.metrics, f"{name}_score")(labels, flagged))
    assert high["flag_rate"]["value"] == flagged.mean() and high["auroc_raw"] == high["auroc"]
    assert (high["n"], high["positives"], high["groups"], high["base_rate"]) == (160, 80, 80, 0.5)
    low = detection.detection_report(-scores, labels, groups, -0.5, "low", draws=200)
    assert low["auroc_raw"]["value"] == pytest.approx(1 - high["auroc"]["value"])
    np.testing.assert_allclose(low["auroc_raw"]["interval"], 1 - np.array(high["auroc"]["interval"])[::-1])
    assert {k: v for k, v in low.items() if k not in ("tau", "direction", "auroc_raw")} == {
        k: v for k, v in high.items() if k not in ("tau", "direction", "auroc_raw")
    }
    json.dumps(low, allow_nan=False)
    everything = detection.detection_report(scores, labels, groups, None, "low", draws=10)
    assert everything["precision"]["value"] == 0.5 and everything["recall"]["interval"] == [1.0, 1.0]


def test_report_says_none_where_nothing_is_defined():
    none = detection.detection_report([1.0, 2.0, 3.0], [0, 0, 0], ["a", "a", "b"], 5.0, "high", draws=20)
    assert none["auroc"] == none["precision"] == none["recall"] == none["f1"] == {"value": None, "interval": None}
    assert none["flag_rate"] == {"value": 0.0, "interval": [0.0, 0.0]}
    one = detection.detection_report([1.0, 2.0], [0, 1], ["a", "a"], 2.0, "high", draws=20)
    assert one["auroc"] == {"value": 1.0, "interval": None} and one["groups"] == 1
    json.dumps([none, one], allow_nan=False)


def test_intervals_over_groups_cover_the_auroc():
    """Twins share a difficulty that cancels from the AUROC; a bootstrap of examples thinks it does not."""
    truth = scipy.stats.norm.cdf(1 / np.sqrt(2 * (3 + 1)))
    trials, covered, rows = 300, 0, 0
    for trial in range(trials):
        scores, labels, groups = twins(np.random.default_rng([3, trial]), 60, shared=np.sqrt(3))
        for grouping in (groups, np.arange(120)):
            report = detection.detection_report(scores, labels, grouping, 0.0, "high", draws=300, seed=trial)
            low, high = report["auroc"]["interval"]
            if grouping is groups:
                covered += low <= truth <= high
            else:
                rows += low <= truth <= high
    assert 0.92 < covered / trials < 0.98
    assert rows / trials > 0.985


def test_weights_of_a_group_are_those_of_its_draw():
    groups = np.array(["b", "a", "b", "c", "a", "b"])
    weights = np.concatenate(list(stats.cluster_bootstrap_weights(groups, draws=50, seed=4)))
    by_group = np.concatenate(list(stats.bootstrap_weights(3, draws=50, seed=4)))
    np.testing.assert_array_equal(weights, by_group[:, [1, 0, 1, 2, 0, 1]])
    assert np.ptp(weights, axis=0).min() > 1


def test_same_draws_whatever_the_chunk(monkeypatch):
    scores, labels, groups = twins(np.random.default_rng(5), 30)
    first = detection.detection_report(scores, labels, groups, 0.0, "high", draws=100, seed=1)
    monkeypatch.setattr(stats, "_CLUSTER_CHUNK_ELEMENTS", 700)
    assert detection.detection_report(scores, labels, groups, 0.0, "high", draws=100, seed=1) == first
    assert detection.detection_report(scores, labels, groups, 0.0, "high", draws=100, seed=2) != first


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: detection.curve([], []), r"scores has shape \(0,\)"),
        (lambda: detection.curve([1.0, np.nan], [0, 1]), r"scores\[1\] is nan"),
        (lambda: detection.curve([1.0, 2.0], [0]), r"labels has shape \(1,\); wanted \[2\]"),
        (lambda: detection.curve([1.0, 2.0], [0, 2]), "labels holds 2"),
        (lambda: detection.at_thresholds([1.0], [1], [0.0], "up"), "direction is 'up'"),
        (lambda: detection.at_thresholds([1.0], [1], [np.inf], "low"), r"taus is \[inf\]"),
        (lambda: detection.tau_grid([1.0], "low", start=1.0), "start, stop, step are 1.0, None, None"),
        (lambda: detection.tau_grid([1.0], "low", 1.0, 0.0, 0.1), "wanted stop >= start"),
        (lambda: detection.best_threshold([1.0], [0], "low"), "labels holds no 1"),
        (lambda: detection.detection_report([1.0], [0], [1, 2], 0.0, "low"), r"groups has shape \(2,\); wanted \[1\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_report_of_flags_is_that_of_their_threshold():
    scores, labels, groups = twins(np.random.default_rng(3), 40)
    whole = detection.detection_report(scores, labels, groups, 0.3, "high", draws=200)
    flags = detection.flag_report(scores >= 0.3, labels, groups, draws=200)
    assert flags == {key: whole[key] for key in flags} and 0 < flags["flag_rate"]["value"] < 1
    assert flags.keys() == {"n", "positives", "groups", "base_rate", "level", "precision", "recall", "f1", "flag_rate"}
