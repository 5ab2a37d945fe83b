"""The files of `experiments.introspection_data`, and what its summary says about them."""

import dataclasses
import hashlib
import json

import pytest

from experiments.introspection_data import Settings, run
from nmjax.data.introspection import read_lists
from nmjax.data.introspection_records import read_records
from nmjax.data.introspection_split import SplitConfig, generate
from nmjax.report import results

SMALL = Settings(lists="tiny", n=100, layers=4, vectors=20, magnitudes=(1.0, 2.0))


def test_split_files(tmp_path):
    settings = dataclasses.replace(SMALL, variant="vague_prompt", seed=3, output=str(tmp_path / "data"))
    written = run(settings)
    assert [path.name for path in written] == ["train.jsonl", "val.jsonl", "test.jsonl", "summary.json"]
    config = SplitConfig("vague_prompt", n=100, seed=3, layers=4, vectors=20, magnitudes=(1.0, 2.0))
    assert {path.stem: read_records(path) for path in written[:3]} == generate(config, read_lists("tiny"))
    found = json.loads(written[3].read_text())
    assert found["sha256"] == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in written[:3]}
    assert found["counts"]["train"]["records"] == 80 and found["counts"]["test"]["kinds"]["steered"] == 5
    assert all(not any(counts["seen before"].values()) for counts in found["counts"].values())
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in run(settings)]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(path.name for path in written)


def test_v2_files(tmp_path):
    settings = dataclasses.replace(SMALL, generator="v2", n=4000, output=str(tmp_path))
    written = run(settings)
    assert [path.name for path in written] == ["train.jsonl", "val.jsonl", "summary.json"]
    records = read_records(written[0], read_lists("tiny").system)
    assert len(records) == 3600 and {record.vector for record in records} - {None} == set(range(10))
    counts = json.loads(written[2].read_text())["counts"]["val"]
    # The reason for the other generator.
    assert counts["seen before"]["unperturbed inputs"] > 0.9 * counts["different"]["unperturbed inputs"]


def test_files_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path, monkeypatch):
    run(dataclasses.replace(SMALL, output=str(tmp_path)))
    v2 = dataclasses.replace(SMALL, generator="v2", n=400, output=str(tmp_path))
    assert {path.name for path in run(v2)} == {path.name for path in tmp_path.iterdir()}  # no test.jsonl any more

    def killed(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        run(dataclasses.replace(v2, seed=1))
    assert not (tmp_path / "summary.json").exists()


def test_bad_settings_write_nothing(tmp_path):
    for change, message in (
        ({"lists": "none"}, "lists='none'"),
        ({"generator": "v2", "variant": "localization_layers"}, "v2 has"),
        ({"n": 5}, "n is 5"),
    ):
        with pytest.raises(ValueError, match=message):
            run(dataclasses.replace(SMALL, output=str(tmp_path / "data"), **change))
    assert not (tmp_path / "data").exists()
