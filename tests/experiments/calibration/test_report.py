"""Text, page, figures and JSON: the same numbers everywhere, for one arm or many, also where a measure is undefined."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.calibration import arms as conditions
from experiments.calibration import output, report
from experiments.calibration.report import MOST_CURVES, Report
from nmjax.report import results
from nmjax.report.tables import with_interval

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
IDENTITY = {"timestamp": "2026-01-31T23:59:00+00:00", "config": {"seed": 0}}
PNG = b"\x89PNG\r\n\x1a\n"


class Tables(html.parser.HTMLParser):
    """The cells of a page's tables, [table][row][cell]."""

    def __init__(self, page):
        super().__init__()
        self.tables, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1] += f" {data}"


@pytest.fixture
def drawn(monkeypatch):
    """The figures made during a test."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    return figures


@pytest.fixture(scope="module")
def full(lab):
    """Two models, four arms, texts and derivatives. The base model is always right at the largest dose, and the
    psychedelic writes nothing: AUROC and most measures of texts are undefined there.
    """
    base, labels = lab.held([0.5, 0.55, 0.7, 0.96], [0.6, 0.65, 0.6, 1.0], n=45, jitter=0.05)
    instruct, _ = lab.held([0.8] * 4, [0.7] * 4, n=45, seed=1, jitter=0.05)
    sober, _ = lab.held([0.5] * 4, [0.6] * 4, n=45, jitter=0.05)
    own = {label: [f"{label} says word{i} and word{i} and then {i}" for i in range(7)] for label in lab.DOSES}
    own["cocaine_100"] = ["Sorry, I cannot help with that. I cannot help with that."] * 7
    own["lsd"] = [""] * 7
    slopes = np.random.default_rng(0).normal(size=(2, 8, 4, 4))
    return lab.make(
        [(base, labels, sober), (instruct, labels)], texts=own, slopes=slopes, left_out={"subject 1": 2, "long": 3}
    )


def numbers(text):
    return NUMBER.findall(text)


def check_all_say_the_same(made, figures):
    """Every table of the report stands in the text and in the page, and every verdict; returns the text."""
    told = Report(made.study, made.findings)
    text, page = told.text(), told.html(IDENTITY, figures)
    sections = told.sections()
    shown = Tables(page).tables
    tables = [table for found in sections.values() for table in found]
    assert len(shown) == len(tables) > 0
    for table, (head, *rows) in zip(tables, shown, strict=True):
        assert table.text() in text
        assert [cell.strip() for cell in head] == list(table.headers)
        assert [[numbers(cell) for cell in row] for row in rows] == [[numbers(c) for c in row] for row in table.rows]
        assert [row[0].strip() for row in rows] == [row[0] for row in table.rows]
    flat, plain = " ".join(text.split()), " ".join(html.unescape(page).split())
    for verdict in told.verdicts.items:
        assert verdict.claim in flat and verdict.because in flat
        assert verdict.claim in plain and verdict.because in plain
    assert not re.search(r"\b(nan|None|inf)\b", text + plain[plain.index("<main") :])
    return text


# --- All of it --------------------------------------------------------------------------------------------------------


def test_a_whole_run_is_written_and_says_the_same_everywhere(full, tmp_path):
    settings = dataclasses.replace(full.study.settings, output_dir=str(tmp_path))
    study = dataclasses.replace(full.study, settings=settings)
    timing = {"base: questions": [3.0, 1.0, 2.0], "base: responses": [4.0, 5.0]}
    paths = output.write(study, full.findings, timing, "20260131_235959")
    names = ["reliability", "metrics", "dose_response", "risk_coverage", "ood", "comparison"]
    assert [path.name for path in paths] == [
        "calibration_summary_20260131_235959.txt",
        *(f"{name}_20260131_235959.png" for name in names),
        "calibration_experiment_20260131_235959.html",
        "calibration_experiment_20260131_235959.json",
    ]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert all(path.read_bytes().startswith(PNG) for path in paths[1:7])
    page = paths[-2].read_text()
    assert page.count("data:image/png;base64,") == 6 and "Shown: 5 of 8 arms." in page

    assert paths[0].read_text() == (text := check_all_say_the_same(full, {}))
    result = results.load_json(paths[-1])
    assert [(e["model_name"], e["pack_name"], e["series"], e["dose"]) for e in result["results"]][2:6] == [
        ("base", "cocaine_50", "cocaine", 0.5), ("base", "cocaine_100", "cocaine", 1.0),
        ("instruct", "none", "none", 0.0), ("instruct", "cocaine_10", "cocaine", 0.1),
    ]  # fmt: skip
    for entry in result["results"]:
        profile = entry["calibration"]
        for name in ("accuracy", "nll", "entropy"):
            low, high = profile["intervals"][name]
            assert f"{profile[name]:.3f} [{low:.3f}, {high:.3f}]" in text and f"{profile[name]:.3f}" in page
        assert f"{profile['ece']:.3f}" in text and f"{entry['letter_mass']['before_sampler']['mean']:.4f}" in text
    for trend in result["dose_response"]:
        for name in set(report.DOSE_METRICS) & set(trend["metrics"]):
            assert with_interval(trend["metrics"][name]["slope"], trend["metrics"][name]["interval"], sign=True) in text
    best = [found for trend in result["dose_response"] for found in trend["best"].values()]
    shown = [f"{b['dose']:g} [{b['dose_interval'][0]:g}, {b['dose_interval'][1]:g}]" for b in best]
    assert [row[1] for row in Report(study, full.findings).sections()["Dose and response"][1].rows] == shown
    assert [v["claim"] for v in result["verdicts"]] == [v.claim for v in Report(study, full.findings).verdicts.items]
    assert result["timing"]["base: questions"] == {"seconds": 6, "first_batch": 3, "median_batch": 2, "batches": 3}
    assert result["generation_time"] == {"base: responses": 9}
    assert result["left_out_as_too_long"]["questions_by_subject"] == {"subject 1": 2, "long": 3}
    assert result["questions_by_subject"] == {f"subject {k}": 15 for k in range(3)}
    assert set(result["identity"]["hashes"]) >= {"model base", "model instruct", "base, cocaine_50"}


def test_what_is_undefined_is_a_dash_and_null(full):
    told = Report(full.study, full.findings)
    found = json.loads(results.dump_json(output.result_json(full.study, full.findings, told, IDENTITY, {})))
    top = found["results"][3]
    assert top["pack_name"] == "cocaine_100" and top["calibration"]["accuracy"] == 1
    assert top["calibration"]["auroc"] is None and top["calibration"]["intervals"]["auroc"] is None
    assert top["difference_from_baseline"]["auroc"] == {"difference": None, "interval": None}
    means = told.sections()["After all effects"][0]
    assert means.rows[3][list(means.headers).index("AUROC")] == "-"
    silent = next(entry for entry in found["writing"] if entry["arm"] == "lsd")
    assert silent["measures"]["distinct_3"] is None and silent["measures"]["avg_response_length"] == 0
    texts = told.sections()["Off the training distribution"]
    assert texts[0].rows[4][0] == "lsd" and texts[0].rows[4][5] == "-"
    assert all("-" in row for row in texts[2].rows if row[0] == "lsd")
    ood = {(e["model_name"], e["pack_name"]): e["ood_metrics"] for e in found["results"]}
    assert ood["base", "cocaine_100"]["unique_ngrams"] == 6 == ood["instruct", "cocaine_100"]["unique_ngrams"]
    assert ood["base", "cocaine_100"]["perplexity"] == pytest.approx(np.e)


def test_numbers_of_texts_stand_beside_their_intervals(full):
    told = Report(full.study, full.findings)
    raw, matched, less, less_matched = told.sections()["Off the training distribution"]
    entry = full.findings.writing[3]
    assert entry["arm"] == "cocaine_100"
    m, against = entry["measures"], entry["against_sober"]
    low, high = m["perplexity_sober_interval"]
    row = dict(zip(raw.headers, raw.rows[3], strict=True))
    assert row["perplexity, sober"] == f"{m['perplexity_sober']:.3f} [{low:.3f}, {high:.3f}]"
    assert row["refusals"] == "1.000 [1.000, 1.000]" and row["words"] == "11.0 [11.0, 11.0]"
    row = dict(zip(less.headers, less.rows[2], strict=True))
    low, high = against["distinct_3"]["interval"]
    assert row["distinct trigrams"] == f"{against['distinct_3']['difference']:+.3f} [{low:+.3f}, {high:+.3f}]*"
    assert row["refusals"] == "+1.000 [+1.000, +1.000]*"
    assert len(less.rows) == 2 * 4, "every arm but the sober one, of both models"
    # The psychedelic wrote nothing, so nothing is left at equal length.
    assert set(matched.rows[3][1:5]) == {"-"} and less_matched.rows[2][1] == "-"


def test_the_headline_is_about_the_largest_dose_of_the_main_series(lab):
    made = lab.make(lab.sharpened([1, 2, 3, 4], n=20), packs=["none", "cocaine_100", "cocaine_10", "lsd"])
    told = Report(made.study, made.findings)
    page = told.html(IDENTITY, {})
    first, last = (made.findings.profile(label)["confidence"] for label in ("none", "cocaine_100"))
    assert f"{first:.3f} \u2192 {last:.3f}" in page and "none \u2192 cocaine_100" in page
    assert told.top == 1


# --- Few arms and many ------------------------------------------------------------------------------------------------


def test_one_arm_is_a_report_too(lab, drawn):
    made = lab.make(lab.sharpened([1], n=20), packs=["none"])
    told = Report(made.study, made.findings)
    figures = told.figures()
    assert list(figures) == ["reliability", "metrics", "risk_coverage"] and len(drawn) == 3
    assert all(png.startswith(PNG) for _, png, _ in figures.values())
    text = check_all_say_the_same(made, figures)
    assert list(told.sections()) == [
        "After all effects", "Before the sampler's effects", "Probability of the letters", "Questions"
    ]  # fmt: skip
    assert text.count("Not measured") == 7 == sum(v.verdict == "undecided" for v in told.verdicts.items)
    results.dump_json(output.result_json(made.study, made.findings, told, IDENTITY, {}))


@pytest.fixture(scope="module")
def many(lab):
    """16 arms of 2 models: 10 series."""
    arms = conditions.from_causes(conditions.CAUSES, "cocaine", ["0.25", "0.5", "1"])
    probs, labels = lab.sharpened([1 + arm.dose for arm in arms], n=20)
    return lab.make([(probs, labels), (probs[::-1], labels)], arms=arms, bootstrap_draws=100)


def test_many_arms_are_all_in_the_tables_and_as_many_as_can_be_told_apart_in_the_figures(many, drawn, monkeypatch):
    for slow in ("reliability_png", "metrics_png"):
        monkeypatch.setattr(report.tables, slow, lambda *_: PNG)
    told = Report(many.study, many.findings)
    figures = told.figures()
    dose, risk, _ = drawn

    def curves(axes):
        return [line.get_label() for line in axes.get_lines() if not line.get_label().startswith("_")]

    series = ["temperature", "qk", "steering", "full", "placebo", "instruct: temperature"]
    assert [curves(axes) for axes in dose.axes if axes.get_visible()] == [series] * len(report.DOSE_METRICS)
    assert figures["dose_response"][2].endswith("Shown: 6 of 10 series.")
    shown = curves(risk.axes[0])
    assert shown == ["none", "temperature@1", "qk@1", "steering@1", "full@1", "instruct: none"]
    assert len(shown) == MOST_CURVES
    assert figures["risk_coverage"][2].endswith("Shown: 6 of 32 arms.")
    check_all_say_the_same(many, {})
    assert len(told.sections()["After all effects"][0].rows) == 32


@pytest.mark.slow
def test_figures_of_many_arms(many):
    figures = Report(many.study, many.findings).figures()
    assert all(png.startswith(PNG) and len(png) > 10_000 for _, png, _ in figures.values())
    assert list(figures) == ["reliability", "metrics", "dose_response", "risk_coverage", "comparison"]
