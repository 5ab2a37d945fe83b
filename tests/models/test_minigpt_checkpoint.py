"""MiniGPT and ConfidenceAwareGPT as checkpoints: GPT-2 as transformers computes and stores it, and what is ours."""

import dataclasses
import importlib.util
import json
import math
import shutil
from pathlib import Path

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
import nmjax
from experiments.convert import convert
from models.convert import tensors
from models.files import CheckpointError
from models.hf_config import ConfigError
from nmjax.lm import LanguageModel

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = {"vocab": 13, "embed": 12, "layers": 2, "heads": 3, "max_positions": 9}
MINI = models.MiniGPTConfig(**SIZES, dropout=0.25, gelu="tanh", bos_id=3, eos_ids=(4, 5), pad_id=0)
CONFIDENT = models.ConfidenceConfig(**SIZES, norm_eps=1e-6, confidence_init_bias=None, feedback=2)
BOTH = pytest.mark.parametrize("config", [MINI, CONFIDENT], ids=lambda config: config.family)


@pytest.fixture(scope="module", params=["exact", "tanh"])
def gpt2(request):
    """A tiny GPT-2 that transformers wrote, and what it computes: tokens_i [T], logits_i [T, V], greedy [30]."""
    return models.load(GOLDEN / "minigpt" / request.param), reference(request.param)


def reference(name):
    return dict(np.load(GOLDEN / "minigpt" / name / "reference.npz"))


def close_to(wanted):
    return {"rtol": 0, "atol": 1e-5 * max(1.0, np.abs(wanted).max())}


def random_bits(config, dtype=np.float32, seed=0):
    """A checkpoint of any bits at all, infinities and NaNs with payloads among them."""
    rng = np.random.default_rng(seed)
    width = np.dtype(dtype).itemsize
    return {t.hf: rng.integers(0, 256, (*t.hf_shape, width), np.uint8).view(dtype)[..., 0] for t in tensors(config)}


def write(config, arrays, folder):
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return folder


def flat(params):
    return {"/".join(path): np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(params).items()}


def same_bits(seen, wanted):
    assert seen.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (seen[name].dtype, seen[name].shape) == (array.dtype, array.shape), name
        assert seen[name].tobytes() == array.tobytes(), name


def batch(wanted, left_padded):
    """The golden rows, left-padded, and behind them a prompt with what transformers' greedy `generate` writes then."""
    rows = [wanted[f"tokens_{i}"] for i in range(3)]
    return left_padded([*rows, np.concatenate([rows[0][:5], wanted["greedy"]])])


def test_logits_and_greedy_choices_equal_transformers(gpt2, logits, left_padded):
    """A ragged batch; the reference ran every row alone."""
    lm, wanted = gpt2
    tokens, mask = batch(wanted, left_padded)
    seen = logits(lm.module, lm.params, tokens, mask)
    assert isinstance(lm.module, models.MiniGPT) and seen.dtype == np.float32
    for i in range(3):
        here = wanted[f"logits_{i}"]
        np.testing.assert_allclose(seen[i, -len(here) :], here, **close_to(here))
    assert len(set(wanted["greedy"])) >= 7
    np.testing.assert_array_equal(seen[3, -31:-1].argmax(-1), wanted["greedy"])


def test_goldens_can_tell_the_two_gelus_and_two_positions_apart(logits, left_padded):
    lm, wanted = models.load(GOLDEN / "minigpt" / "tanh"), reference("tanh")
    here, (tokens, mask) = wanted["logits_0"], batch(wanted, left_padded)
    other = models.MiniGPT(dataclasses.replace(lm.config, gelu="exact"))
    assert np.abs(logits(other, lm.params, tokens, mask)[0] - here).max() > 10 * close_to(here)["atol"]
    tokens[0, [3, 30]] = tokens[0, [30, 3]]
    assert np.abs(logits(lm.module, lm.params, tokens, mask)[0, -1] - here[-1]).max() > 100 * close_to(here)["atol"]


@pytest.mark.slow
def test_greedy_generation_equals_transformers(gpt2):
    lm, wanted = gpt2
    out = nmjax.generate(lm, [wanted["tokens_0"][:5].tolist()], max_new_tokens=30)
    assert len(set(out.tokens[0])) >= 7 and out.tokens[0] == wanted["greedy"].tolist()


