"""The page that compares all models: verdicts, learning curves, and a section a suite."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from experiments.introspecting import pages, predictions
from nmjax.report.page import Block, Heading, Paragraph, Picture, closing, made_at, render_page
from nmjax.report.plots_training import Curve, CurvePanel, curves_figure
from nmjax.report.tables import Table, number, with_interval
from nmjax.report.verdicts import Verdicts

TITLES = {
    "detection": "Detection: was something done to its activations?",
    "behavior": "What it says of itself: probabilities of yes",
    "identity": "Who it says it is: free answers",
    "self_prediction": "Does it know what it would say?",
    "self_calibration": "Does it know how its answers are distributed?",
    "concepts": "Which concept was injected?",
    "localization": "Where, and how strongly?",
}
READING = (
    "All models are one base with different adapters; the base itself is one of them. Brackets hold 95% intervals. A "
    "difference to the base is taken question by question, on the same items.",
    "A verdict of 'no effect' or 'similar' is an equivalence test: its 90% interval has to lie in a margin that was "
    "fixed before. An interval that is too wide for that is undecided, and not evidence of absence.",
    "Probability mass says how much of the vocabulary's probability falls on the answers that are compared. If it is "
    "small, a ratio of two answers is about what the model hardly ever says.",
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a run found.

    Attributes:
      findings: by suite.
      trainings: contents of training.json by adapter, of those that were trained here.
      identity: of the run.
    """

    findings: Mapping[str, dict[str, Any]]
    trainings: Mapping[str, dict[str, Any]]
    identity: Mapping[str, Any]

    def verdicts(self) -> Verdicts:
        return Verdicts(predictions.verdicts(self.findings, self.trainings))

    @functools.cached_property
    def blocks(self) -> list[Block]:
        """All of the page; its figures are drawn once."""
        blocks: list[Block] = [Heading("The predictions"), self.verdicts()]
        if self.trainings:
            blocks += [Heading("Training"), *training_blocks(self.trainings)]
        for name, found in self.findings.items():
            blocks += [Heading(TITLES[name]), *pages.section(name, found)]
        return [*blocks, *closing(READING, self.identity)]

    def html(self) -> str:
        names = ", ".join(self.identity["config"]["adapters"]) or "no adapter"
        subtitle = f"{self.identity['config']['model']} with {names}, {made_at(self.identity)}"
        return render_page("Introspection", subtitle, self.blocks)

    def text(self) -> str:
        """Verdicts and tables."""
        parts = ["The predictions\n" + self.verdicts().text()]
        for block in self.blocks:
            if isinstance(block, Heading):
                parts.append(f"# {block.text}")
            elif isinstance(block, Table):
                parts.append(block.text())
        return "\n\n".join(parts) + "\n"

    def pictures(self) -> dict[str, bytes]:
        """PNG bytes by name of the section and number in it."""
        section, found = "", {}
        for block in self.blocks:
            if isinstance(block, Heading):
                section, count = next((k for k, title in TITLES.items() if title == block.text), "training"), 0
            elif isinstance(block, Picture):
                count += 1
                found[f"{section}_{count}"] = block.png
        return found


def training_blocks(trainings: Mapping[str, dict[str, Any]]) -> list[Block]:
    """How the trainings went: curves on validation records, and results on records never seen."""

    def curves(name: str) -> dict[str, Curve]:
        found = {}
        for adapter, training in trainings.items():
            seen = [(record["step"], record[name]) for record in training["history"] if record.get(name) is not None]
            if seen:
                found[adapter] = Curve([step for step, _ in seen], [[value for _, value in seen]])
        return found

    panels = [
        CurvePanel(title, curves(name))
        for title, name in (
            ("Accuracy on validation records", "val_accuracy"),
            ("Loss among the answers, nats", "val_loss"),
            ("AUROC on validation records", "val_auroc"),
            ("Probability of all answers together", "val_pair_mass"),
        )
    ]
    rows = []
    for adapter, training in trainings.items():
        tests = [with_interval(test["value"], test["interval"]) for test in training["test"].values()]
        config, best = training["identity"]["config"], training["best"]
        rows.append(
            [
                adapter,
                str(config["variant"]),
                f"{training['steps']:,}",
                str(config["seed"]),
                f"{training['trainable']:,}",
            ]
            + [number(best["val_accuracy"]), str(best["step"])]
            + tests
            + [""] * (3 - len(tests))
        )
    equal = len({(training["steps"], training["identity"]["config"]["seed"]) for training in trainings.values()}) == 1
    how = "the same number of steps, with the same seed" if equal else "numbers of steps or seeds of their own"
    headers = ["adapter", "variant", "steps", "seed", "trained numbers", "best validation accuracy", "at step"]
    headers += ["accuracy, held out", "answer mass, held out", "AUROC, held out"]
    return [
        Paragraph(
            f"The trainings took {how}. Held-out results are those of the last step; where the records were drawn "
            "here, the held-out ones have conversations, questions and vectors of their own."
        ),
        Picture(
            curves_figure([panel for panel in panels if panel.curves]),
            "Learning curves.",
            "Validation accuracy, loss, AUROC and answer mass by training step, a line for each adapter",
        ),
        Table(headers, rows, "What was trained"),
    ]
