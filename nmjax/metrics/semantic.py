"""Several answers to one prompt: how alike their texts are, which say the same, and the entropy of what they say.

Words are those of `nmjax.metrics.texts.words`, entropies are in nats.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import ArrayLike
from scipy.sparse.csgraph import connected_components
from scipy.special import entr

from nmjax.metrics.texts import words

COVERED = 0.8
"""The share of an answer's content words that another must hold to say what it says, see `covers`."""

_ARTICLES = frozenset("a an the".split())
_FUNCTION_WORDS = _ARTICLES | frozenset(
    "of in on at to for by with from as and is are was were be been it its this that these those there he she they we "
    "you i".split()
)  # "no", "not" and "or" are content: they change what is said


class Clusterer(Protocol):
    """Says which answers to a prompt mean the same: numbers [K], equal for answers that do."""

    def __call__(self, prompt: str, answers: Sequence[str], /) -> Sequence[int] | np.ndarray: ...


def normalised(text: str) -> tuple[str, ...]:
    """The words of a text without articles: answers that have the same ones count as the same answer."""
    return tuple(word for word in words(text) if word not in _ARTICLES)


def covers(a: str, b: str, threshold: float = COVERED) -> bool:
    """Whether answer `a` holds at least the share `threshold` of the content words of `b`, or is `b` normalised.

    What stands in for "a entails b" where no model of entailment is at hand. It sees no paraphrase, no word order, and
    in a long answer no single "not".
    """
    x, y = normalised(a), normalised(b)
    there, wanted = set(x) - _FUNCTION_WORDS, set(y) - _FUNCTION_WORDS
    return x == y or (len(wanted) > 0 and len(wanted & there) >= threshold * len(wanted))


def cluster(answers: Sequence[str], entails: Callable[[str, str], bool]) -> list[int]:
    """Numbers [K] of the clusters of answers, from 0 in the order in which they appear.

    Two answers mean the same where each entails the other (Kuhn et al. 2023). What then counts as one cluster is the
    transitive closure, so that the order of the samples does not matter; the paper compares each answer to the first
    one of every cluster before, which gives the same wherever the relation is transitive already. Equal texts are one
    answer, and each pair of different ones is asked once in each direction.
    """
    texts = list(dict.fromkeys(answers))
    same = np.zeros((len(texts), len(texts)), bool)
    for i, j in itertools.combinations(range(len(texts)), 2):
        same[i, j] = entails(texts[i], texts[j]) and entails(texts[j], texts[i])
    component = dict(zip(texts, connected_components(same, directed=False)[1].tolist(), strict=True))
    number = {c: n for n, c in enumerate(dict.fromkeys(component.values()))}
    return [number[component[answer]] for answer in answers]


def by_overlap(prompt: str, answers: Sequence[str]) -> list[int]:
    """The `Clusterer` that needs no model: answers which cover each other (`covers`) mean the same."""
    return cluster(answers, covers)


def semantic_entropy(clusters: ArrayLike, logprobs: ArrayLike | None = None) -> float:
    """Entropy of the meanings of K sampled answers, 0 to ln K (Farquhar et al. 2024).

    Args:
      clusters: [K], the number of each answer's cluster.
      logprobs: ln p of each answer [K]. Without them, a cluster's probability is its share of the samples ("discrete
        semantic entropy"). With them, it is the sum of its answers' probabilities, over that of all clusters (their
        Rao-Blackwellised estimate). An answer that was drawn twice would then count twice, and likely ones as their
        squares: pass each distinct answer once.
    Raises:
      ValueError: no answer, other shapes, or no finite log-probability.
    """
    c = np.asarray(clusters)
    if c.ndim != 1 or len(c) == 0:
        raise ValueError(f"clusters has shape {c.shape}; wanted [K] with K >= 1")
    _, member = np.unique(c, return_inverse=True)
    weights = np.ones(len(c))
    if logprobs is not None:
        lp = np.asarray(logprobs, dtype=np.float64)
        if lp.shape != c.shape or np.isnan(lp).any() or not np.isfinite(lp.max()):
            raise ValueError(f"logprobs is {lp.tolist()}; wanted {len(c)} numbers, one an answer")
        weights = np.exp(lp - lp.max())
    share = np.bincount(member, weights) / weights.sum()
    return float(entr(share).sum())


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L F1 (Lin 2004): 2 LCS / (words of a + words of b), LCS their longest common subsequence; 1 if both are
    empty."""
    x, y = words(a), words(b)
    if not x or not y:
        return float(x == y)
    number = {word: n for n, word in enumerate(dict.fromkeys(x + y))}
    columns = np.array([number[word] for word in y])
    longest = np.zeros(len(y) + 1, np.int64)  # by how many words of y, with those of x so far
    for word in x:
        extended = longest[:-1] + (columns == number[word])
        longest[1:] = np.maximum.accumulate(np.maximum(longest[1:], extended))
    return 2 * int(longest[-1]) / (len(x) + len(y))


def lexical_similarity(answers: Sequence[str]) -> float:
    """Mean `rouge_l` over the pairs of K >= 2 answers: 1 where all are alike. Raises ValueError for fewer."""
    if len(answers) < 2:
        raise ValueError(f"answers has {len(answers)} entries; wanted at least 2")
    pairs = [tuple(sorted(pair)) for pair in itertools.combinations(answers, 2)]
    scores = {pair: rouge_l(*pair) for pair in set(pairs)}
    return float(np.mean([scores[pair] for pair in pairs]))
