"""Documents from the bundled world, from files and from data sets, and their split by text."""

import json

import datasets
import pandas
import pytest

from nmjax.data.documents import PASSAGE, PUBLISHED, read_documents, split_documents
from nmjax.data.world import bundled_world

WIKI = """
 = Du Fu =
 Du Fu was a poet .
 = = Life = =
 He lived .

 = Kiss You ( song ) =

 A song .
 = = = Charts = = =
 It was first .
"""
ARTICLES = [
    "= Du Fu =\n Du Fu was a poet .\n = = Life = =\n He lived .",
    "= Kiss You ( song ) =\n A song .\n = = = Charts = = =\n It was first .",
]


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_the_bundled_world_has_no_end_and_follows_from_its_seed():
    documents = read_documents("bundled", 300, seed=1)
    assert len(documents) == 300 and documents[:40] == read_documents("bundled", 40, seed=1)
    assert documents[:40] != read_documents("bundled", 40, seed=2)
    facts = [(fact.entity, fact.value) for fact in bundled_world().facts]
    about = sum(any(entity in text and value in text for entity, value in facts) for text in documents)
    assert about > 150  # questions, statements, judgements; the rest is stories, riddles, sums
    assert any("Riddle: " in text for text in documents)


def test_a_text_is_cut_into_passages_of_whole_paragraphs(tmp_path):
    paragraphs = [f"{k}: " + "word " * (k % 90) + "end\n  indented" for k in range(120)]
    text = "\n\n \n".join(paragraphs)
    documents = read_documents(write(tmp_path / "book.txt", "\n" + text + "\n\n"))
    assert "\n\n \n".join(documents) == text
    assert min(map(len, documents)) >= PASSAGE - 3  # less the gap after the last paragraph
    assert max(map(len, documents)) < 2 * PASSAGE + max(map(len, paragraphs))
    assert read_documents(tmp_path / "book.txt", 2) == documents[:2]

    lines = [f"{k}: " + "word " * (k % 90) + "end" for k in range(120)]
    documents = read_documents(write(tmp_path / "lines.txt", "\n".join(lines)))
    assert len(documents) > 10 and "\n".join(documents).split("\n") == lines
    assert read_documents(write(tmp_path / "short.txt", "A.\n\nB.\n")) == ["A.\n\nB."]


@pytest.mark.parametrize("text", [WIKI, WIKI.replace("\n\n", "\n"), WIKI.replace("\n", "\r\n"), "\ufeff" + WIKI])
def test_articles_begin_at_their_titles(tmp_path, text):
    assert read_documents(write(tmp_path / "wiki.test.raw", text)) == ARTICLES


def test_a_mark_between_documents_is_heeded(tmp_path):
    file = write(tmp_path / "stories.txt", "One.\n\nday<|endoftext|>\n<|endoftext|>\nTwo.<|endoftext|>")
    assert read_documents(file) == ["One.\n\nday", "Two."]


def test_rows_of_jsonl(tmp_path):
    rows = [{"text": " a\n\nb "}, {"text": " "}, {"text": "c", "other": "d"}]
    file = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_documents(file) == ["a\n\nb", "c"]
    assert read_documents(file, 1) == ["a\n\nb"]
    lines = "\n".join(json.dumps({"line": line + "\n"}) for line in WIKI.split("\n"))
    assert read_documents(write(tmp_path / "wiki.jsonl", lines), column="line") == ARTICLES


def test_a_folder_of_several_files_keeps_short_texts_whole(tmp_path):
    long = "\n\n".join(["x" * 600] * 4)
    write(tmp_path / "b.txt", long)
    write(tmp_path / "README.md", "not a text")
    assert len(read_documents(tmp_path)) == 2  # alone, as if the file had been named
    write(tmp_path / "c.raw", WIKI)
    write(tmp_path / "a.jsonl", json.dumps({"text": "row"}))
    assert read_documents(tmp_path) == ["row", long, *ARTICLES]
    assert read_documents(tmp_path, 2) == ["row", long]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", " \n\n ", "dataset='.*a.txt' holds no text"),
        ("a.jsonl", '{"text": "x"}\n{"txt": "y"}', r"a.jsonl, row 2 has no column 'text'; it has \['txt'\]"),
        ("a.jsonl", '{"text": 3}', "a.jsonl, row 1: text is 3; wanted text"),
        ("a.csv", "x", "a.csv'; wanted 'bundled', a .txt, .raw or .jsonl file, a folder"),
        (None, "", "missing.txt'; wanted 'bundled', a .txt"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, name, text, message):
    file = write(tmp_path / name, text) if name else tmp_path / "missing.txt"
    with pytest.raises(ValueError, match=message):
        read_documents(file)


def test_bytes_that_are_no_text(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "\xff"}')
        with pytest.raises(ValueError, match=f"{name} is not text in UTF-8: "):
            read_documents(tmp_path / name)


def test_sources_that_do_not_exist():
    with pytest.raises(ValueError, match="documents must be 1 or more, or None for the default, got 0"):
        read_documents("bundled", 0)
    for name in ("data/missing.txt", "missing", "a/b/c", "wiki text"):
        with pytest.raises(ValueError, match=f"dataset='{name}'; wanted 'bundled', "):
            read_documents(name)


# --- Data sets --------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for `datasets.load_dataset`: streams `rows` as split train, and notes what it was asked for."""

    def __init__(self, rows, *configs):
        self.rows, self.configs, self.asked = rows, configs, []

    def __call__(self, name, config="default", *, streaming):
        assert streaming
        self.asked.append((name, config))
        if config not in self.configs:
            raise ValueError(f"BuilderConfig '{config}' not found. Available: {list(self.configs)}")
        return {"train": self.rows(), "validation": iter([{"text": "held"}])}


