"""Calibration metrics against scikit-learn, SciPy, a loop over answers and bins, and closed forms."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn import metrics as sk_metrics
from sklearn.calibration import calibration_curve

from nmjax.metrics import calibration


def sample(n, seed=0, sharpen=1.0, choices=4):
    """Labels drawn from softmax(z) and probabilities softmax(sharpen * z): calibrated where `sharpen` is 1."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(n, choices))
    truth = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    labels = np.minimum((rng.random((n, 1)) > truth.cumsum(axis=1)).sum(axis=1), choices - 1)
    probs = np.exp(sharpen * z)
    return probs / probs.sum(axis=1, keepdims=True), labels


def loop_gaps(probs, labels, n_bins):
    """(n_b, |mean confidence - accuracy|, mean confidence, accuracy) of each bin that is not empty, one at a time."""
    rows = []
    for b in range(n_bins):
        conf, right = [], []
        for p, y in zip(probs, labels, strict=True):
            top = max(range(len(p)), key=lambda c: p[c])
            if b / n_bins < p[top] <= (b + 1) / n_bins or (b == 0 and p[top] == 0):
                conf.append(p[top])
                right.append(float(top == y))
        if conf:
            c, a = sum(conf) / len(conf), sum(right) / len(right)
            rows.append((len(conf), abs(c - a), c, a))
    return rows


@pytest.mark.parametrize("n_bins", [1, 7, 10, 15])
@pytest.mark.parametrize("sharpen", [0.5, 1.0, 2.0])
def test_binned_metrics_equal_a_loop(n_bins, sharpen):
    probs, labels = sample(300, seed=n_bins, sharpen=sharpen)
    rows = loop_gaps(probs, labels, n_bins)
    np.testing.assert_allclose(
        calibration.ece(probs, labels, n_bins=n_bins), sum(n * g for n, g, _, _ in rows) / 300, atol=1e-12
    )
    np.testing.assert_allclose(calibration.mce(probs, labels, n_bins=n_bins), max(g for _, g, _, _ in rows), atol=1e-12)
    squared = sum(n / 300 * (g**2 - a * (1 - a) / (n - 1)) for n, g, _, a in rows if n > 1)
    np.testing.assert_allclose(calibration.debiased_l2_squared(probs, labels, n_bins), squared, atol=1e-12)
    bins = calibration.reliability_bins(probs, labels, n_bins)
    filled = bins.counts > 0
    np.testing.assert_allclose(
        np.stack([bins.counts, bins.confidence, bins.accuracy], axis=1)[filled],
        [(n, c, a) for n, _, c, a in rows],
        atol=1e-12,
    )
    assert np.isnan(bins.accuracy[~filled]).all() and bins.counts.sum() == 300


def test_against_scikit_learn():
    probs, labels = sample(500, sharpen=1.7)
    confidence, correct = probs.max(axis=1), (probs.argmax(axis=1) == labels).astype(float)
    np.testing.assert_allclose(
        calibration.brier_multiclass(probs, labels),
        sk_metrics.brier_score_loss(labels, probs, scale_by_half=False),
        atol=1e-12,
    )
    np.testing.assert_allclose(
        calibration.brier_top_label(probs, labels), sk_metrics.brier_score_loss(correct, confidence), atol=1e-12
    )
    np.testing.assert_allclose(calibration.nll(probs, labels), sk_metrics.log_loss(labels, probs), atol=1e-12)
    np.testing.assert_allclose(
        calibration.accuracy(probs, labels), sk_metrics.top_k_accuracy_score(labels, probs, k=1), atol=1e-12
    )
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=10)
    bins = calibration.reliability_bins(probs, labels)
    np.testing.assert_allclose(bins.accuracy[bins.counts > 0], accuracy, atol=1e-12)
    np.testing.assert_allclose(bins.confidence[bins.counts > 0], mean_confidence, atol=1e-12)


