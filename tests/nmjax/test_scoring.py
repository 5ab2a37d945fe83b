"""Scores of choices against one pass over prompt + choice at a time, a float64 log-softmax, and a sort."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

import nmjax
from nmjax import scoring

V, D, WIDTH = 97, 32, 16
rng = np.random.default_rng(0)
VECTOR = rng.standard_normal(D).astype(np.float32)
PROMPTS = [rng.integers(3, V, n).tolist() for n in (3, 12, 7, 9)]
SHORT = [[5], [17], [60]]
LONG = [[5, 5, 5], [17], [60, 8]]  # the first repeats itself, which a frequency penalty sees
SPECS = (
    {},
    dict(qk=2.5, heat=0.6),
    dict(push=3.0, penalty=2.0),
    dict(penalty=-1.5, heat=1.7, k=30),
)


def pack(qk=1.0, push=0.0, penalty=0.0, heat=1.0, k=0, p=1.0):
    """Always all six effects, so that whatever is asked is one compiled program."""
    return nmjax.compose(
        nmjax.scale_qk(qk),
        nmjax.steer(VECTOR, push, layers=[1]),
        nmjax.frequency_penalty(penalty),
        nmjax.temperature(heat),
        nmjax.top_k(k),
        nmjax.top_p(p),
    )


def after_site(x, counts, spec, truncate):
    """float64 [V]: the `logits` site by hand, cuts by a sort."""
    x = (x - spec.get("penalty", 0) * counts) / spec.get("heat", 1)
    if truncate and spec.get("k"):
        x = np.where(x >= np.sort(x)[-spec["k"]], x, -np.inf)
    if truncate and spec.get("p", 1) < 1:
        ranked = np.sort(x)[::-1]
        needed = np.searchsorted(np.cumsum(softmax(ranked)), spec["p"]) + 1
        x = np.where(x >= ranked[needed - 1], x, -np.inf)
    return x


@pytest.fixture(scope="module")
def brute(tiny_lm):
    """The same [rows, 3 choices] the slow way: 12 passes over prompt + choice, one row each."""

    def score(prompts, choices, specs):
        wholes = [prompt + choice for prompt, row in zip(prompts, choices, strict=True) for choice in row]
        packs = [pack(**spec) for spec, row in zip(specs, choices, strict=True) for _ in row]
        result = nmjax.forward(tiny_lm, wholes, packs)
        logits = iter(np.asarray(result.logits, np.float64))
        shape = (len(prompts), len(choices[0]))
        after, before, kept = np.zeros(shape), np.zeros(shape), np.ones(shape, bool)
        for i, row in enumerate(choices):
            for j, choice in enumerate(row):
                x = next(logits)[-len(choice) - 1 : -1]
                for step, token in enumerate(choice):
                    counts = np.bincount(choice[:step], minlength=V)
                    before[i, j] += log_softmax(x[step])[token]
                    after[i, j] += log_softmax(after_site(x[step], counts, specs[i], False))[token]
                    kept[i, j] &= np.isfinite(after_site(x[step], counts, specs[i], True)[token])
        kept |= after == after.max(1, keepdims=True)
        shares = np.where(kept, softmax(after, axis=1), 1e-12)
        return dict(
            logprobs=after,
            sober_logprobs=before,
            probs=shares / shares.sum(1, keepdims=True),
            sober_probs=softmax(before, axis=1),
            mass=np.exp(after).sum(1),
            sober_mass=np.exp(before).sum(1),
            removed=1 - np.where(kept, softmax(after, axis=1), 0).sum(1),
        )

    return score


@pytest.fixture(scope="module")
def agree(tiny_lm, brute, assert_close):
    """Scores `choices`, one list a row; each field must be as by hand. Returns what was scored."""

    def check(choices, prompts=PROMPTS, specs=SPECS, asked=None, **options):
        packs = [pack(**spec) for spec in specs]
        seen = nmjax.score_choices(tiny_lm, prompts, asked or choices, packs, width=WIDTH, **options)
        for field, wanted in brute(prompts, choices, specs).items():
            assert_close(getattr(seen, field), wanted, scale=20.0)  # the scale of this model's logits
        np.testing.assert_allclose(seen.probs.sum(1), 1, atol=1e-6)
        np.testing.assert_allclose(seen.sober_probs.sum(1), 1, atol=1e-6)
        return seen

    return check


@pytest.fixture(scope="module")
def short(agree):
    return agree([SHORT] * 4, asked=SHORT)


def test_one_token_choices(short):
    moved = np.abs(short.logprobs - short.sober_logprobs).max(1)
    assert moved[0] == 0 and (moved[[1, 3]] > 0.1).all(), "temperature acts after the sober scores"
    assert moved[2] == 0, "a penalty on repetition has nothing to act on in a single token"


def test_the_effects_inside_move_the_sober_scores(tiny_lm, short):
    plain = nmjax.score(tiny_lm, PROMPTS, SHORT, pack(), width=WIDTH)
    moved = np.abs(plain - short.sober_logprobs).max(1)
    np.testing.assert_array_equal(moved[[0, 3]], 0)
    assert (moved[[1, 2]] > 0.1).all()


def test_choices_of_several_tokens(agree):
    seen = agree([LONG] * 4, asked=LONG)
    assert abs(seen.logprobs[2, 0] - seen.sober_logprobs[2, 0]) > 0.1, "the penalty did not act on the repetition"


def test_a_common_beginning_moves_to_the_prompt(agree, tiny_lm):
    """The sum is over what follows it, so that choices which differ in one token cost one pass."""
    seen = agree([SHORT] * 4, prompts=[prompt + [7] for prompt in PROMPTS])
    packs = [pack(**spec) for spec in SPECS]
    joined = nmjax.score_choices(tiny_lm, PROMPTS, [[7, *choice] for choice in SHORT], packs, width=WIDTH)
    np.testing.assert_array_equal(joined.logprobs, seen.logprobs)


def test_every_row_its_own_choices(agree):
    choices = [[[int(t)] for t in np.random.default_rng(i).choice(np.arange(3, V), 3, replace=False)] for i in range(4)]
    agree(choices)


def test_text_is_ids(word_lm, short):
    def text(ids):
        return " ".join(f"w{i}" for i in ids)

    packs = [pack(**spec) for spec in SPECS]
    prompts = [text(prompt) for prompt in PROMPTS]
    for choices in ([" w5", " w17", " w60"], [[" w5", " w17", " w60"]] * 4):
        seen = nmjax.score(word_lm, prompts, choices, packs, width=WIDTH)
        np.testing.assert_array_equal(seen, short.logprobs)
    # Ids before text: there is nothing to tokenise in context.
    np.testing.assert_array_equal(nmjax.score(word_lm, PROMPTS, ["w5", "w17", "w60"], packs, width=WIDTH), seen)


def test_choices_are_tokenised_in_context(word_lm, tiny_lm):
    """What a choice does to the prompt's last word: w5 becomes w56, and that is what gets scored."""
    prompts = ["w3 w9 w5", "w30 w4 w7 w5", "w8 w8 w5", "w11 w5"]
    seen = nmjax.score(word_lm, prompts, ["6", "7", "8"], [pack(**spec) for spec in SPECS], width=WIDTH)
    ids = [[3, 9], [30, 4, 7], [8, 8], [11]]
    wanted = nmjax.score(tiny_lm, ids, [[56], [57], [58]], [pack(**spec) for spec in SPECS], width=WIDTH)
    np.testing.assert_array_equal(seen, wanted)


