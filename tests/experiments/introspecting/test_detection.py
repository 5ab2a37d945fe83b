"""The detection suite: what is asked, that a row is the published two passes, and that planted answers are found."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

import models
import nmjax
from experiments.introspecting.pages import detection as page
from experiments.introspecting.subjects import Subjects, make_subjects
from experiments.introspecting.suites.detection import Detection, DetectionConfig
from experiments.introspecting.suites.detection_analysis import Analysis
from nmjax.data.introspection import read_lists
from nmjax.data.introspection_records import unit_vectors
from nmjax.data.introspection_split import SplitConfig, generate
from nmjax.paths import checkpoint_dir
from nmjax.prefix import share_prefix
from nmjax.report.page import Picture, render_page
from nmjax.report.results import dump_json
from nmjax.report.tables import Table, estimate
from nmjax.training import lora

LISTS = read_lists("tiny")
SMALL = DetectionConfig(vectors=2, magnitudes=(5.0, 30.0), unsteered=200, noise=1, systems=4, batch_size=64, draws=50)
CONFIG = models.LlamaConfig.from_hf(
    {"architectures": ["LlamaForCausalLM"], "vocab_size": 1387, "hidden_size": 16, "num_hidden_layers": 4,
     "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 128,
     "tie_word_embeddings": True}
)  # fmt: skip
CONCEPTS = {"sea": np.eye(16)[3], "joy": np.eye(16)[7]}


def noise(tree, seed, size):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * size, jnp.float32), tree)


@pytest.fixture(scope="module")
def subjects():
    """A random Llama (L 4, D 16) with the bundled tokenizer, and two adapters that change it a lot."""
    from transformers import AutoTokenizer

    module = models.Llama(CONFIG)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir("tiny_instruct"))
    base = nmjax.LanguageModel(module, noise(shapes, 0, 0.4), tokenizer)

    def adapter(seed):
        start = lora.init(module, lora.LoraConfig(r=2, targets=("v", "o")), jax.random.key(seed))
        return start.replace(weights=noise(start.weights, seed, 0.4))

    return make_subjects(base, {"one": (adapter(1), "original"), "two": (adapter(2), "vague_prompt")})


@pytest.fixture(scope="module")
def suite(subjects):
    return Detection(subjects, LISTS, SMALL, CONCEPTS)


@pytest.fixture(scope="module")
def records(suite):
    return [suite.ask(unit) for unit in range(suite.units)]


# --- What is asked ----------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(suite, monkeypatch):
    """What the engine is given for each item, by subject and wording: (item, text of the prompt); no model runs."""
    given = {}

    def answer(lm, prompts, choices, packs, **options):
        given["last"] = [lm.tokenizer.decode(prompt) for prompt in prompts]
        return type("Scores", (), {"logprobs": np.zeros((len(prompts), 2))})

    monkeypatch.setattr(nmjax, "score_choices", answer)
    for unit in range(suite.units):
        record = suite.ask(unit)
        pair = given.setdefault((record["subject"], record["wording"]), [])
        pair += zip(record["items"], given["last"], strict=False)
    del given["last"]
    return given


def test_every_subject_reads_the_same_and_more_than_200_unsteered_inputs_are_new(seen, suite):
    assert list(seen) == [("base", "original"), ("base", "vague_prompt"), ("one", "original"),
                          ("two", "original"), ("two", "vague_prompt")]  # fmt: skip
    assert seen["base", "original"] == seen["one", "original"] == seen["two", "original"]
    assert seen["base", "vague_prompt"] == seen["two", "vague_prompt"]
    for wording in ("original", "vague_prompt"):
        trained = generate(SplitConfig(variant=wording, n=2000, layers=4), LISTS)
        old = {record.context for record in trained["train"] + trained["val"]}
        old |= {record.question for record in trained["train"] + trained["val"]}
        old |= {record.system for record in trained["train"] + trained["val"]} - {LISTS.system}
        texts = [text for _, text in seen["base", wording]]
        assert len(old) > 30 and not [text for text in texts if any(part in text for part in old)]
        unsteered = {text for item, text in seen["base", wording] if item["set"] == "unsteered"}
        assert len(unsteered) == 200
        assert all(LISTS.system in text for text in unsteered)
        contexts = {}  # inputs that share one are resampled together
        for item, text in seen["base", wording]:
            if item["set"] in ("unsteered", "system"):
                told = next(context for context in suite._test[wording].contexts if context in text)
                contexts.setdefault(item["source"], set()).add(told)
        assert len(contexts) == 25 and all(len(told) == 1 for told in contexts.values())
        others = [text for item, text in seen["base", wording] if item["set"] == "system"]
        assert len(set(others)) == 4 and not any(LISTS.system in text for text in others)


def test_grid_is_full_and_balanced(suite):
    counts = {}
    for item in suite.items:
        counts.setdefault(item.set, []).append((item.third, item.magnitude, item.source))
    assert {name: len(own) for name, own in counts.items()} == {
        "trained": 12, "held_out": 12, "concepts": 12, "unsteered": 200, "noise": 6, "system": 4,
    }  # fmt: skip
    for name in ("trained", "held_out", "concepts", "noise"):
        assert len(set(counts[name])) == len(counts[name])
        cells = {(third, magnitude) for third, magnitude, _ in counts[name]}
        assert cells == {(third, m) for third in ("early", "middle", "late") for m in (5.0, 30.0)}
    rows = {
        name: {int(source.removeprefix("vector ")) for _, _, source in counts[name]} for name in ("trained", "held_out")
    }
    assert rows["trained"] < set(range(100)) and rows["held_out"] < set(range(150, 200))


@pytest.fixture
def without_tokens(monkeypatch):
    """Suites whose texts are not encoded, which takes longer than all else where nothing is asked."""
    monkeypatch.setattr(Detection, "_segments", None)


def test_inputs_are_used_equally_often(subjects, without_tokens):
    """Sixty steered items of each of 50 vectors' cells over 250 inputs: no one twice before all were once."""
    items = Detection(subjects, LISTS, DetectionConfig(magnitudes=(5.0, 10.0))).items
    used = np.bincount([item.input for item in items if item.set == "held_out"], minlength=250)
    assert len(used) == 250 and used.sum() == 300 and set(used) == {1, 2}


