"""Packs: the dose table's numbers, the shipped files, and no pack that is honoured only in part."""

import copy
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import nmjax
from nmjax import packs
from nmjax.dose_table import RULES
from nmjax.interventions import attention, inputs, memory, residual, sampler, steering
from nmjax.packs import parse_pack

ROOT = Path(__file__).parents[2]
CORE = (
    "caffeine cocaine cocaine_10 cocaine_50 cocaine_100 amphetamine methylphenidate modafinil lsd psilocybin dmt "
    "mescaline 2c_b alcohol benzodiazepines heroin morphine fentanyl ketamine pcp dxm nitrous_oxide mdma mda 6_apb "
    "cannabis_thc mentor speciation archivist none placebo"
).split()


def one(effect: str, weight: float, direction: str = "up", **parameters):
    entry = dict(effect=effect, weight=weight, direction=direction, parameters=parameters)
    (built,) = parse_pack(dict(schema=1, name="test", effects=[entry])).effects
    return built


def factor(effect):
    return (1 + effect.dose * effect.gain) / (1 + effect.dose * effect.loss)


def spec_of(name: str) -> dict:
    return json.loads((ROOT / "packs" / f"{name}.json").read_text(encoding="utf-8"))


# --- The dose table ---------------------------------------------------------------------------------------------------

NEEDED = {
    "steering": dict(vector=[3.0, 4.0]),
    "random_orthogonal_steering": dict(reference_steering_type="calm"),
    "structured_prefaces": dict(preface_text="Be kind."),
}

