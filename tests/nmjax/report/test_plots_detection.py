"""Figures of detectors show the numbers they are given."""

import numpy as np
import pytest

from nmjax.report.plots_detection import (
    ForestRow,
    ScorePanel,
    Square,
    curve_figure,
    forest_figure,
    scores_figure,
    squares_figure,
)

LINE = (np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.8, 1.0]))


def test_curves_marks_and_chance(drawn):
    curve_figure({"a": LINE, "b": LINE}, "x", "y", (0, 1), "chance", {"b": (0.5, 0.8)})
    (axes,) = drawn[0].axes
    a, b, mark, chance = axes.get_lines()
    for line in (a, b):
        np.testing.assert_array_equal(line.get_xydata(), np.stack(LINE, axis=1))
    assert mark.get_xydata().tolist() == [[0.5, 0.8]] and mark.get_color() == b.get_color() != a.get_color()
    assert chance.get_xydata().tolist() == [[0, 0], [1, 1]] and chance.get_linestyle() == "--"


def test_scores_are_counted_by_label_and_the_risky_side_is_shaded(drawn):
    scores, labels = np.array([0.0, 1.0, 1.0, 2.0]), np.array([0, 0, 1, 1])
    panels = [ScorePanel("high", scores, labels, 0.5, "high"), ScorePanel("low", scores, labels, 0.5, "low"),
              ScorePanel("all", scores, labels, None, "high")]  # fmt: skip
    scores_figure(panels, bins=2)
    high, low, everything = drawn[0].axes
    bars = [p for p in high.patches if hasattr(p, "get_height")]
    assert [bar.get_height() for bar in bars[:4]] == [1, 1, 0, 2]
    spans = [[p for p in axes.patches if p.get_alpha() == 0.45] for axes in (high, low, everything)]
    assert spans[0][0].get_x() == 0.5 and spans[1][0].get_x() + spans[1][0].get_width() == 0.5 and not spans[2]


def test_squares_are_shaded_by_side_of_the_middle_and_print_their_texts(drawn):
    square = Square("t", ("r0", "r1"), ("c0", "c1"), [[0.9, 0.1], [None, 0.5]], [["a", "b"], ["-", "d"]])
    squares_figure([square, square])
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["a", "b", "-", "d"]
    risky, safe, nothing, even = axes.patches[:4]
    assert risky.get_facecolor()[:3] != safe.get_facecolor()[:3] and risky.get_alpha() == pytest.approx(
        safe.get_alpha()
    )
    assert nothing.get_alpha() == even.get_alpha() == 0


def test_forest_has_a_mark_a_task_and_leaves_out_what_is_undefined(drawn):
    rows = {
        "s": {"all": ForestRow(0.7, [0.6, 0.8]), "qa": ForestRow(None, None)},
        "t": {"all": ForestRow(0.4, None), "qa": ForestRow(0.9, [0.8, 1.0])},
    }
    forest_figure(rows, "AUROC")
    (axes,) = drawn[0].axes
    values = [line.get_xdata()[0] for line in axes.get_lines() if len(line.get_xdata()) == 1]
    assert values == [0.7, 0.4, 0.9] and len(axes.collections) == 2
    assert [label.get_text() for label in axes.get_yticklabels()] == ["s", "t"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: curve_figure({}, "x", "y", (0, 1), "c"), "curves is empty"),
        (lambda: curve_figure({"a": LINE}, "x", "y", (0, 1), "c", {"b": (0, 0)}), r"no curve for \['b'\]"),
        (lambda: curve_figure(dict.fromkeys("abcdefg", LINE), "x", "y", (0, 1), "c"), "7 lines"),
        (lambda: scores_figure([]), "panels is empty"),
        (lambda: squares_figure([]), "squares is empty"),
        (lambda: forest_figure({}, "x"), "rows is empty"),
    ],
)
def test_bad_input_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
