"""How well a model foretells its answers without a word about probabilities: exact likelihoods of its own answers.

Its commonest answers to a request are scored twice, as texts: as what it says to the request, and as what it says when
it is asked which answers it would give. Among these K answers,

    p(a)  is proportional to  P(a | the request),   q(a)  to  P(a | the question about its answers)

and KL(p || q) says how far what it would say is from what it says it would. A q that knows nothing is uniform; so
KL(p || uniform) stands beside it. Another model's q for the same answers tells what is known of one's own answers from
what is known of answers to this request.

What this is not: q is how likely the answer is as the beginning of what the model replies, not what it would name as
its probability, if it can name any. An answer that begins another one ("red", "reddish") holds that one's probability.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax, rel_entr

from experiments.introspecting.by_category import mean_of
from experiments.introspecting.subjects import BASE
from nmjax.data.stated_probabilities import normalise_answer


def commonest(samples: Sequence[str], count: int) -> list[str]:
    """The `count` commonest answers, each in the wording in which it is given most often; of equals those given first.

    Wordings of the same answer (`normalise_answer`) are counted together; what is no answer is left out.
    """
    wordings: dict[str, collections.Counter] = {}
    for text in samples:
        if (answer := normalise_answer(text)) is not None:
            wordings.setdefault(answer, collections.Counter())[text.rstrip()] += 1
    ranked = sorted(wordings.values(), key=lambda each: -each.total())
    return [each.most_common(1)[0][0] for each in ranked[:count]]


def findings(rows: Sequence[Mapping[str, Mapping[str, Any]]], count: int, draws: int, seed: int) -> dict[str, Any]:
    """What likelihoods say, from what each prompt of `rows` has by subject.

    Args:
      rows: by subject "samples", and "direct" and "foretold", the log-probabilities of answers by their text, those of
        other subjects among them; None where one is not finite.
      count: how many of a subject's own commonest answers are compared; a prompt with fewer than two is left out.
      draws, seed: of the bootstrap over prompts.
    Returns:
      "matrix": by whose q and whose answers the mean over prompts of KL(p || q) in nats, see `mean_of`; "uniform": by
      subject that of KL(p || uniform), "top1" that of whether the likeliest answer is the one foretold as likeliest,
      "versus_uniform" that of the difference of KL(p || q) to it, prompt by prompt. By adapter "versus_base", that of
      the difference to the base's KL of its own answers, which may be harder or easier to foretell, and "advantage",
      that of the difference to the base's foretelling of the same answers.
    """
    names = list(rows[0])
    own = {name: [commonest(row[name]["samples"], count) for row in rows] for name in names}

    def read(p: str, b: str) -> dict[str, np.ndarray]:
        each = [_compared(row[b]["direct"], row[p]["foretold"], texts) for row, texts in zip(rows, own[b], strict=True)]
        return {measure: np.array([found[measure] for found in each]) for measure in ("kl", "uniform", "top1")}

    found = {(p, b): read(p, b) for p in names for b in names}

    def mean(values: np.ndarray) -> dict[str, Any]:
        return mean_of(values, draws, seed)

    def kl(p: str, b: str) -> np.ndarray:
        return found[p, b]["kl"]

    adapters = [name for name in names if name != BASE]
    return {
        "matrix": {p: {b: mean(found[p, b]["kl"]) for b in names} for p in names},
        "uniform": {name: mean(found[name, name]["uniform"]) for name in names},
        "top1": {name: mean(found[name, name]["top1"]) for name in names},
        "versus_uniform": {name: mean(kl(name, name) - found[name, name]["uniform"]) for name in names},
        "versus_base": {name: mean(kl(name, name) - kl(BASE, BASE)) for name in adapters},
        "advantage": {name: mean(kl(name, name) - kl(BASE, name)) for name in adapters},
    }


def _compared(
    direct: Mapping[str, float | None], foretold: Mapping[str, float | None], texts: Sequence[str]
) -> dict[str, float]:
    """KL(p || q), KL(p || uniform), and whether both have the same maximum; NaN where there is nothing to compare."""
    pairs = np.array([[direct[text], foretold[text]] for text in texts], np.float64)  # [K, 2]; None becomes NaN
    if len(pairs) < 2 or np.isnan(pairs).any():
        return {"kl": np.nan, "uniform": np.nan, "top1": np.nan}
    log_p, log_q = log_softmax(pairs, axis=0).T
    p, q = np.exp(log_p), np.exp(log_q)
    likeliest = p == p.max()
    return {
        "kl": float((p * (log_p - log_q)).sum()),
        "uniform": float(rel_entr(p, 1 / len(p)).sum()),
        "top1": float(likeliest[q == q.max()].mean()),
    }
