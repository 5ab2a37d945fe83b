"""B7 on the page: whether models say where, how strongly and when they were steered."""

from __future__ import annotations

from typing import Any

from nmjax.report.page import Block, Paragraph, Picture
from nmjax.report.plots_detection import ForestRow, forest_figure
from nmjax.report.tables import Table, estimate, p_text


def section(findings: dict[str, Any]) -> list[Block]:
    """A table for each task, a figure of all, and what models that were trained for it answer to what."""
    tasks = findings["tasks"]
    blocks: list[Block] = [
        Paragraph(
            "The model reads a conversation while a random direction is added to its activations, and is then asked, "
            "without steering, in which third of its layers that was, how strong it was, or while which of several "
            "numbered sentences. Each possible answer is scored as a whole by its log-probability; the highest is "
            f"what the model says. {findings['records']} conversations a task, {findings['vectors']} directions; "
            "neither these nor the wordings of trained questions occurred in training."
        ),
        Paragraph(
            "Balanced accuracy is the mean over the answers of how often each is given where it is right. A model that "
            "always says the same has the accuracy \u201calways one answer\u201d, but a balanced accuracy of chance: "
            "there is a signal if its interval lies above chance and p is below 0.05. AUROC asks less: whether an "
            "answer is likelier where it is right than elsewhere, even if it is never the likeliest; below 0.5, "
            "answers follow what was done the wrong way round. Intervals are over directions; p is that of a "
            "permutation test of the balanced accuracy, corrected for all rows of all tables (Benjamini-Hochberg). "
            "Failed are conversations that gave no finite number; they are left out."
        ),
    ]
    for task in tasks:
        blocks.append(_task(task))
    blocks.append(_forest(tasks))
    blocks += [
        _confusion(task, name, report)
        for task in tasks
        if task["trained"]
        for name, report in task["subjects"].items()
        if name in task["versus_base"]
    ]
    return blocks


def _task(task: dict[str, Any]) -> Table:
    headers = [
        "model", "balanced accuracy", "difference to base", "accuracy", "AUROC", "p", "signal", "says most",
        "probability of the answers", "failed",
    ]  # fmt: skip
    rows = []
    for name, report in task["subjects"].items():
        difference = task["versus_base"].get(name)
        most = max(range(len(report["given"])), key=report["given"].__getitem__)
        rows.append(
            [
                name,
                estimate(report["balanced_accuracy"]),
                estimate(difference, sign=True),
                estimate(report["accuracy"]),
                estimate(report["macro_auroc"]),
                p_text(report["p_adjusted"]),
                "yes" if report["above_chance"] and report["p_adjusted"] < 0.05 else "no",
                f"{task['answers'][most]} ({report['given'][most]:.0%})",
                f"{report['mass']:.2g}",
                str(report["failed"]),
            ]
        )
    first = next(iter(task["subjects"].values()))
    asked = "Asked as in training, for example" if task["trained"] else "Asked without training"
    caption = (
        f"{task['kind'].capitalize()}: {', '.join(task['answers'])}. {asked}: \u201c{task['question']}\u201d "
        f"Chance {first['chance']:.3f}, always one answer {first['prior']:.3f}"
    )
    return Table(headers, rows, caption)


def _forest(tasks: list[dict[str, Any]]) -> Picture:
    rows: dict[str, dict[str, ForestRow]] = {}
    for task in tasks:
        for name, report in task["subjects"].items():
            auroc = report["macro_auroc"]
            rows.setdefault(name, {})[task["name"]] = ForestRow(auroc["value"], auroc["interval"])
    return Picture(
        forest_figure(rows, "AUROC, mean over the answers"),
        "How well the answers' log-probabilities tell where, how strongly and when a model was steered.",
        "A row for each model with the AUROC of each localization task and its interval.",
    )


def _confusion(task: dict[str, Any], name: str, report: dict[str, Any]) -> Table:
    rows = [
        [answer, *(f"{count:g}" for count in counts)]
        for answer, counts in zip(task["answers"], report["confusion"], strict=True)
    ]
    caption = f"{name}, {task['kind']}: what it was (rows) and what the model said (columns), conversations"
    return Table(["was", *task["answers"]], rows, caption)
