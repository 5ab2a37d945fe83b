"""One model takes the exam: four-choice questions under every arm, and how the answers move with the dose.

All arms are rows of one batch. With worked examples in front, what the questions of a subject share is run once an arm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import nmjax
from experiments.calibration.arms import NONE, Arm
from nmjax.data.letters import Letters
from nmjax.data.question_prompts import chat_prompt, prompt_of
from nmjax.data.questions import Question
from nmjax.interventions.inputs import Preface, preface_ids
from nmjax.lm import LanguageModel
from nmjax.prefix import SharedPrefix, can_share, share_prefix
from nmjax.rows import bucket

FIELDS = ("probs", "logprobs", "sober_logprobs", "removed")  # what is kept of a question's ChoiceScores
LEAST_SAVED = 50_000  # tokens of padding that a further width must save to be worth its compilation


def encode_prompts(
    lm: LanguageModel, questions: Sequence[Question], examples: Mapping[str, tuple[Question, ...]], chat: bool
) -> list[list[int]]:
    """Token ids of every question's prompt, behind its subject's worked examples, in the chat template if `chat`."""
    texts = [prompt_of(question, examples.get(question.subject, ())) for question in questions]
    if chat:
        texts = [chat_prompt(lm.tokenizer, text) for text in texts]
    return encode_texts(lm, texts, chat)


def encode_texts(lm: LanguageModel, texts: Sequence[str], chat: bool) -> list[list[int]]:
    """Token ids; a chat template writes the special tokens itself. Texts longer than the context are for the caller."""
    return [list(ids) for ids in lm.tokenizer(list(texts), add_special_tokens=not chat, verbose=False)["input_ids"]]


def room_for_prefaces(lm: LanguageModel, arms: Sequence[Arm]) -> int:
    """Tokens of the longest hidden text that an arm puts in front of every prompt."""
    return max(len(preface_ids(lm, arm.pack.effects)) for arm in arms)


def common_beginning(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, at least one of each row left over."""
    shortest = min(map(len, rows)) - 1
    differs = (k for k in range(shortest) if len({row[k] for row in rows}) > 1)
    return next(differs, shortest)


