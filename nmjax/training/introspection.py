"""Training a model to tell what was done to it: a conversation is read perturbed, a question about it is not.

The gradient stops at the keys and values of the conversation, so an adapter learns to read them and not to write them,
though it acts in both. Two ways compute the same:

    two segments   the conversation fills a cache, without gradient; the question attends to it
    one segment    both in one pass, in which the conversation's keys and values are detached

The first saves the backward pass through the conversation. Method: the published introspection finetuning study.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nmjax import adapters
from nmjax.interventions.effect import Context, plain_context
from nmjax.interventions.span import SteerSpan
from nmjax.training.loop import LossFn
from nmjax.training.lora import lora_loss

Batch = dict[str, Any]
LOSSES = ("pair", "full")


@dataclasses.dataclass(frozen=True)
class IntrospectionLoss:
    """What is minimised.

    Attributes:
      loss: "pair": cross-entropy among the possible answers only, as published, which leaves their total probability
        free; "full": over the vocabulary.
      kl_to_base: weight of KL(base || model) of the next token where the answer begins, with the answers' first tokens
        taken as one outcome: it holds how probable an answer is, and not which. The base reads the same text, and
        nothing is done to it.
      segments: 2 or 1, see above; the numbers are the same, but for what dropout draws.
    Raises:
      ValueError: anything else.
    """

    loss: str = "pair"
    kl_to_base: float = 0.0
    segments: int = 2

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r}, wanted one of {', '.join(LOSSES)}")
        if not self.kl_to_base >= 0:
            raise ValueError(f"kl_to_base={self.kl_to_base!r}, wanted a number of at least 0")
        if self.segments not in (1, 2):
            raise ValueError(f"segments={self.segments!r}, wanted 1 or 2")


def answer_logprobs(
    module: nn.Module, variables: dict[str, Any], batch: Batch, *, segments: int = 2, perturbed: bool = True, key=None
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the answers, over the whole vocabulary.

    Args:
      batch: as `Examples.batch` makes it.
      segments: 2 or 1, see above.
      perturbed: False leaves the conversation alone.
      key: of dropout in adapters; None is without.
    Returns:
      float32 [B, C], of each answer with all its tokens, and [B, V], of the token that the answers begin with.
    Raises:
      ValueError: the batch is for another model.
    """
    _check(module, batch)
    B, R, Q = batch["rows"].shape
    A = batch["answers"].shape[-1]
    rows, rows_mask = batch["rows"].reshape(B * R, Q), batch["rows_mask"].reshape(B * R, Q)
    run, repeats = (_two_segments, 1) if segments == 2 else (_one_segment, R)
    effects = _effects(batch, repeats) if perturbed else ()
    hidden = run(module, variables, batch, rows, rows_mask, effects, key)
    logits: Any = module.apply(variables, hidden[:, -A:], method="unembed")
    logprobs = jax.nn.log_softmax(logits).reshape(B, R, A, -1)
    by_answer = jnp.broadcast_to(logprobs, (B, batch["answers"].shape[1], *logprobs.shape[2:])) if R == 1 else logprobs
    of_tokens = jnp.take_along_axis(by_answer, batch["answers"][..., None], axis=-1)[..., 0]
    begins = A - batch["answers_mask"][:, 0].sum(-1)  # where the first answer does
    first = jnp.take_along_axis(logprobs[:, 0], begins[:, None, None], axis=1)[:, 0]
    return jnp.where(batch["answers_mask"], of_tokens, 0).sum(-1), first


def _check(module: nn.Module, batch: Batch) -> None:
    config, length = module.config, batch["prefix"].shape[1] + batch["rows"].shape[2]
    for name, wanted, of in (("vectors", config.embed, "embed"), ("coefficients", config.layers, "layers")):
        if batch[name].shape[-1] != wanted:
            raise ValueError(f"batch: {name} have {batch[name].shape[-1]} numbers each; wanted {wanted} ({of})")
    if length > config.max_positions:
        raise ValueError(f"batch: prefix and rows have {length} tokens; wanted at most {config.max_positions}")


def _effects(batch: Batch, repeats: int) -> tuple[SteerSpan]:
    def of(name):
        return jnp.repeat(jnp.asarray(batch[name]), repeats, axis=0)

    span = SteerSpan(
        dose=jnp.ones(len(batch["start"]) * repeats, jnp.float32),
        vectors=of("vectors"),
        coefficients=of("coefficients"),
        start=of("start"),
        end=of("end"),
        width=batch["vectors"].shape[1],
        layers=None,
    )
    return (span,)


