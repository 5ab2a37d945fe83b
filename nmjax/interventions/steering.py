"""Effects along directions of the residual stream: steering, its placebos, ablation, clamping, soft projection."""

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.interventions.effect import Effect, check_number, shared, static
from nmjax.interventions.where import checked_layers, layer_mask
from nmjax.row_sum import row_sum

COEFS = ("absolute", "relative")
PLACEBOS = ("random", "orthogonal")
MANY = 32  # vectors of a batch, from which on a matrix product is faster than their sum


class Steer(Effect):
    """Adds `dose * coefficient * vector` to `resid_post`.

    Rows with different vectors share one bank [M, L, D] and carry coefficients [B, L, M] into it.
    """

    coefficients: Any  # unbound: number; bound: [L, M]
    vectors: Any = shared()  # unbound: [D] or [L, D], None where `source` says what it is; bound: the bank [M, L, D]
    coef: str = static(default="absolute")
    layers: Any = static(default="all")
    source: Any = static(default=None)  # a `Source`
    blends = False

    def bind(self, lm):
        L, D = lm.config.layers, lm.config.embed
        given = self.vectors if self.source is None else self.source.vector(lm)
        shape = np.shape(given)
        if shape not in ((D,), (L, D)):
            raise ValueError(
                f"steer: vector has shape {shape}, wanted ({D},) or ({L}, {D}): (embed,) or (layers, embed)"
            )
        if self.coef == "relative":
            given = _unit(given)
        vectors = (
            jnp.broadcast_to(given, (1, L, D))
            if _traced(given)
            else np.broadcast_to(np.asarray(given, np.float32), (1, L, D))
        )
        mask = layer_mask(self.layers, L)
        if not _traced(vectors) and not vectors[0, mask].any(-1).all():
            raise ValueError(f"steer: vector is 0 in a layer of layers={self.layers!r}, wanted a direction in each")
        coefficients = (self.coefficients * mask.astype(np.float32))[:, None]
        return self.replace(coefficients=coefficients, vectors=vectors, layers=None, source=None)

    def joined(self, following):
        """Pushes in a row become one, so that relative ones all measure the residual that the first one found."""
        if type(following) is not Steer or following.coef != self.coef or self.where or following.where:
            return None
        module = jnp if any(map(_traced, jax.tree.leaves((self, following)))) else np
        parts = [effect.dose * effect.coefficients for effect in (self, following)]
        return self.replace(
            dose=np.float32(1),
            coefficients=module.concatenate(parts, axis=1),
            vectors=module.concatenate([self.vectors, following.vectors]),
        )

    def resid_post(self, x, ctx):
        coefficients = self.dose[:, None] * self.coefficients[:, ctx.layer]  # [B, M]
        bank = self.vectors[:, ctx.layer]  # [M, D]
        if len(bank) > MANY:
            added = coefficients @ bank
        else:  # one after the other, so that vectors of other rows, which have coefficient 0 here, change no bit
            added = sum(coefficients[:, m : m + 1] * bank[m] for m in range(len(bank)))
        added = added[:, None]  # [B, 1, D]
        if self.coef == "relative":
            wide = x.astype(jnp.float32)
            added = added * jnp.sqrt(row_sum(wide * wide))
        return x + added.astype(x.dtype)

    @classmethod
    def stack(cls, rows):
        """Merges the banks of all rows, each distinct vector once, in an order that doesn't depend on the rows."""
        place: dict = {}
        bank: list = []
        columns: list[list[int]] = []
        for row in rows:
            columns.append([])
            for i, vector in enumerate(row.vectors):
                traced = _traced(row.vectors)
                name = (id(row.vectors), i) if traced else hashlib.sha256(np.ascontiguousarray(vector)).digest()
                if name not in place:
                    place[name] = len(bank)
                    bank.append(vector)
                columns[-1].append(place[name])
        order = sorted(place, key=lambda name: (isinstance(name, tuple), name))  # digests; traced ones as they came
        bank = [bank[place[name]] for name in order]
        rank = {place[name]: position for position, name in enumerate(order)}
        widened = []
        for row, column in zip(rows, columns, strict=True):
            chosen = np.zeros((len(column), len(bank)), np.float32)
            chosen[np.arange(len(column)), [rank[index] for index in column]] = 1
            widened.append(row.replace(coefficients=row.coefficients @ chosen, vectors=None))
        join = jnp.stack if any(map(_traced, bank)) else np.stack
        return super().stack(widened).replace(vectors=join(bank))


