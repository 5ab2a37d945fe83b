"""Self-prediction: what is asked and of whom, and what made-up answers amount to."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

import models
import nmjax
from experiments.introspecting.pages.self_prediction import section
from experiments.introspecting.subjects import make_subjects
from experiments.introspecting.suites.self_prediction import (
    SelfPrediction,
    SelfPredictionConfig,
    held_out_majority,
    majority,
)
from nmjax.data.self_prediction import Item
from nmjax.metrics import stats
from nmjax.report.page import render_page
from nmjax.report.results import dump_json
from nmjax.training import lora

# --- Made-up answers --------------------------------------------------------------------------------------------------


def chat(text):
    return ({"role": "user", "content": text},)


def made(answers, properties=("starts_with_vowel",), questions=None):
    """Findings from answers: by subject, an (object-level, hypothetical) pair for each item of each task."""
    n = len(next(iter(answers.values()))) // len(properties)
    tasks = {
        property: tuple(
            Item(f"{property}:{k}", property, questions[k] if questions else f"q{k}", chat(f"{property} {k}"),
                 chat(f"{property} {k}?"), property)
            for k in range(n)
        )
        for property in properties
    }  # fmt: skip
    subjects = types.SimpleNamespace(names=tuple(answers))
    suite = SelfPrediction(subjects, None, SelfPredictionConfig(n_per_task=n), tasks)
    prompts = [
        {"prompt": list(prompt), "answers": {name: own[k][level] for name, own in answers.items()}}
        for k, item in enumerate(item for items in tasks.values() for item in items)
        for level, prompt in enumerate((item.object_level, item.hypothetical))
    ]
    findings = suite.analyse([{"prompts": prompts[:5]}, {"prompts": prompts[5:]}])
    dump_json(findings)  # strict, or it raises
    return findings


VOWELS = [("owl", "true")] * 5 + [("cat", "false")] * 35


def test_a_model_that_always_says_the_same_knows_nothing_of_itself():
    own = made({"base": [("ant ant ant", "ant")] * 40}, ("first_word",))["subjects"]["base"]["all"]
    assert own["accuracy"] == own["majority"] == 1
    assert own["held_out_majority"] == pytest.approx(1)
    assert own["above_majority"] == 0 and own["above_majority_interval"] == [0, 0]
    assert own["entropy"] == 0 and own["commonest"] == 1 and own["balanced_accuracy"] is None
    always_true = made({"base": [("ant", "true")] * 40})["subjects"]["base"]["all"]
    assert always_true["accuracy"] == 1 and always_true["above_majority"] == 0
    assert always_true["balanced_accuracy"] is None


def test_a_model_that_knows_itself_is_above_its_majority():
    own = made({"base": VOWELS})["subjects"]["base"]["all"]
    assert own["accuracy"] == own["balanced_accuracy"] == 1 and own["majority"] == pytest.approx(35 / 40)
    assert own["above_majority"] == pytest.approx(5 / 40) and own["above_majority_interval"][0] > 0
    assert own["entropy"] == pytest.approx(-(np.log2(1 / 8) / 8 + np.log2(7 / 8) * 7 / 8))
    assert own["commonest"] == pytest.approx(35 / 40)


def test_always_saying_no_is_at_chance():
    own = made({"base": [(answer, "false") for answer, _ in VOWELS]})["subjects"]["base"]["all"]
    assert own["accuracy"] == pytest.approx(35 / 40) and own["above_majority"] == pytest.approx(0)
    assert own["balanced_accuracy"] == 0.5


def test_what_cannot_be_read_is_counted_apart():
    own = made({"base": [*VOWELS, ("owl", "I cannot say"), ("owl", ""), ("...", "true")]})["subjects"]["base"]["all"]
    assert (own["n"], own["unread"], own["no_value"], own["scored"]) == (43, 2, 1, 40)
    assert own["accuracy"] == 1
    assert own["unread_interval"] == pytest.approx([float(end) for end in stats.wilson_interval(2, 43)])
    silent = made({"base": [("owl", "perhaps")] * 4})
    own = silent["subjects"]["base"]["all"]
    assert own["scored"] == 0 and own["accuracy"] is own["above_majority"] is own["above_majority_interval"] is None
    assert "perhaps" in render_page("", "", section(silent))


def test_who_predicts_whom():
    """The adapter says what the base does, and the other way round."""
    a = [("owl", "false"), ("cat", "true"), ("ant", "true"), ("dog", "false"), ("elk", "false"), ("fox", "what?")]
    b = [("cat", "true"), ("owl", "false"), ("elk", "true"), ("fox", "false"), ("cow", "true"), ("ape", "true")]
    found = made({"base": a, "adapter": b})
    accuracy = {p: {q: cell["value"] for q, cell in row.items()} for p, row in found["matrix"].items()}
    assert accuracy["base"] == {"base": pytest.approx(2 / 5), "adapter": 1.0}
    assert accuracy["adapter"] == {"base": pytest.approx(5 / 6), "adapter": pytest.approx(3 / 6)}
    assert found["matrix"]["base"]["adapter"]["n"] == 5
    assert found["advantage"]["base"]["adapter"]["value"] == pytest.approx((2 - 5) / 5)
    assert found["advantage"]["adapter"]["base"]["value"] == pytest.approx((2 - 5) / 5)
    assert found["versus_base"]["adapter"]["accuracy"] == {"value": 0, "interval": [0, 0], "n": 5}
    page = render_page("", "", section(found))
    assert "0.833" in page and "-0.600" in page


def random_answers(seed, n):
    rng = np.random.default_rng(seed)
    words, truths = np.array(["owl", "cat", "ant", "dog", "12"]), np.array(["true", "false", "eh"])
    return list(zip(rng.choice(words, n), rng.choice(truths, n, p=[0.3, 0.6, 0.1]), strict=True))


def test_against_scikit_learn_and_paired_intervals():
    n = 120
    answers = {"base": random_answers(0, n), "adapter": random_answers(1, n)}
    found = made(answers)

    def read(name):
        return (
            np.array([word in ("owl", "ant") for word, _ in answers[name]]),
            np.array([truth == "true" for _, truth in answers[name]]),
            np.array([truth != "eh" for _, truth in answers[name]]),
        )

    (y, said, known), (y2, said2, known2) = read("base"), read("adapter")
    own = found["subjects"]["base"]["all"]
    assert own["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y[known], said[known]))
    low, high = own["balanced_accuracy_interval"]
    assert low < own["balanced_accuracy"] < high
    right = (y == said).astype(float)
    assert own["accuracy_interval"] == pytest.approx([float(e) for e in stats.mean_interval(right[known])])
    both = known & known2
    versus = found["versus_base"]["adapter"]["accuracy"]
    assert versus["n"] == both.sum()
    assert versus["interval"] == pytest.approx(
        [float(e) for e in stats.paired_interval((y2 == said2)[both], right[both])]
    )


def test_items_that_share_a_question_are_drawn_together():
    answers = {"base": [pair for pair in random_answers(3, 20) for _ in range(6)]}
    alone = made(answers)["subjects"]["base"]["all"]["accuracy_interval"]
    together = made(answers, questions=[f"q{k // 6}" for k in range(120)])["subjects"]["base"]["all"]
    width = together["accuracy_interval"][1] - together["accuracy_interval"][0]
    assert width == pytest.approx(np.sqrt(6) * (alone[1] - alone[0]), rel=0.25)


def test_kinds_and_tasks_are_told_apart():
    words = [("owl cat", "owl"), ("ant cat", "cat"), ("owl dog", "owl dog"), ("cat owl", "cat")]
    own = made({"base": words + VOWELS[:4]}, ("first_word", "starts_with_vowel"))["subjects"]["base"]
    assert own["kinds"].keys() == {"words", "yes or no"}
    assert own["kinds"]["words"] == own["tasks"]["first_word"]
    assert own["tasks"]["first_word"]["accuracy"] == pytest.approx(2 / 3) and own["all"]["scored"] == 7
    assert own["all"]["entropy"] == pytest.approx((1.5 + 0) / 2)  # owl, ant, owl, cat; and true alone


def test_majorities():
    values, tasks = ["a", "a", "b", None, "x", "y", "x"], ["t"] * 4 + ["u"] * 3
    assert majority(values, tasks).tolist() == [1, 1, 0, 0, 1, 0, 1]
    assert majority(["a", "b", None], ["t"] * 3).tolist() == [0.5, 0.5, 0]  # a tie is shared
    balanced = [True] * 20 + [False] * 20
    assert majority(balanced, ["t"] * 40).mean() == 0.5 > held_out_majority(balanced, ["t"] * 40).mean()
    skewed = [True] * 60 + [False] * 20
    assert held_out_majority(skewed, ["t"] * 80).mean() == pytest.approx(0.75, abs=1e-9)
    assert held_out_majority(["a", None], ["t", "t"]).tolist() == [0, 0]


def test_settings_are_checked():
    with pytest.raises(ValueError, match="n_per_task is 0; wanted 1 or more"):
        SelfPredictionConfig(n_per_task=0)


# --- What is asked ----------------------------------------------------------------------------------------------------


@pytest.fixture
def echo(monkeypatch):
    """Subjects that answer with their name and the prompt; the calls' options, as they come."""
    calls = []

    def generate(lm, messages, packs, **options):
        calls.append(options)
        asked = [chat[-1]["content"] for chat in messages]
        return types.SimpleNamespace(text=[f"{name}: {text}" for name, text in zip(packs, asked, strict=True)])

    monkeypatch.setattr(nmjax, "generate", generate)
    return types.SimpleNamespace(lm=None, names=("base", "a", "b"), pack=lambda name: name), calls


