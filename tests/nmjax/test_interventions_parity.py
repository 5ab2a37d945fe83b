"""Every transform against a float64 torch reference: cached and uncached, in a ragged batch and as a single row.

The reference (`tests/golden/make_interventions.py`) runs one unpadded row without a cache. Its results are committed;
the `parity` test at the end runs it again on new prompts.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

import nmjax

KEPT_BEFORE = 4  # the golden logits start this many tokens before the prompt's end
AT_LOGITS = ("temperature", "top_p", "top_k", "frequency_penalty")


def at_tokens(logits, tokens):
    """float64 log-probabilities of `tokens` [T] under logits [T, V]."""
    return log_softmax(np.asarray(logits, np.float64), axis=-1)[np.arange(len(tokens)), tokens]


def by_hand(logits, generated, effects):
    """[V] after the `logits` site, with a sort: what the sampler effects are by definition."""
    x = np.asarray(logits, np.float64).copy()
    for name, arguments, dose, _ in effects:
        if name == "temperature":
            x /= 1 + dose * (arguments["value"] - 1)
        elif name == "frequency_penalty":
            x -= dose * arguments["value"] * np.bincount(generated, minlength=len(x))
        elif name == "top_k":
            x[x < np.sort(x)[-round(arguments["value"] / dose)]] = -np.inf
        elif name == "top_p":
            p = 1 - dose * (1 - arguments["value"])
            order = np.argsort(-x)
            share = np.exp(log_softmax(x))[order]
            x[order[np.cumsum(share) - share >= p]] = -np.inf
    return x


@pytest.fixture(scope="module")
def forced(cases):
    """Prompt and golden continuation of every row of `cases.rows()`."""
    return [cases.prompts[i] + cases.golden[f"{name}.{i}.tokens"].tolist() for name, i in cases.rows()]


def in_halves(run, rows):
    """The shared batch has room for half of the cases at a time."""
    half = len(rows) // 2
    return run(rows[:half]) + run(rows[half:])


@pytest.fixture(scope="module")
def uncached(cases, forced, pass_in_company):
    """Logits [T, V] of every row, all cases side by side in a ragged batch."""
    packs = [cases.interventions[name] for name, _ in cases.rows()]

    def run(rows):
        return pass_in_company([forced[row] for row in rows], [packs[row] for row in rows])

    return [logits for logits, _ in in_halves(run, range(len(forced)))]


@pytest.fixture(scope="module")
def sober(forced, pass_in_company):
    """Logits [T, V] of the same tokens in a program without effects."""
    return [logits for logits, _ in in_halves(lambda rows: pass_in_company(rows, company=None), forced)]


def acts_inside(spec):
    return any(name not in AT_LOGITS for name, *_ in spec)


def test_every_effect_moves_the_logits(cases, sober):
    """A parity test of an effect that does nothing would pass. Both in the prompt and while generating."""
    for row, (name, i) in enumerate(cases.rows()):
        golden = cases.golden[f"{name}.{i}.logits"]
        if acts_inside(cases.specs[name]):
            moved = np.abs(golden - sober[row][-len(golden) :]).max(axis=1)
            assert moved[:KEPT_BEFORE].max() > 1e-2, name
            assert moved[KEPT_BEFORE:].max() > 1e-2, name
        elif name != "none":
            before, after = golden[KEPT_BEFORE - 1 : -1], cases.golden[f"{name}.{i}.final"]
            np.testing.assert_allclose(golden, sober[row][-len(golden) :], atol=1e-4)
            assert (np.abs(after - before).max(axis=1) > 1e-2).any(), name


def test_order_matters_in_the_reference(cases):
    pair = [cases.golden[f"{name}.0.logits"][:KEPT_BEFORE] for name in ("steer_then_ablate", "ablate_then_steer")]
    assert np.abs(pair[0] - pair[1]).max() > 1e-2


def test_uncached_in_a_ragged_batch(cases, uncached, assert_close):
    for row, (name, i) in enumerate(cases.rows()):
        if name != "steer_here_and_there":  # to a pass without generation all of this is prompt; see test_where.py
            golden = cases.golden[f"{name}.{i}.logits"]
            assert_close(uncached[row][-len(golden) :], golden)


def test_cached_in_a_ragged_batch(cases, everything, assert_close):
    """The decode loop is forced down the reference's path: greedy, where no two tokens are near each other."""
    for row, (name, i) in enumerate(cases.rows()):
        golden, tokens = cases.golden[f"{name}.{i}.logits"], cases.golden[f"{name}.{i}.tokens"]
        assert everything.tokens[row] == tokens.tolist(), name
        wanted = at_tokens(golden[KEPT_BEFORE - 1 : -1], tokens)
        assert_close(everything.logprobs[row], wanted, scale=np.abs(golden).max())


def test_cached_equals_uncached(cases, everything, uncached, assert_close):
    for row, (name, _) in enumerate(cases.rows()):
        if name != "steer_here_and_there":
            tokens = everything.tokens[row]
            wanted = at_tokens(uncached[row][-len(tokens) - 1 : -1], tokens)
            assert_close(everything.logprobs[row], wanted, scale=np.abs(uncached[row]).max())


SLOTS = (
    "scale_qk_up",
    "decay_score",
    "decay_logit",
    "steer_absolute",
    "steer_relative",
    "ablate",
    "mask_heads",
    "frequency_penalty",
    "temperature_down",
    "top_k",
    "top_p",
)


def kind_of(effect):
    return type(effect), getattr(effect, "mode", None), getattr(effect, "coef", None)


