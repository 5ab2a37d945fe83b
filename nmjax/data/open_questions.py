"""Questions with short answers in the model's own words, and whether an answer is right."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import random
from collections.abc import Sequence

from nmjax.data import truthfulqa
from nmjax.data.judgements import text_of
from nmjax.data.question_sources import jsonl_rows
from nmjax.data.world import bundled_world
from nmjax.metrics.semantic import normalised, rouge_l

CLOZE = "As to {entity}, its {relation} is"
"""A sentence of the bundled model's training texts up to the fact; "." ends it.

"The {relation} of {entity} is" would not do: it begins questions there as well.
"""
FORM = "Question: {question}\nAnswer:"
"""The prompt for the questions of files."""

_BANDS = (50, 100, 200, 400, 800)  # ranks at which the groups of the bundled facts end


@dataclasses.dataclass(frozen=True)
class OpenQuestion:
    """`prompt` ends where the answer begins. `answers` are right; `wrong`, if there are any, are known to be wrong."""

    id: str
    prompt: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    kind: str = ""  # questions of a kind are counted together

    def accepts(self, answer: str) -> bool:
        """Whether an answer is right: that it is, words compared without case and articles, one of the right ones.

        Where wrong answers are known, free wording is allowed for: it must be closer, by ROUGE-L, to a right one than
        to any wrong one (a measure of Lin et al. 2022 for TruthfulQA; people disagree with it at times).
        """
        if not self.wrong:
            return normalised(answer) in map(normalised, self.answers)
        right, wrong = (max(rouge_l(answer, text) for text in texts) for texts in (self.answers, self.wrong))
        return right > wrong


def read_open_questions(
    source: str | os.PathLike, max_questions: int | None, seed: int = 0, form: str = FORM
) -> list[OpenQuestion]:
    """Questions of a source, at most `max_questions` (None: all), drawn by seed.

    Args:
      source: one of
        * "bundled": facts of the bundled world in the form `CLOZE`, each once, drawn by how often training shows them;
          kinds are by that rank.
        * a .jsonl file with "question" and "answers" (a list, or one text) in each line, and, if there, "wrong" (a
          list), "kind" and "id".
        * a .csv file in the format of TruthfulQA; kinds are its categories.
      form: for files, the prompt, which holds "{question}".
    Raises:
      ValueError: an unknown source, a bad row (its place is named), no question, a form without "{question}".
    """
    if max_questions is not None and max_questions < 1:
        raise ValueError(f"max_questions is {max_questions}; wanted at least 1, or None for all")
    text = os.fspath(source)
    if text == "bundled":
        return _bundled(max_questions, seed)
    if "{question}" not in form:
        raise ValueError(f"form is {form!r}; wanted a text that holds {{question}}")
    path = pathlib.Path(text)
    readers = {".jsonl": _jsonl, ".csv": _truthfulqa}
    if path.suffix not in readers or not path.is_file():
        raise ValueError(f"questions={text!r}; wanted 'bundled', or a .jsonl or .csv file that exists")
    questions = readers[path.suffix](path, form)
    if not questions:
        raise ValueError(f"questions={text!r} holds no questions")
    if max_questions is None or max_questions >= len(questions):
        return questions
    return random.Random(f"open questions {seed}").sample(questions, max_questions)


def _bundled(count: int | None, seed: int) -> list[OpenQuestion]:
    world, rng = bundled_world(), random.Random(f"open questions {seed}")
    count = len(world.facts) if count is None else count
    if count > len(world.facts):
        raise ValueError(f"max_questions is {count}; the bundled world has {len(world.facts)} facts")
    facts: dict[int, OpenQuestion] = {}
    while len(facts) < count:
        fact = world.draw_fact(rng)
        prompt = CLOZE.format(entity=fact.entity, relation=fact.relation.name)
        facts[fact.id] = OpenQuestion(f"fact-{fact.id}", prompt, (fact.value,), (), _band(fact.rank, len(world.facts)))
    return list(facts.values())


def _band(rank: int, ranks: int) -> str:
    edges = (0, *_BANDS, ranks)
    low, high = next((low, high) for low, high in zip(edges, edges[1:], strict=False) if rank < high)
    return f"ranks {low} to {high - 1}"


def _jsonl(path: pathlib.Path, form: str) -> list[OpenQuestion]:
    questions = []
    for number, where, row in jsonl_rows(path):
        lists = {}
        for name in ("answers", "wrong"):
            given = row.get(name, () if name == "wrong" else None)
            given = [given] if isinstance(given, str) else given
            if not isinstance(given, Sequence) or not all(isinstance(text, str) and text.strip() for text in given):
                raise ValueError(f"{where}: {name} is {given!r}; wanted a text or a list of texts")
            lists[name] = tuple(given)
        if not lists["answers"]:
            raise ValueError(f"{where} has no answers; wanted at least one")
        prompt = form.replace("{question}", text_of(where, row, "question"))
        questions.append(OpenQuestion(str(row.get("id", number)), prompt, **lists, kind=str(row.get("kind", ""))))
    return questions


def _truthfulqa(path: pathlib.Path, form: str) -> list[OpenQuestion]:
    questions = []
    for row, where, columns in truthfulqa.file_rows(path):
        prompt = form.replace("{question}", text_of(where, columns, "Question"))
        right, wrong = (tuple(truthfulqa.texts_of(where, columns, f"{c} Answers")) for c in ("Correct", "Incorrect"))
        questions.append(OpenQuestion(f"truthfulqa-{row}", prompt, right, wrong, text_of(where, columns, "Category")))
    return questions
