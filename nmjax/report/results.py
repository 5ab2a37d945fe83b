"""Result files: atomic writes, strict JSON, the identity of a run, and a log from which a killed run resumes."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

PACKAGES = ("nmjax", "jax", "jaxlib", "flax", "numpy", "scipy", "transformers", "tokenizers")
_LOG_SCHEMA = 1


# --- Strict JSON ------------------------------------------------------------------------------------------------------


def jsonable(value: Any, path: str = "$") -> Any:
    """`value` as plain JSON types: NumPy and JAX scalars and arrays, dataclasses, tuples, paths are converted.

    Raises ValueError for a number that is not finite and TypeError for a type or a key that JSON lacks; both name the
    place, as in `$.packs[2].ece`. A value that can be undefined is written as None by whoever knows what it means.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)  # an IntEnum becomes its number
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}; JSON has no such number, write None where a value is undefined")
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name), f"{path}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{path} has the key {key!r} of type {type(key).__name__}; wanted a string")
        return {key: jsonable(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [jsonable(item, f"{path}[{k}]") for k, item in enumerate(value)]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        array = np.asarray(value)
        if array.dtype.kind in "biu":
            return array.tolist()
        if jax.numpy.issubdtype(array.dtype, jax.numpy.floating):  # bfloat16, too
            return jsonable(array.astype(np.float64).tolist(), path)
        raise TypeError(f"{path} is an array of {array.dtype}, which JSON cannot hold")
    raise TypeError(f"{path} has the type {type(value).__name__}, which JSON cannot hold")


def dump_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON text of `jsonable(value)`; one line unless `indent` is given. Keys keep their order."""
    return json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, indent=indent)


def load_json(path: str | os.PathLike) -> Any:
    """Parse a JSON file; ValueError that names the file if it is not strict JSON (NaN and Infinity are refused)."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{os.fspath(path)} holds {constant}, which is not JSON")

    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"), parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not JSON: {error}") from error


# --- Atomic writes ----------------------------------------------------------------------------------------------------


def write_atomic(path: str | os.PathLike, content: str | bytes) -> pathlib.Path:
    """Write `content` so that `path` holds all of it or what it held before, whenever the process dies.

    The text (UTF-8) or bytes go to a temporary file in the same folder, which is flushed to disk and renamed over
    `path`. Creates the folder. Returns the path.
    """
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def write_json(path: str | os.PathLike, value: Any) -> pathlib.Path:
    """Write `value` as strict, indented JSON, atomically; the errors of `jsonable` leave an existing file alone."""
    return write_atomic(path, dump_json(value, indent=2) + "\n")


# --- Who made this result ---------------------------------------------------------------------------------------------


