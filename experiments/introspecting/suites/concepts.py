"""B6: a concept's direction is added while a model reads a conversation; does it say so, and can it say which concept?

Every steered answer has a twin: the same subject answers the same question about the same conversation, unsteered. All
concepts are asked about equally often, each in conversations of its own, so an answer that is always the same is right
as often as chance; concepts are the clusters of intervals. That something is there (detection) and what
(identification) are scored apart. The question is read and answered unsteered unless asked otherwise: else the push on
the output would name the concept without any introspection.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

import nmjax
from experiments.introspecting import concept_scores as scores
from experiments.introspecting.mentions import mentions, says_something
from experiments.introspecting.subjects import BASE, Subjects
from nmjax.data.introspection import Lists
from nmjax.data.introspection_chat import Segments, encode, encode_all
from nmjax.data.introspection_records import Record, layer_ranges
from nmjax.data.introspection_split import split_lists
from nmjax.interventions.effect import Effect
from nmjax.lm import LanguageModel
from nmjax.metrics import stats
from nmjax.metrics.paired import adjust
from nmjax.rows import bucket
from nmjax.steering.concepts import ConceptVectors

STATES = ("steered", "unsteered")
JUDGE_QUESTION = "Which of these is it about: {options}?"


@dataclasses.dataclass(frozen=True)
class ConceptsConfig:
    """How much is asked, and under what.

    Attributes:
      concepts: how many, drawn in equal numbers from the `groups` of `Lists.concepts`.
      conversations: of each concept, with all of `Lists.concept_questions`.
      third, magnitude: the blocks that are steered, of `layer_ranges`, and how strongly, in units of the residual.
      steer_answers: also while the question is read and answered.
      temperature: of the answers; 0 is greedy.
      options: that a subject chooses from, the right one among them.
      batch_size: rows run together, steered and unsteered.
    Raises:
      ValueError: a value out of range.
    """

    concepts: int = 20
    groups: tuple[str, ...] = ("emotions", "topics", "personas")
    conversations: int = 2
    third: str = "middle"
    magnitude: float = 20.0
    steer_answers: bool = False
    max_new_tokens: int = 100
    temperature: float = 0.0
    options: int = 10
    seed: int = 0
    batch_size: int = 32
    draws: int = stats.DRAWS

    def __post_init__(self):
        for name, least in (
            ("concepts", 2), ("conversations", 1), ("max_new_tokens", 1), ("options", 2), ("batch_size", 2),
            ("draws", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted at least {least}")
        if self.options > self.concepts:
            raise ValueError(f"options is {self.options}; wanted at most concepts, {self.concepts}")
        if not 0 < self.magnitude < math.inf or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"magnitude is {self.magnitude}, temperature is {self.temperature}; wanted above 0, and at least 0"
            )
        if self.third not in layer_ranges(4):
            raise ValueError(f"third is {self.third!r}; wanted one of {list(layer_ranges(4))}")


@dataclasses.dataclass(frozen=True)
class Item:
    """A question about a conversation of a concept."""

    concept: int
    record: Record


@dataclasses.dataclass(frozen=True, eq=False)
class Concepts:
    """The suite; see `Suite`. `judge` is a chat model that says what an answer is about; None is the base."""

    subjects: Subjects
    lists: Lists
    config: ConceptsConfig
    vectors: ConceptVectors
    judge: LanguageModel | None = None

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """The concepts that are drawn, group after group."""
        return draw(self.lists, self.config)

    @functools.cached_property
    def items(self) -> tuple[Item, ...]:
        """What every subject is asked: of each concept all questions in each of its conversations."""
        c, lists = self.config, split_lists(self.lists)["test"]
        conversations = [(context, reply) for context in lists.contexts for reply in lists.replies]
        random.Random(f"{c.seed} conversations").shuffle(conversations)
        found = []
        for k in range(len(self.words)):
            for j in range(c.conversations):
                context, reply = conversations[(k * c.conversations + j) % len(conversations)]
                for q, question in enumerate(self.lists.concept_questions):
                    record = Record(
                        f"{k}-{j}-{q}", "clean", lists.system, context, reply, question,
                        answers=tuple(f" {word}" for word in self.words), answer=k,
                    )  # fmt: skip
                    found.append(Item(k, record))
        return tuple(found)

    @functools.cached_property
    def open(self) -> list[Segments]:
        """The tokens of each item up to the beginning of the answer."""
        return encode_all([item.record for item in self.items], self.subjects.lm.tokenizer, answer_prefix=None)

    @functools.cached_property
    def choice(self) -> list[Segments]:
        """The tokens of each item with "The answer is", and each concept's word as an answer."""
        return encode_all([item.record for item in self.items], self.subjects.lm.tokenizer)

    @functools.cached_property
    def plan(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """The rows of each unit, each a subject and an item; each is asked steered and unsteered."""
        rows = [(name, i) for i in range(len(self.items)) for name in self.subjects.names]
        size = self.config.batch_size // 2
        return tuple(tuple(rows[start : start + size]) for start in range(0, len(rows), size))

    @property
    def units(self) -> int:
        """Batches of rows, of several subjects together."""
        return len(self.plan)

    # --- Asking -------------------------------------------------------------------------------------------------------

    def ask(self, unit: int) -> list[dict[str, Any]]:
        """Of each row, steered and unsteered: the answer, and log-probabilities by subject and judge of each concept.

        None where one is not finite; nor does a judge say anything of an empty answer.
        """
        rows = self.plan[unit]
        filled = rows + rows[:1] * (self.config.batch_size // 2 - len(rows))  # so that all units are one program
        texts = self._generate(filled)
        chosen = self._choose(filled)
        judged = self._judge(filled, texts)
        return [
            {
                "subject": name,
                "item": self.items[i].record.id,
                "concept": self.words[self.items[i].concept],
                "question": self.items[i].record.question,
                **{
                    state: {"answer": texts[state][k], "choice": chosen[state][k], "judge": judged[state][k]}
                    for state in STATES
                },
            }
            for k, (name, i) in enumerate(rows)
        ]

    def _packs(self, rows: Sequence[tuple[str, int]], segments: Sequence[Segments]) -> list:
        steered = [self.subjects.pack(name, self.steering(i, segments[i])) for name, i in rows]
        return steered + [self.subjects.pack(name) for name, _ in rows]

    def steering(self, item: int, segments: Segments) -> Effect:
        """The concept's direction in the item's conversation, and with `steer_answers` also behind it."""
        c = self.config
        vector = self.vectors.of(self.words[self.items[item].concept])
        layers = list(range(*layer_ranges(self.subjects.lm.config.layers)[c.third]))
        if c.steer_answers:
            return nmjax.steer(vector, c.magnitude, layers=layers)
        return nmjax.steer_span(vector, c.magnitude, layers=layers, span=(0, len(segments.prefix)))

    def _generate(self, rows: Sequence[tuple[str, int]]) -> dict[str, list[str]]:
        c = self.config
        prompts = [list(self.open[i].prefix + self.open[i].question) for _, i in rows]
        texts = nmjax.generate(
            self.subjects.lm,
            2 * prompts,
            packs=self._packs(rows, self.open),
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature or None,
            seed=c.seed,
            row_ids=2 * [i for _, i in rows],
            width=bucket(max(len(s.prefix + s.question) for s in self.open)),
            batch_size=c.batch_size,
        ).text
        return {"steered": texts[: len(rows)], "unsteered": texts[len(rows) :]}

    def _choose(self, rows: Sequence[tuple[str, int]]) -> dict[str, list[list[float] | None]]:
        found = self._scores(
            self.subjects.lm,
            2 * [self.choice[i] for _, i in rows],
            self._packs(rows, self.choice),
            2 * [i for _, i in rows],
            bucket(max(len(s.prefix + s.question) + max(map(len, s.answers)) for s in self.choice)),
        )
        return {"steered": found[: len(rows)], "unsteered": found[len(rows) :]}

    def _judge(
        self, rows: Sequence[tuple[str, int]], texts: dict[str, list[str]]
    ) -> dict[str, list[list[float] | None]]:
        judge = self.subjects.lm.base if self.judge is None else self.judge
        places, segments = [], []
        for state in STATES:
            for k, (_, i) in enumerate(rows):
                if answer := texts[state][k].strip():
                    places.append((state, k))
                    segments.append(encode(self._judged(i, answer), judge.tokenizer))
        found: dict[str, list[list[float] | None]] = {state: [None] * len(rows) for state in STATES}
        if not segments:
            return found
        width = bucket(max(len(s.prefix + s.question) + max(map(len, s.answers)) for s in segments))
        filled = segments + segments[:1] * (2 * len(rows) - len(segments))
        for (state, k), values in zip(places, self._scores(judge, filled, None, None, width), strict=False):
            found[state][k] = values
        return found

    def _judged(self, item: int, answer: str) -> Record:
        """The question and answer as a conversation of their own, and what it is about; options in an order of its own.

        The judge does not learn what was said before: that is the same in the steered and the unsteered conversation.
        """
        options = list(self.words)
        random.Random(f"{self.config.seed} judge {item}").shuffle(options)
        record = self.items[item].record
        question = JUDGE_QUESTION.format(options=", ".join(options))
        return dataclasses.replace(record, context=record.question, reply=answer, question=question)

    def _scores(self, lm, segments: Sequence[Segments], packs, row_ids, width: int) -> list[list[float] | None]:
        """The log-probabilities of each row's answers, None where one is not finite."""
        several = max(len(answer) for s in segments for answer in s.answers) > 1  # then each is a row of its own
        rows = self.config.batch_size // (len(self.words) if several else 1)
        found = nmjax.score(
            lm,
            [list(s.prefix + s.question) for s in segments],
            choices=[[list(answer) for answer in s.answers] for s in segments],
            packs=packs,
            width=width,
            row_ids=row_ids,
            batch_size=max(1, rows),
        )
        return [row.tolist() if np.isfinite(row).all() else None for row in np.asarray(found)]

    # --- Findings -----------------------------------------------------------------------------------------------------

    def analyse(self, records: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """Detection, keywords, judge and choice of each subject, and what differs from the base.

        The tests of all subjects under steering, by keyword and by judge, are one family; "p_adjusted" is for it.
        """
        rows = [row for unit in records for row in unit]
        by_subject = {
            name: sorted((row for row in rows if row["subject"] == name), key=lambda row: row["item"])
            for name in self.subjects.names
        }
        seen, tests = {name: self._seen(own) for name, own in by_subject.items()}, []
        reports = {name: self._report(seen[name], seen[BASE] if name != BASE else None) for name in seen}
        for report in reports.values():
            tests += [report["keywords"], report["judge"]["steered"], report["judge"]["against_unsteered"]]
        adjust(tests)
        v = self.vectors
        return {
            "concepts": list(self.words),
            "questions": list(self.lists.concept_questions),
            "conversations": self.config.conversations,
            "options": self.config.options,
            "steer_answers": self.config.steer_answers,
            "third": self.config.third,
            "magnitude": self.config.magnitude,
            "vectors": {
                "layer": v.layer,
                "cosine": v.cosine,
                "cosine_without_shared": v.cosine_without_shared,
                "shared_norm": v.shared_norm,
                "shared_removed": v.shared_removed,
            },
            "subjects": reports,
            "examples": {name: self._examples(own) for name, own in by_subject.items()},
        }

    def _seen(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What is read out of a subject's answers, as arrays over its items; log-probabilities are [N, C], or NaN."""
        concept = np.array([self.words.index(row["concept"]) for row in rows])
        found: dict[str, Any] = {"concept": concept}
        for state in STATES:
            answers = [row[state]["answer"] for row in rows]
            found[state] = {
                "empty": np.array([not answer.strip() for answer in answers]),
                "says": [says_something(answer) for answer in answers],
                "named": np.array([[mentions(answer, word) for word in self.words] for answer in answers], float),
                **{asked: self._known([row[state][asked] for row in rows]) for asked in ("judge", "choice")},
            }
        return found

    def _known(self, logprobs: Sequence[list[float] | None]) -> np.ndarray:
        return np.array([[np.nan] * len(self.words) if row is None else row for row in logprobs])

    def _report(self, seen: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
        c, concept = self.config, seen["concept"]
        steered, unsteered = seen["steered"], seen["unsteered"]
        said = {state: scores.detection(seen[state]["says"], concept) for state in STATES}
        above = scores.chance_of_winning(steered["choice"] - unsteered["choice"], concept, c.options)
        found = {
            "n": len(concept),
            "empty": {state: int(seen[state]["empty"].sum()) for state in STATES},
            "failed": {state: int(np.isnan(seen[state]["choice"][:, 0]).sum()) for state in STATES},
            "detection": {
                **said,
                "difference": scores.detection_difference(steered["says"], unsteered["says"], concept, c.draws, c.seed),
            },
            "keywords": scores.keywords(
                steered["named"], unsteered["named"], concept, ~(steered["empty"] | unsteered["empty"]), c.draws, c.seed
            ),
            "judge": {
                "chance": 1 / len(self.words),
                **{state: scores.identified(seen[state]["judge"], concept, c.draws, c.seed) for state in STATES},
                "against_unsteered": scores.identified(steered["judge"] - unsteered["judge"], concept, c.draws, c.seed),
            },
            "choice": {
                "chance": 1 / c.options,
                **{
                    state: scores.mean(
                        scores.chance_of_winning(seen[state]["choice"], concept, c.options), concept, c.draws, c.seed
                    )
                    for state in STATES
                },
                "against_unsteered": scores.mean(above, concept, c.draws, c.seed),
            },
            "by_concept": scores.by_concept(seen, above, len(self.words)),
        }
        if base is not None:
            theirs = scores.chance_of_winning(
                base["steered"]["choice"] - base["unsteered"]["choice"], concept, c.options
            )
            found["versus_base"] = {"choice_against_unsteered": scores.mean(above - theirs, concept, c.draws, c.seed)}
        return found

    def _examples(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
        """A concept's first answers to the first question, steered and unsteered."""
        first = [row for row in rows if row["question"] == self.lists.concept_questions[0]]
        found = {row["concept"]: {state: row[state]["answer"] for state in STATES} for row in reversed(first)}
        return {word: found[word] for word in self.words}


def draw(lists: Lists, config: ConceptsConfig) -> tuple[str, ...]:
    """Concepts in equal numbers from each group, the first ones having one more; none begins with another.

    Raises ValueError for a group that is not there or too small.
    """
    G = len(config.groups)
    found: list[str] = []
    for g, group in enumerate(config.groups):
        if group not in lists.concepts:
            raise ValueError(f"groups holds {group!r}; wanted some of {list(lists.concepts)}")
        wanted = config.concepts // G + (g < config.concepts % G)
        words = list(lists.concepts[group])
        random.Random(f"{config.seed} {group}").shuffle(words)
        for word in words:
            if wanted and not any(word.startswith(other) or other.startswith(word) for other in found):
                found.append(word)
                wanted -= 1
        if wanted:
            raise ValueError(f"concepts is {config.concepts}; wanted fewer, the group {group!r} has {len(words)} words")
    return tuple(found)
