"""Which tokens stand for the answers A to D: the letters with a space before them, or without."""

from __future__ import annotations

from dataclasses import dataclass

from nmjax.data.question_prompts import chat_prompt
from nmjax.data.questions import LETTERS
from nmjax.lm import LanguageModel

# Letters are encoded behind a text, as they are met: SentencePiece puts a space before a letter that stands alone.
_CONTEXTS = {"space": ("Answer:", " "), "plain": ("Answer:\n", "")}


@dataclass(frozen=True)
class Letters:
    """One token for each of A to D. `other`: the tokens of the other form, where they exist and all differ from `ids`:
    what a model says there is an answer, too, though not the one that is scored."""

    form: str  # "space" or "plain"
    ids: tuple[int, ...]  # [4]
    other: tuple[int, ...] | None  # [4]


def letters_of(lm: LanguageModel, chat: bool, form: str = "auto") -> Letters:
    """The answer tokens of a model.

    Args:
      chat: whether prompts are chats. It matters to `auto` only.
      form: "space" as in "Answer: A", "plain" as in "A" at the beginning of a line, or "auto": with a space, except
        after a chat template whose prompt ends in white space or a special token; the other form where a letter of the
        preferred one is not a token of its own.

    Raises:
      ValueError: an unknown form; no tokenizer; "auto" for a chat without a chat template; a tokenizer in which the
        letters of the form (for "auto": of both forms) are not four different single tokens.
    """
    if form not in ("auto", *_CONTEXTS):
        raise ValueError(f"form={form!r}, wanted 'auto', 'space' or 'plain'")
    if form != "auto":
        forms = [form]
    elif chat and _starts_afresh(lm):
        forms = ["plain", "space"]
    else:
        forms = ["space", "plain"]
    ids = {name: _single_tokens(lm, name) for name in _CONTEXTS}
    for name in forms:
        if chosen := ids[name]:
            (other,) = (ids[rest] for rest in _CONTEXTS if rest != name)
            return Letters(name, chosen, other if other and not set(other) & set(chosen) else None)
    as_text = lm.tokenizer.convert_ids_to_tokens
    seen = "; ".join(f"{name}: {[as_text(ids) for ids in _pieces(lm, name)]}" for name in forms)
    tokenizer = lm.tokenizer.name_or_path or type(lm.tokenizer).__name__
    raise ValueError(f"form={form!r}: in tokenizer {tokenizer!r} A to D are {seen}; wanted four different tokens")


def _starts_afresh(lm: LanguageModel) -> bool:
    """Whether the answer to a chat begins a line or follows a special token, so that no space belongs before it."""
    prompt = chat_prompt(lm.tokenizer, "?")
    return prompt[-1].isspace() or lm.encode(prompt, special=False)[-1] in lm.tokenizer.added_tokens_decoder


def _pieces(lm: LanguageModel, form: str) -> list[list[int]]:
    """What each letter adds to the tokens of a text before it; all tokens of the two where it changes these."""
    text, space = _CONTEXTS[form]
    before = lm.encode(text, "letters", special=False)
    after = [lm.encode(f"{text}{space}{letter}", "letters", special=False) for letter in LETTERS]
    return [ids[len(before) :] if ids[: len(before)] == before else ids for ids in after]


def _single_tokens(lm: LanguageModel, form: str) -> tuple[int, ...] | None:
    pieces = _pieces(lm, form)
    ids = tuple(piece[0] for piece in pieces if len(piece) == 1)
    return ids if len(set(ids)) == len(LETTERS) else None