@pytest.mark.slow
def test_single_row(tiny_lm, cases, assert_close):
    """One row at a time. The other effects ride along at dose 0, so that all cases are one compiled program."""
    slots = [cases.interventions[name].effects[0] for name in SLOTS]
    prompt, seen = cases.prompts[1], set()
    for name, iv in cases.interventions.items():
        if len(iv.effects) > 1 or (iv.effects and iv.effects[0].where is not None):
            continue
        kinds = [kind_of(effect) for effect in iv.effects]
        seen.update(kinds)
        rest = [slot.at(0) if kind_of(slot) not in kinds else iv.effects[0] for slot in slots]
        golden, tokens = cases.golden[f"{name}.1.logits"], cases.golden[f"{name}.1.tokens"]
        whole = nmjax.forward(tiny_lm, [prompt + tokens.tolist()], packs=nmjax.compose(*rest))
        assert_close(whole.logits[0, -len(golden) :], golden)
        out = nmjax.generate(tiny_lm, [prompt], packs=nmjax.compose(*rest), max_new_tokens=8, eos_token_id=[])
        assert out.tokens[0] == tokens.tolist(), name
        wanted = at_tokens(golden[KEPT_BEFORE - 1 : -1], tokens)
        assert_close(out.logprobs[0], wanted, scale=np.abs(golden).max())
    assert seen == {kind_of(slot) for slot in slots}


def test_logits_site_uncached(cases, pass_in_company, assert_close):
    """`next_logits` is after every effect, truncation included; the reference's first step has no counts yet."""
    rows = [(name, i) for name, i in cases.rows() if f"{name}.{i}.final" in cases.golden]
    assert {effect[0] for name, _ in rows for effect in cases.specs[name]} >= set(AT_LOGITS)
    packs = [cases.interventions[name] for name, _ in rows]
    results = pass_in_company([cases.prompts[i] for _, i in rows], packs)
    for (name, i), (_, next_logits) in zip(rows, results, strict=True):
        assert_close(next_logits, cases.golden[f"{name}.{i}.final"][0])


def test_logits_site_cached(cases, in_company, pass_in_company, assert_close):
    """Drawn at temperature 1, `sample_logprobs` are the log-softmax after the site: against a sort, step by step."""
    rows = [(name, i) for name, i in cases.rows() if any(effect[0] in AT_LOGITS for effect in cases.specs[name])]
    packs = [cases.interventions[name] for name, _ in rows]
    prompts = [cases.prompts[i] for _, i in rows]
    out = in_company(prompts, packs, temperature=1.0, seed=3)
    texts = [prompt + tokens for prompt, tokens in zip(prompts, out.tokens, strict=True)]
    repeats = 0
    for k, (raw, _) in enumerate(pass_in_company(texts, packs)):
        name, tokens = rows[k][0], out.tokens[k]
        for step, token in enumerate(tokens):
            final = by_hand(raw[len(prompts[k]) - 1 + step], tokens[:step], cases.specs[name])
            assert np.isfinite(final[token]), f"{name} drew a token that it had cut"
            assert_close(out.sample_logprobs[k][step], log_softmax(final)[token], scale=np.abs(raw).max())
            repeats += "frequency" in name and token in tokens[:step]
    assert repeats > 0, "no token was repeated, so the counts were not tested"


@pytest.mark.slow
def test_each_case_alone(tiny_lm, cases, assert_close):
    """A program of its own for every case: nothing else is compiled in."""
    for name, iv in cases.interventions.items():
        golden, tokens = cases.golden[f"{name}.1.logits"], cases.golden[f"{name}.1.tokens"]
        out = nmjax.generate(tiny_lm, [cases.prompts[1]], packs=iv, max_new_tokens=8, eos_token_id=[])
        assert out.tokens[0] == tokens.tolist(), name
        wanted = at_tokens(golden[KEPT_BEFORE - 1 : -1], tokens)
        assert_close(out.logprobs[0], wanted, scale=np.abs(golden).max())
        if name != "steer_here_and_there":
            whole = nmjax.forward(tiny_lm, [cases.prompts[1] + tokens.tolist()], packs=iv)
            assert_close(whole.logits[0, -len(golden) :], golden)


@pytest.mark.parity
def test_live_torch_on_new_prompts(tiny_lm, cases, assert_close):
    path = Path(__file__).parents[1] / "golden" / "make_interventions.py"
    spec = importlib.util.spec_from_file_location("make_interventions", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert set(script.CASES) == set(cases.specs)
    reference = script.Reference(script.make_weights(1), script.make_vectors(2))

    rng = np.random.default_rng(11)
    prompts = [rng.integers(3, 97, length).tolist() for length in (5, 20)]
    rows = [(name, i) for name in cases.specs for i in range(2)]
    packs = [cases.interventions[name] for name, _ in rows]
    out = nmjax.generate(tiny_lm, [prompts[i] for _, i in rows], packs, max_new_tokens=12, eos_token_id=[])
    whole = nmjax.forward(tiny_lm, [prompts[i] + out.tokens[row] for row, (_, i) in enumerate(rows)], packs)
    for row, (name, i) in enumerate(rows):
        tokens, effects = out.tokens[row], cases.specs[name]
        wanted = reference.logits(prompts[i] + tokens, len(prompts[i]), effects).numpy()
        tolerance = 1e-5 * max(1.0, np.abs(wanted).max())
        if name != "steer_here_and_there":
            assert_close(np.asarray(whole.logits[row])[np.asarray(whole.mask[row])], wanted)
        steps = wanted[len(prompts[i]) - 1 : -1]
        assert_close(out.logprobs[row], at_tokens(steps, tokens), scale=np.abs(wanted).max())
        for t, token in enumerate(tokens):
            final = reference.final(script.torch.from_numpy(steps[t]), tokens[:t], effects).numpy()
            assert final[token] >= final.max() - 10 * tolerance, f"{name}: step {t} is not the reference's choice"
