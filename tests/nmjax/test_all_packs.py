"""Every shipped pack on the bundled model: it does something, nothing at dose 0, and the same in any company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import softmax

import models
import nmjax
from nmjax import generation, paths
from nmjax.data.questions import format_mmlu
from nmjax.data.world import held_out_questions, held_out_statements

NAMES = nmjax.list_packs()
PROBES = [
    "Once upon a time",
    "One day Mia was so",
    "In the end there was",
    "I feel",
    "The",
    "Riddle: I have two hands. I have no mouth.",
    "Words of the heart:",
    "Lake and tree. The",
    format_mmlu(held_out_questions(1, seed=5)[0]),
    held_out_statements(1, seed=5)[0].prompt,
]
NEW = 12


@pytest.fixture(scope="module")
def lm():
    return models.load(paths.checkpoint_dir("tiny"))


@pytest.fixture(scope="module")
def packs():
    return [nmjax.load_pack(name) for name in NAMES]


@pytest.fixture(scope="module")
def run(lm):
    """Sampled continuations, one pack a row, all of one prompt and under one noise."""

    def generate(packs, row_ids=None):
        rows = len(packs)
        row_ids = list(range(rows)) if row_ids is None else row_ids
        return nmjax.generate(
            lm, [PROBES[0]] * rows, packs, max_new_tokens=NEW, temperature=0.9, seed=11, row_ids=row_ids,
            eos_token_id=[],
        )  # fmt: skip

    return generate


@pytest.fixture(scope="module")
def together(run, packs):
    return run(packs)


def test_every_pack_moves_the_next_token(lm, packs):
    rows = [(pack, probe) for pack in [None, *packs] for probe in PROBES]
    result = nmjax.forward(lm, [probe for _, probe in rows], [pack for pack, _ in rows], row_ids=[0] * len(rows))
    shares = np.asarray(softmax(result.next_logits)).reshape(len(packs) + 1, len(PROBES), -1)
    moved = 0.5 * np.abs(shares[1:] - shares[:1]).sum(-1)  # total variation [packs, probes]
    for name, distance in zip(NAMES, moved, strict=True):
        if name == "none":
            assert (distance == 0).all()
        else:
            assert (distance > 1e-3).mean() >= 0.5, (name, distance)


@pytest.mark.slow
def test_at_dose_0_every_pack_is_no_pack(run, packs, together):
    zeros = run([pack.at(0) for pack in packs])
    nothing = run([None] * len(packs))
    assert zeros.tokens == nothing.tokens
    np.testing.assert_allclose(np.stack(zeros.logprobs), np.stack(nothing.logprobs), rtol=0, atol=3e-6)
    assert together.tokens != nothing.tokens


@pytest.mark.slow
def test_at_dose_0_beside_all_packs_it_is_no_pack_in_bits(run, packs):
    ids = list(range(2 * len(packs)))
    zeros = run([pack.at(0) for pack in packs] + packs, row_ids=ids)
    nothing = run([None] * len(packs) + packs, row_ids=ids)
    for i, name in enumerate(NAMES):
        assert zeros.tokens[i] == nothing.tokens[i], name
        np.testing.assert_array_equal(zeros.logprobs[i], nothing.logprobs[i], err_msg=name)
        np.testing.assert_array_equal(zeros.sample_logprobs[i], nothing.sample_logprobs[i], err_msg=name)


@pytest.mark.slow
def test_every_pack_has_a_derivative_at_dose_0(lm, packs):
    def last(doses):
        dosed = [pack.at(dose) for pack, dose in zip(packs, doses, strict=True)]
        return nmjax.forward(lm, [PROBES[1]] * len(packs), dosed).next_logits

    slopes = jax.jvp(last, (jnp.zeros(len(packs)),), (jnp.ones(len(packs)),))[1]
    for name, slope in zip(NAMES, np.asarray(slopes), strict=True):
        assert np.isfinite(slope).all()
        assert (np.abs(slope).max() > 1e-3) == (name != "none"), name


def test_a_pack_does_not_depend_on_its_company(run, packs, together):
    """The packs in another order."""
    order = np.random.default_rng(0).permutation(len(packs)).tolist()
    shuffled = run([packs[i] for i in order], row_ids=order)
    for place, i in enumerate(order):
        assert shuffled.tokens[place] == together.tokens[i], NAMES[i]


def alone(run, packs, together, i):
    single = run([packs[i]], row_ids=[i])
    assert single.tokens[0] == together.tokens[i], NAMES[i]
    np.testing.assert_allclose(single.logprobs[0], together.logprobs[i], atol=1e-4)
    np.testing.assert_allclose(single.sample_logprobs[0], together.sample_logprobs[i], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_pack_alone(run, packs, together, name):
    alone(run, packs, together, NAMES.index(name))


def test_all_packs_are_one_program(run, packs, together):
    """New doses and new noise are new data."""
    before = generation.decode._cache_size(), generation.prefill._cache_size()
    run([pack.at(0.3 + 0.01 * i) for i, pack in enumerate(packs)], row_ids=[7 * i for i in range(len(packs))])
    assert (generation.decode._cache_size(), generation.prefill._cache_size()) == before
