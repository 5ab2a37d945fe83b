"""What the held-out tokens say: does the signal help, and does the model know its coming loss?"""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.lookahead.arms import CONFIDENCE, EQUAL_FLOPS, STANDARD, UNTOLD
from experiments.lookahead.evaluation import TOLD
from nmjax.metrics.loss_prediction import baselines, compare_with_baselines, quality
from nmjax.metrics.seeds import over_seeds, paired_over_seeds

DRAWS = 500  # of the bootstrap over chunks, within a seed
MEASURES = (
    "mse", "r2", "pearson", "spearman", "calibration_slope", "calibration_intercept", "reliability_error",
    "ece_above_median", "brier_above_median", "auroc_wrong",
)  # fmt: skip
"""Of a prediction of the coming loss; see `nmjax.metrics.loss_prediction.quality`."""
OWN = "own"

Tokens = list[dict[str, np.ndarray]]  # of each replica


def analyse(tokens: dict[str, Tokens]) -> dict[str, Any]:
    """Findings as plain values.

    Args:
      tokens: by arm, what `evaluation.held_out` read.
    Returns:
      `losses`: held-out next-token loss by model and, for the confidence model, by what it is told, over seeds;
      `differences`: of the confidence model told its own predictions, less each of the others, paired by seed;
      `quality`: of its predictions of the coming loss, `by_seed` and `over_seeds`, and of the rivals that need no head;
      `advantage`: head less rival, paired by seed, and with intervals within each seed.
    """
    told = tokens[CONFIDENCE]
    losses = {OWN: _means(told, "token_loss")}
    losses |= {name: _means(told, f"token_loss_{name}") for name in TOLD}
    losses |= {name: _means(tokens[name], "token_loss") for name in (UNTOLD, STANDARD, EQUAL_FLOPS) if name in tokens}
    own = [quality(t["predicted"], t["actual"], t["wrong"], t["row"]) for t in told]
    rivals = [baselines(t["actual"], t["wrong"], t["entropy"], t["max_prob"], t["row"]) for t in told]
    within = [
        compare_with_baselines(
            t["predicted"], t["actual"], t["wrong"], t["entropy"], t["max_prob"], t["row"], draws=DRAWS
        )
        for t in told
    ]
    everyone = {"head": own, **{name: [by_seed[name] for by_seed in rivals] for name in rivals[0]}}
    return {
        "losses": {name: over_seeds(values) for name, values in losses.items()},
        "differences": {name: paired_over_seeds(losses[OWN], losses[name]) for name in losses if name != OWN},
        "quality": {
            name: {
                "by_seed": by_seed,
                "over_seeds": {measure: over_seeds([one[measure] for one in by_seed]) for measure in MEASURES},
            }
            for name, by_seed in everyone.items()
        },
        "advantage": {
            rival: {
                measure: {
                    "over_seeds": paired_over_seeds(
                        [one[measure] for one in own], [one[rival][measure] for one in rivals]
                    ),
                    "within_seeds": [one[rival][measure] for one in within],
                }
                for measure in within[0][rival]
            }
            for rival in rivals[0]
        },
        "told_error": over_seeds(_means(told, "told_error")),
        "tokens": len(told[0]["actual"]),
    }


def _means(tokens: Tokens, name: str) -> list[float]:
    return [float(one[name].mean()) for one in tokens]
