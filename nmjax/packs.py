"""Packs: named interventions in JSON files.

    {"schema": 1, "name": "cocaine", "description": "...", "category": "stimulant",
     "effects": [{"effect": "qk_score_scaling", "weight": 0.45, "direction": "up", "parameters": {"layers": "mid"}}]}

Every effect is a function of `u = weight * dose` (`dose_table.py`). Reading a pack fixes the weight; `pack.at(dose)`
multiplies it. What can't be honoured exactly is an error that names the pack, the field, the value seen and the values
allowed. `data/pack.schema.json` says the same to editors and to `jsonschema`, which checks the structure here.
"""

import collections
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema

from nmjax import paths
from nmjax.dose_table import RULES
from nmjax.interventions.compose import Intervention
from nmjax.interventions.effect import Effect
from nmjax.interventions.inputs import Preface
from nmjax.interventions.sampler import Contrast
from nmjax.interventions.where import INDUCTION

SCHEMA = 1
LARGEST = 1_000_000  # bytes of a pack file; the shipped ones have a thousand
DEEPEST = 20  # levels of nesting
MOST = 100  # effects of a pack; the shipped ones have at most seven
WIDEST = 64  # bits of an integer


class PackError(ValueError):
    """A pack that can't be honoured exactly."""


def list_packs() -> list[str]:
    """Names of the packs there are, those in `$NMJAX_HOME/packs` included."""
    files = (file for folder in paths.pack_dirs() for file in folder.glob("*.json"))
    return sorted({file.stem for file in files if file.is_file()})


def load_pack(name_or_path: str | Path) -> Intervention:
    """A pack at dose 1, by its name in `packs/` or by the path of its JSON file.

    Raises:
      PackError: no such pack, or its content can't be honoured exactly.
    """
    path = pack_path(name_or_path)
    return parse_pack(read_spec(path), default_name=path.stem)


def pack_path(name_or_path: str | Path) -> Path:
    """The file of a pack, by name or path. Raises PackError for an unknown name."""
    if not isinstance(name_or_path, str | Path):
        raise PackError(f"name_or_path={name_or_path!r}, wanted the name of a pack or the path of a JSON file")
    path = Path(name_or_path)
    if path.suffix == ".json":
        return path
    try:
        return paths.find_pack_file(str(name_or_path))
    except (OSError, ValueError) as error:
        raise PackError(str(error)) from None


