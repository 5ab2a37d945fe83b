"""Signals that beat length and signals that are length, and the error rate of the comparison."""

import json

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from nmjax.metrics import rivals


def study(rng, n, signal, by_length=0.0, length_tells=1.0):
    """n questions with two answers each: a signal that knows the label and a part of the length, which knows it too."""
    labels, groups = np.tile([0, 1], n), np.repeat(np.arange(n), 2)
    length = np.exp(3 + 0.5 * (rng.normal(size=2 * n) + length_tells * labels))
    own = signal * labels + rng.normal(size=n)[groups] + rng.normal(size=2 * n)
    return own + by_length * np.log(length), length, labels, groups


def test_many_comparisons_are_those_of_each_pair():
    scores, length, labels, groups = study(np.random.default_rng(0), 60, signal=1.0)
    signals, directions = [scores, length, -scores], ("high", "high", "low")
    many = rivals.compare_all(signals, labels, groups, [(0, 1), (2, 1)], draws=200, directions=directions)
    each = [
        rivals.compare_aurocs(signals[i], length, labels, groups, draws=200, directions=(directions[i], "high"))
        for i in (0, 2)
    ]
    assert many == each and many[0]["difference"] == pytest.approx(many[1]["difference"]) != 0


def test_comparison_detects_a_better_signal_in_whatever_direction():
    scores, length, labels, groups = study(np.random.default_rng(0), 150, signal=2.5, length_tells=0.3)
    found = rivals.compare_aurocs(scores, length, labels, groups, draws=500)
    expected = sklearn.metrics.roc_auc_score(labels, scores) - sklearn.metrics.roc_auc_score(labels, length)
    assert found["difference"] == pytest.approx(expected) and expected > 0.1
    assert found["interval"][0] > 0 and found["p_value"] == pytest.approx(2 / 501)
    turned = rivals.compare_aurocs(-scores, length, labels, groups, draws=500)
    assert turned["directions"] == ["low", "high"]
    assert turned["interval"] == pytest.approx(found["interval"]) and turned["p_value"] == found["p_value"]
    against = rivals.compare_aurocs(scores, length, labels, groups, draws=500, directions=("low", "high"))
    assert against["auroc_a"] == pytest.approx(1 - found["auroc_a"]) and against["difference"] < 0
    back = rivals.compare_aurocs(length, scores, labels, groups, draws=500)
    assert back["difference"] == -found["difference"] and back["p_value"] == found["p_value"]
    same = rivals.compare_aurocs(scores, 2 * scores, labels, groups, draws=100)
    assert same["p_value"] == 1 and same["interval"] == [0, 0]
    json.dumps(found, allow_nan=False)


def test_comparison_of_equally_good_signals_errs_as_often_as_it_says():
    p_values = []
    for trial in range(300):
        rng = np.random.default_rng([1, trial])
        labels, groups = np.tile([0, 1], 40), np.repeat(np.arange(40), 2)
        shared = rng.normal(size=80)
        a, b = (labels + shared + rng.normal(size=80) for _ in range(2))
        p_values.append(rivals.compare_aurocs(a, b, labels, groups, draws=200, seed=trial)["p_value"])
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.09
    assert np.mean(np.array(p_values) <= 0.5) == pytest.approx(0.5, abs=0.1)


def test_comparison_without_both_labels_is_none():
    found = rivals.compare_aurocs([1.0, 2.0], [3.0, 1.0], [1, 1], [0, 1], draws=10)
    assert found["difference"] is found["interval"] is found["p_value"] is found["auroc_a"] is None
    json.dumps(found, allow_nan=False)