@pytest.mark.parametrize(
    ("variants", "asked", "pairs"),
    [
        ({}, ("own", "original"), {("base", "original")}),
        ({"f": "food_control", "x": "flipped_labels", "l": "localization_layers", "u": None}, ("own", "original"),
         {("base", "original"), ("f", "original"), ("x", "original"), ("l", "original"), ("u", "original")}),
        ({"v": "vague_prompt", "f": "food_control", "r": "r1_minimal"}, ("own",),
         {("base", "original"), ("base", "vague_prompt"), ("v", "vague_prompt"), ("r", "original")}),
        ({"v": "vague_prompt"}, ("original",), {("base", "original"), ("v", "original")}),
    ],
)  # fmt: skip
def test_who_is_asked_what(subjects, variants, asked, pairs, without_tokens):
    config = dataclasses.replace(SMALL, asked=asked)
    assert set(Detection(Subjects(subjects.lm.base, variants), LISTS, config).pairs) == pairs


@pytest.mark.parametrize(
    ("config", "lists", "concepts", "variants", "message"),
    [
        ({"unsteered": 199}, LISTS, None, {}, "unsteered is 199; wanted at least 200"),
        ({"unsteered": 251}, LISTS, None, {}, "unsteered is 251, but the test split .* 250 different inputs"),
        ({}, dataclasses.replace(LISTS, replies=LISTS.replies[:3]), None, {}, "unsteered is 200, .* has 150 different"),
        ({"systems": 751}, LISTS, None, {}, "systems is 751, .* 750 different inputs .* 3 system prompts"),
        ({"vectors": 51}, LISTS, None, {}, "vectors is 51, but 50 of 200 are held out"),
        ({"magnitudes": (5.0, 5.0)}, LISTS, None, {}, "magnitudes is"),
        ({"asked": ("both",)}, LISTS, None, {}, "asked is"),
        ({"asked": ("own",)}, LISTS, None, {"f": "food_control"}, "no subject has an own wording"),
        ({}, LISTS, {"sea": np.ones(16)}, {}, r"concepts\['sea'\]"),
        ({}, LISTS, {"sea": np.eye(15)[0]}, {}, r"concepts\['sea'\] has shape \(15,\)"),
    ],
)
def test_bad_input_is_named(subjects, config, lists, concepts, variants, message):
    with pytest.raises(ValueError, match=message):
        Detection(
            Subjects(subjects.lm.base, variants), lists, DetectionConfig(**{"unsteered": 200, **config}), concepts
        )


# --- What is answered -------------------------------------------------------------------------------------------------


