"""Self-calibration: samples at exact temperature 1, and what made-up samples and statements amount to."""

import types

import jax
import numpy as np
import pytest
import scipy.stats

import models
import nmjax
from experiments.introspecting.pages.self_calibration import section
from experiments.introspecting.subjects import make_subjects
from experiments.introspecting.suites.self_calibration import SelfCalibration, SelfCalibrationConfig
from nmjax.data.introspection import read_lists
from nmjax.metrics.stated import ALPHA, FLOOR
from nmjax.report.page import render_page
from nmjax.report.results import dump_json
from nmjax.training import lora

# --- Made-up answers --------------------------------------------------------------------------------------------------

TRUE = "1. Cat (50%)\n2. Dog (30%)\n3. Fox (20%)"
SAMPLES = ["Cat."] * 50 + ["a dog"] * 30 + ["The fox!"] * 20


def made(answers):
    """Findings from answers: by subject, a (samples, statement) for each prompt; likelihoods say nothing."""
    prompts = tuple(f"Prompt {k}." for k in range(len(next(iter(answers.values())))))
    lists = types.SimpleNamespace(self_calibration=types.SimpleNamespace(prompts=prompts))
    flat = dict.fromkeys((text for own in answers.values() for samples, _ in own for text in samples), -1.0)
    records = [
        {"prompt": prompt, "answers": {name: {"samples": own[k][0], "statement": own[k][1], "direct": flat,
                                              "foretold": flat} for name, own in answers.items()}}
        for k, prompt in enumerate(prompts)
    ]  # fmt: skip
    findings = SelfCalibration(None, lists).analyse(records)
    dump_json(findings)  # strict, or it raises
    return findings


def test_a_true_statement_fits():
    own = made({"base": [(SAMPLES, TRUE)] * 3})["subjects"]["base"]
    p = (np.array([50, 30, 20, 0]) + ALPHA) / (100 + 4 * ALPHA)
    q = (1 - FLOOR) * np.array([0.5, 0.3, 0.2, 0]) + FLOOR / 4
    assert own["kl_actual_stated"]["value"] == pytest.approx(scipy.stats.entropy(p, q))
    assert own["kl_stated_actual"]["value"] == pytest.approx(scipy.stats.entropy(q, p))
    assert max(own[measure]["value"] for measure in ("kl_actual_stated", "kl_stated_actual")) < 0.01
    assert own["total_variation"]["value"] == pytest.approx(0) and own["top1"]["value"] == own["top5"]["value"] == 1
    assert own["entropy"]["value"] == pytest.approx(scipy.stats.entropy([0.5, 0.3, 0.2], base=2))
    for measure in ("kl_actual_stated", "kl_stated_actual", "entropy"):
        low, high = own[measure]["interval"]
        assert low <= own[measure]["value"] <= high and low < high