def read_spec(path: Path) -> Any:
    """The parsed JSON of a file. Raises PackError if it isn't strict JSON of sensible size, or repeats a key."""
    try:
        if path.stat().st_size > LARGEST:
            raise PackError(f"pack {path.name}: {path.stat().st_size} bytes, wanted at most {LARGEST}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PackError(f"pack file {str(path)!r} does not exist") from None
    except (OSError, ValueError) as error:  # a folder, no permission, not UTF-8, a path that can't be one
        raise PackError(f"pack {path.name!r}: can't be read as text: {error}") from None

    def once(pairs):
        (name, times), *_ = collections.Counter(name for name, _ in pairs).most_common(1) or [("", 0)]
        if times > 1:
            raise PackError(f"pack {path.name}: the field {name!r} occurs {times} times")
        return dict(pairs)

    def refuse(constant):
        raise PackError(f"pack {path.name}: {constant} is not a JSON number")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except RecursionError:
        raise PackError(f"pack {path.name}: nested deeper than {DEEPEST} levels") from None
    except PackError:
        raise
    except ValueError as error:  # not JSON, or an integer of thousands of digits
        raise PackError(f"pack {path.name}: not valid JSON: {error}") from None


def parse_pack(spec: Any, default_name: str = "pack") -> Intervention:
    """A pack at dose 1 from its parsed JSON. Raises PackError as `load_pack` does."""
    given = spec.get("name") if isinstance(spec, dict) else None
    name = given if isinstance(given, str) and given else default_name
    where = f"pack {name if name.isprintable() and len(name) <= 100 else repr(name)[:100]}"
    check_json(where, spec)
    _check_structure(where, spec, _validator())
    return Intervention(
        effects=_effects(f"{where}: effects", spec["effects"]),
        name=name,
        description=spec.get("description", ""),
        category=spec.get("category", ""),
    )


def parse_effects(entries: Any, argument: str) -> Intervention:
    """An intervention from a list of effects in the format of packs. Raises PackError as `load_pack` does."""
    spec = {"effects": entries}
    check_json(argument, spec)
    _check_structure(argument, spec, _validator())
    return Intervention(effects=_effects(argument, entries))


def needs(intervention: Intervention) -> tuple[list[str], bool]:
    """What must be known of a model first: names of steering vectors, and whether induction heads."""
    vectors: set[str] = set()
    induction = False
    for effect in intervention.effects:
        source = getattr(effect, "source", None)
        vectors |= set(source.names) if source is not None else set()
        against = getattr(effect, "against", None)
        if isinstance(against, Intervention):
            more, heads = needs(against)
            vectors, induction = vectors | set(more), induction or heads
        induction = induction or getattr(effect, "heads", None) == INDUCTION
    return sorted(vectors), induction


def schema() -> dict:
    """The JSON Schema of a pack, made from the dose table."""
    effect = {
        "type": "object",
        "required": ["effect", "weight"],
        "properties": {
            "effect": {"enum": sorted(RULES)},
            "weight": {"type": "number", "minimum": 0, "maximum": 1},
            "direction": {"enum": ["up", "down"]},
            "parameters": {"type": "object"},
            "where": _where_schema(),
        },
        "additionalProperties": False,
        "allOf": [
            {
                "if": {"properties": {"effect": {"const": name}}},
                "then": {
                    "properties": {
                        "direction": {"enum": list(rule.directions)},
                        "parameters": {"properties": dict(rule.parameters), "additionalProperties": False},
                    }
                    # `up` is what a missing direction means.
                } | ({} if "up" in rule.directions else {"required": ["direction"]}),
            }
            for name, rule in RULES.items()
        ],
    }  # fmt: skip
    text = {"type": "string"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "nmjax pack",
        "type": "object",
        "required": ["effects"],
        "properties": {
            "schema": {"const": SCHEMA},
            "name": text | {"minLength": 1},
            "description": text,
            "category": text,
            "effects": {"type": "array", "items": effect, "maxItems": MOST},
        },
        "additionalProperties": False,
    }


def _where_schema() -> dict:
    """The arguments of `where.where`."""
    integers = {"type": ["integer", "array"], "items": {"type": "integer"}, "minItems": 1}
    window = {"type": "array", "items": {"type": ["integer", "null"]}, "minItems": 2, "maxItems": 2}
    fields: dict[str, dict] = {"prompt": {"enum": ["all", "none"]}, "generation": {"enum": ["all", "none"]}}
    for region in ("prompt", "generation", "exclude_prompt", "exclude_generation"):
        fields |= {f"{region}_positions": integers, f"{region}_window": window, f"{region}_tokens": integers}
    return {"type": "object", "properties": fields, "additionalProperties": False}


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema())


def check_json(where: str, spec: Any) -> None:
    """Raises PackError for what JSON lacks, and for what no pack needs and would exhaust whoever walks through it."""
    entries = spec.get("effects") if isinstance(spec, dict) else None
    if isinstance(entries, list) and len(entries) > MOST:
        raise PackError(f"{where}: {len(entries)} effects, wanted at most {MOST}")
    level = [("", spec)]
    for _ in range(DEEPEST):
        below = []
        for place, node in level:
            wrong = _not_json(node)
            if wrong:
                raise PackError(f"{where}: {place or 'content'}{wrong}")
            if isinstance(node, dict):
                below += [(f"{place}.{key}" if place else key, item) for key, item in node.items()]
            elif isinstance(node, list):
                below += [(f"{place}[{i}]", item) for i, item in enumerate(node)]
        level = below
        if not level:
            return
    raise PackError(f"{where}: nested deeper than {DEEPEST} levels")


def _not_json(node: Any) -> str:
    """What is wrong with a value, apart from what it contains: "=value, wanted ..."; empty if nothing is."""
    if isinstance(node, dict):
        # A key that is no text can't be part of the place, so it is told here.
        bad = next((key for key in node if not isinstance(key, str) or not _encodable(key)), None)
        return "" if bad is None else f": the field {bad!r:.100}, wanted Unicode text"
    if isinstance(node, str):
        return "" if _encodable(node) else f"={node!r:.100}, wanted Unicode text without lone surrogates"
    if isinstance(node, int):
        fits = node.bit_length() <= WIDEST  # `repr` of thousands of digits is an error in itself
        return "" if fits else f"=an integer of {node.bit_length()} bits, wanted at most {WIDEST}"
    if isinstance(node, float):
        return "" if math.isfinite(node) else f"={node!r}, wanted a finite number"
    return "" if node is None or isinstance(node, list) else f"={node!r:.100}, wanted a value that JSON has"


