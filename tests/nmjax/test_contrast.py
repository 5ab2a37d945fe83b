"""Contrastive decoding against the definition, computed from two plain passes."""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

import nmjax
from nmjax.generation import decode, prefill

V, NEW = 97, 10
VECTOR = np.random.default_rng(3).standard_normal((2, 32)).astype(np.float32)
PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12], [20, 21, 22, 23, 24, 25, 26], [30], [40, 41, 42, 43], [5, 6, 7, 8, 9],
           [50, 51, 52, 53]]  # fmt: skip
ROW_IDS = [3, 4, 5, 6, 7, 8, 9]

# Own effects, effects of the other run, dose * alpha (0: no contrast) and min_p of every row. The last one is
# contrasted at its second to fourth generated token only, with a run that is steered at its prompt's last token only.
FLAT, PUSH, TURN = nmjax.scale_qk(0.3), nmjax.steer(VECTOR[0], 2.0), nmjax.steer(VECTOR[1], 1.5)
NOISY = nmjax.compose(nmjax.scale_qk(0.7), nmjax.jitter_embeddings(0.5))
ROWS = [
    (None, FLAT, 0.8, 0),
    (None, None, 0, 0),
    (nmjax.scale_qk(1.5), NOISY, 0.6, 0),
    (None, None, 0.4, 0),
    (nmjax.jitter_embeddings(0.3), TURN, 1.2, 0.05),
    (nmjax.steer(VECTOR[0], 1.0), None, 0, 0),
    (None, PUSH.on(prompt_positions=[3]), 1.5, 0),
]
WINDOW = (1, 4)


def pack_of(own, other, share, floor):
    contrasts = [nmjax.contrast(other, 2 * share).at(0.5)] if share else []
    return nmjax.compose(own, *contrasts, *([nmjax.min_p(floor)] if floor else []))


PACKS = [pack_of(*row) for row in ROWS]
PACKS[-1] = nmjax.contrast(ROWS[-1][1], 1.5).on(generation_window=WINDOW)


@pytest.fixture(scope="module")
def raw(tiny_lm):
    """Logits [T, V] of texts under interventions without contrasts. One program for up to 16 rows."""
    first = [nmjax.compose(NOISY, PUSH.on(prompt_positions=[0]))]

    def forward(texts, packs, row_ids):
        spare = 16 - len(texts)
        packs, ids = first * (spare - 1) + [TURN] + packs, [0] * spare + row_ids
        result = nmjax.forward(tiny_lm, [list(range(3, 35))] * spare + texts, packs, row_ids=ids)
        return [np.asarray(x, np.float64)[m] for x, m in zip(result.logits, result.mask, strict=True)][spare:]

    return forward


@pytest.fixture(scope="module")
def by_hand(raw):
    """float64 [T, V] for rows of ROWS: their own logits less the share of the other's log-probabilities."""

    def compute(texts, rows=ROWS, row_ids=ROW_IDS):
        own = raw(texts, [row[0] for row in rows], row_ids)
        other = raw(texts, [row[1] for row in rows], row_ids)
        finals = []
        for i, (mine, theirs, (_, _, share, floor)) in enumerate(zip(own, other, rows, strict=True)):
            if i == len(ROWS) - 1:
                step = np.arange(len(mine)) - (len(PROMPTS[i]) - 1)
                share = share * ((step >= WINDOW[0]) & (step < WINDOW[1]))[:, None]
            x = mine - share * log_softmax(theirs, axis=-1)
            shares = np.exp(log_softmax(x, axis=-1))
            finals.append(np.where(shares >= floor * shares.max(-1, keepdims=True), x, -np.inf))
        return own, finals

    return compute


def run(lm, prompts=PROMPTS, packs=PACKS, row_ids=ROW_IDS, **options):
    options = {"max_new_tokens": NEW, "eos_token_id": [], "row_ids": row_ids, **options}
    return nmjax.generate(lm, prompts, packs, **options)


@pytest.fixture(scope="module")
def greedy(tiny_lm):
    return run(tiny_lm)


def check_steps(out, i, prompt, own, final, assert_close, temperature=0.0):
    """Every token, and both of its log-probabilities, are what the definition gives at its step."""
    scale = max(1, np.abs(own).max())
    for step, token in enumerate(out.tokens[i]):
        at = len(prompt) - 1 + step
        assert_close(out.logprobs[i][step], log_softmax(own[at])[token], scale=scale)
        if temperature:
            wanted = log_softmax(final[at] / temperature)[token]
            assert_close(out.sample_logprobs[i][step], wanted, scale=scale / temperature)
        else:
            assert final[at][token] >= final[at].max() - 1e-5 * scale


def whole(prompts, out):
    return [prompt + tokens for prompt, tokens in zip(prompts, out.tokens, strict=True)]


def test_greedy(tiny_lm, greedy, by_hand, assert_close):
    own, final = by_hand(whole(PROMPTS, greedy))
    moved = 0
    for i, prompt in enumerate(PROMPTS):
        check_steps(greedy, i, prompt, own[i], final[i], assert_close)
        last = slice(len(prompt) - 1, -1)
        moved += (own[i][last].argmax(-1) != final[i][last].argmax(-1)).any()
    assert moved >= 2, "contrasts chose no other tokens"