def ranked(tiny_lm, places):
    """[4 rows, 3 choices]: tokens at these places of each prompt's sober distribution, likeliest = 0."""
    logits = np.asarray(nmjax.forward(tiny_lm, (PROMPTS * 3), [pack()] * 12).next_logits)[:4]
    return [[[int(t)] for t in np.argsort(-row)[list(places)]] for row in logits]


def test_truncation_removes_choices(tiny_lm, agree):
    """Places 1, 10 and 50 of the vocabulary: k = 1 removes them all, of which the best stays; k = 2 keeps just that."""
    choices = ranked(tiny_lm, (10, 1, 50))
    seen = agree(choices, specs=[dict(k=1), dict(k=2), dict(k=20), dict(p=0.05)])
    share = softmax(np.asarray(seen.logprobs, np.float64), axis=1)
    np.testing.assert_array_equal(seen.logprobs, seen.sober_logprobs)  # truncation is not in them
    for i in (0, 1):
        np.testing.assert_allclose(seen.probs[i], np.asarray([1e-12, share[i, 1], 1e-12]) / share[i, 1], rtol=1e-5)
        np.testing.assert_allclose(seen.removed[i], 1 - share[i, 1], atol=1e-6)
    np.testing.assert_allclose(seen.probs[2, :2], share[2, :2] / share[2, :2].sum(), rtol=1e-5)
    np.testing.assert_allclose(seen.probs[2, 2], 1e-12 / share[2, :2].sum(), rtol=1e-5)
    np.testing.assert_allclose(seen.removed[2], share[2, 2], rtol=1e-4)
    assert (np.asarray(seen.removed) > 1e-3).all()
    assert (np.asarray(seen.mass) < 0.9).all()


