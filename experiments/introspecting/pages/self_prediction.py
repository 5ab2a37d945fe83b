"""What the page shows of self-prediction."""

from __future__ import annotations

from typing import Any

from nmjax.report.page import Block, Paragraph, Picture
from nmjax.report.plots_detection import ForestRow, forest_figure
from nmjax.report.tables import Table, estimate, number, with_interval

_LONGEST = 28  # characters of an answer in a table


def section(findings: dict[str, Any]) -> list[Block]:
    """Tables and a forest plot of the findings of `experiments.introspecting.suites.self_prediction`."""
    subjects = findings["subjects"]
    blocks: list[Block] = [
        Paragraph(
            f"Each of {findings['n']} questions was asked twice, in conversations apart and with greedy answers: once "
            "for an answer, and once for a property of the answer that the model would give, such as its first word or "
            "whether it begins with a vowel. A prediction is right where the answer has the property it names. What "
            "can't be read as a prediction is no answer: it is counted apart and never taken for a no."
        ),
        Paragraph(
            "A model that always says the same is easy to predict. So what counts is accuracy above the majority: that "
            "of always naming the value that its own answers to a task have most often. This guess has seen the "
            "answers it is scored on, which makes it a bit too good where they are few; held out, it knows only the "
            "other half of them, which makes it a bit too bad. Balanced accuracy is of yes-or-no properties, chance is "
            "0.5. Entropy is that of a task's values, in bits; where it is near 0 there is nothing to predict."
        ),
    ]
    forest = {
        name: {
            kind: ForestRow(own["above_majority"], own["above_majority_interval"])
            for kind, own in ({"all": found["all"]} | found["kinds"]).items()
            if own["above_majority_interval"] is not None
        }
        for name, found in subjects.items()
    }
    if any(forest.values()):
        blocks.append(
            Picture(
                forest_figure(forest, "accuracy above the majority", chance=0.0),
                "How much better each model predicts its own answers than their commonest value does, with 95% "
                "intervals over questions. Where that is right of the line, it knows more of itself than its habits.",
                "Forest plot of accuracy above the majority, a line a model, by kind of property.",
            )
        )
    blocks += [
        Table(
            ["model", "above majority", "accuracy", "majority", "held out", "balanced accuracy", "unread", "no value",
             "entropy", "commonest answer"],
            [_standing(name, found["all"]) for name, found in subjects.items()],
            "Predictions of one's own answers, all tasks. Unread: share of predictions that can't be read; no value: "
            "answers that lack the property, as two words have no third.",
        ),
        Table(
            ["predicted by", *subjects],
            [
                [p, *map(estimate, cells.values())]
                for p, cells in findings["matrix"].items()
            ],
            "Accuracy by who predicts (rows) and whose answers are predicted (columns). One's own are on the diagonal.",
        ),
    ]  # fmt: skip
    if len(subjects) > 1:
        blocks += [
            Table(
                ["instead of itself", *subjects],
                [[p, *(estimate(findings["advantage"][b].get(p), sign=True) for b in subjects)] for p in subjects],
                "How much better the model of a column predicts itself than the model of the row predicts it, on the "
                "questions where both predictions can be read. Where the interval is above 0, it knows of itself what "
                "the other does not; among many cells, some are there by chance.",
            ),
            Table(
                ["adapter", "above majority", "accuracy", "questions"],
                [
                    [
                        name,
                        *(estimate(v[kind], sign=True) for kind in ("above_majority", "accuracy")),
                        str(v["accuracy"]["n"]),
                    ]
                    for name, v in findings["versus_base"].items()
                ],
                "Difference to the base, on the questions that count for both.",
            ),
        ]
    tasks = next(iter(subjects.values()))["tasks"]
    blocks += [
        Table(
            ["task", *subjects],
            [
                [task, *(_above(own["tasks"][task]) for own in subjects.values())]
                for task in tasks
            ],
            "Accuracy above the majority by task; - where no prediction can be read.",
        ),
        Table(
            ["task", "model", "answer", "has", "prediction", "read as"],
            [
                [example["task"], name, _short(a["object_level"]), _value(a["value"]), _short(a["hypothetical"]),
                 _value(a["stated"])]
                for example in findings["examples"] for name, a in example["answers"].items()
            ],
            "An example of each task.",
        ),
    ]  # fmt: skip
    return blocks


def _standing(name: str, own: dict[str, Any]) -> list[str]:
    return [
        name,
        _above(own),
        with_interval(own["accuracy"], own["accuracy_interval"]),
        number(own["majority"]),
        number(own["held_out_majority"]),
        with_interval(own["balanced_accuracy"], own["balanced_accuracy_interval"]),
        with_interval(own["unread"] / own["n"], own["unread_interval"]),
        number(own["no_value"] / own["n"]),
        number(own["entropy"], 2),
        number(own["commonest"], 2),
    ]


def _above(own: dict[str, Any]) -> str:
    return with_interval(own["above_majority"], own["above_majority_interval"], sign=True)


def _value(value: str | bool | None) -> str:
    return "-" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else f'"{value}"'


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}\u2026"
