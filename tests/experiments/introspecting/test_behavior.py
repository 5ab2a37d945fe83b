"""Self-attribution: P(Yes) by hand, planted changes and biases, and the published table."""

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import false_discovery_control, norm

import nmjax
from experiments.introspecting.first_token import chat_ids, word_tokens
from experiments.introspecting.pages import behavior as page
from experiments.introspecting.suites.behavior import CONTROL, SELF, Behavior, BehaviorConfig, analyse
from nmjax.data.introspection import read_lists
from nmjax.report.page import render_page
from nmjax.training.lora import merge

CONFIG = BehaviorConfig(draws=400)
SIZES = {name: 4 for name in (*SELF, *CONTROL, "philosophical")}
PUBLISHED = ("base", "original", "vague_prompt", "r1_minimal", "food_control", "flipped_labels")


def row(question, category, subject, yes, no=0.1):
    log_p = {word: None if p is None else math.log(max(p, 1e-12)) for word, p in (("yes", yes), ("no", no))}
    return {
        "id": question, "category": category, "prompt": f"{question}?", "subject": subject,
        "log_p": log_p | {"as": math.log(0.01)}, "top": [[" Yes", 5, -0.5], [" No", 6, -1.5]],
    }  # fmt: skip


# --- What is asked ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite(two_subjects):
    """9 questions of 2 subjects, in units of 4: the last one is filled up."""
    lists = read_lists("tiny")
    few = [next(p for p in lists.behavior if p.category == name) for name in (*SELF, *CONTROL)]
    config = BehaviorConfig(batch_size=8, top=5)
    return Behavior(two_subjects, dataclasses.replace(lists, behavior=tuple(few)), config)


@pytest.fixture(scope="module")
def records(suite):
    return [suite.ask(unit) for unit in range(suite.units)]


def test_units_cover_every_question_of_every_subject_once(suite, records):
    assert suite.units == 3 and [len(unit) for unit in records] == [8, 8, 2]
    asked = [(r["id"], r["subject"]) for unit in records for r in unit]
    assert sorted(asked) == sorted((p.id, name) for p in suite.lists.behavior for name in ("base", "original"))
    json.dumps(records, allow_nan=False)


def test_p_yes_is_a_softmax_by_hand(suite, records, instruct_lm, acting_adapter):
    """Of the logits that `forward` gives for the chat as text; the adapter is merged there, not chosen by row."""
    rows = [records[0][0], records[0][1], records[2][0], records[2][1]]
    adapted = dataclasses.replace(instruct_lm, params=merge(instruct_lm.params, acting_adapter(instruct_lm, 1)))
    tokenizer = instruct_lm.tokenizer
    for wanted, model in ((rows[::2], instruct_lm), (rows[1::2], adapted)):
        texts = [f"<|bos|>System: {suite.lists.behavior_system}\nUser: {r['prompt']}\nAssistant:" for r in wanted]
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        logits = np.asarray(nmjax.forward(model, prompts).logits[:, -1], np.float64)
        for found, p in zip(wanted, softmax(logits, axis=1), strict=True):
            for word, variants in (("yes", ("Yes", " Yes", "yes", " yes")), ("no", ("No", " No", "no", " no"))):
                ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in variants]
                assert all(len(i) == 1 for i in ids)
                np.testing.assert_allclose(found["log_p"][word], np.log(sum(p[i[0]] for i in ids)), atol=1e-4)
            best = np.argsort(-p)[:5]
            assert [i for _, i, _ in found["top"]] == best.tolist()
            np.testing.assert_allclose([logp for *_, logp in found["top"]], np.log(p[best]), atol=1e-4)
    assert abs(rows[0]["log_p"]["yes"] - rows[1]["log_p"]["yes"]) > 0.01


def test_the_answer_may_be_begun(instruct_lm):
    plain = chat_ids(instruct_lm, "Be true.", "Is it?")
    begun = chat_ids(instruct_lm, "Be true.", "Is it? Yes or no?", "The answer is")
    decode = instruct_lm.tokenizer.decode
    assert decode(plain) == "<|bos|>System: Be true.\nUser: Is it?\nAssistant:"
    assert decode(begun) == "<|bos|>System: Be true.\nUser: Is it? Yes or no?\nAssistant: The answer is"
    with pytest.raises(ValueError, match="tokenizer is NoneType; wanted one with a chat template"):
        chat_ids(dataclasses.replace(instruct_lm, tokenizer=None), "a", "b")
    tokenizer = copy.deepcopy(instruct_lm.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match="refuses a system prompt and the question 'b': no system role"):
        chat_ids(dataclasses.replace(instruct_lm, tokenizer=tokenizer), "a", "b")


