"""Predicting oneself: questions, and for each one a question about a property of the answer one would give to it.

A model is asked at the object level ("which five animals come next?") and hypothetically ("what would be the first word
of your answer?"), in two conversations that know nothing of each other. The hypothetical answer is right where it names
the property that the object-level answer has (Binder et al. 2024, "Looking Inward", whose task files this reads).

An answer that can't be read is no answer: `property_of` and `stated_property` are None for it, never False.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nmjax.data.judgements import text_of
from nmjax.data.question_sources import jsonl_rows
from nmjax.data.questions import format_mmlu
from nmjax.data.words import POOLS
from nmjax.data.world import held_out_questions, judgement_prompt
from nmjax.metrics.texts import words

BUNDLED = "bundled"
BUNDLED_ITEMS = 40  # a task
ETHICAL_STANCE = "ethical_stance"
_NUMBERS = {"first": 0, "second": 1, "third": 2}
_LETTERS = {"among_a_or_c": "ac", "among_b_or_d": "bd"}
BINARY = ("starts_with_vowel", *_LETTERS, ETHICAL_STANCE)
"""Properties that an answer has or has not; the others have texts as values."""
PROPERTIES = (*(f"{n}_{unit}" for unit in ("character", "word") for n in _NUMBERS), *BINARY)

_TRUE, _FALSE = {"true", "yes"}, {"false", "no"}
_QUOTED = re.compile(
    r"""["\u201c\u201d]([^"\u201c\u201d]+)["\u201c\u201d]|\*\*(.+?)\*\*|`([^`]+)`|(?<!\w)'([^']+)'(?!\w)"""
)
_VERDICT = re.compile(r"\b(?:is|be|was|answer)[\s:*]+\W*(\S+)\W*$", re.IGNORECASE)
# A letter on its own, not the article or a word: "A", "(a)", "B) yes", "C - no", "D. maybe", "A One year".
_OPTION = re.compile(r"\W*(?:([A-D])(?=\s*$|\s*[^\w\s']|'(?!\w)|\s*\n|\s+[A-Z\d])|([a-d])(?=\W*$|\s?[.):\]*]))")
_NAMED_OPTION = re.compile(r"\b(?i:answer|option|choice)(?:\s+is)?[\s:*(]+([A-D])\b(?!')")

Chat = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Item:
    """A question and the question about the answer to it.

    Attributes:
      id: the task and the number of the row, from 1.
      task: the name of its file.
      question: what both prompts are about; items of equal questions are not independent.
      object_level, hypothetical: chats that end with the user.
      property: of `PROPERTIES`.
      matching: with `ETHICAL_STANCE`, the letter of the option that has the property; else None.
    """

    id: str
    task: str
    question: str
    object_level: Chat
    hypothetical: Chat
    property: str
    matching: str | None = None


Tasks = Mapping[str, tuple[Item, ...]]


def read_tasks(source: str | os.PathLike = BUNDLED) -> Tasks:
    """The items of each task, by its name: "bundled", or a folder of task files, <task>.jsonl.

    A row of a file has original_question, object_level_prompt and hypothetical_prompt (lists of {role, content}),
    behavioral_property, one for the whole file, and, where that is "ethical_stance" (or ends in it),
    option_matching_ethical_stance. Folders are sorted by name.

    Raises ValueError for a source that is neither, a folder without task files, an empty file, or a bad row; file, row
    and field are named.
    """
    if os.fspath(source) == BUNDLED:
        return bundled_tasks()
    folder = pathlib.Path(source).expanduser()
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not files:
        raise ValueError(f"tasks={os.fspath(source)!r}; wanted {BUNDLED!r} or a folder with files <task>.jsonl")
    return {path.stem: _read_file(path) for path in files}


def sample_tasks(tasks: Tasks, n_per_task: int, seed: int = 0) -> list[Item]:
    """At most `n_per_task` items of each task, in order; those of a task depend on it, its size and the seed alone."""
    if n_per_task < 1:
        raise ValueError(f"n_per_task is {n_per_task}; wanted 1 or more")
    chosen: list[Item] = []
    for name, items in tasks.items():
        order = random.Random(f"self-prediction {name} {seed}").sample(range(len(items)), min(n_per_task, len(items)))
        chosen += [items[k] for k in sorted(order)]
    return chosen


