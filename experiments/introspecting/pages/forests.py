"""Changes from the base by category, as figures and a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nmjax.report.page import Block, Picture
from nmjax.report.plots_detection import ForestRow, forest_figure
from nmjax.report.tables import Table, estimate

_MOST = 6  # adapters that a figure can tell apart
_LEVEL = 0.05


def changes_by_category(
    changes: Mapping[str, Mapping[str, Mapping[str, Any]]], categories: Mapping[str, int], quantity: str
) -> list[Block]:
    """Of the `changes` by adapter and category (`by_category.changes`) of a quantity; `categories` with their sizes."""
    titles = {name: f"{name.replace('_', ' ')} ({n})" for name, n in categories.items()}
    blocks: list[Block] = []
    adapters = list(changes)
    for names in (adapters[start : start + _MOST] for start in range(0, len(adapters), _MOST)):
        rows = {
            title: {name: ForestRow(changes[name][category]["value"], changes[name][category]["interval"])
                    for name in names}
            for category, title in titles.items()
        }  # fmt: skip
        blocks.append(
            Picture(
                forest_figure(rows, f"change of {quantity} from the base", 0.0, "no change"),
                f"Change of {quantity} from the base by category, with the number of questions.",
                f"Change of {quantity} by category for {', '.join(names)}; the numbers are in the table below.",
            )
        )
    table = Table(
        ["category", *changes],
        [[title, *(_cell(own[category]) for own in changes.values())] for category, title in titles.items()],
        f"Change of {quantity} from the base. *: sign flips of the questions' changes, adjusted for all cells of the "
        f"table (Benjamini-Hochberg), p < {_LEVEL:g}. The p of n questions cannot be below 2 / 2^n, so few "
        "categories can have a star. An interval without width says that nothing changed on these questions, no more.",
    )
    return [*blocks, table]


def _cell(row: Mapping[str, Any]) -> str:
    adjusted = row["p_adjusted"]
    star = "*" if adjusted is not None and adjusted < _LEVEL else ""
    return estimate(row, sign=True) + star
