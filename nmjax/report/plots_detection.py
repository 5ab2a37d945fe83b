"""Scores as detectors, as PNG bytes: ROC, precision and recall, scores by label, two detectors' flags, tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from nmjax.report.plots import BAND, BASELINE, DPI, INK, MUTED, POINT, frame, legend_above, line_styles, png_bytes
from nmjax.report.tables import number, with_interval

_DASHED: dict[str, Any] = {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (4, 3))}
_RIGHT, _WRONG = POINT, "#d55e00"


def curve_figure(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], x: str, y: str, chance: tuple[float, float], remark: str,
    points: Mapping[str, tuple[float, float]] | None = None,
) -> bytes:  # fmt: skip
    """One line a detector through the unit square, (x [K], y [K]) by name, at most 6; axis labels `x` and `y`.

    The dashed line goes from (0, chance[0]) to (1, chance[1]) and `remark` says what it is. `points`: a larger mark on
    some of the lines, where their threshold is. Raises ValueError for no line, too many, or points without a line.
    """
    if not curves:
        raise ValueError("curves is empty; wanted at least one detector")
    points = points or {}
    if unknown := set(points) - set(curves):
        raise ValueError(f"no curve for {sorted(unknown)}; there are {list(curves)}")
    figure = Figure(figsize=(5.4, 4.6), dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine())
    axes = figure.subplots()
    styles = line_styles(curves)
    for name, line in curves.items():
        axes.plot(*line, **styles[name] | {"marker": ""}, zorder=2)
        if name in points:
            axes.plot(*points[name], **styles[name] | {"markersize": 8, "linewidth": 0}, zorder=3)
    axes.plot([0, 1], chance, **_DASHED, zorder=1)
    axes.set(xlim=(0, 1.01), ylim=(0, 1.02))
    frame(axes)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    handles = [Line2D([], [], **style if name in points else style | {"marker": ""}) for name, style in styles.items()]
    legend_above(figure, [*handles, Line2D([], [], **_DASHED, label=remark)])
    return png_bytes(figure)


@dataclasses.dataclass(frozen=True)
class ScorePanel:
    """A detector's scores [N], their labels [N] (1: hallucinated) and where it flags: beyond `tau` in `direction`."""

    title: str
    scores: np.ndarray
    labels: np.ndarray
    tau: float | None
    direction: str


