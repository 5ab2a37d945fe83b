"""The decoder against transformers' float32 logits, and against itself: scanned, cached, padded."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from nmjax.interventions.effect import Context, plain_context

VARIANTS = [
    "llama-mha-untied",
    "llama-mha-tied-llama3",
    "llama-gqa2-tied-linear",
    "llama-gqa2-untied-yarn",
    "llama-gqa4-untied-llama3",
    "llama-gqa4-tied-bias",
    "qwen2-gqa2-tied",
    "qwen2-gqa4-untied-sliding",
    "qwen3-gqa2-tied",
    "qwen3-gqa4-untied-yarn",
]
ONE_OF_EACH_FAMILY = ["llama-gqa2-untied-yarn", "qwen2-gqa4-untied-sliding", "qwen3-gqa2-tied"]


def tolerance(reference):
    return 1e-5 * max(1.0, np.abs(reference).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name, golden):
    """A ragged left-padded batch with 310 positions; the reference ran every row alone."""
    it = golden(name)
    assert it.logits.dtype == np.float32 and sorted(it.mask.sum(1)) == [1, 57, 200, 310]
    for i, length in enumerate(it.mask.sum(1)):
        wanted = it.reference[f"logits_{i}"]
        seen = it.logits[i, it.tokens.shape[1] - length + it.reference[f"positions_{i}"]]
        np.testing.assert_allclose(seen, wanted, rtol=0, atol=tolerance(wanted))


def test_goldens_can_tell_positions_apart(golden, logits):
    """The comparison above would be blind to RoPE if these models' logits didn't depend on it."""
    it = golden("llama-mha-untied")
    swapped = it.tokens.copy()
    swapped[0, [3, 90]] = swapped[0, [90, 3]]
    seen = logits(it.lm.module, it.lm.params, swapped, it.mask)
    assert np.abs(seen[0, -1] - it.logits[0, -1]).max() > 100 * tolerance(it.logits)
    np.testing.assert_array_equal(seen[1:], it.logits[1:])


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_scanned_equals_unrolled(name, golden, logits):
    it = golden(name)
    stacked = models.stack_layers(it.lm.params)
    seen = logits(models.ScannedLlama(it.lm.config), stacked, it.tokens, it.mask)
    np.testing.assert_allclose(seen[it.mask], it.logits[it.mask], rtol=0, atol=tolerance(it.logits[it.mask]))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(stacked["layers"])} == {it.lm.config.layers}
    back = models.unstack_layers(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(it.lm.params)
    for seen, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(it.lm.params), strict=True):
        np.testing.assert_array_equal(seen, wanted)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_cached_equals_uncached(name, golden):
    """A prompt in two chunks, then token by token, in a cache with room to spare, beyond the window of qwen2 (40)."""
    it = golden(name)
    module, (rows, width), slots = it.lm.module, it.tokens.shape, 320
    positions = np.where(it.mask, it.mask.cumsum(1) - 1, -1).astype(np.int32)

    @jax.jit
    def step(params, chunk, ctx, cache):
        hidden, cache = module.apply({"params": params}, chunk, ctx=ctx, cache=cache)
        return module.apply({"params": params}, hidden, method="unembed"), cache

    cache = module.init_cache(rows, slots, it.lm.dtype)
    k_pos = np.full((rows, slots), -1, np.int32)
    seen, slot = [], 0
    for size in (150, 150, *[1] * 10):
        part = slice(slot, slot + size)
        k_pos[:, part] = positions[:, part]
        ctx = Context(
            q_pos=jnp.asarray(positions[:, part]),
            k_pos=jnp.array(k_pos),
            tokens=jnp.asarray(it.tokens[:, part]),
            prompt_len=jnp.asarray(it.mask.sum(1), jnp.int32),
            slot=jnp.int32(slot),
        )
        out, cache = step(it.lm.params, it.tokens[:, part], ctx, cache)
        seen.append(out)
        slot += size
    assert slot == width
    seen = np.concatenate(seen, axis=1)
    np.testing.assert_allclose(seen[it.mask], it.logits[it.mask], rtol=0, atol=tolerance(it.logits[it.mask]))


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_residual_identity(name, golden):
    """resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post, and blocks follow each other."""
    lm = golden(name).lm
    tokens = np.random.default_rng(2).integers(0, 97, (2, 16))

    @jax.jit
    def run(params):
        return lm.module.apply({"params": params}, tokens, mutable=["intermediates"])[1]["intermediates"]

    state = run(lm.params)
    before = state["at_embed"]
    for i in range(lm.config.layers):
        at = state[f"layers_{i}"]
        assert np.abs(at["at_attn_out"]).max() > 0.1 and np.abs(at["at_mlp_out"]).max() > 0.1
        np.testing.assert_array_equal(at["at_resid_pre"], before)
        np.testing.assert_allclose(at["at_resid_pre"] + at["at_attn_out"], at["at_resid_mid"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(at["at_resid_mid"] + at["at_mlp_out"], at["at_resid_post"], rtol=1e-6, atol=1e-6)
        pattern = np.asarray(at["attn"]["at_pattern"])
        np.testing.assert_allclose(pattern.sum(-1), 1.0, atol=1e-6)
        assert not np.triu(pattern[0, 0], 1).any(), "a query attended to a later token"
        before = at["at_resid_post"]


def test_scanned_layers_fill_and_read_a_cache_as_unrolled_ones_do(golden):
    it = golden("llama-mha-untied")
    tokens, half = it.tokens[:, :6], 3
    stacked, seen = models.ScannedLlama(it.lm.config), []
    for module, params in ((it.lm.module, it.lm.params), (stacked, models.stack_layers(it.lm.params))):
        whole = plain_context(tokens)
        cache = module.init_cache(len(tokens), 6, it.lm.dtype)
        for start in (0, half):
            here = slice(start, start + half)
            ctx = whole.replace(q_pos=whole.q_pos[:, here], k_pos=whole.k_pos[:, : start + half], slot=start)
            hidden, cache = module.apply({"params": params}, tokens[:, here], ctx=ctx, cache=cache)
        seen.append((hidden, jax.tree.map(lambda *x: np.stack(x), *cache) if isinstance(cache, list) else cache))
    chex.assert_trees_all_close(*seen, atol=1e-5)
    np.testing.assert_allclose(seen[1][0], module.apply({"params": params}, tokens)[:, half:], atol=1e-5)


def test_stories_greedy_equals_transformers(shared_data, golden_folder, logits):
    """A real trained Llama writes what it writes in transformers: behind its beginning-of-sequence token and any number
    of those 200 tokens, the next of them is the likeliest.
    """
    wanted = json.loads((golden_folder / "stories260K_greedy.json").read_text())
    assert len(wanted) == 200
    lm = models.load(shared_data / "stories260K-hf")
    tokens = np.array([[lm.config.bos_id, *wanted]], np.int32)
    found = logits(lm.module, lm.params, tokens, np.ones(tokens.shape, bool))
    assert found[0, :-1].argmax(-1).tolist() == wanted
    assert lm.tokenizer.decode(wanted).startswith("Once upon a time")
