"""Records of the introspection study: what may be in one, files, vectors, ranges of blocks, and the published data."""

import dataclasses
import hashlib
import itertools
import json
import math

import numpy as np
import pytest

from nmjax.data.introspection import read_lists
from nmjax.data.introspection_records import (
    Record,
    layer_ranges,
    published_record,
    read_records,
    summary,
    to_jsonl,
    unit_vectors,
)
from nmjax.data.introspection_v2 import generate
from nmjax.data.introspection_v2 import to_jsonl as v2_jsonl

PUBLISHED = {
    "original": (
        "4b39abed8c202fe68787f69c56cc344440f3f3b0f0e8b8df87d2477ca327ce11",
        "1bb43f9ae2617ffb06ef8935ea981348e17b8b5c7924fa7708148163b4a1bb62",
    ),
    "vague_prompt": (
        "f67c9698ae71c1722138e492ab3a38d60b35167caaaa47b9191a271af591bd59",
        "455b3bcedb756dda8131102e832383ea152522923c4d299d7c8b60f38efcdb23",
    ),
    "food_control": (
        "3f10d11e8556fd3041454e3104a492daf9c3939d5e928f7b19b9748267a2f63e",
        "f4cf8ffcc459fc8214309aa9c4d70fc0d2652bd6dfe3279b18079ec4d4dccd4e",
    ),
    "flipped_labels": (
        "1e88cacf0e8168d0702f9f6adcc40334f47204bb5ba4eb00f9980e4850d36d86",
        "e99200d975bd4b0cb5534dfcd8a48194d3092ee3d8ebe1a481d8073d0cedb80e",
    ),
}
STEERED = Record(
    id="a",
    kind="steered",
    system="S",
    context="C",
    reply="R",
    question="Q",
    answers=(" yes", " no"),
    answer=0,
    vector=3,
    layers=(1, 2),
    third="middle",
    magnitude=5.0,
)
CLEAN = dataclasses.replace(
    STEERED, id="b", kind="clean", answer=1, vector=None, layers=None, third=None, magnitude=None
)


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_lists_give_the_published_bytes(shared_data, variant):
    folder = shared_data / "introspection"
    if not folder.is_dir():
        pytest.skip(f"no published lists at {folder}")
    files = generate(variant, read_lists(folder))
    assert list(files) == ["train", "val"]
    found = tuple(hashlib.sha256(v2_jsonl(rows).encode()).hexdigest() for rows in files.values())
    assert found == PUBLISHED[variant]


def test_v2_with_other_lists_models_and_sizes():
    lists = read_lists("tiny")
    files = generate("original", lists, n=400, seed=1, layers=8, vectors=5, magnitudes=(0.5, 2.0))
    rows = [*files["val"], *files["train"]]
    steered = [row for row in rows if row["steered"]]
    assert [len(part) for part in files.values()] == [360, 40] and len(steered) == 200
    assert {row["vector_idx"] for row in steered} == set(range(5)) and {row["magnitude"] for row in steered} == {
        0.5,
        2.0,
    }
    assert {(row["layer_name"], row["layer_start"], row["layer_end"]) for row in steered} == {
        ("early", 0, 2),
        ("middle", 2, 5),
        ("late", 5, 7),
    }
    assert generate("r1_minimal", lists, n=400, seed=1, layers=8, vectors=5, magnitudes=(0.5, 2.0)) == files
    assert generate("original", lists, n=400, seed=2) != generate("original", lists, n=400, seed=1)
    flipped = generate("flipped_labels", lists, n=400, seed=1)
    for part in flipped.values():
        assert sum(row["label"] != row["steered"] for row in part) == len(part) / 2
    for arguments, message in (
        ({"variant": "localization_layers"}, "variant='localization_layers'; v2 has"),
        ({"variant": "original", "n": 9}, "n is 9"),
        ({"variant": "original", "layers": 3}, "layers is 3; wanted at least 4"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(lists=lists, **arguments)


def test_rows_of_the_published_format_as_records():
    lists = read_lists("tiny")
    for variant in PUBLISHED:
        rows = generate(variant, lists, n=60)["train"]
        for k, row in enumerate(rows):
            record = published_record(row, str(k), "here", lists.system)
            assert (record.answers[record.answer] == " yes") == row.get("label", row["steered"])
            assert (record.kind == "steered") == (row["steered"] and variant != "food_control")
            assert (record.vector, record.magnitude) == (row["vector_idx"], row["magnitude"])
            assert record.conversation[1:] == (
                row["context_prompt"],
                row["assistant_response"],
                row["detection_question"],
            )
    row |= {"positive_token": "Red", "negative_token": "Blue"}
    assert published_record(row, "x", "here", "S").answers == (" Red", " Blue")


def test_files_come_back_as_they_were(tmp_path):
    records = [
        STEERED,
        CLEAN,
        dataclasses.replace(STEERED, id="ç", kind="noise", answer=1, vector=None, noise_seed=2**32 - 1),
        dataclasses.replace(STEERED, id="d", context="0. A\n1. B", spans=((3, 4), (8, 9)), sentence=1),
    ]
    (tmp_path / "own.jsonl").write_text(to_jsonl(records), encoding="utf-8")
    assert read_records(tmp_path / "own.jsonl") == records
    rows = generate("original", read_lists(), n=20)["train"]
    (tmp_path / "published.jsonl").write_text(v2_jsonl(rows))
    assert read_records(tmp_path / "published.jsonl", "S")[4] == published_record(rows[4], "5", "", "S")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "drunk"}, "record 'a': kind is 'drunk'; wanted one of"),
        ({"answers": [" yes", " yes"]}, "wanted two or more different texts"),
        ({"answer": 2}, "answer is 2; wanted 0 to 1"),
        ({"vector": None}, "vector is None; wanted a value"),
        ({"noise_seed": 1}, "noise_seed is 1; wanted none"),
        ({"layers": None}, "layers is None; wanted a value"),
        ({"sentence": 0}, "sentence is 0; wanted the index of a span"),
        ({"spans": [3]}, "row 1: .*int"),
        ({"question": " "}, "row 1: question is ' '; wanted text"),
        ({"dose": 1}, r"row 1 lacks \[\] and has \['dose'\] besides"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(dataclasses.asdict(STEERED) | change))
    with pytest.raises(ValueError, match=message):
        read_records(file)


