"""Steering by name, its placebos, several vectors and subspaces: against sums written out by hand."""

import jax
import numpy as np
import pytest

import nmjax
from nmjax.interventions.compose import batch
from nmjax.steering.store import save_named

L, D = 3, 32
RNG = np.random.default_rng(5)
CALM, BOLD = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in RNG.standard_normal((2, L, D)))
LONG = 4 * CALM + BOLD  # not of norm 1
ONE, TWO = RNG.standard_normal((2, D)).astype(np.float32)
PROMPTS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8]]


@pytest.fixture
def lm(tiny_lm, tmp_path, monkeypatch):
    """`tiny_lm` with vectors of its own in a cache folder of this test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, vectors in (("calm", CALM), ("bold", BOLD), ("long", LONG)):
        save_named(tiny_lm, name, vectors)
    return tiny_lm


def bank(lm, effect):
    """What the effect adds per unit of dose: [L, D]."""
    (bound,) = batch([effect], lm)
    return np.einsum("lm,mld->ld", bound.coefficients[0], bound.vectors)


def added(result):
    """[B][L, T, D] at real tokens, and the norms [L, T, 1] of what it was added to."""
    at = {site: np.asarray(x) for site, x in result.activations.items()}
    before = at["resid_mid"] + at["mlp_out"]
    both = []
    for i, mask in enumerate(np.asarray(result.mask)):
        norms = np.linalg.norm(before[:, i][:, mask].astype(np.float64), axis=-1, keepdims=True)
        both.append(((at["resid_post"] - before)[:, i][:, mask], norms))
    return both


def see(lm, packs):
    capture = ("resid_mid", "mlp_out", "resid_post")
    return added(nmjax.forward(lm, PROMPTS[: len(packs)], packs, capture=capture))


def test_what_is_added(lm, assert_close):
    """Absolute: the vector as it is. Relative: its direction, as long as a share of the token's own residual."""
    packs = [
        nmjax.steer("long", 1.5, layers=[0, 2]).at(0.5),
        nmjax.compose(nmjax.steer("long", 0.4, coef="relative"), nmjax.steer(ONE, 2.0, layers=[1])),
        nmjax.compose(nmjax.steer("bold", -2.0), nmjax.steer(TWO, 0.5)),
    ]
    (first, _), (second, norms), (third, _) = see(lm, packs)
    inside = np.array([1, 0, 1])[:, None, None]
    assert_close(first, np.broadcast_to(0.75 * LONG[:, None] * inside, first.shape))
    unit = LONG / np.linalg.norm(LONG, axis=-1, keepdims=True)
    wanted = 0.4 * norms * unit[:, None] + 2 * ONE * np.array([0, 1, 0])[:, None, None]
    assert_close(second, wanted)
    assert_close(third, np.broadcast_to((-2 * BOLD + 0.5 * TWO)[:, None], third.shape))


def test_rows_with_different_names_share_a_slot(lm):
    effects = batch([nmjax.steer("calm"), nmjax.steer("bold"), None, nmjax.steer("calm", 3.0, layers=[1])], lm)
    assert len(effects) == 1 and effects[0].vectors.shape == (2, L, D)
    assert effects[0].coefficients.shape == (4, L, 2) and effects[0].dose.tolist() == [1, 1, 0, 1]
    added = np.einsum("lm,mld->ld", effects[0].coefficients[3], effects[0].vectors)
    np.testing.assert_allclose(added, 3 * CALM * np.array([0, 1, 0])[:, None], rtol=1e-6)


