"""Does a direction mean what its pairs say? Tests on pairs that took no part in making it, layer by layer.

A layer is accepted if, on held-out pairs, positive texts project higher than their negatives (a one-sided sign-flip
permutation test, with the false discovery rate over layers controlled by Benjamini and Hochberg's procedure) and the
direction explains more than a tenth of the pairs' squared difference.
"""

import dataclasses

import numpy as np
from scipy.stats import false_discovery_control

from nmjax.report.tables import Table, number, with_interval
from nmjax.steering.vectors import (
    Pairs,
    combination,
    differences,
    direction,
    explained_share,
    gram,
    project,
)

ALPHA = 0.01  # of the q-values
LEAST_EXPLAINED = 0.1
LEAST_HELD_OUT = 7  # 2^-7 is the first p-value below 0.01 that sign flips can reach
PERMUTATIONS = 9999
HALVES = 200


@dataclasses.dataclass(frozen=True)
class SteeringReport:
    """What the held-out pairs say about a direction; arrays are [L].

    `separation` is Cohen's d_z: mean of the held-out projections of `positive - negative` over their standard
    deviation. `explained` is the share of the held-out pairs' squared difference along the direction,
    `explained_train` that of the pairs it was made from. `cosine` is the mean cosine between directions made from two
    random halves of the training pairs, `cosine_low` and `cosine_high` hold 95% of the halvings.
    """

    method: str
    train: int  # pairs
    held_out: int
    separation: np.ndarray
    p: np.ndarray
    q: np.ndarray
    explained: np.ndarray
    explained_train: np.ndarray
    cosine: np.ndarray
    cosine_low: np.ndarray
    cosine_high: np.ndarray
    accepted: np.ndarray  # bool
    chosen_layer: int | None  # the accepted layer with the largest separation

    def table(self, caption: str = "") -> Table:
        """One row a layer; the chosen one is marked."""
        rows = []
        for layer in range(len(self.p)):
            mark = "chosen" if layer == self.chosen_layer else "yes" if self.accepted[layer] else "no"
            ends = (self.cosine_low[layer], self.cosine_high[layer])
            rows.append(
                [
                    str(layer),
                    number(self.separation[layer], 2),
                    number(self.p[layer], 4),
                    number(self.q[layer], 4),
                    number(self.explained[layer], 2),
                    number(self.explained_train[layer], 2),
                    with_interval(self.cosine[layer], ends, 2),
                    mark,
                ]
            )
        headers = ["layer", "d_z", "p", "q", "explained", "in training", "cosine of halves", "accepted"]
        return Table(headers, rows, caption)