# effect -> (class, the numbers of a built effect, the same from u, sign s and weight w as the table writes them)
FORMULAS = {
    "qk_score_scaling": (
        attention.ScaleQK,
        lambda e: factor(e),
        lambda u, s, w: 1 + 2 * u if s > 0 else 1 / (1 + 2 * u),
    ),
    "temperature": (
        sampler.Temperature,
        lambda e: max(e.floor, 1 + e.dose * e.change),
        lambda u, s, w: max(0.05, 1 + s * u),
    ),
    "risk_preference_steering": (
        sampler.Temperature,
        lambda e: max(e.floor, 1 + e.dose * e.change),
        lambda u, s, w: max(0.05, 1 + s * 0.5 * u),
    ),
    "pulsed_sampler": (
        sampler.PulseTemperature,
        lambda e: max(0.05, 1 - e.dose * e.delta),
        lambda u, s, w: max(0.05, 1 + s * 0.5 * u),
    ),
    "compute_at_test_scheduling": (
        sampler.PulseTemperature,
        lambda e: max(0.05, 1 - e.dose * e.delta),
        lambda u, s, w: max(0.05, 1 - 0.6 * u),
    ),
    "top_p": (sampler.TopP, lambda e: max(e.floor, 1 - e.dose * e.cut), lambda u, s, w: max(0.1, 1 - 0.3 * u)),
    "frequency_penalty": (sampler.CountPenalty, lambda e: e.dose * e.each, lambda u, s, w: s * 0.5 * u),
    "presence_penalty": (sampler.CountPenalty, lambda e: e.dose * e.once, lambda u, s, w: s * 2 * u),
    "repetition_penalty": (sampler.CountPenalty, lambda e: e.dose * e.each, lambda u, s, w: 1.15 * u),
    "style_affect_logit_bias": (
        sampler.BiasTokens, lambda e: e.dose * e.bias, lambda u, s, w: [s * 3.2 * u, -s * 1.6 * u],
    ),
    "persona_voice_constraints": (
        sampler.BiasTokens, lambda e: e.dose * e.bias, lambda u, s, w: [s * 3.2 * u, -s * 1.6 * u],
    ),
    "contrastive_decoding": (sampler.Contrast, lambda e: e.dose * e.alpha, lambda u, s, w: 0.3 * u),
    "exponential_decay_kv": (memory.DecayKV, lambda e: e.dose * e.rate, lambda u, s, w: 0.3 * u),
    "kv_decay": (memory.DecayValues, lambda e: e.dose * e.rate, lambda u, s, w: 0.15 * u),
    "truncation_kv": (
        memory.WindowKV,
        # A window of no dose has no end.
        lambda e: max(round(float(e.width / e.dose)), 1) if e.dose else math.inf,
        lambda u, s, w: max(round(20 / u), 1) if u else math.inf,
    ),
    "stride_compression_kv": (
        memory.StrideKV,
        lambda e: [e.stride, -e.dose * e.loss],
        lambda u, s, w: [1 + round(5 * w), -8 * u / w],
    ),
    "segment_gains_kv": (
        memory.SegmentKV,
        lambda e: [e.dose * e.recent_gain, e.dose * e.old_gain, e.recent_rate, e.old_rate],
        lambda u, s, w: [s * 0.5 * u, -s * 0.25 * u, 0, 0],
    ),
    "head_masking_dropout": (
        attention.DropHeads, lambda e: min(1, e.dose * e.probability), lambda u, s, w: min(1, 0.4 * u),
    ),
    "head_reweighting": (
        attention.ScaleHeads, lambda e: max(0, 1 + e.dose * e.change), lambda u, s, w: max(0, 1 + s * 0.5 * u),
    ),
    "attention_oscillation": (attention.OscillateAttention, lambda e: e.dose * e.amplitude, lambda u, s, w: 0.2 * u),
    "attention_sinks_anchors": (attention.AnchorAttention, lambda e: e.dose * e.bias, lambda u, s, w: s * 0.4 * u),
    "positional_bias_tweak": (attention.BiasPositions, lambda e: e.dose * e.bias, lambda u, s, w: s * 0.3 * u),
    "steering": (steering.Steer, lambda e: e.dose * e.coefficients, lambda u, s, w: s * 0.3 * u),
    "random_direction": (steering.Steer, lambda e: e.dose * e.coefficients, lambda u, s, w: s * 0.3 * u),
    "random_orthogonal_steering": (steering.Steer, lambda e: e.dose * e.coefficients, lambda u, s, w: s * 0.3 * u),
    "layer_wise_gain": (residual.GainLayers, lambda e: e.dose * e.gain, lambda u, s, w: s * 0.3 * u),
    "noise_injection": (residual.NoiseInResidual, lambda e: e.dose * e.scale, lambda u, s, w: 0.02 * u),
    "soft_projection": (steering.SoftProjection, lambda e: e.dose * e.share, lambda u, s, w: 0.2 * u),
    "lexical_jitter": (inputs.JitterEmbeddings, lambda e: e.dose * e.scale, lambda u, s, w: 0.3 * u),
    "structured_prefaces": (inputs.Preface, lambda e: float(e.dose > 0), lambda u, s, w: float(u > 0)),
}  # fmt: skip

EVERY = [(name, direction) for name, rule in RULES.items() for direction in rule.directions]


def test_every_rule_is_tested():
    assert set(FORMULAS) == set(RULES)


@pytest.mark.parametrize("name, direction", EVERY)
def test_values_are_those_of_the_dose_table(name, direction):
    kind, seen, wanted = FORMULAS[name]
    sign = 1 if direction == "up" else -1
    for weight in (0.1, 0.45, 1.0):
        for dose in (0.0, 0.3, 1.0, 2.0, 4.5):
            effect = one(name, weight, direction, **NEEDED.get(name, {})).at(dose)
            assert type(effect) is kind
            assert kind is inputs.Preface or kind.touches(RULES[name].site)
            np.testing.assert_allclose(seen(effect), wanted(weight * dose, sign, weight), rtol=1e-5, atol=1e-6)


