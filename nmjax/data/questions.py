"""Four-choice questions: the record, MMLU's prompt format, and where questions come from.

Sources: the bundled world, a file (.jsonl or .csv), or a folder of CSV files, one a subject, as MMLU is distributed.
A source that cannot be read is an error; nothing else is ever used in its place.
"""

from __future__ import annotations

import csv
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

LETTERS = ("A", "B", "C", "D")
_OPTION_COLUMNS = (tuple(f"choice{k}" for k in range(4)), LETTERS)  # two customs for naming the options' columns


@dataclass(frozen=True)
class Question:
    """A question with four options; `answer` is the index of the right one, `id` is unique within its source."""

    text: str
    options: tuple[str, ...]
    answer: int
    subject: str
    id: str

    def __post_init__(self):
        if len(self.options) != len(LETTERS):
            raise ValueError(f"question {self.id!r} has {len(self.options)} options; wanted {len(LETTERS)}")
        if self.answer not in range(len(LETTERS)):
            raise ValueError(f"question {self.id!r} has answer={self.answer!r}; wanted 0 to {len(LETTERS) - 1}")


def format_mmlu(question: Question) -> str:
    """The question, four lines "A. ..." to "D. ...", an empty line, "Answer:"; the answer is " A" to " D"."""
    options = [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=True)]
    return "\n".join([question.text, *options, "", "Answer:"])


def load_questions(
    source: str | os.PathLike, max_questions: int | None, seed: int, subjects: Sequence[str] | None = None
) -> list[Question]:
    """Questions of `source`, sampled by subject; the same list for the same arguments.

    Args:
      source: "bundled" (held-out questions of the bundled world), a .jsonl or .csv file, or a folder of .csv files (if
        it has a folder `test`, that one). Columns: question, choice0 to choice3 (or A to D, or in JSONL a list
        `choices`), answer (0 to 3 or A to D), and, if there, subject and id. MMLU's original files without a header
        line are read, too. A file's subject is its name less `_test`, `_dev` or `_val`.
      max_questions: at most so many, equally many from every subject as far as it has them; None takes all.
      seed: decides which questions, and their order. A larger `max_questions` keeps the ones a smaller one had, where
        the source is a file or a folder.
      subjects: only these; None takes all.

    Raises:
      ValueError: an unknown source, a file with other columns, a bad row (file and row are named), an unknown or empty
        subject, no question at all.
    """
    if max_questions is not None and max_questions < 1:
        raise ValueError(f"max_questions is {max_questions}; wanted at least 1, or None for all")
    if os.fspath(source) == "bundled":
        return _bundled(max_questions, seed, subjects)
    path = pathlib.Path(source)
    if path.is_dir():
        questions = _read_folder(path)
    elif path.is_file() and path.suffix in (".jsonl", ".csv"):
        questions = _read_file(path)
    else:
        raise ValueError(f"questions={os.fspath(source)!r}; wanted 'bundled', a .jsonl or .csv file, a folder of .csv")
    return sample_by_subject(_only(questions, subjects, os.fspath(source)), max_questions, seed)


def sample_by_subject(questions: Iterable[Question], count: int | None, seed: int) -> list[Question]:
    """`count` of the questions (all if None or too few), as equally many from every subject as there are.

    Every subject's questions are shuffled, then taken in turn, one a subject, in a shuffled order of the subjects. So a
    shorter list is the beginning of a longer one, and any beginning is balanced to one question a subject.
    """
    by_subject: dict[str, list[Question]] = {}
    for question in questions:
        by_subject.setdefault(question.subject, []).append(question)
    rng = np.random.default_rng(seed)
    shuffled = [[group[i] for i in rng.permutation(len(group))] for _, group in sorted(by_subject.items())]
    in_turn = [shuffled[k] for k in rng.permutation(len(shuffled))]
    rounds = max(map(len, in_turn), default=0)
    chosen = [column[turn] for turn in range(rounds) for column in in_turn if turn < len(column)]
    return chosen if count is None else chosen[:count]


