"""Checkpoints in Hugging Face format: `load` and `save`.

Weights are read leaf by leaf from mapped files, so loading takes the memory of the model and little else. Nothing here
executes what a checkpoint brings: safetensors and JSON only, no pickle.
"""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from models.convert import TIED_HEAD, Tensor, check, full_names, tensors
from models.families import ModelConfig, build, read_config
from models.files import FLOATS, INDEX, SINGLE, CheckpointError, Stored, find, read_json, stored_tensors
from nmjax.lm import LanguageModel

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

_ALIGNMENT = 64
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

Progress = Callable[[list[Tensor]], Iterable[Tensor]]  # wraps the iteration over tensors, as `tqdm.tqdm` does


def load(
    model: str | Path, dtype: str | None = None, *, host: bool = False, progress: Progress = iter
) -> LanguageModel:
    """Reads a checkpoint in Hugging Face format.

    Args:
      model: a folder (as given, or relative to the project), else the id of a model on the hub.
      dtype: 'float32', 'bfloat16' or 'float16' converts every tensor; None keeps each as it is stored.
      host: leaves the parameters in the host's memory, as NumPy arrays; those that need no other dtype are views of the
        files, which must not change. For models that are to be stacked, or spread over devices, leaf by leaf.
      progress: wraps the list of tensors while they load; `tqdm.tqdm` shows a bar.
    Returns:
      The model with layers unrolled (`layers_0`, `layers_1`, ...), without `host` on the default device. Its tokenizer
      is None where the folder has none; `eos_ids` are those of generation_config.json if it names any, else of
      config.json.
    Raises:
      CheckpointError: anything in the way of a faithful model, naming the file or tensor.
    """
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype={dtype!r} is not supported, wanted None or one of {list(DTYPES)}")
    folder = find(model)
    config = _config(folder)
    stored = full_names(config, stored_tensors(folder))
    table = check(config, {name: tensor.shape for name, tensor in stored.items()}, str(folder))
    _check_dtypes(folder, table, stored)
    params: dict = {}
    for tensor in progress(table):
        for path, leaf in zip(tensor.ours, tensor.from_hf(stored[tensor.hf].view()), strict=True):
            wanted = np.dtype(DTYPES[dtype] if dtype else leaf.dtype)
            ready = leaf if host and leaf.dtype == wanted else _copy(leaf, wanted, tensor.hf)
            _insert(params, path, ready if host else jax.device_put(ready))
    if config.tied and TIED_HEAD in stored:
        _check_tied_head(folder, stored, table[0].hf)
    config = dataclasses.replace(config, dtype=str(params["embed"]["embedding"].dtype))
    return LanguageModel(
        module=build(config), params=params, tokenizer=_tokenizer(folder, config.family), folder=folder
    )


def _config(folder: Path) -> ModelConfig:
    """config.json, with the end-of-sequence ids of generation_config.json where it names any (as in transformers)."""
    fields = read_json(folder / "config.json")
    try:
        config = read_config(fields)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if (folder / "generation_config.json").exists():
        eos = read_json(folder / "generation_config.json").get("eos_token_id")
        if eos is not None:
            config = dataclasses.replace(config, eos_ids=tuple(eos) if isinstance(eos, list) else (eos,))
    return config


def _check_dtypes(folder: Path, table: list[Tensor], stored: dict[str, Stored]) -> None:
    wrong = [f"{t.hf} is {stored[t.hf].kind}" for t in table if stored[t.hf].kind not in FLOATS]
    if wrong:
        raise CheckpointError(f"{folder}: wanted tensors of {', '.join(FLOATS)}, but {'; '.join(wrong)}")


def _check_tied_head(folder: Path, stored: dict[str, Stored], name: str) -> None:
    head, embedding = stored[TIED_HEAD], stored[name]
    same = (head.kind, head.shape) == (embedding.kind, embedding.shape)
    # Bits, not values: NaN differs from itself, and -0 equals 0.
    if not (same and np.array_equal(head.view().view(np.uint8), embedding.view().view(np.uint8))):
        raise CheckpointError(
            f"{folder}: by config.json the output head is the embedding table (tie_word_embeddings), "
            f"but {TIED_HEAD} differs from {name}"
        )


def _copy(leaf: np.ndarray, wanted: np.dtype, name: str) -> np.ndarray:
    """A view of the file -> the parameter, in memory of its own.

    On CPU the device takes over an array aligned to 64 bytes instead of copying it, so the memory is allocated that way
    and never touched again.
    """
    size = leaf.size * wanted.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    placed = raw[start : start + size].view(wanted).reshape(leaf.shape)
    with np.errstate(over="ignore"):
        np.copyto(placed, leaf, casting="unsafe")
    if wanted not in (leaf.dtype, np.float32) and np.isinf(placed).any() and not np.isinf(leaf).any():
        raise CheckpointError(f"{name} holds values beyond the range of dtype={wanted.name!r}, wanted another dtype")
    return placed


