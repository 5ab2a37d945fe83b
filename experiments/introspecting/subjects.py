"""The models that are compared: a base, and adapters to it by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import nmjax
from nmjax.adapters import Adapter
from nmjax.interventions.compose import Intervention
from nmjax.interventions.effect import Effect
from nmjax.lm import LanguageModel

BASE = "base"


@dataclasses.dataclass(frozen=True)
class Subjects:
    """What a suite asks; each row of a batch is one of them.

    Attributes:
        lm: the base carrying all adapters by name, or none.
        variants: by the name of each adapter, the variant it was trained as (of `nmjax.data.introspection.WORDINGS`),
            which says what it was asked in training; None where that is not known.
    """

    lm: LanguageModel
    variants: Mapping[str, str | None] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The base, and then the adapters."""
        return (BASE, *self.variants)

    def pack(self, name: str, *effects: Effect | Intervention | None) -> Intervention:
        """The effects in a row that the named subject answers."""
        own = () if name == BASE else (nmjax.use_adapter(name),)
        return nmjax.compose(*own, *effects)


def make_subjects(base: LanguageModel, adapters: Mapping[str, tuple[Adapter, str | None]]) -> Subjects:
    """The base and adapters with their variants, by name.

    Raises ValueError for an adapter that is called "base" or is one of another model.
    """
    if BASE in adapters:
        raise ValueError(
            f"an adapter is called {BASE!r}; wanted another name, that one is the model's without adapters"
        )
    lm = base.with_adapters({name: adapter for name, (adapter, _) in adapters.items()}) if adapters else base
    return Subjects(lm, {name: variant for name, (_, variant) in adapters.items()})


class Suite(Protocol):
    """An evaluation of subjects: questions in units, which are run one after the other and kept, and what they say."""

    @property
    def units(self) -> int:
        """How many units of work there are; what is in each depends on the suite's settings alone."""

    def ask(self, unit: int) -> Any:
        """Runs a unit: everything that was seen, strict JSON."""

    def analyse(self, records: list[Any]) -> dict[str, Any]:
        """Findings with intervals, strict JSON, from the records of all units; runs no model."""
