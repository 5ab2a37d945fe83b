"""Against scikit-learn, closed forms, and the chance level."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score

from nmjax.metrics.multiclass import answered, balanced_accuracy, class_report, macro_auroc, permutation_p


def drawn(n=90, classes=3, signal=1.0, seed=0):
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.choice(classes, n - classes, p=np.arange(1, classes + 1) / 6)])
    return rng.standard_normal((n, classes)) + signal * np.eye(classes)[y], y


def test_agrees_with_scikit_learn():
    s, y = drawn()
    probs = np.exp(s) / np.exp(s).sum(axis=1, keepdims=True)
    weights = np.random.default_rng(1).integers(0, 4, (5, len(y)))
    for w in weights:
        wanted = balanced_accuracy_score(y, s.argmax(axis=1), sample_weight=w)
        assert balanced_accuracy(s, y, w) == pytest.approx(wanted)
    np.testing.assert_allclose(balanced_accuracy(s, y, weights), [balanced_accuracy(s, y, w) for w in weights])
    assert macro_auroc(probs, y) == pytest.approx(roc_auc_score(y, probs, multi_class="ovr", average="macro"))
    report = class_report(s, y, draws=50)
    np.testing.assert_array_equal(report["confusion"], confusion_matrix(y, s.argmax(axis=1)))
    assert report["accuracy"]["value"] == pytest.approx((s.argmax(axis=1) == y).mean())
    assert report["prior"] == pytest.approx(np.bincount(y).max() / len(y)) and report["above_chance"]
    for name in ("accuracy", "balanced_accuracy", "macro_auroc"):
        low, high = report[name]["interval"]
        assert low < report[name]["value"] < high


def test_one_answer_is_at_chance_whatever_the_frequencies():
    _, y = drawn()
    same = np.tile([0.0, 1.0, 2.0], (len(y), 1))
    report = class_report(same, y, draws=50)
    assert report["accuracy"]["value"] == report["prior"] > 0.4
    assert report["balanced_accuracy"] == {"value": pytest.approx(1 / 3), "interval": pytest.approx([1 / 3, 1 / 3])}
    assert report["macro_auroc"]["value"] == 0.5 and report["p_value"] == 1.0 and not report["above_chance"]
    np.testing.assert_allclose(answered(np.zeros((2, 4))), 0.25)
    assert balanced_accuracy(np.zeros((len(y), 3)), y) == pytest.approx(1 / 3)


def test_a_constant_answer_may_hide_a_signal():
    s, y = drawn(signal=3.0)
    report = class_report(s + [0.0, 0.0, 50.0], y, draws=50)
    assert report["balanced_accuracy"]["value"] == pytest.approx(1 / 3) and report["macro_auroc"]["interval"][0] > 0.9


def test_permutations_against_all_of_them():
    s, y = drawn(n=7, signal=1.5, seed=4)
    seen = balanced_accuracy(s, y)
    exact = np.mean([balanced_accuracy(s, np.array(p)) >= seen - 1e-12 for p in itertools.permutations(y)])
    assert 0.01 < exact < 0.5
    assert permutation_p(s, y, draws=20_000) == pytest.approx(exact, abs=0.012)


def test_groups_widen_the_interval():
    s, y = drawn(n=60, signal=0.7)
    width = [
        np.ptp(class_report(np.repeat(s, 6, axis=0), np.repeat(y, 6), groups, 300)["balanced_accuracy"]["interval"])
        for groups in (None, np.repeat(np.arange(60), 6))
    ]
    assert width[1] > 1.8 * width[0]


@pytest.mark.parametrize(
    "scores, labels, message",
    [
        (np.zeros((3, 1)), [0, 0, 0], "wanted \\[N, C\\]"),
        (np.zeros((3, 2)), [0, 1], "wanted \\[N, C\\]"),
        (np.zeros((3, 2)), [0, 0, 0], "labels holds \\[0\\]; wanted each class from 0 to 1"),
        (np.full((2, 2), np.nan), [0, 1], "NaN"),
    ],
)
def test_bad_input_is_named(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        class_report(scores, np.array(labels))
