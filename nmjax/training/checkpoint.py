"""Atomic checkpoints of a training run: Orbax for the arrays, a sha256 manifest that is verified on load.

The only module that imports Orbax. A checkpoint counts once its manifest is there: the manifest is written last and
renamed into place, so a run that is killed while it saves goes on from the checkpoint before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
        folder: created if it does not exist. `step_<n>/` holds the arrays, `step_<n>.json` the manifest.
        keep: how many of the newest checkpoints stay.

    Raises:
        ValueError: if `keep` is below 1.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be 1 or more, got {keep}")
        self.folder, self.keep = Path(folder).absolute(), keep
        self.folder.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, oldest first."""
        return sorted(int(path.stem.removeprefix("step_")) for path in self.folder.glob("step_*.json"))

    def latest(self) -> int | None:
        """The newest of `steps`, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Writes `state` (arrays) and `notes` (strict JSON) as the checkpoint of `step`, and drops the oldest."""
        arrays, manifest = self._paths(step)
        shutil.rmtree(arrays, ignore_errors=True)
        ocp.save(arrays, dict(enumerate_leaves(state)))
        content = {"step": step, "notes": notes, "sha256": _hashes(arrays)}
        scratch = manifest.with_suffix(".tmp")
        with open(scratch, "w") as file:
            json.dump(content, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, manifest)
        for old in self.steps()[: -self.keep]:
            arrays, manifest = self._paths(old)
            manifest.unlink()
            shutil.rmtree(arrays)

    def load(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The state and notes of `step` (None: the newest), in the structure, shapes and types of `like`.

        Raises:
            FileNotFoundError: if there is no complete checkpoint of that step.
            ValueError: if a file's sha256 is not the manifest's, or the leaves are not those of `like`.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self.steps():
            raise FileNotFoundError(
                f"step must be one of the complete checkpoints {self.steps()} in {self.folder}, got {step}"
            )
        arrays, manifest = self._paths(step)
        content = json.loads(manifest.read_text())
        found = _hashes(arrays)
        bad = sorted(
            name for name in found.keys() | content["sha256"].keys() if found.get(name) != content["sha256"].get(name)
        )
        if bad:
            raise ValueError(f"checkpoint {arrays} is damaged: the sha256 of {bad} is not the manifest's")
        wanted = dict(enumerate_leaves(like))
        loaded = ocp.load(arrays, jax.tree.map(_abstract, wanted))
        leaves = [loaded[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), content["notes"]

    def _paths(self, step: int) -> tuple[Path, Path]:
        return self.folder / f"step_{step}", self.folder / f"step_{step}.json"


def enumerate_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, paths such as `.params['embed']['embedding']`."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
