"""The two lookahead steps against plain torch, which appends a token and runs the row again."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from nmjax.training.lookahead import Lookahead, feedback_signal, lookahead_loss, two_pass_training_step

KEY = jax.random.key(0)
LAST = np.tile(np.arange(9) == 8, (3, 1)).astype(np.float32)  # weights of the last positions


def close(seen, wanted, tolerance=1e-4):
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=tolerance * max(1.0, np.abs(wanted).max()))


def vector(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def steps(minigpt):
    """Both steps under the golden signal and draws: (params, alpha, ...) -> (results, gradient of total_loss)."""
    module, tokens, signal = minigpt.aware.module, minigpt.tokens, minigpt.signal
    last_draw, draw = minigpt.draw[:, -1, 0], minigpt.draw[..., 0]

    def total(step):
        def loss(params, *args):
            out = step(params, *args)
            return out["total_loss"], out

        def run(*args):
            (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(*args)
            return out, gradient

        return jax.jit(run)

    @total
    def last(params, alpha):
        targets = tokens[:, 9], tokens[:, 10]
        return two_pass_training_step(module, params, signal, tokens[:, :9], *targets, alpha, KEY, last_draw)

    @total
    def everywhere(params, alpha, weights=None):
        return lookahead_loss(module, params, signal, tokens, alpha, KEY, draw=draw, weights=weights)

    return SimpleNamespace(last=last, everywhere=everywhere)


@pytest.fixture(scope="module")
def at_all(minigpt, steps):
    return steps.everywhere(minigpt.aware.params, minigpt.alpha, np.ones_like(LAST))


def test_the_published_step_equals_torch(minigpt, steps):
    out, gradient = steps.last(minigpt.aware.params, minigpt.alpha)
    for name in ("pred_conf_t", "loss_lm", "loss_confidence", "total_loss", "future_loss"):
        close(out[name], getattr(minigpt, f"last_{name}"), 1e-5)
    close(vector(gradient), minigpt.last_gradient)


def test_every_position_equals_append_and_rerun(minigpt, at_all):
    out, gradient = at_all
    for name in ("pred_conf", "loss_lm", "loss_confidence", "total_loss", "future_loss"):
        close(out[name], getattr(minigpt, f"all_{name}"), 1e-5)
    logprobs = jax.nn.log_softmax(minigpt.told_logits)
    close(out["token_loss"], -np.take_along_axis(logprobs, minigpt.tokens[:, 1:10, None], -1)[..., 0], 1e-5)
    close(vector(gradient), minigpt.all_gradient)


def test_the_last_position_is_the_published_step(minigpt, steps):
    published, its_gradient = steps.last(minigpt.aware.params, minigpt.alpha)
    out, gradient = steps.everywhere(minigpt.aware.params, minigpt.alpha, LAST)
    for name in ("loss_lm", "loss_confidence", "total_loss"):
        close(out[name], published[name], 1e-5)
    close(out["future_loss"][:, -1], published["future_loss"], 1e-5)
    close(out["pred_conf"][:, -1:], published["pred_conf_t"], 1e-5)
    close(vector(gradient), vector(its_gradient))


def test_no_gradient_flows_through_what_is_predicted(minigpt, steps, at_all):
    """The gradient of loss_confidence is that of mean (c - f)^2 at a fixed f, found by differences along a direction;
    with f let go along it is another number. It reaches every parameter but the biases of the keys, which do nothing.
    """
    params, ones = minigpt.aware.params, np.ones_like(LAST)
    (out, with_it), (_, without) = at_all, steps.everywhere(params, np.float32(0), ones)
    gradient = jax.tree.map(lambda a, b: (np.asarray(a) - np.asarray(b)) / minigpt.alpha, with_it, without)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        inert = "['k']['bias']" in jax.tree_util.keystr(path)
        assert (np.abs(leaf).max() < 1e-4) == inert, path

    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)

    def beside(eps):
        moved = jax.tree.map(lambda leaf, d: leaf + np.float32(eps) * d, params, direction)
        there, _ = steps.everywhere(moved, minigpt.alpha, ones)
        c, f = (np.asarray(x, np.float64) for x in (there["pred_conf"], there["future_loss"]))
        return np.array([np.mean((c - out["future_loss"]) ** 2), np.mean((c - f) ** 2)])

    fixed, free = (beside(1e-3) - beside(-1e-3)) / 2e-3
    along = vector(gradient) @ vector(direction)
    assert along == pytest.approx(fixed, rel=1e-2)
    assert abs(free - fixed) > 0.1 * abs(fixed)


def test_a_detached_head_learns_alone(minigpt):
    def loss(params):
        out = lookahead_loss(
            minigpt.aware.module, params, minigpt.signal, minigpt.tokens, 1.0, jax.random.key(0),
            draw=minigpt.draw, detach=True,
        )  # fmt: skip
        return out["loss_confidence"]

    gradient = jax.jit(jax.grad(loss))(minigpt.aware.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert (np.abs(leaf).max() > 0) == ("confidence_predictor" in jax.tree_util.keystr(path)), path


def test_the_signal_is_an_input_without_gradient(minigpt):
    """`feedback_signal` is what torch finds by a loop, and training on it doesn't reach back into the parameters."""
    module, x = minigpt.aware.module, minigpt.tokens[:, :9]

    @jax.jit
    def run(params):
        return jax.value_and_grad(lambda params: jnp.sum(feedback_signal(module, params, x) ** 2))(params)

    total, gradient = run(minigpt.aware.params)
    close(total, (minigpt.fed_signal**2).sum(), 1e-5)
    assert not vector(gradient).any()


