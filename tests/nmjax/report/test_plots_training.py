"""Curves, differences and costs: what is drawn are the numbers given."""

import numpy as np
import pytest

from nmjax.metrics.seeds import over_seeds
from nmjax.report.plots import LINES
from nmjax.report.plots_training import (
    Curve,
    CurvePanel,
    DifferencePanel,
    block_means,
    costs_figure,
    curves_figure,
    differences_figure,
)

X = [1.0, 2.0, 4.0]
THREE = Curve(X, [[5.0, 4.0, 3.0], [6.0, 5.0, 4.0], [7.0, 3.0, 5.0]])
ONE = Curve([2.0, 8.0], [[3.0, -1.0]])


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_curves_are_means_with_the_range_of_the_runs(drawn):
    curves_figure([CurvePanel("loss", {"a": THREE}), CurvePanel("other", {"b": ONE, "a": THREE}, "FLOPs", zero=True)])
    first, second = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["loss", "other"]
    (line,) = first.get_lines()
    assert line.get_xydata().tolist() == [[1, 6], [2, 4], [4, 4]]
    (band,) = first.collections
    low, high = [(1, 5), (2, 3), (4, 3)], [(1, 7), (2, 5), (4, 5)]
    assert {tuple(vertex) for vertex in band.get_paths()[0].vertices} == {*low, *high}
    b, again, zero = second.get_lines()
    assert b.get_xydata().tolist() == [[2, 3], [8, -1]] and set(zero.get_ydata()) == {0}
    assert (line.get_color(), line.get_marker()) == (again.get_color(), again.get_marker()) == LINES[0]
    assert len(second.collections) == 1, "one run has no band"
    assert (first.get_xlabel(), second.get_xlabel()) == ("step", "FLOPs")
    assert labels(drawn[0]) == ["a", "b", "from the lowest seed to the highest"]


@pytest.mark.parametrize("ends", [(0.2, 20.0), (7.0, 17.0)])
def test_a_logarithmic_axis_has_readable_ticks(drawn, ends):
    curves_figure([CurvePanel("loss", {"a": Curve([1, 2], [ends])}, log=True)])
    (axes,) = drawn[0].axes
    low, high = axes.get_ylim()
    ticks = [text.get_text() for text, at in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)
             if low <= at <= high]  # fmt: skip
    assert 4 <= len(ticks) <= 8 and all(str(float(tick)).removesuffix(".0") == tick for tick in ticks)
    assert labels(drawn[0]) == ["a"]


def test_blocks_are_means_of_steps():
    rng = np.random.default_rng(0)
    values = rng.random((2, 10))
    found = block_means(values, most=4)  # blocks of 3, 3, 2, 2 steps
    assert found.x.tolist() == [2, 5, 7.5, 9.5]
    np.testing.assert_allclose(found.values[:, 0], values[:, :3].mean(axis=1))
    np.testing.assert_allclose(found.values[:, 3], values[:, 8:].mean(axis=1))
    few = block_means(values, most=50)
    assert few.x.tolist() == list(range(1, 11)) and np.array_equal(few.values, values)


def test_differences_have_seeds_intervals_and_their_numbers(drawn):
    far, near, one = over_seeds([-2.0, -3.0, -2.5]), over_seeds([0.01, -0.02, 0.03]), over_seeds([0.5])
    panels = [DifferencePanel("told", {"zeros": near, "diverged": over_seeds([None, 1.0])}),
              DifferencePanel("baseline", {"far": far, "one": one})]  # fmt: skip
    differences_figure(panels, "nats")
    first, second = drawn[0].axes
    assert [text.get_text() for text in first.get_yticklabels()] == ["zeros", "diverged"]
    assert [text.get_text() for text in first.texts] == ["+0.007 [-0.056, +0.069]", "-"]
    assert second.get_xlabel() == "nats" and second.texts[1].get_text() == "+0.500"
    (interval,) = second.collections
    np.testing.assert_allclose(interval.get_segments()[0], [[far["interval"][0], 0], [far["interval"][1], 0]])
    mean, rings, mean_of_one, ring, zero = second.get_lines()
    drawn_at = [list(line.get_xdata()) for line in (mean, rings, mean_of_one, ring, zero)]
    assert drawn_at == [[-2.5], [-2.0, -3.0, -2.5], [0.5], [0.5], [0, 0]]
    assert all(axes.get_xlim()[0] < 0 < axes.get_xlim()[1] for axes in drawn[0].axes)


def test_costs_are_bars_from_zero_with_their_amounts(drawn):
    costs_figure({"FLOPs": {"a": 1.176e9, "b": 1.884e9}, "seconds": {"a": 6.4, "b": 0.0}, "none": {"a": 0, "b": 0}})
    flops, seconds, none = drawn[0].axes
    assert [bar.get_width() for bar in flops.patches] == [1.176e9, 1.884e9] and flops.get_xlim()[0] == 0
    assert [text.get_text() for text in flops.texts] == [" 1.18 G", " 1.88 G"]
    assert [text.get_text() for text in seconds.texts] == [" 6.40", " 0.00"] and none.get_xlim() == (0, 1)
    assert all(text.get_window_extent().x1 <= drawn[0].bbox.x1 for axes in drawn[0].axes for text in axes.texts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: curves_figure([]), "panels is empty"),
        (
            lambda: curves_figure([CurvePanel("loss", {"a": Curve(X, [1.0, 2.0, 3.0])})]),
            r"loss, a: values has shape \(3,\); wanted \[R, 3\]",
        ),
        (lambda: curves_figure([CurvePanel("loss", {"a": Curve([1, 1], [[1, 2]])})]), "x is .*; wanted it to increase"),
        (lambda: curves_figure([CurvePanel("loss", dict.fromkeys("abcdefg", ONE))]), "7 lines"),
        (lambda: block_means([[]]), r"values has shape \(1, 0\)"),
        (lambda: differences_figure([DifferencePanel("told", {})], "nats"), r"panels are \['told'\]"),
        (lambda: costs_figure({}), "panels is empty"),
        (lambda: costs_figure({"a": {"x": 1}, "b": {"y": 1}}), r"b: costs of \['y'\]; wanted them of \['x'\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
