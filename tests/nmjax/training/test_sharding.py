"""Sharding: rules against specs written out, meshes, and training on eight devices against training on one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from models.config import LlamaConfig
from models.llama import Llama, ScannedLlama
from models.minigpt import ConfidenceAwareGPT, ConfidenceConfig, MiniGPT, MiniGPTConfig
from nmjax.training import sharding
from nmjax.training.checkpoint import Checkpoints
from nmjax.training.loop import TrainConfig, init_state, make_optimizer, train
from nmjax.training.sharding import RULES, describe, look_up, make_mesh, pin, place, placements, shardings

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("sharded_losses.py")

GPT = dict(vocab=64, embed=16, layers=2, heads=4, max_positions=8)
QWEN = LlamaConfig.from_hf(dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=64, hidden_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=32, max_position_embeddings=64,
    rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, hidden_act="silu"))  # fmt: skip
QWEN3 = LlamaConfig.from_hf(dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=64, hidden_size=16, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=32, max_position_embeddings=64,
    rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=True, hidden_act="silu"))  # fmt: skip


def abstract(data=1, fsdp=1, tensor=1):
    """A mesh of devices that need not exist."""
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def shapes(module):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"])


def specs(tree, mesh, rules=RULES):
    return {placement.path: placement.spec for placement in placements(tree, mesh, rules)}


BLOCK = {
    "attn/q/kernel": P("fsdp", "tensor", None),
    "attn/k/kernel": P("fsdp", "tensor", None),
    "attn/v/kernel": P("fsdp", "tensor", None),
    "attn/o/kernel": P(("tensor", "fsdp"), None, None),
    "mlp/up/kernel": P("fsdp", "tensor"),
    "mlp/down/kernel": P(("tensor", "fsdp"), None),
}
QKV_BIASES = {f"attn/{name}/bias": P("tensor", None) for name in "qkv"}
QWEN_BLOCK = BLOCK | QKV_BIASES | {"mlp/gate/kernel": P("fsdp", "tensor")}
QWEN_BLOCK |= {"attn_norm/scale": P(None), "mlp_norm/scale": P(None)}
GPT_BLOCK = BLOCK | QKV_BIASES | {"mlp/up/bias": P("tensor"), "attn/o/bias": P(None), "mlp/down/bias": P(None)}
ENDS = {"embed/embedding": P("tensor", "fsdp"), "final_norm/scale": P(None)}
GPT_ENDS = ENDS | {"positions/embedding": P(None, "fsdp"), "final_norm/bias": P(None)}


def unrolled(block, layers=2):
    return {f"layers_{i}/{name}": spec for i in range(layers) for name, spec in block.items()}


@pytest.mark.parametrize(
    "module, wanted",
    [
        (Llama(QWEN), unrolled(QWEN_BLOCK) | ENDS | {"lm_head/kernel": P("fsdp", "tensor")}),
        (
            ScannedLlama(QWEN),
            {f"layers/{name}": P(None, *spec) for name, spec in QWEN_BLOCK.items()}
            | ENDS
            | {"lm_head/kernel": P("fsdp", "tensor")},
        ),
        (
            Llama(QWEN3),
            unrolled(
                {name: spec for name, spec in QWEN_BLOCK.items() if not name.endswith("bias")}
                | {"attn/q_norm/scale": P(None), "attn/k_norm/scale": P(None)},
                layers=1,
            )
            | ENDS,
        ),
        (
            MiniGPT(MiniGPTConfig(**GPT)),
            unrolled(GPT_BLOCK | {f"{a}_norm/{b}": P(None) for a in ("attn", "mlp") for b in ("scale", "bias")})
            | GPT_ENDS,
        ),
        (
            ConfidenceAwareGPT(ConfidenceConfig(**GPT)),
            unrolled(
                GPT_BLOCK
                | {f"{name}_norm/kernel": P(None, None, None) for name in ("attn", "mlp")}
                | {f"{name}_norm/bias": P(None, None) for name in ("attn", "mlp")}
            )
            | GPT_ENDS
            | {"confidence_predictor/kernel": P(None, None), "confidence_predictor/bias": P(None)},
        ),
    ],
    ids=["unrolled", "scanned", "qk_norm", "minigpt", "confidence"],
)
def test_every_leaf_lies_where_the_rules_say(module, wanted):
    mesh, params = abstract(2, 2, 2), shapes(module)
    assert specs(params, mesh) == wanted
    optimizer = make_optimizer(TrainConfig(steps=2))
    state = jax.eval_shape(lambda p: init_state(p, optimizer, 0, {"told": jnp.zeros((4, 3, 1))}), params)
    found = specs(state, mesh)
    moments = {f"opt_state/1/0/{moment}/{name}": spec for moment in ("mu", "nu") for name, spec in wanted.items()}
    counts = {"step": P(), "seed": P(), "opt_state/1/0/count": P(), "opt_state/1/2/count": P()}
    carry = {"carry/told": P(None, None, None)}
    assert found == moments | counts | carry | {f"params/{name}": spec for name, spec in wanted.items()}
    several = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), state)
    assert specs(several, mesh) == {name: P(None, *spec) for name, spec in found.items()}


def test_shardings_have_the_structure_of_the_tree_and_the_sizes_of_the_pieces():
    params = shapes(ScannedLlama(QWEN))
    tree = shardings(params, abstract(2, 2, 2))
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    assert tree["layers"]["attn"]["q"]["kernel"].shard_shape((2, 16, 4, 8)) == (2, 8, 2, 8)
    assert tree["embed"]["embedding"].shard_shape((64, 16)) == (32, 8)


def test_what_a_mesh_does_not_divide_is_an_error_or_stays_whole():
    odd = shapes(MiniGPT(MiniGPTConfig(**GPT | {"vocab": 61})))
    with pytest.raises(ValueError, match=r"tensor=3 must divide kv_heads, got kv_heads 4 in layers_0/attn/k/bias of"):
        placements(odd, abstract(tensor=3))
    with pytest.raises(ValueError, match=r"fsdp=3 must divide embed, got embed 16 in embed/embedding of shape"):
        placements(odd, abstract(fsdp=3))
    with pytest.raises(ValueError, match=r"tensor=4 must divide kv_heads, got kv_heads 2 in .*attn/k/bias"):
        placements(shapes(Llama(QWEN)), abstract(tensor=4))
    with pytest.raises(ValueError, match=r"tensor=5 must divide ffw, got ffw 12"):
        placements({"mlp": {"up": {"bias": jnp.zeros(12)}}}, abstract(tensor=5))
    embedding = placements(odd, abstract(fsdp=2, tensor=2))[0]
    assert (embedding.path, embedding.spec) == ("embed/embedding", P(None, "fsdp"))
    assert embedding.note == "vocab 61 stays whole: tensor=2 does not divide it"


def test_a_rule_with_several_layouts_takes_the_first_that_the_mesh_divides():
    found = specs(shapes(Llama(QWEN)), abstract(fsdp=8))
    assert found["layers_0/attn/o/kernel"] == P("tensor", None, "fsdp")  # 4 heads
    assert found["layers_0/mlp/down/kernel"] == P(("tensor", "fsdp"), None)  # ffw 32
    with pytest.raises(ValueError, match=r"fsdp=3 must divide embed, got embed 16 in attn/o/kernel"):
        placements({"attn": {"o": {"kernel": jnp.zeros((4, 8, 16))}}}, abstract(fsdp=3))


def test_a_leaf_without_a_rule_is_an_error_and_rules_can_be_added():
    lora = {"layers": {"attn": {"q": {"lora_a": jnp.zeros((2, 16, 3)), "lora_b": jnp.zeros((2, 3, 4, 8))}}}}
    mesh = abstract(fsdp=2, tensor=2)
    with pytest.raises(ValueError, match=r"layers/attn/q/lora_a of shape \(2, 16, 3\) matches no rule"):
        placements(lora, mesh)
    rules = (*RULES, (r"attn/q/lora_a", ("embed", None)), (r"attn/q/lora_b", (None, "heads", None)))
    assert specs(lora, mesh, rules) == {
        "layers/attn/q/lora_a": P(None, "fsdp", None),
        "layers/attn/q/lora_b": P(None, None, "tensor", None),
    }
    with pytest.raises(ValueError, match=r"names \('embed', 'ffw'\), got mlp/up/kernel of shape \(16,\)"):
        placements({"mlp": {"up": {"kernel": jnp.zeros(16)}}}, mesh)
    with pytest.raises(ValueError, match="head_embed/embedding .* no rule"):  # a rule is for whole parts of a path
        placements({"head_embed": {"embedding": jnp.zeros((64, 16))}}, mesh)


def test_the_table_adds_up():
    params = shapes(MiniGPT(MiniGPTConfig(**GPT | {"vocab": 2**15 + 1, "embed": 64})))
    text = describe(params, abstract(fsdp=2, tensor=2))
    assert text.startswith("mesh data=1, fsdp=2, tensor=2\n")
    lines = [line for line in text.splitlines() if "embed/embedding" in line]
    size = (2**15 + 1) * 32 * 4 / 2**20
    assert len(lines) == 1 and f"(-, fsdp)          {size:.2f}  vocab 32769 stays whole" in lines[0]
    assert len(re.findall(r"layers_\*/attn/q/kernel \(2 times\) +64 x 4 x 16 +\(fsdp, tensor, -\)", text)) == 1
    # Of the 12 matrices D^2 of a layer a device holds a quarter, of the embeddings half; vectors are small.
    floats = 2 * 12 * 64**2 / 4 + (2**15 + 1 + 8) * 32
    assert float(text.splitlines()[-1].split()[1]) == pytest.approx(floats * 4 / 2**20, abs=0.02)


def test_meshes():
    assert jax.device_count() == 1, "what follows is written for one device"
    mesh = make_mesh({"tensor": 1})
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1} and mesh.axis_types == (AxisType.Auto,) * 3
    assert make_mesh(" data=-1 , tensor=1") == mesh
    for spec, message in {
        "data=2,fsdp=4": "'data=2,fsdp=4': the product of the sizes must be 1, the number of devices, got 8",
        "data=-1,fsdp=2": "must be a divisor of 1, got 2",
        "data=-1,fsdp=-1": "whole numbers from 1 on, and -1 at most once, got 'data=-1,fsdp=-1'",
        "data=0": "whole numbers from 1 on",
        "model=2": "among data, fsdp, tensor, got model in 'model=2'",
        "data=1,data=1": "each axis once",
        "data:1": "must read like data=2,fsdp=4",
        "": "must read like",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            make_mesh(spec)
    with pytest.raises(ValueError, match="whole numbers from 1 on.*, got {'data': '2'}"):
        make_mesh({"data": "2"})


def test_without_a_mesh_nothing_is_added_to_the_program():
    x, ids = jnp.ones((2, 3, 4)), jnp.array([1, 0])
    assert pin(x) is x
    take = jax.make_jaxpr(lambda table: jnp.take(table, ids, axis=0))(x[0])
    assert str(jax.make_jaxpr(lambda table: look_up(table, ids))(x[0])) == str(take)


ROWS = "P(('data', 'fsdp'), None, None)"


@pytest.mark.parametrize(
    "run, shape, wanted",
    [
        (pin, (4, 3, 8), ROWS),
        (jax.vmap(pin), (2, 4, 3, 8), "P(UNCONSTRAINED, ('data', 'fsdp'), None, None)"),
        (lambda x: jax.lax.map(pin, x), (2, 4, 3, 8), ROWS),
    ],
    ids=["one", "vmap", "map"],
)
def test_a_mesh_in_force_pins_rows_also_over_seeds(run, shape, wanted):
    with jax.sharding.use_abstract_mesh(abstract(2, 2, 2)):
        text = str(jax.make_jaxpr(run)(jnp.ones(shape)))
    assert text.count("sharding_constraint") == 1 and f"spec={wanted})" in text


@pytest.mark.parametrize(
    "module, tables, pins",
    [(Llama(QWEN), 1, 3), (ScannedLlama(QWEN), 1, 2), (MiniGPT(MiniGPTConfig(**GPT)), 2, 3)],
    ids=["unrolled", "scanned", "minigpt"],
)
def test_the_residual_stream_is_pinned_where_it_enters_and_behind_each_block(module, tables, pins):
    """A scan's block is written once, so it counts once."""
    with jax.sharding.use_abstract_mesh(abstract(2, 2, 2)):
        run = jax.make_jaxpr(lambda params: module.apply({"params": params}, jnp.zeros((4, 3), jnp.int32)))
        text = str(run(shapes(module)))
    assert (text.count("spec=P(UNCONSTRAINED, None))"), text.count(f"spec={ROWS})")) == (tables, pins)


