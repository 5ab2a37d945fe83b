"""Measures of uncertainty against exact enumeration of a small answer space, NumPy, and the engine's own parts."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax

import nmjax
from nmjax.uncertainty import (
    DETECTORS,
    SHOWN,
    SelfCheck,
    p_true,
    predictive_entropy,
    sample_uncertainty,
    self_certainty,
    true_or_false,
)

V = 97
PROMPTS = ["w5 w9 w40 w7", "w88 w3", "w12 w13 w14", "w60 w61 w9 w8 w7"]
OPTIONS = dict(samples=4, max_new_tokens=4, width=8, batch_size=4, check=None)  # four rows: all is one program


def pack(qk=1.0, k=0):
    return nmjax.compose(nmjax.scale_qk(qk), nmjax.top_k(k))


def measured(lm, prompts=PROMPTS, packs=None, **options):
    options = dict(seed=3, clusterer=same_text) | OPTIONS | options
    return sample_uncertainty(lm, prompts, packs=pack() if packs is None else packs, **options)


def same_text(prompt, answers):
    return [answers.index(answer) for answer in answers]


# --- From log-probabilities -------------------------------------------------------------------------------------------


def test_predictive_entropy_is_a_mean_over_samples():
    logprobs, lengths = np.array([[-1.0, -3.0], [-2.0, -2.0]]), np.array([[1, 2], [4, 1]])
    np.testing.assert_allclose(predictive_entropy(logprobs), [2, 2])
    np.testing.assert_allclose(predictive_entropy(logprobs, lengths), [1.25, 1.25])


def test_self_certainty_is_the_divergence_from_uniform():
    p = np.random.default_rng(0).dirichlet(np.ones(7), size=3)
    wanted = np.mean([stats.entropy(np.full(7, 1 / 7), row) for row in p])
    assert self_certainty(np.log(p).mean(axis=1), 7) == pytest.approx(wanted)
    assert self_certainty(np.log(np.full(4, 1 / 7)), 7) == pytest.approx(0, abs=1e-12)
    peaked = np.log([1 - 6e-9, *[1e-9] * 6])
    assert self_certainty([peaked.mean()], 7) == pytest.approx(6 / 7 * np.log(1e9) - np.log(7), abs=1e-6)


def test_mean_logprobs_against_numpy(word_lm, assert_close):
    prompts = [word_lm.encode(prompt) for prompt in PROMPTS]
    answers = [[11, 12, 13, 14], [60], [5, 5], [40, 41, 42]]
    packs = [pack(), pack(qk=2.0), pack(k=1), pack(qk=0.5, k=3)]  # k acts on what is sampled only
    shape = dict(width=12, room=4, batch_size=4)
    seen = nmjax.mean_logprobs(word_lm, prompts, answers, packs, **shape)
    result = nmjax.forward(word_lm, [p + a for p, a in zip(prompts, answers, strict=True)], packs)
    for i, (row, prompt, answer) in enumerate(zip(seen, prompts, answers, strict=True)):
        logits = np.asarray(result.logits[i], np.float64)[np.asarray(result.mask[i])]
        wanted = log_softmax(logits, axis=-1).mean(axis=-1)[len(prompt) - 1 : len(prompt) + len(answer) - 1]
        assert_close(row, wanted, scale=5.0)
    plain = nmjax.mean_logprobs(word_lm, prompts, answers, pack(), **shape)
    moved = [np.abs(a - b).max() for a, b in zip(plain, seen, strict=True)]
    assert moved[0] == moved[2] == 0 and min(moved[1], moved[3]) > 1e-2


# --- Against enumeration ----------------------------------------------------------------------------------------------

TOP, HEAT, DRAWN = 3, 1.5, 100


@pytest.fixture(scope="module")
def enumerated(word_lm):
    """Four times 100 samples of two tokens out of the three likeliest, and ln p of every such answer by text."""
    found = measured(
        word_lm, PROMPTS[:1] * 4, pack(k=TOP), samples=DRAWN, max_new_tokens=2, temperature=HEAT,
        clusterer=lambda prompt, answers: [answer.split()[0] for answer in answers],
    )  # fmt: skip

    def after(paths):
        """By path, ln p of the next token by token: the largest logits, cut and cooled by hand."""
        ids = [word_lm.encode(PROMPTS[0]) + path for path in paths]
        for logits in np.asarray(nmjax.forward(word_lm, ids, pack()).next_logits, np.float64):
            best = np.argsort(-logits)[:TOP]
            yield dict(zip(best.tolist(), log_softmax(logits[best] / HEAT), strict=True))

    first, *_ = after([[]] * 4)
    assert not set(first) & set(word_lm.eos_ids)
    seconds = after([[a] for a in first] + [[]])
    answers = {
        word_lm.tokenizer.decode([a, b]): first[a] + lp
        for a, second in zip(first, seconds, strict=False)
        for b, lp in second.items()
    }
    assert len(answers) == TOP**2 and np.exp(list(answers.values())).sum() == pytest.approx(1)
    return found, answers


def test_samples_have_the_probability_of_what_was_sampled(enumerated):
    found, answers = enumerated
    for row in found:
        np.testing.assert_allclose(row["sample_logprobs"], [answers[text] for text in row["samples"]], atol=1e-4)
        assert (row["sample_tokens"] == 2).all()


def test_predictive_entropy_against_enumeration(enumerated):
    found, answers = enumerated
    exact = stats.entropy(np.exp(list(answers.values())))
    error = np.std([row["sample_logprobs"] for row in found]) / np.sqrt(4 * DRAWN)
    assert 0 < error < 0.05 < exact / 10
    assert abs(np.mean([row["predictive_entropy"] for row in found]) - exact) < 4 * error
    for row in found:
        assert row["length_normalised_entropy"] == pytest.approx(row["predictive_entropy"] / 2)


def test_semantic_entropy_against_enumeration(enumerated):
    """Meanings are first words: where all answers were drawn, the weighted entropy is exact; the discrete one is near
    the exact one, by its spread and bias."""
    found, answers = enumerated
    p = {}
    for text, lp in answers.items():
        p[text.split()[0]] = p.get(text.split()[0], 0) + np.exp(lp)
    exact = stats.entropy(list(p.values()))
    error = np.sqrt((sum(q * np.log(q) ** 2 for q in p.values()) - exact**2) / DRAWN)
    assert exact > 0.5
    complete = [row for row in found if set(row["samples"]) == set(answers)]
    assert complete
    for row in complete:
        assert row["weighted_semantic_entropy"] == pytest.approx(exact, abs=1e-4) and row["num_clusters"] == TOP
    for row in found:
        assert abs(row["semantic_entropy"] - exact) < 4 * error + TOP / DRAWN
    assert len({row["semantic_entropy"] for row in found}) > 1


# --- One call ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(word_lm):
    return measured(word_lm)


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], str | list):
            assert a[name] == b[name], name
        else:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_answer_is_greedy_and_its_measures_are_its_probabilities(word_lm, rows):
    out = nmjax.generate(word_lm, PROMPTS, pack(), max_new_tokens=4, width=8)
    for i, row in enumerate(rows):
        assert row["prompt"] == PROMPTS[i] and row["answer"] == out.text[i].strip() and row["tokens"] == out.tokens[i]
        np.testing.assert_array_equal(row["logprobs"], out.logprobs[i])
        assert row["nll"] == pytest.approx(-out.logprobs[i].sum())
        assert row["perplexity"] == pytest.approx(np.exp(-out.logprobs[i].mean()))
        assert row["self_certainty"] == pytest.approx(-np.mean(row["mean_logprobs"]) - np.log(V))
        assert row["self_certainty"] > 0.1
        assert "p_true" not in row and DETECTORS.keys() - row.keys() == {"p_true"}


def test_samples_differ_and_clusters_are_the_clusterers(rows):
    assert all(len(row["samples"]) == 4 and row["num_clusters"] == len(set(row["samples"])) for row in rows)
    assert sum(row["num_clusters"] for row in rows) > 12
    assert all(row["clusters"].tolist() == same_text("", row["samples"]) for row in rows)


def test_seeds_decide_the_samples_and_nothing_else(word_lm, rows):
    for a, b, c in zip(rows, measured(word_lm), measured(word_lm, seed=4), strict=True):
        equal(a, b)
        assert a["samples"] != c["samples"] and a["answer"] == c["answer"]


def test_rows_do_not_depend_on_their_batch(word_lm, rows):
    """In another order, as token ids, next to others: the row id is what counts."""
    order = [2, 0, 3, 1]
    ids = [word_lm.encode(PROMPTS[i]) for i in order]
    for i, row in zip(order, measured(word_lm, ids, row_ids=order), strict=True):
        equal(rows[i], row)
    more = measured(word_lm, samples=6)
    assert [row["samples"][:4] for row in more] == [row["samples"] for row in rows]


def test_packs_change_answers_and_samples(word_lm, rows):
    changed = measured(word_lm, packs=[pack(), pack(qk=0.1), pack(), pack(k=1)])
    equal(rows[0], changed[0])
    assert abs(rows[1]["nll"] - changed[1]["nll"]) > 1e-3
    sure = changed[3]  # always the likeliest token
    assert set(sure["samples"]) == {rows[3]["answer"]} and sure["lexical_similarity"] == 1
    assert sure["predictive_entropy"] == sure["semantic_entropy"] == sure["weighted_semantic_entropy"] == 0


# --- By asking --------------------------------------------------------------------------------------------------------


def test_the_model_judges_its_own_answer_under_the_same_pack(word_lm):
    asked = []

    def ask(prompt, answer, ideas):
        asked.append((prompt, answer, list(ideas)))
        return f"w20 {prompt} {answer} w21"

    check = SelfCheck(ask, (" w30", " w31"))
    found = measured(word_lm, packs=pack(qk=3.0), samples=6, check=check)
    assert asked == [(row["prompt"], row["answer"], row["samples"][:SHOWN]) for row in found]
    prompts = [f"w20 {row['prompt']} {row['answer']} w21" for row in found]
    lp = np.asarray(nmjax.score(word_lm, prompts, [" w30", " w31"], pack(qk=3.0)), np.float64)
    np.testing.assert_allclose([row["p_true"] for row in found], np.exp(log_softmax(lp, axis=1))[:, 0], rtol=1e-5)
    sober = p_true(word_lm, *zip(*asked, strict=True), check, pack())
    assert np.abs(sober - [row["p_true"] for row in found]).max() > 1e-3


def test_the_question_shows_prompt_answer_and_ideas():
    text = true_or_false("Which metal?", "tin", ["copper", "lead"])
    assert text.startswith("Which metal?\n\n") and "- copper\n- lead\n" in text
    assert text.endswith("Proposed answer: tin\nTrue or False:") and SelfCheck().verdicts == (" True", " False")


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(samples=1), "samples=1, wanted an integer >= 2"),
        (dict(samples=True), "samples=True, wanted"),
        (dict(temperature=0), "temperature=0, wanted above 0"),
        (dict(temperature=float("nan")), "temperature=nan, wanted above 0"),
        (dict(clusterer=lambda prompt, answers: [0]), r"clusterer returned \[0\], wanted 4 numbers"),
    ],
)
def test_bad_arguments_are_named(word_lm, options, message):
    with pytest.raises(ValueError, match=message):
        measured(word_lm, **options)


def test_texts_need_a_tokenizer(tiny_lm):
    with pytest.raises(ValueError, match="no tokenizer"):
        sample_uncertainty(tiny_lm, [[5, 6]], **OPTIONS)
