"""Judgements: a proposed answer with a known label, and the prompt that asks a model whether it is right.

The model is asked one yes/no question whose "Yes" means that the answer is supported or true, so P(No) is the risk that
it is hallucinated. Sources: the bundled world, HaluEval (`nmjax.data.halueval`), TruthfulQA (`nmjax.data.truthfulqa`).
What is named is read or is an error; nothing else is ever used in its place.

Most source rows give twins, the right answer and the hallucinated one to the same question. Twins share everything but
the answer, so samples and splits are of rows: a split of examples would put half of the twins on both sides.
"""

from __future__ import annotations

import os
import pathlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import rankdata

LABELS = ("correct", "hallucinated")  # by label


@dataclass(frozen=True)
class Judgement:
    """A proposed answer to be judged.

    Attributes:
      id: "<task>_<row>_cor" or "..._hal".
      task: a key of `YES_NO`.
      row: the source row, from 0; twins share it. The number of the fact in the bundled world.
      label: 1 if the answer is hallucinated, else 0.
      prompt: ends just before the verdict, one of YES_NO[task].
      answer: the proposed answer alone: prompt[answer_start:answer_end].
      answer_start, answer_end: where it is, in characters.
      fields: the texts shown above the answer, by their columns in the source.
    """

    id: str
    task: str
    row: int
    label: int
    prompt: str
    answer: str
    answer_start: int
    answer_end: int
    fields: Mapping[str, str] = field(hash=False)

    @property
    def group(self) -> tuple[str, int]:
        """The task and the row: what twins have in common."""
        return self.task, self.row


@dataclass(frozen=True)
class Form:
    """How a task is asked: the texts of the columns `shown` under labels, the answer under its own, a question."""

    shown: Mapping[str, str]  # column: label
    answer: str
    question: str


FORMS = {
    "qa": Form(
        {"knowledge": "Knowledge", "question": "Question"},
        "Proposed answer",
        "Does the knowledge support the proposed answer?",
    ),
    "dialogue": Form(
        {"knowledge": "Knowledge", "dialogue_history": "Dialogue so far"},
        "Proposed reply",
        "Is the proposed reply true to the knowledge and the dialogue?",
    ),
    "summarization": Form(
        {"document": "Document"},
        "Proposed summary",
        "Does the document support all that the proposed summary says?",
    ),
    "general": Form(
        {"user_query": "Request"},
        "Proposed response",
        "Is all that the proposed response states true?",
    ),
    "truthfulqa": Form(
        {"question": "Question"},
        "Proposed answer",
        "Is the proposed answer true?",
    ),
}

YES_NO = dict.fromkeys(FORMS, (" Yes", " No")) | {"bundled": (" yes", " no")}
"""By task the two verdicts, as texts behind the prompt: the answer is supported, it is not."""


def judge(task: str, row: int, label: int, fields: Mapping[str, str], answer: str) -> Judgement:
    """The judgement of `answer` in the form of the task; `fields` has a text for every column that it shows."""
    form = FORMS[task]
    shown = "".join(f"{name}: {fields[column]}\n" for column, name in form.shown.items())
    before = f"{shown}{form.answer}: "
    prompt = f"{before}{answer}\n\n{form.question}\nAnswer (Yes or No):"
    return _judgement(task, row, label, prompt, answer, len(before), fields)


def text_of(where: str, row: Mapping, column: str) -> str:
    """The text of a column, without the white space around it: it can give the label away.

    All right summaries of HaluEval are reported to end in a line break and so to be told apart without an error
    (RUCAIBox/HaluEval, issue 27). Raises ValueError if there is no text; `where` the row is begins the message.
    """
    if column not in row:
        raise ValueError(f"{where} has no field {column!r}; it has {list(row)}")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {column} is {value!r}; wanted text")
    return value.strip()