def test_bad_rows_of_the_published_format_are_named(tmp_path):
    row = generate("original", read_lists("tiny"), n=20)["train"][0]
    for change, message in (
        ({"label": 1}, "row 1: label is 1; wanted true or false"),
        ({"context_prompt": ""}, "row 1: context_prompt is ''; wanted text"),
        ({"vector_idx": 1, "magnitude": None}, "row 1: record '1': magnitude is None"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(row | change))
        with pytest.raises(ValueError, match=message):
            read_records(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text(to_jsonl([CLEAN, CLEAN]))
    with pytest.raises(ValueError, match="row 2: the id 'b' occurs twice"):
        read_records(tmp_path / "bad.jsonl")


def test_unit_vectors_are_uniform_on_the_sphere():
    x = unit_vectors(200, 1280, seed=3)
    assert x.dtype == np.float32 and x.shape == (200, 1280)
    np.testing.assert_allclose(np.linalg.norm(x.astype(np.float64), axis=1), 1, atol=1e-6)
    # The cosine of two of them has a mean absolute value of sqrt(2 / (pi D)), up to 1 / D.
    cosines = [a @ b for a, b in itertools.combinations(x, 2)]
    np.testing.assert_allclose(np.mean(np.abs(cosines)), math.sqrt(2 / (math.pi * 1280)), rtol=0.03)
    np.testing.assert_array_equal(unit_vectors(250, 1280, seed=3)[:200], x)
    assert abs(float(unit_vectors(1, 1280, seed=4)[0] @ x[0])) < 0.2
    with pytest.raises(ValueError, match="n is 3, dim is 0"):
        unit_vectors(3, 0, seed=0)


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [  # as published for Qwen2.5 7B, 14B, 32B and Llama-3.3-70B
        (28, [(0, 9), (9, 18), (18, 27)]),
        (48, [(0, 16), (16, 32), (32, 47)]),
        (64, [(0, 21), (21, 42), (42, 63)]),
        (80, [(0, 26), (26, 53), (53, 79)]),
        (4, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_ranges_of_blocks(layers, wanted):
    assert list(layer_ranges(layers).values()) == wanted


def test_summary_counts_what_was_seen_before():
    other = dataclasses.replace(STEERED, id="e", vector=4)
    counts = summary({"train": [STEERED, CLEAN], "val": [CLEAN, other], "test": [other, STEERED]})
    assert counts["train"]["answers"] == {"clean: no": 1, "steered: yes": 1}
    assert set(counts["train"]["seen before"].values()) == {0}
    assert counts["val"]["seen before"] == {
        "contexts": 1, "questions": 1, "vectors": 0, "perturbations": 0, "unperturbed inputs": 1
    }  # fmt: skip
    assert counts["test"]["seen before"]["perturbations"] == 2
