"""The battery: its numbers are the single metrics', its intervals are paired and cover."""

import json

import numpy as np
import pytest

from nmjax.metrics import battery, calibration, stats
from nmjax.report.results import dump_json

ALL = {**battery.MEANS, "ece": calibration.ece, "mce": calibration.mce}


def study(rng, n, temperatures=(1.0, 0.7)):
    """Conditions [P, n, 4] that share their logits and differ in temperature, the first one calibrated; labels [n]."""
    z = 2.0 * rng.normal(size=(n, 4))
    probs = np.exp(z[None] / np.array(temperatures)[:, None, None])
    probs /= probs.sum(axis=-1, keepdims=True)
    labels = np.minimum((rng.random((n, 1)) > probs[0].cumsum(axis=1)).sum(axis=1), 3)
    return probs, labels


def test_profiles_hold_the_single_metrics():
    probs, labels = study(np.random.default_rng(0), 300)
    strata = np.arange(300) % 5
    measured = battery.measure(probs, labels, draws=200, seed=3, strata=strata)
    for p, profile in zip(probs, measured.profiles, strict=True):
        for name, metric in ALL.items():
            assert profile[name] == pytest.approx(float(metric(p, labels)), abs=1e-12)
        assert profile["debiased_l2"] == calibration.debiased_l2(p, labels)
        assert profile["debiased_ece"] == calibration.debiased_ece(p, labels)
        correct = (p.argmax(axis=1) == labels).astype(float)
        expected = stats.mean_interval(correct, draws=200, seed=3, strata=strata)
        np.testing.assert_allclose(profile["intervals"]["accuracy"], expected, atol=1e-12)
        band = calibration.consistency_band(p.max(axis=1), draws=200, seed=3)
        null = profile["under_perfect_calibration"]["mce"]
        assert null["band"] == list(band.interval("mce")) and null["p_value"] == band.p_value("mce", profile["mce"])
        assert profile["num_samples"] == 300 == sum(b["count"] for b in profile["calibration_bins"].values())
        assert profile["calibration_bins"]["bin_0"]["accuracy"] is None, "confidence of four choices is at least 1/4"
    json.loads(dump_json(measured.profiles))


def test_differences_are_paired_and_from_the_baseline():
    probs, labels = study(np.random.default_rng(1), 300, (1.0, 0.7, 1.0))
    measured = battery.measure(probs, labels, baseline=1, draws=300, seed=5)
    assert measured.differences[1] is None
    confidence = probs.max(axis=-1)
    np.testing.assert_allclose(
        measured.differences[0]["confidence"]["interval"],
        stats.paired_interval(confidence[0], confidence[1], draws=300, seed=5),
        atol=1e-12,
    )
    assert measured.differences[0]["ece"]["difference"] == measured.profiles[0]["ece"] - measured.profiles[1]["ece"]
    # Temperature moves no argmax: accuracy is equal in every draw, whatever its own interval.
    assert measured.differences[0]["accuracy"] == {"difference": 0.0, "interval": [0.0, 0.0]}
    assert measured.differences[0] == measured.differences[2]


def test_intervals_of_differences_cover():
    """ECE's difference is covered although the calibrated side's ECE is nearly all bias."""
    probs, labels = study(np.random.default_rng(0), 500_000)
    truth = {name: float(metric(probs[1], labels) - metric(probs[0], labels)) for name, metric in ALL.items()}
    trials, covered = 150, dict.fromkeys(ALL, 0)
    for trial in range(trials):
        probs, labels = study(np.random.default_rng([2, trial]), 250)
        difference = battery.measure(probs, labels, draws=200, seed=trial).differences[1]
        for name in ALL:
            low, high = difference[name]["interval"]
            covered[name] += low - 1e-12 <= truth[name] <= high + 1e-12
    for name in ALL:
        upper = 1.0 if name in ("accuracy", "ece", "mce") else 0.985  # accuracy's is exact here, the others cautious
        assert 0.91 <= covered[name] / trials <= upper, f"{name}: covered in {covered[name] / trials} of the trials"


def test_same_seed_same_bytes():
    probs, labels = study(np.random.default_rng(2), 80)
    first, second, other = (dump_json(battery.measure(probs, labels, draws=100, seed=s).profiles) for s in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize(
    ("probs", "baseline", "message"),
    [(np.ones((2, 3)), 0, r"probs has shape \(2, 3\)"), (np.full((1, 3, 2), 0.5), 1, "baseline is 1; wanted 0 to 0")],
)
def test_bad_input_is_named(probs, baseline, message):
    with pytest.raises(ValueError, match=message):
        battery.measure(probs, [0, 0, 0], baseline=baseline)
