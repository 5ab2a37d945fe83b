"""The monitor's signals against their definitions in float64: identities, stored trajectories, models while they write.

How `generate` acts on the signals is in `test_monitor.py`.
"""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

import models
import nmjax
from nmjax import generation
from nmjax.monitor import NEVER, monitor
from nmjax.signals import SIGNALS, STRATA, make_monitor

ROOT = Path(__file__).parents[2]
T, V, D = 24, 50, 16


def trajectory(L, seed=0):
    """Predictions from flat to one-hot, layers of all sizes, and tokens both likely and not."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((T, V)) * np.geomspace(0.01, 300, T)[rng.permutation(T), None]
    logits[3] = 0  # nothing but ties
    states = rng.standard_normal((T, 1, D)) + rng.standard_normal((T, L, D)) * rng.uniform(0.1, 2, (T, 1, 1))
    states *= 10 ** rng.uniform(-3, 4, (T, L, 1))
    tokens = np.where(rng.random(T) < 0.5, logits.argmax(1), rng.integers(0, V, T))
    return logits.astype(np.float32), states.astype(np.float32), tokens


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# --- Definitions and identities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("L", [1, 2, 3, 5, 8, 12])
def test_a_stored_trajectory(L, signals_by_definition, assert_signals):
    logits, states, tokens = trajectory(L)
    seen, wanted = monitor(logits, states, tokens), signals_by_definition(logits, states, tokens)
    assert_signals(seen, wanted)
    assert list(seen) == list(SIGNALS)
    assert all(values.shape == (T,) and values.dtype == np.float32 for values in seen.values())
    spread = {name for name in STRATA if seen[f"delta_sigma_{name}"].any()}
    assert spread == {name for name, layers in zip(STRATA, strata(L), strict=True) if len(layers) > 1}
    assert {name for name in STRATA if seen[f"hbar_s_{name}"].any()} == spread


def strata(L):
    return range(L // 4), range(L // 4, 3 * L // 4), range(3 * L // 4, L)


@pytest.mark.parametrize(
    "options",
    [
        dict(tau=0.5, lambda_=1.0),
        dict(tau=2.69, lambda_=20.0, alpha=0.2),
        dict(tau=-1, lambda_=0, alpha=0),
        dict(every=2),
        dict(every=7, alpha=3.0),
        dict(every=T),
        dict(every=T + 1),
    ],
    ids=str,
)
def test_options_of_a_stored_trajectory(options, signals_by_definition, assert_signals):
    logits, states, tokens = trajectory(5)
    seen = monitor(logits, states, tokens, **options)
    assert_signals(seen, signals_by_definition(logits, states, tokens, **options))
    checked = np.flatnonzero(~np.isnan(seen["pri"]))
    assert checked.tolist() == [t for t in range(T) if (t + 1) % options.get("every", 1) == 0]


def test_the_spread_of_layers():
    """Identical ones, orthonormal ones, and for any the mean of unit vectors or their cosines."""
    logits, states, tokens = trajectory(5)
    states = unit(states) * 10  # so large that the epsilon in the root is nothing
    same = np.broadcast_to(states[:, :1], states.shape)
    np.testing.assert_allclose(monitor(logits, same, tokens)["delta_sigma"], 0, atol=1e-6)
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((T, D, D)))[0][:, :5]
    np.testing.assert_allclose(monitor(logits, 100 * basis, tokens)["delta_sigma"], math.sqrt(1 - 1 / 5), atol=1e-6)
    seen = monitor(logits, states, tokens)["delta_sigma"].astype(np.float64)
    u = unit(states.astype(np.float64))
    np.testing.assert_allclose(seen**2, 1 - (u.mean(1) ** 2).sum(-1), atol=1e-5)
    np.testing.assert_allclose(seen**2, 1 - np.einsum("tld,tkd->t", u, u) / 25, atol=1e-5)
    assert (seen < 1).all() and np.ptp(seen) > 0.1


def test_the_size_of_a_layer_does_not_matter():
    logits, states, tokens = trajectory(5)
    states = unit(states) * 10
    factor = np.random.default_rng(2).uniform(0.1, 1000, (T, 5, 1))
    a, b = monitor(logits, states, tokens), monitor(logits, states * factor, tokens)
    for name in SIGNALS:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-5)


def test_ranges():
    """Also where the prediction is one token and the layers point everywhere, which is where hbar_s is largest."""
    logits, states, tokens = trajectory(12)
    logits[0, 7] = 1e4
    states[0] = np.eye(12, D)
    seen = monitor(logits, states, tokens)
    assert (seen["I_cat"] >= 0).all() and (seen["I_cat"] <= 1 - 1 / V + 1e-6).all()
    np.testing.assert_allclose(seen["I_cat"][3], 1 - 1 / V, rtol=1e-6)  # all alike
    np.testing.assert_allclose(seen["entropy"][3], math.log(V), rtol=1e-6)
    assert (seen["delta_mu"] > 0.995).all() and (seen["delta_mu"] <= 10 + 1e-5).all()
    assert (seen["hbar_s"] <= math.sqrt(10)).all()
    np.testing.assert_allclose(seen["hbar_s"][0], math.sqrt(10 * math.sqrt(1 - 1 / 12)), rtol=1e-5)
    assert seen["hbar_s"].argmax() == 0


def test_worked_values():
    """Two layers at 60 degrees, the likeliest token ever less so, the others all alike."""
    mass, others = np.array([1 - 1e-9, 0.99, 0.9, 0.5]), 20_000
    logits = np.log(np.concatenate([mass[:, None], np.repeat((1 - mass[:, None]) / others, others, axis=1)], axis=1))
    states = np.broadcast_to([[3.0, 0], [1, math.sqrt(3)]], (4, 2, 2))
    seen = monitor(logits, states, [0, 0, 0, 0])
    np.testing.assert_allclose(seen["max_prob"], mass, atol=1e-5)
    np.testing.assert_allclose(seen["delta_sigma"], 0.5, atol=1e-6)
    np.testing.assert_allclose(seen["delta_mu"], [10, 5.78, 2.24, 1.15], atol=0.005)
    np.testing.assert_allclose(seen["hbar_s"], [2.24, 1.70, 1.06, 0.76], atol=0.005)
    np.testing.assert_allclose(seen["surprise"], -np.log(mass), atol=1e-5)


def test_confident_predictions():
    """Where one token has nearly all, delta_mu tells parts in 1e8 from none, and 1 - sum p^2 in float32 does not."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((400, V)).astype(np.float32)
    logits[:, 0] += np.linspace(0, 25, 400, dtype=np.float32)
    p = softmax(logits.astype(np.float64), axis=1)
    gini = 1 - (p**2).sum(1)
    assert gini.min() < 1e-8 and gini.max() > 0.5
    seen = monitor(logits, np.ones((400, 2, 2)), [0] * 400)
    np.testing.assert_allclose(seen["I_cat"], gini, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(seen["delta_mu"], (gini + 0.01) ** -0.5, rtol=1e-6)


def test_pfail():
    """It passes .85 where hbar_s passes tau + .3469, and its exponent stays within 50."""
    logits, states, tokens = trajectory(5)
    hbar = monitor(logits, states, tokens)["hbar_s"]
    t = int(hbar.argmax())
    beyond = math.log(0.85 / 0.15) / 5
    assert abs(beyond - 0.3469) < 5e-5
    for off, passes in ((1e-4, True), (-1e-4, False)):
        tau = float(hbar[t]) - beyond - off
        pfail = monitor(logits, states, tokens, tau=tau)["pfail"]
        assert (pfail[t] > 0.85) == passes
        assert (pfail > 0.85).sum() == passes  # the others are lower
    for lambda_ in (1e6, 1e30, -1e30):
        seen = monitor(logits, states, tokens, tau=float(np.median(hbar)), lambda_=lambda_)["pfail"]
        high = (hbar > np.median(hbar)) == (lambda_ > 0)
        apart = np.abs(hbar - np.median(hbar)) > 1e-3
        wanted = np.where(high, 1.0, 1 / (1 + math.exp(50)))
        np.testing.assert_allclose(seen[apart], wanted[apart], rtol=1e-5)
        assert 0 < seen.min() < 1e-20 and seen.max() == 1


def test_surprise_and_what_it_is_multiplied_by():
    """Clipped at 1e-10; pri starts as the surprise; a state that turns round counts double alpha."""
    logits = np.zeros((5, 3), np.float32)
    logits[:, 0] = [0, 20, 23, 24, 1000]
    logits[:, 1] = -np.inf
    last = np.array([[1, 0], [2, 0], [-2, 0], [0, 1], [0, 0]], np.float32)  # the same, back, a right angle, nowhere
    seen = monitor(logits, np.stack([np.ones((5, 2)), last], axis=1), [2] * 5, alpha=0.25)
    np.testing.assert_allclose(seen["surprise"], [math.log(2), 20, 23, -math.log(1e-10), -math.log(1e-10)], rtol=1e-6)
    np.testing.assert_allclose(seen["delta_h"], [0, 0, 2, 1, 1], atol=1e-6)
    np.testing.assert_allclose(seen["pri"], seen["surprise"] * (1 + 0.25 * np.array([0, 0, 2, 1, 1])), rtol=1e-6)
    assert seen["pri"][0] == seen["surprise"][0]
    never = monitor(logits, np.stack([np.ones((5, 2)), last], axis=1), [1] * 5)
    np.testing.assert_allclose(never["surprise"], -math.log(1e-10), rtol=1e-6)
    assert all(np.isfinite(values).all() for values in never.values())


def test_half_precision_states_are_float32_signals(signals_by_definition, assert_signals):
    logits, states, tokens = trajectory(5)
    logits, states = jnp.asarray(logits, jnp.bfloat16), jnp.asarray(states, jnp.bfloat16)
    seen = monitor(logits, states, tokens)
    assert {values.dtype for values in seen.values()} == {np.dtype(np.float32)}
    assert_signals(seen, signals_by_definition(logits, states, tokens))


@pytest.mark.parametrize(
    "logits, states, tokens, message",
    [
        ((3, 9), (3, 2, 4), [0, 1], r"logits has shape \(3, 9\), states \(3, 2, 4\), tokens \(2,\); wanted \[T, V\]"),
        ((3, 9), (2, 2, 4), [0, 1, 2], r"states \(2, 2, 4\)"),
        ((9,), (3, 2, 4), [0, 1, 2], r"logits has shape \(9,\)"),
        ((3, 9), (3, 4), [0, 1, 2], r"states \(3, 4\)"),
        ((3, 9), (3, 0, 4), [0, 1, 2], r"states \(3, 0, 4\)"),
        ((1, 9), (1, 2, 4), 0, r"tokens \(\)"),
        ((0, 9), (0, 2, 4), [], r"tokens \(0,\)"),
        ((3, 9), (3, 2, 4), [0, 1, 9], "tokens are 0 to 9, wanted 0 to 8"),
        ((3, 9), (3, 2, 4), [0, -1, 2], "tokens are -1 to 2, wanted 0 to 8"),
    ],
    ids=str,
)
def test_bad_trajectories(logits, states, tokens, message):
    with pytest.raises(ValueError, match=message):
        monitor(np.zeros(logits), np.zeros(states), tokens)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(every=0), "check_every_k_tokens=0, wanted an integer >= 1"),
        (dict(every=2.0), "check_every_k_tokens=2.0"),
        (dict(every=True), "check_every_k_tokens=True"),
        (dict(k_top=0), "k_top=0"),
        (dict(tau=[1.0, 2.0]), "tau has 2 values, wanted one for all 3 rows or one a row"),
        (dict(lambda_=[1.0] * 4), "lambda_ has 4 values"),
        (dict(pfail_cutoff=[]), "pfail_cutoff has 0 values"),
        (dict(tau="high"), "tau='high', wanted a finite number"),
        (dict(tau=math.nan), "tau=nan"),
        (dict(lambda_=math.inf), "lambda_=inf"),
        (dict(pfail_cutoff=None), "pfail_cutoff=None"),
        (dict(alpha=math.nan), "alpha_pri=nan, wanted a finite number"),
        (dict(alpha="0.1"), "alpha_pri='0.1'"),
    ],
    ids=str,
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        make_monitor(3, **options)


