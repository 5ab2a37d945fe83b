"""Clusters, entropies and overlaps against closed forms, brute force and examples counted by hand."""

import collections
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nmjax.metrics.semantic import (
    by_overlap,
    cluster,
    covers,
    lexical_similarity,
    normalised,
    rouge_l,
    semantic_entropy,
)

sentences = st.lists(st.sampled_from("abcd"), max_size=6).map(" ".join)


# --- Which answers mean the same --------------------------------------------------------------------------------------


def test_normalised_answers_lose_case_articles_and_punctuation():
    assert normalised(" The well-known  Copper. ") == ("well-known", "copper")
    assert normalised("an") == normalised("...") == ()


@pytest.mark.parametrize(
    ("a", "b", "there", "back"),
    [
        ("Copper.", "the copper", True, True),
        ("copper", "tin", False, False),
        ("It is in the north of Talton", "north Talton", True, True),
        ("copper and tin", "tin", True, False),  # says more
        ("red tin", "no red tin", False, True),  # "no" is content: 2 of 3 words are not enough
        ("one two three four five", "one two three four six", True, True),  # 4 of 5
        ("one two three four", "one two three six", False, False),  # 3 of 4
        ("it is", "they are", False, False),  # nothing but function words: the same only where equal
        ("it is", "it is.", True, True),
        ("", "tin", False, False),
        ("", ".", True, True),
    ],
)
def test_covering_is_holding_enough_of_the_content_words(a, b, there, back):
    assert covers(a, b) == there and covers(b, a) == back
    assert by_overlap("prompt", [a, b]) == [0, 0 if there and back else 1]


def test_the_threshold_is_the_callers():
    assert not covers("one two", "two three") and covers("one two", "two three", threshold=0.5)


@st.composite
def relations(draw):
    """Answers, some of them alike, and a reflexive relation of them that may hold in one direction only."""
    texts = [f"w{i}" for i in range(draw(st.integers(1, 6)))]
    pairs = draw(st.sets(st.tuples(st.sampled_from(texts), st.sampled_from(texts))))
    return draw(st.lists(st.sampled_from(texts), min_size=1, max_size=8)), pairs | {(t, t) for t in texts}


@given(relations())
def test_clusters_are_the_transitive_closure_of_what_holds_both_ways(case):
    answers, pairs = case
    asked = collections.Counter()

    def entails(a, b):
        asked[a, b] += 1
        return (a, b) in pairs

    found = cluster(answers, entails)
    both = np.array([[(a, b) in pairs and (b, a) in pairs for b in answers] for a in answers])
    reachable = np.linalg.matrix_power(both.astype(np.int64), len(answers)) > 0
    np.testing.assert_array_equal(np.equal.outer(found, found), reachable)
    assert list(dict.fromkeys(found)) == list(range(len(set(found))))  # numbered as they appear
    assert max(asked.values(), default=1) == 1  # each question once


@given(relations(), st.randoms(use_true_random=False))
def test_clusters_do_not_depend_on_the_order_of_the_samples(case, rng):
    answers, pairs = case
    order = list(range(len(answers)))
    rng.shuffle(order)
    found = cluster(answers, lambda a, b: (a, b) in pairs)
    moved = cluster([answers[i] for i in order], lambda a, b: (a, b) in pairs)
    np.testing.assert_array_equal(np.equal.outer(moved, moved), np.equal.outer(found, found)[order][:, order])


def test_entailment_in_one_direction_joins_nothing_and_a_chain_joins_its_ends():
    assert cluster(["all", "some"], lambda a, b: a == "all") == [0, 1]
    near = {frozenset("ab"), frozenset("bc")}
    assert cluster(list("acbad"), lambda a, b: frozenset((a, b)) in near) == [0, 0, 0, 0, 1]


# --- Entropy ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_discrete_entropy_is_that_of_the_cluster_sizes(sizes):
    clusters = np.repeat(np.arange(len(sizes)) * 7, sizes)
    shuffled = np.random.default_rng(0).permutation(clusters)
    assert semantic_entropy(shuffled) == pytest.approx(stats.entropy(sizes), abs=1e-12)


