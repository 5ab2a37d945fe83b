"""The promise of a recall by simulation and in closed form, and the verdict on one."""

import json

import numpy as np
import pytest
import scipy.stats

from nmjax.metrics import conformal, detection

TRIALS = 2000


@pytest.mark.parametrize(("direction", "positives"), [("high", 50), ("low", 31), ("high", 10), ("low", 5)])
def test_recall_on_new_positives_is_the_one_promised(direction, positives):
    """Risks of positives are uniform on [0, 1], so a threshold tau has the recall 1 - tau, and in-sample ones fall
    short of the recall they were picked for."""
    towards_risk = 1 if direction == "high" else -1
    labels = np.r_[np.ones(positives), np.zeros(20)]
    recalls, picked = np.empty(TRIALS), np.empty(TRIALS)
    for trial in range(TRIALS):
        rng = np.random.default_rng([positives, trial])
        scores = towards_risk * np.r_[rng.random(positives), -rng.random(20)]
        found = conformal.conformal_threshold(scores, labels, direction, 0.9)
        recalls[trial] = 1.0 if found["tau"] is None else 1 - towards_risk * found["tau"]
        picked[trial] = 1 - towards_risk * detection.best_threshold(scores, labels, direction, 0.9)["tau"]
    error = recalls.std() / np.sqrt(TRIALS)
    assert recalls.mean() >= 0.9 - 3 * error
    assert recalls.mean() == pytest.approx(found["guarantee"], abs=4 * error + 1e-12)
    assert picked.mean() < 0.9 - 5 * picked.std() / np.sqrt(TRIALS)
    k = found["k"]
    assert k == {50: 5, 31: 3, 10: 1, 5: 0}[positives] and (found["note"] is None) == (k > 0)
    if k:
        assert scipy.stats.kstest(recalls, scipy.stats.beta(positives + 1 - k, k).cdf).pvalue > 0.001


def test_ties_raise_the_recall():
    rng = np.random.default_rng(0)
    recalls = []
    for _ in range(500):
        found = conformal.conformal_threshold(rng.integers(0, 4, 60), np.ones(60), "high")
        recalls.append(detection.flags(np.arange(4), found["tau"], "high").mean())
    assert np.mean(recalls) > 0.95 > found["guarantee"]


def test_threshold_is_a_calibration_score():
    found = conformal.conformal_threshold([5, 1, 9, 3, 7, 0], [1, 1, 1, 1, 0, 0], "low", recall=0.6)
    assert found == {
        "tau": 5.0, "k": 2, "positives": 4, "recall": 0.6, "guarantee": 3 / 5, "note": None,
    }  # fmt: skip
    ten = [conformal.conformal_threshold(np.arange(n), np.ones(n), "high")["k"] for n in (8, 9, 18, 19)]
    assert ten == [0, 1, 1, 2], "k reaches a whole number where 0.1 (n1 + 1) does"
    nobody = conformal.conformal_threshold([1.0], [0], "low")
    assert nobody["tau"] is None and nobody["k"] == 0 and nobody["guarantee"] == 1 and "0 positives" in nobody["note"]
    json.dumps(nobody, allow_nan=False)


def test_clopper_pearson_is_the_beta_quantiles_and_never_covers_less():
    low, high = conformal.clopper_pearson(18, 20)
    assert low == pytest.approx(scipy.stats.beta(18, 3).ppf(0.025)) and high == pytest.approx(
        scipy.stats.beta(19, 2).ppf(0.975)
    )
    assert conformal.clopper_pearson(0, 0) is None and conformal.clopper_pearson(7, 7)[1] == 1.0
    ends = np.array([conformal.clopper_pearson(k, 15) for k in range(16)])
    for p in np.linspace(0.02, 0.98, 25):
        inside = (ends[:, 0] <= p) & (p <= ends[:, 1])
        assert scipy.stats.binom(15, p).pmf(np.flatnonzero(inside)).sum() >= 0.95


def test_verdict_on_a_recall():
    def check(found, positives, target):
        labels = np.r_[np.ones(positives), np.zeros(4)]
        flagged = np.r_[np.arange(positives) < found, [True, True, False, False]]
        return conformal.recall_check(flagged, labels, target)

    assert check(97, 100, 0.9)["met"] == "yes" and check(80, 100, 0.9)["met"] == "no"
    assert check(92, 100, 0.9)["met"] == check(88, 100, 0.9)["met"] == "undecided"
    assert check(88, 100, 0.9)["recall"] == 0.88 and check(5, 5, 0.9)["met"] == "undecided"
    empty = check(0, 0, 0.9)
    assert empty == {"recall": None, "interval": None, "target": 0.9, "met": "undecided"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conformal.conformal_threshold([1.0], [1], "high", 1.0), "recall is 1.0"),
        (lambda: conformal.clopper_pearson(3, 2), "successes is 3 of n = 2"),
        (lambda: conformal.conformal_threshold([1.0], [1], "both"), "direction is 'both'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
