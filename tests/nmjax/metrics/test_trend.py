"""Slopes against numpy's and scipy's, a peak against a loop over draws, and how often either cries wolf."""

import numpy as np
import pytest
import scipy.stats

from nmjax.metrics import paired, stats, trend

DOSES = np.array([0.0, 0.1, 0.25, 0.5, 1.0])


def curve(seed, means, n=120, noise=0.3):
    """Values [D, n] about `means` [D]: questions differ far more from each other than from dose to dose."""
    rng = np.random.default_rng(seed)
    return np.asarray(means)[:, None] + 2.0 * rng.normal(size=n) + noise * rng.normal(size=(len(means), n))


def test_trend_is_the_line_through_each_question():
    values, strata = curve(0, 0.3 * DOSES), np.arange(120) % 4
    found = trend.trend(DOSES, values, draws=500, seed=2, strata=strata)
    slopes = np.polyfit(DOSES, values, 1)[0]
    assert found["slope"] == pytest.approx(slopes.mean())
    assert found["slope"] == pytest.approx(scipy.stats.linregress(DOSES, values.mean(axis=1)).slope)
    np.testing.assert_allclose(found["interval"], stats.mean_interval(slopes, 500, 2, strata), atol=1e-12)
    assert found["p_value"] == float(paired.sign_flip(slopes, seed=2)) < 0.001
    assert found["interval"][0] < 0.3 < found["interval"][1]
    # Unpaired, the same effect drowns in the spread between questions.
    assert scipy.stats.linregress(np.repeat(DOSES, 120), values.ravel()).pvalue > 0.1


def test_trend_does_not_depend_on_the_order_and_units_of_doses():
    values = curve(1, 0.2 * DOSES)
    order = np.array([3, 0, 4, 1, 2])
    found = trend.trend(DOSES, values, draws=200)
    shuffled = trend.trend(DOSES[order], values[order], draws=200)
    percent = trend.trend(100 * DOSES, values, draws=200)
    assert shuffled["monotone"] == found["monotone"]
    for other, scale in ((shuffled, 1), (percent, 100)):
        np.testing.assert_allclose(scale * other["slope"], found["slope"])
        np.testing.assert_allclose(scale * np.array(other["interval"]), found["interval"])


@pytest.mark.parametrize(
    ("means", "expected"),
    [([0, 1, 1, 2], "rising"), ([2, 1, 1, 0], "falling"), ([1, 1, 1, 1], "flat"), ([0, 2, 1, 3], "neither")],
)
def test_monotone_is_about_the_means(means, expected):
    values = np.array(means)[:, None] + np.array([[0.1, -0.1, 0.2, -0.2]])
    assert trend.trend([0, 1, 2, 3], values, draws=50)["monotone"] == expected


def test_no_trend_is_found_where_there_is_none():
    trials = [trend.trend(DOSES, curve([2, k], np.zeros(5), n=40), draws=200, seed=k) for k in range(300)]
    covered = np.mean([t["interval"][0] <= 0 <= t["interval"][1] for t in trials])
    assert 0.91 < covered < 0.98
    assert 0.02 < np.mean([t["p_value"] <= 0.05 for t in trials]) < 0.085


def test_trend_of_samples_fits_each_draw():
    rng = np.random.default_rng(3)
    estimates = 0.1 + 0.2 * DOSES
    samples = estimates + 0.02 * rng.normal(size=(400, 5))
    found = trend.trend_of_samples(DOSES, estimates, samples)
    assert found["slope"] == pytest.approx(0.2)
    np.testing.assert_allclose(found["interval"], np.quantile(np.polyfit(DOSES, samples.T, 1)[0], [0.025, 0.975]))
    samples[::2, 1] = np.nan
    half = trend.trend_of_samples(DOSES, estimates, samples)
    np.testing.assert_allclose(half["interval"], np.quantile(np.polyfit(DOSES, samples[1::2].T, 1)[0], [0.025, 0.975]))
    assert trend.trend_of_samples(DOSES, estimates, np.full((9, 5), np.nan))["interval"] is None
    estimates[2] = np.nan
    assert trend.trend_of_samples(DOSES, estimates, samples) == {"slope": None, "interval": None}


