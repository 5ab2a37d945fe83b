"""Questions from files, folders and the bundled world: format, sampling, and errors that name file and row."""

import collections
import json

import pandas
import pytest

from nmjax.data.questions import Question, format_mmlu, load_questions, sample_by_subject

HEADER = "question,choice0,choice1,choice2,choice3,answer"


def some(subject, count):
    return [Question(f"{subject} {k}?", ("a", "b", "c", "d"), k % 4, subject, f"{subject}:{k}") for k in range(count)]


def subjects_of(questions):
    return dict(collections.Counter(q.subject for q in questions))


def test_prompt_format():
    question = Question("What is two plus two?", ("1", "2", "3", "4"), 3, "arithmetic", "1")
    assert format_mmlu(question) == "What is two plus two?\nA. 1\nB. 2\nC. 3\nD. 4\n\nAnswer:"


@pytest.mark.parametrize(
    ("options", "answer", "message"),
    [(("a", "b", "c"), 0, "3 options; wanted 4"), (("a", "b", "c", "d"), 4, "answer=4; wanted 0 to 3")],
)
def test_a_question_has_four_options_and_one_of_them_is_right(options, answer, message):
    with pytest.raises(ValueError, match=message):
        Question("?", options, answer, "s", "id")


def test_mmlu_folder_against_pandas(shared_data):
    folder = shared_data / "mmlu"
    questions = load_questions(folder, None, seed=0)
    frames = {path.stem.removesuffix("_test"): pandas.read_csv(path, dtype=str, keep_default_na=False)
              for path in (folder / "test").glob("*.csv")}  # fmt: skip
    assert len(questions) == sum(map(len, frames.values())) == 14042 and len(frames) == 57
    for question in questions[:1000]:
        row = frames[question.subject].iloc[int(question.id.split(":")[1]) - 2]  # the header is row 1
        assert [question.text, *question.options, str(question.answer)] == row.tolist()
    two_each = load_questions(folder, 114, seed=3)
    assert set(subjects_of(two_each).values()) == {2} and len(subjects_of(two_each)) == 57
    assert set(subjects_of(load_questions(folder, 10, 0, subjects=["anatomy", "virology"]))) == {"anatomy", "virology"}


def test_sampling_is_balanced_seeded_and_nested():
    pool = some("small", 3) + some("large", 50) + some("medium", 10)
    assert subjects_of(sample_by_subject(pool, 9, seed=0)) == {"small": 3, "large": 3, "medium": 3}
    assert subjects_of(sample_by_subject(pool, 30, seed=0)) == {"small": 3, "large": 17, "medium": 10}
    assert len(sample_by_subject(pool, None, 0)) == 63 == len(set(sample_by_subject(pool, 100, 0)))
    assert sample_by_subject(pool, 20, 0) == sample_by_subject(pool, 40, 0)[:20] == sample_by_subject(pool, 20, 0)
    assert sample_by_subject(pool, 20, 0) != sample_by_subject(pool, 20, 1)
    # Every question has its chance: over many seeds each of 50 is drawn about equally often.
    drawn = collections.Counter(q.id for seed in range(500) for q in sample_by_subject(some("s", 50), 10, seed))
    assert len(drawn) == 50 and 60 < min(drawn.values()) and max(drawn.values()) < 145


def test_bundled_questions_are_balanced_and_seeded():
    questions = load_questions("bundled", 50, seed=0)
    assert set(subjects_of(questions).values()) == {10} and len(set(questions)) == 50
    assert questions == load_questions("bundled", 50, seed=0) != load_questions("bundled", 50, seed=1)
    only = load_questions("bundled", 30, 0, subjects=["people"])
    assert subjects_of(only) == {"people": 30}
    with pytest.raises(ValueError, match="max_questions is None"):
        load_questions("bundled", None, 0)


