"""Self-prediction: properties of answers as models write them, truth values, and the task files."""

import json

import pytest

from nmjax.data.self_prediction import (
    BINARY,
    PROPERTIES,
    bundled_tasks,
    option_of,
    property_of,
    read_tasks,
    sample_tasks,
    stated_property,
    truth_of,
)

PUBLISHED = [
    f"{kind}_{property}"
    for kind in ("animals_long", "english_words_long", "stories_sentences")
    for property in PROPERTIES[:7]
] + ["mmlu_non_cot_among_a_or_c", "mmlu_non_cot_among_b_or_d"]


@pytest.mark.parametrize(
    "answer, characters, words",
    [
        (" cat dog bird", "cat", ("cat", "dog", "bird")),
        ("Cat, Dog, Bird.", "cat", ("cat", "dog", "bird")),
        ("cat,dog;bird", "cat", ("cat", "dog", "bird")),
        ('"Élan vital — indeed!"\n', "éla", ("élan", "vital", "indeed")),
        ("E\u0301lan", "éla", ("élan", None, None)),  # a decomposed accent is no character of its own
        ("I\u2019m sure", "i\u2019m", ("i'm", "sure", None)),
        ("A dog - barks", "a d", ("a", "dog", "barks")),
        ("**Ox**", ("o", "x", None), ("ox", None, None)),
        ("1. cat", "1. ", ("1", "cat", None)),
        ("1,000 cats", "1,0", ("1,000", "cats", None)),
        ("狗 猫", "狗 猫", ("狗", "猫", None)),
        ("", (None,) * 3, (None,) * 3),
        (" ...\n", (None,) * 3, (None,) * 3),
    ],
)
def test_characters_and_words(answer, characters, words):
    numbers = ("first", "second", "third")
    assert tuple(property_of(answer, f"{number}_character") for number in numbers) == tuple(characters)
    assert tuple(property_of(answer, f"{number}_word") for number in numbers) == words


@pytest.mark.parametrize(
    "answer, vowel",
    [("Owl cat", True), ('"Under the sea', True), ("élan", True), ("yak", False), ("5 apples", False), ("", None)]
    + [("дом", None), ("  **ant**", True), ("- elk", True), ("?!", None)],
)
def test_vowels(answer, vowel):
    assert property_of(answer, "starts_with_vowel") is vowel


@pytest.mark.parametrize(
    "answer, option",
    [("A", "a"), (" c\n", "c"), ("A) one year", "a"), ("(B)", "b"), ("**D**", "d"), ("C - Three years", "c")]
    + [("B. Carl Jung", "b"), ("b) Carl Jung", "b"), ("D\n\nThe reason is", "d"), ("A One year.", "a"), ("'C'", "c")]
    + [("The correct answer is B.", "b"), ("Answer: C", "c"), ("The answer is **D** because", "d"), ("Option A", "a")]
    + [("A dog barks", None), ("a", "a"), ("a dog", None), ("the answer is a dog", None), ("Dogs", None), ("", None)]
    + [("E", None), ("I do not know", None), ("A or C", None), ("A's right", None)],
)
def test_options(answer, option):
    assert option_of(answer) == option
    assert property_of(answer, "among_a_or_c") == (None if option is None else option in "ac")
    assert property_of(answer, "among_b_or_d") == (None if option is None else option in "bd")
    assert property_of(answer, "ethical_stance", "B") == (None if option is None else option == "b")


@pytest.mark.parametrize(
    "answer, truth",
    [("true", True), ("True.", True), ("**Yes**, it does", True), ("'true'", True), ("1", True), (" yes\n", True)]
    + [("The answer is true.", True), ("It would be: TRUE", True), ("Answer: yes", True), ("true true true", True)]
    + [("false", False), ("No, it does not.", False), ("FALSE!", False), ("0", False), ("I'd say it is false", False)]
    + [("", None), ("maybe", None), ("true or false", None), ("No, that is true.", None), ("True/False", None)]
    + [("It is not true.", None), ("None of them", None), ("10", None), ("truth", None), ("I do not know.", None)]
    + [("yesterday", None), ("真", None), ("The answer does not start with a vowel", None)],
)
def test_truth_values(answer, truth):
    assert truth_of(answer) is truth
    assert stated_property(f"\n{answer}\n\nBecause it is true.", "starts_with_vowel") is (
        True if not answer else truth  # the first line that says something
    )


@pytest.mark.parametrize(
    "answer, character",
    [
        ("c", "c"),
        ('"C"', "c"),
        ("c.", "c"),
        ("**c**", "c"),
        ("The third character is 'c'.", "c"),
        ("It would be c", "c"),
    ]
    + [("space", " "), ('" "', " "), (",", ","), ('In "cat" the first one is "c".', "c"), ("é", "é"), ("c\nd", "c")]
    + [("cat", None), ("", None), ("'a' or 'b'", None), ("I cannot know that", None), ("c d", None)],
)
def test_stated_characters(answer, character):
    assert stated_property(answer, "third_character") == character