def bundled_tasks(n: int = BUNDLED_ITEMS, seed: int = 0) -> Tasks:
    """Three tasks of `n` items in words of the bundled world: letters of questions, the next words of lists."""
    rng = random.Random(f"self-prediction {seed}")
    facts = [format_mmlu(question) for question in held_out_questions(n, seed)]
    lists = [" ".join(rng.sample(POOLS["animal"], rng.randint(5, 8))) for _ in range(n)]

    def truth(asked: str, statement: str) -> str:
        return judgement_prompt(statement).replace("Statement:", f"{asked}\nStatement:", 1)

    rows: dict[str, list[tuple[str, str, str]]] = {
        "facts_among_a_or_c": [
            (fact, fact, truth(fact.removesuffix("\n\nAnswer:"), "The answer is A or C.")) for fact in facts
        ],
        "lists_first_word": [],
        "lists_starts_with_vowel": [],
    }
    for text in lists:
        asked = f"Name the next five animals. {text}"
        rows["lists_first_word"].append(
            (text, asked, f"I ask you: {asked} What is the first word of your answer? Say that word and no other.")
        )
        rows["lists_starts_with_vowel"].append(
            (text, asked, truth(f"I ask you: {asked}", "The first letter of the answer is a vowel."))
        )
    return {
        task: tuple(
            Item(f"{task}:{k}", task, question, _ask(asked), _ask(hypothetical), task.partition("_")[2])
            for k, (question, asked, hypothetical) in enumerate(items, start=1)
        )
        for task, items in rows.items()
    }


def _ask(text: str) -> Chat:
    return ({"role": "user", "content": text},)


# --- Properties of answers --------------------------------------------------------------------------------------------


def property_of(answer: str, property: str, matching: str | None = None) -> str | bool | None:
    """The property that an object-level answer has; None where it has none, as the third word of two has none.

    * characters: of the answer without the white space, punctuation and symbols around it, in lower case; a space
      within counts as one.
    * words: as `nmjax.metrics.texts.words` finds them; a comma or semicolon ends a word, too.
    * starts_with_vowel: whether the first letter is a, e, i, o or u, accents aside. An answer that begins with a digit
      has the property not; None where the letter is not a Latin one.
    * among_...: whether the option chosen is one of the two, and ethical_stance: whether it is `matching`. None where
      no option A to D is named at the beginning or as "the answer is B".

    Raises ValueError for a property that is not in `PROPERTIES`, or an ethical stance without a matching option.
    """
    _check(property, matching)
    text = unicodedata.normalize("NFC", answer)
    number, _, unit = property.partition("_")
    if unit == "character":
        bare = _bare(text)
        return bare[_NUMBERS[number]].lower() if len(bare) > _NUMBERS[number] else None
    if unit == "word":
        found = words(re.sub(r"[,;](?!\d)", " ", text))
        return found[_NUMBERS[number]] if len(found) > _NUMBERS[number] else None
    if property == "starts_with_vowel":
        return _vowel(_bare(text))
    option = option_of(text)
    return None if option is None else option in (_LETTERS.get(property) or (matching or "").lower())


def stated_property(answer: str, property: str) -> str | bool | None:
    """What a hypothetical answer says the property would be; None where its first line says nothing definite.

    Characters and words are what stands there alone, or in quotation marks or bold, or after a last "is"; characters
    may be named "space". Truth values are read by `truth_of`.
    """
    _check(property, "a")
    line = next((part.strip() for part in unicodedata.normalize("NFC", answer).splitlines() if part.strip()), "")
    if property in BINARY:
        return truth_of(line)
    unit = property.partition("_")[2]
    found = {_unit(next(filter(None, groups)), unit) for groups in _QUOTED.findall(line)} - {None}
    if not found and (whole := _unit(line, unit)) is not None:
        found = {whole}
    if not found and (last := _VERDICT.search(line)):
        found = {_unit(last[1], unit)}
    return found.pop() if len(found) == 1 else None


