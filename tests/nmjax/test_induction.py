"""Induction scores on attention patterns made by hand, and on models whose heads are known."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import nmjax
from nmjax import induction
from nmjax.induction import (
    copy_accuracy,
    find_heads,
    induction_heads,
    induction_scores,
    null_scores,
    offset_scores,
    random_rows,
    repeated_blocks,
)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def fresh(lm):
    """The same model, remembering nothing."""
    return dataclasses.replace(lm)


# --- Scores by hand ---


def test_repeated_blocks_repeat():
    rows = repeated_blocks(5, 7, np.arange(10, 40), seed=2, first=1)
    assert rows.shape == (5, 15) and rows.dtype == np.int32
    assert (rows[:, 0] == 1).all()
    np.testing.assert_array_equal(rows[:, 1:8], rows[:, 8:])
    assert rows[:, 1:].min() >= 10 and rows.max() < 40
    np.testing.assert_array_equal(rows, repeated_blocks(5, 7, np.arange(10, 40), seed=2, first=1))
    with pytest.raises(ValueError, match="got 0 and 7"):
        repeated_blocks(0, 7, np.arange(3))


def test_a_perfect_head_scores_one_and_others_their_share():
    L, B, N, block = 2, 3, 4, 5
    T = 2 * block + 1  # BOS
    uniform = np.tril(np.ones((T, T)))
    uniform /= uniform.sum(-1, keepdims=True)
    pattern = np.broadcast_to(uniform, (L, B, N, T, T)).copy()
    pattern[1, :, 2] = 0
    pattern[0, :, 1] = 0
    for query in range(T):
        occurrence = query - block  # of the same token, in the first copy
        pattern[1, :, 2, query, occurrence + 1 if occurrence >= 1 else 0] = 1  # induction
        pattern[0, :, 1, query, max(occurrence, 0)] = 1  # duplicate-token head: one off
    scores = induction_scores(pattern, block)
    assert scores.shape == (L, N)
    assert scores[1, 2] == 1.0 and scores[0, 1] == 0.0
    assert offset_scores(pattern, block, block)[0, 1] == 1.0
    expected = np.mean([1 / (query + 1) for query in range(T - block, T)])
    np.testing.assert_allclose(np.delete(scores.ravel(), [1, 6]), expected)
    with pytest.raises(ValueError, match="at most half of the 11 positions, got 6"):
        induction_scores(pattern, 6)


def test_copy_accuracy_counts_the_second_copy_but_its_first_token():
    tokens = repeated_blocks(4, 6, np.arange(50), seed=0)
    logits = np.zeros((4, 12, 50), np.float32)
    rows, positions = np.indices((4, 11))
    logits[rows, positions, tokens[:, 1:]] = 5.0  # predicts every next token
    assert copy_accuracy(logits, tokens, 6) == 1.0
    logits[:, :6] = 0  # what predicts the first copy and the second's first token does not count
    logits[:, 6] = 0  # one of five
    logits[:, 6, 49] = 1.0
    missed = (tokens[:, 7] == 49).mean()
    assert copy_accuracy(logits, tokens, 6) == pytest.approx(0.8 + 0.2 * missed)


def test_the_null_keeps_what_has_nothing_to_do_with_matching():
    n = 20
    attention = np.zeros((1, 3, n, n))
    attention[0, 0] = np.eye(n)  # matches: everything is lost by another pairing
    attention[0, 1] = 1 / n  # attends broadly: nothing is
    attention[0, 2, :, 4] = 1  # always to one target: nothing is, except in its own row
    null = null_scores(attention, seed=1, permutations=50)
    assert null.shape == (50, 1, 3)
    assert (null[:, 0, 0] == 0).all()
    np.testing.assert_allclose(null[:, 0, 1], 1 / n)
    np.testing.assert_allclose(null[:, 0, 2], 1 / n)  # one query is always paired with target 4


# --- Models ---


def test_known_heads_get_their_exact_scores(copying_lm):
    done = []
    found = find_heads(copying_lm, block=30, samples=20, progress=done.append)
    assert done == [8, 8, 4]
    rows = random_rows(copying_lm, 20, 30)
    # A token that the block holds twice sends the copying head elsewhere: the exact score, row by row, in Python.
    wanted, right = [], []
    for row in rows:
        for query in range(31, 61):
            last = max(k for k in range(query) if row[k] == row[query])
            wanted.append(last + 1 == query - 30 + 1)
            if query < 60:
                right.append(row[last + 1] == row[query + 1])
    assert 0.5 < np.mean(wanted) < 1
    assert found.induction[1, 2] == pytest.approx(np.mean(wanted), abs=1e-6)
    assert found.duplicate[0, 1] == pytest.approx(np.mean(wanted), abs=1e-6)
    assert found.previous[0, 0] == 1.0
    assert found.copy_accuracy == pytest.approx(np.mean(right))
    uniform = np.mean([1 / (query + 1) for query in range(31, 61)])
    for scores, known in ((found.induction, [(1, 2), (0, 0), (0, 1)]), (found.previous, [(0, 0), (0, 1), (1, 2)])):
        others = [scores[head] for head in np.ndindex(2, 3) if head not in known]
        np.testing.assert_allclose(others, uniform, atol=1e-6)
    assert found.heads == [(1, 2)] and found.mask.sum() == 1 and not found.fallback
    assert found.null < 0.3


def test_measured_scores_are_those_of_a_forward_pass(tiny_lm):
    found = find_heads(tiny_lm, block=12, samples=17, on_empty="none", seed=3)
    rows = random_rows(tiny_lm, 17, 12, seed=3)
    assert rows.shape == (17, 25) and (rows[:, 0] == tiny_lm.config.bos_id).all()
    result = nmjax.forward(tiny_lm, rows.tolist(), capture=("pattern",))
    pattern = np.asarray(result.activations["pattern"])
    np.testing.assert_allclose(found.induction, induction_scores(pattern, 12), atol=1e-6)
    np.testing.assert_allclose(found.previous, offset_scores(pattern, 12, 1), atol=1e-6)
    np.testing.assert_allclose(found.duplicate, offset_scores(pattern, 12, 12), atol=1e-6)
    assert found.copy_accuracy == pytest.approx(copy_accuracy(result.logits, rows, 12), abs=1e-9)


def test_a_random_model_has_no_induction_heads(tiny_lm):
    found = find_heads(tiny_lm, block=40, on_empty="none")
    assert not found.mask.any() and not found.fallback and found.heads == []
    assert found.induction.max() < 0.1
    with pytest.raises(ValueError, match=r"no induction head: the best, head \d of layer \d, scores 0.0\d+ on 32"):
        find_heads(tiny_lm, block=40)
    middle = find_heads(tiny_lm, block=40, on_empty="middle")
    assert middle.fallback and middle.mask.tolist() == [[False, True, True, False]] * 3


def test_the_published_probe_finds_heads_in_any_model(word_lm, monkeypatch):
    monkeypatch.setattr(induction, "PROMPT", "w10 w11 w12 w13 w14 w15 w10")
    found = find_heads(word_lm, method="prompt")
    assert found.mask.sum(axis=1).tolist() == [2, 2, 2]  # max(2, int(0.2 * 4)) in every layer of a random model
    ids = word_lm.encode(induction.PROMPT)
    first, second = [k for k, token in enumerate(ids) if token == 10]
    pattern = np.asarray(nmjax.forward(word_lm, [ids], capture="pattern").activations["pattern"])[:, 0]
    np.testing.assert_allclose(found.induction, pattern[:, :, second, first + 1], atol=1e-6)
    for layer in range(3):
        assert set(np.argsort(-found.induction[layer])[:2]) == set(np.flatnonzero(found.mask[layer]))
    assert found.null is None and found.block == 6 and found.samples == 1
    monkeypatch.setattr(induction, "PROMPT", "w10 w11")
    with pytest.raises(ValueError, match="no token of 'w10 w11' occurs twice"):
        find_heads(word_lm, method="prompt")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"samples": 15}, "samples=15, wanted an integer >= 16"),
        ({"block": 3}, "block=3, wanted an integer >= 4"),
        ({"block": 64}, r"129 tokens \+ 0 more exceed the model's context of 128"),
        ({"threshold": 1.5}, "threshold=1.5, wanted a number from 0 to 1"),
        ({"method": "guess"}, r"method='guess', wanted one of \('repeat', 'prompt'\)"),
        ({"on_empty": "all"}, r"on_empty='all', wanted one of"),
    ],
)
def test_bad_arguments_are_named(tiny_lm, change, message):
    for function in (find_heads, induction_heads):
        with pytest.raises(ValueError, match=message):
            function(fresh(tiny_lm), **{"block": 8, **change})


# --- Remembering ---


def test_heads_are_found_once_and_remembered(copying_lm, tmp_path, monkeypatch):
    lm = fresh(copying_lm)
    mask = induction_heads(lm, block=20)
    assert mask.tolist() == [[False] * 3, [False, False, True]]
    mask[:] = True  # the caller's copy
    (file,) = (tmp_path / "cache" / "nmjax" / "induction" / lm.fingerprint).iterdir()
    monkeypatch.setattr(induction, "_measured", lambda *_, **__: pytest.fail("measured again"))
    assert induction_heads(lm, block=20).sum() == 1
    assert induction_heads(fresh(lm), block=20).sum() == 1  # from the disk
    file.write_text("{torn")
    with pytest.raises(pytest.fail.Exception):
        induction_heads(fresh(lm), block=20)
    monkeypatch.undo()


def test_the_disk_holds_the_whole_result(copying_lm, tmp_path):
    lm = fresh(copying_lm)
    induction_heads(lm, block=20)
    (file,) = (tmp_path / "cache" / "nmjax" / "induction" / lm.fingerprint).iterdir()
    stored, found = induction._read(file), find_heads(lm, block=20)
    for field in dataclasses.fields(found):
        np.testing.assert_array_equal(getattr(stored, field.name), getattr(found, field.name))
    json.loads(file.read_text(), parse_constant=pytest.fail)


def test_the_fallback_is_not_what_is_remembered(tiny_lm):
    lm = fresh(tiny_lm)
    assert induction_heads(lm, "middle", block=20).sum() == 6
    assert induction_heads(lm, "none", block=20).sum() == 0
    with pytest.raises(ValueError, match="no induction head"):
        induction_heads(lm, block=20)


def test_other_weights_are_measured_again_and_off_leaves_the_disk_alone(copying_lm, tmp_path, monkeypatch):
    monkeypatch.setenv("NMJAX_CACHE", "off")
    lm = fresh(copying_lm)
    assert induction_heads(lm, block=20).sum() == 1
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("NMJAX_CACHE", "on")
    induction_heads(fresh(lm), block=20)
    silent = dataclasses.replace(lm, params=jax.tree.map(lambda x: 2 * x, lm.params))
    induction_heads(silent, block=20)
    assert len(list((tmp_path / "cache" / "nmjax" / "induction").iterdir())) == 2


def test_a_checkpoint_may_say_its_block(copying_lm, tmp_path):
    lm = dataclasses.replace(copying_lm, folder=tmp_path)
    assert induction.default_block(lm) == 50 == induction.default_block(copying_lm)
    (tmp_path / "scores.json").write_text('{"induction_block": 16}')
    assert induction.default_block(lm) == 16
    assert find_heads(lm).block == 16


def test_only_ordinary_tokens_are_drawn(copying_lm, word_lm):
    rows = random_rows(copying_lm, 200, 20)
    assert (rows[:, 0] == 1).all() and set(np.unique(rows[:, 1:])) == set(range(3, 60))
    assert random_rows(word_lm, 16, 20).shape == (16, 40)  # its tokenizer puts no BOS in front
