"""What is asked under steering, against single passes; and what planted answers are found to say."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import false_discovery_control, norm

import nmjax
from experiments.introspecting.concept_scores import chance_of_winning, permutation_p
from experiments.introspecting.pages.concepts import section
from experiments.introspecting.subjects import Subjects
from experiments.introspecting.suites.concepts import Concepts, ConceptsConfig, draw
from nmjax.data.introspection import read_lists
from nmjax.data.introspection_records import unit_vectors
from nmjax.report.page import render_page
from nmjax.report.results import dump_json
from nmjax.steering.concepts import ConceptVectors, words_of

CONFIG = ConceptsConfig(concepts=6, conversations=1, options=4, magnitude=8.0, max_new_tokens=3, batch_size=4, draws=80)


@pytest.fixture(scope="module")
def suite(subjects):
    lists = read_lists("tiny")
    words = words_of(lists.concepts)
    two = Subjects(subjects.lm, {"plain": "original"})
    return Concepts(two, lists, CONFIG, ConceptVectors(words, unit_vectors(len(words), 128, 5), 1, 0.4, 0.0, 0.6))


def test_concepts_come_from_all_groups(suite):
    groups = suite.lists.concepts
    words = draw(suite.lists, dataclasses.replace(CONFIG, concepts=20))
    counts = [sum(word in groups[name] for word in words) for name in ("emotions", "topics", "personas")]
    assert counts == [7, 7, 6] and len(set(words)) == 20
    assert words == draw(suite.lists, dataclasses.replace(CONFIG, concepts=20, magnitude=3.0))
    close = dataclasses.replace(suite.lists, concepts={"topics": ("art", "artist", "sea", "seas", "moon")})
    few = dataclasses.replace(CONFIG, groups=("topics",), concepts=3, options=2)
    assert {word[:3] for word in draw(close, few)} == {"art", "sea", "moo"}
    with pytest.raises(ValueError, match="concepts is 4; wanted fewer, the group 'topics' has 5 words"):
        draw(close, dataclasses.replace(few, concepts=4))
    with pytest.raises(ValueError, match="groups holds 'songs'; wanted some of"):
        draw(close, dataclasses.replace(few, groups=("songs",)))


def test_every_concept_is_asked_about_equally_often(suite):
    assert np.bincount([item.concept for item in suite.items]).tolist() == [3] * 6
    conversations = {(item.record.context, item.record.reply): item.concept for item in suite.items}
    assert len(conversations) == 6  # each concept has its own
    assert suite.units == 18 and suite.plan[0] == (("base", 0), ("plain", 0))


def test_steered_is_the_conversation_alone(suite, monkeypatch):
    """What the engine is asked to do in a unit, and what that does to the residual stream."""
    asked = {}

    def generate(lm, prompts, packs, **options):
        asked["generate"] = (prompts, packs, options["row_ids"])
        return SimpleNamespace(text=[" ", "Yes.", "No.", "a drum"])

    def score(lm, prompts, choices, packs, row_ids, **options):
        asked["judge" if packs is None else "choose"] = (prompts, packs, row_ids)
        found = np.arange(24.0).reshape(4, 6) + (100 if packs is None else 0)
        found[3] = np.nan if packs is not None else found[3]
        return found

    monkeypatch.setattr(nmjax, "generate", generate)
    monkeypatch.setattr(nmjax, "score", score)
    rows = suite.ask(0)
    monkeypatch.undo()
    assert [(row["subject"], row["steered"]["answer"], row["unsteered"]["answer"]) for row in rows] == [
        ("base", " ", "No."), ("plain", "Yes.", "a drum")
    ]  # fmt: skip
    assert rows[1]["steered"]["choice"][0] == 6 and rows[0]["unsteered"]["choice"][0] == 12
    assert rows[1]["unsteered"]["choice"] is None
    judged = [rows[k][state]["judge"] for state in ("steered", "unsteered") for k in (0, 1)]  # an empty one is not
    assert judged[0] is None and [values[0] for values in judged[1:]] == [100, 106, 112]
    text = suite.subjects.lm.tokenizer.decode(asked["judge"][0][2])
    assert "Assistant: a drum" in text and f"User: {suite.items[0].record.question}" in text
    assert all(text.count(f" {word}") == 1 for word in suite.words) and text.endswith("The answer is")
    vector, end = suite.vectors.of(suite.words[0]), len(suite.open[0].prefix)
    prompts, packs, row_ids = asked["generate"]
    assert row_ids == [0, 0, 0, 0] and prompts[0][:end] == asked["choose"][0][0][:end] and len(prompts[0]) > end
    seen = nmjax.forward(suite.subjects.lm, prompts[:2], packs=[packs[0], packs[2]], capture=("resid_post",))
    change = np.diff(np.asarray(seen.activations["resid_post"]), axis=1)[:, 0]  # [L, T, D]
    np.testing.assert_allclose(change[1, :end], [-8.0 * vector] * end, atol=1e-4)  # block 1 is the middle third
    assert not change[0].any() and not change[1, end:].any() and change[2, end:].any()
    assert repr(asked["choose"][1]) == repr(packs)


@pytest.mark.slow
def test_a_unit_as_in_single_passes(suite, adapted):
    suite = dataclasses.replace(suite, subjects=Subjects(adapted.lm, {"plain": "original"}))
    rows = json.loads(dump_json(suite.ask(0)))
    lm, tokenizer = suite.subjects.lm, suite.subjects.lm.tokenizer
    chosen, opened = (list(s[0].prefix + s[0].question) for s in (suite.choice, suite.open))
    assert chosen[: len(suite.open[0].prefix)] == list(suite.open[0].prefix)
    vector = suite.vectors.of(suite.words[0])
    end = len(suite.open[0].prefix)
    for row in rows[1:]:
        steer = nmjax.steer(vector, 8.0, layers=[1]).on(prompt_window=(0, end))  # block 1 is the middle third
        packs = [suite.subjects.pack("plain", steer), suite.subjects.pack("plain")]
        found = nmjax.forward(lm, [chosen, chosen, opened, opened], packs=packs * 2)
        last = np.asarray(found.logits[:, -1], np.float64)
        logprobs = last - np.logaddexp.reduce(last, axis=1, keepdims=True)
        words = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in suite.words]
        for k, state in enumerate(("steered", "unsteered")):
            np.testing.assert_allclose(row[state]["choice"], logprobs[k, words], atol=2e-4)
            begins = tokenizer.decode([int(logprobs[2 + k].argmax())])
            assert row[state]["answer"].startswith(begins) or row[state]["answer"] == ""
            assert len(row[state]["judge"]) == 6 and max(row[state]["judge"]) < 0
        assert np.abs(np.subtract(row["steered"]["choice"], row["unsteered"]["choice"])).max() > 0.01
    assert rows[0]["unsteered"]["choice"] != rows[1]["unsteered"]["choice"]  # the adapter acts
    everywhere = dataclasses.replace(suite, config=dataclasses.replace(CONFIG, steer_answers=True))
    assert type(suite.steering(0, suite.open[0])).__name__ == "SteerSpan"
    assert type(everywhere.steering(0, suite.open[0])) is type(nmjax.steer(vector, 1.0))


def planted(suite):
    """base says nothing, is judged always the same and indifferent; plain knows the concept two times in three.

    The judge likes some words so much that it hears them in every answer.
    """
    C, rows = len(suite.words), []
    for item in suite.items:
        right = (0.1 * (np.arange(C) == item.concept) - np.arange(C)).tolist()
        knows = not item.record.id.endswith("-2")
        word = suite.words[item.concept]
        same = {"answer": "No.", "choice": [-3.0] * C, "judge": (-1.0 * np.arange(C)).tolist()}
        prior = {"answer": "No.", "choice": np.arange(C) * -1.0, "judge": same["judge"]}
        said = {
            "answer": f"Yes, the {word}s." if knows else "",
            "choice": np.array(prior["choice"]) + (0.1 * (np.arange(C) == item.concept) if knows else 0),
            "judge": right if knows else None,
        }
        common = {"item": item.record.id, "concept": word, "question": item.record.question}
        rows.append({"subject": "base", **common, "steered": same, "unsteered": same})
        rows.append({"subject": "plain", **common, "steered": said, "unsteered": prior})
    return [json.loads(dump_json(rows[start : start + 5])) for start in range(0, len(rows), 5)]


def test_planted_answers_give_known_rates(suite):
    findings = json.loads(dump_json(suite.analyse(planted(suite))))
    base, plain = findings["subjects"]["base"], findings["subjects"]["plain"]
    # A judge that always says the same is at chance, and so is a subject to which all words are alike.
    assert base["judge"]["steered"]["value"] == pytest.approx(1 / 6) and base["judge"]["steered"]["p_value"] == 1.0
    for kind in ("steered", "unsteered", "against_unsteered"):
        assert base["choice"][kind]["value"] == pytest.approx(1 / 4)
    assert plain["choice"]["unsteered"]["value"] == pytest.approx(1 / 4)  # whatever it prefers, over all concepts
    assert base["keywords"]["own"]["value"] == 0 and base["detection"]["difference"]["value"] == 0
    z = norm.ppf(0.975) ** 2  # of six concepts whose answers are all alike Wilson's interval is that of six answers
    ends = {"base": [0, z / (6 + z)], "plain": [6 / (6 + z), 1]}
    for name, value, counts in (("base", 0, (0, 18, 0)), ("plain", 1, (12, 0, 6))):
        steered = findings["subjects"][name]["detection"]["steered"]
        assert (steered["value"], *(steered[kind] for kind in ("yes", "no", "unclear"))) == (value, *counts)
        assert steered["interval"] == pytest.approx(ends[name])
    assert plain["detection"]["difference"]["interval"] == [1, 1]
    assert plain["empty"] == {"steered": 6, "unsteered": 0}
    named = plain["keywords"]
    assert [named[kind]["value"] for kind in ("own", "unsteered", "others")] == [1, 0, 0] and named["others"]["n"] == 12
    assert named["p_value"] == pytest.approx(1 / 720, abs=0.001)
    assert plain["judge"]["steered"]["value"] == pytest.approx(1 / 6)  # it always says what it likes most
    judged = plain["judge"]["against_unsteered"]
    assert (judged["value"], judged["n"], judged["unanswered"]) == (1, 12, 6) and judged["p_value"] < 0.01
    assert base["judge"]["against_unsteered"]["value"] == pytest.approx(1 / 6)
    tests = [
        test
        for report in (base, plain)
        for test in (report["keywords"], report["judge"]["steered"], report["judge"]["against_unsteered"])
    ]
    np.testing.assert_allclose(
        [test["p_adjusted"] for test in tests], false_discovery_control([test["p_value"] for test in tests])
    )
    assert plain["choice"]["against_unsteered"]["value"] == pytest.approx(2 / 3 + 1 / 3 / 4)
    low, high = plain["versus_base"]["choice_against_unsteered"]["interval"]
    assert low == pytest.approx(high) == pytest.approx(0.5)
    assert plain["by_concept"][0] == {"named": pytest.approx(2 / 3), "judged": 1, "chosen": pytest.approx(0.75)}
    assert findings["examples"]["plain"][suite.words[2]]["steered"] == f"Yes, the {suite.words[2]}s."
    page = render_page("t", "s", section(findings))
    assert page.count("<table>") == 5 and "answered without steering" in page


def test_what_gave_no_number_is_left_out_and_counted(suite):
    records = planted(suite)
    row = records[0][1]
    assert (row["subject"], row["item"]) == ("plain", "0-0-0")
    row["unsteered"] |= {"choice": None, "judge": None}
    findings = json.loads(dump_json(suite.analyse(records)))
    plain = findings["subjects"]["plain"]
    assert plain["failed"] == {"steered": 0, "unsteered": 1} and findings["subjects"]["base"]["failed"]["steered"] == 0
    assert plain["judge"]["steered"]["n"] == 12 and plain["judge"]["against_unsteered"]["n"] == 11
    assert plain["choice"]["steered"]["n"] == 18 and plain["choice"]["against_unsteered"]["n"] == 17
    assert plain["versus_base"]["choice_against_unsteered"]["n"] == 17
    assert np.isnan(chance_of_winning(np.full((1, 6), np.nan), np.array([2]), 4)).all()


def test_winning_against_all_draws_of_others():
    rng = np.random.default_rng(3)
    values, concept = rng.integers(0, 4, (8, 6)).astype(float), np.arange(8) % 6
    for row, k, found in zip(values, concept, chance_of_winning(values, concept, 4), strict=True):
        wins = []
        for others in itertools.combinations([c for c in range(6) if c != k], 3):
            options = row[[k, *others]]
            wins.append((row[k] == options.max()) / (options == options.max()).sum())
        assert found == pytest.approx(np.mean(wins))


def test_permutations_against_all_of_them():
    rng = np.random.default_rng(0)
    concept = np.repeat(np.arange(5), 3)
    shares = rng.random((15, 5)) + 0.3 * np.eye(5)[concept]
    seen = shares[np.arange(15), concept].sum()
    exact = np.mean([
        shares[np.arange(15), np.array(p)[concept]].sum() >= seen - 1e-9 for p in itertools.permutations(range(5))
    ])  # fmt: skip
    assert 0.01 < exact < 0.4 and permutation_p(shares, concept, seed=0) == pytest.approx(exact, abs=0.012)
    assert permutation_p(np.full((15, 5), np.nan), concept, seed=0) is None


def test_bad_settings_are_named():
    for change, message in (
        ({"concepts": 1}, "concepts is 1; wanted at least 2"),
        ({"options": 21}, "options is 21; wanted at most concepts, 20"),
        ({"magnitude": 0.0}, "magnitude is 0.0"),
        ({"third": "top"}, "third is 'top'; wanted one of"),
    ):
        with pytest.raises(ValueError, match=message):
            ConceptsConfig(**change)