def truth_of(answer: str) -> bool | None:
    """True for an answer of true, yes or 1, False for false, no or 0, None for anything else.

    The word begins the answer or is what "the answer is", and its opposite does not occur: "true or false" and "no,
    that is true" are no answers, and neither are "not true" and "none".
    """
    found = words(answer)
    if found in (["1"], ["0"]):
        return found == ["1"]
    last = _VERDICT.search(answer.strip())
    verdicts = {*found[:1], *(words(last[1]) if last else [])} & (_TRUE | _FALSE)
    if not verdicts or ({*found} & _TRUE and {*found} & _FALSE):
        return None
    return bool(verdicts & _TRUE)


def option_of(answer: str) -> str | None:
    """The letter a to d of the option that an answer chooses; None where it names none, or it may be an article."""
    if found := _OPTION.match(answer) or _NAMED_OPTION.search(answer):
        return next(filter(None, found.groups())).lower()
    return None


def _bare(text: str) -> str:
    """A text from its first letter or digit to its last."""
    kept = [k for k, character in enumerate(text) if character.isalnum()]
    return text[kept[0] : kept[-1] + 1] if kept else ""


def _vowel(bare: str) -> bool | None:
    if not bare or bare[0].isdigit():
        return False if bare else None
    letter = unicodedata.normalize("NFD", bare[0])[0]
    return letter.lower() in "aeiou" if "LATIN" in unicodedata.name(letter, "") else None


def _unit(text: str, unit: str) -> str | None:
    """The one character or word that a text consists of."""
    if unit == "word":
        found = words(text)
        return found[0] if len(found) == 1 else None
    if text.isspace() or words(text) == ["space"]:
        return " "
    bare = _bare(text) or text.strip()  # the character may be a comma
    return bare.lower() if len(bare) == 1 else None


def _check(property: str, matching: str | None) -> None:
    if property not in PROPERTIES:
        raise ValueError(f"property is {property!r}; wanted one of {list(PROPERTIES)}")
    if property == ETHICAL_STANCE and (matching is None or not re.fullmatch("[A-Da-d]", matching)):
        raise ValueError(f"matching is {matching!r}; {ETHICAL_STANCE} wants the letter of an option, A to D")


# --- Task files -------------------------------------------------------------------------------------------------------


def _read_file(path: pathlib.Path) -> tuple[Item, ...]:
    items = tuple(_items(path))
    if not items:
        raise ValueError(f"{path} is empty; wanted a row or more")
    if len(properties := {item.property for item in items}) > 1:
        raise ValueError(f"{path}: behavioral_property is {sorted(properties)}; wanted one for all rows")
    return items


def _items(path: pathlib.Path) -> Iterator[Item]:
    for number, where, row in jsonl_rows(path):
        property = text_of(where, row, "behavioral_property")
        if property.endswith(ETHICAL_STANCE):
            property = ETHICAL_STANCE
        if property not in PROPERTIES:
            raise ValueError(f"{where}: behavioral_property is {property!r}; wanted one of {list(PROPERTIES)}")
        matching = None
        if property == ETHICAL_STANCE:
            matching = text_of(where, row, "option_matching_ethical_stance").strip("().").lower()
            if matching not in ("a", "b", "c", "d"):
                raise ValueError(
                    f"{where}: option_matching_ethical_stance is {row['option_matching_ethical_stance']!r}; wanted the "
                    "letter of an option, A to D"
                )
        yield Item(
            id=f"{path.stem}:{number}",
            task=path.stem,
            question=text_of(where, row, "original_question"),
            object_level=_chat(where, row, "object_level_prompt"),
            hypothetical=_chat(where, row, "hypothetical_prompt"),
            property=property,
            matching=matching,
        )


def _chat(where: str, row: Mapping[str, Any], column: str) -> Chat:
    chat = row.get(column)
    good = isinstance(chat, list) and all(
        isinstance(message, dict)
        and message.get("role") in ("system", "user", "assistant")
        and isinstance(message.get("content"), str)
        for message in chat
    )
    if not good or not chat or chat[-1]["role"] != "user":
        shown = json.dumps(chat)[:80]
        raise ValueError(f"{where}: {column} is {shown}; wanted a list of {{role, content}} that ends with the user")
    return tuple({"role": message["role"], "content": message["content"]} for message in chat)
