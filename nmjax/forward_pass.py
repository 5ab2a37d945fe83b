"""One pass over whole prompts: logits and any activation, under per-row interventions."""

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from nmjax.interventions.compose import as_rows
from nmjax.interventions.effect import plain_context, static
from nmjax.interventions.sites import ACTIVATIONS, SITES, act
from nmjax.lm import LanguageModel
from nmjax.rows import Rows, bucket, check_context, encode_all, make_rows, notes, row_keys


class ForwardResult(flax.struct.PyTreeNode):
    """Left-padded to the longest prompt: the last column is every row's last token."""

    logits: jax.Array  # float32 [B, T, V], after the effects inside the network, before the `logits` site
    next_logits: jax.Array  # float32 [B, V] at the last position, after the `logits` site too
    mask: jax.Array  # bool [B, T], True at real tokens
    activations: dict[str, jax.Array]  # captured sites, after their effects; [L, B, ...], `embed` [B, T, D]
    notes: tuple[str, ...] = static(default=())  # doses beyond 1 and clamped values


def forward(lm: LanguageModel, prompts, packs=None, capture: Sequence[str] = (), seed=0, row_ids=None) -> ForwardResult:
    """Runs the model once over every prompt.

    Args:
      prompts: a list of texts or of token id lists.
      packs: one intervention for all rows, or a list with one (or None) a row.
      capture: names of sites (see `interventions.sites.SITES`, all but `logits`).
    Raises:
      ValueError: bad input; the message names the argument, the value seen and the value wanted.
    """
    for site in [capture] if isinstance(capture, str) else capture:
        if site not in SITES or site == "logits":
            raise ValueError(f"capture={site!r}, wanted sites among {[s for s in SITES if s != 'logits']}")
    ids = encode_all(lm, prompts)
    lengths = [len(row) for row in ids]
    check_context(lm, lengths, [0] * len(ids), "more")
    interventions = as_rows(packs, len(ids))
    rows = make_rows(lm, ids, interventions, bucket(max(lengths)), row_keys(seed, row_ids, len(ids)))
    sites = (capture,) if isinstance(capture, str) else tuple(capture)
    result = _forward(lm.module, sites, lm.params, rows)
    # The bucket's own padding is ours, not the caller's.
    spare = rows.tokens.shape[1] - max(lengths)
    return _trim(result, spare).replace(notes=tuple(notes(interventions)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(module, capture: tuple[str, ...], params, rows: Rows) -> ForwardResult:
    ctx = plain_context(rows.tokens, rows.mask).replace(keys=rows.keys)
    hidden, state = module.apply(
        {"params": params}, rows.tokens, ctx=ctx, effects=rows.effects, mutable=[ACTIVATIONS] if capture else []
    )
    logits = module.apply({"params": params}, hidden, method="unembed")
    zeros = jnp.zeros((logits.shape[0], logits.shape[2]), jnp.int32)
    last = ctx.replace(counts=zeros)
    return ForwardResult(
        logits=logits,
        next_logits=act("logits", logits[:, -1], last, rows.effects),
        mask=jnp.asarray(rows.mask),
        activations={site: _gather(state[ACTIVATIONS], site) for site in capture},
    )


def _gather(sown: dict, site: str):
    """A site's values over all layers: [L, B, ...]; a site outside the blocks has none to stack."""
    name = f"at_{site}"
    if name in sown:
        return sown[name]
    found = {
        int(layer.removeprefix("layers_")): leaf
        for layer, tree in sown.items()
        if layer.startswith("layers_")
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if path[-1].key == name
    }
    return jnp.stack([found[layer] for layer in sorted(found)])


def _trim(result: ForwardResult, spare: int) -> ForwardResult:
    if not spare:
        return result

    def cut(site, x):
        """Drops the first `spare` entries of every token axis: T, and S, which here is T."""
        shape = (() if site == "embed" else ("L",)) + tuple(SITES[site][0].split())
        return x[tuple(slice(spare, None) if axis in "TS" else slice(None) for axis in shape)]

    return ForwardResult(
        logits=result.logits[:, spare:],
        next_logits=result.next_logits,
        mask=result.mask[:, spare:],
        activations={site: cut(site, x) for site, x in result.activations.items()},
    )
