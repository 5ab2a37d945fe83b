"""Concept vectors: what they are made of, what they share, and that they are built once."""

import dataclasses

import numpy as np
import pytest

import nmjax
from nmjax.steering import store, vectors
from nmjax.steering.concepts import (
    Templates,
    concept_directions,
    concept_vectors,
    mean_cosine,
    read_templates,
    shared_direction,
    without_shared,
)

ABOUT = Templates("w5", ("w6 {concept} w7", "w8 w9 {concept}", "{concept} w12 w13"))
WORDS = ("w20", "w21", "w22 w23")


@pytest.fixture
def lm(word_lm, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return word_lm


def test_the_contrast_is_that_of_the_texts(lm):
    found = concept_vectors(lm, WORDS, layer=1, templates=ABOUT, token="last")
    for word, vector in zip(WORDS, found.vectors, strict=True):
        pairs = [(t.format(concept=word), t.format(concept="w5")) for t in ABOUT.wordings]
        ends = [[nmjax.forward(lm, [text], capture=("resid_post",)).activations["resid_post"][1, 0, -1]
                 for text in pair] for pair in pairs]  # fmt: skip
        mean = np.mean([np.subtract(about, general) for about, general in ends], axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    assert found.of("w21") is not None and np.array_equal(found.of("w21"), found.vectors[1])
    with pytest.raises(ValueError, match="no vector of the concept 'w9'; there are w20, w21, w22 w23"):
        found.of("w9")
    assert concept_vectors(lm, WORDS, templates=ABOUT, token="last").layer == 1  # of three blocks, the half's last


def test_planted_directions_are_recovered(lm, monkeypatch):
    rng = np.random.default_rng(0)
    shared, *own = np.linalg.qr(rng.standard_normal((32, 4)))[0].T

    def planted(lm, texts, token, batch_size, progress):
        rows = rng.standard_normal((len(texts), 3, 32)) * 0.02
        for row, text in zip(rows, texts, strict=True):
            for word, direction in zip(WORDS, own, strict=True):
                row += (3 * shared + direction) * (word in text)
        return rows

    monkeypatch.setattr(vectors, "activations", planted)
    found = concept_vectors(lm, WORDS, templates=ABOUT)
    assert found.cosine == pytest.approx(0.9, abs=0.02) and found.shared_norm == pytest.approx(0.966, abs=0.01)
    alone = concept_vectors(lm, WORDS, templates=ABOUT, remove_shared=True)
    assert alone.shared_removed and alone.cosine == found.cosine
    # Less what they share, three directions lie in a plane, at angles of 120 degrees.
    assert alone.cosine_without_shared == pytest.approx(-0.5, abs=0.02)
    centred = np.array(own) - np.mean(own, axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    assert np.sum(alone.vectors * centred, axis=1).min() > 0.98


def test_they_are_built_once_and_found_by_name(lm, monkeypatch):
    seen = []
    real = vectors.activations
    monkeypatch.setattr(vectors, "activations", lambda *a: seen.append(a[1]) or real(*a))
    first = concept_directions(lm, WORDS[:2], templates=ABOUT)
    assert len(seen[0]) == 9  # the texts about things in general once
    more = concept_directions(lm, WORDS, templates=ABOUT)
    assert len(seen[1]) == 6 and list(more) == list(WORDS)
    np.testing.assert_array_equal(more["w21"], first["w21"])
    np.testing.assert_array_equal(store.named_vector(lm, "concept_w22-w23"), more["w22 w23"])
    counted = []
    concept_directions(lm, WORDS, templates=ABOUT, progress=counted.append)
    assert len(seen) == 2 and sum(counted) == 12
    concept_directions(lm, WORDS, "pca", ABOUT)  # another plan
    other = dataclasses.replace(ABOUT, general="w30")
    concept_directions(lm, WORDS, templates=other)
    assert [len(texts) for texts in seen[2:]] == [12, 12]
    with pytest.raises(ValueError, match="--concepts=<list of words>"):
        store.named_vector(lm, "concept_w40")


def test_cosines_against_all_pairs():
    x = np.random.default_rng(1).standard_normal((6, 5)) + 1
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [x[i] @ x[j] for i in range(6) for j in range(6) if i != j]
    assert mean_cosine(x) == pytest.approx(np.mean(pairs))
    direction, norm = shared_direction(x)
    assert norm == pytest.approx(np.linalg.norm(x.mean(axis=0)))
    alone = without_shared(x)
    np.testing.assert_allclose(alone @ direction, 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="row 0 is the direction that all share"):
        without_shared(np.array([[1.0, 0.0], [1.0, 0.0]]))


def test_published_vectors_share_most(shared_data):
    path = shared_data / "introspection" / "concept_vectors_v4_f32.npy"
    if not path.is_file():
        pytest.skip(f"no published concept vectors at {path}")
    x = np.load(path)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert mean_cosine(x) == pytest.approx(0.585, abs=1e-3)
    assert shared_direction(x)[1] == pytest.approx(0.768, abs=5e-4)
    assert abs(mean_cosine(without_shared(x))) < 0.01


@pytest.mark.parametrize("name", ["bundled", "tiny"])
def test_templates_differ_in_the_concept_alone(name):
    templates = read_templates(name)
    assert len(templates.wordings) == 12
    for about, general in templates.pairs("clocks"):
        assert about.replace("clocks", templates.general) == general != about


@pytest.mark.parametrize(
    "change, message",
    [
        ({"words": ("w20",)}, "words="),
        ({"words": ("w20", "w20")}, "words="),
        ({"layer": 3}, "layer=3, wanted one of the blocks 0 to 2"),
        ({"templates": "loud"}, "templates='loud'; wanted one of"),
        ({"words": ("w5", "w20")}, "the concept 'w5' has no direction in layer 0"),
    ],
)
def test_bad_input_is_named(lm, change, message):
    arguments = {"words": WORDS, "templates": ABOUT} | change
    with pytest.raises(ValueError, match=message):
        concept_vectors(lm, arguments.pop("words"), **arguments)


def test_bad_templates_are_named():
    with pytest.raises(ValueError, match=r"the wording 'nothing' has no \{concept\}"):
        Templates("things", ("{concept}", "nothing"))
    with pytest.raises(ValueError, match="two or more different"):
        Templates("things", ("{concept}", "{concept}"))
    with pytest.raises(ValueError, match="general is ' '"):
        Templates(" ", ("{concept}", "a {concept}"))
