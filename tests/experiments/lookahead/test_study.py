"""The comparison as a whole: what the models share, what a step costs, and runs that are killed."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import models
import nmjax
from experiments.confidence import ConfidenceAwareExperiment, ConfidenceExperimentConfig, load_results
from experiments.lookahead import arms
from experiments.lookahead.config import PRESETS, make_config
from experiments.lookahead.data import prepare_confidence_data

TINY = ConfidenceExperimentConfig(
    vocab_size=300, embed_dim=16, num_heads=2, num_layers=1, max_seq_len=8, batch_size=4, documents=60,
    training_steps=6, eval_interval=3, save_interval=3, checkpoint_interval=3, eval_batches=3, eval_draws=1,
    seeds=(1, 2),
)  # fmt: skip


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_models_share_initial_values_by_seed_and_batches():
    standard, confidence = arms.standard_arm(TINY, 300, 0), arms.confidence_arm(TINY, 300, 0)
    first, second = leaves(standard.initial_params((1, 2))), leaves(confidence.initial_params((1, 2)))
    compared = 0
    for name, leaf in first.items():
        if "_norm" in name and "final" not in name:
            continue  # a plain norm there, an adaptive one here
        other = second[name][:, :8] if "positions" in name else second[name]
        np.testing.assert_array_equal(leaf, other, err_msg=name)
        compared += 1
    assert compared == len(first) - 4
    assert (first["['embed']['embedding']"][0] != first["['embed']['embedding']"][1]).any()

    data = prepare_confidence_data(TINY)
    one, two = data.batches(4, (1, 2)), data.batches(4, (1,))
    for _ in range(3):
        batch = next(one)["tokens"]
        assert batch.shape == (2, 4, 10)
        np.testing.assert_array_equal(batch[:1], next(two)["tokens"])
        assert (batch[0] != batch[1]).any()


def test_a_step_of_lookahead_costs_what_its_passes_do():
    config = dataclasses.replace(TINY, seeds=(1,))
    standard = arms.step_flops(config, arms.standard_arm(config, 300, 0))

    def cost(**changes):
        changed = dataclasses.replace(config, **changes)
        return arms.step_flops(changed, arms.confidence_arm(changed, 300, 0))

    zeros, jacobi, branch = cost(feedback="zeros"), cost(feedback="scan"), cost(feedback="zeros", draws=2)
    assert standard < zeros < jacobi < zeros + 0.5 * standard  # a forward pass more, without the vocabulary
    assert 0.2 * standard < branch - zeros < 0.5 * standard  # a forward pass of the three passes' worth of a step


def test_presets_and_bad_settings():
    published = make_config("published", {"training_steps": 10})
    assert (published.embed_dim, published.num_layers, published.max_seq_len, published.batch_size) == (256, 6, 128, 4)
    assert (published.seeds, published.dropout, published.training_steps) == ((42, 123, 456), 0.1, 10)
    assert PRESETS["published"]["training_steps"] == 1000 and published.confidence_alpha == 1.0
    for changes, message in (
        ({"seeds": (1, 1)}, "seeds must be one or more different numbers"),
        ({"lookahead_steps": 3}, "lookahead_steps must be 2, got 3"),
        ({"feedback": "echo"}, "feedback='echo', wanted one of"),
        ({"lookahead": "last", "draws": 2}, "looks behind one draw"),
        ({"accumulate": 3}, "accumulate must divide batch_size=16, got 3"),
        ({"steps_per_call": 7}, "steps_per_call must divide training_steps=600, got 7"),
        ({"tokenizer": "bpe", "vocab_size": None}, "vocab_size is None"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config("small", changes)
    with pytest.raises(ValueError, match="preset='huge'"):
        make_config("huge", {})


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"feedback": "scan", "draws": 2}, {"feedback": "carry"}, {"lookahead": "last"},
                                     {"feedback": "zeros", "top": 2, "dropout": 0.1}])  # fmt: skip
def test_every_way_to_train_runs_and_reads_back(tmp_path, changes):
    config = dataclasses.replace(TINY, results_dir=str(tmp_path), **changes)
    found = ConfidenceAwareExperiment(config).run(export=str(tmp_path / "models"), progress=False)
    stored = load_results(tmp_path / f"{found.timestamp}_results.json")
    assert stored == found and not list(tmp_path.glob("run_*"))
    told = found.confidence_model_results["1"][0]
    assert len(told.confidence_loss_history) == len(told.token_loss_history) == 6
    assert [entry["step"] for entry in told.loss_history] == [3, 6]
    assert bool(found.untold_model_results) == (config.feedback != "zeros")
    lm = models.load(tmp_path / "models" / "confidence_1")
    assert len(nmjax.generate(lm, ["Once"], max_new_tokens=3).tokens[0]) == 3


@pytest.mark.slow
def test_a_killed_comparison_goes_on_in_bits(tmp_path):
    """The whole study under SIGKILL, model after model; times and the identity are all that differ."""
    config = dataclasses.replace(TINY, training_steps=30, eval_interval=10, checkpoint_interval=5)
    script = (
        "import json, sys\nfrom experiments.lookahead.config import from_dict\n"
        "from experiments.confidence import ConfidenceAwareExperiment\n"
        "ConfidenceAwareExperiment(from_dict(json.loads(sys.argv[1]))).run(progress=False)\n"
    )

    def start(folder):
        settings = json.dumps(dataclasses.asdict(dataclasses.replace(config, results_dir=str(folder))))
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "NMJAX_CACHE": "off"}
        root = pathlib.Path(__file__).parents[3]
        return subprocess.Popen([sys.executable, "-c", script, settings], cwd=root, env=environment)

    def outcome(folder):
        stored = json.loads(next(folder.glob("*_results.json")).read_text())
        for name in ("standard", "confidence", "untold", "equal_flops"):
            for (result,) in stored[f"{name}_model_results" if name != "equal_flops" else f"{name}_results"].values():
                result.pop("training_time")
        return {name: value for name, value in stored.items() if name not in ("identity", "timestamp", "training_time",
                                                                              "config")}  # fmt: skip

    def checkpoints():
        return {str(path) for path in (tmp_path / "broken").glob("run_*/*/step_*/manifest.json")}

    assert start(tmp_path / "unbroken").wait() == 0
    seen: set[str] = set()
    for delay in np.random.default_rng(3).uniform(0, 1.5, 6):
        process = start(tmp_path / "broken")
        while process.poll() is None and not checkpoints() - seen:
            time.sleep(0.02)
        time.sleep(delay)
        assert process.poll() is None, "the run must really be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen |= checkpoints()
    assert start(tmp_path / "broken").wait() == 0
    assert len({pathlib.Path(path).parents[1].name for path in seen}) >= 2, "in more than one model's training"
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "unbroken")
