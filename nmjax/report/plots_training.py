"""How runs that differ in their seed alone went, as PNG bytes: curves, differences with intervals, costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from nmjax.report.plots import DPI, INK, MUTED, POINT, frame, legend_above, line_styles, png_bytes
from nmjax.report.tables import with_interval

_DASHED: dict[str, Any] = {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (4, 3))}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A quantity of R runs at C moments: `x [C]`, increasing, such as steps or operations so far; `values [R, C]`."""

    x: Sequence[float] | np.ndarray
    values: Sequence[Sequence[float]] | np.ndarray


@dataclasses.dataclass(frozen=True)
class CurvePanel:
    """Curves by name of what was trained. With `zero`, a dashed line at 0; with `log`, a logarithmic vertical axis."""

    title: str
    curves: Mapping[str, Curve]
    x: str = "step"
    zero: bool = False
    log: bool = False


def block_means(values: Sequence[Sequence[float]] | np.ndarray, most: int = 50) -> Curve:
    """The curve of a noisy quantity of every step, `values [R, S]`: means of at most `most` blocks of steps.

    A block stands at the mean of its steps, which count from 1. Raises ValueError for no step.
    """
    each = np.asarray(values, float)
    if each.ndim != 2 or each.shape[1] == 0:
        raise ValueError(f"values has shape {each.shape}; wanted [R, S] with S >= 1")
    blocks = np.array_split(np.arange(each.shape[1]), min(most, each.shape[1]))
    means = np.stack([each[:, block].mean(axis=1) for block in blocks], axis=1)
    return Curve(np.array([block.mean() + 1 for block in blocks]), means)


def curves_figure(panels: Sequence[CurvePanel], columns: int = 2) -> bytes:
    """Small multiples of curves, each the mean over runs; shaded from the lowest run to the highest.

    The band is the range, not an interval: it shows where the runs were, and with three of them an interval for their
    mean would be several times as wide. What is trained looks alike in all panels. Raises ValueError for no panel, more
    curves than there are styles (6), values that are not [R, C], or an x that does not increase.
    """
    if not panels:
        raise ValueError("panels is empty; wanted at least one quantity")
    styles = line_styles(name for panel in panels for name in panel.curves)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    spaced = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
    figure = Figure(figsize=(4.0 * columns + 0.6, 2.9 * rows), dpi=DPI, facecolor="white", layout=spaced)
    banded = False
    for k, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if k >= len(panels):
            axes.set_visible(False)
            continue
        panel = panels[k]
        for name, curve in panel.curves.items():
            x, values = _checked(curve, f"{panel.title}, {name}")
            if len(values) > 1:
                banded = True
                axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=styles[name]["color"], alpha=0.15,
                                  linewidth=0, zorder=1)  # fmt: skip
            axes.plot(x, values.mean(axis=0), **styles[name], markevery=max(1, len(x) // 12), zorder=3)
        if panel.zero:
            axes.axhline(0, **_DASHED, zorder=2)
        if panel.log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, *range(2, 10))))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        frame(axes, panel.title)
        axes.set_xlabel(panel.x, fontsize=8.5, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter())
    handles: list[Any] = [Line2D([], [], **style) for style in styles.values()]
    if banded:
        handles.append(Patch(facecolor=MUTED, alpha=0.25, label="from the lowest seed to the highest"))
    legend_above(figure, handles)
    return png_bytes(figure)


def _checked(curve: Curve, where: str) -> tuple[np.ndarray, np.ndarray]:
    x, values = np.asarray(curve.x, float), np.asarray(curve.values, float)
    if values.ndim != 2 or values.shape[1] != len(x) or not values.size:
        raise ValueError(f"{where}: values has shape {values.shape}; wanted [R, {len(x)}], a run in each row")
    if np.any(np.diff(x) <= 0):
        raise ValueError(f"{where}: x is {x.tolist()}; wanted it to increase")
    return x, values


