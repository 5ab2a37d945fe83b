"""Says what a job needs on a machine that is not here: memory a device, operations, traffic, time, money.

Method. The program that a user would run is compiled for the machine's devices on this CPU, by the compilers of its
vendor, and never run. What the compiler reserves is the memory; operations are counted in the program; what kernels and
collectives move is read from what was compiled. The time is a roofline, a range with its assumptions, no measurement.

    python -m experiments.plan --model_config=config.json --hardware=a100-80g:4 --mesh=fsdp=4 --batch=32 --job=lora
    python -m experiments.plan --model_config=checkpoints/tiny --hardware=v6e:8 --job=generate --search

Wants the extra `plan-cuda` or `plan-tpu`: pip install 'nmjax[plan-cuda]'.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import flags
from tqdm import tqdm

from experiments.planning.jobs import JOBS, Workload
from experiments.planning.plans import Failure, Plan, make_plan, search
from experiments.planning.report import describe, ranking
from models import checkpoint, files
from models.families import ModelConfig, read_config
from nmjax import flags as nm_flags
from nmjax.planning import hardware
from nmjax.planning.ahead_of_time import DoesNotFit
from nmjax.planning.roofline import Assumptions
from nmjax.report import results

NAME = "plan"


def define_flags() -> None:
    w, a = Workload("lora"), Assumptions()
    flags.DEFINE_string("model_config", None, "A config.json, or a checkpoint's folder or hub id.", required=True)
    flags.DEFINE_string("hardware", None, f"Such as a100-80g:4; chips: {', '.join(hardware.CHIPS)}.", required=True)
    flags.DEFINE_string("mesh", None, "Such as data=2,fsdp=4; default: fsdp over all devices.")
    flags.DEFINE_enum("job", w.job, list(JOBS), "What is run.")
    flags.DEFINE_integer("batch", w.batch, "Rows over all devices.")
    flags.DEFINE_integer("seq", w.seq, "Tokens of a row; of its prompt with --job=generate.")
    flags.DEFINE_integer("new_tokens", w.new_tokens, "With --job=generate, tokens that a row is continued with.")
    flags.DEFINE_enum("dtype", w.dtype, list(checkpoint.DTYPES), "Of the model's parameters.")
    flags.DEFINE_integer("lora_r", w.rank, "Rank of the adapter.")
    flags.DEFINE_list("lora_targets", list(w.targets), "Projections that it adapts.")
    flags.DEFINE_integer("accumulate", w.accumulate, "Micro-batches of a training step.")
    flags.DEFINE_float("price", None, "Of one device, in your currency an hour.", lower_bound=0.0)
    flags.DEFINE_float("matmul_share", a.matmul, "Share of their peak that matrix products reach.")
    flags.DEFINE_float("bandwidth_share", a.bandwidth, "Share of the memory's bandwidth that kernels reach.")
    flags.DEFINE_float("link_share", a.link, "Share of the links' speed that collectives reach.")
    flags.DEFINE_bool("search", False, "Tries meshes, and batches from --batch on in powers of two, and ranks them.")
    flags.DEFINE_string("output", None, "Also writes the plan, or the plans, to this JSON file.")


def read_model(name: str) -> ModelConfig:
    """The sizes of a model. Raises ValueError where there are none, or they describe a model that we don't have."""
    path = pathlib.Path(name).expanduser()
    file = path if path.is_file() else files.find(name) / "config.json"
    return read_config(files.read_json(file))


def run() -> list[Plan | Failure]:
    """Plans what the flags say; prints the plan or the ranking."""
    values = flags.FLAGS
    work = Workload(
        job=values.job,
        batch=values.batch,
        seq=values.seq,
        new_tokens=values.new_tokens,
        dtype=values.dtype,
        rank=values.lora_r,
        targets=tuple(values.lora_targets),
        accumulate=values.accumulate,
    )
    assumed = Assumptions(values.matmul_share, values.bandwidth_share, values.link_share)
    config, machine = read_model(values.model_config), hardware.parse(values.hardware)
    found: list[Plan | Failure] = []
    if values.search:
        found += tqdm(search(config, work, machine, values.mesh, assumed), desc=f"Plans for {machine}", unit="plan")
        print(ranking(found, values.price))
    else:
        plan = make_plan(config, work, machine, values.mesh or "fsdp=-1", assumed)
        found.append(plan)
        print(describe(plan, values.price))
    if values.output:
        content = {"plans": [one.record(values.price) for one in found], "versions": results.versions()}
        print(f"Written: {results.write_json(values.output, content)}")
    return found


def main(_: Sequence[str]) -> None:
    # The devices to compile for need not exist, and nothing runs but on the CPU; compiled programs can't be kept.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        found = run()
    except (ValueError, OSError, ModuleNotFoundError, DoesNotFit) as error:
        sys.exit(f"{NAME}: {error}")
    if not any(isinstance(plan, Plan) and plan.fits for plan in found):
        sys.exit(f"{NAME}: does not fit")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
