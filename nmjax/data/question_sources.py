"""Reading four-choice questions: files, folders of CSV files, and data sets as the hub stores them.

What is named is read or is an error; nothing else is ever used in its place.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nmjax.data.questions import LETTERS, Question

_OPTION_COLUMNS = (tuple(f"choice{k}" for k in range(4)), LETTERS)  # two customs for naming the options' columns
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]*[\w-]")


def read_source(source: str | os.PathLike) -> tuple[list[Question], list[Question]]:
    """The questions of a source, and those it sets apart as examples: see `questions.read_pool`.

    Raises ValueError for a source that is not there or can't be read, or a bad row.
    """
    text = os.fspath(source)
    path = pathlib.Path(source).expanduser()
    if path.is_file() and path.suffix in (".jsonl", ".csv"):
        return _read_file(path), []
    if path.is_dir() and _csv_files(path)[0]:
        questions, examples = ([q for file in files for q in _read_file(file)] for files in _csv_files(path))
        return questions, examples
    name, config = text, ""
    if not path.exists():
        name, _, config = text.partition(":")
        path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return _read_data_set(text, path, config)
    if HUB_ID.fullmatch(name) and path.suffix not in (".jsonl", ".csv") and not path.exists():
        return _read_data_set(text, name, config)
    raise ValueError(
        f"questions={text!r}; wanted 'bundled', a .jsonl or .csv file, a folder of .csv files or of a data set, or a "
        "data set of the hub, owner/name or owner/name:config"
    )


# --- Files ------------------------------------------------------------------------------------------------------------


def _csv_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Files of questions and of examples, by folder (test, dev) or by name (law_test.csv); others hold questions."""

    def split(name: str) -> list[pathlib.Path]:
        if (folder / name).is_dir():
            return sorted((folder / name).glob("*.csv"))
        return sorted(file for file in folder.glob("*.csv") if re.search(rf"(^|_){name}$", file.stem))

    questions, dev, val = split("test"), split("dev"), split("val")
    if not questions and not (folder / "test").is_dir():
        questions = sorted(set(folder.glob("*.csv")) - {*dev, *val})
    return questions, dev or val


