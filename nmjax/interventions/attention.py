"""Effects on attention: sharper or flatter scores, silent heads."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from nmjax.interventions.effect import Effect, check_number, static
from nmjax.interventions.where import checked_heads, checked_layers, head_mask, layer_mask


class ScaleQK(Effect):
    """Multiplies query-key scores, by scaling the queries: `q *= (1 + dose * gain) / (1 + dose * loss)`."""

    gain: Any  # unbound: number; bound: [L, N]
    loss: Any
    layers: Any = static(default="all")
    heads: Any = static(default=None)
    blends = False

    def bind(self, lm):
        chosen = layer_mask(self.layers, lm.config.layers)[:, None] & head_mask(self.heads, lm.config.heads)
        chosen = chosen.astype(np.float32)
        return self.replace(gain=self.gain * chosen, loss=self.loss * chosen, layers=None, heads=None)

    def query(self, q, ctx):
        dose = self.dose[:, None]
        factor = (1 + dose * self.gain[:, ctx.layer]) / (1 + dose * self.loss[:, ctx.layer])  # [B, N]
        return q * factor[:, None, :, None].astype(q.dtype)


def scale_qk(factor: float, layers: Any = "all", heads: Any = None) -> ScaleQK:
    """Scales attention scores before the softmax: above 1 sharpens, below 1 flattens.

    At dose d the factor is `1 + d (factor - 1)` if factor >= 1, else `1 / (1 + d (1/factor - 1))`: it never changes
    sign, whatever the dose.

    Args:
      factor: positive.
      layers: see `where.layer_mask`.
      heads: head indices, None = all.
    """
    factor = check_number("scale_qk: factor", factor, "a positive number", lambda value: value > 0)
    gain, loss = max(factor - 1.0, 0.0), max(1.0 / factor - 1.0, 0.0)
    layers, heads = checked_layers(layers), checked_heads(heads)
    return ScaleQK(gain=np.float32(gain), loss=np.float32(loss), layers=layers, heads=heads)


class MaskHeads(Effect):
    """Multiplies head outputs by `max(0, 1 - dose)` where masked. The others are not rescaled."""

    masked: Any = None  # bound: [L, N], 1 = masked
    layers: Any = static(default="all")
    heads: Any = static(default=None)
    blends = False

    def bind(self, lm):
        chosen = layer_mask(self.layers, lm.config.layers)[:, None] & head_mask(self.heads, lm.config.heads)
        return self.replace(masked=chosen.astype(np.float32), layers=None, heads=None)

    def head_out(self, x, ctx):
        gain = 1 - self.dose[:, None] * self.masked[:, ctx.layer]  # [B, N]
        gain = jnp.where(gain >= 0, gain, 0)  # `clip` would halve the derivative at both ends, which are doses 0 and 1
        return x * gain[:, None, :, None].astype(x.dtype)

    def clamps(self):
        return [f"mask_heads: gain {1 - self.dose:g} raised to 0"] if self.dose > 1 else []


def mask_heads(heads: Any, *, layers: Any = "all") -> MaskHeads:
    """Silences attention heads: `mask_heads([4], layers=[1])` masks head 4 of layer 1."""
    return MaskHeads(layers=checked_layers(layers), heads=checked_heads(heads))
