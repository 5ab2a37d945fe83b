"""Effects on attention: sharper or flatter scores, silent or louder heads, biases over positions."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from nmjax.interventions.draws import Drawing, uniform
from nmjax.interventions.effect import Effect, check_number, static
from nmjax.interventions.where import checked_heads, checked_layers, chosen_heads, layer_mask

WAVES = ("sine", "square")
SHAPES = ("recency", "history", "middle")


class ScaleQK(Effect):
    """Multiplies query-key scores, by scaling the queries: `q *= (1 + dose * gain) / (1 + dose * loss)`."""

    gain: Any  # unbound: number; bound: [L, N]
    loss: Any
    layers: Any = static(default="all")
    heads: Any = static(default=None)
    on_empty: str | None = static(default="error")
    blends = False

    def bind(self, lm):
        chosen = chosen_heads(lm, self.layers, self.heads, self.on_empty)
        return self.replace(gain=self.gain * chosen, loss=self.loss * chosen, layers=None, heads=None, on_empty=None)

    def query(self, q, ctx):
        dose = self.dose[:, None]
        factor = (1 + dose * self.gain[:, ctx.layer]) / (1 + dose * self.loss[:, ctx.layer])  # [B, N]
        return q * factor[:, None, :, None].astype(q.dtype)


def scale_qk(factor: float, layers: Any = "all", heads: Any = None, on_empty: str = "error") -> ScaleQK:
    """Scales attention scores before the softmax: above 1 sharpens, below 1 flattens.

    At dose d the factor is `1 + d (factor - 1)` if factor >= 1, else `1 / (1 + d (1/factor - 1))`: it never changes
    sign, whatever the dose.

    Args:
      factor: positive.
      layers: see `where.layer_mask`.
      heads: head indices, None = all, "induction" = those that `induction.induction_heads` finds in these layers.
      on_empty: where there are no induction heads: "error", "middle" (the two middle heads of each layer) or "none".
    """
    factor = check_number("scale_qk: factor", factor, "a positive number", lambda value: value > 0)
    gain, loss = max(factor - 1.0, 0.0), max(1.0 / factor - 1.0, 0.0)
    layers, heads = checked_layers(layers), checked_heads(heads, on_empty)
    return ScaleQK(gain=np.float32(gain), loss=np.float32(loss), layers=layers, heads=heads, on_empty=on_empty)


class ScaleHeads(Effect):
    """Multiplies head outputs by `max(0, 1 + dose * change)`. The others are not rescaled."""

    change: Any  # factor - 1; unbound: number; bound: [L, N]
    layers: Any = static(default="all")
    heads: Any = static(default=None)
    on_empty: str | None = static(default="error")
    blends = False

    def bind(self, lm):
        chosen = chosen_heads(lm, self.layers, self.heads, self.on_empty)
        return self.replace(change=self.change * chosen, layers=None, heads=None, on_empty=None)

    def head_out(self, x, ctx):
        gain = 1 + self.dose[:, None] * self.change[:, ctx.layer]  # [B, N]
        gain = jnp.where(gain >= 0, gain, 0)  # `clip` would halve the derivative at both ends, which are doses 0 and 1
        return x * gain[:, None, :, None].astype(x.dtype)

    def clamps(self):
        gain = 1 + self.dose * self.change
        return [f"scale_heads: gain {gain:g} raised to 0"] if gain < 0 else []


def scale_heads(factor: float, heads: Any = None, layers: Any = "all", on_empty: str = "error") -> ScaleHeads:
    """Reweights attention heads: their outputs times `max(0, 1 + d (factor - 1))` at dose d.

    Args:
      factor: >= 0.
      heads: head indices, None = all, or "induction".
      layers: see `where.layer_mask`.
      on_empty: as for `scale_qk`.
    """
    factor = check_number("scale_heads: factor", factor, "a finite number >= 0", lambda value: value >= 0)
    layers, heads = checked_layers(layers), checked_heads(heads, on_empty)
    return ScaleHeads(change=np.float32(factor - 1.0), layers=layers, heads=heads, on_empty=on_empty)


class DropHeads(Drawing):
    """Silences each head at each token with probability `min(1, dose * probability)`, drawn anew in every layer."""

    probability: Any  # unbound: number; bound: [L, N]
    layers: Any = static(default="all")
    heads: Any = static(default=None)
    blends = False

    def bind(self, lm):
        chosen = chosen_heads(lm, self.layers, self.heads)
        return self.replace(probability=self.probability * chosen, layers=None, heads=None)

    def head_out(self, x, ctx):
        probability = self.dose[:, None] * self.probability[:, ctx.layer]  # [B, N]
        kept = self.draw(ctx, uniform, x.shape[2:3]) >= probability[:, None]  # [B, T, N]
        return x * kept[..., None].astype(x.dtype)

    def clamps(self):
        value = self.dose * self.probability
        return [f"mask_heads: p {value:g} lowered to 1"] if value > 1 else []


def mask_heads(heads: Any = None, *, p: float | None = None, layers: Any = "all") -> ScaleHeads | DropHeads:
    """Silences attention heads, without rescaling the others.

    `mask_heads([4], layers=[1])` masks head 4 of layer 1: at dose d its output is multiplied by `max(0, 1 - d)`. With
    `p`, each of the heads (None = all) is off at a token with probability `min(1, d p)`, independently.

    Args:
      heads: head indices; needed unless `p` is given.
      p: in [0, 1].
      layers: see `where.layer_mask`.
    """
    if p is None:
        if heads is None:
            raise ValueError("mask_heads: wanted heads, or p for a random choice at every token")
        return scale_heads(0.0, heads, layers)
    p = check_number("mask_heads: p", p, "a probability from 0 to 1", lambda value: 0 <= value <= 1)
    return DropHeads(probability=np.float32(p), layers=checked_layers(layers), heads=checked_heads(heads))


class OscillateAttention(Effect):
    """Multiplies head outputs by `1 + dose * amplitude * wave(t)`, t the query's own position, alike in all layers."""

    amplitude: Any  # unbound: number; bound: [L, N]
    rate: Any  # radians a token, of the sine
    period: Any  # tokens, of the square wave
    wave: str = static(default="sine")
    layers: Any = static(default="all")
    heads: Any = static(default=None)
    blends = False

    def bind(self, lm):
        return self.replace(
            amplitude=self.amplitude * chosen_heads(lm, self.layers, self.heads), layers=None, heads=None
        )

    def head_out(self, x, ctx):
        t = ctx.q_pos.astype(jnp.float32)
        period = self.period[:, None]
        wave = jnp.sin(self.rate[:, None] * t) if self.wave == "sine" else jnp.where(t % period < period / 2, 1.0, 0.0)
        gain = 1 + (self.dose[:, None] * self.amplitude[:, ctx.layer])[:, None] * wave[..., None]  # [B, T, N]
        return x * gain[..., None].astype(x.dtype)


