"""Induction heads: how well a model copies a block of random tokens that it sees a second time, and by which heads.

The score of a head is its mean attention, from the tokens of the second copy of the block, to the token that followed
the previous occurrence of the same token (Olsson et al. 2022, "In-context Learning and Induction Heads").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Induction:
    """`scores` float [L, N], between 0 and 1; `copy_accuracy`: share of the second copy's tokens predicted exactly.

    The second copy's first token follows the block's last one for the first time, so it is not counted.
    """

    scores: np.ndarray
    copy_accuracy: float
    block: int
    samples: int


def repeated_blocks(samples: int, block: int, ids: np.ndarray, seed: int = 0, first: int | None = None) -> np.ndarray:
    """Random blocks, each followed by itself: int32 [samples, (first) + 2 * block].

    Args:
        ids: token ids to draw from, uniformly.
        first: an id put in front of every row (BOS), or None.

    Raises:
        ValueError: if `samples` is below 1, or `block` below 2.
    """
    if samples < 1 or block < 2:
        raise ValueError(f"samples must be 1 or more and block 2 or more, got {samples} and {block}")
    tiles = np.random.default_rng(seed).choice(np.asarray(ids), (samples, block))
    rows = np.concatenate([tiles, tiles], axis=1)
    if first is not None:
        rows = np.concatenate([np.full((samples, 1), first), rows], axis=1)
    return rows.astype(np.int32)


def induction_scores(pattern: np.ndarray, block: int) -> np.ndarray:
    """The score of every head, float [L, N].

    Args:
        pattern: attention after the softmax [L, B, N, T, S], T = S, of rows that end with a block and its repetition.
        block: tokens in the block; the last `2 * block` positions are the two copies.

    Raises:
        ValueError: if the rows are shorter than two blocks.
    """
    T = pattern.shape[-1]
    if 2 * block > T:
        raise ValueError(f"block must be at most half of the {T} positions, got {block}")
    queries = np.arange(T - block, T)
    return np.asarray(pattern, np.float64)[..., queries, queries - block + 1].mean(axis=(1, 3))


def copy_accuracy(logits: np.ndarray, tokens: np.ndarray, block: int) -> float:
    """Share of exact next-token predictions within the second copy: logits [B, T, V], tokens int [B, T]."""
    predicted = np.asarray(logits)[:, -block:-1].argmax(axis=-1)
    return float((predicted == np.asarray(tokens)[:, -block + 1 :]).mean())
