"""LoRA training: which projections get an adapter, how it starts, its loss over frozen parameters, and merging it.

    adapter = init(module, LoraConfig(r=16), jax.random.key(0))
    state, _ = train(
        lora_loss(loss), adapter.weights, data, recipe,
        frozen=frozen(params, adapter), identity={"base": lm.base.fingerprint},
    )
    lm.with_adapter(adapter.replace(weights=state.params))

Adapters are float32 whatever the parameters are; these are never copied, differentiated or given to the optimizer.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from nmjax.adapters import LORA, SETTINGS, Adapter, Path, Site, assemble, leaves_of, sites, stack_layers
from nmjax.interventions.where import checked_layers, layer_mask
from nmjax.training.loop import Batch, LossFn, Params, language_model_objective

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What an adapter is made with.

    Attributes:
        r: the rank.
        alpha: the branch is scaled by alpha / r; None is 2 r.
        targets: names of projections (`q k v o gate up down lm_head`, or as Hugging Face has them, `q_proj`), a regular
            expression for whole paths such as `layers_3/attn/q`, or "all-linear": all but the output head.
        rslora: scale by alpha / sqrt(r) instead (Kalajdzievski 2023).
        dropout: probability of each input of the branch to be dropped while training.
        layers: which layers, as everywhere: "all", "mid", indices, fractions of depth.
    """

    r: int = 16
    alpha: float | None = None
    targets: Sequence[str] | str = ("q", "k", "v", "o")
    rslora: bool = False
    dropout: float = 0.05
    layers: Any = "all"

    def __post_init__(self):
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"lora: r={self.r!r}, wanted an integer >= 1")
        alpha = 2 * self.r if self.alpha is None else self.alpha
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha == 0:
            raise ValueError(f"lora: alpha={self.alpha!r}, wanted a finite number other than 0")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout={self.dropout!r}, wanted a number of at least 0 and below 1")
        targets = self.targets if isinstance(self.targets, str) else tuple(self.targets)
        if not targets or not all(isinstance(target, str) and target for target in targets):
            raise ValueError(f"lora: targets={self.targets!r}, wanted names of projections, or a regular expression")
        for name, value in (("alpha", alpha), ("targets", targets), ("layers", checked_layers(self.layers))):
            object.__setattr__(self, name, value)

    def scale(self, r: int | None = None) -> float:
        """Of the branch, at the config's rank or another."""
        r = self.r if r is None else r
        return self.alpha / (math.sqrt(r) if self.rslora else r)  # type: ignore[operator]


def init(module: nn.Module, config: LoraConfig, key: jax.Array) -> Adapter:
    """An adapter that changes nothing yet: b is zero, a uniform within +-1 / sqrt(inputs) as in PEFT.

    Every projection draws from a key of its own, by layer, so stacked and unrolled layers start alike.

    Raises:
        ValueError: for targets or layers that the module doesn't have.
    """
    known = sites(module)
    stacked = next((site.layers for site in known.values() if site.layers is not None), None)
    leaves = {}
    for path, site in targeted(known, config).items():
        draw = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        bound = 1 / math.sqrt(math.prod(site.into))
        leaves[path] = {
            "a": jax.random.uniform(draw, (*site.into, config.r), jnp.float32, -bound, bound),
            "b": jnp.zeros((config.r, *site.out), jnp.float32),
            "scale": jnp.full(config.r, config.scale(), jnp.float32),
            "dropout": jnp.float32(config.dropout),
        }
    adapter = assemble(config, leaves)
    return adapter if stacked is None else stack_layers(adapter, stacked)


