"""MiniGPT and ConfidenceAwareGPT against plain torch, against each other, and as models of the toolkit."""

import dataclasses
import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from models import ConfidenceAwareGPT, ConfidenceConfig, MiniGPT, MiniGPTConfig
from nmjax.interventions.effect import Context, plain_context

START = MiniGPTConfig(vocab=300, embed=64, layers=1, heads=4, max_positions=33, dropout=0.3)
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 16))
TOLD = np.random.default_rng(1).uniform(0, 4, (2, 16, 1)).astype(np.float32)


def aware(config: MiniGPTConfig = START, **more) -> ConfidenceAwareGPT:
    return ConfidenceAwareGPT(ConfidenceConfig(**dataclasses.asdict(config) | more))


def count(module) -> int:
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def leaves(params) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(params).items()}


def close(seen, wanted):
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=1e-5 * max(1.0, np.abs(wanted).max()))


def largest(x):
    """[B, T, ...] -> float64 [T]: the largest absolute value at each position."""
    return np.abs(np.moveaxis(np.asarray(x, np.float64), 1, 0)).reshape(x.shape[1], -1).max(-1)


@functools.partial(jax.jit, static_argnums=0)
def plain_logits(module, params, tokens, rngs):
    hidden = module.apply({"params": params}, tokens, rngs=rngs)
    return module.apply({"params": params}, hidden, method="unembed")


@functools.partial(jax.jit, static_argnums=0)
def told(module, params, tokens, signal, rngs):
    out = module.apply({"params": params}, tokens, confidence_scalars=signal, rngs=rngs)
    return out["logits"], out["confidence_pred"]


# ---- numbers ----


def test_minigpt_equals_torch(minigpt):
    close(plain_logits(minigpt.plain.module, minigpt.plain.params, minigpt.tokens[:, :9], {}), minigpt.plain_logits)


def test_told_equals_torch(minigpt):
    lm, x = minigpt.aware, minigpt.tokens[:, :9]
    logits, confidence = told(lm.module, lm.params, x, minigpt.signal, {})
    close(logits, minigpt.told_logits)
    close(confidence, minigpt.told_confidence)
    logits, confidence = told(lm.module, lm.params, x, minigpt.fed_signal, {})
    close(logits, minigpt.fed_logits)
    close(confidence, minigpt.fed_confidence)
    assert np.abs(minigpt.fed_logits - minigpt.told_logits).max() > 1, "the signal was meant to matter"


def test_a_signal_acts_from_its_own_position_on(minigpt):
    lm, x, signal = minigpt.aware, minigpt.tokens[:, :9], np.array(minigpt.signal)
    signal[:, 5] += 1
    logits, confidence = told(lm.module, lm.params, x, signal, {})
    close(logits[:, :5], minigpt.told_logits[:, :5])
    assert (largest(logits - minigpt.told_logits)[5:] > 1e-3).all()
    assert (largest(confidence - minigpt.told_confidence)[5:] > 1e-3).all()


@functools.partial(jax.jit, static_argnums=(0, 1))
def feedback(config, passes, params, x):
    module = ConfidenceAwareGPT(dataclasses.replace(config, feedback=passes))
    return module.apply({"params": params}, x, plain_context(x), method="feed_back")


def test_parallel_feedback_is_exact_at_first(minigpt):
    """n passes give at positions 0 to n what a loop over prefixes gives."""
    two = feedback(minigpt.aware.config, 2, minigpt.aware.params, minigpt.tokens[:, :9])
    close(two[:, :3], minigpt.fed_signal[:, :3])
    assert (largest(two - minigpt.fed_signal)[3:] > 1e-3).all()


@pytest.mark.slow
def test_feedback_equals_a_loop_over_prefixes(minigpt):
    """Position by position, and by as many passes as tokens."""
    for passes in (None, 8, 9):
        seen = feedback(minigpt.aware.config, passes, minigpt.aware.params, minigpt.tokens[:, :9])
        close(seen, minigpt.fed_signal)


# ---- sizes and the start ----


def test_parameter_counts_of_the_published_run():
    sizes = MiniGPTConfig(vocab=50257, embed=256, layers=6, heads=8, max_positions=128)
    assert count(MiniGPT(sizes)) == 17_637_632
    assert count(aware(dataclasses.replace(sizes, max_positions=129))) == 17_644_289


@pytest.mark.parametrize(("V", "D", "L", "N", "P"), [(50, 12, 1, 3, 7), (9, 8, 3, 1, 20)])
def test_parameter_counts_by_formula(V, D, L, N, P):
    sizes = MiniGPTConfig(vocab=V, embed=D, layers=L, heads=N, max_positions=P)
    assert count(MiniGPT(sizes)) == V * D + P * D + L * (12 * D**2 + 13 * D) + 2 * D
    assert count(aware(sizes)) == count(MiniGPT(sizes)) + 4 * D * L + D + 1


@pytest.fixture(scope="module")
def started():
    """Both models and their parameters for one key; the variant has one position more."""
    variant = aware(dataclasses.replace(START, max_positions=34))
    both = (MiniGPT(START), variant)
    first, second = jax.jit(lambda key: [module.init(key, TOKENS)["params"] for module in both])(jax.random.key(3))
    return both[0], first, variant, second


