"""`load` and `save`: the files, and one clear error for each way they can be wrong."""

import json
import logging
import os
import shutil
import stat
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models.files import CheckpointError
from nmjax.lm import LanguageModel
from nmjax.training.sharding import make_mesh, shardings

NAME = "qwen2-gqa2-tied"


@pytest.fixture
def folder(golden_folder, tmp_path):
    """A copy of a good checkpoint, to be spoilt."""
    return shutil.copytree(golden_folder / NAME, tmp_path / "model", copy_function=shutil.copyfile)


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shard(folder):
    """The same checkpoint in several files."""
    models.save(models.load(folder), folder, max_shard_size=30_000)
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def fails(folder, *parts, **kwargs):
    with pytest.raises(CheckpointError) as error:
        models.load(folder, **kwargs)
    for part in parts:
        assert part in str(error.value)


def test_load_reads_what_is_stored(golden_folder):
    lm = models.load(str(golden_folder / NAME))
    stored = load_file(golden_folder / NAME / "model.safetensors")
    np.testing.assert_array_equal(lm.params["embed"]["embedding"], stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        lm.params["layers_1"]["mlp"]["gate"]["kernel"], stored["model.layers.1.mlp.gate_proj.weight"].T
    )
    assert lm.tokenizer is None and lm.dtype == np.float32


def test_parameters_on_the_host_are_the_same_and_stack_to_the_same(golden_folder):
    lm, half = models.load(golden_folder / NAME), models.load(golden_folder / NAME, "bfloat16")
    for wanted, host in (
        (lm, models.load(golden_folder / NAME, host=True)),
        (half, models.load(golden_folder / NAME, "bfloat16", host=True)),
    ):
        leaves = jax.tree.leaves(host.params)
        assert {type(leaf) for leaf in leaves} == {np.ndarray} and host.fingerprint == wanted.fingerprint
        stacked, here = models.stack_layers(host.params), models.stack_layers(wanted.params)
        assert {type(leaf) for leaf in jax.tree.leaves(stacked)} == {type(jax.tree.leaves(wanted.params)[0])}
        jax.tree.map(np.testing.assert_array_equal, stacked, here)
    mesh = make_mesh("fsdp=1", jax.devices()[:1])
    places = shardings(jax.eval_shape(models.stack_layers, lm.params), mesh)
    spread = models.stack_layers(models.load(golden_folder / NAME, host=True).params, places)
    jax.tree.map(np.testing.assert_array_equal, spread, models.stack_layers(lm.params))
    assert jax.tree.map(lambda leaf: leaf.sharding, spread) == places


def test_parameters_do_not_depend_on_the_file_any_more(folder):
    lm = models.load(folder)
    before = np.array(lm.params["embed"]["embedding"])
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 40_000)
    np.testing.assert_array_equal(lm.params["embed"]["embedding"], before)


def test_end_of_sequence_ids_of_generation_config_win(folder):
    edit(folder / "config.json", eos_token_id=2)
    edit(folder / "generation_config.json", eos_token_id=[5, 7])
    lm = models.load(folder)
    assert lm.config.eos_ids == lm.eos_ids == (5, 7)
    models.save(lm, folder)
    assert models.load(folder).config == lm.config
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [5, 7]
    edit(folder / "config.json", eos_token_id=[3, 4])
    edit(folder / "generation_config.json", eos_token_id=None)
    assert models.load(folder).config.eos_ids == (3, 4)
    (folder / "generation_config.json").unlink()
    assert models.load(folder).config.eos_ids == (3, 4)


def test_tokenizer_and_chat_template_travel(shared_data, folder, tmp_path):
    for path in (shared_data / "tok-smollm2").iterdir():
        shutil.copyfile(path, folder / path.name)
    lm = models.load(folder)
    ids = lm.tokenizer("An odd wörd, 12 times\n")["input_ids"]
    chat = [{"role": "user", "content": "Hello"}]
    text = lm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>user\nHello<|im_end|>" in text and lm.tokenizer.decode(ids) == "An odd wörd, 12 times\n"
    models.save(lm, tmp_path / "again")
    assert "local" not in (tmp_path / "again" / "tokenizer_config.json").read_text()  # how it was read stays behind
    tokenizer = models.load(tmp_path / "again").tokenizer
    assert tokenizer("An odd wörd, 12 times\n")["input_ids"] == ids
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == text


