"""What is steered and asked, against single passes; and what planted answers are found to say."""

import dataclasses
import json

import numpy as np
import pytest

import nmjax
from experiments.introspecting.pages.localization import section
from experiments.introspecting.suites.localization import Localization, LocalizationConfig, steering
from nmjax.data.introspection import read_lists
from nmjax.data.introspection_split import split_lists
from nmjax.report.page import render_page
from nmjax.report.results import dump_json

CONFIG = LocalizationConfig(records=90, magnitudes=(2.0, 10.0, 15.0), strengths=(2.0, 4.0, 8.0), batch_size=4, draws=60)
NAMES = ["layers, untrained", "magnitude, untrained", "magnitude, as trained", "sentence, untrained"]


@pytest.fixture(scope="module")
def suite(subjects):
    return Localization(subjects, read_lists("tiny"), CONFIG)


def test_who_is_asked_what(suite):
    assert {task.name: task.subjects for task in suite.tasks} == dict(
        zip(NAMES, [("base", "plain", "sizes"), ("base", "plain"), ("base", "sizes"), ("base", "plain", "sizes")],
            strict=True)
    )  # fmt: skip
    layers, magnitude, trained, sentence = (task.records for task in suite.tasks)
    tiny = suite.lists
    assert {r.question for r in layers} == {tiny.localization_questions["layers"]}
    assert {r.question for r in sentence} == {tiny.localization_questions["sentence"]}
    assert magnitude[0].answers == (" weak", " fair", " strong") and trained[0].answers == (" 2", " 10", " 15")
    for record in magnitude:
        assert record.magnitude == CONFIG.strengths[record.answer]
    learned = split_lists(tiny, "localization_magnitude")["train"]
    for record in trained:
        assert record.vector >= 150 and record.context not in learned.contexts
        assert all(
            record.question != q.format(options="2, 10 or 15") for q in learned.questions["localization_magnitude"]
        )
    for records in (layers, trained, sentence):
        assert len(set(np.bincount([r.answer for r in records]))) == 1  # equally many of each answer


def test_only_the_tokens_of_the_sentence_are_steered(suite, instruct_lm):
    record, segments = suite.tasks[-1].records[0], suite.segments[-1][0]
    ids = list(segments.prefix + segments.question)
    seen = nmjax.forward(
        instruct_lm, [ids] * 2, packs=[None, steering(record, segments, suite.vectors)], capture=("resid_post",)
    ).activations["resid_post"]  # [L, B, T, D]
    start, _ = record.layers
    change = np.asarray(seen[start, 1] - seen[start, 0])
    np.testing.assert_array_equal(np.asarray(seen[:start, 1]), np.asarray(seen[:start, 0]))
    touched = np.flatnonzero(np.abs(change).max(axis=1))
    np.testing.assert_allclose(
        change[touched], [record.magnitude * suite.vectors[record.vector]] * len(touched), atol=1e-4
    )
    begin, end = record.spans[record.sentence]
    sentence = record.context[begin:end]
    assert instruct_lm.tokenizer.decode([ids[k] for k in touched]).strip() == sentence and len(touched) < len(ids) / 5
    assert np.array_equal(touched, np.arange(touched[0], touched[-1] + 1))


@pytest.mark.slow
def test_answers_are_scored_whole_as_in_single_passes(adapted):
    suite = Localization(adapted, read_lists("tiny"), CONFIG)
    at = next(k for k in range(suite.units) if suite.tasks[suite.plan[k][0]].name == "magnitude, as trained")
    task, segments = suite.tasks[2], suite.segments[2]
    rows = json.loads(dump_json(suite.ask(at)))
    assert [row["subject"] for row in rows] == ["base", "sizes", "base", "sizes"]
    assert {len(answer) for answer in segments[0].answers} == {1, 2}  # " 10" is two tokens
    for row in rows[:2]:
        record, own = task.records[0], segments[0]
        assert row["record"] == record.id
        start = len(own.prefix + own.question)
        wholes = [list(own.prefix + own.question + answer) for answer in own.answers]
        pack = suite.subjects.pack(row["subject"], steering(record, own, suite.vectors))
        found = nmjax.forward(suite.subjects.lm, wholes, packs=[pack] * 3)
        for answer, logits, mask, got in zip(own.answers, found.logits, found.mask, row["logprobs"], strict=True):
            logits = np.asarray(logits)[np.asarray(mask)].astype(np.float64)
            logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            wanted = sum(logprobs[start - 1 + k, token] for k, token in enumerate(answer))
            assert got == pytest.approx(wanted, abs=2e-4)
    assert abs(rows[0]["logprobs"][0] - rows[1]["logprobs"][0]) > 1e-3  # the adapter acts


