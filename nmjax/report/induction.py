"""Induction heads as tables, a heat map and a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from nmjax.induction import InductionHeads
from nmjax.report import page
from nmjax.report.plots import BASELINE, DPI, GRID, INK, png_bytes
from nmjax.report.tables import Table, number, with_interval

MOST_ROWS = 12
NAMES = {"induction": "induction", "previous": "previous token", "duplicate": "previous occurrence"}
"""Scores and how they are printed."""


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Copy accuracy [R] of every row of random tokens, unmodified, without the selected heads, and without as many
    random other heads (draws [P, R]); `draws` is empty where all heads are selected.

    `intervals` are 95% bootstrap intervals: `unmodified`, `selected` and `selected_loss` over rows, `random` and
    `random_loss` over draws (missing for fewer than 2).
    """

    unmodified: np.ndarray
    selected: np.ndarray
    draws: np.ndarray
    intervals: Mapping[str, tuple[float, float]]

    def losses(self) -> dict[str, float]:
        """What is lost with the heads, as shares of exact predictions."""
        before = self.unmodified.mean()
        found = {"selected": float(before - self.selected.mean())}
        return found | ({"random": float(before - self.draws.mean())} if len(self.draws) else {})

    def table(self) -> Table:
        """Copy accuracy of the three conditions, and what is lost against the unmodified model."""
        losses = self.losses()
        rows = [["unmodified", with_interval(self.unmodified.mean(), self.intervals["unmodified"]), "-", "-"]]
        rows.append(
            [
                "without the selected heads",
                with_interval(self.selected.mean(), self.intervals["selected"]),
                with_interval(losses["selected"], self.intervals["selected_loss"]),
                "-",
            ]
        )
        if len(self.draws):
            means = self.draws.mean(axis=1)
            rows.append(
                [
                    f"without as many others, {len(self.draws)} draws",
                    with_interval(means.mean(), self.intervals.get("random")),
                    with_interval(losses["random"], self.intervals.get("random_loss")),
                    f"{number(means.min())} to {number(means.max())}",
                ]
            )
        caption = "Exact predictions in the second copy [95% bootstrap interval over rows, of other heads over draws]"
        return Table(["heads", "copy accuracy", "lost", "range over draws"], rows, caption)


def heads_table(found: InductionHeads) -> Table:
    """The best heads by induction score, selected ones marked."""
    order = np.argsort(-found.induction, axis=None, kind="stable")[: max(MOST_ROWS, int(found.mask.sum()))]
    rows = []
    for place in order:
        layer, head = np.unravel_index(place, found.induction.shape)
        scores = (number(getattr(found, name)[layer, head]) for name in NAMES)
        rows.append([f"{layer}.{head}", *scores, "yes" if found.mask[layer, head] else "no"])
    return Table(["layer.head", *NAMES.values(), "selected"], rows, "Mean attention from the second copy of the block")


