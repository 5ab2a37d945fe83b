"""Training data in disjoint splits: nothing in common, balance, matched controls, where sentences are."""

import dataclasses
from collections import Counter

import pytest

from nmjax.data.introspection import WORDINGS, read_lists
from nmjax.data.introspection_split import SplitConfig, cut, generate, split_lists

N = 1200


@pytest.fixture(scope="module")
def drawn():
    """The records of each variant."""
    lists = read_lists()
    return {variant: generate(SplitConfig(variant, n=N), lists) for variant in WORDINGS}


@pytest.mark.parametrize("variant", WORDINGS)
def test_splits_have_nothing_in_common(drawn, variant):
    splits = drawn[variant]
    assert {name: len(records) for name, records in splits.items()} == {"train": 960, "val": 120, "test": 120}
    standard = read_lists().system
    for what in (
        lambda r: r.context,
        lambda r: r.question,
        lambda r: r.vector,
        lambda r: r.noise_seed,
        lambda r: r.id,
        lambda r: r.system if r.system != standard else None,
        lambda r: tuple(r.context[a:b] for a, b in r.spans) or None,
    ):
        seen = [{what(record) for record in records} - {None} for records in splits.values()]
        assert sum(map(len, seen)) == len(set.union(*seen))
    vectors = [record.vector for record in splits["test"] if record.vector is not None]
    assert all(150 <= vector < 200 for vector in vectors)
    if variant == "localization_sentence":
        sentences = [{r.context[a:b] for r in records for a, b in r.spans} for records in splits.values()]
        assert [len(group) for group in sentences] == [30, 15, 15] and len(set.union(*sentences)) == 60


def test_unsteered_test_inputs_are_many_and_new():
    splits = generate(SplitConfig(), read_lists())
    known = {record.conversation for name in ("train", "val") for record in splits[name]}
    new = {record.conversation for record in splits["test"] if record.kind == "clean"}
    assert len(new) == 250 and not new & known
    contexts, questions = (set(group) for group in (read_lists().contexts, read_lists().questions["original"]))
    assert not any(record.context in contexts or record.question in questions for record in splits["test"])


def test_answers_and_perturbations_are_balanced(drawn):
    records = drawn["original"]["train"]
    kinds = Counter(record.kind for record in records)
    assert kinds == {"steered": 480, "clean": 240, "noise": 120, "system": 120}
    assert all((record.answer == 0) == (record.kind == "steered") for record in records)
    cells = Counter((r.third, r.layers, r.magnitude) for r in records if r.kind == "noise")
    assert len(cells) == 12 and set(cells.values()) == {10}
    cells = Counter((r.third, r.layers, r.magnitude) for r in records if r.kind == "steered")
    assert len(cells) == 12 and set(cells.values()) == {40}
    assert set(Counter(r.vector for r in records if r.vector is not None).values()) <= {4, 5, 6}
    # Neither the system prompt nor the wording nor the reply gives the answer away.
    standard = read_lists().system
    for what in (lambda r: r.system != standard, lambda r: r.question, lambda r: r.reply):
        tables = [Counter(what(r) for r in records if r.answer == answer) for answer in (0, 1)]
        assert tables[0] == tables[1]
    # The answer does not depend on the place in the file either.
    assert 200 < sum(record.answer for record in records[:480]) < 280


def test_controls_are_matched(drawn):
    original, vague, food, flipped = (
        drawn[name]["train"] for name in ("original", "vague_prompt", "food_control", "flipped_labels")
    )
    assert drawn["r1_minimal"] == drawn["original"]
    questions = [split_lists(read_lists(), name)["train"].questions[name] for name in ("original", "vague_prompt")]
    for record, other in zip(original, vague, strict=True):
        assert dataclasses.replace(other, question=record.question) == record
        assert questions[0].index(record.question) == questions[1].index(other.question)
    for record, other in zip(original, flipped, strict=True):
        assert dataclasses.replace(other, answer=record.answer) == record
    disagree = Counter(a.kind for a, b in zip(original, flipped, strict=True) if a.answer != b.answer)
    assert disagree == {"steered": 240, "clean": 120, "noise": 60, "system": 60}
    lists = read_lists()
    for record, other in zip(original, food, strict=True):
        assert (record.id, record.answer, record.system) == (other.id, other.answer, other.system)
        assert (other.vector, other.noise_seed, other.layers, other.magnitude) == (None,) * 4
        about_food = other.context in lists.food.contexts
        assert about_food == (other.reply in lists.food.replies) == (other.answer == 0)
        about = lists.food.replies if about_food else lists.food.other_replies
        assert about.index(other.reply) == lists.replies.index(record.reply)


