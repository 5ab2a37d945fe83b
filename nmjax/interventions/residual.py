"""Effects on the residual stream: steering and directional ablation."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.interventions.effect import Effect, shared, static
from nmjax.interventions.where import hashable, layer_mask

COEFS = ("absolute", "relative")


class Steer(Effect):
    """Adds `dose * coefficient * vector` to `resid_post`.

    Rows with different vectors share one bank [M, L, D] and carry coefficients [B, L, M] into it.
    """

    coefficients: Any  # unbound: number; bound: [L, M]
    vectors: Any = shared()  # unbound: [D] or [L, D]; bound: the bank [M, L, D]
    coef: str = static(default="absolute")
    layers: Any = static(default="all")
    blends = False

    def bind(self, lm):
        L, D = lm.config.layers, lm.config.embed
        shape = np.shape(self.vectors)
        if shape not in ((D,), (L, D)):
            raise ValueError(
                f"steer: vector has shape {shape}, wanted ({D},) or ({L}, {D}): (embed,) or (layers, embed)"
            )
        vectors = (
            jnp.broadcast_to(self.vectors, (1, L, D))
            if _traced(self.vectors)
            else (np.broadcast_to(np.asarray(self.vectors, np.float32), (1, L, D)))
        )
        mask = layer_mask(self.layers, L).astype(np.float32)
        return self.replace(coefficients=(self.coefficients * mask)[:, None], vectors=vectors, layers=None)

    def resid_post(self, x, ctx):
        coefficients = self.dose[:, None] * self.coefficients[:, ctx.layer]  # [B, M]
        added = (coefficients @ self.vectors[:, ctx.layer])[:, None]  # [B, 1, D]
        if self.coef == "relative":
            added = added * jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True)
        return x + added.astype(x.dtype)

    @classmethod
    def stack(cls, rows):
        """Merges the banks of all rows, each distinct vector once."""
        place, bank, columns = {}, [], []
        for row in rows:
            columns.append([])
            for vector in row.vectors:
                name = id(vector) if _traced(vector) else hashlib.sha256(np.ascontiguousarray(vector)).digest()
                if name not in place:
                    place[name] = len(bank)
                    bank.append(vector)
                columns[-1].append(place[name])
        widened = []
        for row, column in zip(rows, columns, strict=True):
            chosen = np.zeros((len(column), len(bank)), np.float32)
            chosen[np.arange(len(column)), column] = 1
            widened.append(row.replace(coefficients=row.coefficients @ chosen, vectors=None))
        join = jnp.stack if any(map(_traced, bank)) else np.stack
        return super().stack(widened).replace(vectors=join(bank))


def _traced(x) -> bool:
    return isinstance(x, jax.core.Tracer)


def steer(vector: Any, scale: float = 1.0, layers: Any = "all", coef: str = "absolute") -> Steer:
    """Adds a vector to the residual stream after the given blocks, at every token.

    Args:
      vector: [D], or [L, D] with one row a layer.
      scale: the coefficient at dose 1; may be negative.
      layers: see `where.layer_mask`; `steer(v, 2.0, layers=[4])` adds `2 v` to `resid_post` of block 4.
      coef: "absolute" adds `scale * vector`; "relative" adds a vector of norm `|scale|` times the norm of the same
        token's residual, in the vector's direction.
    """
    if coef not in COEFS:
        raise ValueError(f"steer: coef={coef!r}, wanted one of {COEFS}")
    _check_vector("steer: vector", vector)
    if not _traced(scale) and not np.isfinite(scale):
        raise ValueError(f"steer: scale={scale!r}, wanted a finite number")
    if coef == "relative":
        vector = vector / np.linalg.norm(vector, axis=-1, keepdims=True)
    if not _traced(vector):
        vector = np.asarray(vector, np.float32)
    return Steer(coefficients=scale, vectors=vector, coef=coef, layers=hashable(layers))


class Ablate(Effect):
    """Removes the component along a unit direction from `resid_post`: `x - (x . d) d`, blended by dose."""

    direction: Any  # [D], unit norm
    mask: Any = None  # bound: [L]
    layers: Any = static(default="all")

    def bind(self, lm):
        if np.shape(self.direction) != (lm.config.embed,):
            raise ValueError(f"ablate: direction has shape {np.shape(self.direction)}, wanted ({lm.config.embed},)")
        return self.replace(mask=layer_mask(self.layers, lm.config.layers).astype(np.float32), layers=None)

    def resid_post(self, x, ctx):
        direction = self.direction[:, None].astype(x.dtype)  # [B, 1, D]
        share = self.mask[:, ctx.layer][:, None, None].astype(x.dtype)
        return x - share * (x * direction).sum(-1, keepdims=True) * direction


def ablate(direction: Any, layers: Any = "all") -> Ablate:
    """Projects a direction [D] (any norm but 0) out of the residual stream after the given blocks."""
    _check_vector("ablate: direction", direction)
    return Ablate(direction=np.asarray(direction / np.linalg.norm(direction), np.float32), layers=hashable(layers))


def _check_vector(argument: str, vector: Any) -> None:
    if _traced(vector):
        return
    values = np.asarray(vector)
    if (
        values.ndim not in (1, 2)
        or not np.issubdtype(values.dtype, np.floating)
        and not np.issubdtype(values.dtype, np.integer)
    ):
        raise ValueError(f"{argument} has shape {values.shape} and dtype {values.dtype}, wanted numbers [D] or [L, D]")
    if not np.isfinite(values).all():
        raise ValueError(f"{argument} holds NaN or infinity")
    if not np.linalg.norm(values, axis=-1).all():
        raise ValueError(f"{argument} has norm 0, so it has no direction")