def test_a_batch_is_placed_by_its_rows():
    mesh = make_mesh("data=1")
    batch = {"tokens": np.arange(24).reshape(2, 4, 3), "weights": np.ones((2, 4))}
    placed = place(batch, mesh, axis=1)
    chex.assert_trees_all_equal(placed, batch)
    assert placed["tokens"].sharding.spec == P(None, ("data", "fsdp"))
    with pytest.raises(ValueError, match=r"leaf \"\['alpha'\]\" must have its rows along axis 1, got shape \(2,\)"):
        place(batch | {"alpha": np.ones(2)}, mesh, axis=1)
    with pytest.raises(ValueError, match=r"multiple of data=1 x fsdp=1 x 3 micro-batches, 3, got 4 in leaf"):
        place(batch, mesh, axis=1, parts=3)


class Interrupted(Exception):
    pass


class NumbersUntil:
    def __init__(self, last):
        self.last = last

    def __getitem__(self, step):
        if step >= self.last:
            raise Interrupted
        return np.random.default_rng(int(step)).normal(size=(8, 3)).astype(np.float32)


def test_a_mesh_of_one_device_changes_no_bit_and_a_resumed_run_stays_on_it(tmp_path):
    traces, seen = [], []

    def loss_fn(params, x, key):
        traces.append(key)
        error = x @ params["w"] + 0.01 * jax.random.normal(key) - x.sum(1, keepdims=True)
        return jnp.mean(error**2), {"mae": jnp.abs(error).mean()}

    def watch(record, params):
        seen.append(params["w"].sharding)
        return {"w": params["w"].tolist()}

    def run(last=12, w=None, **options):
        config = TrainConfig(steps=12, warmup=2, peak_lr=0.1, log_every=2, save_every=4)
        params = {"w": jnp.full((3, 1), 0.1) if w is None else w}
        rules = ((r"w", ("embed", None)), *RULES)
        return train(loss_fn, params, NumbersUntil(last), config, progress=False, watch=watch, rules=rules, **options)

    state, history = run()
    mesh = make_mesh("data=1")
    w = jax.device_put(jnp.full((3, 1), 0.1), jax.NamedSharding(mesh, P("fsdp", None)))
    traces.clear()
    spread, same = run(w=w, mesh=mesh)
    assert len(traces) == 1 and not w.is_deleted()
    chex.assert_trees_all_equal(spread, state)
    assert same == history
    assert spread.params["w"].sharding.spec == spread.opt_state[1][0].mu["w"].sharding.spec == P("fsdp", None)
    assert {type(sharding) for sharding in seen} == {jax.sharding.SingleDeviceSharding}
    with pytest.raises(Interrupted):
        run(last=7, mesh=mesh, checkpoints=Checkpoints(tmp_path))
    assert Checkpoints(tmp_path).latest() == 4
    resumed, again = run(mesh=mesh, checkpoints=Checkpoints(tmp_path))
    chex.assert_trees_all_equal(resumed, state)
    assert again == history and resumed.params["w"].sharding.spec == P("fsdp", None)


