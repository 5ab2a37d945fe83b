"""A prefix that many prompts share (worked examples, a system message), run once an intervention, then read from cache.

    bank     [_ p p p]            one row for each distinct intervention
    batch    [_ p p p|_ q q q]    every row copies its intervention's row of the bank and adds its own tokens behind

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
from nmjax.rows import Rows, check_context, make_rows, prefaced, row_keys


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
    """What `share_prefix` returns; pass it to `score_choices(prefix=...)`."""

    ids: tuple[int, ...]  # without a preface
    bank: PrefixCache
    places: dict[str, int]  # an intervention's content hash -> its row of the bank
    rivals: np.ndarray  # int32 [U]: the row that a contrast sets a row against, mostly itself
    lengths: np.ndarray  # int32 [U]

    def check(self, stems: Sequence[Sequence[int]], interventions: Sequence[Intervention]) -> None:
        """Raises ValueError for a prompt (without a preface) that doesn't begin with the prefix, or a new pack."""
        for i, stem in enumerate(stems):
            if tuple(stem[: len(self.ids)]) != self.ids or len(stem) == len(self.ids):
                raise ValueError(
                    f"prompts[{i}] begins with the tokens {list(stem[: len(self.ids) + 1])}, wanted the prefix "
                    f"{list(self.ids)} and at least one token more"
                )
        for iv in {id(iv): iv for iv in interventions}.values():
            if iv.content_hash() not in self.places:
                raise ValueError(f"packs: the prefix was not run under {iv.name or iv!r}, wanted it in share_prefix")

    def behind(self, interventions: Sequence[Intervention], rows: Rows) -> Behind:
        """Where each row of a batch continues, the hidden ones behind `interventions` included."""
        place = {id(iv): self.places[iv.content_hash()] for iv in {id(iv): iv for iv in interventions}.values()}
        at = np.asarray([place[id(iv)] for iv in interventions], np.int32)
        if rows.owner is not None:  # hidden rows follow, each contrasted with its owner
            at = np.concatenate([at, self.rivals[at[rows.owner[len(at) :]]]])
        return Behind(self.bank, at, self.lengths[at])


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


def share_prefix(lm: LanguageModel, ids: Sequence[int], packs: Sequence, width: int | None = None) -> SharedPrefix:
    """Runs a prefix once for each distinct intervention.

    Args:
      ids: the prefix's token ids, special tokens at its beginning included.
      packs: the interventions that will be asked for; None, an effect, or an intervention each.
      width: padded length; None = that of the longest (prefix and hidden preface).
    Raises:
      ValueError: no ids, an intervention whose prefix differs from row to row (see `can_share`), or a `width` below
        what is needed.
    """
    ids = lm.encode(list(ids), "ids")
    distinct: dict[str, Intervention] = {}
    for i, pack in enumerate(packs):
        iv = as_intervention(pack, f"packs[{i}]")
        if not can_share(iv):
            raise ValueError(
                f"packs[{i}]{f' ({iv.name})' if iv.name else ''} draws noise or acts in places only, so its prefix is "
                "another one in every row; wanted packs without, or no shared prefix"
            )
        distinct.setdefault(iv.content_hash(), iv)
    interventions = list(distinct.values())
    whole, spans = prefaced(lm, [ids] * len(interventions), interventions)
    check_context(lm, [len(row) for row in whole], [1] * len(whole), "token behind the prefix")
    needed = max(map(len, whole))
    if width is not None and width < needed:
        raise ValueError(f"width={width}, wanted at least {needed}, the prefix with its preface")
    rows = make_rows(lm, whole, spans, interventions, width or needed, row_keys(0, None, len(whole)))
    rivals = np.arange(len(whole), dtype=np.int32) if rows.rival is None else rows.rival
    return SharedPrefix(
        ids=tuple(ids),
        bank=_fill(lm.module, lm.params, rows),
        places={name: i for i, name in enumerate(distinct)},
        rivals=rivals,
        lengths=rows.mask.sum(1).astype(np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def _fill(module, params, rows: Rows) -> PrefixCache:
    ctx = rows.context()
    cache = module.init_cache(*rows.tokens.shape, jax.tree.leaves(params)[0].dtype)
    _, cache = module.apply({"params": params}, rows.tokens, ctx=ctx, effects=rows.effects, cache=cache)
    return PrefixCache(cache=cache, k_pos=ctx.k_pos)