def test_residual_of_a_signal_that_is_length_says_nothing():
    copies, own = [], []
    for trial in range(8):
        rng = np.random.default_rng([2, trial])
        noise, noise_length, labels, groups = study(rng, 200, signal=0.0, by_length=4.0)
        copies.append(rivals.residualised_auroc(noise, labels, noise_length, groups, draws=50))
        scores, length, labels, groups = study(rng, 200, signal=1.5, length_tells=0.0)
        own.append(rivals.residualised_auroc(-scores, labels, length, groups, draws=50))
    assert np.mean([f["auroc_raw"] for f in copies]) > 0.65
    assert copies[-1]["rank_correlation"] == pytest.approx(scipy.stats.spearmanr(noise, noise_length).statistic)
    assert np.mean([f["auroc"] for f in copies]) == pytest.approx(0.5, abs=0.02)
    assert np.mean([f["auroc"] for f in own]) == pytest.approx(np.mean([f["auroc_raw"] for f in own]), abs=0.02)
    assert np.mean([f["auroc_raw"] for f in own]) < 0.3
    low, high = own[0]["interval"]
    assert low < own[0]["auroc"] < high < 0.5
    stretched = rivals.residualised_auroc(np.exp(-scores), labels, np.log(length), groups, draws=50)
    assert stretched["auroc"] == pytest.approx(own[-1]["auroc"], abs=1e-12)


def test_residual_of_a_falling_dependence_and_of_constants():
    rng = np.random.default_rng(3)
    noise, length, labels, groups = study(rng, 400, signal=0.0, by_length=-4.0)
    found = rivals.residualised_auroc(noise, labels, length, groups, draws=20)
    assert found["auroc_raw"] < 0.35 and found["auroc"] == pytest.approx(0.5, abs=0.05)
    constant = rivals.residualised_auroc(np.ones(800), labels, length, groups, draws=20)
    assert constant["auroc"] == 0.5 and constant["rank_correlation"] is None
    plain = rivals.residualised_auroc(noise, labels, np.ones(800), groups, draws=20)
    assert plain["auroc"] == pytest.approx(plain["auroc_raw"], abs=0.02)


def test_matched_pairs_are_those_of_brute_force():
    rng = np.random.default_rng(4)
    scores, length, labels, groups = study(rng, 30, signal=0.5, by_length=1.0)
    scores, length = np.round(scores), np.round(length)
    table = rivals.matched_auroc(scores, labels, length, (0.0, 0.25, 100.0), groups, draws=100)
    for row in table:
        won, won_by_length = [], []
        for s1, c1 in zip(scores[labels == 1], length[labels == 1], strict=True):
            for s0, c0 in zip(scores[labels == 0], length[labels == 0], strict=True):
                if max(c1, c0) <= (1 + row["caliper"]) * min(c1, c0):
                    won.append(float(s1 > s0) + 0.5 * (s1 == s0))
                    won_by_length.append(float(c1 > c0) + 0.5 * (c1 == c0))
        assert row["pairs"] == len(won) and row["auroc"] == pytest.approx(np.mean(won))
        assert row["auroc_covariate"] == pytest.approx(np.mean(won_by_length))
        assert row["interval"][0] < row["auroc"] < row["interval"][1]
    exact, _, everyone = table
    assert exact["auroc_covariate"] == 0.5 and 5 < exact["pairs"] < everyone["pairs"] == 900
    assert everyone["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores))
    none = rivals.matched_auroc([1.0, 2.0], [0, 1], [1.0, 5.0])[0]
    assert none == {"caliper": 0.25, "pairs": 0, "auroc": None, "auroc_covariate": None, "interval": None}


def test_length_tells_hallucinated_halueval_answers_and_stops_where_it_is_matched(shared_data):
    rows = [json.loads(line) for line in (shared_data / "halueval" / "qa_data.first1000.jsonl").open()]
    length = np.array([len(row[kind]) for row in rows for kind in ("right_answer", "hallucinated_answer")], float)
    labels, groups = np.tile([0, 1], len(rows)), np.repeat(np.arange(len(rows)), 2)
    residual = rivals.residualised_auroc(length, labels, length, groups, draws=20)
    assert residual["auroc_raw"] == pytest.approx(0.976, abs=5e-4)
    assert residual["auroc"] == pytest.approx(0.5, abs=0.1)
    (matched,) = rivals.matched_auroc(length, labels, length, [0.05], groups, draws=20)
    assert matched["pairs"] > 1000 and matched["auroc"] < 0.56


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rivals.matched_auroc([1.0, 2.0], [0, 1], [-1.0, 2.0]), "covariate holds -1.0"),
        (lambda: rivals.compare_aurocs([1.0], [1.0, 2.0], [1], [0]), r"labels has shape \(1,\); wanted \[2\]"),
        (lambda: rivals.residualised_auroc([1.0, 2.0], [0, 1], [1.0, 2.0], [0, 0]), "folds is 5 of 1 groups"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