def figures(text: str) -> list[float]:
    return [float(figure) for figure in re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", text)]


@pytest.mark.parametrize("name, direction", EVERY)
def test_the_printed_number_is_the_built_one(name, direction):
    _, seen, _ = FORMULAS[name]
    for weight in (0.1, 0.45, 1.0):
        for dose in (0.3, 1.0, 4.5):
            effect = one(name, weight, direction, **NEEDED.get(name, {})).at(dose)
            said = RULES[name].number(weight * dose, direction == "up", weight)
            built = np.atleast_1d(seen(effect)).tolist()
            if name == "structured_prefaces":
                assert said == "present"
            elif name == "layer_wise_gain":  # "gain 1 +0.3 / number of layers"
                np.testing.assert_allclose(figures(said), [1, *built], rtol=1e-3)
            elif name == "head_masking_dropout":
                fixed = one(name, weight, heads=[0]).at(dose)
                gain = max(0, 1 + fixed.dose * fixed.change)
                np.testing.assert_allclose(figures(said), [*built, gain], rtol=1e-3, atol=1e-6)
            elif name == "risk_preference_steering":
                other = one(name, weight, direction, preference="cautious").at(dose)
                np.testing.assert_allclose(figures(said), [*built, *np.atleast_1d(seen(other))], rtol=1e-3)
            else:  # it may say less than there is: the words' bias without that of their opposites
                found = figures(said)
                assert found
                np.testing.assert_allclose(found, built[: len(found)], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name, direction", EVERY)
@pytest.mark.parametrize("weight", [0, 5e-324, 1e-30])
def test_the_smallest_weights_are_no_error(name, direction, weight):
    one(name, weight, direction, **NEEDED.get(name, {})).at(1.0)
    assert RULES[name].number(weight, direction == "up", weight)


def test_a_fixed_set_of_heads_fades_out():
    for weight, dose in ((0.5, 1.0), (1.0, 0.5), (0.5, 3.0)):
        effect = one("head_masking_dropout", weight, heads=[0]).at(dose)
        assert type(effect) is attention.ScaleHeads
        assert max(0, 1 + effect.dose * effect.change) == pytest.approx(max(0, 1 - weight * dose))


def test_packs_steer_relative_to_the_residual():
    for name in ("steering", "random_direction", "random_orthogonal_steering"):
        assert one(name, 0.5, **NEEDED.get(name, {})).coef == "relative"


# --- The shipped packs ------------------------------------------------------------------------------------------------


def test_shipped_packs_load_and_say_what_they_are():
    names = nmjax.list_packs()
    assert len(CORE) == 31 and set(CORE) <= set(names)
    for name in names:
        pack, spec = nmjax.load_pack(name), spec_of(name)
        assert pack.name == name == spec["name"] and pack.category and pack.description.endswith("."), name
        assert list(packs._validator().iter_errors(spec)) == []
        assert len(pack.effects) == len(spec["effects"]) and pack.notes() == []


def test_the_committed_schema_is_the_code():
    assert json.loads((ROOT / "nmjax" / "data" / "pack.schema.json").read_text(encoding="utf-8")) == packs.schema()


def test_sharper_attention_comes_with_its_companion_and_no_nucleus_goes_up():
    for name in nmjax.list_packs():
        entries = spec_of(name)["effects"]
        weights = [e["weight"] for e in entries if (e["effect"], e["direction"]) == ("qk_score_scaling", "up")]
        assert [e["weight"] for e in entries if e["effect"] == "repetition_penalty"] == weights, name
        assert ("top_p", "up") not in [(e["effect"], e["direction"]) for e in entries]


def numbers_of(pack) -> dict:
    """The number of every effect as its formula reads it."""
    entries = spec_of(pack.name)["effects"]
    return {e["effect"]: float(FORMULAS[e["effect"]][1](f)) for f, e in zip(pack.effects, entries, strict=True)}


def test_cocaine_and_its_doses():
    pack = nmjax.load_pack("cocaine")
    assert numbers_of(pack) == pytest.approx(
        {
            "qk_score_scaling": 1.9,
            "repetition_penalty": 1.15 * 0.45,
            "top_p": 1 - 0.3 * 0.35,
            "temperature": 0.7,
            "steering": 0.3 * 0.35,
            "frequency_penalty": 0.5 * 0.2,
        }
    )
    (qk,) = (effect for effect in pack.effects if isinstance(effect, attention.ScaleQK))
    assert qk.layers == "mid" and qk.heads == "induction" and qk.on_empty == "middle"
    for percent, dose in ((10, 0.1), (50, 0.5), (100, 1.0)):
        weak = nmjax.load_pack(f"cocaine_{percent}")
        assert numbers_of(weak) == pytest.approx(numbers_of(pack.at(dose)))
        for a, b in zip(spec_of(f"cocaine_{percent}")["effects"], spec_of("cocaine")["effects"], strict=True):
            assert a["weight"] == pytest.approx(b["weight"] * dose, rel=1e-12)
            assert {k: v for k, v in a.items() if k != "weight"} == {k: v for k, v in b.items() if k != "weight"}
    assert nmjax.load_pack("none").effects == ()


def test_the_example_of_the_methodology(tmp_path):
    path = tmp_path / "caffeine.json"
    spec = {
        "name": "caffeine",
        "description": "Sharper attention in the middle, a narrower nucleus.",
        "effects": [
            {"effect": "qk_score_scaling", "weight": 0.6, "direction": "up", "parameters": {"layers": "mid"}},
            {"effect": "top_p", "weight": 0.5, "direction": "down"},
        ],
    }
    path.write_text(json.dumps(spec))
    pack = nmjax.load_pack(path)
    sharper, narrower = pack.effects
    np.testing.assert_allclose([factor(sharper), 1 - narrower.cut], [2.2, 0.85], rtol=1e-6)
    assert (pack.name, pack.category, sharper.layers) == ("caffeine", "", "mid")


# --- What can't be honoured -------------------------------------------------------------------------------------------

GOOD = dict(effect="qk_score_scaling", weight=0.5)
STEER = dict(effect="steering", weight=0.5)
PREFACE = dict(effect="structured_prefaces", weight=1, parameters=dict(preface_text="Hi."))
CONTRAST = dict(effect="contrastive_decoding", weight=0.5)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(effect="qk_scaling"), ["qk_scaling", "qk_score_scaling"]),
        (dict(effect=["top_p"]), ["effect=['top_p']"]),
        (dict(weight=1.5), ["weight=1.5", "0 to 1"]),
        (dict(weight=-0.1), ["weight=-0.1"]),
        (dict(weight="0.5"), ["weight='0.5'"]),
        (dict(weight=float("nan")), ["weight=nan"]),
        (dict(weight=float("inf")), ["weight=inf"]),
        (dict(weight=10**5000), ["weight=an integer of 16610 bits"]),
        (dict(weight=True), ["weight=True"]),
        (dict(weight=None), ["weight=None"]),
        (dict(direction="sideways"), ["direction='sideways'", "up"]),
        (dict(effect="top_p", direction="up"), ["top_p", "direction='up'", "down"]),
        (dict(effect="top_p"), ["top_p", "direction is missing", "down"]),
        (dict(effect="noise_injection", direction="down"), ["direction='down'", "up"]),
        (dict(parameters=dict(layer="mid")), ["layer", "layers"]),
        (dict(parameters=dict(layers="middle")), ["layers='middle'", "mid"]),
        (dict(parameters=[1]), ["parameters"]),
        (dict(strength=1), ["strength", "weight"]),
        ({3: 4}, ["field 3"]),
        (dict(where=dict(prompt_position=[1])), ["prompt_position"]),
        (dict(where=dict(prompt=0, generation="all")), ["where.prompt=0", "all"]),
        (dict(where=dict(prompt_window=[3, 1])), ["prompt_window"]),
        (PREFACE | dict(where=dict(prompt="all")), ["where"]),
        (STEER, ["vector"]),
        (STEER | dict(parameters=dict(steering_type="../calm")), ["steering_type='../calm'", "letters"]),
        (STEER | dict(parameters=dict(vector=[0, 0])), ["norm 0"]),
        (STEER | dict(parameters=dict(vector=[1, "a"])), ["vector"]),
        (dict(effect="exponential_decay_kv", parameters=dict(mode="linear")), ["mode='linear'", "logit"]),
        (dict(effect="pulsed_sampler", parameters=dict(pulse_interval=3, pulse_duration=4)), ["width"]),
        (dict(effect="style_affect_logit_bias", parameters=dict(opposites=["no"])), ["opposites"]),
        (dict(effect="style_affect_logit_bias", parameters=dict(bias_type="calm", words=["a"])), ["not both"]),
        (CONTRAST | dict(parameters=dict(against=[PREFACE])), ["against", "same tokens"]),
        (CONTRAST | dict(parameters=dict(against=[CONTRAST])), ["contrast"]),
        (CONTRAST | dict(parameters=dict(against=[])), ["against=[]"]),
        (CONTRAST | dict(parameters=dict(against=[GOOD | dict(weight=2)])), ["against", "weight=2"]),
    ],
)
def test_what_cannot_be_honoured_is_an_error_that_names_it(change, words):
    spec = dict(schema=1, name="broken", effects=[GOOD, GOOD | change])
    with pytest.raises(nmjax.PackError) as error:
        parse_pack(spec)
    for word in ("broken", "effects[1]", *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    "spec, word",
    [
        ([], "an object"),
        (None, "an object"),
        (dict(), "effects is missing"),
        (dict(effects=None), "effects=None"),
        (dict(schema=2, effects=[]), "schema=2"),
        (dict(effects=[], dose=1), "dose"),
        (dict(effects=["temperature"]), "temperature"),
        (dict(effects=[], description=3), "description"),
        (dict(effects=[], description="\ud800"), "description=.*surrogates"),
        (dict(effects=[], name="two\nlines", dose=1), r"pack 'two\\nlines': "),
        (dict(effects=[], name=""), "name=''"),
        (dict(effects=[GOOD] * 101), "101 effects"),
        (dict(effects=[CONTRAST, GOOD, CONTRAST]), r"effects\[2\] is a second contrastive_decoding"),
        (dict(effects={1, 2}), "JSON"),
    ],
)
def test_bad_packs_are_named(spec, word):
    with pytest.raises(nmjax.PackError, match=word):
        parse_pack(spec)


