"""Putting effects together: in sequence (`compose`) and side by side, one intervention a row (`batch`)."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from nmjax.interventions.draws import number_streams
from nmjax.interventions.effect import Effect
from nmjax.interventions.sites import SITES
from nmjax.interventions.where import Where


class Intervention(flax.struct.PyTreeNode):
    """An ordered list of effects: the first acts first. A pack is an intervention with a name."""

    effects: tuple[Effect, ...] = ()
    name: str = flax.struct.field(pytree_node=False, default="")
    description: str = flax.struct.field(pytree_node=False, default="")
    category: str = flax.struct.field(pytree_node=False, default="")

    def at(self, dose) -> "Intervention":
        """Every effect at `dose` (finite, >= 0) times its present dose; packs are meant for [0, 1], and extrapolate."""
        return self.replace(effects=tuple(effect.at(dose) for effect in self.effects))

    def content_hash(self) -> str:
        """sha256 of what the effects are, in order, doses included; not of the name."""
        return hashlib.sha256(json.dumps([_described(e) for e in self.effects], sort_keys=True).encode()).hexdigest()

    def notes(self) -> list[str]:
        """What a reader of results must know: doses beyond 1 and values clamped to an effect's legal range."""
        found = []
        for effect in self.effects:
            if isinstance(effect.dose, jax.core.Tracer):
                continue
            if effect.dose > 1:
                found.append(f"{type(effect).__name__}: dose {float(effect.dose):g} extrapolates beyond 1")
            found += effect.clamps()
        return found


def _described(effect: Effect) -> list:
    def value(v: Any) -> Any:
        if isinstance(v, Where):
            return [value(leaf) for leaf in jax.tree.leaves(v)]
        if v is None or isinstance(v, str | bool):
            return v
        if isinstance(v, tuple):
            return [value(item) for item in v]
        if isinstance(v, Intervention):
            return [_described(effect) for effect in v.effects]
        if dataclasses.is_dataclass(v):
            return [value(getattr(v, f.name)) for f in dataclasses.fields(v)]
        array = np.asarray(v)
        return [list(array.shape), array.dtype.str, hashlib.sha256(array.tobytes()).hexdigest()]

    kind = type(effect)
    return [f"{kind.__module__}.{kind.__qualname__}"] + [
        [f.name, value(getattr(effect, f.name))] for f in dataclasses.fields(effect)
    ]


def compose(*parts: Effect | Intervention | None, name: str = "") -> Intervention:
    """One intervention that applies its parts in the order given."""
    return Intervention(effects=tuple(e for part in parts for e in as_intervention(part, "compose").effects), name=name)


def as_intervention(part: Effect | Intervention | None, argument: str = "packs") -> Intervention:
    """None is no intervention; an effect is an intervention of one."""
    if part is None:
        return Intervention()
    if isinstance(part, Intervention):
        return part
    if isinstance(part, Effect):
        return Intervention(effects=(part,))
    raise ValueError(f"{argument}={part!r}, wanted an effect, an intervention (load_pack, compose) or None")


def as_rows(packs, rows: int, argument: str = "packs") -> list[Intervention]:
    """One intervention a row, from one for all or a list of exactly `rows`."""
    if isinstance(packs, list | tuple):
        if len(packs) != rows:
            raise ValueError(f"{argument} has {len(packs)} entries, wanted one for all {rows} rows or one a row")
        return [as_intervention(pack, f"{argument}[{i}]") for i, pack in enumerate(packs)]
    return [as_intervention(packs, argument)] * rows


def batch(interventions: Sequence[Effect | Intervention | None], lm) -> tuple[Effect, ...]:
    """Binds one intervention a row into effects whose fields have a row axis [B, ...].

    Rows are laid out in one sequence of slots that contains every row's own sequence. A slot holds effects of one class
    with equal static fields; a row which doesn't use it gets the class's neutral value. So any mix of interventions and
    doses is one program, and rows with the same set of effects differ in data only.
    """
    bound: dict[int, list[Effect]] = {}  # rows often share an intervention: bind each object once
    for iv in interventions:
        if id(iv) not in bound:
            effects = [_bind(effect, as_intervention(iv).name, lm) for effect in as_intervention(iv).effects]
            bound[id(iv)] = number_streams(effects)
    stacked: list[Effect] = []
    for group in _by_site(bound):
        stacked += _stacked([group[id(iv)] for iv in interventions])
    return tuple(stacked)