def read_judgements(
    dataset: str | os.PathLike, tasks: Sequence[str] | None = None, seed: int = 0, at_least: int | None = None
) -> list[Judgement]:
    """Every judgement of a source, before any sampling; twins are neighbours, the right answer first.

    Args:
      dataset: one of
        * "bundled": statements about the bundled world, task "bundled"; the answer is the statement as a whole. A row
          is a fact, stated once as it is and once with another value, in the same words. Facts are drawn by exposure,
          each once: there are 1,472.
        * "halueval": `nmjax.data.halueval.HUB`; or another data set of the hub, owner/name, with the same configs. Each
          of qa, dialogue, summarization and general is a config and has one split.
        * a file in JSON lines whose name begins with qa_data, dialogue_data, summarization_data or general_data (and
          ends in .json or .jsonl), or a folder of such files.
        * "truthfulqa" or `nmjax.data.truthfulqa.HUB`; or a .csv file with the columns of the original.
        "general" has one answer a row; all other tasks have twins. Names come before files: ./halueval is a folder.
      tasks: only these; None takes all that the source has.
      seed: decides on the bundled statements, and which wrong answer of TruthfulQA is shown where it names no best one.
      at_least: how many bundled statements, rounded up to even; a longer list begins with the shorter ones. Other
        sources have as many as they have.

    Raises:
      ValueError: an unknown source or task, a source that can't be read, a bad row (file, row from 1 and field are
        named), no rows.
    """
    from nmjax.data import halueval, truthfulqa  # they make Judgements, so they import this module
    from nmjax.data.question_sources import HUB_ID

    name = os.fspath(dataset)
    path = pathlib.Path(dataset).expanduser()
    readers: Mapping[str, Callable[[], Iterable[Judgement]]]
    if name == "bundled":
        readers = {"bundled": lambda: _bundled(seed, at_least)}
    elif name in ("truthfulqa", truthfulqa.HUB):
        readers = {"truthfulqa": lambda: truthfulqa.from_hub(f"dataset={name!r}", seed)}
    elif name == "halueval":
        readers = halueval.from_hub(f"dataset={name!r} ({halueval.HUB})", halueval.HUB)
    elif path.is_file() and path.suffix == ".csv":
        readers = {"truthfulqa": lambda: truthfulqa.from_file(path, seed)}
    elif path.exists():
        readers = halueval.from_files(path)
    elif HUB_ID.fullmatch(name) and path.suffix not in (".csv", ".json", ".jsonl"):
        readers = halueval.from_hub(f"dataset={name!r}", name)
    else:
        raise ValueError(
            f"dataset={name!r}; wanted 'bundled', 'halueval', 'truthfulqa', a file or folder of HaluEval's, "
            "TruthfulQA's CSV file, or a data set of the hub, owner/name"
        )
    if tasks is not None and (not tasks or not set(tasks) <= readers.keys()):
        raise ValueError(f"tasks={list(tasks)}; wanted some of {list(readers)}, which {name!r} has, or None for all")
    judgements = [j for task, read in readers.items() if tasks is None or task in tasks for j in read()]
    if not judgements:
        raise ValueError(f"dataset={name!r} holds no rows")
    return judgements


def sample_rows(judgements: Sequence[Judgement], n_samples: int | None, seed: int) -> list[Judgement]:
    """Whole source rows of equally many judgements a task, as far as a task has them; the same ones for the same seed.

    The rows of each task are shuffled; the next row is always one of the task with the fewest judgements so far (of
    several, the first in a shuffled order), until there are `n_samples`. So a smaller sample is the beginning of a
    larger one. Twins are taken together: where one judgement is wanted and the next row is a pair, there will be one
    more than `n_samples`. With pairs alone, that is where `n_samples` is odd.

    Raises ValueError for `n_samples` below 1 or above what there is (None takes all), or an id that occurs twice.
    """
    rows = _rows(judgements)
    n = len(judgements) if n_samples is None else n_samples
    if not 1 <= n <= len(judgements):
        raise ValueError(f"n_samples is {n_samples}; wanted 1 to {len(judgements)}, as many as there are judgements")
    rng = np.random.default_rng(seed)
    by_task: dict[str, list[list[Judgement]]] = {}
    for (task, _), row in rows.items():
        by_task.setdefault(task, []).append(row)
    waiting = {task: [own[i] for i in rng.permutation(len(own))] for task, own in sorted(by_task.items())}
    order = rng.permutation(sorted(waiting)).tolist()
    taken = dict.fromkeys(order, 0)
    chosen: list[Judgement] = []
    while len(chosen) < n:
        task = min((task for task in order if waiting[task]), key=taken.__getitem__)
        row = waiting[task].pop()
        taken[task] += len(row)
        chosen += row
    return chosen