def scores_figure(panels: Sequence[ScorePanel], columns: int = 3, bins: int = 24) -> bytes:
    """Histograms of the scores by label, one panel a detector; shaded: what it flags. ValueError for no panel."""
    if not panels:
        raise ValueError("panels is empty; wanted at least one detector")
    rows = -(-len(panels) // columns)
    columns = -(-len(panels) // rows)
    spaced = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08)
    figure = Figure(figsize=(3.1 * columns + 0.3, 2.35 * rows), dpi=DPI, facecolor="white", layout=spaced)
    for k, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if k >= len(panels):
            axes.set_visible(False)
            continue
        panel = panels[k]
        scores, labels = np.asarray(panel.scores, float), np.asarray(panel.labels, bool)
        edges = np.linspace(scores.min(), scores.max(), bins + 1) if np.ptp(scores) else bins
        for chosen, colour in ((~labels, _RIGHT), (labels, _WRONG)):
            axes.hist(scores[chosen], edges, color=colour, alpha=0.5, linewidth=0)
            axes.hist(scores[chosen], edges, color=colour, histtype="step", linewidth=1.1)
        low, high = axes.get_xlim()
        if panel.tau is not None:
            tau = float(np.clip(panel.tau, low, high))
            axes.axvspan(*((tau, high) if panel.direction == "high" else (low, tau)), color=BAND, alpha=0.45, zorder=0)
            axes.axvline(tau, color=BASELINE, linewidth=1.0)
        axes.set_xlim(low, high)
        axes.locator_params(axis="x", nbins=5)
        frame(axes, panel.title)
    figure.supylabel("samples", fontsize=9, color=INK)
    handles = [
        Patch(facecolor=_WRONG, alpha=0.5, label="hallucinated"),
        Patch(facecolor=_RIGHT, alpha=0.5, label="right"),
        Patch(facecolor=BAND, alpha=0.45, label="flagged"),
        Line2D([], [], color=BASELINE, linewidth=1.0, label="threshold"),
    ]
    legend_above(figure, handles)
    return png_bytes(figure)


@dataclasses.dataclass(frozen=True)
class Square:
    """A two-by-two table: `values [2, 2]` (None: nothing) decide the shade, `texts [2, 2]` are printed."""

    title: str
    rows: tuple[str, str]
    columns: tuple[str, str]
    values: Sequence[Sequence[float | None]]
    texts: Sequence[Sequence[str]]


def squares_figure(squares: Sequence[Square], middle: float = 0.5) -> bytes:
    """Two-by-two tables side by side; a share above `middle` is shaded orange, one below it blue."""
    if not squares:
        raise ValueError("squares is empty; wanted at least one table")
    size = (3.3 * len(squares) + 0.2, 2.9)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12))
    for axes, square in zip(figure.subplots(1, len(squares), squeeze=False)[0], squares, strict=True):
        for i in range(2):
            for j in range(2):
                value = square.values[i][j]
                away = 0.0 if value is None else value - middle
                axes.add_patch(
                    Rectangle((j, i), 1, 1, facecolor=_WRONG if away > 0 else _RIGHT, alpha=min(0.75, 1.4 * abs(away)))
                )
                axes.text(j + 0.5, i + 0.5, square.texts[i][j], ha="center", va="center", fontsize=9, color=INK)
        frame(axes, square.title)
        axes.grid(visible=False)
        axes.set(xlim=(0, 2), ylim=(2, 0))
        axes.set_xticks((0.5, 1.5), square.columns)
        axes.set_yticks((0.5, 1.5), square.rows, rotation=90, va="center")
    return png_bytes(figure)


@dataclasses.dataclass(frozen=True)
class ForestRow:
    """A detector's value in one task (None: undefined) with the ends of its interval."""

    value: float | None
    interval: Sequence[float] | None


def forest_figure(
    rows: Mapping[str, Mapping[str, ForestRow]], x: str, chance: float = 0.5, remark: str = "chance"
) -> bytes:
    """One line a detector, and on it a mark with its interval for each task, at most 6; the dashed line is `chance`.

    `rows`: by detector, by task. `remark` says what the dashed line is. Raises ValueError for no detector, or more
    tasks than there are marks.
    """
    if not rows:
        raise ValueError("rows is empty; wanted at least one detector")
    tasks = list(dict.fromkeys(task for own in rows.values() for task in own))
    styles = line_styles(tasks)
    height = 0.3 + 0.13 * len(tasks)
    figure = Figure(
        figsize=(7.6, height * len(rows) + 0.7), dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine()
    )
    axes = figure.subplots()
    for k, own in enumerate(rows.values()):
        for t, task in enumerate(tasks):
            row = own.get(task)
            if row is None or row.value is None:
                continue
            y = k + (t - (len(tasks) - 1) / 2) * 0.8 / len(tasks)
            style = styles[task]
            if row.interval is not None:
                axes.hlines(y, *row.interval, color=style["color"], linewidth=1.4, zorder=2)
            axes.plot(row.value, y, style["marker"], color=style["color"], markersize=5, zorder=3)
            if len(tasks) == 1:
                axes.text(1.02, y, with_interval(row.value, row.interval), transform=axes.get_yaxis_transform(),
                          va="center", fontsize=8, color=INK)  # fmt: skip
    axes.axvline(chance, **_DASHED, zorder=1)
    frame(axes)
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(x, fontsize=9, color=INK)
    handles = [Line2D([], [], **style | {"markersize": 5}) for style in styles.values()]
    legend_above(figure, [*handles, Line2D([], [], **_DASHED, label=f"{remark}, {number(chance, 1)}")])
    return png_bytes(figure)
