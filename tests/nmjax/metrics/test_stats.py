"""Bootstrap intervals: their coverage on synthetic data, and agreement with scipy and with closed forms."""

import numpy as np
import pytest
import scipy.stats

from nmjax.metrics import calibration, stats


def synthetic(rng, n, ease=1.0):
    """Probabilities [n, 4], over-confident, and labels drawn from a flatter distribution than they claim.

    `ease`, one for all or [n], scales the logits: the larger, the surer and the more often right."""
    z = 1.5 * np.broadcast_to(ease, n)[:, None] * rng.normal(size=(n, 4))
    truth = np.exp(0.7 * z) / np.exp(0.7 * z).sum(axis=1, keepdims=True)
    labels = np.minimum((rng.random((n, 1)) > truth.cumsum(axis=1)).sum(axis=1), 3)
    probs = np.exp(z)
    return probs / probs.sum(axis=1, keepdims=True), labels


LINEAR = {
    "accuracy": calibration.accuracy,
    "confidence": calibration.mean_confidence,
    "overconfidence": calibration.overconfidence,
    "brier": calibration.brier_top_label,
    "brier_multiclass": calibration.brier_multiclass,
    "nll": calibration.nll,
    "entropy": calibration.entropy,
}

SUBJECTS = np.repeat([0.1, 0.5, 1.0, 2.0, 4.0], 40)  # the ease of each question's subject, 40 questions each


@pytest.mark.parametrize("stratified", [False, True])
def test_coverage_of_the_percentile_intervals(stratified):
    """Of questions of one kind, and of as many from each of five subjects that differ in ease."""
    ease = SUBJECTS if stratified else np.ones(200)
    probs, labels = synthetic(np.random.default_rng(0), 200_000, np.tile(ease, 1_000))
    truth = np.array([metric(probs, labels) for metric in LINEAR.values()])
    trials, covered, unaware = 400, np.zeros(len(LINEAR)), np.zeros(len(LINEAR))
    for trial in range(trials):
        probs, labels = synthetic(np.random.default_rng([1, trial]), 200, ease)

        def all_metrics(weights, probs=probs, labels=labels):
            return np.stack([metric(probs, labels, weights) for metric in LINEAR.values()], axis=-1)

        def covers(strata, statistic=all_metrics, trial=trial):
            low, high = stats.percentile_interval(stats.bootstrap(statistic, 200, 400, trial, strata))
            return (low <= truth) & (truth <= high)

        covered += covers(ease if stratified else None)
        unaware += covers(None) if stratified and trial % 4 == 0 else 0
    for name, share in zip(LINEAR, covered / trials, strict=True):
        assert 0.92 < share < 0.98, f"{name}: the 95% interval covered in {share:.3f} of the trials"
    if stratified:
        assert unaware.max() / (trials / 4) > 0.99, "intervals that ignore the subjects were meant to be too wide"


def test_coverage_with_two_questions_a_subject():
    """The plain stratified bootstrap covers about 0.83 here: with m = 2 it sees half of the variance."""
    rng = np.random.default_rng(2)
    trials, covered, plain = 600, 0, 0
    strata = np.repeat(np.arange(57), 2)
    for trial in range(trials):
        values = rng.normal(size=114)
        low, high = stats.mean_interval(values, draws=400, seed=trial, strata=strata)
        covered += low <= 0 <= high
        pairs = values.reshape(57, 2)
        picked = pairs[np.arange(57)[:, None], rng.integers(0, 2, size=(400, 57, 2))].mean(axis=(1, 2))
        plain += np.quantile(picked, 0.025) <= 0 <= np.quantile(picked, 0.975)
    assert 0.92 < covered / trials < 0.98
    assert plain / trials < 0.90


def test_agrees_with_scipy():
    values = np.random.default_rng(3).exponential(size=400)
    low, high = stats.mean_interval(values, draws=20_000, seed=0)
    reference = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    width = reference.confidence_interval.high - reference.confidence_interval.low
    np.testing.assert_allclose([low, high], reference.confidence_interval, atol=0.03 * width)


def test_paired_interval_agrees_with_scipy_and_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(4)
    shared = rng.normal(size=300)
    a, b = shared + 0.1 * rng.normal(size=300) + 0.2, shared + 0.1 * rng.normal(size=300)
    low, high = stats.paired_interval(a, b, draws=20_000)
    reference = scipy.stats.bootstrap(
        (a, b), lambda x, y: x.mean() - y.mean(), paired=True, n_resamples=20_000, method="percentile",
        vectorized=False, rng=1,
    ).confidence_interval  # fmt: skip
    np.testing.assert_allclose([low, high], reference, atol=0.04 * (reference.high - reference.low))
    assert 0 < low < 0.2 < high
    apart = stats.mean_interval(a)[1] - stats.mean_interval(a)[0]
    assert high - low < apart / 5


def test_draws_are_paired_across_statistics():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 50))
    together = stats.bootstrap(lambda w: w @ np.stack([a, b, a - b], axis=1) / 50, 50, draws=300, seed=7)
    alone = stats.bootstrap(lambda w: w @ a / 50, 50, draws=300, seed=7)
    np.testing.assert_allclose(together[:, 0], alone, atol=1e-12)
    np.testing.assert_allclose(together[:, 0] - together[:, 1], together[:, 2], atol=1e-12)


