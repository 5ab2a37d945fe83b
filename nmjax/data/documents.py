"""Documents to train language models on: of the bundled world, in local files, or in data sets as the hub stores them.

What is named is read or is an error; nothing else is ever used in its place.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from nmjax.data.bpe import END_OF_TEXT
from nmjax.data.corpus import draw_document
from nmjax.data.question_sources import HUB_ID, data_set_errors, jsonl_rows, load_splits
from nmjax.data.world import bundled_world

DOCUMENTS = 6_000  # of sources that have no end, or more than anybody wants to wait for
PASSAGE = 1_000  # characters of a document, at least, that is cut out of a longer text
PUBLISHED = {  # names that studies gave to data sets of the hub
    "openwebmath": "open-web-math/open-web-math",
    "tinystories": "roneneldan/TinyStories",
    "wikitext": "Salesforce/wikitext:wikitext-103-raw-v1",
}
_SUFFIXES = (".txt", ".raw", ".jsonl")
# The line of an article's title in WikiText; those of sections have more signs.
_TITLE = re.compile(r"\s*= (?!= ).*(?<! =) =\s*")


def read_documents(
    dataset: str | os.PathLike,
    documents: int | None = None,
    *,
    split: str = "train",
    column: str = "text",
    seed: int = 0,
) -> list[str]:
    """The texts of a source, without white space around them and without empty ones, in its order.

    Args:
        dataset: one of
            * "bundled": documents about the bundled world, drawn as for the bundled model's training.
            * a .txt or .raw file, whose documents are what `<|endoftext|>` separates, if it is in there; the articles,
              if it begins with the title of one in WikiText's style (` = Title = `; a formula alone on its line may
              pass for one); else passages: paragraphs (lines, if no line is blank), as many as make up `PASSAGE`
              characters.
            * a .jsonl file: one document a row.
            * a folder of such files. With several in it, a file that would be cut into passages is one document.
            * a data set as the hub stores them: a folder, or owner/name, or owner/name:config, or a name of
              `PUBLISHED`. Without a config: `all` where there is one of that name, else the default. Rows are streamed,
              and no more than are needed. Rows that are lines of WikiText are put together to articles.
        documents: at most so many, the first ones. None is all of local files, and `DOCUMENTS` of anything else.
        split: of a data set.
        column: of a data set or a .jsonl file.
        seed: decides on the documents of the bundled world; others have no use for it.

    Raises:
        ValueError: `documents` below 1; a source that isn't there or can't be read, lacks a config, split or column,
            has a row without text (its place is named), or holds no text at all.
    """
    if documents is not None and documents < 1:
        raise ValueError(f"documents must be 1 or more, or None for the default, got {documents}")
    asked = os.fspath(dataset)
    limit: int | None = documents or DOCUMENTS
    if asked == "bundled":
        found = _of_the_world(seed)
    elif files := _text_files(pathlib.Path(asked).expanduser()):
        found, limit = _of_files(files, column), documents
    else:
        found = _of_data_set(asked, split, column)
    stripped = (text.strip() for text in found)
    texts = list(itertools.islice((text for text in stripped if text), limit))
    if not texts:
        raise ValueError(f"dataset={asked!r} holds no text")
    return texts


def split_documents(documents: Sequence[str], share: float = 0.1, seed: int = 0) -> tuple[list[str], list[str]]:
    """(training, held-out) documents, both in the given order; no text is on both sides.

    `share` of the distinct texts, drawn at random, are held out, with all their copies.

    Raises:
        ValueError: if `share` is not between 0 and 1, or leaves one side empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    distinct = list(dict.fromkeys(documents))
    count = round(share * len(distinct))
    if not 0 < count < len(distinct):
        counted = f"{count} of the {len(distinct)} distinct documents"
        raise ValueError(f"share={share} holds out {counted}; wanted one or more on each side")
    chosen = np.random.default_rng(seed).permutation(len(distinct))[:count]
    held_out = {distinct[i] for i in chosen}
    return [text for text in documents if text not in held_out], [text for text in documents if text in held_out]


# --- Sources ----------------------------------------------------------------------------------------------------------


