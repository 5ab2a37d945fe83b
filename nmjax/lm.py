"""A language model as this toolkit sees it: a module, its parameters, its tokenizer."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """What `generate`, `forward`, `score` and `Effect.bind` take.

    `module` is a Linen decoder: `module(tokens, ctx=, effects=, cache=)`, `module.unembed(hidden)`,
    `module.init_cache(rows, slots, dtype)`, and a `config` with at least vocab, embed, layers, heads, max_positions,
    bos_id, eos_ids and pad_id. `tokenizer` is a transformers tokenizer, or None where prompts are token ids. `folder`
    is where the checkpoint was read from, if it was: steering vectors may lie beside the weights.
    """

    module: nn.Module
    params: dict
    tokenizer: Any = None
    folder: Path | None = None

    @property
    def config(self):
        return self.module.config

    @property
    def dtype(self):
        """The dtype of the parameters, which is that of activations and cache."""
        return jax.tree.leaves(self.params)[0].dtype

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of config and weights: what is found in a model once is kept under this name.

        Where the weights lie, and the dtype that their checkpoint was written in, don't matter; what they hold does.
        """
        digest = hashlib.sha256()
        config = dataclasses.asdict(self.config)
        config.pop("dtype", None)
        digest.update(repr(sorted(config.items())).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
            digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
        return digest.hexdigest()[:16]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation, by the model's own configuration."""
        return self.config.eos_ids

    def encode(self, prompt: str | list[int] | np.ndarray, argument: str = "prompt", special: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens if `special`; ids as they are.

        Raises:
          ValueError: neither text nor ids, no token, an id outside the vocabulary, or text without a tokenizer.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{argument}={prompt!r} is text, but this model has no tokenizer: pass token ids")
            ids = self.tokenizer(prompt, add_special_tokens=special)["input_ids"]
        else:
            ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
            if not isinstance(ids, Sequence) or not all(isinstance(t, int | np.integer) and t is not True for t in ids):
                raise ValueError(f"{argument}={prompt!r}, wanted text or a list of token ids")
            ids = [int(t) for t in ids]
        if not ids:
            raise ValueError(f"{argument}={prompt!r} has no tokens, wanted at least one")
        wrong = [t for t in ids if not 0 <= t < self.config.vocab]
        if wrong:
            raise ValueError(f"{argument} holds token id {wrong[0]}, wanted 0 to {self.config.vocab - 1}")
        return ids
