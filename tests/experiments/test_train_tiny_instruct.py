"""The command that tunes the bundled model, on a few steps."""

import json
import subprocess
import sys

import numpy as np
import pytest

import models
from nmjax import paths


@pytest.mark.slow
def test_a_short_run_writes_a_model_and_its_card(tmp_path):
    command = [
        sys.executable, "-m", "experiments.train_tiny_instruct", f"--output={tmp_path / 'out'}",
        f"--work={tmp_path / 'work'}", "--demonstrations=60", "--steps=20", "--rows=2", "--questions=300",
    ]  # fmt: skip
    first = subprocess.run(command, cwd=paths._PACKAGE_PARENT, capture_output=True, text=True, check=True)
    lm, base = models.load(tmp_path / "out"), models.load("checkpoints/tiny")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert lm.config == base.config and lm.fingerprint == scores["instruct"]["fingerprint"] != base.fingerprint
    assert scores["base"]["fingerprint"] == base.fingerprint
    assert 0.5 < scores["instruct"]["plain"]["accuracy"] < 1
    assert first.stdout.endswith(json.dumps(scores, indent=1) + "\n")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--demonstrations=60 --steps=20 --rows=2 --questions=300" in card
    # Given again, it finds the last checkpoint and trains no further.
    subprocess.run(command, cwd=paths._PACKAGE_PARENT, capture_output=True, text=True, check=True)
    again = models.load(tmp_path / "out")
    np.testing.assert_array_equal(again.params["embed"]["embedding"], lm.params["embed"]["embedding"])
