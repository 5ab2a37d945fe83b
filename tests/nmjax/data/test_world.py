"""The bundled world: determinism, the split between training and held-out questions, windows and tokenizer."""

import collections
import hashlib
import itertools
import json
import random
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

from nmjax.data.corpus import ANSWER_WEIGHT, BASICS, LETTERS, MIXTURE, Windows, draw_document
from nmjax.data.questions import format_mmlu
from nmjax.data.tokenizer import SPECIALS, build_tokenizer, save_tokenizer
from nmjax.data.words import AFFECT, FEELINGS, POOLS
from nmjax.data.world import FORMS, World, bundled_world, held_out_questions, held_out_statements, is_reserved_form


@pytest.fixture(scope="module")
def world():
    return bundled_world()


@pytest.fixture(scope="module")
def tokenizer(world):
    return build_tokenizer(world)


def make_windows(world, tokenizer, **changes):
    settings = {"steps": 5000, "tokens": 2048, "lengths": (128, 128), "seed": 3} | changes
    return Windows(
        world=world, tokenizer=tokenizer.backend_tokenizer, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id,
        first_word=len(SPECIALS), vocab=len(tokenizer), **settings,
    )  # fmt: skip


def test_facts_are_the_same_in_every_python_version(world):
    rows = [(fact.entity, fact.relation.name, fact.value, fact.rank) for fact in world.facts]
    assert rows == [(f.entity, f.relation.name, f.value, f.rank) for f in World().facts]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest[:16] == "7cb6d1b755345a95", f"the world has changed under Python {sys.version_info[:2]}"
    assert World(seed=8).facts[0] != world.facts[0]


def test_the_corpus_is_the_one_the_bundled_model_was_trained_on(world):
    rng = random.Random(0)
    documents = [draw_document(world, rng) for _ in range(2000)]
    assert len({document[0][0].partition(" ")[0] for document in documents}) > 30
    text = "\0".join(f"{text}|{weight}" for document in documents for text, weight in document)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "536cd35144fbfa81"


def test_exposure_follows_zipf(world):
    by_rank = sorted(world.facts, key=lambda fact: fact.rank)
    assert [fact.rank for fact in by_rank] == list(range(len(world.facts)))
    exposure = np.array([fact.exposure for fact in by_rank])
    assert exposure.sum() == pytest.approx(1.0)
    assert (np.diff(exposure) < 0).all() and exposure[0] > 50 * exposure[-1]
    rng = random.Random(0)
    drawn = collections.Counter(world.draw_fact(rng).id for _ in range(20_000))
    common = sum(drawn[fact.id] for fact in by_rank[:100]) / 20_000
    assert common == pytest.approx(exposure[:100].sum(), abs=0.015)


def test_held_out_questions_are_well_formed_and_repeatable(world):
    questions = held_out_questions(4000, seed=5)
    assert len({question.id for question in questions}) == len({format_mmlu(q) for q in questions}) == 4000
    assert questions[:100] == held_out_questions(100, seed=5)
    assert questions[:100] != held_out_questions(100, seed=6)
    truth = {(fact.entity, fact.relation.name): fact for fact in world.facts}
    for question in questions:
        fact = world.facts[int(question.id.split("-")[1])]
        assert truth[fact.entity, fact.relation.name] is fact
        assert question.options[question.answer] == fact.value
        assert len(set(question.options)) == 4 and set(question.options) <= set(world.pools[fact.relation.pool])
        assert fact.entity in question.text and fact.relation.name in question.text
    counts = np.bincount([question.answer for question in questions], minlength=4)
    assert counts.min() > 900, "the right letter must be uniform"
    with pytest.raises(ValueError, match="n must be 1 or more, got 0"):
        held_out_questions(0)


def test_no_held_out_question_is_ever_a_training_question(world):
    """By construction (wordings and option lists are kept back), and seen on a sample of training questions."""
    for relation in world.relations:
        reserved = [form for form in range(len(FORMS)) if is_reserved_form(relation, form)]
        assert len(reserved) == 2
    used = {form for relation in world.relations for form in range(len(FORMS)) if not is_reserved_form(relation, form)}
    assert used == set(range(len(FORMS))), "every wording is trained on for some relation"

    rng = random.Random(1)
    training = [world.question(rng) for _ in range(20_000)]
    held_out = held_out_questions(4000)
    wordings = {question.text for question in training}
    assert not wordings & {question.text for question in held_out}
    option_lists = {(question.id.split("-")[1], question.options) for question in training}
    assert not option_lists & {(question.id.split("-")[1], question.options) for question in held_out}


def test_no_document_of_the_corpus_holds_a_held_out_wording(world):
    rng = random.Random(2)
    text = "\n".join(segment for _ in range(8000) for segment, _ in draw_document(world, rng))
    asked = [question for question in held_out_questions(300) if f"{question.text}\nA." in text]
    assert not asked
    trained = [world.question(rng) for _ in range(300)]
    assert sum(f"{question.text}\nA." in text for question in trained) > 30, "the search must be able to find wordings"


def test_statements_know_whether_they_are_true(world):
    statements = held_out_statements(600, seed=1)
    assert statements == held_out_statements(600, seed=1)
    assert 240 < sum(statement.true for statement in statements) < 360
    facts = collections.defaultdict(set)
    for fact in world.facts:
        facts[fact.entity, fact.relation.name].add(fact.value)
    for statement in statements:
        subject_facts = [
            f for f in world.facts if f.entity in statement.text.replace(".", " ").replace(",", " ").split()
        ]
        right = any(
            f" {f.relation.name} " in statement.text and f.value in statement.text.strip(".").split()
            for f in subject_facts
        )
        assert right == statement.true, statement
        assert statement.prompt.endswith("Answer:")


