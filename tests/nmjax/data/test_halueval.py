"""HaluEval and TruthfulQA from files and from the hub, and the published split against its published lists."""

import json

import datasets
import pytest

from nmjax.data import halueval, truthfulqa
from nmjax.data.halueval import published_examples, published_split
from nmjax.data.judgements import read_judgements

ROWS = {
    "qa": {"knowledge": "K. ", "question": "Q?", "right_answer": "r", "hallucinated_answer": "It is h."},
    "dialogue": {
        "knowledge": "K",
        "dialogue_history": "[Human]: Hello [Assistant]: Hello",
        "right_response": "r",
        "hallucinated_response": "h",
    },
    # The line break is what all right summaries are reported to end in, and no hallucinated one.
    "summarization": {"document": "D\u2028d", "right_summary": "r\n", "hallucinated_summary": "h"},
    "general": {
        "ID": "",
        "user_query": "U",
        "chatgpt_response": "c",
        "hallucination": "yes",
        "hallucination_spans": [],
    },
}
WIKI = {"Type": "A", "Question": "Q?", "Best Answer": "b", "Correct Answers": "b; c", "Incorrect Answers": "x; y; "}


def write_jsonl(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def write_csv(path, *rows):
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: the data sets by (name, config), each a list of rows by split."""
    held: dict = {}

    def load(name, config):
        if (name, config) not in held:
            raise ValueError(f"BuilderConfig '{config}' not found. Available: {[c for n, c in held if n == name]}")
        return {split: datasets.Dataset.from_list(rows) for split, rows in held[name, config].items()}

    monkeypatch.setattr(datasets, "load_dataset", load)
    return held


# --- Sources ----------------------------------------------------------------------------------------------------------


def test_a_folder_gives_what_its_files_and_the_hub_give(tmp_path, hub):
    for task, row in ROWS.items():
        write_jsonl(tmp_path / f"{task}_data.first.{'json' if task == 'qa' else 'jsonl'}", row, row)
        hub[halueval.HUB, task] = {"data": [row, row]}
    (tmp_path / "LICENSE").write_text("MIT")
    judgements = read_judgements(tmp_path)
    assert [j.id for j in judgements] == [
        *(f"{task}_{row}_{label}" for task in list(ROWS)[:3] for row in (0, 1) for label in ("cor", "hal")),
        "general_0_hal",
        "general_1_hal",
    ]
    assert [(j.answer, j.label) for j in judgements if j.row == 1] == [
        ("r", 0), ("It is h.", 1), ("r", 0), ("h", 1), ("r", 0), ("h", 1), ("c", 1),
    ]  # fmt: skip
    assert judgements[4].prompt == (
        "Knowledge: K\nDialogue so far: [Human]: Hello [Assistant]: Hello\nProposed reply: r\n\n"
        "Is the proposed reply true to the knowledge and the dialogue?\nAnswer (Yes or No):"
    )
    assert judgements[0].fields == {"knowledge": "K.", "question": "Q?"}
    assert judgements[8].fields == {"document": "D\u2028d"}
    assert read_judgements("halueval") == read_judgements(halueval.HUB) == judgements
    assert read_judgements(tmp_path / "qa_data.first.json") == read_judgements(tmp_path, ["qa"]) == judgements[:4]
    hub["some/other", "qa"] = {"train": [ROWS["qa"]]}
    assert read_judgements("some/other", ["qa"]) == judgements[:2]


def test_truthfulqa_shows_the_best_wrong_answer_or_draws_one(tmp_path, hub):
    drawn = read_judgements(write_csv(tmp_path / "a.csv", *[WIKI] * 40))
    assert [(j.id, j.answer) for j in drawn[:2]] == [("truthfulqa_0_cor", "b"), ("truthfulqa_0_hal", drawn[1].answer)]
    assert {j.answer for j in drawn if j.label} == {"x", "y"}  # not the nothing behind the last semicolon
    assert drawn == read_judgements(tmp_path / "a.csv", seed=0) != read_judgements(tmp_path / "a.csv", seed=1)
    assert drawn[:20] == read_judgements(write_csv(tmp_path / "c.csv", *[WIKI] * 10))  # whatever the other rows
    best = read_judgements(write_csv(tmp_path / "b.csv", WIKI | {"Best Incorrect Answer": "z"}))
    assert [j.answer for j in best] == ["b", "z"]
    row = {"question": "Q?", "best_answer": "b", "correct_answers": ["b", "c"], "incorrect_answers": ["x", "y"]}
    hub[truthfulqa.HUB, "generation"] = {"validation": [row] * 40}
    assert read_judgements("truthfulqa") == read_judgements(truthfulqa.HUB) == drawn


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("qa", {"knowledge": None}, r"qa_data.jsonl, row 2: knowledge is None; wanted text"),
        ("dialogue", {"right_response": ""}, r"dialogue_data.jsonl, row 2: right_response is ''; wanted text"),
        ("summarization", {"document": 3}, r"summarization_data.jsonl, row 2: document is 3; wanted text"),
        ("general", {"hallucination": "maybe"}, "general_data.jsonl, row 2: hallucination is 'maybe'; wanted 'yes' or"),
    ],
)
def test_a_bad_row_is_named(tmp_path, task, changes, message):
    write_jsonl(tmp_path / f"{task}_data.jsonl", ROWS[task], ROWS[task] | changes)
    with pytest.raises(ValueError, match=message):
        read_judgements(tmp_path)


def test_a_dialogue_without_its_history_is_not_read(tmp_path):
    row = {"dialogue" if column == "dialogue_history" else column: text for column, text in ROWS["dialogue"].items()}
    with pytest.raises(ValueError, match=r"row 1 has no field 'dialogue_history'; it has \['knowledge', 'dialogue', "):
        read_judgements(write_jsonl(tmp_path / "dialogue_data.json", row))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (WIKI | {"Best Answer": ""}, "row 2: Best Answer is ''; wanted text"),
        (WIKI | {"Incorrect Answers": " ; "}, "row 2: Incorrect Answers is ' ; '; wanted one answer or more"),
        ({"Question": "Q?", "Best Answer": "b"}, r"row 2 has no field 'Incorrect Answers'; it has \['Question', 'Best"),
        (WIKI | {"Incorrect Answers": "x, y"}, "row 2 has more or fewer cells than the header; wanted 5"),
    ],
)
def test_a_bad_row_of_the_table_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"quiz.csv, {message}"):
        read_judgements(write_csv(tmp_path / "quiz.csv", row))


def test_what_a_source_lacks_is_named(tmp_path, hub):
    with pytest.raises(ValueError, match="holds no file that begins with one of qa_data, dialogue_data,"):
        read_judgements(tmp_path)
    file = write_jsonl(tmp_path / "splits.json", ROWS["qa"])
    with pytest.raises(ValueError, match="splits.json': wanted a name that begins with one of qa_data,"):
        read_judgements(file)
    (tmp_path / "qa_data.json").write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        read_judgements(tmp_path)
    with pytest.raises(ValueError, match=r"tasks=\['dialogue'\]; wanted some of \['qa'\]"):
        read_judgements(tmp_path, ["dialogue"])
    write_jsonl(tmp_path / "qa_data.jsonl", ROWS["qa"])
    with pytest.raises(ValueError, match="qa_data.json and .*qa_data.jsonl both hold qa; wanted one file a task"):
        read_judgements(tmp_path)
    hub[halueval.HUB, "qa"] = {"data": [ROWS["qa"]], "more": [ROWS["qa"]]}
    with pytest.raises(
        ValueError, match=r"dataset='halueval' \(p.*/HaluEval\), config 'qa' has the splits \['data', 'mor"
    ):
        read_judgements("halueval", ["qa"])
    with pytest.raises(ValueError, match=r"HaluEval\): wanted config 'general' .* it has the configs \['qa'\]$"):
        read_judgements("halueval", ["general"])
    hub[halueval.HUB, "qa"] = {"data": [ROWS["qa"], ROWS["qa"] | {"question": ""}]}
    with pytest.raises(ValueError, match=r"HaluEval\), config 'qa', row 2: question is ''; wanted text"):
        read_judgements("halueval", ["qa"])


@pytest.mark.parametrize("name", ["halueval", "truthfulqa", "some/other", "data/halueval"])
def test_without_the_hub_nothing_takes_its_place(monkeypatch, tmp_path, name):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        ValueError, match=f"dataset='{name}'.* but the hub can't be reached, and its cache does not hav"
    ):
        read_judgements(name)


# --- The published split ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(shared_data):
    return json.loads((shared_data / "halueval" / "splits_index.json").read_text())


def test_the_published_split_is_drawn_again(published):
    for part in ("train", "test"):
        listed = [(e["id"], e["task"], e["raw_index"], e["label"]) for e in published[part]]
        assert published_examples(part) == listed and len(listed) == 4998
    for name, part in (("calib_n200", "train"), ("calib_n1000", "train"), ("val_n500", "test")):
        listed = published[name]
        assert [e.id for e in published_examples(part, int(name.split("_n")[1]))] == listed
    assert sum(e.label for e in published_examples("train", 200)) == 103


def test_the_published_split_leaks_and_ours_does_not():
    train, test = (published_examples(part) for part in ("train", "test"))
    rows = {(e.task, e.row) for e in train}
    assert sum((e.task, e.row) in rows for e in test) / len(test) == pytest.approx(0.496, abs=5e-4)
    calibration = {(e.task, e.row) for e in published_examples("train", 1000)}
    assert sum((e.task, e.row) in calibration for e in published_examples("test", 500)) == 49


def test_the_published_examples_of_the_rows_there_are(shared_data, published):
    judgements = read_judgements(shared_data / "halueval", ["qa"])
    lines = (shared_data / "halueval" / "qa_data.first1000.jsonl").read_text(encoding="utf-8").split("\n")
    for part, count in (("train", 147), ("test", 163)):
        found, missing = published_split(judgements, part, allow_missing=True)
        listed = [e for e in published[part] if e["task"] == "qa" and e["raw_index"] < 1000]
        assert [j.id for j in found] == [e["id"] for e in listed]
        assert len(found) == count == 4998 - sum(missing.values()) and missing.keys() == {
            "qa",
            "dialogue",
            "summarization",
        }
        for judgement, example in zip(found, listed, strict=True):
            row = json.loads(lines[example["raw_index"]])
            assert judgement.answer == row["hallucinated_answer" if example["label"] else "right_answer"]
            assert judgement.fields["question"] == row["question"].strip()
    assert len(published_split(judgements, "test", 500, allow_missing=True)[0]) == 21
    with pytest.raises(ValueError, match="479 of the 500 published examples .* wanted all, or allow_missing"):
        published_split(judgements, "test", 500)


def test_what_the_published_split_lacks_is_named():
    statements = read_judgements("bundled", at_least=2)
    with pytest.raises(ValueError, match="4998 of the 4998 published examples .* wanted one at least"):
        published_split(statements, "train", allow_missing=True)
    with pytest.raises(ValueError, match="part is 'val'; wanted 'train' or 'test'"):
        published_examples("val")
    with pytest.raises(ValueError, match="n is 5000; wanted 1 to 4998"):
        published_examples("train", 5000)
