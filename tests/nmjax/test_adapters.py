"""A model under low-rank adapters, in one row or all: against merged weights, in every function, with every feature."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import models
import nmjax
from models.llama import Projection
from nmjax import adapter_stack
from nmjax.adapters import LORA, SETTINGS, at_sites, leaves_of, stack_layers, unstack_layers
from nmjax.steering import store, vectors
from nmjax.training import lora
from nmjax.training.lora import LoraConfig

PROMPTS = [[5, 9, 30, 24, 8, 17], [12, 3], [6, 16, 26, 7, 17, 27, 8, 18, 28], [20, 21, 22, 23]]
CONFIG = models.LlamaConfig.from_hf(
    {"architectures": ["Qwen2ForCausalLM"], "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2,
     "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 64,
     "tie_word_embeddings": True}
)  # fmt: skip


def noise(tree, seed, size):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * size, jnp.float32), tree)


def loud(module, seed, **fields):
    """A random adapter that changes a model about as much as a new layer would."""
    adapter = lora.init(module, LoraConfig(**fields), jax.random.key(seed))
    return adapter.replace(weights=noise(adapter.weights, seed, 0.3))


@pytest.fixture(scope="module")
def tiny_lm():
    """A random Qwen2: L 2, N 2, K 1, D 16, V 31, context 64."""
    module = models.Llama(CONFIG)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return nmjax.LanguageModel(module, noise(shapes, 0, 0.4))


@pytest.fixture(scope="module")
def one(tiny_lm):
    return loud(tiny_lm.module, 1, r=3, alpha=5)


@pytest.fixture(scope="module")
def two(tiny_lm):
    return loud(tiny_lm.module, 2, r=2, targets=("q", "v", "down"), layers=[1])


@pytest.fixture(scope="module")
def both(tiny_lm, one, two):
    return tiny_lm.with_adapters({"one": one, "two": two})


@pytest.fixture(scope="module")
def merged(tiny_lm, one, two):
    """The models that rows under adapters must equal."""

    def with_weights(*parts):
        params = tiny_lm.params
        for adapter, dose in parts:
            settings = jax.tree.map(lambda leaf, dose=dose: dose * leaf, adapter.settings)
            params = lora.merge(params, adapter.replace(settings=settings))
        return dataclasses.replace(tiny_lm, params=params)

    return {
        "none": tiny_lm,
        "one": with_weights((one, 1)),
        "two": with_weights((two, 1)),
        "half of one": with_weights((one, 0.5)),
        "one and two": with_weights((one, 1), (two, 1)),
    }


PACKS = {
    "none": None,
    "one": nmjax.use_adapter("one"),
    "two": nmjax.use_adapter("two"),
    "half of one": nmjax.use_adapter("one").at(0.5),
    "one and two": nmjax.compose(nmjax.use_adapter("two"), nmjax.use_adapter("one")),
}


NAMES = ["none", "one", "two", "one and two"]


def seen(lm, packs=None, prompts=PROMPTS):
    result = nmjax.forward(lm, prompts, packs)
    return np.asarray(result.logits), np.asarray(result.mask)


@pytest.fixture(scope="module")
def base_logits(tiny_lm):
    return seen(tiny_lm)[0]


def test_a_new_adapter_is_the_base_in_bits(tiny_lm, base_logits):
    new = lora.init(tiny_lm.module, LoraConfig(r=3), jax.random.key(0))
    np.testing.assert_array_equal(seen(tiny_lm.with_adapter(new))[0], base_logits)


def test_an_adapter_is_its_merged_weights(tiny_lm, one, merged, base_logits, assert_close):
    logits, mask = seen(tiny_lm.with_adapter(one))
    assert_close(logits[mask], seen(merged["one"])[0][mask])
    assert np.abs(logits - base_logits)[mask].max() > 1


def test_every_row_has_its_own(both, merged, base_logits, assert_close):
    for names in (["none", "one", "two", "half of one"], ["one and two", "none", "one", "none"]):
        logits, mask = seen(both, [PACKS[name] for name in names])
        for i, name in enumerate(names):
            assert_close(logits[i][mask[i]], seen(merged[name])[0][i][mask[i]])
            if name == "none":
                np.testing.assert_array_equal(logits[i], base_logits[i])


def test_rows_do_not_see_their_neighbours(both):
    mine = PACKS["one"]
    alone, _ = seen(both, [mine, None, None, None])
    in_company, _ = seen(both, [mine, PACKS["two"], PACKS["one and two"], PACKS["half of one"]])
    np.testing.assert_array_equal(alone[0], in_company[0])
    assert np.abs(alone[1:] - in_company[1:]).max() > 0.1


def test_generation_with_cache_padding_and_effects(both, merged, assert_close):
    """Against one pass over prompt and continuation, with merged weights."""
    steer, new = nmjax.steer(np.linspace(-1, 1, 16), 2.0, layers=[1]), 7
    packs = [nmjax.compose(PACKS[name], steer) for name in NAMES]
    out = nmjax.generate(both, PROMPTS, packs, max_new_tokens=new, eos_token_id=[])
    whole = [prompt + tokens for prompt, tokens in zip(PROMPTS, out.tokens, strict=True)]
    base = seen(merged["none"], steer, whole)[0]
    for i, name in enumerate(NAMES):
        logits = seen(merged[name], steer, whole)[0][i, -new - 1 : -1]
        np.testing.assert_array_equal(out.tokens[i], logits.argmax(-1))
        assert_close(out.logprobs[i], log_softmax(logits, -1).max(-1), scale=np.abs(logits).max())
        assert (name == "none") == np.allclose(logits, base[i, -new - 1 : -1])


def test_scores_behind_a_shared_prefix(both, merged, assert_close):
    prefix = [5, 9, 30, 24]
    prompts = [[*prefix, *row] for row in ([8, 17], [12], [6, 16, 26], [20])]
    packs, choices = [PACKS[name] for name in NAMES], [[7], [8], [9]]
    shared = nmjax.share_prefix(both, [prefix], packs)
    found = nmjax.score(both, prompts, choices, packs, prefix=shared)
    for i, name in enumerate(NAMES):
        logits = seen(merged[name], prompts=prompts)[0][i, -1]
        assert_close(found[i], log_softmax(logits)[[7, 8, 9]], scale=np.abs(logits).max())


def test_contrast_against_an_adapter(both, merged, assert_close):
    """Expert and amateur are rows of one batch under different weights."""
    packs = [nmjax.compose(PACKS["one"], nmjax.contrast(nmjax.use_adapter("two"), 0.5)), None, None, None]
    last = nmjax.forward(both, PROMPTS, packs).next_logits[0]
    expert, amateur = (seen(merged[name])[0][0, -1] for name in ("one", "two"))
    assert_close(last, expert - 0.5 * log_softmax(amateur))


@pytest.mark.slow
def test_the_dose_has_a_derivative_at_zero(both, merged):
    def last(dose):
        return nmjax.forward(both, PROMPTS[:1], nmjax.use_adapter("one").at(dose)).next_logits[0]

    _, slope = jax.jvp(last, (0.0,), (1.0,))
    step = 1e-2
    wanted = (last(step) - last(0.0)) / step
    assert np.abs(slope).max() > 0.1
    np.testing.assert_allclose(slope, wanted, atol=0.1 * np.abs(slope).max())


@pytest.mark.parametrize("stacked", [False, True])
def test_what_a_row_picks(one, two, stacked):
    """With a and b side by side, a row's scale leaves of their product the adapter that it picked."""
    parts = [stack_layers(adapter, 2) if stacked else adapter for adapter in (one, two)]
    several = adapter_stack.stack(dict(zip("ab", parts, strict=True)))
    picked = adapter_stack.pick(several, np.asarray([1, -1, 0], np.int32))
    weights, settings = at_sites(picked[LORA]), at_sites(picked[SETTINGS])
    apart = [leaves_of(adapter) for adapter in parts]
    assert weights.keys() == apart[0].keys() | apart[1].keys()
    spec = "lir,lr,lro->lio" if stacked else "ir,r,ro->io"

    def product(a, scale, b):
        layers = a.shape[:1] if stacked else ()
        return np.einsum(spec, a.reshape(*layers, -1, a.shape[-1]), scale, b.reshape(*layers, a.shape[-1], -1))

    for path, here in weights.items():
        for row, number in enumerate([1, None, 0]):
            change = product(here["a"], settings[path]["scale"][..., row, :], here["b"])
            own = None if number is None else apart[number].get(path)
            wanted = 0 if own is None else product(own["a"], own["scale"], own["b"])
            np.testing.assert_allclose(change, np.broadcast_to(wanted, change.shape), atol=1e-6)


