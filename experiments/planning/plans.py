"""A plan: one workload on one mesh of one machine, compiled; and a search over meshes and batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from experiments.planning.jobs import Workload, programs
from models.families import ModelConfig
from nmjax.planning import hardware as machines
from nmjax.planning.ahead_of_time import Compiled, DoesNotFit, compile_for
from nmjax.planning.hardware import Hardware
from nmjax.planning.roofline import Assumptions, Estimate, estimate
from nmjax.training.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Stage:
    """One program of a job."""

    name: str
    compiled: Compiled
    time: Estimate

    def collectives(self, per_host: int) -> list[dict[str, Any]]:
        """By kind and number of devices: how often they run, bytes of whole arrays, and bytes that a device sends."""
        rows: dict[tuple, dict[str, Any]] = {}
        for one in self.compiled.work.collectives:
            hosts = len({member // per_host for member in one.members})
            start = dict(kind=one.kind, devices=len(one.members), hosts=hosts, runs=0, whole=0.0, sent=0.0)
            row = rows.setdefault((one.kind, len(one.members), hosts), start)
            row["runs"] += one.times
            row["whole"] += one.times * one.size
            row["sent"] += one.times * one.sent
        return sorted(rows.values(), key=lambda row: -row["sent"])


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a workload needs, and how long it should take.

    Attributes:
        mesh: sizes by axis.
        tokens: those trained on, read or generated in one run of all stages.
    """

    machine: Hardware
    mesh: dict[str, int]
    workload: Workload
    stages: tuple[Stage, ...]
    tokens: int
    assumed: Assumptions

    @property
    def memory(self) -> int:
        """Bytes a device, of the stage that needs most."""
        return max(stage.compiled.memory.total for stage in self.stages)

    @property
    def head_room(self) -> int:
        return self.machine.usable_memory - self.memory

    @property
    def fits(self) -> bool:
        return self.head_room >= 0

    @property
    def seconds(self) -> tuple[float, float]:
        """Of one run of all stages: with collectives beside everything else, and with everything waiting for them."""
        return sum(stage.time.fastest for stage in self.stages), sum(stage.time.slowest for stage in self.stages)

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Of the whole machine, lower end first."""
        fast, slow = self.seconds
        return self.tokens / slow, self.tokens / fast

    def cost_per_million(self, price: float) -> tuple[float, float]:
        """Of a million tokens at a price of a device and hour, lower end first."""
        slow, fast = self.tokens_per_second
        hourly = price * self.machine.count
        return hourly / fast / 3600 * 1e6, hourly / slow / 3600 * 1e6

    def record(self, price: float | None = None) -> dict[str, Any]:
        """As JSON holds it."""
        chip = self.machine.chip
        return {
            "hardware": str(self.machine),
            "hosts": self.machine.hosts,
            "mesh": self.mesh,
            "workload": self.workload,
            "fits": self.fits,
            "memory_bytes": self.memory,
            "usable_memory_bytes": self.machine.usable_memory,
            "head_room_bytes": self.head_room,
            "stages": [
                {
                    "name": stage.name,
                    "memory": stage.compiled.memory,
                    "flops": stage.compiled.flops,
                    "traffic_bytes": stage.compiled.work.traffic,
                    "collectives": stage.collectives(chip.per_host),
                    "open_loops": stage.compiled.work.open_loops,
                    "compile_seconds": stage.compiled.seconds,
                    "time": stage.time,
                }
                for stage in self.stages
            ],
            "assumptions": self.assumed,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "price_per_device_hour": price,
            "cost_per_million_tokens": None if price is None else self.cost_per_million(price),
        }


@dataclasses.dataclass(frozen=True)
class Failure:
    """A workload that cannot be run on a mesh, and why."""

    machine: Hardware
    mesh: str | dict[str, int]
    workload: Workload
    reason: str

    def record(self, price: float | None = None) -> dict[str, Any]:
        del price
        return {
            "hardware": str(self.machine),
            "mesh": self.mesh,
            "workload": self.workload,
            "fits": False,
            "reason": self.reason,
        }


def make_plan(config: ModelConfig, work: Workload, machine: Hardware, mesh: str | dict, assumed: Assumptions) -> Plan:
    """Compiles a workload for a machine.

    Raises:
        ValueError: the mesh does not hold the machine's devices, or does not divide the model or the rows; the model
            cannot do the job.
        ModuleNotFoundError: the compiler is not installed.
        DoesNotFit: a TPU's compiler says so. On a GPU `Plan.fits` does.
    """
    spread = make_mesh(mesh, machines.devices(machine))
    stages, tokens = [], 0
    for part in programs(config, work, spread):
        compiled = compile_for(part.function, part.arguments, machine, spread, part.loop)
        stages.append(Stage(part.name, compiled, estimate(compiled.flops, compiled.work, machine, assumed)))
        tokens += part.tokens
    return Plan(machine, dict(spread.shape), work, tuple(stages), tokens, assumed)


def search(
    config: ModelConfig, work: Workload, machine: Hardware, mesh: str | None, assumed: Assumptions, doublings: int = 3
) -> Iterator[Plan | Failure]:
    """Every mesh of a machine's devices (or one), with a batch that is doubled until it no longer fits.

    `tensor` stays within a host, whose links it needs. At most `doublings` times.
    """
    for sizes in meshes(machine) if mesh is None else [mesh]:
        for doubled in range(doublings + 1):
            trial = dataclasses.replace(work, batch=work.batch * 2**doubled)
            try:
                found: Plan | Failure = make_plan(config, trial, machine, sizes, assumed)
            except (ValueError, DoesNotFit) as error:
                found = Failure(machine, sizes, trial, str(error))
            yield found
            if isinstance(found, Failure) or not found.fits:
                break


def meshes(machine: Hardware) -> list[dict[str, int]]:
    """All ways to arrange a machine's devices, `tensor` within a host."""
    count = machine.count
    divisors = [size for size in range(1, count + 1) if count % size == 0]
    return [
        {"data": count // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
        for tensor, fsdp in itertools.product(divisors, divisors)
        if count % (fsdp * tensor) == 0 and tensor <= machine.chip.per_host
    ]


def ranked(found: list[Plan | Failure]) -> list[Plan]:
    """Those that fit, most tokens a second first, counted with everything waiting for collectives."""
    fitting = [plan for plan in found if isinstance(plan, Plan) and plan.fits]
    return sorted(fitting, key=lambda plan: -plan.tokens_per_second[0])
