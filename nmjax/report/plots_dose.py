"""How metrics follow the dose, as PNG bytes: one panel a metric, one line an arm."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nmjax.report.plots import DPI, INK, MUTED, frame, legend_above, line_styles, png_bytes


@dataclasses.dataclass(frozen=True)
class DoseCurve:
    """One metric of one arm: values [D] at increasing doses [D], with interval ends low and high [D] or None.

    A value that is None or NaN is missing: its marker is left out and the line is broken there.
    """

    doses: Sequence[float]
    values: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclasses.dataclass(frozen=True)
class DosePanel:
    """One metric: its curve by name of the arm."""

    title: str
    curves: Mapping[str, DoseCurve]


def dose_response_figure(panels: Sequence[DosePanel], columns: int = 4) -> bytes:
    """Small multiples on one dose axis, shaded where the 95% intervals are; arms look alike in all panels.

    A thin horizontal line carries the value at dose 0, where an arm has one. Raises ValueError for no panel, more arms
    than there are styles (6), and a curve with sequences of unequal lengths, only one end of its intervals, or doses
    that do not increase.
    """
    if not panels:
        raise ValueError("panels is empty; wanted at least one metric")
    for panel in panels:
        for name, curve in panel.curves.items():
            _check(curve, f"{panel.title}, {name}")
    styles = line_styles(name for panel in panels for name in panel.curves)
    rows = -(-len(panels) // columns)
    columns = -(-len(panels) // rows)  # 5 panels are 3 + 2, not 4 + 1
    width, height = (2.6, 2.15) if columns > 2 else (3.6, 2.9)  # inches, of a panel
    spaced = ConstrainedLayoutEngine(h_pad=0.07, w_pad=0.06)
    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.3), dpi=DPI, facecolor="white", layout=spaced)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for k, axes in enumerate(grid.flat):
        if k >= len(panels):
            axes.set_visible(False)
            continue
        for name, curve in panels[k].curves.items():
            _draw(axes, curve, styles[name])
        frame(axes, panels[k].title)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        # Panels without one below them carry the axis; `sharex` would leave them bare.
        axes.tick_params(labelbottom=k + columns >= len(panels))
        if k + columns >= len(panels):
            axes.set_xlabel("dose", fontsize=8.5, color=INK)
    handles = [Line2D([], [], **style) for style in styles.values()]
    if any(0 in curve.doses for panel in panels for curve in panel.curves.values()):
        handles.append(Line2D([], [], color=MUTED, linewidth=0.8, label="value at dose 0"))
    legend_above(figure, handles)
    return png_bytes(figure)


def _check(curve: DoseCurve, where: str) -> None:
    for name in ("values", "low", "high"):
        given = getattr(curve, name)
        if given is not None and len(given) != len(curve.doses):
            raise ValueError(f"{where}: {name} has {len(given)} entries for {len(curve.doses)} doses")
    if (curve.low is None) != (curve.high is None):
        raise ValueError(f"{where}: one end of the intervals is missing; wanted low and high, or neither")
    if np.any(np.diff(curve.doses) <= 0):
        raise ValueError(f"{where}: doses are {list(curve.doses)}; wanted them to increase")


def _draw(axes: Axes, curve: DoseCurve, style: Mapping) -> None:
    doses, values = np.asarray(curve.doses, float), np.asarray(curve.values, float)
    if curve.low is not None and curve.high is not None:
        low, high = np.asarray(curve.low, float), np.asarray(curve.high, float)
        axes.fill_between(doses, low, high, color=style["color"], alpha=0.15, linewidth=0, zorder=1)
    for value in values[doses == 0]:
        axes.axhline(value, color=MUTED, linewidth=0.8, zorder=0)
    axes.plot(doses, values, **style, zorder=3)