def _read_file(path: pathlib.Path) -> list[Question]:
    subject = re.sub(r"_(test|dev|val)$", "", path.stem)
    rows = jsonl_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
    return _unique(str(path), (_question(where, row, subject, f"{path.stem}:{n}") for n, where, row in rows))


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, str, dict]]:
    """(row number, place, columns) of each row; the header, if there is one, is row 1."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))
    if not rows:
        raise ValueError(f"{path} is empty")
    header, start = rows[0], 1
    if "question" not in header and len(header) == 6 and header[5] in LETTERS:  # MMLU's original files have no header
        header, start = ["question", *LETTERS, "answer"], 0
    _check_columns(str(path), header, ("question", "answer"))
    for number, row in enumerate(rows[start:], start=start + 1):
        if row:  # csv gives an empty list for an empty line
            where = f"{path}, row {number}"
            if len(row) != len(header):
                raise ValueError(f"{where} has {len(row)} cells; wanted {len(header)}: {header}")
            yield number, where, dict(zip(header, row, strict=True))


def jsonl_rows(path: pathlib.Path) -> Iterator[tuple[int, str, dict]]:
    """(line number, place, object) of each line that is not empty; the first line is 1."""
    # Not `splitlines`: JSON may hold U+2028 and its like, which are no ends of lines there.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            where = f"{path}, row {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} is a {type(row).__name__}; wanted an object")
            yield number, where, row


# --- Data sets --------------------------------------------------------------------------------------------------------


def _read_data_set(source: str, name: str | pathlib.Path, config: str) -> tuple[list[Question], list[Question]]:
    """Split test, and of dev, validation and val the first that is there."""
    splits = load_splits(f"questions={source!r}", name, config)
    if "test" not in splits:
        raise ValueError(f"questions={source!r} has no split 'test'; it has {sorted(splits)}")

    def read(split: str) -> list[Question]:
        rows, place = splits[split], f"questions={source!r}, split {split!r}"
        _check_columns(place, rows.column_names, ("question", "answer", "subject"))
        numbered = enumerate(rows, start=1)
        return _unique(place, (_question(f"{place}, row {n}", row, "", f"{split}:{n}") for n, row in numbered))

    dev = [split for split in ("dev", "validation", "val") if split in splits]
    return read("test"), read(dev[0]) if dev else []


def load_splits(asked: str, name: str | pathlib.Path, config: str, *, streaming: bool = False) -> Any:
    """The splits, by name, of a data set in a folder or on the hub; without `config`, of `all` or else the default.

    With `streaming`, rows are fetched as they are iterated over, so that may fail, too: see `data_set_errors`.

    Raises ValueError, which begins with what was `asked`, if there is no such data set or config to be had.
    """
    import datasets  # slow to import

    path = name
    if isinstance(name, pathlib.Path):
        # Some folders come without the card that names their configs: then each config is a folder in it.
        if (name / (config or "all")).is_dir() and not (name / "README.md").exists():
            name, config = name / (config or "all"), ""
        path = str(name.resolve())  # a bare "json" would be a reader of the library
    load = functools.partial(datasets.load_dataset, streaming=True) if streaming else datasets.load_dataset
    with data_set_errors(asked, name, config):
        if config:
            return load(path, config)
        try:
            return load(path, "all")
        except ValueError as error:
            if "BuilderConfig 'all' not found" not in str(error):  # a cache without `all` doesn't show there is none
                raise
        return load(path)


@contextlib.contextmanager
def data_set_errors(asked: str, name: str | pathlib.Path, config: str) -> Iterator[None]:
    """Around what reads the data set `name`: what `datasets` raises becomes a ValueError of one line after `asked`."""
    import datasets.exceptions

    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if isinstance(error, ConnectionError):
            reason = "the hub can't be reached, and its cache does not have it"
        elif configs := re.search(r"vailable.*?(\[.*\])", reason):
            reason = f"it has the configs {configs[1]}" + ("" if config else f", named as '{name}:config'")
        what = f"config {config!r} of a data set" if config else "a data set"
        place = "in this folder" if isinstance(name, pathlib.Path) else "on the hub, as there is no such folder here"
        raise ValueError(f"{asked}: wanted {what} {place}, but {reason}") from error


def only_split(place: str, splits: Mapping[str, Any]) -> Any:
    """The one split of a data set, whatever its name. Raises ValueError, with the `place`, if it has several."""
    if len(splits) != 1:
        raise ValueError(f"{place} has the splits {sorted(splits)}; wanted a single one")
    (rows,) = splits.values()
    return rows


# --- Rows -------------------------------------------------------------------------------------------------------------


def _check_columns(place: str, columns: list[str], wanted: tuple[str, ...]) -> None:
    for column in wanted:
        if column not in columns:
            raise ValueError(f"{place} has no column {column!r}; it has {columns}")
    if not any(set(names) <= set(columns) for names in (("choices",), *_OPTION_COLUMNS)):
        raise ValueError(f"{place} has no columns choice0 to choice3, nor A to D, nor 'choices'; it has {columns}")


def _unique(place: str, questions: Iterable[Question]) -> list[Question]:
    found: dict[str, Question] = {}
    for question in questions:
        if question.id in found:
            raise ValueError(f"{place}: the id {question.id!r} occurs twice")
        found[question.id] = question
    return list(found.values())


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
    subject = str(row.get("subject") or subject)
    if not subject:
        raise ValueError(f"{where}: subject is {row.get('subject')!r}; wanted text")
    return Question(
        text=text,
        options=tuple(options),
        answer=_answer(where, row.get("answer")),
        subject=subject,
        id=str(row.get("id") or default_id),
    )


def _answer(where: str, value: object) -> int:
    if isinstance(value, str) and (cell := value.strip()) in (*LETTERS, "0", "1", "2", "3"):
        return LETTERS.index(cell) if cell in LETTERS else int(cell)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 3:
        return value
    raise ValueError(f"{where}: answer is {value!r}; wanted 0 to 3 or A to D")
