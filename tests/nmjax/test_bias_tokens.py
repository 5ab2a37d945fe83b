"""Words and directions by name: the tokens that words begin with, steering vectors of the model's own."""

import base64
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

import models
import nmjax
from nmjax import paths
from nmjax.interventions.compose import batch
from nmjax.interventions.sampler import first_token_ids


class Wordy:
    """As much of a model as a list of words needs: a tokenizer, and room for its ids."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.config = type("Config", (), {"vocab": len(tokenizer), "bos_id": None})

    encode = nmjax.lm.LanguageModel.encode


@pytest.fixture(scope="module")
def bundled():
    return models.load(paths.checkpoint_dir("tiny"))


def vocabulary(folder) -> dict[str, int]:
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]


def test_spellings_in_the_bundled_vocabulary(bundled):
    """Against the tokenizer's file: with and without a space, as written and capitalised."""
    vocab = vocabulary(paths.checkpoint_dir("tiny"))
    for word in ("the", "Once", "little", "day"):
        wanted = set()
        for text in (word, f" {word}", word.capitalize(), f" {word.capitalize()}"):
            pieces = bundled.tokenizer.tokenize(text)
            assert "".join(pieces) == text.replace(" ", "Ġ")
            wanted.add(vocab[pieces[pieces[0] == "Ġ"]])  # a space of its own says nothing about the word
        assert first_token_ids(bundled, [word]) == wanted
        assert f"Ġ{word}" not in vocab or vocab[f"Ġ{word}"] in wanted
    assert vocab["Ġ"] not in first_token_ids(bundled, ["little", "day"])
    found = first_token_ids(bundled, ["the", "day"])
    assert found == first_token_ids(bundled, ["the"]) | first_token_ids(bundled, ["day"])


@pytest.mark.parametrize("name", ["tok-qwen2.5", "tok-smollm2"])
def test_byte_level_vocabularies(shared_data, name):
    lm = Wordy(AutoTokenizer.from_pretrained(shared_data / name))
    vocab = lm.tokenizer.get_vocab()
    wanted = {vocab[token] for token in ("happy", "Ġhappy", "Happy", "ĠHappy") if token in vocab}
    assert len(wanted) >= 3 and wanted <= first_token_ids(lm, ["happy"])
    # A word of several tokens counts by the first of them, here a piece of it.
    for token in first_token_ids(lm, ["unfathomableness"]):
        assert "unfathomableness".startswith(lm.tokenizer.decode([token]).strip().lower())
    assert all(lm.tokenizer.decode([t]).strip() for t in first_token_ids(lm, ["\tword", " x"]))


def test_llama3_vocabulary(shared_data):
    """A file of byte strings and their ranks: a word that is one of them is one token, whatever it merges from."""
    lines = (shared_data / "tok-llama3" / "tokenizer.model").read_text(encoding="utf-8").splitlines()
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in map(str.split, lines)}
    pieces = {rank: piece for piece, rank in ranks.items()}

    class Tokens:
        unk_token_id = None

        def __call__(self, text, add_special_tokens=False):
            whole = text.encode()
            return {"input_ids": [ranks[whole]] if whole in ranks else [ranks[bytes([byte])] for byte in whole]}

        def __len__(self):
            return len(ranks)

        def decode(self, ids):
            return b"".join(pieces[i] for i in ids).decode(errors="replace")

    wanted = {ranks[piece] for piece in (b"happy", b" happy", b"Happy", b" Happy") if piece in ranks}
    assert len(wanted) == 4 and first_token_ids(Wordy(Tokens()), ["happy"]) == wanted


def test_pieces_of_white_space_do_not_count(shared_data):
    """A SentencePiece vocabulary writes the space that begins a text as a piece of its own."""
    lm = models.load(shared_data / "stories260K-hf")
    vocab = lm.tokenizer.get_vocab()
    alone = vocab["▁"]
    assert lm.tokenizer(" happy", add_special_tokens=False)["input_ids"][0] == alone
    found = first_token_ids(lm, ["happy", "xylophone", "q"])
    assert alone not in found and {vocab["▁happy"], vocab["x"], vocab["q"]} <= found
    (effect,) = batch([nmjax.bias_tokens(["xylophone"], 2.0)], lm)
    assert effect.bias[0, alone] == 0 and effect.bias[0, vocab["x"]] == 2
    assert lm.tokenizer.unk_token_id not in found


def test_logits_move_by_the_bias_and_nothing_else(word_lm):
    """A whole-word vocabulary: token i is the word wi. What both lists begin with gets nothing."""
    prompts = [[5, 6, 7], [5, 6, 7], [8, 9]]
    packs = [
        nmjax.bias_tokens(["w10", "w11", "w12"], 3.0, ["w12", "w13"], -1.5).at(0.5),
        None,
        nmjax.compose(nmjax.bias_tokens(["w20"], -2.0), nmjax.bias_tokens(["w20", "w21"], 0.5)),
    ]
    moved = np.asarray(nmjax.forward(word_lm, prompts, packs).next_logits)
    plain = np.asarray(nmjax.forward(word_lm, prompts, [packs[0].at(0), None, packs[2].at(0)]).next_logits)
    wanted = np.zeros((3, 97))
    wanted[0, [10, 11]], wanted[0, 13], wanted[2, 20], wanted[2, 21] = 1.5, -0.75, -1.5, 0.5
    np.testing.assert_allclose(moved - plain, wanted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal((moved - plain)[wanted == 0], 0)


def test_lists_share_a_slot(word_lm):
    packs = [nmjax.bias_tokens([f"w{i}"], i) for i in (10, 11)]
    (effect,) = batch([*packs, None], word_lm)
    assert effect.bias.shape == (3, 97) and effect.bias[0, 10] == 10 and effect.bias[1, 11] == 11
    assert effect.dose.tolist() == [1, 1, 0]


def test_mistakes_are_named(word_lm, tiny_lm):
    for lm, effect, words in (
        (tiny_lm, nmjax.bias_tokens(["w5"], 1), "no tokenizer"),
        (word_lm, nmjax.bias_tokens(["happy"], 1), "no token that 'happy' begins with"),
        (word_lm, nmjax.bias_tokens(["w5"], 1, ["w5"], -1), "begin with the same tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            nmjax.forward(lm, [[5]], nmjax.compose(effect, name="mine"))
    for words in ("happy", [], [""], [" "], [3]):
        with pytest.raises(ValueError, match="words"):
            nmjax.bias_tokens(words, 1.0)
    with pytest.raises(ValueError, match="against=inf"):
        nmjax.bias_tokens(["a"], 1.0, ["b"], float("inf"))
