"""The dose table: what a pack's effect is in this toolkit, and its value as a function of `u = weight * dose`.

Every line is a pure function of the weight; the dose comes later, by `pack.at(dose)`. Effects whose identity lies at
the end of their range (decay, masking, noise, ...) know only `up`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nmjax.data.word_lists import PERSONA, STYLE
from nmjax.interventions import attention, inputs, memory, residual, sampler, steering
from nmjax.interventions.effect import Effect
from nmjax.interventions.where import ON_EMPTY


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the table."""

    python: str  # the transform it builds on
    site: str
    value: str  # the value as a function of u, as the documentation prints it
    identity: str
    build: Callable[..., Effect]  # (weight, up, **parameters) -> the effect at dose 1
    number: Callable[[float, bool, float], str]  # (u, up, weight) -> its value in numbers
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # name -> JSON Schema of its value
    directions: tuple[str, ...] = ("up", "down")


_LAYERS = {"layers": {"type": ["string", "number", "array"]}}
_HEADS = {"heads": {"type": ["string", "integer", "array"]}, "on_empty": {"enum": list(ON_EMPTY)}}
_TEXT = {"type": "string", "minLength": 1}
# A vector is a file of this name.
_VECTOR = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9_.-]*$"}
_VECTORS = {"type": ["string", "array"], "items": _VECTOR} | {"pattern": _VECTOR["pattern"]}
_SEED = {"type": "integer", "minimum": 0}
_WORDS = {"type": "array", "items": _TEXT, "minItems": 1}
_COUNT = {"type": "integer", "minimum": 1}
_UP = ("up",)


def _signed(value: float, up: bool) -> float:
    return value if up else -value


def _scale_qk(weight, up, layers="mid", heads="induction", on_empty="middle"):
    factor = 1 + 2 * weight if up else 1 / (1 + 2 * weight)
    return attention.scale_qk(factor, layers, None if heads == "all" else heads, on_empty)


def _temperature(weight, up):
    return sampler.Temperature(change=np.float32(_signed(weight, up)), floor=np.float32(sampler.COLDEST))


def _risk(weight, up, preference="bold"):
    return _temperature(0.5 * weight, up == (preference == "bold"))


def _top_p(weight, up):
    return sampler.TopP(cut=np.float32(0.3 * weight), floor=np.float32(sampler.NARROWEST))


def _pulse(weight, up, pulse_interval=20, pulse_duration=5):
    return sampler.pulse_temperature(_signed(-0.5 * weight, up), pulse_interval, pulse_duration)


def _contrast(weight, up, against=None):
    from nmjax.packs import parse_effects  # a list of effects within an effect

    if against is None:
        other = attention.scale_qk(1 / 3, layers="all")
    else:
        other = parse_effects(against, "against")
        if any(isinstance(effect, inputs.Preface) for effect in other.effects):
            raise ValueError("against holds a structured_prefaces; both runs read the same tokens")
    return sampler.contrast(other, 0.3 * weight)


def _mask(weight, up, layers="all", heads=None):
    if heads is None:
        return attention.mask_heads(p=0.4 * weight, layers=layers)
    return attention.mask_heads(heads, layers=layers).at(weight)


def _reweight(weight, up, layers="all", heads="induction", on_empty="middle"):
    return attention.scale_heads(1 + _signed(0.5 * weight, up), None if heads == "all" else heads, layers, on_empty)


def _window(weight, up, layers="all", edge="hard"):
    # Weight 0 is a window as wide as any text.
    return memory.window_kv(min(20 / weight, 1e6) if weight > 0 else 1e6, edge, layers)


def _stride(weight, up, layers="all", newest=8, first=4):
    return memory.stride_kv(1 + round(5 * weight), newest, first, layers)


def _segments(weight, up, layers="all", window_size=20, by="age"):
    return memory.segment_kv(_signed(0.5 * weight, up), _signed(-0.25 * weight, up), window_size, by, layers)


def _steering(weight, up, steering_type=None, vector=None, layers="mid", coef="relative"):
    if (steering_type is None) == (vector is None):
        raise ValueError("wanted exactly one of steering_type and vector")
    return steering.steer(steering_type or vector, _signed(0.3 * weight, up), layers=layers, coef=coef)