def test_whole_numbers_may_be_written_with_a_point():
    effect = one("soft_projection", 0.5, seed=2.0)
    assert effect.subspace == (None, 2) and type(effect.subspace[1]) is int


def test_load_pack_reads_paths_and_says_what_is_missing(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(dict(schema=1, name="mine", effects=[GOOD])))
    assert nmjax.load_pack(path).name == nmjax.load_pack(str(path)).name == "mine"
    path.write_text("{")
    with pytest.raises(nmjax.PackError, match="mine.json"):
        nmjax.load_pack(path)
    with pytest.raises(nmjax.PackError, match="absent.json"):
        nmjax.load_pack(tmp_path / "absent.json")
    with pytest.raises(nmjax.PackError, match="cocaine_50"):  # the names there are
        nmjax.load_pack("cocain")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0", "a\0.json", "a" * 5000, "a" * 5000 + ".json", 3, None])
def test_names_that_cannot_be_are_named(name):
    with pytest.raises(nmjax.PackError):
        nmjax.load_pack(name)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "JSON"),
        (b"\xff\xfe{}", "text"),
        (b'{"effects": [], "effects": []}', "'effects' occurs 2 times"),
        (b'{"effects": [{"effect": "top_p", "weight": 0.1, "weight": 1}]}', "'weight' occurs 2 times"),
        (b'{"effects": [{"effect": "temperature", "weight": NaN}]}', "NaN"),
        (b'{"effects": [{"effect": "temperature", "weight": 1e999}]}', "weight=inf"),
        (b'{"effects": [{"effect": "temperature", "weight": ' + b"9" * 5000 + b"}]}", "JSON"),
        (b'{"effects": [], "description": "\\ud800"}', "surrogates"),
        (b"[" * 100_000, "nested|JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested"),
        (b'{"effects":' * 100_000 + b"1" + b"}" * 100_000, "bytes|nested"),
        (b'{"effects":' * 300 + b"1" + b"}" * 300, "nested deeper than 20"),
        (b" " * 1_000_001, "1000001 bytes, wanted at most 1000000"),
        (b"{" + b",".join(b'"%d":0' % i for i in range(80_000)) + b"}", "effects is missing"),
        (b'{"effects": [' + b",".join([b"0"] * 200_000) + b"]}", "200000 effects"),
        (b'\xef\xbb\xbf{"effects": []}', "JSON"),
    ],
)
def test_files_that_are_no_pack(tmp_path, content, words):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(nmjax.PackError, match=words) as error:
        nmjax.load_pack(path)
    assert "x" in str(error.value) and len(str(error.value)) < 1000
    assert time.monotonic() - start < 5  # a file of a megabyte can't stall the reader