def test_closed_forms():
    # Four answers held at 0.8, three of them right; one held at 0.5, wrong.
    probs = [[0.8, 0.2], [0.8, 0.2], [0.2, 0.8], [0.8, 0.2], [0.5, 0.5]]
    labels = [0, 0, 1, 1, 1]
    assert calibration.accuracy(probs, labels) == pytest.approx(3 / 5)
    assert calibration.mean_confidence(probs, labels) == pytest.approx(3.7 / 5)
    assert calibration.overconfidence(probs, labels) == pytest.approx(0.7 / 5)
    assert calibration.ece(probs, labels) == pytest.approx((4 * 0.05 + 0.5) / 5)
    assert calibration.mce(probs, labels) == pytest.approx(0.5)
    assert calibration.brier_top_label(probs, labels) == pytest.approx((3 * 0.04 + 0.64 + 0.25) / 5)
    assert calibration.brier_multiclass(probs, labels) == pytest.approx(2 * (3 * 0.04 + 0.64 + 0.25) / 5)
    nll = -(3 * math.log(0.8) + math.log(0.2) + math.log(0.5)) / 5
    assert calibration.nll(probs, labels) == pytest.approx(nll)
    # The lone answer adds nothing to the debiased value; the four add (0.8 - 0.75)^2 - 0.75 * 0.25 / 3.
    assert calibration.debiased_l2_squared(probs, labels) == pytest.approx(0.8 * (0.0025 - 0.0625))
    assert calibration.debiased_l2(probs, labels) == 0.0


def test_bin_edges_belong_to_the_bin_below():
    assert calibration.bin_index([0.0, 1e-9, 0.1, np.nextafter(0.1, 1), 0.3, 0.7, 0.9, 1.0]).tolist() == [
        0, 0, 0, 1, 2, 6, 8, 9,
    ]  # fmt: skip
    for n_bins in (3, 10, 15, 20):
        edges = np.array([k / n_bins for k in range(1, n_bins + 1)])
        assert calibration.bin_index(edges, n_bins).tolist() == list(range(n_bins))


