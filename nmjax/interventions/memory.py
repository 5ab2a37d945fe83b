"""Effects on what attention remembers. They act on scores and weights and never touch the stored keys and values.

Ages are `T - t`, the tokens from key t to query T; both are a row's own positions, so prefill and decode agree.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from nmjax.interventions.effect import Context, Effect, check_number, static
from nmjax.interventions.where import checked_layers, layer_mask

DECAY_MODES = ("score", "logit", "value")
WINDOW_EDGES = ("hard", "soft")
SEGMENTS = ("age", "origin")
OFF_STRIDE = 8.0  # nats that a key off the stride, or a window's width beyond a soft window, loses at dose 1


def _age(ctx: Context):
    """float32 [B, 1, T, S]; 0 at keys after the query, which the mask hides."""
    age = ctx.q_pos[:, None, :, None] - ctx.k_pos[:, None, None, :]
    return jnp.maximum(age, 0).astype(jnp.float32)


def _layered(effect, lm, *fields: str):
    """`effect` with each of these numbers spread over its layers [L]."""
    mask = layer_mask(effect.layers, lm.config.layers).astype(np.float32)
    return effect.replace(layers=None, **{name: getattr(effect, name) * mask for name in fields})


def _wide(x):
    """[B] -> [B, 1, 1, 1]."""
    return x[:, None, None, None]


class DecayKV(Effect):
    """Exponential forgetting with age in tokens, at rate `dose * rate` per token."""

    rate: Any  # unbound: number; bound: [L]
    mode: str = static(default="score")
    layers: Any = static(default="all")
    blends = False

    def bind(self, lm):
        return _layered(self, lm, "rate")

    def scores(self, x, ctx):
        loss = _wide(self.dose * self.rate[:, ctx.layer]) * _age(ctx)
        return x * jnp.exp(-loss) if self.mode == "score" else x - loss


class DecayValues(Effect):
    """Exponential fading of what is read: attention weights times `exp(-dose * rate * age)`, not renormalised."""

    rate: Any  # unbound: number; bound: [L]
    layers: Any = static(default="all")
    blends = False

    def bind(self, lm):
        return _layered(self, lm, "rate")

    def pattern(self, x, ctx):
        return x * jnp.exp(-_wide(self.dose * self.rate[:, ctx.layer]) * _age(ctx))


def decay_kv(rate: float, mode: str = "score", layers: Any = "all") -> DecayKV | DecayValues:
    """Lets attention to the past fade.

    `mode="score"` is the reference methodology, `S'[T, t] = S[T, t] exp(-rate (T - t))` on the raw scores. It pulls
    scores of either sign to zero, so a distant token that was ignored *gains* attention. `mode="logit"` subtracts
    `rate (T - t)`, which multiplies the attention weight by `exp(-rate (T - t))`: the soft window one usually means.
    `mode="value"` multiplies what attention reads by it and doesn't renormalise, as if the cached values had decayed.

    Args:
      rate: per token, >= 0. A half-life of n tokens is `ln 2 / n` (in logit and value mode).
    """
    if mode not in DECAY_MODES:
        raise ValueError(f"decay_kv: mode={mode!r}, wanted one of {DECAY_MODES}")
    rate = check_number("decay_kv: rate", rate, "a finite number >= 0", lambda value: value >= 0)
    if mode == "value":
        return DecayValues(rate=np.float32(rate), layers=checked_layers(layers))
    return DecayKV(rate=np.float32(rate), mode=mode, layers=checked_layers(layers))


class WindowKV(Effect):
    """Hides keys older than a window of `width / dose` tokens, at least one; none at dose 0."""

    width: Any
    inside: Any = None  # bound: [L], 1 in the layers it acts in
    edge: str = static(default="hard")
    layers: Any = static(default="all")
    blends = False

    def bind(self, lm):
        return self.replace(inside=layer_mask(self.layers, lm.config.layers).astype(np.float32), layers=None)

    def scores(self, x, ctx):
        age, dose = _age(ctx), self.dose * self.inside[:, ctx.layer]
        if self.edge == "soft":
            return x - OFF_STRIDE * jnp.maximum(age * _wide(dose / self.width) - 1, 0)
        width = jnp.maximum(jnp.round(self.width / jnp.maximum(dose, 1e-9)), 1)
        return jnp.where(age < _wide(width), x, jnp.finfo(x.dtype).min)


def window_kv(n: float, edge: str = "hard", layers: Any = "all") -> WindowKV:
    """Lets a token see only the `round(n / d)` newest tokens at dose d, itself always among them.

    Args:
      n: tokens, >= 1.
      edge: "hard" hides what is older; "soft" lowers its score by 8 nats for every window width beyond the first.
    """
    if edge not in WINDOW_EDGES:
        raise ValueError(f"window_kv: edge={edge!r}, wanted one of {WINDOW_EDGES}")
    n = check_number("window_kv: n", n, "a number of tokens >= 1", lambda value: value >= 1)
    return WindowKV(width=np.float32(n), edge=edge, layers=checked_layers(layers))


class StrideKV(Effect):
    """Lowers by `8 * dose` the scores of keys at positions off the stride, the newest and the first ones excepted."""

    loss: Any  # unbound: number; bound: [L]
    stride: Any
    newest: Any
    first: Any
    layers: Any = static(default="all")
    blends = False

    def bind(self, lm):
        return _layered(self, lm, "loss")

    def scores(self, x, ctx):
        k_pos = ctx.k_pos[:, None, None, :].astype(jnp.float32)
        dropped = (k_pos % _wide(self.stride) != 0) & (k_pos >= _wide(self.first)) & (_age(ctx) >= _wide(self.newest))
        return x - _wide(self.dose * self.loss[:, ctx.layer]) * dropped


def stride_kv(stride: int, newest: int = 8, first: int = 4, layers: Any = "all") -> StrideKV:
    """Thins out memory: keeps every `stride`-th position, the `newest` tokens and the row's `first` ones.

    The scores of all others fall by `8 d` nats at dose d: at dose 1 they keep a weight of exp(-8) of what they had.

    Args:
      stride: >= 1; 1 keeps everything.
      newest: >= 1, counted from the query, which is one of them.
      first: >= 0.
    """

    def count(name, value, low):
        wanted = f"an integer >= {low}"
        return np.float32(check_number(f"stride_kv: {name}", value, wanted, lambda v: v >= low and v.is_integer()))

    return StrideKV(
        loss=np.float32(OFF_STRIDE),
        stride=count("stride", stride, 1),
        newest=count("newest", newest, 1),
        first=count("first", first, 0),
        layers=checked_layers(layers),
    )


class SegmentKV(Effect):
    """Gains and decay rates for two segments of memory, the recent one and the old one, in log attention."""

    recent_gain: Any  # nats; unbound: numbers; bound: [L]
    old_gain: Any
    recent_rate: Any  # nats per token of age
    old_rate: Any
    split: Any  # tokens
    by: str = static(default="age")
    layers: Any = static(default="all")
    blends = False

    def bind(self, lm):
        return _layered(self, lm, "recent_gain", "old_gain", "recent_rate", "old_rate")

    def scores(self, x, ctx):
        age = _age(ctx)
        if self.by == "age":
            recent = age < _wide(self.split)
        else:
            recent = (ctx.k_pos >= ctx.prompt_len[:, None])[:, None, None]

        def choose(recent_value, old_value):
            return jnp.where(recent, _wide(recent_value[:, ctx.layer]), _wide(old_value[:, ctx.layer]))

        gain = choose(self.recent_gain, self.old_gain) - choose(self.recent_rate, self.old_rate) * age
        return x + _wide(self.dose) * gain


def _segment(name: str, gains, rates, split, by, layers) -> SegmentKV:
    if by not in SEGMENTS:
        raise ValueError(f"{name}: by={by!r}, wanted one of {SEGMENTS}")
    split = check_number(f"{name}: split", split, "a number of tokens >= 1", lambda value: value >= 1)
    return SegmentKV(
        recent_gain=np.float32(gains[0]),
        old_gain=np.float32(gains[1]),
        recent_rate=np.float32(rates[0]),
        old_rate=np.float32(rates[1]),
        split=np.float32(split),
        by=by,
        layers=checked_layers(layers),
    )


def segment_kv(
    recent: float = 0.5, old: float = -0.25, split: float = 20, by: str = "age", layers: Any = "all"
) -> SegmentKV:
    """Adds `d recent` nats to the scores of recent tokens and `d old` to those of old ones.

    Args:
      recent, old: may be negative.
      split: tokens younger than this are recent; with `by="origin"` it doesn't matter.
      by: "age", or "origin": generated tokens are recent, the prompt is old.
    """
    recent = check_number("segment_kv: recent", recent, "a finite number")
    old = check_number("segment_kv: old", old, "a finite number")
    return _segment("segment_kv", (recent, old), (0, 0), split, by, layers)


def decay_segments(
    recent: float = 0.0, old: float = 0.1, split: float = 20, by: str = "age", layers: Any = "all"
) -> SegmentKV:
    """Logit decay with two rates: scores fall by `d rate` nats per token of age, by segment.

    Args:
      recent, old: rates per token, >= 0.
      split, by: as in `segment_kv`.
    """
    rates = [
        check_number(f"decay_segments: {name}", value, "a finite number >= 0", lambda v: v >= 0)
        for name, value in (("recent", recent), ("old", old))
    ]
    return _segment("decay_segments", (0, 0), rates, split, by, layers)
