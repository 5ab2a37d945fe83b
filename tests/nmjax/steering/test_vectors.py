"""Extraction against one-by-one passes, directions against planted ones and scikit-learn, placebos."""

import json

import numpy as np
import pytest
from sklearn.decomposition import PCA

import nmjax
from nmjax.steering import vectors
from nmjax.steering.vectors import activations, direction, placebo, read_pairs


def cosine(a, b):
    return np.sum(a * b, -1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


# --- Texts ---


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return path


def entry(kind="warm", positive="Hello, friend!", negative="What?"):
    return {"steering_type": kind, "positive": positive, "negative": negative}


def test_read_pairs_groups_by_type_in_order(tmp_path):
    path = write(tmp_path / "p.jsonl", entry(), "", entry("cold", "a", "b"), entry("warm", "ä ", "c"))
    assert read_pairs(path) == {"warm": [("Hello, friend!", "What?"), ("ä ", "c")], "cold": [("a", "b")]}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 holds a list, wanted an object with the keys"),
        ({"positive": "a", "negative": "b"}, r"line 2 holds the keys \['negative', 'positive'\]"),
        (entry() | {"type": "x"}, "line 2 holds the keys"),
        (entry(positive=" "), "line 2: positive=' ', wanted a text"),
        (entry(negative=3), "line 2: negative=3, wanted a text"),
        (entry(positive="x", negative="x "), "line 2: positive and negative are the same text"),
    ],
)
def test_read_pairs_names_file_and_line(tmp_path, line, message):
    with pytest.raises(ValueError, match=message) as error:
        read_pairs(write(tmp_path / "bad.jsonl", entry(), line))
    assert "bad.jsonl" in str(error.value)


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no pair"):
        read_pairs(write(tmp_path / "p.jsonl", ""))


# --- Activations ---


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(3, 97, size).tolist() for size in (5, 18, 1, 16, 7, 9, 30)]


@pytest.mark.parametrize("token", vectors.TOKENS)
def test_batched_activations_equal_one_by_one_passes(tiny_lm, prompts, token, assert_close):
    done = []
    found = activations(tiny_lm, prompts, token, batch_size=3, progress=done.append)
    assert found.shape == (7, 3, 32) and found.dtype == np.float32
    assert sum(done) == 7 and done == [3, 2, 2]  # five texts in the bucket of 16, two in that of 32
    for prompt, mine in zip(prompts, found, strict=True):
        result = nmjax.forward(tiny_lm, [prompt], capture=("resid_post",))
        stream = np.asarray(result.activations["resid_post"])[:, 0]
        assert stream.shape == (3, len(prompt), 32)
        assert_close(mine, stream[:, -1] if token == "last" else stream.mean(axis=1))


def test_one_program_a_padded_length(tiny_lm, prompts):
    vectors._read.clear_cache()
    for count in (3, 5, 7):
        activations(tiny_lm, prompts[:count], batch_size=4)
    assert vectors._read._cache_size() == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"token": "first"}, r"token='first', wanted one of \('last', 'mean'\)"),
        ({"batch_size": 0}, "batch_size=0, wanted an integer >= 1"),
        ({"texts": []}, "texts is empty"),
        ({"texts": [[97]]}, r"texts\[0\] holds token id 97, wanted 0 to 96"),
        ({"texts": [[5] * 129]}, "exceed the model's context of 128"),
    ],
)
def test_bad_input_is_named(tiny_lm, change, message):
    with pytest.raises(ValueError, match=message):
        activations(tiny_lm, **{"texts": [[5]], **change})


# --- Directions ---


