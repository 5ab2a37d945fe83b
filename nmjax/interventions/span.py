"""Steering along a vector of its own in every row, or at every token, over a span of the prompt."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from nmjax.interventions.effect import Effect, check_number, static
from nmjax.interventions.where import checked_layers, layer_mask, place_in_prompt

LONGEST = 2**30  # an end that no prompt reaches
STEP = 16  # lengths of vectors by token are rounded up to its multiples, so that few of them are programs of their own


class SteerSpan(Effect):
    """Adds `dose * coefficients[layer] * vector` to `resid_post` at positions start to end - 1 of the prompt.

    Rows do not share their vectors, so a batch of as many as there are rows is one program whatever the vectors.
    """

    vectors: Any  # [1, D], or [W, D] with one a token of the span, filled up with zeros
    coefficients: Any  # unbound: number; bound: [L]
    start: Any
    end: Any
    width: int = static(default=1)  # W: rows with vectors by token hold their own place in a batch
    layers: Any = static(default="all")
    blends = False

    def bind(self, lm):
        width = self.vectors.shape[1]
        if width != lm.config.embed:
            raise ValueError(f"steer_span: vectors have {width} numbers each, wanted {lm.config.embed} (embed)")
        mask = layer_mask(self.layers, lm.config.layers).astype(np.float32)
        return self.replace(coefficients=self.coefficients * mask, layers=None)

    def neutral(self):
        return super().neutral().replace(vectors=np.zeros_like(self.vectors))

    def resid_post(self, x, ctx):
        hidden, place = place_in_prompt(ctx.q_pos, ctx.preface)
        inside = ~hidden & (place >= self.start[:, None]) & (place < self.end[:, None])
        inside &= ctx.q_pos < ctx.prompt_len[:, None]
        vectors = self.vectors  # [B, 1, D]
        if self.width > 1:
            at = jnp.clip(place - self.start[:, None], 0, self.width - 1)
            vectors = jnp.take_along_axis(vectors, at[..., None], axis=1)  # [B, T, D]
        size = self.dose * self.coefficients[:, ctx.layer]  # [B]
        return x + (size[:, None, None] * inside[..., None] * vectors).astype(x.dtype)


def steer_span(vectors: Any, scale: float, layers: Any = "all", span: tuple[int, int | None] = (0, None)) -> SteerSpan:
    """Adds a vector to the residual stream after the given blocks, at some of the prompt's tokens.

    What follows them reads what they left in the cache; `steer(...).on(prompt_window=span)` does the same along one
    vector, where many rows share few vectors.

    Args:
      vectors: [D], or [T, D] with one for each of the span's T tokens.
      scale: the coefficient at dose 1.
      layers: see `where.layer_mask`.
      span: half open, positions in the prompt, from 0; an end of None is the prompt's. What is generated is left alone.
    Raises:
      ValueError: vectors of other shapes, not finite or of norm 0, or a span that is empty or not as long as them.
    """
    start, end = span
    stop = LONGEST if end is None else end
    whole = all(isinstance(place, int | np.integer) and not isinstance(place, bool) for place in (start, stop))
    if not whole or not 0 <= start < stop:
        raise ValueError(f"steer_span: span={span!r}, wanted (start, end) with 0 <= start < end, or an end of None")
    values = np.asarray(vectors)
    if values.ndim not in (1, 2) or not values.size or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        seen = f"shape {values.shape} and dtype {values.dtype}"
        raise ValueError(f"steer_span: vectors have {seen}, wanted finite numbers [D] or [T, D]")
    values = np.atleast_2d(values.astype(np.float32))
    if not values.any(axis=1).all():
        raise ValueError("steer_span: a vector has norm 0, so it has no direction")
    tokens = len(values)
    if np.ndim(vectors) == 2:
        if end is None or tokens != end - start:
            raise ValueError(f"steer_span: {tokens} vectors for span={span!r}, wanted one for each of its tokens")
        values = np.pad(values, ((0, -tokens % STEP), (0, 0)))
    return SteerSpan(
        vectors=values,
        coefficients=np.float32(check_number("steer_span: scale", scale, "a finite number")),
        start=np.int32(start),
        end=np.int32(stop),
        width=len(values),
        layers=checked_layers(layers),
    )
