"""The battery: its numbers are the single metrics', its intervals are paired and cover."""

import json

import numpy as np
import pytest
import scipy.stats

from nmjax.metrics import battery, calibration, paired, ranking, smooth, stats, trend
from nmjax.report.results import dump_json

ALL = {
    "accuracy": calibration.accuracy,
    "confidence": calibration.mean_confidence,
    "overconfidence": calibration.overconfidence,
    "brier_score": calibration.brier_top_label,
    "brier_multiclass": calibration.brier_multiclass,
    "nll": calibration.nll,
    "entropy": calibration.entropy,
    "ece": calibration.ece,
    "mce": calibration.mce,
    "auroc": ranking.auroc,
    "auprc": ranking.auprc,
}


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
        assert profile["ece_15"] == calibration.ece(p, labels, n_bins=15) != profile["ece"]
        assert profile["ece_equal_mass"] == calibration.ece_equal_mass(p, labels) != profile["ece"]
        assert profile["classwise_ece"] == calibration.classwise_ece(p, labels)
        assert profile["smooth_ece"] == smooth.smooth_ece(p, labels)
        assert profile["overconfident_part"] + profile["underconfident_part"] == pytest.approx(profile["ece"])
        assert profile["answers_held_at"] == calibration.answers_held_at(p, labels)
        assert profile["debiased_l2"] == calibration.debiased_l2(p, labels)
        assert profile["debiased_ece"] == calibration.debiased_ece(p, labels)
        correct = (p.argmax(axis=1) == labels).astype(float)
        expected = stats.mean_interval(correct, draws=200, seed=3, strata=strata)
        np.testing.assert_allclose(profile["intervals"]["accuracy"], expected, atol=1e-12)
        expected = stats.percentile_interval(
            stats.bootstrap(lambda w, p=p: ranking.auroc(p, labels, w), 300, 200, 3, strata)
        )
        np.testing.assert_allclose(profile["intervals"]["auroc"], expected)
        fine = calibration.consistency_band(p.max(axis=1), 15, draws=200, seed=3)
        assert profile["under_perfect_calibration"]["ece_15"]["band"] == list(fine.interval("ece"))
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
    auroc = [ranking.auroc(p, labels) for p in probs]
    assert measured.differences[0]["auroc"]["difference"] == auroc[0] - auroc[1] != 0


def test_tests_are_the_paired_ones_and_adjusted_over_the_whole_family():
    probs, labels = study(np.random.default_rng(3), 200, (1.0, 0.97, 1.0, 0.8))
    labels = np.where(np.arange(200) % 10 == 0, probs[3].argmin(axis=1), labels)  # room for accuracy to differ
    probs[3, ::2] = np.roll(probs[3, ::2], 1, axis=-1)
    measured = battery.measure(probs, labels, baseline=2, draws=50, seed=6)
    assert "tests" not in (measured.differences[2] or {}) and measured.differences[0]["family_size"] == 15
    correct = probs.argmax(axis=-1) == labels
    confidence, chosen = probs.max(axis=-1), probs[:, np.arange(200), labels]
    per_question = {
        "brier_score": (confidence - correct) ** 2,
        "nll": -np.log(chosen),
        "confidence": confidence,
        "entropy": scipy.stats.entropy(probs, axis=-1),
    }
    p_values, adjusted = [], []
    for k in (0, 1, 3):
        tests = measured.differences[k]["tests"]
        assert set(tests) == {"accuracy", *per_question}
        assert tests["accuracy"]["test"] == "mcnemar"
        assert tests["accuracy"]["p_value"] == paired.mcnemar(correct[k], correct[2])
        for name, values in per_question.items():
            change = values[k] - values[2]
            assert tests[name]["test"] == "sign_flip"
            assert tests[name]["p_value"] == float(paired.sign_flip(change, seed=6))
            assert tests[name]["d_z"] == (pytest.approx(paired.cohen_dz(change)) if k else None)
        p_values += [test["p_value"] for test in tests.values()]
        adjusted += [test["p_adjusted"] for test in tests.values()]
    assert set(p_values[:5]) == {1.0}, "the first condition is the baseline again"
    assert min(p_values) < 0.001 and p_values[10] < 0.001, "the last one was meant to be found, its accuracy too"
    np.testing.assert_allclose(adjusted, scipy.stats.false_discovery_control(p_values))
    assert (np.array(adjusted) > p_values).any()


def test_more_statistics_can_be_made_of_the_same_draws():
    doses = [0.0, 0.5, 1.0]
    probs, labels = study(np.random.default_rng(4), 150, (1.0, 0.8, 0.6))
    strata = np.arange(150) % 3
    measured = battery.measure(probs, labels, draws=100, seed=8, strata=strata)
    assert measured.samples.shape == (100, 3, len(battery.NAMES))
    for name in battery.MEANS:
        estimates, samples, largest_bias = measured.of(name)
        expected = trend.trend(doses, measured.questions[name], 100, 8, strata)
        found = trend.trend_of_samples(doses, estimates, samples)
        assert found["slope"] == pytest.approx(expected["slope"], abs=1e-12)
        np.testing.assert_allclose(found["interval"], expected["interval"], atol=1e-12)
        assert not largest_bias.any()
    weights = next(stats.bootstrap_weights(150, 100, 8, strata))
    estimates, samples, largest_bias = measured.of("ece")
    np.testing.assert_allclose(samples[:, 1], calibration.ece(probs[1], labels, weights), atol=1e-12)
    slope = trend.trend_of_samples(doses, estimates, samples, largest_bias)
    assert largest_bias[0] > 0 and slope["slope"] == pytest.approx(estimates[2] - estimates[0])
    # Of three even doses the slope is the last less the first, and so is its interval.
    np.testing.assert_allclose(slope["interval"], measured.differences[2]["ece"]["interval"], atol=1e-12)


def test_what_is_undefined_is_none():
    probs = np.array([[[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]], [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]]])
    measured = battery.measure(probs, [0, 0, 1], draws=100)
    alone, other = measured.profiles  # the first one has all answers right
    assert alone["auroc"] is None and alone["intervals"]["auroc"] is None and alone["auprc"] == 1.0
    assert other["auroc"] == 0.5 and other["intervals"]["auroc"] is not None
    assert np.isnan(measured.of("auroc")[1][:, 1]).any(), "some draws were meant to have right answers only"
    assert measured.differences[1]["auroc"] == {"difference": None, "interval": None}
    assert "NaN" not in dump_json([measured.profiles, measured.differences])
    assert battery.measure(probs[:1], [0, 0, 1], draws=10).differences == [None]


@pytest.mark.slow
def test_intervals_of_differences_cover():
    """ECE's difference is covered although the calibrated side's ECE is nearly all bias."""
    probs, labels = study(np.random.default_rng(0), 500_000)
    truth = {name: float(metric(probs[1], labels) - metric(probs[0], labels)) for name, metric in ALL.items()}
    trials, covered = 100, dict.fromkeys(ALL, 0)
    for trial in range(trials):
        probs, labels = study(np.random.default_rng([2, trial]), 250)
        difference = battery.measure(probs, labels, draws=200, seed=trial).differences[1]
        for name in ALL:
            low, high = difference[name]["interval"]
            covered[name] += low - 1e-12 <= truth[name] <= high + 1e-12
    for name in ALL:
        upper = 1.0 if name in ("accuracy", *battery.BINNED) else 0.985  # accuracy's is exact here, the others cautious
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
