"""The training loop: one step function, seeded batches by step, checkpoints that make a killed run go on in bits.

`train` is given `loss_fn(params, batch, key) -> (loss, metrics)` and data indexed by step (or a Grain iterator, whose
state is kept with the checkpoint); the key of step s is `fold_in(key(seed), s)`. Nothing else changes with time: a run
that was killed and restarted computes what the unbroken run computes.

Several seeds train together, as one program: then parameters, optimizer state and batches have a leading axis R.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from nmjax.training.checkpoint import Checkpoints
from nmjax.training.sharding import RULES, Rules, check_same, gather, place, rows_sharding, shardings, spread

Params = Any
Batch = Any
Metrics = dict[str, Any]
LossFn = Callable[..., tuple[jax.Array, Any]]


class StepSource(Protocol):
    """Batches by step: a Grain `MapDataset`, or anything else with `__getitem__`."""

    def __getitem__(self, step: int) -> Batch: ...


class TrainState(flax.struct.PyTreeNode):
    """What a run carries from step to step; the randomness of a step is that of `fold_in(key(seed), step)`."""

    step: jax.Array  # int32 [], steps done
    seed: jax.Array  # uint32 []
    params: Params
    opt_state: optax.OptState
    carry: Any = None  # what the loss hands from step to step besides


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
        log_every, watch_every, save_every: steps between two records of the history, between two calls of `watch`
            (0: as often as there are records), and between two checkpoints. The last two are rounded up to a whole
            number of compiled calls.
        seed: of the keys passed to the loss, where `train` is not given several.
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
    watch_every: int = 0
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


def make_optimizer(
    config: TrainConfig, clip: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """AdamW under `make_schedule`, behind `clip` (None: of the global gradient norm)."""

    def matrices(params):
        return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip) if clip is None else clip,
        optax.adamw(make_schedule(config), b2=config.b2, weight_decay=config.weight_decay, mask=matrices),
    )


def init_state(params: Params, optimizer: optax.GradientTransformation, seed=0, carry=None) -> TrainState:
    """The state before the first step; `seed` may be traced."""
    return TrainState(jnp.int32(0), jnp.asarray(seed, jnp.uint32), params, optimizer.init(params), carry)


def make_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, accumulate: int = 1
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The pure step function: (state, batch) -> (next state, metrics).

    Gradients, loss and metrics are means over `accumulate` micro-batches, which equals the step on the whole batch
    where the loss is a mean over rows. Metrics gain `loss` and `grad_norm` (before clipping).

    A loss that hands something on (`state.carry` is not None) is called as `loss_fn(params, batch, key, carry)` and
    returns `(loss, (metrics, carry))`. Where the step is called with a third argument, what is not trained, a loss gets
    it as `frozen=`.

    Raises:
        ValueError: at trace time, if a leaf's first axis is not a multiple of `accumulate`, or a loss that hands
            something on is to accumulate.
    """

    def gradient(loss, params, batch, key):
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        return grads, {"loss": value, **metrics}

    def split(leaf):
        if leaf.shape[0] % accumulate:
            raise ValueError(f"accumulate={accumulate} must divide the batch's first axis, got shape {leaf.shape}")
        return leaf.reshape(accumulate, leaf.shape[0] // accumulate, *leaf.shape[1:])

    def accumulated(loss, params, batch, key):
        parts = jax.tree.map(split, batch)
        of_part = functools.partial(gradient, loss, params)

        def add(total, part):
            return jax.tree.map(jnp.add, total, of_part(*part)), None

        keys = jax.random.split(key, accumulate)
        shapes = jax.eval_shape(of_part, jax.tree.map(lambda leaf: leaf[0], parts), keys[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (parts, keys))
        return jax.tree.map(lambda leaf: leaf / accumulate, total)

    def step(state: TrainState, batch: Batch, frozen: Any = None) -> tuple[TrainState, Metrics]:
        loss = loss_fn if frozen is None else functools.partial(loss_fn, frozen=frozen)
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        carry = state.carry
        if carry is not None:
            if accumulate > 1:
                raise ValueError(f"accumulate={accumulate} and a loss with a carry: wanted accumulate=1")
            (value, (metrics, carry)), grads = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key, carry)
            metrics = {"loss": value, **metrics}
        else:
            grads, metrics = (accumulated if accumulate > 1 else gradient)(loss, state.params, batch, key)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state, carry=carry), metrics

    return step