def test_planted_answers_give_known_accuracies(suite):
    rng = np.random.default_rng(1)
    records = []
    for task in suite.tasks:
        for k, record in enumerate(task.records):
            C = len(record.answers)
            right = np.where(np.arange(C) == record.answer, -0.5, -3.0)
            logprobs = {
                "base": -3.0 + 0.1 * rng.standard_normal(C),  # says nothing
                "plain": -5.0 - np.arange(C),  # always the first
                "sizes": right if k % 4 else np.roll(right, 1),  # wrong every fourth time
            }
            records.append([{"task": task.name, "subject": name, "record": record.id, "vector": record.vector,
                             "answers": list(record.answers), "answer": record.answer,
                             "logprobs": logprobs[name].tolist()} for name in task.subjects])  # fmt: skip
    findings = json.loads(dump_json(suite.analyse(records)))
    assert [task["name"] for task in findings["tasks"]] == NAMES
    for task in findings["tasks"]:
        C = len(task["answers"])
        if constant := task["subjects"].get("plain"):
            assert constant["accuracy"]["value"] == pytest.approx(constant["sizes"][0] / 90)
            assert constant["balanced_accuracy"]["value"] == pytest.approx(1 / C) and not constant["above_chance"]
            assert constant["macro_auroc"]["value"] == 0.5 and constant["given"][0] == 1
            assert constant["mass"] == pytest.approx(np.exp(-5.0 - np.arange(C)).sum())
        assert not task["subjects"]["base"]["above_chance"] and task["subjects"]["base"]["p_adjusted"] > 0.05
        if good := task["subjects"].get("sizes"):
            assert (
                good["accuracy"]["value"] == pytest.approx(67 / 90)
                and good["above_chance"]
                and good["p_adjusted"] < 0.01
            )
            assert np.diag(good["confusion"]).sum() == 67
            low, high = task["versus_base"]["sizes"]["interval"]
            assert 0 < low < task["versus_base"]["sizes"]["value"] < high
    page = render_page("t", "s", section(findings))
    assert page.count("<table>") == 4 + 1 and "sizes, magnitude" in page


def test_what_gave_no_number_is_left_out_and_counted(subjects):
    suite = Localization(dataclasses.replace(subjects, variants={"plain": None}), read_lists("tiny"), CONFIG)
    rng, records = np.random.default_rng(0), []
    for task in suite.tasks:
        for k, record in enumerate(task.records):
            common = {"task": task.name, "record": record.id, "vector": record.vector, "answer": record.answer}
            for name in task.subjects:
                logprobs = rng.standard_normal(len(record.answers)).tolist()
                failed = (name, k) in (("plain", 0), ("plain", 1), ("base", 1), ("base", 2))
                records.append([common | {"subject": name, "logprobs": None if failed else logprobs}])
    for task in json.loads(dump_json(suite.analyse(records)))["tasks"]:
        assert [(one["n"], one["failed"]) for one in task["subjects"].values()] == [(88, 2)] * 2
        low, high = task["versus_base"]["plain"]["interval"]
        assert low < task["versus_base"]["plain"]["value"] < high
    last = suite.tasks[0].records[0].answer
    none = [[row | {"logprobs": None} if row["answer"] == last else row for row in unit] for unit in records]
    with pytest.raises(ValueError, match="layers, untrained: base gave no finite .* smaller magnitudes"):
        suite.analyse(none)


def test_fewer_sentences_where_no_more_are_held_out(subjects):
    lists = read_lists("tiny")
    suite = Localization(subjects, dataclasses.replace(lists, sentences=lists.sentences[:20]), CONFIG)
    records = suite.tasks[-1].records
    assert len(records[0].answers) == 5 and np.bincount([r.answer for r in records]).tolist() == [18] * 5


def test_bad_settings_are_named():
    for change, message in (
        ({"records": 11}, "records is 11; wanted at least 12"),
        ({"strengths": (5.0, 5.0, 10.0)}, "strengths is .*; wanted three magnitudes"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalizationConfig(**change)