def oscillate_attention(
    amplitude: float = 0.2, wave: str = "sine", rate: float = 0.1, period: float = 20, layers: Any = "all",
    heads: Any = None,
) -> OscillateAttention:  # fmt: skip
    """Lets head outputs swell and fade with the position t of the token.

    Args:
      amplitude: the gain is `1 + d amplitude sin(rate t)` for a sine; for a square wave `1 + d amplitude` in the first
        half of every `period` and 1 in the second.
      rate: radians a token (sine).
      period: tokens, >= 2 (square).
    """
    if wave not in WAVES:
        raise ValueError(f"oscillate_attention: wave={wave!r}, wanted one of {WAVES}")
    amplitude = check_number("oscillate_attention: amplitude", amplitude, "a finite number")
    rate = check_number("oscillate_attention: rate", rate, "a finite number")
    period = check_number("oscillate_attention: period", period, "a number >= 2", lambda value: value >= 2)
    return OscillateAttention(
        amplitude=np.float32(amplitude),
        rate=np.float32(rate),
        period=np.float32(period),
        wave=wave,
        layers=checked_layers(layers),
        heads=checked_heads(heads),
    )


class AnchorAttention(Effect):
    """Adds `dose * bias` to the scores of a row's first positions."""

    bias: Any  # unbound: number; bound: [L]
    first: Any
    layers: Any = static(default="all")
    blends = False

    def bind(self, lm):
        return self.replace(bias=self.bias * layer_mask(self.layers, lm.config.layers).astype(np.float32), layers=None)

    def scores(self, x, ctx):
        bias = (self.dose * self.bias[:, ctx.layer])[:, None] * (ctx.k_pos < self.first[:, None])  # [B, S]
        return x + bias[:, None, None]


def anchor_attention(bias: float, first: int = 4, layers: Any = "all") -> AnchorAttention:
    """Makes the first `first` tokens of a row attention sinks: their scores rise by `d bias` nats (below 0: fall)."""
    bias = check_number("anchor_attention: bias", bias, "a finite number")
    count = check_number("anchor_attention: first", first, "an integer >= 1", lambda v: v >= 1 and v.is_integer())
    return AnchorAttention(bias=np.float32(bias), first=np.float32(count), layers=checked_layers(layers))


class BiasPositions(Effect):
    """Adds `dose * bias * shape(r)` to scores, `r = t / T` the place of key t in what query T sees, from 0 to 1."""

    bias: Any  # unbound: number; bound: [L]
    shape: str = static(default="recency")
    layers: Any = static(default="all")
    blends = False

    def bind(self, lm):
        return self.replace(bias=self.bias * layer_mask(self.layers, lm.config.layers).astype(np.float32), layers=None)

    def scores(self, x, ctx):
        last = jnp.maximum(ctx.q_pos, 1)[:, None, :, None].astype(jnp.float32)
        place = jnp.clip(ctx.k_pos[:, None, None, :].astype(jnp.float32) / last, 0, 1)
        shape = {"recency": place, "history": 1 - place, "middle": 1 - jnp.abs(2 * place - 1)}[self.shape]
        return x + (self.dose * self.bias[:, ctx.layer])[:, None, None, None] * shape


def bias_positions(bias: float, shape: str = "recency", layers: Any = "all") -> BiasPositions:
    """Tilts attention over positions by up to `d bias` nats.

    Args:
      bias: may be negative.
      shape: "recency" rises linearly to the query itself, "history" falls to it, "middle" peaks half-way.
    """
    if shape not in SHAPES:
        raise ValueError(f"bias_positions: shape={shape!r}, wanted one of {SHAPES}")
    bias = check_number("bias_positions: bias", bias, "a finite number")
    return BiasPositions(bias=np.float32(bias), shape=shape, layers=checked_layers(layers))
