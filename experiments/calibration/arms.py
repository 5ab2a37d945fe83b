"""The conditions of the experiment: packs at their doses, or one pack taken apart into its causes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

import nmjax
from nmjax.interventions.attention import ScaleQK
from nmjax.interventions.effect import Effect
from nmjax.interventions.sampler import Temperature
from nmjax.interventions.steering import Steer
from nmjax.interventions.where import chosen_heads
from nmjax.packs import pack_path, read_spec
from nmjax.steering.vectors import placebo

NONE = "none"
PARTS: dict[str, tuple[type[Effect], ...]] = {"temperature": (Temperature,), "qk": (ScaleQK,), "steering": (Steer,)}
"""What each part of a pack keeps of it."""
CAUSES = (*PARTS, "full", "placebo")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A condition. Arms of one series differ in dose only; `none` is dose 0 of every series."""

    label: str
    pack: nmjax.Intervention  # at its dose
    series: str
    dose: float  # of `base`
    base: nmjax.Intervention
    intensity: float = 1.0  # as asked for: what multiplies the named pack


def from_packs(packs: Sequence[str], intensities: Sequence[str] | None) -> list[Arm]:
    """Packs by name or path, at intensities (1 each if None).

    `cocaine_50` is `cocaine` at 0.5, so both belong to the series `cocaine`.

    Raises ValueError for unknown or repeated packs, bad intensities, or not one intensity a pack.
    """
    if not packs:
        raise ValueError("--packs is empty; wanted at least one pack")
    if intensities is not None and len(intensities) != len(packs):
        raise ValueError(
            f"--intensities has {len(intensities)} values ({', '.join(intensities)}) for {len(packs)} packs "
            f"({', '.join(packs)}); wanted one a pack"
        )
    arms: list[Arm] = []
    for name, dose in zip(packs, intensities or ["1"] * len(packs), strict=True):
        intensity = _number("--intensities", dose, f" for pack {name}")
        pack = nmjax.load_pack(name)
        label = pack.name if intensity == 1 else f"{pack.name}@{intensity:g}"
        if label in [arm.label for arm in arms]:
            raise ValueError(f"--packs holds {label} twice")
        base, share = _series(name, pack)
        arms.append(Arm(label, pack.at(intensity), base.name, share * intensity, base, intensity))
    return arms


def _series(name: str, pack: nmjax.Intervention) -> tuple[nmjax.Intervention, float]:
    """The pack `cocaine` and 0.5 for `cocaine_50`, if that has half of every weight; any other pack itself and 1."""
    if pack.name == NONE:
        return pack, 0.0
    named = re.fullmatch(r"(.+)_(\d+)", pack.name)
    if named and named[1] in nmjax.list_packs():
        share = int(named[2]) / 100
        effects, whole = (read_spec(pack_path(given))["effects"] for given in (name, named[1]))
        weights, others = ([effect.pop("weight") for effect in given] for given in (effects, whole))
        if effects == whole and np.allclose(weights, np.multiply(others, share)):
            return nmjax.load_pack(named[1]), share
    return pack, 1.0


def from_causes(causes: Sequence[str], of: str, doses: Sequence[str]) -> list[Arm]:
    """`none`, and every cause of the pack `of` at every dose above 0.

    `placebo` stands for `full` until `matched_placebo` replaces it: which heads it scales depends on the model.

    Raises ValueError for an unknown or repeated cause, one that the pack lacks, or doses that are not distinct numbers.
    """
    pack = nmjax.load_pack(of)
    if not causes or len(set(causes)) < len(causes) or not set(causes) <= set(CAUSES):
        raise ValueError(f"--arms={','.join(causes)}; wanted some of {', '.join(CAUSES)}, each once")
    values = [_number("--doses", dose) for dose in doses]
    if len(set(values)) < len(values) or not any(values):
        raise ValueError(f"--doses={','.join(doses)}; wanted distinct numbers >= 0, at least one of them above 0")
    sober = nmjax.load_pack(NONE)
    arms = [Arm(NONE, sober, NONE, 0.0, sober)]
    for cause in causes:
        base = part_of(pack, cause)
        for dose in sorted(values):
            if dose > 0:
                arms.append(Arm(f"{cause}@{dose:g}", base.at(dose), cause, dose, base, dose))
    return arms


def part_of(pack: nmjax.Intervention, cause: str) -> nmjax.Intervention:
    """The effects of a pack that belong to a cause. Raises ValueError if there are none."""
    if cause == "placebo" and not any(isinstance(effect, (ScaleQK, Steer)) for effect in pack.effects):
        raise ValueError(
            f"--arms=placebo: the pack {pack.name} neither scales attention nor steers; nothing to replace"
        )
    if cause in ("full", "placebo"):
        return pack.replace(name=f"{pack.name}:{cause}")
    kept = tuple(effect for effect in pack.effects if isinstance(effect, PARTS[cause]))
    if not kept:
        raise ValueError(f"--arms={cause}: the pack {pack.name} has no such effect; it has {_kinds(pack)}")
    return pack.replace(effects=kept, name=f"{pack.name}:{cause}")


def _kinds(pack: nmjax.Intervention) -> str:
    return ", ".join(type(effect).__name__ for effect in pack.effects) or "none"


def matched_placebo(pack: nmjax.Intervention, lm: nmjax.LanguageModel, seed: int) -> nmjax.Intervention:
    """The pack with its aim taken away and its force kept: every steered direction becomes one that is orthogonal to
    all of the pack's, pushed as hard; the scaled heads become as many other ones, drawn from the whole model. The rest,
    the sampler's part, stays.

    Raises ValueError if the model has not as many other heads.
    """
    rng = np.random.default_rng(seed)
    steered = [name for effect in pack.effects if isinstance(effect, Steer) and effect.source
               for name in effect.source.names]  # fmt: skip
    return pack.replace(effects=tuple(_aimless(effect, lm, steered, rng) for effect in pack.effects))


def _aimless(effect: Effect, lm: nmjax.LanguageModel, steered: Sequence[str], rng: np.random.Generator) -> Effect:
    if isinstance(effect, Steer):
        seed = int(rng.integers(2**31))
        if effect.source is None:
            return effect.replace(vectors=placebo(effect.vectors, "orthogonal", seed))
        names = tuple(dict.fromkeys([*effect.source.names, *steered]))  # the first one sets the norm
        return effect.replace(source=dataclasses.replace(effect.source, names=names, placebo="orthogonal", seed=seed))
    if isinstance(effect, ScaleQK):
        aimed = chosen_heads(lm, effect.layers, effect.heads, effect.on_empty)
        count, others = int(aimed.sum()), np.flatnonzero(aimed.ravel() == 0)
        if count > len(others):
            raise ValueError(f"--arms=placebo: the pack scales {count} of {aimed.size} heads; wanted as many others")
        drawn = rng.choice(others, count, replace=False)
        heads = np.zeros_like(aimed)
        heads.flat[drawn] = 1
        return effect.replace(gain=effect.gain * heads, loss=effect.loss * heads, layers="all", heads=None)
    return effect


def _number(flag: str, text: str, of: str = "") -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{flag}: {text!r}{of}; wanted a finite number >= 0")
    return value
