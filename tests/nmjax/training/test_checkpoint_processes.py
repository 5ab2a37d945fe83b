"""Checkpoints between processes: other meshes, two processes at once, and a run that is killed again and again."""

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import nmjax
from nmjax.training.checkpoint import Checkpoints

_MESH = """
    import sys
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from nmjax.training.checkpoint import Checkpoints

    values = {
        "matrix": np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32),
        "small": np.arange(3, dtype=np.int32),  # a copy on every device
    }

    def on(devices, *names):
        mesh = jax.make_mesh((len(devices),), ("x",), devices=devices)
        spec = {"matrix": P(*names), "small": P()}
        return {
            name: jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec[name]), lambda at: value[at])
            for name, value in values.items()
        }

    def check(loaded, like):
        for name, leaf in loaded.items():
            assert leaf.sharding.is_equivalent_to(like[name].sharding, leaf.ndim)
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, values[name][shard.index])
"""

_FEWER_DEVICES = """
    devices, checkpoints = jax.devices(), Checkpoints(sys.argv[1])
    assert len(devices) == 4
    checkpoints.save(1, on(devices, "x"), {})
    for fewer in (on(devices, "x"), on(devices[2:], None, "x"), on(devices[:1])):
        assert len(fewer["matrix"].addressable_shards) == len(fewer["matrix"].sharding.device_set)
        check(checkpoints.load(jax.tree.map(lambda leaf: leaf * 0, fewer))[0], fewer)
"""

_TWO_PROCESSES = """
    import json, os, re, warnings
    from pathlib import Path
    import jax.numpy as jnp

    me = int(sys.argv[2])
    jax.distributed.initialize(f"localhost:{sys.argv[3]}", num_processes=2, process_id=me)
    folder = Path(sys.argv[1])
    state = on(jax.devices(), "x")
    assert not state["matrix"].is_fully_addressable and len(jax.devices()) == 4
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest() is None
    checkpoints.save(1, state, {"from": me})
    with checkpoints:
        checkpoints.save(2, state, {"from": me}, background=True)
    assert checkpoints.steps() == [1, 2], "both see it once `with` has ended"
    check(checkpoints.load(state)[0], state)

    if me == 0:
        manifest = folder / "step_2" / "manifest.json"
        manifest.write_text(manifest.read_text().replace("step", "stop", 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = on(jax.devices()[::-1], None, "x")
        loaded, notes = checkpoints.load(other)
    check(loaded, other)
    assert notes == {"from": 0}, "the notes of process 0, on both"
    told = [str(warning.message) for warning in caught if "step_2 is damaged" in str(warning.message)]
    assert len(told) == (me == 0), "said once"

    for wanted, call in {
        "an array over all processes, got one on": lambda: checkpoints.save(3, {"w": jnp.ones(3)}, {}),
        "step 2 in .* can be used: step_2 is damaged": lambda: checkpoints.load(state, step=2),
        r"must be one of the checkpoints \\[1, 2\\]": lambda: checkpoints.load(state, step=3),
    }.items():
        try:
            call()
        except (ValueError, FileNotFoundError) as error:
            assert re.search(wanted, str(error)), error
        else:
            raise AssertionError(wanted)
    checkpoints.save(3, state, {})
    assert checkpoints.latest() == 3 and checkpoints.steps() == [1, 3]
"""