def test_the_two_models_start_alike(started):
    _, plain, _, variant = started
    plain, variant = leaves(plain), leaves(variant)
    norms = {f"layers_0/{norm}_norm" for norm in ("attn", "mlp")}
    apart = {f"{norm}/{leaf}" for norm in norms for leaf in ("scale", "bias")}
    table = "positions/embedding"
    for name in plain.keys() - apart - {table}:
        np.testing.assert_array_equal(plain[name], variant[name], err_msg=name)
    np.testing.assert_array_equal(plain[table], variant[table][:-1])
    adaptive = {f"{norm}/{leaf}" for norm in norms for leaf in ("kernel", "bias")}
    assert variant.keys() - (plain.keys() - apart) == adaptive | {
        "confidence_predictor/kernel",
        "confidence_predictor/bias",
    }
    for name in adaptive:
        assert not variant[name].any(), name


def test_the_start_is_as_specified(started):
    """Standard deviations within 5 of their standard errors; uniform numbers fill their interval and don't leave it."""
    variant = leaves(started[3])
    bounds = {"confidence_predictor/kernel": 1 / math.sqrt(64)}
    for name, leaf in variant.items():
        if name.endswith(("q/kernel", "k/kernel", "v/kernel")):
            bounds[name] = math.sqrt(6 / (4 * 64))
        elif name.endswith(("o/kernel", "up/kernel", "down/kernel", "embedding")):
            assert abs(leaf.mean()) < 5 * 0.02 / math.sqrt(leaf.size), name
            assert leaf.std() == pytest.approx(0.02, rel=5 / math.sqrt(2 * leaf.size)), name
            assert np.abs(leaf).max() > 0.055, name  # not cut off
        elif name.endswith("bias") and "predictor" not in name:
            assert not leaf.any(), name
    assert len(bounds) == 4
    for name, bound in bounds.items():
        assert 0.9 * bound < np.abs(variant[name]).max() <= bound, name
        assert variant[name].std() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(variant[name].size)), name
    assert (variant["final_norm/scale"] == 1).all() and variant["confidence_predictor/bias"] == 2.0
    assert aware(confidence_init_bias=None).config.initial_confidence == pytest.approx(math.log(300))


def test_at_the_start_it_is_minigpt_in_bits_whatever_it_is_told(started):
    plain, plain_params, variant, params = started
    wanted = np.asarray(plain_logits(plain, plain_params, TOKENS, {}))
    logits, confidence = told(variant, params, TOKENS, np.zeros_like(TOLD), {})
    np.testing.assert_array_equal(logits, wanted)
    assert np.abs(confidence - 2).max() < 3 and np.std(confidence) > 0.01
    np.testing.assert_array_equal(told(variant, params, TOKENS, TOLD, {})[0], wanted)
    learnt = flax.traverse_util.path_aware_map(
        lambda path, leaf: leaf + 0.1 if path[-2:] == ("attn_norm", "kernel") else leaf, params
    )
    np.testing.assert_array_equal(told(variant, learnt, TOKENS, np.zeros_like(TOLD), {})[0], wanted)
    assert np.abs(told(variant, learnt, TOKENS, TOLD, {})[0] - wanted).max() > 1e-2


def test_dropout_acts_where_a_key_is_given_and_alike_in_both_models(started):
    plain, plain_params, variant, params = started
    quiet = plain_logits(plain, plain_params, TOKENS, {})  # equal to the variant's in bits, see above
    keys = [jax.random.key(k, impl="rbg") for k in (0, 1)]  # compiles faster
    a, b = (plain_logits(plain, plain_params, TOKENS, {"dropout": key}) for key in keys)
    assert np.abs(a - quiet).max() > 0.1 and np.abs(a - b).max() > 0.1
    seen, _ = told(variant, params, TOKENS, np.zeros_like(TOLD), {"dropout": keys[0]})
    np.testing.assert_array_equal(seen, a)


# ---- as models of the toolkit ----

PROMPTS = [[3, 10, 1, 18], [20, 28], [9, 9, 25]]
PACKS = [None, nmjax.scale_qk(4.0), nmjax.steer(np.linspace(-1, 1, 12), 3.0, layers=[0])]
ROWS = [(prompt, pack) for prompt in PROMPTS for pack in PACKS]


@pytest.fixture(scope="module", params=[pytest.param("plain", marks=pytest.mark.slow), "aware"])
def written(request, minigpt):
    """Five tokens behind every prompt under every pack, and logits of one padded batch: what was written (9 rows of 7
    to 9 tokens), the golden rows, these with another token at 5, and the first of them under PACKS[1]."""
    lm = getattr(minigpt, request.param)
    prompts, packs = map(list, zip(*ROWS, strict=True))
    out = nmjax.generate(lm, prompts, packs=packs, max_new_tokens=5)
    golden = minigpt.tokens[:, :9]
    changed = np.where(np.arange(9) == 5, (golden + 1) % 29, golden)
    whole = [prompt + new for prompt, new in zip(prompts, out.tokens, strict=True)]
    others = [*golden.tolist(), *changed.tolist(), golden[0].tolist()]
    result = nmjax.forward(lm, whole + others, packs=packs + [None] * 6 + PACKS[1:2])
    return request.param, lm, out, np.asarray(result.logits)


