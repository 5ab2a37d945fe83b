"""Risk against coverage: the curves given, and the risk of keeping everything."""

import numpy as np
import pytest

from nmjax.report.plots_risk import risk_coverage_figure

COVERAGE = [0.25, 0.5, 1.0]
CURVES = {"none": (COVERAGE, [0.0, 0.1, 0.4]), "pack": (COVERAGE, [0.2, 0.2, 0.3])}
BANDS = {"pack": ([0.1, 0.1, 0.2], [0.3, 0.3, 0.4])}


@pytest.mark.parametrize(("baseline", "everything"), [(None, 0.4), ("pack", 0.3)])
def test_curves_band_and_the_risk_of_keeping_everything(drawn, baseline, everything):
    risk_coverage_figure(CURVES, BANDS, baseline)
    (axes,) = drawn[0].axes
    none, pack, dashed = axes.get_lines()
    for line, (coverage, risk) in zip((none, pack), CURVES.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([coverage, risk], axis=1))
    assert set(dashed.get_ydata()) == {everything} and dashed.get_linestyle() == "--"
    (band,) = axes.collections
    low, high = BANDS["pack"]
    vertices = {tuple(vertex) for vertex in band.get_paths()[0].vertices}
    assert vertices == {*zip(COVERAGE, low, strict=True), *zip(COVERAGE, high, strict=True)}
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["none", "pack", f"{baseline or 'none'}, all answers kept"]


def test_bytes_follow_the_numbers():
    moved = CURVES | {"pack": (COVERAGE, [0.2, 0.25, 0.3])}
    assert risk_coverage_figure(CURVES) == risk_coverage_figure(CURVES) != risk_coverage_figure(moved)


@pytest.mark.parametrize(
    ("curves", "bands", "baseline", "message"),
    [
        ({}, None, None, "curves is empty"),
        ({"none": (COVERAGE, [0.1])}, None, None, "none: risk has 1 entries for 3 coverages"),
        (CURVES, {"pack": ([0.1], [0.1, 0.2, 0.3])}, None, "pack: low has 1 entries for 3 coverages"),
        ({"none": ([1.0, 0.5], [0.1, 0.2])}, None, None, r"none: coverage is \[1.  0.5\]; wanted it to increase"),
        ({"none": ([0.5, 0.9], [0.1, 0.2])}, None, None, "none: coverage is .* up to 1"),
        ({"none": ([], [])}, None, None, "none: coverage is"),
        (CURVES, {"other": BANDS["pack"]}, None, r"no curve for \['other'\]; there are \['none', 'pack'\]"),
        (CURVES, None, "other", r"no curve for \['other'\]"),
    ],
)
def test_bad_curves_are_named(curves, bands, baseline, message):
    with pytest.raises(ValueError, match=message):
        risk_coverage_figure(curves, bands, baseline)
