"""Packs: named interventions in JSON files, and the dose table that gives their effects a meaning.

    {"schema": 1, "name": "cocaine", "description": "...", "category": "stimulant",
     "effects": [{"effect": "qk_score_scaling", "weight": 0.45, "direction": "up", "parameters": {"layers": "mid"}}]}

Every effect is a function of `u = weight * dose`. Reading a pack fixes the weight; `pack.at(dose)` multiplies it. What
can't be honoured exactly is an error that names the pack, the field, the value seen and the values allowed.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nmjax import paths
from nmjax.interventions import attention, memory, residual, sampler
from nmjax.interventions.compose import Intervention
from nmjax.interventions.effect import Effect

SCHEMA = 1


class PackError(ValueError):
    """A pack that can't be honoured exactly."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the dose table: how a pack's effect becomes one of ours."""

    python: str  # the transform it builds on
    site: str
    value: str  # the value as a function of u = weight x dose, as the documentation prints it
    identity: str
    build: Callable[..., Effect]  # (weight, up, **parameters) -> the effect at dose 1
    parameters: tuple[str, ...] = ()
    directions: tuple[str, ...] = ("up", "down")


def _scale_qk(weight, up, layers="mid", heads=None):
    return attention.scale_qk(1 + 2 * weight if up else 1 / (1 + 2 * weight), layers=layers, heads=heads)


def _temperature(weight, up):
    change = np.float32(weight if up else -weight)
    return sampler.Temperature(change=change, floor=np.float32(sampler.COLDEST))


def _top_p(weight, up):
    return sampler.TopP(cut=np.float32(0.3 * weight), floor=np.float32(sampler.NARROWEST))


def _steering(weight, up, vector, layers="all"):
    return residual.steer(vector, 0.3 * weight if up else -0.3 * weight, layers=layers, coef="relative")


RULES: Mapping[str, Rule] = {
    "qk_score_scaling": Rule(
        "scale_qk", "query", "factor 1 + 2u (up), 1 / (1 + 2u) (down)", "1", _scale_qk, ("layers", "heads")
    ),
    "temperature": Rule("temperature", "logits", "1 + u (up), max(0.05, 1 - u) (down)", "1", _temperature),
    "top_p": Rule("top_p", "logits", "max(0.1, 1 - 0.3u)", "1, bypassed exactly", _top_p, directions=("down",)),
    "frequency_penalty": Rule(
        "frequency_penalty", "logits", "0.5u per generated occurrence (up), -0.5u (down)", "0",
        lambda weight, up: sampler.frequency_penalty(0.5 * weight if up else -0.5 * weight),
    ),
    "exponential_decay_kv": Rule(
        "decay_kv", "scores", "rate 0.3u per token", "0",
        lambda weight, up, mode="score", layers="all": memory.decay_kv(0.3 * weight, mode=mode, layers=layers),
        ("mode", "layers"), directions=("up",),
    ),
    "head_masking_dropout": Rule(
        "mask_heads", "head_out", "gain 1 - u on a fixed set of heads, not below 0", "1",
        lambda weight, up, heads, layers="all": attention.mask_heads(heads, layers=layers).at(weight),
        ("heads", "layers"), directions=("up",),
    ),
    "steering": Rule(
        "steer", "resid_post", "coefficient 0.3u (up), -0.3u (down), relative to the token's own residual norm", "0",
        _steering, ("vector", "layers"),
    ),
}  # fmt: skip

_PACK_FIELDS = ("schema", "name", "description", "category", "effects")
_EFFECT_FIELDS = ("effect", "weight", "direction", "parameters", "where")


def load_pack(name_or_path: str | Path) -> Intervention:
    """A pack at dose 1, by its name in `packs/` or by the path of its JSON file.

    Raises:
      PackError: no such pack, or its content can't be honoured exactly.
    """
    path = Path(name_or_path)
    if path.suffix != ".json":
        try:
            path = paths.find_pack_file(str(name_or_path))
        except (FileNotFoundError, ValueError) as error:
            raise PackError(str(error)) from None
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PackError(f"pack file {str(name_or_path)!r} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PackError(f"pack {path.name}: not valid JSON: {error}") from None
    return parse_pack(spec, default_name=path.stem)


def parse_pack(spec: Any, default_name: str = "pack") -> Intervention:
    """A pack at dose 1 from its parsed JSON. Raises PackError as `load_pack` does."""
    if not isinstance(spec, dict):
        raise PackError(f"pack {default_name}: holds {type(spec).__name__}, wanted an object with {_PACK_FIELDS}")
    name = spec.get("name", default_name)
    _check_fields(f"pack {name}", spec, _PACK_FIELDS)
    if spec.get("schema", SCHEMA) != SCHEMA:
        raise PackError(f"pack {name}: schema={spec['schema']!r}, wanted {SCHEMA}")
    for field in ("name", "description", "category"):
        if not isinstance(spec.get(field, ""), str):
            raise PackError(f"pack {name}: {field}={spec[field]!r}, wanted text")
    effects = spec.get("effects")
    if not isinstance(effects, list):
        raise PackError(f"pack {name}: effects={effects!r}, wanted a list")
    return Intervention(
        effects=tuple(_effect(f"pack {name}: effects[{i}]", entry) for i, entry in enumerate(effects)),
        name=name,
        description=spec.get("description", ""),
        category=spec.get("category", ""),
    )


def _effect(where: str, entry: Any) -> Effect:
    if not isinstance(entry, dict):
        raise PackError(f"{where}={entry!r}, wanted an object with {_EFFECT_FIELDS}")
    _check_fields(where, entry, _EFFECT_FIELDS)
    name = entry.get("effect")
    rule = RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        raise PackError(f"{where}: effect={name!r}, wanted one of {sorted(RULES)}")
    weight, direction = entry.get("weight"), entry.get("direction", "up")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise PackError(f"{where} ({entry['effect']}): weight={weight!r}, wanted a number from 0 to 1")
    if direction not in rule.directions:
        raise PackError(f"{where} ({entry['effect']}): direction={direction!r}, wanted one of {rule.directions}")
    parameters, selection = entry.get("parameters", {}), entry.get("where")
    if not isinstance(parameters, dict):
        raise PackError(f"{where} ({entry['effect']}): parameters={parameters!r}, wanted an object")
    _check_fields(f"{where} ({entry['effect']}): parameters", parameters, rule.parameters)
    try:
        effect = rule.build(float(weight), direction == "up", **parameters)
        return effect if selection is None else effect.on(**selection)
    except (TypeError, ValueError) as error:
        raise PackError(f"{where} ({entry['effect']}): {error}") from error


def _check_fields(where: str, given: dict, allowed: tuple[str, ...]) -> None:
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise PackError(f"{where}: unknown field {unknown[0]!r}, wanted one of {allowed or 'none'}")
