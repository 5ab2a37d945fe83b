"""What a reader is told about a calibration or a validation: the same numbers as text and as a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.monitoring.analysis import JOINT, RIVALS, who_beats
from experiments.monitoring.study import VALIDATE, Study
from experiments.monitoring.watching import LENGTH, P_NO, Scored
from nmjax.metrics import detection
from nmjax.report import page
from nmjax.report.plots_detection import (
    ForestRow,
    ScorePanel,
    Square,
    curve_figure,
    forest_figure,
    scores_figure,
    squares_figure,
)
from nmjax.report.tables import Table, number, p_text, with_interval
from nmjax.report.verdicts import Verdict, Verdicts

NAMES = {
    LENGTH: "answer length",
    P_NO: "P(No)",
    "answer_nll": "answer NLL",
    "first_max_prob": "max prob, 1st step",
    "first_entropy": "entropy, 1st step",
    "pri": "PRI",
    "joint": "hbar_s + PRI",
    "all_signals": "all signals",
}
"""How a statistic is printed, where it isn't by its own name."""
IN_FIGURES = ("hbar_s", "pri", "joint", P_NO, LENGTH)
IN_VERDICTS = ("hbar_s", "pri", "joint")
PLACES = {LENGTH: "the length of the answer", P_NO: "the model's own P(No)"}
MEANS = {"beats": "supported", "loses": "contradicted", "neither": "undecided"}


def named(statistic: str) -> str:
    return NAMES.get(statistic, statistic)