def _random_direction(weight, up, reference_steering_type=(), layers="mid", seed=0):
    return steering.steer_placebo("random", reference_steering_type, _signed(0.3 * weight, up), layers, seed=seed)


def _orthogonal(weight, up, reference_steering_type=(), layers="mid", seed=0):
    return steering.steer_placebo("orthogonal", reference_steering_type, _signed(0.3 * weight, up), layers, seed=seed)


def _preface(weight, up, preface_text=None):
    if preface_text is None:
        raise ValueError("preface_text is missing, wanted the hidden text")
    return inputs.preface(preface_text).at(weight)


def _bias(lists):
    def build(weight, up, bias_type=None, persona_type=None, words=None, opposites=()):
        kind = bias_type or persona_type or (None if words else next(iter(lists)))
        if kind is not None and words is not None:
            raise ValueError("wanted a list by its name or words, not both")
        if kind is not None and kind not in lists:
            raise ValueError(f"the word list {kind!r} is unknown, wanted one of {sorted(lists)}")
        if kind is not None and opposites:
            raise ValueError("opposites come with words, a list by its name has its own")
        words, opposites = lists[kind] if kind is not None else (words, opposites)
        return sampler.bias_tokens(words, _signed(3.2 * weight, up), opposites, _signed(-1.6 * weight, up))

    return build


def _plain(scale: float, unit: str = ""):
    """`scale * u`, with the sign of the direction."""
    return lambda u, up, weight: f"{_signed(scale * u, up):+.4g}{unit}"


