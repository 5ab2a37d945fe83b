"""How well confidence tells right answers from wrong ones: AUROC, average precision, risk and coverage.

These see the order of the confidences alone, so they say nothing about calibration and calibration nothing about them:
a model whose answers are all held at its accuracy is perfectly calibrated and has an AUROC of 1/2.

`probs [N, C]`, `labels [N]` and `weights [..., N]` are as in `nmjax.metrics.calibration`, and so is *confidence*.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import ArrayLike
from scipy.special import digamma

from nmjax.metrics.calibration import top_label


def _ranked(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the right and of the wrong answers at each of the G distinct confidences, highest first: [..., G]."""
    confidence, correct = top_label(probs, labels)
    order = np.argsort(-confidence, kind="stable")
    start = np.flatnonzero(np.diff(confidence[order], prepend=np.inf))
    w = np.asarray(1.0 if weights is None else weights, dtype=np.float64)
    right, wrong = (np.add.reduceat((w * kept)[..., order], start, axis=-1) for kept in (correct, 1 - correct))
    return right, wrong


def _divide(a: np.ndarray, b: np.ndarray, otherwise: float) -> np.ndarray:
    """a / b, and `otherwise` where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(b), otherwise), where=b != 0)


def auroc(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Probability that a right answer is held at a higher confidence than a wrong one, in [0, 1]; a tie counts half.

    The area under the ROC curve as the Mann-Whitney statistic. NaN where all answers, or all with weight, are right or
    all are wrong.
    """
    right, wrong = _ranked(probs, labels, weights)
    lower = wrong.sum(axis=-1, keepdims=True) - np.cumsum(wrong, axis=-1)
    wins = (right * (lower + wrong / 2)).sum(axis=-1)
    return _divide(wins, right.sum(axis=-1) * wrong.sum(axis=-1), np.nan)


def auprc(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Average precision of 'confident' as a detector of right answers, in [0, 1]; NaN where none is right.

    Sum over distinct confidences, falling, of (recall gained) x (precision so far): the step-wise area under the
    precision-recall curve, as scikit-learn defines it. An order that says nothing has the accuracy as its value.
    """
    right, wrong = _ranked(probs, labels, weights)
    precision = _divide(np.cumsum(right, axis=-1), np.cumsum(right + wrong, axis=-1), 0.0)
    return _divide((right * precision).sum(axis=-1), right.sum(axis=-1), np.nan)


def risk_coverage(probs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The risk-coverage curve (El-Yaniv and Wiener 2010): coverage [N] = 1/N .. 1 and risk [N].

    `risk[k]` is the share of wrong answers among the k + 1 most confident ones: the error were all others withheld.
    Tied answers enter in random order and the risk is its mean over the orders.
    """
    right, wrong = _ranked(probs, labels, None)
    tied = right + wrong
    taken = np.arange(1, round(tied.sum()) + 1)
    return taken / len(taken), np.cumsum(np.repeat(wrong / tied, tied.astype(np.int64))) / taken


def aurc(probs: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> np.ndarray:
    """Area under the risk-coverage curve: the mean of its N risks, in [0, 1]; lower is better (Geifman et al. 2019).

    Where m answers tie, the n before them hold E wrong ones and a share r of the m is wrong, the m risks sum to
    sum_j (E + j r) / (n + j) = m r + (E - n r) (H(n + m) - H(n)) with H the harmonic numbers. H continues to real
    numbers, so weights may be any; whole ones count repetitions, and they should sum to about N.
    """
    right, wrong = _ranked(probs, labels, weights)
    tied = right + wrong
    upto = np.cumsum(tied, axis=-1)
    before, wrong_before = upto - tied, np.cumsum(wrong, axis=-1) - wrong
    excess = wrong_before - before * _divide(wrong, tied, 0.0)
    risks = wrong + excess * (digamma(upto + 1) - digamma(before + 1))
    return np.asarray(risks.sum(axis=-1) / upto[..., -1])