def test_windows_are_indexed_by_step(world, tokenizer):
    windows = make_windows(world, tokenizer)
    first, again = windows[17], make_windows(world, tokenizer)[17]
    np.testing.assert_array_equal(first["tokens"], again["tokens"])
    np.testing.assert_array_equal(first["weights"], again["weights"])
    assert (windows[18]["tokens"] != first["tokens"]).any()
    assert (make_windows(world, tokenizer, seed=4)[17]["tokens"] != first["tokens"]).any()
    assert first["tokens"].shape == (16, 129) and first["tokens"].dtype == np.int32
    assert first["weights"].shape == (16, 128) and first["weights"].dtype == np.float32
    assert first["tokens"].min() >= 0 and first["tokens"].max() < len(tokenizer)
    assert (first["tokens"][:, 0] == tokenizer.bos_token_id).all()


def test_windows_change_with_the_step(world, tokenizer):
    windows = make_windows(world, tokenizer, lengths=(48, 128), switch=20, basics=10, repeated=(0.5, 0.0))
    assert windows[19]["tokens"].shape == (42, 49) and windows[20]["tokens"].shape == (16, 129)
    parts = (range(10), range(10, 20))
    text = ["".join(tokenizer.decode(windows[step]["tokens"].ravel()) for step in part) for part in parts]
    drills = [part.count("Letters:") for part in text]
    assert drills[0] > 1.5 * drills[1] > 0  # half of the early rows are random blocks, and still


def test_repeated_windows_weigh_only_what_can_be_known(world, tokenizer):
    sizes = []
    for seed in range(20):
        batch = make_windows(world, tokenizer, seed=seed, repeated=(0.25, 0.25))[4000]
        for tokens, weights in zip(batch["tokens"][:4, 1:], batch["weights"][:4], strict=True):
            size = int(np.flatnonzero(weights)[0]) - 1  # nothing tells where the second copy begins
            np.testing.assert_array_equal(tokens[size:], tokens[:-size])
            assert (weights[size + 1 :] == 1).all()
            sizes.append(size)
    assert min(sizes) < 8 and 56 < max(sizes) <= 64


def test_the_weight_marks_the_letter(world, tokenizer):
    batch = make_windows(world, tokenizer, repeated=(0, 0))[4000]
    letters = {tokenizer.encode(f" {letter}", add_special_tokens=False)[0] for letter in LETTERS}
    cue = tokenizer.encode("\n\nAnswer:", add_special_tokens=False)[-1]
    seen = 0
    for tokens, weights in zip(batch["tokens"], batch["weights"], strict=True):
        for before, token, weight in zip(tokens[:-1], tokens[1:], weights, strict=True):
            if before == cue and token in letters:
                assert weight == ANSWER_WEIGHT
                seen += 1
            if token == tokenizer.bos_token_id:
                assert weight == 0
    assert seen > 20
    assert sum(MIXTURE.values()) == pytest.approx(1.0)
    assert sum(BASICS.values()) == pytest.approx(1.0)


def test_tokenizer_encodes_any_text(tokenizer):
    rng = random.Random(0)
    ranges = [(32, 127), (9, 14), (0x80, 0x800), (0x800, 0xD7FF), (0xE000, 0x10000), (0x10000, 0x10FFFF), (32, 33)]
    for _ in range(500):
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    for text in ("", " ", "\n", "\t\tx \n\n  y\r\n", "Once upon a time, 1234.5 naïve café 日本語 🙂"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.unk_token is None
    assert tokenizer.encode("A")[0] == tokenizer.bos_token_id


def test_words_are_single_tokens(world, tokenizer):
    words = [*AFFECT, *itertools.chain(*POOLS.values()), *itertools.chain(*FEELINGS.values()), *world.pools["town"]]
    words += [name for names in world.entities.values() for name in names]
    texts = [f" {word}" for word in [*words, *"ABCD0123456789", "yes", "no", "Yes", "No"]]
    texts += [*"ABCD0123456789", "yes", "no", "Yes", "No"]
    long = [text for text in texts if len(tokenizer.encode(text, add_special_tokens=False)) != 1]
    assert not long
    assert len(tokenizer.encode(" 407", add_special_tokens=False)) == 3, "digits stay single"


def test_held_out_questions_have_no_token_that_training_lacks(world, tokenizer):
    windows = make_windows(world, tokenizer, repeated=(0, 0), tokens=8192)
    seen = np.unique([windows[step]["tokens"] for step in range(4000, 4040)])
    asked = {token for question in held_out_questions(500) for token in tokenizer.encode(format_mmlu(question))}
    missing = asked - set(seen.tolist())
    rare = {tokenizer.decode([token]) for token in missing}
    names = {f" {name}" for names in world.entities.values() for name in names}
    assert rare <= names and len(rare) < 10


def test_tokenizer_survives_the_disk(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    texts = [format_mmlu(question) for question in held_out_questions(20)] + ["Zorro\t 12\n\n naïve", "  a   b"]
    for text in texts:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text
    assert loaded.eos_token_id == tokenizer.eos_token_id and loaded.pad_token_id == tokenizer.pad_token_id
    chat = [{"role": "user", "content": "Tell me a story."}]
    rendered = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|bos|>User: Tell me a story.\nAssistant:"
    chat += [{"role": "assistant", "content": "Once."}]
    assert loaded.apply_chat_template(chat, tokenize=False) == "<|bos|>User: Tell me a story.\nAssistant: Once.<|eos|>"