def test_bias_that_differs_between_doses_is_allowed_for():
    """Every true value is 0.05; the estimates are off by a bias of up to 0.04 that shrinks with the dose."""
    rng = np.random.default_rng(4)
    largest = 0.04 * (1 - DOSES)
    estimates = 0.05 + largest
    samples = estimates + 0.001 * rng.normal(size=(500, 5))
    assert trend.trend_of_samples(DOSES, estimates, samples)["interval"][1] < 0, (
        "the bias was meant to look like a slope"
    )
    low, high = trend.trend_of_samples(DOSES, estimates, samples, largest)["interval"]
    assert low < 0 < high
    corners = [np.polyfit(DOSES, estimates - largest * np.array(corner), 1)[0] for corner in np.ndindex(2, 2, 2, 2, 2)]
    spread = np.ptp(np.quantile(np.polyfit(DOSES, samples.T, 1)[0], [0.025, 0.975])) / 2
    np.testing.assert_allclose([low, high], [min(corners) - spread, max(corners) + spread], atol=0.2 * spread)


def test_peak_within_the_range_is_found_and_its_fall_beyond():
    values, strata = curve(5, -((DOSES - 0.4) ** 2)), np.arange(120) % 3
    found = trend.peak(DOSES, values, draws=400, seed=1, strata=strata)
    weights = np.concatenate(list(stats.bootstrap_weights(120, 400, 1, strata)))
    winners = [DOSES[max(range(5), key=lambda d, w=w: float(w @ values[d]))] for w in weights]
    assert found["doses_in_interval"] == [d for d in DOSES if winners.count(d) >= 10]
    assert found["dose"] == DOSES[values.mean(axis=1).argmax()] in found["doses_in_interval"]
    assert found["dose_interval"] == [found["doses_in_interval"][0], found["doses_in_interval"][-1]]
    assert 0.25 <= found["dose"] <= 0.5 and 1 < len(found["doses_in_interval"]) < 5
    at = DOSES.tolist().index(found["dose"])
    assert found["difference"] == pytest.approx((values[4] - values[at]).mean())
    expected = stats.paired_interval(values[4], values[at], 400, 1, strata, level=1 - 0.05 / 4)
    np.testing.assert_allclose(found["interval"], expected)
    assert found["falls_beyond"] is True and found["interval"][1] < 0
    # What is best at its smallest is the mirror image, in any order of doses.
    mirrored = trend.peak(DOSES[::-1], -values[::-1], draws=400, seed=1, strata=strata, largest=False)
    assert mirrored["falls_beyond"] is True
    assert mirrored["doses_in_interval"] == found["doses_in_interval"]
    np.testing.assert_allclose(mirrored["interval"], -np.array(found["interval"])[::-1])


def test_peak_at_the_largest_dose_cannot_fall_beyond_and_ties_are_all_best():
    found = trend.peak(DOSES, curve(6, DOSES), draws=200)
    assert found["dose"] == 1.0 and found["doses_in_interval"] == [1.0]
    assert found["falls_beyond"] is found["difference"] is found["interval"] is None
    same = np.tile(np.random.default_rng(7).normal(size=50), (5, 1)) * (1 + np.arange(5)[:, None] * 1e-16)
    found = trend.peak(DOSES, same, draws=200)
    assert found["dose"] == 0.0 and found["doses_in_interval"] == DOSES.tolist() and found["falls_beyond"] is False


def test_peak_picked_from_noise_rarely_falls_beyond():
    """Five equal doses: the best-looking one is no better than the largest, whatever a plain interval says."""
    trials, falls, plain = 400, 0, 0
    for k in range(trials):
        values = curve([8, k], np.zeros(5), n=60)
        found = trend.peak(DOSES, values, draws=1000, seed=k)
        falls += found["falls_beyond"] is True
        if found["falls_beyond"] is not None:
            best = values.mean(axis=1).argmax()
            plain += stats.paired_interval(values[4], values[best], 1000, k)[1] < 0
    assert falls / trials < 0.05 < plain / trials


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trend.trend([0.5], [[1.0, 2.0]]), r"doses is \[0.5\]; wanted at least 2"),
        (lambda: trend.peak([1, 1], [[1.0, 2.0]] * 2), r"doses is \[1.0, 1.0\].*all different"),
        (lambda: trend.trend([0, 1], [[1.0, 2.0]]), r"values has shape \(1, 2\); wanted \[2, N\]"),
        (lambda: trend.peak([0, 1], [[1.0, 2.0], [1.0, np.nan]]), r"values\[1, 1\] is nan"),
        (lambda: trend.trend_of_samples([0, 1], [1.0, 2.0], [[1.0, 2.0, 3.0]]), r"samples \(1, 3\); wanted \[2\], \["),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
