"""The experiment on the bundled model: what it saves, skips, refuses and writes."""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

import models
from experiments import build_steering_vectors as experiment
from nmjax.steering import store, vectors
from nmjax.steering.io import load_vector
from nmjax.steering.validation import split_pairs

NAMES = [
    f"{first} {last}" for first in ("Tom", "Ann", "Ben", "Eva") for last in ("Reed", "Moss", "Hill", "Lake", "Fox")
]
PLACES = ("the park", "the old house")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """40 pairs of a real contrast, and 40 of none: the same sentences, sides drawn at random."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("prompts") / "pairs.jsonl"
    lines = []
    for place in PLACES:
        for name in NAMES:
            texts = [f"{name} went to {place} and felt happy", f"{name} went to {place} and felt sad"]
            lines.append({"steering_type": "happy", "positive": texts[0], "negative": texts[1]})
            rng.shuffle(texts)
            lines.append({"steering_type": "noise", "positive": texts[0], "negative": texts[1]})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def settings(prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return experiment.Settings(prompts=str(prompts), held_out=0.3, output_dir=str(tmp_path / "results"))


@pytest.fixture(scope="module")
def lm():
    return models.load(models.checkpoint.find("checkpoints/tiny"))


def run(settings, lm):
    return experiment.run(settings, lm, vectors.read_pairs(settings.prompts))


def test_what_is_accepted_is_saved_and_found_by_name(settings, lm, prompts, tmp_path, capsys):
    written = run(settings, lm)
    kinds = [path.name.split("_2")[0] + path.suffix for path in written]
    assert kinds == ["happy.safetensors.safetensors", "steering_summary.txt", "steering_separation.png",
                     "steering_cosines.png", "steering_vectors.html", "steering_vectors.json"]  # fmt: skip
    out = capsys.readouterr().out
    assert "Not saved, no layer is accepted: noise" in out
    found = store.named_vector(lm, "happy")
    train, _ = split_pairs(vectors.read_pairs(prompts)["happy"], 0.3, 0)
    sides = [vectors.activations(lm, [pair[k] for pair in train], token="mean") for k in (0, 1)]
    mean = (sides[0].astype(np.float64) - sides[1]).mean(axis=0)
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean, axis=-1, keepdims=True), atol=2e-6)
    with pytest.raises(ValueError, match="--types=noise"):
        store.named_vector(lm, "noise")
    metadata = load_vector(written[0])[1]
    assert metadata["model"] == lm.fingerprint and metadata["method"] == "mean_diff" and metadata["pairs"] == "40"

    result = json.loads(written[-1].read_text(), parse_constant=pytest.fail)
    report = result["types"]["happy"]["report"]
    assert str(report["chosen_layer"]) == metadata["chosen_layer"] and report["accepted"][report["chosen_layer"]]
    assert (report["train"], report["held_out"]) == (28, 12)
    assert result["types"]["noise"]["file"] is None and result["types"]["noise"]["report"]["chosen_layer"] is None
    page = written[-2].read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page
    for path in written[2:4]:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_type_built_by_the_same_plan_is_skipped(settings, lm, monkeypatch, capsys):
    settings = dataclasses.replace(settings, keep_rejected=True)
    first = {path.name: path.read_bytes() for path in run(settings, lm) if path.suffix == ".safetensors"}
    assert sorted(first) == ["happy.safetensors", "noise.safetensors"]
    before = capsys.readouterr().out
    again = run(dataclasses.replace(settings, rebuild=True), lm)
    assert {path.name: path.read_bytes() for path in again if path.suffix == ".safetensors"} == first

    # A run that was killed after `happy`: only `noise` is computed.
    (store.cached_folder(lm) / "noise.safetensors").unlink()
    seen = []
    real = vectors.activations
    monkeypatch.setattr(vectors, "activations", lambda *a, **k: seen.append(a[1]) or real(*a, **k))
    capsys.readouterr()
    assert [path.name for path in run(settings, lm)][0] == "noise.safetensors"
    after = capsys.readouterr().out
    assert len(seen) == 1 and "Built already by the same plan: happy" in after
    assert before.split("\n\n")[0] == after.split("\n\n")[0]  # the same table
    # Another plan is not the same plan, and a damaged file is nothing.
    run(dataclasses.replace(settings, seed=1), lm)
    assert len(seen) == 3
    (store.cached_folder(lm) / "happy.safetensors").write_bytes(b"torn")
    run(dataclasses.replace(settings, seed=1), lm)
    assert len(seen) == 4


def test_gguf_and_a_folder_of_ones_own(settings, lm, tmp_path):
    settings = dataclasses.replace(settings, types=["happy"], format="gguf", output=str(tmp_path / "out"))
    with pytest.warns(UserWarning, match="llama.cpp refuses"):
        written = run(settings, lm)
    assert written[0] == tmp_path / "out" / "happy.gguf"
    with pytest.warns(UserWarning, match="llama.cpp refuses"):
        found, metadata = load_vector(written[0])
    assert found.shape == (lm.config.layers, lm.config.embed) and metadata["model_hint"] == "llama"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"types": ["happy", "sad"]}, "--types holds 'sad', wanted types that .*: happy, noise"),
        ({"model": "no/such/model/here"}, "no checkpoint folder"),
        ({"prompts": "missing.jsonl"}, "missing.jsonl"),
    ],
)
def test_bad_flags_are_named_before_any_compute(settings, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        experiment.prepare(dataclasses.replace(settings, **change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"types": ["happy"]}, "--types is set along with --concepts=tiny"),
        ({"prompts": "pairs.jsonl"}, "--prompts is set along with --concepts=tiny"),
        ({"format": "gguf"}, "--format=gguf with --concepts, wanted safetensors"),
        ({"concepts": "missing.txt"}, "missing.txt"),
    ],
)
def test_bad_flags_of_concepts_are_named(settings, change, message):
    settings = dataclasses.replace(settings, **{"concepts": "tiny", "prompts": None} | change)
    with pytest.raises((ValueError, OSError), match=message):
        experiment.prepare_concepts(settings)


def test_too_few_pairs_name_the_type(lm):
    with pytest.raises(ValueError, match="happy: held_out=0.2 of 5 unique pairs holds out 1, wanted at least 7"):
        experiment.build(lm, {"happy": [(f"{k}", f"not {k}") for k in range(5)]})


def test_concepts_are_saved_and_reported(settings, lm, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("happy\nsad\n\nmoon\n")
    settings = dataclasses.replace(
        settings, prompts=None, concepts=str(words), wordings="tiny", remove_shared=True, layer=2
    )
    written = experiment.run_concepts(settings, lm, experiment.read_concepts(str(words)))
    names = ["happy", "sad", "moon", "happy_alone", "sad_alone", "moon_alone"]
    assert [path.name for path in written[:6]] == [f"concept_{name}.safetensors" for name in names]
    found, alone = (np.stack([store.named_vector(lm, f"concept_{n}")[2] for n in part])
                    for part in (names[:3], names[3:]))  # fmt: skip
    np.testing.assert_allclose(alone @ found.mean(axis=0), 0, atol=1e-6)
    record = json.loads(written[-1].read_text(), parse_constant=pytest.fail)["concepts"]
    pairs = (found @ found.T)[np.triu_indices(3, 1)]
    assert record["cosine"] == pytest.approx(pairs.mean(), abs=1e-6) and record["layer"] == 2
    assert f"mean cosine of two concepts             {pairs.mean():6.3f}" in capsys.readouterr().out
    assert "http" not in written[-2].read_text()


@pytest.mark.slow
def test_command_line(prompts, tmp_path):
    """Flags reach the settings, and bad ones exit with one line."""
    command = [sys.executable, "-m", "experiments.build_steering_vectors", "--prompts", str(prompts)]
    command += ["--held-out", "0.3", "--types", "happy", "--token=mean", f"--output_dir={tmp_path}"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("steering_vectors_*.json")
    assert json.loads(path.read_text())["config"]["token"] == "mean"
    assert len(list((tmp_path / "cache").rglob("happy.safetensors"))) == 1
    done = subprocess.run([*command, "--types=sad"], cwd=root, env=environment, text=True, capture_output=True)
    assert done.returncode == 1 and "--types holds 'sad'" in done.stderr.splitlines()[-1]
