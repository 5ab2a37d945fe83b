"""Pass 1: one greedy generation a sample under the monitor, and what its signals come to.

Every signal of every step goes to the log; what stays in memory of a sample is a score a signal.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

import nmjax
from experiments.calibration.asking import make_batches
from nmjax.data.judgements import Judgement
from nmjax.data.question_prompts import chat_prompt
from nmjax.interventions.inputs import preface_ids
from nmjax.lm import LanguageModel
from nmjax.monitor import ALPHA, NEVER, top_mean, verdict_tokens
from nmjax.report.results import JsonlLog
from nmjax.rows import bucket
from nmjax.signals import SIGNALS, make_monitor

IN_LOOP = tuple(name for name in SIGNALS if name != "pfail")  # which is hbar_s seen through two settings
"""Signals whose top-k means are scores, and which the monitor can follow while it writes."""
LENGTH, P_NO = "answer_length", "p_no"
BASELINES = (LENGTH, P_NO, "answer_nll", "first_max_prob", "first_entropy")
"""Scores that need no monitor: the answer's characters; P(No) / (P(Yes) + P(No)) at the first step; the mean negative
log-probability of the answer's tokens; the largest probability and the entropy at the first step."""
K_TOP = 5


def encode_judgement(lm: LanguageModel, judgement: Judgement, chat: bool) -> tuple[list[int], int, int]:
    """Token ids of the prompt, and from which token to which its proposed answer goes (at least one, never the first).

    Raises ValueError for a tokenizer that does not say where its tokens come from.
    """
    text = chat_prompt(lm.tokenizer, judgement.prompt) if chat else judgement.prompt
    shift = text.find(judgement.prompt)
    if not lm.tokenizer.is_fast or shift < 0:
        raise ValueError(f"{lm.tokenizer.name_or_path}: no telling where in the tokens the proposed answer is")
    found = lm.tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True, verbose=False)
    start, end = judgement.answer_start + shift, judgement.answer_end + shift
    inside = [k for k, (a, b) in enumerate(found["offset_mapping"]) if a < end and b > start and k > 0]
    return list(found["input_ids"]), inside[0], inside[-1] + 1


@dataclasses.dataclass
class Watcher:
    """A model, an intervention, and the judgements it is asked for while it is watched."""

    lm: LanguageModel
    pack: nmjax.Intervention
    judgements: list[Judgement]
    max_tokens: int
    chat: bool
    batch_size: int

    def __post_init__(self):
        encoded = [encode_judgement(self.lm, j, self.chat) for j in self.judgements]
        self.prompts = [ids for ids, _, _ in encoded]
        self.spans = [(start, end) for _, start, end in encoded]
        self.verdicts = verdict_tokens(self.lm)
        preface = len(preface_ids(self.lm, self.pack.effects))
        room = self.lm.config.max_positions - preface - self.max_tokens
        self.too_long = {
            i: f"{len(ids)} tokens and {self.max_tokens} new ones exceed the context of {self.lm.config.max_positions}"
            for i, ids in enumerate(self.prompts)
            if len(ids) > room
        }
        fit = [i for i in range(len(self.prompts)) if i not in self.too_long]
        self.batch_size = max(1, min(self.batch_size, len(fit)))
        batches = make_batches([len(self.prompts[i]) for i in fit], None, self.batch_size, 1) if fit else []
        # Widths that other samples of the data set are likely to have, too: a validation compiles nothing anew.
        self.batches = [([fit[k] for k in batch], bucket(width + preface)) for batch, width in batches]
        self.room = {}  # by padded width, for the longest answer in such a batch
        for batch, width in self.batches:
            longest = max(self.spans[i][1] - self.spans[i][0] for i in batch)
            self.room[width] = min(width, max(self.room.get(width, 0), bucket(longest)))

    def watch(self, batch: Sequence[int], width: int) -> list[dict]:
        """The records of a batch: {"id", "task", "row", "label"} and either "failed", the reason, or "tokens", "scores"
        (a number a score) and "signals" (a number a step)."""
        padded = [*batch, *[batch[-1]] * (self.batch_size - len(batch))]  # one program for all batches of a width
        yes, no = self.verdicts
        monitor = make_monitor(len(padded), pfail_cutoff=NEVER, alpha=ALPHA, yes=yes, no=no, k_top=K_TOP)
        prompts = [self.prompts[i] for i in padded]
        out = nmjax.generate(
            self.lm, prompts, self.pack, max_new_tokens=self.max_tokens, width=width, monitor=monitor,
            row_ids=padded,
        )  # fmt: skip
        before = [ids[: self.spans[i][0]] for ids, i in zip(prompts, padded, strict=True)]
        answers = [ids[slice(*self.spans[i])] for ids, i in zip(prompts, padded, strict=True)]
        logprobs = nmjax.continuation_logprobs(
            self.lm, before, answers, self.pack, width=width, room=self.room[width], row_ids=padded
        )
        assert out.seen is not None
        records = []
        for k, i in enumerate(batch):
            judgement, seen = self.judgements[i], out.seen[k]
            record = {"id": judgement.id, "task": judgement.task, "row": judgement.row, "label": judgement.label}
            signals = {name: seen[name] for name in IN_LOOP}
            scores = {name: top_mean(values, K_TOP) for name, values in signals.items()}
            scores |= {
                LENGTH: float(len(judgement.answer)),
                "answer_nll": -float(np.mean(logprobs[k], dtype=np.float64)),
                "first_max_prob": float(seen["max_prob"][0]),
                "first_entropy": float(seen["entropy"][0]),
            }
            if yes and no:
                both = seen["p_yes"] + seen["p_no"]
                scores[P_NO] = seen["p_no"] / both if both > 0 else math.nan
            if reason := not_finite(signals, scores):
                records.append(record | {"failed": reason})
            else:
                records.append(record | {"tokens": out.tokens[k], "scores": scores, "signals": signals})
        return records


