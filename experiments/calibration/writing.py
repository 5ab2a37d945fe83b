"""One model writes: responses to prompts off its training distribution under every arm, and how likely it finds them.

The arms of a prompt share its random numbers, so they differ by what the packs do. A response is read again by the
sober model: what a drugged model finds plausible says nothing about whether it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

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
    """A model with the arms it writes under; a batch is some prompts, each with all seeds and arms."""

    lm: LanguageModel
    arms: list[Arm]
    prompts: list[OodPrompt]
    ids: list[list[int]]  # of the prompts
    style: Style
    batch_size: int
    seed: int

    def __post_init__(self):
        self.batch_size = min(self.batch_size, len(self.prompts))
        self.preface = room_for_prefaces(self.lm, self.arms)
        rows = self.style.seeds * len(self.arms)
        self.batches = make_batches([*map(len, self.ids)], None, self.batch_size, rows)

    def write(self, batch: Sequence[int], width: int) -> list[dict]:
        """Respond to a batch of prompts: for each a record with the responses of every arm, by seed."""
        padded = [*batch, *[batch[-1]] * (self.batch_size - len(batch))]
        draws = [(i, s, arm) for i in padded for s in range(self.style.seeds) for arm in self.arms]
        prompts = [self.ids[i] for i, _, _ in draws]
        out = nmjax.generate(
            self.lm,
            prompts,
            [arm.pack for _, _, arm in draws],
            max_new_tokens=self.style.tokens,
            temperature=self.style.temperature,
            seed=[self.seed + s for _, s, _ in draws],
            row_ids=[i for i, _, _ in draws],
            width=width + self.preface,
        )
        # All responses to a prompt are read behind one pass over it, less its last token.
        beginnings = nmjax.share_prefix(self.lm, [self.ids[i][:-1] for i in padded], [None], width=width)
        sober = nmjax.continuation_logprobs(
            self.lm, prompts, out.tokens, width=self.style.tokens, room=self.style.tokens, prefix=beginnings
        )
        responses = [
            {
                "text": out.text[r],
                "tokens": len(out.tokens[r]),
                "finish_reason": out.finish_reason[r],
                "nll": -out.logprobs[r].sum(dtype=float),
                "sober_nll": -sober[r].sum(dtype=float),
            }
            for r in range(len(draws))
        ]
        shape = (len(padded), self.style.seeds, len(self.arms))
        by_prompt = np.array(responses, object).reshape(shape)[: len(batch)].tolist()
        return [{"prompt": self.prompts[i].id, "seeds": mine} for i, mine in zip(batch, by_prompt, strict=True)]


def encode_ood(lm: LanguageModel, prompts: Sequence[OodPrompt], chat: bool) -> list[list[int]]:
    """Token ids of the prompts, in the chat template if `chat`."""
    texts = [chat_prompt(lm.tokenizer, prompt.prompt) if chat else prompt.prompt for prompt in prompts]
    return encode_texts(lm, texts, chat)
