"""The training loop: one step function, seeded batches by step, checkpoints that make a killed run go on in bits.

`train` is given `loss_fn(params, batch, key) -> (loss, metrics)` and a data source indexed by step, so that the state
of the data is the step itself; the key of step s is `fold_in(key(seed), s)`. Nothing else changes with time: a run that
was killed and restarted computes what the unbroken run computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from nmjax.training.checkpoint import Checkpoints

Params = Any
Batch = Any
Metrics = dict[str, Any]
LossFn = Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class StepSource(Protocol):
    """Batches by step: a Grain `MapDataset`, or anything else with `__getitem__`."""

    def __getitem__(self, step: int) -> Batch: ...


class TrainState(flax.struct.PyTreeNode):
    """What a run carries from step to step: `step` int32 [] (steps done), parameters, optimizer state."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState


@dataclass(frozen=True)
class TrainConfig:
    """A recipe.

    Attributes:
        steps: optimizer steps in all.
        peak_lr, end_lr: learning rate after `warmup` steps of linear growth, and at the end.
        warmup: steps.
        decay: over how many steps at the end the rate falls from one to the other, linearly; before that it is
            constant, so that runs of different lengths share their first part. 0 is a cosine over all steps.
        weight_decay: of AdamW, on every parameter with two or more axes.
        clip: largest global norm of the gradient.
        accumulate: micro-batches a step; every leaf of a batch is split along its first axis.
        scan: steps a compiled call runs (their batches are stacked); the numbers do not depend on it up to rounding.
        log_every, save_every: steps between two records of the history, and between two checkpoints. Both are rounded
            up to a whole number of calls.
        seed: of the keys passed to the loss.
    """

    steps: int
    peak_lr: float = 3e-3
    end_lr: float = 0.0
    warmup: int = 100
    decay: int = 0
    weight_decay: float = 0.1
    b2: float = 0.95
    clip: float = 1.0
    accumulate: int = 1
    scan: int = 1
    log_every: int = 50
    save_every: int = 500
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "accumulate", "scan", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.decay and not 0 < self.decay <= self.steps - self.warmup:
            wanted = f"0 to steps - warmup = {self.steps - self.warmup}"
            raise ValueError(f"decay must be {wanted}, got {self.decay}")
        if self.steps % self.scan:
            raise ValueError(f"steps must be a multiple of scan={self.scan}, got {self.steps}")


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """The learning rate by step: a warm-up, then a cosine, or a plateau and a linear decay."""
    warmup = min(config.warmup, config.steps - 1)
    if not config.decay:
        return optax.warmup_cosine_decay_schedule(0.0, config.peak_lr, warmup, config.steps, config.end_lr)
    rise = optax.linear_schedule(0.0, config.peak_lr, warmup)
    fall = optax.linear_schedule(config.peak_lr, config.end_lr, config.decay)
    return optax.join_schedules([rise, fall], [config.steps - config.decay])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW under `make_schedule`, behind a clip of the global gradient norm."""

    def matrices(params):
        return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(make_schedule(config), b2=config.b2, weight_decay=config.weight_decay, mask=matrices),
    )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))


def make_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, seed: int = 0, accumulate: int = 1
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure step function: (state, batch) -> (next state, metrics).

    Gradients, loss and metrics are means over `accumulate` micro-batches, which equals the step on the whole batch
    where the loss is a mean over rows. Metrics gain `loss` and `grad_norm` (before clipping).

    Raises:
        ValueError: at trace time, if a leaf's first axis is not a multiple of `accumulate`.
    """

    def gradient(params, batch, key):
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
        return grads, {"loss": loss, **metrics}

    def split(leaf):
        if leaf.shape[0] % accumulate:
            raise ValueError(f"accumulate={accumulate} must divide the batch's first axis, got shape {leaf.shape}")
        return leaf.reshape(accumulate, leaf.shape[0] // accumulate, *leaf.shape[1:])

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulate == 1:
            grads, metrics = gradient(state.params, batch, key)
        else:
            parts = jax.tree.map(split, batch)

            def add(total, part):
                return jax.tree.map(jnp.add, total, gradient(state.params, *part)), None

            keys = jax.random.split(key, accumulate)
            shapes = jax.eval_shape(gradient, state.params, jax.tree.map(lambda leaf: leaf[0], parts), keys[0])
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            total, _ = jax.lax.scan(add, zeros, (parts, keys))
            grads, metrics = jax.tree.map(lambda leaf: leaf / accumulate, total)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def train(
    loss_fn: LossFn,
    params: Params,
    data: StepSource,
    config: TrainConfig,
    *,
    optimizer: optax.GradientTransformation | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = True,
    on_record: Callable[[Metrics, Params], Metrics | None] | None = None,
) -> tuple[TrainState, list[Metrics]]:
    """Runs `config.steps` steps, or what is left of them after the newest checkpoint.

    Args:
        loss_fn: (params, batch, key) -> (loss [], dict of metrics []).
        params: initial parameters; ignored (except for their shapes) when there is a checkpoint.
        data: `data[step]` is the batch of that step, a pytree of arrays.
        optimizer: None is `make_optimizer(config)`.
        checkpoints: where to save and to go on from; None keeps nothing.
        progress: shows a bar with the time left.
        on_record: called with every record of the history and the parameters of that moment; what it returns is added
            to the record.

    Returns:
        The final state, and the history: one dict of floats every `log_every` steps, with its `step`.

    Raises:
        FloatingPointError: if the loss stops being finite, at the next record.
    """
    optimizer = make_optimizer(config) if optimizer is None else optimizer
    state = init_state(params, optimizer)
    history: list[Metrics] = []
    if checkpoints is not None and checkpoints.latest() is not None:
        state, history = checkpoints.load(state)
    step_fn = make_step(loss_fn, optimizer, seed=config.seed, accumulate=config.accumulate)
    if config.scan > 1:
        run = jax.jit(lambda state, batches: jax.lax.scan(step_fn, state, batches), donate_argnums=0)
    else:
        run = jax.jit(step_fn, donate_argnums=0)
    state = jax.tree.map(jnp.copy, state)  # the first call gives its argument's memory away: not the caller's

    done = int(state.step)
    with tqdm(total=config.steps, initial=done, unit="step", disable=not progress, mininterval=1.0) as bar:
        while done < config.steps:
            batches = [data[step] for step in range(done, done + config.scan)]
            batch = jax.tree.map(lambda *leaves: np.stack(leaves), *batches) if config.scan > 1 else batches[0]
            state, metrics = run(state, batch)
            before, done = done, done + config.scan
            bar.update(config.scan)
            if _passed(before, done, config.log_every) or done == config.steps:
                record = {name: float(np.asarray(value).reshape(-1)[-1]) for name, value in metrics.items()}
                if not np.isfinite(record["loss"]):
                    raise FloatingPointError(f"loss must stay finite, got {record['loss']} at step {done}")
                record = {"step": done, **record}
                if on_record is not None:
                    record |= on_record(record, state.params) or {}
                history.append(record)
                bar.set_postfix_str(f"loss {record['loss']:.3f}")
            if checkpoints is not None and (_passed(before, done, config.save_every) or done == config.steps):
                checkpoints.save(done, state, history)
    return state, history


def _passed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy in nats of each token: logits [..., V], targets int [...] -> [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def next_token_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted mean cross-entropy in nats: logits [B, T, V], targets int [B, T], weights float [B, T] -> []."""
    return jnp.sum(token_losses(logits, targets) * weights) / jnp.maximum(jnp.sum(weights), 1e-9)


def language_model_loss(module) -> LossFn:
    """`next_token_loss` of a decoder; a batch holds `tokens` int [B, T+1] and `weights` float [B, T], those of
    predicting `tokens[:, 1:]`."""

    def loss_fn(params, batch, key):
        del key
        tokens = batch["tokens"]
        hidden = module.apply({"params": params}, tokens[:, :-1])
        logits = module.apply({"params": params}, hidden, method="unembed")
        return next_token_loss(logits, tokens[:, 1:], batch["weights"]), {}

    return loss_fn