@pytest.mark.parametrize("n_bins", [10, 15])
@pytest.mark.parametrize("tied", [False, True])
def test_equal_mass_ece_equals_a_loop_over_quantiles(n_bins, tied):
    probs, labels = sample(7 * 30, seed=4, sharpen=1.6)
    if tied:  # to one decimal: a few values, each held by many
        top = np.round(probs.max(axis=1), 1)
        probs = np.stack([top, 1 - top], axis=1)
        probs[top == 0.5] = [0.51, 0.49]
        labels = labels % 2
    confidence, correct = calibration.top_label(probs, labels)
    ranked = sorted(confidence)
    upper = [ranked[math.ceil(len(ranked) * k / n_bins) - 1] for k in range(1, n_bins + 1)]  # quantiles
    member = np.array([next(b for b in range(n_bins) if c <= upper[b]) for c in confidence])
    np.testing.assert_array_equal(calibration.equal_mass_index(confidence, n_bins), member)
    counts = np.bincount(member, minlength=n_bins)
    assert (counts == 0).any() if tied else (counts == 210 // n_bins).all()
    weights = np.random.default_rng(0).random((3, 210))
    for w, value in zip(weights, calibration.ece_equal_mass(probs, labels, weights, n_bins), strict=True):
        gaps = [abs((w * (confidence - correct))[member == b].sum()) for b in range(n_bins)]
        assert value == pytest.approx(sum(gaps) / w.sum())
    assert calibration.ece_equal_mass(probs, labels, n_bins=n_bins) == pytest.approx(
        calibration.ece_equal_mass(probs, labels, np.full(210, 2.0), n_bins)
    )


def test_classwise_ece_is_the_mean_over_choices_of_a_binary_ece():
    probs, labels = sample(200, seed=6, sharpen=2.0)
    for n_bins in (10, 15):
        values = []
        for c in range(4):
            bins = [[] for _ in range(n_bins)]
            for p, y in zip(probs[:, c], labels, strict=True):
                bins[next(b for b in range(n_bins) if p <= (b + 1) / n_bins)].append(p - (y == c))
            values.append(sum(abs(sum(b)) for b in bins) / 200)
        assert calibration.classwise_ece(probs, labels, n_bins=n_bins) == pytest.approx(np.mean(values))


def test_entropy_is_that_of_scipy():
    probs, labels = sample(50)
    probs[0] = [1, 0, 0, 0]
    assert calibration.entropy(probs, labels) == pytest.approx(scipy_stats.entropy(probs, axis=1).mean())
    assert calibration.entropy(np.full((3, 4), 0.25), [0, 1, 2]) == pytest.approx(math.log(4))
    assert calibration.entropy([[1.0, 0.0], [0.5, 0.5]], [0, 0], [[3, 1], [0, 1]]) == pytest.approx(
        [math.log(2) / 4, math.log(2)]
    )


def test_the_parts_of_ece_are_its_over_and_its_underconfident_bins():
    # Held at 0.8: 4 answers, 2 right. Held at 0.6: 6 answers, all right.
    probs, labels = [[0.8, 0.2]] * 4 + [[0.6, 0.4]] * 6, [0, 0, 1, 1] + [0] * 6
    over, under = calibration.confidence_split(probs, labels)
    assert (over, under) == (pytest.approx(0.4 * 0.3), pytest.approx(0.6 * 0.4))
    for sharpen in (0.5, 1.0, 2.0):
        probs, labels = sample(300, sharpen=sharpen)
        weights = np.random.default_rng(2).random((4, 300))
        over, under = calibration.confidence_split(probs, labels, weights, n_bins=15)
        np.testing.assert_allclose(over + under, calibration.ece(probs, labels, weights, n_bins=15), atol=1e-12)
        gap = calibration.overconfidence(probs, labels, weights)
        np.testing.assert_allclose(over - under, gap, atol=1e-12)


def test_answers_held_at_a_threshold():
    probs = [[0.95, 0.05]] * 10 + [[0.9, 0.1]] * 5 + [[0.6, 0.4]] * 5
    labels = [0] * 9 + [1] + [0, 0, 0, 1, 1] + [1] * 5
    held = calibration.answers_held_at(probs, labels)
    assert [(row["threshold"], row["count"], row["right"]) for row in held] == [
        (0.9, 15, 12 / 15),
        (0.95, 10, 0.9),
        (0.99, 0, None),
    ]
    for row, right in zip(held, (12, 9), strict=False):
        low, high = scipy_stats.binomtest(right, row["count"]).proportion_ci(method="wilson")
        assert row["interval"] == pytest.approx([low, high])
    assert held[2]["interval"] is None
    assert calibration.answers_held_at(probs, labels, [0.5])[0]["right"] == pytest.approx(
        calibration.accuracy(probs, labels)
    )


@pytest.mark.parametrize("n", [1, 2, 30])
@pytest.mark.parametrize("right", [True, False])
def test_one_answer_and_all_right_and_all_wrong(n, right):
    """All held at 0.7: every binned error is the distance to 1 or 0, whatever the bins."""
    probs, labels = np.tile([0.7, 0.3], (n, 1)), np.full(n, 0 if right else 1)
    gap = 0.3 if right else 0.7
    for n_bins in (1, 10, 15):
        for metric in (calibration.ece, calibration.mce, calibration.ece_equal_mass, calibration.classwise_ece):
            assert metric(probs, labels, n_bins=n_bins) == pytest.approx(gap), metric.__name__
        split = (0, gap) if right else (gap, 0)
        assert calibration.confidence_split(probs, labels, n_bins=n_bins) == pytest.approx(split)
        assert calibration.debiased_ece(probs, labels, n_bins) == pytest.approx(gap)
        # A lone answer says nothing of its own noise.
        assert calibration.debiased_l2(probs, labels, n_bins) == pytest.approx(gap if n > 1 else 0)
    certain = calibration.ece(np.tile([1.0, 0.0], (n, 1)), labels), calibration.mce(np.tile([1.0, 0.0], (n, 1)), labels)
    assert certain == pytest.approx((0, 0) if right else (1, 1))


def test_probability_cut_to_zero_has_the_floor_as_likelihood():
    assert calibration.nll([[1.0, 0.0]], [1]) == pytest.approx(-math.log(1e-12))
    assert calibration.nll([[1.0, 0.0]], [1], floor=1e-3) == pytest.approx(math.log(1000))
    assert calibration.nll([[1.0, 0.0]], [0]) == 0.0


@pytest.mark.parametrize(
    "metric",
    [
        calibration.accuracy,
        calibration.mean_confidence,
        calibration.overconfidence,
        calibration.brier_top_label,
        calibration.brier_multiclass,
        calibration.nll,
        calibration.entropy,
        calibration.ece,
        calibration.mce,
        calibration.classwise_ece,
    ],
)
def test_weights_count_repetitions(metric):
    probs, labels = sample(60, sharpen=1.5)
    weights = np.random.default_rng(1).integers(0, 4, size=(5, 60))
    repeated = [metric(np.repeat(probs, w, axis=0), np.repeat(labels, w)) for w in weights]
    np.testing.assert_allclose(metric(probs, labels, weights=weights), repeated, atol=1e-12)
    np.testing.assert_allclose(metric(jnp.asarray(probs), jnp.asarray(labels)), metric(probs, labels), atol=1e-6)


def test_debiased_l2_is_unbiased_where_the_plug_in_is_not():
    plug_in, debiased = [], []
    for seed in range(300):
        probs, labels = sample(200, seed=seed)
        bins = calibration.reliability_bins(probs, labels)
        keep = bins.counts > 0
        plug_in.append((bins.counts[keep] / 200 * (bins.confidence - bins.accuracy)[keep] ** 2).sum())
        debiased.append(calibration.debiased_l2_squared(probs, labels))
    noise = np.std(debiased) / math.sqrt(300)
    assert np.mean(plug_in) > 10 * noise, "the plug-in value was meant to be biased here"
    assert abs(np.mean(debiased)) < 3 * noise + 1e-4  # the rest: confidences vary a little within a bin


def test_debiased_ece_against_resampled_normals_and_the_truth():
    probs, labels = sample(200, seed=3, sharpen=2.0)
    bins = calibration.reliability_bins(probs, labels)
    keep = bins.counts > 0
    share, gap, acc = bins.counts[keep] / 200, (bins.confidence - bins.accuracy)[keep], bins.accuracy[keep]
    count, rng = bins.counts[keep], np.random.default_rng(0)
    draws = rng.normal(gap, np.sqrt(acc * (1 - acc) / count), size=(200_000, len(gap)))
    expected = 2 * calibration.ece(probs, labels) - (np.abs(draws) @ share).mean()
    np.testing.assert_allclose(calibration.debiased_ece(probs, labels), expected, atol=2e-4)
    smooth = (acc * count + 1) / (count + 2)
    draws = rng.normal(gap, np.sqrt(smooth * (1 - smooth) / count), size=(200_000, len(gap)))
    expected = 2 * calibration.mce(probs, labels) - np.abs(draws).max(axis=1).mean()
    np.testing.assert_allclose(calibration.debiased_mce(probs, labels), expected, atol=5e-3)
    truth = calibration.ece(*sample(400_000, seed=9, sharpen=2.0))
    trials = [sample(200, seed=100 + k, sharpen=2.0) for k in range(200)]
    plug_in = np.mean([calibration.ece(*t) for t in trials]) - truth
    debiased = np.mean([calibration.debiased_ece(*t) for t in trials]) - truth
    assert plug_in > 0.004 and abs(debiased) < plug_in / 2
    truth = calibration.mce(*sample(400_000, seed=9, sharpen=2.0))
    plug_in = np.mean([calibration.mce(*t) for t in trials]) - truth
    debiased = np.mean([calibration.debiased_mce(*t, draws=300) for t in trials]) - truth
    assert plug_in > 0.05 and abs(debiased) < 0.7 * plug_in


def test_consistency_band_is_the_distribution_under_perfect_calibration():
    # All confidences in one bin: |k/n - c| with k binomial, whose quantiles are known exactly.
    n, c = 400, 0.75
    band = calibration.consistency_band(np.full(n, c), draws=20_000, seed=1)
    exact = np.sort(np.abs(scipy_stats.binom(n, c).rvs(400_000, random_state=2) / n - c))
    np.testing.assert_allclose(band.interval("ece"), np.quantile(exact, [0.025, 0.975]), atol=1.01 / n)
    assert band.mean("ece") == pytest.approx(exact.mean(), rel=0.03)
    np.testing.assert_array_equal(band.ece, band.mce)
    low, high = scipy_stats.binom(n, c).ppf([0.025, 0.975]) / n
    assert band.accuracy_low[7] == pytest.approx(low, abs=1.01 / n)
    assert band.accuracy_high[7] == pytest.approx(high, abs=1.01 / n)
    assert np.isnan(np.delete(band.accuracy_low, 7)).all()


def test_consistency_band_equals_a_loop_over_draws_and_holds_its_level():
    inside = 0
    for seed in range(200):
        probs, labels = sample(150, seed=seed)
        band = calibration.consistency_band(probs.max(axis=1), draws=400, seed=seed)
        low, high = band.interval("ece")
        inside += low <= calibration.ece(probs, labels) <= high
    assert 0.91 < inside / 200 < 0.985
    # A simulated outcome vector gives the metrics' own value: two choices, the first held at the confidence.
    confidence = np.array([0.55, 0.61, 0.68, 0.91, 0.95, 0.99, 0.52])
    band = calibration.consistency_band(confidence, draws=50, seed=4)
    order = np.argsort(calibration.bin_index(confidence), kind="stable")
    right = np.random.default_rng(4).random((50, 7)) < confidence[order]
    probs = np.stack([confidence[order], 1 - confidence[order]], axis=1)
    for metric in ("ece", "mce"):
        values = [getattr(calibration, metric)(probs, (~r).astype(int)) for r in right]
        np.testing.assert_allclose(getattr(band, metric), np.sort(values), atol=1e-12)


def test_p_value_counts_draws_at_or_above():
    band = calibration.ConsistencyBand(0.95, np.arange(1, 10) / 10, np.zeros(9), np.zeros(1), np.zeros(1))
    assert band.p_value("ece", 0.85) == pytest.approx(2 / 10)
    assert band.p_value("ece", 0.9) == pytest.approx(2 / 10)
    assert band.p_value("ece", 2.0) == pytest.approx(1 / 10)
    assert band.p_value("ece", 0.0) == 1.0


def test_seeds_and_chunks_do_not_matter(monkeypatch):
    confidence = sample(100)[0].max(axis=1)
    whole = calibration.consistency_band(confidence, draws=64, seed=5)
    monkeypatch.setattr(calibration, "_CHUNK_ELEMENTS", 1000)
    pieces = calibration.consistency_band(confidence, draws=64, seed=5)
    np.testing.assert_array_equal(whole.ece, pieces.ece)
    assert not np.array_equal(whole.ece, calibration.consistency_band(confidence, draws=64, seed=6).ece)


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        ([0.5, 0.5], [0], r"shape \(2,\)"),
        ([[0.5, 0.5]], [0, 1], r"labels has shape \(2,\)"),
        ([[0.5, 0.5]], [2], r"labels\[0\] is 2; wanted 0 to 1"),
        ([[0.5, 0.5]], [0.0], "dtype float64"),
        ([[0.5, 0.5], [0.7, 0.7]], [0, 1], r"probs\[1\] sums to 1.4"),
        ([[0.5, 0.5], [float("nan"), 1.0]], [0, 1], r"probs\[1\] is \[nan, 1.0\]"),
        ([[-0.5, 1.5]], [0], r"probs\[0\]"),
    ],
)
def test_bad_input_is_named(probs, labels, message):
    with pytest.raises(ValueError, match=message):
        calibration.ece(probs, labels)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="n_bins is 0"):
        calibration.bin_index([0.5], 0)
    with pytest.raises(ValueError, match="n_bins is 0"):
        calibration.equal_mass_index([0.5], 0)
    with pytest.raises(ValueError, match="floor is 0"):
        calibration.nll([[0.5, 0.5]], [0], floor=0.0)
    with pytest.raises(ValueError, match="confidence has shape"):
        calibration.consistency_band([1.5])
    with pytest.raises(ValueError, match="metric is 'nll'"):
        calibration.consistency_band([0.5]).interval("nll")
