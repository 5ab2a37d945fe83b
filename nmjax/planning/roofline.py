"""How long a program should take: its operations, its memory traffic and its collectives against what a machine does.

A kernel waits for the slower of arithmetic and memory, so these two overlap. Collectives may run beside kernels or not:
the estimate is a range, from everything overlapping to nothing doing so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from nmjax.planning.hardware import Hardware
from nmjax.planning.program import Collective, Work


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What share of its peak a machine reaches.

    Attributes:
        matmul: of the peak of matrix products.
        bandwidth: of the memory's.
        link: of what devices send each other.
        latency: seconds that a collective takes however small it is.
    """

    matmul: float = 0.5
    bandwidth: float = 0.8
    link: float = 0.8
    latency: float = 1e-5

    def __post_init__(self):
        for name in ("matmul", "bandwidth", "link"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share above 0 and at most 1, got {getattr(self, name)}")
        if self.latency < 0:
            raise ValueError(f"latency must be 0 or more seconds, got {self.latency}")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one run of a program on one device."""

    compute: float
    memory: float
    communication: float

    @property
    def fastest(self) -> float:
        """Collectives run beside everything else."""
        return max(self.compute, self.memory, self.communication)

    @property
    def slowest(self) -> float:
        """Everything waits for collectives."""
        return max(self.compute, self.memory) + self.communication

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("compute", "memory", "communication"), key=lambda name: getattr(self, name))


def estimate(flops: Mapping[str, float], work: Work, hardware: Hardware, assumed: Assumptions) -> Estimate:
    """The time of a program.

    Args:
        flops: operations of all devices together, by dtype; each is taken to do its share.
        work: what one device moves.
    """
    chip = hardware.chip
    peaks = {"float32": chip.flops_float32, "float64": chip.flops_float32}
    compute = sum(count / peaks.get(dtype, chip.flops) for dtype, count in flops.items())
    return Estimate(
        compute=compute / hardware.count / assumed.matmul,
        memory=work.traffic / chip.bandwidth / assumed.bandwidth,
        communication=sum(seconds(one, hardware, assumed) for one in work.collectives),
    )


def seconds(one: Collective, hardware: Hardware, assumed: Assumptions) -> float:
    """The time of all runs of a collective.

    A ring that leaves a host goes through the network cards of all its members there, which share what crosses.
    """
    chip = hardware.chip
    if len(one.members) < 2:
        return 0.0
    hosts = {member // chip.per_host for member in one.members}
    speed = chip.link
    if len(hosts) > 1:
        speed = min(chip.link, chip.network * len(one.members) / len(hosts))
    return one.times * (assumed.latency + one.sent / speed / assumed.link)
