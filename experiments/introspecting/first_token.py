"""How an answer would begin: the chat that asks, and what the words yes, no and so on hold of the first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from scipy.special import logsumexp

from nmjax.lm import LanguageModel

VARIANTS = {
    "yes": ("Yes", " Yes", "yes", " yes"),
    "no": ("No", " No", "no", " no"),
    "as": ("As", " As"),  # as in "As an AI"
    "i": ("I", " I"),
    "my": ("My", " My"),
}
"""The ways in which each word may begin an answer."""

REQUIRED = ("yes", "no")


def chat_ids(lm: LanguageModel, system: str, question: str, answer_prefix: str = "") -> list[int]:
    """Token ids of a chat up to where the answer begins, or up to what is put into the assistant's mouth.

    Raises ValueError for a model without a chat template, or with one that refuses the chat.
    """
    tokenizer = lm.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(f"the model's tokenizer is {type(tokenizer).__name__}; wanted one with a chat template")
    chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    if answer_prefix:
        chat.append({"role": "assistant", "content": answer_prefix})
    ends = {"continue_final_message": True} if answer_prefix else {"add_generation_prompt": True}
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, **ends)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses a system prompt and the question {question!r}: {error}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def word_tokens(lm: LanguageModel, words: Sequence[str]) -> dict[str, list[int]]:
    """By word of `VARIANTS`, the ids of those of its variants that are single tokens.

    Raises ValueError where none is, for a word of `REQUIRED`; others have an empty list then.
    """
    found = {}
    for word in words:
        encoded = [lm.encode(text, "variant", special=False) for text in VARIANTS[word]]
        # A token for all that is unknown says nothing.
        known = [ids[0] for ids in encoded if len(ids) == 1 and ids[0] != lm.tokenizer.unk_token_id]
        found[word] = list(dict.fromkeys(known))
        if word in REQUIRED and not known:
            raise ValueError(
                f"none of {list(VARIANTS[word])} is a single token of this model's tokenizer, they have "
                f"{[len(ids) for ids in encoded]}; wanted at least one"
            )
    return found


def first_token(lm: LanguageModel, logprobs: np.ndarray, tokens: Mapping[str, Sequence[int]], top: int) -> dict:
    """What is kept of a distribution [V] of the first token.

    Returns {"log_p": the log-probability of each word, all its variants together, None for one that has none or that
    is not finite, "top": the likeliest tokens as [text, id, log-probability]}.
    """
    row = np.asarray(logprobs, np.float64)
    log_p = {word: float(logsumexp(row[ids])) if len(ids) else None for word, ids in tokens.items()}
    best = [int(i) for i in np.argsort(-row, kind="stable")[:top] if np.isfinite(row[i])]
    return {
        "log_p": {word: value if value is not None and np.isfinite(value) else None for word, value in log_p.items()},
        "top": [[lm.tokenizer.decode([i]), i, float(row[i])] for i in best],
    }


def probabilities(records: Sequence[Mapping[str, Any]], word: str) -> np.ndarray:
    """P of a word [N] in what `first_token` kept; NaN where there is none."""
    values = [record["log_p"].get(word) for record in records]
    return np.exp(np.array([np.nan if value is None else value for value in values], np.float64))
