"""Packs: the dose table's numbers, and no pack that is honoured only in part."""

import json

import numpy as np
import pytest

import nmjax
from nmjax.interventions import attention, memory, residual, sampler
from nmjax.packs import RULES, parse_pack


def one(effect: str, weight: float, direction: str = "up", **parameters):
    entry = dict(effect=effect, weight=weight, direction=direction, parameters=parameters)
    (built,) = parse_pack(dict(schema=1, name="test", effects=[entry])).effects
    return built


def factor(effect):
    return (1 + effect.dose * effect.gain) / (1 + effect.dose * effect.loss)


@pytest.mark.parametrize("dose", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("weight", [0.1, 0.45, 1.0])
def test_values_are_those_of_the_dose_table(weight, dose):
    u = weight * dose
    close = lambda seen, wanted: np.testing.assert_allclose(seen, wanted, rtol=1e-5, atol=1e-7)  # noqa: E731
    close(factor(one("qk_score_scaling", weight).at(dose)), 1 + 2 * u)
    close(factor(one("qk_score_scaling", weight, "down").at(dose)), 1 / (1 + 2 * u))
    for direction, wanted in (("up", 1 + u), ("down", max(0.05, 1 - u))):
        effect = one("temperature", weight, direction).at(dose)
        close(max(effect.floor, 1 + effect.dose * effect.change), wanted)
    effect = one("top_p", weight, "down").at(dose)
    close(max(effect.floor, 1 - effect.dose * effect.cut), max(0.1, 1 - 0.3 * u))
    effect = one("frequency_penalty", weight).at(dose)
    close(effect.dose * effect.penalty, 0.5 * u)
    effect = one("exponential_decay_kv", weight).at(dose)
    close(effect.dose * effect.rate, 0.3 * u)
    effect = one("head_masking_dropout", weight, heads=[0]).at(dose)
    close(effect.dose, u)
    effect = one("steering", weight, "down", vector=[1.0, 0.0]).at(dose)
    close(effect.dose * effect.coefficients, -0.3 * u)
    assert effect.coef == "relative"


def test_every_rule_builds_its_transform():
    built = {
        "qk_score_scaling": (attention.ScaleQK, {}),
        "temperature": (sampler.Temperature, {}),
        "top_p": (sampler.TopP, {}),
        "frequency_penalty": (sampler.FrequencyPenalty, {}),
        "exponential_decay_kv": (memory.DecayKV, {}),
        "head_masking_dropout": (attention.ScaleHeads, dict(heads=[0])),
        "steering": (residual.Steer, dict(vector=[1.0])),
    }
    assert set(built) == set(RULES)
    for name, (kind, parameters) in built.items():
        effect = one(name, 0.5, RULES[name].directions[0], **parameters)
        assert type(effect) is kind and effect.touches(RULES[name].site)


def test_cocaine_is_the_two_knobs_and_its_doses():
    pack = nmjax.load_pack("cocaine")
    qk, heat = pack.effects
    np.testing.assert_allclose([factor(qk), 1 + heat.change], [1 + 2 * 0.45, 1 - 0.3], rtol=1e-6)
    assert qk.layers == "mid" and qk.heads is None
    for percent in (10, 50, 100):
        weak = nmjax.load_pack(f"cocaine_{percent}").effects
        same = pack.at(percent / 100).effects
        np.testing.assert_allclose(factor(weak[0]), factor(same[0]), rtol=1e-6)
        np.testing.assert_allclose(weak[1].dose * weak[1].change, same[1].dose * same[1].change, rtol=1e-6)
    assert nmjax.load_pack("none").effects == ()


GOOD = dict(effect="qk_score_scaling", weight=0.5)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(effect="qk_scaling"), ["qk_scaling", "qk_score_scaling"]),
        (dict(weight=1.5), ["weight=1.5", "0 to 1"]),
        (dict(weight=-0.1), ["weight=-0.1"]),
        (dict(weight="0.5"), ["weight='0.5'"]),
        (dict(weight=float("nan")), ["weight=nan"]),
        (dict(weight=True), ["weight=True"]),
        (dict(direction="sideways"), ["direction='sideways'", "up"]),
        (dict(effect="top_p", direction="up"), ["top_p", "direction='up'", "down"]),
        (dict(parameters=dict(layer="mid")), ["layer", "layers"]),
        (dict(parameters=[1]), ["parameters"]),
        (dict(strength=1), ["strength", "weight"]),
        (dict(where=dict(prompt_position=[1])), ["prompt_position"]),
        (dict(effect="steering", parameters={}), ["vector"]),
        (dict(effect="exponential_decay_kv", parameters=dict(mode="linear")), ["mode='linear'", "logit"]),
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
        ([], "list"),
        (dict(effects=None), "effects=None"),
        (dict(schema=2, effects=[]), "schema=2"),
        (dict(effects=[], dose=1), "dose"),
        (dict(effects=["temperature"]), "temperature"),
        (dict(effects=[], description=3), "description"),
    ],
)
def test_bad_packs_are_named(spec, word):
    with pytest.raises(nmjax.PackError, match=word):
        parse_pack(spec)


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


def test_a_pack_in_a_file_can_say_where():
    entry = GOOD | dict(where=dict(generation="all"))
    (effect,) = parse_pack(dict(effects=[entry])).effects
    assert effect.where is not None


@pytest.mark.parametrize("dose", [-0.1, float("inf"), float("nan"), "1", None, [0.5]])
def test_bad_doses_are_named(dose):
    with pytest.raises(ValueError, match="dose="):
        nmjax.load_pack("cocaine").at(dose)


def test_doses_multiply_and_extrapolation_is_noted():
    pack = nmjax.load_pack("cocaine")
    assert pack.at(0.5).at(0.5).effects[0].dose == 0.25
    assert pack.at(1.0).notes() == []
    notes = pack.at(4.0).notes()
    assert sum("extrapolates beyond 1" in note for note in notes) == 2
    assert any("temperature" in note and "0.05" in note for note in notes)
