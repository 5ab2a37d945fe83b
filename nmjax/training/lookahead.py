"""Two-pass lookahead training: a model learns to predict the loss it will have one token after its own choice.

At position t the model sees x_0..x_t and predicts the next token and, as c_t, a coming loss. Its own choice y is drawn
from what it predicted and put behind x_t, with c_t as the signal beside it; how badly the model then predicts x_{t+2}
is what c_t is asked to equal:

    pass 1   x_0 ... x_t           ->  logits z_t, confidence c_t            loss_lm = CE(z_t, x_{t+1})
    pass 2   x_0 ... x_t  y ~ z_t  ->  f_t = CE(logits after y, x_{t+2})     loss_confidence = (c_t - f_t)^2

No gradient flows through f_t, so pass 2 reads the keys and values that pass 1 left: at one position that is one cached
token (`two_pass_training_step`), at all of them one more forward in which every choice attends to the tokens before it
and to itself (`lookahead_loss`). Both equal appending y and running anew.

Modules are duck-typed: `told`, `predict`, `branch`, `feed_back`, `unembed`, `init_cache` as in `models.minigpt`.
B rows, L tokens of context, V vocabulary, M choices a position.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from nmjax.interventions.effect import Context, plain_context
from nmjax.sampling import draw as draw_token
from nmjax.training.loop import token_losses


@dataclasses.dataclass(frozen=True)
class Lookahead:
    """Which of its own choices a position looks behind.

    Attributes:
        draws: tokens sampled from the model's distribution by inverse CDF; their losses are averaged.
        top: in place of sampling, the so many likeliest tokens, their losses weighted by their probabilities (which
            are made to sum to 1). 0 samples.

    Raises:
        ValueError: `draws` below 1 or `top` below 0.
    """

    draws: int = 1
    top: int = 0

    def __post_init__(self):
        if self.draws < 1 or self.top < 0:
            raise ValueError(f"wanted draws >= 1 and top >= 0, got draws={self.draws}, top={self.top}")

    def choose(self, logits: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Choices int32 [B, L, M] from logits [B, L, V], and their weights float32 [B, L, M], which sum to 1.

        Raises ValueError for a `top` above V.
        """
        if self.top > logits.shape[-1]:
            raise ValueError(f"top={self.top}, wanted at most the vocabulary's {logits.shape[-1]}")
        if self.top:
            likeliest, tokens = jax.lax.top_k(logits, self.top)
            return tokens.astype(jnp.int32), jax.nn.softmax(likeliest, axis=-1)
        flat = logits.reshape(-1, logits.shape[-1])
        uniform = jax.random.uniform(key, (self.draws, len(flat)))
        tokens = jax.vmap(draw_token, in_axes=(None, 0), out_axes=-1)(flat, uniform)
        tokens = tokens.reshape(*logits.shape[:2], self.draws)
        return tokens, jnp.full(tokens.shape, 1 / self.draws, jnp.float32)


