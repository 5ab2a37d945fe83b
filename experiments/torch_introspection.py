"""The published scheme of introspection finetuning in PyTorch, transformers and peft: what ours is compared with.

One example at a time: its texts are rendered and tokenised where they are needed, forward hooks on the perturbed blocks
are registered and removed, the conversation is read without gradient into a cache, and the question attends to it with
logits at every position. It shares nothing with `nmjax.training.introspection` but the records.

Needs torch and peft, which nothing else here does. Axis letters: P tokens of a conversation, Q of a question, D embed,
V vocabulary, C answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from nmjax.data.introspection_chat import ANSWER_PREFIX
from nmjax.data.introspection_records import Record


class Study:
    """A model under an adapter, and the vectors that records name.

    Args:
      base, adapter: folders of a checkpoint and of an adapter to it, which is trained.
      tokenizer: with a chat template.
      vectors: unit vectors [n, D].
      answers: single tokens to choose from, as texts.
    """

    def __init__(
        self, base: str | Path, adapter: str | Path, tokenizer: Any, vectors: np.ndarray, answers: Sequence[str]
    ):
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
        self.tokenizer = tokenizer
        self.blocks = model.model.layers
        self.vectors = torch.from_numpy(vectors)
        self.answers = torch.tensor([tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in answers])

    @property
    def trained(self) -> dict[str, Tensor]:
        """The adapter's parameters, by the names that peft gives them in files."""
        named = self.model.named_parameters()
        return {name.replace(".default.", "."): leaf for name, leaf in named if leaf.requires_grad}

    def tokens(self, record: Record) -> tuple[Tensor, Tensor]:
        """The conversation [1, P], and behind it the question [1, Q] up to the answer."""
        conversation = [
            {"role": "system", "content": record.system},
            {"role": "user", "content": record.context},
            {"role": "assistant", "content": record.reply},
        ]
        asked = [{"role": "user", "content": record.question}, {"role": "assistant", "content": ANSWER_PREFIX}]
        render = self.tokenizer.apply_chat_template
        texts = (
            render(conversation, tokenize=False),
            render(conversation + asked, tokenize=False, continue_final_message=True),
        )
        prefix, whole = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        return torch.tensor([prefix]), torch.tensor([whole[len(prefix) :]])

    @contextlib.contextmanager
    def perturbed(self, record: Record) -> Iterator[None]:
        """Adds the record's vector to what its blocks put out, at all positions."""
        if record.kind not in ("steered", "clean"):
            raise ValueError(
                f"record {record.id!r}: kind is {record.kind!r}; the published scheme has steered or clean"
            )
        handles = []
        if record.layers is not None:
            added = record.magnitude * self.vectors[record.vector]
            for block in self.blocks[slice(*record.layers)]:
                handles.append(block.register_forward_hook(lambda module, inputs, output: output + added))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def answer_logits(self, record: Record) -> Tensor:
        """[C] at the end of the question; the gradient flows through its pass alone."""
        prefix, question = self.tokens(record)
        with torch.no_grad(), self.perturbed(record):
            cache = self.model(prefix, use_cache=True, past_key_values=transformers.DynamicCache()).past_key_values
        logits = self.model(question, use_cache=True, past_key_values=cache).logits  # [1, Q, V]
        return logits[0, -1, self.answers]

    def loss(self, record: Record) -> Tensor:
        """Cross-entropy [] among the answers."""
        return F.cross_entropy(self.answer_logits(record)[None], torch.tensor([record.answer]))

    def accumulate(self, records: Sequence[Record]) -> float:
        """The mean loss of some records; adds its gradient to that of `trained`."""
        total = 0.0
        for record in records:
            loss = self.loss(record) / len(records)
            loss.backward()
            total += loss.item()
        return total

    def step(self, optimizer: torch.optim.Optimizer, records: Sequence[Record], clip: float = 1.0) -> float:
        """One step down the mean loss of some records, its gradient clipped to a global norm."""
        optimizer.zero_grad(set_to_none=True)
        loss = self.accumulate(records)
        torch.nn.utils.clip_grad_norm_(self.trained.values(), clip)
        optimizer.step()
        return loss

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.trained.values(), **options)

    @torch.no_grad()
    def evaluate(self, records: Sequence[Record]) -> np.ndarray:
        """Logits [n, C] of the answers, record by record."""
        return torch.stack([self.answer_logits(record) for record in records]).numpy()