def test_variants_of_several_tokens_are_left_out(instruct_lm):
    found = word_tokens(instruct_lm, ("yes", "my"))
    assert instruct_lm.tokenizer.convert_ids_to_tokens(found["yes"]) == ["Yes", "\u0120Yes", "yes", "\u0120yes"]
    assert found["my"] == []

    def letters(text, argument, special):  # each letter a token, the last one known to nobody
        return [0] if text == "yes" else [ord(c) for c in text]

    spelled = SimpleNamespace(encode=letters, tokenizer=SimpleNamespace(unk_token_id=0))
    with pytest.raises(ValueError, match=r"none of \['Yes', .* is a single token .* \[3, 4, 1, 4\]; wanted"):
        word_tokens(spelled, ("yes",))


# --- What is found ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """Four questions a category; "shifted" says yes more often everywhere, "biased" where it is asked about itself."""
    rng = np.random.default_rng(0)
    rows = []
    for category, n in SIZES.items():
        of_category = 0.05 * rng.standard_normal()
        for k in range(n):
            base, noise = rng.uniform(0.1, 0.4), of_category + 0.03 * rng.standard_normal()
            change = {"base": 0.0, "same": 0.002 * rng.standard_normal(), "shifted": 0.2}
            change["biased"] = noise + 0.3 * (category in SELF)
            rows += [row(f"{category}-{k}", category, name, base + plus) for name, plus in change.items()]
    return rows


@pytest.fixture(scope="module")
def findings(planted):
    return analyse(planted, ("base", "same", "shifted", "biased"), CONFIG)


def changes_of(rows, name):
    """By question, from the records."""
    p = {(r["id"], r["subject"]): math.exp(r["log_p"]["yes"]) for r in rows}
    return {r["id"]: (r["category"], p[r["id"], name] - p[r["id"], "base"]) for r in rows if r["subject"] == "base"}


def test_a_shift_of_all_categories_alike_is_no_bias(findings):
    shifted = findings["bias"]["shifted"]
    assert abs(shifted["value"]) < 1e-9 and shifted["equivalence"]["verdict"] == "equivalent"
    assert all(abs(own["value"] - 0.2) < 1e-9 for own in findings["changes"]["shifted"].values())
    assert findings["bias"]["same"]["equivalence"]["verdict"] == "equivalent"


def test_a_planted_bias_is_found_with_its_spread(findings, planted):
    found = findings["bias"]["biased"]
    by_category = {}
    for category, change in changes_of(planted, "biased").values():
        by_category.setdefault(category, []).append(change)
    own, control = (np.concatenate([by_category[c] for c in side]) for side in (SELF, CONTROL))
    np.testing.assert_allclose(found["value"], own.mean() - control.mean(), atol=1e-12)
    assert found["value"] > 0.25 and found["equivalence"]["verdict"] == "different"
    # Questions are drawn within their category, so the variance is that of a stratified mean.
    variance = sum(
        (4 / len(side)) ** 2 * np.var(by_category[c], ddof=1) / 4
        for side, names in ((own, SELF), (control, CONTROL))
        for c in names
    )
    low, high = found["interval"]
    np.testing.assert_allclose((high - low) / 2, norm.ppf(0.975) * math.sqrt(variance), rtol=0.15)
    assert variance < np.var(own, ddof=1) / len(own) + np.var(control, ddof=1) / len(control)


def test_biases_are_compared_question_by_question(findings):
    difference, back = (findings["bias_differences"][pair] for pair in ("biased - shifted", "shifted - biased"))
    np.testing.assert_allclose(difference["value"], findings["bias"]["biased"]["value"], atol=1e-9)
    np.testing.assert_allclose(difference["interval"], [-end for end in back["interval"][::-1]], atol=1e-9)
    assert findings["bias_differences"]["shifted - same"]["equivalence"]["verdict"] == "equivalent"
    assert len(findings["bias_differences"]) == 6


def test_p_values_are_adjusted_over_subjects_and_categories(findings, planted):
    cells = [own for by_category in findings["changes"].values() for own in by_category.values()]
    p_values = [cell["p_value"] for cell in cells]
    assert len(cells) == 3 * len(SIZES)
    np.testing.assert_allclose([c["p_adjusted"] for c in cells], false_discovery_control(p_values))
    assert findings["changes"]["shifted"]["meta"]["p_value"] == 2 / 2**4  # all signs alike, or all turned
    meta = [change for category, change in changes_of(planted, "same").values() if category == "meta"]
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1)
    wanted = np.mean(np.abs(meta @ signs) >= abs(sum(meta)) - 1e-12)
    assert findings["changes"]["same"]["meta"]["p_value"] == wanted


def test_the_share_of_yes_needs_no_mass(planted):
    """Half of everything moved to another word: P(Yes) halves, the share of yes stays."""
    half = [
        r | {"log_p": {word: p - math.log(2) for word, p in r["log_p"].items()}, "subject": "elsewhere"}
        for r in planted
        if r["subject"] == "base"
    ]
    found = analyse([r for r in planted if r["subject"] == "base"] + half, ("base", "elsewhere"), CONFIG)
    for category in SIZES:
        base, other = (
            {m: found["means"][m][s][category]["value"] for m in found["means"]} for s in ("base", "elsewhere")
        )
        np.testing.assert_allclose([other["p_yes"], other["mass"]], [base["p_yes"] / 2, base["mass"] / 2])
        np.testing.assert_allclose(other["share"], base["share"])
    assert abs(found["bias_of_share"]["elsewhere"]["value"]) < 1e-12