def test_placebos(lm):
    """As long as the reference; at right angles where that is asked for; another seed is another direction."""
    random, other = (bank(lm, nmjax.steer_placebo("random", "long", coef="absolute", seed=s)) for s in (0, 1))
    norms = np.linalg.norm(LONG, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(random, axis=-1), norms, rtol=1e-5)
    assert np.abs((random * other).sum(-1) / norms**2).max() < 0.6
    np.testing.assert_array_equal(random, bank(lm, nmjax.steer_placebo("random", "long", coef="absolute", seed=0)))
    right = bank(lm, nmjax.steer_placebo("orthogonal", ["long", "bold"], 2.0, coef="absolute"))
    np.testing.assert_allclose(np.linalg.norm(right, axis=-1), 2 * norms, rtol=1e-5)
    for reference in (LONG, BOLD):
        np.testing.assert_allclose((right * reference).sum(-1) / norms, 0, atol=1e-4)
    relative = bank(lm, nmjax.steer_placebo("orthogonal", "long", 0.3))
    np.testing.assert_allclose(np.linalg.norm(relative, axis=-1), 0.3, rtol=1e-5)
    without = bank(lm, nmjax.steer_placebo("random", scale=0.3))
    np.testing.assert_allclose(np.linalg.norm(without, axis=-1), 0.3, rtol=1e-5)


def test_a_placebo_steers_as_hard(lm, assert_close):
    packs = [nmjax.steer_placebo("random", "calm", 0.3), nmjax.steer_placebo("orthogonal", ["calm"], 0.3).at(2)]
    for (seen, norms), share in zip(see(lm, packs), (0.3, 0.6), strict=True):
        assert_close(np.linalg.norm(seen, axis=-1, keepdims=True), share * norms)


def test_a_missing_vector_is_named(lm):
    mine = nmjax.compose(nmjax.steer("gentle"), name="mine")
    for packs in (mine, nmjax.compose(nmjax.steer_placebo("orthogonal", ["calm", "gentle"]), name="mine")):
        with pytest.raises(ValueError, match="pack mine: Steer: .*'gentle'.*bold, calm, long.*build_steering_vectors"):
            nmjax.forward(lm, PROMPTS[:1], packs)
    with pytest.raises(ValueError, match="pack mine: Steer: .*'gentle'.*--types=gentle"):
        nmjax.forward(lm, PROMPTS[:1], nmjax.contrast(mine))
    with pytest.raises(ValueError, match="steering vector name"):
        nmjax.forward(lm, PROMPTS[:1], nmjax.steer("../calm"))


@pytest.mark.slow
def test_scale_of_a_named_vector_has_a_gradient(lm):
    def loss(scale):
        packs = nmjax.compose(nmjax.steer("bold", scale, layers=[1], coef="relative"), nmjax.steer(ONE, 0.1))
        return nmjax.forward(lm, PROMPTS[:1], packs).next_logits[0, 3]

    slope, h = jax.grad(loss)(0.3), 1e-2
    np.testing.assert_allclose(slope, (loss(0.3 + h) - loss(0.3 - h)) / (2 * h), rtol=2e-2)
    assert abs(slope) > 1e-2


def test_subspaces_of_several_rows(lm, assert_close):
    """Every row is pulled to its own; directions that depend on one another span less than they number."""
    plane, line = np.stack([ONE, TWO]), np.stack([ONE, -2 * ONE, 0 * ONE])
    rows = [(0.5, plane), (1.0, line), (0.7, plane)]
    packs = [nmjax.soft_projection(share, basis, layers="all") for share, basis in rows]
    capture = ("resid_mid", "mlp_out", "resid_post")
    result = nmjax.forward(lm, PROMPTS, packs, capture=capture)
    at = {site: np.asarray(x, np.float64) for site, x in result.activations.items()}
    for i, (share, basis) in enumerate(((0.5, plane), (1.0, line[:1]), (0.7, plane))):
        x = (at["resid_mid"] + at["mlp_out"])[:, i][:, np.asarray(result.mask[i])]
        # The projection on the span of the rows of A: A' (A A')^-1 A.
        onto = basis.T @ np.linalg.solve(basis @ basis.T, basis)
        assert_close(at["resid_post"][:, i][:, np.asarray(result.mask[i])], x + share * (x @ onto - x))
    assert nmjax.compose(packs[0].at(3)).notes()[1] == "soft_projection: share 1.5 lowered to 1"
