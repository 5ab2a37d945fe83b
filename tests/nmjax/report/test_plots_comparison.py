"""The forest plot: differences in units of their margins, and which of them count as equivalent."""

import dataclasses

import numpy as np
import pytest

from nmjax.report.plots_comparison import ComparisonRow, comparison_figure

WITHIN = ComparisonRow("accuracy", 0.01, -0.01, 0.02, 0.05)
WIDE = ComparisonRow("NLL", 0.1, -0.2, 0.4, 0.2)
FAR = ComparisonRow("entropy", -3.0, -3.5, -0.3, 0.1)


def test_rows_are_drawn_in_margins_and_printed_in_their_unit(drawn):
    comparison_figure([WITHIN, WIDE], "base + dose", "instruct")
    (axes,) = drawn[0].axes
    (lines,) = axes.collections
    np.testing.assert_allclose([s[:, 0] for s in lines.get_segments()], [[-0.2, 0.4], [-1, 2]])
    points = [line for line in axes.get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose([point.get_xydata()[0] for point in points], [[0.2, 0], [0.5, 1]])
    assert points[0].get_markerfacecolor() == points[0].get_color() and points[1].get_markerfacecolor() == "white"
    (margin,) = axes.patches
    assert (margin.get_x(), margin.get_width()) == (-1, 2)
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == ["+0.010 [-0.010, +0.020]  (\u00b10.050)", "+0.100 [-0.200, +0.400]  (\u00b10.200)"]
    label = axes.get_xlabel()
    assert label.index("base + dose") < label.index("difference") < label.index("instruct")


def test_what_lies_beyond_the_axis_is_an_arrow(drawn):
    comparison_figure([WITHIN, FAR], "a", "b")
    (axes,) = drawn[0].axes
    left, right = axes.get_xlim()
    assert -30 < left < -3 and right == -left, "one far metric must not squeeze the others"
    arrows = {line.get_marker(): line.get_xydata() for line in axes.get_lines() if line.get_marker() in "<>"}
    assert len(arrows[">"]) == 0 and arrows["<"][0, 1] == 1 and left < arrows["<"][0, 0] < 0.9 * left
    np.testing.assert_allclose(axes.collections[0].get_segments()[1][:, 0], [left, -3])
    assert sum(line.get_marker() == "o" for line in axes.get_lines()) == 1


@pytest.mark.parametrize(
    ("low", "high", "equivalent"), [(-0.04, 0.04, True), (-0.05, 0.04, False), (-0.04, 0.06, False), (0.1, 0.2, False)]
)
def test_equivalent_means_the_whole_interval_within_the_margin(low, high, equivalent):
    assert ComparisonRow("x", 0.0, low, high, 0.05).equivalent is equivalent


def test_bytes_follow_the_numbers():
    moved = dataclasses.replace(WITHIN, difference=0.015)
    assert comparison_figure([WITHIN], "a", "b") == comparison_figure([WITHIN], "a", "b")
    assert comparison_figure([WITHIN], "a", "b") != comparison_figure([moved], "a", "b")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows is empty"),
        ([dataclasses.replace(WITHIN, margin=0.0)], "accuracy: margin is 0.0; wanted a positive number"),
        ([dataclasses.replace(WITHIN, low=0.3)], r"accuracy: the interval is \[0.3, 0.02\]; wanted low <= high"),
    ],
)
def test_bad_rows_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        comparison_figure(rows, "a", "b")