def test_a_row_is_the_published_two_passes(suite, subjects, records):
    """The conversation is run with the vector at all of its tokens; the question, without it, reads that cache."""
    lm, vectors = subjects.lm, {f"vector {k}": v for k, v in enumerate(unit_vectors(200, 16, 42))}
    ranges = {"early": [0], "middle": [1], "late": [2]}
    chosen = {}
    for record in records:
        asker = record["subject"], record["wording"]
        if asker in (("base", "original"), ("two", "vague_prompt")):
            chosen |= {(*asker, item["set"]): item for item in record["items"] if item["third"] in (None, "middle")}
    asked = []
    for (name, wording, kind), item in chosen.items():
        segments = suite._segments[wording, item["system"], item["input"]]
        prefix, effect = list(segments.prefix), None
        if kind == "noise":
            each = unit_vectors(len(prefix), 16, item["noise_seed"])
            effect = nmjax.steer_span(each, item["magnitude"], ranges[item["third"]], (0, len(prefix)))
        elif item["third"]:
            direction = (vectors | CONCEPTS)[item["source"]]
            effect = nmjax.steer(direction, item["magnitude"], layers=ranges[item["third"]])
        asked.append((prefix, prefix + list(segments.question), subjects.pack(name, effect), subjects.pack(name)))
    assert len(asked) == 12
    prefixes, prompts, steered, bare = (list(column) for column in zip(*asked, strict=True))
    bank = share_prefix(lm, prefixes, steered)

    def behind(packs):
        """The question, unsteered, behind the conversation as it was read under other packs."""
        places = {
            (own.content_hash(), tuple(prefix)): bank.places[pack.content_hash(), tuple(prefix)]
            for prefix, pack, own in zip(prefixes, packs, bare, strict=True)
        }
        choices = [list(answer) for answer in segments.answers]
        return nmjax.score(lm, prompts, choices, bare, prefix=dataclasses.replace(bank, places=places))

    numbers = np.array([[item["yes"], item["no"]] for item in chosen.values()])
    np.testing.assert_allclose(numbers, behind(steered), atol=2e-5 * max(1, np.abs(numbers).max()))
    moved = np.abs(numbers - behind(bare)).max(axis=1)
    untouched = np.array([item["third"] is None for item in chosen.values()])
    assert untouched.sum() == 4 and moved[untouched].max() < 1e-4 and moved[~untouched].min() > 0.03


