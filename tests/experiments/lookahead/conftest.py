"""Made-up comparisons, analysed as a trained one is."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.lookahead.analysis import analyse
from experiments.lookahead.arms import CONFIDENCE, EQUAL_FLOPS, STANDARD, UNTOLD
from experiments.lookahead.config import ConfidenceExperimentConfig
from experiments.lookahead.evaluation import TOLD
from experiments.lookahead.results import ConfidenceExperimentResults, ConfidenceTrainingResult, TrainingResult

CHUNKS, LENGTH, STEPS, EVERY = 12, 10, 20, 10
FLOPS = {STANDARD: 1e9, CONFIDENCE: 1.5e9, UNTOLD: 1.4e9, EQUAL_FLOPS: 1e9}
# Held-out losses beyond 2 nats, the same for all seeds, which add some noise.
LEVELS = {
    "token_loss": 0.0,
    "zeros": 0.3,
    "shuffled": 0.2,
    "constant": 0.1,
    STANDARD: 0.5,
    UNTOLD: 0.4,
    EQUAL_FLOPS: -0.5,
}


def read(arm, seed):
    """What `evaluation.held_out` reads for one replica."""
    rng = np.random.default_rng([seed, sorted(FLOPS).index(arm)])
    n = CHUNKS * LENGTH
    level = LEVELS["token_loss" if arm == CONFIDENCE else arm]
    loss = 2 + level + rng.exponential(size=n) * 0.1
    actual = rng.gamma(2, 1, n)
    tokens = {
        "token_loss": loss, "entropy": actual + rng.normal(size=n) * 3, "max_prob": rng.random(n),
        "wrong": rng.random(n) < 0.5, "row": np.repeat(np.arange(CHUNKS), LENGTH),
    }  # fmt: skip
    if arm == CONFIDENCE:
        tokens |= {f"token_loss_{name}": loss + LEVELS[name] + rng.normal(size=n) * 0.01 for name in TOLD}
        tokens |= {
            "predicted": actual + rng.normal(size=n) * 0.2,
            "actual": actual,
            "told_error": rng.random(n) * 0.1,
        }
    return tokens


def trained(arm, seed, tokens, steps):
    rng = np.random.default_rng([seed, steps])
    history = []
    for step in range(EVERY, steps + 1, EVERY):
        last, more = step == steps, 1 / step
        measured = {f"eval_{name[6:]}": float(v.mean()) + (0 if last else more) for name, v in tokens.items()
                    if name.startswith("token_loss")}  # fmt: skip
        if arm == CONFIDENCE:
            measured |= {"mse": 1.0, "r2": 0.5 - more, "pearson": 0.7, "told_error": 0.05 + more * seed}
        history.append(
            {"step": step, "flops": step * FLOPS[arm], "lr": 1e-3, "train_loss": 2.0, "perplexity": 7.0, **measured}
        )
    final = history[-1]["eval_loss"]
    common = {
        "model_type": arm, "seed": seed, "final_train_loss": 2 + seed / 100, "final_eval_loss": final,
        "final_perplexity": float(np.exp(final)), "best_eval_loss": final, "best_perplexity": float(np.exp(final)),
        "loss_history": history, "token_loss_history": (3 + rng.random(steps)).tolist(), "training_time": 4.5,
    }  # fmt: skip
    if arm != CONFIDENCE:
        return TrainingResult(**common)
    return ConfidenceTrainingResult(
        **common,
        **{name: rng.random(steps).tolist() for name in ("confidence_loss_history", "total_loss_history",
                                                         "confidence_predictions", "actual_future_losses")},
        held_out_sample={name: tokens[name][:50].tolist() for name in ("predicted", "actual")},
    )  # fmt: skip


def compare(seeds=(1, 2, 3), arms=(STANDARD, CONFIDENCE, UNTOLD, EQUAL_FLOPS)):
    """A finished comparison: told its own predictions the model is better than told anything else (by 0.1 nats or
    more) and than MiniGPT at equal steps (0.5), not at equal FLOPs (0.5 worse); its head knows the coming loss."""
    tokens = {arm: [read(arm, seed) for seed in seeds] for arm in arms}
    steps = {STANDARD: STEPS, CONFIDENCE: STEPS, UNTOLD: STEPS, EQUAL_FLOPS: STEPS * 3 // 2}
    by_arm = {
        arm: {str(seed): [trained(arm, seed, tokens[arm][r], steps[arm])] for r, seed in enumerate(seeds)}
        for arm in arms
    }
    config = ConfidenceExperimentConfig(training_steps=STEPS, seeds=seeds, steps_per_call=1)
    return ConfidenceExperimentResults(
        standard_model_results=by_arm[STANDARD],
        confidence_model_results=by_arm[CONFIDENCE],
        untold_model_results=by_arm.get(UNTOLD, {}),
        equal_flops_results=by_arm.get(EQUAL_FLOPS, {}),
        config=config,
        timestamp="20260131_235959",
        training_time={arm: 4.5 * len(seeds) for arm in arms},
        parameter_counts=dict.fromkeys(FLOPS, 169728) | {CONFIDENCE: 170369},
        flops_per_step=FLOPS,
        data={"vocabulary": 1024, "training_tokens": 50040, "held_out_tokens": 130, "evaluated_tokens": 120},
        findings=analyse(tokens),
        identity={"timestamp": "2026-01-31T23:59:59+00:00", "hashes": {"data": "6dd9184d"}},
    )


@pytest.fixture(scope="session")
def compared():
    """Three seeds, four models."""
    return compare()


@pytest.fixture(scope="session")
def single():
    """One seed, and the two models that are always trained."""
    return compare(seeds=(7,), arms=(STANDARD, CONFIDENCE))


@pytest.fixture
def drawn(monkeypatch):
    """The figures made during a test, in place of drawing their pixels."""
    figures = []

    def save(figure, file, **_):
        figures.append(figure)
        file.write(b"\x89PNG\r\n\x1a\n" + bytes(12) + len(figures).to_bytes(4, "big"))

    monkeypatch.setattr(Figure, "savefig", save)
    return figures
