"""The same answers measured by netcal, torchmetrics, relplot and scikit-learn: `tests/golden/make_calibration.py`."""

import json
from pathlib import Path

import numpy as np
import pytest

from nmjax.metrics import calibration, ranking, smooth

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "calibration.json").read_text())
BINS = (10, 15)


@pytest.fixture(params=GOLDEN["cases"])
def case(request):
    theirs = GOLDEN["cases"][request.param]
    return np.array(theirs["probs"]), np.array(theirs["labels"]), theirs


def test_cases_are_what_their_names_say():
    cases = {name: (np.array(c["probs"]), np.array(c["labels"])) for name, c in GOLDEN["cases"].items()}
    assert abs(calibration.overconfidence(*cases["calibrated"])) < 0.05
    assert calibration.overconfidence(*cases["overconfident"]) > 0.1
    assert len(np.unique(cases["tied"][0].max(axis=1))) == 7
    assert (calibration.reliability_bins(*cases["skewed"]).counts[4:8] == 0).all()


@pytest.mark.parametrize("n_bins", BINS)
def test_binned_errors(case, n_bins):
    probs, labels, theirs = case
    ece, mce = calibration.binned_errors(probs, labels, n_bins=n_bins)
    classwise = calibration.classwise_ece(probs, labels, n_bins=n_bins)
    bins = calibration.reliability_bins(probs, labels, n_bins)
    l2 = np.sqrt(np.nansum(bins.counts / len(labels) * (bins.confidence - bins.accuracy) ** 2))
    ours = {"l1": ece, "max": mce, "l2": l2, "classwise_l1": classwise}
    for name, values in theirs["torchmetrics"].items():
        assert ours[name] == pytest.approx(values[str(n_bins)], abs=1e-6), name
    equal_mass = calibration.ece_equal_mass(probs, labels, n_bins=n_bins)
    ours = {"ece": ece, "mce": mce, "classwise_ece": classwise, "ece_equal_mass": equal_mass}
    for name, values in theirs["netcal"].items():
        assert ours[name] == pytest.approx(values[str(n_bins)], abs=1e-12), name


def test_smooth_ece(case):
    probs, labels, theirs = case
    assert smooth.smooth_ece(probs, labels) == pytest.approx(theirs["relplot"]["smece"], abs=1e-3)
    for bandwidth, value in theirs["relplot"]["smece_sigma"].items():
        assert smooth.smooth_ece(probs, labels, float(bandwidth)) == pytest.approx(value, abs=5e-5)
        soft = smooth.soft_ece(*calibration.top_label(probs, labels), float(bandwidth))
        assert soft == pytest.approx(value, abs=1e-4)


def test_scores_and_ranking(case):
    probs, labels, theirs = case
    ours = {
        "brier_score_loss": calibration.brier_top_label,
        "log_loss": calibration.nll,
        "roc_auc_score": ranking.auroc,
        "average_precision_score": ranking.auprc,
    }
    assert {name: float(metric(probs, labels)) for name, metric in ours.items()} == pytest.approx(
        theirs["scikit-learn"], abs=1e-12
    )
