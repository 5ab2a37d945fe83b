"""The files of a checkpoint: where they are, and their tensors as memory-mapped arrays.

The safetensors library's own reader copies each tensor into anonymous memory first. Here a tensor is a view of the
file, so the only copy a load makes is the one into the parameter's final place.
"""

import dataclasses
import json
import math
import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from nmjax import paths

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_HUB_IGNORED = ["*/*", "consolidated*", "adapter_*"]  # folders of other formats, other weights


class CheckpointError(ValueError):
    """A checkpoint that can't be read or written faithfully; the message names the file or the tensors."""


def find(
    model: str | Path, files: list[str] = _HUB_FILES, ignored: list[str] = _HUB_IGNORED, what: str = "checkpoint"
) -> Path:
    """The folder of a checkpoint: as given, else one of the project's by name, else downloaded from the hub.

    Args:
      files, ignored: patterns of what to download.
      what: is wanted, for messages; only checkpoints are looked for among the project's.
    Raises:
      CheckpointError: nothing there, and the hub doesn't have it or can't be reached.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file, wanted the folder of a {what}")
    name = str(model)
    if what != "checkpoint" and "/" not in name:
        raise CheckpointError(f"no {what} folder {name!r}; an id on the hub is owner/name")
    if "/" not in name.removeprefix("checkpoints/").rstrip("/"):
        try:
            return paths.checkpoint_dir(name)
        except (FileNotFoundError, ValueError) as error:
            raise CheckpointError(f"no checkpoint folder {name!r}: {error}; an id on the hub is owner/name") from error
    if name.count("/") > 1 or name[0] in "./~" or name.endswith("/"):
        raise CheckpointError(f"no {what} folder {name!r}")
    return _download(name, files, ignored, what)


def _download(hub_id: str, files: list[str], ignored: list[str], what: str) -> Path:
    import huggingface_hub  # slow to import

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=files, ignore_patterns=ignored))
    except Exception as error:  # the hub client has a dozen kinds of failure, which mean one thing here
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"no {what} folder {hub_id!r}, and no {hub_id!r} from the hub: {type(error).__name__}: {reason}"
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
    except ValueError as error:  # not JSON, or not even UTF-8
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, wanted a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, else what the index names.

    Raises:
      CheckpointError: there are none, or the index names one that is not there.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}"
            + (f", only pickled weights ({', '.join(pickled)})" if pickled else "")
            + "; pickled weights can run code and are not read: convert them to safetensors, "
            "for example with save_pretrained of transformers"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: weight_map={weight_map!r}, wanted tensor name -> file name")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{folder / INDEX} names files which do not exist: {', '.join(missing)}")
    return [folder / name for name in names]


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor in a file, not read yet."""

    path: Path
    kind: str  # safetensors' name of the dtype
    shape: tuple[int, ...]
    _buffer: mmap.mmap
    _offset: int

    def view(self) -> np.ndarray:
        """The tensor as a read-only view of the file, which must not outlive the load: the file may change."""
        count = math.prod(self.shape)
        return np.frombuffer(self._buffer, FLOATS[self.kind], count, self._offset).reshape(self.shape)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, from whichever file holds it.

    Raises:
      CheckpointError: a file is truncated, or its header is corrupted or contradicts its size; a tensor occurs twice.
    """
    stored: dict[str, Stored] = {}
    for path in weight_files(folder):
        here = file_tensors(path)
        twice = sorted(stored.keys() & here.keys())
        if twice:
            raise CheckpointError(f"{path} holds {', '.join(twice)}, which {stored[twice[0]].path.name} holds too")
        stored |= here
    return stored


def file_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of one file. Raises CheckpointError where it is truncated or corrupted."""
    try:
        with safe_open(path, framework="np"):  # the library checks the header against the file
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or corrupted: {error}") from error
    with path.open("rb") as file:
        # Layout: 8 bytes with the header's length, the header in JSON, the tensors.
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header.pop("__metadata__", None)
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), buffer, start + entry["data_offsets"][0])
        for name, entry in header.items()
    }
