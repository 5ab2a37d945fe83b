"""The decoder against transformers' float32 logits, and against itself: scanned, cached, padded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from nmjax.interventions.effect import Context

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
def test_logits_equal_transformers(name, golden_folder, load_golden, left_padded, logits):
    """A ragged left-padded batch with 310 positions; the reference ran every row alone."""
    reference = np.load(golden_folder / name / "reference.npz")
    rows = [reference[f"tokens_{i}"] for i in range(4)]
    assert sorted(map(len, rows)) == [1, 57, 200, 310]
    tokens, mask = left_padded(rows)
    lm = load_golden(name)
    out = logits(lm.module, lm.params, tokens, mask)
    assert out.dtype == np.float32
    for i, row in enumerate(rows):
        wanted = reference[f"logits_{i}"]
        seen = out[i, tokens.shape[1] - len(row) + reference[f"positions_{i}"]]
        np.testing.assert_allclose(seen, wanted, rtol=0, atol=tolerance(wanted))


def test_goldens_can_tell_positions_apart(load_golden, left_padded, logits, golden_folder):
    """The comparison above would be blind to RoPE if these models' logits didn't depend on it."""
    reference = np.load(golden_folder / "llama-mha-untied" / "reference.npz")
    row = reference["tokens_1"]
    swapped = row.copy()
    swapped[[3, 90]] = swapped[[90, 3]]
    tokens, mask = left_padded([row, swapped])
    lm = load_golden("llama-mha-untied")
    a, b = logits(lm.module, lm.params, tokens, mask)[:, -1]
    assert np.abs(a - b).max() > 100 * tolerance(a)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_scanned_equals_unrolled(name, load_golden, left_padded, logits):
    lm = load_golden(name)
    rng = np.random.default_rng(0)
    tokens, mask = left_padded([rng.integers(0, 97, n) for n in (60, 17)])
    stacked = models.stack_layers(lm.params)
    a = logits(lm.module, lm.params, tokens, mask)
    b = logits(models.ScannedLlama(lm.config), stacked, tokens, mask)
    np.testing.assert_allclose(a[mask], b[mask], rtol=0, atol=tolerance(a[mask]))
    back = models.unstack_layers(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(lm.params)
    for seen, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(lm.params), strict=True):
        np.testing.assert_array_equal(seen, wanted)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(stacked["layers"])} == {lm.config.layers}


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_cached_equals_uncached(name, load_golden, left_padded, logits):
    """A prompt in two chunks, then token by token, in a cache with room to spare; the window of qwen2 (40) is passed."""
    lm = load_golden(name)
    rng = np.random.default_rng(1)
    tokens, mask = left_padded([rng.integers(0, 97, n) for n in (60, 45, 12)])
    rows, width, slots = *tokens.shape, 80
    wanted = logits(lm.module, lm.params, tokens, mask)
    positions = np.where(mask, mask.cumsum(1) - 1, -1).astype(np.int32)

    @jax.jit
    def step(chunk, ctx, cache):
        hidden, cache = lm.module.apply({"params": lm.params}, chunk, ctx=ctx, cache=cache)
        return lm.module.apply({"params": lm.params}, hidden, method="unembed"), cache

    cache = lm.module.init_cache(rows, slots, lm.dtype)
    k_pos = np.full((rows, slots), -1, np.int32)
    seen, slot = [], 0
    for size in (20, 30, *[1] * 10):
        part = slice(slot, slot + size)
        k_pos[:, part] = positions[:, part]
        ctx = Context(
            q_pos=jnp.asarray(positions[:, part]),
            k_pos=jnp.asarray(k_pos),
            tokens=jnp.asarray(tokens[:, part]),
            prompt_len=jnp.asarray(mask.sum(1), jnp.int32),
            slot=jnp.int32(slot),
        )
        out, cache = step(tokens[:, part], ctx, cache)
        seen.append(out)
        slot += size
    assert slot == width
    seen = np.concatenate(seen, axis=1)
    np.testing.assert_allclose(seen[mask], wanted[mask], rtol=0, atol=tolerance(wanted[mask]))


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_residual_identity(name, load_golden):
    """resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post, and blocks follow each other."""
    lm = load_golden(name)
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


def test_scanned_llama_refuses_a_cache(load_golden):
    lm = load_golden("llama-mha-untied")
    module = models.ScannedLlama(lm.config)
    with pytest.raises(ValueError, match="cache.*unstack_layers"):
        module.apply(
            {"params": models.stack_layers(lm.params)}, np.zeros((1, 1), int), cache=lm.module.init_cache(1, 4, lm.dtype)
        )


def test_stories_greedy_equals_transformers(shared_data, golden_folder, logits):
    """A real trained Llama writes, from its beginning-of-sequence token, the 200 tokens it writes in transformers."""
    wanted = json.loads((golden_folder / "stories260K_greedy.json").read_text())
    assert len(wanted) == 200
    lm = models.load(shared_data / "stories260K-hf")
    tokens = np.zeros((1, 201), np.int32)
    tokens[0, 0] = lm.config.bos_id
    mask = np.ones_like(tokens, bool)  # what lies after the last token written, causality hides
    for i in range(200):
        tokens[0, i + 1] = logits(lm.module, lm.params, tokens, mask)[0, i].argmax()
    assert tokens[0, 1:].tolist() == wanted
    assert lm.tokenizer.decode(wanted).startswith("Once upon a time")