def finished(task, environments=({},)):
    """(return code, stdout, stderr) of `sharded_losses.py`, run once for each environment, side by side."""
    base = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(PROGRAM), json.dumps(task)]
    children = [subprocess.Popen(command, env=base | extra, **pipes) for extra in environments]
    return [(child.wait(), *texts) for child, texts in [(child, child.communicate()) for child in children]]


def launched(task, environments=({},)):
    """What `sharded_losses.py` printed in its process 0, and the stderr of each process."""
    codes, out, errors = zip(*finished(task, environments), strict=True)
    assert set(codes) == {0}, "\n".join(errors)
    return json.loads(next(text for text in out if "RESULT" in text).split("RESULT")[1]), errors


def as_by_srun():
    """The environments of two tasks on one host."""
    job = str(np.random.default_rng().integers(2**20))  # decides the port
    slurm = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    return [slurm | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]


def assert_same_training(found, wanted):
    """Losses to 1e-5 of their size, and parameters (sums of squares of each leaf) after the last step."""
    losses = np.array(wanted["losses"])
    assert len(np.unique(losses)) == losses.size, "losses must move, and differ between seeds"
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
    np.testing.assert_allclose(found["squares"], wanted["squares"], rtol=1e-4, atol=1e-6)
    assert found["traces"] == wanted["traces"]


