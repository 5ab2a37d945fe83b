"""`generate` against plain passes over the text so far: the same tokens, the same probabilities, the right end."""

import numpy as np
import pytest
from scipy.special import log_softmax

import nmjax
from nmjax import generation

V, NEW, WIDTH = 97, 16, 32
rng = np.random.default_rng(1)
PROMPTS = [rng.integers(3, V, n).tolist() for n in (2, 5, 9, 16, 12, 7)]
SAME = [PROMPTS[1]] * 6
FILLER = [3] * WIDTH  # makes every pass of `logits` the same program


@pytest.fixture(scope="module")
def run(tiny_lm):
    """Six rows of at most 16 + 16 tokens: one compiled program, whatever else is asked."""

    def generate(prompts=PROMPTS, lm=tiny_lm, **options):
        return nmjax.generate(lm, prompts, **{"max_new_tokens": NEW, "eos_token_id": [], **options})

    return generate


@pytest.fixture(scope="module")
def logits(tiny_lm):
    """float64 [T, V] of each of up to six rows."""

    def forward(rows):
        result = nmjax.forward(tiny_lm, rows + [FILLER] * (7 - len(rows)))
        kept = zip(result.logits, result.mask, strict=True)
        return [np.asarray(x, np.float64)[np.asarray(mask)] for x, mask in kept][: len(rows)]

    return forward


@pytest.fixture(scope="module")
def greedy(logits):
    """The slow loop: a pass over everything so far for every token. `banned[i]` are not written before `until[i]`."""

    def loop(banned=(), until=(0,) * 6):
        rows = [list(prompt) for prompt in PROMPTS]
        for step in range(NEW):
            for i, x in enumerate(logits(rows)):
                last = x[-1].copy()
                last[list(banned) if step < until[i] else []] = -np.inf
                rows[i].append(int(last.argmax()))
        return [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)]

    return loop


@pytest.fixture(scope="module")
def plain(run):
    return run()


@pytest.fixture(scope="module")
def sampled(run):
    return run(temperature=1.0, seed=5)


def assert_same(a, b, rows=slice(None), of_b=None):
    """Equal tokens, and equal bits of their probabilities."""
    of_b = rows if of_b is None else of_b
    assert a.tokens[rows] == b.tokens[of_b]
    for field in ("logprobs", "sample_logprobs"):
        for x, y in zip(getattr(a, field)[rows], getattr(b, field)[of_b], strict=True):
            np.testing.assert_array_equal(x, y)


def differ(tokens):
    """How many different rows there are."""
    return len({tuple(row) for row in tokens})


def test_greedy_is_repeated_forward(plain, greedy):
    assert plain.tokens == greedy()
    assert plain.finish_reason == ["length"] * 6
    assert differ(plain.tokens) == 6
    assert plain.prompt_tokens == PROMPTS


@pytest.mark.parametrize("which", ["plain", "sampled"])
def test_logprobs_are_those_of_a_pass_over_the_whole(which, logits, assert_close, request):
    out = request.getfixturevalue(which)
    wholes = [prompt + tokens for prompt, tokens in zip(PROMPTS, out.tokens, strict=True)]
    for i, x in enumerate(logits(wholes)):
        steps = log_softmax(x, axis=1)[len(PROMPTS[i]) - 1 : -1]
        assert_close(out.logprobs[i], steps[np.arange(NEW), out.tokens[i]], scale=np.abs(x).max())
        assert out.logprobs[i].dtype == np.float32


