"""What a reader is told: verdicts, tables and figures, the same numbers as text and as a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.calibration.analysis import Findings
from experiments.calibration.arms import NONE
from experiments.calibration.predictions import verdicts
from experiments.calibration.study import Study, main_series
from nmjax.metrics import ranking, stats
from nmjax.report import calibration as tables
from nmjax.report import page
from nmjax.report.calibration import NAMES
from nmjax.report.plots import MetricPanel, metrics_figure
from nmjax.report.plots_comparison import ComparisonRow, comparison_figure
from nmjax.report.plots_dose import DoseCurve, DosePanel, dose_response_figure
from nmjax.report.plots_risk import risk_coverage_figure
from nmjax.report.tables import Table, number, p_text, with_interval
from nmjax.report.verdicts import Verdicts

MOST_CURVES = 6  # lines that a reader can tell apart in one figure
DOSE_METRICS = ("accuracy", "confidence", "entropy", "nll", "brier_score", "ece", "auroc")
WRITING = {
    "perplexity": "perplexity, drugged",
    "perplexity_sober": "perplexity, sober",
    "distinct_1": "distinct words",
    "distinct_2": "distinct bigrams",
    "distinct_3": "distinct trigrams",
    "distinct_4": "distinct 4-grams",
    "diversity_ratio": "trigrams, pooled",
    "repetition_rate": "repeated bigrams",
    "longest_repeated_span": "longest repetition",
    "refusal_rate": "refusals",
    "stock_phrase_rate": "stock phrases",
    "avg_response_length": "words",
}
"""How a measure of texts is printed."""
COMPARED = ("distinct_3", "repetition_rate", "longest_repeated_span", "refusal_rate", "stock_phrase_rate",
            "avg_response_length")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a study; see `sections` for what it holds."""

    study: Study
    findings: Findings

    @property
    def verdicts(self) -> Verdicts:
        return Verdicts(verdicts(self.study, self.findings))

    @property
    def top(self) -> int:
        """The first model's condition at the largest dose of the main series; the baseline where there is no dose."""
        f = self.findings
        series = main_series(self.study.examinees[0].arms)
        dosed = [k for k, c in enumerate(f.conditions) if c.model == 0 and c.arm.series == series]
        return max(dosed, key=lambda k: f.conditions[k].arm.dose, default=f.baseline)

    def headline(self) -> str:
        """The summary that fits a terminal."""
        f = self.findings
        parts = [
            f"Calibration under the influence: {' and '.join(self.study.names)}, {len(self.study.questions)} questions "
            f"of {len({q.subject for q in self.study.questions})} subjects, {self.study.settings.bootstrap_draws} "
            "bootstrap draws.\nProbabilities over the four letters after all effects, the sampler's included.",
            tables.means_table(f.after, f.labels, ("accuracy", "confidence", "brier_score", "nll")).text(),
            tables.binned_table(f.after, f.labels).text(),
            self.verdicts.text(),
        ]
        return "\n\n".join(parts) + "\n"

    def text(self) -> str:
        """The headline and all tables."""
        text = self.headline()
        for title, found in self.sections().items():
            text += f"\n\n== {title} ==\n\n" + "\n\n".join(table.text() for table in found) + "\n"
        return text

    # --- Tables -------------------------------------------------------------------------------------------------------

    def sections(self) -> dict[str, list[Table]]:
        """All tables by section title."""
        f = self.findings
        found: dict[str, list[Table]] = {}
        for title, battery in (("After all effects", f.after), ("Before the sampler's effects", f.before)):
            found[title] = [
                tables.means_table(battery, f.labels),
                tables.binned_table(battery, f.labels),
                tables.more_errors_table(battery, f.labels),
                tables.held_table(battery, f.labels),
            ]
            if len(f.labels) > 1:
                found[title] += [
                    tables.differences_table(battery, f.labels, f.baseline_label),
                    tables.tests_table(battery, f.labels, f.baseline_label),
                ]
        if f.trends:
            found["Dose and response"] = [self._trends(), self._best()]
        if f.derivatives:
            found["Derivatives by dose"] = [self._derivatives()]
        if f.writing:
            found["Off the training distribution"] = [
                self._writing(),
                self._matched(),
                self._writing_differences(matched=False),
                self._writing_differences(matched=True),
            ]
        if f.comparison:
            found["Base against instruct"] = [self._comparison(), self._distances()]
        found["Probability of the letters"] = [self._mass()]
        found["Questions"] = [self._questions()]
        return found

    def _trends(self) -> Table:
        rows = []
        for trend in self.findings.trends:
            for name in DOSE_METRICS:
                if name in trend["metrics"]:
                    found = trend["metrics"][name]
                    p_value = p_text(found["p_value"]) if "p_value" in found else "-"
                    slope = with_interval(found["slope"], found["interval"], sign=True)
                    rows.append([f"{self._named(trend)}: {NAMES[name]}", slope, p_value, found.get("monotone", "-")])
            for name, found in trend["metrics_before_sampler"].items():
                slope = with_interval(found["slope"], found["interval"], sign=True)
                what = f"{self._named(trend)}: {NAMES[name]}, before the sampler"
                rows.append([what, slope, p_text(found["p_value"]), found["monotone"]])
        caption = "Slope per unit of dose [95% interval], p of no trend by sign flips over questions, how the means go"
        return Table(["series", "slope", "p", "means"], rows, caption)

    def _best(self) -> Table:
        rows = []
        for trend in self.findings.trends:
            for name, best in trend["best"].items():
                low, high = best["dose_interval"]
                row = [f"{self._named(trend)}: {NAMES[name]}", f"{best['dose']:g} [{low:g}, {high:g}]", _change(best)]
                rows.append(row)
        headers = ["series", "best dose", "change beyond"]
        caption = (
            "Where performance is best [doses that are best in 2.5% of the draws or more], and how much it differs at "
            "the largest dose [interval that allows for the choice of the best]"
        )
        return Table(headers, rows, caption)

    def _derivatives(self) -> Table:
        rows = [
            [f"{self._named(d)}@{d['dose']:g}", number(d["nll"]["value"]),
             with_interval(d["nll"]["derivative"], d["nll"]["interval"], sign=True), number(d["soft_ece"]["value"]),
             number(d["soft_ece"]["derivative"], sign=True)]
            for d in self.findings.derivatives
        ]  # fmt: skip
        first = self.findings.derivatives[0]
        caption = (
            f"By forward-mode differentiation on {first['questions']} questions, before truncation; smooth ECE at "
            f"bandwidth {first['soft_ece']['bandwidth']:g}"
        )
        return Table(["at", "NLL", "d NLL / d dose", "smooth ECE", "d ECE / d dose"], rows, caption)

    def _writing(self) -> Table:
        rows = []
        for entry in self.findings.writing:
            m = entry["measures"]
            rows.append([self._written(entry), *(_measured(m, name) for name in WRITING)])
        w = self.study.writers[0]
        caption = (
            f"{len(w.prompts)} prompts, {w.style.seeds} responses each, at most {w.style.tokens} tokens, temperature "
            f"{w.style.temperature:g} [95% interval over prompts]"
        )
        return Table(["arm", *WRITING.values()], rows, caption)

    def _matched(self) -> Table:
        names = [f"distinct_{n}" for n in (1, 2, 3, 4)] + ["avg_response_length"]
        rows = [
            [self._written(entry), *(_measured(entry["measures"]["length_matched"], name) for name in names)]
            for entry in self.findings.writing
        ]
        caption = "The same at equal length: every arm's response cut to the shortest one to its prompt and seed"
        return Table(["arm", *(WRITING[name] for name in names)], rows, caption)

    def _writing_differences(self, matched: bool) -> Table:
        names = [name for name in COMPARED if not (matched and name == "avg_response_length")]
        rows = []
        for entry in self.findings.writing:
            if "against_sober" in entry:
                found = entry["against_sober"]["length_matched"] if matched else entry["against_sober"]
                rows.append([self._written(entry), *(_change(found[name], star=True) for name in names)])
        caption = (
            f"Difference from {NONE} of the same model{', at equal length' if matched else ''}, paired over prompts "
            "[95% interval; * leaves out 0]"
        )
        return Table(["arm", *(WRITING[name] for name in names)], rows, caption)

    def _comparison(self) -> Table:
        rows = []
        for entry in self.findings.comparison:
            for name, test in entry["profile"].items():
                change = with_interval(test["difference"], test["interval_90"], sign=True)
                rows.append([f"{entry['left']}: {NAMES[name]}", change, number(test["margin"]), test["verdict"]])
        caption = f"Less {self.findings.comparison[0]['right']} [90% interval], and the verdict of two one-sided tests"
        return Table(["arm", "difference", "margin", "verdict"], rows, caption)

    def _distances(self) -> Table:
        names = {
            "total_variation": "total variation",
            "jensen_shannon": "Jensen-Shannon (nats)",
            "same_answer": "same answer",
        }
        rows = []
        for entry in self.findings.comparison:
            apart = [entry["distance"][name] for name in names]
            rows.append([entry["left"], *(with_interval(d["mean"], d["interval"]) for d in apart)])
        caption = f"Distance of the answers from those of {self.findings.comparison[0]['right']}, mean over questions"
        return Table(["arm", *names.values()], rows, caption)

    def _mass(self) -> Table:
        rows = [
            [label, *(number(entry[when][what], 4) for when in ("after_all_effects", "before_sampler")
                      for what in ("mean", "min")), number(entry["other_form"], 4)]
            for label, entry in zip(self.findings.labels, self.findings.mass, strict=True)
        ]  # fmt: skip
        headers = ["arm", "mean", "least", "mean before sampler", "least before sampler", "other form"]
        forms = ", ".join(
            f"{name} with {'' if e.letters.form == 'space' else 'no '}space before the letter"
            for name, e in zip(self.study.names, self.study.examinees, strict=True)
        )
        return Table(headers, rows, f"Probability of the four letters together, before renormalising ({forms})")

    def _questions(self) -> Table:
        asked = [q.subject for q in self.study.questions]
        subjects = sorted({*asked, *self.study.left_out})
        rows = [[s, str(asked.count(s)), str(self.study.left_out.get(s, 0))] for s in subjects]
        return Table(["subject", "asked", "left out, too long"], rows, "Questions by subject")

    def _named(self, entry: Mapping[str, Any]) -> str:
        return entry["series"] if entry["model"] == self.study.names[0] else f"{entry['model']}: {entry['series']}"

    def _written(self, entry: Mapping[str, Any]) -> str:
        return entry["arm"] if entry["model"] == self.study.names[0] else f"{entry['model']}: {entry['arm']}"

    # --- Figures ------------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, tuple[str, bytes, str]]:
        """(title, PNG, caption) by short name."""
        f = self.findings
        found = {
            "reliability": (
                "Reliability",
                tables.reliability_png(f.after, f.labels),
                "Accuracy against confidence in ten bins, after all effects. Points below the diagonal: more confident "
                "than right. A point outside the shaded band is miscalibration that chance does not explain.",
            ),
            "metrics": (
                "Measures by arm",
                tables.metrics_png(f.after, f.labels),
                "Points with 95% bootstrap intervals; ECE and MCE with the shaded band under perfect calibration in "
                f"their place. The vertical line is {f.baseline_label}.",
            ),
        }
        if f.trends:
            found["dose_response"] = (
                "Dose and response",
                self._dose_png(),
                "Means with 95% intervals over questions; ECE is the plug-in value, which is above 0 even for a "
                f"calibrated model.{_shown(MOST_CURVES, len(f.trends), 'series')}",
            )
        found["risk_coverage"] = (
            "Risk and coverage",
            self._risk_png(),
            "Share of wrong answers among the most confident ones: where confidence is useful, it falls to the left."
            + _shown(len(self._risk_conditions()), len(f.labels), "arms"),
        )
        if f.writing:
            found["ood"] = (
                "Off the training distribution",
                self._ood_png(),
                "What the arms wrote: points with 95% intervals over prompts. Perplexities are of the responses alone.",
            )
        if f.comparison:
            entry = max(f.comparison, key=lambda c: c["dose"])
            found["comparison"] = (
                "Base against instruct",
                self._comparison_png(entry),
                f"{entry['left']} of {self.study.names[0]} against {entry['right']}, 90% intervals; the shaded band is "
                "the margin that was fixed beforehand.",
            )
        return found

    def _dose_png(self) -> bytes:
        shown = self.findings.trends[:MOST_CURVES]
        panels = []
        for name in DOSE_METRICS:
            curves = {}
            for trend in shown:
                profiles = [self.findings.profile(label) for label in trend["conditions"]]
                ends = [p["intervals"].get(name) or [None, None] for p in profiles]
                banded = name in profiles[0]["intervals"]
                curves[self._named(trend)] = DoseCurve(
                    trend["doses"],
                    [p[name] for p in profiles],
                    [low for low, _ in ends] if banded else None,
                    [high for _, high in ends] if banded else None,
                )
            panels.append(DosePanel(NAMES[name], curves))
        return dose_response_figure(panels)

    def _risk_conditions(self) -> list[int]:
        """The baseline, the largest dose, the second model's `none`; then the first model's arms by falling dose."""
        conditions = self.findings.conditions
        first = {self.findings.baseline, self.top}
        first |= {k for k, c in enumerate(conditions) if c.model == 1 and c.arm.label == NONE}
        others = [k for k, c in enumerate(conditions) if c.model == 0 and k not in first]
        others.sort(key=lambda k: -conditions[k].arm.dose)
        return sorted([*first, *others[: MOST_CURVES - len(first)]])

    def _risk_png(self) -> bytes:
        f = self.findings
        curves, bands = {}, {}
        for k in self._risk_conditions():
            coverage, risk = ranking.risk_coverage(f.answers.probs[k], f.answers.labels)
            start = max(1, len(coverage) // 20)  # the error among a handful says nothing
            counts = np.arange(1, len(coverage) + 1)
            low, high = stats.wilson_interval(risk * counts, counts)
            curves[f.labels[k]] = (coverage[start:], risk[start:])
            if k in (f.baseline, self.top):
                bands[f.labels[k]] = (low[start:], high[start:])
        return risk_coverage_figure(curves, bands, f.baseline_label)

    def _ood_png(self) -> bytes:
        names = [name for name in WRITING if name != "diversity_ratio"]
        labels = [self._written(entry) for entry in self.findings.writing]
        panels = []
        for name in names:
            measures = [entry["measures"] for entry in self.findings.writing]
            ends = [_interval(m, name) or (None, None) for m in measures]
            low, high = zip(*ends, strict=True)
            panels.append(MetricPanel(WRITING[name], [m[name] for m in measures], low, high))
        return metrics_figure(panels, labels, labels.index(NONE))

    def _comparison_png(self, entry: Mapping[str, Any]) -> bytes:
        # The figure shows the right one less the left one.
        rows = [
            ComparisonRow(NAMES[name], -t["difference"], -t["interval_90"][1], -t["interval_90"][0], t["margin"])
            for name, t in entry["profile"].items()
        ]
        return comparison_figure(rows, entry["left"], entry["right"])

    # --- Page ---------------------------------------------------------------------------------------------------------

    def html(self, identity: Mapping[str, Any], figures: Mapping[str, tuple[str, bytes, str]]) -> str:
        """The page: headline numbers, verdicts, figures, all tables, how to read them, and who made them."""
        blocks: list[page.Block] = [self._cards(), page.Heading("Verdicts"), self.verdicts]
        for title, png, caption in figures.values():
            blocks += [page.Heading(title), page.Picture(png, caption, f"{title}: {', '.join(self.findings.labels)}")]
        pictured = {title for title, *_ in figures.values()}
        for title, found in self.sections().items():
            blocks += [page.Heading(f"{title}: numbers" if title in pictured else title), *found]
        blocks += page.closing(READING, identity)
        subtitle = (
            f"{' and '.join(self.study.names)} on {len(self.study.questions)} four-choice questions under "
            f"{len(self.study.examinees[0].arms)} arms. {page.made_at(identity)}"
        )
        return page.render_page("Calibration under the influence", subtitle, blocks)

    def _cards(self) -> page.Cards:
        f = self.findings
        first, last = f.after.profiles[f.baseline], f.after.profiles[self.top]
        span = f"{f.baseline_label} \u2192 {f.labels[self.top]}"

        def change(key: str) -> str:
            return f"{number(first[key])} \u2192 {number(last[key])}"

        p_value = p_text(last["under_perfect_calibration"]["ece"]["p_value"])
        subjects = len({q.subject for q in self.study.questions})
        return page.Cards([
            ("Questions", str(len(self.study.questions)), f"{subjects} subjects, the same for all arms"),
            ("Accuracy", change("accuracy"), span),
            ("Mean confidence", change("confidence"), span),
            ("ECE", change("ece"), f"{span}; p {p_value} against perfect calibration"),
        ])  # fmt: skip


def _shown(shown: int, total: int, what: str) -> str:
    """What a caption adds where a figure has no room for all."""
    return f" Shown: {shown} of {total} {what}." if shown < total else ""


def _interval(measures: Mapping[str, Any], name: str) -> list[float] | None:
    return measures.get(f"{name}_interval") or measures["intervals"].get(name)


def _measured(measures: Mapping[str, Any], name: str) -> str:
    if measures[name] is None:
        return "-"
    return with_interval(measures[name], _interval(measures, name), 1 if measures[name] >= 10 else 3)


def _change(found: Mapping[str, Any], star: bool = False) -> str:
    """A difference with its interval, "-" where there is none; with `star`, marked if the interval leaves out 0."""
    if found["difference"] is None:
        return "-"
    low, high = found["interval"]
    mark = "*" if star and (round(low, 3) > 0 or round(high, 3) < 0) else ""  # as printed
    return with_interval(found["difference"], (low, high), sign=True) + mark


READING = (
    "Confidence is the largest of the four letters' probabilities, renormalised over the letters. ECE is the "
    "count-weighted mean distance of confidence and accuracy over ten equal bins, MCE the largest one. Both are above "
    "0 even for a perfectly calibrated model, hence their distribution under perfect calibration (simulated from the "
    "confidences; p is the share at or above the value seen) and debiased values (Kumar et al. 2019) in place of "
    "bootstrap intervals.",
    "Before the sampler's effects is what the network alone says; a colder sampler sharpens the letters' probabilities "
    "without touching the network. A letter that truncation removes has probability 1e-12 before renormalising, so a "
    "right answer that was cut costs 27.6 nats of NLL: that, not the network, is what moves a mean NLL by tenths.",
    "Differences are paired: all arms answered the same questions, and each bootstrap draw compares them on the same "
    "resample. Intervals of differences of ECE and MCE allow for the unknown bias of both sides and are wide. The p "
    "values of tests are McNemar's for accuracy and of sign flips for the rest; 'adjusted' ones control the share of "
    "false discoveries over all tests of the table (Benjamini and Hochberg). Intervals are not adjusted.",
    "A verdict is 'supported' or 'contradicted' only where 95% intervals (for equality, 90%) leave out the other. A "
    "claim of several parts is supported where all are, and contradicted by one that is the opposite: of m parts, one "
    "errs by chance in up to 2.5% m of studies. Where no question differs, the interval for equality is as wide as "
    "what N questions may have missed, 3 / N. A rise of NLL beyond the best dose counts where Brier's score, which "
    "no floor decides, rises, too.",
    "Texts are compared on the same prompts with the same random numbers. At equal length, every arm's response "
    "is cut to the shortest one, as longer texts repeat themselves more. A rate that is 0 everywhere has an interval "
    "without width; with n responses it may still be 3.7 / n.",
)