def _stacked(rows: list[list[Effect]]) -> list[Effect]:
    """The bound effects of every row in one sequence of slots that contains each row's own."""
    # Rows often share an intervention: each distinct one is laid out and stacked once, then copied to its rows.
    distinct = list({id(effects): effects for effects in rows}.values())
    number = {id(effects): k for k, effects in enumerate(distinct)}
    row_of = np.asarray([number[id(effects)] for effects in rows], np.int32)
    keyed = [_keyed(effects) for effects in distinct]
    slots: list = []
    # Sorted, so that the same interventions in other rows are the same program.
    for row in sorted(([key for key, _ in row] for row in keyed), key=repr):
        slots = _merge(slots, row)

    columns: list[list[Effect | None]] = []  # distinct intervention -> its effect in each slot
    for effects in keyed:
        rest = list(effects)
        columns.append([rest.pop(0)[1] if rest and rest[0][0] == slot else None for slot in slots])

    stacked = []
    for column in zip(*columns, strict=True):
        example = next((effect for effect in column if effect is not None), None)
        if example is None:  # every row found an earlier slot of this kind
            continue
        used = np.asarray([effect is not None for effect in column])[row_of]
        users = np.flatnonzero(used)
        few = example.costly and 2 * len(users) <= len(used)
        slot = example.stack([example.neutral() if effect is None else effect for effect in column])
        slot = slot.take(row_of[users] if few else row_of)
        stacked.append(slot.replace(rows=users.astype(np.int32)) if few else slot)
    return stacked


def _bind(effect: Effect, name: str, lm) -> Effect:
    kind = type(effect)
    if not any(kind.touches(site) for site in SITES):
        raise ValueError(f"{kind.__name__} has no method named after a site, wanted at least one of {list(SITES)}")
    try:
        return effect.bind(lm)
    except ValueError as error:
        raise ValueError(f"{f'pack {name}: ' if name else ''}{kind.__name__}: {error}") from error


def _by_site(rows: dict[int, list[Effect]]) -> list[dict[int, list[Effect]]]:
    """Every row's effects, neighbours joined, in groups that are laid out one after the other: one group a site.

    A pass comes to one site after the other, so order matters within a site only, and rows which list their effects in
    different orders can share slots. Effects at several sites tie the orders of these together: with one of them in the
    batch, all is one group.
    """
    several = any(sum(map(effect.touches, SITES)) > 1 for effects in rows.values() for effect in effects)
    groups = [None] if several else list(SITES)
    return [
        {
            key: _joined([effect for effect in effects if site is None or effect.touches(site)])
            for key, effects in rows.items()
        }
        for site in groups
    ]


def _joined(effects: Sequence[Effect]) -> list[Effect]:
    """The effects of a row, neighbours made one where they can be."""
    shorter: list[Effect] = []
    for effect in effects:
        both = shorter[-1].joined(effect) if shorter else None
        if both is None:
            shorter.append(effect)
        else:
            shorter[-1] = both
    return shorter


def _keyed(effects: Sequence[Effect]) -> list[tuple[Any, Effect]]:
    """(class, static fields, ordinal among equals in this row) of each bound effect."""
    seen: dict = {}
    keyed = []
    for effect in effects:
        static = tuple(
            getattr(effect, f.name) for f in dataclasses.fields(effect) if not f.metadata.get("pytree_node", True)
        )
        kind = (type(effect), static)
        seen[kind] = seen.get(kind, -1) + 1
        keyed.append(((*kind, seen[kind]), effect))
    return keyed


def _merge(a: list, b: list) -> list:
    """A shortest sequence that contains both `a` and `b` in order (their common subsequence appears once)."""
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            best[i][j] = best[i + 1][j + 1] + 1 if a[i] == b[j] else max(best[i + 1][j], best[i][j + 1])
    merged, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            merged.append(a[i])
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            merged.append(a[i])
            i += 1
        else:
            merged.append(b[j])
            j += 1
    return merged + a[i:] + b[j:]
