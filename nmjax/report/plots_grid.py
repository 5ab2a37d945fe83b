"""A quantity over two settings, as PNG bytes: one small grid of shaded numbers for each condition."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from nmjax.report.plots import DPI, GRID, INK, png_bytes
from nmjax.report.tables import number


@dataclasses.dataclass(frozen=True)
class GridPanel:
    """`values [R, C]` of a condition; None: undefined."""

    title: str
    values: Sequence[Sequence[float | None]]


def grid_figure(
    panels: Sequence[GridPanel], rows: Sequence[str], columns: Sequence[str], x: str,
    ends: tuple[float, float] = (0.0, 1.0), across: int = 3,
) -> bytes:  # fmt: skip
    """Values between the two `ends`: blue above their middle, red below it, white in it.

    `rows [R]` and `columns [C]` name the settings, `x` what the columns are. Raises ValueError for no panel, or values
    that are not [R, C].
    """
    if not panels:
        raise ValueError("panels is empty; wanted at least one condition")
    down = -(-len(panels) // across)
    across = -(-len(panels) // down)
    size = (0.62 * len(columns) * across + 1.4, (0.4 * len(rows) + 0.65) * down + 0.2)
    spaced = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.08)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout=spaced)
    low, high = ends
    for k, axes in enumerate(figure.subplots(down, across, squeeze=False, sharey=True).flat):
        if k >= len(panels):
            axes.set_visible(False)
            continue
        values = np.array(panels[k].values, dtype=float)  # None becomes NaN, which is not drawn
        if values.shape != (len(rows), len(columns)):
            raise ValueError(
                f"{panels[k].title}: values has shape {values.shape}; wanted {(len(rows), len(columns))}, {list(rows)} "
                f"by {list(columns)}"
            )
        axes.imshow(values, vmin=low, vmax=high, cmap="RdBu", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            far = abs(value - (low + high) / 2) > 0.35 * (high - low)
            text = number(None if np.isnan(value) else value, 2)
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if far else INK)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(labelsize=8, length=0, labelcolor=INK)
        axes.set_title(panels[k].title, fontsize=9, color=INK, loc="left")
        for spine in axes.spines.values():
            spine.set_color(GRID)
    figure.supxlabel(x, fontsize=8.5, color=INK)
    return png_bytes(figure)
