"""Documents as one stream of tokens, its chunks, and seeded batches of them by step.

Chunks of L + 2 tokens follow each other at a distance of L, so with L tokens of context every token is the next-token
target once an epoch and the target after that once, and a model that needs L + 1 tokens reads the same chunks.
R seeds, B rows, L tokens of context.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

_DOCUMENTS_AT_ONCE = 1000


def token_stream(tokenizer: Any, documents: Sequence[str]) -> np.ndarray:
    """int32 [n]: the tokens of every document, each followed by the tokenizer's end-of-text token.

    That token stands nowhere else: a document which spells it out gets the tokens of its letters.

    Args:
        tokenizer: of transformers.

    Raises:
        ValueError: without documents, or if the tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"tokenizer must have an eos_token to end documents with, got {tokenizer.eos_token}")
    if not documents:
        raise ValueError("documents must hold one text or more, got none")
    parts = []
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        encoded = tokenizer(
            list(documents[start : start + _DOCUMENTS_AT_ONCE]),
            add_special_tokens=False,
            split_special_tokens=True,
            verbose=False,  # about documents longer than a model's context: they are cut into chunks
        )
        parts += [np.array([*ids, end], np.int32) for ids in encoded["input_ids"]]
    return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class Chunks:
    """`chunks[i]` is int32 [L + 2], `stream[i * L : i * L + L + 2]`; a source for Grain.

    Of n tokens (n - 2) // L chunks are made, so fewer than L at the end of the stream are no target.

    Attributes:
        stream: int32 [n].
        context: L.

    Raises:
        ValueError: if `context` is below 1, or the stream is too short for a chunk.
    """

    stream: np.ndarray
    context: int

    def __post_init__(self):
        if self.context < 1:
            raise ValueError(f"context must be 1 or more, got {self.context}")
        if len(self.stream) < self.context + 2:
            wanted = f"{self.context + 2} or more for context={self.context}"
            raise ValueError(f"stream must have {wanted}, got {len(self.stream)} tokens")

    def __len__(self) -> int:
        return (len(self.stream) - 2) // self.context

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be 0 to {len(self) - 1}, got {index}")
        start = index * self.context
        return self.stream[start : start + self.context + 2]


def batches(chunks: Chunks, batch_size: int, seeds: int | Sequence[int]) -> grain.MapDataset:
    """Training batches by step, without end: `{"tokens": int32 [R, B, L + 2]}`, or `[B, L + 2]` for one int.

    Every epoch goes through all chunks in an order of its own; a batch may hold the end of one and the beginning of the
    next. A seed's order depends on nothing but the seed, so its batches are the same alone and among others.

    An iterator's state is the step. `.to_iter_dataset()` reads 500 batches ahead if it isn't given other `ReadOptions`.

    Args:
        batch_size: B, at most the number of chunks.
        seeds: R of them, each 0 or more.

    Raises:
        ValueError: for no seed or one below 0, a `batch_size` below 1, or too few chunks for one batch.
    """
    _check_batch_size(batch_size)
    if len(chunks) < batch_size:
        tokens = f"{batch_size * chunks.context + 2} tokens"
        raise ValueError(f"batch_size={batch_size} needs {tokens}, got {len(chunks.stream)} ({len(chunks)} chunks)")
    several = [seeds] if isinstance(seeds, int) else list(seeds)
    if not several or min(several) < 0:
        raise ValueError(f"seeds must be one or more numbers from 0, got {seeds}")
    # `.seed` hashes the seed before `.shuffle` adds the epoch to it: epoch 1 of seed 42 is not epoch 0 of seed 43.
    endless = [grain.MapDataset.source(chunks).seed(seed).shuffle().repeat().batch(batch_size) for seed in several]
    if isinstance(seeds, int):
        return endless[0].map(lambda tokens: {"tokens": tokens})
    return grain.experimental.ZipMapDataset(endless).map(lambda rows: {"tokens": np.stack(rows)})


def held_out_batches(chunks: Chunks, batch_size: int) -> grain.MapDataset:
    """All chunks once, in order: `{"tokens": int32 [B, L + 2], "weights": float32 [B, L]}`.

    The weights are 1; the last batch is filled up with rows of zeros whose weights are 0. A mean over all tokens is the
    sum of weighted losses over the sum of weights, not the mean of the batches' means.

    Raises ValueError for a `batch_size` below 1.
    """
    _check_batch_size(batch_size)
    ones = np.ones(chunks.context, np.float32)
    rows = grain.MapDataset.source(chunks).map(lambda tokens: {"tokens": tokens, "weights": ones})
    fill = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return rows.batch(batch_size, batch_fn=fill)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
