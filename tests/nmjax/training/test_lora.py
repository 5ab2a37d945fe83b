"""LoRA training: what is targeted, how it starts, its gradients against merged weights, runs that are killed."""

import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import models
from nmjax.adapters import assemble, at_sites, check, leaves_of, stack_layers, unstack_layers
from nmjax.training import lora
from nmjax.training.checkpoint import Checkpoints
from nmjax.training.loop import (
    TrainConfig,
    init_state,
    language_model_loss,
    make_optimizer,
    make_step,
    train,
)
from nmjax.training.lora import LoraConfig, lora_language_model_loss

CONFIG = models.LlamaConfig.from_hf(
    {"architectures": ["LlamaForCausalLM"], "vocab_size": 23, "hidden_size": 8, "num_hidden_layers": 2,
     "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12, "max_position_embeddings": 32,
     "tie_word_embeddings": True}
)  # fmt: skip
MODULE, SCANNED = models.Llama(CONFIG), models.ScannedLlama(CONFIG)
BATCH = {"tokens": np.random.default_rng(0).integers(3, 23, (3, 7)), "weights": np.ones((3, 6), np.float32)}
KEY = jax.random.key(7)


def noise(tree, seed, size=0.4):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * size, jnp.float32), tree)


@pytest.fixture(scope="module")
def params():
    return noise(jax.eval_shape(MODULE.init, KEY, np.zeros((1, 1), np.int32))["params"], 0)


@pytest.fixture(scope="module")
def adapter():
    """Random, and missing at one projection of one layer."""
    new = lora.init(MODULE, LoraConfig(r=2, alpha=3, targets=("q", "o", "down"), dropout=0.0), KEY)
    leaves = leaves_of(new.replace(weights=noise(new.weights, 1)))
    del leaves["layers_0", "attn", "q"]
    return assemble(new.config, leaves)


# --- Where and how ----------------------------------------------------------------------------------------------------


def test_counts_of_the_published_adapters(shared_data):
    fields = json.loads((shared_data / "configs" / "Qwen2.5-Coder-32B-Instruct_config.json").read_text())
    module = models.ScannedLlama(models.LlamaConfig.from_hf(fields))
    for r, wanted in ((16, 33_554_432), (1, 2_097_152)):
        shapes = jax.eval_shape(lambda r=r: lora.init(module, LoraConfig(r=r), KEY))
        assert lora.count(shapes) == wanted


def test_the_start_is_that_of_peft():
    """b zero; a uniform within +-1/sqrt(in), which is torch's kaiming_uniform_(a=sqrt(5)); every projection its own."""
    found = at_sites(lora.init(MODULE, LoraConfig(r=200, targets=("q", "o")), KEY).weights)
    assert list(found) == [(f"layers_{i}", "attn", name) for i in range(2) for name in "qo"]
    for path, here in found.items():
        bound = 1 / math.sqrt(8 if path[-1] == "q" else 2 * 4)
        assert not here["b"].any() and here["a"].dtype == jnp.float32
        assert np.abs(here["a"]).max() <= bound and np.abs(here["a"]).max() > 0.95 * bound
        np.testing.assert_allclose(np.std(here["a"]), bound / math.sqrt(3), rtol=0.05)
        others = [other["a"].ravel() for at, other in found.items() if at != path]
        assert max(abs(np.corrcoef(here["a"].ravel(), other)[0, 1]) for other in others) < 0.1


def test_stacked_layers_start_alike():
    config = LoraConfig(r=2, targets=("k", "o"), layers=[1])
    unrolled, scanned = (lora.init(module, config, KEY) for module in (MODULE, SCANNED))
    check(SCANNED, scanned.weights)
    chex.assert_trees_all_equal(unstack_layers(scanned), unrolled)
    assert lora.count(scanned) == 2 * lora.count(unrolled)  # zeros stand in for layer 0


@pytest.mark.parametrize(
    "fields, paths",
    [
        ({"targets": ["q_proj", "v"]}, {(i, "attn", n) for i in "01" for n in "qv"}),
        ({"targets": r"layers_1/(attn/k|mlp/\w+)"},
         {("1", "attn", "k")} | {("1", "mlp", n) for n in ("up", "gate", "down")}),
        ({"targets": "all-linear", "layers": "last"},
         {("1", "attn", n) for n in "qkvo"} | {("1", "mlp", n) for n in ("up", "gate", "down")}),
        ({}, {(i, "attn", n) for i in "01" for n in "qkvo"}),
    ],
)  # fmt: skip
def test_targets(fields, paths):
    for module in (MODULE, SCANNED):
        found = lora.targeted(lora.sites(module), LoraConfig(**fields))
        assert {(path[0].removeprefix("layers_"), *path[1:]) for path in found} == paths


