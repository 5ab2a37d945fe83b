"""The experiment on the bundled model: measures that tell its wrong answers, files, and a run that goes on."""

import dataclasses
import json

import pytest

import models
from experiments import uncertainty as experiment
from nmjax import paths


@pytest.fixture(scope="module")
def lm():
    return models.load(paths.checkpoint_dir("tiny"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return experiment.Settings(
        output_dir=str(tmp_path_factory.mktemp("results")), max_questions=96, samples=5, batch_size=48,
        max_new_tokens=4, bootstrap_draws=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(settings, lm):
    return experiment.run(settings, lm)


@pytest.fixture(scope="module")
def result(written):
    return json.loads(written[3].read_text(), parse_constant=pytest.fail)


def test_the_model_knows_the_facts_it_has_often_seen(result):
    records = result["records"]
    often, rare = ([r["right"] for r in records if r["kind"] == f"ranks {band}"] for band in ("0 to 49", "800 to 1471"))
    assert sum(often) > 0.9 * len(often) and sum(rare) < 0.5 * len(rare)
    assert result["accuracy"] == sum(r["right"] for r in records) / 96
    assert all(r["right"] == (r["answer"] == r["answers"][0]) for r in records)


def test_measures_tell_wrong_answers(result):
    """The probability of the answer, and every measure of the samples, with intervals clear of 1/2."""
    found = {finding["name"]: finding for finding in result["findings"]}
    for name in ("nll", "predictive_entropy", "lexical_similarity", "semantic_entropy", "weighted_semantic_entropy"):
        assert found[name]["auroc_interval"][0] > 0.55 and found[name]["prr_interval"][0] > 0.1, name
    assert found["p_true_statement"]["auroc_interval"][0] > 0.5  # asked in the words that it was trained on


def test_files(written, result):
    text, png, page, _, log = written
    assert [path.suffix for path in written] == [".txt", ".png", ".html", ".json", ".jsonl"]
    assert "Above chance: -ln p of the answer" in text.read_text()
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 1 and "http" not in html and png.read_bytes()[:4] == b"\x89PNG"
    assert len(log.read_text().splitlines()) == 1 + 2 + 2  # plan, batches, two ways to ask
    assert result["identity"]["config"]["samples"] == 5 and len(result["records"]) == 96


def test_a_killed_run_goes_on_and_ends_the_same(settings, lm, result, tmp_path, monkeypatch):
    settings = dataclasses.replace(settings, output_dir=str(tmp_path))
    whole, calls = experiment.sample_uncertainty, []

    def until_the_second(*args, **options):
        calls.append(options["row_ids"][0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(experiment, "sample_uncertainty", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(settings, lm)
    assert [path.suffixes for path in tmp_path.iterdir()] == [[".partial", ".jsonl"]]
    again = json.loads(experiment.run(settings, lm)[3].read_text())
    assert calls == [0, 48, 48]  # the first batch was not repeated
    assert again["records"] == result["records"] and again["findings"] == result["findings"]


def test_a_lone_question_is_refused(settings, lm):
    with pytest.raises(ValueError, match="there is 1 question; intervals need at least 2"):
        experiment.run(dataclasses.replace(settings, max_questions=1), lm)
