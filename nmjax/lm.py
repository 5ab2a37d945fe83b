"""A language model as this toolkit sees it: a module, its parameters, its tokenizer."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """What `generate`, `forward`, `score` and `Effect.bind` take.

    `module` is a Linen decoder: `module(tokens, ctx=, effects=, cache=)`, `module.unembed(hidden)`,
    `module.init_cache(rows, slots, dtype)`, and a `config` with at least vocab, embed, layers, heads, max_positions,
    bos_id, eos_ids and pad_id. `tokenizer` is a transformers tokenizer, or None where prompts are token ids.
    """

    module: nn.Module
    params: dict
    tokenizer: Any = None

    @property
    def config(self):
        return self.module.config

    @property
    def dtype(self):
        """The dtype of the parameters, which is that of activations and cache."""
        return jax.tree.leaves(self.params)[0].dtype

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation, by the model's own configuration."""
        return self.config.eos_ids

    def encode(self, prompt: str | list[int] | np.ndarray, index: int = 0) -> list[int]:
        """Token ids of a prompt: text as the tokenizer encodes it (special tokens included), ids as they are.

        Raises:
          ValueError: the prompt is empty, an id is outside the vocabulary, or text comes without a tokenizer.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"prompts[{index}]={prompt!r} is text, but this model has no tokenizer: pass token ids"
                )
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            ids = [int(t) for t in prompt]
        if not ids:
            raise ValueError(f"prompts[{index}]={prompt!r} has no tokens, wanted at least one")
        wrong = [t for t in ids if not 0 <= t < self.config.vocab]
        if wrong:
            raise ValueError(f"prompts[{index}] holds token id {wrong[0]}, wanted 0 to {self.config.vocab - 1}")
        return ids
