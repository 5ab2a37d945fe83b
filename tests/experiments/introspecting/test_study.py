"""The whole study: killed at any moment it goes on, and ends as it would have; settings that can't work."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from experiments import introspection
from experiments.introspecting import evaluation, training_settings
from experiments.introspecting.evaluation import read_subjects
from experiments.introspection import Study
from nmjax.report import results

ROOT = pathlib.Path(__file__).parents[3]
SMALL = """
import sys
from experiments import introspection
from experiments.introspecting import evaluation, training_settings

training_settings.PRESETS["tiny"] |= {
    "n": 120, "steps": 12, "warmup": 1, "batch_size": 4, "eval_every": 2, "eval_records": 8, "save_every": 4,
    "steps_per_call": 2, "lora_r": 2, "lora_targets": ("q_proj",),
}
few = {"vectors": 2, "unsteered": 200, "noise": 1, "systems": 4, "magnitudes": (400.0,), "draws": 50}
evaluation.PRESETS["tiny"]["sizes"] |= {"detection": few, "behavior": {"batch_size": 8, "draws": 50}}
few_variants = {"variants": ("original", "food_control"), "suites": ("detection", "behavior")}
study = introspection.Study(output=sys.argv[1], parallel=int(sys.argv[2]), **few_variants)
introspection.run(study, progress=False)
"""


def start(folder, parallel=1):
    command = [sys.executable, "-c", SMALL, str(folder), str(parallel)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)


def outcome(folder):
    """What has to be equal: findings, trainings but for the time they were made, adapters in bytes."""
    path = max(folder.glob("introspection_eval_*.json"))  # one more for a run that was killed when all was written
    found = results.load_json(path)
    adapters = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}
    trainings = {name: (one["history"], one["test"]) for name, one in found["trainings"].items()}
    return found["findings"], found["verdicts"], trainings, adapters


@pytest.mark.slow
def test_a_study_that_is_killed_again_and_again_ends_like_an_unbroken_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    began = time.monotonic()
    assert start(whole).wait() == 0
    took, moments, killed = time.monotonic() - began, random.Random(0), 0
    for _ in range(12):
        process = start(broken)
        try:
            process.wait(timeout=moments.uniform(0.15, 0.8) * took)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
    else:
        assert start(broken).wait() == 0
    assert killed
    assert outcome(broken) == outcome(whole)


@pytest.mark.slow
def test_trainings_side_by_side_are_those_in_turn(tmp_path):
    assert start(tmp_path / "two", parallel=2).wait() == start(tmp_path / "one").wait() == 0
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")


def test_all_variants_have_the_same_steps_and_seed():
    study = Study(seed=3)
    recipes = {study.training(variant).recipe(8000) for variant in study.variants}
    assert len(recipes) == 1 and recipes.pop().seed == 3
    settings = study.evaluation()
    assert [adapter.partition("=")[0] for adapter in settings.adapters] == [f"{v}:{v}" for v in study.variants]
    assert all(settings.config(name).seed == 3 for name in evaluation.SUITES)
    assert settings.magnitudes == study.training("original").magnitudes
    published = Study(preset="qwen32b")
    assert published.training("original") == training_settings.TrainingSettings(
        data="results/introspection/data/original", output="results/introspection/adapters/original"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": ("original", "original")}, "variants="),
        ({"variants": ("other",)}, "variants="),
        ({"suites": ("detection", "telepathy")}, "suite='telepathy'"),
        ({"parallel": 0}, "parallel=0"),
        ({"preset": "big"}, "preset='big'"),
        ({"steps": 5}, None),
    ],
)
def test_bad_settings_are_named(change, message):
    if message is None:  # too few for the warm-up; said when the number of records is known
        with pytest.raises(ValueError, match="more than warmup"):
            Study(**change).training("original").recipe(8000)
        return
    with pytest.raises(ValueError, match=message):
        Study(**change)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (("results/x",), "wanted NAME=FOLDER"),
        (("a=x", "a=y"), "no such|not found|a"),
        (("a:other=x",), "variant 'other'"),
        (("base=nowhere/at/all",), "nowhere"),
    ],
)
def test_adapters_that_can_not_be_had(instruct_lm, adapters, message):
    with pytest.raises(ValueError, match=message):
        read_subjects(evaluation.EvaluationSettings(adapters=adapters), instruct_lm)


def test_fields_that_a_suite_does_not_have():
    with pytest.raises(ValueError, match="behavior has no setting 'vectors'"):
        evaluation.make_settings("tiny", {"sizes": {"behavior": {"vectors": 3}}})


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"CUDA_VISIBLE_DEVICES": "4, GPU-ab,6"}, ["4", "GPU-ab", "6"]),
        ({"CUDA_VISIBLE_DEVICES": "2,-1,3"}, ["2"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "4", "JAX_PLATFORMS": "cpu"}, []),
        ({}, ["0", "1"]),
    ],
)
def test_gpus(monkeypatch, tmp_path, environment, wanted):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: one (UUID: GPU-1)'\necho '  MIG 1g: x'\necho 'GPU 1: two (UUID: GPU-2)'\n")
    tool.chmod(0o755)
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"PATH": f"{tmp_path}:/bin:/usr/bin"}).items():
        monkeypatch.setenv(name, value)
    assert introspection.gpus() == wanted


def test_each_training_has_a_gpu_of_its_own(monkeypatch, tmp_path):
    started = []

    def done(settings, device, preset):
        started.append((settings.variant, device))
        introspection._log(settings).parent.mkdir(parents=True)
        introspection._log(settings).touch()
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(introspection, "_start", done)
    monkeypatch.setattr(introspection, "gpus", lambda: ["5", "7"])
    monkeypatch.setattr(introspection.time, "sleep", lambda seconds, wait=time.sleep: wait(0.02))
    variants = ("original", "food_control")
    introspection.train_side_by_side(Study(variants=variants, parallel=2, output=str(tmp_path)), progress=False)
    assert started == [("original", "5"), ("food_control", "7")]
    with pytest.raises(ValueError, match="parallel=3, wanted at most 2, the number of GPUs"):
        introspection.train_side_by_side(Study(parallel=3, output=str(tmp_path)), progress=False)


def test_a_training_that_fails_says_why(tmp_path, monkeypatch):
    def failing(settings, device, preset):
        path = introspection._log(settings)
        path.parent.mkdir(parents=True)
        path.write_text("out of luck")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])

    monkeypatch.setattr(introspection, "_start", failing)
    monkeypatch.setattr(introspection.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="the training of original failed: out of luck"):
        introspection.train_side_by_side(Study(variants=("original",), output=str(tmp_path)), progress=False)