def test_confidence_told_nothing_is_gpt2_whose_norms_are_its_scales_and_shifts(tmp_path, logits, left_padded):
    """`1 + s` in place of a norm's weight, `b` of its bias: the halves of `adaptive_1` and `adaptive_2` in this order.

    With no feedback the signal is 0, whatever it is multiplied with.
    """
    source, wanted = GOLDEN / "minigpt" / "exact", reference("exact")
    arrays = load_file(source / "model.safetensors")
    rng = np.random.default_rng(1)
    for name in [name for name in arrays if ".ln_1." in name or ".ln_2." in name]:
        if name.endswith("weight"):
            scale, shift = arrays.pop(name), arrays.pop(name.replace("weight", "bias"))
            there = name.replace("ln_", "adaptive_").removesuffix(".weight")
            arrays[f"{there}.bias"] = np.concatenate([scale - 1, shift])
            arrays[f"{there}.weight"] = rng.standard_normal((2 * len(scale), 1), np.float32)
    D = models.load(source).config.embed
    arrays["confidence_predictor.weight"] = rng.standard_normal((1, D), np.float32)
    arrays["confidence_predictor.bias"] = np.full(1, 2, np.float32)
    sizes = {"vocab": 61, "embed": D, "layers": 2, "heads": 2, "max_positions": 48}
    lm = models.load(write(models.ConfidenceConfig(**sizes, feedback=0), arrays, tmp_path))
    assert isinstance(lm.module, models.ConfidenceAwareGPT)
    seen = logits(lm.module, lm.params, *batch(wanted, left_padded))[0]
    np.testing.assert_allclose(seen, wanted["logits_0"], **close_to(wanted["logits_0"]))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shard", [None, 900], ids=["one-file", "sharded"])
@BOTH
def test_import_then_export_keeps_every_bit(config, dtype, shard, tmp_path):
    arrays = random_bits(config, dtype)
    lm = models.load(write(config, arrays, tmp_path / "in"))
    assert lm.config == dataclasses.replace(config, dtype=np.dtype(dtype).name) and type(lm.config) is type(config)
    models.save(lm, tmp_path / "out", **({"max_shard_size": shard} if shard else {}))
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 3) == bool(shard)
    same_bits({name: array for file in files for name, array in load_file(file).items()}, arrays)
    again = models.load(tmp_path / "out")
    assert again.config == lm.config and again.fingerprint == lm.fingerprint
    same_bits(flat(again.params), flat(lm.params))


@BOTH
def test_the_table_names_what_the_model_has(config):
    module = models.MiniGPT(config) if config is MINI else models.ConfidenceAwareGPT(config)
    params = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    shapes = {"/".join(path): leaf.shape for path, leaf in flax.traverse_util.flatten_dict(params).items()}
    assert shapes == {"/".join(path): t.shape for t in tensors(config) for path in t.ours}


def test_layouts_against_indexing(tmp_path):
    """c_attn holds queries, keys, values one after the other, each N heads of H; Conv1D has its input axis first."""
    arrays = random_bits(CONFIDENT)
    layer = models.load(write(CONFIDENT, arrays, tmp_path)).params["layers_1"]
    D, H = CONFIDENT.embed, CONFIDENT.head_dim
    packed, bias = (arrays[f"transformer.h.1.attn.c_attn.{kind}"] for kind in ("weight", "bias"))
    for part, name in enumerate("qkv"):
        for head in range(CONFIDENT.heads):
            columns = slice(part * D + head * H, part * D + (head + 1) * H)
            np.testing.assert_array_equal(layer["attn"][name]["kernel"][:, head], packed[:, columns])
            np.testing.assert_array_equal(layer["attn"][name]["bias"][head], bias[columns])
    out = arrays["transformer.h.1.attn.c_proj.weight"]
    np.testing.assert_array_equal(layer["attn"]["o"]["kernel"][2], out[2 * H :])
    np.testing.assert_array_equal(layer["mlp"]["up"]["kernel"], arrays["transformer.h.1.mlp.c_fc.weight"])
    np.testing.assert_array_equal(layer["mlp"]["down"]["kernel"], arrays["transformer.h.1.mlp.c_proj.weight"])
    scale, shift = layer["mlp_norm"]["kernel"][0]
    np.testing.assert_array_equal(np.concatenate([scale, shift]), arrays["transformer.h.1.adaptive_2.weight"][:, 0])