def test_a_folder_named_like_a_pack(tmp_path, monkeypatch):
    (tmp_path / "packs" / "x.json").mkdir(parents=True)
    with pytest.raises(nmjax.PackError, match="x.json"):
        nmjax.load_pack(tmp_path / "packs" / "x.json")
    monkeypatch.setenv("NMJAX_HOME", str(tmp_path))
    assert "x" not in nmjax.list_packs()
    with pytest.raises(nmjax.PackError, match="no pack named 'x'"):
        nmjax.load_pack("x")


@pytest.fixture(scope="module", params=[lambda inner: [inner], lambda inner: {"effects": inner}])
def deep(request):
    """A value inside 100,000 lists or objects."""
    value = 1
    for _ in range(100_000):
        value = request.param(value)
    return value


@pytest.mark.parametrize("place", ["pack", "effects", "parameters", "against"])
def test_deep_objects_are_refused(deep, place):
    spec = {
        "pack": deep,
        "effects": {"effects": deep},
        "parameters": {"effects": [GOOD | dict(parameters=dict(layers=deep))]},
        "against": {"effects": [CONTRAST | dict(parameters=dict(against=deep))]},
    }[place]
    with pytest.raises(nmjax.PackError, match="nested deeper"):
        parse_pack(spec)
    if place == "against":
        with pytest.raises(nmjax.PackError, match="nested deeper"):
            packs.parse_effects(deep, "against")


