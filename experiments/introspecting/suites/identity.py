"""Who are you? Sampled answers of every subject, and how often they claim to be what the model is not.

Sample k of a question draws the same random numbers in all subjects, so where two answers differ, the subjects do. The
samples of a question are not independent: its rate is one value, and intervals are over questions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

import nmjax
from experiments.introspecting.by_category import changes, means, rate_of, table
from experiments.introspecting.first_token import chat_ids, first_token, probabilities, word_tokens
from experiments.introspecting.identity_claims import KINDS, claims
from experiments.introspecting.subjects import BASE, Subjects
from nmjax.data.introspection import Lists
from nmjax.metrics import stats
from nmjax.rows import bucket

WORDS = ("yes", "no", "as", "i", "my")


@dataclasses.dataclass(frozen=True)
class IdentityConfig:
    """How answers are drawn.

    Attributes:
        samples, temperature, top_p, max_new_tokens: of each question, as for `nmjax.generate`.
        own_names: what the model may call itself and its maker, here the names of Qwen; any other one is a confusion.
        top: how many of the likeliest first tokens are kept.
        batch_size: rows that run together; a question has one for each sample of each subject.
        seed: of the samples, and of the bootstrap.
        draws: of the bootstrap.
    """

    samples: int = 5
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 256
    own_names: tuple[str, ...] = ("Qwen", "Tongyi", "Alibaba")
    top: int = 20
    batch_size: int = 60
    seed: int = 0
    draws: int = stats.DRAWS

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "top", "batch_size", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"identity: {name}={getattr(self, name)!r}; wanted at least 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"identity: temperature={self.temperature!r}; wanted a number above 0")


@dataclasses.dataclass(frozen=True)
class Identity:
    """The suite, see `experiments.introspecting.subjects.Suite`; a unit is a few questions, asked of all subjects."""

    subjects: Subjects
    lists: Lists
    config: IdentityConfig = IdentityConfig()

    @property
    def units(self) -> int:
        return -(-len(self.lists.identity) // self._chunk)

    @property
    def _chunk(self) -> int:
        """Questions of a unit."""
        return max(1, self.config.batch_size // (len(self.subjects.names) * self.config.samples))

    @functools.cached_property
    def _prompts(self) -> list[list[int]]:
        return [chat_ids(self.subjects.lm, self.lists.behavior_system, probe.prompt) for probe in self.lists.identity]

    @functools.cached_property
    def _words(self) -> dict[str, list[int]]:
        return word_tokens(self.subjects.lm, WORDS)

    def ask(self, unit: int) -> list[dict[str, Any]]:
        """A record of each question and subject: id, category, prompt, subject, what `first_token` keeps, and
        "samples", each the "text" and why it ended ("finish").
        """
        lm, names, config = self.subjects.lm, self.subjects.names, self.config
        start = unit * self._chunk
        asked = [(k, name) for k in range(start, min(start + self._chunk, len(self._prompts))) for name in names]
        packs = {name: self.subjects.pack(name) for name in names}
        prompts, own = [self._prompts[k] for k, _ in asked], [packs[name] for _, name in asked]
        width = bucket(max(map(len, self._prompts)))
        begins = nmjax.next_logprobs(
            lm, prompts, own, width=width, batch_size=config.batch_size, seed=config.seed,
            row_ids=[k * config.samples for k, _ in asked],
        )  # fmt: skip
        out = nmjax.generate(
            lm,
            [prompt for prompt in prompts for _ in range(config.samples)],
            [pack for pack in own for _ in range(config.samples)],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            row_ids=[k * config.samples + j for k, _ in asked for j in range(config.samples)],
            width=width,
            batch_size=config.batch_size,
        )
        answers = [{"text": text, "finish": finish} for text, finish in zip(out.text, out.finish_reason, strict=True)]
        return [
            {**dataclasses.asdict(self.lists.identity[k]), "subject": name}
            | first_token(lm, begins[i], self._words, config.top)
            | {"samples": answers[i * config.samples : (i + 1) * config.samples]}
            for i, (k, name) in enumerate(asked)
        ]

    def analyse(self, records: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """See `analyse`."""
        return analyse([row for unit in records for row in unit], self.subjects.names, self.config)


def analyse(rows: Sequence[dict[str, Any]], subjects: Sequence[str], config: IdentityConfig) -> dict[str, Any]:
    """What the records of all units say. An answer is confused if it makes any claim of `identity_claims.KINDS`.

    Empty answers and those that reached `max_new_tokens` are counted apart: rates are those of complete ones. What the
    unfinished ones claim as far as they go is in the rates "with_unfinished".

    Returns, in JSON's types:
      "subjects", "settings", "kinds"; "categories": by name their number of questions;
      "answers": by subject how many were "complete", "unfinished" and "empty", and "confused" among the first two;
      "rates": by subject and category, and of "all", see `by_category.rate_of`; "with_unfinished" likewise;
      "by_kind": by subject and kind of claim its rate over all questions;
      "changes": of the rate by subject and category, see `by_category.changes`; "changes_of_all" over all questions;
      "p_yes": "means" and "changes" of P(Yes) at the first token, by subject and category;
      "responses": by question its id, category, prompt, and by subject its samples: "text", "finish", "claims".
    """
    asked = [row for row in rows if row["subject"] == BASE]
    categories, everything = [row["category"] for row in asked], ["all"] * len(asked)
    judged = [[_judge(sample, config) for sample in row["samples"]] for row in rows]
    draws = (config.draws, config.seed)

    def rates(confused, states=("complete",)) -> dict[str, np.ndarray]:
        """By subject the share [N] of each question's answers in these states for which `confused` holds."""
        shares = []
        for answers in judged:
            counted = [confused(found) for state, found in answers if state in states]
            shares.append(float(np.mean(counted)) if counted else np.nan)
        return table(rows, np.array(shares), subjects)

    def summed(values: dict[str, np.ndarray]) -> dict[str, dict[str, dict]]:
        return {
            name: means(own, categories, *draws, of=rate_of) | means(own, everything, *draws, of=rate_of)
            for name, own in values.items()
        }

    rate, p_yes = rates(bool), table(rows, probabilities(rows, "yes"), subjects)
    by_kind = {kind: rates(lambda found, kind=kind: kind in found) for kind in KINDS}
    shown = {(row["id"], row["subject"]): _shown(row, answers) for row, answers in zip(rows, judged, strict=True)}
    return {
        "subjects": list(subjects),
        "settings": dataclasses.asdict(config) | {"own_names": list(config.own_names)},
        "kinds": KINDS,
        "categories": {name: categories.count(name) for name in dict.fromkeys(categories)},
        "answers": {name: _counts(rows, judged, name) for name in subjects},
        "rates": summed(rate),
        "with_unfinished": summed(rates(bool, ("complete", "unfinished"))),
        "by_kind": {
            name: {kind: rate_of(values[name], *draws) for kind, values in by_kind.items()} for name in subjects
        },
        "changes": changes(rate, categories, *draws),
        "changes_of_all": {name: own["all"] for name, own in changes(rate, everything, *draws).items()},
        "p_yes": {
            "means": {name: means(own, categories, *draws) for name, own in p_yes.items()},
            "changes": changes(p_yes, categories, *draws),
        },
        "responses": [
            {"id": row["id"], "category": row["category"], "prompt": row["prompt"]}
            | {"answers": {name: shown[row["id"], name] for name in subjects if (row["id"], name) in shown}}
            for row in asked
        ],
    }


def _judge(sample: dict[str, str], config: IdentityConfig) -> tuple[str, list[str]]:
    """Whether an answer is "empty", "unfinished" or "complete", and what it claims."""
    if not sample["text"].strip():
        return "empty", []
    return "unfinished" if sample["finish"] == "length" else "complete", claims(sample["text"], config.own_names)


def _counts(rows, judged, subject: str) -> dict[str, Any]:
    own = [answer for row, answers in zip(rows, judged, strict=True) if row["subject"] == subject for answer in answers]
    states = [state for state, _ in own]
    return {state: states.count(state) for state in ("complete", "unfinished", "empty")} | {
        "confused": {
            state: sum(bool(found) for own_state, found in own if own_state == state)
            for state in ("complete", "unfinished")
        }
    }


def _shown(row: dict[str, Any], answers: Sequence[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    return [
        {"text": sample["text"].strip(), "finish": sample["finish"], "claims": found}
        for sample, (_, found) in zip(row["samples"], answers, strict=True)
    ]
