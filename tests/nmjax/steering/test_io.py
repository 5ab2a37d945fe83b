"""Files of vectors: round trips, real control vectors read by the format's own tools, damage."""

import os

import numpy as np
import pytest
import safetensors.numpy
from gguf import GGUFReader, GGUFWriter
from safetensors import safe_open

from nmjax.steering.io import load_vector, save_vector

LAYER_0 = "ignore:.*direction.0 acts after the first block"


@pytest.fixture
def vectors():
    rows = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    rows[[0, 3]] = 0  # layers without a direction
    return rows


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_round_trip_is_exact(tmp_path, vectors, suffix):
    path = save_vector(tmp_path / "deep" / f"warm.{suffix}", vectors, {"steering_type": "warm", "pairs": 80, "ü": "ä"})
    found, metadata = load_vector(path)
    np.testing.assert_array_equal(found, vectors)
    assert found.dtype == np.float32
    assert metadata.items() >= {"schema": "nmjax.steering.1", "steering_type": "warm", "pairs": "80", "ü": "ä"}.items()
    assert os.listdir(path.parent) == [path.name]  # no temporary file stays
    first = path.read_bytes()
    save_vector(path, vectors, {"steering_type": "warm", "pairs": 80, "ü": "ä"})
    assert path.read_bytes() == first
    assert load_vector(path, layers=9)[0].shape == (9, 12)


def test_safetensors_is_what_the_library_reads(tmp_path, vectors):
    path = save_vector(tmp_path / "v.safetensors", vectors, {"method": "mean_diff"})
    with safe_open(path, "np") as file:
        assert sorted(file.keys()) == [f"direction.{i}" for i in range(5)]
        np.testing.assert_array_equal(file.get_tensor("direction.2"), vectors[2])
        assert file.metadata() == {"schema": "nmjax.steering.1", "method": "mean_diff"}


def test_gguf_is_a_control_vector(tmp_path, vectors):
    path = save_vector(tmp_path / "v.gguf", vectors, {"model_hint": "llama"})
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama" and fields["controlvector.layer_count"] == 5
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2", "direction.4"]
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == "F32"
        np.testing.assert_array_equal(tensor.data, vectors[int(tensor.name[-1])])


def test_a_file_as_repeng_writes_it(tmp_path):
    """Layers 1 to L - 1, counted as L - 1, and nothing of ours."""
    writer = GGUFWriter(tmp_path / "repeng.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 3)
    for layer in (3, 1, 2):
        writer.add_tensor(f"direction.{layer}", np.full(4, layer, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, metadata = load_vector(tmp_path / "repeng.gguf")
    np.testing.assert_array_equal(found, np.arange(4)[:, None] * np.ones(4))
    assert metadata["controlvector.model_hint"] == "mistral"


@pytest.mark.filterwarnings(LAYER_0)
@pytest.mark.parametrize("name, method", [("happy_diffmean", "diffmean"), ("real1-pca", "center")])
def test_real_control_vectors(shared_data, tmp_path, name, method):
    path = shared_data / "control-vectors-gguf" / f"{name}.gguf"
    found, metadata = load_vector(path)
    assert found.shape == (28, 1536) and metadata["controlvector.method"] == method
    # The published vectors are of unit length, whatever wrote them: bytes read at a wrong place would not be.
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-4)
    raw = path.read_bytes()
    assert found[27].tobytes() in raw and found[0].tobytes() in raw
    again, _ = load_vector(save_vector(tmp_path / "again.gguf", found, metadata))
    np.testing.assert_array_equal(again, found)


def test_layer_0_in_gguf_warns(tmp_path):
    with pytest.warns(UserWarning, match="llama.cpp refuses a file that holds it"):
        path = save_vector(tmp_path / "v.gguf", np.ones((2, 3)))
    with pytest.warns(UserWarning, match="v.gguf: direction.0 acts after the first block"):
        load_vector(path)


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_damaged_files_are_one_clear_error(tmp_path, vectors, suffix):
    path = save_vector(tmp_path / f"v.{suffix}", vectors)
    whole = path.read_bytes()
    for content in (b"", whole[:6], whole[:40], whole[: len(whole) // 2], whole[:-20], b"\xff" * 200):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"v\.{suffix} is not a whole"):
            load_vector(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"no file of steering vectors at .*v.{suffix}"):
        load_vector(path)


def test_files_of_another_kind_are_errors(tmp_path):
    def stored(tensors):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        path.write_bytes(safetensors.numpy.save(tensors))
        return path

    one = np.ones(3, np.float32)
    for path, message in [
        (stored({"direction.0": one, "lm_head": one}), "holds the tensor 'lm_head', wanted only direction.<layer>"),
        (stored({"direction.x": one}), "holds the tensor 'direction.x'"),
        (stored({}), "holds no tensor named direction.<layer>"),
        (stored({"direction.0": one, "direction.1": one[:2]}), "directions have the shapes"),
        (stored({"direction.0": np.ones((2, 3), np.float32)}), "directions have the shapes"),
        (stored({"direction.1": one * np.nan}), "direction.1 holds NaN or infinity"),
        (stored({"direction.0": np.ones(3, np.int32)}), "is of int32, wanted floating point"),
        (stored({"direction.99999": one}), "holds direction.99999 .* wanted at most 4096 layers"),
        (tmp_path / "v.pt", "ends in '.pt', wanted one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_vector(path)
    with pytest.raises(ValueError, match="wanted at most 2 layers"):
        load_vector(stored({"direction.2": one}), layers=2)
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("output.weight", one)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="model.gguf has the architecture 'llama', wanted 'controlvector'"):
        load_vector(tmp_path / "model.gguf")


def test_what_cannot_be_saved_is_named(tmp_path):
    for rows, name, message in [
        (np.ones(3), "v.gguf", r"vectors has shape \(3,\), wanted \[L, D\]"),
        (np.zeros((2, 3)), "v.gguf", "nothing but zeros"),
        (np.full((2, 3), np.nan), "v.safetensors", "holds NaN"),
        (np.ones((2, 3)), "v.npz", "ends in '.npz'"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_vector(tmp_path / name, rows)
    assert not list(tmp_path.iterdir())