_KILLED = """
    import json, sys
    import grain, jax, numpy as np
    import jax.numpy as jnp
    from models.minigpt import ConfidenceAwareGPT, ConfidenceConfig
    from nmjax.paths import enable_compilation_cache
    from nmjax.training.checkpoint import Checkpoints, named_leaves
    from nmjax.training.lookahead import lookahead_loss
    from nmjax.training.loop import TrainConfig, train

    R, B, L, V = 2, 3, 8, 41
    enable_compilation_cache()
    module = ConfidenceAwareGPT(ConfidenceConfig(vocab=V, embed=16, layers=1, heads=2, max_positions=16, dropout=0.1))
    rows = np.random.default_rng(0).integers(0, V, (50, L + 2)).astype(np.int32)

    class Batches:
        # A Grain iterator that tells who watches when a batch is asked for.
        def __init__(self):
            order = grain.MapDataset.source(rows).seed(7).shuffle().repeat().batch(R * B)
            self.rows = iter(order.map(lambda batch: batch.reshape(R, B, -1)).to_iter_dataset())
            self.get_state, self.set_state = self.rows.get_state, self.rows.set_state

        def __iter__(self):
            return self

        def __next__(self):
            print("batch", flush=True)
            return next(self.rows)

    def loss_fn(params, tokens, key, told):
        # Told what was predicted on the batch before, so the carry decides the numbers, too.
        found = lookahead_loss(module, params, told[..., None], tokens, 0.1, key)
        metrics = {name: found[name] for name in ("loss_lm", "loss_confidence")}
        return found["total_loss"], (metrics, jax.lax.stop_gradient(found["pred_conf"]))

    init = jax.vmap(lambda key: module.init(key, jnp.zeros((1, 4), jnp.int32))["params"])
    params = jax.jit(init)(jax.random.split(jax.random.key(0), R))
    recipe = TrainConfig(steps=60, scan=2, warmup=5, log_every=1, save_every=1)
    state, history = train(
        loss_fn, params, Batches(), recipe, seeds=[3, 4], carry=jnp.zeros((R, B, L)),
        checkpoints=Checkpoints(sys.argv[1]), progress=False,
    )
    np.savez(sys.argv[2], **dict(named_leaves(state)), history=json.dumps(history))
"""


def write(folder, *parts):
    script = folder / "child.py"
    script.write_text("".join(textwrap.dedent(part) for part in parts))
    return str(script)


def environment(devices=1, **more):
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # compiles in half the time
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(Path(nmjax.__file__).parent.parent)} | more


def test_four_devices_two_and_one_read_the_same_bits(tmp_path):
    script = write(tmp_path, _MESH, _FEWER_DEVICES)
    subprocess.run([sys.executable, script, str(tmp_path / "run")], env=environment(4), check=True)


@pytest.mark.slow
def test_two_processes_save_and_read_as_one(tmp_path):
    script = write(tmp_path, _MESH, _TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = [
        subprocess.Popen([sys.executable, script, str(tmp_path / "run"), str(i), port], env=environment(2))
        for i in range(2)
    ]
    try:
        assert [child.wait(timeout=120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    like = {"matrix": jax.ShapeDtypeStruct((8, 12), np.float32), "small": jax.ShapeDtypeStruct((3,), np.int32)}
    state, _ = Checkpoints(tmp_path / "run").load(like, step=3)
    np.testing.assert_array_equal(state["matrix"], np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32))
    np.testing.assert_array_equal(state["small"], [0, 1, 2])


@pytest.mark.slow
def test_sigkill_at_ten_random_moments_changes_no_bit(tmp_path):
    script, env = write(tmp_path, _KILLED), environment(NMJAX_CACHE=str(tmp_path / "compiled"))

    def start(name):
        arguments = [script, str(tmp_path / name), str(tmp_path / f"{name}.npz")]
        child = subprocess.Popen([sys.executable, *arguments], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(3):  # the first call of the compiled steps is over when the third batch is asked for
            assert child.stdout.readline() == "batch\n"
        return child

    unbroken, began = start("unbroken"), time.perf_counter()
    unbroken.communicate()
    a_save = (time.perf_counter() - began) / 30
    assert unbroken.returncode == 0

    resumed, in_a_save = [], 0
    for delay in np.random.default_rng(0).uniform(0.0, 2.0, 10):
        child = start("broken")
        time.sleep(delay * a_save)
        child.kill()
        child.communicate()
        assert child.returncode == -9, "the run must not have ended by itself"
        resumed.append(Checkpoints(tmp_path / "broken").latest() or 0)
        in_a_save += any((tmp_path / "broken").glob("*.new"))
    print(f"goes on from {resumed}; {in_a_save} of 10 kills during a save")
    assert len(set(resumed)) >= 4 and in_a_save >= 1 and 0 < resumed[-1] < 60
    broken = start("broken")
    broken.communicate()
    assert broken.returncode == 0
    with np.load(tmp_path / "unbroken.npz") as wanted, np.load(tmp_path / "broken.npz") as seen:
        assert wanted.files == seen.files and any(name.startswith(".carry") for name in seen.files)
        for name in wanted.files:
            assert wanted[name].tobytes() == seen[name].tobytes(), name
        history = json.loads(str(seen["history"]))
        assert [record["step"] for record in history] == list(range(1, 61))
        assert np.mean(history[-1]["loss"]) < np.mean(history[0]["loss"]) and seen[".carry"].any()