RULES: Mapping[str, Rule] = {
    "qk_score_scaling": Rule(
        "scale_qk", "query", "factor 1 + 2u (up), 1 / (1 + 2u) (down)", "1", _scale_qk,
        lambda u, up, w: f"factor {1 + 2 * u if up else 1 / (1 + 2 * u):.4g}", _LAYERS | _HEADS,
    ),
    "temperature": Rule(
        "temperature", "logits", "1 + u (up), max(0.05, 1 - u) (down)", "1", _temperature,
        lambda u, up, w: f"T {max(sampler.COLDEST, 1 + _signed(u, up)):.4g}",
    ),
    "pulsed_sampler": Rule(
        "pulse_temperature", "logits", "1 - 0.5u (down), 1 + 0.5u (up) in the pulse, not below 0.05", "1", _pulse,
        lambda u, up, w: f"T {max(sampler.COLDEST, 1 + _signed(0.5 * u, up)):.4g} in the pulse",
        {"pulse_interval": _COUNT, "pulse_duration": _COUNT},
    ),
    "compute_at_test_scheduling": Rule(
        "pulse_temperature", "logits", "1 - 0.6u in bursts, not below 0.05", "1",
        lambda weight, up, burst_length=10: sampler.pulse_temperature(0.6 * weight, 2 * burst_length, burst_length),
        lambda u, up, w: f"T {max(sampler.COLDEST, 1 - 0.6 * u):.4g} in bursts", {"burst_length": _COUNT}, _UP,
    ),
    "risk_preference_steering": Rule(
        "temperature", "logits", "T 1 + 0.5u (bold), max(0.05, 1 - 0.5u) (cautious); reversed by down", "1", _risk,
        lambda u, up, w: "T {:.4g} if bold, {:.4g} if cautious".format(
            *(max(sampler.COLDEST, 1 + _signed(0.5 * u, up == bold)) for bold in (True, False))
        ),
        {"preference": {"enum": ["bold", "cautious"]}},
    ),
    "top_p": Rule(
        "top_p", "logits", "max(0.1, 1 - 0.3u)", "1, bypassed exactly", _top_p,
        lambda u, up, w: f"p {max(sampler.NARROWEST, 1 - 0.3 * u):.4g}", directions=("down",),
    ),
    "frequency_penalty": Rule(
        "frequency_penalty", "logits", "0.5u per generated occurrence (up), -0.5u (down)", "0",
        lambda weight, up: sampler.frequency_penalty(_signed(0.5 * weight, up)), _plain(0.5, " nats an occurrence"),
    ),
    "presence_penalty": Rule(
        "presence_penalty", "logits", "2u once a token was generated (up), -2u (down)", "0",
        lambda weight, up: sampler.presence_penalty(_signed(2 * weight, up)), _plain(2, " nats"),
    ),
    "repetition_penalty": Rule(
        "repetition_penalty", "logits", "1.15u per generated occurrence", "0",
        lambda weight, up: sampler.repetition_penalty(1.15 * weight), _plain(1.15, " nats an occurrence"),
        directions=_UP,
    ),
    "style_affect_logit_bias": Rule(
        "bias_tokens", "logits", "3.2u nats on the words, -1.6u on their opposites (down: reversed)", "0", _bias(STYLE),
        _plain(3.2, " nats on the words"),
        {"bias_type": {"enum": sorted(STYLE)}, "words": _WORDS, "opposites": _WORDS},
    ),
    "persona_voice_constraints": Rule(
        "bias_tokens", "logits", "3.2u nats on the persona's words, -1.6u on their opposites", "0", _bias(PERSONA),
        _plain(3.2, " nats on the words"), {"persona_type": {"enum": sorted(PERSONA)}},
    ),
    "contrastive_decoding": Rule(
        "contrast", "logits", "alpha 0.3u, against the same model under other effects", "0", _contrast,
        lambda u, up, w: f"alpha {0.3 * u:.4g}", {"against": {"type": "array", "minItems": 1}}, _UP,
    ),
    "exponential_decay_kv": Rule(
        "decay_kv", "scores", "rate 0.3u per token", "0",
        lambda weight, up, mode="score", layers="all": memory.decay_kv(0.3 * weight, mode=mode, layers=layers),
        lambda u, up, w: f"rate {0.3 * u:.4g} a token", _LAYERS | {"mode": {"enum": list(memory.DECAY_MODES)}}, _UP,
    ),
    "kv_decay": Rule(
        "decay_kv", "pattern", "rate 0.15u per token on the values read", "0",
        lambda weight, up, layers="all": memory.decay_kv(0.15 * weight, mode="value", layers=layers),
        lambda u, up, w: f"rate {0.15 * u:.4g} a token", _LAYERS, _UP,
    ),
    "truncation_kv": Rule(
        "window_kv", "scores", "the round(20 / u) newest tokens, itself always among them", "no window", _window,
        lambda u, up, w: f"window {max(1, round(20 / u))} tokens" if u > 1e-4 else "no window",
        _LAYERS | {"edge": {"enum": list(memory.WINDOW_EDGES)}}, _UP,
    ),
    "stride_compression_kv": Rule(
        "stride_kv", "scores", "stride 1 + round(5 weight); -8 dose nats on keys off it", "dose 0", _stride,
        lambda u, up, w: f"stride {1 + round(5 * w)}, {-8 * u / w if w else 0:.4g} nats off it",
        _LAYERS | {"newest": _COUNT, "first": {"type": "integer", "minimum": 0}}, _UP,
    ),
    "segment_gains_kv": Rule(
        "segment_kv", "scores", "+0.5u nats on recent tokens, -0.25u on old ones (down: reversed)", "0", _segments,
        lambda u, up, w: f"{_signed(0.5 * u, up):+.4g} nats recent, {_signed(-0.25 * u, up):+.4g} old",
        _LAYERS | {"window_size": _COUNT, "by": {"enum": list(memory.SEGMENTS)}},
    ),
    "head_masking_dropout": Rule(
        "mask_heads", "head_out", "each head off with p = 0.4u; with `heads`, gain 1 - u on these, not below 0", "0",
        _mask, lambda u, up, w: f"p {min(1, 0.4 * u):.4g} (gain {max(0, 1 - u):.4g} on a fixed set)",
        _LAYERS | {"heads": {"type": ["integer", "array"]}}, _UP,
    ),
    "head_reweighting": Rule(
        "scale_heads", "head_out", "gain 1 + 0.5u (up), 1 - 0.5u (down)", "1", _reweight,
        lambda u, up, w: f"gain {max(0, 1 + _signed(0.5 * u, up)):.4g}", _LAYERS | _HEADS,
    ),
    "attention_oscillation": Rule(
        "oscillate_attention", "head_out", "gain 1 + 0.2u sin(0.1 t), t the position of the token", "0",
        lambda weight, up, oscillation_type="sine", layers="all": attention.oscillate_attention(
            0.2 * weight, oscillation_type, layers=layers
        ),
        lambda u, up, w: f"amplitude {0.2 * u:.4g}",
        _LAYERS | {"oscillation_type": {"enum": list(attention.WAVES)}}, _UP,
    ),
    "attention_sinks_anchors": Rule(
        "anchor_attention", "scores", "0.4u nats on the first tokens (up), -0.4u (down)", "0",
        lambda weight, up, first=4, layers="all": attention.anchor_attention(_signed(0.4 * weight, up), first, layers),
        _plain(0.4, " nats"), _LAYERS | {"first": _COUNT},
    ),
    "positional_bias_tweak": Rule(
        "bias_positions", "scores", "0.3u nats times the shape over positions (up), -0.3u (down)", "0",
        lambda weight, up, bias_type="recency", layers="all": attention.bias_positions(
            _signed(0.3 * weight, up), bias_type, layers
        ),
        _plain(0.3, " nats"), _LAYERS | {"bias_type": {"enum": list(attention.SHAPES)}},
    ),
    "steering": Rule(
        "steer", "resid_post", "coefficient 0.3u (up), -0.3u (down), relative to the token's own residual norm", "0",
        _steering, _plain(0.3, " of the residual's norm"),
        _LAYERS | {"steering_type": _VECTOR, "vector": {"type": "array"}, "coef": {"enum": list(steering.COEFS)}},
    ),
    "random_direction": Rule(
        "steer_placebo", "resid_post", "coefficient 0.3u (up), -0.3u (down) along a random direction", "0",
        _random_direction, _plain(0.3, " of the residual's norm"),
        _LAYERS | {"reference_steering_type": _VECTORS, "seed": _SEED},
    ),
    "random_orthogonal_steering": Rule(
        "steer_placebo", "resid_post", "coefficient 0.3u (up), -0.3u (down) at right angles to the references", "0",
        _orthogonal, _plain(0.3, " of the residual's norm"),
        _LAYERS | {"reference_steering_type": _VECTORS, "seed": _SEED},
    ),
    "layer_wise_gain": Rule(
        "gain_layers", "resid_post", "gain 1 + 0.3u / number of layers (up), 1 - 0.3u / number (down)", "1",
        lambda weight, up, layers="all": residual.gain_layers(_signed(0.3 * weight, up), layers),
        lambda u, up, w: f"gain 1 {_signed(0.3 * u, up):+.4g} / number of layers", _LAYERS,
    ),
    "noise_injection": Rule(
        "add_noise", "resid_post", "0.02u times the RMS of the same token's residual", "0",
        lambda weight, up, layers="mid": residual.add_noise(0.02 * weight, layers),
        lambda u, up, w: f"{0.02 * u:.4g} RMS", _LAYERS, _UP,
    ),
    "soft_projection": Rule(
        "soft_projection", "resid_post", "share 0.2u of the way to a random half of the dimensions", "0",
        lambda weight, up, layers="mid", seed=0: steering.soft_projection(0.2 * weight, seed=seed, layers=layers),
        lambda u, up, w: f"share {0.2 * u:.4g}", _LAYERS | {"seed": _SEED}, _UP,
    ),
    "lexical_jitter": Rule(
        "jitter_embeddings", "embed", "0.3u times the RMS of the embedding table", "0",
        lambda weight, up: inputs.jitter_embeddings(0.3 * weight), lambda u, up, w: f"{0.3 * u:.4g} RMS",
        directions=_UP,
    ),
    "structured_prefaces": Rule(
        "preface", "tokens", "the text is there if u > 0", "absent", _preface,
        lambda u, up, w: "present" if u > 0 else "absent", {"preface_text": _TEXT}, _UP,
    ),
}  # fmt: skip
