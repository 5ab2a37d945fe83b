"""Effects on what attention remembers. They act on scores and never touch the stored keys and values."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from nmjax.interventions.effect import Effect, check_number, static
from nmjax.interventions.where import checked_layers, layer_mask

DECAY_MODES = ("score", "logit")


class DecayKV(Effect):
    """Exponential forgetting with age `T - t` in tokens, at rate `dose * rate` per token."""

    rate: Any  # unbound: number; bound: [L]
    mode: str = static(default="score")
    layers: Any = static(default="all")
    blends = False

    def bind(self, lm):
        return self.replace(rate=self.rate * layer_mask(self.layers, lm.config.layers).astype(np.float32), layers=None)

    def scores(self, x, ctx):
        age = jnp.maximum(ctx.q_pos[:, None, :, None] - ctx.k_pos[:, None, None, :], 0).astype(jnp.float32)
        loss = (self.dose * self.rate[:, ctx.layer])[:, None, None, None] * age
        return x * jnp.exp(-loss) if self.mode == "score" else x - loss


def decay_kv(rate: float, mode: str = "score", layers: Any = "all") -> DecayKV:
    """Lets attention to the past fade.

    `mode="score"` is the reference methodology, `S'[T, t] = S[T, t] exp(-rate (T - t))` on the raw scores. It pulls
    scores of either sign to zero, so a distant token that was ignored *gains* attention. `mode="logit"` subtracts
    `rate (T - t)`, which multiplies the attention weight by `exp(-rate (T - t))`: the soft window one usually means.

    Args:
      rate: per token, >= 0. A half-life of n tokens is `ln 2 / n` (in logit mode).
    """
    if mode not in DECAY_MODES:
        raise ValueError(f"decay_kv: mode={mode!r}, wanted one of {DECAY_MODES}")
    rate = check_number("decay_kv: rate", rate, "a finite number >= 0", lambda value: value >= 0)
    return DecayKV(rate=np.float32(rate), mode=mode, layers=checked_layers(layers))
