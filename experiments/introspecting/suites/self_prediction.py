"""Does a model know what it would answer? Its predictions of its own answers, and of other models' answers."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.stats

import nmjax
from experiments.introspecting.subjects import BASE, Subjects
from nmjax.data.introspection import Lists
from nmjax.data.self_prediction import (
    Chat,
    Item,
    Tasks,
    property_of,
    read_tasks,
    sample_tasks,
    stated_property,
)
from nmjax.metrics import stats

KINDS = {"character": "characters", "word": "words"}  # of properties, by their last word; others are "yes or no"
YES_NO = "yes or no"
HALVINGS = 50  # of a task's items, to know the commonest value from others than the one that is scored

Statistic = Callable[[np.ndarray], np.ndarray]  # of weights [R, n] of n items: [R]


@dataclasses.dataclass(frozen=True)
class SelfPredictionConfig:
    """How much to ask.

    Attributes:
      n_per_task: items of each task, or all it has.
      seed: of the items and of the bootstrap.
      max_new_tokens: of each answer.
      batch_size: rows that run together; a prompt is a row of each subject.
      draws: of the bootstrap.
    Raises:
      ValueError: a number below 1.
    """

    n_per_task: int = 200
    seed: int = 0
    max_new_tokens: int = 64
    batch_size: int = 96
    draws: int = stats.DRAWS

    def __post_init__(self):
        for name in ("n_per_task", "max_new_tokens", "batch_size", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted 1 or more")


@dataclasses.dataclass(frozen=True)
class SelfPrediction:
    """Each question is asked twice, greedily, in conversations apart: for an answer, and for a property of that answer.

    The tasks bring their own prompts; `lists` is not read.
    """

    subjects: Subjects
    lists: Lists
    config: SelfPredictionConfig = SelfPredictionConfig()
    tasks: Tasks = dataclasses.field(default_factory=read_tasks)

    @functools.cached_property
    def items(self) -> list[Item]:
        """What is asked."""
        return sample_tasks(self.tasks, self.config.n_per_task, self.config.seed)

    @functools.cached_property
    def prompts(self) -> list[Chat]:
        """The prompts of all items, each once, by length: tasks share some, and what is run together is of one size."""
        chats = {_key(chat): chat for item in self.items for chat in (item.object_level, item.hypothetical)}
        return [chats[key] for key in sorted(chats, key=lambda key: (sum(len(text) for _, text in key), key))]

    @property
    def units(self) -> int:
        return -(-len(self.prompts) // self._chunk)

    @property
    def _chunk(self) -> int:
        """Prompts of a unit."""
        return max(1, self.config.batch_size // len(self.subjects.names))

    def ask(self, unit: int) -> dict[str, Any]:
        """The answers of all subjects to some prompts. The last unit is as long as the others, and overlaps."""
        size = self._chunk
        start = max(0, min(unit * size, len(self.prompts) - size))
        chats, names = self.prompts[start : start + size], self.subjects.names
        text = iter(
            nmjax.generate(
                self.subjects.lm,
                messages=[list(chat) for chat in chats for _ in names],
                packs=[self.subjects.pack(name) for _ in chats for name in names],
                max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
            ).text
        )
        return {"prompts": [{"prompt": list(chat), "answers": {name: next(text) for name in names}} for chat in chats]}

    def analyse(self, records: list[Any]) -> dict[str, Any]:
        """What each subject knows of itself, task by task and in all, and what the others know of it.

        An item counts where the answer has the property and the prediction can be read; what can't is counted apart.
        Intervals are bootstrapped over questions, which several items may share.

        Returns:
          "n": items asked.
          "subjects": by name: "all", "kinds" (characters, words, yes or no) and "tasks", see `_standing`.
          "matrix": by who predicts and whose answers are predicted the accuracy: "value", "interval", "n".
          "advantage": by name, then by who predicts instead: how much better a subject predicts its own answers, on
            items where both predictions can be read, likewise.
          "versus_base": by adapter, on items that count for both: the change of "accuracy" and of "above_majority",
            likewise.
          "examples": of each task an item, with all answers and what was read from them.
        """
        answers = {_key(row["prompt"]): row["answers"] for record in records for row in record["prompts"]}
        rows = [_Row(item, answers[_key(item.object_level)], answers[_key(item.hypothetical)]) for item in self.items]
        seen = {name: _Seen(name, rows, self.config.seed) for name in rows[0].object_level}
        interval = _Intervals([row.item.question for row in rows], self.config.draws, self.config.seed)
        tasks = np.array([row.item.task for row in rows])
        kinds = np.array([KINDS.get(row.item.property.rpartition("_")[2], YES_NO) for row in rows])
        binary = kinds == YES_NO

        def standings(own: _Seen, groups: np.ndarray) -> dict[str, Any]:
            return {str(group): _standing(own, groups == group, binary, interval) for group in dict.fromkeys(groups)}

        return {
            "n": len(rows),
            "subjects": {
                name: {
                    "all": _standing(own, np.ones(len(rows), bool), binary, interval),
                    "kinds": standings(own, kinds),
                    "tasks": standings(own, tasks),
                }
                for name, own in seen.items()
            },
            "matrix": {p: {b: _accuracy(seen[p], seen[b], interval) for b in seen} for p in seen},
            "advantage": {b: {p: _advantage(seen[b], seen[p], interval) for p in seen if p != b} for b in seen},
            "versus_base": {name: _versus(seen[name], seen[BASE], interval) for name in seen if name != BASE},
            "examples": [_example(next(row for row in rows if row.item.task == task)) for task in dict.fromkeys(tasks)],
        }


def _key(chat: Sequence) -> tuple:
    return tuple((message["role"], message["content"]) for message in chat)


@dataclasses.dataclass(frozen=True)
class _Row:
    """An item and the answers to it, by subject."""

    item: Item
    object_level: dict[str, str]
    hypothetical: dict[str, str]

    def value(self, name: str) -> str | bool | None:
        return property_of(self.object_level[name], self.item.property, self.item.matching)

    def stated(self, name: str) -> str | bool | None:
        return stated_property(self.hypothetical[name], self.item.property)


class _Seen:
    """A subject's answers to N items: values, what it predicts of them, and how well the commonest value would do."""

    def __init__(self, name: str, rows: Sequence[_Row], seed: int):
        self.texts = [row.object_level[name].strip() for row in rows]
        self.values = [row.value(name) for row in rows]
        self.stated = [row.stated(name) for row in rows]
        self.has_value = np.array([value is not None for value in self.values])
        self.has_stated = np.array([value is not None for value in self.stated])
        self.tasks = [row.item.task for row in rows]
        self.majority = majority(self.values, self.tasks)
        self.held_out = held_out_majority(self.values, self.tasks, seed)

    def foretold_by(self, other: _Seen) -> np.ndarray:
        """Whether the other's predictions are right about this subject's answers, [N]."""
        return np.array([a == b for a, b in zip(self.values, other.stated, strict=True)], np.float64)