def test_localization_asks_for_what_was_done(drawn):
    for record in drawn["localization_layers"]["train"]:
        assert record.answers == (" early", " middle", " late") and record.answers[record.answer] == f" {record.third}"
    for record in drawn["localization_magnitude"]["train"]:
        assert (
            record.answers == (" 5", " 10", " 20", " 30") and float(record.answers[record.answer]) == record.magnitude
        )
        assert "5, 10, 20 or 30" in record.question
    layers, magnitude = (drawn[f"localization_{name}"]["train"] for name in ("layers", "magnitude"))
    for what, classes in ((lambda r: r.third, 3), (lambda r: r.magnitude, 4)):
        assert Counter(map(what, layers)) == Counter(map(what, magnitude))
        assert set(Counter(map(what, layers)).values()) == {960 // classes}


def test_sentences_are_where_they_are_said_to_be(drawn):
    bank = set(read_lists().sentences)
    for record in drawn["localization_sentence"]["train"]:
        lines = record.context.split("\n")
        assert len(lines) == len(record.spans) == 10
        for number, (line, (start, end)) in enumerate(zip(lines, record.spans, strict=True)):
            assert record.context[start:end] in bank and line == f"{number}. {record.context[start:end]}"
        assert record.sentence == record.answer and record.answers[record.answer] == f" {record.sentence}"
        assert "0 to 9" in record.question
    assert set(Counter(r.sentence for r in drawn["localization_sentence"]["train"]).values()) == {96}


def test_numbers_of_many_sentences_do_not_begin_with_each_other():
    config = SplitConfig("localization_sentence", n=10, sentences=12)
    (record,) = generate(config, read_lists())["test"]
    assert record.answers[0] == " 00" and record.answers[-1] == " 11" and "00 to 11" in record.question
    assert record.context.startswith("00. ")


@pytest.mark.parametrize("n", [10, 37, 110])
def test_kinds_of_small_and_odd_splits(n):
    """Half of what is not steered has noise, half another system prompt, but for what can't be halved."""
    splits = generate(SplitConfig(n=n, noise=0.5, systems=0.5), read_lists())
    assert sum(map(len, splits.values())) == n
    for records in splits.values():
        kinds = Counter(record.kind for record in records)
        assert kinds["steered"] == len(records) // 2 and abs(kinds["noise"] - kinds["system"]) <= 1 >= kinds["clean"]


def test_seeds_and_published_sizes():
    lists = dataclasses.replace(read_lists(), spare_contexts=(), spare_questions={})
    first, again, other = (generate(SplitConfig(n=200, seed=seed), lists) for seed in (1, 1, 2))
    assert first == again and first != other
    assert [len(part.contexts) for part in split_lists(lists).values()] == [10, 5, 5]
    assert [len(part.questions["original"]) for part in split_lists(lists).values()] == [2, 1, 1]
    assert cut(range(7)) == (range(3), range(3, 4), range(4, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "deny"}, "variant='deny'; wanted one of"),
        ({"n": 9}, "n is 9; wanted at least 10"),
        ({"vectors": 3}, "vectors is 3; wanted at least 4"),
        ({"magnitudes": (5.0, 5.0)}, "magnitudes is"),
        ({"magnitudes": (0.0,)}, "magnitudes is"),
        ({"variant": "localization_magnitude", "magnitudes": (1.0, 2.0)}, "three or more to choose from"),
        ({"noise": 0.6, "systems": 0.6}, "noise is 0.6, systems is 0.6; wanted shares"),
        ({"layers": 2}, "layers is 2; wanted at least 4"),
        ({"variant": "localization_sentence", "sentences": 16}, "sentences is 16, but a split has only 15"),
    ],
)
def test_settings_that_can_not_be(change, message):
    with pytest.raises(ValueError, match=message):
        generate(SplitConfig(**change), read_lists())


def test_lists_that_are_too_short():
    lists = dataclasses.replace(read_lists(), other_systems=("one", "two", "three"))
    with pytest.raises(ValueError, match="variant='deny'; wanted one of"):
        split_lists(lists, "deny")
    with pytest.raises(ValueError, match="the lists have 3 other system prompts; wanted at least 4"):
        split_lists(lists)