# ---- what is looked behind ----


@pytest.fixture(scope="module")
def choices(minigpt):
    """At all positions: future losses under 2000 keys [K, B, L], and behind the three likeliest [B, L]; and all results
    for the golden draws."""
    module, params, tokens, signal = minigpt.aware.module, minigpt.aware.params, minigpt.tokens, minigpt.signal

    def everywhere(key, **more):
        return lookahead_loss(module, params, signal, tokens, minigpt.alpha, key, **more)

    @jax.jit
    def run(keys):
        return {
            "sampled": jax.vmap(everywhere)(keys)["future_loss"],
            "top": everywhere(KEY, lookahead=Lookahead(top=3))["future_loss"],
            "given": everywhere(KEY, draw=minigpt.draw),
        }

    return SimpleNamespace(**jax.tree.map(np.asarray, run(jax.random.split(KEY, 2000))))


def assert_drawn(words, logits):
    """Chi-square tests of words [K, P], drawn at P places from logits [P, V] each, and of their independence."""
    (K, P), V = words.shape, logits.shape[-1]
    probs = scipy.special.softmax(logits.astype(np.float64), axis=-1)
    p_values = []
    for place, p in enumerate(probs):
        counts = np.bincount(words[:, place], minlength=V)
        rare = K * p < 5
        observed = np.append(counts[~rare], counts[rare].sum())
        p_values.append(scipy.stats.chisquare(observed, K * np.append(p[~rare], p[rare].sum())).pvalue)
    assert min(p_values) > 0.001 / P
    ranks = np.take_along_axis(np.cumsum(probs, axis=1), words.T, axis=1)
    assert np.abs(np.corrcoef(ranks) - np.eye(P)).max() < 5 / np.sqrt(K)


def assert_choices_drawn(seen, logits, of_word):
    """`assert_drawn` of the words behind future losses [K, P], when those behind every word are [P, V]."""
    assert np.diff(np.sort(of_word)).min() > 2e-4
    words = np.abs(seen[..., None] - of_word).argmin(-1)
    np.testing.assert_allclose(seen, np.take_along_axis(of_word, words.T, 1).T, rtol=0, atol=5e-5)
    assert_drawn(words, logits)


def test_choices_are_drawn_from_what_the_model_predicts(minigpt, choices):
    flat = (x.reshape(27, 29) for x in (minigpt.told_logits, minigpt.future_of_word))
    assert_choices_drawn(choices.sampled.reshape(2000, 27), *flat)


