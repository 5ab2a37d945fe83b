"""Prefixes that several prompts share (worked examples, a text that is read again), run once, then read from cache.

    bank     [_ p p p]            one row for each prefix and distinct intervention
    batch    [_ p p p|_ q q q]    every row copies its row of the bank and adds its own tokens behind

Positions, masks and effects read `k_pos` alone, so a row scores the same with and without the bank.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from nmjax.interventions.compose import Intervention, as_intervention
from nmjax.interventions.draws import Drawing
from nmjax.interventions.effect import Context, Effect
from nmjax.interventions.sampler import Contrast
from nmjax.lm import LanguageModel
from nmjax.rows import Rows, check_context, encode_all, make_rows, prefaced, row_keys


class PrefixCache(flax.struct.PyTreeNode):
    """The arrays of a bank of U rows."""

    cache: list  # per layer {"k", "v"} [U, K, S, H]
    k_pos: jax.Array  # int32 [U, S], -1 = empty


class Behind(flax.struct.PyTreeNode):
    """Where the rows of a batch find what they stand behind."""

    bank: PrefixCache
    row: np.ndarray  # int32 [B], into the bank
    length: np.ndarray  # int32 [B], tokens of the prefix, a hidden preface included

    def start(self, rows: Rows) -> tuple[Context, list]:
        """The context of a pass over `rows.tokens` behind the prefix, and a cache with room for them."""
        T, S = rows.tokens.shape[1], self.bank.k_pos.shape[1]
        own = rows.context()
        q_pos = jnp.where(own.q_pos >= 0, own.q_pos + self.length[:, None], -1)
        k_pos = jnp.concatenate([self.bank.k_pos[self.row], q_pos], axis=1)

        def longer(leaf):
            return jnp.pad(leaf[self.row], ((0, 0), (0, 0), (0, T), (0, 0)))

        return own.replace(q_pos=q_pos, k_pos=k_pos, slot=S), jax.tree.map(longer, self.bank.cache)


@dataclasses.dataclass(frozen=True)
class SharedPrefix:
    """What `share_prefix` returns; pass it to `score_choices(prefix=...)` or `continuation_logprobs`."""

    bank: PrefixCache
    places: dict[tuple[str, tuple[int, ...]], int]  # an intervention's content hash and a prefix -> row of the bank
    rivals: np.ndarray  # int32 [U]: the row that a contrast sets a row against, mostly itself
    lengths: np.ndarray  # int32 [U], tokens with a hidden preface

    def find(self, prompts: Sequence[Sequence[int]], interventions: Sequence[Intervention]) -> np.ndarray:
        """int32 [B]: the row of the bank that each prompt (ids without a preface) begins with, the longest such.

        Raises ValueError for a prompt that begins with no prefix or has no token more, or an unknown intervention.
        """
        hashes = {id(iv): iv.content_hash() for iv in {id(iv): iv for iv in interventions}.values()}
        known, sizes = {name for name, _ in self.places}, sorted({len(ids) for _, ids in self.places}, reverse=True)
        found = []
        for i, (prompt, iv) in enumerate(zip(prompts, interventions, strict=True)):
            name = hashes[id(iv)]
            if name not in known:
                raise ValueError(f"packs: the prefix was not run under {iv.name or iv!r}, wanted it in share_prefix")
            keys = ((name, tuple(prompt[:size])) for size in sizes if size < len(prompt))
            at = next((self.places[key] for key in keys if key in self.places), None)
            if at is None:
                raise ValueError(
                    f"prompts[{i}] begins with the tokens {list(prompt[: sizes[0] + 1])}, wanted a prefix that was run "
                    "and at least one token more"
                )
            found.append(at)
        return np.asarray(found, np.int32)

    def behind(self, found: np.ndarray, rows: Rows) -> Behind:
        """Where each row of a batch continues, given what `find` found for the rows that were asked for."""
        if rows.owner is not None:  # hidden rows follow, each contrasted with its owner
            found = np.concatenate([found, self.rivals[found[rows.owner[len(found) :]]]])
        return Behind(self.bank, found, self.lengths[found])


def can_share(part: Effect | Intervention | None) -> bool:
    """Whether a prefix under this intervention is the same in every row: nothing is drawn, nothing acts in places only.

    Noise has a stream of its own in every row, and a selection of positions may count from the end of a row's prompt.
    """
    effects = as_intervention(part).effects
    return all(
        effect.where is None
        and not isinstance(effect, Drawing)
        and (not isinstance(effect, Contrast) or can_share(effect.against))
        for effect in effects
    )


def share_prefix(
    lm: LanguageModel, prefixes: Sequence[Sequence[int]], packs: Sequence, width: int | None = None
) -> SharedPrefix:
    """Runs every prefix once for each distinct intervention.

    Args:
      prefixes: token ids, special tokens at their beginnings included. One that is given twice is run twice: so many
        prefixes are one program, whatever they are.
      packs: the interventions that will be asked for; None, an effect, or an intervention each.
      width: padded length; None = that of the longest (prefix and hidden preface).
    Raises:
      ValueError: no ids, an intervention whose prefix differs from row to row (see `can_share`), or a `width` below
        what is needed.
    """
    distinct: dict[str, Intervention] = {}
    for i, pack in enumerate(packs):
        iv = as_intervention(pack, f"packs[{i}]")
        if not can_share(iv):
            raise ValueError(
                f"packs[{i}]{f' ({iv.name})' if iv.name else ''} draws noise or acts in places only, so its prefix is "
                "another one in every row; wanted packs without, or no shared prefix"
            )
        distinct.setdefault(iv.content_hash(), iv)
    ids = encode_all(lm, list(prefixes), "prefixes")
    keys = [(name, tuple(row)) for name in distinct for row in ids]
    interventions = [distinct[name] for name, _ in keys]
    whole, spans = prefaced(lm, [list(ids) for _, ids in keys], interventions)
    check_context(lm, [len(row) for row in whole], [1] * len(whole), "token behind the prefix")
    needed = max(map(len, whole))
    if width is not None and width < needed:
        raise ValueError(f"width={width}, wanted at least {needed}, the longest prefix with its preface")
    rows = make_rows(lm, whole, spans, interventions, width or needed, row_keys(0, None, len(whole)))
    return SharedPrefix(
        bank=_fill(lm.module, lm.variables, rows),
        places={key: i for i, key in enumerate(keys)},
        rivals=np.arange(len(whole), dtype=np.int32) if rows.rival is None else rows.rival,
        lengths=rows.mask.sum(1).astype(np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def _fill(module, variables, rows: Rows) -> PrefixCache:
    ctx, variables = rows.context(), rows.adapted(variables)
    cache = module.init_cache(*rows.tokens.shape, jax.tree.leaves(variables["params"])[0].dtype)
    _, cache = module.apply(variables, rows.tokens, ctx=ctx, effects=rows.effects, cache=cache)
    return PrefixCache(cache=cache, k_pos=ctx.k_pos)
