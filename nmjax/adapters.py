"""Low-rank adapters (LoRA, Hu et al. 2021): what one is, where it can be, how it acts.

To what a projection makes of x, an adapter of rank r adds `((x a) * scale) b`, with a [in..., r], b [r, out...] and
scale [r]. They are variables beside the parameters, in two Linen collections of the same layout: `lora` holds a and b,
which are trained, `lora_settings` scale and dropout, which are not. A model without these collections is the base.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

if TYPE_CHECKING:
    from nmjax.training.lora import LoraConfig

LORA, SETTINGS = "lora", "lora_settings"

Path = tuple[str, ...]
Weights = dict[str, Any]  # nested like the parameters, {"a", "b"} in place of {"kernel", "bias"}


class Adapter(flax.struct.PyTreeNode):
    """One adapter. With stacked layers (`ScannedLlama`) every leaf has L in front."""

    weights: Weights  # float32: a [in..., r], b [r, out...]
    settings: dict[str, Any]  # float32: scale [r], dropout []
    config: LoraConfig = flax.struct.field(pytree_node=False)  # that it was made with

    @property
    def variables(self) -> dict[str, Any]:
        return {LORA: self.weights, SETTINGS: self.settings}

    @property
    def stacked(self) -> bool:
        return "layers" in self.weights


def adapt(module: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    """`y`, which `module` made of `x` by its `equation`, plus what the adapter in the module's scope adds, if any.

    The sum is made in the wider dtype of the two and has the dtype of `y`. Dropout acts on the adapter's `x` where an
    rng called `dropout` is given.

    Raises:
      ValueError: there are several adapters (`adapter_stack`), and nobody chose.
    """
    if not module.has_variable(LORA, "a"):
        return y
    a: jax.Array = module.get_variable(LORA, "a")
    b: jax.Array = module.get_variable(LORA, "b")
    if not module.has_variable(SETTINGS, "scale"):
        raise ValueError("the model carries several adapters, of which this function can't choose; wanted one of them")
    x_axes, into, out, y_axes = _axes(module.equation)
    x = x.astype(a.dtype)
    if module.has_rng("dropout"):
        kept = 1 - module.get_variable(SETTINGS, "dropout")
        x = jnp.where(jax.random.bernoulli(module.make_rng("dropout"), kept, x.shape), x / kept, 0)
    rows = "".join(axis for axis in x_axes if axis not in into)
    scale: jax.Array = module.get_variable(SETTINGS, "scale")  # [r], or [B, r] with one a row
    low = jnp.einsum(f"{x_axes},{into}r->{rows}r", x, a) * scale[..., None, :]
    return (y + jnp.einsum(f"{rows}r,r{out}->{y_axes}", low, b)).astype(y.dtype)


def _axes(equation: str) -> tuple[str, str, str, str]:
    """Of "btd,dnh->btnh": the axes of x, those of the kernel that are summed over and that stay, the axes of y."""
    x, rest = equation.split(",")
    kernel, y = rest.split("->")
    return x, "".join(axis for axis in kernel if axis not in y), "".join(axis for axis in kernel if axis in y), y


@dataclasses.dataclass(frozen=True)
class Site:
    """A projection that can carry an adapter; its kernel is [in..., out...], behind L where layers are stacked."""

    path: Path  # ("layers_3", "attn", "q"), or with stacked layers ("layers", "attn", "q")
    into: tuple[int, ...]
    out: tuple[int, ...]
    layers: int | None = None  # L where they are stacked

    def shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        """Of an adapter's a and b here."""
        lead = () if self.layers is None else (self.layers,)
        return {"a": (*lead, *self.into, r), "b": (*lead, r, *self.out)}


@functools.lru_cache(maxsize=16)
def sites(module: nn.Module) -> dict[Path, Site]:
    """Every projection of a decoder, the output head's included: modules that have an `equation` and call `adapt`."""
    found: dict[Path, tuple[str, tuple[int, ...]]] = {}

    def record(call, args, kwargs, context):
        if hasattr(context.module, "equation"):
            found[context.module.path] = (context.module.equation, context.module.shape)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    kernels = flatten_dict(shapes["params"])
    known = {}
    for path, (equation, shape) in found.items():
        split, kernel = len(_axes(equation)[1]), kernels[*path, "kernel"].shape
        layers = kernel[0] if len(kernel) > len(shape) else None
        known[path] = Site(path, shape[:split], shape[split:], layers)
    return known


