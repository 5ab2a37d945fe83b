"""The training loop: its step against optax by hand, accumulation, scan, seeds, and the losses of language models."""

import dataclasses

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.training.checkpoint import Checkpoints
from nmjax.training.loop import (
    TrainConfig,
    init_state,
    language_model_loss,
    make_optimizer,
    make_schedule,
    make_step,
    next_token_loss,
    train,
)


class Points:
    """Batches of a linear regression with known weights, by step."""

    def __getitem__(self, step):
        rng = np.random.default_rng(int(step))
        x = rng.normal(size=(8, 3)).astype(np.float32)
        return {"x": x, "y": x @ np.array([[1.0], [-2.0], [0.5]], np.float32) + 0.3}


def loss_fn(params, batch, key):
    noise = 0.01 * jax.random.normal(key, params["w"].shape)  # makes the key matter
    error = batch["x"] @ (params["w"] + noise) + params["b"] - batch["y"]
    return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def initial():
    return {"w": jnp.full((3, 1), 0.1), "b": jnp.zeros((1,))}


CONFIG = TrainConfig(steps=24, peak_lr=0.1, warmup=4, log_every=4, save_every=6)


def test_it_learns():
    config = TrainConfig(steps=400, peak_lr=0.1, warmup=10, weight_decay=0.0, log_every=100)
    state, history = train(loss_fn, initial(), Points(), config, progress=False)
    np.testing.assert_allclose(state.params["w"][:, 0], [1.0, -2.0, 0.5], atol=0.03)
    np.testing.assert_allclose(state.params["b"], 0.3, atol=0.03)
    assert [record["step"] for record in history] == [100, 200, 300, 400]
    assert history[-1]["loss"] < 0.01 and set(history[0]) == {"step", "loss", "mae", "grad_norm"}


def test_the_step_is_clipped_adamw_written_out_by_hand():
    config = TrainConfig(steps=10, peak_lr=0.01, warmup=2, weight_decay=0.2, clip=0.5)
    step = make_step(loss_fn, make_optimizer(config))
    state = init_state(initial(), make_optimizer(config), seed=5)
    w, moment, square = np.array(initial()["w"], np.float64), 0.0, 0.0
    for index, rate in enumerate([0.0, 0.005]):
        batch = Points()[index]
        grads = jax.grad(lambda p, b=batch, i=index: loss_fn(p, b, jax.random.fold_in(jax.random.key(5), i))[0])(
            state.params
        )
        norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(grads)))
        assert norm > 0.5, "the clip must act"
        grad = np.asarray(grads["w"], np.float64) * 0.5 / norm
        moment, square = 0.9 * moment + 0.1 * grad, 0.95 * square + 0.05 * grad**2
        direction = moment / (1 - 0.9 ** (index + 1)) / (np.sqrt(square / (1 - 0.95 ** (index + 1))) + 1e-8)
        w = w - rate * (direction + 0.2 * w)
        state, metrics = step(state, batch)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    assert int(state.step) == 2


def test_schedules_at_their_corners():
    plateau = make_schedule(TrainConfig(steps=100, peak_lr=0.1, end_lr=0.01, warmup=10, decay=20))
    np.testing.assert_allclose([plateau(s) for s in (0, 5, 10, 50, 80, 90, 100)], [0, 0.05, 0.1, 0.1, 0.1, 0.055, 0.01])
    longer = make_schedule(TrainConfig(steps=200, peak_lr=0.1, end_lr=0.01, warmup=10, decay=20))
    np.testing.assert_array_equal([plateau(s) for s in range(80)], [longer(s) for s in range(80)])
    cosine = make_schedule(TrainConfig(steps=110, peak_lr=0.1, end_lr=0.02, warmup=10))
    np.testing.assert_allclose([cosine(s) for s in (0, 10, 60, 110)], [0, 0.1, 0.06, 0.02], rtol=1e-6)


def test_accumulation_equals_the_whole_batch():
    def quiet(params, batch, key):
        return loss_fn(params, batch, jax.random.key(0))

    optimizer = make_optimizer(CONFIG)
    results = [
        make_step(quiet, optimizer, accumulate=parts)(init_state(initial(), optimizer), Points()[0])
        for parts in (1, 2, 8)
    ]
    for state, metrics in results[1:]:
        chex.assert_trees_all_close(state.opt_state, results[0][0].opt_state, rtol=1e-5)
        chex.assert_trees_all_close(metrics, results[0][1], rtol=1e-5)
    with pytest.raises(ValueError, match="accumulate=3 must divide"):
        make_step(quiet, optimizer, accumulate=3)(init_state(initial(), optimizer), Points()[0])


def test_scan_over_steps_equals_single_steps():
    single, history = train(loss_fn, initial(), Points(), CONFIG, progress=False)
    scanned, scanned_history = train(
        loss_fn, initial(), Points(), TrainConfig(**vars(CONFIG) | {"scan": 4}), progress=False
    )
    chex.assert_trees_all_close(single.params, scanned.params, rtol=1e-6)
    assert [r["step"] for r in history] == [r["step"] for r in scanned_history]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="steps must be a multiple of scan=5, got 24"):
        TrainConfig(steps=24, scan=5)
    with pytest.raises(ValueError, match="decay must be 0 to steps - warmup = 14, got 15"):
        TrainConfig(steps=24, warmup=10, decay=15)
    with pytest.raises(ValueError, match="accumulate must be 1 or more, got 0"):
        TrainConfig(steps=24, accumulate=0)
    with pytest.raises(FloatingPointError, match="loss must stay finite, got nan at step 4"):
        train(lambda p, b, k: (jnp.sum(p["w"]) * jnp.nan, {}), initial(), Points(), CONFIG, progress=False)


