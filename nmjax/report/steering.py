"""Steering vectors as tables, a figure and a page: what held-out pairs say about each type, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nmjax.report import page
from nmjax.report.plots import BASELINE, DPI, GRID, INK, MUTED, POINT, frame, png_bytes
from nmjax.report.tables import Table, number, with_interval
from nmjax.steering.validation import ALPHA, LEAST_EXPLAINED, SteeringReport


def summary_table(reports: Mapping[str, SteeringReport]) -> Table:
    """One row a type, with the figures of its chosen layer, or of the best layer where none is accepted."""
    rows = []
    for name, report in reports.items():
        layer = report.chosen_layer
        best = int(report.separation.argmax()) if layer is None else layer
        ends = (report.cosine_low[best], report.cosine_high[best])
        rows.append(
            [
                name,
                f"{report.train}+{report.held_out}",
                f"{int(report.accepted.sum())} of {len(report.accepted)}",
                "none" if layer is None else str(layer),
                number(report.separation[best], 2),
                number(report.q[best], 4),
                number(report.explained[best], 2),
                with_interval(report.cosine[best], ends, 2),
            ]
        )
    headers = ["type", "pairs", "accepted layers", "chosen", "d_z", "q", "explained", "cosine of halves"]
    caption = "Steering vectors on held-out pairs; figures of the chosen layer, or of the best where none is accepted"
    return Table(headers, rows, caption)


def separation_figure(reports: Mapping[str, SteeringReport], columns: int = 4) -> bytes:
    """One small panel a type: held-out d_z by layer, accepted layers filled, the chosen one ringed."""
    if not reports:
        raise ValueError("reports is empty; wanted at least one type")
    rows = -(-len(reports) // columns)
    columns = -(-len(reports) // rows)  # 5 panels are 3 + 2, not 4 + 1
    width, height = max(2.5 * columns + 0.5, 3.6), 1.85 * rows + 0.65
    spaced = ConstrainedLayoutEngine(h_pad=0.07, w_pad=0.06)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=spaced)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for k, axes in enumerate(grid.flat):
        if k >= len(reports):
            axes.set_visible(False)
            continue
        name, report = list(reports.items())[k]
        layers = np.arange(len(report.separation))
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.plot(layers, report.separation, color=POINT, linewidth=1.1, zorder=2)
        for chosen, face in ((report.accepted, POINT), (~report.accepted, "white")):
            axes.plot(layers[chosen], report.separation[chosen], "o", color=POINT, markerfacecolor=face, markersize=5,
                      zorder=3)  # fmt: skip
        if report.chosen_layer is not None:
            axes.plot(report.chosen_layer, report.separation[report.chosen_layer], "o", markersize=10,
                      color=BASELINE, fillstyle="none", markeredgewidth=1.3, zorder=4)  # fmt: skip
        frame(axes, name)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.margins(x=0.12, y=0.18)
        # Panels without one below them carry the axis; `sharex` would leave them bare.
        axes.tick_params(labelbottom=k + columns >= len(reports))
        if k + columns >= len(reports):
            axes.set_xlabel("layer", fontsize=8.5, color=INK)
        if k % columns == 0:
            axes.set_ylabel("d_z, held out", fontsize=8.5, color=INK)
    style: dict[str, Any] = {"color": POINT, "marker": "o", "markersize": 5, "linewidth": 0}
    handles = [
        Line2D([], [], **style, label="accepted layer"),
        Line2D([], [], **style, markerfacecolor="white", label="not accepted"),
        Line2D([], [], color=BASELINE, marker="o", markersize=9, fillstyle="none", linewidth=0, label="chosen"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
    return png_bytes(figure)


def cosine_figure(names: Sequence[str], cosines: np.ndarray, layer: str) -> bytes:
    """Cosines between the types' directions [R, R] in one layer: types that are not distinct stand out."""
    size = 0.42 * len(names) + 2.2
    figure = Figure(figsize=(size + 0.6, size), dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine())
    axes = figure.subplots()
    image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    for i, row in enumerate(cosines):
        for j, value in enumerate(row):
            shade = "white" if abs(value) > 0.6 else INK
            axes.text(j, i, number(value, 1), ha="center", va="center", fontsize=7, color=shade)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=8, length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    axes.set_title(f"cosine between directions, {layer}", fontsize=10, color=INK, loc="left")
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.ax.tick_params(labelsize=8, labelcolor=INK, length=0)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return png_bytes(figure)


@dataclasses.dataclass(frozen=True)
class SteeringPage:
    """What a reader is told about the vectors of one model, as text and as a page."""

    model: str
    reports: Mapping[str, SteeringReport]

    def text(self) -> str:
        """The summary and every type's table."""
        parts = [summary_table(self.reports)]
        parts += [report.table(f"{name}: {report.method}") for name, report in self.reports.items()]
        return "\n\n".join(table.text() for table in parts) + "\n"

    def html(self, identity: Mapping[str, Any], separation: bytes, cosines: bytes | None) -> str:
        """The page; figures are PNG."""
        accepted = sum(report.chosen_layer is not None for report in self.reports.values())
        first = next(iter(self.reports.values()))
        blocks: list[page.Block] = [
            page.Cards(
                [
                    ("Types", str(len(self.reports)), f"{accepted} with an accepted layer"),
                    ("Method", first.method.replace("_", " "), "of positive less negative texts"),
                    ("Pairs", f"{first.train} + {first.held_out}", f"training + held out, {next(iter(self.reports))}"),
                ]
            ),
            summary_table(self.reports),
            page.Heading("Separation by layer"),
            page.Picture(
                separation,
                "Standardised separation d_z of held-out pairs along the direction. A filled point is an accepted "
                "layer, the ring is the chosen one.",
                f"d_z by layer of {', '.join(self.reports)}",
            ),
        ]
        if cosines is not None:
            blocks += [
                page.Heading("Are the types distinct?"),
                page.Picture(
                    cosines,
                    "Two types whose directions have a cosine near 1 steer alike, whatever they are called.",
                    "Cosines between the directions of all types",
                ),
            ]
        blocks.append(page.Heading("Layers"))
        blocks += [report.table(name) for name, report in self.reports.items()]
        blocks += page.closing(_READING, identity)
        subtitle = f"{self.model}: {', '.join(self.reports)}. {page.made_at(identity)}"
        return page.render_page("Steering vectors", subtitle, blocks)


_READING = (
    "A direction is made from the training pairs alone, and everything but the column 'in training' and the cosine of "
    "halves is measured on pairs that took no part in it. d_z is the mean of the held-out projections of positive less "
    "negative over their standard deviation: 0.8 is usually called large.",
    f"A layer is accepted if q < {ALPHA} and more than {LEAST_EXPLAINED:.0%} of the held-out pairs' squared difference "
    "lies along the direction. p is from a one-sided sign-flip permutation test (positive projects higher), q is p "
    "after Benjamini and Hochberg's correction over layers.",
    "The cosine of halves compares directions made from two random halves of the training pairs, with 95% of the "
    "halvings in brackets: near 1 the direction hardly depends on which pairs were drawn, near 0 it is those pairs.",
    "A direction that separates texts need not steer: that is measured by steering with it, against a placebo of the "
    "same length. Early layers often separate best because the texts differ in their words.",
)