def test_names_without_the_first_word_and_with_old_buffers(tmp_path):
    """The published gpt2 says `wte.weight`; old checkpoints carry the causal mask and a copy of the tied table."""
    arrays = random_bits(MINI)
    wanted = flat(models.load(write(MINI, arrays, tmp_path / "in")).params)
    bare = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    bare |= {f"h.{i}.attn.bias": np.tri(9, dtype=bool)[None, None] for i in range(2)}
    bare |= {f"h.{i}.attn.masked_bias": np.float32(-1e4)[None] for i in range(2)}
    bare["lm_head.weight"] = bare["wte.weight"].copy()
    same_bits(flat(models.load(write(MINI, bare, tmp_path / "bare")).params), wanted)
    bare["lm_head.weight"].view(np.uint32)[2, 3] ^= 1
    with pytest.raises(CheckpointError, match="lm_head.weight differs from transformer.wte.weight"):
        models.load(write(MINI, bare, tmp_path / "bare"))


def test_one_error_lists_everything_that_does_not_fit(tmp_path):
    arrays = random_bits(CONFIDENT)
    del arrays["confidence_predictor.bias"], arrays["transformer.h.1.attn.c_attn.bias"]
    arrays["transformer.h.0.attn.c_attn.weight"] = arrays["transformer.h.0.attn.c_attn.weight"].T
    arrays["transformer.h.0.ln_1.weight"] = arrays["transformer.h.2.attn.c_attn.bias"] = np.ones(12, np.float32)
    with pytest.raises(CheckpointError) as error:
        models.load(write(CONFIDENT, arrays, tmp_path))
    for part in (
        str(tmp_path),
        "missing: transformer.h.1.attn.c_attn.bias, confidence_predictor.bias",
        "unknown: transformer.h.0.ln_1.weight, transformer.h.2.attn.c_attn.bias",
        "transformer.h.0.attn.c_attn.weight has shape (36, 12), wanted (12, 36)",
    ):
        assert part in str(error.value)


def test_save_lists_parts_of_a_packed_tensor_that_do_not_go_together(tmp_path):
    lm = models.load(write(MINI, random_bits(MINI), tmp_path / "in"))
    params = flax.traverse_util.flatten_dict(lm.params, sep="/")
    params["layers_0/attn/k/kernel"] = params["layers_0/attn/k/kernel"].astype("bfloat16")
    params["layers_1/attn/v/bias"] = params["layers_1/attn/v/bias"][:2]
    del params["layers_1/attn/q/kernel"]
    with pytest.raises(CheckpointError) as error:
        models.save(LanguageModel(lm.module, flax.traverse_util.unflatten_dict(params, sep="/")), tmp_path / "out")
    for part in (
        "layers_0/attn/k/kernel is bfloat16, wanted float32 as the others in transformer.h.0.attn.c_attn.weight",
        "layers_1/attn/v/bias has shape (2, 4), wanted (3, 4)",
        "layers_1/attn/q/kernel is missing",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_parameter_counts():
    """The closed form of GPT-2, and a reference implementation's counts at d 256, 6 layers, 128 and 129 positions."""

    def count(config):
        return sum(math.prod(t.hf_shape) for t in tensors(config))

    V, P, D, L = MINI.vocab, MINI.max_positions, MINI.embed, MINI.layers
    assert count(MINI) == V * D + P * D + L * (12 * D * D + 13 * D) + 2 * D
    assert count(CONFIDENT) - count(MINI) == 4 * D * L + D + 1
    sizes = {"vocab": 50257, "embed": 256, "layers": 6, "heads": 8}
    assert count(models.MiniGPTConfig(**sizes, max_positions=128)) == 17_637_632
    assert count(models.ConfidenceConfig(**sizes, max_positions=129)) == 17_644_289


def test_the_published_gpt2(shared_data):
    config = models.MiniGPTConfig.from_hf(json.loads((shared_data / "configs" / "mlc_preset.gpt2.json").read_text()))
    assert sum(math.prod(t.hf_shape) for t in tensors(config)) == 124_439_808
    assert config == models.MiniGPTConfig(
        vocab=50257, embed=768, layers=12, heads=12, max_positions=1024, dropout=0.1, gelu="tanh", bos_id=50256,
        eos_ids=(50256,),
    )  # fmt: skip


@pytest.mark.parametrize("gelu, names", [("exact", ["gelu"]), ("tanh", ["gelu_new", "gelu_pytorch_tanh", None])])
def test_gelu_by_its_names(gelu, names):
    hf = dataclasses.replace(MINI, gelu=gelu).to_hf()
    assert hf["activation_function"] == names[0]
    for name in names:
        assert models.MiniGPTConfig.from_hf(hf | {"activation_function": name}).gelu == gelu


@pytest.mark.parametrize(
    "field, value",
    [
        ("activation_function", "relu"),
        ("n_inner", 50),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"quant_method": "gptq"}),
        ("n_embd", None),
        ("n_layer", 0),
        ("vocab_size", "many"),
        ("layer_norm_epsilon", "small"),
        ("resid_pdrop", True),
        ("confidence_init_bias", "two"),
        ("feedback", -1),
        ("feedback", 1.5),
    ],
)
def test_a_field_that_would_change_the_numbers_is_an_error_that_names_it(field, value):
    hf = CONFIDENT.to_hf() | {"n_inner": 48, "pruned_heads": {}, "scale_attn_weights": True}
    assert models.ConfidenceConfig.from_hf(hf) == CONFIDENT
    with pytest.raises(ConfigError, match=field):
        models.ConfidenceConfig.from_hf(hf | {field: value})