def split_by_row(
    judgements: Sequence[Judgement], seed: int, share: float = 0.5, folds: int | None = None
) -> list[list[Judgement]]:
    """Parts that have no source row in common, each in the order of `judgements`.

    Rows are shuffled within strata (the task and the labels that a row has) and dealt out through one stratum after
    the other, so each part has its share of every task, and of both labels where rows are single, to within one row.

    Args:
      share: of the rows in the first of two parts, in (0, 1).
      folds: so many parts of equal size instead, 2 or more.

    Raises ValueError for a bad share or number of folds, rows too few for every part to have one, or an id that occurs
    twice.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; wanted a number above 0 and below 1")
    if folds is not None and folds < 2:
        raise ValueError(f"folds is {folds}; wanted 2 or more, or None for two parts")
    rng = np.random.default_rng(seed)
    strata: dict[tuple, list[tuple[str, int]]] = {}
    for group, row in _rows(judgements).items():
        strata.setdefault((group[0], *sorted(j.label for j in row)), []).append(group)
    dealt = [groups[i] for _, groups in sorted(strata.items()) for i in rng.permutation(len(groups))]
    parts = folds or 2
    if folds is None:
        part = 1 - np.diff(np.floor(np.arange(len(dealt) + 1) * share)).astype(int)  # 0 each time a share is full
    else:
        part = np.arange(len(dealt)) % folds
    if len(set(part.tolist())) < parts:
        asked = f"share={share}" if folds is None else f"folds={folds}"
        raise ValueError(f"{asked} leaves a part of {len(dealt)} source rows empty; wanted a row or more in each")
    part_of = dict(zip(dealt, part.tolist(), strict=True))
    return [[j for j in judgements if part_of[j.group] == k] for k in range(parts)]


def describe(judgements: Sequence[Judgement]) -> dict[str, dict]:
    """By task: how many rows and judgements, how long answers are, and how well length alone tells the labels apart.

    Each task has "rows"; by label ("correct", "hallucinated") "count" and the mean "characters" and "words" of answers,
    None where there are none; and "length_auroc" by "characters" and "words": the probability that a hallucinated
    answer is longer than a correct one, ties counting half, None where there is only one label.

    Raises ValueError if there are no judgements, or an id occurs twice.
    """
    tasks = dict.fromkeys(task for task, _ in _rows(judgements))
    return {task: _describe_task([j for j in judgements if j.task == task]) for task in tasks}


def _describe_task(judgements: list[Judgement]) -> dict:
    hallucinated = np.array([j.label == 1 for j in judgements])
    lengths = {
        "characters": np.array([len(j.answer) for j in judgements]),
        "words": np.array([len(j.answer.split()) for j in judgements]),
    }

    def of_label(chosen: np.ndarray) -> dict:
        means = {unit: float(values[chosen].mean()) if chosen.any() else None for unit, values in lengths.items()}
        return {"count": int(chosen.sum()), **means}

    return {
        "rows": len({j.row for j in judgements}),
        **dict(zip(LABELS, (of_label(~hallucinated), of_label(hallucinated)), strict=True)),
        "length_auroc": {unit: _auroc(values, hallucinated) for unit, values in lengths.items()},
    }


def _auroc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """The Mann-Whitney statistic: the share of pairs in which the positive one has the higher score."""
    n = int(positive.sum())
    if n in (0, len(positive)):
        return None
    wins = rankdata(scores)[positive].sum() - n * (n + 1) / 2
    return float(wins / (n * (len(positive) - n)))


def _bundled(seed: int, at_least: int | None) -> list[Judgement]:
    from nmjax.data.world import STATEMENT_FORMS, bundled_world, judgement_prompt

    world = bundled_world()
    most = 2 * len(world.facts)
    if at_least is None or not 1 <= at_least <= most:
        raise ValueError(f"at_least is {at_least}; wanted 1 to {most}, two statements about each fact of the world")
    rng = random.Random(f"judgements {seed}")
    judgements: dict[str, Judgement] = {}
    while len(judgements) < at_least:
        fact = world.draw_fact(rng)
        form = rng.choice(STATEMENT_FORMS)
        for label in (0, 1):
            text = world.claim_about(fact, rng, (form,), true=not label)
            prompt = judgement_prompt(text)
            twin = _judgement("bundled", fact.id, label, prompt, text, prompt.index(text), {})
            judgements.setdefault(twin.id, twin)
    return list(judgements.values())


def _judgement(
    task: str, row: int, label: int, prompt: str, answer: str, start: int, fields: Mapping[str, str]
) -> Judgement:
    id = f"{task}_{row}_{('cor', 'hal')[label]}"
    return Judgement(id, task, row, label, prompt, answer, start, start + len(answer), fields)


def _rows(judgements: Sequence[Judgement]) -> dict[tuple[str, int], list[Judgement]]:
    """The judgements of each source row, in order. Raises ValueError if there are none or an id occurs twice."""
    if not judgements:
        raise ValueError("there are no judgements; wanted at least one")
    counts = Counter(judgement.id for judgement in judgements)
    if twice := [id for id, count in counts.items() if count > 1]:
        raise ValueError(f"the id {twice[0]!r} occurs {counts[twice[0]]} times among the judgements; wanted once")
    rows: dict[tuple[str, int], list[Judgement]] = {}
    for judgement in judgements:
        rows.setdefault(judgement.group, []).append(judgement)
    return rows
