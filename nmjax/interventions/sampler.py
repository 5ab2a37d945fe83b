"""Effects on the next-token distribution, applied to the logits before the caller's own temperature and cuts."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from nmjax.interventions.effect import Effect, check_number
from nmjax.sampling import keep_top_k, keep_top_p

COLDEST = 0.05  # a temperature never falls below this, nor a nucleus below NARROWEST, however high the dose
NARROWEST = 0.1


class Temperature(Effect):
    """Divides logits by `max(floor, 1 + dose * change)`."""

    change: Any  # T - 1
    floor: Any
    blends = False
    keeps_best = True

    def logits(self, x, ctx):
        return x / jnp.maximum(self.floor, 1 + self.dose * self.change)[:, None]

    def clamps(self):
        value = 1 + self.dose * self.change
        return [f"temperature {value:g} raised to {self.floor:g}"] if value < self.floor else []


def temperature(value: float) -> Temperature:
    """Sampling temperature: at dose d, `max(0.05, 1 + d (value - 1))`. Multiplies the caller's own temperature."""
    value = check_number("temperature: value", value, "a positive number", lambda number: number > 0)
    return Temperature(change=np.float32(value - 1.0), floor=np.float32(min(COLDEST, value)))


class TopP(Effect):
    """Keeps the smallest set of tokens whose mass reaches `max(floor, 1 - dose * cut)`."""

    cut: Any  # 1 - p
    floor: Any
    blends = False
    truncates = True
    keeps_best = True

    def logits(self, x, ctx):
        return keep_top_p(x, jnp.maximum(self.floor, 1 - self.dose * self.cut))

    def clamps(self):
        value = 1 - self.dose * self.cut
        return [f"top_p {value:g} raised to {self.floor:g}"] if value < self.floor else []


def top_p(value: float) -> TopP:
    """Nucleus sampling (Holtzman et al. 2020); at dose d, `p = max(0.1, 1 - d (1 - value))`. p = 1 changes nothing."""
    value = check_number("top_p: value", value, "a number in (0, 1]", lambda number: 0 < number <= 1)
    return TopP(cut=np.float32(1.0 - value), floor=np.float32(min(NARROWEST, value)))


class TopK(Effect):
    """Keeps the `round(k / dose)` likeliest tokens, at least one; all of them at dose 0."""

    k: Any
    blends = False
    truncates = True
    keeps_best = True

    def logits(self, x, ctx):
        wanted = self.k / jnp.maximum(self.dose, 1e-6)
        return keep_top_k(x, jnp.where(wanted >= x.shape[-1], 0, jnp.maximum(jnp.round(wanted), 1)).astype(jnp.int32))


def top_k(value: int) -> TopK:
    """Keeps the `value` likeliest tokens (and ties with the last of them); 0 keeps all."""
    k = check_number("top_k: value", value, "an integer >= 0", lambda number: number >= 0 and number.is_integer())
    return TopK(k=np.float32(k or np.inf))


class FrequencyPenalty(Effect):
    """Subtracts `dose * penalty * count` from each generated token's logit (as OpenAI does: not the prompt)."""

    penalty: Any
    blends = False
    reads_counts = True

    def logits(self, x, ctx):
        return x - (self.dose * self.penalty)[:, None] * ctx.counts


def frequency_penalty(value: float) -> FrequencyPenalty:
    """Makes each repetition of a generated token less likely by `value` nats; negative values encourage repetition."""
    value = check_number("frequency_penalty: value", value, "a finite number")
    return FrequencyPenalty(penalty=np.float32(value))
