"""Machines to plan for: what a chip has, how many there are, and a topology that XLA compiles for without one.

Figures are those of the vendors' data sheets, dense and in one direction. A CUDA compiler is told of a card by a
`GpuTargetConfig`; what a device would report to it is written here as data.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping

import jax
from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        platform: "cuda" or "tpu".
        memory: bytes that the device reports.
        reserved: bytes of these that no program gets: a context, buffers of collectives and workspaces of libraries,
            which the compiler does not count. A TPU's compiler counts all.
        flops: peak dense multiply-adds in bfloat16, two operations each, a second.
        flops_float32: of matrices in float32 at JAX's default precision (TF32 on a GPU, bfloat16 passes on a TPU).
        bandwidth: of the device's memory, bytes a second.
        link: bytes a second that a device sends in a ring inside its host (GPU) or slice (TPU, both ways of an axis).
        network: bytes a second that a device sends to other hosts; a TPU's slice is one network.
        per_host: devices of a host.
        target: of a GPU, fields of its device description.
    """

    name: str
    platform: str
    memory: int
    reserved: int
    flops: float
    flops_float32: float
    bandwidth: float
    link: float
    network: float
    per_host: int
    target: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def extra(self) -> str:
        """The project's extra that installs the compiler."""
        return f"plan-{self.platform}"


_NVIDIA = {
    "threads_per_block_limit": "1024",
    "threads_per_warp": "32",
    "threads_per_core_limit": "2048",
    "shared_memory_per_block": "49152",
    "registers_per_core_limit": "65536",
    "registers_per_block_limit": "65536",
    "block_dim_limit_x": "2147483647",
    "block_dim_limit_y": "65535",
    "block_dim_limit_z": "65535",
    "thread_dim_limit_x": "1024",
    "thread_dim_limit_y": "1024",
    "thread_dim_limit_z": "64",
    "runtime_version": '"12.9.0"',
    "driver_version": '"12.9.0"',
}
_AMPERE = _NVIDIA | {
    "cuda_compute_capability": "{ major: 8 }",
    "core_count": "108",
    "fpus_per_core": "64",
    "clock_rate_ghz": "1.41",
    "l2_cache_size": "41943040",
    "shared_memory_per_core": "167936",
    "shared_memory_per_block_optin": "166912",
}
_HOPPER = _NVIDIA | {
    "cuda_compute_capability": "{ major: 9 }",
    "core_count": "132",
    "fpus_per_core": "128",
    "clock_rate_ghz": "1.98",
    "l2_cache_size": "52428800",
    "shared_memory_per_core": "233472",
    "shared_memory_per_block_optin": "232448",
}


def _gpu(name: str, memory: int, bandwidth: float, generation: Mapping[str, str], **rates) -> Chip:
    target = {**generation, "device_memory_size": str(memory), "memory_bandwidth": f"{bandwidth:.0f}"}
    return Chip(name, "cuda", memory, 2 * GIB, bandwidth=bandwidth, per_host=8, target=target, **rates)


def _tpu(name: str, memory: float, flops: float, bandwidth: float, link: float) -> Chip:
    usable = round(memory * GIB)
    return Chip(name, "tpu", usable, 0, flops, flops, bandwidth, link, network=link, per_host=4)


_A100 = dict(flops=312e12, flops_float32=156e12, link=300e9, network=25e9)  # HDR InfiniBand, one port a card
_H100 = dict(flops=989e12, flops_float32=494e12, link=450e9, network=50e9)  # NDR InfiniBand

CHIPS = {
    chip.name: chip
    for chip in (
        _gpu("a100-40g", 42331013120, 1555.2e9, _AMPERE, **_A100),
        _gpu("a100-80g", 85100068864, 2039.04e9, _AMPERE, **_A100),
        _gpu("h100", 84942979072, 3352.32e9, _HOPPER, **_H100),
        _gpu("h200", 151397597184, 4800e9, _HOPPER, **_H100),
        _tpu("v5e", 15.75, 197e12, 819e9, 90e9),
        _tpu("v5p", 95.74, 459e12, 2765e9, 180e9),
        _tpu("v6e", 31.25, 918e12, 1640e9, 180e9),
    )
}