def _traced(x) -> bool:
    return isinstance(x, jax.core.Tracer)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a vector comes from that is found or drawn once the model is known."""

    names: tuple[str, ...]  # of the model's steering vectors; see `steering.store`
    placebo: str | None = None  # None: the vector itself; "random" or "orthogonal" (to all of `names`), of its norm
    seed: int = 0

    def vector(self, lm) -> np.ndarray:
        """float32 [L, D]. Raises ValueError for a vector that the model lacks, with the command that builds it."""
        from nmjax.steering import store, vectors  # they run the model, so they stand above this module

        named = [store.named_vector(lm, name) for name in self.names]
        if self.placebo is None:
            return named[0]
        if not named:
            named = [np.ones((lm.config.layers, lm.config.embed), np.float32)]
        return vectors.placebo(named, self.placebo, self.seed)


def steer(vector: Any, scale: float = 1.0, layers: Any = "all", coef: str = "absolute") -> Steer:
    """Adds a vector to the residual stream after the given blocks, at every token.

    Args:
      vector: [D], or [L, D] with one row a layer, or the name of one of the model's own steering vectors.
      scale: the coefficient at dose 1; may be negative.
      layers: see `where.layer_mask`; `steer(v, 2.0, layers=[4])` adds `2 v` to `resid_post` of block 4.
      coef: "absolute" adds `scale * vector`; "relative" adds a vector of norm `|scale|` times the norm of the same
        token's residual, in the vector's direction.
    """
    if coef not in COEFS:
        raise ValueError(f"steer: coef={coef!r}, wanted one of {COEFS}")
    if isinstance(vector, str):
        return _sourced(Source((vector,)), scale, layers, coef)
    vector = _checked_vector("steer: vector", vector)
    vector = _unit(vector) if coef == "relative" else vector
    return Steer(coefficients=_coefficient(scale), vectors=vector, coef=coef, layers=checked_layers(layers))


def steer_placebo(
    kind: str, reference: Any = (), scale: float = 1.0, layers: Any = "all", coef: str = "relative", seed: int = 0
) -> Steer:
    """Steers along a direction without meaning: what any push of this size does.

    Args:
      kind: "random", a Gaussian direction; or "orthogonal", one at right angles to every reference, layer by layer.
      reference: names of the model's steering vectors, the first of which sets the norm (with `coef="relative"` only
        `scale` does); at least one for "orthogonal".
      scale, layers, coef: as for `steer`.
      seed: another seed is another direction.
    """
    names = (reference,) if isinstance(reference, str) else tuple(reference)
    if kind not in PLACEBOS:
        raise ValueError(f"steer_placebo: kind={kind!r}, wanted one of {PLACEBOS}")
    if not all(isinstance(name, str) for name in names) or (kind == "orthogonal" and not names):
        raise ValueError(f"steer_placebo: reference={reference!r}, wanted names of steering vectors")
    if coef not in COEFS:
        raise ValueError(f"steer_placebo: coef={coef!r}, wanted one of {COEFS}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"steer_placebo: seed={seed!r}, wanted an integer >= 0")
    return _sourced(Source(names, kind, seed), scale, layers, coef)


def _sourced(source: Source, scale, layers, coef) -> Steer:
    return Steer(
        coefficients=_coefficient(scale), vectors=None, coef=coef, layers=checked_layers(layers), source=source
    )


def _coefficient(scale):
    return scale if _traced(scale) else np.float32(check_number("steer: scale", scale, "a finite number"))


class Ablate(Effect):
    """Removes the component along a unit direction from `resid_post`: `x - (x . d) d`, blended by dose."""

    direction: Any  # [D], unit norm
    mask: Any = None  # bound: [L]
    layers: Any = static(default="all")

    def bind(self, lm):
        _check_width("ablate", self.direction, lm)
        return self.replace(mask=layer_mask(self.layers, lm.config.layers).astype(np.float32), layers=None)

    def resid_post(self, x, ctx):
        direction = self.direction[:, None]  # float32 [B, 1, D]: rounded to bfloat16 it would be another direction
        share = self.mask[:, ctx.layer][:, None, None]
        return x - share * (x * direction).sum(-1, keepdims=True) * direction


def ablate(direction: Any, layers: Any = "all") -> Ablate:
    """Projects a direction [D] (any norm but 0) out of the residual stream after the given blocks."""
    return Ablate(direction=_unit(_checked_vector("ablate: direction", direction)), layers=checked_layers(layers))


class ClampProjection(Effect):
    """Sets the component along a unit direction of `resid_post` to a value, blended by dose."""

    direction: Any  # [D], unit norm
    value: Any
    mask: Any = None  # bound: [L]
    layers: Any = static(default="all")

    def bind(self, lm):
        _check_width("clamp_projection", self.direction, lm)
        return self.replace(mask=layer_mask(self.layers, lm.config.layers).astype(np.float32), layers=None)

    def resid_post(self, x, ctx):
        direction = self.direction[:, None]  # float32 [B, 1, D]: rounded to bfloat16 it would be another direction
        share = self.mask[:, ctx.layer][:, None, None]
        missing = self.value[:, None, None] - (x * direction).sum(-1, keepdims=True)
        return x + share * missing * direction


def clamp_projection(direction: Any, value: float, layers: Any = "all") -> ClampProjection:
    """Holds the residual's component along a direction [D] (any norm but 0) at `value`, in units of the residual."""
    value = check_number("clamp_projection: value", value, "a finite number")
    direction = _unit(_checked_vector("clamp_projection: direction", direction))
    return ClampProjection(direction=direction, value=np.float32(value), layers=checked_layers(layers))