@pytest.mark.parametrize("strata", [None, list("aabbbbcdef"), list("aaaaaaaaab"), list("abcdefghij")])
def test_weights_sum_to_n_and_give_the_variance_of_a_stratified_mean(strata):
    values = np.random.default_rng(6).normal(size=10)
    weights = np.concatenate(list(stats.bootstrap_weights(10, draws=60_000, seed=1, strata=strata)))
    np.testing.assert_allclose(weights.sum(axis=1), 10)
    # The textbook variance, strata pooled as documented: single ones together, a lone one with the smallest other.
    groups = {
        None: ["".join("x" * 10)],
        "aabbbbcdef": ["aa", "bbbb", "cdef"],
        "aaaaaaaaab": ["aaaaaaaaab"],
        "abcdefghij": ["abcdefghij"],
    }[None if strata is None else "".join(strata)]
    start, expected = 0, 0.0
    for group in groups:
        part = values[start : start + len(group)]
        expected += (len(part) / 10) ** 2 * part.var(ddof=1) / len(part)
        start += len(part)
    means = weights @ values / 10
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.var() == pytest.approx(expected, rel=0.03)


def test_order_of_the_strata_does_not_matter_to_the_totals():
    strata = list("babacbcaab")
    weights = next(stats.bootstrap_weights(10, draws=200, seed=0, strata=strata))
    for name in "abc":
        member = np.array([s == name for s in strata])
        np.testing.assert_allclose(weights[:, member].sum(axis=1), member.sum())


def test_same_seed_same_draws_whatever_the_chunk(monkeypatch):
    values = np.random.default_rng(8).normal(size=40)
    first = stats.mean_interval(values, draws=100, seed=3)
    assert stats.mean_interval(values, draws=100, seed=4) != first
    monkeypatch.setattr(stats, "_CHUNK_ELEMENTS", 400)
    np.testing.assert_array_equal(stats.mean_interval(values, draws=100, seed=3), first)


def test_bounded_bias_interval_covers_a_difference_of_ece_that_the_percentile_interval_misses():
    """A calibrated condition, whose ECE is nearly all bias, against a sharpened one, whose ECE is nearly none."""

    def pair(rng, n):
        z = 2.0 * rng.normal(size=(n, 4))
        flat, sharp = np.exp(z), np.exp(z / 0.7)
        flat /= flat.sum(axis=1, keepdims=True)
        labels = np.minimum((rng.random((n, 1)) > flat.cumsum(axis=1)).sum(axis=1), 3)
        return flat, sharp / sharp.sum(axis=1, keepdims=True), labels

    flat, sharp, labels = pair(np.random.default_rng(0), 200_000)
    truth = calibration.ece(sharp, labels) - calibration.ece(flat, labels)
    trials, covered, percentile = 100, 0, 0
    for trial in range(trials):
        flat, sharp, labels = pair(np.random.default_rng([1, trial]), 500)
        weights = next(stats.bootstrap_weights(500, draws=300, seed=trial))
        samples = calibration.ece(sharp, labels, weights) - calibration.ece(flat, labels, weights)
        estimate = calibration.ece(sharp, labels) - calibration.ece(flat, labels)
        largest = [calibration.consistency_band(p.max(axis=1), draws=200).mean("ece") for p in (flat, sharp)]
        low, high = stats.bounded_bias_interval(samples, estimate, (-largest[0], largest[1]))
        covered += low <= truth <= high
        low, high = stats.percentile_interval(samples)
        percentile += low <= truth <= high
    assert covered / trials >= 0.95
    assert percentile / trials < 0.6


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (3, 10), (100, 100), (412, 1000)])
def test_wilson_interval_agrees_with_scipy(k, n):
    reference = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(stats.wilson_interval(k, n), [reference.low, reference.high], atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.mean_interval([1.0]), "n is 1"),
        (lambda: stats.mean_interval([1.0, 2.0], draws=0), "draws is 0"),
        (lambda: stats.mean_interval([1.0, 2.0], strata=["a"]), "strata has 1 labels; wanted 2"),
        (lambda: stats.paired_interval([1.0, 2.0], [1.0, 2.0, 3.0]), r"shape \(2,\) and b \(3,\)"),
        (lambda: stats.percentile_interval([1.0], level=95), "level is 95"),
        (lambda: stats.wilson_interval(2, 1), r"successes is 2.0 of n = 1.0"),
        (lambda: stats.bounded_bias_interval([1.0], 0.0, (1.0, 0.0)), "bias is"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wilson_interval_over_clusters_between_its_two_ends():
    rng = np.random.default_rng(0)
    answers = rng.random(60) < 0.8
    alone = stats.cluster_wilson_interval(answers, np.arange(60))
    assert alone == pytest.approx(stats.wilson_interval(answers.sum(), 60))
    copied = stats.cluster_wilson_interval(np.repeat(answers, 4), np.repeat(np.arange(60), 4))
    assert copied == pytest.approx(alone)  # three copies more are no more evidence
    assert stats.cluster_wilson_interval(np.ones(240), np.repeat(np.arange(60), 4)) == pytest.approx(
        stats.wilson_interval(60, 60)
    )


def test_coverage_of_the_wilson_interval_over_clusters():
    """Of 40 clusters of 6 answers whose rates differ (beta), about a mean of 0.9; answers alone would cover less."""
    rng = np.random.default_rng(1)
    groups, covered = np.repeat(np.arange(40), 6), np.zeros(2)
    for _ in range(1000):
        answers = rng.random(240) < np.repeat(rng.beta(1.8, 0.2, 40), 6)
        plain = stats.wilson_interval(answers.sum(), 240)
        for k, (low, high) in enumerate((stats.cluster_wilson_interval(answers, groups), plain)):
            covered[k] += low <= 0.9 <= high
    assert covered[0] >= 930 > covered[1] + 50


@pytest.mark.parametrize("successes", [[0.5, 1.0], [], [[1, 0]]])
def test_wilson_interval_over_clusters_wants_zeros_and_ones(successes):
    with pytest.raises(ValueError, match="successes has shape"):
        stats.cluster_wilson_interval(successes, np.zeros(len(successes)))