# --- Models while they write ------------------------------------------------------------------------------------------


def passes(lm, prompt, tokens):
    """Logits [T, V] and states [T, L, D] at every step of a text, from one pass over all of it without a cache."""
    result = nmjax.forward(lm, [prompt + tokens], capture=("resid_post",))
    steps = slice(len(prompt) - 1, -1)
    return np.asarray(result.logits[0])[steps], np.asarray(result.activations["resid_post"][:, 0]).swapaxes(0, 1)[steps]


def growing(lm, prompt, tokens):
    """The same from a pass over the text so far for every token."""
    logits, states = [], []
    for t in range(len(tokens)):
        result = nmjax.forward(lm, [prompt + tokens[:t]], capture=("resid_post",))
        logits.append(np.asarray(result.logits[0, -1]))
        states.append(np.asarray(result.activations["resid_post"][:, 0, -1]))
    return np.stack(logits), np.stack(states)


def compare(lm, out, definition, assert_signals, source=passes):
    """A monitored generation, and the monitor of stored arrays, with the definition on single-row passes."""
    largest = {}
    for prompt, tokens, seen in zip(out.prompt_tokens, out.tokens, out.seen, strict=True):
        logits, states = source(lm, prompt, tokens)
        wanted = definition(logits, states, tokens)
        for found in ({name: seen[name] for name in SIGNALS}, monitor(logits, states, tokens)):
            for name, off in assert_signals(found, wanted).items():
                largest[name] = max(off, largest.get(name, 0))
    return largest


