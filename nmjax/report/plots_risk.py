"""Risk against coverage, as PNG bytes: how many errors are left when only the more confident answers are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nmjax.report.plots import DPI, INK, MUTED, frame, legend_above, line_styles, png_bytes


def risk_coverage_figure(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    bands: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    baseline: str | None = None,
) -> bytes:
    """Error rate among the answers kept (risk, 0 to 1) against the share kept (coverage, 0 to 1), one line a condition.

    `curves` holds (coverage [K], risk [K]) by condition, coverage increasing to 1; `bands` the ends (low [K], high [K])
    of an interval around the risk of some of them. The dashed line is the risk of `baseline` (the first condition if
    None) with all answers kept. Raises ValueError for no curve, more than there are styles (6), unequal lengths, other
    coverages, and a band or baseline without a curve.
    """
    if not curves:
        raise ValueError("curves is empty; wanted at least one condition")
    bands = bands or {}
    baseline = next(iter(curves)) if baseline is None else baseline
    if unknown := {baseline, *bands} - set(curves):
        raise ValueError(f"no curve for {sorted(unknown)}; there are {list(curves)}")
    figure = Figure(figsize=(6.6, 3.7), dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine())
    axes = figure.subplots()
    styles = line_styles(curves)
    for name, (coverage, risk) in curves.items():
        x = np.asarray(coverage, float)
        low, high = bands.get(name, (None, None))
        for what, given in (("risk", risk), ("low", low), ("high", high)):
            if given is not None and len(given) != len(x):
                raise ValueError(f"{name}: {what} has {len(given)} entries for {len(x)} coverages")
        if not (len(x) and np.isclose(x[-1], 1) and np.all(np.diff(x) > 0)):
            raise ValueError(f"{name}: coverage is {x}; wanted it to increase from each entry to the next, up to 1")
        if low is not None and high is not None:
            axes.fill_between(x, np.asarray(low, float), np.asarray(high, float), color=styles[name]["color"],
                              alpha=0.15, linewidth=0, zorder=1)  # fmt: skip
        axes.plot(x, risk, **styles[name], markevery=0.1, zorder=3)
    everything = float(curves[baseline][1][-1])
    dashed: dict[str, Any] = {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (4, 3))}
    axes.axhline(everything, **dashed, zorder=2)
    axes.set(xlim=(0, 1.02), ylim=(0, None))
    frame(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.set_xlabel("share of answers kept, the most confident first", fontsize=9, color=INK)
    axes.set_ylabel("error rate among them", fontsize=9, color=INK)
    handles = [Line2D([], [], **style) for style in styles.values()]
    legend_above(figure, [*handles, Line2D([], [], **dashed, label=f"{baseline}, all answers kept")])
    return png_bytes(figure)
