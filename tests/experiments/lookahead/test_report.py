"""What a comparison says: its verdicts follow from the numbers, and text and page hold the numbers of the file."""

import copy
import dataclasses
import html
import re
import statistics

import numpy as np
import pytest

from experiments.lookahead import claims, output
from experiments.lookahead.arms import CONFIDENCE, EQUAL_FLOPS, STANDARD, UNTOLD
from experiments.lookahead.figures import ARMS
from experiments.lookahead.report import Report
from experiments.lookahead.results import load_results
from nmjax.metrics.seeds import over_seeds
from nmjax.report.verdicts import Verdict

BELOW, ABOVE, ACROSS, NOTHING = [-3.0, -2.0, -2.5], [3.0, 2.0, 2.5], [-1.0, 1.0, 0.5], [0.0, 0.0, 0.0]


def changed(compared, path, values):
    """The findings with another quantity over seeds at `path`."""
    findings = copy.deepcopy(compared.findings)
    *most, last = path
    place = findings
    for name in most:
        place = place[name]
    place[last] = over_seeds(values)
    return findings


# --- Verdicts ---------------------------------------------------------------------------------------------------------


def test_claims_of_a_run_whose_truth_is_known(compared):
    found = claims.verdicts(compared.findings)
    assert [v.verdict for v in found] == [
        "supported",
        "supported",
        "supported",
        "contradicted",
        "supported",
        "supported",
    ]
    assert claims.answer(found) == "Yes, and MiniGPT is as good or better at equal FLOPs"


@pytest.mark.parametrize(
    ("claim", "path", "values", "verdict"),
    [
        (0, ("differences", "zeros"), ABOVE, "contradicted"),
        (0, ("differences", "shuffled"), NOTHING, "contradicted"),  # as of a model that learnt to ignore the signal
        (0, ("differences", "constant"), ACROSS, "undecided"),
        (0, ("differences", "constant"), [-3.0, None, -2.5], "undecided"),
        (0, ("differences", "constant"), BELOW, "supported"),
        (1, ("differences", UNTOLD), BELOW, "supported"),
        (1, ("differences", UNTOLD), ABOVE, "contradicted"),
        (1, ("differences", UNTOLD), ACROSS, "undecided"),
        (2, ("differences", STANDARD), BELOW, "supported"),
        (2, ("differences", STANDARD), ABOVE, "contradicted"),
        (2, ("differences", STANDARD), ACROSS, "undecided"),
        (3, ("differences", EQUAL_FLOPS), BELOW, "supported"),
        (3, ("differences", EQUAL_FLOPS), ABOVE, "contradicted"),
        (3, ("differences", EQUAL_FLOPS), ACROSS, "undecided"),
        (4, ("advantage", "entropy", "r2", "over_seeds"), ABOVE, "supported"),
        (4, ("advantage", "entropy", "r2", "over_seeds"), BELOW, "contradicted"),
        (4, ("advantage", "max_prob", "r2", "over_seeds"), ACROSS, "undecided"),
        (5, ("quality", "head", "over_seeds", "calibration_slope"), [0.99, 1.0, 1.01], "supported"),
        (5, ("quality", "head", "over_seeds", "calibration_slope"), [0.97, 0.971, 0.972], "supported"),
        (5, ("quality", "head", "over_seeds", "calibration_slope"), [0.8, 0.81, 0.79], "contradicted"),
        (5, ("quality", "head", "over_seeds", "calibration_slope"), [1.2, 1.21, 1.19], "contradicted"),
        (5, ("quality", "head", "over_seeds", "calibration_slope"), [0.8, 1.2, 1.0], "undecided"),
    ],
)
def test_each_verdict_follows_its_rule(compared, claim, path, values, verdict):
    others = [v.verdict for v in claims.verdicts(compared.findings)]
    found = [v.verdict for v in claims.verdicts(changed(compared, path, values))]
    assert found[claim] == verdict
    assert found[:claim] + found[claim + 1 :] == others[:claim] + others[claim + 1 :]


def test_reasons_name_the_numbers_and_what_is_missing(compared):
    slope = ("quality", "head", "over_seeds", "calibration_slope")
    inside = claims.verdicts(changed(compared, slope, [0.97, 0.971, 0.972]))[5].because
    assert "0.971 [0.969, 0.973]" in inside and "leaves out 1" in inside
    assert "contains 1" in claims.verdicts(changed(compared, slope, [0.99, 1.0, 1.01]))[5].because
    diverged = claims.verdicts(changed(compared, ("differences", STANDARD), [-3.0, None, -2.5]))[2]
    assert diverged.because.endswith("Undefined in at least one seed, so undecided.")


