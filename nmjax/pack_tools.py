"""What is said about packs, and done with their files: tables, differences, and packs in the reference layout."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import nmjax.packs as packs
from nmjax.dose_table import RULES
from nmjax.interventions.compose import Intervention
from nmjax.interventions.effect import Effect, check_number
from nmjax.interventions.where import INDUCTION, chosen_heads, layer_mask
from nmjax.packs import PackError
from nmjax.steering import store

PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # a name that is a file name everywhere
WEIGHT = 0.5  # what the reference layout means by an effect without weight


def aligned(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, all left-aligned; lines end without blanks."""
    lines = [headers, ["-" * max(len(row[c]) for row in [headers, *rows]) for c in range(len(headers))], *rows]
    return "\n".join(
        "  ".join(cell.ljust(len(rule)) for cell, rule in zip(line, lines[1], strict=True)).rstrip() for line in lines
    )


# --- One pack ---------------------------------------------------------------------------------------------------------


def listing() -> str:
    """A table of all packs there are; one that can't be honoured has the reason for its description."""
    rows = []
    for name in packs.list_packs():
        try:
            pack = packs.load_pack(name)
        except PackError as error:
            rows.append([name, "-", "-", "-", f"BAD: {' '.join(str(error).split())}"])
            continue
        sentence = pack.description.split(". ")[0].rstrip(".")
        rows.append([name, pack.category, str(len(pack.effects)), _needs(pack), sentence])
    return aligned(["pack", "category", "effects", "needs", "description"], rows)


def _needs(pack: Intervention) -> str:
    vectors, induction = packs.needs(pack)
    return "; ".join((["vectors " + ", ".join(vectors)] if vectors else []) + ["induction heads"] * induction) or "-"


def explain(name_or_path: str, dose: float, lm, model: str = "the model") -> str:
    """What a pack is at a dose and in a model: values, places, clamps, and what is missing.

    Raises ValueError for a bad dose; PackError for a pack that can't be honoured.
    """
    path = packs.pack_path(name_or_path)
    spec = packs.read_spec(path)
    check_number("dose", dose, "one finite number >= 0", lambda value: value >= 0)
    pack = packs.parse_pack(spec, path.stem).at(dose)
    L, N = lm.config.layers, lm.config.heads
    head = f"{pack.name}{f' ({pack.category})' if pack.category else ''} at dose {dose:g}"
    parts = [f"{head}, in {model}: {L} layers of {N} heads", pack.description]
    rows = [row for entry, effect in zip(spec["effects"], pack.effects, strict=True)
            for row in _explained(entry, effect, dose, lm)]  # fmt: skip
    if rows:
        headers = ["effect", "weight", "value", "Python", "site", "layers", "heads", "parameters"]
        parts.append(aligned(headers, rows))
    else:
        parts.append("No effects.")
    notes = pack.notes() or ["none"]
    parts.append("\n".join(["Clamped or beyond what packs are meant for:", *(f"  {note}" for note in notes)]))
    parts.append("\n".join(["Needs:", *(f"  {line}" for line in _found(pack, lm))]))
    parts.append(f"Content hash at this dose: {pack.content_hash()}")
    return "\n\n".join(part for part in parts if part)


def _explained(entry: Mapping, effect: Effect, dose: float, lm, prefix: str = "") -> list[list[str]]:
    rule, weight, up = RULES[entry["effect"]], entry["weight"], entry.get("direction", "up") == "up"
    parameters = entry.get("parameters", {})
    value = rule.number(weight * dose, up, weight)
    if getattr(effect, "coef", None) == "absolute":
        value = value.replace(" of the residual's norm", " times the vector")
    if entry.get("where"):
        parameters = {**parameters, "where": entry["where"]}
    inner = parameters.get("against", [])
    shown = ", ".join(f"{key}={_short(item)}" for key, item in parameters.items() if key != "against") or "-"
    rows = [[
        prefix + entry["effect"], f"{weight:g} {'up' if up else 'down'}", value, rule.python, rule.site,
        layers_of(effect, lm), heads_of(effect, lm), shown,
    ]]  # fmt: skip
    against = getattr(effect, "against", None)
    if against is not None and not inner:
        rows[0][-1] = "against=attention scores divided by 3"
    elif against is not None:
        rows[0][-1] = "against the rows below, at dose 1"
        for other, rival in zip(inner, against.effects, strict=True):
            rows += _explained(other, rival, 1.0, lm, prefix + "  > ")
    return rows


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def layers_of(effect: Effect, lm) -> str:
    """Indices of the layers an unbound effect acts in; "-" where it acts in none of them."""
    layers = getattr(effect, "layers", None)
    if layers is None:
        return "-"
    try:
        return _indices(layer_mask(layers, lm.config.layers))
    except ValueError as error:
        return f"error: {error}"