# A slice of a TPU has a shape. v5e and v6e are tori of two axes, v5p of three.
_SHAPES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("1x1x1", "2x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}


@dataclasses.dataclass(frozen=True)
class Hardware:
    """So many chips of a kind, spread over as few hosts as hold them."""

    chip: Chip
    count: int

    def __str__(self) -> str:
        return f"{self.chip.name}:{self.count}"

    @property
    def hosts(self) -> int:
        return -(-self.count // self.chip.per_host)

    @property
    def usable_memory(self) -> int:
        """Bytes a device gives a program."""
        return self.chip.memory - self.chip.reserved


def parse(text: str) -> Hardware:
    """`a100-80g:4` as hardware; the count, of chips, is 1 where it is left out.

    Raises:
        ValueError: for an unknown chip, or a count that such machines don't come in: GPUs are so many of one host of
            8 or whole hosts, and a TPU's slices are powers of two.
    """
    found = re.fullmatch(r"\s*([\w-]+)\s*(?::\s*(\d+))?\s*", text)
    if not found or found[1].lower() not in CHIPS:
        raise ValueError(f"hardware must read like a100-80g:4, with one of {', '.join(CHIPS)}, got {text!r}")
    hardware = Hardware(CHIPS[found[1].lower()], int(found[2] or 1))
    _arrangement(hardware)
    return hardware


def _arrangement(hardware: Hardware) -> str:
    """As XLA names it: of GPUs slices x hosts x devices of a host, of TPUs the shape of a slice."""
    chip, count = hardware.chip, hardware.count
    if chip.platform == "cuda":
        if count < 1 or (count > chip.per_host and count % chip.per_host):
            wanted = f"1 to {chip.per_host}, or a multiple of {chip.per_host} for whole hosts"
            raise ValueError(f"hardware: the number of {chip.name} must be {wanted}, got {count}")
        return f"1x{hardware.hosts}x{min(count, chip.per_host)}"
    shapes = {_size(shape): shape for shape in _SHAPES[3 if chip.name == "v5p" else 2]}
    if count not in shapes:
        wanted = f"one of {', '.join(map(str, shapes))}"
        raise ValueError(f"hardware: the number of {chip.name} chips must be {wanted}, got {count}")
    return f"{chip.name}:{shapes[count]}"


def _size(shape: str) -> int:
    size = 1
    for axis in shape.split("x"):
        size *= int(axis)
    return size


def target_config(chip: Chip) -> str:
    """The `GpuTargetConfig` of a GPU, in protobuf's text format."""
    fields = "\n".join(
        f"  {name} {value}" if value.startswith("{") else f"  {name}: {value}" for name, value in chip.target.items()
    )
    # cuDNN 9.10: what a compiler may count on, were a program to call it.
    return (
        f'gpu_device_info {{\n{fields}\n}}\nplatform_name: "CUDA"\n'
        f'dnn_version_info {{ major: 9 minor: 10 }}\ndevice_description_str: "{chip.name}"\n'
    )


def devices(hardware: Hardware) -> list[jax.Device]:
    """Devices to compile for, none of which need exist; JAX itself must run on the CPU (`JAX_PLATFORMS=cpu`).

    Raises:
        ModuleNotFoundError: the compiler for this platform is not installed; says how to.
    """
    chip, arrangement = hardware.chip, _arrangement(hardware)
    module = {"cuda": "jax_plugins.xla_cuda12", "tpu": "libtpu"}[chip.platform]
    if not _installed(module):
        raise ModuleNotFoundError(
            f"hardware: to compile for {chip.name} wanted the package of {module}, which is not installed; "
            f"install the project's extra: pip install 'nmjax[{chip.extra}]'"
        )
    if chip.platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # or it asks the cloud which TPU this is
        return topologies.get_topology_desc(arrangement, "tpu").devices
    return topologies.get_topology_desc("", "cuda", target_config=target_config(chip), topology=arrangement).devices


def _installed(module: str) -> bool:
    """Whether a module can be found, and the packages it lies in."""
    parent = module.rpartition(".")[0]
    return (not parent or _installed(parent)) and importlib.util.find_spec(module) is not None
