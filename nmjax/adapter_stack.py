"""Several adapters in one batch: each row has its own, some of several, or none.

Side by side, several adapters are one of the summed rank R, and which of them a row gets is a matter of its scale
[B, R]: no weights are copied, a row may have each at a strength of its own, and a scale of 0 is the base.

    a  [in, 0 0 1 1 1]    adapter 0 of rank 2 beside adapter 1 of rank 3
    the scale of a row with adapter 1:   0 0 s s s
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from nmjax.adapters import LORA, SETTINGS, Adapter, Weights, at_sites, leaves_of


class AdapterStack(flax.struct.PyTreeNode):
    """Several adapters by name, of which every row of a batch chooses (`choose`)."""

    weights: Weights  # float32: a [in..., R], b [R, out...], R the sum of the ranks
    settings: dict[str, Any]  # float32: bank [M, R], the scale of each adapter in its own places; dropout []
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    @property
    def variables(self) -> dict[str, Any]:
        return {LORA: self.weights, SETTINGS: self.settings}


def stack(adapters: Mapping[str, Adapter]) -> AdapterStack:
    """Several adapters of one model, by name, as one; they may differ in rank, scale and where they act.

    Dropout is left behind: several adapters are for running, not for training.

    Raises:
      ValueError: there are none, or the layers of some are stacked and those of others not.
    """
    if not adapters or len({adapter.stacked for adapter in adapters.values()}) > 1:
        kinds = {name: "stacked layers" if one.stacked else "unrolled layers" for name, one in adapters.items()}
        raise ValueError(f"adapters={kinds}, wanted at least one, and all with their layers stacked or all unrolled")
    parts = [leaves_of(adapter) for adapter in adapters.values()]
    weights, settings = {}, {}
    for path in dict.fromkeys(path for part in parts for path in part):
        here = {number: part[path] for number, part in enumerate(parts) if path in part}
        a, b, scale = ([leaves[name] for leaves in here.values()] for name in ("a", "b", "scale"))
        owner = np.repeat(list(here), [leaf.shape[-1] for leaf in scale])  # [R]
        own = owner == np.arange(len(parts))[:, None]
        weights[*path, "a"] = jnp.concatenate(a, axis=-1)
        weights[*path, "b"] = jnp.concatenate(b, axis=1 if path[0] == "layers" else 0)  # behind L if there is one
        settings[*path, "bank"] = jnp.where(own, jnp.concatenate(scale, axis=-1)[..., None, :], 0)
        settings[*path, "dropout"] = jnp.zeros(scale[0].shape[:-1])
    return AdapterStack(unflatten_dict(weights), unflatten_dict(settings), tuple(adapters))


def choose(variables: dict[str, Any], doses) -> dict[str, Any]:
    """The variables of a model with M adapters, in which each row has every adapter at its dose [B, M]; 0 = without."""
    doses, settings = jnp.asarray(doses), {}
    for path, here in at_sites(variables[SETTINGS]).items():
        settings[*path, "scale"] = jnp.einsum("bm,...mr->...br", doses, here["bank"], precision="highest")
        settings[*path, "dropout"] = here["dropout"]
    return {**variables, SETTINGS: unflatten_dict(settings)}


def pick(several: AdapterStack, rows) -> dict[str, Any]:
    """The collections for `module.apply` in which row b has adapter `rows[b]`, int32 [B]; -1 is the base."""
    return choose(several.variables, jax.nn.one_hot(jnp.asarray(rows), len(several.names)))
