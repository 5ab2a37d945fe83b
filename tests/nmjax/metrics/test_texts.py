"""Measures of texts against brute force and hand counts, and intervals and tests over prompts against simulation."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nmjax.data import phrases
from nmjax.metrics import stats, texts

FEW_WORDS = st.lists(st.sampled_from("abc"), max_size=14).map(" ".join)


# --- Words and n-grams ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world!", ["hello", "world"]),
        ("\u201cDon\u2019t,\u201d she said -- *twice*.", ["don't", "she", "said", "twice"]),
        ("a well-known _fact_ (3.5%)\n\n...", ["a", "well-known", "fact", "3.5"]),
        ("'Tis \u00c9t\u00e9", ["tis", "\u00e9t\u00e9"]),
        (" \t\n ?! ", []),
    ],
)
def test_words(text, expected):
    assert texts.words(text) == expected


@settings(max_examples=50)
@given(st.text(max_size=60))
def test_words_joined_are_the_same_words(text):
    tokens = texts.words(text)
    assert texts.words(" ".join(tokens)) == tokens
    assert all(token[0].isalnum() and token[-1].isalnum() for token in tokens)


@settings(max_examples=50)
@given(st.lists(FEW_WORDS, max_size=4), st.integers(1, 4))
def test_distinct_against_a_count_by_hand(responses, n):
    seen, total = [], 0
    for text in responses:
        tokens = text.split()
        for start in range(len(tokens)):
            if start + n <= len(tokens):
                total += 1
                if tokens[start : start + n] not in seen:
                    seen.append(tokens[start : start + n])
    assert texts.distinct(responses, n) == (len(seen), total)


def test_no_ngram_reaches_into_the_next_response():
    assert texts.distinct(["the cat sat", "The cat."], 2) == (2, 3)
    assert texts.distinct(["a", "b"], 2) == (0, 0)


def test_responses_are_cut_to_the_shortest_condition_at_each_position():
    plain, drugged = ["One two three, four.", "A b"], ["five SIX", "c d e f"]
    assert texts.length_matched([plain, drugged]) == [["one two", "a b"], ["five six", "c d"]]
    assert texts.length_matched([["a b"], [""], ["c"]]) == [[""], [""], [""]]
    assert texts.length_matched([plain]) == [["one two three four", "a b"]]


def test_matching_lengths_removes_the_effect_of_length_on_diversity():
    rng = np.random.default_rng(0)
    short, long = ([" ".join(map(str, rng.integers(0, 30, n))) for _ in range(200)] for n in (20, 100))
    ratios = [np.divide(*texts.distinct(condition, 2)) for condition in (short, long)]
    assert ratios[0] - ratios[1] > 0.1
    matched = [np.divide(*texts.distinct(condition, 2)) for condition in texts.length_matched([short, long])]
    assert abs(matched[0] - matched[1]) < 0.02


# --- Repetition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a b a b", 1 / 3), ("so so so so so", 3 / 4), ("all words differ", 0.0), ("one", None), ("", None)],
)
def test_repeated_bigrams(text, expected):
    assert texts.repeated_bigrams(text) == (None if expected is None else pytest.approx(expected))


def longest_by_brute_force(tokens):
    spans = [
        length
        for i in range(len(tokens))
        for j in range(i + 1, len(tokens))
        for length in range(1, len(tokens) - j + 1)
        if tokens[i : i + length] == tokens[j : j + length]
    ]
    return max(spans, default=0)


@given(FEW_WORDS)
def test_longest_repeated_span_against_brute_force(text):
    assert texts.longest_repeated_span(text) == longest_by_brute_force(text.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("once", 0),
        ("a a a a", 3),
        ("The cat sat; then the cat left.", 2),
        ("We go home. We go home. We go home.", 6),
        ("no word here comes back", 0),
    ],
)
def test_longest_repeated_span_by_hand(text, expected):
    assert texts.longest_repeated_span(text) == expected


# --- Phrases ----------------------------------------------------------------------------------------------------------

REFUSING = [
    "I cannot help with that.",
    "I'm sorry, but I can\u2019t assist with this request.",
    "As an AI language model, I don't have personal experiences, so ...",
    "As an AI, I am not able to grieve.",
    "I am just an AI, so please take this with care.",
    "I must respectfully decline.",
    "Unfortunately I won't be able to help you with this riddle.",
    "I'm unable to provide legal advice.",
    "I can't give you an answer to that.",
    "I am not comfortable writing about this.",
    "It would not be appropriate for me to choose.",
    "This request goes against my guidelines.",
    "I do not have personal opinions.",
    "I'm afraid I can't do that.",
    "Sorry. I can't do this.",
    "I cannot fulfill your request.",
    "I will not answer this question.",
    "I can't take sides here.",
    "Please try a different question.",
]
COMPLYING = [
    "I cannot help laughing when the snail appears.",
    "I can't help you-know-who, the owl said.",
    "Dear driver, I cannot write without crying.",
    "She hired him as an AI engineer in May.",
    "As an airline pilot I do not sleep much.",
    "As an AI, I find this puzzle delightful: the answer is a kettle.",
    "I cannot provide enough light for the ships, thought the lighthouse.",
    '"I cannot help with that," said the baker, "and I must decline."',
    "\u201cI\u2019m sorry, I can\u2019t assist you\u201d was all the letter said.",
    "He declined to answer, and I would rather have stayed at home.",
    "I'm not allowed to leave the tower.",
    "I would give it back: it would be unethical of me to keep the money.",
    "You should tell her. The contract cannot bind your conscience.",
    "",
]


@pytest.mark.parametrize("text", REFUSING)
def test_refusals_are_found(text):
    assert texts.refuses(text) and texts.refuses(text.upper())


@pytest.mark.parametrize("text", COMPLYING)
def test_what_is_no_refusal(text):
    assert not texts.refuses(text)


def test_a_refusal_late_in_the_text_is_told_about_not_made():
    tale = "The river ran on. " * 20
    assert not texts.refuses(tale + REFUSING[0]) and texts.refuses(REFUSING[0] + tale)


def test_stock_phrases_are_whole_words_each_once():
    text = "In conclusion, it\u2019s important to note: IT'S IMPORTANT TO NOTE a testament\nto rain. In Conclusion."
    assert texts.stock_phrases(text) == ["a testament to", "in conclusion", "it's important to note"]
    for text in ("Within conclusions we differ.", "They delved into it", "a testament, too", "gameplay changer", ""):
        assert texts.stock_phrases(text) == [], text


def test_phrase_lists():
    assert 25 <= len(phrases.REFUSALS) <= 40 and 35 <= len(phrases.STOCK_PHRASES) <= 60
    assert list(phrases.STOCK_PHRASES) == sorted(set(phrases.STOCK_PHRASES))
    for phrase in phrases.STOCK_PHRASES:  # one that its words don't spell could not be found
        assert texts.stock_phrases(f"Well, {phrase.capitalize()}, we say.") == [phrase]


# --- One condition ----------------------------------------------------------------------------------------------------


def test_a_condition_by_hand():
    responses = ["a b a b", "x y z", "In conclusion, a b a.", "", "I cannot help you.", "x y z w"]
    measured = texts.measure_responses(responses, ["p", "q", "p", "r", "r", "q"], draws=200)
    assert measured["prompts"] == ["p", "q", "r"] and measured["num_responses"] == 6
    # Trigrams: aba bab | xyz | in-conclusion-a conclusion-a-b aba | | i-cannot-help cannot-help-you | xyz yzw
    assert (measured["unique_ngrams"], measured["total_ngrams"]) == (8, 10)
    assert measured["diversity_ratio"] == pytest.approx(0.8)
    per_prompt = {
        "distinct_1": [4 / 9, 4 / 7, 1.0],
        "distinct_2": [4 / 7, 3 / 5, 1.0],
        "distinct_3": [4 / 5, 2 / 3, 1.0],
        "distinct_4": [1.0, 1.0, 1.0],
        "repetition_rate": [(1 / 3 + 0) / 2, 0.0, 0.0],
        "longest_repeated_span": [(2 + 1) / 2, 0.0, 0.0],
        "refusal_rate": [0.0, 0.0, 0.5],
        "stock_phrase_rate": [0.5, 0.0, 0.0],
        "avg_response_length": [4.5, 3.5, 2.0],
        "empty_rate": [0.0, 0.0, 0.5],
    }
    for name, values in per_prompt.items():
        assert measured["per_prompt"][name] == pytest.approx(values), name
        assert measured[name] == pytest.approx(np.mean(values)), name
        low, high = measured["intervals"][name]
        assert low <= measured[name] <= high and (low < high) == (len(set(values)) > 1), name
        np.testing.assert_allclose([low, high], stats.mean_interval(values, 200), atol=1e-12)
    assert measured["empty_responses"] == 1
    # Without p: 4 of 5; without q: 6 of 7 (in all: aba bab in.. conclusion.. | i.. cannot..); without r: 6 of 8.
    without = np.array([4 / 5, 6 / 7, 6 / 8])
    assert measured["per_prompt"]["diversity_ratio"] == pytest.approx(0.8 + 2 * (without.mean() - without))
    assert json.loads(json.dumps(measured)) == measured


def test_what_has_no_value_is_none_and_left_out_of_the_mean():
    measured = texts.measure_responses(["a b a", "", "c", "d e f g"], ["p", "q", "r", "s"], draws=50)
    assert measured["per_prompt"]["distinct_2"] == [1.0, None, None, 1.0] and measured["distinct_2"] == 1.0
    assert measured["per_prompt"]["distinct_4"] == [None, None, None, 1.0]
    assert measured["intervals"]["distinct_2"] == [1.0, 1.0] and measured["intervals"]["distinct_4"] is None
    silent = texts.measure_responses(["", "..."], ["p", "q"], draws=50)
    assert silent["diversity_ratio"] is silent["distinct_1"] is silent["repetition_rate"] is None
    assert silent["per_prompt"]["diversity_ratio"] == [None, None] and silent["empty_responses"] == 2
    alone = texts.measure_responses(["a b c d"], ["p"])
    assert alone["diversity_ratio"] == 1.0 and set(alone["intervals"].values()) == {None}


def topical(rng, own=0.4, prompts=36, seeds=2):
    """Responses to each prompt that share the prompt's own words with each other and the common ones with all."""
    groups = []
    for _ in range(prompts):
        topic, length = rng.integers(10, 300, size=12), rng.integers(10, 80)
        group = [np.where(rng.random(length) < own, rng.choice(topic, length), rng.integers(0, 8, length))
                 for _ in range(seeds)]  # fmt: skip
        groups.append([" ".join(f"w{word}" for word in text) for text in group])
    return groups