def check(module: nn.Module, weights: Weights) -> None:
    """Raises ValueError, with all that is wrong, where the weights of adapters are not of this module's shapes."""
    known, problems = sites(module), []
    for path, pair in at_sites(weights).items():
        if path not in known:
            problems.append(f"{'/'.join(path)} is no projection of this model")
            continue
        seen = {name: tuple(leaf.shape) for name, leaf in pair.items()}
        wanted = known[path].shapes(seen["a"][-1] if "a" in seen else 0)
        problems += [
            f"{'/'.join(path)}/{name} has shape {seen.get(name)}, wanted {shape}"
            for name, shape in wanted.items()
            if seen.get(name) != shape
        ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"adapter: it is for another model: {'; '.join(problems[:8])}{more}")


def at_sites(tree: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """The leaves of a collection by the path of their projection: {path: {"a": ..., "b": ...}}."""
    found: dict[Path, dict[str, Any]] = {}
    for (*path, name), leaf in flatten_dict(dict(tree)).items():
        found.setdefault(tuple(path), {})[name] = leaf
    return found


def assemble(config: LoraConfig, leaves: Mapping[Path, Mapping[str, Any]]) -> Adapter:
    """An adapter from {path: {"a", "b", "scale", "dropout"}}."""

    def part(*names):
        return unflatten_dict({(*path, name): here[name] for path, here in leaves.items() for name in names})

    return Adapter(weights=part("a", "b"), settings=part("scale", "dropout"), config=config)


def leaves_of(adapter: Adapter) -> dict[Path, dict[str, Any]]:
    """What `assemble` took."""
    settings = at_sites(adapter.settings)
    return {path: here | settings[path] for path, here in at_sites(adapter.weights).items()}


def stack_layers(adapter: Adapter, layers: int) -> Adapter:
    """The adapter for a module whose L layers are stacked.

    Where layers differ in rank, or some have no adapter, zeros stand in (scale 0: they are never trained).
    """
    if adapter.stacked:
        return adapter
    flat = leaves_of(adapter)
    inside = dict.fromkeys(path[1:] for path in flat if path[0].startswith("layers_"))
    together = {path: here for path, here in flat.items() if not path[0].startswith("layers_")}
    for rest in inside:
        here = [flat.get((f"layers_{i}", *rest)) for i in range(layers)]
        present = [leaves for leaves in here if leaves is not None]
        rank = max(leaves["scale"].shape[-1] for leaves in present)
        blank = jax.tree.map(jnp.zeros_like, present[0])
        padded = [_of_rank(blank if leaves is None else leaves, rank) for leaves in here]
        together["layers", *rest] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)
    return assemble(adapter.config, together)


def _of_rank(leaves: dict[str, Any], rank: int) -> dict[str, Any]:
    """Filled up with zeros."""
    spare = rank - leaves["scale"].shape[-1]
    if spare == 0:
        return leaves

    def fill(leaf, axis):
        return jnp.pad(leaf, [(0, spare if i == axis % leaf.ndim else 0) for i in range(leaf.ndim)])

    return leaves | {"a": fill(leaves["a"], -1), "b": fill(leaves["b"], 0), "scale": fill(leaves["scale"], -1)}


def unstack_layers(adapter: Adapter) -> Adapter:
    """The adapter for a module with one subtree a layer; what `stack_layers` filled up with zeros is left out again."""
    if not adapter.stacked:
        return adapter
    apart = {}
    for path, here in leaves_of(adapter).items():
        if path[0] != "layers":
            apart[path] = here
            continue
        for i in range(len(here["scale"])):
            a, b, scale, dropout = (here[name][i] for name in ("a", "b", "scale", "dropout"))
            used = np.flatnonzero(np.asarray(scale))
            if len(used):
                apart[f"layers_{i}", *path[1:]] = {
                    "a": a[..., used], "b": b[used], "scale": scale[used], "dropout": dropout,
                }  # fmt: skip
    return assemble(adapter.config, apart)
