"""The published scheme in torch against ours: the same loss, the same gradient of the adapter, the same grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark_introspection as benchmark

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    pytest.importorskip("peft", reason="peft is not installed (requirements-parity.txt)")
    ...
