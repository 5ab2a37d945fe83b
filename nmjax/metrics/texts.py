"""Measures of generated texts: diversity, repetition, refusals, stock phrases and length, and their comparison.

Everything counts words as `words` finds them. A condition's responses are measured prompt by prompt, because answers to
one prompt, however many seeds it has, are not independent: intervals and tests are over prompts.

More text holds more repeats, so distinct ratios fall with length: compare conditions on the responses `length_matched`.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from nmjax.data.phrases import REFUSALS, STOCK_PHRASES
from nmjax.metrics import paired, stats

OPENING_WORDS = 50
"""A refusal is looked for in so many words from the beginning of a response: later ones are said about something."""

POOLED_NGRAM = 3
"""The pooled diversity ratio counts trigrams, as the study that we follow does."""

_WORD = re.compile(r"[^\W_](?:\S*[^\W_])?")
_STRAIGHT = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u201c": '"', "\u201d": '"'})
_QUOTED = re.compile(r'"[^"]*(?:"|$)')
_REFUSAL = re.compile(rf"(?:^| )(?:{'|'.join(REFUSALS)})(?: |$)")

# --- One text, or a few -----------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """The words of a text: what white space separates, in lower case, from its first letter or digit to its last.

    Punctuation within a word stays ("don't", "well-known"), tokens of nothing but punctuation vanish, and curly
    apostrophes become straight. `words(" ".join(words(text)))` is `words(text)`.
    """
    return _WORD.findall(text.translate(_STRAIGHT).lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` adjacent words, in order; none where there are fewer than `n` words."""
    if n < 1:
        raise ValueError(f"n is {n}; wanted at least 1")
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def distinct(responses: Sequence[str], n: int) -> tuple[int, int]:
    """How many different n-grams of words, and how many in all, the responses hold together (Li et al. 2016).

    No n-gram reaches from one response into the next. The ratio of the two is distinct-n.
    """
    _check_texts(responses)
    grams = [gram for text in responses for gram in ngrams(words(text), n)]
    return len(set(grams)), len(grams)


def length_matched(responses_by_condition: Sequence[Sequence[str]]) -> list[list[str]]:
    """The responses [P][N], at each position (same prompt and seed) cut to the words of the shortest condition's.

    Texts come back as their words joined by spaces. A position where one condition said nothing is empty for all.

    Raises ValueError if the conditions don't have the same number of responses.
    """
    for responses in responses_by_condition:
        _check_texts(responses)
    if len(sizes := {len(responses) for responses in responses_by_condition}) > 1:
        raise ValueError(f"responses_by_condition has conditions of {sorted(sizes)} responses; wanted equally many")
    cut = []
    for position in zip(*responses_by_condition, strict=True):
        tokens = [words(text) for text in position]
        shortest = min(map(len, tokens))
        cut.append([" ".join(t[:shortest]) for t in tokens])
    return [[position[p] for position in cut] for p in range(len(responses_by_condition))]


def repeated_bigrams(text: str) -> float | None:
    """Share of a text's word bigrams that it already had: 1 - unique / total; None for fewer than two words."""
    ratio = _ratio(*distinct([text], 2))
    return None if ratio is None else 1 - ratio


def longest_repeated_span(text: str) -> int:
    """Length in words of the longest run of words that begins at two places or more; 0 where no word recurs.

    The occurrences may overlap, so a loop counts in full: "a a a a" has a repeated span of 3.
    """
    tokens = words(text)

    def all_differ(n: int) -> bool:
        grams = ngrams(tokens, n)
        return len(set(grams)) == len(grams)

    # A run that recurs has a shorter one that recurs, so once the n-grams all differ, the longer ones do, too.
    return bisect.bisect_left(range(1, len(tokens)), True, key=all_differ)


def refuses(text: str) -> bool:
    """Whether the opening of a response (`OPENING_WORDS`) holds one of `phrases.REFUSALS` outside double quotes.

    What a character says in quotes is part of the task done. Word lists miss refusals put in other words.
    """
    opening = words(_QUOTED.sub(" ", text.translate(_STRAIGHT)))[:OPENING_WORDS]
    return _REFUSAL.search(" ".join(opening)) is not None


def stock_phrases(text: str) -> list[str]:
    """The phrases of `phrases.STOCK_PHRASES` that a text holds as whole words, each once, in the list's order."""
    padded = f" {' '.join(words(text))} "
    return [phrase for phrase in STOCK_PHRASES if f" {phrase} " in padded]


# --- The responses of one condition -----------------------------------------------------------------------------------