def heads_of(effect: Effect, lm) -> str:
    """The heads of an unbound effect, "layer: heads"; for induction heads whether there are any, and what acts else."""
    if not hasattr(effect, "heads"):
        return "-"
    heads, layers, on_empty = (getattr(effect, name, None) for name in ("heads", "layers", "on_empty"))
    try:
        if heads is None:
            return "all"
        if heads != INDUCTION:
            return _by_layer(chosen_heads(lm, layers, heads))
        found = chosen_heads(lm, layers, INDUCTION, "none")
        if found.any():
            return f"induction {_by_layer(found)}"
        if on_empty == "middle":
            middle = chosen_heads(lm, layers, INDUCTION, on_empty)
            return f"no induction heads here; middle heads {_by_layer(middle)}"
        return "no induction heads here; " + ("nothing is changed" if on_empty == "none" else "using it is an error")
    except ValueError as error:
        return f"error: {error}"


def _indices(mask: np.ndarray) -> str:
    """`[0, 2, 3, 4]` as "0, 2-4"."""
    found = np.flatnonzero(mask)
    runs = np.split(found, np.flatnonzero(np.diff(found) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _by_layer(mask: np.ndarray) -> str:
    return "; ".join(f"{layer}: {_indices(heads)}" for layer, heads in enumerate(mask) if heads.any())


def _found(pack: Intervention, lm) -> list[str]:
    """One line for everything the pack needs of a model: whether it is there, and what builds it."""
    vectors, induction = packs.needs(pack)
    lines = []
    for name in vectors:
        try:
            store.named_vector(lm, name)
            lines.append(f"steering vector {name!r}: there")
        except ValueError as error:
            lines.append(f"steering vector {name!r}: MISSING: {error}")
    if induction:
        any_found = chosen_heads(lm, "all", INDUCTION, "none")
        where = f"found, layer: heads {_by_layer(any_found)}" if any_found.any() else "NONE in this model"
        lines.append(f"induction heads: {where} (measured by python -m experiments.induction_heads)")
    return lines or ["nothing"]


# --- Two packs --------------------------------------------------------------------------------------------------------


def diff(first: str, second: str) -> str:
    """What changes from one pack to another, effect by effect. Raises PackError."""
    specs = [packs.read_spec(packs.pack_path(name)) for name in (first, second)]
    built = [packs.load_pack(name) for name in (first, second)]
    before, after = ([_normal(entry) for entry in spec["effects"]] for spec in specs)
    pairs = _paired(before, after)
    lines = []
    for i, entry in enumerate(before):
        if i not in pairs:
            lines.append(f"- removed  {_entry(entry)}")
        elif changes := _changes(entry, after[pairs[i]]):
            lines.append(f"~ changed  {entry['effect']}: {'; '.join(changes)}")
        else:
            lines.append(f"= equal    {_entry(entry)}")
    lines += [f"+ added    {_entry(after[j])}" for j in range(len(after)) if j not in pairs.values()]
    order = [pairs[i] for i in sorted(pairs)]
    if order != sorted(order):
        lines.append("The order of the effects differs, and they act in order.")
    same = built[0].content_hash() == built[1].content_hash()
    lines.append(f"The two {'are the same intervention' if same else 'differ'}: content hashes "
                 f"{' and '.join(pack.content_hash()[:12] for pack in built)}")  # fmt: skip
    return "\n".join([f"{first} -> {second}", *lines])


def _normal(entry: Mapping) -> dict:
    return {"direction": "up", "parameters": {}, "where": {}, **entry}


def _paired(before: list[dict], after: list[dict]) -> dict[int, int]:
    """Index before -> index after, of effects of one name; the most alike find each other first."""
    pairs: dict[int, int] = {}
    likeness = (lambda e: e, lambda e: {**e, "weight": 0}, lambda e: e["effect"])
    for view in likeness:
        for i, entry in enumerate(before):
            free = (j for j, other in enumerate(after) if j not in pairs.values() and view(other) == view(entry))
            if i not in pairs and (j := next(free, None)) is not None:
                pairs[i] = j
    return pairs


def _changes(a: Mapping, b: Mapping) -> list[str]:
    found = [f"{key} {_short(a[key])} -> {_short(b[key])}" for key in ("weight", "direction") if a[key] != b[key]]
    for part in ("parameters", "where"):
        for key in sorted(a[part].keys() | b[part].keys()):
            if a[part].get(key) != b[part].get(key):
                old, new = (_short(e[part][key]) if key in e[part] else "default" for e in (a, b))
                found.append(f"{'where.' if part == 'where' else ''}{key} {old} -> {new}")
    return found


def _entry(entry: Mapping) -> str:
    extra = {**entry["parameters"], **({"where": entry["where"]} if entry["where"] else {})}
    shown = ", ".join(f"{key}={_short(value)}" for key, value in extra.items())
    return f"{entry['effect']} {entry['weight']:g} {entry['direction']}{f' ({shown})' if shown else ''}"


# --- Packs from elsewhere ---------------------------------------------------------------------------------------------


def imported(content: Any, source: str) -> tuple[dict[str, dict], list[str], list[str]]:
    """Packs of a `{"packs": {name: {...}}}` file as this toolkit's own, a line for all that was left out, and errors.

    An effect is taken over whole or not at all. What was left out is named in the pack's description, too. A pack with
    an error is not among the results: its name can't be a file's, it isn't a pack, or nothing of it is left.

    Raises:
      PackError: the file holds no packs, or what no pack may hold anywhere.
    """
    packs.check_json(source, content)
    found = content.get("packs") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        seen = f"packs={found!r:.60}" if isinstance(content, dict) else f"{content!r:.60}"
        raise PackError(f'{source}: {seen}, wanted {{"packs": {{name: pack, ...}}}} with at least one pack')
    specs, dropped, errors = {}, [], []
    for name, pack in found.items():
        try:
            specs[name], lines = _imported(name, pack, source)
        except PackError as error:
            errors.append(str(error))
        else:
            dropped += lines
    return specs, dropped, errors


def _imported(name: str, pack: Any, source: str) -> tuple[dict, list[str]]:
    if not PLAIN.fullmatch(name):
        raise PackError(f"{source}: pack name {name!r:.80}, wanted letters, digits, '_', '-' and '.', none of the last "
                        "two in front")  # fmt: skip
    entries = pack.get("effects") if isinstance(pack, dict) else None
    if not isinstance(entries, list):
        raise PackError(f"{source}: pack {name}: effects={entries!r:.60}, wanted a list")
    kept, lines, missing = [], [], []
    for i, entry in enumerate(entries):
        full = {"weight": WEIGHT, "direction": "up", "parameters": {}} | entry if isinstance(entry, dict) else entry
        try:
            packs.parse_pack({"name": name, "effects": [full]})
            kept.append({key: full[key] for key in ("effect", "weight", "direction", "parameters", "where")
                         if key in full})  # fmt: skip
        except PackError as error:
            reason = str(error).removeprefix(f"pack {name}: ").removeprefix("effects[0]").lstrip(": ")
            if isinstance(entry, dict) and isinstance(entry.get("effect"), str) and entry["effect"] not in RULES:
                reason = f"unknown effect {entry['effect']!r:.60}"  # without the thirty names there are
            lines.append(f"pack {name}: dropped effects[{i}]: {reason}")
            missing.append(_told(full))
    for key in sorted(pack.keys() - {"name", "description", "category", "effects", "schema"}):
        lines.append(f"pack {name}: dropped the field {key!r:.60}, which packs don't have")
        missing.append(f"the field {key!r:.60}")
    if entries and not kept:
        raise PackError("; ".join([f"{source}: pack {name}: nothing of it can be honoured", *lines]))
    if pack.get("name", name) != name:
        lines.append(f"pack {name}: its own name {pack['name']!r:.60} gives way to the name it is listed under")
    texts = {key: pack.get(key, "") for key in ("description", "category")}
    spec = {"schema": packs.SCHEMA, "name": name, **texts, "effects": kept}
    packs.parse_pack(spec)  # texts that are none, two contrasts
    if missing:
        left_out = f"Left out at import, since it can't be honoured: {'; '.join(missing)}."
        spec["description"] = f"{texts['description'].rstrip()} {left_out}".lstrip()
    return spec, lines


def _told(entry: Any) -> str:
    """An effect that was left out, for the description."""
    if not isinstance(entry, dict):
        return ascii(entry)[:60]
    weight, direction = entry["weight"], entry["direction"]
    weight = f"{weight:g}" if isinstance(weight, int | float) and abs(weight) < 1e300 else "a weight of no range"
    return ascii(f"{entry.get('effect')} {weight} {direction}").strip("'\"")[:100]


def render(spec: Mapping) -> str:
    """A pack as the text of a file, one effect a line."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}," for key, value in spec.items()
             if key != "effects"]  # fmt: skip
    effects = ",\n".join(f"    {json.dumps(entry, ensure_ascii=False)}" for entry in spec["effects"])
    return "\n".join(["{", *lines, '  "effects": [' + (f"\n{effects}\n  ]" if effects else "]"), "}"]) + "\n"
