"""One pass: shapes, captures, the residual identity under effects, bad input."""

import chex
import numpy as np
import pytest

import nmjax

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]
B, T, L, N, K, H, D, V = 2, 5, 3, 4, 2, 8, 32, 97
SHAPES = {
    "embed": (B, T, D), "resid_pre": (L, B, T, D), "query": (L, B, T, N, H), "scores": (L, B, N, T, T),
    "pattern": (L, B, N, T, T), "head_out": (L, B, T, N, H), "attn_out": (L, B, T, D), "resid_mid": (L, B, T, D),
    "mlp_out": (L, B, T, D), "resid_post": (L, B, T, D),
}  # fmt: skip


@pytest.fixture(scope="module")
def result(tiny_lm):
    pack = nmjax.compose(nmjax.steer(np.ones(32), 0.5), nmjax.decay_kv(0.2), nmjax.mask_heads([1], layers=[0]))
    return nmjax.forward(tiny_lm, PROMPTS, packs=pack, capture=tuple(SHAPES))


def test_shapes(result):
    chex.assert_shape(result.logits, (B, T, V))
    chex.assert_shape(result.next_logits, (B, V))
    assert result.mask.tolist() == [[True] * 5, [False] * 2 + [True] * 3]
    for site, shape in SHAPES.items():
        chex.assert_shape(result.activations[site], shape)


def test_residual_identity_holds_under_effects(result, assert_close):
    a = result.activations
    assert_close(a["resid_pre"] + a["attn_out"], a["resid_mid"])
    # Steering adds to resid_post after the sum.
    assert_close(a["resid_mid"] + a["mlp_out"] + 0.5, a["resid_post"])
    assert_close(a["resid_post"][:-1], a["resid_pre"][1:])
    assert_close(a["embed"], a["resid_pre"][0])


def test_attention_is_causal_and_sums_to_one_on_real_tokens(result):
    pattern = np.asarray(result.activations["pattern"])
    np.testing.assert_allclose(pattern[:, 0].sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(pattern[:, 1, :, 2:].sum(-1), 1, atol=1e-6)
    assert (pattern * np.triu(np.ones((T, T)), 1))[:, 0].max() == 0
    assert pattern[:, 1, :, 2:, :2].max() == 0  # nobody sees padding
    assert np.abs(np.asarray(result.activations["head_out"])[0, :, :, 1]).max() == 0  # the masked head


def test_next_logits_are_after_the_sampler(tiny_lm):
    out = nmjax.forward(tiny_lm, PROMPTS, packs=nmjax.temperature(0.5))
    np.testing.assert_allclose(out.next_logits, 2 * out.logits[:, -1], rtol=1e-6)


def test_capturing_changes_nothing(tiny_lm, assert_close):
    assert_close(nmjax.forward(tiny_lm, PROMPTS).logits, nmjax.forward(tiny_lm, PROMPTS, capture=tuple(SHAPES)).logits)


def test_notes_of_extrapolated_doses(tiny_lm):
    assert nmjax.forward(tiny_lm, PROMPTS).notes == ()
    (note,) = nmjax.forward(tiny_lm, PROMPTS, packs=[None, nmjax.scale_qk(2.0).at(1.5)]).notes
    assert "row 1" in note and "1.5" in note


@pytest.mark.parametrize(
    "kwargs, word",
    [
        (dict(prompts="text"), "prompts"),
        (dict(prompts=[]), "prompts"),
        (dict(prompts=[[]]), "prompts"),
        (dict(prompts=[[97]]), "97"),
        (dict(prompts=[["a"]]), "prompts"),
        (dict(prompts=["text"]), "tokenizer"),
        (dict(prompts=[[3] * 129]), "context of 128"),
        (dict(packs=[None]), "packs"),
        (dict(packs="cocaine"), "packs"),
        (dict(capture=("resid",)), "capture='resid'"),
        (dict(capture="logits"), "capture='logits'"),
        (dict(seed=[1, 2, 3]), "seed"),
        (dict(seed=0.5), "seed"),
        (dict(row_ids=[1]), "row_ids"),
    ],
)
def test_bad_input_is_named(tiny_lm, kwargs, word):
    with pytest.raises(ValueError, match=word):
        nmjax.forward(tiny_lm, **{"prompts": PROMPTS, **kwargs})