def _two_segments(module, variables, batch: Batch, rows, rows_mask, effects, key):
    """Hidden states [B R, Q, D] of the rows."""
    B, P = batch["prefix"].shape
    repeats, Q = len(rows) // B, rows.shape[1]
    still = jax.lax.stop_gradient(variables)
    cache = module.init_cache(B, P, jax.tree.leaves(variables["params"])[0].dtype)
    before = plain_context(batch["prefix"], batch["prefix_mask"])
    _, cache = module.apply(still, batch["prefix"], ctx=before, effects=effects, cache=cache, rngs=_rngs(key, 0))

    def longer(leaf):  # [..., B, K, P, H] -> [..., B R, K, P + Q, H]
        leaf = jnp.repeat(leaf, repeats, axis=leaf.ndim - 4)
        return jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 2) + [(0, Q), (0, 0)])

    k_pos = jnp.repeat(before.k_pos, repeats, axis=0)
    ctx = _behind(rows, rows_mask, k_pos).replace(slot=P)
    hidden, _ = module.apply(variables, rows, ctx=ctx, cache=jax.tree.map(longer, cache), rngs=_rngs(key, 1))
    return hidden


def _one_segment(module, variables, batch: Batch, rows, rows_mask, effects, key):
    """The same, from one pass over conversation and rows."""
    B, P = batch["prefix"].shape
    prefix, prefix_mask = (jnp.repeat(batch[name], len(rows) // B, axis=0) for name in ("prefix", "prefix_mask"))
    k_pos = plain_context(prefix, prefix_mask).k_pos
    ctx = _behind(rows, rows_mask, k_pos)
    tokens = jnp.concatenate([prefix, rows], axis=1)
    detached = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < P, tokens.shape)
    ctx = ctx.replace(q_pos=ctx.k_pos, tokens=tokens, detached=detached)
    return module.apply(variables, tokens, ctx=ctx, effects=effects, rngs=_rngs(key, 0))[:, P:]


def _behind(rows, rows_mask, k_pos) -> Context:
    """The context of rows [B, Q] whose positions go on from those of a prefix [B, P]."""
    length = (k_pos >= 0).sum(axis=1, keepdims=True)
    own = plain_context(rows, rows_mask)
    q_pos = jnp.where(own.q_pos >= 0, own.q_pos + length, -1)
    return own.replace(
        q_pos=q_pos, k_pos=jnp.concatenate([k_pos, q_pos], axis=1), prompt_len=own.prompt_len + length[:, 0]
    )


def _rngs(key, segment: int):
    return None if key is None else {"dropout": jax.random.fold_in(key, segment)}


def introspection_loss(module: nn.Module, config: IntrospectionLoss = IntrospectionLoss()) -> LossFn:
    """The loss of adapter weights for `train`, with metrics.

    accuracy: share of rows whose right answer is the likeliest; pair_mass: mean probability of all answers together;
    kl_to_base: nats, where it has a weight. Raises ValueError, before anything is computed, for weights or batches of
    another model.
    """

    def loss(variables, batch, key):
        adapters.check(module, variables[adapters.LORA])
        logprobs, first = answer_logprobs(module, variables, batch, segments=config.segments, key=key)
        scores = jax.nn.log_softmax(logprobs) if config.loss == "pair" else logprobs
        value = -jnp.take_along_axis(scores, batch["target"][:, None], axis=1).mean()
        metrics = {
            "accuracy": jnp.mean(logprobs.argmax(-1) == batch["target"]),
            "pair_mass": jnp.mean(jnp.exp(logprobs).sum(-1)),
        }
        if config.kl_to_base:
            base = {"params": variables["params"]}
            _, wanted = answer_logprobs(module, base, batch, segments=config.segments, perturbed=False)
            metrics["kl_to_base"] = kl_but_for_the_answer(wanted, first, first_tokens(batch)).mean()
            value += config.kl_to_base * metrics["kl_to_base"]
        return value, metrics

    return lora_loss(loss)


def first_tokens(batch: Batch) -> jax.Array:
    """int32 [B, C]: the token that each answer begins with."""
    A = batch["answers"].shape[-1]
    begins = A - batch["answers_mask"].sum(-1)
    return jnp.take_along_axis(jnp.asarray(batch["answers"]), begins[..., None], axis=-1)[..., 0]


def kl_but_for_the_answer(p, q, answers) -> jax.Array:
    """KL(p || q) in nats [B] of log-probabilities [B, V], with the tokens `answers` [B, C] as one outcome."""
    inside = jax.nn.one_hot(answers, p.shape[-1], dtype=bool).any(1)

    def lumped(x):
        together = jax.nn.logsumexp(jnp.where(inside, x, -jnp.inf), axis=-1)
        return jnp.where(inside, 0, x), together

    (p_rest, p_answer), (q_rest, q_answer) = lumped(p), lumped(q)
    rest = jnp.where(inside, 0, jnp.exp(p_rest) * (p_rest - q_rest)).sum(-1)
    return rest + jnp.exp(p_answer) * (p_answer - q_answer)