def test_next_token_loss_is_the_weighted_mean_of_nats():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    targets = np.array([[0, 4, 2], [1, 1, 3]])
    weights = np.array([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]], np.float32)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    expected = -(picked * weights).sum() / weights.sum()
    assert float(next_token_loss(logits, targets, weights)) == pytest.approx(expected, rel=1e-6)
    assert float(next_token_loss(logits, targets, np.zeros_like(weights))) == 0.0


def test_language_model_loss_predicts_each_token_from_those_before(copying_lm):
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(3, 60, (2, 9)), "weights": rng.uniform(size=(2, 8)).astype(np.float32)}
    loss, metrics = language_model_loss(copying_lm.module)(copying_lm.params, batch, jax.random.key(0))
    logits = nmjax.forward(copying_lm, batch["tokens"][:, :-1].tolist()).logits
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    picked = np.take_along_axis(log_probs, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    assert float(loss) == pytest.approx(-np.average(picked, weights=batch["weights"]), rel=1e-5) and metrics == {}


class Replicas:
    """`Points` of another step for each seed, with the axis R in front."""

    def __init__(self, shifts):
        self.shifts = shifts

    def __getitem__(self, step):
        batches = [Points()[100 * shift + step] for shift in self.shifts]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def replicated(R):
    return jax.tree.map(lambda leaf: jnp.stack([leaf * (r + 1) for r in range(R)]), initial())


@pytest.mark.parametrize("side_by_side", [True, False])
def test_seeds_that_train_together_equal_separate_runs(side_by_side, monkeypatch):
    if side_by_side:  # as on an accelerator
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = dataclasses.replace(CONFIG, scan=4, log_every=1)
    together, history = train(loss_fn, replicated(3), Replicas((0, 1, 2)), config, seeds=(5, 6, 9), progress=False)
    assert len(history) == 24 and [len(record["loss"]) for record in history] == [3] * 24
    for r, seed in enumerate((5, 6, 9)):
        alone = jax.tree.map(lambda leaf, r=r: leaf[r : r + 1], replicated(3))
        state, its = train(loss_fn, alone, Replicas((r,)), config, seeds=(seed,), progress=False)
        mine = jax.tree.map(lambda leaf, r=r: leaf[r : r + 1], together)
        chex.assert_trees_all_close(mine, state, rtol=1e-5)
        np.testing.assert_allclose([h["loss"][r] for h in history], [h["loss"][0] for h in its], rtol=1e-5)
    assert abs(together.params["w"][0] - together.params["w"][1]).max() > 1e-3, "replicas must differ"


def test_a_loss_hands_its_carry_on():
    def remembering(params, batch, key, carry):
        loss, metrics = loss_fn(params, batch, key)
        return loss, (metrics | {"heard": carry}, loss)

    state, history = train(
        remembering,
        initial(),
        Points(),
        dataclasses.replace(CONFIG, log_every=1),
        carry=jnp.float32(-1),
        progress=False,
    )
    losses = [record["loss"] for record in history]
    assert [record["heard"] for record in history] == [-1, *losses[:-1]] and float(state.carry) == losses[-1]
    with pytest.raises(ValueError, match="accumulate=2 and a loss with a carry"):
        train(remembering, initial(), Points(), dataclasses.replace(CONFIG, accumulate=2), carry=jnp.float32(0))


def test_a_grain_iterator_goes_on_where_it_stopped(tmp_path):
    def data():
        points = [Points()[k] for k in range(7)]
        shuffled = grain.MapDataset.source(points).seed(3).shuffle().repeat()
        return iter(shuffled.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)))

    unbroken, history = train(loss_fn, initial(), data(), CONFIG, progress=False)

    def interrupt(history, params):
        if history[-1]["step"] == 12:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(loss_fn, initial(), data(), CONFIG, checkpoints=Checkpoints(tmp_path), progress=False, watch=interrupt)
    resumed, its = train(loss_fn, initial(), data(), CONFIG, checkpoints=Checkpoints(tmp_path), progress=False)
    chex.assert_trees_all_equal(resumed, unbroken)
    assert its == history


def test_records_are_of_the_steps_they_name_and_watch_sees_its_moment():
    config = dataclasses.replace(CONFIG, scan=4, log_every=3, watch_every=8)
    seen = []

    def watch(history, params):
        seen.append((history[-1]["step"], float(params["w"][0, 0])))
        return {"noticed": 1.0}

    state, history = train(loss_fn, initial(), Points(), config, progress=False, watch=watch)
    assert [record["step"] for record in history] == [3, 6, 8, 9, 12, 15, 16, 18, 21, 24]
    assert [step for step, _ in seen] == [8, 16, 24] and seen[-1][1] == float(state.params["w"][0, 0])
    assert [record["step"] for record in history if "noticed" in record] == [8, 16, 24]
    _, every = train(loss_fn, initial(), Points(), dataclasses.replace(CONFIG, log_every=1), progress=False)
    for record in history:
        assert record["loss"] == pytest.approx(every[record["step"] - 1]["loss"], rel=1e-5)


def test_a_checkpoint_that_whole_calls_do_not_lead_to_the_end_from_is_refused(tmp_path):
    train(loss_fn, initial(), Points(), CONFIG, checkpoints=Checkpoints(tmp_path), progress=False)
    for changes in ({"steps": 12}, {"steps": 32, "scan": 16}):
        other = dataclasses.replace(CONFIG, **changes)
        with pytest.raises(ValueError, match="can't be reached from the checkpoint of step 24"):
            train(loss_fn, initial(), Points(), other, checkpoints=Checkpoints(tmp_path), progress=False)