STORIES = ["Once upon a time there was", "One day, a little girl", "Lily and Tom", "Tom and his dog went to a park"] * 2
HEAT = [0, 0, 0, 0, 1.0, 1.0, 1.5, 0.7]  # greedy rows beside sampled ones


def write(lm, new):
    options = dict(max_new_tokens=new, eos_token_id=[], temperature=HEAT, seed=1)
    return nmjax.generate(lm, STORIES, **options, monitor=make_monitor(8, pfail_cutoff=NEVER))


@pytest.mark.slow
def test_stories(shared_data, signals_by_definition, assert_signals):
    """Prompts of four lengths, so padded on the left, greedy and sampled together."""
    lm = models.load(shared_data / "stories260K-hf")
    out = write(lm, 60)
    assert len({len(ids) for ids in out.prompt_tokens}) == 4
    compare(lm, out, signals_by_definition, assert_signals)
    hbar = np.concatenate([seen["hbar_s"] for seen in out.seen])
    assert hbar.min() < 1 and hbar.max() > 2  # they range widely


@pytest.mark.slow
def test_stories_from_growing_texts(shared_data, signals_by_definition, assert_signals):
    lm = models.load(shared_data / "stories260K-hf")
    compare(lm, write(lm, 80), signals_by_definition, assert_signals, source=growing)