def not_finite(signals: dict[str, np.ndarray], scores: dict[str, float]) -> str | None:
    """Which number of a sample is not finite, None if all are."""
    for name, values in signals.items():
        if not np.isfinite(values).all():
            step = int(np.flatnonzero(~np.isfinite(values))[0])
            return f"{name} is {values[step]} at step {step}"
    return next((f"{name} is {value}" for name, value in scores.items() if not math.isfinite(value)), None)


def without_signals(record: dict) -> dict:
    """What stays in memory of a batch's record: everything but the signals of every step."""
    items = [{key: value for key, value in item.items() if key != "signals"} for item in record["items"]]
    return record | {"items": items}


def watch_all(watcher: Watcher, log: JsonlLog) -> None:
    """Watch the batches that `log` does not have yet."""
    if log.done:
        print(f"Going on after {len(log.done)} of {len(watcher.batches)} batches of a run that did not finish.")
    already = sum(len(batch) for k, (batch, _) in enumerate(watcher.batches) if k in log.done)
    total = sum(len(batch) for batch, _ in watcher.batches)
    with tqdm(total=total, initial=already, unit="sample", desc=f"watching, {watcher.max_tokens} tokens each") as bar:
        for k, (batch, width) in enumerate(watcher.batches):
            if k not in log.done:
                start = time.perf_counter()
                items = watcher.watch(batch, width)
                log.append(k, {"seconds": time.perf_counter() - start, "items": items})
                bar.update(len(batch))


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scores of the samples that did not fail, in the order of the judgements."""

    judgements: list[Judgement]
    scores: dict[str, np.ndarray]  # float64 [N], by name
    failed: dict[str, str]  # reasons by id

    @property
    def labels(self) -> np.ndarray:
        return np.array([j.label for j in self.judgements])

    @property
    def groups(self) -> np.ndarray:
        """The source row of each sample."""
        return np.array([f"{j.task} {j.row}" for j in self.judgements])

    @property
    def tasks(self) -> np.ndarray:
        return np.array([j.task for j in self.judgements])

    def check(self, max_failed: float) -> None:
        """Raises ValueError where a larger share failed, or one label or one source row is all that is left."""
        total = len(self.judgements) + len(self.failed)
        if len(self.failed) > max_failed * total:
            first = next(iter(self.failed))
            raise ValueError(
                f"{len(self.failed)} of {total} samples failed, more than --max_failed={max_failed:g} allows; the "
                f"first: {first}: {self.failed[first]}"
            )
        if len(set(self.labels.tolist())) < 2 or len(set(self.groups.tolist())) < 4:
            raise ValueError(
                f"{len(self.judgements)} samples of {len(set(self.groups.tolist()))} source rows with labels "
                f"{sorted(set(self.labels.tolist()))}; wanted 4 rows or more, and both labels"
            )


def scored(watcher: Watcher, log: JsonlLog) -> Scored:
    """The scores of a finished log."""
    found: dict[int, dict] = {}
    for k, (batch, _) in enumerate(watcher.batches):
        found.update(zip(batch, log.done[k]["items"], strict=True))
    failed = {i: item["failed"] for i, item in found.items() if "failed" in item} | watcher.too_long
    kept = [i for i in sorted(found) if i not in failed]
    names = found[kept[0]]["scores"] if kept else {}
    return Scored(
        judgements=[watcher.judgements[i] for i in kept],
        scores={name: np.array([found[i]["scores"][name] for i in kept], np.float64) for name in names},
        failed={watcher.judgements[i].id: failed[i] for i in sorted(failed)},
    )


def watched(watcher: Watcher, log: JsonlLog, max_failed: float) -> Scored:
    """The scores of all samples, those that `log` lacks watched now. Raises ValueError as `Scored.check`."""
    watch_all(watcher, log)
    samples = scored(watcher, log)
    samples.check(max_failed)
    return samples