@pytest.mark.parametrize(
    "fields, match",
    [
        (
            {"targets": ["q_proj", "w1"]},
            r"targets \['w1'\] are no projections of this model, wanted some of \['q', 'k'",
        ),
        ({"targets": "attn/q"}, r"targets='attn/q' matches no path; wanted one such as layers_0/attn/q, of \['q', 'k'"),
        ({"targets": "(q"}, "is not a regular expression"),
        ({"targets": []}, r"targets=\[\], wanted names of projections"),
        ({"targets": "layers_0/.*", "layers": [1]}, r"has no projection in layers=\(1,\)"),
        ({"layers": [2]}, "layers"),
        ({"r": 0}, "r=0, wanted an integer >= 1"),
        ({"alpha": 0}, "alpha=0, wanted a finite number other than 0"),
        ({"dropout": 1.0}, "dropout=1.0, wanted a number of at least 0 and below 1"),
    ],
)
def test_what_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        lora.init(MODULE, LoraConfig(**fields), KEY)


def test_scales():
    assert LoraConfig(r=16).alpha == 32 and LoraConfig(r=16).scale() == 2
    assert LoraConfig(r=16, alpha=8, rslora=True).scale() == 2
    adapter = lora.init(MODULE, LoraConfig(r=4, alpha=6, rslora=True), KEY)
    assert {float(s) for leaf in at_sites(adapter.settings).values() for s in leaf["scale"]} == {3.0}


# --- Gradients --------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_merged_kernels(params, adapter):
    """By the chain rule: dL/da = s (dL/dW) b^T and dL/db = s a^T (dL/dW), with dL/dW at W + s a b.

    The adapter's side has its layers stacked, so the two ways to run layers are compared as well; what stands in where
    a layer has no adapter is not trained.
    """
    whole = jax.jit(jax.value_and_grad(lambda p: language_model_loss(MODULE)(p, BATCH, KEY)[0]))
    wanted_loss, of_kernels = whole(lora.merge(params, adapter))
    assert abs(float(wanted_loss - whole(params)[0])) > 0.03

    stacked, loss = stack_layers(adapter, 2), lora_language_model_loss(SCANNED)
    of_weights = jax.jit(jax.value_and_grad(lambda w, frozen: loss(w, BATCH, KEY, frozen=frozen)[0]))
    seen_loss, grads = of_weights(stacked.weights, lora.frozen(models.stack_layers(params), stacked))
    assert float(seen_loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    missing = grads["layers"]["attn"]["q"]
    assert not missing["a"][0].any() and not missing["b"][0].any() and missing["b"][1].any()

    apart = at_sites(unstack_layers(stacked.replace(weights=grads)).weights)
    for path, here in at_sites(adapter.weights).items():
        kernel, seen = flatten_dict(of_kernels)[*path, "kernel"], apart[path]
        a, b = np.asarray(here["a"]).reshape(-1, 2), np.asarray(here["b"]).reshape(2, -1)
        slope = 1.5 * np.asarray(kernel).reshape(len(a), -1)
        np.testing.assert_allclose(np.asarray(seen["a"]).reshape(-1, 2), slope @ b.T, atol=1e-5)
        np.testing.assert_allclose(np.asarray(seen["b"]).reshape(2, -1), a.T @ slope, atol=1e-5)


def test_merging_and_taking_out_again(params, adapter):
    merged = lora.merge(params, adapter)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), merged, params)
    assert sum(jax.tree.leaves(moved)) == 5
    chex.assert_trees_all_close(lora.unmerge(merged, adapter), params, atol=1e-6)
    stacked = lora.merge(models.stack_layers(params), stack_layers(adapter, 2))
    chex.assert_trees_all_close(models.unstack_layers(stacked), merged, atol=1e-7)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    kernel = lora.merge(half, adapter)["layers_1"]["attn"]["q"]["kernel"]
    here = at_sites(adapter.weights)["layers_1", "attn", "q"]
    exact = np.asarray(half["layers_1"]["attn"]["q"]["kernel"], np.float64) + 1.5 * np.einsum(
        "dr,rnh->dnh", np.asarray(here["a"], np.float64), np.asarray(here["b"], np.float64)
    )
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(kernel, np.float64), exact, rtol=2**-8)
    with pytest.raises(ValueError, match="another model: wanted layers_0/attn/o/kernel"):
        lora.merge({"embed": params["embed"]}, adapter)


