"""A calibration study as tables, figures, text and one page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nmjax.metrics.battery import Battery
from nmjax.report import page
from nmjax.report.plots import MetricPanel, ReliabilityPanel, metrics_figure, reliability_figure
from nmjax.report.tables import Table, number, with_interval

NAMES = {
    "accuracy": "accuracy",
    "confidence": "confidence",
    "overconfidence": "conf. - acc.",
    "brier_score": "Brier (top)",
    "brier_multiclass": "Brier (all)",
    "nll": "NLL (nats)",
    "ece": "ECE",
    "mce": "MCE",
}
"""How a metric's key is printed."""


MEAN_KEYS = ("accuracy", "confidence", "overconfidence", "brier_score", "brier_multiclass", "nll")


def means_table(battery: Battery, labels: Sequence[str], keys: Sequence[str] = MEAN_KEYS) -> Table:
    """The metrics that are means over questions, with their bootstrap intervals."""
    rows = [
        [label, *(with_interval(p[key], p["intervals"][key], sign=key == "overconfidence") for key in keys)]
        for label, p in zip(labels, battery.profiles, strict=True)
    ]
    return Table(["pack", *(NAMES[key] for key in keys)], rows, "Means over questions [95% bootstrap interval]")


def binned_table(battery: Battery, labels: Sequence[str]) -> Table:
    """ECE and MCE, each with its band under perfect calibration, p-value and debiased value; debiased L2."""
    rows = []
    for label, p in zip(labels, battery.profiles, strict=True):
        cells = [label]
        for key in ("ece", "mce"):
            null = p["under_perfect_calibration"][key]
            band = f"{number(null['band'][0])} to {number(null['band'][1])}"
            cells += [number(p[key]), band, p_text(null["p_value"]), number(p[f"debiased_{key}"])]
        rows.append([*cells, number(p["debiased_l2"])])
    headers = ["pack", "ECE", "if calibrated", "p", "debiased", "MCE", "if calibrated", "p", "debiased", "L2, debiased"]
    caption = "Calibration error; 'if calibrated' is where 95% of the values of a perfectly calibrated model would lie"
    return Table(headers, rows, caption)


def differences_table(
    battery: Battery, labels: Sequence[str], baseline: str, keys: Sequence[str] = tuple(NAMES)
) -> Table:
    """Every condition less the baseline, with paired intervals; a star marks those that leave out 0."""
    rows = []
    for label, difference in zip(labels, battery.differences, strict=True):
        if difference is not None:
            cells = []
            for key in keys:
                low, high = difference[key]["interval"]
                star = "*" if round(low, 3) > 0 or round(high, 3) < 0 else " "  # as printed
                cells.append(with_interval(difference[key]["difference"], (low, high), sign=True) + star)
            rows.append([label, *cells])
    caption = f"Difference from {baseline} on the same questions [paired 95% interval; * leaves out 0]"
    return Table(["pack", *(NAMES[key] for key in keys)], rows, caption)


def p_text(p_value: float) -> str:
    """`0.034`, or `<0.001` where more decimals would say nothing."""
    return "<0.001" if p_value < 0.001 else number(p_value)


def reliability_png(battery: Battery, labels: Sequence[str]) -> bytes:
    """Reliability diagrams, one a condition."""
    panels = [
        ReliabilityPanel(
            title=label,
            bins=battery.bins[k],
            band=battery.bands[k],
            notes=[(name, number(battery.profiles[k][key])) for name, key in
                   (("acc", "accuracy"), ("conf", "confidence"), ("ECE", "ece"))],
        )
        for k, label in enumerate(labels)
    ]  # fmt: skip
    return reliability_figure(panels)


