"""Records of the introspection study as tokens: a conversation that is perturbed, and a question that is not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from nmjax.data.introspection_records import Record

ANSWER_PREFIX = "The answer is"


@dataclass(frozen=True)
class Segments:
    """Token ids of a record.

    Attributes:
      prefix: the conversation [P], with all that the chat template puts into it, the special tokens included.
      question: what follows [Q]: the user's question and the assistant's answer up to where `answers` begin.
      perturbed: which tokens of the prefix [P] a perturbation acts on.
      answers: the ids of each answer; none begins with another one. Of two answers, each is a single token.
    """

    prefix: tuple[int, ...]
    question: tuple[int, ...]
    perturbed: tuple[bool, ...]
    answers: tuple[tuple[int, ...], ...]


def encode(record: Record, tokenizer: Any, answer_prefix: str | None = ANSWER_PREFIX) -> Segments:
    """The tokens of a record, by the tokenizer's own chat template; `answer_prefix` is put into the assistant's mouth.

    With None, the assistant says what it will: its turn has only begun, and `answers` is empty.

    Raises:
      ValueError: no chat template, or no fast tokenizer; a template or a tokenizer in which what is asked changes the
        conversation before it; a numbered sentence without a token; answers that are not single tokens where there are
        two, or begin with each other. Records, and the pieces of answers, are named.
    """
    prefix_text, text = _texts(record, tokenizer, answer_prefix)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = tuple(encoded["input_ids"]), encoded["offset_mapping"]
    prefix = tuple(tokenizer(prefix_text, add_special_tokens=False)["input_ids"])
    if ids[: len(prefix)] != prefix:
        at = next(k for k, token in enumerate(prefix) if ids[k : k + 1] != (token,))
        alone, together = (tokenizer.convert_ids_to_tokens(part[at:][:4]) for part in (prefix, ids))
        raise ValueError(
            f"record {record.id!r}: its question changes the tokens of its conversation, from {alone} to {together}"
        )
    return Segments(
        prefix=prefix,
        question=ids[len(prefix) :],
        perturbed=_perturbed(record, prefix_text, offsets[: len(prefix)]),
        answers=() if answer_prefix is None else _answers(record, tokenizer, text, ids),
    )


def encode_all(records: Sequence[Record], tokenizer: Any, answer_prefix: str | None = ANSWER_PREFIX) -> list[Segments]:
    """`encode` of each record; those with equal texts share their segments."""
    known: dict[tuple, Segments] = {}
    segments = []
    for record in records:
        texts = (record.conversation, record.answers, record.spans, record.sentence)
        if texts not in known:
            known[texts] = encode(record, tokenizer, answer_prefix)
        segments.append(known[texts])
    return segments


def _texts(record: Record, tokenizer: Any, answer_prefix: str | None) -> tuple[str, str]:
    """The conversation, and with the question and the beginning of its answer."""
    if tokenizer is None or not tokenizer.chat_template or not tokenizer.is_fast:
        raise ValueError(f"the tokenizer is {type(tokenizer).__name__}; wanted a fast one with a chat template")

    def render(*messages: dict[str, str], **options: bool) -> str:
        try:
            return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except jinja2.TemplateError as error:
            raise ValueError(f"record {record.id!r}: the chat template refuses its conversation: {error}") from error

    conversation = [
        {"role": "system", "content": record.system},
        {"role": "user", "content": record.context},
        {"role": "assistant", "content": record.reply},
    ]
    question = {"role": "user", "content": record.question}
    if answer_prefix is None:
        text = render(*conversation, question, add_generation_prompt=True)
    else:
        answer = {"role": "assistant", "content": answer_prefix}
        text = render(*conversation, question, answer, continue_final_message=True)
    prefix = render(*conversation)
    if not text.startswith(prefix):
        # Some templates show the thoughts behind an answer, but only behind the last one. So the question's turn is
        # taken off a conversation that goes on.
        asked, turn = render(*conversation, question), render(question)
        prefix = asked.removesuffix(turn)
        if prefix == asked or not text.startswith(prefix):
            raise ValueError(
                f"record {record.id!r}: the chat template changes its conversation when a question follows"
            )
    return prefix, text


def _perturbed(record: Record, text: str, offsets: Sequence[tuple[int, int]]) -> tuple[bool, ...]:
    """Of each token of the conversation whether it is perturbed: all are, or those that hold a part of the sentence."""
    if record.sentence is None:
        return (True,) * len(offsets)
    if text.count(record.context) != 1:
        raise ValueError(f"record {record.id!r}: its context is {text.count(record.context)} times in the conversation")
    start, end = (text.index(record.context) + place for place in record.spans[record.sentence])
    perturbed = tuple(first < end and last > start for first, last in offsets)
    if not any(perturbed):
        raise ValueError(f"record {record.id!r}: sentence {record.sentence} has no token")
    return perturbed


def _answers(record: Record, tokenizer: Any, text: str, ids: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The tokens that each answer adds to the text."""
    found = []
    for answer in record.answers:
        whole = tuple(tokenizer(text + answer, add_special_tokens=False)["input_ids"])
        added = whole[len(ids) :]
        pieces = tokenizer.convert_ids_to_tokens(added)
        if whole[: len(ids)] != ids or not added:
            raise ValueError(f"record {record.id!r}: the answer {answer!r} changes the tokens of {text[-20:]!r}")
        if len(record.answers) == 2 and len(added) > 1:
            raise ValueError(f"record {record.id!r}: the answer {answer!r} is {pieces}; wanted a single token")
        found.append(added)
    for (a, short), (b, long) in itertools.permutations(zip(record.answers, found, strict=True), 2):
        if long[: len(short)] == short:
            raise ValueError(f"record {record.id!r}: the tokens of answer {b!r} begin with those of answer {a!r}")
    return tuple(found)