@pytest.mark.parametrize(
    ("verdicts", "answer"),
    [
        ("supported supported supported supported", "Yes, and the whole beats MiniGPT at equal FLOPs"),
        ("supported supported supported contradicted", "Yes, and MiniGPT is as good or better at equal FLOPs"),
        ("supported supported contradicted contradicted", "Yes, and MiniGPT is as good or better at equal steps"),
        (
            "supported supported supported undecided",
            "Yes, and whether the whole beats MiniGPT at equal FLOPs is undecided",
        ),
        ("supported contradicted contradicted contradicted", "No, and MiniGPT is as good or better at equal steps"),
        ("contradicted supported supported supported", "No, and the whole beats MiniGPT at equal FLOPs"),
        ("supported undecided supported supported", "Undecided, and the whole beats MiniGPT at equal FLOPs"),
        ("undecided supported supported supported", "Undecided, and the whole beats MiniGPT at equal FLOPs"),
    ],
)
def test_the_answer_follows_from_the_verdicts(verdicts, answer):
    found = [Verdict("a claim", verdict, "") for verdict in verdicts.split()]
    assert claims.answer(found) == answer
    uses, untold, equal_steps = claims.reason(found).removesuffix(".").split(". ")
    words = {"supported": ("uses the signal", "It also beats", "It is better"),
             "contradicted": ("gains nothing", "as good or better", "as good or better"),
             "undecided": ("undecided", "undecided", "undecided")}  # fmt: skip
    for k, said in enumerate((uses, untold, equal_steps)):
        assert words[verdicts.split()[k]][k] in said


# --- Numbers ----------------------------------------------------------------------------------------------------------


def plain(page):
    """A page's text: tags and data away."""
    body = page[page.index("<main>") : page.index("</main>")]
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", body)).split())


def check_all_say_the_same(report, figures):
    """Tables and verdicts stand in the text and in the page; returns both."""
    text, page = report.text(), report.html(figures)
    shown, flat = plain(page), " ".join(text.split())
    for table in (table for tables in report.sections().values() for table in tables):
        assert table.text() in text
        for row in table.rows:
            assert " ".join(row) in shown
    for verdict in report.verdicts.items:
        assert verdict.claim in flat and verdict.because in flat
        assert verdict.claim in shown and verdict.because in shown
    for line in (report.answer(), *report.plainly(), *report.improvements()):
        assert line in flat and line in shown
    assert not re.search(r"\b(nan|None|inf)\b", text + shown.split(" Identity Configuration,")[0])
    return text, page


def test_text_and_page_hold_the_numbers_of_the_file(compared, drawn):
    report = Report(compared)
    figures = report.figures()
    text, page = check_all_say_the_same(report, figures)
    finals = {}
    for arm, results in ((STANDARD, compared.standard_model_results), (CONFIDENCE, compared.confidence_model_results)):
        finals[arm] = [r.final_eval_loss for (r,) in results.values()]
        perplexities = [r.final_perplexity for (r,) in results.values()]
        for values in (finals[arm], perplexities):
            digits = 1 if statistics.mean(values) >= 10 else 3
            assert f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}" in text
    means = {arm: statistics.mean(values) for arm, values in finals.items()}
    improvement = (means[STANDARD] - means[CONFIDENCE]) / means[STANDARD]
    assert improvement > 0.1
    assert f"over MiniGPT, equal steps: {improvement:+.2%}." in text and f"{improvement:+.2%}" in page
    for name, found in compared.findings["differences"].items():
        values = np.subtract(
            compared.findings["losses"]["own"]["by_seed"], compared.findings["losses"][name]["by_seed"]
        )
        half = 4.302652729911275 * values.std(ddof=1) / np.sqrt(3)  # Student's t of 2 degrees of freedom
        shown = f"{values.mean():+.4f} [{values.mean() - half:+.4f}, {values.mean() + half:+.4f}]"
        assert found["mean"] == pytest.approx(values.mean()) and shown in text and shown in plain(page)
    assert "1.500e+09" in text and "3.000e+10" in text and "170,369" in text and "6dd9184d" in page


def test_the_page_begins_with_the_answer(compared, drawn):
    page = Report(compared).html({})
    first = re.search(r"<h2[^>]*>(.*?)</h2>", page)[1]
    assert first == "Does the confidence signal help? Yes, and MiniGPT is as good or better at equal FLOPs."
    assert "(Student's t) lies below 0" in plain(page), "the rule is stated"


