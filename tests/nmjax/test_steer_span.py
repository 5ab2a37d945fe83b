"""`steer_span` against addition by hand and against `steer` at selected positions."""

import numpy as np
import pytest

import nmjax

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]
RNG = np.random.default_rng(0)
U, W = RNG.standard_normal((2, 32)).astype(np.float32)
EACH = RNG.standard_normal((3, 32)).astype(np.float32)


def residual(lm, packs, prompts=PROMPTS):
    """[L, B, T, D], left-padded."""
    return np.asarray(nmjax.forward(lm, prompts, packs=packs, capture="resid_post").activations["resid_post"])


def test_it_is_steer_at_selected_positions(tiny_lm):
    spans = [(1, 4), (0, 2)]
    own = residual(tiny_lm, [nmjax.steer_span(v, 3.0, [0, 1], s) for v, s in zip((U, W), spans, strict=True)])
    other = residual(
        tiny_lm, [nmjax.steer(v, 3.0, [0, 1]).on(prompt_window=s) for v, s in zip((U, W), spans, strict=True)]
    )
    np.testing.assert_allclose(own, other, atol=1e-5)
    assert np.abs(own - residual(tiny_lm, None)).max() > 1


def test_each_token_has_its_own_vector(tiny_lm):
    """In the first block nothing but the addition differs, token by token."""
    packs = [nmjax.steer_span(EACH, 2.0, [0], (2, 5)), nmjax.steer_span(U, 2.0, [0])]
    change = residual(tiny_lm, packs)[0] - residual(tiny_lm, None)[0]
    wanted = np.zeros_like(change)
    wanted[0, 2:5] = 2 * EACH
    wanted[1, 2:] = 2 * U  # behind two columns of padding
    np.testing.assert_allclose(change[0], wanted[0], atol=1e-5)
    np.testing.assert_allclose(change[1, 2:], wanted[1, 2:], atol=1e-5)


def test_what_follows_the_prompt_is_left_alone(tiny_lm):
    packs = [nmjax.steer_span(U, 3.0), nmjax.steer_span(U, 3.0, span=(0, 4)), nmjax.steer(U, 3.0), None]
    found = nmjax.continuation_logprobs(tiny_lm, PROMPTS[1:] * 4, [[5, 6, 7]] * 4, packs=packs)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert all(np.abs(found[0] - other).max() > 0.01 for other in found[2:])


@pytest.mark.parametrize(
    "arguments",
    [
        (np.zeros(32), 1.0),
        (np.full(32, np.nan), 1.0),
        (EACH, 1.0, "all", (0, 4)),
        (EACH, 1.0),
        (U, 1.0, "all", (3, 3)),
        (U, 1.0, "all", (-1, 3)),
        (U, float("inf")),
        (U, 1.0, "nowhere"),
    ],
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=r"steer_span|layers"):
        nmjax.steer_span(*arguments)


def test_a_vector_of_another_model_is_an_error(tiny_lm):
    with pytest.raises(ValueError, match=r"31 numbers each, wanted 32"):
        nmjax.forward(tiny_lm, PROMPTS[:1], packs=nmjax.steer_span(U[:31], 1.0))