def pieces(found, ending):
    """(whole, piece) of the parameter and of its two moments."""
    return [shapes for path, shapes in found["pieces"].items() if path.endswith(ending) and "count" not in path]


def test_eight_devices_train_as_one():
    task = {"models": ["confidence"], "devices": 8, "meshes": ["", "data=2,fsdp=4", "data=2,fsdp=2,tensor=2"]}
    found, (errors,) = launched(task)
    alone, flat, deep = (found[mesh] for mesh in task["meshes"])
    assert_same_training(flat, alone)
    assert_same_training(deep, alone)
    assert pieces(alone, "['attn']['q']['kernel']") == [[[2, 16, 4, 4]] * 2] * 3
    assert pieces(flat, "['attn']['q']['kernel']") == [[[2, 16, 4, 4], [2, 4, 4, 4]]] * 3
    assert pieces(deep, "['attn']['q']['kernel']") == [[[2, 16, 4, 4], [2, 8, 2, 4]]] * 3
    assert pieces(deep, "['mlp']['down']['kernel']") == [[[2, 64, 16], [2, 16, 16]]] * 3
    assert pieces(deep, "['embed']['embedding']") == [[[2, 61, 16], [2, 61, 8]]] * 3  # 61 is odd
    assert "rematerialization" not in errors, "the compiler had to bring a whole activation together"


