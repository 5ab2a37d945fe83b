"""The models that are compared, the losses they train on, and what a step of each costs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.lookahead.config import ConfidenceExperimentConfig
from models.minigpt import ConfidenceAwareGPT, ConfidenceConfig, MiniGPT, MiniGPTConfig
from nmjax.interventions.effect import plain_context
from nmjax.training.lookahead import Lookahead, feedback_signal, future_losses, lookahead_loss, two_pass_training_step
from nmjax.training.loop import LossFn, init_state, make_optimizer, make_step, token_losses

STANDARD, CONFIDENCE, EQUAL_FLOPS = "standard", "confidence", "standard_equal_flops"
UNTOLD = "confidence_untold"  # learns to predict its coming loss as the confidence model does, and is told nothing


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model of the comparison and how it trains: `steps` steps on `loss`, which may hand on a `carry` [R, ...]."""

    name: str
    module: nn.Module
    loss: LossFn
    steps: int
    carry: Any = None

    def initial_params(self, seeds) -> dict:
        """Parameters with a leading axis R; what two modules share has equal bits for equal seeds."""
        tokens = jnp.zeros((1, 2), jnp.int32)
        return jax.vmap(lambda seed: self.module.init(jax.random.key(seed), tokens)["params"])(
            jnp.asarray(seeds, jnp.uint32)
        )

    @property
    def parameters(self) -> int:
        """How many parameters one replica has."""
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: self.initial_params([0]))))


def standard_arm(config: ConfidenceExperimentConfig, vocab: int, eos_id: int | None) -> Arm:
    """MiniGPT, trained on the next token at the positions that the confidence model is trained at."""
    module = MiniGPT(MiniGPTConfig(max_positions=config.max_seq_len, **_sizes(config, vocab, eos_id)))
    L = config.max_seq_len
    first = 0 if config.lookahead == "all" else L - 1

    def loss(params, batch, key):
        tokens = batch["tokens"]
        # The key of pass 1 of the other arm, so that both drop alike.
        hidden = module.apply({"params": params}, tokens[:, :L], rngs={"dropout": jax.random.split(key)[0]})
        logits = module.apply({"params": params}, hidden[:, first:], method="unembed")
        mean = jnp.mean(token_losses(logits, tokens[:, first + 1 : L + 1]))
        return mean, {"loss_lm": mean}

    return Arm(STANDARD, module, loss, config.training_steps)


def confidence_arm(config: ConfidenceExperimentConfig, vocab: int, eos_id: int | None, name: str = CONFIDENCE) -> Arm:
    """ConfidenceAwareGPT under two-pass lookahead training; pass 2 reaches one position beyond the context."""
    passes = {"jacobi": config.jacobi_passes, "scan": None, "zeros": 0, "carry": 0}[config.feedback]
    module = ConfidenceAwareGPT(
        ConfidenceConfig(
            max_positions=config.max_seq_len + 1,
            confidence_init_bias=config.confidence_init_bias,
            feedback=passes,
            **_sizes(config, vocab, eos_id),
        )
    )
    L, alpha = config.max_seq_len, config.confidence_alpha
    lookahead = Lookahead(config.draws, config.top)

    def two_passes(params, tokens, signal, key):
        if config.lookahead == "all":
            found = lookahead_loss(module, params, signal, tokens, alpha, key, lookahead, detach=config.detach_head)
            predicted = found["pred_conf"]
        else:
            found = two_pass_training_step(
                module,
                params,
                signal,
                tokens[:, :L],
                tokens[:, L],
                tokens[:, L + 1],
                alpha,
                key,
                detach=config.detach_head,
            )
            predicted = found["pred_conf_t"]
        metrics = {name: found[name] for name in ("loss_lm", "loss_confidence")}
        metrics |= {"prediction": jnp.mean(predicted), "future_loss": jnp.mean(found["future_loss"])}
        return found["total_loss"], metrics, predicted

    def loss(params, batch, key):
        tokens = batch["tokens"]
        total, metrics, _ = two_passes(params, tokens, feedback_signal(module, params, tokens[:, :L], key), key)
        return total, metrics

    def carrying_loss(params, batch, key, buffer):
        """The published feedback: what was predicted on the rows before, wherever they came from."""
        total, metrics, predicted = two_passes(params, batch["tokens"], buffer, key)
        predicted = jax.lax.stop_gradient(predicted)
        if config.lookahead == "all":
            buffer = jnp.pad(predicted[:, :-1], ((0, 0), (1, 0)))[..., None]
        else:
            buffer = jnp.concatenate([buffer[:, 1:], predicted[..., None]], axis=1)
        return total, (metrics, buffer)

    if config.feedback == "carry":
        nothing = jnp.zeros((len(config.seeds), config.batch_size, L, 1), jnp.float32)
        return Arm(name, module, carrying_loss, config.training_steps, nothing)
    return Arm(name, module, loss, config.training_steps)


