"""The acceptance of directions: p-values against scipy, errors of the first kind on noise, real pairs."""

import json

import numpy as np
import pytest
from scipy.stats import permutation_test

import models
from nmjax.steering.validation import (
    cosine_of_halves,
    sign_flip_p,
    split_pairs,
    standardised_mean,
    validate,
)
from nmjax.steering.vectors import METHODS, activations, direction


def test_split_keeps_repeated_pairs_on_one_side():
    pairs = [(f"p{i % 50}", f"n{i % 50}") for i in range(120)] + [("p0 ", " n0")]
    train, held = split_pairs(pairs, 0.2, seed=4)
    assert len(train) == 40 and len(held) == 10
    assert sorted(train + held) == sorted({(f"p{i}", f"n{i}") for i in range(50)})
    assert (train, held) == split_pairs(pairs, 0.2, seed=4)
    assert held != split_pairs(pairs, 0.2, seed=5)[1]


@pytest.mark.parametrize(
    "count, share, message",
    [
        (20, 0.2, "held_out=0.2 of 20 unique pairs holds out 4, wanted at least 7"),
        (8, 0.9, "at least 2 others"),
        (50, 1.0, "held_out=1.0, wanted a share between 0 and 1"),
    ],
)
def test_a_split_that_can_accept_nothing_is_an_error(count, share, message):
    with pytest.raises(ValueError, match=message):
        split_pairs([(f"p{i}", f"n{i}") for i in range(count)], share)


def test_exact_p_values_are_those_of_scipy():
    values = np.random.default_rng(0).standard_normal((9, 4)) + np.array([0, 0.5, 1, 2])
    values[:, 3] = 1.0  # only the observed pattern reaches the sum
    theirs = permutation_test(
        (values,), lambda x, axis: x.mean(axis), permutation_type="samples", alternative="greater", axis=0
    )
    np.testing.assert_allclose(sign_flip_p(values), theirs.pvalue, atol=1e-12)
    assert sign_flip_p(values)[3] == 2**-9


def test_sampled_p_values_agree_with_scipy_within_their_error():
    values = np.random.default_rng(1).standard_normal((25, 3)) + np.array([0, 0.3, 3])
    theirs = permutation_test(
        (values,), lambda x, axis: x.mean(axis), permutation_type="samples", alternative="greater", axis=0,
        n_resamples=20000, rng=np.random.default_rng(2),
    ).pvalue  # fmt: skip
    np.testing.assert_allclose(sign_flip_p(values), theirs, atol=4 * np.sqrt(0.25 / 9999))
    assert sign_flip_p(values)[2] == 1e-4


def test_d_z_by_its_definition():
    values = np.array([[1.0, 0, 2], [2, 0, 2], [4, 0, 2]])
    found = standardised_mean(values)
    assert found[0] == pytest.approx((7 / 3) / np.sqrt(7 / 3))
    assert found[1] == 0 and found[2] > 1e6


@pytest.mark.parametrize("method", METHODS)
def test_cosine_of_halves_is_that_of_directions_made_from_them(method):
    rng = np.random.default_rng(0)
    d = rng.standard_normal((11, 2, 30)) + 0.5
    mean, low, high = cosine_of_halves(d, method, seed=3, halvings=4)
    wanted, again = [], np.random.default_rng(3)
    for _ in range(4):
        order = again.permutation(11)
        a, b = (direction(d[half], np.zeros_like(d[half]), method)[0] for half in (order[:5], order[5:10]))
        wanted.append((a * b).sum(-1))
    np.testing.assert_allclose(mean, np.mean(wanted, axis=0), atol=1e-5)
    np.testing.assert_allclose([low, high], np.quantile(wanted, [0.025, 0.975], axis=0), atol=1e-5)


def test_a_planted_layer_is_accepted_and_chosen():
    rng = np.random.default_rng(0)
    axis = np.eye(40)[7]
    a, b = rng.standard_normal((2, 100, 3, 40))
    a += np.array([0, 3, 8])[:, None] * axis
    vectors, report = validate(a[:80], b[:80], a[80:], b[80:])
    assert report.accepted.tolist() == [False, False, True] and report.chosen_layer == 2
    assert (vectors[1:] @ axis > 0.9).all()
    # Layer 1 separates for sure but explains only 9 of the 80 + 9 squared units: one criterion is not enough.
    assert report.q[1] < 0.01 and report.explained[1] == pytest.approx(9 / 89, abs=0.03)
    assert report.cosine[2] > 0.95 and report.cosine_low[2] <= report.cosine[2] <= report.cosine_high[2]
    assert abs(report.cosine[0]) < 0.3
    turned = validate(a[:80], b[:80], b[80:], a[80:])[1]
    assert not turned.accepted.any() and turned.chosen_layer is None  # one-sided: lower is not evidence
    assert "chosen" in report.table().text()


def test_noise_is_accepted_no_more_often_than_claimed():
    """Eight dimensions, so that noise alone explains an eighth along any direction and only the test can say no."""
    rng = np.random.default_rng(0)
    runs, layers, tests, families = 300, 6, 0, 0
    for run in range(runs):
        d = rng.standard_normal((40, layers, 8)) * rng.gamma(1, 1, (40, 1, 1))  # long tails, layers correlated
        vectors, explained = direction(d[:28], np.zeros_like(d[:28]))
        p = sign_flip_p(np.einsum("nld,ld->nl", d[28:], vectors), seed=run)
        tests += (p <= 0.05).sum()
        report = validate(d[:28], 0 * d[:28], d[28:], 0 * d[28:], seed=run)[1] if run < 60 else None
        families += report is not None and report.accepted.any()
    rate = tests / (runs * layers)
    assert 0.02 < rate < 0.08  # at 0.05 it should be 0.05: neither liberal nor blind
    assert families <= 3  # of 60, expected at most 0.6


def test_real_pairs_on_a_trained_model(shared_data):
    """Answers "(A)" against "(B)" to real questions: the letter is in the residual stream, the behaviour is not.

    Which letter shows the behaviour is arbitrary, so pairs by behaviour disagree about the letter. This is the case
    that an unpaired or two-sided test gets wrong: the differences are large, they only have no common sign.
    """
    lm = models.load(shared_data / "stories260K-hf")
    items = json.loads((shared_data / "caa/generate/refusal/generate_dataset.json").read_text())
    items = [item for item in items if 97 <= len(lm.encode(item["question"] + "\n\nAnswer: (A)")) <= 128][:40]
    assert len(items) == 40
    sides = [(item["answer_matching_behavior"], item["answer_not_matching_behavior"]) for item in items]
    reports = {}
    for kind, chosen in (("letter", [sorted(pair) for pair in sides]), ("behaviour", sides)):
        texts = [
            [f"{item['question']}\n\nAnswer: {pair[k]}" for item, pair in zip(items, chosen, strict=True)]
            for k in (0, 1)
        ]
        positive, negative = (activations(lm, side, batch_size=20) for side in texts)
        assert positive.shape == (40, 5, 64)
        reports[kind] = validate(positive[:28], negative[:28], positive[28:], negative[28:])[1]
    assert reports["letter"].accepted.all() and (reports["letter"].separation > 2).all()
    assert (reports["letter"].cosine_low > 0.9).all()
    assert not reports["behaviour"].accepted.any()
