"""Figures: what is drawn is what was measured, on equal axes, the same bytes for the same numbers."""

import io

import numpy as np
import pytest
from matplotlib import image

from nmjax.metrics import battery
from nmjax.report import calibration as report
from nmjax.report import plots


@pytest.fixture(scope="module")
def measured():
    rng = np.random.default_rng(0)
    z = 2.0 * rng.normal(size=(400, 4))
    probs = np.exp(z[None] / np.array([1.0, 0.8, 0.4])[:, None, None])
    probs /= probs.sum(axis=-1, keepdims=True)
    labels = np.minimum((rng.random((400, 1)) > probs[0].cumsum(axis=1)).sum(axis=1), 3)
    return battery.measure(probs, labels, baseline=1, draws=100)


LABELS = ["none", "half", "full"]


def test_reliability_diagram_draws_the_bins(measured, drawn):
    png = report.reliability_png(measured, LABELS)
    assert image.imread(io.BytesIO(png)).shape[1] > 1000
    axes = drawn[0].axes
    assert len(axes) == 6
    for k in range(3):
        upper, lower, bins = axes[2 * k], axes[2 * k + 1], measured.bins[k]
        filled, many = bins.counts > 0, bins.counts >= 10
        _, joined, dots, hollow = upper.get_lines()
        np.testing.assert_allclose(joined.get_xydata(), np.stack([bins.confidence, bins.accuracy], axis=1)[many])
        np.testing.assert_allclose(dots.get_xydata(), joined.get_xydata())
        few = filled & ~many
        np.testing.assert_allclose(hollow.get_xydata(), np.stack([bins.confidence, bins.accuracy], axis=1)[few])
        heights = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in upper.patches]
        band = np.stack([measured.bands[k].accuracy_low, measured.bands[k].accuracy_high], axis=1)[filled]
        np.testing.assert_allclose(heights, band)
        np.testing.assert_allclose([bar.get_height() for bar in lower.patches], bins.counts)
        assert upper.get_xlim() == upper.get_ylim() == lower.get_xlim() == (0, 1)
        assert LABELS[k] in [text.get_text() for text in upper.texts]
    assert len({axes[2 * k + 1].get_ylim() for k in range(3)}) == 1, "counts must be comparable between panels"


def test_metrics_figure_draws_values_intervals_and_the_baseline(measured, drawn):
    report.metrics_png(measured, LABELS)
    panels = {axes.get_title(loc="left"): axes for axes in drawn[0].axes if axes.get_visible()}
    assert set(panels) == set(report.NAMES.values())
    for key, title in report.NAMES.items():
        baseline, points = panels[title].get_lines()
        values = [p[key] for p in measured.profiles]
        np.testing.assert_allclose(points.get_xdata(), values)
        assert set(baseline.get_xdata()) == {values[1]}
        if key in ("ece", "mce"):
            bands = [p["under_perfect_calibration"][key]["band"] for p in measured.profiles]
            np.testing.assert_allclose([(b.get_x(), b.get_x() + b.get_width()) for b in panels[title].patches], bands)
            left, right = panels[title].get_xlim()
            assert left < min(b[0] for b in bands) and right > max(b[1] for b in bands), "no band may be cut off"
        else:
            (lines,) = panels[title].collections
            intervals = [p["intervals"][key] for p in measured.profiles]
            np.testing.assert_allclose([segment[:, 0] for segment in lines.get_segments()], intervals)


def test_missing_metrics_leave_a_gap_that_says_so(drawn):
    panels = [
        plots.MetricPanel("some", [0.5, None, 0.7], [0.4, None, 0.6], [0.6, None, 0.8]),
        plots.MetricPanel("baseline missing", [None, 0.1, 0.2]),
        plots.MetricPanel("none", [None] * 3, [None] * 3, [None] * 3),
    ]
    plots.metrics_figure(panels, LABELS)
    some, baseline, empty = drawn[0].axes
    points = some.get_lines()[1].get_xydata()
    np.testing.assert_array_equal(points[[0, 2]], [[0.5, 0], [0.7, 2]])
    assert np.isnan(points[1, 0])
    gaps = [[(text.get_text(), text.get_position()[1]) for text in axes.texts] for axes in (some, baseline, empty)]
    assert gaps == [[("no value", 1)], [("no value", 0)], [("no value", k) for k in range(3)]]
    assert len(baseline.get_lines()) == 1, "a baseline without a value has no line"
    assert len(empty.get_xticks()) == 0 and len(some.get_xticks()) > 1


def test_ten_metrics_of_ten_conditions_and_sixteen_diagrams_keep_their_letters_apart(measured, drawn):
    conditions = [f"a_condition_with_a_name_{k}" for k in range(10)]
    plots.metrics_figure([plots.MetricPanel(f"metric {k}", list(range(10))) for k in range(10)], conditions)
    titles = [f"a_condition_with_a_rather_long_name_{k}" for k in range(16)]
    notes = [("acc", "0.687"), ("conf", "0.686"), ("ECE", "0.020")]
    plots.reliability_figure(
        [plots.ReliabilityPanel(title, measured.bins[0], measured.bands[0], notes) for title in titles]
    )
    for figure in drawn:
        texts = [text for axes in figure.axes if axes.get_visible() for text in (*axes.texts, axes._left_title)]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        assert len(boxes) >= 10
        for k, box in enumerate(boxes):
            assert figure.bbox.x1 >= box.x1 and box.x0 >= 0
            assert not box.count_overlaps(boxes[:k]), "no title or note may run into another"


def test_same_numbers_same_bytes(measured):
    assert report.reliability_png(measured, LABELS) == report.reliability_png(measured, LABELS)
    assert report.metrics_png(measured, LABELS) == report.metrics_png(measured, LABELS)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_panels(measured, drawn, count):
    panels = [plots.ReliabilityPanel(f"p{k}", measured.bins[0], measured.bands[0]) for k in range(count)]
    plots.reliability_figure(panels)
    assert len(drawn[0].axes) == 2 * count


def test_bad_panels_are_named():
    with pytest.raises(ValueError, match="panels is empty"):
        plots.reliability_figure([])
    with pytest.raises(ValueError, match="ECE: low has 1 entries for 2 conditions"):
        plots.metrics_figure([plots.MetricPanel("ECE", [1, 2], [0], [3, 4])], ["a", "b"])
    with pytest.raises(ValueError, match="panels is empty"):
        plots.metrics_figure([], ["a"])


def test_tables_print_the_battery(measured):
    means = report.means_table(measured, LABELS)
    first = measured.profiles[0]
    low, high = first["intervals"]["accuracy"]
    assert means.rows[0][:2] == ["none", f"{first['accuracy']:.3f} [{low:.3f}, {high:.3f}]"]
    binned = report.binned_table(measured, LABELS)
    null = first["under_perfect_calibration"]["ece"]
    assert binned.rows[0][1:3] == [f"{first['ece']:.3f}", f"{null['band'][0]:.3f} to {null['band'][1]:.3f}"]
    differences = report.differences_table(measured, LABELS, "half", ("confidence", "accuracy"))
    assert [row[0] for row in differences.rows] == ["none", "full"]
    assert differences.rows[1][1].startswith("+") and differences.rows[1][1].endswith("]*")
    assert differences.rows[1][2] == "0.000 [0.000, 0.000] ", "temperature moves no answer"