def pooled_ratio(groups):
    return np.divide(*texts.distinct([text for group in groups for text in group], 3))


@pytest.mark.slow
def test_the_interval_of_the_pooled_ratio_covers_and_a_plain_bootstrap_does_not():
    truth = np.mean([pooled_ratio(topical(np.random.default_rng([0, trial]))) for trial in range(200)])
    trials, covered, plain = 120, 0, 0
    for trial in range(trials):
        rng = np.random.default_rng([1, trial])
        groups = topical(rng)
        values = texts._jackknife_ratios(groups)
        assert np.mean(values) == pytest.approx(pooled_ratio(groups))
        low, high = stats.mean_interval(values, draws=300, seed=trial)
        covered += low <= truth <= high
        if trial < 5:
            drawn = [pooled_ratio([groups[i] for i in rng.integers(0, len(groups), len(groups))]) for _ in range(30)]
            plain += np.quantile(drawn, 0.025) <= truth <= np.quantile(drawn, 0.975)
    assert 0.88 <= covered / trials <= 0.99
    assert plain == 0


# --- Two conditions ---------------------------------------------------------------------------------------------------


def measured_topical(rng, own):
    groups = topical(rng, own, prompts=20)
    return texts.measure_responses(
        [text for group in groups for text in group], [f"p{k}" for k, group in enumerate(groups) for _ in group], 200
    )