@dataclasses.dataclass(frozen=True)
class DifferencePanel:
    """Differences in one unit, by what is compared with; each as `nmjax.metrics.seeds.paired_over_seeds` gives it."""

    title: str
    rows: Mapping[str, Mapping[str, Any]]


def differences_figure(panels: Sequence[DifferencePanel], x: str, digits: int = 3) -> bytes:
    """One line a comparison: the mean over seeds with its interval, and every seed as a small ring.

    Panels stand one below the other and have axes of their own, as their differences can be of other magnitudes; 0 is
    in all of them. A comparison without a mean is left blank. Raises ValueError for no panel or a panel without rows.
    """
    if not panels or not all(panel.rows for panel in panels):
        raise ValueError(f"panels are {[panel.title for panel in panels]}; wanted one or more, each with rows")
    counts = [len(panel.rows) for panel in panels]
    size = (8.2, 0.32 * sum(counts) + 0.62 * len(panels) + 0.3)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine(h_pad=0.06))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[count + 0.4 for count in counts])[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        for k, found in enumerate(panel.rows.values()):
            seeds = [value for value in found["by_seed"] if value is not None]
            if found["interval"] is not None:
                axes.hlines(k, *found["interval"], color=POINT, linewidth=1.6, zorder=2)
            if found["mean"] is not None:
                axes.plot(found["mean"], k, "o", color=POINT, markersize=6, zorder=3)
            axes.plot(seeds, [k] * len(seeds), "o", color=INK, markerfacecolor="none", markersize=4,
                      markeredgewidth=0.9, linewidth=0, zorder=4)  # fmt: skip
            shown = with_interval(found["mean"], found["interval"], digits, sign=True)
            axes.text(1.02, k, shown, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=INK)
        axes.axvline(0, **_DASHED, zorder=1)
        frame(axes, panel.title)
        axes.grid(axis="y", visible=False)
        axes.set_yticks(range(len(panel.rows)), list(panel.rows))
        axes.set_ylim(len(panel.rows) - 0.4, -0.6)
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    grid[-1].set_xlabel(x, fontsize=8.5, color=INK)
    ring: dict[str, Any] = {"color": INK, "markerfacecolor": "none", "markersize": 4, "linewidth": 0}
    handles = [
        Line2D([], [], color=POINT, marker="o", markersize=6, linewidth=1.6, label="mean over seeds, 95% interval"),
        Line2D([], [], marker="o", **ring, label="a seed"),
        Line2D([], [], **_DASHED, label="no difference"),
    ]
    legend_above(figure, handles)
    return png_bytes(figure)


def costs_figure(panels: Mapping[str, Mapping[str, float]]) -> bytes:
    """Bars from 0, one panel a kind of cost: its amount by what was trained, printed at the bar (G = 10^9, T = 10^12).

    Raises ValueError for no panel, or panels about different things.
    """
    if not panels:
        raise ValueError("panels is empty; wanted at least one kind of cost")
    names = list(next(iter(panels.values())))
    for title, amounts in panels.items():
        if list(amounts) != names:
            raise ValueError(f"{title}: costs of {list(amounts)}; wanted them of {names}, as in the first panel")
    size = (2.5 * len(panels) + 1.6, 0.36 * len(names) + 0.6)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.08))
    shown = EngFormatter(places=2)
    for axes, (title, amounts) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items(), strict=True
    ):
        values = [amounts[name] for name in names]
        axes.barh(range(len(names)), values, height=0.6, color=POINT, linewidth=0)
        for k, value in enumerate(values):
            axes.text(value, k, f" {shown(value)}", va="center", fontsize=8, color=INK)
        frame(axes, title)
        axes.grid(axis="y", visible=False)
        axes.set_yticks(range(len(names)), names)
        axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, 1.45 * max(values) or 1))  # room for the amounts
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
        axes.xaxis.set_major_formatter(EngFormatter())
    return png_bytes(figure)
