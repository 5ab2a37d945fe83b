"""Whatever the effect: padding changes nothing, and a cache changes nothing."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import nmjax
from nmjax.interventions.compose import batch
from nmjax.interventions.effect import Context
from nmjax.interventions.sites import SITES


def _specimens():
    """The specimens of every class, which `test_dose_zero.py` checks to be complete."""
    spec = importlib.util.spec_from_file_location("dose_zero", Path(__file__).with_name("test_dose_zero.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SPECIMENS


NEW = 8
SPECIMENS = _specimens()
NAMES, PACKS = list(SPECIMENS), list(SPECIMENS.values())
PROMPTS = [np.random.default_rng(i).integers(3, 97, (6, 3, 12, 1)[i % 4]).tolist() for i in range(len(PACKS))]
# In a pass over the whole text all of it is prompt; these say otherwise of what was generated.
BY_ORIGIN = ("segment rates", "steer somewhere")


def named(name, check, *arguments, **options):
    try:
        check(*arguments, **options)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


def test_a_cache_changes_nothing(in_company, pass_in_company, assert_close):
    """In the batches of the whole suite: the place of a row, so its random stream, is the same in both."""
    out = in_company(PROMPTS, PACKS, max_new_tokens=NEW)
    passes = pass_in_company([p + t for p, t in zip(PROMPTS, out.tokens, strict=True)], PACKS)
    plain = pass_in_company([p + t for p, t in zip(PROMPTS, out.tokens, strict=True)], [e.at(0) for e in PACKS])
    for i, name in enumerate(NAMES):
        logits, _ = passes[i]
        steps = log_softmax(logits[-NEW - 1 : -1].astype(np.float64), axis=-1)[np.arange(NEW), out.tokens[i]]
        if name not in BY_ORIGIN:
            named(name, assert_close, out.logprobs[i], steps, scale=np.abs(logits).max())
        if any(PACKS[i].touches(site) for site in SITES if site != "logits"):
            assert np.abs(logits - plain[i][0]).max() > 1e-2, f"{name} does nothing"


def test_far_positions(tiny_lm):
    """Strides, windows and segments count exactly where float32 is coarse; ages, not positions, decide the rest."""
    T = 100_003
    k_pos = np.arange(T - 399, T + 1)
    ctx = Context(
        q_pos=jnp.full((2, 1), T), k_pos=jnp.asarray([k_pos, k_pos]), tokens=jnp.zeros((2, 1), jnp.int32),
        prompt_len=jnp.full(2, T - 50), layer=jnp.int32(0),
    )  # fmt: skip
    x, age = jnp.zeros((2, 4, 1, 400)), T - k_pos
    for effect, wanted in (
        (nmjax.stride_kv(7, newest=3), -8.0 * ((k_pos % 7 != 0) & (age >= 3))),
        (nmjax.window_kv(33), np.where(age < 33, 0, np.finfo(np.float32).min)),
        (nmjax.window_kv(33).at(0.5), np.where(age < 66, 0, np.finfo(np.float32).min)),
        (nmjax.segment_kv(0.5, -0.25, split=77), np.where(age < 77, 0.5, -0.25)),
        (nmjax.segment_kv(1.0, -1.0, by="origin"), np.where(k_pos >= T - 50, 1.0, -1.0)),
        (nmjax.decay_kv(0.2, mode="logit"), -0.2 * age),
    ):
        (bound,) = batch([effect, None], tiny_lm)
        seen = np.asarray(bound.act("scores", x, ctx))
        np.testing.assert_allclose(seen[0, 2, 0], wanted, rtol=1e-6)
        assert not seen[1].any()


def see(lm, texts):
    result = nmjax.forward(lm, texts, PACKS, row_ids=list(range(len(PACKS))))
    return [np.asarray(x)[m] for x, m in zip(result.logits, result.mask, strict=True)], np.asarray(result.next_logits)


@pytest.mark.slow
def test_padding_changes_nothing(tiny_lm, assert_close):
    """The same rows in buckets of 16 and of 32 tokens, the wider one for the sake of one long neighbour."""
    logits, last = see(tiny_lm, PROMPTS)
    wide = list(PROMPTS)
    wide[NAMES.index("temperature up")] = list(range(3, 33))
    padded, padded_last = see(tiny_lm, wide)
    for i, name in enumerate(NAMES):
        if wide[i] is PROMPTS[i]:
            named(name, assert_close, padded[i], logits[i])
            named(name, assert_close, padded_last[i], last[i], scale=np.abs(logits[i]).max())