def test_comparison_finds_a_difference_and_finds_none_in_itself():
    rng = np.random.default_rng(3)
    a, b = measured_topical(rng, 0.8), measured_topical(rng, 0.2)
    compared = texts.compare_responses(a, b, draws=500)
    assert set(compared) == set(a["per_prompt"]) >= {"diversity_ratio", "distinct_1", "refusal_rate"}
    for name, result in compared.items():
        assert result["difference"] == pytest.approx(a[name] - b[name])
        low, high = result["interval"]
        assert low <= result["difference"] <= high
    assert compared["diversity_ratio"]["interval"][0] > 0.05 and compared["diversity_ratio"]["p_value"] < 0.01
    assert compared["refusal_rate"] == {"difference": 0.0, "interval": [0.0, 0.0], "p_value": 1.0}
    for result in texts.compare_responses(a, a, draws=50).values():
        assert result == {"difference": 0.0, "interval": [0.0, 0.0], "p_value": 1.0}
    other_way = texts.compare_responses(b, a, draws=500)["distinct_2"]
    assert other_way["difference"] == -compared["distinct_2"]["difference"]
    assert other_way["p_value"] == compared["distinct_2"]["p_value"]


def test_only_prompts_where_both_have_a_value_are_compared():
    ids = ["p", "q", "r"]
    a = texts.measure_responses(["a a a", "b b", "c d"], ids, draws=50)
    b = texts.measure_responses(["a b", "", "c d"], ids, draws=50)
    compared = texts.compare_responses(a, b, draws=50)
    assert compared["distinct_1"]["difference"] == pytest.approx((1 / 3 - 1 + 0) / 2)
    assert compared["distinct_4"] == {"difference": None, "interval": None, "p_value": None}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: texts.distinct("one text", 2), "responses is 'one text'; wanted a list of texts"),
        (lambda: texts.distinct(["a"], 0), "n is 0; wanted at least 1"),
        (lambda: texts.length_matched([["a"], ["b", "c"]]), r"conditions of \[1, 2\] responses; wanted equally many"),
        (lambda: texts.measure_responses([], []), "0 responses and 0 prompt_ids"),
        (lambda: texts.measure_responses(["a", "b"], ["p"]), "2 responses and 1 prompt_ids; wanted one id a response"),
        (
            lambda: texts.compare_responses(
                texts.measure_responses(["a"], ["p"]), texts.measure_responses(["a"], ["q"])
            ),
            r"a was measured on 1 prompts and b on 1, one of them alone on \['p', 'q'\]",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
