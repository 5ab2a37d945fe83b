"""Figures of calibration results as PNG bytes: reliability diagrams and metrics by condition.

Drawn on `matplotlib.figure.Figure` directly: no window system, no global state, the same bytes for the same numbers.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from nmjax.metrics.calibration import ConsistencyBand, ReliabilityBins
from nmjax.metrics.stats import wilson_interval

INK, MUTED, GRID = "#1f2933", "#5f6c7b", "#e4e7eb"
POINT, BAND, BASELINE = "#1d5b9b", "#c9dbef", "#b45309"
LINES = (("#1d5b9b", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#1f2933", "D"), ("#882255", "v"), ("#cc79a7", "P"))
"""Colour and marker of each line where several share a panel; told apart without colour vision, too."""
DPI = 150
_FEW = 10  # a bin with fewer answers is drawn hollow and not joined to the line


@dataclasses.dataclass(frozen=True)
class ReliabilityPanel:
    """One condition of a reliability diagram; `notes` are (name, value as text), printed in the panel."""

    title: str
    bins: ReliabilityBins
    band: ConsistencyBand
    notes: Sequence[tuple[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class MetricPanel:
    """One metric by condition: values [P], intervals low and high [P] (both None where there is none). An entry that
    is None is missing: a condition for which the metric has no value, or a value without interval.

    `band_low`, `band_high` [P]: where the value would lie under perfect calibration (None where that has no meaning).
    """

    title: str
    values: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    band_low: Sequence[float | None] | None = None
    band_high: Sequence[float | None] | None = None


def reliability_figure(panels: Sequence[ReliabilityPanel], columns: int = 4) -> bytes:
    """Reliability diagrams, one a condition on equal axes, each above the number of answers in its bins.

    Points: accuracy of a bin at its mean confidence, with Wilson 95% intervals, hollow where fewer than 10 answers make
    it. Shaded: the consistency band, where a bin's accuracy would lie were the confidences perfectly calibrated.
    """
    if not panels:
        raise ValueError("panels is empty; wanted at least one condition")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width, height, legend = 2.8 * columns + 0.75, 4.3 * rows, 0.5 if columns > 1 else 0.8  # inches
    figure = Figure(figsize=(width, height + legend), dpi=DPI, facecolor="white")
    grid = figure.add_gridspec(
        rows, columns, wspace=0.1, hspace=0.26, left=0.62 / width, right=1 - 0.15 / width,
        top=height / (height + legend) - 0.5 / (height + legend), bottom=0.5 / (height + legend),
    )  # fmt: skip
    most = max(int(panel.bins.counts.max()) for panel in panels)
    for k, panel in enumerate(panels):
        row, column = divmod(k, columns)
        pair = grid[row, column].subgridspec(2, 1, height_ratios=[3.1, 1.0], hspace=0.09)
        upper = figure.add_subplot(pair[0])
        lower = figure.add_subplot(pair[1], sharex=upper)
        _reliability(upper, panel)
        _counts(lower, panel.bins, most)
        for axes in (upper, lower):
            axes.tick_params(labelleft=column == 0)
        upper.tick_params(labelbottom=False)
        lower.set_xlabel("confidence", color=INK, fontsize=9)
        if column == 0:
            upper.set_ylabel("accuracy", color=INK, fontsize=9)
            lower.set_ylabel("answers", color=INK, fontsize=9)
    _legend(figure)
    return png_bytes(figure)


def _reliability(axes: Axes, panel: ReliabilityPanel) -> None:
    bins, band = panel.bins, panel.band
    filled = bins.counts > 0
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    left, right = bins.edges[:-1][filled], bins.edges[1:][filled]
    low, high = band.accuracy_low[filled], band.accuracy_high[filled]
    axes.bar(left, high - low, right - left, bottom=low, align="edge", color=BAND, linewidth=0, zorder=0)
    confidence, accuracy, counts = bins.confidence[filled], bins.accuracy[filled], bins.counts[filled]
    whisker_low, whisker_high = wilson_interval(np.round(accuracy * counts), counts)
    axes.vlines(confidence, whisker_low, whisker_high, color=POINT, linewidth=1.1, zorder=2)
    many = counts >= _FEW
    axes.plot(confidence[many], accuracy[many], color=POINT, linewidth=1.1, zorder=3)
    for chosen, face in ((many, POINT), (~many, "white")):
        axes.plot(
            confidence[chosen], accuracy[chosen], "o", color=POINT, markerfacecolor=face, markersize=4.5, clip_on=False,
            zorder=4,
        )  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(0, 1))
    frame(axes)
    size = 10.5 * min(1, 24 / max(1, len(panel.title)))  # a long title must not run into the next panel's
    axes.text(0, 1.1, panel.title, transform=axes.transAxes, fontsize=size, color=INK, fontweight="bold")
    notes = "  ".join(f"{name} {value}" for name, value in panel.notes)
    axes.text(0, 1.03, notes, transform=axes.transAxes, fontsize=8.5, color=INK)


def _counts(axes: Axes, bins: ReliabilityBins, most: int) -> None:
    centres = (bins.edges[:-1] + bins.edges[1:]) / 2
    axes.bar(centres, bins.counts, np.diff(bins.edges) * 0.92, color="#9fb3c8", linewidth=0)
    for x, count in zip(centres, bins.counts, strict=True):
        if count and len(centres) <= 12:
            axes.text(x, count + 0.03 * most, str(count), ha="center", va="bottom", fontsize=6.5, color=MUTED)
    axes.set(xlim=(0, 1), ylim=(0, 1.22 * most))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    frame(axes)


def _legend(figure: Figure) -> None:
    line: dict[str, Any] = {"color": POINT, "marker": "o", "markersize": 4.5}
    handles = [
        Line2D([], [], **line, linewidth=1.1, label="accuracy in the bin, 95% interval"),
        Line2D([], [], **line, linewidth=0, markerfacecolor="white", label=f"fewer than {_FEW} answers"),
        Patch(facecolor=BAND, label="95% band under perfect calibration"),
        Line2D([], [], color=MUTED, linestyle=(0, (4, 3)), linewidth=0.9, label="perfect calibration"),
    ]
    columns = 4 if figure.get_figwidth() > 9 else 2 if figure.get_figwidth() > 5 else 1
    figure.legend(handles=handles, loc="upper left", ncols=columns, frameon=False, fontsize=8, labelcolor=INK)


def metrics_figure(
    panels: Sequence[MetricPanel], conditions: Sequence[str], baseline: int = 0, columns: int = 4
) -> bytes:
    """One small panel a metric, conditions [P] from top to bottom, values with their intervals.

    A thin vertical line carries the value of the condition `baseline` through the panel.
    """
    if not panels:
        raise ValueError("panels is empty; wanted at least one metric")
    for panel in panels:
        for name in ("values", "low", "high", "band_low", "band_high"):
            given = getattr(panel, name)
            if given is not None and len(given) != len(conditions):
                raise ValueError(f"{panel.title}: {name} has {len(given)} entries for {len(conditions)} conditions")
    rows = -(-len(panels) // columns)
    columns = -(-len(panels) // rows)  # 5 panels are 3 + 2, not 4 + 1
    height = 0.28 * len(conditions) + 0.95
    spaced = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.08)
    figure = Figure(figsize=(2.45 * columns + 1.1, height * rows), dpi=DPI, facecolor="white", layout=spaced)
    y = np.arange(len(conditions))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for k, axes in enumerate(grid.flat):
        if k >= len(panels):
            axes.set_visible(False)
            continue
        panel = panels[k]
        values = _floats(panel.values)
        if np.isfinite(values[baseline]):
            axes.axvline(values[baseline], color=BASELINE, linewidth=0.8, alpha=0.7, zorder=0)
        if panel.band_low is not None and panel.band_high is not None:
            low, high = _floats(panel.band_low), _floats(panel.band_high)
            axes.barh(y, high - low, left=low, height=0.5, color=BAND, linewidth=0, zorder=1)
        if panel.low is not None and panel.high is not None:
            axes.hlines(y, _floats(panel.low), _floats(panel.high), color=POINT, linewidth=1.6, zorder=2)
        axes.plot(values, y, "o", color=POINT, markersize=5, zorder=3)
        for missing in y[~np.isfinite(values)]:
            axes.text(0.5, missing, "no value", transform=axes.get_yaxis_transform(), ha="center", va="center",
                      fontsize=7, color=MUTED, bbox={"facecolor": "white", "linewidth": 0, "pad": 1})  # fmt: skip
        axes.set_yticks(y, conditions)
        axes.set_ylim(len(conditions) - 0.4, -0.6)
        axes.use_sticky_edges = False  # or a bar that starts at the edge of the data would be cut there
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4) if np.isfinite(values).any() else NullLocator())
        frame(axes, panel.title)
        axes.grid(axis="y", visible=False)
    return png_bytes(figure)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.asarray(values, dtype=float)  # None becomes NaN, which is not drawn


def frame(axes: Axes, title: str = "") -> None:
    """The look all panels share."""
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.7)
    axes.tick_params(labelsize=8, colors=MUTED, length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    if title:
        axes.set_title(title, fontsize=10, color=INK, loc="left", pad=6)


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Line styles by name, in the order given; ValueError for more names than there are styles."""
    names = list(dict.fromkeys(names))
    if len(names) > len(LINES):
        raise ValueError(f"{len(names)} lines, {', '.join(names)}; wanted at most {len(LINES)} in one figure")
    return {
        name: {"color": color, "marker": marker, "markersize": 4.5, "linewidth": 1.4, "label": name}
        for name, (color, marker) in zip(names, LINES, strict=False)
    }


def legend_above(figure: Figure, handles: Sequence[Artist]) -> None:
    """One legend for all panels, in as many columns as the figure has room for; the figure grows by its height."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / (0.6 + 0.066 * longest))))
    figure.set_figheight(figure.get_figheight() + 0.17 * -(-len(handles) // columns) + 0.1)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=8, labelcolor=INK)


def png_bytes(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