def targeted(known: dict[Path, Site], config: LoraConfig) -> dict[Path, Site]:
    """The sites that a config targets, of all that there are, each layer by itself.

    Raises:
        ValueError: for targets or layers that are not among them.
    """
    apart = unrolled(known)
    count = len({path[0] for path in apart if path[0].startswith("layers_")})
    chosen = layer_mask(config.layers, count)

    def inside(path):
        at = path[0].removeprefix("layers_")
        return chosen[int(at)] if at.isdigit() else config.layers == "all"

    names = list(dict.fromkeys(path[-1] for path in apart))
    if isinstance(config.targets, str) and config.targets != ALL_LINEAR:
        try:
            wanted = {path for path in apart if re.fullmatch(config.targets, "/".join(path))}
        except re.error as error:
            raise ValueError(f"lora: targets={config.targets!r} is not a regular expression: {error}") from error
        if not wanted:
            example = "/".join(next(iter(apart)))
            raise ValueError(
                f"lora: targets={config.targets!r} matches no path; wanted one such as {example}, of {names}"
            )
    else:
        listed = [n for n in names if n != "lm_head"] if config.targets == ALL_LINEAR else config.targets
        plain = [name.removesuffix("_proj") for name in listed]
        unknown = [name for name, short in zip(listed, plain, strict=True) if short not in names]
        if unknown:
            raise ValueError(f"lora: targets {unknown} are no projections of this model, wanted some of {names}")
        wanted = {path for path in apart if path[-1] in plain}
    found = {path: site for path, site in apart.items() if path in wanted and inside(path)}
    if not found:
        raise ValueError(f"lora: targets={config.targets!r} has no projection in layers={config.layers!r}")
    return found


def unrolled(known: dict[Path, Site]) -> dict[Path, Site]:
    """Sites with one entry a layer, whether or not the module's layers are stacked."""
    apart = {}
    for path, site in known.items():
        if site.layers is None:
            apart[path] = site
        for i in range(site.layers or 0):
            here = (f"layers_{i}", *path[1:])
            apart[here] = dataclasses.replace(site, path=here, layers=None)
    return apart


def count(adapter: Adapter) -> int:
    """How many numbers are trained; shapes are enough."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapter.weights))


# --- Training ---------------------------------------------------------------------------------------------------------


def frozen(params: Params, adapter: Adapter) -> dict[str, Any]:
    """What `train(frozen=...)` takes when the adapter's weights are trained: all the other variables."""
    return {"params": params, SETTINGS: adapter.settings}


def lora_loss(loss: Callable[[dict[str, Any], Batch, jax.Array], tuple[jax.Array, Any]]) -> LossFn:
    """A loss of a model's variables, `loss(variables, batch, key)`, as one of adapter weights for `train`."""

    def loss_fn(weights, batch, key, *, frozen):
        return loss({**frozen, LORA: weights}, batch, key)

    return loss_fn


def lora_language_model_loss(module: nn.Module) -> LossFn:
    """`loop.language_model_loss` of adapters, with their dropout."""

    def loss(variables, batch, key):
        return language_model_objective(module, variables, batch, rngs={"dropout": key}), {}

    return lora_loss(loss)


# --- Merging ----------------------------------------------------------------------------------------------------------


def merge(params: Params, adapter: Adapter) -> Params:
    """The parameters with `a scale b` added to the kernels, in float32 and then rounded to each kernel's dtype."""
    return _merged(params, adapter, 1.0)


def unmerge(params: Params, adapter: Adapter) -> Params:
    """Takes a merged adapter out again, up to rounding: keep the parameters themselves where bits matter."""
    return _merged(params, adapter, -1.0)


def _merged(params: Params, adapter: Adapter, sign: float) -> Params:
    flat = flatten_dict(params)
    for path, here in leaves_of(adapter).items():
        product = jax.vmap(_product) if path[0] == "layers" else _product
        change = sign * product(here["a"], here["scale"], here["b"])
        kernel = flat.get((*path, "kernel"))
        if kernel is None or kernel.shape != change.shape:
            seen = "none" if kernel is None else f"shape {kernel.shape}"
            name = "/".join(path)
            raise ValueError(f"adapter: it is for another model: wanted {name}/kernel of {change.shape}, got {seen}")
        flat[*path, "kernel"] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    return unflatten_dict(flat)


def _product(a, scale, b):
    """[in..., r], [r], [r, out...] -> [in..., out...]."""
    return jnp.tensordot(a * scale, b, axes=1, precision=jax.lax.Precision.HIGHEST)
