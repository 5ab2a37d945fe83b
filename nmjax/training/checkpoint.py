"""Checkpoints of a training run that a kill or a flipped bit cannot spoil: Orbax for the arrays, sha256 for all files.

The only module that imports Orbax. A checkpoint is a folder:

    step_120/arrays/...       what Orbax wrote
    step_120/manifest.json    sha256 of every other file, the leaves' types and shapes, the notes; and its own sha256

It is written as `step_120.new` and renamed once all of it is there, so a run that is killed while it saves goes on from
the checkpoint before. So does one whose newest checkpoint is damaged: `load` reads every file before it trusts any.

With several processes, all share the folder and call `save`, `load`, `latest` and `wait` together; process 0 alone
hashes, renames and decides, and the others hear from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from nmjax.report.results import dump_json, jsonable, write_atomic

_MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one run, in one folder. As a context manager, it ends with `wait`.

    Args:
        folder: created if it does not exist.
        keep: how many whole checkpoints stay, the newest.

    Raises:
        ValueError: if `keep` is below 1.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be 1 or more, got {keep}")
        self.folder, self.keep = Path(folder).absolute(), keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # Where one process fails, the others may never come to the meeting that `wait` ends with.
        self.wait() if error is None else self._join()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first; whether they are whole, only `load` finds out."""
        return self._steps("")

    def latest(self) -> int | None:
        """The newest of `steps`, or None."""
        self._join()
        return _of_process_0(lambda: max(self.steps(), default=None))

    def save(self, step: int, state: Any, notes: dict[str, Any], *, background: bool = False) -> None:
        """Saves `state` (arrays) and `notes` (strict JSON, up to NumPy scalars) as the checkpoint of `step`.

        Then drops what is too old, what is damaged, and what is of later steps: the run has gone back behind them.

        Args:
            background: returns as soon as `state` may be donated, and writes while the caller goes on. What goes wrong
                there is raised by the next call; `wait` before the process ends.

        Raises:
            ValueError: if a leaf is empty, or, with several processes, is of one process alone; or if a number in
                `notes` is not finite. TypeError: if something in `notes` is not JSON. Both name the place.
        """
        arrays = {name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for name, leaf in named_leaves(state)}
        for name, array in arrays.items():
            if array.size == 0:
                raise ValueError(f"state{name} must have at least one element, got shape {array.shape}")
            if jax.process_count() > 1 and isinstance(array, jax.Array) and array.is_fully_addressable:
                raise ValueError(f"state{name} must be an array over all processes, got one on {array.sharding}")
        content = {"step": step, "leaves": _kinds(arrays), "notes": jsonable(notes, "notes")}
        self.wait()
        if jax.process_index() == 0:
            for suffix in (".new", ".old"):
                for leftover in self._steps(suffix):
                    shutil.rmtree(self._path(leftover, suffix))
        multihost_utils.sync_global_devices("what a killed run left is gone")
        writing = ocp.save_async(self._path(step, ".new") / "arrays", arrays)
        self._pending = self._thread.submit(self._finish, writing, content)
        if not background:
            self.wait()

    def wait(self) -> None:
        """Returns when what `save` began is on disk, for every process; raises what went wrong with it."""
        self._join()
        multihost_utils.sync_global_devices("saved")

    def load(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The state and notes of a checkpoint.

        Args:
            like: the structure, shapes and types of the state, as arrays or `jax.ShapeDtypeStruct`s; each leaf is put
                where the one here is, on whatever devices it was when it was saved.
            step: that of the checkpoint. None: the newest that is whole; a warning names those that are newer and
                what is wrong with them.

        Raises:
            FileNotFoundError: if there is no checkpoint (of that step).
            ValueError: if none is whole, or not that of `step`, or if the leaves are not those of `like`.
        """
        self._join()
        content, bad = _of_process_0(lambda: self._choose(step))
        if content is None and not bad:
            raise FileNotFoundError(f"step must be one of the checkpoints {self.steps()} in {self.folder}, got {step}")
        if content is None:
            what = "no checkpoint" if step is None else f"step {step}"
            raise ValueError(
                f"{what} in {self.folder} can be used: {'; '.join(bad)}. Put a copy of a whole one back, or remove the "
                "folder to start from step 0"
            )
        if bad and jax.process_index() == 0:
            instead = f"step {content['step']} is used instead"
            warnings.warn(f"checkpoints in {self.folder}: {'; '.join(bad)}; {instead}", stacklevel=2)
        wanted = {name: _abstract(leaf) for name, leaf in named_leaves(like)}
        where = self._path(content["step"])
        _check_leaves(content["leaves"], _kinds(wanted), where)
        loaded = ocp.load(where / "arrays", wanted)
        return jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in wanted]), content["notes"]

    def _path(self, step: int, suffix: str = "") -> Path:
        return self.folder / f"step_{step}{suffix}"

    def _steps(self, suffix: str) -> list[int]:
        names = (re.fullmatch(r"step_(0|[1-9]\d*)" + re.escape(suffix), path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def _join(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _finish(self, writing: ocp.AsyncResponse[None], content: dict[str, Any]) -> None:
        """Makes the folder that Orbax writes to a checkpoint, when all processes have written."""
        writing.result()
        if jax.process_index() > 0:
            return
        step = content["step"]
        new = self._path(step, ".new")
        write_atomic(new / _MANIFEST, _sealed(dump_json({**content, "sha256": _hashes(new)}).encode()))
        if step in self.steps():
            self._drop(step)
        os.replace(new, self._path(step))
        whole = 0
        for other in reversed(self.steps()):
            if other == step or (other < step and whole < self.keep and not _inspect(self._path(other))[1]):
                whole += 1
            else:
                self._drop(other)

    def _drop(self, step: int) -> None:
        old = self._path(step, ".old")
        os.replace(self._path(step), old)  # a kill in between leaves no half a checkpoint
        shutil.rmtree(old)

    def _choose(self, step: int | None) -> tuple[dict[str, Any] | None, list[str]]:
        """The manifest of the newest whole checkpoint, or of `step`; and what is wrong with those that are newer."""
        bad: list[str] = []
        for candidate in (n for n in reversed(self.steps()) if step in (None, n)):
            content, problems = _inspect(self._path(candidate))
            if not problems:
                unfinished = [n for n in self._steps(".new") if n > candidate and step is None]
                return content, [f"step_{n} was not written to its end" for n in unfinished] + bad
            bad.append(f"step_{candidate} is damaged ({', '.join(problems)})")
        return None, bad


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf, paths such as `.params['embed']['embedding']`."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _kinds(leaves: dict[str, Any]) -> dict[str, str]:
    """Type and shape of every leaf, as `float32[3, 1]`."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _check_leaves(saved: dict[str, str], wanted: dict[str, str], where: Path) -> None:
    differences = [
        f"{name} is {saved.get(name, 'missing')}, wanted {wanted.get(name, 'none')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError(f"checkpoint {where} is of another state: {'; '.join(differences[:5])}{more}")


def _abstract(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return np.asarray(leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` but the manifest, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name != _MANIFEST and not path.is_dir():
            with open(path, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _sealed(content: bytes) -> bytes:
    """A JSON object of `content`, JSON itself, and its sha256: no bit of it can change without notice."""
    return b'{"sha256": "%s", "content": %s}\n' % (hashlib.sha256(content).hexdigest().encode(), content)


def _inspect(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint's manifest, and what is wrong with its files: nothing, if it is whole."""
    try:
        manifest = (folder / _MANIFEST).read_bytes()
        found = _hashes(folder)
    except OSError as error:  # a file that is gone, or on a part of the disk that cannot be read any more
        return {}, [str(error)]
    if manifest != _sealed(manifest[len(_sealed(b"")) - 2 : -2]):
        return {}, [f"{_MANIFEST} is not as it was written"]
    content = json.loads(manifest)["content"]
    wanted = content["sha256"]
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name} does not belong there" for name in sorted(found.keys() - wanted.keys())]
    problems += [f"{name} is not as it was written" for name in wanted if found.get(name, wanted[name]) != wanted[name]]
    if folder.name != f"step_{content['step']}":
        problems.append(f"{_MANIFEST} is of step {content['step']}")
    return content, problems


def _of_process_0(find: Callable[[], Any]) -> Any:
    """What `find` returns on process 0 (as JSON has it), on every process."""
    if jax.process_count() == 1:
        return find()
    text = json.dumps(find()).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text or bytes(size), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(sent).tobytes())