def split_pairs(pairs: Pairs, held_out: float = 0.2, seed: int = 0) -> tuple[Pairs, Pairs]:
    """Unique pairs, shuffled by `seed`, as (training, held-out); a repeated pair is never on both sides.

    Raises:
      ValueError: a share outside (0, 1), fewer than 2 training pairs, or too few held-out pairs to accept anything.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out!r}, wanted a share between 0 and 1")
    unique = list(dict.fromkeys((positive.strip(), negative.strip()) for positive, negative in pairs))
    count = round(held_out * len(unique))
    if count < LEAST_HELD_OUT or len(unique) - count < 2:
        raise ValueError(
            f"held_out={held_out:g} of {len(unique)} unique pairs holds out {count}, wanted at least {LEAST_HELD_OUT} "
            f"(fewer cannot reach p < {ALPHA}) and at least 2 others: add pairs, or hold out more"
        )
    order = np.random.default_rng(seed).permutation(len(unique))
    return [unique[i] for i in order[count:]], [unique[i] for i in order[:count]]


def validate(
    train_positive: np.ndarray,
    train_negative: np.ndarray,
    held_positive: np.ndarray,
    held_negative: np.ndarray,
    method: str = "mean_diff",
    seed: int = 0,
) -> tuple[np.ndarray, SteeringReport]:
    """The direction that the training pairs give, float32 [L, D], and what the held-out pairs say about it.

    Args:
      train_positive, train_negative: activations float [n, L, D]; n >= 2, and n >= 4 for the cosine of halves to be
        between directions of two pairs each.
      held_positive, held_negative: [m, L, D], m >= 7.
    Raises:
      ValueError: bad shapes or values, see `direction`.
    """
    vectors, explained_train = direction(train_positive, train_negative, method)
    held = differences(held_positive, held_negative)
    if held.shape[1:] != vectors.shape:
        raise ValueError(f"held_positive has shape {held.shape}, wanted [m, L, D] with [L, D] = {vectors.shape}")
    if len(held) < LEAST_HELD_OUT:
        raise ValueError(f"held_positive holds {len(held)} pairs, wanted at least {LEAST_HELD_OUT}")
    along = project(held, vectors)
    p = sign_flip_p(along, seed)
    q = false_discovery_control(p, method="bh")
    explained = explained_share(held, vectors)
    separation = standardised_mean(along)
    accepted = (q < ALPHA) & (explained > LEAST_EXPLAINED)
    cosine, low, high = cosine_of_halves(differences(train_positive, train_negative), method, seed)
    report = SteeringReport(
        method=method,
        train=len(train_positive),
        held_out=len(held),
        separation=separation,
        p=p,
        q=q,
        explained=explained,
        explained_train=explained_train,
        cosine=cosine,
        cosine_low=low,
        cosine_high=high,
        accepted=accepted,
        chosen_layer=int(np.where(accepted, separation, -np.inf).argmax()) if accepted.any() else None,
    )
    return vectors, report


def sign_flip_p(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """One-sided p-values [L] that the mean of each column of `values` [m, L] is above 0.

    If positive and negative were exchangeable within a pair, every difference could as well have the other sign. All
    2^m sign patterns are tried where there are no more than 9,999, else as many random ones, the observed pattern
    counted in (Phipson and Smyth 2010).
    """
    values = np.asarray(values, np.float64)
    m = len(values)
    exact = 2**m <= PERMUTATIONS
    if exact:
        signs = 1.0 - 2.0 * ((np.arange(2**m)[:, None] >> np.arange(m)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (PERMUTATIONS, m))
    observed = values.sum(axis=0)
    # Sums in another order differ in the last bit; a tie must count.
    reached = (signs @ values >= observed - 1e-12 * np.abs(values).sum(axis=0)).sum(axis=0)
    return reached / len(signs) if exact else (reached + 1) / (len(signs) + 1)


def standardised_mean(values: np.ndarray) -> np.ndarray:
    """Cohen's d_z [L]: mean over standard deviation (n - 1) of the columns of [m, L]; 0 for a column of zeros."""
    mean, spread = values.mean(axis=0), values.std(axis=0, ddof=1)
    spread = np.maximum(spread, 1e-9 * np.abs(mean))  # pairs that agree to the last bit
    return np.divide(mean, spread, out=np.zeros_like(mean), where=spread > 0)


def cosine_of_halves(
    d: np.ndarray, method: str, seed: int = 0, halvings: int = HALVES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far a direction is a matter of which pairs were drawn, from training differences [n, L, D].

    Returns mean, 2.5% and 97.5% quantile [L], over random halvings, of the cosine between the halves' directions; 0
    where a half has no direction.
    """
    products = gram(d)  # [L, n, n]
    n = len(d)
    rng = np.random.default_rng(seed)
    found = np.empty((halvings, len(products)))
    for k in range(halvings):
        order = rng.permutation(n)
        a, b = order[: n // 2], order[n // 2 : 2 * (n // 2)]
        left, right = (combination(products[:, half[:, None], half], method) for half in (a, b))
        across = np.einsum("ln,lnm,lm->l", left, products[:, a[:, None], b], right)
        lengths = [
            np.einsum("ln,lnm,lm->l", w, products[:, half[:, None], half], w) for w, half in ((left, a), (right, b))
        ]
        size = np.sqrt(np.maximum(lengths[0] * lengths[1], 0))
        found[k] = np.divide(across, size, out=np.zeros_like(across), where=size > 0)
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    return found.mean(axis=0), low, high
