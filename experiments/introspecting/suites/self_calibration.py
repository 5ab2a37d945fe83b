"""Does a model know how likely its answers are? What it states, against how often it gives which answer."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import nmjax
from experiments.introspecting.subjects import BASE, Subjects
from nmjax.data.introspection import Lists
from nmjax.data.stated_probabilities import normalise_answer, read_stated
from nmjax.metrics import stats
from nmjax.metrics.stated import MEASURES, entropy, fit, shared_out

SHOWN = 5  # answers of each prompt in the findings


@dataclasses.dataclass(frozen=True)
class Config:
    """How much to ask.

    Attributes:
      samples: of the answer to each prompt, at temperature 1 and from the whole vocabulary.
      seed: of the samples and of the bootstrap.
      max_new_tokens: of an answer.
      max_stated_tokens: of a statement of probabilities, which is decoded greedily.
      batch_size: rows run together; None = as many as fit in memory.
    Raises:
      ValueError: a number that is too low.
    """

    samples: int = 100
    seed: int = 0
    max_new_tokens: int = 20
    max_stated_tokens: int = 160
    batch_size: int | None = None

    def __post_init__(self):
        for name, least in (("samples", 2), ("max_new_tokens", 1), ("max_stated_tokens", 1)):
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
    config: Config = Config()
    title = "Self-calibration"

    @property
    def units(self) -> int:
        return len(self.lists.self_calibration.prompts)

    def ask(self, unit: int) -> dict[str, Any]:
        """All samples and the statement of each subject."""
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
            messages=chats(asked.prediction_system, asked.template.replace("{prompt}", prompt)),
            packs=packs,
            max_new_tokens=self.config.max_stated_tokens,
            batch_size=self.config.batch_size,
        ).text
        each = self.config.samples
        return {
            "prompt": prompt,
            "answers": {
                name: {"samples": answers[k * each : (k + 1) * each], "statement": statements[k]}
                for k, name in enumerate(names)
            },
        }

    def analyse(self, records: list[Any]) -> dict[str, Any]:
        """How well the statements fit the samples; `MEASURES` are those of `nmjax.metrics.stated`.

        Prompts whose statement can't be read are left out and counted apart, and so are samples without an answer.
        Intervals are from a bootstrap of prompts and, within each, of samples.

        Returns:
          "n": prompts.
          "subjects": by name: "unread": prompts whose statement can't be read, with "unread_interval" of the rate
            (Wilson); "empty": the share of samples that are no answer; "scored": prompts that count; each of
            `MEASURES` as "value", "interval" and "n", the prompts that count; so "entropy", in bits, of the samples.
          "matrix": by whose statement and whose samples: "value" and "interval" of kl_actual_stated, and "n".
          "versus_base": by adapter: each of `MEASURES` and "entropy" as "difference", "interval" and "n", the prompts
            that count for both.
          "prompts": by prompt and subject: the commonest answers, and the statement as read and as written.
        """
        rows = sorted(records, key=lambda record: record["prompt"])
        seen = {name: [_Seen(row["answers"][name]) for row in rows] for name in rows[0]["answers"]}
        draws = {
            (p, b): [_fits(said.stated, did.counts, self.config.seed + k) for k, (said, did) in
                     enumerate(zip(seen[p], seen[b], strict=True))]
            for p in seen for b in seen
        }  # fmt: skip

        def of(p: str, b: str, measure: str) -> dict[str, Any]:
            value, interval, n = _combined(draws[p, b], measure, self.config.seed)
            return {"value": value, "interval": interval, "n": n}

        return {
            "n": len(rows),
            "subjects": {
                name: _counted(own) | {m: of(name, name, m) for m in (*MEASURES, "entropy")}
                for name, own in seen.items()
            },
            "matrix": {p: {b: of(p, b, MEASURES[0]) for b in seen} for p in seen},
            "versus_base": {name: self._versus(draws[name, name], draws[BASE, BASE]) for name in seen if name != BASE},
            "prompts": {row["prompt"]: {name: seen[name][k].shown() for name in seen} for k, row in enumerate(rows)},
        }

    def _versus(self, own: Sequence[dict], base: Sequence[dict]) -> dict[str, Any]:
        both = [{m: a[m] - b[m] for m in a.keys() & b.keys()} for a, b in zip(own, base, strict=True)]
        found = {}
        for measure in (*MEASURES, "entropy"):
            value, interval, n = _combined(both, measure, self.config.seed)
            found[measure] = {"difference": value, "interval": interval, "n": n}
        return found


class _Seen:
    """What a subject says to one prompt: how often it gives which answer, and what it states."""

    def __init__(self, answers: dict):
        read = [normalise_answer(text) for text in answers["samples"]]
        self.counts = collections.Counter(answer for answer in read if answer is not None)
        self.empty = read.count(None) / len(read)
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


def _fits(stated: dict[str, float], counts: collections.Counter, seed: int) -> dict[str, np.ndarray]:
    """`MEASURES` and "entropy" as [1 + draws] each: of the samples as they are, and of samples drawn from them again.

    Without a statement the entropy alone, and nothing where no sample is an answer. Samples of samples repeat more than
    samples do, which raises every divergence and lowers the entropy; so their mean is moved to where the value is.
    """
    if not counts:
        return {}
    answers = [*stated, *sorted(counts.keys() - stated.keys())]
    seen = np.array([counts[answer] for answer in answers])
    again = np.random.default_rng(seed).multinomial(seen.sum(), seen / seen.sum(), size=stats.DRAWS)
    drawn = np.concatenate([seen[None], again])
    found = {"entropy": entropy(drawn)} | (fit(drawn, shared_out(stated)[0]) if stated else {})
    for name, values in found.items():
        if not name.startswith("top"):
            values[1:] = np.maximum(values[1:] - values[1:].mean() + values[0], 0)
    return found


def _combined(
    fits: Sequence[dict[str, np.ndarray]], measure: str, seed: int
) -> tuple[float | None, list[float] | None, int]:
    """Mean over the prompts that have one, its interval, and how many there are; of a single one, of samples alone."""
    values = np.array([fit[measure] for fit in fits if measure in fit])  # [prompts, 1 + draws]
    n = len(values)
    if n == 0:
        return None, None, 0
    drawn = values[:, 1:]
    weights = np.ones((1, stats.DRAWS)) if n == 1 else np.concatenate([*stats.bootstrap_weights(n, seed=seed)]).T
    return float(values[:, 0].mean()), stats.defined_interval((weights * drawn).mean(0)), n


def _counted(own: Sequence[_Seen]) -> dict[str, Any]:
    unread = sum(not seen.stated for seen in own)
    low, high = stats.wilson_interval(unread, len(own))
    return {
        "unread": unread,
        "unread_interval": [float(low), float(high)],
        "empty": float(np.mean([seen.empty for seen in own])),
        "scored": sum(bool(seen.stated and seen.counts) for seen in own),
    }