@pytest.mark.slow
def test_the_bundled_model(signals_by_definition, assert_signals):
    lm = models.load(ROOT / "checkpoints" / "tiny")
    compare(lm, write(lm, 16), signals_by_definition, assert_signals)


@pytest.fixture(scope="module")
def half_lm(tiny_lm):
    return dataclasses.replace(tiny_lm, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_lm.params))


def test_half_precision_parameters(half_lm, monkeypatch):
    """Signals [rows, room] in float32, before and in the loop; traced, not run."""
    shapes, prefill, decode = [], generation.prefill, generation.decode

    class Traced(Exception):
        pass

    def trace(module, room, *rest):
        params, rows, sampling, limits, watch = rest
        state = jax.eval_shape(lambda *rest: prefill(module, room, *rest), *rest)
        after = jax.eval_shape(
            lambda *rest: decode(module, *rest[:-1], 16, *rest[-1]), params, rows, sampling, limits, (state, watch)
        )
        shapes.extend([state.seen, after.seen])
        raise Traced

    monkeypatch.setattr(generation, "prefill", trace)
    with pytest.raises(Traced):
        nmjax.generate(half_lm, [[3, 4, 5], [6]], max_new_tokens=20, monitor=make_monitor(2))
    assert len(shapes) == 2
    for seen in shapes:
        assert {(x.shape, x.dtype) for x in seen.signals.values()} == {((2, 32), np.dtype(np.float32))}
        assert seen.signals.keys() == set(SIGNALS)
        assert seen.p_yes.dtype == seen.direction.dtype == np.float32


@pytest.mark.slow
def test_a_half_precision_model(half_lm, tiny_lm):
    """Near those of the full model on the same text, and all finite."""
    watch = make_monitor(2, pfail_cutoff=NEVER)
    out = nmjax.generate(half_lm, [[3, 4, 5], [6, 7]], max_new_tokens=16, eos_token_id=[], monitor=watch)
    for prompt, tokens, seen in zip(out.prompt_tokens, out.tokens, out.seen, strict=True):
        wanted = monitor(*passes(tiny_lm, prompt, tokens), tokens)
        for name in SIGNALS:
            assert seen[name].dtype == np.float32
            np.testing.assert_allclose(seen[name], wanted[name], rtol=0.1, atol=0.1)
