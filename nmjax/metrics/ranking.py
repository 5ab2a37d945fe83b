"""How well a score tells two kinds apart by its order alone: AUROC, average precision, risk and coverage.

These say nothing about calibration and calibration nothing about them: a model whose answers are all held at its
accuracy is perfectly calibrated and has an AUROC of 1/2.

The functions named `score_*` take any `scores [N]` and what is to be found, `positive [N]` of 0 and 1. The others score
the answers to multiple-choice questions by confidence, and what is to be found is a right answer: `probs [N, C]`,
`labels [N]` and *confidence* are as in `nmjax.metrics.calibration`. `weights [..., N]` give a value for each leading
index (see `nmjax.metrics.stats`).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import ArrayLike
from scipy.special import digamma

from nmjax.metrics.calibration import top_label


def _ranked(scores: ArrayLike, weights: ArrayLike | None, *values: ArrayLike) -> list[np.ndarray]:
    """Weighted sums of each of the `values [N]` over each of the G distinct scores, highest first: [..., G]."""
    s = np.asarray(scores, dtype=np.float64)
    order = np.argsort(-s, kind="stable")
    start = np.flatnonzero(np.diff(s[order], prepend=np.inf))
    w = np.asarray(1.0) if weights is None else np.asarray(weights, dtype=np.float64)[..., order]
    columns = [w * np.asarray(v, dtype=np.float64)[order] for v in values]
    return columns if len(start) == len(s) else [np.add.reduceat(column, start, axis=-1) for column in columns]


def _kinds(positive: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    kind = np.asarray(positive, dtype=np.float64)
    return kind, 1 - kind


def _divide(a: np.ndarray, b: np.ndarray, otherwise: float) -> np.ndarray:
    """a / b, and `otherwise` where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(b), otherwise), where=b != 0)


def score_auroc(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Probability that a positive scores higher than a negative, in [0, 1]; a tie counts half.

    The area under the ROC curve as the Mann-Whitney statistic. NaN where all, or all with weight, are of one kind.
    """
    found, other = _ranked(scores, weights, *_kinds(positive))
    lower = other.sum(axis=-1, keepdims=True) - np.cumsum(other, axis=-1)
    wins = (found * (lower + other / 2)).sum(axis=-1)
    return _divide(wins, found.sum(axis=-1) * other.sum(axis=-1), np.nan)


def score_average_precision(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Average precision of a high score as a detector of positives, in [0, 1]; NaN where there is none.

    Sum over distinct scores, falling, of (recall gained) x (precision so far): the step-wise area under the
    precision-recall curve, as scikit-learn defines it. An order that says nothing has the share of positives as value.
    """
    found, other = _ranked(scores, weights, *_kinds(positive))
    precision = _divide(np.cumsum(found, axis=-1), np.cumsum(found + other, axis=-1), 0.0)
    return _divide((found * precision).sum(axis=-1), found.sum(axis=-1), np.nan)


def score_aurc(
    scores: ArrayLike, loss: ArrayLike, weights: ArrayLike | None = None, max_rejection: float = 1.0
) -> np.ndarray:
    """Mean `loss [N]` (any numbers) of those still kept while the lowest scores are rejected one by one.

    The area under the risk-coverage curve (El-Yaniv and Wiener 2010): the mean of N risks, those of the N, N - 1, .. 1
    highest scores, or of the first `max_rejection` N of them.

    Where m scores tie, the n above them lose E together and the m lose r each on average, the risk of keeping n + j in
    random order is (E + j r) / (n + j), and risks sum to m r + (E - n r) (H(n + m) - H(n)) with H the harmonic numbers.
    H continues to real numbers, so weights may be any; whole ones count repetitions, and they should sum to about N.
    """
    lost, tied = _ranked(scores, weights, loss, np.ones(np.shape(loss)))
    share, upto = _divide(lost, tied, 0.0), np.cumsum(tied, axis=-1)
    total = upto[..., -1:]
    excess = np.cumsum(lost, axis=-1) - lost - (upto - tied) * share
    kept = np.maximum(np.concatenate([np.zeros_like(total), upto], axis=-1), (1 - max_rejection) * total)
    risks = np.diff(kept, axis=-1) * share + excess * np.diff(digamma(kept + 1), axis=-1)
    return np.asarray(risks.sum(axis=-1) / (max_rejection * total[..., 0]))


def auroc(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """`score_auroc` of the confidence: the probability that a right answer is held at a higher one than a wrong one."""
    return score_auroc(*top_label(probs, labels), weights)


def auprc(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """`score_average_precision` of the confidence as a detector of right answers."""
    return score_average_precision(*top_label(probs, labels), weights)


def risk_coverage(probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The risk-coverage curve (El-Yaniv and Wiener 2010): coverage [N] = 1/N .. 1 and risk [N].

    `risk[k]` is the share of wrong answers among the k + 1 most confident ones: the error were all others withheld.
    Tied answers enter in random order and the risk is its mean over the orders.
    """
    confidence, correct = top_label(probs, labels)
    right, wrong = _ranked(confidence, None, *_kinds(correct))
    tied = right + wrong
    taken = np.arange(1, round(tied.sum()) + 1)
    return taken / len(taken), np.cumsum(np.repeat(wrong / tied, tied.astype(np.int64))) / taken


def aurc(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Area under the risk-coverage curve: the mean of its N risks, in [0, 1]; lower is better (Geifman et al. 2019)."""
    confidence, correct = top_label(probs, labels)
    return score_aurc(confidence, 1 - correct, weights)
