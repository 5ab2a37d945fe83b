"""Random numbers of effects: functions of the row, the effect, the layer and the token's position, of nothing else.

So the same token draws the same numbers with and without a cache, in any batch, beside any neighbours, and two packs
with one row key draw the same noise.
"""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.interventions.effect import Context, Effect


class Drawing(Effect, kw_only=True):
    """Base class of effects that draw random numbers. `stream` tells equals within one intervention apart."""

    stream: Any = np.uint32(0)  # set by `batch`: the effect's ordinal among those of its class in its own intervention

    def draw(self, ctx: Context, sample: Callable, shape: tuple[int, ...]) -> jax.Array:
        """`sample(key, shape)` for every query token: [B, T, *shape]; at `layer` None, of the pass as a whole."""
        kind = zlib.crc32(type(self).__qualname__.encode())
        layer = 0 if ctx.layer is None else ctx.layer + 1

        def row(key, stream, positions):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, kind), stream), layer)
            return jax.vmap(lambda position: sample(jax.random.fold_in(key, position), shape))(positions)

        return jax.vmap(row)(ctx.keys, self.stream, ctx.q_pos)


def number_streams(effects: list[Effect]) -> list[Effect]:
    """Gives every drawing effect of an intervention its ordinal among those of its class."""
    seen: dict[type, int] = {}
    numbered = []
    for effect in effects:
        if isinstance(effect, Drawing):
            seen[type(effect)] = seen.get(type(effect), -1) + 1
            effect = effect.replace(stream=np.uint32(seen[type(effect)]))
        numbered.append(effect)
    return numbered


def uniform(key, shape) -> jax.Array:
    return jax.random.uniform(key, shape)


def normal(key, shape) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32)