def test_a_false_statement_does_not():
    wrong = TRUE.replace("Cat", "Owl")
    own = made({"base": [(SAMPLES, wrong), (SAMPLES, TRUE)]})["subjects"]["base"]
    assert own["total_variation"]["value"] == pytest.approx((0.5 + 0) / 2)
    assert own["top1"]["value"] == 0.5 and own["top5"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert own["kl_actual_stated"]["value"] > 1


def test_what_cannot_be_read_is_counted_apart():
    found = made({"base": [(SAMPLES, TRUE), (SAMPLES, "I cannot."), (["..."] * 3 + ["Cat"], TRUE)]})
    own = found["subjects"]["base"]
    assert (own["unread"], own["scored"], own["kl_actual_stated"]["n"], own["entropy"]["n"]) == (1, 2, 2, 3)
    assert own["empty"] == pytest.approx(0.75 / 3)
    silent = made({"base": [(SAMPLES, "I cannot."), (SAMPLES, "")], "adapter": [(SAMPLES, "No."), (SAMPLES, TRUE)]})
    assert silent["subjects"]["base"]["kl_actual_stated"] == {"value": None, "interval": None, "n": 0}
    assert silent["versus_base"]["adapter"]["top1"]["n"] == 0 and silent["versus_base"]["adapter"]["entropy"]["n"] == 2
    assert "Without a single statement that can be read: base." in render_page("", "", section(silent))


def test_differences_are_paired_by_prompt():
    """Prompts differ much, subjects by the same in each: the difference is known better than either."""
    rng = np.random.default_rng(0)
    words = np.array(["cat", "dog", "fox", "owl", "ant", "bee"])
    statement = "1. cat (40%)\n2. dog (30%)\n3. fox (30%)"
    answers = {"base": [], "adapter": []}
    for k in range(8):
        other = k / 8  # the share of answers that the statement lacks
        shares = np.array([0.4, 0.3, 0.3, 0, 0, 0]) * (1 - other) + np.array([0, 0, 0, 1, 1, 1]) * other / 3
        samples = list(rng.choice(words, 200, p=shares))
        answers["base"].append((samples, statement))
        answers["adapter"].append((samples, statement.replace("40", "45").replace("dog (30%)", "dog (25%)")))
    found = made(answers)
    change, own = found["versus_base"]["adapter"]["kl_actual_stated"], found["subjects"]["base"]["kl_actual_stated"]
    wide, narrow = (high - low for low, high in (own["interval"], change["interval"]))
    assert change["n"] == 8 and narrow < wide / 3
    values = {name: found["subjects"][name]["kl_actual_stated"]["value"] for name in answers}
    assert change["value"] == pytest.approx(values["adapter"] - values["base"])
    # The same samples under both: the matrix has the adapter's fit off the diagonal, too.
    matrix = {p: {b: cell["value"] for b, cell in row.items()} for p, row in found["matrix"].items()}
    assert matrix["adapter"]["base"] == pytest.approx(values["adapter"])
    assert matrix["base"]["adapter"] == pytest.approx(values["base"])
    assert "Difference to the base" in render_page("", "", section(found))


def test_intervals_hold_the_noise_of_samples():
    """Of a single prompt, the spread is that of drawing the samples again; it shrinks with their number."""

    def width(factor):
        (low, high) = made({"base": [(SAMPLES * factor, TRUE.replace("50", "30"))]})["subjects"]["base"][
            "kl_actual_stated"
        ]["interval"]
        return high - low

    assert width(1) == pytest.approx(2 * width(4), rel=0.2)


def test_samples_of_the_same_number_are_drawn_together():
    """Two subjects whose samples differ in one of 100: their difference is known far better than by chance draws."""
    other = [*SAMPLES[:49], "An owl.", *SAMPLES[50:]]
    found = made({"base": [(SAMPLES, TRUE)], "adapter": [(other, TRUE)], "turned": [(SAMPLES[::-1], TRUE)]})

    def width(of):
        low, high = of["interval"]
        return high - low

    own = width(found["subjects"]["base"]["total_variation"])
    assert width(found["versus_base"]["adapter"]["total_variation"]) < own / 2
    # The same answers, but each of another number: nothing is shared.
    assert width(found["versus_base"]["turned"]["total_variation"]) > own
    assert found["versus_base"]["turned"]["total_variation"]["value"] == 0


def test_a_draw_without_an_answer_is_left_out():
    own = made({"base": [(["Cat", *["..."] * 9], TRUE)]})["subjects"]["base"]
    assert own["empty"] == 0.9 and own["entropy"] == {"value": 0, "interval": [0, 0], "n": 1}
    low, high = own["kl_actual_stated"]["interval"]
    assert low <= own["kl_actual_stated"]["value"] <= high


def test_settings_are_checked():
    with pytest.raises(ValueError, match="samples is 1; wanted 2 or more"):
        SelfCalibrationConfig(samples=1)


# --- What is asked ----------------------------------------------------------------------------------------------------


def test_each_prompt_is_sampled_and_asked_about(monkeypatch, instruct_lm):
    calls = []

    def generate(lm, messages, packs, num_return_sequences=1, **options):
        calls.append((messages, options))
        return types.SimpleNamespace(text=[f"{name} {k}" for name in packs for k in range(num_return_sequences)])

    def scored(lm, prompts, continuations, packs, batch_size, **options):
        calls.append([lm.tokenizer.decode(a + b) for a, b in zip(prompts, continuations, strict=True)])
        assert len(packs) == 16 and packs[:2] == ["base", "a"] and batch_size == 16
        values = [np.array([-1.0, -k]) for k in range(15)]
        return [*values, np.array([-np.inf])]

    monkeypatch.setattr(nmjax, "generate", generate)
    monkeypatch.setattr(nmjax, "continuation_logprobs", scored)
    subjects = types.SimpleNamespace(lm=instruct_lm, names=("base", "a"), pack=lambda name: name)
    config = SelfCalibrationConfig(samples=4, seed=5, max_new_tokens=2, max_stated_tokens=4, compared=2, batch_size=16)
    lists = read_lists()
    suite = SelfCalibration(subjects, lists, config)
    assert suite.units == 10
    record = suite.ask(1)
    assert record["prompt"] == "Name a random color"
    for k, (name, own) in enumerate(record["answers"].items()):
        assert own["samples"] == [f"{name} {j}" for j in range(4)] and own["statement"] == f"{name} 0"
        assert own["direct"] == {"base 0": -1 - k, "base 1": -3 - k, "a 0": -5 - k, "a 1": -7 - k}
        last = -15.0 if name == "base" else None  # what is not finite is no number
        assert own["foretold"] == {"base 0": -9 - k, "base 1": -11 - k, "a 0": -13 - k, "a 1": last}
    (sampled, how), (asked, greedily), texts = calls
    # Nothing but the temperature shapes what is drawn; the row ids are the prompt's, so no unit or subject matters.
    assert how == {"max_new_tokens": 2, "temperature": 1.0, "seed": 5, "row_ids": [1, 1], "batch_size": 16}
    assert greedily == {"max_new_tokens": 4, "batch_size": 16}
    lists = lists.self_calibration
    assert [message["content"] for message in sampled[1]] == [lists.system, "Name a random color"]
    question = (
        "If I asked you 'Name a random color', what would be your top 5 responses and their approximate probabilities?"
    )
    assert [message["content"] for message in asked[0]] == [lists.prediction_system, question]
    assert lists.system in texts[0] and texts[0].endswith("User: Name a random color\nAssistant:base 0")
    assert lists.prediction_system in texts[8] and texts[8].endswith(f"User: {question}\nAssistant: 1. base 0")


@pytest.mark.slow
def test_samples_are_of_the_whole_distribution():
    """The first tokens come as often as the softmax says, those beyond a nucleus of 95% included."""
    lm = models.load("checkpoints/tiny_instruct")
    adapter = lora.init(lm.module, lora.LoraConfig(r=2), jax.random.key(0))
    subjects = make_subjects(lm, {"fresh": (adapter, None)})
    config = SelfCalibrationConfig(samples=400, max_new_tokens=1, max_stated_tokens=3)
    suite = SelfCalibration(subjects, read_lists("tiny"), config)
    record = suite.ask(2)
    for what in ("samples", "statement"):  # an adapter at its start is the base: equal noise
        assert record["answers"]["base"][what] == record["answers"]["fresh"][what]
    asked = suite.lists.self_calibration
    chat = [{"role": "system", "content": asked.system}, {"role": "user", "content": record["prompt"]}]
    text = lm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    p = scipy.special.softmax(np.asarray(nmjax.forward(lm, [ids]).logits)[0, -1].astype(np.float64))
    for text, logprob in record["answers"]["base"]["direct"].items():
        (token,) = lm.encode(text, "answer", special=False)
        assert logprob == pytest.approx(np.log(p[token]), abs=1e-4)
        assert record["answers"]["fresh"]["direct"][text] == pytest.approx(logprob, abs=1e-4)
        assert record["answers"]["base"]["foretold"][text] < 0
    before, share = lm.tokenizer.decode(ids, skip_special_tokens=True), {}
    for token, mass in enumerate(p):
        after = lm.tokenizer.decode([*ids, token], skip_special_tokens=True)[len(before) :]
        share[after] = share.get(after, 0.0) + mass
    samples = record["answers"]["base"]["samples"]
    assert len(samples) == 400 and set(samples) <= share.keys()
    order = sorted(share, key=share.get, reverse=True)
    rare = set(np.array(order)[np.cumsum([share[word] for word in order]) > 0.95])
    expected = sum(share[word] for word in rare)
    found = sum(sample in rare for sample in samples)
    assert expected > 0.01 and scipy.stats.binomtest(found, 400, expected).pvalue > 0.001
    common = [word for word in order if share[word] > 0.02]
    counts, weights = [samples.count(word) for word in common], [share[word] for word in common]
    chi2 = scipy.stats.chisquare([*counts, 400 - sum(counts)], 400 * np.array([*weights, 1 - sum(weights)]))
    assert len(common) > 3 and chi2.pvalue > 0.001