def test_sizes_that_do_not_go_together_and_unknown_architectures(tmp_path):
    folder = write(MINI, random_bits(MINI), tmp_path)
    for wrong, parts in (
        ({"n_head": 5}, "heads must divide embed=12, got 5"),
        ({"resid_pdrop": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        (
            {"architectures": ["GPTNeoForCausalLM"]},
            "GPTNeoForCausalLM.*'ConfidenceAwareGPT', 'GPT2LMHeadModel', ",
        ),
    ):
        (folder / "config.json").write_text(json.dumps(MINI.to_hf() | wrong))
        with pytest.raises(CheckpointError, match=f"{folder}.*{parts}"):
            models.load(folder)
    with pytest.raises(ConfigError, match=r"'GPT2LMHeadModel' is unknown, wanted one of \['ConfidenceAwareGPT'\]"):
        models.ConfidenceConfig.from_hf(MINI.to_hf())
    with pytest.raises(ValueError, match="gelu must be 'exact' or 'tanh', got 'erf'"):
        dataclasses.replace(MINI, gelu="erf")


@BOTH
def test_convert_command(config, tmp_path, capsys):
    convert(str(write(config, random_bits(config), tmp_path / "in")), tmp_path / "out", None)
    assert f"out: {config.family}, " in capsys.readouterr().out
    same_bits(load_file(tmp_path / "out" / "model.safetensors"), random_bits(config))


def _make_minigpt():
    spec = importlib.util.spec_from_file_location("make_minigpt", GOLDEN / "make_minigpt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parity
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("fields", [{}, {"n_head": 4, "n_layer": 3, "layer_norm_epsilon": 1e-3}, {"n_inner": 64}])
def test_live_logits_and_greedy_tokens(activation, fields, tmp_path, logits, left_padded):
    pytest.importorskip("torch")
    make = _make_minigpt()
    model = make.build(7, activation_function=activation, **fields)
    model.save_pretrained(tmp_path)
    lm, rows = models.load(tmp_path), make.rows(1)
    tokens, mask = left_padded(rows)
    seen = logits(lm.module, lm.params, tokens, mask)
    for i, row in enumerate(rows):
        wanted = make.reference(model, row)
        np.testing.assert_allclose(seen[i, tokens.shape[1] - len(row) :], wanted, **close_to(wanted))
    out = nmjax.generate(lm, [rows[0][:5].tolist()], max_new_tokens=30, eos_token_id=[])
    assert out.tokens[0] == make.greedy(model, rows[0][:5], 30).tolist()


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard", [None, 9_000], ids=["one-file", "sharded"])
def test_what_we_save_transformers_reads_with_identical_logits(dtype, shard, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    def read(folder):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        return model.eval()

    source = GOLDEN / "minigpt" / "tanh"
    models.save(models.load(source, dtype=dtype), tmp_path, **({"max_shard_size": shard} if shard else {}))
    original, crossed = read(source), read(tmp_path)
    row = torch.from_numpy(_make_minigpt().rows()[0].astype(np.int64))[None]
    with torch.no_grad():
        assert torch.equal(original(row).logits, crossed(row).logits)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "activation_function"):
        assert getattr(crossed.config, key) == getattr(original.config, key)


@pytest.mark.parity
def test_a_bare_decoder_of_transformers_loads(tmp_path):
    pytest.importorskip("torch")
    model = _make_minigpt().build(7)
    model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "bare")
    assert "wte.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    shutil.copyfile(tmp_path / "whole" / "config.json", tmp_path / "bare" / "config.json")
    same_bits(flat(models.load(tmp_path / "bare").params), flat(models.load(tmp_path / "whole").params))
