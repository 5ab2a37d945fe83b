"""Tables against counts by hand and one example at a time."""

import json

import numpy as np
import pytest
import scipy.stats

from nmjax.metrics import score_tables

SCORES = np.array([0.1, 0.9, 0.4, 0.4, 0.8, 0.2, 0.7, 0.3])
LABELS = np.array([0, 1, 1, 0, 1, 0, 0, 1])


def test_summary_by_hand():
    table = score_tables.summary(SCORES, LABELS)
    assert (table["n"], table["positives"], table["rate"]) == (8, 4, 0.5)
    assert (table["min"], table["median"], table["max"]) == (0.1, 0.4, 0.9)
    assert table["mean"] == pytest.approx(0.475) and table["sd"] == pytest.approx(SCORES.std(ddof=1))
    assert table["by_label"]["hallucinated"]["mean"] == pytest.approx(0.6)
    assert table["by_label"]["right"] == {"n": 4, "mean": pytest.approx(0.35), "sd": pytest.approx(0.264575, abs=1e-6)}
    t = scipy.stats.ttest_ind(SCORES[LABELS == 1], SCORES[LABELS == 0]).statistic
    assert table["cohens_d"] == pytest.approx(t / np.sqrt(4 / 2))  # equal sizes: t = d sqrt(n / 2)
    assert score_tables.cohens_d(-SCORES, LABELS) == pytest.approx(-table["cohens_d"])


def test_undefined_is_none():
    table = score_tables.summary([0.3, 0.3], [1, 1])
    assert table["cohens_d"] is None and table["by_label"]["right"] == {"n": 0, "mean": None, "sd": None}
    assert score_tables.cohens_d([0.3, 0.3, 0.3, 0.3], [1, 1, 0, 0]) is None
    flags = np.array([True, True])
    json.dumps([table, score_tables.quadrants(flags, flags, [0, 1])], allow_nan=False)
    assert score_tables.quadrants(flags, flags, [0, 1])["neither"]["rate"] is None


def test_median_check_by_hand():
    high, low = (score_tables.median_check(SCORES, LABELS, direction) for direction in ("high", "low"))
    assert high["tau"] == low["tau"] == 0.4
    assert high["precision"] == pytest.approx(3 / 5) and high["difference"] == pytest.approx(0.1)
    assert low["precision"] == pytest.approx(2 / 5) and low["difference"] == pytest.approx(-0.1)
    assert high["base_rate"] == 0.5


def test_label_quadrants_lists_the_most_extreme_first():
    table = score_tables.label_quadrants(SCORES, LABELS, examples=2)
    assert table == {
        "median": 0.4,
        "hallucinated_low": {"count": 2, "indices": [7, 2]},
        "hallucinated_high": {"count": 2, "indices": [1, 4]},
        "right_low": {"count": 3, "indices": [0, 5]},
        "right_high": {"count": 1, "indices": [6]},
    }
    assert score_tables.label_quadrants(SCORES, LABELS, median=0.85)["hallucinated_high"]["indices"] == [1]
    many = score_tables.label_quadrants(np.arange(100.0), np.arange(100) % 2)
    assert many["right_high"] == {"count": 25, "indices": [98, 96, 94, 92, 90]}


def test_quadrants_are_those_of_counting():
    rng = np.random.default_rng(0)
    a, b, y = rng.random((3, 300)) < [[0.5], [0.3], [0.4]]
    table = score_tables.quadrants(a, b, y)
    names = {(0, 0): "neither", (1, 1): "both", (1, 0): "only_a", (0, 1): "only_b"}
    for (by_a, by_b), name in names.items():
        inside = [label for x, z, label in zip(a, b, y, strict=True) if (x, z) == (by_a, by_b)]
        cell = table[name]
        assert (cell["count"], cell["hallucinated"]) == (len(inside), sum(inside))
        reference = scipy.stats.binomtest(int(sum(inside)), len(inside)).proportion_ci(method="wilson")
        assert cell["rate"] == sum(inside) / len(inside)
        np.testing.assert_allclose(cell["interval"], [reference.low, reference.high])
    assert sum(cell["count"] for cell in table.values()) == 300
