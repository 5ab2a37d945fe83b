"""Launching: what a process finds out about itself from flags, environment and launchers, and starts that hang."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags

from nmjax import flags as nm_flags
from nmjax.training import launch
from nmjax.training.distributed import start, start_table
from nmjax.training.launch import Launch, detect

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """No launcher of the machine that runs the tests shows through."""
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "PMI", "MPI_", "JAX_COORD", "JAX_LOCAL", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)


@pytest.fixture
def environment(monkeypatch):
    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


SLURM = {
    "SLURM_JOB_ID": "5000", "SLURM_STEP_NODELIST": "node[007-008]", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
}  # fmt: skip
ONE_A_NODE = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
# As Open MPI 4.1, Open MPI 5.0 and MPICH 5.0 set them (for the second of four processes on two hosts).
OPEN_MPI_4 = {
    "OMPI_MCA_orte_hnp_uri": "370999296.0;tcp://192.0.2.2:52949;tcp6://[fd00::2]:51195", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
OPEN_MPI_5 = {name: value for name, value in OPEN_MPI_4.items() if "WORLD" in name}
OPEN_MPI_5 |= {"PMIX_NAMESPACE": "prterun-node-a-25846@1"}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def test_alone(environment):
    assert detect() == (Launch(), "")
    environment(**SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert detect() == (Launch(), "")  # all GPUs are its own
    environment(**SLURM)
    assert detect(Launch(num_processes=1)) == (Launch(num_processes=1), "")
    assert start("", Launch(num_processes=1)) is None
    assert start("data=1", Launch(num_processes=1)).size == 1


def test_flags_come_before_the_environment(environment):
    environment(JAX_COORDINATOR_ADDRESS="there:1", JAX_NUM_PROCESSES="4", JAX_PROCESS_ID="3")
    environment(JAX_LOCAL_DEVICE_IDS="2,3")
    assert detect() == (Launch("there:1", 4, 3, (2, 3)), "flags or environment")
    here = Launch(process_id=0, local_device_ids=["0"], start_timeout=7.0)
    assert detect(here) == (Launch("there:1", 4, 0, (0,), 7.0), "flags or environment")


@pytest.mark.parametrize(
    "variables, wanted, source",
    [
        (SLURM, Launch("node007:62344", 8, 5, (1,)), "slurm"),
        (SLURM | ONE_A_NODE, Launch("node007:62344", 2, 1), "slurm"),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, Launch("node007:62344", 8, 5), "slurm"),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Launch("node007:62344", 8, 5, (1,)), "slurm"),
        (OPEN_MPI_4, Launch("192.0.2.2:61904", 4, 1, (1,)), "ompi"),
        (OPEN_MPI_5, Launch("node-a:62710", 4, 1, (1,)), "mpirun"),
        (SLURM | OPEN_MPI_5, Launch("node-a:62710", 4, 1, (1,)), "mpirun"),
        (OPEN_MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, Launch("127.0.0.1:62710", 4, 1, (1,)), "mpirun"),
        (OPEN_MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Launch("node-a:62710", 4, 1), "mpirun"),
        (MPICH | {"JAX_COORDINATOR_ADDRESS": "node1:7"}, Launch("node1:7", 4, 1, (1,)), "mpirun"),
    ],
    ids=[
        "slurm", "slurm, one a node", "slurm, bound GPU", "slurm, all GPUs seen", "open mpi 4", "open mpi 5",
        "open mpi 5 in a slurm job", "open mpi 5, one host", "open mpi 5, one a node", "mpich",
    ],
)  # fmt: skip
def test_launchers_are_detected(environment, variables, wanted, source):
    """Ports: JAX's rule, 61440 plus the job's number modulo 4096; for Open MPI 4 that of the universe in its URI."""
    environment(**variables)
    assert detect() == (wanted, source)


def test_flags_come_before_launchers(environment):
    environment(**SLURM, JAX_COORDINATOR_PORT="99")
    assert detect()[0].coordinator == "node007:99"
    assert detect(Launch(local_device_ids=[3])) == (Launch("node007:99", 8, 5, (3,)), "slurm")
    assert detect(Launch("other:1", process_id=7)) == (Launch("other:1", 8, 7, (1,)), "slurm")
    assert detect(Launch("other:1", 16, 15)) == (Launch("other:1", 16, 15, (1,)), "flags or environment")


def test_mpich_on_one_host_meets_there(environment):
    environment(**MPICH | {"MPI_LOCALNRANKS": "4"})
    assert detect()[0].coordinator == f"127.0.0.1:{61440 + os.getppid() % 4096}"


@pytest.mark.parametrize(
    "told, message",
    [
        ({"coordinator": "host"}, "coordinator must be HOST:PORT, got 'host'"),
        ({"num_processes": 0}, "num_processes must be 1 or more, got 0"),
        ({"num_processes": 2, "process_id": 2}, "process_id must be 0 to num_processes - 1, got 2"),
        ({"local_device_ids": ["0", "gpu"]}, "local_device_ids must be numbers such as 0,1, got"),
        ({"start_timeout": 0.0}, "start_timeout must be above 0 seconds, got 0"),
        ({"coordinator": "host:1"}, "num_processes, process_id must be given .* beside coordinator=host:1"),
        ({"num_processes": 2, "process_id": 1}, "coordinator must be given .* beside num_processes=2, process_id=1"),
    ],
)
def test_wrong_or_incomplete_flags_are_named(told, message):
    with pytest.raises(ValueError, match=message):
        detect(Launch(**told))


def test_wrong_or_incomplete_environments_are_named(environment):
    environment(JAX_NUM_PROCESSES="two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES must be a number, got 'two'"):
        detect()
    environment(JAX_NUM_PROCESSES="4", **MPICH)
    with pytest.raises(ValueError, match="coordinator must be given, as HOST:PORT of process 0: mpirun does not say"):
        detect()


def test_flags_fill_a_launch(monkeypatch):
    values = flags.FlagValues()
    for name in ("string", "integer", "list", "float"):
        define = getattr(flags, f"DEFINE_{name}")
        monkeypatch.setattr(launch.flags, f"DEFINE_{name}", lambda *a, f=define, **k: f(*a, flag_values=values, **k))
    launch.define_flags()
    line = "prog --mesh=data=2,fsdp=4 --coordinator h:1 --num_processes=2 --process-id=1 --local_device_ids 4 5"
    values(nm_flags.normalize(line.split(), values))
    monkeypatch.setattr(nm_flags.flags, "FLAGS", values)
    assert nm_flags.filled(Launch) == Launch("h:1", 2, 1, (4, 5), 50.0)
    assert values.mesh == "data=2,fsdp=4"


def test_the_table_of_a_start():
    def device(process, number, local, platform="gpu", kind="H100"):
        return SimpleNamespace(
            process_index=process, id=number, local_hardware_id=local, platform=platform, device_kind=kind
        )

    devices = [device(0, 0, 0), device(0, 1, 1), device(1, 2, 2), device(1, 3, 3), device(2, 4, None, "cpu", "cpu")]
    lines = start_table(["alpha", "alpha", "beta"], devices).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["0", "alpha", "gpu", "(H100)", "2", "0", "1", "0", "1"],
        ["1", "alpha", "gpu", "(H100)", "2", "2", "3", "2", "3"],
        ["2", "beta", "cpu", "(cpu)", "1", "4"],
    ]


def begin(*told, **environment):
    program = f"from nmjax.training.distributed import *; initialize(Launch(*{told}))"
    child = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    return subprocess.Popen([sys.executable, "-c", program], env=child, stderr=subprocess.PIPE, text=True)


def test_a_start_that_hangs_becomes_an_error_that_says_who_was_expected():
    """Process 0 waits for a peer, and process 1 of another program, told by SLURM, for its coordinator."""
    began = time.monotonic()
    slurm = SLURM | ONE_A_NODE | {"SLURM_STEP_NODELIST": "localhost,node2"}
    children = [begin("localhost:61001", 2, 0, None, 1.5), begin(None, None, None, None, 1.5, **slurm)]
    first, second = (child.communicate(timeout=60)[1] for child in children)
    assert [child.returncode for child in children] == [1, 1] and time.monotonic() - began < 30
    for wanted in (
        "FATAL: the start hangs. Process 0 on ",
        " has been waiting for all processes to call in until 1.5 s after its start.",
        "Expected: 2 processes, as flags or environment said, which meet at localhost:61001.",
        "Check that every process was started",
    ):
        assert wanted in first
    assert "Process 1 on " in second
    assert "2 processes on localhost,node2, as slurm said, which meet at localhost:62344" in second
    assert "Traceback" not in first + second


@pytest.mark.slow
def test_processes_with_different_numbers_of_devices_are_an_error():
    counts = ["--xla_force_host_platform_device_count=1", "--xla_force_host_platform_device_count=2"]
    children = [begin("localhost:61002", 2, i, None, 30.0, XLA_FLAGS=counts[i]) for i in range(2)]
    for child in children:
        message = child.communicate(timeout=60)[1]
        assert child.returncode != 0 and "equally many devices, got {0: 1, 1: 2} (process: devices)" in message
