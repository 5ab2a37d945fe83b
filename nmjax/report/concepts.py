"""Concept vectors as text and as a page: how alike they are, and what they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from nmjax.report import page
from nmjax.report.tables import Table, number
from nmjax.steering.concepts import ConceptVectors, without_shared

SHOWN = 10  # pairs of concepts


@dataclasses.dataclass(frozen=True)
class ConceptPage:
    """What a reader is told about the concept vectors of one model; those given are as found."""

    model: str
    found: ConceptVectors

    def figures(self) -> Table:
        """The numbers that say what the vectors have in common."""
        found = self.found
        rows = [
            ["mean cosine of two concepts", number(found.cosine)],
            ["the same without the shared direction", number(found.cosine_without_shared)],
            ["norm of the mean direction", number(found.shared_norm)],
            ["that norm for concepts at right angles", number(1 / np.sqrt(len(found.words)))],
        ]
        caption = f"{len(found.words)} concepts, read after block {found.layer}"
        return Table(["what they share", "value"], rows, caption)

    def alike(self) -> Table:
        """The pairs with the highest cosines, as found, and what they are without the shared direction."""
        words, vectors = self.found.words, self.found.vectors
        alone = without_shared(vectors)
        first, second = np.triu_indices(len(words), 1)
        cosines = np.sum(vectors[first] * vectors[second], axis=1)
        rows = [
            [f"{words[first[k]]}, {words[second[k]]}", number(cosines[k]), number(alone[first[k]] @ alone[second[k]])]
            for k in np.argsort(-cosines, kind="stable")[:SHOWN]
        ]
        return Table(["concepts", "cosine", "without the shared direction"], rows, "The most alike")

    def text(self) -> str:
        """Both tables."""
        return f"{self.figures().text()}\n\n{self.alike().text()}\n"

    def html(self, identity: Mapping[str, Any]) -> str:
        """The page."""
        blocks: list[page.Block] = [
            self.figures(),
            page.Heading("Which are alike"),
            self.alike(),
            *page.closing(
                [
                    "A concept's direction is the difference, inside the model, of texts about it and of texts about "
                    "things in general. All concepts are set against the same texts, so a part of each direction says "
                    "no more than that the text is about something particular: that is the shared direction.",
                    "A mean cosine near 0 means that concepts differ from each other as much as they differ from "
                    "things in general; near 1, that one direction stands for all of them. A detector that reacts to "
                    "the shared direction alone looks as if it knew every concept.",
                ],
                identity,
            ),
        ]
        return page.render_page("Concept vectors", f"{self.model}, {page.made_at(identity)}", blocks)
