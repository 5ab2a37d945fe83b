"""`config.json`: real ones build and count right, both spellings mean the same, what can't be honoured is refused."""

import dataclasses
import json
import math

import flax.traverse_util
import jax
import numpy as np
import pytest

import models
from models.config import ConfigError, LlamaConfig
from models.convert import tensors
from models.rope import Rope

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
}

# Sizes which the models' publishers state, or which follow from a published checkpoint's files.
PUBLISHED = {
    "meta-llama--Meta-Llama-3.1-8B_config.json": 8_030_261_248,
    "meta-llama--Meta-Llama-3.1-70B_config.json": 70_553_706_496,
    "Qwen2.5-Coder-32B-Instruct_config.json": 32_763_876_352,
    "Qwen2.5-0.5B-Instruct_config.json": 494_032_768,
    "Qwen--Qwen3-8B_config.json": 8_190_735_360,
    "Qwen--Qwen3-0.6B_config.json": 596_049_920,
    "SmolLM2-135M-Instruct.json": 134_515_008,
}


def read(path):
    return LlamaConfig.from_hf(json.loads(path.read_text()))


def shapes(module):
    params = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    return {"/".join(path): leaf.shape for path, leaf in flax.traverse_util.flatten_dict(params).items()}


def real_configs(shared_data):
    folder = shared_data / "configs"
    return sorted([*folder.glob("*_config.json"), folder / "SmolLM2-135M-Instruct.json"])


def test_real_configs_build(shared_data):
    """Every one, by shape evaluation: both loops have exactly the tensors which the conversion table names."""
    found = real_configs(shared_data)
    assert {path.name for path in found} >= set(PUBLISHED)
    for path in found:
        config = read(path)
        table = sum(math.prod(t.shape) for t in tensors(config))
        scanned = sum(math.prod(shape) for shape in shapes(models.ScannedLlama(config)).values())
        assert scanned == table == PUBLISHED.get(path.name, table), path.name
        small = dataclasses.replace(config, layers=2, windows=None)
        assert shapes(models.Llama(small)) == {"/".join(t.ours[0]): t.shape for t in tensors(small)}, path.name


def test_config_round_trip(shared_data, golden_folder):
    golden = sorted(golden_folder.glob("*/config.json"))
    assert len(golden) == 10
    for path in [*golden, *real_configs(shared_data)]:
        config = read(path)
        assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config, path


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0},
        {"rope_type": "default"},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_both_rope_spellings_mean_the_same(scaling):
    old = LlamaConfig.from_hf(BASE | {"rope_theta": 5000.0, "rope_scaling": scaling})
    new = LlamaConfig.from_hf(BASE | {"rope_parameters": {"rope_theta": 5000.0, **scaling}})
    older = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    oldest = LlamaConfig.from_hf(BASE | {"rope_theta": 5000.0, "rope_scaling": older})
    assert old == new == oldest
    assert (old.rope.theta, old.rope.kind) == (5000.0, scaling["rope_type"])


@pytest.mark.parametrize("name", ["llama-2", "llama-3.1", "llama-3.2", "qwen2.5", "qwen3", "qwen3-yarn", "smollm2"])
def test_frequencies_of_published_models_equal_torch(name, golden_folder):
    """float32 [H/2] against transformers in torch, whose power function is off by one unit here and there."""
    llama3 = {"kind": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_positions": 8192}
    rope = {
        "llama-2": Rope(),
        "llama-3.1": Rope(theta=5e5, factor=8.0, **llama3),
        "llama-3.2": Rope(theta=5e5, factor=32.0, **llama3),
        "qwen2.5": Rope(theta=1e6),
        "qwen3": Rope(theta=1e6),
        "qwen3-yarn": Rope(theta=1e6, kind="yarn", factor=4.0, original_max_positions=32768),
        "smollm2": Rope(theta=1e5),
    }[name]
    wanted = np.load(golden_folder / "rope.npz")[name]
    seen, _ = rope.frequencies(2 * len(wanted))
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen, wanted, rtol=1.2e-7, atol=0)
    assert (seen != wanted).sum() <= 1


def test_yarn_scale_equals_transformers(golden_folder):
    for name in ("llama-gqa2-untied-yarn", "qwen3-gqa4-untied-yarn"):
        reference = np.load(golden_folder / name / "reference.npz")
        config = read(golden_folder / name / "config.json")
        frequencies, scale = config.rope.frequencies(config.head_dim)
        np.testing.assert_allclose(scale, reference["rope_scale"], rtol=1e-12)
        np.testing.assert_allclose(frequencies, reference["frequencies"], rtol=1.2e-7)


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("pretraining_tp", 2),
        ("partial_rotary_factor", 0.5),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("quantization_config", {"quant_method": "fp8"}),
        ("num_experts", 8),
        ("no_rope_layers", [1, 1, 0]),
        ("residual_multiplier", 0.22),
        ("hidden_size", None),
        ("vocab_size", "many"),
        ("num_hidden_layers", 0),
        ("num_key_value_heads", 3),
    ],
)
def test_a_field_that_would_change_the_numbers_is_an_error_that_names_it(field, value):
    LlamaConfig.from_hf(BASE)
    with pytest.raises(ConfigError, match=field):
        LlamaConfig.from_hf(BASE | {field: value})


@pytest.mark.parametrize(
    "scaling, named",
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "longrope", "factor": 2.0}, "longrope"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor.*original_max_position"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": 0.7, "original_max_position_embeddings": 32}, "mscale"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_rope_that_is_not_understood_is_an_error_that_names_it(scaling, named):
    with pytest.raises(ValueError, match=named):
        LlamaConfig.from_hf(BASE | {"rope_scaling": scaling})


def test_unknown_architecture_lists_the_known_ones():
    with pytest.raises(ConfigError, match="GPT2LMHeadModel.*LlamaForCausalLM"):
        LlamaConfig.from_hf(BASE | {"architectures": ["GPT2LMHeadModel"]})


def test_sliding_windows_by_layer():
    qwen = BASE | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4}

    def windows(**more):
        return LlamaConfig.from_hf(qwen | more).windows

    assert windows(use_sliding_window=False, max_window_layers=1) is None
    assert windows(use_sliding_window=True, max_window_layers=1) == (0, 4, 4)
    assert windows(use_sliding_window=True, max_window_layers=3) is None
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert windows(use_sliding_window=True, layer_types=kinds) == (4, 0, 0)
    with pytest.raises(ConfigError, match="layer_types"):
        windows(use_sliding_window=True, layer_types=["chunked_attention"] * 3)
    assert LlamaConfig.from_hf(BASE | {"sliding_window": 4, "use_sliding_window": True}).windows is None
