"""Grids show the numbers they are given."""

import numpy as np
import pytest

from nmjax.report.plots_grid import GridPanel, grid_figure

VALUES = [[0.9, None, 0.5], [0.1, 0.52, 1.0]]


def test_cells_print_their_values_on_one_scale(drawn):
    grid_figure([GridPanel("a", VALUES), GridPanel("b", VALUES)], ["early", "late"], ["5", "10", "20"], "magnitude")
    first, second = drawn[0].axes
    assert [text.get_text() for text in first.texts] == ["0.90", "-", "0.50", "0.10", "0.52", "1.00"]
    image = first.images[0]
    np.testing.assert_array_equal(image.get_array().filled(-1), [[0.9, -1, 0.5], [0.1, 0.52, 1.0]])
    assert image.get_clim() == (0, 1)
    red, _, blue, _ = image.cmap(0.1)
    assert red > blue and image.cmap(0.9)[2] > image.cmap(0.9)[0]
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("a", "b")
    assert [label.get_text() for label in first.get_yticklabels()] == ["early", "late"]


def test_four_panels_stand_in_two_rows_of_two(drawn):
    grid_figure([GridPanel(str(k), VALUES) for k in range(4)], "ab", "xyz", "x")
    assert [axes.get_subplotspec().rowspan.start for axes in drawn[0].axes] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("panels", "message"), [([], "panels is empty"), ([GridPanel("a", [[0.5, 0.5]])], r"a: values has shape \(1, 2\)")]
)
def test_bad_input_is_named(panels, message):
    with pytest.raises(ValueError, match=message):
        grid_figure(panels, ["early", "late"], ["5", "10"], "magnitude")