def test_csv_variants_give_the_same_question(tmp_path):
    wanted = ("Which, of these?", ("w", "x", 'y "z"', "None"), 1)
    cells = '"Which, of these?",w,x,"y ""z""",None'
    for name, text in {
        "plain_test.csv": f"{HEADER}\n{cells},1\n",
        "letters_dev.csv": f"question,A,B,C,D,answer\n{cells},B\n",
        "original_test.csv": f"{cells},B\n",
        "bom.csv": f"\ufeff{HEADER}\n{cells},1\n\n",
        "subject.csv": f"subject,{HEADER}\nlaw,{cells},1\n",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (question,) = load_questions(tmp_path / name, None, 0)
        assert (question.text, question.options, question.answer) == wanted, name
        stem = name.removesuffix(".csv").removesuffix("_test").removesuffix("_dev")
        assert question.subject == ("law" if stem == "subject" else stem)
    for row in ({"choices": list(wanted[1])}, {f"choice{k}": o for k, o in enumerate(wanted[1])}):
        row |= {"question": wanted[0], "answer": 1, "id": "x", "subject": "y"}
        (tmp_path / "q.jsonl").write_text(json.dumps(row))
        (question,) = load_questions(tmp_path / "q.jsonl", None, 0)
        assert question == Question(*wanted, "y", "x")


def test_a_folder_without_test_is_read_as_it_is(tmp_path):
    (tmp_path / "law.csv").write_text(f"{HEADER}\nq,a,b,c,d,0\n")
    assert [q.subject for q in load_questions(tmp_path, None, 0)] == ["law"]
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="holds no .csv file"):
        load_questions(tmp_path, None, 0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.csv", "", r"q\.csv is empty"),
        ("q.csv", "question,choice0,choice1,choice2,choice3\nq,a,b,c,d\n", r"q\.csv has no column 'answer'"),
        ("q.csv", "question,choice0,choice1,choice2,answer\nq,a,b,c,0\n", "no columns choice0 to choice3"),
        ("q.csv", f"{HEADER}\nq,a,b,c,d,0\nq,a,b,c,d,E\n", r"q\.csv, row 3: answer is 'E'; wanted 0 to 3 or A to D"),
        ("q.csv", f"{HEADER}\nq,a,b,c,d,4\n", "row 2: answer is '4'"),
        ("q.csv", f"{HEADER}\nq,a,b,c,d\n", "row 2 has 5 cells; wanted 6"),
        ("q.csv", f"{HEADER}\n ,a,b,c,d,1\n", "row 2: question is ' '"),
        ("q.csv", f"{HEADER}\nq,a,b,,d,1\n", "row 2: the options are .*none of them empty"),
        ("q.csv", f"{HEADER}\n", "holds no questions"),
        ("q.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": 0}', r"q\.jsonl, row 1: the options are"),
        ("q.jsonl", '{"question": "q", "answer": 0}', "row 1: no options"),
        ("q.jsonl", '{"question": "q", "choices": ["a", "b", "c", "d"], "answer": true}', "answer is True"),
        ("q.jsonl", '{"question": "q", "choices": ["a", "b", "c", "d"]}', "answer is None"),
        ("q.jsonl", '\n{"question', r"q\.jsonl, row 2 is not JSON"),
        ("q.jsonl", "[1]", "row 1 is a list; wanted an object"),
        ("q.jsonl", 2 * '{"question": "q", "choices": ["a", "b", "c", "d"], "answer": 0, "id": "x"}\n', "'x' occurs"),
        ("q.txt", "", r"q\.txt'; wanted 'bundled'"),
    ],
)
def test_bad_files_are_named_with_the_row(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_questions(tmp_path / name, None, 0)


def test_unknown_sources_and_subjects_are_errors(tmp_path):
    with pytest.raises(ValueError, match="questions='cais/mmlu'; wanted 'bundled'"):
        load_questions("cais/mmlu", 10, 0)
    with pytest.raises(ValueError, match=r"subjects=\['alchemy'\] have no question in 'bundled'; there"):
        load_questions("bundled", 10, 0, subjects=["people", "alchemy"])
    with pytest.raises(ValueError, match="max_questions is 0"):
        load_questions("bundled", 0, 0)
