"""The chats that the bundled model is tuned on: a fixed set, nothing held out in them, and only answers in the loss."""

import collections
import re

import numpy as np
import pytest

from nmjax.data.demonstrations import BARE_SHARE, MIXTURE, STOCK, PackedChats, demonstrations, encode_chat
from nmjax.data.questions import LETTERS
from nmjax.data.tokenizer import BOS, EOS, build_tokenizer
from nmjax.data.world import FORMS, STATEMENT_FORMS, bundled_world, is_reserved_form, is_reserved_options

QUESTION = re.compile(r"(.+)\nA\. (.+)\nB\. (.+)\nC\. (.+)\nD\. (.+)(?:\n\nAnswer:(?: ([A-D])$)?)?", re.MULTILINE)


@pytest.fixture(scope="module")
def world():
    return bundled_world()


@pytest.fixture(scope="module")
def tokenizer(world):
    return build_tokenizer(world)


@pytest.fixture(scope="module")
def shown(world):
    return demonstrations(world, 3000)


@pytest.fixture(scope="module")
def exchanges(shown):
    """(request, answer) of every demonstration."""
    return [(one.chat[i]["content"], one.chat[i + 1]["content"]) for one in shown for i in range(0, len(one.chat), 2)]


def test_the_set_is_fixed(world, shown):
    assert demonstrations(world, 500) == shown[:500]
    assert demonstrations(world, 500, seed=1) != shown[:500]
    counts = collections.Counter(one.kind for one in shown)
    assert sum(MIXTURE.values()) == pytest.approx(1)
    for kind, share in MIXTURE.items():
        assert counts[kind] / 3000 == pytest.approx(share, abs=0.03)
    for one in shown:
        assert [message["role"] for message in one.chat] == ["user", "assistant"] * (len(one.chat) // 2)
    with pytest.raises(ValueError, match="n must be 1 or more, got 0"):
        demonstrations(world, 0)


def test_questions_are_training_questions_with_their_answers(world, exchanges):
    """Every question in any message, against all wordings there are."""
    wordings = {}
    for fact in world.facts:
        for form, text in enumerate(FORMS):
            wording = text.format(r=fact.relation.name, e=fact.entity, k=fact.relation.kind)
            wordings[wording] = fact, is_reserved_form(fact.relation, form)
    assert sum(reserved for _, reserved in wordings.values()) > 2000, "there must be something to find"
    found, bare = 0, []
    for request, answer in exchanges:
        questions = QUESTION.findall(request)
        for index, (text, *options, letter) in enumerate(questions):
            fact, reserved = wordings[text]
            assert not reserved and not is_reserved_options(fact, tuple(options))
            last = index == len(questions) - 1
            assert options[LETTERS.index(answer if last else letter)] == fact.value
        found += len(questions)
        if request.startswith("The following"):
            assert request.endswith("Answer:")
        elif questions:
            bare.append(not request.endswith("Answer:"))
    assert found > 1500 and np.mean(bare) == pytest.approx(BARE_SHARE, abs=0.05)


def test_judgements_are_right(world, exchanges):
    true = {
        form.format(r=fact.relation.name, e=fact.entity, k=fact.relation.kind, v=fact.value)
        for fact in world.facts
        for form in STATEMENT_FORMS
    }
    said = collections.Counter()
    for request, answer in exchanges:
        if request.startswith("Statement: "):
            statement = request.removeprefix("Statement: ").split("\n")[0]
            wanted = "yes" if statement in true else "no"
            assert answer == (wanted.capitalize() if "Yes or No" in request else wanted)
            said[answer] += 1
    assert min(said.values()) > 20 and set(said) == {"yes", "no", "Yes", "No"}


def test_stories_are_about_what_was_asked_for(shown):
    asked = 0
    for one in shown:
        request, answer = one.chat[0]["content"], one.chat[1]["content"]
        if one.kind == "story" and (subject := re.search(r" about (?:an? )?(\w+)", request)):
            assert subject.group(1) in re.findall(r"\w+", answer.split(".")[0])
            asked += 1
        assert one.kind != "stock" or answer in STOCK
    assert asked > 300


def test_answers_are_in_the_tokenizers_words(tokenizer, exchanges):
    for _, answer in exchanges:
        ids = tokenizer.encode(f" {answer}", add_special_tokens=False)
        assert len(ids) == len(re.findall(r"\w+|[^\w\s]", answer)), answer


def test_the_loss_is_what_the_assistant_writes(tokenizer, shown):
    several = 0
    for one in shown[:400]:
        ids, weights = map(np.array, encode_chat(tokenizer, one.chat))
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(one.chat, tokenize=False)
        answers = [message["content"] for message in one.chat if message["role"] == "assistant"]
        assert tokenizer.decode(ids[weights == 1]) == "".join(f" {answer}{EOS}" for answer in answers)
        prompt = tokenizer.decode(ids[weights == 0])
        assert prompt.startswith(f"{BOS}User: ") and EOS not in prompt
        assert prompt.count("Assistant:") == len(answers)
        assert set(weights.tolist()) == {0.0, 1.0}
        several += len(answers) > 1
    assert several > 5


def test_windows_hold_whole_chats_each_once_an_epoch(tokenizer, shown):
    chats = [one.chat for one in shown[:40]]
    encoded = [encode_chat(tokenizer, chat) for chat in chats]
    packed = PackedChats(tokenizer, chats, steps=20, rows=3, length=128, seed=5)
    assert len(packed) == 20 and packed[0]["tokens"].shape == (3, 129) and packed[0]["weights"].shape == (3, 128)
    seen = []
    for step in range(20):
        for tokens, weights in zip(packed[step]["tokens"], packed[step]["weights"], strict=True):
            starts = [*np.flatnonzero(tokens == tokenizer.bos_token_id), len(tokens)]
            weights = np.concatenate([[0.0], weights])  # of predicting each token; nothing predicts the first
            for start, end in zip(starts, starts[1:], strict=False):
                chat = tokens[start:end]
                length = int((chat != tokenizer.pad_token_id).sum())
                seen.append((chat[:length].tolist(), weights[start : start + length].tolist()))
                assert not weights[start + length : end].any()
    assert len(seen) == packed.epochs * 40 > 100
    first, second = seen[:40], seen[40:80]
    assert sorted(first) == sorted(second) == sorted(encoded) and first != second
    again = PackedChats(tokenizer, chats, steps=20, rows=3, length=128, seed=5)
    other = PackedChats(tokenizer, chats, steps=20, rows=3, length=128, seed=6)
    np.testing.assert_array_equal(packed.tokens, again.tokens)
    assert (packed.tokens != other.tokens).any()
    longest = max(len(ids) for ids, _ in encoded)
    with pytest.raises(ValueError, match=f"length must be at least {longest - 1}.* got {longest - 2}"):
        PackedChats(tokenizer, chats, steps=1, rows=1, length=longest - 2)
