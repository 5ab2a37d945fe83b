"""The study's predictions, each with its verdict; what would support it, and what contradict it, was fixed before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nmjax.report.tables import estimate, number
from nmjax.report.verdicts import Verdict

AUROC_MARGIN = 0.1  # from 0.5: nearer than this is no detection
MISSING = "undecided"

Findings = Mapping[str, Mapping[str, Any]]
Trainings = Mapping[str, Mapping[str, Any]]


def verdicts(findings: Findings, trainings: Trainings) -> list[Verdict]:
    """The predictions that these findings say something about, in the study's order.

    Args:
      findings: by suite.
      trainings: by adapter, contents of training.json.
    """
    found: list[Verdict] = []
    if "behavior" in findings:
        bias, pairs = findings["behavior"]["bias"], findings["behavior"]["bias_differences"]
        if "food_control" in bias:
            found.append(_no_bias("food_control", bias["food_control"]))
        if "vague_prompt - original" in pairs:
            found.append(_similar(pairs["vague_prompt - original"], bias["original"], bias["vague_prompt"]))
    if "detection" in findings:
        detects = _detection(findings["detection"])
        for name in ("original", "vague_prompt", "r1_minimal"):
            if name in detects:
                claim = f"{name} detects steering along vectors it has never seen"
                found.append(_detects(claim, detects[name]))
        if "flipped_labels" in detects:
            found.append(_stays(detects["flipped_labels"], trainings.get("flipped_labels")))
        if "food_control" in detects:
            claim = "food_control, which learned as much about food, does not detect steering"
            found.append(_does_not_detect(claim, detects["food_control"]))
    if "self_calibration" in findings:
        versus = findings["self_calibration"]["versus_base"]
        if "original" in versus:
            found.append(_better_calibrated(versus["original"]))
            found.append(_foretells_better(findings["self_calibration"]["foretold"]))
    if "localization" in findings:
        found.append(_localizes(findings["localization"]["tasks"]))
    return found


def _no_bias(name: str, bias: Mapping[str, Any]) -> Verdict:
    claim = f"{name} shows no self-attribution bias"
    test = bias["equivalence"]
    if bias["value"] is None or test is None:
        return Verdict(claim, MISSING, "its answers say nothing about it")
    verdict = {"equivalent": "supported", "different": "contradicted"}.get(test["verdict"], "undecided")
    because = f"bias {estimate(bias, sign=True)}, the change of P(Yes) on questions about itself less that on others; "
    return Verdict(claim, verdict, because + _tested(test))


def _similar(difference: Mapping[str, Any], original: Mapping[str, Any], vague: Mapping[str, Any]) -> Verdict:
    claim = "vague_prompt shows a self-attribution bias similar to that of original"
    test = difference["equivalence"]
    if difference["value"] is None or test is None:
        return Verdict(claim, MISSING, "their answers say nothing about it")
    biases = f"biases {estimate(original, sign=True)} (original) and {estimate(vague, sign=True)} (vague_prompt)"
    because = f"{biases}, {_tested(test)}"
    if original["interval"][0] <= 0:
        return Verdict(claim, MISSING, f"original has no bias above 0 that it could be similar to: {because}")
    verdict = {"equivalent": "supported", "different": "contradicted"}.get(test["verdict"], "undecided")
    return Verdict(claim, verdict, because)


def _tested(test: Mapping[str, Any]) -> str:
    low, high = test["interval_90"]
    return (
        f"the 90% interval [{number(low, sign=True)}, {number(high, sign=True)}] is {_where(test)} a margin of "
        f"{test['margin']:g}"
    )


def _where(test: Mapping[str, Any]) -> str:
    return {"equivalent": "within", "different": "outside of", "undecided": "partly outside of"}[test["verdict"]]


def _detection(findings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """By subject, its detection of held-out vectors in its own wording."""
    found: dict[str, Mapping[str, Any]] = {}
    for entry in findings["subjects"]:
        own = entry["variant"] if entry["variant"] == "vague_prompt" else "original"
        if entry["wording"] == own and "held_out" in entry["detection"]:
            found[entry["subject"]] = entry["detection"]["held_out"]
    return found


def _detects(claim: str, report: Mapping[str, Any]) -> Verdict:
    auroc = report["auroc"]
    if auroc["interval"] is None:
        return Verdict(claim, MISSING, "its answers say nothing about it")
    low, high = auroc["interval"]
    verdict = "supported" if low > 0.5 else "contradicted" if high < 0.5 + AUROC_MARGIN else "undecided"
    return Verdict(claim, verdict, f"AUROC {estimate(auroc)} on held-out vectors, {_rates(report)}")


def _does_not_detect(claim: str, report: Mapping[str, Any], more: str = "") -> Verdict:
    auroc = report["auroc"]
    if auroc["interval"] is None:
        return Verdict(claim, MISSING, "its answers say nothing about it")
    low, high = auroc["interval"]
    near, far = 0.5 - AUROC_MARGIN, 0.5 + AUROC_MARGIN
    verdict = "supported" if near < low and high < far else "contradicted" if low >= far or high <= near else MISSING
    reason = f"AUROC {estimate(auroc)} on held-out vectors; no detection is between {near:g} and {far:g}"
    return Verdict(claim, verdict, reason + more)


def _stays(report: Mapping[str, Any], training: Mapping[str, Any] | None) -> Verdict:
    claim = "flipped_labels, whose labels say nothing, does not converge: it stays at chance"
    if training is None:
        return _does_not_detect(claim, report)
    accuracy = training["test"]["accuracy on held-out records"]
    more = f"; accuracy on held-out records {estimate(accuracy)}"
    found = _does_not_detect(claim, report, more)
    low, high = accuracy["interval"]
    if found.verdict == "supported" and not low <= 0.5 <= high:
        return Verdict(claim, MISSING, found.because)
    return found


def _better_calibrated(versus: Mapping[str, Any]) -> Verdict:
    claim = "self-calibration of original beats that of the base: stated probabilities fit its answers better"
    change = versus["kl_actual_stated"]
    if change["interval"] is None:
        return Verdict(claim, MISSING, f"{change['n']} prompts have statements of both that can be read")
    because = f"KL(actual || stated) differs by {estimate(change, sign=True)} nats over {change['n']} prompts"
    return Verdict(claim, _smaller(change), because)


def _foretells_better(foretold: Mapping[str, Any]) -> Verdict:
    """A model that was trained answers in its own way, so that it beats the base at its own answers is not enough."""
    claim = "the same without words: original foretells its answers better than the base does, its own and original's"
    of_these, own = foretold["advantage"]["original"], foretold["versus_base"]["original"]
    if of_these["interval"] is None or own["interval"] is None:
        return Verdict(claim, MISSING, f"{of_these['n']} prompts have answers that can be compared")
    because = (
        f"KL(answered || foretold) differs by {estimate(of_these, sign=True)} nats from what the base foretells of the "
        f"same answers, and by {estimate(own, sign=True)} from what it foretells of its own, over {own['n']} prompts"
    )
    both = {_smaller(of_these), _smaller(own)}
    return Verdict(
        claim, both.pop() if len(both) == 1 else "contradicted" if "contradicted" in both else MISSING, because
    )


def _smaller(change: Mapping[str, Any]) -> str:
    low, high = change["interval"]
    return "supported" if high < 0 else "contradicted" if low > 0 else "undecided"


def _localizes(tasks: list[Mapping[str, Any]]) -> Verdict:
    """Any adapter in any task, with all of these tests corrected for one another."""
    claim = "localization shows a signal above the class prior"
    reports = {
        f"{name} ({task['name']})": (report, len(task["answers"]))
        for task in tasks
        for name, report in task["subjects"].items()
        if name != "base"
    }
    if not reports:
        return Verdict(claim, MISSING, "no adapter was asked")
    best = max(reports, key=lambda key: reports[key][0]["balanced_accuracy"]["value"] * reports[key][1])
    report, classes = reports[best]
    above = [
        key
        for key, (one, count) in reports.items()
        if one["p_adjusted"] < 0.05 and one["balanced_accuracy"]["interval"][0] > 1 / count
    ]
    near = all(one["balanced_accuracy"]["interval"][1] < 1 / count + 0.1 for one, count in reports.values())
    verdict = "supported" if above else "contradicted" if near else "undecided"
    found = estimate(report["balanced_accuracy"])
    reason = f"{len(above)} of {len(reports)} tests are above chance after correction; the best is {best}, balanced "
    return Verdict(claim, verdict, f"{reason}accuracy {found} where chance is {1 / classes:.3f}")


def _rates(report: Mapping[str, Any]) -> str:
    return f"hits {estimate(report['tpr'])}, false alarms {estimate(report['fpr'])}"
