"""Where a model's steering vectors are kept, by name.

First `steering/` beside the weights, which is how a checkpoint ships its own; then the user's caches, under the model's
fingerprint. A vector is good for the weights that it was found in and for no others, so the fingerprint is checked.
Under an adapter those of the base serve, too, unless it has its own: so a pack is the same intervention on both.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nmjax.lm import LanguageModel
from nmjax.paths import user_cache
from nmjax.steering.io import load_vector, save_vector

CONCEPT = "concept_"  # what the names of concepts' vectors begin with

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def cached_folder(lm: LanguageModel) -> Path:
    """The folder in the user's caches that holds this model's vectors; it need not exist."""
    return user_cache() / "steering" / lm.fingerprint


def folders(lm: LanguageModel) -> list[Path]:
    """Where `named_vector` looks, in this order."""
    beside = [] if lm.folder is None else [Path(lm.folder) / "steering"]
    own = [] if lm.adapter is None else [cached_folder(lm)]
    return [*own, *beside, cached_folder(lm.base)]


def vector_file(folder: Path, name: str, suffix: str = ".safetensors") -> Path:
    """The file of a name in a folder. Raises ValueError for a name that is not one plain word."""
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
        raise ValueError(f"steering vector name {name!r}, wanted letters, digits, '_', '-' and '.'")
    return folder / f"{name}{suffix}"


def named_vector(lm: LanguageModel, name: str) -> np.ndarray:
    """The model's own vector of this name, float32 [L, D], unit rows.

    Raises:
      ValueError: there is none (the message names the command that builds it, and the vectors there are), it was found
        in other weights, or it has another shape.
    """
    return _found(lm, name)[0]


def metadata_of(lm: LanguageModel, name: str) -> dict[str, str]:
    """What its file says of how a vector was made. Raises ValueError as `named_vector` does."""
    return _found(lm, name)[1]


def has_vector(lm: LanguageModel, name: str) -> bool:
    """Whether `named_vector` would find it."""
    return _look(lm, name)[0] is not None


def _found(lm: LanguageModel, name: str) -> tuple[np.ndarray, dict[str, str]]:
    found, refused = _look(lm, name)
    if found is not None:
        return found
    reason = "; ".join(refused) or f"this model has no steering vector {name!r}"
    there = ", ".join(stored_names(lm)) or "none yet"
    raise ValueError(f"{reason}; there are: {there}. Build it with: {build_command(lm, name)}")


def _look(lm: LanguageModel, name: str) -> tuple[tuple[np.ndarray, dict[str, str]] | None, list[str]]:
    """The first file of this name that fits, with its metadata, if any; and why those before it don't fit."""
    refused: list[str] = []
    read = lm.__dict__.setdefault("_steering_files", {})  # packs are bound at every call
    for folder in folders(lm):
        path = vector_file(folder, name)
        if not path.is_file():
            continue
        version = (path, path.stat().st_mtime_ns, path.stat().st_size)
        if version not in read:
            read[version] = load_vector(path)
        vectors, metadata = read[version]
        wanted = (lm.config.layers, lm.config.embed)
        if metadata.get("model") not in (lm.fingerprint, lm.base.fingerprint):
            refused.append(f"{path} was found in the model {metadata.get('model')}, this one is {lm.fingerprint}")
        elif vectors.shape != wanted:
            refused.append(f"{path} has shape {vectors.shape}, wanted {wanted}: (layers, embed)")
        else:
            return (vectors, metadata), refused
    return None, refused


def stored_names(lm: LanguageModel) -> list[str]:
    """Names of the files in this model's folders, whether or not they fit it."""
    return sorted({path.stem for folder in folders(lm) for path in folder.glob("*.safetensors")})


def save_named(
    lm: LanguageModel,
    name: str,
    vectors: np.ndarray,
    metadata: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Path:
    """Keeps vectors [L, D] under a name, with the model's fingerprint; by default in the user's caches.

    folder: `<checkpoint>/steering` to ship them beside the weights.

    Raises ValueError for a name that is not plain or vectors of another shape.
    """
    wanted = (lm.config.layers, lm.config.embed)
    if np.shape(vectors) != wanted:
        raise ValueError(f"vectors has shape {np.shape(vectors)}, wanted {wanted}: (layers, embed)")
    path = vector_file(cached_folder(lm) if folder is None else Path(folder), name)
    return save_vector(path, vectors, {**(metadata or {}), "model": lm.fingerprint})


def build_command(lm: LanguageModel, name: str) -> str:
    """The command line that makes a vector of this name."""
    model = "<folder or hub id>" if lm.folder is None else lm.folder
    wanted = "--concepts=<list of words>" if name.startswith(CONCEPT) else f"--types={name}"
    return f"python -m experiments.build_steering_vectors --model={model} {wanted}"
