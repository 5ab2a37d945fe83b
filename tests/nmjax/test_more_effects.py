"""The wider vocabulary of effects against the float64 torch reference: cached and uncached, in a ragged batch.

As in `test_interventions_parity.py`, but in a program of its own; the reference is the same script.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

import nmjax

GOLDEN = Path(__file__).parents[1] / "golden" / "interventions"
KEPT_BEFORE = 4
AT_LOGITS = ("min_p", "presence_penalty", "repetition_penalty", "pulse_temperature")
SPEC = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
ROWS = [(name, i) for name in SPEC["more"] for i in range(len(SPEC["prompts"]))]


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "more.npz"))


@pytest.fixture(scope="module")
def interventions():
    vectors = dict(np.load(GOLDEN / "vectors.npz"))

    def build(transform, arguments, dose, where):
        assert where is None
        resolved = {k: vectors[v] if k in ("direction", "basis") else v for k, v in arguments.items()}
        return getattr(nmjax, transform)(**resolved).at(dose)

    return {name: nmjax.compose(*(build(*effect) for effect in effects)) for name, effects in SPEC["more"].items()}


@pytest.fixture(scope="module")
def packs(interventions):
    return [interventions[name] for name, _ in ROWS]


@pytest.fixture(scope="module")
def cached(tiny_lm, packs):
    prompts = [SPEC["prompts"][i] for _, i in ROWS]
    return nmjax.generate(tiny_lm, prompts, packs, max_new_tokens=8, eos_token_id=[])


@pytest.fixture(scope="module")
def passes(tiny_lm, packs):
    """Unpadded logits [T, V] of texts, row by row under the cases' interventions (or others)."""

    def run(texts, others=None):
        result = nmjax.forward(tiny_lm, texts, packs if others is None else others)
        logits, mask = np.asarray(result.logits), np.asarray(result.mask)
        return [row[real] for row, real in zip(logits, mask, strict=True)], np.asarray(result.next_logits)

    return run


@pytest.fixture(scope="module")
def forced(golden):
    return [SPEC["prompts"][i] + golden[f"{name}.{i}.tokens"].tolist() for name, i in ROWS]


def by_hand(logits, generated, effects):
    """[V] after the `logits` site."""
    x = np.asarray(logits, np.float64).copy()
    for name, arguments, dose, _ in effects:
        counts = np.bincount(generated, minlength=len(x))
        if name == "pulse_temperature":
            base, pulsed = arguments.get("base", 1.0), len(generated) % arguments["period"] < arguments["width"]
            x /= max(0.05, 1 + dose * (base - 1) - dose * arguments["delta"] * pulsed)
        elif name == "presence_penalty":
            x -= dose * arguments["value"] * (counts > 0)
        elif name == "repetition_penalty":
            x -= dose * arguments["beta"] * counts
        elif name == "min_p":
            shares = np.exp(log_softmax(x))
            x[shares < dose * arguments["value"] * shares.max()] = -np.inf
    return x


def test_every_effect_moves_the_reference(golden, forced, passes):
    """A parity test of an effect that does nothing would pass. In the prompt and while generating."""
    sober, _ = passes(forced, [None] * len(ROWS))
    for row, (name, i) in enumerate(ROWS):
        moved = np.abs(golden[f"{name}.{i}.logits"] - sober[row][-KEPT_BEFORE - 8 :]).max(axis=1)
        if any(effect[0] not in AT_LOGITS for effect in SPEC["more"][name]):
            assert moved.max() > 1e-2, name
            assert moved[KEPT_BEFORE:].max() > 1e-2, name
        else:
            before = golden[f"{name}.{i}.logits"][KEPT_BEFORE - 1 : -1]
            after = golden[f"{name}.{i}.final"]
            finite = np.isfinite(after)
            assert not finite.all() or np.abs(after - before).max() > 1e-2, name


def test_uncached(golden, forced, passes, assert_close):
    logits, _ = passes(forced)
    for row, (name, i) in enumerate(ROWS):
        if "origin" not in name:  # to a pass without generation all of this is prompt
            assert_close(logits[row][-KEPT_BEFORE - 8 :], golden[f"{name}.{i}.logits"])


def test_cached(golden, cached, assert_close):
    for row, (name, i) in enumerate(ROWS):
        wanted, tokens = golden[f"{name}.{i}.logits"], golden[f"{name}.{i}.tokens"]
        assert cached.tokens[row] == tokens.tolist(), name
        steps = log_softmax(wanted[KEPT_BEFORE - 1 : -1].astype(np.float64), axis=-1)
        assert_close(cached.logprobs[row], steps[np.arange(8), tokens], scale=np.abs(wanted).max())


def test_logits_site(tiny_lm, golden, packs, passes, assert_close):
    """The first step in a pass; drawn at temperature 1.5, `sample_logprobs` are what the site leaves, step by step."""
    _, next_logits = passes([SPEC["prompts"][i] for _, i in ROWS])
    prompts = [SPEC["prompts"][i] for _, i in ROWS]
    out = nmjax.generate(tiny_lm, prompts, packs, max_new_tokens=16, eos_token_id=[], temperature=1.5, seed=3)
    raw, _ = passes([prompt + tokens for prompt, tokens in zip(prompts, out.tokens, strict=True)])
    repeated, checked = set(), set()
    for row, (name, i) in enumerate(ROWS):
        effects = SPEC["more"][name]
        kinds = {effect[0] for effect in effects} & set(AT_LOGITS)
        if not kinds:
            continue
        checked |= kinds
        if f"{name}.{i}.final" in golden:
            assert_close(next_logits[row], golden[f"{name}.{i}.final"][0])
        for step, token in enumerate(out.tokens[row]):
            before = out.tokens[row][:step]
            final = by_hand(raw[row][len(prompts[row]) - 1 + step], before, effects)
            assert np.isfinite(final[token]), f"{name} drew a token that it had cut"
            wanted = log_softmax(final / 1.5)[token]
            assert_close(out.sample_logprobs[row][step], wanted, scale=np.abs(raw[row]).max())
            repeated |= {kind for kind in kinds if token in before}
    assert checked == set(AT_LOGITS)
    assert repeated & {"presence_penalty", "repetition_penalty"}, "no token was repeated, so counts were not tested"


@pytest.mark.slow
def test_each_case_alone_and_unpadded(tiny_lm, golden, interventions, assert_close):
    for name, iv in interventions.items():
        wanted, tokens = golden[f"{name}.1.logits"], golden[f"{name}.1.tokens"]
        out = nmjax.generate(tiny_lm, [SPEC["prompts"][1]], packs=iv, max_new_tokens=8, eos_token_id=[])
        assert out.tokens[0] == tokens.tolist(), name
        if "origin" not in name:
            whole = nmjax.forward(tiny_lm, [SPEC["prompts"][1] + tokens.tolist()], packs=iv)
            assert_close(whole.logits[0, -KEPT_BEFORE - 8 :], wanted)