def _encodable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _check_structure(where: str, spec: Any, validator) -> None:
    """Raises PackError for the first thing, in reading order, that the schema forbids."""
    errors = sorted(validator.iter_errors(spec), key=lambda error: [str(part) for part in error.absolute_path])
    if not errors:
        return
    error = errors[0]
    path = list(error.absolute_path)
    if path[:1] == ["effects"] and len(path) > 1:
        entry = spec["effects"][path[1]]
        kind = entry.get("effect") if isinstance(entry, dict) else None
        where += f": effects[{path[1]}]" + (f" ({kind})" if isinstance(kind, str) and kind in RULES else "")
        path = path[2:]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    raise PackError(f"{where}: {_said(place, error)}")


def _said(place: str, error: jsonschema.ValidationError) -> str:
    """One violation in this project's words."""
    seen, wanted = error.instance, error.validator_value
    value = f"{place}={seen!r}"[:200] if place else f"holds {seen!r}"[:200]
    if error.validator == "additionalProperties":
        allowed = list(error.schema.get("properties", {}))
        unknown = sorted(set(seen) - set(allowed))[0]
        inside = f"{place}: " if place else ""
        return f"{inside}unknown field {unknown!r}, wanted one of {allowed or 'none'}"
    if error.validator == "required":
        missing = next(name for name in wanted if name not in seen)
        allowed = error.schema.get("properties", {}).get(missing, {}).get("enum")
        return f"{missing} is missing, wanted one of {allowed}" if allowed else f"{missing} is missing"
    if error.validator == "type":
        kinds = wanted if isinstance(wanted, list) else [wanted]
        return f"{value}, wanted {' or '.join(_KINDS[kind] for kind in kinds)}"
    if error.validator in ("minimum", "maximum"):
        low, high = error.schema.get("minimum", "-inf"), error.schema.get("maximum")
        return f"{value}, wanted a number from {low} to {high}" if high is not None else f"{value}, wanted >= {low}"
    if error.validator in ("enum", "const"):
        return f"{value}, wanted {f'one of {wanted}' if error.validator == 'enum' else repr(wanted)}"
    if error.validator in ("minLength", "minItems"):
        return f"{value}, wanted at least {wanted}"
    if error.validator == "maxItems":
        return f"{value}, wanted at most {wanted}"
    if error.validator == "pattern":
        return f"{value}, wanted letters, digits, '_', '-' and '.'"
    return f"{value}: {error.message[:200]}"


_KINDS = {
    "object": "an object", "array": "a list", "string": "text", "number": "a number", "integer": "an integer",
    "null": "null",
}  # fmt: skip


def _effects(where: str, entries: list) -> tuple[Effect, ...]:
    found = tuple(_effect(f"{where}[{i}]", entry) for i, entry in enumerate(entries))
    contrasts = [i for i, effect in enumerate(found) if isinstance(effect, Contrast)]
    if len(contrasts) > 1:  # a row has one rival
        raise PackError(f"{where}[{contrasts[1]}] is a second {entries[contrasts[1]]['effect']}, wanted at most one")
    return found


def _effect(where: str, entry: dict) -> Effect:
    name, up = entry["effect"], entry.get("direction", "up") == "up"
    parameters = dict(entry.get("parameters", {}))
    for key, value in parameters.items():
        # JSON knows no difference between 5 and 5.0; seeds do.
        if isinstance(value, float) and RULES[name].parameters[key].get("type") == "integer":
            parameters[key] = int(value)
    try:
        effect = RULES[name].build(float(entry["weight"]), up, **parameters)
        selection = entry.get("where")
        if selection is None:
            return effect
        if isinstance(effect, Preface):
            raise ValueError("a hidden text has no where, it is all before the prompt")
        return effect.on(**selection)
    except (TypeError, ValueError, OverflowError) as error:
        raise PackError(f"{where} ({name}): {error}") from error


def vectors_of(interventions: Sequence[Intervention]) -> list[str]:
    """Names of the steering vectors that any of them needs."""
    return sorted({name for iv in interventions for name in needs(iv)[0]})
