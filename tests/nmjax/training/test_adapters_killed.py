"""Training of an adapter on introspection records under SIGKILL: bit for bit what the unbroken run makes."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from nmjax.training.checkpoint import Checkpoints

_CHILD = """
    import sys, time
    import jax, numpy as np
    from models.config import LlamaConfig
    from models.llama import ScannedLlama
    from nmjax.data.introspection_batches import Examples, training_batches
    from nmjax.data.introspection_chat import Segments
    from nmjax.data.introspection_records import YES_NO, Record, unit_vectors
    from nmjax.lm import LanguageModel
    from nmjax.training import lora
    from nmjax.training.checkpoint import Checkpoints
    from nmjax.training.introspection import introspection_loss
    from nmjax.training.loop import TrainConfig, train

    config = LlamaConfig.from_hf(dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=61, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64, max_position_embeddings=64,
        rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True, hidden_act="silu"))
    module, rng = ScannedLlama(config), np.random.default_rng(0)
    steered = {"kind": "steered", "layers": (0, 1), "magnitude": 2.0}
    records = [
        Record(id=str(k), system="", context="", reply="", question="", answers=YES_NO, answer=k % 2,
               **({"kind": "clean"} if k % 2 else {"vector": k % 4, **steered}))
        for k in range(24)
    ]
    tokens = [[tuple(rng.integers(0, 59, n).tolist()) for n in rng.integers(3, 9, 2)] for _ in records]
    segments = [Segments(prefix, question, (True,) * len(prefix), ((59,), (60,))) for prefix, question in tokens]
    batches = training_batches(Examples(records, segments, unit_vectors(4, 32, 0), 2), 4, seed=0)

    class Data:
        def __getitem__(self, step):
            time.sleep(0.02)  # or the run is over before it can be killed
            return batches[step]

    params = module.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    recipe = TrainConfig(steps=160, warmup=10, log_every=10, save_every=7)
    adapter = lora.init(module, lora.LoraConfig(r=4), jax.random.key(1))
    state, history = train(
        introspection_loss(module), adapter.weights, Data(), recipe, frozen=lora.frozen(params, adapter),
        identity={"base": LanguageModel(module, params).fingerprint}, checkpoints=Checkpoints(sys.argv[1]),
        progress=False,
    )
    np.savez(sys.argv[2], *jax.tree.leaves(state.params), loss=[record["loss"] for record in history])
"""


@pytest.mark.slow
def test_sigkill_anywhere_changes_no_bit_of_an_adapter(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(_CHILD))

    def start(folder):
        arguments = [str(tmp_path / folder), str(tmp_path / f"{folder}.npz")]
        environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
        return subprocess.Popen([sys.executable, str(script), *arguments], env=environment)

    assert start("unbroken").wait() == 0
    delays, kills = np.random.default_rng(0).uniform(0.0, 0.4, 30), 0
    for delay in delays:
        child = start("broken")
        before = Checkpoints(tmp_path / "broken").latest()
        while child.poll() is None and Checkpoints(tmp_path / "broken").latest() == before:
            time.sleep(0.01)
        time.sleep(delay)
        if child.poll() is not None:
            break
        child.send_signal(signal.SIGKILL)
        child.wait()
        kills += 1
    assert kills >= 3, "the run must really have been killed"
    assert start("broken").wait() == 0
    with np.load(tmp_path / "unbroken.npz") as unbroken, np.load(tmp_path / "broken.npz") as broken:
        assert unbroken.files == broken.files
        assert len(np.unique(unbroken["loss"])) == 16, "it must be trained"
        for name in unbroken.files:
            np.testing.assert_array_equal(unbroken[name], broken[name])
    assert Checkpoints(tmp_path / "broken").latest() == 160