def test_truncation_after_a_temperature(tiny_lm, agree):
    """The nucleus is of the tempered distribution: hot enough, it holds what it cuts at temperature 1."""
    choices = ranked(tiny_lm, (0, 8, 80))
    seen = agree(choices, specs=[dict(p=0.6, heat=heat) for heat in (0.3, 1.0, 3.0, 50.0)])
    kept = (np.asarray(seen.probs) > 1e-9).sum(1)
    assert kept[0] == 1 and kept[3] >= 2


def test_nothing_is_removed_without_truncation(short):
    np.testing.assert_allclose(short.removed[:3], 0, atol=1e-6)
    np.testing.assert_allclose(short.probs[0], short.sober_probs[0], rtol=1e-6)


def test_one_pack_for_all_rows(tiny_lm, short):
    seen = nmjax.score(tiny_lm, PROMPTS, SHORT, pack(**SPECS[1]), width=WIDTH)
    np.testing.assert_array_equal(seen[1], short.logprobs[1])
    assert np.abs(seen[0] - short.logprobs[0]).max() > 0.1


def test_batches_of_rows(agree):
    """Three rows at a time, so the second batch is filled up; one program for both."""
    agree([LONG] * 4, asked=LONG, batch_size=3)


def test_a_fixed_width_is_one_program(tiny_lm, short):
    packs = [pack(**spec) for spec in SPECS]
    before = scoring._score._cache_size()
    for seed, dose in enumerate((0, 0.3, 1.4)):
        prompts = [prompt[: 2 + seed] for prompt in PROMPTS]
        nmjax.score(tiny_lm, prompts, [[9 + seed], [8], [7]], [p.at(dose) for p in packs], width=WIDTH, seed=seed)
    assert scoring._score._cache_size() == before
    nmjax.score(tiny_lm, PROMPTS, SHORT, packs, width=WIDTH + 1)
    assert scoring._score._cache_size() == before + 1


def test_width_changes_nothing_else(tiny_lm, short, assert_close):
    wider = nmjax.score(tiny_lm, PROMPTS, SHORT, [pack(**spec) for spec in SPECS], width=WIDTH + 1)
    assert_close(wider, short.logprobs)


def test_continuations_token_by_token(tiny_lm, brute, assert_close):
    """What `brute` sums for a choice, and the sum is of as many numbers as there are tokens."""
    packs = [pack(**spec) for spec in SPECS]
    seen = nmjax.continuation_logprobs(tiny_lm, PROMPTS, [[9, 4, 4], [7], [8, 3], [5, 5]], packs, batch_size=3)
    wanted = brute(PROMPTS, [[[9, 4, 4]], [[7]], [[8, 3]], [[5, 5]]], SPECS)["sober_logprobs"][:, 0]
    assert [len(row) for row in seen] == [3, 1, 2, 2]
    assert_close([row.sum() for row in seen], wanted, scale=20.0)


