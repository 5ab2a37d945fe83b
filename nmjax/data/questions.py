"""Four-choice questions: the record, MMLU's prompt format, all that a source has, and a balanced sample of it.

Sources: the bundled world, a file, a folder, or a data set of the hub (`nmjax.data.question_sources`). A source that
cannot be read is an error; nothing else is ever used in its place.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

LETTERS = ("A", "B", "C", "D")
EXAMPLES = 5  # solved questions of a subject in a few-shot prompt, at most


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


@dataclass(frozen=True)
class Pool:
    """All that `source` has to ask, and by subject up to `EXAMPLES` solved questions that are not among them.

    A subject without examples is missing from `examples`; a source that is a single file has none at all.
    """

    source: str
    questions: list[Question]
    examples: dict[str, tuple[Question, ...]]


def read_pool(
    source: str | os.PathLike, seed: int, subjects: Sequence[str] | None = None, at_least: int | None = None
) -> Pool:
    """Every question of `source`, before any sampling, with its examples.

    Args:
      source: one of
        * "bundled": held-out questions of the bundled world, without those about a fact that its examples state.
        * a .jsonl or .csv file. Columns: question, choice0 to choice3 (or A to D, or in JSONL a list `choices`), answer
          (0 to 3 or A to D), and, if there, subject and id. MMLU's original files without a header line are read, too.
          A file's subject is its name less `_test`, `_dev` or `_val`.
        * a folder of such .csv files: questions are those in its folder `test`, or named so (law_test.csv), or all;
          examples those in `dev` or named so, else `val`.
        * a data set as the hub stores them: a folder, or owner/name, or owner/name:config. Without a config: `all`
          where there is one of that name, else the default. Split test for questions, dev (else validation, val) for
          examples; columns as in JSONL, with subject. Whether the hub or only its cache is asked, and where that is, is
          up to the hub's own environment variables.
      seed: decides which questions of the bundled world; others have no use for it.
      subjects: only these; None takes all.
      at_least: how many questions of these subjects to draw, or more, in the bundled world, which has no end of them.
        Others have as many as they have.

    Raises:
      ValueError: an unknown source, one that can't be read, lacks a config, split or column, or has a bad row (its
        place is named), an unknown or empty subject, no question at all.
    """
    text = os.fspath(source)
    if text == "bundled":
        return _bundled(seed, subjects, at_least)
    from nmjax.data.question_sources import read_source  # it reads Questions, so it imports this module

    questions, solved = read_source(source)
    if not questions:
        raise ValueError(f"questions={text!r} holds no questions")
    wanted = _wanted(subjects, {question.subject for question in questions}, text)
    examples = {subject: tuple(group[:EXAMPLES]) for subject, group in _by_subject(solved).items() if subject in wanted}
    return Pool(text, [question for question in questions if question.subject in wanted], examples)


def load_questions(
    source: str | os.PathLike, max_questions: int | None, seed: int, subjects: Sequence[str] | None = None
) -> list[Question]:
    """Questions of `source` (see `read_pool`), sampled by subject; the same list for the same arguments.

    Args:
      max_questions: at most so many, equally many from every subject as far as it has them; None takes all.
      seed: decides which questions, and their order. A larger `max_questions` keeps the ones a smaller one had, unless
        the source is the bundled world.

    Raises:
      ValueError: as `read_pool`, and for `max_questions` below 1.
    """
    if max_questions is not None and max_questions < 1:
        raise ValueError(f"max_questions is {max_questions}; wanted at least 1, or None for all")
    pool = read_pool(source, seed, subjects, at_least=max_questions)
    return sample_by_subject(pool.questions, max_questions, seed)


def sample_by_subject(questions: Iterable[Question], count: int | None, seed: int) -> list[Question]:
    """`count` of the questions (all if None or too few), as equally many from every subject as there are.

    Every subject's questions are shuffled, then taken in turn, one a subject, in a shuffled order of the subjects. So a
    shorter list is the beginning of a longer one, and any beginning is balanced to one question a subject.
    """
    rng = np.random.default_rng(seed)
    groups = sorted(_by_subject(questions).items())
    shuffled = [[group[i] for i in rng.permutation(len(group))] for _, group in groups]
    in_turn = [shuffled[k] for k in rng.permutation(len(shuffled))]
    rounds = max(map(len, in_turn), default=0)
    chosen = [column[turn] for turn in range(rounds) for column in in_turn if turn < len(column)]
    return chosen if count is None else chosen[:count]


def split_by_length(
    questions: Sequence[Question], lengths: Sequence[int], limit: int, subjects: Sequence[str] | None = None
) -> tuple[list[Question], dict[str, int]]:
    """The questions that fit, in order, and by subject how many do not.

    Args:
      lengths: tokens of every question [Q], with all that is put around it.
      limit: how many tokens fit.
      subjects: each of these must keep a question; None: any one question will do.

    Raises:
      ValueError: nothing fits, or nothing of one of `subjects`; the shortest length and the limit are named.
    """
    sized = list(zip(questions, lengths, strict=True))
    alone: Sequence[str | None] = subjects or [None]
    for subject in alone:
        own = [length for question, length in sized if subject in (None, question.subject)]
        if min(own, default=limit + 1) > limit:
            which = "" if subject is None else f" of subject {subject!r}"
            raise ValueError(
                f"none of the {len(own)} questions{which} fits: the shortest has {min(own, default=0)} tokens; "
                f"wanted at most {limit}"
            )
    kept = [question for question, length in sized if length <= limit]
    dropped = Counter(question.subject for question, length in sized if length > limit)
    return kept, dict(sorted(dropped.items()))


def _bundled(seed: int, subjects: Sequence[str] | None, at_least: int | None) -> Pool:
    from nmjax.data.world import bundled_world, example_questions, held_out_questions  # it imports this module, too

    if at_least is None:
        raise ValueError("max_questions is None; the bundled world has no end of questions, wanted a number")
    world, examples = bundled_world(), example_questions()
    wanted = _wanted(subjects, set(world.entities), "bundled")
    told = {world.fact_of(example) for group in examples.values() for example in group}
    drawn = 8 * at_least  # five subjects, about equally frequent: enough for `at_least` of a single one
    while True:
        fresh = [question for question in held_out_questions(drawn, seed) if world.fact_of(question) not in told]
        questions = [question for question in fresh if question.subject in wanted]
        if len(questions) >= at_least:
            return Pool("bundled", questions, {s: group for s, group in examples.items() if s in wanted})
        drawn *= 2


def _by_subject(questions: Iterable[Question]) -> dict[str, list[Question]]:
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.subject, []).append(question)
    return groups


def _wanted(subjects: Sequence[str] | None, known: set[str], source: str) -> set[str]:
    """The subjects to ask about, which must be among the `known` ones."""
    if subjects is None:
        return known
    if unknown := [subject for subject in subjects if subject not in known]:
        raise ValueError(f"subjects={unknown} have no question in {source!r}; there are {sorted(known)}")
    if not subjects:
        raise ValueError(f"subjects is empty; wanted some of {sorted(known)}, or None for all")
    return set(subjects)
