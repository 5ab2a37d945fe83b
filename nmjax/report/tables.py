"""Tables that a terminal, a text file and a page show alike, and the numbers in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


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
    value: float, interval: Sequence[float] | None, digits: int = 3, sign: bool = False, brackets: str = "[]"
) -> str:
    """`0.614 [0.583, 0.644]`; the value alone where there is no interval."""
    text = number(value, digits, sign)
    if interval is None:
        return text
    low, high = (number(end, digits, sign) for end in interval)
    return f"{text} {brackets[0]}{low}, {high}{brackets[1]}"