def test_what_gave_no_number_is_left_out_and_counted(planted):
    broken = [
        r | {"log_p": dict.fromkeys(r["log_p"])} if (r["id"], r["subject"]) == ("meta-0", "biased") else r
        for r in planted
    ]
    found = analyse(broken, ("base", "same", "shifted", "biased"), CONFIG)
    assert found["failed"] == {"base": 0, "same": 0, "shifted": 0, "biased": 1}
    rest = [
        c for name, (category, c) in changes_of(planted, "biased").items() if category == "meta" and name != "meta-0"
    ]
    assert found["changes"]["biased"]["meta"]["n"] == 3
    np.testing.assert_allclose(found["changes"]["biased"]["meta"]["value"], np.mean(rest))
    json.dumps(found, allow_nan=False)
    nothing = [r | {"log_p": dict.fromkeys(r["log_p"])} if r["subject"] == "biased" else r for r in planted]
    assert analyse(nothing, ("base", "biased"), CONFIG)["bias"]["biased"]["value"] is None


def test_the_published_changes_are_reproduced(shared_data):
    path = shared_data / "introspection" / "reference_behavioral_75_v2.json"
    if not path.is_file():
        pytest.skip(f"no published values at {path}")
    rows = [
        row(r["id"], r["cat"], name, r[name]["p_yes"], r[name]["p_no"])
        for r in json.loads(path.read_text())
        for name in PUBLISHED
    ]
    found = analyse(rows, PUBLISHED, CONFIG)
    wanted = {
        "meta": (0.428, 0.417, 0.376, 0.307, 0.066, 0.192),
        "consciousness": (0.264, 0.291, 0.222, 0.192, 0.016, 0.138),
        "pos_self": (0.319, 0.242, 0.156, 0.179, 0.046, 0.137),
        "ai_capability": (0.278, 0.127, 0.092, 0.052, 0.007, 0.148),
        "other_minds": (0.150, 0.078, 0.081, 0.074, 0.022, 0.016),
        "ai_selfknow": (0.375, 0.000, 0.013, 0.000, 0.000, 0.003),
        "generic_pref": (0.0,) * 6,
        "factual_yes": (1.0,) + (0.0,) * 5,
        "absurd": (0.0,) * 6,
    }
    for category, (base, *changes) in wanted.items():
        values = [found["changes"][name][category]["value"] for name in PUBLISHED[1:]]
        np.testing.assert_allclose(found["means"]["p_yes"]["base"][category]["value"], base, atol=5.1e-4)
        np.testing.assert_allclose(values, changes, atol=5.1e-4)
    verdicts = {name: own["equivalence"]["verdict"] for name, own in found["bias"].items()}
    assert verdicts["food_control"] == "equivalent"
    assert {verdicts[name] for name in ("original", "vague_prompt", "r1_minimal")} == {"different"}
    moved = [found["means"]["p_no"][name]["neg_self"]["value"] for name in ("base", "original", "vague_prompt")]
    np.testing.assert_allclose(np.diff(moved[::2])[0], -0.71, atol=0.006)
    np.testing.assert_allclose(np.diff(moved[:2])[0], -0.23, atol=0.006)


# --- The page, and bad input ------------------------------------------------------------------------------------------


def test_the_page_says_what_was_found(findings):
    html = render_page("t", "s", page.section(json.loads(json.dumps(findings))))
    assert "40 questions that can be answered" in html
    value = f"+{findings['bias']['biased']['value']:.3f}"
    assert (
        f'<td data-key="{float(value)}">{value}<small>' in html and ">a bias</td>" in html and ">similar</td>" in html
    )
    assert "biased \u2212 shifted" in html and "philosophical (4)" in html


def test_the_base_alone_has_a_page(planted):
    found = analyse([r for r in planted if r["subject"] == "base"], ("base",), CONFIG)
    html = render_page("t", "s", page.section(found))
    assert "Mean P(Yes) by category" in html and "bias" not in html


def test_bad_settings_are_named(two_subjects):
    with pytest.raises(ValueError, match="behavior: margin=0; wanted a number above 0"):
        BehaviorConfig(margin=0)
    with pytest.raises(ValueError, match="behavior: batch_size=0; wanted at least 1"):
        BehaviorConfig(batch_size=0)
    with pytest.raises(ValueError, match="answer_prefix='The answer is '; wanted no white space at its ends"):
        BehaviorConfig(answer_prefix="The answer is ")
    lists = read_lists("tiny")
    without = tuple(probe for probe in lists.behavior if probe.category != "absurd")
    with pytest.raises(ValueError, match=r"no questions of \['absurd'\]"):
        Behavior(two_subjects, dataclasses.replace(lists, behavior=without))