@pytest.mark.slow
def test_all_models_with_dropout_feedback_and_scanned_steps():
    task = {"models": ["feedback", "standard", "llama"], "devices": 8, "config": {"scan": 2}}
    found, _ = launched(task | {"meshes": ["", "data=2,fsdp=2,tensor=2"]})
    assert_same_training(*reversed(found.values()))


@pytest.mark.slow
def test_seeds_side_by_side_and_accumulation():
    task = {"models": ["plain"], "devices": 8, "config": {"accumulate": 2}, "vmap": True}
    found, _ = launched(task | {"meshes": ["", "data=4,fsdp=2"]})
    assert_same_training(*reversed(found.values()))


def assert_same_adapter(found, wanted, tolerance=1e-5):
    losses = np.array(wanted["losses"])
    assert len(np.unique(losses)) == losses.size, "they must move"
    np.testing.assert_allclose(found["losses"], losses, rtol=tolerance)
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, leaf in wanted["weights"].items():
        np.testing.assert_allclose(found["weights"][name], leaf, atol=tolerance, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss", [{}, {"loss": "full", "kl_to_base": 0.5}, {"segments": 1}], ids=["pair", "full and KL", "one segment"]
)
def test_an_adapter_learns_from_introspection_on_eight_devices_as_on_one(loss):
    task = {"adapter": loss, "devices": 8, "meshes": ["", "fsdp=4,tensor=2"]}
    found, (errors,) = launched(task)
    alone, spread = (found[mesh] for mesh in task["meshes"])
    assert_same_adapter(spread, alone)
    assert pieces(alone, "['attn']['q']['a']") == [[[2, 16, 2]] * 2] * 3
    assert pieces(spread, "['attn']['q']['a']") == [[[2, 16, 2], [2, 4, 2]]] * 3
    assert pieces(spread, "['attn']['q']['b']") == [[[2, 2, 4, 8], [2, 2, 2, 8]]] * 3
    assert "rematerialization" not in errors, "the compiler had to bring a whole activation together"


@pytest.mark.slow
def test_an_adapter_learns_from_introspection_in_two_processes_and_in_parts():
    task = {"adapter": {"loss": "full"}, "config": {"accumulate": 2}}
    mesh = "data=2,fsdp=2,tensor=2"
    found, _ = launched(task | {"meshes": [mesh], "devices": 4}, as_by_srun())
    alone, _ = launched(task | {"meshes": [""], "devices": 1})
    assert_same_adapter(found[mesh], alone[""])


@pytest.mark.slow
def test_two_processes_train_as_one():
    mesh = "data=2,fsdp=4"
    task = {"models": ["confidence", "plain"], "meshes": [mesh], "devices": 4}
    found, errors = launched(task, as_by_srun())
    alone, _ = launched(task | {"meshes": [""], "devices": 1})
    assert_same_training(found[mesh], alone[""])
    assert pieces(found[mesh], "['attn']['q']['kernel']")[0] == [[2, 16, 4, 4], [2, 4, 4, 4]]
    assert re.search(r"^0 .* cpu \(cpu\) +4 .*\n1 .* cpu \(cpu\) +4 ", errors[0], re.M) and "platform" not in errors[1]


@pytest.mark.slow
def test_processes_with_different_data_are_an_error():
    task = {"models": ["plain"], "meshes": ["data=2"], "devices": 1, "own": True}
    for code, _, errors in finished(task, as_by_srun()):
        assert code != 0
        assert "the first batch must be the same in every process, got others than process 0's in [1]" in errors