def metrics_png(battery: Battery, labels: Sequence[str]) -> bytes:
    """Every metric by condition, with intervals, or with the band under perfect calibration for ECE and MCE."""
    panels = []
    for key, name in NAMES.items():
        values = [p[key] for p in battery.profiles]
        if key in ("ece", "mce"):
            bands = [p["under_perfect_calibration"][key]["band"] for p in battery.profiles]
            panels.append(MetricPanel(name, values, None, None, [b[0] for b in bands], [b[1] for b in bands]))
        else:
            intervals = [p["intervals"][key] for p in battery.profiles]
            panels.append(MetricPanel(name, values, [i[0] for i in intervals], [i[1] for i in intervals]))
    return metrics_figure(panels, labels, battery.differences.index(None))


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What a reader is told about a study of P packs: the same numbers as text and as a page.

    `after` and `before`: measured after all effects, and before the sampler's. `mass` [P]: for each pack the mean and
    least probability of the answer letters, {"after_all_effects": {"mean", "min"}, "before_sampler": {...}}.
    """

    model: str
    labels: Sequence[str]
    baseline: int
    num_questions: int
    num_subjects: int
    draws: int
    after: Battery
    before: Battery
    mass: Sequence[Mapping[str, Any]]

    def sections(self) -> dict[str, list[Table]]:
        """All tables by section title."""
        found = {}
        for title, battery in (("After all effects", self.after), ("Before the sampler's effects", self.before)):
            found[title] = [means_table(battery, self.labels), binned_table(battery, self.labels)]
            if len(self.labels) > 1:
                found[title].append(differences_table(battery, self.labels, self.labels[self.baseline]))
        found["Probability of the letters"] = [self._mass_table()]
        return found

    def headline(self) -> str:
        """The summary that fits a terminal."""
        parts = [
            f"Calibration under the influence: {self.model}, {self.num_questions} questions of {self.num_subjects} "
            f"subjects, {self.draws} bootstrap draws.\n"
            "Probabilities over the four letters after all effects, the sampler's included.",
            means_table(self.after, self.labels, ("accuracy", "confidence", "brier_score", "nll")).text(),
            binned_table(self.after, self.labels).text(),
        ]
        if len(self.labels) > 1:
            keys = ("accuracy", "confidence", "ece", "brier_score")
            parts.append(differences_table(self.after, self.labels, self.labels[self.baseline], keys).text())
        return "\n\n".join(parts) + "\n"

    def text(self) -> str:
        """The headline and all tables."""
        text = self.headline()
        for title, tables in self.sections().items():
            text += f"\n\n== {title} ==\n\n" + "\n\n".join(table.text() for table in tables) + "\n"
        return text

    def html(self, identity: Mapping[str, Any], reliability: bytes, metrics: bytes) -> str:
        """The page: headline numbers, the two figures (PNG), all tables, how to read them, and who made them."""
        blocks: list[page.Block] = [
            self._cards(),
            page.Heading("Reliability"),
            page.Picture(
                reliability,
                "Accuracy against confidence in ten bins, after all effects. Points below the diagonal: more confident "
                "than right. A point outside the shaded band is miscalibration that chance does not explain.",
                f"Reliability diagrams of {', '.join(self.labels)}",
            ),
            page.Heading("Measures by pack"),
            page.Picture(
                metrics,
                "Points with 95% bootstrap intervals; ECE and MCE with the shaded band under perfect calibration in "
                f"their place. The vertical line is {self.labels[self.baseline]}.",
                "Every measure by pack",
            ),
        ]
        for title, tables in self.sections().items():
            blocks += [page.Heading(title), *tables]
        blocks += page.closing(_READING, identity)
        subtitle = (
            f"{self.model} on {self.num_questions} four-choice questions under {', '.join(self.labels)}. "
            f"{page.made_at(identity)}"
        )
        return page.render_page("Calibration under the influence", subtitle, blocks)

    def _cards(self) -> page.Cards:
        first, last = self.after.profiles[self.baseline], self.after.profiles[-1]
        span = f"{self.labels[self.baseline]} \u2192 {self.labels[-1]}"

        def change(key: str) -> str:
            return f"{number(first[key])} \u2192 {number(last[key])}"

        p_value = p_text(last["under_perfect_calibration"]["ece"]["p_value"])
        return page.Cards(
            [
                ("Questions", str(self.num_questions), f"{self.num_subjects} subjects, the same for all packs"),
                ("Accuracy", change("accuracy"), span),
                ("Mean confidence", change("confidence"), span),
                ("ECE", change("ece"), f"{span}; p {p_value} against perfect calibration"),
            ]
        )

    def _mass_table(self) -> Table:
        rows = [
            [label, *(number(entry[when][what], 4) for when in ("after_all_effects", "before_sampler")
                      for what in ("mean", "min"))]
            for label, entry in zip(self.labels, self.mass, strict=True)
        ]  # fmt: skip
        headers = ["pack", "mean", "least", "mean before sampler", "least before sampler"]
        return Table(headers, rows, "Probability of the four letters together, before renormalising")


_READING = (
    "Confidence is the largest of the four letters' probabilities, renormalised over the letters. ECE is the "
    "count-weighted mean distance of confidence and accuracy over ten equal bins, MCE the largest one. Both are above "
    "0 even for a perfectly calibrated model, hence their distribution under perfect calibration (simulated from the "
    "confidences; p is the share at or above the value seen) and debiased values (Kumar et al. 2019) in place of "
    "bootstrap intervals.",
    "Before the sampler's effects is what the network alone says; a colder sampler sharpens the letters' probabilities "
    "without touching the network.",
    "Differences are paired: all packs answered the same questions, and each bootstrap draw compares them on the same "
    "resample. Intervals of differences of ECE and MCE allow for the unknown bias of both sides and are wide. No "
    "interval is corrected for the number of comparisons; the p-values of the paired tests in the JSON file are.",
)
