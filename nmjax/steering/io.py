"""Files of steering vectors: safetensors, and GGUF control vectors as repeng and llama.cpp exchange them.

In both, the tensor `direction.{i}` [D] belongs to the output of block i, counted from 0: our row i of [L, D]. repeng
numbers its layers so, and llama.cpp adds `direction.{i}` after block i, too; but llama.cpp has no place for i = 0 and
refuses a whole file that holds one, so such a file is written with a warning.
"""

import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from nmjax.report.results import write_atomic

SCHEMA = "nmjax.steering.1"
SUFFIXES = (".safetensors", ".gguf")
MOST_LAYERS = 4096  # a larger index is a broken file, not a model

_NAME = re.compile(r"direction\.(\d{1,9})")
_ARCHITECTURE = "controlvector"
_OURS = "nmjax."  # prefix of our metadata in GGUF, which has everybody's keys in one file


def save_vector(path: str | Path, vectors: np.ndarray, metadata: Mapping[str, Any] | None = None) -> Path:
    """Writes vectors [L, D], float32, atomically; the suffix, `.safetensors` or `.gguf`, says in which format.

    Args:
      metadata: values become strings; `schema` is added. In GGUF, `model_hint` is also the control vector's own hint.
        A row of zeros is a layer without a direction: GGUF leaves it out.
    Raises:
      ValueError: another suffix, another shape, nothing but zeros, or values that are not finite.
    """
    target = Path(path)
    rows = np.asarray(vectors, np.float32)
    if rows.ndim != 2 or not rows.size or len(rows) > MOST_LAYERS:
        raise ValueError(f"vectors has shape {rows.shape}, wanted [L, D]")
    if not np.isfinite(rows).all() or not rows.any():
        raise ValueError(f"vectors for {target} holds NaN, infinity or nothing but zeros, wanted directions")
    texts = {"schema": SCHEMA} | {key: str(value) for key, value in (metadata or {}).items()}
    if _suffix(target) == ".gguf":
        return write_atomic(target, _gguf_bytes(target, rows, texts))
    tensors = {f"direction.{layer}": np.ascontiguousarray(row) for layer, row in enumerate(rows)}
    return write_atomic(target, with_sorted_metadata(safetensors.numpy.save(tensors, texts)))


def load_vector(path: str | Path, layers: int | None = None) -> tuple[np.ndarray, dict[str, str]]:
    """Vectors float32 [L, D] and metadata of a file of either format; layers that it leaves out are rows of zeros.

    Args:
      layers: L; None = what the file says. repeng counts only the layers it holds, so its files may say too little.
    Raises:
      ValueError: another suffix, a file that is damaged, of another kind or without directions, or more layers than
        asked for; the message names the file.
      FileNotFoundError: no such file.
    """
    source = Path(path)
    suffix = _suffix(source)
    if not source.is_file():
        raise FileNotFoundError(f"no file of steering vectors at {source}")
    rows, count, metadata = (_read_gguf if suffix == ".gguf" else _read_safetensors)(source)
    if not rows:
        raise ValueError(f"{source} holds no tensor named direction.<layer>")
    shapes = sorted({row.shape for row in rows.values()})
    if len(shapes) > 1 or len(shapes[0]) != 1:
        raise ValueError(f"{source}: directions have the shapes {shapes}, wanted one shape [D]")
    for layer, row in rows.items():
        if not np.isfinite(row).all():
            raise ValueError(f"{source}: direction.{layer} holds NaN or infinity")
    L = max(count, 1 + max(rows))
    if L > MOST_LAYERS or (layers is not None and 1 + max(rows) > layers):
        wanted = f"at most {layers or MOST_LAYERS} layers"
        raise ValueError(f"{source} holds direction.{max(rows)} and says it has {count} layers, wanted {wanted}")
    vectors = np.zeros((layers or L, *shapes[0]), np.float32)
    for layer, row in rows.items():
        vectors[layer] = row
    return vectors, metadata


def _suffix(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r}, wanted one of {SUFFIXES}")
    return path.suffix


def _layer(path: Path, name: str) -> int:
    found = _NAME.fullmatch(name)
    if not found:
        raise ValueError(f"{path} holds the tensor {name!r}, wanted only direction.<layer>")
    return int(found[1])


def _read_safetensors(path: Path) -> tuple[dict[int, np.ndarray], int, dict[str, str]]:
    """Rows by layer, the number of layers that the file claims (0: nothing), metadata."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            rows = {}
            for name in file.keys():  # noqa: SIM118  not a dict
                layer = _layer(path, name)
                row = file.get_tensor(name)
                if row.dtype.kind != "f":
                    raise ValueError(f"{path}: {name} is of {row.dtype}, wanted floating point")
                rows[layer] = row.astype(np.float32)
            return rows, 0, file.metadata() or {}
    except (safetensors.SafetensorError, TypeError) as error:  # TypeError: a dtype that NumPy lacks
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def with_sorted_metadata(content: bytes) -> bytes:
    """The same safetensors file with its metadata in order: the library's order differs from run to run."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[start:]


def _read_gguf(path: Path) -> tuple[dict[int, np.ndarray], int, dict[str, str]]:
    from gguf import GGMLQuantizationType, GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = [(tensor.name, tensor.tensor_type, np.array(tensor.data)) for tensor in reader.tensors]
    except Exception as error:  # the reader checks nothing: a damaged file fails wherever the bytes lead it
        raise ValueError(f"{path} is not a whole GGUF file: {type(error).__name__}: {error}") from error
    architecture = fields.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise ValueError(f"{path} has the architecture {architecture!r}, wanted {_ARCHITECTURE!r}")
    rows = {}
    for name, kind, data in tensors:
        if kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            raise ValueError(f"{path}: {name} is of type {kind.name}, wanted F32 or F16")
        rows[_layer(path, name)] = data.astype(np.float32)
    if 0 in rows:
        _warn_of_layer_0(path)
    count = fields.get(f"{_ARCHITECTURE}.layer_count", 0)
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"{path}: {_ARCHITECTURE}.layer_count={count!r}, wanted a number of layers")
    kept = {k: v for k, v in fields.items() if not k.startswith("GGUF.") and k != "general.architecture"}
    return rows, count, {key.removeprefix(_OURS): str(value) for key, value in kept.items()}


def _gguf_bytes(target: Path, rows: np.ndarray, texts: Mapping[str, str]) -> bytes:
    from gguf import GGUFWriter

    if rows[0].any():
        _warn_of_layer_0(target)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "vectors.gguf"
        writer = GGUFWriter(draft, _ARCHITECTURE)
        hint = f"{_ARCHITECTURE}.model_hint"  # also what a loaded file's own hint is called
        writer.add_string(hint, texts.get("model_hint", texts.get(hint, "")))
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(rows))
        for key, value in texts.items():
            writer.add_string(f"{_OURS}{key}", value)
        for layer, row in enumerate(rows):
            if row.any():
                writer.add_tensor(f"direction.{layer}", np.ascontiguousarray(row))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return draft.read_bytes()


def _warn_of_layer_0(path: Path) -> None:
    warnings.warn(f"{path}: direction.0 acts after the first block here; llama.cpp refuses a file that holds it",
                  stacklevel=4)  # fmt: skip