def _insert(tree: dict, path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _tokenizer(folder: Path, family: str) -> Any:
    """The folder's tokenizer with its chat template, read by transformers from local files; None if it has none."""
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    # Where torch is missing, transformers says so on import, as if anything were wrong.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # slow to import

    # It wants to see the model's config, too: an empty one where it would complain that it doesn't know the family.
    config = None if family in transformers.CONFIG_MAPPING else transformers.PreTrainedConfig()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, config=config)
    except Exception as error:  # whatever transformers raises, the cause is a tokenizer it can't read
        raise CheckpointError(f"{folder}: transformers can't read its tokenizer: {error}") from error
    for how in ("is_local", "local_files_only"):  # how it was read; else `save` would write that, too
        tokenizer.init_kwargs.pop(how, None)
    return tokenizer


def save(
    lm: LanguageModel, folder: str | Path, *, max_shard_size: int = 5_000_000_000, progress: Progress = iter
) -> None:
    """Writes a checkpoint in Hugging Face format, which `load` here and `from_pretrained` in transformers read.

    Everything is written under other names first and then moved into place, config.json last: a folder that has one is
    whole. Weight files of an earlier checkpoint in the folder are removed; its other files stay.

    Args:
      lm: the model; its parameters may be unrolled (`Llama`) or stacked (`ScannedLlama`).
      folder: created if it doesn't exist.
      max_shard_size: bytes of tensors in one safetensors file; a larger model is split and gets an index.
      progress: wraps the list of tensors while they are written; `tqdm.tqdm` shows a bar.
    Raises:
      CheckpointError: the parameters are not those of the model's config; one message lists all.
    """
    table = list(tensors(lm.config))
    leaves = _leaves(lm.params, table)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        new = Path(temporary)
        _write_weights(progress(table), leaves, new, max_shard_size)
        if lm.tokenizer is not None:
            lm.tokenizer.save_pretrained(new)
        hf = dataclasses.replace(lm.config, dtype=str(leaves[table[0].hf][0].dtype)).to_hf()
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json({key: hf[key] for key in special if hf.get(key) is not None}, new / "generation_config.json")
        _write_json(hf, new / "config.json")
        for weights in new.glob("*.safetensors"):  # which the library writes for the owner's eyes only
            weights.chmod((new / "config.json").stat().st_mode)
        _move(new, folder)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A parameter of one layer, which in a stacked tree is a slice that isn't taken before it is needed."""

    array: Any
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape if self.layer is None else self.array.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        return np.asarray(self.array if self.layer is None else self.array[self.layer])


def _leaves(params: dict, table: list[Tensor]) -> dict[str, list[_Leaf]]:
    """The parameters that every tensor holds, by the tensor's name in the checkpoint."""
    flat = flax.traverse_util.flatten_dict(params)
    leaves: dict[str, list[_Leaf]] = {tensor.hf: [] for tensor in table}
    unused, problems = set(flat), []
    for tensor in table:
        for ours in tensor.ours:
            name, path, layer = "/".join(ours), ours, None
            if path not in flat and tensor.layer is not None:
                path, layer = ("layers", *path[1:]), tensor.layer
            if path not in flat:
                problems.append(f"{name} is missing")
                continue
            leaf, together = _Leaf(flat[path], layer), leaves[tensor.hf]
            together.append(leaf)
            unused.discard(path)
            if leaf.shape != tensor.shape:
                problems.append(f"{name} has shape {leaf.shape}, wanted {tensor.shape}")
            if str(leaf.dtype) not in DTYPES:
                problems.append(f"{name} is {leaf.dtype}, wanted one of {list(DTYPES)}")
            elif leaf.dtype != together[0].dtype:
                problems.append(f"{name} is {leaf.dtype}, wanted {together[0].dtype} as the others in {tensor.hf}")
    problems += [f"{'/'.join(path)} is unknown" for path in sorted(unused)]
    if problems:
        raise CheckpointError(f"params are not those of the model's config: {'; '.join(problems)}")
    return leaves


def _write_weights(table: Iterable[Tensor], leaves: dict[str, list[_Leaf]], folder: Path, max_shard_size: int) -> None:
    """Fills one file after another; what they are called depends on how many there are, so that comes last."""
    shards: list[list[str]] = []
    arrays: dict[str, np.ndarray] = {}
    held = 0

    def flush() -> None:
        save_file(arrays, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(arrays))
        arrays.clear()

    for tensor in table:
        size = sum(leaf.nbytes for leaf in leaves[tensor.hf])
        if arrays and held + size > max_shard_size:
            flush()
            held = 0
        # The writer takes the memory of each array as it lies, so it has to lie in order.
        arrays[tensor.hf] = np.ascontiguousarray(tensor.to_hf([leaf.read() for leaf in leaves[tensor.hf]]))
        held += size
    flush()
    if len(shards) == 1:
        os.rename(folder / "0.safetensors", folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"{i}.safetensors", folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(leaf.nbytes for together in leaves.values() for leaf in together)
    _write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX)


def _move(new: Path, folder: Path) -> None:
    """Puts the files of `new` in place of those in `folder`."""
    names = {path.name for path in new.iterdir()}
    # While there is no config.json, nobody can take old and new files for one checkpoint.
    (folder / "config.json").unlink(missing_ok=True)
    for stale in {path.name for path in folder.glob("model*.safetensors*")} - names:
        (folder / stale).unlink()
    for name in sorted(names, key=lambda name: (name == "config.json", name)):
        os.replace(new / name, folder / name)


def _write_json(value: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