def heat_map(found: InductionHeads) -> bytes:
    """The three scores by layer and head on one scale; selected heads are framed."""
    L, N = found.induction.shape
    cell = min(0.5, max(0.12, 4 / max(L, N)))
    width, height = 3 * (cell * N + 0.55) + 1.0, max(cell * L, 1.4) + 1.35
    figure = Figure(figsize=(max(width, 7.0), height), dpi=DPI, facecolor="white", layout=ConstrainedLayoutEngine())
    grid = figure.subplots(1, 3, sharey=True)
    for axes, (name, title) in zip(grid, NAMES.items(), strict=True):
        values = getattr(found, name)
        image = axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        if max(L, N) <= 12:
            for layer, head in np.ndindex(L, N):
                shade = "white" if values[layer, head] > 0.6 else INK
                axes.text(head, layer, f"{values[layer, head]:.2f}", ha="center", va="center", fontsize=7, color=shade)
        for layer, head in np.argwhere(found.mask):
            frame = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=BASELINE, linewidth=1.6, zorder=3)
            axes.add_patch(frame)
            frame.set_clip_on(False)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("head", fontsize=8.5, color=INK)
        axes.tick_params(labelsize=8, length=0, labelcolor=INK)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        for spine in axes.spines.values():
            spine.set_color(GRID)
    grid[0].set_ylabel("layer", fontsize=8.5, color=INK)
    bar = figure.colorbar(image, ax=grid, shrink=0.9, pad=0.015)
    bar.ax.tick_params(labelsize=8, length=0, labelcolor=INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return png_bytes(figure)


@dataclasses.dataclass(frozen=True)
class InductionPage:
    """What a reader is told about the heads of one model, as text and as a page."""

    model: str
    found: InductionHeads
    ablation: Ablation | None  # None where no head is selected

    def headline(self) -> str:
        """One paragraph on what was selected and why."""
        found = self.found
        heads = ", ".join(f"{layer}.{head}" for layer, head in found.heads)
        count = f"{int(found.mask.sum())} of {found.mask.size}"
        if found.method == "prompt":
            why = "the best fifth of every layer by the published probe, which has no threshold"
        elif found.fallback:
            why = "no head passes, so these are the two middle heads of every layer"
        else:
            why = f"score above {max(found.threshold or 0, found.null or 0):.3f}"
        on = (
            "one prompt"
            if found.method == "prompt"
            else f"{found.samples} rows of {found.block} random tokens, repeated"
        )
        return (
            f"{self.model} on {on}: {count} heads selected ({why}){': ' + heads if heads else ''}. "
            f"Copy accuracy {number(found.copy_accuracy)}."
        )

    def text(self) -> str:
        """Headline and tables."""
        tables = [heads_table(self.found)] + ([self.ablation.table()] if self.ablation else [])
        return "\n\n".join([self.headline(), *(table.text() for table in tables)]) + "\n"

    def html(self, identity: Mapping[str, Any], picture: bytes) -> str:
        """The page; the heat map is PNG."""
        found = self.found
        cards = [
            ("Heads selected", f"{int(found.mask.sum())} of {found.mask.size}",
             "the fallback: none passed" if found.fallback else f"by method {found.method!r}"),
            ("Best induction score", number(float(found.induction.max())),
             "no null" if found.null is None else f"99.9% of the null below {number(found.null)}"),
            ("Copy accuracy", number(found.copy_accuracy), f"block of {found.block} tokens, {found.samples} rows"),
        ]  # fmt: skip
        if self.ablation:
            losses = self.ablation.losses()
            remark = f"{number(losses['random'])} with as many others" if "random" in losses else "all heads"
            cards.append(("Lost without them", number(losses["selected"]), remark))
        blocks: list[page.Block] = [
            page.Cards(cards),
            page.Paragraph(self.headline()),
            page.Heading("Scores"),
            page.Picture(
                picture,
                "Mean attention from the tokens of the second copy to the token after the previous occurrence of the "
                "same token (induction), to the token before, and to the previous occurrence itself. Framed: selected.",
                "Heat maps of three scores by layer and head",
            ),
            heads_table(found),
        ]
        if self.ablation:
            blocks += [page.Heading("Do they do the copying?"), self.ablation.table()]
        blocks += page.closing(_READING, identity)
        subtitle = f"{self.model}. {page.made_at(identity)}"
        return page.render_page("Induction heads", subtitle, blocks)


_READING = (
    "Every row is a block of random tokens followed by itself, so the second copy can be predicted from the first and "
    "from nothing else. A head is selected if its induction score is above the threshold and above the null: the 99.9% "
    "quantile, over heads and permutations, of the scores that the same attention gives when every query is paired "
    "with another query's target.",
    "Attention alone does not show that a head matters. The ablation silences the selected heads and counts exact "
    "predictions again; silencing as many random other heads is the comparison. All conditions see the same rows. Some "
    "of the other heads may matter as much: induction is built on heads that attend to the previous token, so look at "
    "the range over draws, too.",
    "Copy accuracy leaves out the first token of the second copy, which follows the block's last token for the first "
    "time.",
)
