"""What the tests of the introspection study share."""

import jax
import numpy as np
import pytest

import models
from experiments.introspecting.subjects import Subjects, make_subjects
from nmjax.training.lora import LoraConfig, init

VARIANTS = {"plain": "original", "sizes": "localization_magnitude"}


def acting(adapter, seed: int):
    """The adapter with a b that is not zero, so that it changes what the model says."""
    rng = np.random.default_rng(seed)
    weights = jax.tree_util.tree_map_with_path(
        lambda path, x: np.float32(0.05 * rng.standard_normal(x.shape)) if path[-1].key == "b" else x, adapter.weights
    )
    return adapter.replace(weights=weights)


@pytest.fixture(scope="session")
def instruct_lm():
    """The bundled model with a chat template: L 4, D 128."""
    return models.load(models.checkpoint.find("checkpoints/tiny_instruct"))


@pytest.fixture(scope="session")
def subjects(instruct_lm) -> Subjects:
    """The base, and names of adapters that are not there: enough where the model is not run under them."""
    return Subjects(instruct_lm, VARIANTS)


@pytest.fixture(scope="session")
def adapted(instruct_lm) -> Subjects:
    """The base and two adapters that act."""
    adapter = init(instruct_lm.module, LoraConfig(r=2, targets=("q", "v")), jax.random.key(0))
    return make_subjects(
        instruct_lm, {name: (acting(adapter, seed), variant) for seed, (name, variant) in enumerate(VARIANTS.items())}
    )