# --- Runs -------------------------------------------------------------------------------------------------------------


class Data:
    """Batches of tokens that a model can learn: each is followed by its successor."""

    def __getitem__(self, step):
        start = np.random.default_rng(int(step)).integers(3, 12, (4, 1))
        return {"tokens": (start + np.arange(7)).astype(np.int32), "weights": np.ones((4, 6), np.float32)}


RECIPE = TrainConfig(steps=24, peak_lr=0.05, warmup=4, log_every=4, save_every=5)


@pytest.fixture
def run_in_bfloat16(params):
    """The step of adapters over bfloat16 parameters, its first state, and what is frozen."""
    half = models.stack_layers(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    adapter = lora.init(SCANNED, LoraConfig(r=3, targets=("v", "up"), dropout=0.1), KEY)
    step = make_step(lora_language_model_loss(SCANNED), make_optimizer(RECIPE))
    return step, init_state(adapter.weights, make_optimizer(RECIPE)), lora.frozen(half, adapter)


def test_adapters_stay_float32_over_bfloat16_parameters(run_in_bfloat16):
    step, state, frozen = run_in_bfloat16
    after, metrics = jax.eval_shape(step, state, Data()[0], frozen)
    leaves = jax.tree.leaves((after.params, after.opt_state, metrics))
    assert {leaf.dtype for leaf in leaves if leaf.ndim} == {np.dtype(np.float32)}
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.slow
def test_a_run_learns_and_drops_out_by_its_seed(run_in_bfloat16):
    step, state, frozen = run_in_bfloat16
    step, losses = jax.jit(step), []
    for i in range(RECIPE.steps):
        state, metrics = step(state, Data()[i], frozen)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.2
    seeded = [state.replace(seed=jnp.uint32(seed)) for seed in (0, 0, 1)]
    same, again, other = (float(step(one, Data()[0], frozen)[1]["loss"]) for one in seeded)
    assert same == again != other


def linear_loss(weights, batch, key, *, frozen):
    del key
    error = batch["x"] @ (weights["w"] + frozen["w"]) - batch["y"]
    return jnp.mean(error**2), {}


def linear(shape=()):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*shape, 8, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.float32([1.0, -2.0, 0.5])}


def test_what_is_frozen_is_an_argument_and_not_a_constant():
    step = jax.jit(chex.assert_max_traces(make_step(linear_loss, make_optimizer(RECIPE), accumulate=2), n=1))
    state = init_state({"w": jnp.zeros(3)}, make_optimizer(RECIPE))
    losses = [float(step(state, linear(), {"w": jnp.full(3, value)})[1]["loss"]) for value in (0.0, 1.0)]
    x, y = linear()["x"], linear()["y"]
    np.testing.assert_allclose(losses, [np.mean(y**2), np.mean((x.sum(1) - y) ** 2)], rtol=1e-5)


def test_replicas_and_scanned_steps_share_what_is_frozen():
    weights, frozen = {"w": jnp.asarray([[0.0, 0, 0], [1, 1, 1]])}, {"w": jnp.float32([0, -2, 0])}
    recipe = TrainConfig(**vars(RECIPE) | {"scan": 4})
    both, _ = train(linear_loss, weights, [linear((2,))] * 24, recipe, seeds=[0, 1], frozen=frozen, progress=False)
    batch, second = jax.tree.map(lambda leaf: leaf[1], linear((2,))), {"w": weights["w"][1]}
    alone, _ = train(linear_loss, second, [batch] * 24, RECIPE, frozen=frozen, progress=False)
    np.testing.assert_allclose(both.params["w"][1], alone.params["w"], rtol=1e-4)
    assert np.abs(both.params["w"][0] - both.params["w"][1]).max() > 0.1


def test_a_run_goes_on_only_over_what_it_was_frozen_over(tmp_path):
    def run(steps, identity):
        return train(
            linear_loss, {"w": jnp.zeros(3)}, [linear()] * 24, TrainConfig(**vars(RECIPE) | {"steps": steps}),
            frozen={"w": jnp.ones(3)}, identity=identity, checkpoints=Checkpoints(tmp_path), progress=False,
        )  # fmt: skip

    run(20, {"base": "a"})
    for other in ({"base": "b"}, None):
        with pytest.raises(ValueError, match=r"identity=.*, but the checkpoint in .* is of {'base': 'a'}; wanted the"):
            run(24, other)
    assert int(run(24, {"base": "a"})[0].step) == 24
