"""Effects on the next-token distribution, applied to the logits before the caller's own temperature and cuts."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.interventions.adapter import UseAdapter
from nmjax.interventions.effect import Effect, check_number, static
from nmjax.interventions.inputs import Preface
from nmjax.interventions.sites import SITES
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


class PulseTemperature(Effect):
    """Divides logits by `max(0.05, 1 + dose * (base - 1 - delta * pulse(t)))`, t the generated token's number."""

    delta: Any
    base: Any
    period: Any  # tokens
    width: Any
    blends = False
    keeps_best = True

    def logits(self, x, ctx):
        pulse = ctx.written % self.period.astype(jnp.int32) < self.width
        value = 1 + self.dose * (self.base - 1) - self.dose * self.delta * pulse
        return x / jnp.maximum(COLDEST, value)[:, None]

    def clamps(self):
        value = 1 + self.dose * (self.base - 1) - self.dose * self.delta
        return [f"pulse_temperature {value:g} raised to {COLDEST:g}"] if value < COLDEST else []


def pulse_temperature(delta: float, period: int = 20, width: int = 5, base: float = 1.0) -> PulseTemperature:
    """Lowers the temperature in pulses: `base - delta` for the first `width` of every `period` generated tokens.

    At dose d, with t the row's own generated-token number from 0: `1 + d (base - 1)`, less `d delta` where
    `t mod period < width`, and never below 0.05.

    Args:
      delta: a negative one heats.
      period, width: tokens, 1 <= width <= period.
      base: > 0.
    """
    delta = check_number("pulse_temperature: delta", delta, "a finite number")
    base = check_number("pulse_temperature: base", base, "a positive number", lambda number: number > 0)
    length = check_number("pulse_temperature: period", period, "an integer >= 1", _count)
    wanted = f"an integer from 1 to the period, {length:g}"
    pulse = check_number("pulse_temperature: width", width, wanted, lambda number: _count(number) and number <= length)
    values = dict(delta=delta, base=base, period=length, width=pulse)
    return PulseTemperature(**{name: np.float32(value) for name, value in values.items()})


def _count(number: float) -> bool:
    return number >= 1 and number.is_integer()


class TopP(Effect):
    """Keeps the smallest set of tokens whose mass reaches `max(floor, 1 - dose * cut)`."""

    cut: Any  # 1 - p
    floor: Any
    blends = False
    truncates = True
    costly = True
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
    costly = True
    keeps_best = True

    def logits(self, x, ctx):
        wanted = self.k / jnp.maximum(self.dose, 1e-6)
        return keep_top_k(x, jnp.where(wanted >= x.shape[-1], 0, jnp.maximum(jnp.round(wanted), 1)).astype(jnp.int32))


def top_k(value: int) -> TopK:
    """Keeps the `value` likeliest tokens (and ties with the last of them); 0 keeps all."""
    k = check_number("top_k: value", value, "an integer >= 0", lambda number: number >= 0 and number.is_integer())
    return TopK(k=np.float32(k or np.inf))


class MinP(Effect):
    """Removes tokens less likely than `min(1, dose * share)` times the likeliest."""

    share: Any
    blends = False
    truncates = True
    keeps_best = True

    def logits(self, x, ctx):
        return jnp.where(x >= x.max(-1, keepdims=True) + jnp.log(jnp.minimum(self.dose * self.share, 1)), x, -jnp.inf)

    def clamps(self):
        value = self.dose * self.share
        return [f"min_p {value:g} lowered to 1"] if value > 1 else []


def min_p(value: float) -> MinP:
    """Keeps tokens at least `d value` times as likely as the likeliest (Nguyen et al. 2024); 0 keeps all."""
    value = check_number("min_p: value", value, "a number from 0 to 1", lambda number: 0 <= number <= 1)
    return MinP(share=np.float32(value))


class CountPenalty(Effect):
    """Subtracts `dose * (each * count + once * [count > 0])` from the logits of generated tokens (not the prompt's)."""

    each: Any
    once: Any
    blends = False
    reads_counts = True

    def joined(self, following):
        """Penalties in a row add up."""
        if type(following) is not CountPenalty or self.where or following.where:
            return None
        each, once = (
            self.dose * getattr(self, name) + following.dose * getattr(following, name) for name in ("each", "once")
        )
        return self.replace(dose=np.float32(1), each=each, once=once)

    def logits(self, x, ctx):
        return x - self.dose[:, None] * (self.each[:, None] * ctx.counts + self.once[:, None] * (ctx.counts > 0))


def frequency_penalty(value: float) -> CountPenalty:
    """Makes a generated token less likely by `d value` nats for each time it was generated (as OpenAI does).

    Negative values encourage repetition.
    """
    return CountPenalty(each=_penalty("frequency_penalty: value", value), once=np.float32(0))


def presence_penalty(value: float) -> CountPenalty:
    """Makes a token that was generated at all less likely by `d value` nats (as OpenAI does)."""
    return CountPenalty(each=np.float32(0), once=_penalty("presence_penalty: value", value))


def repetition_penalty(beta: float) -> CountPenalty:
    """`logits[token] -= d beta count(token)` over generated tokens: the methodology's companion of QK scaling.

    Not the division of the same name in Hugging Face, which depends on the sign of a logit. It is the formula of
    `frequency_penalty`, under the name that the methodology gives it.
    """
    return CountPenalty(each=_penalty("repetition_penalty: beta", beta), once=np.float32(0))


