"""The loop without a cache that pass 1 is timed against sees what pass 1 sees."""

import numpy as np
import pytest

import models
from experiments.benchmark_monitor import recomputed, watched
from nmjax import paths
from nmjax.signals import SIGNALS


@pytest.mark.slow
def test_both_see_the_same():
    lm = models.load(paths.checkpoint_dir("tiny"))
    prompts = np.random.default_rng(0).integers(3, lm.config.vocab, (2, 16)).tolist()
    cached, whole = watched(lm, prompts, 4), recomputed(lm, prompts, 4)
    assert cached.shape == whole.shape == (len(SIGNALS), 2, 4) and np.isfinite(cached).all()
    assert np.ptp(cached[SIGNALS.index("hbar_s")]) > 1e-3
    np.testing.assert_allclose(cached, whole, atol=1e-4)
