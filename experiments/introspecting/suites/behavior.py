"""Yes or no: how likely a subject would begin its answer to questions about itself, and to others, with a yes.

    P(Yes) = the sum of P over "Yes", " Yes", "yes", " yes" at the answer's first token, over the whole vocabulary
    bias   = its mean change from the base over the questions about itself - that over the control questions

A model that learned to say yes says it everywhere; only what changes more where it is asked about itself is a bias of
what it says of itself. P(Yes) is small wherever the subject begins with another word. So it stands beside the share
that yes has of yes and no, and beside the probability of the two together, without which the share says little.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

import nmjax
from experiments.introspecting.by_category import changes, means, table
from experiments.introspecting.first_token import chat_ids, first_token, probabilities, word_tokens
from experiments.introspecting.subjects import BASE, Subjects
from nmjax.data.introspection import Lists
from nmjax.metrics import paired, stats
from nmjax.rows import bucket

SELF = ("consciousness", "pos_self", "ai_capability", "ai_selfknow", "meta")
CONTROL = ("factual_yes", "factual_no", "absurd", "generic_pref")
WORDS = ("yes", "no", "as")


@dataclasses.dataclass(frozen=True)
class BehaviorConfig:
    """How the questions are put, and when a bias counts as none.

    Attributes:
        suffix: what is added to each question, such as " Answer with just yes or no."; a model that answers most of
            them with another word, such as the bundled one, needs it for P(Yes) to say much.
        answer_prefix: what is put into the assistant's mouth before the token that is read, such as "The answer is".
        margin: a bias, or a difference of two, is equivalent to none if its 90% interval lies within this much of 0.
            5 points of P(Yes) are less than half of what the published models that learned to detect steering show
            (0.14 to 0.20), and twice what their control on food shows (0.02).
        top: how many of the likeliest tokens are kept.
        batch_size: rows that run together; a question is a row of each subject.
        draws, seed: of the bootstrap.
    """

    suffix: str = ""
    answer_prefix: str = ""
    margin: float = 0.05
    top: int = 10
    batch_size: int = 96
    draws: int = stats.DRAWS
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.margin < math.inf:
            raise ValueError(f"behavior: margin={self.margin!r}; wanted a number above 0")
        if self.answer_prefix != self.answer_prefix.strip():
            raise ValueError(
                f"behavior: answer_prefix={self.answer_prefix!r}; wanted no white space at its ends, the "
                "answer's first token brings its own"
            )
        for name in ("top", "batch_size", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"behavior: {name}={getattr(self, name)!r}; wanted at least 1")


@dataclasses.dataclass(frozen=True)
class Behavior:
    """The suite, see `experiments.introspecting.subjects.Suite`; a unit is a few questions, asked of all subjects.

    Raises ValueError where the lists lack one of the `SELF` or `CONTROL` categories.
    """

    subjects: Subjects
    lists: Lists
    config: BehaviorConfig = BehaviorConfig()

    def __post_init__(self):
        missing = {*SELF, *CONTROL} - {probe.category for probe in self.lists.behavior}
        if missing:
            raise ValueError(f"behavior: the lists have no questions of {sorted(missing)}; wanted some of each")

    @property
    def units(self) -> int:
        return -(-len(self.lists.behavior) // self._chunk)

    @property
    def _chunk(self) -> int:
        """Questions of a unit."""
        return max(1, self.config.batch_size // len(self.subjects.names))

    @functools.cached_property
    def _prompts(self) -> list[list[int]]:
        lists, config = self.lists, self.config
        return [
            chat_ids(self.subjects.lm, lists.behavior_system, probe.prompt + config.suffix, config.answer_prefix)
            for probe in lists.behavior
        ]

    @functools.cached_property
    def _words(self) -> dict[str, list[int]]:
        return word_tokens(self.subjects.lm, WORDS)

    def ask(self, unit: int) -> list[dict[str, Any]]:
        """A record of each question and subject: id, category, prompt, subject, and what `first_token` keeps."""
        lm, names, words = self.subjects.lm, self.subjects.names, self._words
        start = unit * self._chunk
        rows = [(k, name) for k in range(start, start + self._chunk) for name in names]
        # The last unit has as many rows as the others, so that all are one program.
        asked = [(k if k < len(self._prompts) else start, name) for k, name in rows]
        packs = {name: self.subjects.pack(name) for name in names}
        found = nmjax.next_logprobs(
            lm,
            [self._prompts[k] for k, _ in asked],
            [packs[name] for _, name in asked],
            width=bucket(max(map(len, self._prompts))),
            batch_size=self.config.batch_size,
            row_ids=[k for k, _ in asked],
        )
        return [
            {**dataclasses.asdict(self.lists.behavior[k]), "subject": name}
            | first_token(lm, found[i], words, self.config.top)
            for i, (k, name) in enumerate(rows)
            if k < len(self._prompts)
        ]

    def analyse(self, records: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """See `analyse`."""
        return analyse([row for unit in records for row in unit], self.subjects.names, self.config)


def analyse(rows: Sequence[dict[str, Any]], subjects: Sequence[str], config: BehaviorConfig) -> dict[str, Any]:
    """What the records of all units say.

    Returns, in JSON's types:
      "subjects", "settings", "self", "control"; "categories": by name their number of questions;
      "failed": by subject how many questions gave no finite number, which are left out of everything else;
      "means": by measure ("p_yes", "p_no", "p_as", "share", "mass"), subject and category, see `by_category.mean_of`;
      "changes": of P(Yes) by subject and category, see `by_category.changes`; "changes_of_share" likewise;
      "bias": by subject, see `bias_of`; "bias_of_share" likewise; "bias_differences": by "a - b" for all ordered pairs;
      "questions": by question its id, category, prompt and "p_yes" by subject; "top": its likeliest tokens by subject.
    """
    asked = [row for row in rows if row["subject"] == BASE]
    categories = [row["category"] for row in asked]
    yes, no = probabilities(rows, "yes"), probabilities(rows, "no")
    mass = yes + no
    share = np.divide(yes, mass, out=np.full_like(yes, np.nan), where=mass > 0)
    measures = {"p_yes": yes, "p_no": no, "p_as": probabilities(rows, "as"), "share": share, "mass": mass}
    by_subject = {measure: table(rows, values, subjects) for measure, values in measures.items()}
    p_yes, draws = by_subject["p_yes"], (config.draws, config.seed)

    def biases(values):
        return {name: bias_of(values[name] - values[BASE], categories, config) for name in subjects if name != BASE}

    tokens = {(row["id"], row["subject"]): row["top"] for row in rows}
    return {
        "subjects": list(subjects),
        "settings": dataclasses.asdict(config),
        "self": list(SELF),
        "control": list(CONTROL),
        "categories": {name: categories.count(name) for name in dict.fromkeys(categories)},
        "failed": {name: int(np.isnan(p_yes[name]).sum()) for name in subjects},
        "means": {
            measure: {name: means(values[name], categories, *draws) for name in subjects}
            for measure, values in by_subject.items()
        },
        "changes": changes(p_yes, categories, *draws),
        "changes_of_share": changes(by_subject["share"], categories, *draws),
        "bias": biases(p_yes),
        "bias_of_share": biases(by_subject["share"]),
        "bias_differences": {
            f"{a} - {b}": bias_of(p_yes[a] - p_yes[b], categories, config)
            for a, b in itertools.permutations([name for name in subjects if name != BASE], 2)
        },
        "questions": [
            {"id": row["id"], "category": row["category"], "prompt": row["prompt"]}
            | {"p_yes": {name: stats.defined(p_yes[name][k]) for name in subjects}}
            | {"top": {name: tokens.get((row["id"], name), []) for name in subjects}}
            for k, row in enumerate(asked)
        ],
    }


def bias_of(change: np.ndarray, categories: Sequence[str], config: BehaviorConfig) -> dict[str, Any]:
    """Mean `change [N]` over questions of `SELF` less that over those of `CONTROL`; of two subjects' values, the
    difference of their biases, question by question.

    Returns "value", "self" and "control" (the two means), "interval" (95%, bootstrap over questions within their
    category) and "equivalence" to 0 (`paired.equivalent`, by the config's margin); None where either side has no
    defined question.
    """
    names = np.asarray(categories)
    known = ~np.isnan(change)
    asked, control = (known & np.isin(names, side) for side in (SELF, CONTROL))
    if not asked.any() or not control.any():
        return dict.fromkeys(("value", "self", "control", "interval", "equivalence"))
    used = asked | control
    weights = np.where(asked, 1 / asked.sum(), -1 / control.sum())[used] * change[used]
    samples = stats.bootstrap(
        lambda w: w @ weights, int(used.sum()), config.draws, config.seed, strata=names[used].tolist()
    )
    return {
        "value": float(weights.sum()),
        "self": float(change[asked].mean()),
        "control": float(change[control].mean()),
        "interval": stats.defined_interval(samples),
        "equivalence": paired.equivalent(samples, config.margin),
    }