def _penalty(argument: str, value) -> np.float32:
    return np.float32(check_number(argument, value, "a finite number"))


class BiasTokens(Effect):
    """Adds `dose * bias[token]` to the logits."""

    bias: Any  # unbound: (nats on the words, nats on the opposites); bound: [V]
    words: Any = static(default=())
    opposites: Any = static(default=())
    blends = False

    def bind(self, lm):
        here, there = (first_token_ids(lm, words) for words in (self.words, self.opposites))
        if here == there:
            raise ValueError("bias_tokens: words and opposites begin with the same tokens of this model")
        bias = np.zeros(lm.config.vocab, np.float32)
        # A token that both lists begin with says nothing about either.
        bias[sorted(here - there)], bias[sorted(there - here)] = self.bias
        return self.replace(bias=bias, words=(), opposites=())

    def joined(self, following):
        """Biases in a row add up."""
        if type(following) is not BiasTokens or self.where or following.where:
            return None
        return self.replace(dose=np.float32(1), bias=self.dose * self.bias + following.dose * following.bias)

    def logits(self, x, ctx):
        return x + self.dose[:, None] * self.bias


def bias_tokens(words: Sequence[str], bias: float, opposites: Sequence[str] = (), against: float = 0.0) -> BiasTokens:
    """Makes the words likelier by `d bias` nats, and the opposites by `d against`, at the token each begins with.

    Args:
      words, opposites: each counts with and without a leading space, as written and capitalised.
      bias, against: nats; a negative one makes less likely.
    """
    lists = []
    for name, given in (("words", words), ("opposites", opposites)):
        if isinstance(given, str) or not all(isinstance(word, str) and word.strip() for word in given):
            raise ValueError(f"bias_tokens: {name}={given!r}, wanted a list of words")
        lists.append(tuple(given))
    if not lists[0]:
        raise ValueError("bias_tokens: words is empty, wanted at least one word")
    nats = [check_number(f"bias_tokens: {n}", v, "a finite number") for n, v in (("bias", bias), ("against", against))]
    return BiasTokens(bias=np.asarray(nats, np.float32), words=lists[0], opposites=lists[1])


def first_token_ids(lm, words: Sequence[str]) -> set[int]:
    """The tokens that the words begin with, in all their spellings; one that only holds white space doesn't count.

    Raises:
      ValueError: the model has no tokenizer, or no spelling of a word begins with a token that it knows.
    """
    if words and lm.tokenizer is None:
        raise ValueError("bias_tokens: this model has no tokenizer, so it has no words")
    known = lm.__dict__.setdefault("_first_token_ids", {})  # tokenising a list takes longer than a step of decoding
    for word in words:
        if word not in known:
            spellings = [space + spelling for spelling in (word, word.capitalize()) for space in ("", " ")]
            begins = {_first_token(lm, spelling) for spelling in spellings}
            if begins == {None}:
                raise ValueError(f"bias_tokens: this model has no token that {word!r} begins with")
            known[word] = begins - {None}
    return set().union(*(known[word] for word in words))


def _first_token(lm, text: str) -> int | None:
    """The first token that holds more than white space; None where it is the one for unknown text."""
    for token in lm.encode(text, "bias_tokens: words", special=False):
        if lm.tokenizer.decode([token]).strip():
            return None if token == lm.tokenizer.unk_token_id else token
    return None


class Contrast(Effect):
    """Subtracts `dose * alpha` times the log-probabilities of the same row under another intervention."""

    alpha: Any
    against: Any = None  # unbound: an Intervention; bound: None
    blends = False
    costly = True

    def bind(self, lm):
        return self.replace(against=None)

    def clamps(self):
        return [f"contrast: {note}" for note in self.against.notes()]

    def logits(self, x, ctx):
        return x - (self.dose * self.alpha)[:, None] * jax.nn.log_softmax(ctx.rivals)


def contrast(against: Any, alpha: float = 0.5) -> Contrast:
    """Contrastive decoding (Li et al. 2023) against the same model under another intervention.

    `logits - d alpha log p_other`: what the other run finds likely, too, becomes less likely. The other run is a hidden
    row of the same batch, with the same tokens, so it costs one row; rows without this effect, or with it at dose 0,
    have none. Combine it with `min_p`, which keeps it from promoting what the model itself finds absurd.

    Args:
      against: an effect or intervention, without contrasts and prefaces. What it does at the `logits` site doesn't
        count: the other run's probabilities are those that its network gives.
      alpha: >= 0.
    """
    from nmjax.interventions.compose import as_intervention  # which builds on effects

    other = as_intervention(against, "contrast: against")
    if any(isinstance(effect, Contrast) for effect in other.effects):
        raise ValueError("contrast: against holds a contrast itself, wanted an intervention without one")
    if any(isinstance(effect, Preface) for effect in other.effects):
        raise ValueError("contrast: against holds a preface, but the other run reads the same tokens as the row")
    inside = [site for site in SITES if site != "logits"]
    adapted = any(isinstance(effect, UseAdapter) for effect in other.effects)
    if other.effects and not adapted and not any(effect.touches(site) for effect in other.effects for site in inside):
        names = ", ".join(type(effect).__name__ for effect in other.effects)
        raise ValueError(f"contrast: against={names} acts at `logits` only, wanted an effect inside the network")
    alpha = check_number("contrast: alpha", alpha, "a finite number >= 0", lambda number: number >= 0)
    return Contrast(alpha=np.float32(alpha), against=other)
