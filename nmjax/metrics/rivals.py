"""Whether a signal says more than a plainer one, such as the length of the answer: by difference, residual and match.

Conventions and checks are those of `nmjax.metrics.detection`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import ArrayLike
from scipy.stats import rankdata
from sklearn.isotonic import IsotonicRegression

from nmjax.metrics import ranking, stats
from nmjax.metrics.crossfit import splits
from nmjax.metrics.detection import check_groups, check_scores, sign


def compare_aurocs(
    a: ArrayLike,
    b: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    draws: int = stats.DRAWS,
    seed: int = 0,
    directions: tuple[str, str] | None = None,
    level: float = stats.LEVEL,
) -> dict:
    """AUROC of signal `a [N]` less that of `b [N]` on the same examples, each in its own direction, paired by draw.

    `directions` of the two come from other data (`crossfit.choose_direction`). Without them, each signal gets the one
    in which its AUROC here is 1/2 or more: that flatters a signal that says little, `b` as well as `a`.

    Returns "auroc_a", "auroc_b", "directions", "difference", its bootstrap "interval" over groups and "p_value", the
    two-sided one that goes with it: twice the share of draws on the far side of 0. All None where one label is missing.
    """
    return compare_all([a, b], labels, groups, [(0, 1)], draws, seed, directions, level)[0]


def compare_all(
    signals: Sequence[ArrayLike],
    labels: ArrayLike,
    groups: ArrayLike,
    pairs: Sequence[tuple[int, int]],
    draws: int = stats.DRAWS,
    seed: int = 0,
    directions: Sequence[str] | None = None,
    level: float = stats.LEVEL,
) -> list[dict]:
    """`compare_aurocs` for several `pairs` (indices) of the `signals`, each [N]; every signal is resampled once."""
    (_, y), group = check_scores(signals[0], labels), check_groups(groups, len(np.asarray(labels)))
    checked = [check_scores(s, labels)[0] for s in signals]
    chosen = directions or ["low" if ranking.score_auroc(s, y) < 0.5 else "high" for s in checked]
    risks = [sign(direction) * s for direction, s in zip(chosen, checked, strict=True)]

    def aurocs(weights: np.ndarray | None) -> np.ndarray:  # [R, N] -> [R, signals]
        return np.stack([ranking.score_auroc(risk, y, weights) for risk in risks], axis=-1)

    values, draws_of = aurocs(None), stats.cluster_bootstrap(aurocs, group, draws, seed)
    found = []
    for i, j in pairs:
        samples = draws_of[:, i] - draws_of[:, j]
        samples = samples[~np.isnan(samples)]
        tail = 1 + min((samples <= 0).sum(), (samples >= 0).sum())
        found.append(
            {
                "auroc_a": stats.defined(values[i]),
                "auroc_b": stats.defined(values[j]),
                "directions": [chosen[i], chosen[j]],
                "difference": stats.defined(values[i] - values[j]),
                "interval": stats.defined_interval(samples, level),
                "p_value": min(1.0, float(2 * tail / (1 + len(samples)))) if len(samples) else None,
            }
        )
    return found


def residualised_auroc(
    scores: ArrayLike,
    labels: ArrayLike,
    covariate: ArrayLike,
    groups: ArrayLike,
    folds: int = 5,
    seed: int = 0,
    draws: int = stats.DRAWS,
    level: float = stats.LEVEL,
) -> dict:
    """AUROC of what is left of the scores [N] when the part that rises or falls with `covariate [N]` is taken away.

    The ranks of the scores are regressed on the covariate by isotonic regression, rising or falling as the other folds
    say, and each fold is predicted by the others. Ranks, because neither they nor AUROC change if scores or covariate
    are stretched. It is a hard test: where the covariate tells the labels apart, what the signal knows about them and
    shares with the covariate goes, too. A dependence that first rises and then falls stays; see `matched_auroc`.

    Returns "auroc_raw" and "auroc" (of the residual, with "interval" over groups), both of high scores as the risky
    ones, and "rank_correlation" (Spearman) of scores and covariate, None where one is constant.
    """
    (s, y), (c, _) = check_scores(scores, labels), check_scores(covariate, labels)
    group = check_groups(groups, len(y))
    ranks, covariate_ranks = rankdata(s), rankdata(c)
    residual = np.empty(len(s))
    for others, within in splits(group, y, folds, seed):
        rising = np.cov(ranks[others], covariate_ranks[others])[0, 1] >= 0
        trend = IsotonicRegression(increasing=bool(rising), out_of_bounds="clip").fit(c[others], ranks[others])
        residual[within] = ranks[within] - trend.predict(c[within])
    residual = np.round(residual, 9)  # equal ones differ by rounding, and AUROC counts ties
    samples = stats.cluster_bootstrap(lambda w: ranking.score_auroc(residual, y, w), group, draws, seed)
    varied = min(np.ptp(s), np.ptp(c)) > 0
    return {
        "auroc_raw": stats.defined(ranking.score_auroc(s, y)),
        "auroc": stats.defined(ranking.score_auroc(residual, y)),
        "interval": stats.defined_interval(samples, level),
        "rank_correlation": float(np.corrcoef(ranks, covariate_ranks)[0, 1]) if varied else None,
    }


def matched_auroc(
    scores: ArrayLike,
    labels: ArrayLike,
    covariate: ArrayLike,
    calipers: Sequence[float] = (0.25,),
    groups: ArrayLike | None = None,
    draws: int = stats.DRAWS,
    seed: int = 0,
    level: float = stats.LEVEL,
) -> list[dict]:
    """AUROC over the pairs of a positive and a negative that are alike in `covariate [N]` (lengths: none below 0).

    A pair is alike within a caliper of 0.25 if the larger value is at most 1.25 times the smaller one. Any two examples
    make a pair, of one question or of two. Takes memory and time for all pairs: 0.1 GB at N = 5,000.

    One dictionary a caliper: "caliper", "pairs", "auroc" (the share of pairs whose positive scores higher, ties half),
    "auroc_covariate" (the same of the covariate: 1/2 if the match is perfect) and "interval" of "auroc" over `groups`
    (without them, each example is its own). None where no pair is alike.
    """
    (s, y), (c, _) = check_scores(scores, labels), check_scores(covariate, labels)
    if c.min() < 0:
        raise ValueError(f"covariate holds {c.min()}; wanted numbers of 0 or more, whose ratios mean something")
    group = np.arange(len(y)) if groups is None else check_groups(groups, len(y))
    wins = _wins(s, y)
    table = []
    for caliper in calipers:
        shorter, longer = (end(c[y][:, None], c[~y]) for end in (np.minimum, np.maximum))
        alike = (longer <= (1 + caliper) * shorter).astype(np.float64)  # [positives, negatives]

        def share(weights: np.ndarray, alike=alike, wins=wins) -> np.ndarray:  # [R, N] -> [R]
            won, pairs = (((weights[:, y] @ m) * weights[:, ~y]).sum(axis=1) for m in (alike * wins, alike))
            return np.divide(won, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)

        everyone = np.ones((1, len(y)))
        table.append(
            {
                "caliper": float(caliper),
                "pairs": int(alike.sum()),
                "auroc": stats.defined(share(everyone)[0]),
                "auroc_covariate": stats.defined(share(everyone, wins=_wins(c, y))[0]),
                "interval": stats.defined_interval(stats.cluster_bootstrap(share, group, draws, seed), level),
            }
        )
    return table


def _wins(s: np.ndarray, y: np.ndarray) -> np.ndarray:
    """1 where a positive scores higher than a negative, 1/2 where the same, else 0: [positives, negatives]."""
    return (np.sign(s[y][:, None] - s[~y]) + 1) / 2