def _bundled(count: int | None, seed: int, subjects: Sequence[str] | None) -> list[Question]:
    from nmjax.data.world import held_out_questions  # the world is made of Questions, so it imports this module

    if count is None:
        raise ValueError("max_questions is None; the bundled world has no end of questions, wanted a number")
    pool = 8 * count  # five subjects, about equally frequent: enough for `count` of a single one
    while True:
        questions = _only(held_out_questions(pool, seed), subjects, "bundled")
        chosen = sample_by_subject(questions, count, seed)
        if len(chosen) == count:
            return chosen
        pool *= 2


def _only(questions: list[Question], subjects: Sequence[str] | None, source: str) -> list[Question]:
    if not questions:
        raise ValueError(f"questions={source!r} holds no questions")
    if subjects is None:
        return questions
    known = {q.subject for q in questions}
    if unknown := [s for s in subjects if s not in known]:
        raise ValueError(f"subjects={unknown} have no question in {source!r}; there are {sorted(known)}")
    return [q for q in questions if q.subject in set(subjects)]


# --- Files ------------------------------------------------------------------------------------------------------------


def _read_folder(folder: pathlib.Path) -> list[Question]:
    inner = folder / "test" if (folder / "test").is_dir() else folder
    files = sorted(inner.glob("*.csv"))
    if not files:
        raise ValueError(f"questions={str(folder)!r} holds no .csv file, nor does a folder 'test' in it")
    return [question for file in files for question in _read_file(file)]


def _read_file(path: pathlib.Path) -> list[Question]:
    subject = re.sub(r"_(test|dev|val)$", "", path.stem)
    rows = jsonl_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
    questions = [_question(where, row, subject, f"{path.stem}:{number}") for number, where, row in rows]
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"{path}: the id {question.id!r} occurs twice")
        seen.add(question.id)
    return questions


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, str, dict]]:
    """(row number, place, columns) of each row; the header, if there is one, is row 1."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))
    if not rows:
        raise ValueError(f"{path} is empty")
    header, start = rows[0], 1
    if "question" not in header and len(header) == 6 and header[5] in LETTERS:  # MMLU's original files have no header
        header, start = ["question", *LETTERS, "answer"], 0
    for wanted in ("question", "answer"):
        if wanted not in header:
            raise ValueError(f"{path} has no column {wanted!r}; it has {header}")
    if not any(set(names) <= set(header) for names in _OPTION_COLUMNS):
        raise ValueError(f"{path} has no columns choice0 to choice3 (or A to D); it has {header}")
    for number, row in enumerate(rows[start:], start=start + 1):
        if row:  # csv gives an empty list for an empty line
            where = f"{path}, row {number}"
            if len(row) != len(header):
                raise ValueError(f"{where} has {len(row)} cells; wanted {len(header)}: {header}")
            yield number, where, dict(zip(header, row, strict=True))


def jsonl_rows(path: pathlib.Path) -> Iterator[tuple[int, str, dict]]:
    """(line number, place, object) of each line that is not empty; the place names file and line, for errors.

    Raises ValueError for a line that is not a JSON object.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            where = f"{path}, row {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} is a {type(row).__name__}; wanted an object")
            yield number, where, row


def _question(where: str, row: dict, subject: str, default_id: str) -> Question:
    text = row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: question is {text!r}; wanted text")
    options = row.get("choices")
    if options is None:
        names = next((names for names in _OPTION_COLUMNS if set(names) <= row.keys()), None)
        if names is None:
            raise ValueError(f"{where}: no options; wanted 'choices' (a list), choice0 to choice3 or A to D")
        options = [row[name] for name in names]
    if not isinstance(options, list) or len(options) != 4 or not all(isinstance(o, str) and o.strip() for o in options):
        raise ValueError(f"{where}: the options are {options!r}; wanted four texts, none of them empty")
    return Question(
        text=text,
        options=tuple(options),
        answer=_answer(where, row.get("answer")),
        subject=str(row.get("subject") or subject),
        id=str(row.get("id") or default_id),
    )


def _answer(where: str, value: object) -> int:
    if isinstance(value, str) and (cell := value.strip()) in (*LETTERS, "0", "1", "2", "3"):
        return LETTERS.index(cell) if cell in LETTERS else int(cell)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 3:
        return value
    raise ValueError(f"{where}: answer is {value!r}; wanted 0 to 3 or A to D")
