"""A hidden preface is the same text in front of the prompt, by hand, and leaves no other trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import nmjax
from nmjax.interventions.where import stack_where, where

BOS, NEW = 1, 8
TEXT, IDS = "w60 w61 w62 w63 w64", [60, 61, 62, 63, 64]
P = nmjax.preface(TEXT)
SHORT, SHORT_IDS = nmjax.preface("w70"), [70]
VECTOR = np.random.default_rng(3).standard_normal(32).astype(np.float32)
SITES = ("embed", "resid_post", "pattern")
# (prompt, pack, the ids that are read): with and without a first BOS, several prefaces in order, dose 0, company.
ROWS = [
    ([BOS, 5, 6, 7], P, [BOS, *IDS, 5, 6, 7]),
    ([5, 6, 7], P, [*IDS, 5, 6, 7]),
    ([BOS, 10, 11, 12, 13, 14], None, [BOS, 10, 11, 12, 13, 14]),
    ([BOS, 20], P.at(0.3), [BOS, *IDS, 20]),
    ([BOS, 20], P.at(0), [BOS, 20]),
    ([BOS, 30, 31], nmjax.compose(SHORT, P), [BOS, *SHORT_IDS, *IDS, 30, 31]),
    ([BOS], SHORT, [BOS, *SHORT_IDS]),
    ([BOS, 5, 6, 7], nmjax.compose(P, nmjax.contrast(nmjax.scale_qk(0.3), 0.8)), [BOS, *IDS, 5, 6, 7]),
]
PROMPTS, PACKS, READ = ([row[k] for row in ROWS] for k in range(3))
BY_HAND = [None] * 7 + [nmjax.contrast(nmjax.scale_qk(0.3), 0.8)]


@pytest.fixture(scope="module")
def out(word_lm):
    return nmjax.generate(word_lm, PROMPTS, PACKS, max_new_tokens=NEW, eos_token_id=[], temperature=[0, 1.0] * 4)


@pytest.fixture(scope="module")
def by_hand(word_lm):
    return nmjax.generate(word_lm, READ, BY_HAND, max_new_tokens=NEW, eos_token_id=[], temperature=[0, 1.0] * 4)


@pytest.fixture(scope="module")
def passes(word_lm):
    """A pass with prefaces, and one over what is read, as NumPy arrays."""
    return [
        jax.tree.map(np.asarray, nmjax.forward(word_lm, *rows, capture=SITES))
        for rows in ((PROMPTS, PACKS), (READ, BY_HAND))
    ]


def test_it_matters(out):
    assert out.tokens[3] != out.tokens[4]


def test_text_by_hand(out, by_hand):
    """The same tokens, with the same probabilities, drawn with the same random numbers."""
    assert out.tokens == by_hand.tokens and out.finish_reason == by_hand.finish_reason
    for what in ("logprobs", "sample_logprobs"):
        for seen, wanted in zip(getattr(out, what), getattr(by_hand, what), strict=True):
            np.testing.assert_allclose(seen, wanted, rtol=0, atol=1e-5)


def test_no_output_shows_it(out):
    assert out.prompt_tokens == PROMPTS
    for i, prompt in enumerate(PROMPTS):
        words = [f"w{t}" for t in prompt if t != BOS]
        assert out.full_text[i].split()[: len(words)] == words
        assert out.text[i].split() == [f"w{t}" for t in out.tokens[i] if t > 2]
        if not set(out.tokens[i]) & {60, 61, 62, 63, 64, 70}:
            assert not any(f"w{t}" in out.full_text[i] for t in (*IDS, *SHORT_IDS))


def test_a_pass_shows_the_visible_tokens(passes, assert_close):
    seen, wanted = passes
    assert seen.mask.sum(1).tolist() == [len(prompt) for prompt in PROMPTS]
    assert seen.logits.shape == (8, 6, 97) and seen.activations["pattern"].shape == (3, 8, 4, 6, 6)
    for i, (prompt, read) in enumerate(zip(PROMPTS, READ, strict=True)):
        start = 1 if prompt[0] == BOS else 0
        # Places of the prompt in what is read.
        keep = [*range(start), *range(len(read) - len(prompt) + start, len(read))]
        mine, theirs = seen.mask[i], wanted.mask[i]
        np.testing.assert_array_equal(np.flatnonzero(mine), np.arange(6 - len(prompt), 6))
        assert_close(seen.logits[i][mine], wanted.logits[i][theirs][keep])
        assert_close(seen.next_logits[i], wanted.next_logits[i])
        for site in ("embed", "resid_post"):
            a, b = seen.activations[site], wanted.activations[site]
            a, b = (a[None], b[None]) if site == "embed" else (a, b)
            assert_close(a[:, i][:, mine], b[:, i][:, theirs][:, keep])
        a = seen.activations["pattern"][:, i][:, :, mine][..., mine]
        b = wanted.activations["pattern"][:, i][:, :, theirs][..., theirs][:, :, keep][..., keep]
        assert_close(a, b)
    hidden = 1 - seen.activations["pattern"][:, 0, :, -1].sum(-1)
    assert hidden.min() > 0.01  # what the last token attends to in the preface is not shown


def test_any_dose_above_0_is_all_of_it_and_0_is_none(word_lm, out, passes):
    q = nmjax.compose(P, nmjax.scale_qk(1.7))
    zero, none = (nmjax.forward(word_lm, PROMPTS[:2], [p, q]) for p in (P.at(0), None))
    np.testing.assert_array_equal(zero.logits[0][zero.mask[0]], none.logits[0][none.mask[0]])
    np.testing.assert_array_equal(zero.next_logits, none.next_logits)
    packs = [pack.at(0.01) if i in (0, 1, 5, 6) else pack for i, pack in enumerate(PACKS)]
    again = nmjax.generate(word_lm, PROMPTS, packs, max_new_tokens=NEW, eos_token_id=[], temperature=[0, 1.0] * 4)
    assert again.tokens == out.tokens


SELECTIONS = [
    dict(prompt_positions=[0, 2]),
    dict(prompt_positions=[-1, -3]),
    dict(prompt_window=(1, -1)),
    dict(prompt_window=(-2, None), generation_window=(1, 3)),
    dict(prompt_tokens=[5, 62]),
    dict(generation="all"),
    dict(prompt="all"),
    dict(exclude_prompt_positions=[0]),
    dict(prompt="all", exclude_prompt_tokens=[62]),
    dict(),
]


def chosen(kwargs, place, token, length, hidden):
    """Does a selection hold this token of the row as its author sees it? `place` counts visible tokens from 0."""
    everything = kwargs.get("prompt") == "all" or not any(not k.startswith("exclude") for k in kwargs)
    if hidden:
        return everything
    if place >= length:
        start, stop = kwargs.get("generation_window", (0, 0))
        return start <= place - length < stop or kwargs.get("generation") == "all" or (
            everything and "prompt" not in kwargs)  # fmt: skip
    if place in [k % length for k in kwargs.get("exclude_prompt_positions", ())]:
        return False
    if token in kwargs.get("exclude_prompt_tokens", ()):
        return False
    start, stop = kwargs.get("prompt_window", (0, 0))
    inside = (start % length if start else 0) <= place < (length if stop is None else stop % length if stop else 0)
    at = place in [k % length for k in kwargs.get("prompt_positions", ())]
    return everything or inside or at or token in kwargs.get("prompt_tokens", ())


@pytest.mark.slow
def test_selections_mean_the_visible_prompt(word_lm, assert_close):
    """Steering the selected places, with a preface, against steering the same tokens, named one by one, by hand."""
    prompts = [[BOS, 5, 6, 7], [5, 6, 7]] * len(SELECTIONS)
    kwargs = [s for s in SELECTIONS for _ in range(2)]
    steer = nmjax.steer(VECTOR, 2.0)
    packs = [nmjax.compose(P, steer.on(**k) if k else steer) for k in kwargs]
    out = nmjax.generate(word_lm, prompts, packs, max_new_tokens=NEW, eos_token_id=[])
    texts, places = [], []
    for prompt, k, tokens in zip(prompts, kwargs, out.tokens, strict=True):
        start = 1 if prompt[0] == BOS else 0
        visible = [*prompt, *tokens]
        held = [chosen(k, place, token, len(prompt), False) for place, token in enumerate(visible)]
        held[start:start] = [chosen(k, 0, t, len(prompt), True) for t in IDS]
        texts.append([*visible[:start], *IDS, *visible[start:]])
        places.append(np.flatnonzero(held).tolist())
    assert len({str(p) for p in places[::2]}) >= 8
    wide = max(map(len, places))  # one size, so one program
    wanted = nmjax.forward(
        word_lm, texts, [steer.on(prompt_positions=p + [p[0]] * (wide - len(p))) for p in places], capture=()
    )
    for i, tokens in enumerate(out.tokens):
        logits = np.asarray(wanted.logits[i], np.float64)
        assert_close(
            out.logprobs[i], log_softmax(logits[-NEW - 1 : -1], axis=-1)[np.arange(NEW), tokens], np.abs(logits).max()
        )
    with pytest.raises(ValueError, match="prompt_positions holds 4, but the prompt has 4 tokens"):
        nmjax.forward(word_lm, prompts[:1], nmjax.compose(P, steer.on(prompt_positions=[4])))


def test_selections_in_any_prompt(word_lm):
    """300 random selections, prefaces and prompts, against going through the tokens one by one."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(300):
        length, hidden, start = int(rng.integers(1, 8)), int(rng.integers(0, 5)), int(rng.integers(0, 2))

        def places(low, length=length):
            return rng.integers(low * length, length, rng.integers(1, 3)).tolist()

        options = dict(
            prompt="all", prompt_positions=places(-1), prompt_window=(int(rng.integers(-length, length)), None),
            prompt_tokens=rng.integers(3, 7, 2).tolist(), generation="all", generation_positions=places(0),
            generation_window=(int(rng.integers(0, 3)), int(rng.integers(3, 6))), exclude_prompt_positions=places(-1),
            exclude_prompt_tokens=[int(rng.integers(3, 7))], exclude_generation_positions=places(0),
        )  # fmt: skip
        names = rng.choice(list(options), rng.integers(1, 5), replace=False)
        try:
            selection = where(**{str(name): options[name] for name in names})
        except ValueError as error:
            assert "empty" in str(error)
            continue
        rows.append(({str(name): options[name] for name in names}, selection, length, hidden, min(start, length)))
    tokens = rng.integers(3, 7, (len(rows), 18))
    position = rng.permuted(np.tile(np.arange(18), (len(rows), 1)), axis=1)
    total = np.asarray([length + hidden for _, _, length, hidden, _ in rows])
    spans = np.asarray([(start, hidden) for *_, hidden, start in rows])
    seen = np.asarray(stack_where([row[1] for row in rows]).mask(*map(jnp.asarray, (position, tokens, total, spans))))
    wanted = np.zeros(seen.shape, bool)
    for i, (options, _, length, hidden, start) in enumerate(rows):
        including = [name for name in options if not name.startswith("exclude")]
        for t in range(18):
            place, token = position[i, t], tokens[i, t]
            whole = {region: options.get(region) == "all" or not including for region in ("prompt", "generation")}
            if start <= place < start + hidden:
                wanted[i, t] = whole["prompt"]
                continue
            place -= hidden if place >= start else 0
            region, end = ("prompt", length) if place < length else ("generation", 0)
            place -= 0 if region == "prompt" else length

            def named(prefix, place=place, token=token, end=end, options=options):
                first, stop = options.get(f"{prefix}_window", (0, 0))
                inside = first + (end if first < 0 else 0) <= place < (99 if stop is None else stop)
                at = place in [p + end if p < 0 else p for p in options.get(f"{prefix}_positions", ())]
                return inside or at or token in options.get(f"{prefix}_tokens", ())

            wanted[i, t] = (whole[region] or named(region)) and not named(f"exclude_{region}")
    np.testing.assert_array_equal(seen, wanted)
    assert len(rows) > 200 and 0.2 < wanted.mean() < 0.8


