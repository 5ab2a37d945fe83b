"""PEFT's folders: its own adapters give its logits, ours come back in bits, and anything else is one clear error."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models.files import CheckpointError
from models.peft import CONFIG, WEIGHTS, base_name
from nmjax.adapters import assemble, leaves_of, stack_layers
from nmjax.training import lora
from nmjax.training.lora import LoraConfig

GOLDEN = Path(__file__).parents[1] / "golden"


def _make_lora():
    """The script beside the golden arrays, which says what the adapters are."""
    spec = importlib.util.spec_from_file_location("make_lora", GOLDEN / "make_lora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VARIANTS = _make_lora().VARIANTS


@pytest.fixture(scope="module")
def base():
    return models.load(GOLDEN / "models" / "qwen2-gqa2-tied")


@pytest.fixture
def folder(tmp_path):
    """A copy of a good adapter, to be spoilt."""
    return shutil.copytree(GOLDEN / "lora" / "attention", tmp_path / "adapter", copy_function=shutil.copyfile)


def edit(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def same_bits(seen, wanted):
    assert seen.keys() == wanted.keys()
    for name, leaf in wanted.items():
        other = seen[name]
        assert leaf.dtype == other.dtype and np.array_equal(np.asarray(leaf), np.asarray(other)), name


def flat(adapter):
    return flax.traverse_util.flatten_dict(leaves_of(adapter))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_peft(base, name, left_padded, logits):
    """A ragged left-padded batch of what peft ran row by row: merged, and for one as branches of its own."""
    adapter = models.read_adapter(base, GOLDEN / "lora" / name)
    reference = np.load(GOLDEN / "lora" / name / "reference.npz")
    rows = [reference[f"tokens_{i}"] for i in range(3)]
    tokens, mask = left_padded(rows)
    base_logits = logits(base.module, base.params, tokens, mask)
    found = [logits(base.module, lora.merge(base.params, adapter), tokens, mask)]
    if name == "patterns":
        adapted = base.with_adapter(adapter)

        @jax.jit
        def run(variables):
            hidden = base.module.apply(variables, tokens, mask)
            return base.module.apply(variables, hidden, method="unembed")

        found.append(np.asarray(run(adapted.variables)))
    for seen in found:
        for i, row in enumerate(rows):
            wanted = reference[f"logits_{i}"]
            own = slice(tokens.shape[1] - len(row), None)
            np.testing.assert_allclose(seen[i, own], wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()))
            assert np.abs(base_logits[i, own] - wanted).max() > 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_what_peft_wrote_comes_back_in_bits(base, name, tmp_path):
    original = GOLDEN / "lora" / name
    adapter = models.read_adapter(base, original)
    models.save_adapter(base, adapter, tmp_path)
    same_bits(load_file(tmp_path / WEIGHTS), load_file(original / WEIGHTS))
    again = models.read_adapter(base, tmp_path)
    same_bits(flat(again), flat(adapter))
    assert again.config == adapter.config
    written, read = (json.loads((folder / CONFIG).read_text()) for folder in (tmp_path, original))
    for field in ("r", "use_rslora", "lora_dropout", "bias", "peft_type", "task_type", "layers_to_transform"):
        assert written[field] == read[field]
    if name != "patterns":  # whose patterns and regular expression are written one module at a time
        assert written["lora_alpha"] == read["lora_alpha"] and written["target_modules"] == read["target_modules"]
        assert not written["rank_pattern"] and not written["alpha_pattern"]


def noisy(adapter, seed=0):
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), adapter.weights)
    return adapter.replace(weights=drawn)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 3, "targets": ("q", "v")},
        {"r": 3, "alpha": 0.7, "rslora": True, "targets": ("q", "up"), "layers": [1], "dropout": 0.25},
        {"r": 3, "targets": "layers_0/attn/q|layers_1/attn/v"},
    ],
)
def test_ours_come_back_in_bits(base, fields, tmp_path):
    adapter = noisy(lora.init(base.module, LoraConfig(**fields), jax.random.key(0)))
    models.save_adapter(base, stack_layers(adapter, base.config.layers), tmp_path)
    again = models.read_adapter(base, tmp_path)
    same_bits(flat(again), flat(adapter))
    assert again.config == adapter.config
    assert models.load_adapter(base, tmp_path).adapter.config == adapter.config
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


def test_ranks_that_differ_are_patterns(base, tmp_path):
    """An adapter of ranks and scales of its own in every module, in names that regular expressions can't confuse."""
    parts = [lora.init(base.module, LoraConfig(r=r, alpha=r * r, targets=(t,)), jax.random.key(r)) for r, t in
             ((1, "q"), (2, "k"), (3, "v"))]  # fmt: skip
    leaves = {path: here for part in parts for path, here in leaves_of(part).items()}
    mixed = noisy(assemble(parts[0].config, leaves))
    models.save_adapter(base, mixed, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["r"] == 1 and len(written["rank_pattern"]) == 4 == len(written["alpha_pattern"])
    same_bits(flat(models.read_adapter(base, tmp_path)), flat(mixed))


# --- Packed projections -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt():
    return models.load(GOLDEN / "minigpt" / "tanh")


def test_gpt2_shares_lora_a_of_its_packed_projection(gpt, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for i in range(2):
        for name, into, out in (("attn.c_attn", 16, 48), ("mlp.c_fc", 16, 64), ("mlp.c_proj", 64, 16)):
            at = f"base_model.model.transformer.h.{i}.{name}"
            arrays[f"{at}.lora_A.weight"] = rng.normal(size=(2, into)).astype(np.float32)
            arrays[f"{at}.lora_B.weight"] = rng.normal(size=(out, 2)).astype(np.float32)
    save_file(arrays, tmp_path / WEIGHTS)
    targets = ["c_attn", "c_fc", "mlp.c_proj"]
    (tmp_path / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": targets})
    )
    adapter = models.read_adapter(gpt, tmp_path)
    merged = lora.merge(gpt.params, adapter)
    for i in range(2):  # GPT-2's kernels are [in, out]
        A, B = (arrays[f"base_model.model.transformer.h.{i}.attn.c_attn.lora_{part}.weight"] for part in "AB")
        change = 1.5 * (B @ A).T.reshape(16, 3, 2, 8)
        for number, name in enumerate("qkv"):
            before, after = (tree[f"layers_{i}"]["attn"][name]["kernel"] for tree in (gpt.params, merged))
            np.testing.assert_allclose(after, before + change[:, number], atol=1e-5)
    models.save_adapter(gpt, adapter, tmp_path / "again")
    same_bits(load_file(tmp_path / "again" / WEIGHTS), arrays)
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["fan_in_fan_out"] is True


@pytest.mark.parametrize("targets", [("q",), ("q", "k", "v")])
def test_what_gpt2_packs_can_not_be_written_apart(gpt, targets, tmp_path):
    adapter = noisy(lora.init(gpt.module, LoraConfig(r=2, targets=targets), jax.random.key(0)))
    with pytest.raises(
        CheckpointError, match=r"transformer.h.0.attn.c_attn is one module to PEFT.*merged into the model"
    ):
        models.save_adapter(gpt, adapter, tmp_path)


# --- Where it is, and what it is for ----------------------------------------------------------------------------------


def test_from_the_hub(base, folder, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository, allow_patterns, ignore_patterns):
        asked.append((repository, allow_patterns, ignore_patterns))
        return folder.parent

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    adapter = models.read_adapter(base, "Someone/introspection-r16", subfolder="adapter")
    same_bits(flat(adapter), flat(models.read_adapter(base, folder)))
    assert asked == [("Someone/introspection-r16", [f"adapter/{CONFIG}", f"adapter/{WEIGHTS}"], [])]


def test_the_base_is_known_by_its_hash(base, folder, tmp_path):
    adapter = models.read_adapter(base, folder)
    models.save_adapter(base, adapter, tmp_path / "ours")
    other = models.load(GOLDEN / "models" / "qwen2-gqa2-tied", dtype="bfloat16")
    models.read_adapter(other, folder)  # peft doesn't say whose it is
    with pytest.raises(CheckpointError, match=f"for the base {base.fingerprint}, this one is {other.fingerprint}"):
        models.read_adapter(other, tmp_path / "ours")
    taken = models.load_adapter(other, tmp_path / "ours", any_base=True)
    same_bits(flat(taken.adapter), flat(adapter))


def test_names_of_bases(base):
    def called(folder):
        return base_name(dataclasses.replace(base, folder=folder))

    assert called(Path("/cache/models--Qwen--Qwen2.5-7B/snapshots/0a1b")) == "Qwen/Qwen2.5-7B"
    assert called(Path("checkpoints/tiny")) == "tiny" and called(None) == ""


SPOILT = {
    "use_dora": (True, "use_dora=True is not supported"),
    "modules_to_save": (["embed_tokens"], "modules_to_save=.'embed_tokens'. is not supported"),
    "kasa_config": ({"beta": 1}, "kasa_config=.* is not supported"),
    "something_new": ("on", "something_new='on' is not supported"),
    "bias": ("all", "bias='all' is not supported, wanted 'none'"),
    "peft_type": ("IA3", "peft_type='IA3' is not supported, wanted 'LORA'"),
    "init_lora_weights": ("pissa_niter_4", "init_lora_weights='pissa_niter_4' is not supported"),
    "r": (0, "r=0, wanted an integer >= 1"),
    "lora_alpha": ("8", "lora_alpha='8', wanted a finite number"),
    "lora_dropout": (1.0, "lora_dropout=1.0, wanted at least 0 and below 1"),
    "target_modules": (None, "target_modules=None, wanted a list of names or one regular expression"),
    "rank_pattern": ({"q_proj": "four"}, "rank_pattern=.* wanted regular expressions and ranks"),
    "layers_to_transform": ("0", "layers_to_transform='0', wanted indices of layers"),
}


@pytest.mark.parametrize("field", SPOILT)
def test_other_kinds_of_adapters_are_refused_by_name(base, folder, field):
    value, match = SPOILT[field]
    edit(folder, **{field: value})
    with pytest.raises(CheckpointError, match=f"{CONFIG}: {match}"):
        models.read_adapter(base, folder)


def spoil_arrays(folder, change):
    arrays = load_file(folder / WEIGHTS)
    change(arrays)
    save_file(arrays, folder / WEIGHTS)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_damage_and_other_bases_are_named(base, gpt, folder, tmp_path):
    def refused(match, lm=base, **fields):
        with pytest.raises(CheckpointError, match=match):
            models.read_adapter(lm, folder, **fields)

    original = load_file(folder / WEIGHTS)
    refused("the base has no model.layers.0.self_attn.k_proj.*; its linear layers are .'c_attn', 'c_proj', 'c_fc'", gpt)
    edit(folder, r=5)
    refused(r"lora_A of model.layers.0.self_attn.k_proj has shape \(4, 32\), wanted \(5, 32\): r=5 by adapter_config")
    edit(folder, r=4, target_modules=["q_proj", "k_proj", "v_proj"])
    refused("not the target_modules of adapter_config.json; not among them: model.layers.0.self_attn.o_proj")
    edit(folder, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    refused("missing: model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj")
    edit(folder, target_modules="(q_proj")
    refused(r"'\(q_proj' is not a regular expression")
    edit(folder, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    spoil_arrays(folder, lambda arrays: arrays.pop(Q0))
    refused("wanted lora_A and lora_B of every module, got one of them for model.layers.0.self_attn.q_proj")
    save_file(
        original | {Q0.replace("lora_A.weight", "lora_magnitude_vector"): np.zeros(3, np.float32)}, folder / WEIGHTS
    )
    refused("wanted tensors called .*, got base_model.*lora_magnitude_vector")
    save_file({name: leaf.astype(np.int32) for name, leaf in original.items()}, folder / WEIGHTS)
    refused("wanted tensors of F32, BF16, F16, but base_model.*is I32")
    data = (GOLDEN / "lora" / "attention" / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-4])
    refused("truncated or corrupted")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(f"has no {WEIGHTS}, only adapter_model.bin: pickled weights can run code and are not read")
    refused("adapter_config.json does not exist", subfolder="best")
    with pytest.raises(CheckpointError, match="no LoRA adapter folder"):
        models.read_adapter(base, tmp_path / "nowhere")


def test_an_adapter_for_another_model_is_not_written(base, gpt, tmp_path):
    adapter = lora.init(gpt.module, LoraConfig(r=1, targets=("q",)), jax.random.key(0))
    with pytest.raises(
        CheckpointError, match=r"another model: layers_0/attn/q/a has shape \(16, 1\), wanted \(32, 1\)"
    ):
        models.save_adapter(base, adapter, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- The card ---------------------------------------------------------------------------------------------------------


def test_what_a_killed_save_left_goes(base, tmp_path):
    (tmp_path / ".saving-1").mkdir()
    (tmp_path / ".saving-1" / WEIGHTS).write_bytes(b"half")
    models.save_adapter(base, lora.init(base.module, LoraConfig(r=2), jax.random.key(0)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


def test_the_card_says_what_the_run_was(base, tmp_path):
    adapter = noisy(lora.init(base.module, LoraConfig(r=3), jax.random.key(0)))
    history = [{"step": step, "loss": 1 / step, "accuracy": None if step == 1 else 0.5} for step in range(1, 31)]
    card = models.AdapterCard(
        title="A detector",
        summary="Says whether it was steered.",
        data="9,000 records, sha256 `4b39`.",
        hyperparameters={"learning rate": 2e-4, "steps": 3375, "seed": 0},
        history=history,
        results=[models.Result("AUROC, held-out vectors", 0.951, (0.92, 0.97), 1200), models.Result("d'", None)],
        command="python -m experiments.train --r=3",
        figures={"curves": b"\x89PNG"},
    )
    models.save_adapter(base, adapter, tmp_path, card)
    text = (tmp_path / "README.md").read_text()
    for fact in (
        "base_model: qwen2-gqa2-tied", f"`{base.fingerprint}`", "rank 3, alpha 6, 1,344 trained parameters in\n8 ",
        "(q_proj, k_proj, v_proj, o_proj)", "sha256 `4b39`", "| learning rate | 0.0002 |", "| steps | 3,375 |",
        "| step | loss | accuracy |", "| 1 | 1 | - |", "| 30 | 0.03333 | 0.5 |", "![curves](curves.png)",
        "| AUROC, held-out vectors | 0.951 [0.920, 0.970] | 1,200 |", "| d' | - |  |",
        "    python -m experiments.train --r=3",
    ):  # fmt: skip
        assert fact in text, fact
    assert text.count("\n| ") < 30 and (tmp_path / "curves.png").read_bytes() == b"\x89PNG"
    assert lora.count(adapter) == 1344
