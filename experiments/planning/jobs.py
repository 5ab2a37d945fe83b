"""The programs of each job, with arguments that have shapes, dtypes and places and no values.

They are those that users run: `train`'s step, `generate`'s prefill and decode, `forward`'s pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.lookahead.arms import confidence_arm
from experiments.lookahead.config import ConfidenceExperimentConfig
from models.config import LlamaConfig
from models.families import ModelConfig, build
from models.llama import ScannedLlama
from models.minigpt_config import MiniGPTConfig
from nmjax import forward_pass, generation
from nmjax.rows import Rows, bucket
from nmjax.sampling import Sampling
from nmjax.training import lora
from nmjax.training.introspection import introspection_loss
from nmjax.training.loop import TrainConfig, init_state, make_optimizer, make_step, on_mesh
from nmjax.training.sharding import rows_sharding, shardings


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is run.

    Attributes:
        job: one of `JOBS`.
        batch: rows B over all devices.
        seq: tokens T of a row; of its prompt where it is continued.
        new_tokens: that each row is continued with.
        dtype: of the model's parameters, but that what is trained is float32.
        rank: of the LoRA adapter.
        targets: the projections that it adapts.
        accumulate: micro-batches of a step.
    """

    job: str
    batch: int = 32
    seq: int = 96
    new_tokens: int = 128
    dtype: str = "bfloat16"
    rank: int = 16
    targets: tuple[str, ...] = ("q", "k", "v", "o")
    accumulate: int = 1

    def __post_init__(self):
        if self.job not in JOBS:
            raise ValueError(f"job={self.job!r}, wanted one of {', '.join(JOBS)}")
        for name in ("batch", "seq", "new_tokens", "rank", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate must divide batch={self.batch}, got {self.accumulate}")
        if self.job == "lora" and self.seq < 2:
            raise ValueError(f"seq must be 2 or more with job=lora, a conversation and a question, got {self.seq}")


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled call.

    Attributes:
        function: jitted.
        arguments: of `function`; arrays are `jax.ShapeDtypeStruct` with their shardings.
        tokens: how many it reads or writes that a user counts.
        loop: how often its outermost loop runs, where the program does not say.
    """

    name: str
    function: Callable
    arguments: tuple
    tokens: int
    loop: int | None = None


def programs(config: ModelConfig, work: Workload, mesh: Mesh) -> list[Program]:
    """What a job runs on a mesh, in its order.

    Raises:
        ValueError: the model cannot do this job, its context is too short, or the mesh does not divide a parameter or
            the rows.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if work.batch % (devices * work.accumulate):
        wanted = f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}"
        wanted += f" x accumulate={work.accumulate}" if work.accumulate > 1 else ""
        raise ValueError(f"batch must be a multiple of {wanted}, got {work.batch}")
    return JOBS[work.job](config, work, mesh)


def lora_step(config: ModelConfig, work: Workload, mesh: Mesh) -> list[Program]:
    """A training step of an adapter on introspection records: a conversation without gradient, and a question that
    attends to it, whose answer is read at its end; base frozen, layers scanned and run again in the backward pass."""
    if not isinstance(config, LlamaConfig):
        raise ValueError(f"job=lora wants a Llama or Qwen model, got {config.family}")
    _check_context(config, work.seq)
    module = ScannedLlama(config)
    params = _parameters(module, work.dtype)
    settings = lora.LoraConfig(r=work.rank, targets=work.targets)
    adapter = jax.eval_shape(lambda key: lora.init(module, settings, key), jax.random.key(0))
    batch = jax.eval_shape(lambda: _introspection_batch(config, work))
    loss = introspection_loss(module)
    return [_training_step(loss, adapter.weights, lora.frozen(params, adapter), batch, work, mesh)]


