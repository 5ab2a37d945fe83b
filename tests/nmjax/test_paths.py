import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest

from nmjax import paths


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An NMJAX_HOME with one pack of its own."""
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "mine.json").write_text("{}")
    monkeypatch.setenv("NMJAX_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """Stands in for the folder that holds the package, with one pack and one checkpoint."""
    root = tmp_path / "bundled"
    (root / "packs").mkdir(parents=True)
    (root / "packs" / "cocaine.json").write_text("{}")
    (root / "checkpoints" / "tiny").mkdir(parents=True)
    monkeypatch.delenv("NMJAX_HOME", raising=False)
    monkeypatch.setattr(paths, "_PACKAGE_PARENT", root)
    return root


@pytest.fixture
def jax_cache_setting():
    """Lets a test set JAX's cache folder, from a state where none is set."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_data_lie_beside_the_package():
    assert paths._PACKAGE_PARENT / "nmjax" / "paths.py" == Path(paths.__file__).resolve()


def test_bundled_data_are_found_by_name(bundled):
    assert paths.pack_dirs() == [bundled / "packs"]
    assert paths.find_pack_file("cocaine") == bundled / "packs" / "cocaine.json"
    assert paths.find_pack_file("cocaine.json") == bundled / "packs" / "cocaine.json"
    for name in ("tiny", "checkpoints/tiny", "checkpoints/tiny/"):
        assert paths.checkpoint_dir(name) == bundled / "checkpoints" / "tiny"


def test_home_comes_first_and_the_package_second(bundled, home):
    assert paths.pack_dirs() == [home / "packs", bundled / "packs"]
    assert paths.find_pack_file("mine") == home / "packs" / "mine.json"
    assert paths.find_pack_file("cocaine") == bundled / "packs" / "cocaine.json"
    (home / "packs" / "cocaine.json").write_text("{}")
    assert paths.find_pack_file("cocaine") == home / "packs" / "cocaine.json"
    assert paths.checkpoint_dir("tiny") == bundled / "checkpoints" / "tiny"


def test_missing_home_is_an_error(bundled, monkeypatch):
    monkeypatch.setenv("NMJAX_HOME", str(bundled / "nowhere"))
    for search in (paths.pack_dirs, lambda: paths.find_pack_file("cocaine"), lambda: paths.checkpoint_dir("tiny")):
        with pytest.raises(FileNotFoundError, match="NMJAX_HOME=.*nowhere"):
            search()


def test_unknown_names_list_what_there_is(bundled, home):
    with pytest.raises(FileNotFoundError, match="no pack named 'cofee' .* there are: cocaine, mine"):
        paths.find_pack_file("cofee")
    with pytest.raises(FileNotFoundError, match="no checkpoint named 'big' .* there are: tiny"):
        paths.checkpoint_dir("big")


def test_no_folder_of_packs_at_all(tmp_path, monkeypatch):
    monkeypatch.delenv("NMJAX_HOME", raising=False)
    monkeypatch.setattr(paths, "_PACKAGE_PARENT", tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder 'packs' found"):
        paths.pack_dirs()


@pytest.mark.parametrize("name", ["", "../cocaine", "sub/cocaine", ".."])
def test_names_with_folders_are_refused(bundled, name):
    with pytest.raises(ValueError, match="must be one plain name"):
        paths.find_pack_file(name)
    with pytest.raises(ValueError, match="must be one plain name"):
        paths.checkpoint_dir(name)


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NMJAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert paths.cache_dir() == tmp_path / ".cache" / "nmjax" / "jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert paths.cache_dir() == tmp_path / "xdg" / "nmjax" / "jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert paths.cache_dir() == tmp_path / ".cache" / "nmjax" / "jax"
    monkeypatch.setenv("NMJAX_CACHE", "~/here")
    assert paths.cache_dir() == tmp_path / "here"
    for off in ("off", "OFF"):
        monkeypatch.setenv("NMJAX_CACHE", off)
        assert paths.cache_dir() is None


def test_cache_is_set_once_and_a_users_choice_stays(jax_cache_setting, monkeypatch, tmp_path):
    monkeypatch.setenv("NMJAX_CACHE", "off")
    paths.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("NMJAX_CACHE", str(tmp_path / "a"))
    paths.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a")
    monkeypatch.setenv("NMJAX_CACHE", str(tmp_path / "b"))
    paths.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a")


def test_unwritable_cache_warns_once_and_is_left_out(jax_cache_setting, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NMJAX_CACHE", str(tmp_path / "file" / "cache"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            paths.enable_compilation_cache()
    assert [str(w.message).split(":")[0] for w in seen] == ["compiled programs are not kept between runs"]
    assert jax.config.jax_compilation_cache_dir is None


def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    """The second run must find every program: it adds no file, and JAX reports hits and no miss."""
    program = """
import jax, jax.numpy as jnp
from nmjax.paths import enable_compilation_cache
enable_compilation_cache()
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/", 1)[-1]))
def f(x):
    for i in range(30):
        x = jnp.sin(x @ x) + jax.nn.softmax(x) * i
    return x
jax.jit(f)(jnp.ones((32, 32))).block_until_ready()
print(events.count("cache_hits"))
"""
    env = os.environ | {"NMJAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    env.pop("XLA_FLAGS", None)  # what compiles in no time is not kept
    hits, files = [], []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=env,
            cwd=paths._PACKAGE_PARENT,
            text=True,
            capture_output=True,
            check=True,
        )
        hits.append(int(done.stdout))
        files.append(sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("jit_f-")))
    assert hits[0] == 0 and hits[1] >= 1
    assert len(files[0]) == 1 and files[1] == files[0]