def untold_arm(config: ConfidenceExperimentConfig, vocab: int, eos_id: int | None) -> Arm:
    """The same model, trained alike on both losses, that is told nothing."""
    return confidence_arm(dataclasses.replace(config, feedback="zeros"), vocab, eos_id, UNTOLD)


def optimizer(config: ConfidenceExperimentConfig, steps: int) -> optax.GradientTransformation:
    """AdamW; the head's gradient is clipped apart from the rest.

    A squared error of some nats has a gradient that dwarfs that of the next-token loss. Clipped together, the head's
    size would decide how far the whole model learns from the next token.
    """

    def head(of_head: bool):
        def mask(params):
            return jax.tree_util.tree_map_with_path(
                lambda path, _: ("confidence_predictor" in jax.tree_util.keystr(path)) == of_head, params
            )

        return optax.masked(optax.clip_by_global_norm(config.max_grad_norm), mask)

    return make_optimizer(config.recipe(steps), optax.chain(head(False), head(True)))


def step_flops(config: ConfidenceExperimentConfig, arm: Arm) -> float:
    """Floating-point operations of one optimizer step of one replica, as XLA counts them in the step that runs.

    XLA counts the body of a loop once. So the exact feedback, which reads every position once, is counted as one
    parallel pass, and choices beyond the first are added.
    """
    loss, build = arm.loss, {CONFIDENCE: confidence_arm, UNTOLD: untold_arm}.get(arm.name)
    if build is not None:
        countable = dataclasses.replace(config, draws=1, top=0)
        if config.feedback == "scan":
            countable = dataclasses.replace(countable, feedback="jacobi", jacobi_passes=1)
        loss = build(countable, arm.module.config.vocab, None).loss
    params = jax.tree.map(lambda leaf: leaf[0], arm.initial_params(config.seeds[:1]))
    tokens = jnp.zeros((config.batch_size, config.max_seq_len + 2), jnp.int32)
    adamw = optimizer(config, config.training_steps)
    state = init_state(params, adamw, carry=None if arm.carry is None else arm.carry[0])
    total = _flops(make_step(loss, adamw), state, {"tokens": tokens})
    more = max(config.top, config.draws) - 1
    if build is not None and more:
        total += more * _flops(functools.partial(future_losses, arm.module), *_second_pass(arm, params, tokens), {})
    return total


def _second_pass(arm: Arm, params, tokens) -> tuple:
    """Arguments of `future_losses` of the right shapes."""
    context = tokens[:, :-2]
    cache = arm.module.init_cache(*context.shape, jnp.float32)
    told = jnp.zeros((*context.shape, 1), jnp.float32)
    return params, context, told, plain_context(context), cache, tokens[:, 2:]


def _flops(function, *arguments) -> float:
    counted = jax.jit(function).lower(*arguments).cost_analysis()
    if not counted or "flops" not in counted:
        raise ValueError(f"XLA does not count operations on {jax.default_backend()}")
    return float(counted["flops"])


def _sizes(config: ConfidenceExperimentConfig, vocab: int, eos_id: int | None) -> dict[str, Any]:
    return {
        "vocab": vocab,
        "embed": config.embed_dim,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "dropout": config.dropout,
        "eos_ids": () if eos_id is None else (eos_id,),
    }
