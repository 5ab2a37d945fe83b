"""Effects on the residual stream as a whole: louder, noisier."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from nmjax.interventions.draws import Drawing, normal
from nmjax.interventions.effect import Effect, check_number, static
from nmjax.interventions.where import checked_layers, layer_mask


def rms(x):
    """[..., D] -> float32 [..., 1], the root of the mean square."""
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True))


class GainLayers(Effect):
    """Multiplies `resid_post` by `max(0, 1 + dose * gain / n)` after each of its n layers."""

    gain: Any  # unbound: number; bound: [L]
    layers: Any = static(default="all")
    blends = False

    def bind(self, lm):
        mask = layer_mask(self.layers, lm.config.layers).astype(np.float32)
        return self.replace(gain=self.gain * mask / mask.sum(), layers=None)

    def resid_post(self, x, ctx):
        gain = 1 + self.dose * self.gain[:, ctx.layer]
        return x * jnp.where(gain >= 0, gain, 0)[:, None, None].astype(x.dtype)

    def clamps(self):
        change = self.dose * self.gain  # how many layers share it is known with the model
        return [f"gain_layers: 1 {change:+g} / layers, raised to 0 where below"] if change < -1 else []


def gain_layers(gain: float, layers: Any = "all") -> GainLayers:
    """Amplifies the residual stream by `1 + d gain / n` after each of the n given layers.

    Args:
      gain: above -1; the product over all n layers lies near `exp(d gain)`.
    """
    gain = check_number("gain_layers: gain", gain, "a number above -1", lambda value: value > -1)
    return GainLayers(gain=np.float32(gain), layers=checked_layers(layers))


class NoiseInResidual(Drawing):
    """Adds Gaussian noise to `resid_post`, with `dose * scale` times the RMS of the same token's residual."""

    scale: Any  # unbound: number; bound: [L]
    layers: Any = static(default="all")
    blends = False

    def bind(self, lm):
        return self.replace(
            scale=self.scale * layer_mask(self.layers, lm.config.layers).astype(np.float32), layers=None
        )

    def resid_post(self, x, ctx):
        noise = self.draw(ctx, normal, x.shape[2:])  # [B, T, D]
        size = (self.dose * self.scale[:, ctx.layer])[:, None, None]
        return x + (size * rms(x) * noise).astype(x.dtype)


def add_noise(scale: float, layers: Any = "mid") -> NoiseInResidual:
    """Adds noise of `d scale` times the RMS of the token's own residual, fresh at every token and layer.

    Args:
      scale: >= 0.
    """
    scale = check_number("add_noise: scale", scale, "a finite number >= 0", lambda value: value >= 0)
    return NoiseInResidual(scale=np.float32(scale), layers=checked_layers(layers))