def test_sample_logprobs(run, plain, sampled, logits, assert_close):
    """0 where greedy; as drawn from where not: here after a temperature and top-k, other ones in each row."""
    for row in plain.sample_logprobs:
        np.testing.assert_array_equal(row, np.zeros(NEW))
    for i in range(6):
        np.testing.assert_allclose(sampled.sample_logprobs[i], sampled.logprobs[i], atol=1e-5)
    heat, k = [0.5, None, 1.5, 3.0, 0, 0.8], [0, 3, 4, 20, 2, 1]
    out = run(temperature=heat, top_k=k, seed=2)
    wholes = [prompt + tokens for prompt, tokens in zip(PROMPTS, out.tokens, strict=True)]
    for i, x in enumerate(logits(wholes)):
        if not heat[i]:
            assert out.tokens[i] == plain.tokens[i]
            np.testing.assert_array_equal(out.sample_logprobs[i], 0)
            continue
        x = x[len(PROMPTS[i]) - 1 : -1] / heat[i]
        x = np.where(x >= np.sort(x, axis=1)[:, -(k[i] or V)][:, None], x, -np.inf)
        wanted = log_softmax(x, axis=1)[np.arange(NEW), out.tokens[i]]
        assert_close(out.sample_logprobs[i], wanted, scale=np.abs(x[np.isfinite(x)]).max())
    assert out.tokens[5] == plain.tokens[5]  # one token left to draw from
    assert sum(out.tokens[i] != plain.tokens[i] for i in (0, 2, 3)) == 3


def cut_after(tokens, ends):
    """`tokens` up to and including the first of `ends`."""
    found = [i for i, token in enumerate(tokens) if token in ends]
    return tokens[: found[0] + 1] if found else tokens


@pytest.fixture(scope="module")
def ends(plain):
    """Two tokens that end different rows at different steps, and leave others alone."""

    def early(token):
        return [i for i, row in enumerate(plain.tokens) if 0 < len(cut_after(row, [token])) - 1 < NEW - 4]

    tokens = [t for t in dict.fromkeys(sum(plain.tokens, [])) if 0 < len(early(t)) < 4]
    pairs = [(a, b) for a in tokens for b in tokens if set(early(a)) - set(early(b)) and set(early(b)) - set(early(a))]
    return next(pair for pair in pairs if len(set(early(pair[0]) + early(pair[1]))) < 6)


@pytest.mark.parametrize("several", [False, True])
def test_eos_ends_its_row_only(run, plain, ends, several):
    chosen = ends if several else ends[:1]
    out = run(eos_token_id=list(chosen) if several else chosen[0])
    wanted = [cut_after(row, chosen) for row in plain.tokens]
    assert out.tokens == wanted
    ended = [len(row) < NEW for row in wanted]
    assert any(ended) and not all(ended)
    for i, row in enumerate(wanted):
        assert len(out.logprobs[i]) == len(out.sample_logprobs[i]) == len(row)
        np.testing.assert_array_equal(out.logprobs[i], plain.logprobs[i][: len(row)])
        assert out.finish_reason[i] == ("eos" if row[-1] in chosen else "length")


def test_eos_of_the_model_is_the_default(run, tiny_lm):
    assert tiny_lm.eos_ids == (2,)
    options = dict(temperature=3.0, seed=1)
    out, without = run(eos_token_id=None, **options), run(**options)
    assert out.tokens == [cut_after(row, [2]) for row in without.tokens]
    assert "eos" in out.finish_reason


def test_min_new_tokens_bans_eos(run, greedy, ends, plain):
    least = [0, 3, 9, NEW, 1, 5]
    out = run(eos_token_id=list(ends), min_new_tokens=least)
    assert out.tokens == [cut_after(row, ends) for row in greedy(ends, least)]
    assert [len(row) >= n for row, n in zip(out.tokens, least, strict=True)] == [True] * 6
    assert any(len(cut_after(row, ends)) <= n for row, n in zip(plain.tokens, least, strict=True)), "nothing was banned"


def test_max_new_tokens_per_row(run, plain):
    lengths = [1, 4, 13, 2, 7, 1]
    out = run(max_new_tokens=lengths)
    assert out.tokens == [row[:n] for row, n in zip(plain.tokens, lengths, strict=True)]
    assert [len(row) for row in out.logprobs] == lengths
    assert run(max_new_tokens=1).tokens == [row[:1] for row in plain.tokens]


