"""What a process is told of itself where there are several: by flags, else the environment, else its launcher."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Sequence

from absl import flags

# JAX's own detection of launchers: `jax.distributed.initialize` runs it, too, but does not say what it found, and gives
# a process one GPU even where the launcher started one process a host.
from jax._src.clusters import ClusterEnv, GceTpuCluster, GkeTpuCluster, OmpiCluster, SlurmCluster


@dataclasses.dataclass(frozen=True)
class Launch:
    """What this process is told of itself; None is not told.

    Attributes:
        coordinator: HOST:PORT at which process 0 listens.
        num_processes, process_id: how many processes there are, and which of them this is, from 0.
        local_device_ids: which GPUs of its host are this process's; None is all that it sees.
        start_timeout: seconds until a start that hangs is given up.

    Raises:
        ValueError: for anything else.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: Sequence[int | str] | None = None
    start_timeout: float = 50.0

    def __post_init__(self):
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(f"coordinator must be HOST:PORT, got {self.coordinator!r}")
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes must be 1 or more, got {self.num_processes}")
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or sys.maxsize):
            raise ValueError(f"process_id must be 0 to num_processes - 1, got {self.process_id}")
        if self.local_device_ids is not None:
            if not all(str(device).strip().isdecimal() for device in self.local_device_ids):
                raise ValueError(f"local_device_ids must be numbers such as 0,1, got {self.local_device_ids}")
            object.__setattr__(self, "local_device_ids", tuple(map(int, self.local_device_ids)))
        if not self.start_timeout > 0:
            raise ValueError(f"start_timeout must be above 0 seconds, got {self.start_timeout}")


def define_flags() -> None:
    """Flags of `Launch`, for `nmjax.flags.filled(Launch)`, and `--mesh`."""
    default = Launch()
    flags.DEFINE_string("mesh", "", "Devices to spread training over, such as data=2,fsdp=4 (axes data, fsdp, tensor).")
    flags.DEFINE_string("coordinator", None, "HOST:PORT at which process 0 listens; default: as the launcher says.")
    flags.DEFINE_integer("num_processes", None, "Processes in all; default: as the launcher says.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is; default: as the launcher says.", lower_bound=0)
    flags.DEFINE_list("local_device_ids", None, "GPUs of this host that this process takes; see docs/launching.md.")
    flags.DEFINE_float("start_timeout", default.start_timeout, "Seconds until a start that hangs is given up.")


class Mpirun(ClusterEnv):
    """Open MPI from version 5 on, and MPICH: JAX detects neither."""

    name = "mpirun"
    opt_in_only_method = True  # subclassing adds it to what JAX tries by itself, and that is not ours to change
    # processes, this one, this one on its host, processes on its host
    _VARIABLES = (
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    )

    @classmethod
    def _values(cls) -> list[int] | None:
        for names in cls._VARIABLES:
            if all(name in os.environ for name in names):
                return [int(os.environ[name]) for name in names]
        return None

    @classmethod
    def is_env_present(cls) -> bool:
        return cls._values() is not None

    @classmethod
    def get_coordinator_address(cls, timeout_secs: int | None, override_coordinator_port: str | None) -> str:
        count, *_, count_here = cls._values()  # type: ignore[misc]
        # Open MPI 5 names a run after the host and the process of mpirun: prterun-node001-25846@1.
        run = re.fullmatch(r"prte\w*-(.+)-(\d+)@\d+", os.environ.get("PMIX_NAMESPACE", ""))
        if count_here == count:
            host = "127.0.0.1"
        elif run:
            host = run[1]
        else:
            raise ValueError("coordinator must be given, as HOST:PORT of process 0: mpirun does not say where it runs")
        launcher = int(run[2]) if run else os.getppid()
        return f"{host}:{override_coordinator_port or _port(launcher)}"

    @classmethod
    def get_process_count(cls) -> int:
        return cls._values()[0]  # type: ignore[index]

    @classmethod
    def get_process_id(cls) -> int:
        return cls._values()[1]  # type: ignore[index]

    @classmethod
    def get_local_process_id(cls) -> int:
        return cls._values()[2]  # type: ignore[index]


def _port(number: int) -> int:
    """A port for a run with this number, among those that JAX takes for such, too."""
    return 65536 - 4096 + number % 4096


# The first that is there counts: mpirun starts its daemons through srun, so that their processes look like SLURM's.
_LAUNCHERS: tuple[type[ClusterEnv], ...] = (OmpiCluster, Mpirun, SlurmCluster, GkeTpuCluster, GceTpuCluster)


def detect(launch: Launch = Launch()) -> tuple[Launch, str]:
    """`launch` with what the environment and the launcher know filled in, and who told it; "" if this process is alone.

    The environment is `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID` and `JAX_LOCAL_DEVICE_IDS`.

    Raises:
        ValueError: if there are several processes and one of coordinator, num_processes and process_id is unknown, or
            if one of them is not what `Launch` wants.
    """
    told, source = _or(launch, _from_environment()), "flags or environment"
    if told.num_processes == 1:
        return told, ""
    cluster = next((cluster for cluster in _LAUNCHERS if cluster.is_env_present()), None)
    if cluster is not None and cluster.get_process_count() > 1:
        source = cluster.name if None in _identity(told).values() else source
        told = _or(told, _from_launcher(cluster, told))
    known = _identity(told)
    if all(value is None for value in known.values()):
        return told, ""
    missing = [name for name, value in known.items() if value is None]
    if missing:
        seen = ", ".join(f"{name}={value}" for name, value in known.items() if value is not None)
        raise ValueError(f"{', '.join(missing)} must be given (by a flag, the environment or a launcher) beside {seen}")
    return told, source


def _identity(told: Launch) -> dict[str, str | int | None]:
    return {name: getattr(told, name) for name in ("coordinator", "num_processes", "process_id")}


def _or(first: Launch, second: Launch) -> Launch:
    """What the first is not told, the second is."""
    return dataclasses.replace(first, **{k: v for k, v in vars(second).items() if getattr(first, k) is None})


def _from_environment() -> Launch:
    def number(name: str) -> int | None:
        text = os.environ.get(name)
        if text is not None and not text.isdecimal():
            raise ValueError(f"{name} must be a number, got {text!r}")
        return None if text is None else int(text)

    devices = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    return Launch(
        os.environ.get("JAX_COORDINATOR_ADDRESS"),
        number("JAX_NUM_PROCESSES"),
        number("JAX_PROCESS_ID"),
        devices.split(",") if devices else None,
    )


def _from_launcher(cluster: type[ClusterEnv], told: Launch) -> Launch:
    port = os.environ.get("JAX_COORDINATOR_PORT")
    rank = cluster.get_local_process_id()
    if cluster is SlurmCluster:
        alone_here = os.environ.get("SLURM_STEP_NUM_NODES") == os.environ["SLURM_NTASKS"]
    else:
        alone_here = "1" in (os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"), os.environ.get("MPI_LOCALNRANKS"))
    # A launcher that binds a GPU to each process lets it see that one only, and calls it 0.
    bound = re.fullmatch(r"[^,]+", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    return Launch(
        told.coordinator or cluster.get_coordinator_address(int(told.start_timeout), port),
        cluster.get_process_count(),
        cluster.get_process_id(),
        None if rank is None or alone_here or bound else [rank],
    )
