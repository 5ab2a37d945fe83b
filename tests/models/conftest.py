"""Tiny random checkpoints with logits computed by transformers; `tests/golden/make_models.py` made them."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import models

GOLDEN = Path(__file__).parents[1] / "golden" / "models"


@functools.cache
def _load(name: str):
    return models.load(GOLDEN / name)


@functools.cache
def _logits_fn(module):
    @jax.jit
    def run(params, tokens, mask):
        hidden = module.apply({"params": params}, tokens, mask)
        return module.apply({"params": params}, hidden, method="unembed")

    return run


@pytest.fixture(scope="session")
def golden_folder():
    return GOLDEN


@pytest.fixture(scope="session")
def load_golden():
    """name -> LanguageModel, loaded once a session."""
    return _load


@pytest.fixture(scope="session")
def logits():
    """(module, params, tokens [B, T], mask [B, T]) -> float32 [B, T, V], compiled once a module and shape."""

    def run(module, params, tokens, mask):
        return np.asarray(_logits_fn(module)(params, tokens, mask))

    return run


@pytest.fixture(scope="session")
def left_padded():
    """Rows of different lengths -> tokens int32 [B, T] and mask bool [B, T]."""

    def pad(rows):
        width = max(map(len, rows))
        tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            tokens[i, width - len(row) :] = row
            mask[i, width - len(row) :] = True
        return tokens, mask

    return pad
