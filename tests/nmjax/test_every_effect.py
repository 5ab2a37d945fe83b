"""Whatever the effect: dose 0 is no intervention (four properties), and neither cache nor padding changes anything.

Classes are found by themselves, so that a new effect without a specimen here fails the suite.
"""

import importlib
import pkgutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import nmjax
import nmjax.interventions
from nmjax.interventions.compose import batch
from nmjax.interventions.effect import Context
from nmjax.interventions.sites import SITES

V, D, N, H = 97, 32, 4, 8
# The vectors of the shared batch, so that its program serves here too.
VECTORS = np.load(Path(__file__).parents[1] / "golden" / "interventions" / "vectors.npz")
WIDE, OTHER, BY_LAYER = VECTORS["wide"], VECTORS["other"], VECTORS["by_layer"]

# At least one of every class, and one for every value of a static field that chooses between formulas.
SPECIMENS = {
    "scale_qk up": nmjax.scale_qk(2.5),
    "scale_qk down": nmjax.scale_qk(0.3, layers=[0, 1], heads=[1]),
    "decay score": nmjax.decay_kv(0.2),
    "decay logit": nmjax.decay_kv(0.2, mode="logit"),
    "steer": nmjax.steer(WIDE, 2.0, layers=[1]),
    "steer relative": nmjax.steer(BY_LAYER, -0.5, coef="relative"),
    "ablate": nmjax.ablate(OTHER),
    "mask heads": nmjax.mask_heads([0, 3], layers=[0, 1]),
    "temperature up": nmjax.temperature(1.8),
    "temperature down": nmjax.temperature(0.4),
    "top_p": nmjax.top_p(0.4),
    "top_k": nmjax.top_k(3),
    "frequency penalty": nmjax.frequency_penalty(1.5),
    "steer somewhere": nmjax.steer(OTHER, 3.0).on(prompt_window=(1, -1), generation="all"),
    "decay value": nmjax.decay_kv(0.2, mode="value"),
    "scale heads": nmjax.scale_heads(1.7, [1]),
    "drop heads": nmjax.mask_heads(p=0.5),
    "oscillate": nmjax.oscillate_attention(0.5, rate=0.7),
    "oscillate square": nmjax.oscillate_attention(0.5, "square", period=6, layers=[1, 2]),
    "anchor": nmjax.anchor_attention(1.5, first=2),
    "bias positions": nmjax.bias_positions(2.0, "middle"),
    "window hard": nmjax.window_kv(2),
    "window soft": nmjax.window_kv(1, edge="soft"),
    "stride": nmjax.stride_kv(3, newest=1, first=0),
    "segments": nmjax.segment_kv(1.0, -1.0, split=2),
    "segment rates": nmjax.decay_segments(0.1, 0.3, by="origin"),
    "clamp": nmjax.clamp_projection(OTHER, 2.0, layers=[1]),
    "soft projection": nmjax.soft_projection(0.5, rank=7, layers="all"),
    "gain layers": nmjax.gain_layers(0.8),
    "noise": nmjax.add_noise(0.3, layers="all"),
    "jitter": nmjax.jitter_embeddings(0.4),
    "drop tokens": nmjax.drop_tokens(0.5),
    "min_p": nmjax.min_p(0.3),
    "pulse": nmjax.pulse_temperature(0.5, period=4, width=2),
    "presence penalty": nmjax.presence_penalty(1.5),
    "contrast": nmjax.contrast(nmjax.scale_qk(0.2), 0.6),
    "steer a span": nmjax.steer_span(WIDE, 2.0, layers=[1], span=(1, 4)),
    "steer each token": nmjax.steer_span([WIDE, OTHER, WIDE], 2.0, span=(0, 3)),
}
# Where the dose moves a threshold (a cut, a window, a chance), the derivative is 0 wherever it exists, so property (iv)
# can't hold.
STEPS = ("drop heads", "drop tokens", "window hard", "window soft")
SMOOTH = {name: effect for name, effect in SPECIMENS.items() if not effect.truncates and name not in STEPS}
# No counts without generated tokens: in a single pass the penalty subtracts 0 at any dose. Noise follows a row's place
# in the batch, which differs between the two programs compared.
MOVES_FORWARD = {
    name: effect for name, effect in SMOOTH.items() if not effect.reads_counts and not isinstance(effect, nmjax.Drawing)
}
# Effects on text need a tokenizer, and an adapter needs a model that has it: they are tested where these are at hand.
ON_TEXT = {"Preface", "BiasTokens", "Drawing", "UseAdapter"}


