"""Effects: what acts inside a model, as data.

An effect is a pytree. Its constructor holds what a person wrote (layer names, factors); `bind` resolves that against a
model into arrays; `batch` gives every row its own values. A dose, a seed or a layer set is therefore never part of the
compiled program, only of its inputs.

Methods named after sites (`sites.py`) say where an effect acts:

    class Louder(nmjax.Effect):
        gain: float

        def mlp_out(self, x, ctx):          # [B, T, D] -> the same shape
            return x * self.gain

A method is traced for one row (B = 1) and vectorised over the batch, so no effect can see a neighbour's row. A field
is whatever `bind` made of it with that row axis in front: a number arrives as [1], an array [L, D] as [1, L, D].
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from nmjax.interventions.sites import QUERY_AXIS, SITES
from nmjax.interventions.where import stack_where, where


class Context(flax.struct.PyTreeNode):
    """What an effect may know about the pass it acts in. B rows, T query tokens, S key slots.

    Positions count a row's own real tokens from 0, so padding, caching and batching never shift them.
    """

    q_pos: jax.Array  # int32 [B, T]; -1 at padding
    k_pos: jax.Array  # int32 [B, S]; -1 in an empty slot
    tokens: jax.Array  # int32 [B, T]
    prompt_len: jax.Array  # int32 [B]; a hidden preface counts
    slot: jax.Array | int = 0  # the first cache slot that this chunk is written to
    layer: jax.Array | None = None  # int32 [], traced: index arrays with it; None outside the blocks
    counts: jax.Array | None = None  # int32 [B, V], how often a token was generated; only at `logits`
    rivals: jax.Array | None = None  # float32 [B, V], logits of the row each is contrasted with; only at `logits`
    keys: jax.Array | None = None  # PRNG keys [B], one stream a row
    preface: jax.Array | None = None  # int32 [B, 2]: first position and length of a hidden preface
    detached: jax.Array | None = None  # bool [B, T]: tokens through whose keys and values no gradient flows

    @property
    def written(self) -> jax.Array:
        """int32 [B]: the number, from 0, of the generated token that the last query decides."""
        return self.q_pos[:, -1] + 1 - self.prompt_len

    @property
    def valid(self) -> jax.Array:
        """bool [B, S]: filled slots."""
        return self.k_pos >= 0


def plain_context(tokens, mask=None, prompt_len=None, preface=None) -> Context:
    """The context of a pass over whole rows without a cache, padded on either side; `mask` [B, T]: real tokens."""
    real = jnp.ones(tokens.shape, bool) if mask is None else mask
    positions = jnp.where(real, jnp.cumsum(real, axis=1) - 1, -1).astype(jnp.int32)
    length = real.sum(axis=1).astype(jnp.int32) if prompt_len is None else prompt_len
    return Context(q_pos=positions, k_pos=positions, tokens=tokens, prompt_len=length, preface=preface)


def shared(**kwargs) -> Any:
    """A field which all rows of a batch hold in common: it gets no row axis (a bank of vectors)."""
    return flax.struct.field(metadata={"shared": True}, **kwargs)


def static(**kwargs) -> Any:
    """A hashable field which is part of the program, not data: rows with different values get a slot each."""
    return flax.struct.field(pytree_node=False, **kwargs)


class Effect(flax.struct.PyTreeNode, kw_only=True):
    """Base class: subclass it, add fields, and define a method named after each site to act on.

    `dose` scales the change. Unless a class sets `blends = False` and uses `self.dose` itself, the dispatcher mixes:
    `(1 - dose) * x + dose * f(x)`, which is exact at 0 and 1 and has a derivative at 0.
    """

    dose: Any = np.float32(1)
    where: Any = None  # a where.Where; None = everywhere
    rows: Any = shared(default=None)  # int32 [K], set by `batch`: the rows it holds; None = all

    blends: ClassVar[bool] = True
    reads_counts: ClassVar[bool] = False  # needs ctx.counts
    truncates: ClassVar[bool] = False  # removes tokens from the distribution
    costly: ClassVar[bool] = False  # worth a detour around the rows of a batch that don't use it
    keeps_best: ClassVar[bool] = False  # never changes which token is likeliest, so it is inert under greedy decoding

    @classmethod
    def touches(cls, site: str) -> bool:
        return getattr(cls, site, None) is not None

    def at(self, dose) -> "Effect":
        """The same effect at `dose` times its present dose."""
        return self.replace(dose=self.dose * check_dose(dose))

    def on(self, **selection) -> "Effect":
        """The same effect at the tokens that `where.where(**selection)` selects; elsewhere it changes nothing."""
        return self.replace(where=where(**selection))

    def clamps(self) -> list[str]:
        """What the present dose would reach beyond the effect's legal range, in words; for an unbound effect."""
        return []

    def bind(self, lm) -> "Effect":
        """Resolves names against a model into arrays without a row axis; by default there are no names."""
        return self

    def joined(self, following: "Effect") -> "Effect | None":
        """One bound effect that does what this one and the one after it do; None if that takes both."""
        return None

    def neutral(self) -> "Effect":
        """A bound effect of this one's shape which changes nothing: what rows without it get."""
        return self.replace(dose=np.float32(0), where=None)

    @classmethod
    def stack(cls, rows: Sequence["Effect"]) -> "Effect":
        """One effect whose fields have a row axis, from bound effects of this class with equal static fields."""
        for field in dataclasses.fields(cls):
            values = [getattr(row, field.name) for row in rows]
            if field.metadata.get("shared") and not all(v is values[0] or np.array_equal(v, values[0]) for v in values):
                raise ValueError(
                    f"{cls.__name__}.{field.name} is shared by all rows of a batch, but they hold different values"
                )
        together = {f.name: getattr(rows[0], f.name) for f in dataclasses.fields(cls) if f.metadata.get("shared")}
        apart = [row.replace(where=None, **dict.fromkeys(together)) for row in rows]
        stacked = jax.tree.map(functools.partial(_stack, cls.__name__), *apart)
        return stacked.replace(where=stack_where([row.where for row in rows]), **together)

    def take(self, rows: np.ndarray) -> "Effect":
        """This stacked effect with the given rows, in their order."""
        return _map_fields(self, lambda leaf: leaf[rows])

    def act(self, site: str, x, ctx: Context):
        """`x` [B, ...] with this (bound, batched) effect applied to every row at `site`.

        Raises:
          ValueError: the method changed the shape.
        """
        if self.rows is not None:
            chosen = self.replace(rows=None).act(site, x[self.rows], _map_fields(ctx, lambda leaf: leaf[self.rows]))
            return x.at[self.rows].set(chosen, unique_indices=True, indices_are_sorted=True)
        effect = jax.tree.map(jnp.asarray, self)  # a traced layer can't index numpy
        return jax.vmap(
            functools.partial(_one_row, site), in_axes=(_row_axes(effect), 0, _row_axes(ctx)), axis_size=x.shape[0]
        )(effect, x, ctx)