@pytest.fixture
def serve(monkeypatch):
    def serve(rows, *configs):
        hub = Hub(rows, *configs)
        monkeypatch.setattr(datasets, "load_dataset", hub)
        return hub

    return serve


def test_no_more_is_streamed_than_is_needed(serve):
    def rows():
        yield {"text": "Once. ", "other": 1}
        yield {"text": ""}
        yield {"text": "Twice."}
        raise OSError("the line is\ncut")

    hub = serve(rows, "default")
    assert read_documents("roneneldan/TinyStories", 2) == read_documents("tinystories", 2) == ["Once.", "Twice."]
    assert hub.asked == [(PUBLISHED["tinystories"], config) for config in ("all", "default")] * 2
    assert read_documents("some/stories", split="validation") == ["held"]
    with pytest.raises(ValueError, match="^dataset='some/one': wanted a data set on the hub, .* but the line is cut$"):
        read_documents("some/one", 3)
    with pytest.raises(ValueError, match=r"^dataset='some/one' has no split 'dev'; it has \['train', 'validation'\]"):
        read_documents("some/one", split="dev")
    with pytest.raises(ValueError, match=r"'some/one', split 'train', row 1 has no column 'story'; it has \['text',"):
        read_documents("some/one", 1, column="story")
    with pytest.raises(ValueError, match="'some/one', split 'train', row 1: other is 1; wanted text"):
        read_documents("some/one", 1, column="other")
    with pytest.raises(ValueError, match=r"config 'en' of a data set on the hub, .* it has the configs \['default'\]"):
        read_documents("some/one:en")


def test_lines_of_wikitext_are_put_together(serve):
    configs = [f"wikitext-{k}-raw-v1" for k in (2, 103)]
    hub = serve(lambda: ({"text": line + "\n"} for line in WIKI.split("\n")), *configs)
    assert read_documents("wikitext") == ARTICLES
    assert read_documents("wikitext", 1) == ARTICLES[:1]
    assert read_documents("wikitext:wikitext-2-raw-v1") == ARTICLES
    assert hub.asked == [("Salesforce/wikitext", configs[k]) for k in (1, 1, 0)]


def test_a_folder_is_read_as_the_hub_stores_it(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "TORCH_AVAILABLE", False)  # streaming would import it, for seconds
    for split in ("train", "validation"):
        table = pandas.DataFrame({"text": [f"{split} {k}" for k in range(4)]})
        table.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    assert read_documents(tmp_path, 3) == ["train 0", "train 1", "train 2"]
    assert read_documents(tmp_path, split="validation")[3] == "validation 3"
    (tmp_path / "train-00000-of-00001.parquet").write_text("junk")
    with pytest.raises(ValueError, match="^dataset='.*': wanted a data set in this folder, but .*Parquet"):
        read_documents(tmp_path)
    with pytest.raises(ValueError) as caught:
        read_documents("roneneldan/TinyStories")
    assert str(caught.value).endswith("but the hub can't be reached, and its cache does not have it")


# --- The split --------------------------------------------------------------------------------------------------------


def test_no_text_is_on_both_sides():
    documents = [f"text {k % 70}" for k in range(100)] + ["text 3"] * 20
    train, held_out = split_documents(documents, 0.2, seed=5)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(documents)
    assert len(set(held_out)) == 14  # a fifth of 70 texts
    assert [text for text in documents if text in set(held_out)] == held_out
    assert split_documents(documents, 0.2, seed=5) == (train, held_out)
    others = [set(split_documents(documents, 0.2, seed)[1]) for seed in range(20)]
    assert len(set(map(frozenset, others))) == 20 and set.union(*others) > set(held_out)


@pytest.mark.parametrize(
    ("documents", "share", "message"),
    [
        (["a"] * 50, 0.5, "share=0.5 holds out 0 of the 1 distinct documents; wanted one or more on each side"),
        ([*"abcd"], 0.1, "share=0.1 holds out 0 of the 4"),
        ([*"abcd"], 0.9, "share=0.9 holds out 4 of the 4"),
        ([], 0.5, "share=0.5 holds out 0 of the 0"),
        ([*"abcd"], 1.0, "share must lie between 0 and 1, got 1.0"),
        ([*"abcd"], float("nan"), "share must lie between 0 and 1, got nan"),
    ],
)
def test_an_empty_side_is_an_error(documents, share, message):
    with pytest.raises(ValueError, match=message):
        split_documents(documents, share)


# --- Real texts -------------------------------------------------------------------------------------------------------


def test_tiny_shakespeare(shared_data):
    documents = read_documents(shared_data / "tinyshakespeare")
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    assert all(document in text for document in documents) and " ".join(documents).split() == text.split()
    assert len(documents) > 900 and min(map(len, documents)) >= PASSAGE - 2


def test_wikitext(shared_data):
    documents = read_documents(shared_data / "wikitext2-raw")
    titles = [text.partition("\n")[0].strip() for text in documents]
    assert titles[:3] == ["= Robert Boulter =", "= Du Fu =", "= Kiss You ( One Direction song ) ="]
    formulas = [title for title in titles if title.endswith((" k =", " C ="))]
    assert len(titles) - len(formulas) == 60 and len(formulas) == 2  # the test split has 60 articles
    words = (shared_data / "wikitext2-raw" / "wiki.test.raw").read_text(encoding="utf-8").split()
    assert " ".join(documents).split() == words
