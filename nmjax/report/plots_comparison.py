"""Two conditions metric by metric, as PNG bytes: a forest plot of differences against their equivalence margins."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from nmjax.report.plots import BAND, DPI, INK, MUTED, POINT, frame, legend_above, png_bytes
from nmjax.report.tables import number, with_interval

_FURTHEST = 4.0  # margins; what lies beyond is drawn as an arrow at the edge


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """One metric: the right condition's value less the left one's, the ends of its interval, and the margin within
    which the two count as equivalent, all in the metric's own unit.
    """

    title: str
    difference: float
    low: float
    high: float
    margin: float

    @property
    def equivalent(self) -> bool:
        """Whether the whole interval lies within the margin."""
        return -self.margin < self.low and self.high < self.margin


def comparison_figure(rows: Sequence[ComparisonRow], left: str, right: str) -> bytes:
    """One row a metric: the difference with its interval, measured in margins so that all metrics share an axis, and
    printed at the side in the metric's unit.

    The shaded band is the margin; a filled point has its whole interval in there. Values to the right are higher under
    `right`. Raises ValueError for no rows, a margin that is not positive, and ends in the wrong order.
    """
    if not rows:
        raise ValueError("rows is empty; wanted at least one metric")
    for row in rows:
        if not row.margin > 0:
            raise ValueError(f"{row.title}: margin is {row.margin}; wanted a positive number")
        if not row.low <= row.high:
            raise ValueError(f"{row.title}: the interval is [{row.low}, {row.high}]; wanted low <= high")
    y = np.arange(len(rows))
    margins = np.array([row.margin for row in rows])
    x, low, high = (np.array([getattr(row, name) for row in rows]) / margins for name in ("difference", "low", "high"))
    reach = min(_FURTHEST, max(1.5, 1.08 * np.abs([low, high, x]).max()))
    figure = Figure(
        figsize=(9.0, 0.32 * len(rows) + 0.75), dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine()
    )
    axes = figure.subplots()
    axes.axvspan(-1, 1, color=BAND, alpha=0.6, linewidth=0, zorder=0)
    axes.axvline(0, color=MUTED, linewidth=0.9, zorder=1)
    axes.hlines(y, np.clip(low, -reach, reach), np.clip(high, -reach, reach), color=POINT, linewidth=1.6, zorder=2)
    for ends, marker in ((low < -reach, "<"), (high > reach, ">")):
        edge = 0.98 * reach * (1 if marker == ">" else -1)
        axes.plot(np.full(ends.sum(), edge), y[ends], marker, color=POINT, markersize=6, zorder=3)
    for k, row in enumerate(rows):
        if abs(x[k]) <= reach:
            face = POINT if row.equivalent else "white"
            axes.plot(x[k], k, "o", color=POINT, markerfacecolor=face, markersize=6, zorder=4)
        digits = 3 if row.margin < 0.5 else 2
        shown = with_interval(row.difference, (row.low, row.high), digits, sign=True)
        axes.text(1.02, k, f"{shown}  (\u00b1{number(row.margin, digits)})", transform=axes.get_yaxis_transform(),
                  va="center", fontsize=8, color=INK)  # fmt: skip
    axes.text(1.02, 1.01, "difference [interval]  (\u00b1margin)", transform=axes.transAxes, va="bottom", fontsize=8,
              color=MUTED)  # fmt: skip
    frame(axes)
    axes.set_yticks(y, [row.title for row in rows])
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(-reach, reach))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"\u2190 higher under {left}      difference / margin      higher under {right} \u2192",
                    fontsize=8.5, color=INK)  # fmt: skip
    style: dict[str, Any] = {"color": POINT, "marker": "o", "markersize": 6, "linewidth": 1.6}
    handles = [
        Line2D([], [], **style, label="equivalent: interval in the margin"),
        Line2D([], [], **style, markerfacecolor="white", label="not shown to be"),
        Patch(facecolor=BAND, alpha=0.6, label="equivalence margin"),
    ]
    legend_above(figure, handles)
    return png_bytes(figure)
