"""Intervals over seeds against scipy, and how often they hold the truth."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from nmjax.metrics import seeds


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_is_student_t(level):
    values = np.random.default_rng(0).normal(3.0, 0.2, size=5)
    found = seeds.over_seeds(values, level)
    reference = scipy.stats.ttest_1samp(values, 0).confidence_interval(level)
    assert found["mean"] == pytest.approx(values.mean()) and found["n"] == 5
    np.testing.assert_allclose(found["interval"], reference)
    np.testing.assert_array_equal(found["by_seed"], values)


def test_pairing_removes_what_the_seeds_share():
    rng = np.random.default_rng(1)
    shared = rng.normal(4.0, 1.0, size=6)
    a, b = shared + rng.normal(0.1, 0.02, size=6), shared + rng.normal(0.0, 0.02, size=6)
    found = seeds.paired_over_seeds(a, b)
    np.testing.assert_allclose(found["interval"], scipy.stats.ttest_rel(a, b).confidence_interval())
    np.testing.assert_allclose(found["by_seed"], a - b)
    unpaired = scipy.stats.ttest_ind(a, b).confidence_interval()
    assert unpaired.low < 0 < found["interval"][0], "the difference was meant to show by pairing alone"


def test_the_interval_holds_the_truth_as_often_as_it_says_with_three_seeds():
    runs = np.random.default_rng(2).normal(size=(4000, 3))
    ends = np.array([seeds.over_seeds(run)["interval"] for run in runs])
    covered = np.mean((ends[:, 0] <= 0) & (ends[:, 1] >= 0))
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))
    normal = np.abs(runs.mean(axis=1)) <= 1.96 * runs.std(axis=1, ddof=1) / math.sqrt(3)
    assert normal.mean() < 0.85, "an interval of 1.96 standard errors was meant to be too short"


def test_one_seed_has_no_interval_equal_ones_have_no_width_and_a_lost_one_has_no_mean():
    assert seeds.over_seeds([2.5]) == {"by_seed": [2.5], "mean": 2.5, "interval": None, "n": 1}
    assert seeds.over_seeds([2.5, 2.5, 2.5])["interval"] == [2.5, 2.5]
    for lost in (None, math.nan, math.inf):
        expected = {"by_seed": [1.0, None], "mean": None, "interval": None, "n": 2}
        assert seeds.over_seeds([1.0, lost]) == expected
        assert seeds.paired_over_seeds([3.0, 1.0], [2.0, lost]) == expected
    json.dumps(seeds.over_seeds(np.float32([1, 2])), allow_nan=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seeds.over_seeds([]), r"values has shape \(0,\); wanted \[R\]"),
        (lambda: seeds.over_seeds(np.ones((2, 2))), r"values has shape \(2, 2\)"),
        (lambda: seeds.over_seeds([1.0, 2.0], level=95), "level is 95; wanted a share"),
        (lambda: seeds.paired_over_seeds([1.0, 2.0], [1.0]), "a has 2 values and b 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
