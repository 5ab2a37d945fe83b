"""Plans that are really compiled, where the compilers are installed; each in its own process, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.minigpt_config import MiniGPTConfig
from nmjax.planning.hardware import _installed

GPT = MiniGPTConfig(vocab=256, embed=64, layers=2, heads=4, max_positions=64)
ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.slow
needs_cuda = pytest.mark.skipif(
    not _installed("jax_plugins.xla_cuda12"), reason="wants the CUDA compiler: pip install 'nmjax[plan-cuda]'"
)
needs_tpu = pytest.mark.skipif(not _installed("libtpu"), reason="wants the TPU compiler: pip install 'nmjax[plan-tpu]'")


def planned(tmp_path, **flags):
    """The plans that the binary writes, and its exit status."""
    output = tmp_path / "plan.json"
    words = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, "-m", "experiments.plan", *words, f"--output={output}"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert output.exists(), done.stderr[-2000:]
    return json.loads(output.read_text())["plans"], done.returncode


@pytest.fixture
def coder(shared_data):
    file = shared_data / "configs" / "Qwen2.5-Coder-32B-Instruct_config.json"
    if not file.exists():
        pytest.skip(f"no configuration of that model at {file}")
    return str(file)


@needs_cuda
def test_lora_on_a_32b_model_on_four_a100s_takes_what_is_known(coder, tmp_path):
    flags = dict(job="lora", hardware="a100-80g:4", mesh="fsdp=4", batch=32, seq=88)
    (plan,), status = planned(tmp_path, model_config=coder, **flags)
    (step,) = plan["stages"]
    assert status == 0 and plan["fits"]
    # A quarter of the parameters in bfloat16, and of the adapter, its gradient's moments and what is not spread.
    parameters, adapter = 32_763_876_352, 33_554_432
    assert step["memory"]["arguments"] == pytest.approx((2 * parameters + 3 * 4 * adapter) / 4, rel=0.01)
    assert step["memory"]["arguments"] == pytest.approx(16.8e9, rel=0.02)
    assert 1.5e9 < step["memory"]["temporaries"] < 2.5e9
    assert step["open_loops"] == 0
    # Every layer's weights, or activations in their place, are sent at least twice and at most three times.
    layers = 2 * (parameters - 2 * 152064 * 5120) * 3 / 4
    assert 1.5 * layers < sum(one["sent"] for one in step["collectives"]) < 3.5 * layers
    # One pass of every layer for the conversation and three for the question, less what is not needed again.
    passes = 32 * (48 + 3 * 40)
    assert step["flops"]["bfloat16"] == pytest.approx(2 * passes * (parameters - 2 * 152064 * 5120), rel=0.1)


@needs_cuda
def test_one_card_holds_a_training_with_two_rows_and_not_a_smaller_card(coder, tmp_path):
    flags = dict(model_config=coder, job="lora", mesh="data=1", batch=2, seq=88)
    (plan,), status = planned(tmp_path, hardware="a100-80g:1", **flags)
    assert status == 0 and plan["fits"] and plan["stages"][0]["collectives"] == []
    (plan,), status = planned(tmp_path, hardware="a100-40g:1", **flags)
    assert status == 1 and not plan["fits"] and plan["head_room_bytes"] < -20e9


@needs_cuda
def test_generate_forward_and_two_passes_on_gpus(tmp_path):
    tiny = dict(model_config="checkpoints/tiny", hardware="h100:2", batch=8, seq=32)
    (plan,), _ = planned(tmp_path, job="generate", mesh="tensor=2", new_tokens=16, **tiny)
    prefill, decode = plan["stages"]
    assert decode["memory"]["aliased"] > 0 and plan["tokens"] == 8 * 16  # the cache is written in place
    assert {one["kind"] for one in prefill["collectives"]} >= {"all-reduce"}
    (plan,), _ = planned(tmp_path, job="forward", mesh="data=2", **tiny)
    assert plan["stages"][0]["collectives"] == [] and plan["fits"]
    (tmp_path / "config.json").write_text(json.dumps(GPT.to_hf()))
    gpt = dict(model_config=tmp_path / "config.json", hardware="h100:2", batch=8, seq=32)
    (plan,), _ = planned(tmp_path, job="two_pass", mesh="data=2", **gpt)
    (step,) = plan["stages"]
    # Two forward passes, the first with a backward, and one for what the model is told: at least 5 passes of 2 N T.
    kernels = GPT.layers * 12 * GPT.embed**2
    assert step["flops"]["float32"] > 5 * 2 * kernels * 8 * 32
    assert {one["kind"] for one in step["collectives"]} == {"all-reduce"}  # of gradients


@needs_tpu
def test_a_tpu_slice(tmp_path):
    flags = dict(model_config="checkpoints/tiny", job="lora", hardware="v5e:4", mesh="fsdp=4", batch=8, seq=32)
    (plan,), status = planned(tmp_path, **flags)
    assert status == 0 and plan["fits"] and plan["hosts"] == 1
    assert any(one["kind"] == "all-gather" for one in plan["stages"][0]["collectives"])