@pytest.mark.parametrize(
    "answer, word",
    [("cat", "cat"), ("Cat.", "cat"), ('"cat"', "cat"), ("**Cat**\n\nas a cat is common", "cat"), ("`cat`", "cat")]
    + [("The first word is: cat", "cat"), ("My first word would be 'cat', I think.", "cat"), ("don\u2019t", "don't")]
    + [("cat dog", None), ("", None), ("I am glad to help.", None), ('"cat" or "dog"', None), ("...", None)],
)
def test_stated_words(answer, word):
    assert stated_property(answer, "first_word") == word


def test_unknown_properties_are_named():
    with pytest.raises(ValueError, match=r"property is 'last_word'; wanted one of \['first_character'"):
        property_of("a", "last_word")
    with pytest.raises(ValueError, match="matching is None; ethical_stance wants the letter"):
        property_of("a", "ethical_stance")


# --- Tasks ------------------------------------------------------------------------------------------------------------


def test_bundled_tasks():
    tasks = read_tasks()
    assert {name: len(items) for name, items in tasks.items()} == {
        "facts_among_a_or_c": 40,
        "lists_first_word": 40,
        "lists_starts_with_vowel": 40,
    }
    items = [item for items in tasks.values() for item in items]
    assert len({item.id for item in items}) == 120 and tasks == bundled_tasks() != bundled_tasks(seed=1)
    for item in items:
        assert item.property in PROPERTIES and item.task.endswith(item.property)
        (asked,), (hypothetical,) = item.object_level, item.hypothetical
        assert asked["content"].removesuffix("\n\nAnswer:") in hypothetical["content"]
        assert item.question in asked["content"] and hypothetical["content"] != asked["content"]


def test_samples_are_seeded_and_of_each_task():
    tasks = bundled_tasks()
    few = sample_tasks(tasks, 5)
    assert [item.task for item in few] == [name for name in tasks for _ in range(5)]
    assert few == sample_tasks(tasks, 5) != sample_tasks(tasks, 5, seed=1)
    alone = sample_tasks({"lists_first_word": tasks["lists_first_word"]}, 5)
    assert alone == few[5:10]  # another task next to it changes nothing
    assert sample_tasks(tasks, 200) == [item for items in tasks.values() for item in items]
    with pytest.raises(ValueError, match="n_per_task is 0; wanted 1 or more"):
        sample_tasks(tasks, 0)


GOOD = {
    "original_question": "cat dog",
    "original_dataset": "animals",
    "object_level_prompt": [{"role": "user", "content": "Next?\ncat dog\n"}],
    "hypothetical_prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "First word?\n"}],
    "behavioral_property": "first_word",
    "option_matching_ethical_stance": None,
}


def written(folder, *rows):
    (folder / "my_task.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_rows_of_files(tmp_path):
    ethical = GOOD | {"behavioral_property": "myopic_ethical_stance", "option_matching_ethical_stance": "(B)"}
    ((name, (item,)),) = read_tasks(written(tmp_path, GOOD)).items()
    assert (name, item.id, item.question, item.property, item.matching) == (
        "my_task",
        "my_task:1",
        "cat dog",
        "first_word",
        None,
    )
    assert list(item.object_level) == GOOD["object_level_prompt"]
    assert list(item.hypothetical) == GOOD["hypothetical_prompt"]
    ((item,),) = read_tasks(written(tmp_path, ethical)).values()
    assert (item.property, item.matching) == ("ethical_stance", "b")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"original_question": ""}, "row 2: original_question is ''; wanted text"),
        ({"behavioral_property": "length"}, r"row 2: behavioral_property is 'length'; wanted one of \['first_char"),
        ({"object_level_prompt": "Next?"}, r'row 2: object_level_prompt is "Next\?"; wanted a list of'),
        ({"hypothetical_prompt": []}, r"row 2: hypothetical_prompt is \[\]; wanted a list"),
        ({"hypothetical_prompt": [{"role": "assistant", "content": "Yes"}]}, "that ends with the user"),
        ({"behavioral_property": "ethical_stance"}, "row 2: option_matching_ethical_stance is None; wanted text"),
        ({"behavioral_property": "first_character"}, r"is \['first_character', 'first_word'\]; wanted one for all"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"my_task.jsonl.*{message}"):
        read_tasks(written(tmp_path, GOOD, GOOD | change))


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match="tasks='nowhere'; wanted 'bundled' or a folder with files <task>.jsonl"):
        read_tasks("nowhere")
    with pytest.raises(ValueError, match="wanted 'bundled' or a folder"):
        read_tasks(tmp_path)
    with pytest.raises(ValueError, match="my_task.jsonl is empty"):
        read_tasks(written(tmp_path))


def test_the_published_files(shared_data):
    folder = shared_data / "introspection" / "binder_test"
    if not folder.is_dir():
        pytest.skip(f"no published tasks at {folder}")
    tasks = read_tasks(folder)
    assert sorted(tasks) == sorted(PUBLISHED)
    assert all(len(items) == 500 for items in tasks.values())
    assert all(item.task.endswith(item.property) for items in tasks.values() for item in items)
    assert len({item.object_level[0]["content"] for items in tasks.values() for item in items}) == 7066
    assert len(sample_tasks(tasks, 200)) == 23 * 200
    assert sum(items[0].property in BINARY for items in tasks.values()) == 5
