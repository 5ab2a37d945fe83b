"""What a model does on held-out text, token by token, told its own confidence or something else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lookahead.arms import CONFIDENCE, UNTOLD, Arm
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
      x_{t+1}), `row` (the chunk a token belongs to). Of a confidence model also `predicted` and `actual`, the loss one
      step later. All this is of a model that is told its own exact predictions, unless it learnt without; told so it
      has `token_loss_*` for what else it may be told (see `TOLD`), and `told_error`: how far the signal it trains under
      is from the exact one.
    """
    read = {CONFIDENCE: _told, UNTOLD: _untold}.get(arm.name, _standard)
    R = len(jax.tree.leaves(params)[0])
    found = []
    for r in range(R):
        replica = jax.tree.map(lambda leaf, r=r: leaf[r], params)
        parts = []
        for k, tokens in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(seed), k)
            part = read(arm.module, draws, replica, jnp.asarray(tokens), key)
            rows = np.broadcast_to(len(tokens) * k + np.arange(len(tokens))[:, None], part["token_loss"].shape)
            parts.append({name: np.asarray(value).reshape(-1) for name, value in (part | {"row": rows}).items()})
        found.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _standard(module, draws: int, params, tokens, key) -> dict[str, jax.Array]:
    hidden = module.apply({"params": params}, tokens[:, :-2])
    return _of_logits(module.apply({"params": params}, hidden, method="unembed"), tokens[:, 1:-1])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _untold(module, draws: int, params, tokens, key) -> dict[str, jax.Array]:
    return _of_signal(module, draws, params, tokens, key, jnp.zeros((*tokens[:, :-2].shape, 1)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _told(module, draws: int, params, tokens, key) -> dict[str, jax.Array]:
    context = tokens[:, :-2]
    exact = module.clone(config=dataclasses.replace(module.config, feedback=None))
    signal = feedback_signal(exact, params, context)
    others = {
        "zeros": jnp.zeros_like(signal),
        "shuffled": jnp.roll(signal, len(signal) // 2, axis=0),
        "constant": jnp.broadcast_to(signal.mean(), signal.shape),
    }

    def token_loss(told):
        out = module.apply({"params": params}, context, confidence_scalars=told)
        return token_losses(out["logits"], tokens[:, 1:-1])

    return {
        **_of_signal(module, draws, params, tokens, key, signal),
        **{f"token_loss_{name}": token_loss(told) for name, told in others.items()},
        "told_error": jnp.abs(feedback_signal(module, params, context) - signal)[..., 0],
    }


def _of_signal(module, draws: int, params, tokens, key, signal) -> dict[str, jax.Array]:
    out = module.apply({"params": params}, tokens[:, :-2], confidence_scalars=signal)
    two = lookahead_loss(module, params, signal, tokens, 1.0, key, Lookahead(draws))
    read = _of_logits(out["logits"], tokens[:, 1:-1])
    return {**read, "predicted": two["pred_conf"], "actual": two["future_loss"]}


def _of_logits(logits, following) -> dict[str, jax.Array]:
    logprobs = jax.nn.log_softmax(logits)
    return {
        "token_loss": token_losses(logits, following),
        "entropy": -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1),
        "max_prob": jnp.exp(logprobs.max(-1)),
        "wrong": jnp.argmax(logits, axis=-1) != following,
    }
