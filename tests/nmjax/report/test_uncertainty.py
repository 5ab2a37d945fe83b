"""Measures as detectors against scikit-learn, and what the page says of them."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from nmjax.report.uncertainty import BASELINE, TITLES, UncertaintyPage, evaluate
from nmjax.uncertainty import DETECTORS

rng = np.random.default_rng(0)
N = 300
RIGHT = rng.random(N) < 0.6
MEASURES = {
    "semantic_entropy": rng.normal(size=N) + 0.7 * ~RIGHT,
    "nll": rng.normal(size=N) + 2 * ~RIGHT,
    "p_true": rng.normal(size=N),
    "num_clusters": rng.normal(size=N) + RIGHT,  # points the wrong way
}
KINDS = ["rare" if i % 3 else "often" for i in range(N)]


@pytest.fixture(scope="module")
def findings():
    return evaluate(MEASURES, RIGHT, draws=500)


def page(findings, right=RIGHT):
    return UncertaintyPage("model", "bundled", 10, right, KINDS, MEASURES, findings, [["q<", "a", "yes", "a, b"]])


def test_findings_are_ordered_by_auroc_and_agree_with_scikit_learn(findings):
    assert [f.name for f in findings] == ["nll", "semantic_entropy", "p_true", "num_clusters"]
    for f in findings:
        assert f.auroc == pytest.approx(roc_auc_score(~RIGHT, MEASURES[f.name]))
        assert f.auroc_interval[0] < f.auroc < f.auroc_interval[1]
        assert f.prr_interval[0] < f.prr < f.prr_interval[1] and f.prr_half != f.prr
    assert [f.tells for f in findings] == ["above", "above", "neither", "below"]
    baseline, second = findings[:2]
    assert baseline.over_baseline is None
    assert second.over_baseline == pytest.approx(second.auroc - baseline.auroc)
    assert second.over_baseline_interval[1] < 0


def test_the_page_says_which_tell(findings):
    report = page(findings)
    text = report.headline()
    assert f"Above chance: {TITLES['nll']}, semantic entropy (discrete)." in text
    assert "Not told from chance: P(True)." in text and "Pointing the wrong way: number of clusters." in text
    assert f"Better than {TITLES['nll']}: none." in text
    html = report.html({"timestamp": "2026-01-31T23:59:00+00:00"}, report.figure())
    assert html.count("data:image/png;base64,") == 1 and "q&lt;" in html and "3 of 4" not in html
    assert "2 of 4" in html and all(TITLES[name] in html for name in MEASURES)
    rows = {row[0]: row for row in report.by_kind().rows}
    often = np.array(KINDS) == "often"
    assert rows["often"][1:3] == ["100", f"{RIGHT[often].mean():.3f}"]


def test_where_all_answers_are_right_there_is_nothing_to_tell():
    right = np.ones(N, bool)
    findings = evaluate(MEASURES, right, draws=100)
    report = page(findings, right)
    assert all(f.auroc is None and f.prr is None and f.tells == "neither" for f in findings)
    assert "nothing to tell apart" in report.headline() and "None" not in report.text()
    assert report.figure().startswith(b"\x89PNG")


def test_every_measure_has_a_title():
    assert DETECTORS.keys() < TITLES.keys() and BASELINE in DETECTORS