def subclasses(cls):
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)


def test_every_effect_class_has_a_specimen():
    for module in pkgutil.walk_packages(nmjax.__path__, "nmjax."):
        if module.name.startswith("nmjax.interventions"):
            importlib.import_module(module.name)
    ours = {cls for cls in subclasses(nmjax.Effect) if cls.__module__.split(".")[0] == "nmjax"}
    covered = {type(effect) for effect in SPECIMENS.values()}
    missing = {cls.__name__ for cls in ours - covered}
    assert missing == ON_TEXT, f"add a specimen of {sorted(missing - ON_TEXT)}"


def context():
    """Two rows in a cache with empty slots, one of them padded, some tokens generated."""
    return Context(
        q_pos=jnp.asarray([[3, 4, 5], [-1, 0, 1]]),
        k_pos=jnp.asarray([[0, 1, 2, 3, 4, 5, -1], [-1, -1, -1, -1, 0, 1, -1]]),
        tokens=jnp.asarray([[5, 6, 7], [0, 8, 9]]),
        prompt_len=jnp.asarray([5, 2]),
        layer=jnp.int32(1),
        counts=jnp.asarray(np.random.default_rng(1).integers(0, 3, (2, V))),
        rivals=jnp.asarray(np.random.default_rng(3).standard_normal((2, V)), jnp.float32),
        keys=jax.random.split(jax.random.key(0), 2),
    )


def inputs(site):
    """Random values [B, ...] of both signs with zeros of both signs, and cut tokens at `logits`."""
    sizes = {"B": 2, "T": 3, "S": 7, "D": D, "N": N, "H": H, "V": V}
    x = np.random.default_rng(2).standard_normal([sizes[axis] for axis in SITES[site][0].split()]).astype(np.float32)
    x.flat[::7], x.flat[3::7] = 0.0, -0.0
    if site == "logits":
        x[:, 5::11] = -np.inf
    return jnp.asarray(x * 3)


@pytest.mark.parametrize("name", SPECIMENS)
def test_i_methods_return_their_input(name, tiny_lm):
    touched = [site for site in SITES if SPECIMENS[name].touches(site)]
    assert touched
    for site in touched:
        x, (active,) = inputs(site), batch([SPECIMENS[name]] * 2, tiny_lm)
        (bound,) = batch([SPECIMENS[name].at(0)] * 2, tiny_lm)
        act = jax.jit(lambda effect, site=site, x=x: effect.act(site, x, context()))
        assert not np.array_equal(act(active), x), "the effect does nothing at dose 1"
        np.testing.assert_array_equal(act(bound), x)


@pytest.fixture(scope="module")
def prompts():
    return [np.random.default_rng(i).integers(3, V, 6 + i % 9).tolist() for i in range(len(SPECIMENS))]


ZEROS = [effect.at(0) for effect in SPECIMENS.values()]
NOTHING = [None] * len(SPECIMENS)


@pytest.fixture(scope="module")
def run(prompts, in_company, pass_in_company):
    """What a pass and a sampled continuation return for `packs`, in some company."""

    def everything(packs, company="cases"):
        passes = pass_in_company(prompts, packs, company=company)
        out = in_company(prompts, packs, company=company, max_new_tokens=6, temperature=0.9, seed=1)
        return [results(*passes[i], out, i) for i in range(len(packs))]

    return everything


def results(logits, next_logits, out, i):
    made = {what: getattr(out, what)[i] for what in ("tokens", "logprobs", "sample_logprobs")}
    return {"logits": logits, "next_logits": next_logits, **made}


def assert_equal_in_bits(a, b):
    for left, right in zip(a, b, strict=True):
        for what in left:
            np.testing.assert_array_equal(left[what], right[what], err_msg=what)


@pytest.fixture(scope="module")
def all_at_zero(run):
    """Every specimen at dose 0, in a batch where every class acts on other rows."""
    return run(ZEROS)