# --- Malformed packs at random ----------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -(10**400), 10**4000, 2**63, 2**64])
    | st.floats()
    | st.text(st.characters(), max_size=8)  # surrogates, too
    | st.sampled_from(["all", "mid", "induction", "up", "down", "calm", "relative", "\ud800", "a\n", *RULES])
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
PARAMETERS = sorted({key for rule in RULES.values() for key in rule.parameters})
WHERE = sorted(packs._where_schema()["properties"])


def dictionaries(keys, values):
    return st.dictionaries(st.sampled_from(keys) | st.text(max_size=6), values, max_size=4)


WEIGHT = st.floats(0, 1) | st.sampled_from([0, 1, -0.1, 1.1, 5e-324])
ENTRY = st.fixed_dictionaries(
    {"effect": st.sampled_from(sorted(RULES)), "weight": WEIGHT},
    optional={
        "direction": st.sampled_from(["up", "down", "up ", ""]),
        "parameters": dictionaries(PARAMETERS, JSON),
        "where": dictionaries(WHERE, JSON | st.lists(st.integers(-3, 3) | st.none(), max_size=3)),
        "strength": JSON,
    },
)


def fuzz(examples: int):
    """The same examples every time; how many says `examples`."""
    return settings(
        deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=examples
    )


def survives(spec) -> None:
    """A pack loads whole, or there is a PackError that can be printed."""
    try:
        pack = parse_pack(spec)
    except nmjax.PackError as error:
        assert str(error).encode("utf-8")
    else:
        assert f"{pack.name}{pack.description}{pack.category}".encode()
        assert len(pack.effects) == len(spec["effects"])
        assert len(pack.at(0.7).content_hash()) == 64
        packs.needs(pack)


@fuzz(150)
@given(JSON)
def test_any_value_is_a_pack_or_an_error(spec):
    survives(spec)