def test_entropy_of_one_meaning_and_of_as_many_as_answers():
    assert semantic_entropy([3] * 5) == 0
    assert semantic_entropy(range(5)) == pytest.approx(np.log(5))
    assert semantic_entropy([0, 0, 1, 1]) == pytest.approx(np.log(2))


def test_weighted_entropy_sums_the_probabilities_of_a_cluster():
    p = np.array([0.2, 0.1, 0.4])  # clusters of .3 and .4, which together hold .7
    wanted = stats.entropy([3 / 7, 4 / 7])
    assert semantic_entropy([0, 0, 1], np.log(p)) == pytest.approx(wanted)
    assert semantic_entropy([0, 0, 1], np.log(p) - 2000) == pytest.approx(wanted)  # long answers
    assert semantic_entropy([0, 0, 1], [-5.0] * 3) == pytest.approx(semantic_entropy([0, 0, 1]))
    assert semantic_entropy([0, 1], [0.0, -np.inf]) == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-30, 0)), min_size=1, max_size=8))
def test_to_tell_fewer_meanings_apart_lowers_the_entropy(answers):
    clusters, logprobs = np.array([c for c, _ in answers]), [lp for _, lp in answers]
    for weights in (None, logprobs):
        whole = semantic_entropy(clusters, weights)
        assert -1e-12 <= semantic_entropy(np.minimum(clusters, 2), weights) <= whole + 1e-9 <= np.log(5) + 2e-9


@pytest.mark.parametrize(
    ("clusters", "logprobs", "message"),
    [
        ([], None, r"clusters has shape \(0,\); wanted \[K\] with K >= 1"),
        ([[0, 1]], None, r"clusters has shape \(1, 2\)"),
        ([0, 1], [-1.0], "wanted 2 numbers, one an answer"),
        ([0, 1], [-1.0, np.nan], "logprobs is"),
        ([0, 1], [-np.inf, -np.inf], "logprobs is"),
    ],
)
def test_bad_clusters_are_named(clusters, logprobs, message):
    with pytest.raises(ValueError, match=message):
        semantic_entropy(clusters, logprobs)


# --- Overlap ----------------------------------------------------------------------------------------------------------


def test_rouge_l_counted_by_hand():
    # Common subsequence "the cat on mat", 4 of 6 and of 5 words.
    assert rouge_l("The cat sat on the mat.", "the black cat on mat") == pytest.approx(8 / 11)
    assert rouge_l("a b c", "c b a") == pytest.approx(1 / 3)
    assert rouge_l("Same, words!", "same words") == 1
    assert rouge_l("a", "b") == rouge_l("", "a") == 0 and rouge_l("", "") == 1


@given(sentences, sentences)
def test_rouge_l_against_recursion(a, b):
    x, y = tuple(a.split()), tuple(b.split())

    @functools.cache
    def common(i, j):
        if i == len(x) or j == len(y):
            return 0
        return 1 + common(i + 1, j + 1) if x[i] == y[j] else max(common(i + 1, j), common(i, j + 1))

    wanted = 2 * common(0, 0) / (len(x) + len(y)) if x + y else 1.0
    assert rouge_l(a, b) == rouge_l(b, a) == pytest.approx(wanted)
    assert (rouge_l(a, b) == 1) == (x == y)


def test_lexical_similarity_is_the_mean_over_pairs():
    answers = ["red tin", "red tin", "blue tin", "copper"]
    pairs = [rouge_l(a, b) for a, b in itertools.combinations(answers, 2)]
    assert pairs == [1, 0.5, 0, 0.5, 0, 0] and lexical_similarity(answers) == pytest.approx(2 / 6)
    assert lexical_similarity(["tin"] * 3) == 1
    with pytest.raises(ValueError, match="answers has 1 entries; wanted at least 2"):
        lexical_similarity(["tin"])