def test_copies(run, sampled, plain):
    """The first copy is the row itself; the others draw from streams of their own, if they draw."""
    out = run(PROMPTS[:3], temperature=1.0, seed=5, num_return_sequences=2)
    assert_same(out, sampled, slice(0, 6, 2), slice(0, 3))
    assert differ(out.tokens) == 6
    assert out.prompt_tokens == [PROMPTS[i // 2] for i in range(6)]
    calm = run(PROMPTS[:3], num_return_sequences=2)
    assert calm.tokens == [plain.tokens[i // 2] for i in range(6)]
    mixed = run(PROMPTS[:3], num_return_sequences=2, temperature=[0.0, 1.0, 0.0], max_new_tokens=[16, 3, 5])
    assert [len(row) for row in mixed.tokens] == [16, 16, 3, 3, 5, 5]
    assert mixed.tokens[:2] == calm.tokens[:2] and mixed.tokens[2] != mixed.tokens[3]


def test_batches_of_rows(run, sampled, ends, assert_close):
    """Four rows at a time, so the second batch is filled up: the same but for rounding."""
    out = run(temperature=1.0, seed=5, batch_size=4)
    assert out.tokens == sampled.tokens
    for a, b in zip(out.logprobs + out.sample_logprobs, sampled.logprobs + sampled.sample_logprobs, strict=True):
        assert_close(a, b, scale=20.0)
    least, most = [0, 2, 0, 5, 4, 0], [16, 3, 5, 9, 16, 2]
    options = dict(eos_token_id=list(ends), min_new_tokens=least, max_new_tokens=most, temperature=[0, 1, 0, 1, 0, 1])
    whole, parts = run(**options), run(**options, batch_size=4)
    assert (parts.tokens, parts.finish_reason) == (whole.tokens, whole.finish_reason)
    assert parts.prompt_tokens == PROMPTS


def test_the_same_seed_is_the_same_bytes(run, sampled):
    assert_same(run(temperature=1.0, seed=5), sampled)
    other = run(temperature=1.0, seed=6)
    assert sum(a != b for a, b in zip(other.tokens, sampled.tokens, strict=True)) == 6


def test_what_seeds_mean(run):
    """A scalar: the row id is the index. A list: it is 0. `row_ids` overrides both."""
    scalar = run(SAME, temperature=1.0, seed=5)
    assert differ(scalar.tokens) == 6
    listed = run(SAME, temperature=1.0, seed=[5] * 6)
    assert differ(listed.tokens) == 1
    assert_same(listed, scalar, slice(0, 1))
    seeds = run(SAME, temperature=1.0, seed=[5, 6, 7, 8, 9, 5])
    assert differ(seeds.tokens) == 5
    assert_same(seeds, listed, slice(5, 6), slice(0, 1))
    assert_same(run(SAME, temperature=1.0, seed=[5] * 6, row_ids=list(range(6))), scalar)
    back = run(SAME, temperature=1.0, seed=5, row_ids=[5, 4, 3, 2, 1, 0])
    assert back.tokens == scalar.tokens[::-1]
    same = run(SAME, temperature=1.0, seed=5, row_ids=3)
    assert same.tokens == [scalar.tokens[3]] * 6


def test_a_sampled_row_does_not_see_its_neighbours(run, sampled):
    others = [[7] * 16, PROMPTS[1], [8, 9], PROMPTS[3], [60] * 10, [11]]
    out = run(others, temperature=[2.0, 1.0, 0.0, 1.0, 0.7, 1.0], top_p=[0.5, 1, 1, 1, 0.9, 1], seed=5)
    for i in (1, 3):
        assert_same(out, sampled, slice(i, i + 1))
    # Nor its place: the row id goes with the row.
    moved = run(PROMPTS[::-1], temperature=1.0, seed=5, row_ids=[5, 4, 3, 2, 1, 0])
    assert_same(moved, sampled, slice(None, None, -1), slice(None))


def test_a_longer_run_begins_with_the_shorter(run, sampled):
    """What is drawn depends on the position, not on when the loop ends."""
    short = run(temperature=1.0, seed=5, max_new_tokens=6)
    assert short.tokens == [row[:6] for row in sampled.tokens]


def words(tokens):
    """What the tokenizer of `word_lm` makes of ids; it leaves the specials 0 to 2 out."""
    return " ".join(f"w{t}" for t in tokens if t > 2)


def by_words(prompt, tokens, stops):
    """(tokens up to the one which completes a stop, the text before it, the reason), one more token at a time."""
    before = words(prompt)
    for kept in range(1, len(tokens) + 1):
        text = words(prompt + tokens[:kept])[len(before) :]
        starts = [text.index(stop) for stop in stops if stop in text]
        if starts:
            return tokens[:kept], text[: min(starts)], "stop"
    return tokens, words(prompt + tokens)[len(before) :], "length"


def test_text_is_the_decoded_continuation(run, word_lm, plain):
    out = run(lm=word_lm)
    assert out.tokens == plain.tokens
    assert out.text == [by_words(p, t, ())[1] for p, t in zip(PROMPTS, out.tokens, strict=True)]
    assert out.full_text == [words(p + t) for p, t in zip(PROMPTS, out.tokens, strict=True)]
    assert run([words(p) for p in PROMPTS], lm=word_lm).tokens == plain.tokens
    assert plain.text == plain.full_text == [""] * 6  # no tokenizer, no text


@pytest.mark.parametrize("every", [1, 3, 16])
def test_stop_strings(run, word_lm, plain, every, monkeypatch):
    """Two words of row 0 (so across tokens), a word of row 1, a part of a word of row 2; looked for ever so often."""
    monkeypatch.setattr(generation, "STOP_CHECK_EVERY", every)
    a, b, c = plain.tokens[:3]
    stops = [words(a[4:6]), f" w{b[6]}", f"{c[8]}"]
    wanted = [by_words(p, t, stops) for p, t in zip(PROMPTS, plain.tokens, strict=True)]
    assert {reason for *_, reason in wanted} == {"stop", "length"}
    out = run(lm=word_lm, stop=stops)
    assert out.tokens == [tokens for tokens, *_ in wanted]
    assert out.text == [text for _, text, _ in wanted]
    assert out.finish_reason == [reason for *_, reason in wanted]
    assert out.full_text == [words(p) + text for p, (_, text, _) in zip(PROMPTS, wanted, strict=True)]
    for i, (tokens, *_) in enumerate(wanted):
        np.testing.assert_array_equal(out.logprobs[i], plain.logprobs[i][: len(tokens)])
        assert len(out.sample_logprobs[i]) == len(tokens)


def test_one_stop_string_and_none(run, word_lm, plain):
    stop = words(plain.tokens[0][4:6])
    wanted = [by_words(p, t, [stop]) for p, t in zip(PROMPTS, plain.tokens, strict=True)]
    assert run(lm=word_lm, stop=stop).text == [text for _, text, _ in wanted]
    assert run(lm=word_lm, stop=None).tokens == run(lm=word_lm, stop=[]).tokens == plain.tokens
    # A prompt that holds the stop string doesn't stop its row.
    assert run(lm=word_lm, stop=words(PROMPTS[2][:2])).tokens[2] == plain.tokens[2]


def test_messages_go_through_the_chat_template(run, word_lm):
    said = [prompt[:10] for prompt in PROMPTS]
    chats = [[{"role": "user", "content": words(ids)}, {"role": "assistant", "content": "w40"}] for ids in said]
    out = run(None, lm=word_lm, messages=[chat[: 1 + i % 2] for i, chat in enumerate(chats)], max_new_tokens=3)
    wanted = [[1, 10, *said[i], *([11, 40] if i % 2 else []), 11] for i in range(6)]
    assert out.prompt_tokens == wanted
    assert out.tokens == run(wanted, max_new_tokens=3).tokens


def test_temperatures_multiply(in_company, logits, assert_close):
    pack = nmjax.compose(nmjax.temperature(0.5))
    both = in_company(PROMPTS, pack, temperature=0.8, seed=3)
    call = in_company(PROMPTS, None, temperature=0.4, seed=3)
    once = in_company(PROMPTS, None, temperature=0.8, seed=3)
    assert both.tokens == call.tokens
    assert sum(a != b for a, b in zip(once.tokens, call.tokens, strict=True)) > 2, "the pack does nothing"
    wholes = [prompt + tokens for prompt, tokens in zip(PROMPTS, both.tokens, strict=True)]
    for i, x in enumerate(logits(wholes)):
        np.testing.assert_allclose(both.sample_logprobs[i], call.sample_logprobs[i], atol=1e-4)
        np.testing.assert_array_equal(both.logprobs[i], call.logprobs[i])  # at temperature 1, before the pack
        steps = log_softmax(x[len(PROMPTS[i]) - 1 : -1] / 0.4, axis=1)
        assert_close(both.sample_logprobs[i], steps[np.arange(NEW), both.tokens[i]], scale=np.abs(x).max() / 0.4)


@pytest.mark.slow
def test_greedy_stays_greedy_under_a_pack_with_a_temperature(in_company, plain):
    """As in HF, drawing starts with the caller's temperature; the result says what has no effect."""
    hot, nucleus = nmjax.temperature(1.8), nmjax.top_p(0.5)
    packs = [hot, nmjax.compose(hot, nucleus), nmjax.compose(nmjax.frequency_penalty(1.0), hot), hot, None, None]
    heat, p = [None, None, None, 1.0, None, 1.0], [1, 1, 1, 1, 0.5, 0.5]
    out = in_company(PROMPTS, packs, temperature=heat, top_p=p)
    for i in (0, 1, 4):
        assert out.tokens[i] == plain.tokens[i]
        np.testing.assert_array_equal(out.sample_logprobs[i], 0)
    assert out.tokens[2] != plain.tokens[2]  # the penalty is not inert
    first = out.notes.index("row 58: Temperature is inert under greedy decoding")
    assert [note for note in out.notes[first:] if "inert" in note] == [
        "row 58: Temperature is inert under greedy decoding",
        "row 59: TopP is inert under greedy decoding",
        "row 59: Temperature is inert under greedy decoding",
        "row 60: Temperature is inert under greedy decoding",
        "row 62: top_p and top_k are inert under greedy decoding, give a temperature",
    ]


def test_a_temperature_before_a_penalty_is_not_inert():
    iv = nmjax.compose(nmjax.temperature(1.8), nmjax.frequency_penalty(1.0), nmjax.top_p(0.5))
    assert generation._inert([iv], [0.0], [1.0], [0]) == ["row 0: TopP is inert under greedy decoding"]
    assert generation._inert([iv], [0.1], [1.0], [0]) == []


def test_notes_name_the_row(in_company):
    out = in_company(PROMPTS, [None, nmjax.temperature(0.5).at(3), None, None, None, None])
    assert "row 59: Temperature: dose 3 extrapolates beyond 1" in out.notes
    assert "row 59: temperature -0.5 raised to 0.05" in out.notes


TWO = [[3, 4, 5], [6]]
CHAT = [{"role": "user", "content": "w3"}]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(prompts=None), "prompts, messages: wanted exactly one"),
        (dict(messages=[CHAT]), "prompts, messages: wanted exactly one"),
        (dict(prompts="w3 w4"), "prompts='w3 w4', wanted a list"),
        (dict(prompts=7), "prompts=7, wanted a list"),
        (dict(prompts=[]), "prompts is empty"),
        (dict(prompts=["w3", ""]), r"prompts\[1\]='' has no tokens"),
        (dict(prompts=[[3], [V]]), rf"prompts\[1\] holds token id {V}"),
        (dict(prompts=[[3], [-1]]), r"prompts\[1\] holds token id -1"),
        (dict(prompts=[[3], [4.0]]), r"prompts\[1\]=\[4.0\]"),
        (dict(prompts=None, messages=CHAT), "messages=.*wanted a list of chats"),
        (dict(prompts=None, messages=[]), r"messages=\[\]"),
        (dict(prompts=None, messages=[[{"content": "w3"}]]), "messages=.*wanted a list of chats"),
        (dict(packs=[None]), "packs has 1 entries, .* 2 rows"),
        (dict(packs=[None, "cocaine"]), r"packs\[1\]='cocaine'"),
        (dict(packs=0.5), "packs=0.5"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(max_new_tokens=2.0), "max_new_tokens=2.0"),
        (dict(max_new_tokens=True), "max_new_tokens=True"),
        (dict(max_new_tokens=None), "max_new_tokens=None"),
        (dict(max_new_tokens=[4, 4, 4]), "max_new_tokens has 3 values, .* 2 rows"),
        (dict(max_new_tokens=2**40), f"max_new_tokens={2**40}"),
        (dict(max_new_tokens=2**31 - 1), r"prompts\[0\]: 3 tokens \+ 2147483647 new tokens exceed .* 128"),
        (dict(max_new_tokens=[4, 128]), r"prompts\[1\]: 1 tokens \+ 128 new tokens exceed .* 128"),
        (dict(min_new_tokens=-1), "min_new_tokens=-1"),
        (dict(min_new_tokens=[1]), "min_new_tokens has 1 values"),
        (dict(temperature=-0.5), "temperature=-0.5"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=float("inf")), "temperature=inf"),
        (dict(temperature=1e39), r"temperature=1e\+39"),
        (dict(temperature="hot"), "temperature='hot'"),
        (dict(temperature=[0.5]), "temperature has 1 values"),
        (dict(temperature=[0.5, -1]), "temperature=-1"),
        (dict(top_p=0), "top_p=0"),
        (dict(top_p=[1, 0.0]), r"top_p=.*0.0"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(top_p=[0.5] * 3), "top_p has 3 values"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_k=2.5), "top_k=2.5"),
        (dict(seed="a"), "seed='a'"),
        (dict(seed=0.5), "seed=0.5"),
        (dict(seed=[1, 2, 3]), "seed has 3 values"),
        (dict(row_ids=[1]), "row_ids has 1 values"),
        (dict(row_ids=[1, None]), "row_ids=None"),
        (dict(stop=""), "stop='', wanted non-empty"),
        (dict(stop=["a", ""]), r"stop=\['a', ''\]"),
        (dict(stop=5), "stop=5"),
        (dict(stop=[5]), r"stop=\[5\]"),
        (dict(eos_token_id=V), f"eos_token_id={V}"),
        (dict(eos_token_id=-1), "eos_token_id=-1"),
        (dict(eos_token_id=[2, 2.5]), r"eos_token_id=\[2, 2.5\]"),
        (dict(eos_token_id="</s>"), "eos_token_id='</s>'"),
        (dict(eos_token_id=True), "eos_token_id=True"),
        (dict(num_return_sequences=0), "num_return_sequences=0"),
        (dict(width=1), "width=1, wanted an integer of at least"),
        (dict(width=64.0), "width=64.0"),
        (dict(num_return_sequences=1.0), "num_return_sequences=1.0"),
        (dict(num_return_sequences=True), "num_return_sequences=True"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(batch_size=[1, 1]), r"batch_size=\[1, 1\]"),
        (dict(packs=nmjax.steer(np.ones(5))), "Steer.*32"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(word_lm, arguments, message, monkeypatch):
    """And before any compute."""
    monkeypatch.setattr(generation, "prefill", None)
    with pytest.raises(ValueError, match=message):
        nmjax.generate(word_lm, **{"prompts": TWO, **arguments})


def test_what_a_model_without_a_tokenizer_cannot_do(tiny_lm):
    for arguments, message in (
        (dict(prompts=[[3], "w3"]), r"prompts\[1\]='w3' is text, but this model has no tokenizer"),
        (dict(prompts=TWO, stop="a"), "stop='a' needs a tokenizer"),
        (dict(messages=[CHAT]), "messages: this model's tokenizer has no chat template"),
    ):
        with pytest.raises(ValueError, match=message):
            nmjax.generate(tiny_lm, **arguments)


@pytest.mark.slow
def test_stories_stop_and_continue(shared_data):
    """A trained model whose tokenizer glues pieces: the spaces are where one text decoded as a whole has them."""
    import models

    lm = models.load(shared_data / "stories260K-hf")
    prompts = ["Once upon a time", "One day, a little girl named Lily"]
    out = nmjax.generate(lm, prompts, max_new_tokens=40)
    for i, text in enumerate(out.text):
        assert out.full_text[i] == prompts[i] + text
        assert lm.encode(out.full_text[i]) == out.prompt_tokens[i] + out.tokens[i]
    stop = out.text[0][30:38]
    cut = nmjax.generate(lm, prompts, max_new_tokens=40, stop=stop)
    assert cut.text[0] == out.text[0][: out.text[0].index(stop)]
    assert cut.finish_reason[0] == "stop"
    assert cut.tokens[0] == out.tokens[0][: len(cut.tokens[0])]
