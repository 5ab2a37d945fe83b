"""Questions from data sets as the hub stores them: configs, splits, columns, and errors in one line."""

import json

import datasets
import pandas
import pytest

from nmjax.data.questions import Pool, Question, load_questions, read_pool

LOAD_DATASET = datasets.load_dataset


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """No network, whatever the environment says, and a cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def frame(tag, count, **changes):
    rows = {
        "question": [f"{tag} {k}?" for k in range(count)],
        "subject": [("law", "art")[k % 2] for k in range(count)],
        "choices": [["w", "x", "y", "z"]] * count,
        "answer": [k % 4 for k in range(count)],
    }
    table = pandas.DataFrame(rows | changes)
    return table.drop(columns=[name for name, column in changes.items() if column is None])


def write_hub_folder(folder, configs=("law", "all"), splits=("test", "dev", "validation"), card=True, **changes):
    """A data set with one folder of Parquet a config, and the card that says so."""
    lines = ["---", "configs:"]
    for config in configs:
        (folder / config).mkdir()
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            count = 14 if split == "dev" else 6
            frame(f"{config} {split}", count, **changes).to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    if card:
        (folder / "README.md").write_text("\n".join([*lines, "---"]))
    return folder


def texts(pool: Pool):
    return [q.text for q in pool.questions], {s: [e.text for e in group] for s, group in pool.examples.items()}


@pytest.mark.parametrize("card", [True, False])
def test_a_folder_is_read_as_the_hub_stores_it(tmp_path, card):
    write_hub_folder(tmp_path, splits=("test", "dev"), card=card)
    pool = read_pool(tmp_path, 0)
    assert pool.questions[2] == Question("all test 2?", ("w", "x", "y", "z"), 2, "law", "test:3")
    told = {s: [f"all dev {k}?" for k in range(first, 10, 2)] for first, s in enumerate(("law", "art"))}
    assert texts(pool) == ([f"all test {k}?" for k in range(6)], told)
    assert texts(read_pool(f"{tmp_path}:law", 0))[0] == [f"law test {k}?" for k in range(6)]
    only = read_pool(tmp_path, 0, subjects=["art"])
    assert {q.subject for q in only.questions} == set(only.examples) == {"art"}
    assert len(load_questions(tmp_path, 4, 0)) == 4


def test_examples_are_of_dev_then_of_validation(tmp_path):
    for splits, used in (
        (("test", "dev", "validation"), "dev"),
        (("test", "validation"), "validation"),
        (("test", "val", "train"), "val"),
        (("test",), None),
    ):
        folder = tmp_path / "-".join(splits)
        folder.mkdir()
        examples = read_pool(write_hub_folder(folder, splits=splits), 0).examples
        assert {e.text.split()[1] for group in examples.values() for e in group} == ({used} if used else set())


def test_a_folder_of_json_gives_what_its_file_gives(tmp_path):
    rows = [
        {"question": f"{k}?", "choices": [*"1234"], "answer": "ABCD"[k % 4], "subject": "sums", "id": f"i{k}"}
        for k in range(5)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_pool(tmp_path, 0).questions == read_pool(tmp_path / "test.jsonl", 0).questions


class Hub:
    """Stands in for `datasets.load_dataset`: serves a folder, knows some configs, and notes what it was asked for."""

    def __init__(self, folder, *configs):
        self.folder, self.configs, self.asked = folder, configs, []

    def __call__(self, name, config="default"):
        self.asked.append((name, config))
        if config not in self.configs:
            raise ValueError(f"BuilderConfig '{config}' not found. Available: {list(self.configs)}")
        return LOAD_DATASET(str(self.folder), config)


def test_a_hub_id_chooses_its_config(tmp_path, monkeypatch):
    hub = Hub(write_hub_folder(tmp_path, ("all", "law", "default")), "all", "law")
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert texts(read_pool("cais/mmlu", 0))[0][0] == "all test 0?"
    assert texts(read_pool("cais/mmlu:law", 0))[0][0] == "law test 0?"
    assert hub.asked == [("cais/mmlu", "all"), ("cais/mmlu", "law")]
    with pytest.raises(ValueError, match=r"mmlu:art': wanted config 'art' .* it has the configs \['all', 'law'\]"):
        read_pool("cais/mmlu:art", 0)

    hub = Hub(tmp_path, "default")
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert texts(read_pool("some.one/quiz-1", 0))[0][0] == "default test 0?"
    assert hub.asked == [("some.one/quiz-1", "all"), ("some.one/quiz-1", "default")]


def test_only_a_missing_config_makes_way_for_the_default(monkeypatch):
    """A cache that lacks `all` may hold another config: that is not what was asked for."""

    def cached(name, config="law"):
        if config == "law":
            pytest.fail("another config was read in place of 'all'")
        raise ValueError(f"Couldn't find cache for {name} for config 'all'\nAvailable configs in the cache: ['law']")

    monkeypatch.setattr(datasets, "load_dataset", cached)
    with pytest.raises(ValueError, match=r"it has the configs \['law'\], named as 'cais/mmlu:config'"):
        read_pool("cais/mmlu", 0)


@pytest.mark.parametrize("name", ["cais/mmlu", "cais/mmlu:all", "data/mmlu"])
def test_without_the_hub_there_is_one_line(name):
    with pytest.raises(ValueError) as caught:
        read_pool(name, 0)
    message = str(caught.value)
    assert message.startswith(f"questions='{name}': wanted ") and "\n" not in message
    assert message.endswith("on the hub, as there is no such folder here, but the hub can't be reached, and its cache "
                            "does not have it")  # fmt: skip
    assert isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"configs": ("law", "art")}, r"': wanted a data set in this folder, but it has the configs \['law', 'art'\]"),
        ({"splits": ("train", "dev")}, r"' has no split 'test'; it has \['dev', 'train'\]"),
        ({"question": None}, r"', split 'test' has no column 'question'; it has \['subject', 'choices', 'answer'\]"),
        ({"subject": None}, "', split 'test' has no column 'subject'"),
        ({"answer": None}, "', split 'test' has no column 'answer'"),
        ({"choices": None}, "', split 'test' has no columns choice0 to choice3"),
        ({"subject": ""}, "', split 'test', row 1: subject is ''; wanted text"),
        ({"answer": 4}, "', split 'test', row 1: answer is 4; wanted 0 to 3 or A to D"),
        ({"id": "x"}, "', split 'test': the id 'x' occurs twice"),
    ],
)
def test_what_a_data_set_lacks_is_named(tmp_path, changes, message):
    write_hub_folder(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"questions='.*{message}"):
        read_pool(tmp_path, 0)


def test_a_folder_that_is_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="wanted a data set in this folder, but .* doesn't contain any data files"):
        read_pool(tmp_path, 0)
    (tmp_path / "test.parquet").write_text("junk")
    with pytest.raises(ValueError, match="wanted a data set in this folder, but .*Parquet"):
        read_pool(tmp_path, 0)