def on_mesh(run: Callable, mesh: Mesh, state_places: Any, frozen_places: Any, rows: int = 0) -> Callable:
    """`run(state, batch, frozen)` compiled for a mesh; it gives the memory of its first argument away.

    Args:
        state_places, frozen_places: shardings of the state and of what is not trained, see `sharding.shardings`.
        rows: the axis B of a batch, which is spread over the mesh.
    """
    ins = (state_places, rows_sharding(mesh, rows), frozen_places)
    outs = (state_places, NamedSharding(mesh, PartitionSpec()))
    return jax.jit(run, in_shardings=ins, out_shardings=outs, donate_argnums=0)


def over_seeds(run: Callable) -> Callable:
    """`run(state, batch, frozen)` for states and batches with a leading axis R: side by side, or on a CPU in turn.

    A CPU is full with one, and its matrix products are slower with an axis in front.
    """
    if jax.default_backend() == "cpu":
        return lambda states, batches, frozen: jax.lax.map(lambda pair: run(*pair, frozen), (states, batches))
    return jax.vmap(run, in_axes=(0, 0, None))


def train(
    loss_fn: LossFn,
    params: Params,
    data: StepSource | Iterator[Batch],
    config: TrainConfig,
    *,
    seeds: Sequence[int] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    carry: Any = None,
    checkpoints: Checkpoints | None = None,
    progress: bool | str = True,
    watch: Callable[[list[Metrics], Params], Metrics | None] | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    frozen: Any = None,
    identity: dict[str, Any] | None = None,
) -> tuple[TrainState, list[Metrics]]:
    """Runs `config.steps` steps, or what is left of them after the newest checkpoint.

    Args:
        loss_fn: (params, batch, key) -> (loss [], dict of metrics []); see `make_step` for one with a carry.
        params: initial parameters; ignored (except for their shapes) when there is a checkpoint.
        data: `data[step]` is the batch of that step, a pytree of arrays; or an iterator of batches, with `get_state`
            and `set_state` where there are checkpoints.
        seeds: trains one replica a seed; parameters, carry and every leaf of a batch have a leading axis R. None trains
            one, without that axis, with `config.seed`.
        optimizer: None is `make_optimizer(config)`.
        checkpoints: where to save, in the background, and to go on from, the newest whole one; None keeps nothing.
        progress: shows a bar with the time left; a text names it.
        watch: called with the history and the parameters of that moment, every `config.watch_every` steps and at the
            end; what it returns is added to the newest record, which is the history's last. With a mesh the parameters
            are whole copies on the first device of each process.
        mesh: devices to spread state and batches over, see `sharding`; None runs on the default device. With several
            processes all call `train` with the same arguments and the same data, and only process 0 shows the bar.
        rules: how parameters, optimizer state and what is frozen are spread over the mesh.
        frozen: a pytree that the loss gets as `frozen=`, such as the parameters under an adapter: an argument of the
            program, neither differentiated nor copied, and part of no checkpoint.
        identity: what a checkpoint must have been made with to be gone on from, such as the hash of what is frozen;
            strict JSON.

    Returns:
        The final state, and the history: a dict every `log_every` steps, of its `step` and of floats (with seeds, lists
        of R floats).

    Raises:
        FloatingPointError: if a loss stops being finite, at the next record.
        ValueError: if the mesh does not divide a parameter or the batch, processes were given different data, or there
            are checkpoints but none that can be used (see `Checkpoints.load`), one of another `identity`, or one from
            which `config.steps` can't be reached.
    """
    optimizer = make_optimizer(config) if optimizer is None else optimizer

    def start(params, carry):
        if seeds is None:
            state = init_state(params, optimizer, config.seed, carry)
        else:
            given = jnp.asarray(seeds, jnp.uint32)
            state = jax.vmap(lambda p, s, c: init_state(p, optimizer, s, c))(params, given, carry)
        # Copies, because the first step gives its argument's memory away, which is not to be the caller's; and not of
        # weak type, as what comes out of a step is not: it would be compiled twice.
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf)), state)

    run = make_step(loss_fn, optimizer, accumulate=config.accumulate)
    if config.scan > 1:
        run = _scanned(run)
    run = run if seeds is None else over_seeds(run)
    rows = (config.scan > 1) + (seeds is not None)  # the axis B of the batches that `run` takes
    if mesh is None:
        state = start(params, carry)
        run = jax.jit(run, donate_argnums=0)
    else:
        check_same(params, "params")
        places = shardings(jax.eval_shape(start, params, carry), mesh, rules)
        state = jax.jit(start, out_shardings=places)(spread(params, places.params), spread(carry, places.carry))
        below = shardings(frozen, mesh, rules)
        frozen = spread(frozen, below)
        run = on_mesh(run, mesh, places, below, rows)
    history: list[Metrics] = []
    if checkpoints is not None and checkpoints.latest() is not None:
        state, notes = checkpoints.load(state)
        if notes.get("identity") != identity:
            raise ValueError(
                f"identity={identity}, but the checkpoint in {checkpoints.folder} is of {notes.get('identity')}; "
                "wanted the same, or another folder"
            )
        history = notes["history"]
        if hasattr(data, "set_state"):
            data.set_state(notes["data"])

    first = done = int(np.ravel(state.step)[0])
    if done > config.steps or (config.steps - done) % config.scan:
        raise ValueError(
            f"steps={config.steps} can't be reached from the checkpoint of step {done} by scan={config.scan}"
        )
    label = progress if isinstance(progress, str) else None
    silent = not progress or jax.process_index() > 0
    bar = tqdm(total=config.steps, initial=done, unit="step", desc=label, disable=silent, mininterval=1.0)
    with bar, checkpoints or contextlib.nullcontext():
        while done < config.steps:
            batches = [next(data) if isinstance(data, Iterator) else data[done + i] for i in range(config.scan)]
            batch = batches[0] if config.scan == 1 else _stacked(batches, axis=0 if seeds is None else 1)
            if mesh is not None:
                if done == first:
                    check_same(batch, "the first batch")
                batch = place(batch, mesh, rows, config.accumulate)
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                state, metrics = run(state, batch, frozen)
            before, done = done, done + config.scan
            bar.update(config.scan)
            watched = watch is not None and _due(before, done, config.watch_every or config.log_every, config.steps)
            new = _records(metrics, before, config, whole_call=watched)
            history += new
            for record in new:
                if not np.isfinite(record["loss"]).all():
                    raise FloatingPointError(f"loss must stay finite, got {record['loss']} at step {record['step']}")
            if watched:
                seen = state.params if mesh is None else gather(state.params)
                history[-1] |= watch(history, seen) or {}  # type: ignore[misc]
            if new:
                bar.set_postfix_str(f"loss {np.mean(new[-1]['loss']):.3f}")
            if checkpoints is not None and _due(before, done, config.save_every, config.steps):
                at = data.get_state() if hasattr(data, "get_state") else None
                kept = {"history": history, "data": at, "identity": identity}
                checkpoints.save(done, state, kept, background=True)
    return state, history