def lookahead_loss(
    module,
    params,
    signal,
    tokens,
    alpha,
    key,
    lookahead: Lookahead = Lookahead(),
    draw=None,
    weights=None,
    detach=False,
) -> dict[str, jax.Array]:
    """The exact lookahead at every position, in one forward more than a standard step.

    Args:
        signal: float32 [B, L, 1], the confidence the model is told at each position; see `feedback_signal`.
        tokens: int [B, L + 2]: L tokens of context, and two targets behind the last of them.
        alpha: weight of loss_confidence in total_loss.
        key: of dropout, and of the choices.
        draw: int [B, L] or [B, L, M], choices to look behind in place of those `lookahead` makes, of equal weight.
        weights: float [B, L] of the positions in both losses; None = all count alike.
        detach: no gradient of loss_confidence reaches the trunk: the head learns from what the next-token loss makes.
    Returns:
        `total_loss`, `loss_lm` (next-token cross-entropy) and `loss_confidence` [], means over positions;
        `pred_conf` [B, L], `future_loss` [B, L] (what it is asked to equal) and `token_loss` [B, L].
    Raises:
        ValueError: arrays of other shapes, or a context that leaves the model no position for a choice.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 3:
        raise ValueError(f"tokens has shape {tokens.shape}, wanted [B, L + 2] with L of 1 or more")
    B, L = tokens.shape[0], tokens.shape[1] - 2
    _check(module, L, {"signal": (signal, (B, L, 1)), "weights": (weights, (B, L))})
    if draw is not None and draw.shape[:2] != (B, L):
        raise ValueError(f"draw has shape {draw.shape}, wanted {(B, L)}, or an axis of choices more")
    weights = jnp.ones((B, L), jnp.float32) if weights is None else weights
    ctx = plain_context(tokens[:, :L])
    hidden, confidence, cache, dropout = _first_pass(module, params, tokens[:, :L], signal, ctx, L, key, detach)
    logits = module.apply({"params": params}, hidden, method="unembed")
    losses = token_losses(logits, tokens[:, 1 : L + 1])

    frozen, cache, confidence_now, logits = jax.lax.stop_gradient((params, cache, confidence, logits))
    if draw is None:
        choices, shares = lookahead.choose(logits, jax.random.fold_in(key, 1))
    else:
        choices = draw.reshape(B, L, -1)
        shares = jnp.full(choices.shape, 1 / choices.shape[-1], jnp.float32)
    M = choices.shape[-1]

    def future(choice):
        return future_losses(module, frozen, choice, confidence_now, ctx, cache, tokens[:, 2:], dropout)

    if M == 1:
        target = future(choices[..., 0])
    else:
        each = jax.lax.map(future, jnp.moveaxis(choices, -1, 0))  # one at a time: each takes [B, L, V] of memory
        target = jnp.sum(jnp.moveaxis(each, 0, -1) * shares, axis=-1)
    count = jnp.maximum(weights.sum(), 1e-9)
    loss_lm = jnp.sum(losses * weights) / count
    loss_confidence = jnp.sum((confidence[..., 0] - target) ** 2 * weights) / count
    return {
        "total_loss": loss_lm + alpha * loss_confidence,
        "loss_lm": loss_lm,
        "loss_confidence": loss_confidence,
        "pred_conf": confidence[..., 0],
        "future_loss": target,
        "token_loss": losses,
    }


def future_losses(module, params, choice, confidence, ctx: Context, cache, targets, rngs) -> jax.Array:
    """The loss [B, L] at targets [B, L] behind one choice [B, L] a position, which hears of a confidence [B, L, 1].

    `ctx` and `cache` are of the pass that read the tokens in front.
    """
    behind = ctx.replace(q_pos=ctx.q_pos + 1, tokens=choice)
    found = module.apply({"params": params}, choice, confidence, behind, cache, method="branch", rngs=rngs)
    return token_losses(module.apply({"params": params}, found, method="unembed"), targets)


def two_pass_training_step(
    module, params, prev_conf, tokens_t, tokens_t_plus_1, tokens_t_plus_2, alpha, key, draw=None, detach=False
) -> dict[str, jax.Array]:
    """The published step: both losses at the last position of each row.

    `functools.partial(two_pass_training_step, module)` has the published signature.

    Args:
        prev_conf: float32 [B, L, 1], the confidence the model is told at each position.
        tokens_t, tokens_t_plus_1, tokens_t_plus_2: int [B, L], [B], [B]; the context and the two tokens behind it.
        alpha: weight of loss_confidence in total_loss.
        key: of dropout, and of the sampled choice.
        draw: int [B], the choice to append in place of a sampled one.
        detach: as for `lookahead_loss`.
    Returns:
        `pred_conf_t` [B, 1] and `total_loss`, `loss_lm`, `loss_confidence` [], means over rows; `future_loss` [B], what
        `pred_conf_t` is asked to equal.
    Raises:
        ValueError: arrays of other shapes, or a context that leaves the model no position for a choice.
    """
    B, L = tokens_t.shape
    targets = {"tokens_t_plus_1": (tokens_t_plus_1, (B,)), "tokens_t_plus_2": (tokens_t_plus_2, (B,))}
    _check(module, L, {"prev_conf": (prev_conf, (B, L, 1)), "draw": (draw, (B,)), **targets})
    ctx = plain_context(tokens_t)
    hidden, confidence, cache, dropout = _first_pass(module, params, tokens_t, prev_conf, ctx, L + 1, key, detach)
    logits = module.apply({"params": params}, hidden[:, -1:], method="unembed")[:, 0]
    loss_lm = jnp.mean(token_losses(logits, tokens_t_plus_1))

    frozen, cache, told, logits = jax.lax.stop_gradient((params, cache, confidence[:, -1:], logits))
    choice = draw_token(logits, jax.random.uniform(jax.random.fold_in(key, 1), (B,))) if draw is None else draw
    position = jnp.full((B, 1), L, jnp.int32)
    behind = Context(
        q_pos=position,
        k_pos=jnp.concatenate([ctx.k_pos, position], axis=1),
        tokens=choice[:, None],
        prompt_len=ctx.prompt_len,
        slot=L,
    )
    hidden, _, _ = module.apply(
        {"params": frozen}, choice[:, None], told, behind, (), cache, method="told", rngs=dropout
    )
    future = token_losses(module.apply({"params": frozen}, hidden, method="unembed"), tokens_t_plus_2[:, None])[:, 0]
    loss_confidence = jnp.mean((confidence[:, -1, 0] - future) ** 2)
    return {
        "pred_conf_t": confidence[:, -1],
        "total_loss": loss_lm + alpha * loss_confidence,
        "loss_lm": loss_lm,
        "loss_confidence": loss_confidence,
        "future_loss": future,
    }


def feedback_signal(module, params, tokens, key=None) -> jax.Array:
    """float32 [B, L, 1]: what the model is told on rows int [B, L] when it is told its own predictions.

    `module.config.feedback` says how they are found (exactly, by Jacobi passes, or not at all: zeros). No gradient
    flows through them. `key`: of dropout; None = none.
    """
    rngs = {} if key is None else {"dropout": key}
    frozen = jax.lax.stop_gradient(params)
    return module.apply({"params": frozen}, tokens, plain_context(tokens), method="feed_back", rngs=rngs)


def _check(module, context: int, arrays: dict) -> None:
    """Raises ValueError unless each of name -> (array or None, shape) fits, and a choice behind the context, too."""
    for name, (array, shape) in arrays.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, wanted {shape}")
    room = module.config.max_positions
    if context >= room:
        raise ValueError(f"tokens: a context of {context} tokens and a choice behind them exceed max_positions={room}")


def _first_pass(module, params, tokens, signal, ctx: Context, slots: int, key, detach: bool):
    """Hidden states, confidences and the filled cache of `slots` slots; and the rngs of the second pass."""
    first, second = jax.random.split(key)
    cache = module.init_cache(len(tokens), slots, jax.tree.leaves(params)[0].dtype)
    hidden, confidence, cache = module.apply(
        {"params": params}, tokens, signal, ctx, (), cache, method="told", rngs={"dropout": first}
    )
    if detach:
        confidence = module.apply({"params": params}, jax.lax.stop_gradient(hidden), method="predict")
    return hidden, confidence, cache, {"dropout": second}
