"""Tables that a terminal, a text file and a page show alike, and the numbers in them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells are text already; the first column names the row and is left-aligned, the others are right-aligned."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self):
        for k, row in enumerate(self.rows):
            if len(row) != len(self.headers):
                raise ValueError(f"table row {k} has {len(row)} cells; wanted one for each of {list(self.headers)}")

    def text(self) -> str:
        """Aligned columns, the caption above; lines end without blanks."""
        widths = [max(len(str(line[c])) for line in [self.headers, *self.rows]) for c in range(len(self.headers))]

        def line(cells: Sequence[str]) -> str:
            first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
            return "  ".join([first.strip().ljust(widths[0]), *rest]).rstrip()

        body = [line(self.headers), "  ".join("-" * w for w in widths), *map(line, self.rows)]
        return "\n".join(([self.caption] if self.caption else []) + body)


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number with fixed decimals, "-" for None; with `sign`, a plus or minus in front."""
    if value is None:
        return "-"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    zero = float(text) == 0
    return text.replace("-", "").replace("+", "") if zero else text


def with_interval(
    value: float | None, interval: Sequence[float] | None, digits: int = 3, sign: bool = False, brackets: str = "[]"
) -> str:
    """`0.614 [0.583, 0.644]`; the value alone where there is no interval."""
    text = number(value, digits, sign)
    if interval is None:
        return text
    low, high = (number(end, digits, sign) for end in interval)
    return f"{text} {brackets[0]}{low}, {high}{brackets[1]}"


def estimate(found: Mapping[str, Any] | None, digits: int = 3, sign: bool = False) -> str:
    """`with_interval` of what has a "value" and an "interval"; "-" for None."""
    return "-" if found is None else with_interval(found["value"], found["interval"], digits, sign)


def p_text(p_value: float | None) -> str:
    """`0.034`, or `<0.001` where more decimals would say nothing; "-" for None."""
    return "<0.001" if p_value is not None and p_value < 0.001 else number(p_value)


def sort_key(cell: str) -> float | str:
    """What a cell sorts by: its leading number, else its text; "" where there is nothing ("-"), which comes last.

    `0.61 [0.58, 0.64]*` is 0.61 and `+0.02` is 0.02; `<0.001` is just below 0.001 and `>0.1` just above 0.1. `50%`
    and `2x` are numbers, a name that begins with digits (`4bit`, `2024-01-31`) is text.
    """
    cell = cell.strip()
    if found := _NUMBER.match(cell):
        value = float(found["number"].replace(",", "").replace("\u2212", "-"))
        return math.nextafter(value, {"<": -math.inf, ">": math.inf}[found["side"]]) if found["side"] else value
    return "" if cell == "-" else cell


_NUMBER = re.compile(
    r"(?P<side>[<>]?)\s*(?P<number>[-+\u2212]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?(e[-+]?\d+)?)[x%\u00d7]?(?![\w.-])",
    re.ASCII,
)
