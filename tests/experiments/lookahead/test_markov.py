"""A source whose coming loss is known in closed form: what the trained head predicts must be that."""

import dataclasses

import jax
import numpy as np

from experiments.lookahead.arms import confidence_arm
from experiments.lookahead.config import ConfidenceExperimentConfig
from nmjax.training.lookahead import feedback_signal
from nmjax.training.loop import train

STATES = 12
CONFIG = ConfidenceExperimentConfig(
    embed_dim=32, num_heads=2, num_layers=1, max_seq_len=24, batch_size=32, training_steps=200, learning_rate=1e-2,
    weight_decay=0.0, seeds=(1,), save_interval=200, eval_interval=200, checkpoint_interval=200, draws=2,
    detach_head=False,
)  # fmt: skip


def transitions() -> np.ndarray:
    """[STATES, STATES]: some states are followed by nearly anything, some by nearly one other only."""
    rng = np.random.default_rng(0)
    rows = [rng.dirichlet(np.full(STATES, sharpness)) for sharpness in np.geomspace(0.05, 5, STATES)]
    return 0.97 * np.stack(rng.permutation(rows)) + 0.03 / STATES


def expected_loss(P: np.ndarray) -> np.ndarray:
    """[STATES]: of a model that knows P and stands at x: it chooses y ~ P[x] itself, while the text goes on by P, and
    is then asked for the text's second token z ~ (P P)[x]: sum over y, z of P[x, y] (P P)[x, z] (-log P[y, z])."""
    return np.einsum("xy,xz,yz->x", P, P @ P, -np.log(P))


class Source:
    """Batches of the chain by step: int32 [R = 1, B, L + 2]."""

    def __init__(self, P):
        self.cumulative = P.cumsum(1)

    def __getitem__(self, step):
        rng = np.random.default_rng([7, step])
        shape = (CONFIG.batch_size, CONFIG.max_seq_len + 2)
        chain = np.empty(shape, np.int32)
        chain[:, 0] = rng.integers(STATES, size=shape[0])
        for t in range(1, shape[1]):
            beyond = rng.random((shape[0], 1)) < self.cumulative[chain[:, t - 1]]
            chain[:, t] = beyond.argmax(1)
        return {"tokens": chain[None]}


def test_the_head_learns_the_closed_form_of_its_coming_loss():
    P = transitions()
    arm = confidence_arm(CONFIG, STATES, None)
    initial = arm.initial_params(CONFIG.seeds)
    recipe = dataclasses.replace(CONFIG.recipe(CONFIG.training_steps), scan=50)
    state, history = train(arm.loss, initial, Source(P), recipe, seeds=CONFIG.seeds, progress=False)

    tokens = Source(P)[10_000]["tokens"][0, :, :-2]
    known = expected_loss(P)[tokens]
    assert known.std() > 0.3, "the source must be of varying difficulty"

    def correlation(params):
        params = jax.tree.map(lambda leaf: leaf[0], params)
        signal = feedback_signal(arm.module, params, tokens)
        said = arm.module.apply({"params": params}, tokens, confidence_scalars=signal)["confidence_pred"][..., 0]
        return np.corrcoef(np.ravel(said), known.ravel())[0, 1], np.mean(said)

    before, _ = correlation(initial)
    after, mean = correlation(state.params)
    assert abs(before) < 0.8 and after > 0.95
    assert abs(mean - known.mean()) < 0.15  # nats
