"""What an experiment says about the claims it was made to test."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

MARKS = {"supported": "\u2713", "contradicted": "\u2717", "undecided": "?"}
"""The verdicts there are, and the sign that goes with each."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim, what the numbers say about it ("supported", "contradicted" or "undecided"), and which numbers.

    Raises ValueError for another verdict.
    """

    claim: str
    verdict: str
    because: str

    def __post_init__(self):
        if self.verdict not in MARKS:
            raise ValueError(f"verdict is {self.verdict!r} for {self.claim!r}; wanted one of {list(MARKS)}")


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Verdicts in the order they are told."""

    items: Sequence[Verdict]

    def text(self, width: int = 110) -> str:
        """One paragraph a claim: the verdict in a column of its own, the claim beside it, the reason below."""
        indent = " " * (max(map(len, MARKS)) + 2)
        lines = []
        for item in self.items:
            claim = textwrap.fill(item.claim, width, initial_indent=indent, subsequent_indent=indent)
            lines.append(item.verdict + claim[len(item.verdict) :])
            if item.because:
                lines.append(textwrap.fill(item.because, width, initial_indent=indent, subsequent_indent=indent))
        return "\n".join(lines)