def test_sampled(tiny_lm, by_hand, assert_close):
    out = run(tiny_lm, temperature=1.3)
    own, final = by_hand(whole(PROMPTS, out))
    for i, prompt in enumerate(PROMPTS):
        check_steps(out, i, prompt, own[i], final[i], assert_close, temperature=1.3)


def test_next_logits_of_a_pass(tiny_lm, by_hand, assert_close):
    result = nmjax.forward(tiny_lm, PROMPTS, PACKS, capture=("resid_post", "embed"), row_ids=ROW_IDS)
    own, final = by_hand(PROMPTS)
    for i in range(len(PROMPTS)):
        assert_close(np.asarray(result.logits[i])[np.asarray(result.mask[i])], own[i])
        assert_close(result.next_logits[i], final[i][-1], scale=np.abs(own[i]).max())
    B, T = len(PROMPTS), max(map(len, PROMPTS))
    assert result.mask.shape == (B, T) and result.next_logits.shape == (B, V)
    assert result.activations["resid_post"].shape == (3, B, T, 32) and result.activations["embed"].shape == (B, T, 32)


def test_scores(tiny_lm, by_hand, assert_close):
    """Two tokens a choice: the second is scored with the first in both runs' context."""
    choices = [[5, 60], [9, 61], [70, 62]]
    scores = nmjax.score_choices(tiny_lm, PROMPTS, choices, PACKS, row_ids=ROW_IDS)
    for c, choice in enumerate(choices):
        own, final = by_hand([prompt + choice for prompt in PROMPTS])
        for i, (_, _, share, floor) in enumerate(ROWS):
            at = len(PROMPTS[i]) - 1
            sober = sum(log_softmax(own[i][at + k])[token] for k, token in enumerate(choice))
            assert_close(scores.sober_logprobs[i, c], sober, scale=np.abs(own[i]).max())
            if not floor:
                wanted = sum(log_softmax(final[i][at + k])[token] for k, token in enumerate(choice))
                assert_close(scores.logprobs[i, c], wanted, scale=np.abs(own[i]).max())
            assert share == 0 or abs(scores.logprobs[i, c] - sober) > 1e-2


def test_rows_without_a_contrast_are_untouched(tiny_lm, greedy):
    """Whatever the others are contrasted with, and how strongly: not a bit. (`test_greedy` has their values.)"""
    beside = run(tiny_lm, packs=[pack if i in (1, 5) else pack.at(2) for i, pack in enumerate(PACKS)])
    for i in (1, 5):
        assert greedy.tokens[i] == beside.tokens[i]
        np.testing.assert_array_equal(greedy.logprobs[i], beside.logprobs[i])
    assert greedy.tokens[0] != beside.tokens[0]


def test_order_of_rows(tiny_lm, greedy):
    order = [3, 1, 2, 0, 4, 5, 6]
    out = run(tiny_lm, [PROMPTS[i] for i in order], [PACKS[i] for i in order], [ROW_IDS[i] for i in order])
    for place, i in enumerate(order):
        assert out.tokens[place] == greedy.tokens[i]
        np.testing.assert_allclose(out.logprobs[place], greedy.logprobs[i], atol=1e-5)


@pytest.mark.slow
def test_chunks_and_copies(tiny_lm, by_hand, assert_close):
    """Four rows in batches of three, the last one filled up; copies draw apart, and each is contrasted with its own."""
    rows, prompts, ids = [ROWS[0], (None, PUSH, 0.5, 0)], [PROMPTS[0], PROMPTS[2]], [1, 2]
    packs = [pack_of(*row) for row in rows]
    options = dict(temperature=1.0, num_return_sequences=2, max_new_tokens=NEW)
    out = run(tiny_lm, prompts, packs, ids, batch_size=3, **options)
    assert len(out.tokens) == 4 and len({str(tokens) for tokens in out.tokens}) == 4
    prompts, rows = [p for p in prompts for _ in range(2)], [row for row in rows for _ in range(2)]
    own, final = by_hand(whole(prompts, out), rows, [1, 1, 2, 2])
    for i, prompt in enumerate(prompts):
        check_steps(out, i, prompt, own[i], final[i], assert_close, temperature=1.0)


def test_ends_of_rows(tiny_lm, word_lm, greedy):
    """Hidden rows end with theirs: end tokens, their minimum, stop strings."""
    end = greedy.tokens[0][3]
    out = run(tiny_lm, eos_token_id=end)
    for i, tokens in enumerate(greedy.tokens):
        kept = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        assert out.tokens[i] == kept and out.finish_reason[i] == ("eos" if end in tokens else "length")
    later = run(tiny_lm, eos_token_id=end, min_new_tokens=6)
    assert len(later.tokens[0]) >= 6 and end not in later.tokens[0][:6] and later.tokens[0][:3] == out.tokens[0][:3]
    stopped = run(word_lm, stop=f"w{greedy.tokens[2][4]}")
    assert stopped.finish_reason[2] == "stop"
    assert stopped.tokens[2] == greedy.tokens[2][: greedy.tokens[2].index(greedy.tokens[2][4]) + 1]
    free = [i for i in range(len(PROMPTS)) if greedy.tokens[2][4] not in greedy.tokens[i]]
    assert free and all(stopped.tokens[i] == greedy.tokens[i] for i in free)


