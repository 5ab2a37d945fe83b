"""Which of a model's adapters a row runs under, and how strongly."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nmjax.interventions.effect import Effect, static


class UseAdapter(Effect):
    """An adapter that the model carries under a name, at the effect's dose. It acts at no site but on the weights."""

    adapter: str = static(default="")


def use_adapter(name: str) -> UseAdapter:
    """Runs a row under an adapter of a model that carries several (`lm.with_adapters`): its branch times `d`.

    Several of them in one row add up, and a row without any is the base.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"use_adapter: name={name!r}, wanted the name of an adapter")
    return UseAdapter(adapter=name)


def adapter_doses(lm, rows: Sequence[Sequence[Effect]]):
    """float32 [B, M]: every row's dose of each of the model's adapters; None for a model without named ones.

    Raises:
      ValueError: a row wants an adapter that the model doesn't carry, or wants it at some tokens only.
    """
    names = lm.adapter_names
    doses = [[np.float32(0)] * len(names) for _ in rows]
    for i, effects in enumerate(rows):
        for effect in effects:
            if not isinstance(effect, UseAdapter):
                continue
            if effect.adapter not in names:
                there = list(names) or "none by name; give it some with lm.with_adapters"
                raise ValueError(f"use_adapter: name={effect.adapter!r}, but the model's adapters are {there}")
            if effect.where is not None:
                raise ValueError("use_adapter: it has no selection of tokens, it is all of the row")
            at = names.index(effect.adapter)
            doses[i][at] = doses[i][at] + effect.dose
    if not names:
        return None
    traced = any(isinstance(dose, jax.Array) for row in doses for dose in row)
    return jnp.asarray(doses, jnp.float32) if traced else np.asarray(doses, np.float32)