def test_forward_equals_torch(written, minigpt):
    name, _, _, logits = written
    close(logits[9:12], minigpt.plain_logits if name == "plain" else minigpt.fed_logits)


def test_nothing_sees_what_comes_later(written):
    """Neither through attention nor through the predictions that are fed back."""
    _, _, _, logits = written
    moved = largest(logits[12:15] - logits[9:12])
    assert (moved[:5] < 1e-5).all() and (moved[5:] > 1e-3).all()


def test_cached_equals_uncached(written):
    """Rows of different lengths, padded on the left, each under its own intervention, and these move the output."""
    _, _, out, logits = written
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    for i, (seen, tokens) in enumerate(zip(out.logprobs, out.tokens, strict=True)):
        assert len(tokens) == 5
        close(seen, logprobs[i, np.arange(-6, -1), tokens])
    first = np.array([x[0] for x in out.logprobs]).reshape(len(PROMPTS), len(PACKS))
    assert (np.abs(first[:, 1:] - first[:, :1]) > 1e-3).all()


def test_neighbours_and_dose_zero_change_no_bit(written):
    """The first row at dose 0, the others in opposite order."""
    _, lm, out, _ = written
    prompts, packs = map(list, zip(*(ROWS[:1] + ROWS[:0:-1]), strict=True))
    packs[0] = PACKS[1].at(0)
    turned = nmjax.generate(lm, prompts, packs=packs, max_new_tokens=5)
    np.testing.assert_array_equal(turned.logprobs[0], out.logprobs[0])
    assert turned.tokens == out.tokens[:1] + out.tokens[:0:-1] != out.tokens
    for seen, wanted in zip(turned.logprobs, out.logprobs[:1] + out.logprobs[:0:-1], strict=True):
        close(seen, wanted)


@pytest.mark.slow
def test_scores_equal_torch(written, minigpt):
    """Whole prompts for MiniGPT; for ConfidenceAwareGPT behind a shared prefix, whose last prediction is fed on."""
    name, lm, _, logits = written
    row, packs = minigpt.tokens[0].tolist(), PACKS[:2]
    prefix = None if name == "plain" else nmjax.share_prefix(lm, [row[:4]], packs)
    scores = nmjax.score(lm, [row[:6]] * 2, [row[6:8], [4, 9], [27]], packs, prefix=prefix)
    golden = minigpt.plain_logits if name == "plain" else minigpt.fed_logits
    for i, whole in enumerate((golden[0], logits[15])):
        logprobs = np.asarray(jax.nn.log_softmax(whole))
        close(scores[i, 0], logprobs[5, row[6]] + logprobs[6, row[7]])
        close(scores[i, 2], logprobs[5, 27])
    assert np.abs(scores[0] - scores[1]).max() > 1e-2


def test_no_feedback_is_told_nothing_behind_a_cache_either(minigpt):
    """One token at position 3, where 5.0 was predicted at position 2."""
    cache = minigpt.aware.module.init_cache(1, 6, jnp.float32)
    cache[-1]["confidence"] = cache[-1]["confidence"].at[0, 0, 3].set(5.0)
    token, k_pos = jnp.zeros((1, 1), jnp.int32), jnp.array([[-1, 0, 1, 2, 3, -1]])
    ctx = Context(q_pos=k_pos[:, 4:5], k_pos=k_pos, tokens=token, prompt_len=jnp.array([4]), slot=4)
    for feedback, wanted in [(None, 5.0), (3, 5.0), (0, 0.0)]:
        module = ConfidenceAwareGPT(dataclasses.replace(minigpt.aware.config, feedback=feedback))
        assert module.apply({"params": minigpt.aware.params}, token, ctx, (), cache, method="feed_back") == wanted


# ---- errors ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 0}, "layers must be 1 or more, got 0"),
        ({"feedback": -1}, "feedback must be None or 0 or more passes, got -1"),
    ],
)
def test_bad_sizes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        aware(**fields)


@pytest.mark.parametrize(
    ("width", "more", "message"),
    [
        (4, {"confidence_scalars": np.zeros((1, 4, 1)), "cache": []}, "cache: with confidence_scalars wanted None"),
        (4, {"confidence_scalars": np.zeros((1, 4))}, r"confidence_scalars has shape \(1, 4\), wanted \(1, 4, 1\)"),
        (11, {}, "tokens: 11 of a row exceed max_positions=10"),
    ],
)
def test_bad_calls_are_named(minigpt, width, more, message):
    lm, tokens = minigpt.aware, np.zeros((1, width), np.int32)
    with pytest.raises(ValueError, match=message):
        lm.module.apply({"params": lm.params}, tokens, **more)
    if not more:
        with pytest.raises(ValueError, match=message):
            minigpt.plain.module.apply({"params": minigpt.plain.params}, tokens)
