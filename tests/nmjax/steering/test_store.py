"""Where named vectors are found, and what is said where they are not."""

import dataclasses

import jax
import numpy as np
import pytest

from nmjax.steering.io import load_vector, save_vector
from nmjax.steering.store import cached_folder, named_vector, save_named, stored_names


@pytest.fixture
def lm(tiny_lm, tmp_path, monkeypatch):
    """A model with a folder of its own and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NMJAX_CACHE", "off")
    return dataclasses.replace(tiny_lm, folder=tmp_path / "model")


def rows(seed=0):
    return np.random.default_rng(seed).standard_normal((3, 32)).astype(np.float32)


def test_saved_vectors_are_found_in_the_cache_and_beside_the_weights(lm, tmp_path):
    cached = save_named(lm, "warm", rows(0), {"method": "mean_diff"})
    assert cached == tmp_path / "cache/nmjax/steering" / lm.fingerprint / "warm.safetensors"
    np.testing.assert_array_equal(named_vector(lm, "warm"), rows(0))
    assert load_vector(cached)[1].items() >= {"method": "mean_diff", "model": lm.fingerprint}.items()
    np.testing.assert_array_equal(named_vector(dataclasses.replace(lm, folder=None), "warm"), rows(0))
    save_named(lm, "warm", rows(1), folder=lm.folder / "steering")
    np.testing.assert_array_equal(named_vector(lm, "warm"), rows(1))  # the checkpoint's own comes first
    assert stored_names(lm) == ["warm"]


def test_other_weights_do_not_get_the_vector(lm):
    path = save_named(lm, "warm", rows(), folder=lm.folder / "steering")
    other = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * 1.001, lm.params))
    assert cached_folder(other) != cached_folder(lm)
    with pytest.raises(ValueError, match=f"{path} was found in the model {lm.fingerprint}, this one is "):
        named_vector(other, "warm")
    save_named(other, "warm", rows(2))  # what is found in the cache under its own fingerprint fits
    np.testing.assert_array_equal(named_vector(other, "warm"), rows(2))


def test_a_missing_vector_names_the_command_and_what_there_is(lm, tmp_path):
    command = f"python -m experiments.build_steering_vectors --model={lm.folder} --types=cold"
    with pytest.raises(ValueError, match="no steering vector 'cold'; there are: none yet") as error:
        named_vector(lm, "cold")
    assert command in str(error.value)
    save_named(lm, "warm", rows())
    save_named(lm, "dry", rows(), folder=lm.folder / "steering")
    with pytest.raises(ValueError, match="there are: dry, warm"):
        named_vector(lm, "cold")


def test_wrong_shapes_and_names_are_errors(lm):
    with pytest.raises(ValueError, match=r"vectors has shape \(2, 32\), wanted \(3, 32\)"):
        save_named(lm, "warm", rows()[:2])
    save_vector(cached_folder(lm) / "warm.safetensors", rows()[:2], {"model": lm.fingerprint})
    with pytest.raises(ValueError, match=r"warm.safetensors has shape \(2, 32\), wanted \(3, 32\)"):
        named_vector(lm, "warm")
    for name in ("../warm", "", ".hidden", "a/b", 3):
        with pytest.raises(ValueError, match="steering vector name"):
            named_vector(lm, name)