def test_sweeps_are_one_program(tiny_lm, greedy):
    """Doses, strengths, seeds, and what the other run does: all data."""
    before = prefill._cache_size(), decode._cache_size()
    seen = set()
    for k in range(3):
        packs = [
            nmjax.contrast(nmjax.scale_qk(0.3 + k).at(0.5 + k), 0.5 + k).at(1 - 0.3 * k),
            None,
            nmjax.compose(nmjax.scale_qk(1.5), nmjax.contrast(NOISY.at(0.2 * k), 0.7)),
            nmjax.contrast(None, 0.1 * k),
            nmjax.compose(nmjax.jitter_embeddings(0.1), nmjax.contrast(TURN.at(k)), nmjax.min_p(0.1 * k)),
            PACKS[5],
            PACKS[6].at(1 + k),
        ]
        seen.add(str(run(tiny_lm, packs=packs, seed=k).tokens))
    assert (prefill._cache_size(), decode._cache_size()) == before and len(seen) == 3


def test_others_with_different_vectors_share_a_slot(tiny_lm):
    from nmjax.rows import make_rows, row_keys

    packs = [nmjax.compose(nmjax.contrast(PUSH)), nmjax.compose(nmjax.contrast(TURN)), nmjax.compose(PUSH)]
    rows = make_rows(tiny_lm, PROMPTS[:3], [(0, 0)] * 3, packs, 16, row_keys(0, None, 3))
    assert [type(effect).__name__ for effect in rows.effects] == ["Steer", "Contrast"]
    assert rows.tokens.shape == (5, 16)
    assert rows.owner.tolist() == [0, 1, 2, 0, 1] and rows.rival.tolist() == [3, 4, 2, 3, 4]
    (steer, contrast) = rows.effects
    # A contrast stands on its own rows where these are few.
    assert contrast.rows.tolist() == [0, 1] and contrast.dose.tolist() == [1, 1] and steer.vectors.shape == (2, 3, 32)


def test_the_other_run_is_data(tiny_lm):
    """A contrast can be hashed, compared as a tree, scaled, and passed to compiled functions, arrays within or not."""
    one, two = nmjax.contrast(PUSH, 0.7), nmjax.contrast(TURN, 0.7)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    hashes = {nmjax.compose(e).content_hash() for e in (one, two, one.at(0.5), nmjax.contrast(PUSH.at(0.5), 0.7))}
    assert len(hashes) == 4 and nmjax.compose(nmjax.contrast(PUSH, 0.7)).content_hash() in hashes
    final = jax.jit(lambda packs: nmjax.forward(tiny_lm, PROMPTS[:1], packs).next_logits)
    first, second = final(one), final(two)
    assert final._cache_size() == 1 and np.abs(first - second).max() > 1e-2
    assert one.at(2).against.effects[0].dose == 1  # the dose is the contrast's, not the other run's
    assert nmjax.compose(nmjax.contrast(PUSH.at(3))).notes() == ["contrast: Steer: dose 3 extrapolates beyond 1"]


def test_mistakes_are_named(tiny_lm):
    for against, words in (
        (nmjax.contrast(FLAT), "against holds a contrast itself"),
        (nmjax.compose(FLAT, nmjax.contrast(None)), "against holds a contrast itself"),
        (nmjax.preface("text"), "against holds a preface"),
        (nmjax.temperature(2.0), "Temperature acts at `logits` only"),
        ("cocaine", "against='cocaine'"),
    ):
        with pytest.raises(ValueError, match=words):
            nmjax.contrast(against)
    with pytest.raises(ValueError, match=r"packs\[1\] holds 2 contrasts"):
        run(tiny_lm, PROMPTS[:2], [None, nmjax.compose(nmjax.contrast(FLAT), nmjax.contrast(PUSH))], [0, 1])
    with pytest.raises(ValueError, match=r"packs\[1\] Steer: prompt_positions holds 9, but the prompt has 3 tokens"):
        run(tiny_lm, PROMPTS[:2], [None, nmjax.contrast(PUSH.on(prompt_positions=[9]))], [0, 1])
    with pytest.raises(ValueError, match="alpha=-1"):
        nmjax.contrast(FLAT, -1)


@pytest.mark.slow
def test_gradient_of_the_other_runs_dose(tiny_lm):
    def final(dose):
        return nmjax.forward(tiny_lm, PROMPTS[:1], nmjax.contrast(PUSH.at(dose))).next_logits[0, 7]

    np.testing.assert_allclose(jax.grad(final)(0.5), (final(0.51) - final(0.49)) / 0.02, rtol=2e-2)
