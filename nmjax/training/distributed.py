"""Several processes as one program, and a plain error where they do not come together.

A start that hangs ends, after `start_timeout` seconds, in a message that says who was expected and what to check.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from jax._src.distributed import global_state
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from nmjax.report.tables import Table
from nmjax.training.launch import Launch, detect
from nmjax.training.sharding import make_mesh


def start(mesh: str = "", launch: Launch | None = None) -> Mesh | None:
    """`initialize`, then the mesh that a flag asks for (see `make_mesh`); None for "" and a process that is alone."""
    initialize(launch)
    return make_mesh(mesh) if mesh or jax.process_count() > 1 else None


def initialize(launch: Launch | None = None) -> None:
    """Joins the processes into one program, if there are several; process 0 prints a table of them on stderr.

    Ends the process with status 1 and a message on stderr if that takes longer than `launch.start_timeout` seconds.

    Raises:
        ValueError: as `detect` does.
        RuntimeError: if JAX has been used before, processes see different numbers of devices, or the first all-reduce
            over all of them fails.
    """
    told, source = detect(launch or Launch())
    if not source:
        if told.local_device_ids is not None:
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, told.local_device_ids)))
        return
    with _Deadline(told, source) as deadline:
        deadline.stage = "waiting for all processes to call in"
        jax.distributed.initialize(
            told.coordinator,
            told.num_processes,
            told.process_id,
            told.local_device_ids,  # type: ignore[arg-type]
            cluster_detection_method="deactivate",
            initialization_timeout=int(2 * told.start_timeout) + 60,  # ours is first, and JAX's aborts with a core dump
        )
        deadline.hosts = hosts = _exchange(socket.gethostname())
        deadline.stage = "setting up the devices"
        devices = jax.devices()
        if told.process_id == 0:
            print(start_table(hosts, devices), file=sys.stderr, flush=True)
        counts = Counter(device.process_index for device in devices)
        if len(set(counts.values())) > 1:
            raise RuntimeError(f"processes must have equally many devices, got {dict(counts)} (process: devices)")
        deadline.stage = "in the first all-reduce"
        multihost_utils.sync_global_devices("nmjax start")


def _exchange(text: str) -> list[str]:
    """What each process says, by process; goes through the coordinator and needs no device."""
    client: Any = global_state.client
    client.key_value_set(f"nmjax/start/{global_state.process_id}", text)
    names = [f"nmjax/start/{process}" for process in range(global_state.num_processes)]
    return [client.blocking_key_value_get(name, 24 * 3600 * 1000) for name in names]


def start_table(hosts: Sequence[str], devices: Sequence[jax.Device]) -> str:
    """A line a process: its host, its platform, how many devices it has, and their numbers on the host and in all."""

    def line(process: int, host: str) -> list[str]:
        own = [device for device in devices if device.process_index == process]
        kinds = ", ".join(sorted({f"{device.platform} ({device.device_kind})" for device in own}))
        local = [str(d.local_hardware_id) for d in own if d.local_hardware_id is not None]  # a CPU's is known at home
        return [str(process), host, kinds, str(len(own)), " ".join(local), " ".join(str(d.id) for d in own)]

    headers = ["process", "host", "platform", "devices", "on its host", "in all"]
    return Table(headers, [line(*pair) for pair in enumerate(hosts)]).text()


# What may be wrong where a start hangs.
_HINTS = {
    "waiting for all processes to call in": "every process was started, with its own process_id, and none has failed "
    "(see their own logs); {coordinator} is process 0's host under a name that the others can reach (not localhost or "
    "127.x.x.x if there are several hosts), and a firewall or a *_proxy variable does not keep them from it",
    "setting up the devices": "no other program holds the GPUs (nvidia-smi), and all processes run the same software",
    "in the first all-reduce": "no two processes use the same GPU (--local_device_ids gives each its own), and the "
    "hosts reach each other on the network that NCCL takes (NCCL_DEBUG=INFO shows it, NCCL_SOCKET_IFNAME chooses it)",
}


class _Deadline:
    """Ends the process if its block takes longer than `start_timeout`; `stage`, a key of `_HINTS`, is where it is.

    A thread does it, because what hangs is C++ code that no exception reaches.
    """

    def __init__(self, told: Launch, source: str):
        self.told, self.source, self.stage = told, source, ""
        nodes = os.environ.get("SLURM_STEP_NODELIST")
        self.hosts = [nodes] if source == "slurm" and nodes else []
        self.timer = threading.Timer(told.start_timeout, self.give_up)
        self.timer.daemon = True

    def __enter__(self) -> _Deadline:
        self.timer.start()
        return self

    def __exit__(self, *_):
        self.timer.cancel()

    def give_up(self) -> None:
        told, where = self.told, f" on {', '.join(self.hosts)}" if self.hosts else ""
        print(
            f"FATAL: the start hangs. Process {told.process_id} on {socket.gethostname()} has been {self.stage} until "
            f"{told.start_timeout:g} s after its start.\n"
            f"Expected: {told.num_processes} processes{where}, as {self.source} said, which meet at "
            f"{told.coordinator}.\n"
            f"Check that {_HINTS[self.stage].format(coordinator=told.coordinator)}.\n"
            "If processes only start slowly, raise --start_timeout.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