def test_ii_next_to_the_same_classes(run, all_at_zero):
    """`[p.at(0), q]` against `[None, q]` for all p at once, with every class among the rows q: one program."""
    assert_equal_in_bits(all_at_zero, run(NOTHING))


@pytest.mark.slow
def test_ii_next_to_another_class(run, all_at_zero):
    """The same against a program that holds but the effect of q: what is compiled in changes no bit."""
    assert_equal_in_bits(all_at_zero, run(NOTHING, company=nmjax.steer(WIDE, 3.0)))


def test_iii_equals_the_program_without_effects(run, all_at_zero):
    for zero, plain in zip(all_at_zero, run(NOTHING, company=None), strict=True):
        assert zero["tokens"] == plain["tokens"]
        atol = 1e-6 * max(1.0, np.abs(plain["logits"]).max())
        for what in ("logits", "next_logits", "logprobs", "sample_logprobs"):
            np.testing.assert_allclose(zero[what], plain[what], rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECIMENS)
def test_ii_pair_by_pair(name, tiny_lm, prompts):
    p, texts = SPECIMENS[name], prompts[7:9]
    another = nmjax.steer(OTHER) if "scale" in name else nmjax.scale_qk(1.7)
    for q in (p.at(0.5), another):
        seen = []
        for packs in ([p.at(0), q], [None, q]):
            passed = nmjax.forward(tiny_lm, texts, packs)
            out = nmjax.generate(tiny_lm, texts, packs, max_new_tokens=6, temperature=0.9, seed=1, eos_token_id=[])
            logits, mask = np.asarray(passed.logits[0]), np.asarray(passed.mask[0])
            seen.append(results(logits[mask], passed.next_logits[0], out, 0))
        assert_equal_in_bits(seen[:1], seen[1:])


@pytest.mark.parametrize("name", SMOOTH)
def test_iv_methods_have_a_derivative(name, tiny_lm):
    """At dose 0, and the right one: against a one-sided difference of third order, as doses start at 0."""
    for site in (site for site in SITES if SMOOTH[name].touches(site)):
        x = inputs(site)
        finite = np.isfinite(x)

        def at(dose, site=site, x=x):
            (bound,) = batch([SMOOTH[name].at(dose)] * 2, tiny_lm)
            return jnp.where(jnp.isfinite(x), bound.act(site, x, context()), 0)

        act = jax.jit(lambda dose, at=at: jax.jvp(at, (dose,), (jnp.float32(1),)))  # value and slope
        slope = np.asarray(act(0.0)[1])
        h = 1 / 64
        difference = (18 * act(h)[0] - 9 * act(2 * h)[0] + 2 * act(3 * h)[0] - 11 * act(0.0)[0]) / (6 * h)
        assert np.abs(slope[finite]).max() > 1e-3
        np.testing.assert_allclose(slope, difference, rtol=0, atol=3e-3 * max(1, np.abs(slope).max()))


@pytest.mark.slow
def test_iv_the_model_has_a_derivative(tiny_lm, prompts, pass_in_company):
    """Every row moves with its own dose, through the whole network."""
    effects = list(MOVES_FORWARD.values())
    texts = prompts[: len(effects)]

    def final(doses):
        packs = [effect.at(dose) for effect, dose in zip(effects, doses, strict=True)]
        return nmjax.forward(tiny_lm, texts, packs).next_logits

    slopes = jax.jvp(final, (jnp.zeros(len(effects)),), (jnp.ones(len(effects)),))[1]
    h = 1 / 64
    at = [np.stack([last for _, last in pass_in_company(texts, [e.at(k * h) for e in effects])]) for k in range(4)]
    differences = (18 * at[1] - 9 * at[2] + 2 * at[3] - 11 * at[0]) / (6 * h)
    for name, slope, difference in zip(MOVES_FORWARD, slopes, differences, strict=True):
        size = np.abs(slope).max()
        assert size > 1e-2, f"{name}: no derivative at dose 0"
        assert np.abs(slope - difference).max() < 0.02 * size + 5e-3, name


# --- A cache and padding ----------------------------------------------------------------------------------------------

