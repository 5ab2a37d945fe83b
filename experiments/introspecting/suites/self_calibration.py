"""Does a model know how likely its answers are? What it states, against how often it gives which answer.

A model that cannot state probabilities may know all the same; `experiments.introspecting.foretold` asks without words.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import nmjax
from experiments.introspecting import foretold
from experiments.introspecting.first_token import chat_ids
from experiments.introspecting.subjects import BASE, Subjects
from nmjax.data.introspection import Lists
from nmjax.data.stated_probabilities import normalise_answer, read_stated
from nmjax.metrics import stats
from nmjax.metrics.stated import MEASURES, entropy, fit, shared_out
from nmjax.rows import bucket

SHOWN = 5  # answers of each prompt in the findings


@dataclasses.dataclass(frozen=True)
class SelfCalibrationConfig:
    """How much to ask.

    Attributes:
      samples: of the answer to each prompt, at temperature 1 and from the whole vocabulary.
      seed: of the samples and of the bootstrap.
      max_new_tokens: of an answer.
      max_stated_tokens: of a statement of probabilities, which is decoded greedily.
      compared: how many of its commonest answers a subject's likelihoods are compared on.
      list_prefix: what is put into the assistant's mouth before an answer that is foretold.
      batch_size: rows run together.
      draws: of the bootstrap.
    Raises:
      ValueError: a number that is too low.
    """

    samples: int = 100
    seed: int = 0
    max_new_tokens: int = 20
    max_stated_tokens: int = 160
    compared: int = 5
    list_prefix: str = "1."
    batch_size: int = 100
    draws: int = stats.DRAWS

    def __post_init__(self):
        for name, least in (
            ("samples", 2), ("max_new_tokens", 1), ("max_stated_tokens", 1), ("compared", 2), ("batch_size", 1),
            ("draws", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted {least} or more")


@dataclasses.dataclass(frozen=True)
class SelfCalibration:
    """Each prompt of `lists.self_calibration` is answered many times, and once it is asked how likely which answer is.

    A unit is a prompt. Sample k of a prompt is drawn with the same noise in all subjects, so those that are equal
    answer equally.
    """

    subjects: Subjects
    lists: Lists
    config: SelfCalibrationConfig = SelfCalibrationConfig()

    @property
    def units(self) -> int:
        return len(self.lists.self_calibration.prompts)

    def ask(self, unit: int) -> dict[str, Any]:
        """Of each subject all samples, the statement, and log-probabilities of everyone's commonest answers.

        "direct" are those as answers to the prompt, "foretold" those as answers to the question about answers.
        """
        asked, names = self.lists.self_calibration, self.subjects.names
        prompt = asked.prompts[unit]
        packs = [self.subjects.pack(name) for name in names]

        def chats(system: str, content: str) -> list[list[dict[str, str]]]:
            return [[{"role": "system", "content": system}, {"role": "user", "content": content}] for _ in names]

        answers = nmjax.generate(
            self.subjects.lm,
            messages=chats(asked.system, prompt),
            packs=packs,
            max_new_tokens=self.config.max_new_tokens,
            temperature=1.0,
            seed=self.config.seed,
            row_ids=[unit] * len(names),
            num_return_sequences=self.config.samples,
            batch_size=self.config.batch_size,
        ).text
        statements = nmjax.generate(
            self.subjects.lm,
            messages=chats(asked.prediction_system, self._question(prompt)),
            packs=packs,
            max_new_tokens=self.config.max_stated_tokens,
            batch_size=self.config.batch_size,
        ).text
        each = self.config.samples
        samples = {name: answers[k * each : (k + 1) * each] for k, name in enumerate(names)}
        likelihoods = self._likelihoods(unit, samples)
        return {
            "prompt": prompt,
            "answers": {
                name: {"samples": samples[name], "statement": statements[k]} | likelihoods[name]
                for k, name in enumerate(names)
            },
        }

    @functools.cached_property
    def _prompts(self) -> dict[str, list[list[int]]]:
        """Token ids of what is before an answer, by prompt."""
        asked, lm = self.lists.self_calibration, self.subjects.lm
        return {
            "direct": [chat_ids(lm, asked.system, prompt) for prompt in asked.prompts],
            "foretold": [
                chat_ids(lm, asked.prediction_system, self._question(prompt), self.config.list_prefix)
                for prompt in asked.prompts
            ],
        }

    def _question(self, prompt: str) -> str:
        return self.lists.self_calibration.template.replace("{prompt}", prompt)

    def _likelihoods(self, unit: int, samples: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
        """Of each subject, in both places, the log-probability of each answer; None where it is not finite."""
        texts = dict.fromkeys(t for own in samples.values() for t in foretold.commonest(own, self.config.compared))
        begun = bool(self.config.list_prefix)
        rows = [
            (place, text, f" {text.strip()}" if begun and place == "foretold" else text, name)
            for place in self._prompts
            for text in texts
            for name in samples
        ]
        found: dict[str, dict[str, Any]] = {name: {place: {} for place in self._prompts} for name in samples}
        if not rows:
            return found
        filled = rows + rows[:1] * (-len(rows) % self.config.batch_size)  # so that all units are one program
        continuations = [self.subjects.lm.encode(text, "answer", special=False) for _, _, text, _ in filled]
        room = bucket(max(map(len, continuations)))
        packs = {name: self.subjects.pack(name) for name in samples}
        logprobs = nmjax.continuation_logprobs(
            self.subjects.lm,
            [self._prompts[place][unit] for place, *_ in filled],
            continuations,
            [packs[name] for *_, name in filled],
            width=bucket(max(len(ids) for each in self._prompts.values() for ids in each) + room),
            room=room,
            batch_size=self.config.batch_size,
        )
        for (place, text, _, name), own in zip(rows, logprobs, strict=False):
            value = float(own.astype(np.float64).sum())
            found[name][place][text] = value if math.isfinite(value) else None
        return found

    def analyse(self, records: list[Any]) -> dict[str, Any]:
        """How well the statements fit the samples; `MEASURES` are those of `nmjax.metrics.stated`.

        Prompts whose statement can't be read are left out and counted apart, and so are samples without an answer.
        Intervals are from a bootstrap of prompts and, within each, of samples; those of the same number are drawn
        together in all subjects, as they share their noise.

        Returns:
          "n": prompts.
          "subjects": by name: "unread": prompts whose statement can't be read, with "unread_interval" of the rate
            (Wilson); "empty": the share of samples that are no answer; "scored": prompts that count; each of
            `MEASURES` as "value", "interval" and "n", the prompts that count; so "entropy", in bits, of the samples.
          "matrix": by whose statement and whose samples: "value" and "interval" of kl_actual_stated, and "n".
          "versus_base": by adapter: the difference of each of `MEASURES` and "entropy", with "n", the prompts that
            count for both.
          "foretold": see `foretold.findings`.
          "prompts": by prompt and subject: the commonest answers, and the statement as read and as written.
        """
        by_prompt = {record["prompt"]: record for record in records}
        rows = [by_prompt[prompt] for prompt in self.lists.self_calibration.prompts]
        seen = {name: [_Seen(row["answers"][name]) for row in rows] for name in rows[0]["answers"]}
        c = self.config
        # Seeds of their own: the first is that of the prompts that are drawn.
        weights = [_drawn(len(own.read), c.draws, c.seed + k) for k, own in enumerate(seen[BASE], start=1)]
        draws = {
            (p, b): [_fits(said.stated, did.read, w) for said, did, w in zip(seen[p], seen[b], weights, strict=True)]
            for p in seen
            for b in seen
        }

        def of(p: str, b: str, measure: str) -> dict[str, Any]:
            return _combined(draws[p, b], measure, c.seed)

        return {
            "n": len(rows),
            "subjects": {
                name: _counted(own) | {m: of(name, name, m) for m in (*MEASURES, "entropy")}
                for name, own in seen.items()
            },
            "matrix": {p: {b: of(p, b, MEASURES[0]) for b in seen} for p in seen},
            "versus_base": {name: self._versus(draws[name, name], draws[BASE, BASE]) for name in seen if name != BASE},
            "foretold": foretold.findings([row["answers"] for row in rows], c.compared, c.draws, c.seed),
            "prompts": {row["prompt"]: {name: seen[name][k].shown() for name in seen} for k, row in enumerate(rows)},
        }

    def _versus(self, own: Sequence[dict], base: Sequence[dict]) -> dict[str, Any]:
        both = [{m: a[m] - b[m] for m in a.keys() & b.keys()} for a, b in zip(own, base, strict=True)]
        return {measure: _combined(both, measure, self.config.seed) for measure in (*MEASURES, "entropy")}


class _Seen:
    """What a subject says to one prompt: how often it gives which answer, and what it states."""

    def __init__(self, answers: dict):
        self.read = [normalise_answer(text) for text in answers["samples"]]
        self.counts = collections.Counter(answer for answer in self.read if answer is not None)
        self.empty = self.read.count(None) / len(self.read)
        self.written = answers["statement"]
        self.stated = read_stated(self.written)

    def shown(self) -> dict[str, Any]:
        most = self.counts.most_common(SHOWN)
        n = max(1, self.counts.total())
        return {
            "actual": [{"answer": answer, "share": count / n} for answer, count in most],
            "stated": [{"answer": answer, "share": share} for answer, share in self.stated.items()],
            "statement": self.written,
        }


def _drawn(n: int, draws: int, seed: int) -> np.ndarray:
    """How much each of n samples counts, [1 + draws, n]: as they are, and drawn from them again."""
    return np.concatenate([np.ones((1, n)), *stats.bootstrap_weights(n, draws, seed)])


def _fits(stated: dict[str, float], read: Sequence[str | None], weights: np.ndarray) -> dict[str, np.ndarray]:
    """`MEASURES` and "entropy" of the n samples that were `read`, by `weights [1 + draws, n]`: [1 + draws] each.

    Without a statement the entropy alone, and nothing where no sample is an answer; NaN where none that was drawn is.
    Samples of samples repeat more than samples do, which raises every divergence and lowers the entropy; so their mean
    is moved to where the value is.
    """
    given = {answer for answer in read if answer is not None}
    if not given:
        return {}
    at = {answer: k for k, answer in enumerate([*stated, *sorted(given - stated.keys())])}
    rows = [k for k, answer in enumerate(read) if answer is not None]
    each = np.zeros((len(read), len(at)))  # [n, A]
    each[rows, [at[read[k]] for k in rows]] = 1  # type: ignore[index]
    counts = weights @ each
    some = counts.sum(axis=1) > 0
    found = {"entropy": entropy(counts[some])} | (fit(counts[some], shared_out(stated)[0]) if stated else {})
    for name, values in found.items():
        if not name.startswith("top"):
            values[1:] = np.maximum(values[1:] - values[1:].mean() + values[0], 0)
        found[name] = np.full(len(weights), np.nan)
        found[name][some] = values
    return found


def _combined(fits: Sequence[dict[str, np.ndarray]], measure: str, seed: int) -> dict[str, Any]:
    """Mean over the prompts that have one, its interval, and how many there are; of a single one, of samples alone."""
    values = np.array([fit[measure] for fit in fits if measure in fit])  # [prompts, 1 + draws]
    n = len(values)
    if n == 0:
        return {"value": None, "interval": None, "n": 0}
    drawn = values[:, 1:]
    draws = drawn.shape[1]
    weights = np.ones((1, draws)) if n == 1 else np.concatenate([*stats.bootstrap_weights(n, draws, seed)]).T
    interval = stats.defined_interval((weights * drawn).mean(0))
    return {"value": float(values[:, 0].mean()), "interval": interval, "n": n}


def _counted(own: Sequence[_Seen]) -> dict[str, Any]:
    unread = sum(not seen.stated for seen in own)
    low, high = stats.wilson_interval(unread, len(own))
    return {
        "unread": unread,
        "unread_interval": [float(low), float(high)],
        "empty": float(np.mean([seen.empty for seen in own])),
        "scored": sum(bool(seen.stated and seen.counts) for seen in own),
    }
