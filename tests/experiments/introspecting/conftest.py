"""What the tests of the suites share: the bundled model, and adapters to it that act."""

import jax
import numpy as np
import pytest

import models
from experiments.introspecting.subjects import Subjects, make_subjects
from nmjax import paths
from nmjax.training import lora

VARIANTS = {"plain": "original", "sizes": "localization_magnitude"}


@pytest.fixture(scope="session")
def acting_adapter():
    """By seed, an adapter to a model: of rank 2, random, far from its start."""

    def make(lm, seed, size=0.1):
        adapter = lora.init(lm.module, lora.LoraConfig(r=2), jax.random.key(seed))
        rng = np.random.default_rng(seed)
        leaves, tree = jax.tree.flatten_with_path(adapter.weights)
        drawn = [
            size * rng.standard_normal(leaf.shape).astype(np.float32) if path[-1].key == "b" else leaf
            for path, leaf in leaves
        ]
        return adapter.replace(weights=jax.tree.unflatten(tree, drawn))

    return make


@pytest.fixture(scope="session")
def instruct_lm():
    return models.load(paths.checkpoint_dir("tiny_instruct"))


@pytest.fixture(scope="session")
def two_subjects(instruct_lm, acting_adapter):
    """The base, and an adapter called "original"."""
    return make_subjects(instruct_lm, {"original": (acting_adapter(instruct_lm, 1), "original")})


@pytest.fixture(scope="session")
def subjects(instruct_lm):
    """The base, and names of adapters that are not there: enough where the model is not run under them."""
    return Subjects(instruct_lm, VARIANTS)


@pytest.fixture(scope="session")
def adapted(instruct_lm, acting_adapter):
    """The base and two adapters that act."""
    adapters = {
        name: (acting_adapter(instruct_lm, seed, 0.05), variant) for seed, (name, variant) in enumerate(VARIANTS.items())
    }
    return make_subjects(instruct_lm, adapters)
