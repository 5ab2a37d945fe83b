"""A safetensors file as memory-mapped arrays.

The library's own reader copies each tensor into anonymous memory first. Here a tensor is a view of the file, so the only
copy a load makes is the one into the parameter's final place.
"""

import dataclasses
import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

FLOATS = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


class BadFileError(ValueError):
    """Not a whole safetensors file; the message names it."""


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


def open_file(path: Path) -> Mapping[str, Stored]:
    """Every tensor of a file, by name.

    Raises:
      BadFileError: the file is truncated, or its header is corrupted or contradicts its size.
    """
    try:
        with safe_open(path, framework="np"):  # the library's checks of the header against the file
            pass
    except SafetensorError as error:
        raise BadFileError(f"{path} is truncated or corrupted: {error}") from error
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