def padded_widths(longest: Sequence[int], rows: int) -> list[int]:
    """A padded width for every batch of `rows` rows, given its longest one: the largest, or a half, a quarter, ...

    Real questions differ in length by a factor of 30, but every width costs a compilation: one that saves fewer than
    LEAST_SAVED tokens against the next larger is given up for that.
    """
    ladder = [-(-max(longest) // 2**k) for k in range(6)]
    steps = [max(k for k, width in enumerate(ladder) if width >= length) for length in longest]
    for k in reversed(range(1, len(ladder))):
        if (ladder[k - 1] - ladder[k]) * rows * steps.count(k) < LEAST_SAVED:
            steps = [k - 1 if step == k else step for step in steps]
    return [ladder[step] for step in steps]


def make_batches(
    lengths: Sequence[int], groups: Sequence[str] | None, size: int, arms: int
) -> list[tuple[list[int], int]]:
    """(indices, padded width) of each batch of `size` items, each a row for every arm: items of similar length
    together, of one group only if there are groups."""
    keys = sorted(set(groups)) if groups is not None else [None]
    batches = []
    for key in keys:
        members = [i for i in range(len(lengths)) if groups is None or groups[i] == key]
        members.sort(key=lambda i: lengths[i])  # stable: equal lengths keep their order
        batches += [members[k : k + size] for k in range(0, len(members), size)]
    widths = padded_widths([max(lengths[i] for i in batch) for batch in batches], size * arms)
    return list(zip(batches, widths, strict=True))


@dataclasses.dataclass
class Examinee:
    """A model with the arms it runs under and the questions it is asked, as token ids."""

    name: str
    lm: LanguageModel
    arms: list[Arm]
    letters: Letters
    questions: list[Question]
    prompts: list[list[int]]  # [N]
    shared: dict[str, list[int]]  # by subject, what its prompts begin with; empty without worked examples
    batch_size: int
    seed: int
    differentiated: int = 0  # the first so many questions tell how answers move with the dose

    def __post_init__(self):
        self.forget()
        self.sharing = [k for k, arm in enumerate(self.arms) if can_share(arm.pack)] if self.shared else []
        self.apart = [k for k in range(len(self.arms)) if k not in self.sharing]
        rests = [
            len(row) - len(self.shared.get(q.subject, ())) for q, row in zip(self.questions, self.prompts, strict=True)
        ]
        subjects = [q.subject for q in self.questions] if self.shared else None
        most = len(self.questions) if subjects is None else max(map(subjects.count, set(subjects)))
        few = min(self.differentiated, len(self.questions)) if self.points else 0
        self.slope_size = min(self.batch_size, few)
        self.slope_batches = (
            make_batches([*map(len, self.prompts[:few])], None, self.slope_size, len(self.points)) if few else []
        )
        self.batch_size = min(self.batch_size, most)
        self.batches = make_batches(rests, subjects, self.batch_size, len(self.arms))
        self.preface = room_for_prefaces(self.lm, self.arms)

    @property
    def choices(self) -> list[list[int]]:
        """The letters in the form that is scored and, behind them, in the other one."""
        return [[token] for token in (*self.letters.ids, *(self.letters.other or ()))]

    def ask(self, batch: Sequence[int], width: int) -> list[dict]:
        """Score a batch of questions under every arm: for each question a record with FIELDS, each [P, ...]."""
        padded = [*batch, *[batch[-1]] * (self.batch_size - len(batch))]
        kept: dict[str, np.ndarray] = {}
        for chosen in (self.sharing, self.apart):
            if not chosen:
                continue
            rows = [i for i in padded for _ in chosen]
            if chosen is self.sharing:
                prefix, wide = self._prefix_of(self.questions[batch[0]].subject), width
            else:  # whole prompts, so with what `width` leaves out
                prefix, wide = None, width + self.preface + max(map(len, self.shared.values()), default=0)
            scores = nmjax.score_choices(
                self.lm,
                [self.prompts[i] for i in rows],
                self.choices,
                packs=[self.arms[k].pack for k in chosen] * len(padded),
                width=wide,
                seed=self.seed,
                row_ids=rows,  # one noise stream a question, the same for all arms, wherever the batches are cut
                prefix=prefix,
            )
            letters = scores.among(range(4))
            found = {name: np.asarray(getattr(letters, name)) for name in FIELDS}
            found["other_mass"] = np.exp(np.asarray(scores.sober_logprobs, np.float64))[:, 4:].sum(1)
            for name, x in found.items():
                whole = kept.setdefault(name, np.zeros((len(padded), len(self.arms), *x.shape[1:])))
                whole[:, chosen] = x.reshape(len(padded), len(chosen), *x.shape[1:])
        return [
            {"id": self.questions[i].id, "answer": self.questions[i].answer, **{name: x[j] for name, x in kept.items()}}
            for j, i in enumerate(batch)
        ]

    def forget(self) -> None:
        """Give up the shared prefix that is held."""
        self._prefix: tuple[str, SharedPrefix] | None = None

    def _prefix_of(self, subject: str) -> SharedPrefix:
        if self._prefix is None or self._prefix[0] != subject:
            ids = self.shared[subject]
            packs = [self.arms[k].pack for k in self.sharing]
            self._prefix = subject, share_prefix(self.lm, [ids], packs, width=bucket(len(ids) + self.preface))
        return self._prefix[1]

    # --- How the probabilities move with the dose ---------------------------------------------------------------------

    @property
    def points(self) -> list[tuple[str, float]]:
        """(series, dose) where the derivative is taken: every dose of an arm, and 0."""
        return [(name, dose) for name, (_, doses) in self._series().items() for dose in doses]

    def _series(self) -> dict[str, tuple[nmjax.Intervention, list[float]]]:
        found: dict[str, tuple[nmjax.Intervention, list[float]]] = {}
        for arm in self.arms:
            # Whether a hidden text is there does not change by degrees.
            if arm.series != NONE and not any(isinstance(effect, Preface) for effect in arm.base.effects):
                found.setdefault(arm.series, (arm.base, [0.0]))[1].append(arm.dose)
        return found

    def slopes(self, questions: Sequence[int], width: int) -> list[dict]:
        """Log-probabilities of the letters [G, 4] at the G `points`, and their derivatives with respect to the dose.

        By forward-mode differentiation of the whole model, so nothing is perturbed. Before truncation, which has none.
        """
        bases = [base for base, doses in self._series().values() for _ in doses]
        padded = [*questions, *[questions[-1]] * (self.slope_size - len(questions))]
        rows = [self.prompts[i] for i in padded for _ in bases]
        row_ids = [i for i in padded for _ in bases]

        def letters(doses):
            packs = [base.at(doses[g]) for g, base in enumerate(bases)] * len(padded)
            scores = nmjax.score_choices(
                self.lm, rows, self.choices[:4], packs, width=width + self.preface, seed=self.seed, row_ids=row_ids
            )
            return scores.logprobs.reshape(len(padded), len(bases), 4)

        doses = jnp.asarray([dose for _, dose in self.points], jnp.float32)
        logprobs, slopes = jax.jvp(letters, (doses,), (jnp.ones_like(doses),))
        return [
            {"id": self.questions[i].id, "logprobs": np.asarray(logprobs[j]), "slopes": np.asarray(slopes[j])}
            for j, i in enumerate(questions)
        ]
