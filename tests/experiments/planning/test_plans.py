"""Programs of jobs against the functions they are made of, plans against hand numbers, and what a bad request says."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import plan as binary
from experiments.planning import plans, report
from experiments.planning.jobs import Workload, programs
from experiments.planning.plans import Failure, Plan, Stage, meshes, ranked
from models.config import LlamaConfig
from models.minigpt_config import MiniGPTConfig
from nmjax.planning import hardware
from nmjax.planning.ahead_of_time import Compiled, DoesNotFit, Memory
from nmjax.planning.hardware import parse
from nmjax.planning.operations import matmul_flops
from nmjax.planning.program import Collective, Work
from nmjax.planning.roofline import Assumptions, Estimate
from nmjax.training.sharding import make_mesh

QWEN = LlamaConfig.from_hf(dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=64, hidden_size=16, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=32, max_position_embeddings=64,
    rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, hidden_act="silu"))  # fmt: skip
GPT = MiniGPTConfig(vocab=61, embed=16, layers=2, heads=4, max_positions=32)
D, F, V, L, HEADS, KV = 16, 32, 64, 3, 32, 16  # HEADS and KV: widths of queries and of keys


def flops(program):
    with jax.set_mesh(make_mesh("data=1")):
        return matmul_flops(program.function.trace(*program.arguments).jaxpr, program.loop)


def products(tokens, layers=L):
    """Of the kernels of all layers."""
    return 2 * tokens * layers * (D * (HEADS + 2 * KV) + HEADS * D + 3 * D * F)


def attention(rows, queries, keys, layers=L):
    return 2 * 2 * rows * layers * queries * keys * HEADS


def norms(tokens, count):
    """A norm sums its squares by a product with ones, in float32."""
    return 2 * tokens * count * D


def test_forward_and_generate_multiply_what_their_models_do():
    B, T, mesh = 2, 16, make_mesh("data=1")
    (forward,) = programs(QWEN, Workload("forward", B, T), mesh)
    wanted = {"bfloat16": products(B * T) + attention(B, T, T) + 2 * B * T * D * V}
    assert flops(forward) == wanted | {"float32": norms(B * T, 2 * L + 1)}
    prefill, decode = programs(QWEN, Workload("generate", B, T, new_tokens=5), mesh)
    head = 2 * B * D * V
    room = 16  # new tokens have room for a multiple of 16
    assert flops(prefill)["bfloat16"] == products(B * T) + attention(B, T, T) + head
    assert flops(decode)["bfloat16"] == 4 * (products(B) + attention(B, 1, T + room) + head)
    assert (prefill.tokens, decode.tokens) == (B, 4 * B)


def test_a_lora_step_trains_the_adapter_alone():
    B, T, r = 4, 8, 2
    (step,) = programs(QWEN, Workload("lora", B, T, rank=r), make_mesh("data=1"))
    state, batch, frozen = step.arguments
    sizes = {"q": D + HEADS, "k": D + KV, "v": D + KV, "o": HEADS + D}
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == L * r * sum(sizes.values())
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen["params"])} == {jnp.dtype("bfloat16")}
    P, Q = 5, 3
    shapes = {name: batch[name].shape for name in ("prefix", "rows", "vectors", "coefficients", "answers", "target")}
    wanted = {"prefix": (B, P), "rows": (B, 1, Q), "vectors": (B, 1, D), "coefficients": (B, L)}
    assert shapes == wanted | {"answers": (B, 2, 1), "target": (B,)}
    # Kernels: forward; of the question forward again, and towards inputs; what `down` makes is not needed again.
    kernels = products(B * P) + 3 * products(B * Q) - 2 * B * Q * L * F * D
    head = 2 * 2 * B * D * V  # at the last position only
    low = 2 * B * L * r * sum(sizes.values())
    found = flops(step)
    # Attention: of the question forward twice, and towards what is its own of both factors of both products, those of
    # the scores in float32.
    assert found["bfloat16"] == kernels + head + attention(B, P, P) + 3 * attention(B, Q, P + Q)
    assert found["float32"] == low * (P + 4 * Q) + attention(B, Q, P + Q) + norms(B * P, 2 * L + 1) + norms(
        B * Q, 6 * L + 2
    )


def test_two_passes():
    (step,) = programs(GPT, Workload("two_pass", 4, 8, dtype="float32"), make_mesh("data=1"))
    state, batch, frozen = step.arguments
    assert frozen is None and batch["tokens"].shape == (4, 10)
    assert "confidence_predictor" in state.params and step.tokens == 32


@pytest.mark.parametrize(
    "config, work, message",
    [
        (GPT, Workload("lora"), "job=lora wants a Llama or Qwen model, got gpt2"),
        (QWEN, Workload("two_pass"), "job=two_pass wants a GPT-2 or ConfidenceAwareGPT model, got qwen2"),
        (QWEN, Workload("forward", seq=65), "rows of 65 tokens exceed the model's context of 64"),
        (QWEN, Workload("generate", seq=60, new_tokens=5), "rows of 65 tokens exceed the model's context of 64"),
        (QWEN, Workload("lora", seq=8, targets=("w",)), "targets \\['w'\\] are no projections of this model"),
    ],
)
def test_jobs_that_a_model_cannot_do(config, work, message):
    with pytest.raises(ValueError, match=message):
        programs(config, work, make_mesh("data=1"))


def test_bad_workloads():
    for values, message in (
        (dict(job="train"), "job='train', wanted one of lora, two_pass, generate, forward"),
        (dict(job="lora", batch=0), "batch must be 1 or more, got 0"),
        (dict(job="lora", seq=1), "seq must be 2 or more with job=lora"),
        (dict(job="lora", batch=6, accumulate=4), "accumulate must divide batch=6, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            Workload(**values)
    mesh = jax.sharding.AbstractMesh((2, 4, 1), ("data", "fsdp", "tensor"))
    with pytest.raises(ValueError, match="batch must be a multiple of data=2 x fsdp=4 x accumulate=2, got 8"):
        programs(QWEN, Workload("lora", batch=8, accumulate=2), mesh)


def made_up(machine="a100-80g:16", total=70e9, seconds=(2.0, 1.0, 4.0), batch=32):
    """A plan whose only stage needs so many bytes and seconds."""
    work = Work(1e9, tuple(Collective("all-gather", 1e9, members, times=2) for members in ((0, 1), (2, 3), (0, 8))))
    memory = Memory(arguments=int(total) - 10, temporaries=4, outputs=8, aliased=2)
    stage = Stage("step", Compiled(memory, {"bfloat16": 1e15}, work, 1.0), Estimate(*seconds))
    mesh = {"data": 1, "fsdp": 16, "tensor": 1}
    return Plan(parse(machine), mesh, Workload("lora", batch), (stage,), 3600, Assumptions())


def test_a_plan_adds_up():
    plan = made_up()
    assert plan.memory == 70e9 and plan.head_room == 85100068864 - 2 * 2**30 - 70e9 and plan.fits
    assert plan.seconds == (4.0, 6.0) and plan.tokens_per_second == (600.0, 900.0)
    # 16 devices at 9 an hour are 0.04 a second: a million tokens take 1111 or 1667 seconds.
    assert plan.cost_per_million(9.0) == pytest.approx((44.444, 66.667), rel=1e-4)
    inside, across = plan.stages[0].collectives(per_host=8)
    assert inside == dict(kind="all-gather", devices=2, hosts=1, runs=4, whole=4e9, sent=2e9)
    assert across == dict(kind="all-gather", devices=2, hosts=2, runs=2, whole=2e9, sent=1e9)
    assert not made_up(total=83e9).fits


def test_a_plan_as_text():
    text = report.describe(made_up(), price=9.0)
    assert re.search(r"^step +70.00 +0.00 +0.00 +0.00 +70.00 +12.95$", text, re.M)
    assert "lora on a100-80g:16 (2 hosts), mesh data=1,fsdp=16,tensor=1: 32 rows of 96 tokens" in text
    assert "Fits: 12.95 GB a device to spare; 600 to 900 tokens/s; at 144 an hour for all, 44.44 to 66.67 a" in text
    assert "25 GB/s a device between hosts" in text
    assert "DOES NOT FIT: 0.05 GB a device too much" in report.describe(made_up(total=83e9))


def test_meshes_of_a_machine():
    found = meshes(parse("a100-80g:16"))
    assert all(sizes["data"] * sizes["fsdp"] * sizes["tensor"] == 16 for sizes in found)
    assert len(found) == len({tuple(sizes.values()) for sizes in found}) == 5 + 4 + 3 + 2  # tensor 1, 2, 4, 8
    assert max(sizes["tensor"] for sizes in found) == 8


def test_a_search_doubles_batches_until_they_no_longer_fit(monkeypatch):
    def planned(config, work, machine, mesh, assumed):
        if mesh["tensor"] == 2:
            raise ValueError("tensor=2 must divide kv_heads, got 1")
        if mesh["data"] == 2:
            raise DoesNotFit("too much")
        return made_up(machine="a100-80g:2", total=work.batch * 10e9, seconds=(10 / work.batch, 0, 0), batch=work.batch)

    monkeypatch.setattr(plans, "make_plan", planned)
    found = list(plans.search(QWEN, Workload("lora", batch=2), parse("a100-80g:2"), None, Assumptions()))
    assert [one.workload.batch for one in found] == [2, 2, 4, 8, 16, 2]
    best = ranked(found)
    assert [plan.workload.batch for plan in best] == [8, 4, 2]
    text = report.ranking(found)
    assert text.index("  8  ") < text.index("  4  ") and "batch 16: 77.05 GB a device too much" in text
    assert "tensor=2, batch 2: tensor=2 must divide kv_heads, got 1" in text and "batch 2: too much" in text
    assert isinstance(found[0], Failure) and "None fits." in report.ranking(found[:1])


@pytest.fixture
def request_flags(tmp_path):
    if "model_config" not in flags.FLAGS:
        binary.define_flags()
    flags.FLAGS.mark_as_parsed()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN.to_hf()))
    with flagsaver.flagsaver(model_config=str(file), hardware="a100-80g:2", mesh=None, search=False, output=None):
        yield flags.FLAGS


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hardware="b200"), "hardware must read like a100-80g:4, with one of a100-40g, .*, got 'b200'"),
        (dict(model_config="no_such_folder"), "no checkpoint folder 'no_such_folder'"),
        (dict(batch=-1), "batch must be 1 or more, got -1"),
        (dict(matmul_share=0.0), "matmul must be a share above 0 and at most 1, got 0.0"),
        ({}, r"which is not installed; install the project's extra: pip install 'nmjax\[plan-cuda\]'"),
    ],
)
def test_a_bad_request_is_one_line(request_flags, monkeypatch, changes, message):
    monkeypatch.setattr(hardware, "_installed", lambda module: False)
    before = jax.config.jax_enable_compilation_cache
    try:
        with flagsaver.flagsaver(**changes), pytest.raises(SystemExit, match=f"^plan: .*{message}"):
            binary.main([])
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def test_what_is_written(request_flags, monkeypatch, tmp_path, capsys):
    plan = made_up()
    monkeypatch.setattr(binary, "make_plan", lambda *arguments: plan)
    with flagsaver.flagsaver(output=str(tmp_path / "plan.json"), price=9.0):
        assert binary.run() == [plan]
    assert "Fits: 12.95 GB" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert found["memory_bytes"] == 70e9 and found["fits"] and found["seconds"] == [4, 6]
    assert found["stages"][0]["collectives"][0]["sent"] == 2e9
    assert found["workload"] == json.loads(json.dumps(dataclasses.asdict(plan.workload)))
