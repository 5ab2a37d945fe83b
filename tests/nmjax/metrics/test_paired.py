"""Paired tests against scipy, enumeration and their own error rates."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from nmjax.metrics import paired, stats


def test_mcnemar_counts_only_what_one_side_got_right():
    a, b = np.ones(40), np.ones(40)
    b[:9], a[9:11] = 0, 0  # 9 questions for a alone, 2 for b alone, 29 for both
    tail = sum(math.comb(11, k) for k in range(3)) / 2**11
    assert paired.mcnemar(a, b) == paired.mcnemar(b, a) == pytest.approx(2 * tail)
    assert paired.mcnemar(np.tile(a, 3).astype(bool), np.tile(b, 3)) < 0.005 < paired.mcnemar(a, b)
    assert paired.mcnemar(a, a) == 1.0


@pytest.mark.parametrize("n", [2, 7, 12])
def test_sign_flip_of_few_questions_enumerates(n):
    d = np.random.default_rng(n).normal(0.4, size=n)
    flipped = [abs(np.dot(signs, d)) for signs in itertools.product((-1, 1), repeat=n)]
    assert float(paired.sign_flip(d)) == np.mean(np.array(flipped) >= abs(d.sum()) - 1e-9)
    reference = scipy.stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert float(paired.sign_flip(d)) == pytest.approx(reference.pvalue)


def test_sign_flip_of_many_questions_agrees_with_scipy_and_by_column():
    rng = np.random.default_rng(8)
    columns = rng.exponential(size=(100, 3)) - np.array([1.0, 0.8, 0.5])
    p_values = paired.sign_flip(columns, draws=20_000)
    for column, p_value in zip(columns.T, p_values, strict=True):
        reference = scipy.stats.permutation_test(
            (column,), np.mean, permutation_type="samples", n_resamples=20_000, vectorized=True, rng=1
        )
        assert p_value == pytest.approx(reference.pvalue, abs=0.012)
        assert p_value == float(paired.sign_flip(column, draws=20_000))
    assert p_values[2] < 0.001 < p_values[1] < 0.2 < p_values[0]


def test_sign_flip_holds_its_level_where_the_mean_is_0():
    p_values = paired.sign_flip(np.random.default_rng(1).standard_t(3, size=(30, 4000)), draws=999)
    for level in (0.01, 0.05, 0.5):
        assert np.mean(p_values <= level) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 4000))


def test_sign_flip_counts_ties_whatever_the_rounding():
    whole = np.random.default_rng(2).integers(-2, 4, size=(25, 40)).astype(float)
    tenths = whole * 0.1 / 3
    assert len({float(np.float64(x).sum()) for x in ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1])}) == 2, "rounding was meant"
    np.testing.assert_array_equal(paired.sign_flip(whole, draws=500), paired.sign_flip(tenths, draws=500))
    assert float(paired.sign_flip(np.zeros(30), draws=50)) == 1.0
    assert float(paired.sign_flip([0.1, 0.2, -0.3])) == 1.0, "a mean of 0 but for rounding"


def test_sign_flip_same_seed_whatever_the_chunk(monkeypatch):
    d = np.random.default_rng(3).normal(0.2, size=70)
    first = paired.sign_flip(d, draws=300, seed=4)
    assert first != paired.sign_flip(d, draws=300, seed=5)
    monkeypatch.setattr(paired, "_CHUNK_ELEMENTS", 700)
    assert paired.sign_flip(d, draws=300, seed=4) == first


def test_cohen_dz_is_t_over_root_n():
    d = np.random.default_rng(4).normal(0.3, size=50)
    assert paired.cohen_dz(d) == pytest.approx(scipy.stats.ttest_1samp(d, 0).statistic / math.sqrt(50))
    assert paired.cohen_dz(0.3 - np.full(9, 0.2)) is None and paired.cohen_dz(np.zeros(9)) is None


def test_benjamini_hochberg_equals_its_definition():
    p_values = np.random.default_rng(5).beta(0.5, 2, size=30)
    ranked = sorted(p_values)
    # Benjamini and Hochberg call the k smallest, k the last with p_(k) <= k q / m; adjusted p is the least such q.
    expected = [min(ranked[k] * 30 / (k + 1) for k in range(30) if ranked[k] >= p) for p in p_values]
    adjusted = paired.benjamini_hochberg(p_values)
    np.testing.assert_allclose(adjusted, np.minimum(expected, 1))
    assert (np.array(adjusted) > p_values).sum() > 20
    assert paired.benjamini_hochberg([]) == [] and paired.benjamini_hochberg([0.03]) == [0.03]


def test_equivalent_reads_the_90_percent_interval():
    samples = np.random.default_rng(6).normal(0.01, 0.01, size=200_000)
    low, high = 0.01 - 1.645 * 0.01, 0.01 + 1.645 * 0.01
    for margin, verdict in ((0.03, "equivalent"), (0.02, "undecided")):
        result = paired.equivalent(samples, margin)
        assert result["verdict"] == verdict and result["margin"] == margin
        np.testing.assert_allclose(result["interval_90"], [low, high], atol=3e-4)
    for sign in (1, -1):
        assert paired.equivalent(sign * (samples + 0.03), 0.02)["verdict"] == "different"
    # A bias of up to 0.01 upwards on the first side: the true difference may be that much lower.
    result = paired.equivalent(samples, 0.03, estimate=0.01, bias=(0.0, 0.01))
    np.testing.assert_allclose(result["interval_90"], [low - 0.01, high], atol=3e-4)


def test_equivalent_errs_in_5_percent_at_the_margin():
    """The bound of the claim: a true difference as large as the margin."""
    trials, wrong, right = 600, 0, 0
    for trial in range(trials):
        noise = np.random.default_rng([7, trial]).normal(size=200)
        weights = next(stats.bootstrap_weights(200, draws=300, seed=trial))
        wrong += paired.equivalent(weights @ (noise + 0.25) / 200, 0.25)["verdict"] == "equivalent"
        right += paired.equivalent(weights @ noise / 200, 0.25)["verdict"] == "equivalent"
    assert 0.02 < wrong / trials < 0.08
    assert right / trials > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired.mcnemar([1, 0], [1]), r"correct_a has shape \(2,\) and correct_b \(1,\)"),
        (lambda: paired.mcnemar([1, 0], [1, 0.5]), "correct_b holds 0.5; wanted 0 and 1"),
        (lambda: paired.sign_flip([]), r"differences has shape \(0,\)"),
        (lambda: paired.sign_flip([1.0, np.nan]), "wanted finite values"),
        (lambda: paired.sign_flip([1.0, 2.0], draws=0), "draws is 0"),
        (lambda: paired.cohen_dz([1.0]), r"differences has shape \(1,\)"),
        (lambda: paired.equivalent([0.1], 0.0), "margin is 0.0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