def _of_the_world(seed: int) -> Iterator[str]:
    world, rng = bundled_world(), random.Random(f"documents {seed}")
    while True:
        yield "".join(text for text, _ in draw_document(world, rng))


def _text_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The file itself, or those in the folder, as far as they are of a kind that is read as text."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in files if file.suffix in _SUFFIXES and file.is_file()]


def _of_files(files: Sequence[pathlib.Path], column: str) -> Iterator[str]:
    for file in files:
        try:
            if file.suffix == ".jsonl":
                yield from _articles(_column(column, ((where, row) for _, where, row in jsonl_rows(file))))
            else:
                yield from _cut(file.read_text(encoding="utf-8-sig"), alone=len(files) == 1)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not text in UTF-8: {error}") from error


def _of_data_set(asked: str, split: str, column: str) -> Iterator[str]:
    name, config = _located(asked)
    place = f"dataset={asked!r}"
    splits = load_splits(place, name, config, streaming=True)
    if split not in splits:
        raise ValueError(f"{place} has no split {split!r}; it has {sorted(splits)}")

    def rows() -> Iterator[tuple[str, Mapping]]:
        with data_set_errors(place, name, config):
            for number, row in enumerate(splits[split], start=1):
                yield f"{place}, split {split!r}, row {number}", row

    return _articles(_column(column, rows()))


def _located(asked: str) -> tuple[str | pathlib.Path, str]:
    """(name, config) of a data set; the name is a path if it is a folder."""
    name, _, config = (asked, "", "") if pathlib.Path(asked).expanduser().exists() else asked.partition(":")
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path, config
    hub, _, default = PUBLISHED.get(name, name).partition(":")
    if HUB_ID.fullmatch(hub) and path.suffix not in _SUFFIXES and not path.exists():
        return hub, config or default
    raise ValueError(
        f"dataset={asked!r}; wanted 'bundled', a .txt, .raw or .jsonl file, a folder of such files or of a data set, a "
        f"data set of the hub, owner/name or owner/name:config, or one of {sorted(PUBLISHED)}"
    )


def _column(column: str, rows: Iterable[tuple[str, Mapping]]) -> Iterator[str]:
    """The texts of a column; rows are given as (place, columns)."""
    for where, row in rows:
        if column not in row:
            raise ValueError(f"{where} has no column {column!r}; it has {list(row)}")
        if not isinstance(row[column], str):
            raise ValueError(f"{where}: {column} is {row[column]!r}; wanted text")
        yield row[column]


# --- From texts to documents ------------------------------------------------------------------------------------------


def _cut(text: str, alone: bool) -> Iterable[str]:
    """The documents in the text of a file, which may be the only one (`alone`)."""
    if END_OF_TEXT in text:
        return text.split(END_OF_TEXT)
    if _TITLE.fullmatch(text.lstrip().partition("\n")[0]):
        return _articles(text.split("\n"))
    return _passages(text) if alone else [text]


def _articles(rows: Iterable[str]) -> Iterator[str]:
    """The rows that are not blank; if the first is a title of WikiText, articles made of them, each from its title on.

    Blank lines are left out: some copies of WikiText have them, some don't.
    """
    filled = (row for row in rows if row.strip())
    first = next(filled, "")
    if not _TITLE.fullmatch(first):
        yield from itertools.chain([first], filled)
        return
    article = [first.strip("\n")]
    for row in filled:
        if _TITLE.fullmatch(row):
            yield "\n".join(article)
            article = []
        article.append(row.strip("\n"))
    yield "\n".join(article)


def _passages(text: str) -> list[str]:
    """Paragraphs put together until they have `PASSAGE` characters; what is left at the end joins the last passage."""
    paragraphs = re.findall(r"(?s).+?(?:\n\s*\n|\Z)", text)
    if len(paragraphs) == 1:
        paragraphs = [line + "\n" for line in text.split("\n")]
    passages = [""]
    for paragraph in paragraphs:
        if len(passages[-1]) >= PASSAGE:
            passages.append("")
        passages[-1] += paragraph
    if len(passages) > 1 and len(passages[-1]) < PASSAGE:
        rest = passages.pop()
        passages[-1] += rest
    return passages