def _stack(owner: str, *leaves):
    """Leaves of all rows with a row axis in front; numpy unless one of them is being differentiated."""
    if any(isinstance(leaf, jax.Array) for leaf in leaves):
        return jnp.stack([jnp.asarray(leaf) for leaf in leaves])
    arrays = [np.asarray(leaf) for leaf in leaves]
    if arrays[0].dtype.kind not in "biuf" or any(array.shape != arrays[0].shape for array in arrays):
        raise ValueError(
            f"{owner}: a field holds {leaves[0]!r} and shapes {sorted({a.shape for a in arrays})}, wanted numbers or "
            f"arrays of one shape in all rows; declare other fields with nmjax.static()"
        )
    return np.stack([array.astype(np.float32) if array.dtype == np.float64 else array for array in arrays])


def _one_row(site: str, effect: Effect, x, ctx: Context):
    """`vmap` took the row axis away; methods are written with one, so put an axis of 1 back."""
    effect, ctx = (_map_fields(node, lambda leaf: jnp.asarray(leaf)[None]) for node in (effect, ctx))
    x = x[None]
    y = getattr(effect, site)(x, ctx)
    shape = getattr(y, "shape", None)
    if shape != x.shape:
        seen = repr(y) if shape is None else f"shape {shape}"
        wanted = f"shape {x.shape} ({SITES[site][0]} with B = 1)"
        raise ValueError(f"{type(effect).__name__}.{site} returned {seen}, wanted {wanted}")
    y = y.astype(x.dtype)
    if effect.blends:
        y = _mix(x, y, _like(effect.dose, x))
    if effect.where is not None:
        # `logits` at a position decide the token after it, so there the selected position is the one being written.
        position = ctx.q_pos if site in QUERY_AXIS else ctx.q_pos[:, -1:] + 1
        chosen = effect.where.mask(position, ctx.tokens[:, -position.shape[1] :], ctx.prompt_len, ctx.preface)
        shape = [1] * x.ndim
        shape[QUERY_AXIS.get(site, 0)] = -1
        y = jnp.where(chosen.reshape(shape), y, x)
    return y[0]


def _mix(x, y, dose):
    """`(1 - dose) x + dose y`; where either is infinite (a token that was cut), x at dose 0 and y above, never NaN."""
    finite = jnp.isfinite(x) & jnp.isfinite(y)
    before, after = jnp.where(finite, x, 0), jnp.where(finite, y, 0)
    mixed = (1 - dose).astype(x.dtype) * before + dose.astype(x.dtype) * after
    return jnp.where(finite, mixed, jnp.where(dose > 0, y, x))


def _like(value, x):
    """[B] -> [B, 1, 1, ...] of x's rank."""
    return value.reshape(value.shape[:1] + (1,) * (x.ndim - 1))


_CONTEXT_UNROWED = ("slot", "layer")


def _is_shared(node, field: dataclasses.Field) -> bool:
    return field.metadata.get("shared", False) or (isinstance(node, Context) and field.name in _CONTEXT_UNROWED)


def _map_fields(node, fn):
    """`fn` on every leaf of the fields which have a row axis."""
    fields = [f for f in dataclasses.fields(node) if f.metadata.get("pytree_node", True) and not _is_shared(node, f)]
    return node.replace(**{f.name: jax.tree.map(fn, getattr(node, f.name)) for f in fields})


def _row_axes(node):
    """The `in_axes` of a node: 0 where there is a row axis, None where all rows share the value."""
    axes = jax.tree.map(lambda _: None, node)
    return axes.replace(
        **{
            f.name: jax.tree.map(lambda _: 0, getattr(node, f.name))
            for f in dataclasses.fields(node)
            if f.metadata.get("pytree_node", True) and not _is_shared(node, f)
        }
    )


def check_dose(dose):
    """A dose is finite and not negative; a traced one (inside `jit`, `grad`, `jvp`) can't be checked."""
    if isinstance(dose, jax.core.Tracer):
        return dose
    return np.float32(check_number("dose", dose, "one finite number >= 0", lambda value: value >= 0))


def check_number(argument: str, value: Any, wanted: str, legal: Callable[[float], bool] = lambda _: True) -> float:
    """`value` as a float. Raises ValueError, which says what was wanted, unless it is one finite and legal number."""
    array = np.asarray(value)
    number = array.ndim == 0 and array.dtype.kind in "iuf" and abs(float(array)) <= np.finfo(np.float32).max
    if not number or not legal(float(array)):
        raise ValueError(f"{argument}={value!r}, wanted {wanted}")
    return float(array)