def test_numbers_do_not_depend_on_the_unit(subjects, records):
    """Without the concepts all other rows have other neighbours and other places; their numbers are the same bits."""
    other = Detection(subjects, LISTS, SMALL)

    def answers(found, subject):
        return {
            tuple(item[key] for key in item if key not in ("yes", "no")): (item["yes"], item["no"])
            for record in found
            if (record["subject"], record["wording"]) == (subject, "original")
            for item in record["items"]
        }

    known, base = answers(records, "one"), answers(records, "base")
    again = answers([other.ask(2 * other.units // len(other.pairs))], "one")
    assert len(again) == 228 and all(known[key] == values for key, values in again.items())
    here = np.array([known[key] for key in again])
    assert np.ptp(here) > 0.5 and np.abs(here - [base[key] for key in again]).max() > 1


def test_records_and_findings_are_strict_json_and_become_a_section(suite, records):
    assert json.loads(dump_json(records)) == records
    findings = suite.analyse(records)
    assert json.loads(dump_json(findings)) == findings
    blocks = page.section(findings)
    assert sum(isinstance(block, Picture) for block in blocks) == 4  # a ROC for each wording
    text = render_page("t", "s", blocks)
    assert all(name in text for name in ("base, asked vaguely", "two, asked vaguely", "12 with held-out vectors"))
    headline = next(block for block in blocks if isinstance(block, Table))
    base = findings["subjects"][0]["detection"]["held_out"]
    assert headline.rows[0][:2] == ["base", estimate(base["auroc"])]


# --- What it says -----------------------------------------------------------------------------------------------------


def planted(subject, shift, seed, mass=0.8, wording="original"):
    """A record: 20 vectors in 2 cells whose margins lie `shift` (by cell) above those of 200 unsteered inputs."""
    rng = np.random.default_rng(seed)
    blank = {"third": None, "magnitude": None, "noise_seed": None, "system": None}
    items = [
        {**blank, "set": "held_out", "source": f"vector {v}", "input": v, "third": "early", "magnitude": m, "at": s}
        for m, s in shift.items()
        for v in range(20)
    ]
    items += [{**blank, "set": "unsteered", "source": f"input {k}", "input": k, "at": 0.0} for k in range(200)]
    items += [{**blank, "set": "noise", "source": f"noise {k}", "input": k, "at": 9.0} for k in range(30)]
    for item in items:
        margin = item.pop("at") + rng.normal() - 1
        item["yes"] = float(np.log(mass) - np.log1p(np.exp(-margin)))
        item["no"] = item["yes"] - float(margin)
    return {"subject": subject, "wording": wording, "items": items}


def margins(record, **where):
    return np.array(
        [i["yes"] - i["no"] for i in record["items"] if all(i[name] == value for name, value in where.items())]
    )


@pytest.fixture(scope="module")
def found():
    """Records of a base at chance and of a detector of the larger magnitude only, and their findings."""
    records = [planted("base", {5.0: 0.0, 30.0: 0.0}, 0), planted("one", {5.0: 0.0, 30.0: 6.0}, 1, mass=0.05)]
    records[1]["items"][0]["yes"] = None  # of a vector in the first cell
    return records, Analysis({"one": "original"}, draws=400, seed=0).findings(records)["subjects"]


def test_planted_answers_are_found(found):
    (_, record), (base, own) = found
    kept = {**record, "items": record["items"][1:]}
    steered, unsteered = margins(kept, set="held_out"), margins(kept, set="unsteered")
    report = own["detection"]["held_out"]

    def auroc(a, b):
        return roc_auc_score(np.repeat([1, 0], [len(a), len(b)]), np.concatenate([a, b]))

    assert report["auroc"]["value"] == pytest.approx(auroc(steered, unsteered))
    hits, alarms = (steered > 0).sum(), (unsteered > 0).sum()
    wanted = norm.ppf((hits + 0.5) / 40) - norm.ppf((alarms + 0.5) / 201)
    assert report["d_prime_loglinear"]["value"] == pytest.approx(wanted)
    assert report["accuracy"]["value"] == pytest.approx((hits + 200 - alarms) / 239)
    assert own["sets"]["held_out"] | {"n": 40, "failed": 1} == own["sets"]["held_out"]
    weak, strong = report["cells"]
    assert (weak["magnitude"], weak["n"], strong["magnitude"], strong["n"]) == (5.0, 19, 30.0, 20)
    assert strong["auroc"]["value"] == pytest.approx(auroc(margins(kept, magnitude=30.0), unsteered)) and (
        weak["auroc"]["interval"][0] < 0.5 < weak["auroc"]["interval"][1] < 0.99 < strong["auroc"]["interval"][0]
    )
    assert report["against"] == {"noise": report["against"]["noise"]}
    assert report["against"]["noise"]["value"] == pytest.approx(auroc(steered, margins(kept, set="noise")))
    assert report["against"]["noise"]["value"] < 0.2  # it says yes to noise, and more so
    area = np.trapezoid(report["roc"]["tpr"], report["roc"]["fpr"])
    assert area == pytest.approx(report["auroc"]["value"])
    low, high = base["detection"]["held_out"]["auroc"]["interval"]
    assert low < 0.5 < high


def test_mass_says_what_a_yes_weighs(found):
    _, (base, own) = found
    for entry, mass, low in ((base, 0.8, 0.0), (own, 0.05, 1.0)):
        assert entry["sets"]["unsteered"]["mass"]["value"] == pytest.approx(mass)
        assert entry["sets"]["unsteered"]["low_mass"]["value"] == low


def test_difference_to_the_base_is_of_the_same_items(found):
    (base, record), (first, own) = found
    labels = np.repeat([1, 0], [39, 200])
    aurocs = [
        roc_auc_score(labels, np.concatenate([margins(one, set="held_out"), margins(one, set="unsteered")]))
        for one in ({**side, "items": side["items"][1:]} for side in (record, base))
    ]
    difference = own["to_base"]["held_out"]
    assert difference["value"] == pytest.approx(aurocs[0] - aurocs[1])
    low, high = difference["interval"]
    assert 0 < low < difference["value"] < high and difference["p_value"] < 0.05
    assert difference["p_adjusted"] == difference["p_value"] and first["to_base"] == {}


def test_an_equal_subject_differs_by_nothing():
    record = planted("base", {5.0: 1.0}, 3)
    other = {**record, "subject": "one"}
    difference = Analysis({"one": None}, 50, 0).findings([record, other])["subjects"][1]["to_base"]["held_out"]
    assert (difference["value"], difference["interval"], difference["p_value"]) == (0.0, [0.0, 0.0], 1.0)


def test_a_subject_without_a_finite_answer_has_no_numbers():
    record = planted("base", {5.0: 1.0}, 3)
    for item in record["items"]:
        item["no"] = None
    findings = Analysis({}, 50, 0).findings([record])
    assert findings["subjects"][0]["detection"]["held_out"]["auroc"] == {"value": None, "interval": None}
    assert findings["subjects"][0]["sets"]["held_out"]["failed"] == 20
