"""The byte-level BPE that is trained on the spot, and tokenizers by name."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nmjax.data.bpe import END_OF_TEXT, SMALLEST, text_tokenizer, train_bpe
from nmjax.paths import checkpoint_dir

CORPUS = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3  # of Sennrich et al. 2016
TEXTS = ["Once upon a time there was a duck.", "It's a duck, isn't it?\n\nYes\tit is!  Ünï ✓ 🦆", "1 + 1 = 2"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS * 3, 300)


def learnt(tokenizer):
    return {token for token in tokenizer.get_vocab() if len(token) > 1} - {END_OF_TEXT}


def test_merges_are_those_of_the_commonest_pairs():
    # es and st stand in 9 words, then es + t; lo and ow in 7, then lo + w; ne, ew, we, est with w are next, with 6.
    assert learnt(train_bpe(CORPUS, SMALLEST + 2)) == {"es", "est"}
    assert learnt(train_bpe(CORPUS, SMALLEST + 4)) == {"es", "est", "lo", "low"}
    assert train_bpe(CORPUS, SMALLEST + 4).tokenize("lowest newer") == ["low", "est", "Ġ", "n", "e", "w", "e", "r"]


def test_encoding_merges_in_the_order_learnt(tokenizer):
    """Against merging by hand, pair by pair, within the pieces that GPT-2's rules make."""
    core = tokenizer.backend_tokenizer
    merges = [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]
    assert len(merges) > 20
    for text in [*TEXTS, "There is a duckling upon it"]:
        tokens = []
        for piece, _ in core.pre_tokenizer.pre_tokenize_str(text):
            parts = list(piece)
            for left, right in merges:
                at = 0
                while at + 1 < len(parts):
                    if (parts[at], parts[at + 1]) == (left, right):
                        parts[at : at + 2] = [left + right]
                    at += 1
            tokens += parts
        assert tokenizer.tokenize(text) == tokens


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_one_special_token_and_the_same_every_time(tokenizer):
    assert len(tokenizer) == 300 and set(tokenizer.all_special_tokens) == {END_OF_TEXT}
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == end
    assert end not in tokenizer.encode("no end here")
    assert train_bpe(iter(TEXTS * 3), 300).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(train_bpe(["ab"], 5000)) == SMALLEST + 1  # no pair is left to merge


def test_tokenizers_by_name(tokenizer, tmp_path):
    assert text_tokenizer("bpe:300", TEXTS * 3).get_vocab() == tokenizer.get_vocab()
    bundled = Tokenizer.from_file(str(checkpoint_dir("tiny") / "tokenizer.json"))
    assert text_tokenizer("bundled", []).get_vocab() == bundled.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    again = text_tokenizer(str(tmp_path), [])
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert again.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bpe:many", "tokenizer='bpe:many'; wanted bpe:SIZE, such as bpe:1024"),
        ("bpe:-5", "tokenizer='bpe:-5'; wanted bpe:SIZE"),
        ("bpe:256", "vocab must be 257 or more .*, got 256"),
        ("owner/missing", "tokenizer='owner/missing'; wanted bpe:SIZE, 'bundled', or a tokenizer in a folder or on"),
        ("./missing", "tokenizer='./missing'; wanted"),
    ],
)
def test_a_tokenizer_that_is_not_to_be_had(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        text_tokenizer(name, TEXTS)
    assert "\n" not in str(caught.value)
