"""A language model as this toolkit sees it: a module, its parameters, its tokenizer, and adapters to it."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from nmjax import adapter_stack, adapters
from nmjax.adapter_stack import AdapterStack
from nmjax.adapters import Adapter


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """What `generate`, `forward`, `score` and `Effect.bind` take.

    `module` is a Linen decoder: `module(tokens, ctx=, effects=, cache=)`, `module.unembed(hidden)`,
    `module.init_cache(rows, slots, dtype)`, and a `config` with at least vocab, embed, layers, heads, max_positions,
    bos_id, eos_ids and pad_id. `tokenizer` is a transformers tokenizer, or None where prompts are token ids. `folder`
    is where the checkpoint was read from, if it was: steering vectors may lie beside the weights. `adapter` is what
    `with_adapter` or `with_adapters` put on top of the parameters.
    """

    module: nn.Module
    params: dict
    tokenizer: Any = None
    folder: Path | None = None
    adapter: Adapter | AdapterStack | None = None

    @property
    def config(self):
        return self.module.config

    @property
    def dtype(self):
        """The dtype of the parameters, which is that of activations and cache."""
        return jax.tree.leaves(self.params)[0].dtype

    @property
    def variables(self) -> dict[str, Any]:
        """What `module.apply` takes: the parameters, and the adapters' collections if there are any."""
        return {"params": self.params} | ({} if self.adapter is None else self.adapter.variables)

    def with_adapter(self, adapter: Adapter | None) -> "LanguageModel":
        """The same model under one adapter in every row; None takes adapters off.

        Raises ValueError, with all that is wrong, for an adapter of another model.
        """
        if adapter is not None and not isinstance(adapter, Adapter):
            raise ValueError(f"adapter is a {type(adapter).__name__}, wanted an Adapter, or with_adapters for several")
        return self._carrying(adapter)

    def with_adapters(self, adapters: Mapping[str, Adapter]) -> "LanguageModel":
        """The same model carrying adapters by name; a row chooses by `packs=use_adapter(name)`, without it is the base.

        Raises ValueError, with all that is wrong, for none or for those of another model.
        """
        for adapter in adapters.values():
            self.with_adapter(adapter)
        return self._carrying(adapter_stack.stack(adapters))

    def _carrying(self, adapter: Adapter | AdapterStack | None) -> "LanguageModel":
        if adapter is not None:
            adapters.check(self.module, adapter.weights)
        new = dataclasses.replace(self, adapter=adapter)
        new.__dict__["base"] = self.base  # one object for all, with what was once found out about it
        return new

    @functools.cached_property
    def base(self) -> "LanguageModel":
        """The model without adapters."""
        return self if self.adapter is None else dataclasses.replace(self, adapter=None)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Of what `with_adapters` was given."""
        return self.adapter.names if isinstance(self.adapter, AdapterStack) else ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the SHA-256 of config, weights and adapters: what is found in a model is kept under it.

        Where the weights lie, whether layers are stacked, and the dtype that their checkpoint was written in, don't
        matter; what they hold does.
        """
        if self.adapter is not None:
            digest = hashlib.sha256(f"{self.base.fingerprint} {self.adapter_names}".encode())
            _add_leaves(digest, self.adapter.variables)
            return digest.hexdigest()[:16]
        digest = hashlib.sha256()
        config = dataclasses.asdict(self.config)
        config.pop("dtype", None)
        digest.update(repr(sorted(config.items())).encode())
        _add_leaves(digest, _unstacked(self.params))
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


def _unstacked(params: dict) -> dict:
    """The tree with one subtree a layer; where layers are stacked, of functions that slice when they are called."""
    if "layers" not in params:
        return params
    layers = len(jax.tree.leaves(params["layers"])[0])

    def of_layer(i):
        return jax.tree.map(lambda leaf: functools.partial(leaf.__getitem__, i), params["layers"])

    rest = {name: tree for name, tree in params.items() if name != "layers"}
    return rest | {f"layers_{i}": of_layer(i) for i in range(layers)}


def _add_leaves(digest, tree: dict) -> None:
    """Adds path, shape, dtype and bytes of every leaf to a hash, with one leaf at a time in memory."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = leaf() if callable(leaf) else leaf
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
