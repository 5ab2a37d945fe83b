"""Induction heads: how well a model copies a block of random tokens that it sees a second time, and by which heads.

The score of a head is its mean attention, from the tokens of the second copy of the block, to the token that followed
the previous occurrence of the same token (Olsson et al. 2022, "In-context Learning and Induction Heads").

`find_heads` measures a model and selects heads; `induction_heads` gives the selection alone and remembers it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.forward_pass import gather
from nmjax.interventions.effect import plain_context
from nmjax.interventions.sites import ACTIVATIONS
from nmjax.interventions.where import ON_EMPTY
from nmjax.lm import LanguageModel
from nmjax.paths import user_cache
from nmjax.report.results import content_hash, load_json, write_json
from nmjax.rows import check_context, rows_that_fit

BLOCK = 50
LEAST_SAMPLES = 16
METHODS = ("repeat", "prompt")
PROMPT = " A B C D E F A"  # with a leading space, so that both A's are one and the same token
PERMUTATIONS = 1000
NULL_QUANTILE = 0.999
_SCHEMA = 1  # of what is kept on disk; a change of what the numbers mean changes it


@dataclass(frozen=True)
class InductionHeads:
    """What was found in a model; scores are mean attention weights, float [L, N], between 0 and 1.

    `null` is the 99.9% quantile, over heads and permutations, of the score that a head gets where queries and targets
    are paired at random; a selected head is above both it and `threshold`. With method="prompt" there is neither.
    """

    induction: np.ndarray  # to the token after the previous occurrence
    previous: np.ndarray  # to the token before the query
    duplicate: np.ndarray  # to the previous occurrence itself
    mask: np.ndarray  # bool [L, N], the selected heads
    threshold: float | None
    null: float | None
    copy_accuracy: float  # share of exact predictions in the second copy
    block: int  # tokens
    samples: int
    seed: int
    method: str
    fallback: bool = False  # True where no head passed and `mask` holds the middle heads instead

    @property
    def heads(self) -> list[tuple[int, int]]:
        """(layer, head) of the selected heads, best first."""
        chosen = np.argwhere(self.mask)
        order = np.argsort(-self.induction[self.mask], kind="stable")
        return [(int(layer), int(head)) for layer, head in chosen[order]]


# --- Scores by hand ---------------------------------------------------------------------------------------------------


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
    return offset_scores(pattern, block, block - 1)


def offset_scores(pattern: np.ndarray, block: int, offset: int) -> np.ndarray:
    """Mean attention from the second copy's queries to the key `offset` tokens before each, float [L, N].

    An offset of `block - 1` is induction, `block` the previous occurrence, 1 the previous token. Arguments and errors
    as in `induction_scores`.
    """
    T = pattern.shape[-1]
    if 2 * block > T:
        raise ValueError(f"block must be at most half of the {T} positions, got {block}")
    queries = np.arange(T - block, T)
    return np.asarray(pattern, np.float64)[..., queries, queries - offset].mean(axis=(1, 3))


def copy_accuracy(logits: np.ndarray, tokens: np.ndarray, block: int) -> float:
    """Share of exact next-token predictions within the second copy: logits [B, T, V], tokens int [B, T].

    The second copy's first token follows the block's last one for the first time, so it is not counted.
    """
    predicted = np.asarray(logits)[:, -block:-1].argmax(axis=-1)
    return float((predicted == np.asarray(tokens)[:, -block + 1 :]).mean())


def null_scores(attention: np.ndarray, seed: int = 0, permutations: int = PERMUTATIONS) -> np.ndarray:
    """Scores that heads get where every query is paired with another query's target: float [R, L, N].

    Queries and targets stay the same and only their pairing is permuted, never a query with its own target; so a head
    that attends broadly, or by distance, scores here as it does in earnest, and one that matches tokens does not.

    Args:
      attention: [L, N, n, n], mean attention over samples from query i to the target of query j.
    """
    n = attention.shape[-1]
    rng = np.random.default_rng(seed)
    found = np.empty((permutations, *attention.shape[:2]))
    for k in range(permutations):
        order = rng.permutation(n)
        while (order == np.arange(n)).any():  # one in e permutations has no fixed point
            order = rng.permutation(n)
        found[k] = attention[..., np.arange(n), order].mean(axis=-1)
    return found


# --- Measuring a model ------------------------------------------------------------------------------------------------


def find_heads(
    lm: LanguageModel,
    block: int | None = None,
    samples: int = 32,
    threshold: float = 0.4,
    seed: int = 0,
    method: str = "repeat",
    on_empty: str = "error",
    progress: Callable[[int], None] | None = None,
) -> InductionHeads:
    """The induction heads of a model without interventions, over all layers.

    Args:
      block: tokens of the repeated block; None = `default_block(lm)`. Only for method="repeat".
      samples: rows of random tokens, at least 16.
      threshold: selected heads score above it, and above the null distribution's 99.9% quantile.
      method: "repeat", as above; "prompt", the published probe: attention in the text " A B C D E F A", from the
        second A to what followed the first, by which the best fifth of every layer's heads (at least 2) are taken
        whatever they score. It finds heads in any model, trained or not; use it to compare with published work only.
      on_empty: where no head passes, "error" raises, "none" selects none, "middle" selects the two middle heads of
        every layer (N/2 - 1 and N/2), which published work falls back to.
      progress: called after each batch with the number of rows in it.
    Raises:
      ValueError: a bad argument, rows beyond the model's context, or no head with on_empty="error".
    """
    if on_empty not in ON_EMPTY:
        raise ValueError(f"on_empty={on_empty!r}, wanted one of {ON_EMPTY}")
    return _when_empty(_measured(lm, block, samples, threshold, seed, method, progress), on_empty)


def induction_heads(
    lm: LanguageModel,
    on_empty: str = "error",
    block: int | None = None,
    samples: int = 32,
    threshold: float = 0.4,
    seed: int = 0,
    method: str = "repeat",
) -> np.ndarray:
    """The selection of `find_heads`, bool [L, N], found once and then remembered.

    It is kept with the model object, and on disk in the user's caches under the model's fingerprint
    (`NMJAX_CACHE=off` leaves the disk alone). Under an adapter they are the base's, so that a pack is the same
    intervention on both. Arguments and errors as in `find_heads`.
    """
    lm = lm.base
    if on_empty not in ON_EMPTY:
        raise ValueError(f"on_empty={on_empty!r}, wanted one of {ON_EMPTY}")
    block = default_block(lm) if block is None else block
    arguments = {"block": block, "samples": samples, "threshold": threshold, "seed": seed, "method": method}
    key = content_hash(arguments)
    remembered: dict[str, InductionHeads] = lm.__dict__.setdefault("_induction_heads", {})
    if key not in remembered:
        path = _cache_file(lm, key)
        found = _read(path) if path else None
        if found is None:
            found = _measured(lm, **arguments)
            _keep(path, found)
        remembered[key] = found
    return _when_empty(remembered[key], on_empty).mask.copy()


def default_block(lm: LanguageModel) -> int:
    """50, unless a `scores.json` beside the weights has an `induction_block`: the lengths a small model learned."""
    path = None if lm.folder is None else Path(lm.folder) / "scores.json"
    scores = load_json(path) if path is not None and path.is_file() else None
    said = scores.get("induction_block") if isinstance(scores, dict) else None
    return said if isinstance(said, int) else BLOCK


def random_rows(lm: LanguageModel, samples: int, block: int, seed: int = 0) -> np.ndarray:
    """Rows of a random block and its repetition for this model: int32 [samples, (BOS) + 2 * block].

    Ordinary tokens only; BOS is in front where the tokenizer, or without one the configuration, puts it.
    """
    c, tokenizer = lm.config, lm.tokenizer
    special = {c.bos_id, c.pad_id, *c.eos_ids}
    vocab, first = c.vocab, c.bos_id
    if tokenizer is not None:
        special |= set(tokenizer.all_special_ids)
        vocab = min(vocab, len(tokenizer))  # embeddings are often padded
        first = c.bos_id if lm.encode("a")[0] == c.bos_id else None
    ids = np.setdiff1d(np.arange(vocab), [t for t in special if t is not None])
    return repeated_blocks(samples, block, ids, seed, first)


def _measured(lm, block, samples, threshold, seed, method, progress=None) -> InductionHeads:
    if method not in METHODS:
        raise ValueError(f"method={method!r}, wanted one of {METHODS}")
    if method == "prompt":
        return _measured_by_prompt(lm, seed)
    block = default_block(lm) if block is None else block
    for name, value, least in (("block", block, 4), ("samples", samples, LEAST_SAMPLES)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}={value!r}, wanted an integer >= {least}")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold!r}, wanted a number from 0 to 1")
    rows = random_rows(lm, samples, block, seed)
    T = rows.shape[1]
    check_context(lm, [T], [0], "more")
    size = min(samples, 8, rows_that_fit(lm, T))
    sums: Any = None
    for start in range(0, samples, size):
        part = rows[start : start + size]
        counted = np.arange(size) < len(part)
        part = np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)])
        found = jax.device_get(_attention(lm.module, block, lm.variables, part, counted))
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
        if progress is not None:
            progress(int(counted.sum()))
    copies, previous, hits = sums
    copies, previous = copies / samples, previous / samples  # [L, N, n, n + 1], [L, N]
    at = np.arange(block)
    induction, duplicate = copies[..., at, at + 1].mean(-1), copies[..., at, at].mean(-1)
    null = float(np.quantile(null_scores(copies[..., 1:], seed), NULL_QUANTILE))
    return InductionHeads(
        induction=induction,
        previous=previous,
        duplicate=duplicate,
        mask=induction > max(threshold, null),
        threshold=float(threshold),
        null=null,
        copy_accuracy=float(hits / (samples * (block - 1))),
        block=int(block),
        samples=int(samples),
        seed=seed,
        method=method,
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attention(module, block: int, variables, tokens, counted):
    """Sums over the rows that count: attention from the second copy to the first and one token more, float32
    [L, N, n, n + 1]; to the previous token [L, N]; and exact predictions within the second copy [].
    """
    ctx = plain_context(tokens)
    hidden, state = module.apply(variables, tokens, ctx=ctx, effects=(), mutable=[ACTIVATIONS])
    pattern = gather(state[ACTIVATIONS], "pattern")  # [L, B, N, T, T]
    T = tokens.shape[1]
    queries = jnp.arange(T - block, T)
    rows = jnp.where(counted[:, None, None, None], pattern[..., T - block :, :].astype(jnp.float32), 0).sum(axis=1)
    copies = rows[..., T - 2 * block : T - block + 1]
    previous = rows[..., jnp.arange(block), queries - 1].mean(axis=-1)
    logits = module.apply(variables, hidden[:, -block:-1], method="unembed")
    hits = (logits.argmax(axis=-1) == tokens[:, -block + 1 :]) & counted[:, None]
    return copies, previous, hits.sum()


def _measured_by_prompt(lm: LanguageModel, seed: int) -> InductionHeads:
    ids = lm.encode(PROMPT, "method='prompt'")
    first = next((k for k, token in enumerate(ids) if token in ids[k + 1 :]), None)
    if first is None:
        raise ValueError(f"method='prompt': no token of {PROMPT!r} occurs twice for this tokenizer: {ids}")
    second = ids.index(ids[first], first + 1)
    pattern, predicted = jax.device_get(_whole_pattern(lm.module, lm.variables, np.asarray([ids], np.int32)))
    row = pattern[:, 0, :, second].astype(np.float64)  # [L, N, S]
    induction = row[..., first + 1]
    L, N = induction.shape
    best = np.argsort(-induction, axis=1, kind="stable")[:, : max(2, int(0.2 * N))]
    mask = np.zeros((L, N), bool)
    np.put_along_axis(mask, best, True, axis=1)
    return InductionHeads(
        induction=induction,
        previous=row[..., second - 1],
        duplicate=row[..., first],
        mask=mask,
        threshold=None,
        null=None,
        copy_accuracy=float(predicted[0, second] == ids[first + 1]),
        block=second - first,
        samples=1,
        seed=seed,
        method="prompt",
    )


@functools.partial(jax.jit, static_argnums=0)
def _whole_pattern(module, variables, tokens):
    """Attention [L, B, N, T, T] and the likeliest next tokens [B, T]."""
    ctx = plain_context(tokens)
    hidden, state = module.apply(variables, tokens, ctx=ctx, effects=(), mutable=[ACTIVATIONS])
    logits = module.apply(variables, hidden, method="unembed")
    return gather(state[ACTIVATIONS], "pattern"), logits.argmax(axis=-1)


def _when_empty(found: InductionHeads, on_empty: str) -> InductionHeads:
    if found.mask.any() or on_empty == "none":
        return found
    if on_empty == "error":
        layer, head = np.unravel_index(found.induction.argmax(), found.induction.shape)
        raise ValueError(
            f"no induction head: the best, head {head} of layer {layer}, scores {found.induction[layer, head]:.3f} on "
            f"{found.samples} repeated blocks of {found.block} tokens, wanted more than "
            f"{max(found.threshold or 0, found.null or 0):.3f}; a shorter block, a lower threshold, or "
            "on_empty='middle' or 'none' may be what you want"
        )
    N = found.mask.shape[1]
    mask = np.zeros_like(found.mask)
    mask[:, [max(N // 2 - 1, 0), N // 2]] = True
    return dataclasses.replace(found, mask=mask, fallback=True)


# --- Remembering ------------------------------------------------------------------------------------------------------


def _cache_file(lm: LanguageModel, key: str) -> Path | None:
    if os.environ.get("NMJAX_CACHE", "").lower() == "off":
        return None
    return user_cache() / "induction" / lm.fingerprint / f"{key[:16]}.json"


def _read(path: Path) -> InductionHeads | None:
    """What a file holds; None where there is none, or not one that this version wrote."""
    try:
        stored = load_json(path)
        if stored["schema"] != _SCHEMA:
            return None
        fields: dict[str, Any] = {k: np.asarray(v) if isinstance(v, list) else v for k, v in stored["found"].items()}
        return InductionHeads(**fields)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path | None, found: InductionHeads) -> None:
    if path is None:
        return
    try:
        write_json(path, {"schema": _SCHEMA, "found": found})
    except OSError as error:
        warnings.warn(f"induction heads are not kept between runs: {path} cannot be written ({error})", stacklevel=3)
