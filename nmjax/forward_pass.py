"""One pass over whole prompts: logits and any activation, under per-row interventions."""

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from nmjax.interventions.compose import as_rows
from nmjax.interventions.effect import static
from nmjax.interventions.sites import ACTIVATIONS, SITES, act
from nmjax.lm import LanguageModel
from nmjax.rows import Rows, bucket, check_context, encode_all, make_rows, notes, prefaced, row_keys


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
    interventions = as_rows(packs, len(ids))
    whole, spans = prefaced(lm, ids, interventions)
    check_context(lm, [len(row) for row in whole], [0] * len(ids), "more")
    width = bucket(max(map(len, whole)))
    rows = make_rows(lm, whole, spans, interventions, width, row_keys(seed, row_ids, len(ids)))
    sites = (capture,) if isinstance(capture, str) else tuple(capture)
    result = _forward(lm.module, sites, len(ids), lm.variables, rows)
    # The bucket's own padding is ours, not the caller's; nor does a hidden preface show.
    result = _cut_prefaces(result, spans, width, rows.mask) if rows.preface is not None else result
    result = _trim(result, width - max(map(len, ids)))
    return result.replace(notes=tuple(notes(interventions)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(module, capture: tuple[str, ...], asked_for: int, variables, rows: Rows) -> ForwardResult:
    ctx, variables = rows.context(), rows.adapted(variables)
    hidden, state = module.apply(
        variables, rows.tokens, ctx=ctx, effects=rows.effects, mutable=[ACTIVATIONS] if capture else []
    )
    logits = module.apply(variables, hidden, method="unembed")
    zeros = jnp.zeros((logits.shape[0], logits.shape[2]), jnp.int32)
    last = ctx.replace(counts=zeros, rivals=rows.rivals(logits[:, -1]))
    result = ForwardResult(
        logits=logits,
        next_logits=act("logits", logits[:, -1], last, rows.effects),
        mask=jnp.asarray(rows.mask),
        activations={site: gather(state[ACTIVATIONS], site) for site in capture},
    )
    return _map(result, "B", lambda x, axis: jax.lax.slice_in_dim(x, 0, asked_for, axis=axis))


def gather(sown: dict, site: str):
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


def _map(result: ForwardResult, letters: str, fn) -> ForwardResult:
    """`fn(x, axis)` on every array, for each of its axes that one of the letters names (T for S: here they are one)."""

    def on(shape, x):
        for axis, letter in enumerate(shape):
            if letter in letters:
                x = fn(x, axis)
        return x

    def captured(site):
        return (() if site == "embed" else ("L",)) + tuple(SITES[site][0].replace("S", "T").split())

    return result.replace(
        logits=on("BTV", result.logits),
        next_logits=on("BV", result.next_logits),
        mask=on("BT", result.mask),
        activations={site: on(captured(site), x) for site, x in result.activations.items()},
    )


def _trim(result: ForwardResult, spare: int) -> ForwardResult:
    """Without the first `spare` entries of every token axis."""
    return _map(result, "T", lambda x, axis: jax.lax.slice_in_dim(x, spare, x.shape[axis], axis=axis))


def _cut_prefaces(result: ForwardResult, spans, width: int, mask) -> ForwardResult:
    """Moves what stands before a row's preface up to what stands behind it, so that the preface's place is padding."""
    source = np.tile(np.arange(width), (len(spans), 1))
    visible = np.array(mask[: len(spans)])
    for row, (start, length) in enumerate(spans):
        begin = width - int(visible[row].sum())  # the column of position 0
        source[row, begin + length : begin + length + start] = np.arange(begin, begin + start)
        visible[row, begin : begin + length] = False

    def move(x, axis):
        rows = 0 if axis == 1 else 1  # the B axis stands in front, or behind L
        index = source.reshape([len(spans) if a == rows else width if a == axis else 1 for a in range(x.ndim)])
        return jnp.take_along_axis(x, index, axis=axis)

    return _map(result, "T", move).replace(mask=jnp.asarray(visible))
