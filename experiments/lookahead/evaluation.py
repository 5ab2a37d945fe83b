"""What a model does on held-out text, token by token, told its own confidence or something else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lookahead.arms import CONFIDENCE, Arm
from nmjax.training.lookahead import Lookahead, feedback_signal, lookahead_loss
from nmjax.training.loop import token_losses

TOLD = ("zeros", "shuffled", "constant")
"""What a model may be told in place of its own predictions: nothing; those it makes at the same positions of another
text; their mean. A signal that helps does so by what it says here, so it has to beat all three."""


def held_out(arm: Arm, params, batches: Sequence[np.ndarray], draws: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Every held-out token of every replica, a dictionary of arrays [tokens] each.

    Args:
      params: with a leading axis R.
      batches: int [B, L + 2] each, two rows or more.
      draws: choices a position behind which its future loss is measured; it is the mean of theirs.
      seed: of these choices.
    Returns:
      `token_loss` (of x_{t+1}), `entropy` and `max_prob` (of the distribution at t), `wrong` (whether its mode is not
      x_{t+1}), `row` (the chunk a token belongs to). Of a confidence model, told its own exact predictions, also
      `predicted` and `actual`, the loss one step later, `token_loss_*` for what else it may be told (see `TOLD`), and
      `told_error`: how far the signal it trains under is from the exact one.
    """
    R = len(jax.tree.leaves(params)[0])
    found = []
    for r in range(R):
        replica = jax.tree.map(lambda leaf, r=r: leaf[r], params)
        parts = []
        for k, tokens in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(seed), k)
            part = _read(arm.module, arm.name == CONFIDENCE, draws, replica, jnp.asarray(tokens), key)
            rows = np.broadcast_to(len(tokens) * k + np.arange(len(tokens))[:, None], part["token_loss"].shape)
            parts.append({name: np.asarray(value).reshape(-1) for name, value in (part | {"row": rows}).items()})
        found.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _read(module, confident: bool, draws: int, params, tokens, key) -> dict[str, jax.Array]:
    context, following = tokens[:, :-2], tokens[:, 1:-1]
    if not confident:
        hidden = module.apply({"params": params}, context)
        return _of_logits(module.apply({"params": params}, hidden, method="unembed"), following)

    exact = module.clone(config=dataclasses.replace(module.config, feedback=None))
    signal = feedback_signal(exact, params, context)
    two = lookahead_loss(module, params, signal, tokens, 1.0, key, Lookahead(draws))
    own = module.apply({"params": params}, context, confidence_scalars=signal)
    others = {
        "zeros": jnp.zeros_like(signal),
        "shuffled": jnp.roll(signal, len(signal) // 2, axis=0),
        "constant": jnp.broadcast_to(signal.mean(), signal.shape),
    }
    losses = {
        f"token_loss_{name}": token_losses(
            module.apply({"params": params}, context, confidence_scalars=other)["logits"], following
        )
        for name, other in others.items()
    }
    trained_under = feedback_signal(module, params, context)
    return {
        **_of_logits(own["logits"], following),
        **losses,
        "predicted": two["pred_conf"],
        "actual": two["future_loss"],
        "told_error": jnp.abs(trained_under - signal)[..., 0],
    }


def _of_logits(logits, following) -> dict[str, jax.Array]:
    logprobs = jax.nn.log_softmax(logits)
    return {
        "token_loss": token_losses(logits, following),
        "entropy": -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1),
        "max_prob": jnp.exp(logprobs.max(-1)),
        "wrong": jnp.argmax(logits, axis=-1) != following,
    }
