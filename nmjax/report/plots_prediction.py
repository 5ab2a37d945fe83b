"""Predicted against actual values, as PNG bytes: a scatter, its means in bins, and how many are in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nmjax.report.plots import BASELINE, DPI, INK, MUTED, POINT, frame, legend_above, png_bytes

_DASHED: dict[str, Any] = {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (4, 3))}


@dataclasses.dataclass(frozen=True)
class PredictionPanel:
    """One model: `predicted [N]` and `actual [N]` of some tokens, and the means in bins of all of them.

    `bins`: {"predicted", "actual", "counts"}, each [bins], as `nmjax.metrics.loss_prediction.quality` gives them under
    "reliability"; None where a bin is empty.
    """

    title: str
    predicted: Sequence[float] | np.ndarray
    actual: Sequence[float] | np.ndarray
    bins: Mapping[str, Sequence[Any]]


def prediction_figure(panels: Sequence[PredictionPanel], x: str, y: str, columns: int = 3) -> bytes:
    """Tokens as faint dots, bins as a line of larger points, y = x dashed; below, the tokens in each bin.

    All panels have the same axes. Raises ValueError for no panel, or unequal numbers of predicted and actual values.
    """
    if not panels:
        raise ValueError("panels is empty; wanted at least one model")
    for panel in panels:
        if len(panel.predicted) != len(panel.actual):
            raise ValueError(
                f"{panel.title}: {len(panel.predicted)} predicted and {len(panel.actual)} actual values; wanted as many"
            )
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    everything = np.concatenate([[*panel.predicted, *panel.actual] for panel in panels] + [_ends(panels)])
    low, high = everything.min(), everything.max()
    ends = (low - 0.03 * (high - low), high + 0.03 * (high - low)) if high > low else (low - 1, high + 1)
    most = max(int(max(panel.bins["counts"])) for panel in panels)
    size = (3.1 * columns + 0.6, 4.3 * rows)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.08))
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3.2, 1.0] * rows)
    for k in range(rows * columns):
        upper, lower = grid[2 * (k // columns) :, k % columns][:2]
        if k >= len(panels):
            upper.set_visible(False)
            lower.set_visible(False)
            continue
        panel = panels[k]
        upper.plot(ends, ends, **_DASHED, zorder=2)
        upper.plot(panel.predicted, panel.actual, ".", color=POINT, alpha=0.22, markersize=3.5, markeredgewidth=0,
                   zorder=1)  # fmt: skip
        filled = [b for b, count in enumerate(panel.bins["counts"]) if count]
        predicted, actual, counts = (
            [panel.bins[name][b] for b in filled] for name in ("predicted", "actual", "counts")
        )
        upper.plot(predicted, actual, "o-", color=BASELINE, markersize=5, linewidth=1.4, zorder=3)
        lower.vlines(predicted, 0, counts, color=BASELINE, linewidth=2)
        upper.set(xlim=ends, ylim=ends)
        lower.set(xlim=ends, ylim=(0, 1.15 * most))
        frame(upper, panel.title)
        frame(lower)
        for axis in (upper.xaxis, upper.yaxis, lower.xaxis):
            axis.set_major_locator(MaxNLocator(nbins=6))
        upper.tick_params(labelbottom=False)
        lower.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
        lower.set_xlabel(x, fontsize=8.5, color=INK)
        if k % columns == 0:
            upper.set_ylabel(y, fontsize=8.5, color=INK)
            lower.set_ylabel("tokens", fontsize=8.5, color=INK)
    handles = [
        Line2D([], [], color=POINT, marker=".", alpha=0.6, linewidth=0, label="a token"),
        Line2D([], [], color=BASELINE, marker="o", markersize=5, linewidth=1.4, label="mean of a bin"),
        Line2D([], [], **_DASHED, label="predicted = actual"),
    ]
    legend_above(figure, handles)
    return png_bytes(figure)


def _ends(panels: Sequence[PredictionPanel]) -> list[float]:
    """The bins' means, which are seen even where there is no token to draw."""
    return [v for panel in panels for name in ("predicted", "actual") for v in panel.bins[name] if v is not None]
