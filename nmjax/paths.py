"""Where the packs, the bundled checkpoints and the caches lie on disk.

Data is looked for in `$NMJAX_HOME` (if set), then beside the `nmjax` package: that is the root of the source tree, and
`site-packages` after an install from a wheel, which carries `packs/` and `checkpoints/` at the same places.
"""

import os
import tempfile
import warnings
from pathlib import Path

import jax

_PACKAGE_PARENT = Path(__file__).resolve().parent.parent


def _roots() -> list[Path]:
    """The folders that may hold `packs/` and `checkpoints/`, first choice first."""
    home = os.environ.get("NMJAX_HOME")
    if not home:
        return [_PACKAGE_PARENT]
    root = Path(home).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"NMJAX_HOME={home!r} is not a folder; set it to the folder that holds packs/ and "
                                "checkpoints/, or unset it")
    return [root, _PACKAGE_PARENT]


def _existing(kind: str) -> list[Path]:
    """Folders named `kind` under the roots. Raises FileNotFoundError if there is none."""
    candidates = [root / kind for root in _roots()]
    found = [folder for folder in candidates if folder.is_dir()]
    if not found:
        raise FileNotFoundError(f"no folder {kind!r} found; looked at {_listing(candidates)}")
    return found


def _listing(items) -> str:
    return ", ".join(str(item) for item in items) or "nothing"


def _check_plain_name(kind: str, name: str) -> None:
    if name != Path(name).name or name in ("", ".."):
        raise ValueError(f"{kind} name {name!r} must be one plain name, without folders")


def pack_dirs() -> list[Path]:
    """The folders of packs, first choice first. Raises FileNotFoundError if there is none."""
    return _existing("packs")


def find_pack_file(name: str) -> Path:
    """The JSON file of the pack `name` (with or without `.json`); a pack in `$NMJAX_HOME` hides a bundled one.

    Raises ValueError if `name` has a folder in it, FileNotFoundError, which lists the known packs, if it is unknown.
    """
    _check_plain_name("pack", name)
    stem = name.removesuffix(".json")
    folders = _existing("packs")
    for folder in folders:
        if (file := folder / f"{stem}.json").is_file():
            return file
    known = sorted({file.stem for folder in folders for file in folder.glob("*.json")})
    raise FileNotFoundError(f"no pack named {stem!r} in {_listing(folders)}; there are: {_listing(known)}")


def checkpoint_dir(name: str) -> Path:
    """The folder of the checkpoint `name`, which may be written `tiny` or `checkpoints/tiny`.

    Raises ValueError if `name` has any other folder in it, FileNotFoundError, which lists the known checkpoints, if it
    is unknown.
    """
    plain = name.removeprefix("checkpoints/").rstrip("/")
    _check_plain_name("checkpoint", plain)
    folders = _existing("checkpoints")
    for folder in folders:
        if (found := folder / plain).is_dir():
            return found
    known = sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})
    raise FileNotFoundError(f"no checkpoint named {plain!r} in {_listing(folders)}; there are: {_listing(known)}")


def user_cache() -> Path:
    """`nmjax` in the user's caches: what was found in models is kept there, whatever `$NMJAX_CACHE` says."""
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification: a relative path is to be ignored.
    folder = Path(base) if base and os.path.isabs(base) else Path("~/.cache").expanduser()
    return folder / "nmjax"


def cache_dir() -> Path | None:
    """The folder of compiled programs: `$NMJAX_CACHE` (None if it is `off`), else `nmjax/jax` in the user's caches."""
    chosen = os.environ.get("NMJAX_CACHE")
    if chosen:
        return None if chosen.lower() == "off" else Path(chosen).expanduser().absolute()
    return user_cache() / "jax"


def enable_compilation_cache() -> None:
    """Makes JAX keep compiled programs in `cache_dir()` between runs.

    A cache that the user has already chosen in JAX itself is left alone. A folder that cannot be written costs a
    warning and the cache, nothing else.
    """
    folder = cache_dir()
    if folder is None or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        warnings.warn(f"compiled programs are not kept between runs: {folder} cannot be written ({error}); set "
                      "NMJAX_CACHE to another folder, or to 'off'", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX keeps by default only what took a second to compile; small models are many programs of less.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
