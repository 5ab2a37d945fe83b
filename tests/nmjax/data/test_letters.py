"""The tokens that stand for A to D, in real tokenizers and in made-up ones."""

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import AutoTokenizer

from nmjax.data.letters import Letters, letters_of
from nmjax.data.tokenizer import build_tokenizer
from nmjax.data.world import bundled_world
from nmjax.lm import LanguageModel
from nmjax.paths import checkpoint_dir

SPACED, PLAIN = ["ĠA", "ĠB", "ĠC", "ĠD"], ["A", "B", "C", "D"]


def model_of(tokenizer) -> LanguageModel:
    """Nothing but the tokenizer."""
    return LanguageModel(cast(Any, SimpleNamespace(config=SimpleNamespace(vocab=1_000_000))), {}, tokenizer)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(bundled_world())


@pytest.mark.parametrize(
    ("name", "chat", "form", "tokens", "other"),
    [
        ("tok-qwen2.5", False, "space", SPACED, PLAIN),
        ("tok-qwen2.5", True, "plain", PLAIN, SPACED),
        ("tok-smollm2", False, "space", SPACED, PLAIN),
        ("tok-smollm2", True, "plain", PLAIN, SPACED),
        ("stories260K-hf", False, "plain", PLAIN, None),  # " B" is a token, " A" is two
        ("tiny", False, "space", SPACED, PLAIN),
        ("tiny", True, "space", SPACED, PLAIN),  # its chats go on after "Assistant:"
    ],
)
def test_letters_of_real_tokenizers(request, name, chat, form, tokens, other):
    if name == "tiny":
        folder = checkpoint_dir("tiny")
    elif not (folder := request.getfixturevalue("shared_data") / name).is_dir():
        pytest.skip(f"no tokenizer {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    letters = letters_of(model_of(tokenizer), chat)
    assert letters.form == form and tokenizer.convert_ids_to_tokens(letters.ids) == tokens
    assert letters.other is None if other is None else tokenizer.convert_ids_to_tokens(letters.other) == other
    # Independently: the letter's token goes on from the prompt and decodes to the letter.
    before = tokenizer("Answer:", add_special_tokens=False)["input_ids"]
    decoded = [tokenizer.decode([*before, token]) for token in letters.ids]
    assert decoded == [f"Answer:{' ' if form == 'space' else ''}{letter}" for letter in "ABCD"]


def test_the_form_can_be_chosen(tokenizer):
    spaced, plain = (letters_of(model_of(tokenizer), False, form) for form in ("space", "plain"))
    assert spaced == Letters("space", plain.other, plain.ids) and plain.form == "plain"
    with pytest.raises(ValueError, match="form='both', wanted 'auto', 'space' or 'plain'"):
        letters_of(model_of(tokenizer), False, "both")


@pytest.mark.parametrize(
    ("ending", "form"), [("Assistant:", "space"), ("[/ASK]", "space"), ("\n", "plain"), ("<|eos|>", "plain")]
)
def test_what_ends_the_chat_prompt_decides(tokenizer, ending, form):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}{{ ending }}{% endif %}".replace(
        "ending", repr(ending)
    )
    assert letters_of(model_of(changed), True).form == form
    assert letters_of(model_of(changed), False).form == "space"


def test_a_tokenizer_without_letters_is_named(tokenizer, word_lm):
    with pytest.raises(ValueError, match=r"form='auto': in tokenizer '.+' A to D are space: .*<unk>.*; plain: .*<unk>"):
        letters_of(word_lm, False)
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        letters_of(dataclasses.replace(word_lm, tokenizer=None), False)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    assert letters_of(model_of(bare), False).form == "space"
    with pytest.raises(ValueError, match="no chat template"):
        letters_of(model_of(bare), True)