def test_tokenizer_of_a_family_that_transformers_does_not_know(tmp_path, caplog):
    """It travels, and nobody is warned of a `model of type` something."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["?", *"abcdefg"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "?")), unk_token="?")
    module = models.ConfidenceAwareGPT(models.ConfidenceConfig(vocab=8, embed=4, layers=1, heads=1, max_positions=6))
    params = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    models.save(LanguageModel(module, zeros, tokenizer), tmp_path)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        lm = models.load(tmp_path)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert lm.encode("c") == [3] and lm.tokenizer.decode([3]) == "c" and not caplog.text


def test_save_replaces_an_earlier_checkpoint_and_nothing_else(folder):
    (folder / "README.md").write_text("mine")
    lm = models.load(folder)
    weight_map = shard(folder)
    assert not (folder / "model.safetensors").exists() and len(set(weight_map.values())) > 2
    models.save(lm, folder)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "reference.npz",
    }  # fmt: skip
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("*[ng].safetensors")} | {
        stat.S_IMODE((folder / "model.safetensors").stat().st_mode),
        stat.S_IMODE((folder / "config.json").stat().st_mode),
    }
    assert len(modes) == 1, "weights must be as readable as the rest"


def test_a_save_that_fails_leaves_the_earlier_checkpoint(folder):
    lm = models.load(folder)

    class Broken:
        def save_pretrained(self, _):
            raise OSError("disk full")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        models.save(type(lm)(lm.module, lm.params, Broken()), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_save_lists_parameters_that_are_not_the_models(golden, tmp_path):
    lm = golden(NAME).lm
    spoilt = {**lm.params, "adapter": {"a": np.ones(3, np.float32)}, "final_norm": {"scale": np.ones(3, np.float32)}}
    del spoilt["layers_1"]
    with pytest.raises(CheckpointError) as error:
        models.save(type(lm)(lm.module, spoilt), tmp_path / "out")
    for part in ("layers_1/mlp/up/kernel is missing", "adapter/a is unknown", "scale has shape (3,), wanted (32,)"):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_the_project_are_found_by_name(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "home" / "checkpoints" / "mine")
    monkeypatch.setenv("NMJAX_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert models.load("checkpoints/mine").config == models.load("mine").config == models.load(folder).config


def test_missing_folder(tmp_path):
    fails(tmp_path / "nowhere", str(tmp_path / "nowhere"))
    fails("surely-no-such-model", "surely-no-such-model", "owner/name")
    fails("checkpoints/surely-no-such-model", "surely-no-such-model")
    (tmp_path / "file").write_text("")
    fails(tmp_path / "file", "is a file")


def test_hub_failure_is_one_error_with_the_id(monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network here\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="'somebody/some-model'.*no network here$") as error:
        models.load("somebody/some-model")
    assert isinstance(error.value.__cause__, huggingface_hub.errors.LocalEntryNotFoundError)


def test_hub_download_asks_for_safetensors_only(monkeypatch, folder):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    there = ["config.json", "model.safetensors", "pytorch_model.bin", "original/consolidated.00.pth", "tokenizer.json",
             "original/params.json", "onnx/model.onnx", "consolidated.safetensors", "training_args.bin", "README.md",
             "merges.txt", "vocab.json", "chat_template.jinja", "evil.py"]  # fmt: skip
    taken = []

    def download(name, allow_patterns, ignore_patterns):
        taken.extend(filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models.load("somebody/some-model").config.family == "qwen2"
    assert set(taken) == {"config.json", "model.safetensors", "tokenizer.json", "merges.txt", "vocab.json",
                          "chat_template.jinja"}  # fmt: skip


def test_bad_config_files(folder):
    (folder / "config.json").rename(folder / "aside")
    fails(folder, str(folder / "config.json"), "does not exist")
    (folder / "config.json").write_text("{")
    fails(folder, str(folder / "config.json"), "not valid JSON")
    (folder / "config.json").write_text("[]")
    fails(folder, str(folder / "config.json"), "list")
    shutil.copyfile(folder / "aside", folder / "config.json")
    edit(folder / "config.json", architectures=["MambaForCausalLM"])
    fails(folder, str(folder), "MambaForCausalLM")
    shutil.copyfile(folder / "aside", folder / "config.json")
    edit(folder / "config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4})
    fails(folder, str(folder), "dynamic")


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails(folder, str(folder), "pytorch_model.bin", "convert them to safetensors")
    (folder / "pytorch_model.bin").unlink()
    fails(folder, str(folder), "neither model.safetensors nor model.safetensors.index.json")


def test_truncated_and_corrupted_files_are_named(folder):
    path = folder / "model.safetensors"
    good = path.read_bytes()
    short = [good[:-1], good[:1000], good[:4], b""]
    for bad in (*short, b"\xff" * 8 + good[8:], good[:9] + b"!!!!" + good[13:], good + b"x"):
        path.write_bytes(bad)
        fails(folder, str(path), "truncated or corrupted")


def test_an_index_that_does_not_fit(folder):
    weight_map = shard(folder)
    models.load(folder)
    index = folder / "model.safetensors.index.json"
    last = sorted(set(weight_map.values()))[-1]
    (folder / last).rename(folder / "aside")
    fails(folder, str(index), last)
    (folder / last).write_bytes((folder / "aside").read_bytes()[:-3])
    fails(folder, str(folder / last), "truncated or corrupted")
    save_file({"model.norm.weight": np.ones(32, np.float32), **load_file(folder / "aside")}, folder / last)
    save_file({"model.norm.weight": np.ones(32, np.float32)}, folder / "more.safetensors")
    edit(index, weight_map=weight_map | {"more": "more.safetensors"})
    fails(folder, "model.norm.weight", "more.safetensors")
    for bad in ({}, [], None):
        edit(index, weight_map=bad)
        fails(folder, str(index), "weight_map")


def test_dtypes(folder):
    fails(folder, "dtype='float64'", "bfloat16", dtype="float64")
    arrays = load_file(folder / "model.safetensors")
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.int8)
    save_file(arrays, folder / "model.safetensors")
    fails(folder, "model.norm.weight is I8")


def test_tokenizer_that_can_not_be_read(folder):
    (folder / "tokenizer.json").write_text("{}")
    fails(folder, str(folder), "tokenizer")


def test_convert_command(golden_folder, tmp_path):
    def run(*flags):
        command = [sys.executable, "-m", "experiments.convert", *flags]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, cwd=golden_folder.parents[2], env=environment, capture_output=True, text=True)

    done = run(f"--model={golden_folder / NAME}", "--output", str(tmp_path / "out"), "--dtype=float16")
    assert done.returncode == 0, done.stderr
    assert "qwen2" in done.stdout and "float16" in done.stdout and "reading: 100%" in done.stderr
    assert models.load(tmp_path / "out").dtype == np.float16
    failed = run(f"--model={tmp_path / 'nowhere'}", f"--output={tmp_path / 'out2'}")
    assert failed.returncode == 1 and "nowhere" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.slow
def test_memory_of_a_load_is_the_model_and_little_else():
    """The growth of anonymous memory over the bytes of a checkpoint of 0.3 GB whose largest leaf is 5% of it."""
    command = [sys.executable, "-m", "experiments.benchmark_load", "--gigabytes=0.3", "--output=/dev/stdout"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert 0.04 < result["largest_leaf_share"] <= 0.05
    assert result["growth_over_checkpoint_bytes"] < 1.15