def test_dropout_of_the_branch_and_of_nothing_else():
    """With a and b the identity the branch is what is left of its input: 0 or x / (1 - p)."""
    module = Projection("btd,df->btf", (64, 64))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 64)), jnp.float32)
    variables = {
        "params": {"kernel": jnp.zeros((64, 64))},
        LORA: {"a": jnp.eye(64), "b": jnp.eye(64)},
        SETTINGS: {"scale": jnp.full(64, 2.0), "dropout": jnp.float32(0.25)},
    }
    np.testing.assert_array_equal(module.apply(variables, x), 2 * x)
    y = np.asarray(module.apply(variables, x, rngs={"dropout": jax.random.key(0)}))
    kept = y != 0
    np.testing.assert_allclose(y[kept], (2 * np.asarray(x) / 0.75)[kept], rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / kept.size)


def test_minigpt_and_its_scan_over_positions(golden_gpt):
    """ConfidenceAwareGPT reads its own predictions one position at a time, in a scan that must hand adapters on."""
    module, params, tokens = golden_gpt
    adapter = loud(module, 3, r=2, targets=("q", "v", "up"))
    run = jax.jit(module.apply)
    base = run({"params": params}, tokens)
    here = run({"params": params} | adapter.variables, tokens)
    wanted = run({"params": lora.merge(params, adapter)}, tokens)
    np.testing.assert_allclose(here, wanted, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(here - base).max() > 0.05


@pytest.fixture(scope="module")
def golden_gpt():
    config = models.ConfidenceConfig(vocab=19, embed=8, layers=1, heads=2, max_positions=16)
    module = models.ConfidenceAwareGPT(config)
    tokens = np.asarray([[3, 4, 5, 6, 7]], np.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    return module, noise(params, 0, 0.3), tokens


def test_padding_layers_comes_off_in_bits(tiny_lm, two):
    back = unstack_layers(stack_layers(two, 2))
    assert jax.tree.structure(back) == jax.tree.structure(two)
    for found, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_fingerprints(tiny_lm, one, both):
    adapted = tiny_lm.with_adapter(one)
    louder = one.replace(weights=jax.tree.map(lambda leaf: 2 * leaf, one.weights))
    prints = [lm.fingerprint for lm in (tiny_lm, adapted, tiny_lm.with_adapter(louder), both)]
    assert len(set(prints)) == 4
    assert {lm.base.fingerprint for lm in (tiny_lm, adapted, both)} == {tiny_lm.fingerprint}
    assert adapted.with_adapter(None).fingerprint == tiny_lm.fingerprint
    stacked = nmjax.LanguageModel(models.ScannedLlama(tiny_lm.config), models.stack_layers(tiny_lm.params))
    assert stacked.fingerprint == tiny_lm.fingerprint


def test_vectors_of_the_base_serve_under_an_adapter(tiny_lm, one, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lm = dataclasses.replace(tiny_lm, folder=None)
    adapted = lm.with_adapter(one)
    rows = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    store.save_named(lm, "warm", rows)
    np.testing.assert_array_equal(store.named_vector(adapted, "warm"), rows)
    store.save_named(adapted, "warm", -rows)
    np.testing.assert_array_equal(store.named_vector(adapted, "warm"), -rows)
    np.testing.assert_array_equal(store.named_vector(lm, "warm"), rows)


def test_errors_before_any_compute(tiny_lm, one, both):
    def refused(match, call, *arguments, **options):
        with pytest.raises(ValueError, match=match):
            call(*arguments, **options)

    use = nmjax.use_adapter
    refused(r"use_adapter: name='r16', but the model's adapters are \['one', 'two'\]", seen, both, use("r16"))
    refused("the model's adapters are none by name; give it some with lm.with_adapters", seen, tiny_lm, use("one"))
    refused("use_adapter: it has no selection of tokens", seen, both, use("one").on(prompt="all"))
    refused("use_adapter: name='', wanted the name of an adapter", use, "")
    refused("wanted at least one, and all with their layers stacked or all unrolled", tiny_lm.with_adapters, {})
    refused("wanted an Adapter, or with_adapters for several", tiny_lm.with_adapter, {"one": one})
    refused("carries several adapters, of which this function can't choose", vectors.activations, both, PROMPTS)
    other = models.Llama(dataclasses.replace(tiny_lm.config, heads=1, layers=1))
    refused(
        r"another model: .*layers_0/attn/q/b has shape \(3, 2, 8\), wanted \(3, 1, 8\).*layers_1/attn/k is no proj",
        nmjax.LanguageModel(other, tiny_lm.params).with_adapter, one,
    )  # fmt: skip
    refused("layers/attn/q is no projection of this model", tiny_lm.with_adapter, stack_layers(one, 2))