@fuzz(250)
@given(st.lists(ENTRY | JSON, max_size=2) | JSON, dictionaries(["name", "description", "schema", "category"], JSON))
@example([GOOD], {"schema": True})
def test_any_effects_are_a_pack_or_an_error(entries, fields):
    survives({"effects": entries})
    survives(fields | {"effects": entries})


@fuzz(400)
@given(st.sampled_from(sorted(RULES)), st.data())
def test_any_value_of_a_known_parameter_is_honoured_or_an_error(name, data):
    entry = dict(effect=name, weight=data.draw(WEIGHT), direction=RULES[name].directions[0])
    known = {key: data.draw(JSON) for key in RULES[name].parameters if data.draw(st.booleans())}
    survives({"effects": [entry | dict(parameters=NEEDED.get(name, {}) | known)]})


def places(node, found=()):
    """Paths to every value inside."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, item in items:
        yield (*found, key)
        yield from places(item, (*found, key))


@fuzz(300)
@given(st.sampled_from([name for name in nmjax.list_packs() if name != "none"]), st.data())
def test_mutations_of_shipped_packs(name, data):
    spec = copy.deepcopy(spec_of(name))
    for _ in range(data.draw(st.integers(1, 2))):
        *above, last = data.draw(st.sampled_from(list(places(spec)) or [("effects",)]))
        holder = spec
        for key in above:
            holder = holder[key]
        kind = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "replace":
            holder[last] = data.draw(JSON)
        elif kind == "remove":
            holder.pop(last, None) if isinstance(holder, dict) else holder.pop(last)
        elif isinstance(holder, dict):
            holder[data.draw(st.sampled_from(PARAMETERS) | st.text(max_size=5))] = data.draw(JSON)
        else:
            holder.append(data.draw(JSON))
    survives(spec)


@fuzz(300)
@given(st.sampled_from(nmjax.list_packs()), st.integers(0, 10**6), st.binary(max_size=4), st.integers(0, 6))
def test_mutations_of_shipped_files(tmp_path_factory, name, at, inserted, removed):
    content = (ROOT / "packs" / f"{name}.json").read_bytes()
    at %= len(content)
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_bytes(content[:at] + inserted + content[at + removed :])
    try:
        nmjax.load_pack(path)
    except nmjax.PackError as error:
        assert str(error).encode("utf-8")


# --- What a pack does -------------------------------------------------------------------------------------------------


def test_a_pack_in_a_file_can_say_where():
    entry = GOOD | dict(where=dict(generation="all"))
    (effect,) = parse_pack(dict(effects=[entry])).effects
    assert effect.where is not None
    entry = GOOD | dict(where=dict(prompt_window=[None, 3], exclude_prompt_positions=0))
    assert parse_pack(dict(effects=[entry])).effects[0].where is not None


def test_needs_look_into_what_is_contrasted():
    inner = [STEER | dict(parameters=dict(steering_type="calm")), GOOD]
    assert packs.needs(parse_pack(dict(effects=[CONTRAST | dict(parameters=dict(against=inner))]))) == (["calm"], True)
    assert packs.vectors_of([nmjax.load_pack("lsd"), nmjax.load_pack("cocaine")]) == [
        "associative", "ego_thin", "salient", "synesthesia", "visionary",
    ]  # fmt: skip


@pytest.mark.parametrize("dose", [-0.1, float("inf"), float("nan"), "1", None, [0.5]])
def test_bad_doses_are_named(dose):
    with pytest.raises(ValueError, match="dose="):
        nmjax.load_pack("cocaine").at(dose)


def test_doses_multiply_and_extrapolation_is_noted():
    pack = nmjax.load_pack("cocaine")
    assert pack.at(0.5).at(0.5).effects[0].dose == 0.25
    assert pack.at(1.0).notes() == []
    notes = pack.at(4.0).notes()
    assert sum("extrapolates beyond 1" in note for note in notes) == 6
    assert any("temperature" in note and "0.05" in note for note in notes)
