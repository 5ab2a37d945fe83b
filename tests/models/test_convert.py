"""The conversion table: bits survive both ways, and every tensor that doesn't fit is listed."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import models
from models.config import LlamaConfig
from models.convert import check, tensors
from models.files import CheckpointError
from models.rope import Rope

CONFIG = LlamaConfig(
    family="llama", vocab=13, embed=12, layers=2, heads=4, kv_heads=2, head_dim=6, ffw=10, max_positions=32,
    norm_eps=1e-5, rope=Rope(), qkv_bias=True, out_bias=True,
)  # fmt: skip
QWEN3 = LlamaConfig(
    family="qwen3", vocab=13, embed=12, layers=2, heads=4, kv_heads=1, head_dim=6, ffw=10, max_positions=32,
    norm_eps=1e-5, rope=Rope(), tied=True, qk_norm=True,
)  # fmt: skip


def random_bits(config, dtype, seed=0):
    """A checkpoint of any bits at all, infinities and NaNs with payloads among them."""
    rng = np.random.default_rng(seed)
    width = np.dtype(dtype).itemsize
    return {
        t.hf: rng.integers(0, 256, (*t.hf_shape, width), np.uint8).view(dtype)[..., 0] for t in tensors(config)
    }  # fmt: skip


def write(config, arrays, folder):
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("config", [CONFIG, QWEN3], ids=["llama-untied-bias", "qwen3-tied"])
@pytest.mark.parametrize("shard", [None, 700], ids=["one-file", "sharded"])
def test_import_then_export_keeps_every_bit(config, dtype, shard, tmp_path):
    arrays = random_bits(config, dtype)
    lm = models.load(write(config, arrays, tmp_path / "in"))
    assert lm.dtype == dtype and lm.config.dtype == np.dtype(dtype).name
    models.save(lm, tmp_path / "out", **({"max_shard_size": shard} if shard else {}))
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 3) == bool(shard) == (tmp_path / "out" / "model.safetensors.index.json").exists()
    back = {}
    for file in files:
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
        back |= load_file(file)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes(), name
    again = models.load(tmp_path / "out")
    assert again.config == lm.config
    for seen, wanted in zip(flat(again.params), flat(lm.params), strict=True):
        assert seen[0] == wanted[0] and np.asarray(seen[1]).tobytes() == np.asarray(wanted[1]).tobytes()


def flat(tree, path=()):
    if isinstance(tree, dict):
        return [pair for key in sorted(tree) for pair in flat(tree[key], (*path, key))]
    return [(path, tree)]


def test_layouts_against_indexing():
    """Head h of q is rows h*H to (h+1)*H of q_proj; of the output projection, columns."""
    table = {t.hf: t for t in tensors(CONFIG)}
    H, name = CONFIG.head_dim, "model.layers.1.self_attn."
    arrays = random_bits(CONFIG, np.float32)
    for projection, heads in (("q", 4), ("k", 2), ("v", 2)):
        theirs = arrays[f"{name}{projection}_proj.weight"]
        [ours] = table[f"{name}{projection}_proj.weight"].from_hf(theirs)
        assert ours.shape == (12, heads, H)
        for h in range(heads):
            np.testing.assert_array_equal(ours[:, h], theirs[h * H : (h + 1) * H].T)
    theirs = arrays[name + "o_proj.weight"]
    [ours] = table[name + "o_proj.weight"].from_hf(theirs)
    for h in range(4):
        np.testing.assert_array_equal(ours[h], theirs[:, h * H : (h + 1) * H].T)
    assert table["model.layers.1.mlp.down_proj.weight"].ours == (("layers_1", "mlp", "down", "kernel"),)


def test_one_error_lists_everything_that_does_not_fit():
    shapes = {t.hf: t.hf_shape for t in tensors(CONFIG)}
    check(CONFIG, shapes, "here")
    del shapes["model.norm.weight"], shapes["model.layers.1.self_attn.q_proj.bias"]
    shapes["model.layers.2.mlp.up_proj.weight"] = shapes["model.layers.0.mlp.extra"] = (3,)
    shapes["model.layers.0.self_attn.k_proj.weight"] = (12, 12, 1)
    with pytest.raises(CheckpointError) as error:
        check(CONFIG, shapes, "here")
    message = str(error.value)
    for part in (
        "here",
        "missing: model.layers.1.self_attn.q_proj.bias, model.norm.weight",
        "unknown: model.layers.0.mlp.extra, model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.k_proj.weight has shape (12, 12, 1), wanted (12, 12)",
    ):
        assert part in message


def test_rotary_buffers_are_ignored_and_nothing_like_them():
    shapes = {t.hf: t.hf_shape for t in tensors(CONFIG)}
    shapes |= {"model.layers.0.self_attn.rotary_emb.inv_freq": (3,), "model.rotary_emb.inv_freq": (3,)}
    check(CONFIG, shapes, "here")
    with pytest.raises(CheckpointError, match="unknown: model.layers.0.rotary_emb.inv_freq"):
        check(CONFIG, shapes | {"model.layers.0.rotary_emb.inv_freq": (3,)}, "here")


def test_tied_checkpoint_may_hold_a_copy_of_the_embedding(tmp_path):
    arrays = random_bits(QWEN3, np.float32)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    lm = models.load(write(QWEN3, arrays, tmp_path / "copy"))
    assert "lm_head" not in lm.params
    arrays["lm_head.weight"].view(np.uint32)[2, 3] ^= 1
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        models.load(write(QWEN3, arrays, tmp_path / "other"))


def test_conversion_to_bfloat16_rounds_to_nearest_even(tmp_path):
    rng = np.random.default_rng(3)
    arrays = {t.hf: rng.standard_normal(t.hf_shape, np.float32) for t in tensors(QWEN3)}
    folder = write(QWEN3, arrays, tmp_path / "in")
    lm = models.load(folder, dtype="bfloat16")
    assert {str(leaf.dtype) for _, leaf in flat(lm.params)} == {"bfloat16"} and lm.config.dtype == "bfloat16"
    bits = arrays["model.embed_tokens.weight"].view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(np.asarray(lm.params["embed"]["embedding"]).view(np.uint16), rounded)
    models.save(lm, tmp_path / "half")
    back = models.load(tmp_path / "half", dtype="float32").params["embed"]["embedding"]
    np.testing.assert_array_equal(np.asarray(back).view(np.uint32) >> 16, rounded)


def test_conversion_to_float16_refuses_what_does_not_fit(tmp_path):
    arrays = {t.hf: np.ones(t.hf_shape, np.float32) for t in tensors(QWEN3)}
    arrays["model.layers.1.mlp.up_proj.weight"][0, 0] = 70_000
    folder = write(QWEN3, arrays, tmp_path / "in")
    with pytest.raises(CheckpointError, match="model.layers.1.mlp.up_proj.weight.*float16"):
        models.load(folder, dtype="float16")


def test_stacked_parameters_are_saved_like_unrolled_ones(tmp_path):
    lm = models.load(write(CONFIG, random_bits(CONFIG, np.float32), tmp_path / "in"))
    stacked = type(lm)(models.ScannedLlama(lm.config), models.stack_layers(lm.params))
    models.save(lm, tmp_path / "a")
    models.save(stacked, tmp_path / "b")
    a, b = ((tmp_path / side / "model.safetensors").read_bytes() for side in "ab")
    assert a == b
