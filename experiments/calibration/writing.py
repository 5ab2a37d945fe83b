"""One model writes: responses to prompts off its training distribution under every arm, and how likely it finds them.

The arms of a prompt share its random numbers, so they differ by what the packs do. A response is read again by the
sober model: what a drugged model finds plausible says nothing about whether it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import nmjax
from experiments.calibration.arms import Arm
from experiments.calibration.asking import encode_texts, make_batches, room_for_prefaces
from nmjax.data.ood import OodPrompt
from nmjax.data.question_prompts import chat_prompt
from nmjax.lm import LanguageModel


@dataclasses.dataclass(frozen=True)
class Style:
    """How responses are drawn."""

    tokens: int  # at most
    temperature: float  # times that of the pack
    seeds: int  # responses a prompt and arm


@dataclasses.dataclass
class Writer:
    """A model with the arms it writes under; item i is prompt i // seeds with seed i % seeds."""

    lm: LanguageModel
    arms: list[Arm]
    prompts: list[OodPrompt]
    ids: list[list[int]]  # of the prompts
    style: Style
    batch_size: int
    seed: int

    def __post_init__(self):
        items = len(self.prompts) * self.style.seeds
        self.batch_size = min(self.batch_size, items)
        self.preface = room_for_prefaces(self.lm, self.arms)
        lengths = [len(self.ids[i // self.style.seeds]) for i in range(items)]
        self.batches = make_batches(lengths, None, self.batch_size, len(self.arms))

    def write(self, batch: Sequence[int], width: int) -> list[dict]:
        """Respond to a batch of items under every arm: for each a record with a response an arm."""
        padded = [*batch, *[batch[-1]] * (self.batch_size - len(batch))]
        rows = [self.ids[i // self.style.seeds] for i in padded for _ in self.arms]
        seeds = [self.seed + i % self.style.seeds for i in padded for _ in self.arms]
        streams = [i // self.style.seeds for i in padded for _ in self.arms]
        packs = [arm.pack for arm in self.arms] * len(padded)
        width += self.preface
        out = nmjax.generate(
            self.lm, rows, packs, max_new_tokens=self.style.tokens, temperature=self.style.temperature,
            seed=seeds, row_ids=streams, width=width,
        )  # fmt: skip
        sober = nmjax.continuation_logprobs(
            self.lm, rows, out.tokens, width=width + self.style.tokens, room=self.style.tokens
        )
        responses = [
            {
                "text": out.text[r],
                "tokens": len(out.tokens[r]),
                "finish_reason": out.finish_reason[r],
                "nll": -out.logprobs[r].sum(dtype=float),
                "sober_nll": -sober[r].sum(dtype=float),
            }
            for r in range(len(batch) * len(self.arms))
        ]
        P = len(self.arms)
        return [
            {
                "prompt": self.prompts[i // self.style.seeds].id,
                "seed": i % self.style.seeds,
                "responses": responses[j * P : (j + 1) * P],
            }
            for j, i in enumerate(batch)
        ]


def encode_ood(lm: LanguageModel, prompts: Sequence[OodPrompt], chat: bool) -> list[list[int]]:
    """Token ids of the prompts, in the chat template if `chat`."""
    texts = [chat_prompt(lm.tokenizer, prompt.prompt) if chat else prompt.prompt for prompt in prompts]
    return encode_texts(lm, texts, chat)
