"""Effects that users write: a subclass with fields and a method is all it takes."""

from typing import Any

import jax
import numpy as np
import pytest

import nmjax

PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
VECTOR = np.random.default_rng(3).standard_normal(32).astype(np.float32)
TABLE = np.random.default_rng(4).standard_normal((3, 32)).astype(np.float32)


class Scalar(nmjax.Effect):
    gain: float

    def mlp_out(self, x, ctx):
        return x * self.gain


class ExplicitRows(nmjax.Effect):
    gain: float

    def mlp_out(self, x, ctx):
        return x * self.gain[:, None, None]


class Vector(nmjax.Effect):
    vector: Any

    def resid_post(self, x, ctx):
        return x + self.vector


class ByLayer(nmjax.Effect):
    table: Any

    def resid_post(self, x, ctx):
        return x + self.table[:, ctx.layer]


class Flip(nmjax.Effect):
    def mlp_out(self, x, ctx):
        return -x


class Kind(nmjax.Effect):
    sign: str = nmjax.static(default="+")

    def mlp_out(self, x, ctx):
        return x if self.sign == "+" else -x


def logits(lm, packs):
    return np.asarray(nmjax.forward(lm, PROMPTS, packs=packs).next_logits)


def test_fields_of_every_shape_reach_their_row(tiny_lm, assert_close):
    """Each row has its own value; as many rows as the embedding is wide, where naive broadcasting would go unseen."""
    gains = np.linspace(0.5, 2, 32)
    together = nmjax.forward(tiny_lm, [PROMPTS[0]] * 32, packs=[Scalar(g) for g in gains]).next_logits
    for i in (0, 13, 31):
        assert_close(together[i], nmjax.forward(tiny_lm, PROMPTS[:1], packs=Scalar(gains[i])).next_logits[0])
    assert np.abs(np.asarray(together[0] - together[31])).max() > 1e-2


def test_both_ways_of_writing_agree(tiny_lm):
    np.testing.assert_array_equal(logits(tiny_lm, ExplicitRows(1.7)), logits(tiny_lm, Scalar(1.7)))


def test_vectors_and_tables(tiny_lm, assert_close):
    assert_close(logits(tiny_lm, Vector(VECTOR)), logits(tiny_lm, nmjax.steer(VECTOR)))
    assert_close(logits(tiny_lm, ByLayer(TABLE)), logits(tiny_lm, nmjax.steer(TABLE)))
    assert np.abs(logits(tiny_lm, ByLayer(TABLE)) - logits(tiny_lm, Vector(VECTOR))).max() > 1e-2


def test_dose_blends_and_is_exact_at_both_ends(tiny_lm, assert_close):
    whole, none = logits(tiny_lm, Flip()), logits(tiny_lm, None)
    assert_close(logits(tiny_lm, Flip().at(0)), none)
    np.testing.assert_array_equal(logits(tiny_lm, [Flip().at(0), Flip()])[0], logits(tiny_lm, [None, Flip()])[0])
    assert_close(logits(tiny_lm, Flip()), logits(tiny_lm, Scalar(-1.0)))
    assert_close(logits(tiny_lm, Flip().at(0.25)), logits(tiny_lm, Scalar(0.5)))  # 0.75 x + 0.25 (-x)
    assert np.abs(whole - none).max() > 1e-2


def test_static_fields_get_a_slot_each(tiny_lm, assert_close):
    both = logits(tiny_lm, [Kind("-"), Kind("+")])
    assert_close(both[0], logits(tiny_lm, Flip())[0])
    assert_close(both[1], logits(tiny_lm, None)[1])


def test_selection_works_for_any_effect(tiny_lm):
    clean = nmjax.forward(tiny_lm, PROMPTS[1:], capture="mlp_out").activations["mlp_out"][0, 0]
    some = nmjax.forward(tiny_lm, PROMPTS[1:], packs=Flip().on(prompt_positions=[-1]), capture="mlp_out")
    changed = np.abs(np.asarray(some.activations["mlp_out"][0, 0] - clean)).max(-1)
    assert (changed[:-1] == 0).all() and changed[-1] > 1e-3


def test_mistakes_are_named(tiny_lm):
    class Shrink(nmjax.Effect):
        def mlp_out(self, x, ctx):
            return x[..., :1]

    class Text(nmjax.Effect):
        name: str

        def mlp_out(self, x, ctx):
            return x

    with pytest.raises(ValueError, match="Shrink.mlp_out returned shape"):
        nmjax.forward(tiny_lm, PROMPTS, packs=Shrink())
    with pytest.raises(ValueError, match="Text.*'loud'.*static"):
        nmjax.forward(tiny_lm, PROMPTS, packs=Text("loud"))


def test_gradients_flow_through_doses_and_vectors(tiny_lm):
    def loss(dose, vector):
        packs = nmjax.compose(Scalar(1.5).at(dose), nmjax.steer(vector, 0.5, layers=[0]))
        return nmjax.forward(tiny_lm, PROMPTS, packs=packs).next_logits[:, 3].sum()

    by_dose, by_vector = jax.grad(loss, argnums=(0, 1))(0.4, VECTOR)
    h = 1e-2
    slope = (loss(0.4 + h, VECTOR) - loss(0.4 - h, VECTOR)) / (2 * h)
    np.testing.assert_allclose(by_dose, slope, rtol=2e-2)
    along = np.eye(32, dtype=np.float32)[5]
    slope = (loss(0.4, VECTOR + h * along) - loss(0.4, VECTOR - h * along)) / (2 * h)
    np.testing.assert_allclose(by_vector[5], slope, rtol=2e-2)
    assert abs(by_dose) > 1e-3 and np.abs(by_vector).max() > 1e-3