def test_continuations_are_what_generate_reports(tiny_lm, assert_close):
    packs = [pack(**SPECS[1]), pack(**SPECS[2])]
    out = nmjax.generate(tiny_lm, PROMPTS[:2], packs, max_new_tokens=5, eos_token_id=[])
    seen = nmjax.continuation_logprobs(tiny_lm, PROMPTS[:2], out.tokens, packs)
    for row, wanted in zip(seen, out.logprobs, strict=True):
        assert_close(row, wanted, scale=20.0)
    sober = nmjax.continuation_logprobs(tiny_lm, PROMPTS[:2], out.tokens, [pack()] * 2)
    assert max(np.abs(a - b).max() for a, b in zip(sober, seen, strict=True)) > 1e-2


TWO = [[3, 4, 5], [6]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(prompts="w3"), "prompts='w3'"),
        (dict(prompts=[]), "prompts is empty"),
        (dict(prompts=[[3], []]), r"prompts\[1\]=\[\] has no tokens"),
        (dict(prompts=[[3], [V]]), rf"prompts\[1\] holds token id {V}"),
        (dict(prompts=[[3], 4]), r"prompts\[1\]=4"),
        (dict(choices=" A"), "choices=' A'"),
        (dict(choices=3), "choices=3"),
        (dict(choices=[]), r"choices=\[\]"),
        (dict(choices=[5, 6]), "choices=5"),
        (dict(choices=[[5], []]), r"choices=\[\] has no tokens"),
        (dict(choices=[[5], [-1]]), "choices holds token id -1"),
        (dict(choices=[[[5], [6]]] * 3), "choices has 3 lists, .* each of 2 prompts"),
        (dict(choices=[[[5], [6]], [[5]]]), r"choices\[1\]=\[\[5\]\], wanted a list of 2 choices"),
        (dict(choices=[["w5", "w6"], "w5"]), r"choices\[1\]='w5', wanted a list of 2"),
        (dict(prompts=["w3", "w4"], choices=[" w5", ""]), r"choices: '' adds no token to prompts\[0\]"),
        (dict(prompts=["w3 w4", "w4"], choices=[" w5", "0 w1"]), r"choices: .* only token of prompts\[1\]"),
        (dict(packs=[None]), "packs has 1 entries, .* 2 rows"),
        (dict(packs="cocaine"), "packs='cocaine'"),
        (dict(packs=[None, 3]), r"packs\[1\]=3"),
        (dict(width=2), "width=2, wanted at least 3"),
        (dict(width=3, choices=[[5, 6], [7]]), "width=3, wanted at least 4"),
        (dict(width=8.0), "width=8.0, wanted an integer"),
        (dict(width=True), "width=True, wanted an integer"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(batch_size=1.5), "batch_size=1.5"),
        (dict(seed="a"), "seed='a'"),
        (dict(seed=[1, 2, 3]), "seed has 3 values"),
        (dict(row_ids=[1]), "row_ids has 1 values"),
    ],
)
def test_bad_arguments_are_named(word_lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        nmjax.score(word_lm, **{"prompts": TWO, "choices": [[5], [6]], **arguments})


def test_text_without_a_tokenizer(tiny_lm):
    with pytest.raises(ValueError, match=r"prompts\[1\]='w3' is text"):
        nmjax.score(tiny_lm, [[3], "w3"], [[5], [6]])
    with pytest.raises(ValueError, match="choices=' A' is text"):
        nmjax.score(tiny_lm, TWO, [" A", " B"])


@pytest.mark.parametrize("length, choices", [(129, [[5], [6]]), (127, [[5, 6, 7], [8]]), (127, [[9, 5, 6, 7], [9]])])
def test_beyond_the_context(tiny_lm, length, choices):
    """The last token of a choice is only predicted, never read: 128 tokens + 1 fit the context of 128."""
    with pytest.raises(ValueError, match=r"prompts\[1\]: .* exceed the model's context of 128"):
        nmjax.score(tiny_lm, [[3], [3] * length], choices)


def test_the_whole_context_is_usable(tiny_lm):
    prompt = np.random.default_rng(3).integers(3, V, 128).tolist()
    seen = nmjax.score(tiny_lm, [prompt], SHORT)
    logits = np.asarray(nmjax.forward(tiny_lm, [prompt]).logits, np.float64)[0, -1]
    np.testing.assert_allclose(seen[0], log_softmax(logits)[[5, 17, 60]], atol=1e-4)
