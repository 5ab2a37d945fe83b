"""Live comparisons with torch: both models and all steps at larger sizes, and the committed arrays."""

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import ConfidenceAwareGPT, ConfidenceConfig, MiniGPT, MiniGPTConfig
from nmjax.training.lookahead import feedback_signal, lookahead_loss, two_pass_training_step

pytestmark = pytest.mark.parity

SIZES = [
    MiniGPTConfig(vocab=500, embed=64, layers=3, heads=4, max_positions=25),
    MiniGPTConfig(vocab=67, embed=36, layers=5, heads=6, max_positions=25, norm_eps=1e-3, gelu="tanh"),
]
ALPHA = 0.4


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def torch_minigpt(torch):
    from experiments import torch_minigpt

    return torch_minigpt


def random_params(module):
    """Every one of them random, so that each term of a model matters."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    def fill(path, leaf):
        values = 0.15 * rng.normal(size=leaf.shape) + (path[-1].key == "scale")
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def close(seen, wanted, tolerance):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=tolerance * max(1.0, np.abs(wanted).max()))


def trees_close(seen, wanted, tolerance):
    """Leaf by leaf, each against its own largest value. Biases of keys do nothing, so their gradient is rounding."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(seen), jax.tree.leaves(wanted), strict=True):
        scale = max(np.abs(b).max(), 1e-2)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def gradients(torch_minigpt, model, loss):
    model.zero_grad()
    loss.backward()
    return jax.tree.map(np.asarray, torch_minigpt.as_tree(model, lambda parameter: parameter.grad))


def dict_at(tree, path):
    return functools.reduce(lambda node, step: node[step.key], path, tree)


def rows(config, rng):
    """Tokens [4, 26], a signal [4, 24, 1] and choices [4, 24]."""
    tokens, draw = rng.integers(0, config.vocab, (4, 26)), rng.integers(0, config.vocab, (4, 24))
    return tokens, rng.uniform(0, 5, (4, 24, 1)).astype(np.float32), draw


@pytest.mark.parametrize("config", SIZES)
def test_standard_step(torch, torch_minigpt, config):
    module = MiniGPT(config)
    params, (tokens, _, _) = random_params(module), rows(config, np.random.default_rng(1))
    tokens = tokens[:, :-1]

    @jax.jit
    def ours(params):
        logits = module.apply({"params": params}, module.apply({"params": params}, tokens[:, :-1]), method="unembed")
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), logits

    (loss, logits), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    model = torch_minigpt.from_params(config, params).eval()
    close(logits, model(torch.from_numpy(tokens[:, :-1])).detach(), 1e-5)
    wanted = torch_minigpt.standard_step(model, torch.from_numpy(tokens))
    close(loss, wanted.detach(), 1e-5)
    trees_close(gradient, gradients(torch_minigpt, model, wanted), 1e-4)


@pytest.mark.parametrize("config", SIZES)
def test_both_lookahead_steps(torch, torch_minigpt, config):
    config = ConfidenceConfig(**dataclasses.asdict(config))
    module = ConfidenceAwareGPT(config)
    params, (tokens, signal, draw) = random_params(module), rows(config, np.random.default_rng(2))
    model = torch_minigpt.from_params(config, params).eval()
    x, t, s, d = tokens[:, :24], torch.from_numpy(tokens), torch.from_numpy(signal), torch.from_numpy(draw)

    def last(params):
        args = (signal, x, tokens[:, 24], tokens[:, 25], ALPHA, jax.random.key(0), draw[:, -1])
        out = two_pass_training_step(module, params, *args)
        return out["total_loss"], out

    def everywhere(params):
        out = lookahead_loss(module, params, signal, tokens, ALPHA, jax.random.key(0), draw=draw)
        return out["total_loss"], out

    torch_last = torch_minigpt.two_pass_step(model, s, t[:, :24], t[:, 24], t[:, 25], ALPHA, d[:, -1])
    for ours, wanted in [(last, torch_last), (everywhere, torch_minigpt.lookahead_step(model, s, t, ALPHA, d))]:
        (_, out), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
        for name, value in wanted.items():
            close(out[name], value.detach(), 1e-5)
        trees_close(gradient, gradients(torch_minigpt, model, wanted["total_loss"]), 1e-4)
    assert torch_last["loss_confidence"] > 0.1
    fed = jax.jit(lambda params: feedback_signal(module, params, x))(params)
    close(fed, torch_minigpt.feed_back(model, t[:, :24]), 1e-5)


def test_torch_draws_its_own_choice_where_none_is_given(torch, torch_minigpt):
    config = ConfidenceConfig(**dataclasses.asdict(SIZES[1]))
    model = torch_minigpt.from_params(config, random_params(ConfidenceAwareGPT(config))).eval()
    tokens, signal, _ = (torch.from_numpy(a) for a in rows(config, np.random.default_rng(3)))
    last = (signal, tokens[:, :24], tokens[:, 24], tokens[:, 25], ALPHA)
    torch.manual_seed(0)
    seen = torch.stack([torch_minigpt.two_pass_step(model, *last)["future_loss"] for _ in range(20)])
    words = torch.arange(config.vocab)[:, None].expand(-1, 4)
    of_word = torch.stack([torch_minigpt.two_pass_step(model, *last, word)["future_loss"] for word in words])
    assert (seen[:, None] - of_word).abs().min(1).values.max() < 1e-5
    assert all(len(column.unique()) > 5 for column in seen.T)


def test_updates_are_those_of_clipped_adamw(torch, torch_minigpt):
    config, rng = SIZES[1], np.random.default_rng(4)
    params = random_params(MiniGPT(config))
    model = torch_minigpt.from_params(config, params).eval()
    optimizer = torch_minigpt.make_optimizer(model, lr=1e-2)
    ours = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))
    state, before = ours.init(params), params
    for _ in range(3):
        tokens = torch.from_numpy(rng.integers(0, config.vocab, (4, 20)))
        gradient = gradients(torch_minigpt, model, torch_minigpt.standard_step(model, tokens))
        assert optax.tree.norm(gradient) > 0.6, "the clip must act"
        torch_minigpt.update(optimizer, torch_minigpt.standard_step(model, tokens), clip=0.5)
        updates, state = ours.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    for path, seen in jax.tree_util.tree_leaves_with_path(torch_minigpt.as_tree(model)):
        name = jax.tree_util.keystr(path)
        if "['k']['bias']" not in name:  # whose gradient is rounding, which Adam makes large
            wanted, old = (dict_at(tree, path) for tree in (params, before))
            np.testing.assert_allclose(seen, wanted, rtol=0, atol=1e-4, err_msg=name)
            assert np.abs(wanted - old).max() > 0.02, name


def test_committed_arrays_are_what_torch_computes(torch_minigpt):
    golden = Path(__file__).parents[1] / "golden" / "lookahead.npz"
    spec = importlib.util.spec_from_file_location("make_lookahead", golden.with_name("make_lookahead.py"))
    make_lookahead = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_lookahead)
    made, committed = make_lookahead.make(), dict(np.load(golden))
    assert made.keys() == committed.keys()
    for name, array in made.items():
        close(committed[name], array, 1e-6)
