"""Open prompts of kinds that the model's own training text hardly holds: creative tasks, riddles, ethical dilemmas.

The bundled ones were written for this package. Their answers are not scored as right or wrong; they show how a model's
texts change in diversity, repetition and refusals (`nmjax.metrics.texts`).
"""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass

from nmjax.data.questions import jsonl_rows

PROMPTS = pathlib.Path(__file__).with_name("ood_prompts.jsonl")
CATEGORIES = ("creative", "riddle", "ethics")


@dataclass(frozen=True)
class OodPrompt:
    """A prompt; `id` is unique within its file, `category` one of `CATEGORIES`."""

    id: str
    category: str
    prompt: str


def load_prompts(path: str | os.PathLike | None = None, per_category: int | None = None) -> list[OodPrompt]:
    """The prompts of a JSONL file in its order, one `{"id", "category", "prompt"}` a line.

    Args:
      path: None = the bundled file. Other keys of a line are ignored, empty lines skipped.
      per_category: the first so many of each category, as far as it has them; None = all.

    Raises:
      ValueError: a line that is not such an object, an empty text, an unknown category or an id seen before (file and
        line are named), or a file without prompts.
      FileNotFoundError: no such file.
    """
    if per_category is not None and per_category < 1:
        raise ValueError(f"per_category is {per_category}; wanted at least 1, or None for all")
    source = PROMPTS if path is None else pathlib.Path(path)
    found: dict[str, OodPrompt] = {}
    for _, where, row in jsonl_rows(source):
        for key in ("id", "category", "prompt"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise ValueError(f"{where}: {key} is {row.get(key)!r}; wanted text")
        prompt = OodPrompt(row["id"], row["category"], row["prompt"])
        if prompt.category not in CATEGORIES:
            raise ValueError(f"{where}: category is {prompt.category!r}; wanted one of {list(CATEGORIES)}")
        if prompt.id in found:
            raise ValueError(f"{where}: the id {prompt.id!r} occurs twice")
        found[prompt.id] = prompt
    if not found:
        raise ValueError(f"{source} holds no prompt")
    groups = {name: [prompt for prompt in found.values() if prompt.category == name] for name in CATEGORIES}
    kept = {prompt.id for group in groups.values() for prompt in group[:per_category]}
    return [prompt for prompt in found.values() if prompt.id in kept]
