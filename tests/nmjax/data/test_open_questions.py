"""Open questions: facts of the bundled world, files, and which answers are right."""

import json

import pytest

from nmjax.data.open_questions import OpenQuestion, read_open_questions
from nmjax.data.world import bundled_world

WIKI = {"Category": "Myths", "Question": "Q?", "Correct Answers": "b; c d", "Incorrect Answers": "x; y"}


def write_csv(path, *rows):
    path.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]) + "\n", encoding="utf-8")
    return path


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_bundled_questions_are_facts_each_once():
    questions = read_open_questions("bundled", 200)
    assert len({question.id for question in questions}) == 200
    assert questions == read_open_questions("bundled", 200) != read_open_questions("bundled", 200, seed=1)
    facts = {f"fact-{fact.id}": fact for fact in bundled_world().facts}
    for question in questions:
        fact = facts[question.id]
        assert question.prompt == f"As to {fact.entity}, its {fact.relation.name} is"
        assert question.answers == (fact.value,) and question.wrong == ()
        low, high = map(int, question.kind.removeprefix("ranks ").split(" to "))
        assert low <= fact.rank <= high
    assert len({question.kind for question in questions}) == 6


def test_all_bundled_questions_and_no_more():
    assert len(read_open_questions("bundled", None)) == 1472
    with pytest.raises(ValueError, match="max_questions is 1473; the bundled world has 1472 facts"):
        read_open_questions("bundled", 1473)


def test_a_right_answer_is_one_of_the_right_ones():
    question = OpenQuestion("q", "p", ("the red tin", "copper"))
    assert question.accepts(" Red tin.") and question.accepts("A copper")
    assert not any(map(question.accepts, ("tin", "red tin and copper", "", "not copper")))


def test_where_wrong_answers_are_known_the_nearer_kind_counts():
    question = OpenQuestion("q", "p", ("Nothing happens to you", "It passes"), ("You grow a melon", "You die"))
    assert question.accepts("nothing bad happens") and not question.accepts("a melon will grow in you")
    assert not question.accepts("I like cheese")  # as far from both


def test_jsonl(tmp_path):
    path = write_jsonl(
        tmp_path / "q.jsonl",
        {"question": "Which metal?", "answers": "tin"},
        {"question": "Why?", "answers": ["a", "b"], "wrong": ["c"], "kind": "k", "id": 7},
    )
    assert read_open_questions(path, None) == [
        OpenQuestion("1", "Question: Which metal?\nAnswer:", ("tin",)),
        OpenQuestion("7", "Question: Why?\nAnswer:", ("a", "b"), ("c",), "k"),
    ]
    (chosen,) = read_open_questions(path, 1, form="{question} It is")
    assert chosen.prompt in ("Which metal? It is", "Why? It is")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Q?"}, "row 1: answers is None; wanted a text or a list of texts"),
        ({"question": "Q?", "answers": []}, "row 1 has no answers"),
        ({"question": "Q?", "answers": [""]}, r"row 1: answers is \[''\]"),
        ({"question": "Q?", "answers": "a", "wrong": 3}, "row 1: wrong is 3"),
        ({"answers": "a"}, "row 1 has no field 'question'"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_open_questions(write_jsonl(tmp_path / "q.jsonl", row), None)


def test_truthfulqa(tmp_path):
    (question,) = read_open_questions(write_csv(tmp_path / "t.csv", WIKI), None)
    prompt = "Question: Q?\nAnswer:"
    assert question == OpenQuestion("truthfulqa-0", prompt, ("b", "c d"), ("x", "y"), "Myths")


def test_the_published_truthfulqa(shared_data):
    questions = read_open_questions(shared_data / "truthfulqa" / "TruthfulQA.csv", None)
    assert len(questions) == 817 and len({question.kind for question in questions}) == 38
    known = [q for q in questions if any(map(q.accepts, q.answers)) and not all(map(q.accepts, q.wrong))]
    assert len(known) == 817


def test_bad_sources_are_named(tmp_path):
    empty = tmp_path / "q.jsonl"
    empty.touch()
    for source, options, message in (
        ("nothing.jsonl", {}, "questions='nothing.jsonl'; wanted 'bundled', or a .jsonl or .csv file that exists"),
        (tmp_path, {}, "wanted 'bundled'"),
        (empty, {}, "holds no questions"),
        (empty, {"form": "Q:"}, "form is 'Q:'; wanted a text that holds {question}"),
        ("bundled", {"max_questions": 0}, "max_questions is 0; wanted at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            read_open_questions(source, **{"max_questions": None, **options})
