"""Live comparisons with peft on torch: what either writes the other reads with the same logits."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import models
import nmjax
from models.peft import CONFIG, WEIGHTS
from nmjax.training import lora
from nmjax.training.lora import LoraConfig

pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parents[1] / "golden"
# A base for each family, with what peft and we call its projections.
BASES = {
    "llama": "models/llama-gqa4-tied-bias",
    "qwen2": "models/qwen2-gqa4-untied-sliding",
    "qwen3": "models/qwen3-gqa2-tied",
    "gpt2": "minigpt/tanh",
}
FROM_PEFT = {
    "llama": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
    "qwen2": {"r": 4, "target_modules": ["q_proj", "lm_head"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "qwen3": {"r": 2, "lora_alpha": 1, "target_modules": r".*1\.[a-z_]+\.\w+_proj", "rank_pattern": {"k_proj": 5}},
    "gpt2": {"r": 3, "lora_alpha": 7, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
}  # fmt: skip
TO_PEFT = {
    "llama": {"r": 3, "alpha": 0.7, "targets": "all-linear", "rslora": True},
    "qwen2": {"r": 4, "targets": ("q", "lm_head")},
    "qwen3": {"r": 2, "targets": "layers_0/attn/q|layers_1/mlp/down"},
    "gpt2": {"r": 3, "targets": ("o", "up", "down"), "layers": [1]},
}


@pytest.fixture(scope="module")
def make_lora():
    """The script that makes the golden arrays."""
    pytest.importorskip("peft", reason="peft is not installed (requirements-parity.txt)")
    spec = importlib.util.spec_from_file_location("make_lora", GOLDEN / "make_lora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(make_lora, lm, reference, base):
    rows = [row % 61 + (row % 61 < 3) * 3 for row in make_lora.rows(seed=1)]
    result = nmjax.forward(lm, [row.tolist() for row in rows])
    for i, row in enumerate(rows):
        wanted = make_lora.logits(reference, row)
        seen = np.asarray(result.logits[i])[np.asarray(result.mask[i])]
        np.testing.assert_allclose(seen, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()))
        assert np.abs(make_lora.logits(base, row) - wanted).max() > 0.1


@pytest.mark.parametrize("family", BASES)
def test_adapters_of_peft(make_lora, family, tmp_path):
    folder = GOLDEN / BASES[family]
    reference = make_lora.adapted(make_lora.read_base(folder), 0, **FROM_PEFT[family])
    # Else peft adds a copy of the base's whole head where that has an adapter.
    reference.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    lm = models.load_adapter(models.load(folder), tmp_path / "theirs")
    compare(make_lora, lm, reference, make_lora.read_base(folder))
    models.save_adapter(lm, lm.adapter, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("family", BASES)
def test_adapters_of_ours(make_lora, family, tmp_path):
    import peft

    folder = GOLDEN / BASES[family]
    lm = models.load(folder)
    adapter = lora.init(lm.module, LoraConfig(**TO_PEFT[family]), jax.random.key(0))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), adapter.weights)
    adapter = adapter.replace(weights=drawn)
    models.save_adapter(lm, adapter, tmp_path)
    reference = peft.PeftModel.from_pretrained(make_lora.read_base(folder), tmp_path).eval()
    compare(make_lora, lm.with_adapter(adapter), reference, make_lora.read_base(folder))
    missing = set(json.loads((tmp_path / CONFIG).read_text())) - set(peft.LoraConfig().to_dict())
    assert not missing, "fields that peft doesn't know"


def test_the_committed_logits_are_those_of_the_installed_peft(make_lora):
    for seed, (name, fields) in enumerate(make_lora.VARIANTS.items()):
        model = make_lora.adapted(make_lora.read_base(), seed, **fields)
        wanted = np.load(GOLDEN / "lora" / name / "reference.npz")
        for i, row in enumerate(make_lora.rows()):
            np.testing.assert_allclose(make_lora.logits(model, row), wanted[f"logits_{i}"], atol=1e-5)
