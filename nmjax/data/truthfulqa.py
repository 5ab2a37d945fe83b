"""TruthfulQA (Lin et al. 2022) as judgements: of each question the best answer, and a wrong one that people believe."""

from __future__ import annotations

import csv
import pathlib
import random
from collections.abc import Iterable, Iterator, Mapping

from nmjax.data.judgements import Judgement, judge, text_of
from nmjax.data.question_sources import load_splits, only_split

HUB = "truthfulqa/truthful_qa"
CONFIG = "generation"

# Columns of the question, the best answer, the wrong answers and, where there is one, the best of those.
_FILE_COLUMNS = ("Question", "Best Answer", "Incorrect Answers", "Best Incorrect Answer")
_HUB_COLUMNS = ("question", "best_answer", "incorrect_answers", "best_incorrect_answer")


def from_hub(asked: str, seed: int) -> Iterator[Judgement]:
    """The judgements of the data set on the hub; errors begin with what was `asked`."""
    rows = only_split(asked, load_splits(asked, HUB, CONFIG))
    placed = ((row, f"{asked}, row {row + 1}", columns) for row, columns in enumerate(rows))
    return _judgements(placed, _HUB_COLUMNS, seed)


def from_file(path: pathlib.Path, seed: int) -> Iterator[Judgement]:
    """The judgements of a CSV file. Raises ValueError for a row with more or fewer cells than the header."""
    return _judgements(file_rows(path), _FILE_COLUMNS, seed)


def file_rows(path: pathlib.Path) -> list[tuple[int, str, Mapping]]:
    """(row from 0, place, columns) of every row of a CSV file. Raises ValueError as `from_file`."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        rows = list(table)
    placed: list[tuple[int, str, Mapping]] = []
    for row, columns in enumerate(rows):
        where = f"{path}, row {row + 2}"  # the header is row 1
        if None in columns or None in columns.values():
            raise ValueError(f"{where} has more or fewer cells than the header; wanted {len(table.fieldnames or ())}")
        placed.append((row, where, columns))
    return placed


def _judgements(rows: Iterable[tuple[int, str, Mapping]], names: tuple[str, ...], seed: int) -> Iterator[Judgement]:
    """The judgements of rows, given as (row from 0, place, columns)."""
    question, best, incorrect, best_incorrect = names
    for row, where, columns in rows:
        fields = {"question": text_of(where, columns, question)}
        right = text_of(where, columns, best)
        if best_incorrect in columns:
            wrong = text_of(where, columns, best_incorrect)
        else:
            wrong = random.Random(f"truthfulqa {seed} {row}").choice(texts_of(where, columns, incorrect))
        for label, answer in enumerate((right, wrong)):
            yield judge("truthfulqa", row, label, fields, answer)


def texts_of(where: str, columns: Mapping, column: str) -> list[str]:
    """The answers of a column: a list on the hub, in the file one text with semicolons between them."""
    cell = columns.get(column)
    parts = cell if isinstance(cell, list) else text_of(where, columns, column).split(";")
    texts = [part.strip() for part in parts if part.strip()]
    if not texts:
        raise ValueError(f"{where}: {column} is {cell!r}; wanted one answer or more")
    return texts
