"""Settings and fixtures of every test. The environment is set before the first import of JAX."""

import os
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NMJAX_CACHE", str(PROJECT_ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from nmjax.paths import enable_compilation_cache  # noqa: E402

enable_compilation_cache()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real inputs that are not part of the project: `$NMJAX_TEST_DATA`, else `../shared/data`."""
    chosen = os.environ.get("NMJAX_TEST_DATA")
    folder = Path(chosen) if chosen else PROJECT_ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set NMJAX_TEST_DATA to the folder that holds it")
    return folder