def listed(statistics: Sequence[str]) -> str:
    return ", ".join(map(named, statistics)) or "none"


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a study from its findings; see `sections` for what it holds."""

    study: Study
    samples: Scored
    findings: Mapping[str, Any]
    values: Mapping[str, np.ndarray]  # [N], by statistic

    @property
    def validates(self) -> bool:
        return self.study.name == VALIDATE

    @property
    def where(self) -> str:
        return "held-out samples" if self.validates else "calibration samples"

    # --- In words -----------------------------------------------------------------------------------------------------

    @property
    def verdicts(self) -> Verdicts:
        return Verdicts([*self._recall_verdict(), self._direction_verdict(), *self._rival_verdicts()])

    def _recall_verdict(self) -> list[Verdict]:
        if not self.validates:
            return []
        rule = self.findings["monitor"]
        check = rule["recall_check"]
        verdict = {"yes": "supported", "no": "contradicted", "undecided": "undecided"}[check["met"]]
        positives = int(self.samples.labels.sum())
        flagged = rule["report"]["flag_rate"]["value"]
        because = (
            f"It finds {with_interval(check['recall'], check['interval'])} of {positives} (exact interval), flagging "
            f"{flagged:.1%} of all samples with a precision of {number(rule['report']['precision']['value'])} against "
            f"a base rate of {number(self.findings['base_rate'])}."
        )
        if check["met"] == "undecided":
            because += f" The interval holds {check['target']:g}: met as far as these samples can tell, not proven."
        claim = (
            f"The monitor, following {named(rule['statistic'])} at the stored threshold, finds at least "
            f"{check['target']:.0%} of hallucinated answers to questions it was not calibrated on"
        )
        return [Verdict(claim, verdict, because)]

    def _direction_verdict(self) -> Verdict:
        raw = self.findings["statistics"]["hbar_s"]["at_best"]["auroc_raw"]
        low, high = raw["interval"] or (0.0, 1.0)
        verdict = "supported" if high < 0.5 else "contradicted" if low > 0.5 else "undecided"
        because = f"AUROC of hbar_s as it is {with_interval(raw['value'], raw['interval'])}; below 0.5, low is risky."
        return Verdict("Low hbar_s is risky, as was published", verdict, because)

    def _rival_verdicts(self) -> list[Verdict]:
        compared = self.findings["comparisons"]
        chosen = self.findings["monitor"]["statistic"]
        found = []
        for name in dict.fromkeys((*IN_VERDICTS, chosen)):
            for rival, entries in compared.items():
                entry = entries[name]
                because = (
                    f"AUROC {number(entry['auroc_a'])} against {number(entry['auroc_b'])}, difference "
                    f"{with_interval(entry['difference'], entry['interval'], sign=True)}, adjusted p "
                    f"{p_text(entry['p_adjusted'])}."
                )
                what = f"{named(name)}, which the monitor follows," if name == chosen else named(name)
                verdict = MEANS[entry["verdict"]]
                found.append(
                    Verdict(f"{what} tells hallucinated answers better than {PLACES[rival]}", verdict, because)
                )
        return found

    def plainly(self) -> list[str]:
        """Which signals beat length and P(No), and which do not, in sentences."""
        compared = self.findings["comparisons"]
        groups = who_beats(compared)
        rivals = " and ".join(PLACES[rival] for rival in compared)
        lines = []
        if len(compared) > 1:
            lines.append(f"Better than {rivals}: {listed(groups['both'])}.")
        for rival in compared:
            lines.append(f"Better than {PLACES[rival]} only: {listed(groups[rival])}.")
        lines.append(f"Better than neither: {listed(groups['neither'])}.")
        for rival in compared:
            worse = [name for name, entry in compared[rival].items() if entry["verdict"] == "loses"]
            lines.append(f"Worse than {PLACES[rival]}: {listed(worse)}.")
        return lines + self._within_tasks()

    def _within_tasks(self) -> list[str]:
        """A rival may be strong in each task and cancel over all of them; this tells."""
        tasks = self.findings["by_task"]
        if len(tasks) == 1:
            return []
        told = dict.fromkeys((*RIVALS, self.findings["monitor"]["statistic"]))
        lines = [
            "The above is over all tasks together. Within tasks, AUROC of the score as it is (low is risky below 0.5):"
        ]
        for task, own in tasks.items():
            values = [f"{named(name)} {_shown(own[name]['auroc_raw'])}" for name in told if name in own]
            lines.append(f"{task}: {'; '.join(values)}.")
        return lines

    def log_lines(self) -> list[str]:
        """Range, rate, means and deviations by label, and Cohen's d of the two published signals."""
        y = self.samples.labels
        lines = [f"Hallucination rate: {int(y.sum())} of {len(y)} ({y.mean():.1%})"]
        for name in ("hbar_s", "pri"):
            found = self.findings["statistics"][name]
            told, check = found["summary"], found["median_check"]
            by = {label: f"{number(m['mean'])} (sd {number(m['sd'])})" for label, m in told["by_label"].items()}
            lines.append(
                f"{named(name)}: range {number(told['min'])} to {number(told['max'])}, hallucinated "
                f"{by['hallucinated']}, right {by['right']}, Cohen's d {number(told['cohens_d'], sign=True)}; flagging "
                f"the riskier half ({found['direction']}): precision {number(check['precision'])} against "
                f"{number(check['base_rate'])}"
            )
        return lines

    def headline(self) -> str:
        """The summary that fits a terminal."""
        s = self.study
        parts = [
            f"{s.name.replace('_', ' ').capitalize()}: {s.model}, {len(self.samples.judgements)} {self.where} of "
            f"{s.data['dataset']}, {s.settings.max_tokens} tokens each; failed: {len(self.samples.failed)}.",
            "\n".join(self.log_lines()),
            self._signals_table().text(),
            "\n".join(self.plainly()),
            self._monitor_text(),
            self.verdicts.text(),
        ]
        return "\n\n".join(parts) + "\n"

    def _monitor_text(self) -> str:
        rule = self.findings["monitor"]
        sign = ">=" if rule["direction"] == "high" else "<="
        terms = " ".join(f"{w:+.4g} {name}" for name, w in rule["weights"].items())
        terms = next(iter(rule["weights"])) if len(rule["weights"]) == 1 else f"{rule['intercept']:.4g} {terms}"
        tau = "everything is flagged" if rule["note"] else f"{terms} {sign} {rule['tau']:.6g}"
        promise = rule["note"] or (
            f"from {rule['positives']} positives, finds a new one with probability {rule['guarantee']:.3f} or more"
        )
        return f"The monitor flags: {tau} (means of the five largest values; {promise})."

    def _data_text(self) -> str:
        data = self.study.data
        if data["split"] == "published":
            twins = data.get("rows_calibrated_on")
            shared = (
                f"; {twins} of the source rows were calibrated on, as twins are on both sides of it" if twins else ""
            )
            return f"The split is the published one, by example{shared}."
        return (
            "Source rows were split in two halves, one to calibrate on and one to validate on, so that the right and "
            "the hallucinated answer to a question are never on both sides."
        )

    # --- Tables -------------------------------------------------------------------------------------------------------

    def sections(self) -> dict[str, list[Table]]:
        """All tables by section title."""
        found = {
            "Signals": [self._signals_table(), self._by_label_table()],
            "Thresholds": [self._threshold_table("best"), self._threshold_table("conformal")],
            "Against length and P(No)": [self._rivals_table(rival) for rival in self.findings["comparisons"]],
        }
        if len(self.findings["by_task"]) > 1:
            found["By task"] = [self._task_table("auroc_raw"), self._task_table("auroc")]
        found["Combinations"] = [self._combination_table()]
        found["Label by score"] = [self._label_table(name) for name in ("hbar_s", "pri")]
        found["Flags side by side"] = [self._flags_table()]
        if self.samples.failed:
            rows = [[id, reason] for id, reason in self.samples.failed.items()]
            found["Failed samples"] = [Table(["sample", "reason"], rows, "Left out, never given a score")]
        return found

    def _in_order(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Statistics, those of the highest AUROC first."""
        entries = self.findings["statistics"].items()
        return sorted(entries, key=lambda item: -(item[1]["at_best"]["auroc"]["value"] or 0))

    def _signals_table(self) -> Table:
        rows = []
        for name, e in self._in_order():
            report, residual = e["at_best"], e["length_residualised"]
            cells = [
                e["kind"], e["direction"], _shown(report["auroc_raw"]), _shown(report["auroc"]),
                _shown(report["average_precision"]), with_interval(residual["auroc"], residual["interval"]),
                number(e["summary"]["cohens_d"], 2, sign=True),
            ]  # fmt: skip
            if not self.validates:
                agreement = e.get("agreement")
                cells[4:4] = [number(e["auroc_crossfit"]), "-" if agreement is None else f"{agreement:.0%}"]
            rows.append([named(name), *cells])
        headers = ["statistic", "kind", "risky", "AUROC raw", "AUROC", "average precision", "AUROC beyond length", "d"]
        caption = (
            "AUROC raw: of the score as it is; AUROC: in the direction that was calibrated [95% interval over rows]"
        )
        if not self.validates:
            headers[5:5] = ["cross-fitted", "folds agree"]
            caption = (
                "AUROC raw: of the score as it is; AUROC: in the direction chosen on these samples [95% interval over "
                "rows]; cross-fitted: in the direction that the other folds choose"
            )
        return Table(headers, rows, caption)

    def _by_label_table(self) -> Table:
        rows = []
        for name, e in self._in_order():
            told, check = e["summary"], e["median_check"]
            by = [f"{number(m['mean'], 4)} \u00b1 {number(m['sd'], 4)}" for m in told["by_label"].values()]
            rows.append([named(name), f"{told['min']:.4g} to {told['max']:.4g}", *by, number(check["precision"]),
                         number(check["difference"], sign=True)])  # fmt: skip
        headers = ["statistic", "range", "hallucinated", "right", "precision, riskier half", "less base rate"]
        return Table(headers, rows, "Mean and standard deviation by label; and what flagging the riskier half finds")

    def _threshold_table(self, which: str) -> Table:
        rows = []
        for name, e in self._in_order():
            report, kept = e[f"at_{which}"], e[which]
            direction = kept.get("direction", e["direction"])
            tau = "all" if kept["tau"] is None else f"{'>=' if direction == 'high' else '<='} {kept['tau']:.4g}"
            cells = [tau, *(_shown(report[key]) for key in ("precision", "recall", "f1", "flag_rate"))]
            if which == "conformal":
                cells.append(number(kept["guarantee"]))
            if self.validates:
                cells.append(e["recall_checks"][which]["met"])
            rows.append([named(name), *cells])
        headers = ["statistic", "flag if", "precision", "recall", "F1", "flagged"]
        headers += ["promised recall"] * (which == "conformal") + ["recall met"] * self.validates
        recall = self.study.settings.min_recall
        best = f"Threshold of the highest precision at a recall of {recall:g} or more on the calibration samples"
        conformal = "Split-conformal threshold: half of the calibration rows chose the direction, the other half set it"
        base = f"; flagging everything has a precision of {number(self.findings['base_rate'])}"
        return Table(headers, rows, (best if which == "best" else conformal) + base)

    def _rivals_table(self, rival: str) -> Table:
        entries = sorted(self.findings["comparisons"][rival].items(), key=lambda item: -item[1]["difference"])
        words = {"beats": "better", "loses": "worse", "neither": "not shown"}
        rows = [
            [named(name), number(e["auroc_a"]), with_interval(e["difference"], e["interval"], sign=True),
             p_text(e["p_value"]), p_text(e["p_adjusted"]), words[e["verdict"]]]
            for name, e in entries
        ]  # fmt: skip
        b = number(entries[0][1]["auroc_b"])
        caption = (
            f"AUROC less that of {PLACES[rival]} ({b}), paired over rows; p adjusted over all tests of both tables"
        )
        return Table(["statistic", "AUROC", "difference", "p", "adjusted", "verdict"], rows, caption)

    def _task_table(self, which: str) -> Table:
        tasks = self.findings["by_task"]
        rows = [
            [named(name), _shown(e["at_best"][which]), *(_shown(own[name][which]) for own in tasks.values())]
            for name, e in self._in_order()
        ]
        captions = {
            "auroc_raw": "AUROC of the score as it is; on both sides of 0.5 where tasks differ in direction",
            "auroc": "AUROC in the direction of all tasks together",
        }
        return Table(["statistic", "all tasks", *tasks], rows, captions[which])

    def _combination_table(self) -> Table:
        rows = []
        for name in JOINT:
            e = self.findings["statistics"][name]
            cells = [_shown(e["at_best"]["auroc"]), _shown(e["at_best"]["average_precision"])]
            if not self.validates:
                cells += [number(e["auroc_in_sample"]), number(e["brier"]), number(e["ece"])]
            rows.append([named(name), *cells])
        headers = ["combination", "AUROC", "average precision"]
        if self.validates:
            return Table(headers, rows, "Logistic combinations with the stored weights")
        headers += ["AUROC in sample", "Brier", "ECE"]
        return Table(
            headers, rows, "Logistic combinations, out of fold by source row; in sample shows what that flatters"
        )

    def _label_table(self, name: str) -> Table:
        table = self.findings["labels_by_score"][name]
        rows = []
        for key, cell in table.items():
            if key != "median":
                told = key.replace("_", ", ")
                rows += [
                    [f"{told} ({cell['count']})", e["id"], number(e["score"], 4), " ".join(e["prompt"].split())]
                    for e in cell["examples"]
                ]
        caption = (
            f"{named(name)}: label by low or high score (median {number(table['median'], 4)}), the most extreme ones"
        )
        return Table(["label, score (count)", "sample", "score", "prompt"], rows, caption)

    def _flags_table(self) -> Table:
        rows = [
            [
                cell["flagged_by"],
                str(cell["count"]),
                str(cell["hallucinated"]),
                with_interval(cell["rate"], cell["interval"]),
            ]
            for cell in self.findings["flags_side_by_side"].values()
        ]
        return Table(["flagged by", "samples", "hallucinated", "rate"], rows, "PRI and hbar_s at their best thresholds")

    # --- Figures ------------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, tuple[str, bytes, str]]:
        """(title, PNG, caption) by short name."""
        shown = [n for n in dict.fromkeys((*IN_FIGURES, self.findings["monitor"]["statistic"])) if n in self.values]
        base = self.findings["base_rate"]
        roc, recall, at_roc, at_recall = {}, {}, {}, {}
        for name in shown:
            e = self.findings["statistics"][name]
            label = f"{named(name)} ({number(e['at_best']['auroc']['value'])})"
            c = detection.curve(detection.sign(e["direction"]) * self.values[name], self.samples.labels)
            positives = int(self.samples.labels.sum())
            negatives = len(self.samples.labels) - positives
            roc[label] = (np.append(0, c.fp / negatives), np.append(0, c.tp / positives))
            recall[label] = (c.recall, c.precision)
            report = e["at_best"]
            k = int(
                np.argmin(
                    np.abs(c.recall - report["recall"]["value"]) + np.abs(c.flag_rate - report["flag_rate"]["value"])
                )
            )
            at_roc[label], at_recall[label] = (c.fp[k] / negatives, c.recall[k]), (c.recall[k], c.precision[k])
        panels = [
            ScorePanel(named(n), self.values[n], self.samples.labels, e["best"]["tau"], e["direction"])
            for n in shown
            for e in [self.findings["statistics"][n]]
        ]
        found = {
            "roc": (
                "ROC",
                curve_figure(roc, "share of right answers flagged", "recall", (0, 1), "chance", at_roc),
                "Each statistic in its direction, with its AUROC; marks: its best threshold.",
            ),
            "precision_recall": (
                "Precision and recall",
                curve_figure(recall, "recall", "precision", (base, base), f"base rate {number(base)}", at_recall),
                "Marks: the best threshold of each statistic; the dashed line is what flagging everything gives.",
            ),
            "scores": (
                "Scores by label",
                scores_figure(panels),
                "The further apart the two colours, the more a statistic says. Shaded: flagged at the best threshold.",
            ),
            "quadrants": (
                "Quadrants",
                squares_figure([*map(self._label_square, ("hbar_s", "pri")), self._flags_square()]),
                "Left and middle: samples by label and score, the share of each row printed below the count. Right: "
                "what hbar_s and PRI flag, with the share that is hallucinated.",
            ),
        }
        tasks = self.findings["by_task"]
        rows = {}
        for name, e in self._in_order():
            reports = {"all": e["at_best"]} | ({t: own[name] for t, own in tasks.items()} if len(tasks) > 1 else {})
            rows[named(name)] = {t: ForestRow(r["auroc"]["value"], r["auroc"]["interval"]) for t, r in reports.items()}
        title = "AUROC by task" if len(tasks) > 1 else "AUROC"
        caption = "In the direction that was calibrated on all tasks together, 95% intervals over source rows."
        found["forest"] = (title, forest_figure(rows, "AUROC"), caption)
        return found

    def _label_square(self, name: str) -> Square:
        table = self.findings["labels_by_score"][name]
        values: list[list[float | None]] = []
        texts = []
        for label in ("hallucinated", "right"):
            counts = [table[f"{label}_{side}"]["count"] for side in ("low", "high")]
            values.append([count / max(1, sum(counts)) for count in counts])
            texts.append([f"{count}\n{count / max(1, sum(counts)):.0%}" for count in counts])
        return Square(named(name), ("hallucinated", "right"), ("low", "high"), values, texts)

    def _flags_square(self) -> Square:
        q = self.findings["flags_side_by_side"]
        grid = [["q2", "q4"], ["q3", "q1"]]
        texts = [[f"{q[k]['count']}\n{number(q[k]['rate'], 2)}" for k in row] for row in grid]
        values = [[q[k]["rate"] for k in row] for row in grid]
        return Square("flags", ("hbar_s flags", "not"), ("PRI flags", "not"), values, texts)

    # --- Page ---------------------------------------------------------------------------------------------------------

    def html(self, identity: Mapping[str, Any], figures: Mapping[str, tuple[str, bytes, str]]) -> str:
        """The page: headline numbers, verdicts, what beats what, figures, tables, how to read them, who made them."""
        blocks: list[page.Block] = [self._cards(), page.Paragraph(self._data_text())]
        blocks += [page.Heading("Verdicts"), self.verdicts, page.Heading("What beats length and P(No)")]
        blocks += [page.Paragraph(line) for line in self.plainly()]
        blocks += [page.Heading("The monitor's rule"), page.Paragraph(self._monitor_text())]
        for title, png, caption in figures.values():
            blocks += [page.Heading(title), page.Picture(png, caption, f"{title} on the {self.where}")]
        pictured = {title for title, *_ in figures.values()}
        for title, found in self.sections().items():
            blocks += [page.Heading(f"{title}: numbers" if title in pictured else title), *found]
        blocks += page.closing(READING, identity)
        title = "Thresholds validated" if self.validates else "Thresholds calibrated"
        subtitle = (
            f"The hallucination monitor on {self.study.model}: {len(self.samples.judgements)} {self.where} of "
            f"{self.study.data['dataset']}. {page.made_at(identity)}"
        )
        return page.render_page(title, subtitle, blocks)

    def _cards(self) -> page.Cards:
        rule, y = self.findings["monitor"], self.samples.labels
        rows = len(set(self.samples.groups.tolist()))
        follows = self.findings["statistics"][rule["statistic"]]["at_best"]["auroc"]
        cards = [
            (
                "Samples",
                str(len(y)),
                f"{rows} source rows, {y.mean():.0%} hallucinated, {len(self.samples.failed)} failed",
            ),
            ("Monitor follows", named(rule["statistic"]), f"{rule['direction']} is risky"),
            ("Its AUROC", number(follows["value"]), f"{_interval(follows['interval'])} on the {self.where}"),
        ]
        for rival in (n for n in RIVALS if n in self.findings["statistics"]):
            auroc = self.findings["statistics"][rival]["at_best"]["auroc"]
            cards.append((f"AUROC of {named(rival)}", number(auroc["value"]), _interval(auroc["interval"])))
        if self.validates:
            check = rule["recall_check"]
            remark = f"{_interval(check['interval'])}, wanted {check['target']:g}: {check['met']}"
            cards.append(("Recall of the monitor", number(check["recall"]), remark))
        return page.Cards(cards)


def _interval(interval: Sequence[float] | None) -> str:
    return "no interval" if interval is None else f"[{number(interval[0])}, {number(interval[1])}]"


def _shown(entry: Mapping[str, Any]) -> str:
    return with_interval(entry["value"], entry["interval"])


READING = (
    "Every sample is a proposed answer that the model is asked to judge. A signal's score is the mean of its five "
    "largest values over the tokens it then writes. P(No) is P(No) / (P(Yes) + P(No)) at the first of them; answer "
    "NLL is the mean negative log-probability of the proposed answer's own tokens. Answer length, in characters, "
    "needs no model.",
    "Which scores are risky, high or low, is not known beforehand and differs between models. It is chosen by AUROC "
    "on calibration samples; 'AUROC raw' ignores the choice, so below 0.5 it says that low scores are risky. An AUROC "
    "in a direction that was chosen on the same samples is flattered a little, a cross-fitted one is not.",
    "AUROC beyond length: of what is left of a score when the part that rises or falls with the answer's length is "
    "taken away. In some data sets hallucinated answers are simply longer.",
    "The best threshold is picked on the calibration samples, so its recall tends to be lower on others. The split- "
    "conformal one keeps its promise on average over calibrations, for any score. On held-out samples 'recall met' is "
    "yes or no where the exact (Clopper-Pearson) interval lies on one side of the recall wanted, else undecided.",
    "'Better' and 'worse' want an adjusted p below 0.05 (Benjamini and Hochberg over all comparisons). Everything is "
    "resampled by source row, so that the two answers to a question stay together.",
)