@pytest.mark.slow
def test_the_published_step_draws_its_choice_from_what_the_model_predicts(minigpt):
    module, params, tokens, signal = minigpt.aware.module, minigpt.aware.params, minigpt.tokens, minigpt.signal

    @jax.jit
    @jax.vmap
    def sampled(key):
        targets = tokens[:, 9], tokens[:, 10]
        return two_pass_training_step(module, params, signal, tokens[:, :9], *targets, 1.0, key)["future_loss"]

    seen = np.asarray(sampled(jax.random.split(KEY, 2000)))
    assert_choices_drawn(seen, minigpt.told_logits[:, -1], minigpt.future_of_word[:, -1])


def test_several_draws(minigpt, choices):
    """Drawn independently, and averaged."""
    words, shares = jax.jit(Lookahead(draws=2000).choose)(minigpt.told_logits, KEY)
    assert words.shape == shares.shape == (3, 9, 2000)
    np.testing.assert_allclose(shares, 1 / 2000, rtol=1e-6)
    assert_drawn(np.moveaxis(np.asarray(words), -1, 0).reshape(2000, -1), minigpt.told_logits.reshape(-1, 29))

    target = np.take_along_axis(minigpt.future_of_word, minigpt.draw, -1).mean(-1)
    close(choices.given["future_loss"], target, 1e-5)
    loss_confidence = np.mean((minigpt.all_pred_conf - target) ** 2)
    close(choices.given["total_loss"], minigpt.all_loss_lm + minigpt.alpha * loss_confidence, 1e-5)


def test_the_likeliest_are_weighted_by_their_probabilities(minigpt, choices):
    likeliest = np.argsort(-minigpt.told_logits)[..., :3]
    weights = np.take_along_axis(np.exp(minigpt.told_logits), likeliest, -1)
    target = (weights * np.take_along_axis(minigpt.future_of_word, likeliest, -1)).sum(-1) / weights.sum(-1)
    close(choices.top, target, 1e-5)


# ---- errors ----


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match="draws=0, top=0"):
        Lookahead(draws=0)
    with pytest.raises(ValueError, match="draws=1, top=-1"):
        Lookahead(top=-1)
    with pytest.raises(ValueError, match="top=6, wanted at most the vocabulary's 5"):
        Lookahead(top=6).choose(jnp.zeros((1, 1, 5)), KEY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signal": (3, 9)}, r"signal has shape \(3, 9\), wanted \(3, 9, 1\)"),
        ({"tokens": (3, 2)}, r"tokens has shape \(3, 2\), wanted \[B, L \+ 2\]"),
        ({"tokens": (3, 12), "signal": (3, 10, 1)}, "a context of 10 tokens and a choice.*max_positions=10"),
        ({"draw": (3, 8)}, r"draw has shape \(3, 8\), wanted \(3, 9\)"),
        ({"weights": (3, 10)}, r"weights has shape \(3, 10\), wanted \(3, 9\)"),
    ],
)
def test_bad_rows_are_named(minigpt, change, message):
    shapes = {"signal": (3, 9, 1), "tokens": (3, 11)} | change
    arrays = {name: np.zeros(shape, np.float32 if name in ("signal", "weights") else np.int32)
              for name, shape in shapes.items()}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        lookahead_loss(minigpt.aware.module, minigpt.aware.params, alpha=1.0, key=KEY, **arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prev_conf": (3, 9)}, r"prev_conf has shape \(3, 9\), wanted \(3, 9, 1\)"),
        ({"tokens_t_plus_1": (3, 1)}, r"tokens_t_plus_1 has shape \(3, 1\), wanted \(3,\)"),
        ({"tokens_t_plus_2": (2,)}, r"tokens_t_plus_2 has shape \(2,\), wanted \(3,\)"),
        ({"draw": (3, 1)}, r"draw has shape \(3, 1\), wanted \(3,\)"),
        ({"tokens_t": (3, 10), "prev_conf": (3, 10, 1)}, "a context of 10 tokens and a choice.*max_positions=10"),
    ],
)
def test_bad_rows_of_the_published_step_are_named(minigpt, change, message):
    shapes = {"prev_conf": (3, 9, 1), "tokens_t": (3, 9), "tokens_t_plus_1": (3,), "tokens_t_plus_2": (3,)} | change
    arrays = {name: np.zeros(shape, np.float32 if name == "prev_conf" else np.int32) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        two_pass_training_step(minigpt.aware.module, minigpt.aware.params, alpha=1.0, key=KEY, **arrays)
