"""How a question is put to a model: alone, after solved examples of its subject, or as the message of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nmjax.data.questions import LETTERS, Question, format_mmlu


def few_shot_header(subject: str) -> str:
    """The sentence above MMLU's few-shot prompts, with the empty line after it."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def few_shot_prefix(subject: str, examples: Sequence[Question]) -> str:
    """The header and the examples with their letters, an empty line after each: a question's prompt goes behind it."""
    solved = [f"{format_mmlu(example)} {LETTERS[example.answer]}\n\n" for example in examples]
    return few_shot_header(subject) + "".join(solved)


def prompt_of(question: Question, examples: Sequence[Question] = ()) -> str:
    """The question in MMLU's format, after the solved `examples` if there are any."""
    prefix = few_shot_prefix(question.subject, examples) if examples else ""
    return prefix + format_mmlu(question)


def chat_prompt(tokenizer: Any, prompt: str) -> str:
    """`prompt` as the user's only message in the tokenizer's chat template, up to where the assistant's answer begins.

    The template writes the special tokens itself: encode with `lm.encode(text, special=False)`. Models whose template
    can switch thinking off are asked to answer at once.

    Raises ValueError where the tokenizer has no chat template, or there is no tokenizer.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("this model's tokenizer has no chat template; wanted one, to ask as a chat")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
