"""Checkpoints in Hugging Face format: `load` and `save`.

Weights are read leaf by leaf from mapped files, so loading takes the memory of the model and little else. Nothing here
executes what a checkpoint brings: safetensors and JSON only, no pickle.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from models.config import ConfigError, LlamaConfig
from models.convert import CheckpointError, Tensor, check, tensors
from models.llama import Llama
from models.mapped import FLOATS, BadFileError, Stored, open_file
from nmjax.lm import LanguageModel

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_ALIGNMENT = 64
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_HUB_IGNORED = ["*/*", "consolidated*", "adapter_*"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

Progress = Callable[[list[Tensor]], Any]  # wraps the iteration over tensors, as `tqdm.tqdm` does


def load(model: str | Path, dtype: str | None = None, *, progress: Progress = iter) -> LanguageModel:
    """Reads a checkpoint in Hugging Face format.

    Args:
      model: a folder (as given, or relative to the project), else the id of a model on the hub.
      dtype: 'float32', 'bfloat16' or 'float16' converts every tensor; None keeps each as it is stored.
      progress: wraps the list of tensors while they load; `tqdm.tqdm` shows a bar.
    Returns:
      The model with layers unrolled (`layers_0`, `layers_1`, ...) on the default device. Its tokenizer is None where
      the folder has none; `eos_ids` are those of generation_config.json if it names any, else of config.json.
    Raises:
      CheckpointError: anything in the way of a faithful model, naming the file or tensor.
    """
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype={dtype!r} is not supported, wanted None or one of {list(DTYPES)}")
    folder = find(model)
    config = _config(folder)
    stored = _open(folder)
    table = check(config, {name: tensor.shape for name, tensor in stored.items()}, str(folder))
    _check_dtypes(folder, table, stored)
    params: dict = {}
    for tensor in progress(table):
        _insert(params, tensor.ours, _place(tensor.from_hf(stored[tensor.hf].view()), dtype, tensor.hf))
    if config.tied and "lm_head.weight" in stored:
        _check_tied_head(folder, stored)
    return LanguageModel(module=Llama(config), params=params, tokenizer=_tokenizer(folder))


def find(model: str | Path) -> Path:
    """The folder of a checkpoint: as given, relative to the project, or downloaded from the hub.

    Raises:
      CheckpointError: nothing there, and the hub doesn't have it or can't be reached.
    """
    if (folder := Path(model).expanduser()).is_dir():
        return folder
    with contextlib.suppress(ImportError):
        from nmjax import paths

        if (known := paths.checkpoint_dir(str(model))) and Path(known).is_dir():
            return Path(known)
    if Path(model).is_file():
        raise CheckpointError(f"{model} is a file, wanted the folder of a checkpoint")
    if str(model).count("/") != 1 or str(model)[0] in "./~" or str(model).endswith("/"):
        raise CheckpointError(f"no checkpoint folder {model}, and that is no hub id either (owner/name)")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(str(model), allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED)
        )
    except Exception as error:  # the hub client raises a dozen kinds, and their meaning here is one
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"no checkpoint folder {model}, and the hub gave no model {str(model)!r}: {type(error).__name__}: {reason}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      CheckpointError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, wanted a JSON object")
    return value


def _config(folder: Path) -> LlamaConfig:
    """config.json, with the end-of-sequence ids of generation_config.json where it names any (as in transformers)."""
    try:
        config = LlamaConfig.from_hf(read_json(folder / "config.json"))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if (folder / "generation_config.json").exists():
        eos = read_json(folder / "generation_config.json").get("eos_token_id")
        if eos is not None:
            config = dataclasses.replace(config, eos_ids=tuple(eos) if isinstance(eos, list) else (eos,))
    return config


def _open(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, from whichever file holds it."""
    stored: dict[str, Stored] = {}
    for path in weight_files(folder):
        try:
            tensors_here = open_file(path)
        except BadFileError as error:
            raise CheckpointError(str(error)) from error
        twice = sorted(stored.keys() & tensors_here.keys())
        if twice:
            raise CheckpointError(f"{path} holds {', '.join(twice)}, which {stored[twice[0]].path.name} holds too")
        stored |= tensors_here
    return stored


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or else what the index names.

    Raises:
      CheckpointError: there are none, or the index names one that is not there.
    """
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    if not (folder / _INDEX).exists():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{folder} holds pickled weights only ({', '.join(pickles)}), which can run code when read: "
                f"convert them to safetensors (in transformers: model.save_pretrained)"
            )
        raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX}")
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / _INDEX}: weight_map={weight_map!r}, wanted tensor name -> file name")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{folder / _INDEX} names files which do not exist: {', '.join(missing)}")
    return [folder / name for name in names]


def _check_dtypes(folder: Path, table: list[Tensor], stored: dict[str, Stored]) -> None:
    wrong = [f"{t.hf} is {stored[t.hf].kind}" for t in table if stored[t.hf].kind not in FLOATS]
    if wrong:
        raise CheckpointError(f"{folder}: wanted tensors of {', '.join(FLOATS)}, but {'; '.join(wrong)}")


def _check_tied_head(folder: Path, stored: dict[str, Stored]) -> None:
    head, embedding = stored["lm_head.weight"], stored["model.embed_tokens.weight"]
    same = (head.kind, head.shape) == (embedding.kind, embedding.shape)
    # Bits, not values: NaN differs from itself, and -0 equals 0.
    if not (same and np.array_equal(head.view().view(np.uint8), embedding.view().view(np.uint8))):
        raise CheckpointError(
            f"{folder}: config.json says tie_word_embeddings=true, but lm_head.weight differs from "
            "model.embed_tokens.weight; set it to false to use this lm_head"
        )


def _place(leaf: np.ndarray, dtype: str | None, name: str) -> jax.Array:
    """A view of the file -> the parameter, in memory of its own.

    On CPU the device takes over an array aligned to 64 bytes instead of copying it, so the memory is allocated that way
    and never touched again.
    """
    wanted = np.dtype(DTYPES[dtype] if dtype else leaf.dtype)
    size = leaf.size * wanted.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    placed = raw[start : start + size].view(wanted).reshape(leaf.shape)
    with np.errstate(over="ignore"):
        np.copyto(placed, leaf, casting="unsafe")
    if wanted.itemsize < leaf.dtype.itemsize or wanted == np.float16 != leaf.dtype:
        if np.isinf(placed).any() and not np.isinf(leaf).any():
            raise CheckpointError(f"{name} holds values beyond the range of dtype={dtype!r}, wanted another dtype")
    return jax.device_put(placed)


def _insert(tree: dict, path: tuple[str, ...], leaf: jax.Array) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer with its chat template, through transformers and without the network; None if it has none."""
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers raises, the cause is a tokenizer it can't read
        raise CheckpointError(f"{folder}: transformers can't read its tokenizer: {error}") from error