def planted(n=80, D=64, seed=0):
    """Two layers. Pairs share a contrast of length 2 along axis `truth` and disagree, far more, along another axis."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((D, 2)))[0].T
    truth, quarrel = axes
    base = rng.standard_normal((n, 2, D))
    noise = 0.1 * rng.standard_normal((n, 2, D))
    shift = 2 * truth + 3 * rng.standard_normal((n, 1, 1)) * quarrel
    return base + shift + noise, base, truth, quarrel


def test_the_mean_finds_a_contrast_that_centred_pca_subtracts():
    positive, negative, truth, quarrel = planted()
    mean, explained = direction(positive, negative)
    assert (cosine(mean, truth) > 0.95).all()
    assert mean.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(mean, axis=-1), 1, atol=1e-6)
    centred, _ = direction(positive, negative, "pca_centered")
    assert (np.abs(cosine(centred, truth)) < 0.1).all()
    assert (np.abs(cosine(centred, quarrel)) > 0.99).all()
    # The share by its definition: what is left after projecting the direction out.
    d = positive - negative
    for layer in range(2):
        left = d[:, layer] - np.outer(d[:, layer] @ mean[layer], mean[layer])
        assert explained[layer] == pytest.approx(1 - (left**2).sum() / (d[:, layer] ** 2).sum(), rel=1e-5)


def test_pca_about_zero_finds_a_contrast_that_dominates():
    positive, negative, truth, _ = planted()
    strong = positive + 8 * truth
    assert (cosine(direction(strong, negative, "pca")[0], truth) > 0.9).all()
    assert (np.abs(cosine(direction(strong, negative, "pca_centered")[0], truth)) < 0.1).all()


@pytest.mark.parametrize("n", [12, 90])  # fewer and more pairs than dimensions
def test_both_components_are_those_of_independent_solvers(n):
    rng = np.random.default_rng(1)
    positive, negative = rng.standard_normal((2, n, 3, 40)) + 0.2 * np.arange(40)
    d = positive - negative
    centred, _ = direction(positive, negative, "pca_centered")
    about_zero, explained = direction(positive, negative, "pca")
    for layer in range(3):
        theirs = PCA(1).fit(d[:, layer]).components_[0]
        assert abs(cosine(centred[layer], theirs)) == pytest.approx(1, abs=1e-6)
        _, sizes, axes = np.linalg.svd(d[:, layer], full_matrices=False)
        assert abs(cosine(about_zero[layer], axes[0])) == pytest.approx(1, abs=1e-6)
        assert explained[layer] == pytest.approx(sizes[0] ** 2 / (sizes**2).sum(), rel=1e-5)


@pytest.mark.parametrize("method", vectors.METHODS)
def test_swapping_the_sides_turns_the_direction(method):
    positive, negative, truth, _ = planted()
    forth, back = direction(positive, negative, method)[0], direction(negative, positive, method)[0]
    np.testing.assert_allclose(forth, -back, atol=1e-6)
    assert (((positive - negative).mean(axis=0) * forth).sum(-1) > 0).all()


def test_a_layer_without_differences_has_no_direction():
    positive, negative, _, _ = planted()
    positive[:, 1] = negative[:, 1]
    for method in vectors.METHODS:
        found, explained = direction(positive, negative, method)
        assert not found[1].any() and explained[1] == 0 and explained[0] > 0


def test_bad_differences_are_named():
    good = np.zeros((3, 2, 4))
    for positive, negative, method, message in [
        (good, good[:2], "mean_diff", r"positive has shape \(3, 2, 4\) and negative \(2, 2, 4\)"),
        (good[:1], good[:1], "mean_diff", "positive holds 1 pairs, wanted at least 2"),
        (good + np.nan, good, "mean_diff", "NaN or infinity"),
        (good, good, "ica", "method='ica', wanted one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            direction(positive, negative, method)


# --- Placebos ---


@pytest.mark.parametrize("kind", vectors.PLACEBOS)
def test_placebos_are_as_long_as_the_first_reference_and_seeded(kind):
    rng = np.random.default_rng(0)
    reference = (rng.standard_normal((4, 50)) * np.array([[1], [30], [1e-3], [0]])).astype(np.float32)
    found = placebo(reference, kind, seed=5)
    assert found.dtype == np.float32 and found.shape == (4, 50)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), np.linalg.norm(reference, axis=-1), rtol=1e-6)
    assert not found[3].any()
    np.testing.assert_array_equal(found, placebo(reference, kind, seed=5))
    assert (np.abs(cosine(found[:3], placebo(reference, kind, seed=6)[:3])) < 0.5).all()
    assert abs(cosine(found[0], found[1])) < 0.5  # layers are independent
    assert placebo(reference[1], kind).shape == (50,)


def test_orthogonal_placebos_are_orthogonal_to_every_reference():
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((4, 50))
    references = [shared + 1e-3 * rng.standard_normal((4, 50)) for _ in range(8)] + [shared[0], np.zeros((4, 50))]
    found = placebo(references, "orthogonal")
    for reference in references[:-1]:
        assert (np.abs(cosine(found, reference)) < 1e-6).all()
    assert np.abs(cosine(placebo(references, "random"), shared)).max() > 1e-3
    assert abs(cosine(placebo(shared[1].tolist(), "orthogonal"), shared[1])) < 1e-6  # a plain list is one vector


def test_bad_placebos_are_named():
    for reference, kind, message in [
        (np.ones(3), "zero", "kind='zero', wanted one of"),
        ([np.ones((2, 3)), np.ones((3, 3))], "random", r"reference\[1\] has shape \(3, 3\)"),
        ([np.ones(3), np.ones((2, 3))], "random", r"wanted the \[L, D\] first"),
        ([np.ones(3), np.array([1, 2, np.inf])], "random", r"reference\[1\] holds NaN or infinity"),
        (list(np.eye(3)), "orthogonal", "the references span all 3 dimensions"),
    ]:
        with pytest.raises(ValueError, match=message):
            placebo(reference, kind)
