"""HaluEval (Li et al. 2023) as judgements, and the split by which a monitor of semantic uncertainty was once measured.

Rows of qa, dialogue and summarization have a right answer and a hallucinated one, written by ChatGPT; rows of general
have one answer and people's verdict on it.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from nmjax.data.judgements import FORMS, Judgement, judge, text_of
from nmjax.data.question_sources import jsonl_rows, load_splits, only_split

HUB = "pminervini/HaluEval"
TASKS = ("qa", "dialogue", "summarization", "general")

_TWINS = {  # columns of the right and of the hallucinated answer
    "qa": ("right_answer", "hallucinated_answer"),
    "dialogue": ("right_response", "hallucinated_response"),
    "summarization": ("right_summary", "hallucinated_summary"),
}

Reader = Callable[[], Iterator[Judgement]]


def from_hub(asked: str, hub: str) -> dict[str, Reader]:
    """By task, what reads the config of that name; errors begin with what was `asked`."""

    def read(task: str) -> Iterator[Judgement]:
        place = f"{asked}, config {task!r}"
        rows = only_split(place, load_splits(asked, hub, task))
        return _judgements(task, ((row, f"{place}, row {row + 1}", columns) for row, columns in enumerate(rows)))

    return {task: partial(read, task) for task in TASKS}


def from_files(path: pathlib.Path) -> dict[str, Reader]:
    """By task, what reads its file: `path` itself, or the one in the folder `path`.

    Raises ValueError if there is none, or two of one task.
    """
    found: dict[str, pathlib.Path] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        task = next((task for task in TASKS if file.name.startswith(f"{task}_data")), None)
        if task and file.suffix in (".json", ".jsonl"):
            if task in found:
                raise ValueError(f"{found[task]} and {file} both hold {task}; wanted one file a task")
            found[task] = file
    if not found:
        names = ", ".join(f"{task}_data" for task in TASKS)
        what = "it holds no file that begins" if path.is_dir() else "wanted a name that begins"
        raise ValueError(f"dataset='{path}': {what} with one of {names} and ends in .json or .jsonl")

    def read(task: str) -> Iterator[Judgement]:
        return _judgements(task, ((line - 1, where, columns) for line, where, columns in jsonl_rows(found[task])))

    return {task: partial(read, task) for task in TASKS if task in found}


def _judgements(task: str, rows: Iterable[tuple[int, str, Mapping]]) -> Iterator[Judgement]:
    """The judgements of rows, given as (row from 0, place, columns)."""
    for row, where, columns in rows:
        fields = {column: text_of(where, columns, column) for column in FORMS[task].shown}
        for label, answer in _answers(task, where, columns):
            yield judge(task, row, label, fields, answer)


def _answers(task: str, where: str, columns: Mapping) -> list[tuple[int, str]]:
    """(label, text) of each answer in a row."""
    if task in _TWINS:
        return [(label, text_of(where, columns, column)) for label, column in enumerate(_TWINS[task])]
    answer, verdict = text_of(where, columns, "chatgpt_response"), text_of(where, columns, "hallucination")
    if verdict not in ("no", "yes"):
        raise ValueError(f"{where}: hallucination is {verdict!r}; wanted 'yes' or 'no'")
    return [(("no", "yes").index(verdict), answer)]


# --- The published split ----------------------------------------------------------------------------------------------

PUBLISHED_SEED = 42
PUBLISHED_ROWS = 10_000  # in each file
PUBLISHED_SOURCES = 10_000 // 3 // 2  # rows drawn from each


class Published(NamedTuple):
    """An example of the published split. `id` counts the rows in the order they were drawn, `row` those of the file."""

    id: str
    task: str
    row: int
    label: int


def published_examples(part: str, n: int | None = None) -> list[Published]:
    """The examples of the study's part "train" or "test", 4,998 each, in its order; or the `n` it took from a part.

    It calibrated on 200 or 1,000 of train and validated on 500 of test (flowstyleliving/anthropic-ai-safety). It drew
    examples, not rows, so half of those in test have their twin in train: use them to compare with its numbers only.
    No file is needed to draw them; they rest on how CPython's `random` samples and shuffles.

    Raises ValueError for another part, or `n` that is not 1 to 4,998.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part is {part!r}; wanted 'train' or 'test'")
    rng = random.Random(PUBLISHED_SEED)
    examples = [
        Published(f"{task}_{rank}_{('cor', 'hal')[label]}", task, row, label)
        for task in _TWINS
        for rank, row in enumerate(rng.sample(range(PUBLISHED_ROWS), PUBLISHED_SOURCES))
        for label in (0, 1)
    ]
    rng.shuffle(examples)
    random.Random(PUBLISHED_SEED).shuffle(examples)
    half = len(examples) // 2
    chosen = examples[:half] if part == "train" else examples[half:]
    if n is None:
        return chosen
    if not 1 <= n <= half:
        raise ValueError(f"n is {n}; wanted 1 to {half}, or None for all")
    return random.Random(PUBLISHED_SEED).sample(chosen, n)


def published_split(
    judgements: Sequence[Judgement], part: str, n: int | None = None, allow_missing: bool = False
) -> tuple[list[Judgement], dict[str, int]]:
    """The judgements that `published_examples(part, n)` names, under its ids, and by task how many are missing.

    Args:
      judgements: of HaluEval's files, or of their beginnings: rows are told by their place in the file.
      allow_missing: a part that lacks rows is another sample, so its numbers are not comparable with the published
        ones; it is an error unless this is set.

    Raises ValueError for missing judgements that are not allowed, if all of them are missing, or as
    `published_examples`.
    """
    have = {(j.task, j.row, j.label): j for j in judgements}
    wanted = published_examples(part, n)
    found = [dataclasses.replace(have[e[1:]], id=e.id) for e in wanted if e[1:] in have]
    missing = dict(Counter(e.task for e in wanted if e[1:] not in have))
    if not found or (missing and not allow_missing):
        aim = "wanted one at least" if allow_missing else "wanted all, or allow_missing to go on without them"
        absent = f"{sum(missing.values())} of the {len(wanted)} published examples have no judgement here"
        raise ValueError(f"{absent} (by task {missing}); {aim}")
    return found, missing
