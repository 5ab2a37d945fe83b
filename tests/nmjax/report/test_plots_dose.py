"""Dose-response panels: lines, bands and the value at dose 0 are the numbers given."""

import dataclasses

import numpy as np
import pytest

from nmjax.report.plots import LINES
from nmjax.report.plots_dose import DoseCurve, DosePanel, dose_response_figure

DOSES = [0, 0.25, 1]
CURVE = DoseCurve(DOSES, [0.5, 0.6, 0.8], [0.45, 0.5, 0.7], [0.55, 0.7, 0.9])
BARE = DoseCurve([0.5, 1], [0.3, None])


def test_panels_draw_their_curves_alike(drawn):
    dose_response_figure([DosePanel("accuracy", {"pack": CURVE}), DosePanel("ECE", {"placebo": BARE, "pack": CURVE})])
    first, second = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["accuracy", "ECE"]
    zero, line = first.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), np.stack([DOSES, CURVE.values], axis=1))
    assert set(zero.get_ydata()) == {0.5}
    (band,) = first.collections
    vertices = {tuple(vertex) for vertex in band.get_paths()[0].vertices}
    assert vertices == {*zip(DOSES, CURVE.low, strict=True), *zip(DOSES, CURVE.high, strict=True)}
    bare, _, again = second.get_lines()
    assert bare.get_xydata()[0].tolist() == [0.5, 0.3] and np.isnan(bare.get_ydata()[1])
    assert (line.get_color(), line.get_marker()) == (again.get_color(), again.get_marker()) == LINES[0]
    assert bare.get_color() == LINES[1][0] and len(second.collections) == 1
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["pack", "placebo", "value at dose 0"]


def test_legend_names_dose_0_only_where_it_is(drawn):
    dose_response_figure([DosePanel("ECE", {"placebo": BARE})])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["placebo"]


@pytest.mark.parametrize("count", [1, 5, 8])
def test_six_arms_fit_in_any_number_of_panels(drawn, count):
    arms = {f"an arm with a long name, {k}": CURVE for k in range(6)}
    dose_response_figure([DosePanel(f"metric {k}", arms) for k in range(count)])
    (figure,) = drawn
    visible = [axes for axes in figure.axes if axes.get_visible()]
    box = figure.legends[0].get_window_extent()
    assert len(visible) == count and box.x1 <= figure.bbox.x1
    assert all(axes.get_tightbbox().y1 < box.y0 for axes in visible), "the legend stands above the panels"
    labelled = [axes for axes in visible if axes.get_xlabel() == "dose"]
    assert len(labelled) == min(count, 3 if count == 5 else 4)


def test_bytes_follow_the_numbers():
    panels = [DosePanel("accuracy", {"pack": CURVE})]
    moved = [DosePanel("accuracy", {"pack": dataclasses.replace(CURVE, values=[0.5, 0.61, 0.8])})]
    assert dose_response_figure(panels) == dose_response_figure(panels) != dose_response_figure(moved)


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ([], "panels is empty"),
        ([DosePanel("ECE", {"pack": DoseCurve(DOSES, [1, 2])})], "ECE, pack: values has 2 entries for 3 doses"),
        ([DosePanel("ECE", {"pack": DoseCurve([0], [1], [1, 2], [2])})], "ECE, pack: low has 2 entries for 1 doses"),
        ([DosePanel("ECE", {"pack": DoseCurve([0], [1], [1])})], "ECE, pack: one end of the intervals is missing"),
        (
            [DosePanel("ECE", {"pack": DoseCurve([0, 0], [1, 2])})],
            r"ECE, pack: doses are \[0, 0\]; wanted them",
        ),
        ([DosePanel("ECE", dict.fromkeys("abcdefg", BARE))], "7 lines, a, b, c, d, e, f, g; wanted at most 6"),
    ],
)
def test_bad_panels_are_named(panels, message):
    with pytest.raises(ValueError, match=message):
        dose_response_figure(panels)