def test_scores_by_hand(word_lm, assert_close):
    choices = [[5, 40], [9, 41], [5, 42]]
    scores = nmjax.score_choices(word_lm, PROMPTS, choices, PACKS)
    plain = nmjax.score_choices(word_lm, READ, choices, BY_HAND)
    for what in ("logprobs", "sober_logprobs", "probs", "mass"):
        assert_close(getattr(scores, what), getattr(plain, what))
    assert abs(scores.logprobs[3] - scores.logprobs[4]).max() > 1e-2


def test_stop_strings(word_lm, out):
    """One that stands in the preface stops nothing; one that is written stops its row."""
    word = f"w{out.tokens[0][3]}"
    stopped = nmjax.generate(
        word_lm, PROMPTS, PACKS, max_new_tokens=NEW, eos_token_id=[], temperature=[0, 1.0] * 4, stop=[word, "w61 w62"]
    )
    # A prompt without visible text: the continuation starts as it does without a stop string, not with a space.
    options = dict(max_new_tokens=NEW, eos_token_id=[], temperature=[0, 1.0] * 4)
    nothing = nmjax.generate(word_lm, PROMPTS, PACKS, stop=f"w{out.tokens[6][2]}", **options)
    assert nothing.finish_reason[6] == "stop" and nothing.text[6] == nothing.full_text[6]
    assert out.text[6].startswith(nothing.text[6])
    first = [f"w{t}" for t in out.tokens[0]].index(word)
    assert stopped.finish_reason[0] == "stop" and stopped.tokens[0] == out.tokens[0][: first + 1]
    assert stopped.text[0].split() == [f"w{t}" for t in out.tokens[0][:first]]
    for i in range(1, 8):
        if word not in out.text[i].split():
            assert stopped.tokens[i] == out.tokens[i] and stopped.finish_reason[i] == "length"