def save(lm: LanguageModel, folder: str | Path, *, max_shard_size: int = 5_000_000_000) -> None:
    """Writes a checkpoint in Hugging Face format, which `load` here and `from_pretrained` in transformers read.

    Files are written under other names and then moved into place, weights first and config.json last; weight files of an
    earlier checkpoint in the folder are removed after that. Other files in the folder stay.

    Args:
      lm: the model; its parameters may be unrolled (`Llama`) or stacked (`ScannedLlama`).
      folder: created if it doesn't exist.
      max_shard_size: bytes of tensors in one safetensors file; a larger model is split and gets an index.
    Raises:
      CheckpointError: the parameters are not those of the model's config; one message lists all.
    """
    config: LlamaConfig = lm.config
    table = list(tensors(config))
    leaves = {t.hf: _leaf(lm.params, t) for t in table}
    wrong = [f"{'/'.join(t.ours)} is {_shape(leaves[t.hf])}, wanted {t.shape}" for t in table if _shape(leaves[t.hf]) != t.shape]
    if wrong:
        raise CheckpointError(f"params don't fit the model's config: {'; '.join(wrong)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        written = Path(temporary)
        _write_weights(table, leaves, written, max_shard_size)
        if lm.tokenizer is not None:
            lm.tokenizer.save_pretrained(written)
        config = dataclasses.replace(config, dtype=str(leaves[table[0].hf].dtype))
        hf = config.to_hf()
        ends = {key: hf.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id") if hf.get(key) is not None}
        _write_json(ends, written / "generation_config.json")
        _write_json(hf, written / "config.json")
        names = sorted((p.name for p in written.iterdir()), key=lambda name: (name == "config.json", name == _INDEX, name))
        for name in names:
            os.replace(written / name, folder / name)
        for stale in set(folder.glob("model*.safetensors*")) - {folder / name for name in names}:
            stale.unlink()


def _leaf(params: dict, tensor: Tensor) -> Any:
    """The leaf at a tensor's path, whether layers are unrolled or stacked; None if there is none."""
    head, *rest = tensor.ours
    layer = None
    if head.startswith("layers_") and "layers" in params:
        head, layer = "layers", int(head.removeprefix("layers_"))
    node: Any = params
    for key in (head, *rest):
        node = node.get(key) if isinstance(node, dict) else None
    return node if layer is None or node is None else node[layer]


def _shape(leaf: Any) -> tuple[int, ...] | None:
    return None if leaf is None else tuple(leaf.shape)


def _write_weights(table: list[Tensor], leaves: dict[str, Any], folder: Path, max_shard_size: int) -> None:
    shards: list[list[Tensor]] = [[]]
    room = max_shard_size
    for tensor in table:
        size = leaves[tensor.hf].nbytes
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(tensor)
        room -= size
    names = [_SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        # The writer takes the memory of each array as it lies, so it has to lie in order.
        arrays = {t.hf: np.ascontiguousarray(t.to_hf(np.asarray(leaves[t.hf]))) for t in shard}
        save_file(arrays, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {t.hf: name for name, shard in zip(names, shards, strict=True) for t in shard}
        total = sum(leaf.nbytes for leaf in leaves.values())
        _write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / _INDEX)


def _write_json(value: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
