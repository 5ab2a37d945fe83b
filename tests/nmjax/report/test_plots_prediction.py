"""Predicted against actual: the tokens, the bins and their counts."""

import dataclasses

import numpy as np
import pytest

from nmjax.report.plots_prediction import PredictionPanel, prediction_figure

BINS = {"predicted": [1.0, None, 3.0], "actual": [1.5, None, 2.5], "counts": [40, 0, 60]}
PANEL = PredictionPanel("seed 1", [0.5, 2.0, 4.0], [0.0, 3.0, 5.0], BINS)


def test_tokens_bins_and_counts(drawn):
    second = dataclasses.replace(PANEL, title="seed 2", predicted=[-1.0], actual=[9.0])
    prediction_figure([PANEL, second], "predicted", "actual")
    upper, other, lower, _ = drawn[0].axes
    same, tokens, bins = upper.get_lines()
    np.testing.assert_array_equal(tokens.get_xydata(), [[0.5, 0], [2, 3], [4, 5]])
    np.testing.assert_array_equal(bins.get_xydata(), [[1, 1.5], [3, 2.5]])
    np.testing.assert_array_equal(same.get_xdata(), same.get_ydata())
    assert [segment.tolist() for segment in lower.collections[0].get_segments()] == [
        [[1, 0], [1, 40]],
        [[3, 0], [3, 60]],
    ]
    assert upper.get_xlim() == upper.get_ylim() == other.get_ylim() == lower.get_xlim()
    assert upper.get_xlim()[0] < -1 and upper.get_xlim()[1] > 9, "no token is cut off"
    assert [axes.get_title(loc="left") for axes in (upper, other)] == ["seed 1", "seed 2"]


def test_any_number_of_panels(drawn):
    prediction_figure([PANEL] * 4, "predicted", "actual")
    assert sum(axes.get_visible() for axes in drawn[0].axes) == 8
    constant = PredictionPanel("one value", [2.0], [2.0], {"predicted": [2.0], "actual": [2.0], "counts": [5]})
    prediction_figure([constant], "predicted", "actual")
    assert drawn[1].axes[0].get_xlim() == (1, 3)


def test_bad_panels_are_named():
    with pytest.raises(ValueError, match="panels is empty"):
        prediction_figure([], "x", "y")
    with pytest.raises(ValueError, match="seed 1: 3 predicted and 1 actual values"):
        prediction_figure([dataclasses.replace(PANEL, actual=[1.0])], "x", "y")
