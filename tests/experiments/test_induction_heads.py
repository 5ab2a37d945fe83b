"""The experiment: ablation on a model whose copying head is known, and its files."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import models
import nmjax
from experiments import induction_heads as experiment
from nmjax import induction


def test_all_masks_are_one_program_and_silence_their_heads(copying_lm):
    rng = np.random.default_rng(0)
    mask = rng.random((2, 3)) < 0.5
    rows = induction.random_rows(copying_lm, 2, 10).tolist()
    result = nmjax.forward(copying_lm, rows, packs=experiment.without(mask), capture="head_out")
    silenced = ~np.asarray(result.activations["head_out"]).any(axis=(1, 2, 4))
    np.testing.assert_array_equal(silenced, mask)


@pytest.fixture(scope="module")
def random_lm():
    return models.load(pathlib.Path(__file__).parents[1] / "golden" / "interventions" / "model")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return experiment.Settings(output_dir=str(tmp_path / "results"), block=16, random_draws=6)


def test_copying_is_lost_with_the_copying_head_alone(settings, copying_lm, capsys):
    written = experiment.run(settings, copying_lm)
    assert [path.suffix for path in written] == [".txt", ".png", ".html", ".json"]
    result = json.loads(written[-1].read_text(), parse_constant=pytest.fail)
    assert result["heads"] == [[1, 2]] and not result["found"]["fallback"]
    ablation = result["ablation"]
    unmodified = np.mean(ablation["unmodified"])
    assert unmodified == pytest.approx(result["found"]["copy_accuracy"]) and unmodified > 0.7
    assert np.mean(ablation["selected"]) < 0.05
    np.testing.assert_array_equal(ablation["draws"], [ablation["unmodified"]] * 6)  # the others change nothing
    assert result["losses"] == {"selected": unmodified - np.mean(ablation["selected"]), "random": 0}
    low, high = ablation["intervals"]["selected_loss"]
    assert low < result["losses"]["selected"] < high
    page = written[2].read_text()
    assert page.count("data:image/png;base64,") == 1 and "http" not in page and "Lost without them" in page
    assert "1.2" in capsys.readouterr().out


def test_without_heads_there_is_nothing_to_ablate(settings, random_lm):
    written = experiment.run(settings, random_lm)
    result = json.loads(written[-1].read_text())
    assert result["heads"] == [] and result["ablation"] is None
    with pytest.raises(ValueError, match="no induction head"):
        experiment.run(dataclasses.replace(settings, on_empty="error"), random_lm)
    middle = dataclasses.replace(settings, on_empty="middle", samples=16, random_draws=1)
    result = json.loads(experiment.run(middle, random_lm)[-1].read_text())
    assert result["found"]["fallback"] and len(result["heads"]) == 6
    assert np.shape(result["ablation"]["draws"]) == (1, 16)


def test_random_heads_are_others_and_as_many():
    mask = np.zeros((3, 4), bool)
    mask[1, :3] = True
    masks = experiment.random_others(mask, 20, seed=0)
    assert len(masks) == 20 and all(m.sum() == 3 and not (m & mask).any() for m in masks)
    assert len({m.tobytes() for m in masks}) > 10
    assert experiment.random_others(np.ones((2, 2), bool), 5, 0) == []
    mask[:] = True
    mask[0, 0] = False
    assert experiment.random_others(mask, 2, 0)[0].sum() == 1  # no more are left


@pytest.mark.slow
def test_command_line(tmp_path):
    """Flags reach the settings, and bad ones exit with one line."""
    command = [sys.executable, "-m", "experiments.induction_heads", "--block=8", f"--output_dir={tmp_path}"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "--on_empty=middle", "--random_draws=0"], cwd=root, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("induction_heads_*.json")
    result = json.loads(path.read_text())
    assert result["found"]["block"] == 8 and result["config"]["on_empty"] == "middle"
    assert result["ablation"]["draws"] == []
    done = subprocess.run([*command, "--samples=3"], cwd=root, env=environment, text=True, capture_output=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("induction_heads: samples=3, wanted an integer >= 16")