def _introspection_batch(config: LlamaConfig, work: Workload) -> dict[str, jax.Array]:
    """What `Examples.batch` makes where two answers are single tokens. The question has 5 of 11 tokens, 40 of 88."""
    B, Q, C = work.batch, max(1, work.seq * 5 // 11), 2
    P = work.seq - Q
    per_row = jnp.zeros(B, jnp.int32)
    return {
        "prefix": jnp.zeros((B, P), jnp.int32),
        "prefix_mask": jnp.ones((B, P), bool),
        "rows": jnp.zeros((B, 1, Q), jnp.int32),
        "rows_mask": jnp.ones((B, 1, Q), bool),
        "answers": jnp.zeros((B, C, 1), jnp.int32),
        "answers_mask": jnp.ones((B, C, 1), bool),
        "target": per_row,
        "index": per_row,
        "vectors": jnp.zeros((B, 1, config.embed), jnp.float32),
        "coefficients": jnp.zeros((B, config.layers), jnp.float32),
        "start": per_row,
        "end": per_row,
    }


def two_pass_step(config: ModelConfig, work: Workload, mesh: Mesh) -> list[Program]:
    """A training step of ConfidenceAwareGPT on both losses at every position, one pass for what it is told."""
    if not isinstance(config, MiniGPTConfig):
        raise ValueError(f"job=two_pass wants a GPT-2 or ConfidenceAwareGPT model, got {config.family}")
    recipe = ConfidenceExperimentConfig(
        embed_dim=config.embed,
        num_layers=config.layers,
        num_heads=config.heads,
        max_seq_len=work.seq,
        batch_size=work.batch,
        accumulate=work.accumulate,
        dropout=config.dropout,
    )
    arm = confidence_arm(recipe, config.vocab, None)
    params = _parameters(arm.module, "float32")
    batch = {"tokens": jax.ShapeDtypeStruct((work.batch, work.seq + 2), jnp.int32)}
    return [_training_step(arm.loss, params, None, batch, work, mesh)]


def forward_pass_of_all(config: ModelConfig, work: Workload, mesh: Mesh) -> list[Program]:
    """`forward`: logits at every position of whole rows."""
    _check_context(config, work.seq)
    module = build(config)
    variables = _placed({"params": _parameters(module, work.dtype)}, mesh)
    rows = _rows(work.batch, work.seq, mesh)
    arguments = (module, (), work.batch, variables, rows)
    return [Program("forward", forward_pass._forward, arguments, work.batch * work.seq)]


def generate(config: ModelConfig, work: Workload, mesh: Mesh) -> list[Program]:
    """`generate`: the prompts, and then one token after the other in a loop on the device, greedily."""
    _check_context(config, work.seq + work.new_tokens)
    module = build(config)
    variables = _placed({"params": _parameters(module, work.dtype)}, mesh)
    rows, room = _rows(work.batch, bucket(work.seq), mesh), bucket(work.new_tokens)

    def per_row(dtype):
        return jax.ShapeDtypeStruct((work.batch,), dtype, sharding=rows_sharding(mesh))

    sampling = Sampling(per_row(jnp.float32), per_row(jnp.float32), per_row(jnp.int32))
    eos: Any = jax.ShapeDtypeStruct((max(1, len(config.eos_ids)),), jnp.int32, sharding=_whole(mesh))
    limits = generation.Limits(per_row(jnp.int32), per_row(jnp.int32), eos)
    start = (module, room, variables, rows, sampling, limits)
    state = jax.eval_shape(lambda *arguments: generation.prefill(module, room, *arguments), *start[2:])
    until = jax.ShapeDtypeStruct((), jnp.int32, sharding=_whole(mesh))
    steps = work.new_tokens - 1  # the first is the prefill's
    going_on = (module, variables, rows, sampling, limits, until, _placed_rows(state, work.batch, config, mesh))
    return [
        Program("prefill", generation.prefill, start, work.batch),
        Program("decode", generation.decode, going_on, work.batch * steps, loop=steps),
    ]


JOBS: dict[str, Callable[[ModelConfig, Workload, Mesh], list[Program]]] = {
    "lora": lora_step,
    "two_pass": two_pass_step,
    "generate": generate,
    "forward": forward_pass_of_all,
}


def _training_step(loss, params, frozen, batch, work: Workload, mesh: Mesh) -> Program:
    optimizer = make_optimizer(TrainConfig(steps=1000))
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    step = on_mesh(
        make_step(loss, optimizer, accumulate=work.accumulate), mesh, shardings(state, mesh), shardings(frozen, mesh)
    )
    return Program("step", step, (state, batch, frozen), work.batch * work.seq)


def _check_context(config: ModelConfig, tokens: int) -> None:
    if tokens > config.max_positions:
        raise ValueError(f"seq: rows of {tokens} tokens exceed the model's context of {config.max_positions}")


def _parameters(module, dtype: str) -> dict[str, Any]:
    shapes = jax.eval_shape(lambda key: module.init(key, jnp.zeros((1, 2), jnp.int32))["params"], jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes)


def _placed(tree, mesh: Mesh):
    """Shapes with the places that the rules of `nmjax.training.sharding` give them."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings(tree, mesh)
    )


def _rows(batch: int, width: int, mesh: Mesh) -> Rows:
    def of(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding(mesh))

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    return Rows(
        tokens=of((batch, width), jnp.int32),
        mask=of((batch, width), jnp.bool_),
        prompt_len=of((batch,), jnp.int32),
        effects=(),
        keys=of(keys.shape, keys.dtype),
    )


def _placed_rows(state, batch: int, config: ModelConfig, mesh: Mesh):
    """A decoding state, spread by rows, and its cache [B, K, S, H] by heads as well where the mesh divides them."""
    by_heads = config.kv_heads % mesh.shape["tensor"] == 0

    def place(leaf):
        if leaf.ndim == 4 and leaf.shape[1] == config.kv_heads and by_heads:
            sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor"))
        else:
            sharding = rows_sharding(mesh) if leaf.ndim and leaf.shape[0] == batch else _whole(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, state)


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