def test_figures_draw_the_file(compared, drawn):
    figures = Report(compared).figures()
    assert list(figures) == ["differences", "convergence", "told", "calibration", "signal", "training", "cost"]
    differences, convergence, told, calibration, signal, training, cost = drawn
    intervals = [axes.collections[k].get_segments()[0][:, 0] for axes in differences.axes
                 for k in range(len(axes.collections))]  # fmt: skip
    wanted = [compared.findings["differences"][name]["interval"] for name in
              ("zeros", "shuffled", "constant", UNTOLD, STANDARD, EQUAL_FLOPS)]  # fmt: skip
    np.testing.assert_allclose(intervals, wanted)

    by_step, by_flops = convergence.axes
    lines = {line.get_label(): line for line in by_step.get_lines()}
    assert list(lines) == list(ARMS.values())
    results = [r for (r,) in compared.equal_flops_results.values()]
    losses = np.mean([[e["eval_loss"] for e in r.loss_history] for r in results], axis=0)
    np.testing.assert_allclose(lines["MiniGPT, equal FLOPs"].get_xydata(), np.stack([[10, 20, 30], losses], 1))
    assert by_flops.get_lines()[1].get_xdata().tolist() == [1.5e10, 3e10]

    models = [r for (r,) in compared.confidence_model_results.values()]
    lost = {line.get_label(): line.get_ydata()[-1] for line in told.axes[1].get_lines()[:3]}
    assert lost["told zeros"] == pytest.approx(-compared.findings["differences"]["zeros"]["mean"])
    np.testing.assert_allclose(calibration.axes[0].get_lines()[1].get_ydata(), models[0].held_out_sample["actual"])
    error = np.mean([[e["told_error"] for e in r.loss_history] for r in models], axis=0)
    np.testing.assert_allclose(signal.axes[0].get_lines()[0].get_ydata(), error)
    assert f"{error[-1]:.3f}" in figures["signal"][0]
    np.testing.assert_allclose(
        training.axes[1].get_lines()[0].get_ydata(), np.mean([r.confidence_loss_history for r in models], axis=0)
    )
    steps, flops = {STANDARD: 20, CONFIDENCE: 20, UNTOLD: 20, EQUAL_FLOPS: 30}, compared.flops_per_step
    assert [bar.get_width() for bar in cost.axes[2].patches] == [steps[arm] * flops[arm] for arm in steps]


# --- Files that hold less ---------------------------------------------------------------------------------------------


def test_one_seed_decides_nothing_and_says_why(single, drawn):
    report = Report(single)
    figures = report.figures()
    assert len(figures) == 7
    text, _ = check_all_say_the_same(report, figures)
    assert {v.verdict for v in report.verdicts.items} == {"undecided"}
    reasons = [v.because for v in report.verdicts.items]
    assert all(reasons[k].endswith("One seed has no interval: train several to decide.") for k in (0, 2, 4, 5))
    assert reasons[1] == "Not trained in this run: the same model, trained without the signal."
    assert reasons[3] == "Not trained in this run: MiniGPT, equal FLOPs."
    assert "help? Undecided, and whether" in text and "±" not in text.split("seconds are")[1].split("Relative")[0]
    assert "1 seed," in text


def test_an_unfinished_run_has_curves_and_no_comparison(compared, drawn):
    begun = dataclasses.replace(
        compared,
        findings={},
        untold_model_results={},
        equal_flops_results={},
        training_time={STANDARD: 1.0, CONFIDENCE: 2.0},
    )
    report = Report(begun)
    figures = report.figures()
    assert list(figures) == ["convergence", "told", "signal", "training", "cost"]
    text, page = check_all_say_the_same(report, figures)
    assert "This run is not finished." in text and "MiniGPT 20, ConfidenceAwareGPT 20 (of 20;" in text
    assert "Verdicts" not in page and not report.verdicts.items

    def cut(results):
        fields = {"loss_history": [], "final_eval_loss": None, "final_perplexity": None, "best_eval_loss": None}
        return {seed: [dataclasses.replace(r, **fields)] for seed, (r,) in results.items()}

    first = dataclasses.replace(
        begun, standard_model_results=cut(begun.standard_model_results), confidence_model_results={}, identity={}
    )
    report = Report(first)
    assert list(report.figures()) == ["training", "cost"]
    text, _ = check_all_say_the_same(report, {})
    assert report.sections()["Held-out loss"][0].rows == [["MiniGPT", "2.020 ± 0.010", "-", "-", "-", "4.5"]]
    empty = Report(dataclasses.replace(first, standard_model_results={}, training_time={}))
    assert empty.figures() == {} and "Steps so far: none" in empty.text()


def test_findings_of_something_else_are_refused(compared):
    with pytest.raises(ValueError, match=r"findings lack \['advantage', 'differences'"):
        Report(dataclasses.replace(compared, findings={"losses": {}, "quality": {}}))


# --- Files ------------------------------------------------------------------------------------------------------------


def test_everything_is_written_and_the_results_come_back(compared, tmp_path, drawn):
    paths = output.write(compared, tmp_path / "new", "20260131_235959")
    names = ["summary.txt", *(f"{n}.png" for n in Report(compared).figures()), "report.html", "results.json"]
    assert [path.name for path in paths] == [f"20260131_235959_{name}" for name in names]
    assert sorted((tmp_path / "new").iterdir()) == sorted(paths), "nothing temporary is left"
    assert load_results(paths[-1]).findings == compared.findings
    assert paths[0].read_text() == Report(compared).text() == Report(load_results(paths[-1])).text()
    assert paths[-2].read_text().count("data:image/png;base64,") == 7