NEW = 8
TEXTS = [np.random.default_rng(i).integers(3, 97, (6, 3, 12, 1)[i % 4]).tolist() for i in range(len(SPECIMENS))]
# A contrast's hidden rows would be a program of their own; test_contrast.py has it with and without a cache.
IN_ONE_PROGRAM = [effect.at(0) if name == "contrast" else effect for name, effect in SPECIMENS.items()]
# In a pass over the whole text all of it is prompt; these say otherwise of what was generated.
BY_ORIGIN = ("segment rates", "steer somewhere")


def named(name, check, *arguments, **options):
    try:
        check(*arguments, **options)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


def test_a_cache_changes_nothing(in_company, pass_in_company, assert_close):
    """In the programs of the doses 0: the place of a row, so its random stream, is the same with and without."""
    out = in_company(TEXTS, IN_ONE_PROGRAM, max_new_tokens=NEW)
    whole = [prompt + tokens for prompt, tokens in zip(TEXTS, out.tokens, strict=True)]
    passes, plain = pass_in_company(whole, IN_ONE_PROGRAM), pass_in_company(whole, ZEROS)
    for i, (name, effect) in enumerate(SPECIMENS.items()):
        logits, _ = passes[i]
        steps = log_softmax(logits[-NEW - 1 : -1].astype(np.float64), axis=-1)[np.arange(NEW), out.tokens[i]]
        if name not in BY_ORIGIN:
            named(name, assert_close, out.logprobs[i], steps, scale=np.abs(logits).max())
        if any(effect.touches(site) for site in SITES if site != "logits"):
            assert np.abs(logits - plain[i][0]).max() > 1e-2, f"{name} does nothing"


def test_far_positions(tiny_lm):
    """Strides, windows and segments count exactly where float32 is coarse; ages, not positions, decide the rest."""
    T = 100_003
    k_pos = np.arange(T - 399, T + 1)
    ctx = Context(
        q_pos=jnp.full((2, 1), T), k_pos=jnp.asarray([k_pos, k_pos]), tokens=jnp.zeros((2, 1), jnp.int32),
        prompt_len=jnp.full(2, T - 50), layer=jnp.int32(0),
    )  # fmt: skip
    x, age = jnp.zeros((2, 4, 1, 400)), T - k_pos
    for effect, wanted in (
        (nmjax.stride_kv(7, newest=3), -8.0 * ((k_pos % 7 != 0) & (age >= 3))),
        (nmjax.window_kv(33), np.where(age < 33, 0, np.finfo(np.float32).min)),
        (nmjax.window_kv(33).at(0.5), np.where(age < 66, 0, np.finfo(np.float32).min)),
        (nmjax.segment_kv(0.5, -0.25, split=77), np.where(age < 77, 0.5, -0.25)),
        (nmjax.segment_kv(1.0, -1.0, by="origin"), np.where(k_pos >= T - 50, 1.0, -1.0)),
        (nmjax.decay_kv(0.2, mode="logit"), -0.2 * age),
    ):
        (bound,) = batch([effect, None], tiny_lm)
        seen = np.asarray(bound.act("scores", x, ctx))
        np.testing.assert_allclose(seen[0, 2, 0], wanted, rtol=1e-6)
        assert not seen[1].any()


def see(lm, texts):
    result = nmjax.forward(lm, texts, list(SPECIMENS.values()), row_ids=list(range(len(SPECIMENS))))
    return [np.asarray(x)[m] for x, m in zip(result.logits, result.mask, strict=True)], np.asarray(result.next_logits)


@pytest.mark.slow
def test_padding_changes_nothing(tiny_lm, assert_close):
    """The same rows in buckets of 16 and of 32 tokens, the wider one for the sake of one long neighbour."""
    logits, last = see(tiny_lm, TEXTS)
    wide = list(TEXTS)
    wide[list(SPECIMENS).index("temperature up")] = list(range(3, 33))
    padded, padded_last = see(tiny_lm, wide)
    for i, name in enumerate(SPECIMENS):
        if wide[i] is TEXTS[i]:
            named(name, assert_close, padded[i], logits[i])
            named(name, assert_close, padded_last[i], last[i], scale=np.abs(logits[i]).max())
