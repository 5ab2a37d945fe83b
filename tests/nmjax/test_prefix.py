"""Scores behind a shared prefix are those of the whole prompts, whatever the effects."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import nmjax
from nmjax.prefix import can_share, share_prefix


def _specimens():
    """The specimens of every class, which `test_every_effect.py` checks to be complete."""
    spec = importlib.util.spec_from_file_location("every_effect", Path(__file__).with_name("test_every_effect.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SPECIMENS


EVERY = {**_specimens(), "contrast": nmjax.contrast(nmjax.scale_qk(0.5), 0.6)}
SHARED = {name: effect for name, effect in EVERY.items() if can_share(effect)}
PREFIX = np.random.default_rng(0).integers(3, 97, 21).tolist()
RESTS = [np.random.default_rng(i).integers(3, 97, n).tolist() for i, n in enumerate((4, 1, 7))]
CHOICES = [[5], [17, 3], [60]]


def test_what_draws_or_acts_in_places_is_not_shared():
    apart = set(EVERY) - set(SHARED)
    assert apart == {"drop heads", "noise", "jitter", "drop tokens", "steer somewhere"} & set(EVERY) | {
        name for name in apart if EVERY[name].where is not None
    }
    assert len(SHARED) >= 25


def test_as_the_whole_prompts(tiny_lm, assert_close):
    """Three prompts under every effect, choices of one and two tokens; a contrast adds hidden rows to both passes."""
    packs = list(SHARED.values())
    rows = [PREFIX + rest for rest in RESTS for _ in packs]
    shared = share_prefix(tiny_lm, [PREFIX], packs, width=24)
    assert len(shared.lengths) > len(packs)  # the contrast's own
    seen = nmjax.score_choices(tiny_lm, rows, CHOICES, packs * 3, prefix=shared)
    whole = nmjax.score_choices(tiny_lm, rows, CHOICES, packs * 3)
    for field in ("logprobs", "sober_logprobs", "probs"):
        assert_close(getattr(seen, field), getattr(whole, field), scale=20.0)
    unmoved = np.asarray(whole.sober_logprobs).reshape(3, len(packs), 3)
    inside = [any(effect.touches(s) for s in ("query", "scores", "resid_post")) for effect in packs]
    moved = np.abs(unmoved - unmoved[:, [list(SHARED).index("temperature up")]]).max((0, 2))
    assert (moved[inside] > 1e-3).sum() >= sum(inside) - 2, "the effects were meant to act inside"


def test_the_bank_is_what_is_read(tiny_lm):
    """Another prefix's cache under the same tokens gives other scores."""
    shared = share_prefix(tiny_lm, [PREFIX], [None])
    other = share_prefix(tiny_lm, [PREFIX[::-1]], [None])
    rows = [PREFIX + rest for rest in RESTS]
    seen = nmjax.score_choices(tiny_lm, rows, [[5], [17]], prefix=shared)
    wrong = nmjax.score_choices(tiny_lm, rows, [[5], [17]], prefix=dataclasses.replace(shared, bank=other.bank))
    assert np.abs(np.asarray(seen.logprobs - wrong.logprobs)).max() > 0.1


def test_continuations_behind_several_prefixes(tiny_lm, assert_close):
    """Each row behind its own prompt, less a token, as when what several arms wrote is read again."""
    prompts = [PREFIX[:9], PREFIX, PREFIX[5:11]]
    packs = [None, nmjax.contrast(nmjax.scale_qk(0.5), 0.6), nmjax.scale_qk(2.0)]
    shared = share_prefix(tiny_lm, [prompt[:-1] for prompt in prompts], packs)
    rows = [(prompt, pack, [9, 8, 7, 6][: k + 1]) for k, prompt in enumerate(prompts) for pack in packs]
    ids, own, texts = (list(column) for column in zip(*rows, strict=True))
    seen = nmjax.continuation_logprobs(tiny_lm, ids, texts, own, prefix=shared)
    whole = nmjax.continuation_logprobs(tiny_lm, ids, texts, own)
    for a, b in zip(seen, whole, strict=True):
        assert_close(a, b, scale=20.0)
    assert np.abs(whole[2] - whole[0]).max() > 1e-2 and np.abs(whole[3][0] - whole[0][0]) > 1e-2


def test_a_hidden_preface_is_part_of_it(word_lm, assert_close):
    text = " ".join(f"w{i}" for i in PREFIX[:6])
    prompts = [f"{text} w{a} w{b}" for a, b in ((5, 9), (60, 4))]
    packs = [None, nmjax.preface("w7 w8 w9"), nmjax.compose(nmjax.preface("w44"), nmjax.decay_kv(0.3))]
    ids = word_lm.encode(text)
    shared = share_prefix(word_lm, [ids], packs)
    rows = [prompt for prompt in prompts for _ in packs]
    seen = nmjax.score_choices(word_lm, rows, [" w5", " w17"], packs * 2, prefix=shared)
    whole = nmjax.score_choices(word_lm, rows, [" w5", " w17"], packs * 2)
    assert_close(seen.logprobs, whole.logprobs, scale=20.0)
    assert np.abs(whole.logprobs[1] - whole.logprobs[0]).max() > 1e-2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm, shared: share_prefix(lm, [], [None]), "prefixes is empty"),
        (lambda lm, shared: share_prefix(lm, [[5], []], [None]), r"prefixes\[1\]=\[\] has no tokens"),
        (lambda lm, shared: share_prefix(lm, [[5]], [nmjax.add_noise(0.1)]), r"packs\[0\] draws noise"),
        (lambda lm, shared: share_prefix(lm, [[5, 6]], [None], width=1), "width=1, wanted at least 2"),
        (lambda lm, shared: share_prefix(lm, [[5] * 128], [None]), "exceed the model's context"),
        (lambda lm, shared: nmjax.score_choices(lm, [[5, 6, 7]], [[1], [2]], prefix=shared), r"prompts\[0\] begins"),
        (lambda lm, shared: nmjax.score_choices(lm, [PREFIX], [[1], [2]], prefix=shared), r"prompts\[0\] begins"),
        (
            lambda lm, shared: nmjax.score_choices(
                lm, [PREFIX + [5]], [[1], [2]], nmjax.compose(nmjax.scale_qk(2.0), name="sharp"), prefix=shared
            ),
            "not run under 'sharp'",
        ),
    ],
)
def test_bad_input_is_named(tiny_lm, shared, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_lm, shared)


@pytest.fixture(scope="module")
def shared(tiny_lm):
    return share_prefix(tiny_lm, [PREFIX], [None])
