"""Training data as in the second version of the published study, byte for byte where its lists are given.

Kept for comparison. It is drawn from a few hundred different conversations, all of which occur in both files, and so do
nearly all perturbations: see `nmjax.data.introspection_split` for data that can show more than memory.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

from nmjax.data.introspection import WORDINGS, Lists
from nmjax.data.introspection_records import MAGNITUDES, layer_ranges

VARIANTS = tuple(name for name in WORDINGS if not name.startswith("localization"))
Row = dict[str, Any]


def generate(
    variant: str,
    lists: Lists,
    n: int = 10_000,
    seed: int = 42,
    layers: int = 64,
    vectors: int = 100,
    magnitudes: Sequence[float] = MAGNITUDES,
) -> dict[str, list[Row]]:
    """The rows of "train" and "val", the first tenth, in the published format.

    Args:
      variant: one of `VARIANTS`. Half of the rows are steered, those of food_control about food; flipped_labels says
        the opposite of what was done in half of the rows of each file.
      layers: blocks of the model, which decide on the ranges.
      vectors: they are numbered from 0 to `vectors` - 1.
    Raises:
      ValueError: an unknown variant, `n` below 10, no vector, or no magnitude.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}; v2 has {list(VARIANTS)}")
    if n < 10 or vectors < 1 or not magnitudes:
        raise ValueError(f"n is {n}, vectors is {vectors}, magnitudes is {magnitudes}; wanted at least 10, 1 and one")
    rng = random.Random(seed)
    questions = lists.questions[WORDINGS[variant]]
    food = variant == "food_control"
    ranges = list(layer_ranges(layers).items())
    rows = []
    for k in range(n):
        positive = k < n // 2
        contexts, replies = lists.contexts, lists.replies
        perturbation: tuple = (None, (None, (None, None)), None)
        if food and positive:
            contexts, replies = lists.food.contexts, lists.food.replies
        elif food:
            contexts, replies = lists.food.other_contexts, lists.food.other_replies
        elif positive:
            # The order of the draws is part of the format, here and below.
            third = ranges[rng.randint(0, 2)]
            perturbation = rng.randint(0, vectors - 1), third, rng.choice(magnitudes)
        vector, (name, (start, end)), magnitude = perturbation
        rows.append(
            {
                "steered": positive,
                "vector_idx": vector,
                "layer_start": start,
                "layer_end": end,
                "layer_name": name,
                "magnitude": magnitude,
                "context_prompt": rng.choice(contexts),
                "assistant_response": rng.choice(replies),
                "detection_question": rng.choice(questions),
            }
        )
    rng.shuffle(rows)
    files = {"train": rows[n // 10 :], "val": rows[: n // 10]}
    return {name: _flipped(part, seed) for name, part in files.items()} if variant == "flipped_labels" else files


def _flipped(rows: Sequence[Row], seed: int) -> list[Row]:
    opposite = set(random.Random(seed).sample(range(len(rows)), len(rows) // 2))
    return [row | {"label": row["steered"] != (k in opposite)} for k, row in enumerate(rows)]


def to_jsonl(rows: Iterable[Row]) -> str:
    """A line of JSON for each row, in the published bytes."""
    return "".join(json.dumps(row) + "\n" for row in rows)