def _scanned(step: Callable) -> Callable:
    """`step(state, batch, frozen)` for batches with one axis more in front."""

    def run(state, batches, frozen):
        return jax.lax.scan(lambda state, batch: step(state, batch, frozen), state, batches)

    return run


def _stacked(batches: list[Batch], axis: int) -> Batch:
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis), *batches)


def _records(metrics: Metrics, before: int, config: TrainConfig, whole_call: bool) -> list[Metrics]:
    """The records of a call that began after `before` steps; with `whole_call`, one of its last step in any case."""
    fetched = {name: np.asarray(value) for name, value in metrics.items()}
    records = []
    for i in range(config.scan):
        step = before + i + 1
        if step % config.log_every == 0 or step == config.steps or (whole_call and i == config.scan - 1):
            now = {name: value[..., i] if config.scan > 1 else value for name, value in fetched.items()}
            records.append({"step": step, **{name: value.tolist() for name, value in now.items()}})
    return records


def _due(before: int, now: int, every: int, last: int) -> bool:
    """Whether a multiple of `every` lies in (before, now], or `now` is the last step."""
    return now // every > before // every or now == last


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy in nats of each token: logits [..., V], targets int [...] -> [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def next_token_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted mean cross-entropy in nats: logits [B, T, V], targets int [B, T], weights float [B, T] -> []."""
    return jnp.sum(token_losses(logits, targets) * weights) / jnp.maximum(jnp.sum(weights), 1e-9)


def language_model_loss(module) -> LossFn:
    """`language_model_objective` of the parameters alone."""

    def loss_fn(params, batch, key):
        del key
        return language_model_objective(module, {"params": params}, batch), {}

    return loss_fn


def language_model_objective(module, variables: dict[str, Any], batch: Batch, rngs=None) -> jax.Array:
    """`next_token_loss` of a decoder; a batch holds `tokens` int [B, T+1] and `weights` float [B, T], those of
    predicting `tokens[:, 1:]`."""
    tokens = batch["tokens"]
    hidden = module.apply(variables, tokens[:, :-1], rngs=rngs)
    logits = module.apply(variables, hidden, method="unembed")
    return next_token_loss(logits, tokens[:, 1:], batch["weights"])