def test_every_prompt_is_asked_of_every_subject(echo):
    subjects, calls = echo
    suite = SelfPrediction(subjects, None, SelfPredictionConfig(n_per_task=30, max_new_tokens=9, batch_size=26))
    assert len(suite.items) == 90 and len(suite.prompts) < 180  # two tasks ask about the same lists
    records = [suite.ask(unit) for unit in range(suite.units)]
    assert {len(record["prompts"]) for record in records} == {8}  # the last is filled up, so that shapes are equal
    rows = {row["prompt"][0]["content"]: row["answers"] for record in records for row in record["prompts"]}
    wanted = {chat[0]["content"] for item in suite.items for chat in (item.object_level, item.hypothetical)}
    assert rows.keys() == wanted and len(suite.prompts) == len(wanted)
    assert all(answers == {name: f"{name}: {text}" for name in subjects.names} for text, answers in rows.items())
    assert calls == [{"max_new_tokens": 9, "batch_size": 26}] * suite.units  # greedy
    lengths = [len(prompt[0]["content"]) for prompt in suite.prompts]
    assert lengths == sorted(lengths)


def test_findings_do_not_depend_on_units(echo):
    subjects, _ = echo
    suites = [SelfPrediction(subjects, None, SelfPredictionConfig(n_per_task=3, batch_size=size)) for size in (12, 300)]
    found = [suite.analyse([suite.ask(unit) for unit in range(suite.units)]) for suite in suites]
    assert suites[1].units == 1 and found[0] == found[1]
    example = found[0]["examples"][1]["answers"]["a"]
    assert example["object_level"].startswith("a: Name the next five animals.") and example["value"] == "a"
    assert [example["task"] for example in found[0]["examples"]] == list(suites[0].tasks)


@pytest.mark.slow
def test_answers_are_those_of_merged_weights():
    lm = models.load("checkpoints/tiny_instruct")
    adapter = lora.init(lm.module, lora.LoraConfig(r=2), jax.random.key(0))
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) * 0.3, adapter.weights)
    adapter = adapter.replace(weights=weights)
    config = SelfPredictionConfig(n_per_task=4, max_new_tokens=8)
    suite = SelfPrediction(make_subjects(lm, {"loud": (adapter, None)}), None, config)
    records = [suite.ask(unit) for unit in range(suite.units)]
    rows = {row["prompt"][0]["content"]: row["answers"] for record in records for row in record["prompts"]}
    merged = dataclasses.replace(lm, params=lora.merge(lm.params, adapter))
    for name, model in (("base", lm), ("loud", merged)):
        alone = nmjax.generate(model, messages=[list(chat(text)) for text in rows], max_new_tokens=8)
        assert [answers[name] for answers in rows.values()] == alone.text
    assert any(answers["base"] != answers["loud"] for answers in rows.values())
    found = suite.analyse(records)
    assert found["subjects"]["base"]["tasks"]["facts_among_a_or_c"]["no_value"] == 0  # it answers with letters
