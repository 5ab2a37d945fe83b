"""Where parameters, optimizer states and batches lie on a mesh of devices: rules as data, and what follows from them.

A mesh has three axes. Rows of a batch are spread over `data` and `fsdp`; parameters over `fsdp` (along the residual
stream's width) and `tensor` (heads, ffw, vocabulary). `RULES` says what each dimension of a leaf is, by the end of its
path, `MESH_AXES` which mesh axes that is spread over; an optimizer's moments have their parameter's path behind their
own and so lie where it lies. Everything is worked out from shapes, before any memory of a device is touched.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nmjax.report.tables import Table

AXES = ("data", "fsdp", "tensor")

# What a dimension is -> the mesh axes it is spread over; None in a rule is spread over none.
MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "ffw": ("tensor",),
    "vocab": ("tensor",),
    "heads_in": ("tensor", "fsdp"),
    "ffw_in": ("tensor", "fsdp"),
}
# Sizes that nobody chooses (GPT-2's vocabulary is 50257): where the mesh does not divide them they stay whole.
MAY_STAY_WHOLE = ("vocab",)

Names = tuple[str | None, ...]
Rules = Sequence[tuple[str, *tuple[Names, ...]]]

# (regular expression for the last parts of a path, what the leaf's last dimensions are); the first that matches counts.
# Dimensions in front of the named ones (stacked layers L, seeds R) stay whole, and so does all of a leaf without names.
# Where a rule says in several ways what they are, the first counts that the mesh divides. What leads out of a sublayer
# is spread along its inputs if it can be: to gather it along its last dimension, XLA for GPUs lays all layers out anew,
# which takes the memory of the whole stack a second time.
RULES: Rules = (
    (r"embed/embedding", ("vocab", "embed")),
    (r"positions/embedding", (None, "embed")),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r"attn/q/kernel", ("embed", "heads", None)),
    (r"attn/q/bias", ("heads", None)),
    (r"attn/[kv]/kernel", ("embed", "kv_heads", None)),
    (r"attn/[kv]/bias", ("kv_heads", None)),
    (r"attn/o/kernel", ("heads_in", None, None), ("heads", None, "embed")),
    (r"mlp/(gate|up)/kernel", ("embed", "ffw")),
    (r"mlp/up/bias", ("ffw",)),
    (r"mlp/down/kernel", ("ffw_in", None), ("ffw", "embed")),
    (r"(attn/o|mlp/down)/bias", ()),
    (r"\w+_norm/(scale|bias|kernel)", ()),
    (r"confidence_predictor/(kernel|bias)", ()),
    # Adapters: `a` reads the projection's input, `b` writes its output; the rank is never spread.
    (r"attn/[qkv]/a", ("embed", None)),
    (r"attn/q/b", (None, "heads", None)),
    (r"attn/[kv]/b", (None, "kv_heads", None)),
    (r"attn/o/a", ("heads", None, None)),
    (r"attn/o/b", (None, "embed")),
    (r"mlp/(gate|up)/a", ("embed", None)),
    (r"mlp/(gate|up)/b", (None, "ffw")),
    (r"mlp/down/a", ("ffw", None)),
    (r"mlp/down/b", (None, "embed")),
    (r"lm_head/a", ("embed", None)),
    (r"lm_head/b", (None, "vocab")),
    (r"(q|k|v|o|gate|up|down|lm_head)/(scale|dropout)", ()),
    (r"step|seed|count", ()),
    (r"carry(/.*)?", ()),
)


def make_mesh(spec: str | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all processes as a mesh with the axes `data, fsdp, tensor`.

    Args:
        spec: sizes by axis, as `{"data": 2, "fsdp": 4}` or as "data=2,fsdp=4". Axes left out have size 1; one may be
            -1 and takes the devices that are left.
        devices: in place of those there are, such as those of a machine to plan for.

    Raises:
        ValueError: for a text that does not read like that, an unknown axis, a size that is neither 1 or more nor a
            single -1, or a mesh that does not hold exactly the devices there are.
    """
    sizes = dict.fromkeys(AXES, 1) | (_parsed(spec) if isinstance(spec, str) else dict(spec))
    unknown = sorted(sizes.keys() - set(AXES))
    if unknown:
        raise ValueError(f"mesh axes must be among {', '.join(AXES)}, got {', '.join(unknown)} in {spec!r}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or not all(isinstance(size, int) and (size > 0 or size == -1) for size in sizes.values()):
        raise ValueError(f"mesh sizes must be whole numbers from 1 on, and -1 at most once, got {spec!r}")
    devices = jax.devices() if devices is None else devices
    count, held = len(devices), math.prod(size for size in sizes.values() if size != -1)
    if open_axes and count % held == 0:
        sizes[open_axes[0]] = count // held
    elif held != count:
        wanted = f"a divisor of {count}" if open_axes else f"{count}, the number of devices"
        raise ValueError(f"mesh {spec!r}: the product of the sizes must be {wanted}, got {held}")
    shape, types = tuple(sizes[axis] for axis in AXES), (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def _parsed(spec: str) -> dict[str, int]:
    pairs = [re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+)\s*", part) for part in spec.split(",")]
    sizes = {pair[1]: int(pair[2]) for pair in pairs if pair}
    if len(sizes) < len(pairs):
        raise ValueError(f"mesh must read like data=2,fsdp=4, each axis once, got {spec!r}")
    return sizes


class Placement(NamedTuple):
    """How one leaf is spread over a mesh."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    spec: PartitionSpec
    note: str = ""

    def bytes_per_device(self, mesh: Mesh | AbstractMesh) -> int:
        local = NamedSharding(mesh, self.spec).shard_shape(self.shape)
        return math.prod(local) * self.dtype.itemsize


def placements(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> list[Placement]:
    """How each leaf of a tree (arrays, or shapes from `jax.eval_shape`) is spread, in the order of its leaves.

    Raises:
        ValueError: if a leaf matches no rule or has fewer dimensions than its rule names, or if the mesh does not
            divide a dimension (other than one of `MAY_STAY_WHOLE`).
    """
    found = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path, shape = jax.tree_util.keystr(keys, simple=True, separator="/"), tuple(np.shape(leaf))
        *preferred, last = _layouts(path, shape, rules)
        names = next((names for names in preferred if _divides(mesh, shape, names)), last)
        spec: list[Any] = [None] * len(shape)
        note = ""
        for at, name in enumerate(names, start=len(shape) - len(names)):
            axes = MESH_AXES[name] if name else ()
            if shape[at] % _parts(mesh, name) == 0:
                spec[at] = axes if len(axes) > 1 else axes[0] if axes else None
            elif name in MAY_STAY_WHOLE:
                note = f"{name} {shape[at]} stays whole: {_sizes(mesh, axes)} does not divide it"
            else:
                seen = f"{shape[at]} in {path} of shape {shape}"
                raise ValueError(f"mesh: {_sizes(mesh, axes)} must divide {name}, got {name} {seen}")
        found.append(Placement(path, shape, np.dtype(leaf.dtype), PartitionSpec(*spec), note))
    return found


def _layouts(path: str, shape: tuple[int, ...], rules: Rules) -> tuple[Names, ...]:
    """What a leaf's last dimensions are, in the ways that its rule knows, first choice first."""
    for pattern, *layouts in rules:
        if re.search(rf"(^|/)({pattern})$", path):
            for names in layouts:
                if len(names) > len(shape):
                    raise ValueError(f"sharding rule {pattern!r} names {names}, got {path} of shape {shape}")
            return tuple(layouts)
    raise ValueError(f"sharding: {path} of shape {shape} matches no rule; add one to `rules`")


def _divides(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], names: Names) -> bool:
    return all(shape[at] % _parts(mesh, name) == 0 for at, name in enumerate(names, start=len(shape) - len(names)))


def _parts(mesh: Mesh | AbstractMesh, name: str | None) -> int:
    return math.prod(mesh.shape[axis] for axis in (MESH_AXES[name] if name else ()))


def _sizes(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> str:
    return " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Any:
    """The tree of `NamedSharding` that `placements` describes; takes what it takes and raises what it raises."""
    leaves = [NamedSharding(mesh, placement.spec) for placement in placements(tree, mesh, rules)]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def describe(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> str:
    """A table of `placements`, one line for all layers alike, with the memory each leaf takes on a device."""
    groups: dict[tuple, list[Placement]] = {}
    for placement in placements(tree, mesh, rules):
        alike = re.sub(r"layers_\d+", "layers_*", placement.path)
        groups.setdefault((alike, placement.shape, placement.spec, placement.note), []).append(placement)

    def megabytes(members: Sequence[Placement]) -> str:
        return f"{sum(member.bytes_per_device(mesh) for member in members) / 2**20:.2f}"

    rows = []
    for (path, shape, spec, note), members in groups.items():
        over = ", ".join("+".join(axes) if isinstance(axes, tuple) else axes or "-" for axes in spec)
        count = f" ({len(members)} times)" if len(members) > 1 else ""
        rows.append([path + count, " x ".join(map(str, shape)), f"({over})", megabytes(members), note])
    rows.append(["all", "", "", megabytes([member for members in groups.values() for member in members]), ""])
    caption = f"mesh {', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}"
    return Table(["leaf", "shape", "spread over", "MiB a device", "note"], rows, caption).text()


def pin(x: jax.Array) -> jax.Array:
    """The residual stream [B, T, D] with its rows spread over (data, fsdp), where a mesh is in force; else `x` itself.

    Without it the compiler is free to spread D as the parameters are spread, and sends activations around instead of
    parameters.
    """
    return _constrained(x, PartitionSpec(MESH_AXES["batch"], None, None))


def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows [..., D] of a table [V, D] at ids int [...]; where a mesh is in force, D is brought together first.

    A lookup in parts of D would have to send whole activations to where their rows belong.
    """
    return jnp.take(_constrained(table, PartitionSpec(PartitionSpec.UNCONSTRAINED, None)), ids, axis=0)


def _constrained(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    if not set(AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """That of a batch whose leaves have their rows B along `axis`; all other axes stay whole."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, MESH_AXES["batch"]))


def place(batch: Any, mesh: Mesh, axis: int = 0, parts: int = 1) -> Any:
    """A batch on the host as global arrays whose rows B, along `axis` of every leaf, are spread over (data, fsdp).

    Every process makes the same whole batch and keeps the rows of its own devices.

    Args:
        parts: micro-batches that the rows will be split into, each of which shall be spread evenly.

    Raises:
        ValueError: if the rows are not a multiple of data x fsdp x parts, or a leaf does not have so many axes.
    """
    sharding = rows_sharding(mesh, axis)
    devices = math.prod(mesh.shape[name] for name in MESH_AXES["batch"])

    def one(keys, leaf):
        leaf, path = np.asarray(leaf), jax.tree_util.keystr(keys)
        if leaf.ndim <= axis:
            raise ValueError(f"batch: leaf {path!r} must have its rows along axis {axis}, got shape {leaf.shape}")
        if leaf.shape[axis] % (devices * parts):
            micro = f" x {parts} micro-batches" if parts > 1 else ""
            wanted = f"a multiple of {_sizes(mesh, MESH_AXES['batch'])}{micro}, {devices * parts}"
            raise ValueError(f"batch: rows must be {wanted}, got {leaf.shape[axis]} in leaf {path!r}")
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree_util.tree_map_with_path(one, batch)


def spread(tree: Any, places: Any) -> Any:
    """A tree of arrays, the same in every process, under a tree of shardings; a leaf that lies there already stays."""

    def one(leaf, sharding):
        if jax.process_count() == 1 or _spans_processes(leaf):
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, places)


def gather(tree: Any) -> Any:
    """The whole of every leaf on this process's first device; all processes have to call it."""

    def one(leaf):
        whole = multihost_utils.process_allgather(leaf, tiled=True) if _spans_processes(leaf) else leaf
        return jax.device_put(np.asarray(whole), jax.local_devices()[0])

    return jax.tree.map(one, tree)


def check_same(tree: Any, what: str) -> None:
    """Raises ValueError unless what each process has made by itself of a tree is the same in all; `what` names it."""
    if jax.process_count() == 1:
        return
    digest = 0
    for leaf in jax.tree.leaves(tree):
        if not _spans_processes(leaf):
            digest = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, digest)
    digests = multihost_utils.process_allgather(np.uint32(digest))
    others = np.flatnonzero(digests != digests[0]).tolist()
    if others:
        raise ValueError(f"{what} must be the same in every process, got others than process 0's in {others}")


def _spans_processes(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
