"""Effects on the residual stream: steering and directional ablation."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.interventions.effect import Effect, check_number, shared, static
from nmjax.interventions.where import checked_layers, layer_mask

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
        mask = layer_mask(self.layers, L)
        if not _traced(vectors) and not vectors[0, mask].any(-1).all():
            raise ValueError(f"steer: vector is 0 in a layer of layers={self.layers!r}, wanted a direction in each")
        mask = mask.astype(np.float32)
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
            for i, vector in enumerate(row.vectors):
                traced = _traced(row.vectors)
                name = (id(row.vectors), i) if traced else hashlib.sha256(np.ascontiguousarray(vector)).digest()
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
    vector = _checked_vector("steer: vector", vector)
    coefficient = scale if _traced(scale) else np.float32(check_number("steer: scale", scale, "a finite number"))
    vector = _unit(vector) if coef == "relative" else vector
    return Steer(coefficients=coefficient, vectors=vector, coef=coef, layers=checked_layers(layers))


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
    return Ablate(direction=_unit(_checked_vector("ablate: direction", direction)), layers=checked_layers(layers))


def _checked_vector(argument: str, vector: Any) -> Any:
    """float32 [D] or [L, D], not 0; a traced one can't be checked."""
    if _traced(vector):
        return vector
    values = np.asarray(vector)
    if values.ndim not in (1, 2) or values.dtype.kind not in "iuf":
        raise ValueError(f"{argument} has shape {values.shape} and dtype {values.dtype}, wanted numbers [D] or [L, D]")
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{argument} holds NaN or infinity")
    if not values.any():
        raise ValueError(f"{argument} has norm 0, so it has no direction")
    return values


def _unit(vector: Any) -> Any:
    """Every row at norm 1; rows of zeros (layers that a file of vectors leaves out) stay."""
    module = jnp if _traced(vector) else np
    norm = module.linalg.norm(vector, axis=-1, keepdims=True)
    return vector / module.where(norm > 0, norm, 1)