def content_hash(value: Any) -> str:
    """SHA-256, in hex, of a value's JSON with sorted keys: equal values have equal hashes on every machine."""
    text = json.dumps(jsonable(value), ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def path_hash(path: str | os.PathLike) -> str:
    """SHA-256, in hex, of a file's bytes, or of the names and hashes of all files in a folder, hidden ones left out.

    Raises FileNotFoundError for a path that does not exist.
    """
    root = pathlib.Path(path)
    if root.is_dir():
        names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
        visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
        return content_hash({name: path_hash(root / name) for name in visible})
    with open(root, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def timestamp() -> str:
    """The time now, UTC, as it appears in file names: 20260131_235959."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y%m%d_%H%M%S")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the numbers; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # e.g. nmjax run from a source tree that was not installed
            found[name] = None
    return found


def run_identity(name: str, config: Mapping[str, Any], seeds: Mapping[str, int], hashes: Mapping[str, str]) -> dict:
    """Everything needed to repeat a run: time, command line, configuration, seeds, versions, hardware, hashes."""
    device = jax.devices()[0]
    return {
        "experiment": name,
        "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "config": jsonable(config, "config"),
        "seeds": jsonable(seeds, "seeds"),
        "versions": versions(),
        "device": {
            "kind": device.device_kind,
            "backend": device.platform,
            "count": jax.device_count(),
            "host": platform.machine(),
            "cpus": os.cpu_count(),
        },
        "hashes": jsonable(hashes, "hashes"),
    }


# --- Resumable runs ---------------------------------------------------------------------------------------------------


def lock(file: Any, path: str | os.PathLike) -> None:
    """Keeps other runs away from an open file or folder until it is closed, or the process ends.

    Raises OSError, which names `path`, where another run holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there nothing is protected
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(
            f"{os.fspath(path)} is being written by another run; wait for it or use another folder"
        ) from error


class JsonlLog:
    """The finished batches of a run, one JSON line each, so that a killed run loses at most the batch in flight.

    The first line holds the plan and its hash; the plan says everything that decides a batch's numbers. Opening an
    existing log with the same plan reads the batches back into `done` (batch number -> record); a last line without
    its line end was torn by a kill and is dropped. A log of another plan is an error, never mixed in. With
    `resume=False` an existing log is overwritten. The open file is locked, so two runs cannot write one log. `keep`
    says what of a record stays in memory, in `done`; the file has all of it.

        with JsonlLog(path, plan) as log:
            for k in range(batches):
                if k not in log.done:
                    log.append(k, compute(k))

    Raises ValueError (naming file and line) for a different plan, a line in the middle that is not JSON, or a batch
    that occurs twice; OSError if another process writes this log.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        plan: Mapping[str, Any],
        resume: bool = True,
        keep: Callable[[Any], Any] = lambda record: record,
    ):
        self.path = pathlib.Path(path)
        self._keep = keep
        self.plan_hash = content_hash(plan)
        self.done: dict[int, Any] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115  closed by close()
        try:
            lock(self._file, self.path)
            if not resume:
                self._file.truncate(0)
            if not self._read():
                self._write({"schema": _LOG_SCHEMA, "plan_hash": self.plan_hash, "plan": plan})
        except BaseException:
            self._file.close()
            raise

    def append(self, batch: int, record: Any) -> None:
        """Add a finished batch; it is on disk when this returns."""
        if batch in self.done:
            raise ValueError(f"batch {batch} is in {self.path} already")
        self._write({"batch": batch, "record": record})
        self.done[batch] = jsonable(self._keep(record))  # what a resumed run would read, so both go on alike

    def close(self) -> None:
        """Release the file and its lock."""
        self._file.close()

    def finish(self, path: str | os.PathLike) -> pathlib.Path:
        """Give the complete log its final name and close it; the next run of the same plan starts afresh."""
        os.replace(self.path, path)
        self.close()
        return pathlib.Path(path)

    def __enter__(self) -> JsonlLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> bool:
        """Fill `done` from the file and cut a torn tail off; False if there is no whole header yet."""
        self._file.seek(0)
        number = 0
        for number, line in enumerate(self._whole_lines(), start=1):
            where = f"{self.path}, line {number}"
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error}); --noresume starts anew") from error
            wanted = {"schema", "plan_hash", "plan"} if number == 1 else {"batch", "record"}
            if not isinstance(entry, dict) or entry.keys() != wanted:
                raise ValueError(f"{where} lacks the fields {sorted(wanted)}; --noresume starts anew")
            if number == 1:
                if (entry["schema"], entry["plan_hash"]) != (_LOG_SCHEMA, self.plan_hash):
                    raise ValueError(
                        f"{where} belongs to another plan (hash {str(entry['plan_hash'])[:12]}, wanted "
                        f"{self.plan_hash[:12]}): another model, pack, question or version; --noresume starts anew"
                    )
            elif entry["batch"] in self.done:
                raise ValueError(f"{where} repeats batch {entry['batch']}; --noresume starts anew")
            else:
                self.done[entry["batch"]] = self._keep(entry["record"])
        return number > 0

    def _whole_lines(self) -> Iterator[bytes]:
        """The lines that were not torn; what comes behind them is cut off."""
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                self._file.truncate(end)
                return
            end += len(line)
            yield line

    def _write(self, entry: Any) -> None:
        self._file.write(dump_json(entry).encode("utf-8") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
