"""Interventions in sequence and side by side."""

import numpy as np
import pytest

import nmjax
from nmjax.interventions.compose import _merge, as_rows, batch

RNG = np.random.default_rng(1)
V, W = RNG.standard_normal((2, 32)).astype(np.float32)
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def lone(tiny_lm):
    """Next-token logits of one intervention alone."""
    return lambda iv: np.asarray(nmjax.forward(tiny_lm, [PROMPT], packs=iv).next_logits[0])


def test_order_is_kept_and_matters(lone):
    push, clean = nmjax.steer(V, 2.0, layers=[1]), nmjax.ablate(V, layers=[1])
    first, second = nmjax.compose(push, clean), nmjax.compose(clean, push)
    assert first.content_hash() != second.content_hash()
    assert np.abs(lone(first) - lone(second)).max() > 1e-2
    np.testing.assert_allclose(lone(first), lone(clean), atol=1e-4)  # what was pushed is removed again


def test_content_hash_is_of_the_content():
    pack = nmjax.compose(nmjax.scale_qk(1.5), nmjax.steer(V, 1.0), name="one")
    same = nmjax.compose(nmjax.compose(nmjax.scale_qk(1.5)), nmjax.steer(V.copy(), 1.0), name="two")
    assert pack.content_hash() == same.content_hash()
    others = [
        pack.at(0.5),
        nmjax.compose(nmjax.scale_qk(1.6), nmjax.steer(V, 1.0)),
        nmjax.compose(nmjax.scale_qk(1.5, layers="mid"), nmjax.steer(V, 1.0)),
        nmjax.compose(nmjax.scale_qk(1.5), nmjax.steer(W, 1.0)),
        nmjax.compose(nmjax.scale_qk(1.5), nmjax.steer(V, 1.0).on(prompt="all")),
    ]
    hashes = {pack.content_hash(), *(other.content_hash() for other in others)}
    assert len(hashes) == 1 + len(others)


def test_conflicting_orders_and_many_vectors_in_one_batch(tiny_lm, lone, assert_close):
    push, pull, clean = nmjax.steer(V, 2.0), nmjax.steer(W, -1.0, layers=[0]), nmjax.ablate(V + W, layers=[0, 1])
    sharp = nmjax.scale_qk(3.0)
    rows = [
        nmjax.compose(push, clean),
        nmjax.compose(clean, push),
        nmjax.compose(push, pull, sharp),
        nmjax.compose(pull, sharp),
        nmjax.compose(push, push, clean),
        None,
        push,
        clean.at(0.5),
    ]
    together = np.asarray(nmjax.forward(tiny_lm, [PROMPT] * len(rows), packs=rows).next_logits)
    for row, iv in zip(together, rows, strict=True):
        assert_close(row, lone(iv))
    distances = np.abs(together[:, None] - together[None]).max(-1)
    assert (distances[~np.eye(len(rows), dtype=bool)] > 1e-3).all()  # they are all different interventions


def test_a_vector_held_by_many_rows_is_stored_once(tiny_lm):
    rows = [nmjax.steer(V, 1.0).at(0.1 * i) for i in range(8)] + [nmjax.steer(W, 1.0)]
    (slot,) = batch(rows, tiny_lm)
    assert slot.vectors.shape == (2, 3, 32) and slot.coefficients.shape == (9, 3, 2)


def test_applying_a_pack_changes_neither_the_pack_nor_the_model(tiny_lm, lone):
    before, pack = lone(None), nmjax.compose(nmjax.scale_qk(2.0), nmjax.steer(V, 1.0), nmjax.decay_kv(0.1))
    name, first = pack.content_hash(), lone(pack)
    other = lone(nmjax.mask_heads([0]))
    np.testing.assert_array_equal(lone(pack), first)
    np.testing.assert_array_equal(lone(None), before)
    assert pack.content_hash() == name
    assert np.abs(first - before).max() > 1e-2 and np.abs(other - first).max() > 1e-2


@pytest.mark.parametrize("a, b, wanted", [("", "ab", 2), ("ab", "ba", 3), ("abc", "abc", 3), ("abcbdab", "bdcaba", 9)])
def test_merge_is_a_shortest_common_supersequence(a, b, wanted):
    merged = _merge(list(a), list(b))
    assert len(merged) == wanted
    for word in (a, b):
        rest = iter(merged)
        assert all(letter in rest for letter in word)


def test_lists_must_fit_the_rows():
    with pytest.raises(ValueError, match="packs has 2 entries.*3 rows"):
        as_rows([None, None], 3)
    with pytest.raises(ValueError, match=r"packs\[1\]='cocaine'"):
        as_rows([None, "cocaine"], 2)