class SoftProjection(Effect):
    """Moves `resid_post` by `dose * share` of the way to its projection on a subspace."""

    share: Any  # unbound: number; bound: [L]
    basis: Any = shared(default=None)  # unbound: [R, D] or None; bound: orthonormal [R, D]
    subspace: Any = static(default=None)  # unbound: (rank, seed) of a random one; bound: a hash of the basis
    layers: Any = static(default="all")
    blends = False
    costly = True

    def bind(self, lm):
        D = lm.config.embed
        if self.basis is None:
            rank, seed = self.subspace
            rank = max(1, D // 2) if rank is None else rank
            if rank > D:
                raise ValueError(f"soft_projection: rank={rank}, wanted at most {D}, the width of the residual stream")
            orthonormal = _random_basis(rank, D, seed)
        else:
            basis = np.asarray(self.basis, np.float64)
            _check_width("soft_projection", basis[0], lm)
            _, sizes, axes = np.linalg.svd(basis, full_matrices=False)
            # Directions that depend on one another span less than they number.
            orthonormal = axes[sizes > 1e-6 * sizes[0]].astype(np.float32)
        share = self.share * layer_mask(self.layers, lm.config.layers).astype(np.float32)
        # Rows of one slot share their basis, so every basis has a slot of its own.
        name = hashlib.sha256(orthonormal.tobytes()).hexdigest()
        return self.replace(share=share, basis=orthonormal, subspace=name, layers=None)

    def resid_post(self, x, ctx):
        share = jnp.minimum(self.dose * self.share[:, ctx.layer], 1)[:, None, None]
        return x + share * ((x @ self.basis.T) @ self.basis - x)

    def clamps(self):
        value = self.dose * self.share
        return [f"soft_projection: share {value:g} lowered to 1"] if value > 1 else []


def soft_projection(
    share: float, basis: Any = None, *, rank: int | None = None, seed: int = 0, layers: Any = "mid"
) -> SoftProjection:
    """Pulls the residual stream towards a subspace: `x + min(1, d share) (P x - x)`, P the projection on the subspace.

    Args:
      share: in [0, 1].
      basis: directions [R, D] that span the subspace; None = a random one of `rank` dimensions.
      rank: of the random subspace; None = half of the width.
      seed: of the random subspace.
    """
    share = check_number("soft_projection: share", share, "a number from 0 to 1", lambda value: 0 <= value <= 1)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"soft_projection: rank={rank!r}, wanted an integer >= 1")
    if basis is not None:
        basis = np.atleast_2d(_checked_vector("soft_projection: basis", basis))
    return SoftProjection(
        share=np.float32(share), basis=basis, subspace=(rank, seed), layers=checked_layers(layers)
    )


@functools.lru_cache(maxsize=16)
def _random_basis(rank: int, width: int, seed: int) -> np.ndarray:
    """Orthonormal float32 [R, D]."""
    drawn = np.random.default_rng(seed).standard_normal((width, rank))
    return np.ascontiguousarray(np.linalg.qr(drawn).Q.T, np.float32)


def _check_width(name: str, direction, lm) -> None:
    if np.shape(direction) != (lm.config.embed,):
        raise ValueError(f"{name}: direction has shape {np.shape(direction)}, wanted ({lm.config.embed},)")


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
