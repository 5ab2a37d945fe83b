"""Induction scores on attention patterns and logits made by hand."""

import numpy as np
import pytest

from nmjax.induction import copy_accuracy, induction_scores, repeated_blocks


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