def test_texts_as_prompts(word_lm, out):
    """A text is encoded as it is without a preface; here, without special tokens."""
    texts = nmjax.generate(
        word_lm, ["w5 w6 w7" if i < 2 else p for i, p in enumerate(PROMPTS)], PACKS, max_new_tokens=NEW,
        eos_token_id=[], temperature=[0, 1.0] * 4,
    )  # fmt: skip
    assert texts.tokens[1] == out.tokens[1] and texts.prompt_tokens[0] == [5, 6, 7]


def test_mistakes_are_named(word_lm, tiny_lm):
    with pytest.raises(ValueError, match="preface: text='hi' is text, but this model has no tokenizer"):
        nmjax.forward(tiny_lm, [[5]], nmjax.preface("hi"))
    for text in ("", 3, None):
        with pytest.raises(ValueError, match="preface: text"):
            nmjax.preface(text)
    with pytest.raises(ValueError, match="preface: text.*no tokens"):
        nmjax.forward(word_lm, [[5]], nmjax.preface(" "))
    with pytest.raises(ValueError, match="can't be differentiated"):
        jax.grad(lambda dose: nmjax.forward(word_lm, [[5]], P.at(dose)).next_logits[0, 3])(0.5)
    with pytest.raises(ValueError, match="no selection of tokens"):
        nmjax.forward(word_lm, [[5]], P.on(generation="all"))
    long = nmjax.preface(" ".join(["w60"] * 120))
    blank = dataclasses.replace(word_lm, params=None)  # whoever computes with it fails otherwise
    for call in (
        lambda: nmjax.forward(blank, [[5] * 9], long),
        lambda: nmjax.generate(blank, [[5] * 4], long, max_new_tokens=5),
        lambda: nmjax.score_choices(blank, [[5] * 8], [[3, 4], [5, 6]], long),
    ):
        with pytest.raises(ValueError, match=r"prompts\[0\]: 12[48] tokens|prompts\[0\]: 129 tokens"):
            call()
    assert nmjax.preface("hi").at(0).dose == 0  # and absent, so no tokenizer is needed
    nmjax.rows.prefaced(tiny_lm, [[5]], [nmjax.compose(nmjax.preface("hi").at(0))])
