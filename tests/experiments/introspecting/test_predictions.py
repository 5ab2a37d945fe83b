"""Verdicts from planted findings: what supports a prediction, what contradicts it, and what leaves it open."""

import pytest

from experiments.introspecting.predictions import verdicts


def bias(value, low, high, verdict):
    test = {"margin": 0.05, "interval_90": [low + 0.01, high - 0.01], "verdict": verdict}
    return {"value": value, "self": value, "control": 0.0, "interval": [low, high], "equivalence": test}


def behavior(food="equivalent", difference="equivalent", original=(0.1, 0.3)):
    return {
        "behavior": {
            "bias": {
                "original": bias(0.2, *original, "different"),
                "vague_prompt": bias(0.2, 0.1, 0.3, "different"),
                "food_control": bias(0.01, -0.02, 0.04, food),
            },
            "bias_differences": {"vague_prompt - original": bias(0.0, -0.03, 0.03, difference)},
        }
    }


def report(low, high):
    rate = {"value": 0.9, "interval": [0.8, 0.95]}
    return {"auroc": {"value": (low + high) / 2, "interval": [low, high]}, "tpr": rate, "fpr": rate}


def detection(name, low, high, wording="original", variant=None):
    entry = {"subject": name, "variant": variant or name, "wording": wording}
    return {"detection": {"subjects": [entry | {"detection": {"held_out": report(low, high)}}]}}


def accuracy(low, high):
    return {"flipped_labels": {"test": {"accuracy on held-out records": {"value": 0.5, "interval": [low, high]}}}}


def test_behavior():
    found = {v.claim.split()[0]: v.verdict for v in verdicts(behavior(), {})}
    assert found == {"food_control": "supported", "vague_prompt": "supported"}
    found = [v.verdict for v in verdicts(behavior("different", "undecided"), {})]
    assert found == ["contradicted", "undecided"]
    without = verdicts(behavior(original=(-0.1, 0.3)), {})[1]
    assert without.verdict == "undecided" and "no bias above 0 that it could be similar to" in without.because


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.6, 0.9, "supported"), (0.4, 0.58, "contradicted"), (0.45, 0.8, "undecided")]
)
def test_detectors(low, high, verdict):
    (found,) = verdicts(detection("r1_minimal", low, high), {})
    assert found.verdict == verdict and "r1_minimal" in found.claim


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.44, 0.56, "supported"), (0.7, 0.9, "contradicted"), (0.1, 0.3, "contradicted"), (0.45, 0.7, "undecided")],
)
def test_controls(low, high, verdict):
    (food,) = verdicts(detection("food_control", low, high), {})
    (flipped,) = verdicts(detection("flipped_labels", low, high), accuracy(0.45, 0.55))
    assert food.verdict == flipped.verdict == verdict
    if verdict == "supported":  # an accuracy off chance leaves it open all the same
        assert verdicts(detection("flipped_labels", low, high), accuracy(0.55, 0.6))[0].verdict == "undecided"


def test_vague_prompt_is_judged_in_its_own_words():
    findings = detection("vague_prompt", 0.4, 0.5)
    findings["detection"]["subjects"] += detection("vague_prompt", 0.8, 0.9, "vague_prompt")["detection"]["subjects"]
    (found,) = verdicts(findings, {})
    assert found.verdict == "supported"


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [([-2, -1], "supported"), ([0.5, 1], "contradicted"), ([-1, 1], "undecided"), (None, "undecided")],
)
def test_self_calibration(interval, verdict):
    change = {"value": None if interval is None else sum(interval) / 2, "interval": interval, "n": 10}
    flat = {"value": 0.0, "interval": [-1, 1], "n": 10}
    one_sided = verdict if verdict == "contradicted" else "undecided"  # better at one of the two is not enough
    for stated, own, same, wanted in (
        (change, flat, flat, (verdict, "undecided")),
        (flat, change, change, ("undecided", verdict)),
        (flat, change, flat, ("undecided", one_sided)),
        (flat, flat, change, ("undecided", one_sided)),
    ):
        foretold = {"versus_base": {"original": own}, "advantage": {"original": same}}
        found = {"versus_base": {"original": {"kl_actual_stated": stated}}, "foretold": foretold}
        assert tuple(v.verdict for v in verdicts({"self_calibration": found}, {})) == wanted


def test_localization():
    def task(low, high, q, kind="layers"):
        one = {"balanced_accuracy": {"value": (low + high) / 2, "interval": [low, high]}, "p_adjusted": q}
        return {"name": f"{kind}, untrained", "answers": ["a", "b", "c"], "subjects": {"base": one, "original": one}}

    def verdict(*tasks):
        return verdicts({"localization": {"tasks": list(tasks)}}, {})[0].verdict

    assert verdict(task(0.4, 0.6, 0.01), task(0.3, 0.4, 0.9, "sentence")) == "supported"
    assert verdict(task(0.35, 0.6, 0.2)) == "undecided"  # not after correction
    assert verdict(task(0.3, 0.4, 0.9)) == "contradicted"
    assert verdict(task(0.3, 0.5, 0.9)) == "undecided"