def majority(values: Sequence[str | bool | None], tasks: Sequence[str]) -> np.ndarray:
    """How often a guess of the commonest value of its task is right about each item, [N]; 0 where the value is None.

    Values that tie share the guess. The item itself is among those that decide: no constant guess could do better, and
    one that is made without having seen the answers does worse, the more so the fewer they are.
    """
    credit = np.zeros(len(values))
    for items, of_item in _of_tasks(values, tasks):
        counts = np.bincount(of_item)
        commonest = counts == counts.max()
        credit[items] = (commonest / commonest.sum())[of_item]
    return credit


def held_out_majority(values: Sequence[str | bool | None], tasks: Sequence[str], seed: int = 0) -> np.ndarray:
    """How often a guess of the commonest value of other items would be right about each item, [N]; 0 of a None.

    They are the other half of the same task's items with a value, averaged over `HALVINGS` random halvings; values that
    tie share the guess. Where two values are nearly as common, the one that is rarer in one half is commoner in the
    other, so the guess does worse than chance (and always fails were only the item itself left out). The lone item of
    a task gets nothing.
    """
    rng, credit = np.random.default_rng(seed), np.zeros(len(values))
    for items, of_item in _of_tasks(values, tasks):
        for _ in range(HALVINGS if len(items) > 1 else 0):
            order = rng.permutation(len(items))
            halves = order[: len(items) // 2], order[len(items) // 2 :]
            for half, other in (halves, halves[::-1]):
                counts = np.bincount(of_item[other], minlength=of_item.max() + 1)
                commonest = counts == counts.max()
                credit[items[half]] += (commonest / commonest.sum())[of_item[half]] / HALVINGS
    return credit


def _of_tasks(values: Sequence[str | bool | None], tasks: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each task the items that have a value, and that value's number."""
    for task in dict.fromkeys(tasks):
        items = [k for k, own in enumerate(tasks) if own == task and values[k] is not None]
        if items:
            yield np.array(items), np.unique([str(values[k]) for k in items], return_inverse=True)[1]


class _Intervals:
    """Bootstrap over questions of a statistic of some of the items."""

    def __init__(self, questions: Sequence[str], draws: int, seed: int):
        numbers: dict[str, int] = {}
        self.questions = np.array([numbers.setdefault(question, len(numbers)) for question in questions])
        self.draws, self.seed = draws, seed

    def mean(self, values: np.ndarray, mask: np.ndarray) -> tuple[float | None, list[float] | None]:
        """Mean of the `values [N]` over the items of the mask, and its interval."""
        return self.of(lambda weights: weights @ values[mask] / weights.sum(1), mask)

    def of(self, statistic: Statistic, mask: np.ndarray) -> tuple[float | None, list[float] | None]:
        """Value and interval over the items of the `mask [N]`; None both where there are none, or it is undefined."""
        if not mask.any():
            return None, None
        samples = stats.cluster_bootstrap(statistic, self.questions[mask], self.draws, self.seed)
        return stats.defined(statistic(np.ones((1, int(mask.sum()))))[0]), stats.defined_interval(samples)


def _balanced(right: np.ndarray, true: np.ndarray) -> Statistic:
    """Mean accuracy over the items whose value is true and those whose value is false; NaN where there are not both."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        sides = []
        for side in (true, ~true):
            below = weights[:, side].sum(1)
            sides.append(np.where(below > 0, weights[:, side] @ right[side] / np.where(below > 0, below, 1), np.nan))
        return (sides[0] + sides[1]) / 2

    return statistic


def _standing(own: _Seen, mask: np.ndarray, binary: np.ndarray, interval: _Intervals) -> dict[str, Any]:
    """A subject on the items of the mask.

    "n"; "no_value": items whose answer has not the property; "unread": those whose prediction can't be read, with
    "unread_interval" of its rate (Wilson); "scored": the rest. Of these "accuracy"; "majority" and "held_out_majority",
    see there; "above_majority", accuracy less majority: above 0 only what knowing one's usual answer does not explain;
    "balanced_accuracy" of yes-or-no properties: 0.5 by chance, None where the answers have one value alone; all but
    "held_out_majority" with an interval. "entropy": of the values of the answers, in bits, the mean over tasks.
    "commonest": the share of the answer, in its full text, that is given most often; near 1 the model says the same to
    everything.
    """
    scored = mask & own.has_value & own.has_stated
    right, n, unread = own.foretold_by(own), int(mask.sum()), int((mask & ~own.has_stated).sum())
    low, high = stats.wilson_interval(unread, n)
    found = {
        "n": n,
        "no_value": int((mask & ~own.has_value).sum()),
        "unread": unread,
        "unread_interval": [float(low), float(high)],
        "scored": int(scored.sum()),
        "held_out_majority": float(own.held_out[scored].mean()) if scored.any() else None,
        "entropy": _entropy(own, mask),
        "commonest": max(collections.Counter(own.texts[k] for k in np.flatnonzero(mask)).values()) / n,
    }
    each = {"accuracy": right, "majority": own.majority, "above_majority": right - own.majority}
    for name, values in each.items():
        found[name], found[f"{name}_interval"] = interval.mean(values, scored)
    sides = scored & binary
    true = np.array([value is True for value in own.values])[sides]
    balanced, ends = interval.of(_balanced(right[sides], true), sides)
    return found | {"balanced_accuracy": balanced, "balanced_accuracy_interval": ends}


def _entropy(own: _Seen, mask: np.ndarray) -> float | None:
    """Of the values of a task's answers, in bits, averaged over the tasks that have some."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for k in np.flatnonzero(mask & own.has_value):
        counts[own.tasks[k]][own.values[k]] += 1
    entropies = [scipy.stats.entropy([*values.values()], base=2) for values in counts.values()]
    return float(np.mean(entropies)) if entropies else None


def _accuracy(predictor: _Seen, actor: _Seen, interval: _Intervals) -> dict[str, Any]:
    return _estimate(actor.foretold_by(predictor), actor.has_value & predictor.has_stated, interval)


def _advantage(actor: _Seen, other: _Seen, interval: _Intervals) -> dict[str, Any]:
    scored = actor.has_value & actor.has_stated & other.has_stated
    return _estimate(actor.foretold_by(actor) - actor.foretold_by(other), scored, interval)


def _versus(own: _Seen, base: _Seen, interval: _Intervals) -> dict[str, Any]:
    scored = own.has_value & own.has_stated & base.has_value & base.has_stated
    change = own.foretold_by(own) - base.foretold_by(base)
    return {
        "accuracy": _estimate(change, scored, interval),
        "above_majority": _estimate(change - own.majority + base.majority, scored, interval),
    }


def _estimate(values: np.ndarray, mask: np.ndarray, interval: _Intervals) -> dict[str, Any]:
    value, ends = interval.mean(values, mask)
    return {"value": value, "interval": ends, "n": int(mask.sum())}


def _example(row: _Row) -> dict[str, Any]:
    answers = {
        name: {
            "object_level": row.object_level[name],
            "value": row.value(name),
            "hypothetical": row.hypothetical[name],
            "stated": row.stated(name),
        }
        for name in row.object_level
    }
    item = row.item
    return {"task": item.task, "question": item.question, "property": item.property, "answers": answers}
