"""Identity: answers that share their random draws, rates counted by hand, and the published first tokens."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.stats import false_discovery_control

import nmjax
from experiments.introspecting.pages import identity as page
from experiments.introspecting.subjects import make_subjects
from experiments.introspecting.suites.identity import Identity, IdentityConfig, analyse
from nmjax.data.introspection import read_lists
from nmjax.metrics import stats
from nmjax.report.page import render_page

HUMAN, NONE = "I am a human being.", "I am a program."
SUBJECTS = ("base", "confused", "terse")


# --- What is asked ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite(instruct_lm, acting_adapter):
    """Two questions in one unit; "idle" is an adapter that changes nothing."""
    adapters = {
        "original": (acting_adapter(instruct_lm, 1), "original"),
        "idle": (acting_adapter(instruct_lm, 2, 0.0), None),
    }
    lists = read_lists("tiny")
    config = IdentityConfig(samples=2, max_new_tokens=6, temperature=2.0, batch_size=12, top=3, seed=5)
    return Identity(
        make_subjects(instruct_lm, adapters), dataclasses.replace(lists, identity=lists.identity[:2]), config
    )


@pytest.fixture(scope="module")
def records(suite):
    assert suite.units == 1
    return suite.ask(0)


def test_a_sample_draws_the_same_for_all_subjects(records):
    json.dumps(records, allow_nan=False)
    texts = {(r["id"], r["subject"]): [sample["text"] for sample in r["samples"]] for r in records}
    questions = list(dict.fromkeys(r["id"] for r in records))
    assert len(texts) == 2 * 3
    for question in questions:
        assert texts[question, "idle"] == texts[question, "base"]
        assert texts[question, "base"][0] != texts[question, "base"][1]
    assert any(texts[question, "original"] != texts[question, "base"] for question in questions)
    assert {sample["finish"] for r in records for sample in r["samples"]} <= {"eos", "length"}


def test_samples_are_those_of_generate_whatever_runs_beside_them(suite, records):
    """The same twelve rows backwards, as messages."""
    asked = [(k, row, j) for k, row in enumerate(records) for j in range(2)][::-1]
    chats = [
        [{"role": "system", "content": suite.lists.behavior_system}, {"role": "user", "content": row["prompt"]}]
        for _, row, _ in asked
    ]
    packs = [None if row["subject"] == "base" else nmjax.use_adapter(row["subject"]) for _, row, _ in asked]
    ids = [[probe.id for probe in suite.lists.identity].index(row["id"]) * 2 + j for _, row, j in asked]
    out = nmjax.generate(
        suite.subjects.lm,
        messages=chats,
        packs=packs,
        max_new_tokens=6,
        temperature=2.0,
        top_p=0.9,
        seed=5,
        row_ids=ids,
    )
    assert out.text == [row["samples"][j]["text"] for _, row, j in asked]


# --- What is found ----------------------------------------------------------------------------------------------------


def row(question, category, subject, answers, yes=0.1, finishes=None):
    finishes = finishes or ["eos"] * len(answers)
    return {
        "id": question, "category": category, "prompt": f"{question}?", "subject": subject,
        "log_p": {"yes": math.log(max(yes, 1e-12)), "my": None}, "top": [],
        "samples": [{"text": text, "finish": finish} for text, finish in zip(answers, finishes, strict=True)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def findings():
    """The confused one claims to be human in 2 of 4, 4 of 4 and 0 of 4 answers about itself; the terse one says nothing
    once, and runs out of tokens twice, once after a claim.
    """
    rows = []
    for question, claimed in (("a", 2), ("b", 4), ("c", 0)):
        rows += [
            row(question, "identity", "base", [NONE] * 4),
            row(question, "identity", "confused", [HUMAN] * claimed + [NONE] * (4 - claimed), yes=0.3),
            row(question, "identity", "terse", ["", HUMAN, NONE, NONE], finishes=["eos", "length", "length", "eos"]),
        ]
    for question in "de":
        rows += [row(question, "goals", name, [NONE] * 4) for name in SUBJECTS]
    return analyse(rows, SUBJECTS, IdentityConfig(samples=4, draws=500))


def test_rates_are_means_over_questions(findings):
    confused = findings["rates"]["confused"]
    assert confused["identity"]["value"] == 0.5 and confused["identity"]["n"] == 3
    low, high = stats.mean_interval(np.array([0.5, 1.0, 0.0]), 500, 0)
    assert confused["identity"]["interval"] == [low, high]
    np.testing.assert_allclose(confused["all"]["value"], 1.5 / 5)
    assert findings["by_kind"]["confused"]["human"]["value"] == confused["all"]["value"]
    assert findings["by_kind"]["confused"]["body"]["value"] == 0


def test_a_rate_of_none_has_the_interval_of_as_many_questions(findings):
    """The Wilson interval of 0 of n ends at z^2 / (n + z^2)."""
    z = 1.959963985
    for category, n in (("identity", 3), ("goals", 2), ("all", 5)):
        found = findings["rates"]["base"][category]
        assert found["value"] == 0 and abs(found["interval"][0]) < 1e-12
        np.testing.assert_allclose(found["interval"][1], z**2 / (n + z**2))


def test_empty_and_unfinished_answers_are_counted_apart(findings):
    counts = findings["answers"]["terse"]
    assert {state: counts[state] for state in ("complete", "unfinished", "empty")} == {
        "complete": 3 + 8, "unfinished": 6, "empty": 3,
    }  # fmt: skip
    assert counts["confused"] == {"complete": 0, "unfinished": 3}
    assert findings["rates"]["terse"]["identity"]["value"] == 0
    np.testing.assert_allclose(findings["with_unfinished"]["terse"]["identity"]["value"], 1 / 3)


def test_changes_are_paired_with_the_base(findings):
    change = findings["changes"]["confused"]["identity"]
    assert change["value"] == 0.5 and change["p_value"] == 4 / 8  # signs of (0.5, 1, 0) that reach 1.5 or -1.5
    cells = [own for by_category in findings["changes"].values() for own in by_category.values()]
    np.testing.assert_allclose(
        [cell["p_adjusted"] for cell in cells], false_discovery_control([cell["p_value"] for cell in cells])
    )
    np.testing.assert_allclose(findings["changes_of_all"]["confused"]["value"], 0.3)
    np.testing.assert_allclose(findings["p_yes"]["changes"]["confused"]["identity"]["value"], 0.2)


def test_the_published_first_tokens_are_reproduced(shared_data):
    path = shared_data / "introspection" / "reference_identity_30_v2.json"
    if not path.is_file():
        pytest.skip(f"no published values at {path}")
    names = ("base", "original", "vague_prompt", "r1_minimal", "food_control", "flipped_labels")
    rows = [
        row(r["id"], r["cat"], name, [NONE], r[name]["p_yes"]) for r in json.loads(path.read_text()) for name in names
    ]
    p_yes = analyse(rows, names, IdentityConfig(draws=50))["p_yes"]
    wanted = {
        "awareness": (0.285, 0.367, 0.345, 0.361, 0.028, 0.199),
        "true_nature": (0.003, 0.128, 0.145, 0.112, 0.001, 0.053),
        "goals": (0.0, 0.053, 0.068, 0.018, 0.0, 0.003),
    }
    for category, (base, *changes) in wanted.items():
        np.testing.assert_allclose(p_yes["means"]["base"][category]["value"], base, atol=5.1e-4)
        values = [p_yes["changes"][name][category]["value"] for name in names[1:]]
        np.testing.assert_allclose(values, changes, atol=5.1e-4)


# --- The page, and bad input ------------------------------------------------------------------------------------------


def test_the_page_shows_answers_side_by_side(findings):
    html = render_page("t", "s", page.section(json.loads(json.dumps(findings, allow_nan=False))))
    first = f"<dt>base, 1</dt><dd>{NONE}</dd><dt>confused, 1</dt><dd>{HUMAN} [human]</dd><dt>terse, 1</dt><dd>(nothing)"
    assert first in html and f"<dt>terse, 2</dt><dd>{HUMAN} [human, unfinished]</dd>" in html
    assert html.count("<details>") == 5
    assert '<td data-key="0.5">+0.500<small>' in html


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="identity: samples=0; wanted at least 1"):
        IdentityConfig(samples=0)
    with pytest.raises(ValueError, match="identity: temperature=0; wanted a number above 0"):
        IdentityConfig(temperature=0)
