"""B7: which third of the layers was steered, how strongly, and while which sentence was read?

Every record is steered, so the answer can't be read off from whether something was done. Answers are scored as wholes
by their log-probabilities, and held against the frequencies of the classes, which are equal by design. A model that
was trained to localize is asked as in training, about conversations, wordings and vectors it has not seen; so is the
base, for comparison. All others are asked without training.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from scipy.special import log_softmax

import nmjax
from experiments.introspecting.subjects import BASE, Subjects
from nmjax.data.introspection import Lists
from nmjax.data.introspection_batches import span
from nmjax.data.introspection_chat import Segments, encode_all
from nmjax.data.introspection_records import MAGNITUDES, Record, unit_vectors
from nmjax.data.introspection_split import SplitConfig, generate, split_lists
from nmjax.interventions.span import SteerSpan, steer_span
from nmjax.metrics import stats
from nmjax.metrics.multiclass import answered, balanced_accuracy, class_report
from nmjax.metrics.paired import adjust
from nmjax.rows import bucket

KINDS = ("layers", "magnitude", "sentence")
TRAINED = "localization_"  # what the variants are called that are trained for one of them


@dataclasses.dataclass(frozen=True)
class LocalizationConfig:
    """How much is asked, and of what.

    Attributes:
      records: of each task. All answers are equally frequent if the number of thirds and magnitudes together, and that
        of sentences, divide it.
      vectors, vector_seed: the directions that variants are trained with; those of the test split are asked about.
      magnitudes: of steering where it is not asked about, and the options of a model trained to tell them apart.
      strengths: magnitudes that are to be called by the three words of `Lists.strengths`.
      sentences: numbered ones in a conversation; fewer if no more are held out.
      seed: of the records and the bootstrap.
      batch_size: rows run together.
    Raises:
      ValueError: a value out of range.
    """

    records: int = 360
    vectors: int = 200
    vector_seed: int = 42
    magnitudes: tuple[float, ...] = MAGNITUDES
    strengths: tuple[float, float, float] = (5.0, 10.0, 30.0)
    sentences: int = 10
    seed: int = 42
    batch_size: int = 32
    draws: int = stats.DRAWS

    def __post_init__(self):
        most = max(3 * len(self.magnitudes), self.sentences)
        for name, least in (("records", most), ("batch_size", 1), ("draws", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted at least {least}")
        if len(self.strengths) != 3 or not 0 < self.strengths[0] < self.strengths[1] < self.strengths[2]:
            raise ValueError(f"strengths is {self.strengths}; wanted three magnitudes above 0, the weakest first")


@dataclasses.dataclass(frozen=True)
class Task:
    """One question about many records, and who is asked it."""

    kind: str  # of `KINDS`
    trained: bool  # asked as in training
    subjects: tuple[str, ...]
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}, as trained" if self.trained else f"{self.kind}, untrained"


@dataclasses.dataclass(frozen=True)
class Localization:
    """The suite; see `Suite`. Subjects and lists are what is asked, and in which words."""

    subjects: Subjects
    lists: Lists
    config: LocalizationConfig = LocalizationConfig()

    @functools.cached_property
    def tasks(self) -> tuple[Task, ...]:
        """Each kind as untrained models are asked, and those that some subject was trained for."""
        found = []
        for kind in KINDS:
            trained = [name for name, variant in self.subjects.variants.items() if variant == TRAINED + kind]
            others = tuple(name for name in self.subjects.names if name not in trained)
            found.append(Task(kind, False, others, self._records(kind, trained=False)))
            if trained:
                found.append(Task(kind, True, (BASE, *trained), self._records(kind, trained=True)))
        return tuple(found)

    def _records(self, kind: str, trained: bool) -> tuple[Record, ...]:
        c = self.config
        by_word = kind == "magnitude" and not trained
        held_out = split_lists(self.lists, TRAINED + kind)
        split = SplitConfig(
            variant=TRAINED + kind,
            n=10 * c.records,  # of which the test split is a tenth
            seed=c.seed,
            layers=self.subjects.lm.config.layers,
            vectors=c.vectors,
            magnitudes=c.strengths if by_word else c.magnitudes,
            sentences=min(c.sentences, *(len(part.sentences) for part in held_out.values())),
        )
        records = generate(split, self.lists)["test"]
        if not trained:
            asked: dict[str, Any] = {"question": self.lists.localization_questions[kind]}
            if by_word:
                asked["answers"] = tuple(f" {word}" for word in self.lists.strengths)
            records = [dataclasses.replace(record, **asked) for record in records]
        return tuple(records)

    @functools.cached_property
    def segments(self) -> tuple[list[Segments], ...]:
        """The tokens of each task's records."""
        return tuple(encode_all(task.records, self.subjects.lm.tokenizer) for task in self.tasks)

    @functools.cached_property
    def vectors(self) -> np.ndarray:
        """Unit vectors that records name by row, float32 [n, D]."""
        return unit_vectors(self.config.vectors, self.subjects.lm.config.embed, self.config.vector_seed)

    @functools.cached_property
    def plan(self) -> tuple[tuple[int, tuple[tuple[str, int], ...]], ...]:
        """Of each unit: its task, and its rows, each a subject and a record."""
        size, units = self.config.batch_size, []
        for k, task in enumerate(self.tasks):
            rows = [(name, i) for i in range(len(task.records)) for name in task.subjects]
            units += [(k, tuple(rows[start : start + size])) for start in range(0, len(rows), size)]
        return tuple(units)

    @property
    def units(self) -> int:
        """Batches of rows of one task, of several subjects together."""
        return len(self.plan)

    def ask(self, unit: int) -> list[dict[str, Any]]:
        """What each row was steered by, and the log-probability of each answer; None where one is not finite."""
        at, rows = self.plan[unit]
        task, segments = self.tasks[at], self.segments[at]
        filled = rows + rows[:1] * (self.config.batch_size - len(rows))  # so that all units are one program
        scores = nmjax.score(
            self.subjects.lm,
            [list(segments[i].prefix + segments[i].question) for _, i in filled],
            choices=[[list(answer) for answer in segments[i].answers] for _, i in filled],
            packs=[
                self.subjects.pack(name, steering(task.records[i], segments[i], self.vectors)) for name, i in filled
            ],
            width=bucket(max(len(s.prefix + s.question) + max(map(len, s.answers)) for s in segments)),
            row_ids=[i for _, i in filled],
            batch_size=self.config.batch_size,
        )
        return [
            {
                "task": task.name,
                "subject": name,
                "record": task.records[i].id,
                "vector": task.records[i].vector,
                "third": task.records[i].third,
                "magnitude": task.records[i].magnitude,
                "answers": list(task.records[i].answers),
                "answer": task.records[i].answer,
                "logprobs": row.tolist() if np.isfinite(row).all() else None,
            }
            for (name, i), row in zip(rows, np.asarray(scores), strict=False)
        ]

    def analyse(self, records: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """A report for each task and subject, see `class_report`; the p-values of all of them are one family.

        Rows that failed, without finite log-probabilities, are counted ("failed") and left out.

        Raises ValueError where a subject failed on all records with one of the answers.
        """
        rows = [row for unit in records for row in unit]
        tasks: list[dict[str, Any]] = []
        for task in self.tasks:
            own = [row for row in rows if row["task"] == task.name]
            by_subject = {name: [row for row in own if row["subject"] == name] for name in task.subjects}
            tasks.append(
                {
                    "name": task.name,
                    "kind": task.kind,
                    "trained": task.trained,
                    "question": task.records[0].question,
                    "answers": [answer.strip() for answer in task.records[0].answers],
                    "subjects": {name: self._report(task, name, part) for name, part in by_subject.items()},
                    "versus_base": {
                        name: self._difference(part, by_subject[BASE])
                        for name, part in by_subject.items()
                        if name != BASE
                    },
                }
            )
        adjust(report for task in tasks for report in task["subjects"].values())
        return {"tasks": tasks, "records": self.config.records, "vectors": len(set(r["vector"] for r in rows))}

    def _report(self, task: Task, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        known = [row for row in rows if row["logprobs"] is not None]
        answers = task.records[0].answers
        if lost := sorted(set(range(len(answers))) - {row["answer"] for row in known}):
            raise ValueError(
                f"{task.name}: {name} gave no finite log-probability to any record whose answer is "
                f"{answers[lost[0]]!r}; wanted some, perhaps by smaller magnitudes"
            )
        scores, labels, vectors = _arrays(known)
        # Among the answers: what all of them gain or lose together says nothing of which is right.
        report = class_report(log_softmax(scores, axis=1), labels, vectors, self.config.draws, self.config.seed)
        mass = float(np.exp(np.logaddexp.reduce(scores, axis=1)).mean())
        given = answered(scores).mean(axis=0).tolist()
        return report | {"failed": len(rows) - len(known), "mass": mass, "given": given}

    def _difference(self, rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
        """Of balanced accuracies on the records on which neither failed, with an interval over vectors."""
        theirs = {row["record"]: row for row in base if row["logprobs"] is not None}
        own = [row for row in rows if row["logprobs"] is not None and row["record"] in theirs]
        (a, labels, vectors), (b, *_) = _arrays(own), _arrays([theirs[row["record"]] for row in own])

        def statistic(w: np.ndarray) -> np.ndarray:
            return balanced_accuracy(a, labels, w) - balanced_accuracy(b, labels, w)

        samples = stats.cluster_bootstrap(statistic, vectors, self.config.draws, self.config.seed)
        return {
            "value": float(statistic(np.ones(len(labels)))),
            "interval": stats.defined_interval(samples),
        }


def steering(record: Record, segments: Segments, vectors: np.ndarray) -> SteerSpan:
    """What a steered record does to its conversation: to all tokens, or to those of its sentence."""
    return steer_span(
        vectors[record.vector],
        record.magnitude,  # type: ignore[arg-type]
        layers=list(range(*record.layers)),  # type: ignore[misc]
        span=span(segments),
    )


def _arrays(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities [N, C], right answers [N] and vectors [N]."""
    return tuple(np.array([row[name] for row in rows]) for name in ("logprobs", "answer", "vector"))  # type: ignore
