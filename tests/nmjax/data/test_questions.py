"""Questions from files, folders and the bundled world: format, sampling, lengths, and errors that name file and row."""

import collections
import json

import pandas
import pytest
from transformers import AutoTokenizer

from nmjax.data.questions import (
    Pool,
    Question,
    format_mmlu,
    load_questions,
    read_pool,
    sample_by_subject,
    split_by_length,
)
from nmjax.data.world import bundled_world, example_questions, held_out_questions, is_reserved_form, is_reserved_options

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
    pool = read_pool(folder, seed=0)
    assert sorted(q.id for q in pool.questions) == sorted(q.id for q in questions)
    assert {subject: len(group) for subject, group in pool.examples.items()} == dict.fromkeys(frames, 5)
    dev = pandas.read_csv(folder / "dev" / "virology_dev.csv", dtype=str, keep_default_na=False)
    seen = [[e.text, *e.options, str(e.answer)] for e in pool.examples["virology"]]
    assert seen == dev.values.tolist()
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
    for seed in range(30):  # the first few draws often miss a subject
        assert subjects_of(load_questions("bundled", 1, seed, ["medicine"])) == {"medicine": 1}
    with pytest.raises(ValueError, match="max_questions is None"):
        load_questions("bundled", None, 0)


def test_bundled_examples_give_no_answer_away():
    world, examples = bundled_world(), example_questions()
    pool = read_pool("bundled", seed=4, at_least=400)
    told = {fact.id for fact in map(world.fact_of, [e for group in examples.values() for e in group])}
    assert len(told) == 25
    drawn = held_out_questions(3200, seed=4)
    rest = [question for question in drawn if world.fact_of(question).id not in told]
    assert 0.98 * len(drawn) < len(rest) < len(drawn)
    assert pool.questions == rest and pool.examples == examples == read_pool("bundled", 5, at_least=1).examples
    for subject, group in examples.items():
        assert {e.subject for e in group} == {subject} and {e.answer for e in group} == {0, 1, 2, 3}
        for example in group:
            fact = world.fact_of(example)
            assert fact.entity in example.text and example.options[example.answer] == fact.value
            assert is_reserved_options(fact, example.options)
            assert is_reserved_form(fact.relation, int(example.id.split("-")[2]))
    only = read_pool("bundled", 4, subjects=["people"], at_least=400)
    assert set(only.examples) == {"people"} == {q.subject for q in only.questions} and len(only.questions) >= 400


def test_lengths_part_the_questions():
    pool = some("long", 6) + some("mixed", 6) + some("short", 6)
    lengths = [30, 31, 30, 32, 33, 30, 10, 30, 10, 31, 12, 11, 3, 1, 2, 9, 9, 9]
    kept, dropped = split_by_length(pool, lengths, 12)
    assert kept == [q for q, length in zip(pool, lengths, strict=True) if length < 13]
    assert dropped == {"long": 6, "mixed": 2} and len(kept) + sum(dropped.values()) == 18
    assert split_by_length(pool, lengths, 33) == (pool, {})
    assert split_by_length(pool, lengths, 12, ["mixed", "short"])[1] == dropped
    with pytest.raises(ValueError, match="none of the 6 questions of subject 'long' fits: the shortest has 30 tokens"):
        split_by_length(pool, lengths, 12, ["mixed", "long"])
    with pytest.raises(ValueError, match="none of the 18 questions fits: the shortest has 1 tokens; wanted at most 0"):
        split_by_length(pool, lengths, 0)
    with pytest.raises(ValueError, match="none of the 0 questions fits"):
        split_by_length([], [], 10)


def test_few_of_the_long_mmlu_questions_fit_a_small_model(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260K-hf", local_files_only=True)
    subjects = ["anatomy", "high_school_european_history", "high_school_us_history"]
    pool = read_pool(shared_data / "mmlu", 0, subjects)
    lengths = [len(ids) for ids in tokenizer([format_mmlu(q) for q in pool.questions])["input_ids"]]
    kept, dropped = split_by_length(pool.questions, lengths, 512, subjects)
    assert subjects_of(kept) == dict(zip(subjects, (135, 7, 9), strict=True))
    assert dropped == {"high_school_european_history": 158, "high_school_us_history": 195}
    with pytest.raises(ValueError, match="'high_school_european_history' fits: the shortest has 357 tokens"):
        split_by_length(pool.questions, lengths, 300, subjects)


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
    with pytest.raises(ValueError, match=r"has no split 'test'; it has \['train'\]"):
        load_questions(tmp_path, None, 0)


@pytest.mark.parametrize(
    ("questions", "examples"),
    [
        ("test/law.csv", "dev/law.csv"),
        ("test/law_test.csv", "dev/law_dev.csv"),
        ("test/law_test.csv", "val/law_val.csv"),
        ("law_test.csv", "law_dev.csv"),
        ("law.csv", "law_dev.csv"),
        ("law.csv", "dev/law.csv"),
    ],
)
def test_a_folder_keeps_its_examples_apart(tmp_path, questions, examples):
    for name, word in ((questions, "asked"), (examples, "told")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join([HEADER, *(f"{word} {k},a,b,c,d,{k % 4}" for k in range(7))]))
    pool = read_pool(tmp_path, 0)
    assert [q.text for q in pool.questions] == [f"asked {k}" for k in range(7)] and pool.source == str(tmp_path)
    assert list(pool.examples) == ["law"] and [e.text for e in pool.examples["law"]] == [f"told {k}" for k in range(5)]
    assert read_pool(tmp_path / questions, 0) == Pool(str(tmp_path / questions), pool.questions, {})


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
    for name in ("cais", "a/b/c", "./mmlu", "data/questions.csv"):
        with pytest.raises(ValueError, match=f"questions='{name}'; wanted 'bundled'"):
            load_questions(name, 10, 0)
    with pytest.raises(ValueError, match=r"subjects=\['alchemy'\] have no question in 'bundled'; there"):
        load_questions("bundled", 10, 0, subjects=["people", "alchemy"])
    with pytest.raises(ValueError, match=r"subjects is empty; wanted some of \['biology', "):
        load_questions("bundled", 10, 0, subjects=[])
    with pytest.raises(ValueError, match="max_questions is 0"):
        load_questions("bundled", 0, 0)
