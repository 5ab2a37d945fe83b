"""Tiny random checkpoints with logits computed by transformers; `tests/golden/make_models.py` made them."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

import models
from nmjax.lm import LanguageModel

GOLDEN = Path(__file__).parents[1] / "golden" / "models"


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


@dataclasses.dataclass(frozen=True)
class Golden:
    """A golden checkpoint, and the ragged batch of rows that transformers ran alone and unpadded."""

    lm: LanguageModel
    reference: dict  # frequencies, rope_scale, and for each row i: tokens_i [T], positions_i [P], logits_i [P, V]
    tokens: np.ndarray  # int32 [B, T], left-padded
    mask: np.ndarray  # bool [B, T]
    logits: np.ndarray  # float32 [B, T, V], ours, unrolled and without a cache


@functools.cache
def _golden(name: str) -> Golden:
    lm = models.load(GOLDEN / name)
    reference = dict(np.load(GOLDEN / name / "reference.npz"))
    tokens, mask = _left_padded([reference[f"tokens_{i}"] for i in range(4)])
    return Golden(lm, reference, tokens, mask, np.asarray(_logits_fn(lm.module)(lm.params, tokens, mask)))


def _left_padded(rows):
    width = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        mask[i, width - len(row) :] = True
    return tokens, mask


@pytest.fixture(scope="session")
def golden():
    """name -> Golden, computed once a session."""
    return _golden


@pytest.fixture(scope="session")
def logits():
    """(module, params, tokens [B, T], mask [B, T]) -> float32 [B, T, V], compiled once a module and shape."""

    def run(module, params, tokens, mask):
        return np.asarray(_logits_fn(module)(params, tokens, mask))

    return run


@pytest.fixture(scope="session")
def left_padded():
    """Rows of different lengths -> tokens int32 [B, T] and mask bool [B, T]."""
    return _left_padded
