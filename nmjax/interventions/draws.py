"""Random numbers of effects: functions of the row, the effect, the layer and the token's position, of nothing else.

So the same token draws the same numbers with and without a cache, in any batch, beside any neighbours, and two packs
with one row key draw the same noise.

They come from a hash of these coordinates, pcg4d (Jarzynski and Olano 2020, "Hash Functions for GPU Rendering"): a
dozen integer operations a number, which XLA fuses into the effect. Threefry, which makes the row's key, is a chain of
loops on a CPU, and would take longer than the layer that it disturbs.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.interventions.effect import Context, Effect


class Drawing(Effect, kw_only=True):
    """Base class of effects that draw random numbers. `stream` tells equals within one intervention apart."""

    costly = True

    stream: Any = np.uint32(0)  # set by `batch`: the effect's ordinal among those of its class in its own intervention

    def draw(self, ctx: Context, distribution: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> jax.Array:
        """[B, T, *shape] numbers of a distribution (`uniform` or `normal`), fresh for every query token and layer.

        Args:
          shape: of what one token draws, at most 2^20 numbers.
        """
        kind = np.uint32(zlib.crc32(type(self).__qualname__.encode()))
        layer = jnp.uint32(0) if ctx.layer is None else ctx.layer.astype(jnp.uint32) + 1
        assert ctx.keys is not None, "the models of this toolkit pass a key for every row"
        words = jax.random.key_data(ctx.keys)  # [B, 2]
        bits, *_ = pcg4d(
            words[:, :1, None] ^ kind,
            words[:, -1:, None] + self.stream.astype(jnp.uint32)[:, None, None] * np.uint32(0x9E3779B9),
            ctx.q_pos[:, :, None].astype(jnp.uint32),
            (layer << 20) + jnp.arange(math.prod(shape), dtype=jnp.uint32),
        )
        return distribution(bits).reshape(*ctx.q_pos.shape, *shape)


def pcg4d(x, y, z, w):
    """Four well-mixed uint32 words from four uint32 coordinates, elementwise."""
    x, y, z, w = (v * np.uint32(1664525) + np.uint32(1013904223) for v in (x, y, z, w))
    for _ in range(2):
        x = x + y * w
        y = y + z * x
        z = z + x * y
        w = w + y * z
        x, y, z, w = (v ^ (v >> 16) for v in (x, y, z, w))
    return x, y, z, w


def uniform(bits) -> jax.Array:
    """uint32 -> float32 in [0, 1), 2^24 values."""
    return (bits >> 8).astype(jnp.float32) * np.float32(2**-24)


def normal(bits) -> jax.Array:
    """uint32 -> float32, standard normal by the inverse of its distribution function."""
    centred = (bits >> 8).astype(jnp.float32) * np.float32(2**-23) - np.float32(1 - 2**-24)  # in (-1, 1)
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(centred)


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