def measure_responses(
    responses: Sequence[str], prompt_ids: Sequence[str], draws: int = stats.DRAWS, seed: int = 0
) -> dict:
    """Every measure of one condition's responses, with 95% intervals over prompts, as a dictionary for JSON.

    Args:
      responses: [N] texts.
      prompt_ids: [N], which prompt each one answers; several seeds of a prompt share its id.
      draws, seed: of the bootstrap over prompts (`stats.bootstrap_weights`); the seeds of a prompt go together.

    Returns:
      `unique_ngrams`, `total_ngrams`: word trigrams of all responses together, and `diversity_ratio`, their ratio: the
        published measure. It falls as prompts are added, so it compares conditions on the same prompts only.
      `distinct_1` to `distinct_4`: unique / total n-grams of the seeds of one prompt, mean over prompts.
      `repetition_rate` (`repeated_bigrams`), `longest_repeated_span` and `avg_response_length` (words), `refusal_rate`,
        `stock_phrase_rate` and `empty_rate` (shares of responses): mean over a prompt's responses, then over prompts.
      `empty_responses`: how many have no word. `num_responses`.
      `prompts` [K]: the distinct ids in order; `per_prompt[metric]` [K]: the values whose mean is the metric.
      `intervals[metric]`: (low, high). Counts have none, nor has a metric with values for fewer than two prompts.

    A prompt has None where a metric is undefined (too few words in all its responses) and is left out of its mean.

    A bootstrap of `diversity_ratio` would draw prompts twice, whose n-grams then repeat each other: all its draws lie
    below the estimate. Its `per_prompt` values are the jackknife's instead (Efron and Stein 1981), for K prompts
    ratio + (K - 1) (mean of the ratios without one prompt - ratio without this one). Their mean is the ratio and their
    standard error the jackknife's, so the interval and the comparison of two conditions are made as for any mean.

    The interval of a rate that is 0 at every prompt has no width; `stats.wilson_interval` bounds such a rate.

    Raises ValueError if there is no response or not one prompt id a response.
    """
    _check_texts(responses)
    if len(responses) == 0 or len(prompt_ids) != len(responses):
        raise ValueError(f"{len(responses)} responses and {len(prompt_ids)} prompt_ids; wanted one id a response")
    groups: dict[str, list[str]] = {}
    for prompt, text in zip(prompt_ids, responses, strict=True):
        groups.setdefault(prompt, []).append(text)

    rows = [_of_one_prompt(texts) for texts in groups.values()]
    per_prompt = {name: [row[name] for row in rows] for name in rows[0]}
    per_prompt["diversity_ratio"] = _jackknife_ratios(list(groups.values()))
    unique, total = distinct(responses, POOLED_NGRAM)
    return {
        "unique_ngrams": unique,
        "total_ngrams": total,
        **{name: _mean(values) for name, values in per_prompt.items()},
        "diversity_ratio": _ratio(unique, total),
        "empty_responses": sum(not words(text) for text in responses),
        "num_responses": len(responses),
        "intervals": {name: _interval(values, draws, seed) for name, values in per_prompt.items()},
        "interval_level": stats.LEVEL,
        "prompts": list(groups),
        "per_prompt": per_prompt,
    }


def _of_one_prompt(texts: list[str]) -> dict[str, float | None]:
    return {
        **{f"distinct_{n}": _ratio(*distinct(texts, n)) for n in (1, 2, 3, 4)},
        "repetition_rate": _mean([repeated_bigrams(text) for text in texts]),
        "longest_repeated_span": _mean([longest_repeated_span(text) for text in texts]),
        "refusal_rate": _mean([refuses(text) for text in texts]),
        "stock_phrase_rate": _mean([bool(stock_phrases(text)) for text in texts]),
        "avg_response_length": _mean([len(words(text)) for text in texts]),
        "empty_rate": _mean([not words(text) for text in texts]),
    }


def _jackknife_ratios(groups: list[list[str]]) -> list[float | None]:
    """For each prompt its value of the pooled diversity ratio, see `measure_responses`."""
    grams = [[gram for text in texts for gram in ngrams(words(text), POOLED_NGRAM)] for texts in groups]
    owners = Counter(gram for own in grams for gram in set(own))  # in how many prompts' responses each occurs
    total = np.array([len(own) for own in grams])
    alone = np.array([sum(owners[gram] == 1 for gram in set(own)) for own in grams])
    if len(grams) < 2 or (total == total.sum()).any():
        return [None] * len(grams)  # without the only prompt that has n-grams there is no ratio
    without = (len(owners) - alone) / (total.sum() - total)
    return (len(owners) / total.sum() + (len(grams) - 1) * (without.mean() - without)).tolist()


# --- Two conditions ---------------------------------------------------------------------------------------------------


def compare_responses(a: dict, b: dict, draws: int = stats.DRAWS, seed: int = 0) -> dict[str, dict]:
    """Condition `a` minus condition `b`, both from `measure_responses` for the same prompts.

    For each metric that has `per_prompt` values the mean `difference` over the prompts where both are defined, its
    paired bootstrap `interval` (95%) and the two-sided `p_value` of flipping the signs of the prompts' differences
    (`paired.sign_flip`); all None where fewer than two prompts are left.

    Raises ValueError if the prompts differ.
    """
    if a["prompts"] != b["prompts"]:
        raise ValueError(
            f"a was measured on {len(a['prompts'])} prompts and b on {len(b['prompts'])}, one of them alone on "
            f"{sorted(set(a['prompts']) ^ set(b['prompts']))[:5]}; wanted the same ones in the same order"
        )
    return {name: _compare(values, b["per_prompt"][name], draws, seed) for name, values in a["per_prompt"].items()}


def _compare(a: list[float | None], b: list[float | None], draws: int, seed: int) -> dict:
    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if len(both) < 2:
        return {"difference": None, "interval": None, "p_value": None}
    x, y = np.array(both, dtype=np.float64).T
    low, high = stats.paired_interval(x, y, draws, seed)
    return {
        "difference": float((x - y).mean()),
        "interval": [float(low), float(high)],
        "p_value": float(paired.sign_flip(x - y, seed=seed)),
    }


# --- Values that may be missing ---------------------------------------------------------------------------------------


def _ratio(unique: int, total: int) -> float | None:
    return unique / total if total else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _interval(values: Sequence[float | None], draws: int, seed: int) -> list[float] | None:
    known = np.array([value for value in values if value is not None])
    return [float(end) for end in stats.mean_interval(known, draws, seed)] if len(known) > 1 else None


def _check_texts(responses: Sequence[str]) -> None:
    if isinstance(responses, str):
        raise ValueError(f"responses is {responses[:40]!r}; wanted a list of texts")
