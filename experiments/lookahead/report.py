"""What a reader is told about a comparison: the same numbers as text and as a page, from a results file alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.lookahead import claims
from experiments.lookahead.analysis import MEASURES, OWN
from experiments.lookahead.arms import CONFIDENCE
from experiments.lookahead.claims import NAMES, difference
from experiments.lookahead.evaluation import TOLD
from experiments.lookahead.figures import ARMS, Figure, costs, draw, trained
from experiments.lookahead.results import ConfidenceExperimentResults, TrainingResult
from nmjax.report import page
from nmjax.report.tables import Table, number, with_interval
from nmjax.report.verdicts import Verdicts

TITLE = "ConfidenceAwareGPT against MiniGPT"
MEASURED = {
    "mse": "mean squared error (lower)",
    "r2": "R squared (higher)",
    "pearson": "Pearson correlation (higher)",
    "spearman": "Spearman correlation (higher)",
    "calibration_slope": "calibration slope (near 1)",
    "calibration_intercept": "calibration intercept (near 0)",
    "reliability_error": "error of a bin's mean (lower)",
    "ece_above_median": "ECE, loss above its median (lower)",
    "brier_above_median": "Brier, loss above its median (lower)",
    "auroc_wrong": "AUROC, next choice wrong (higher)",
}
"""How a measure is printed, and which values are good."""
TRAINED_UNDER = {
    "jacobi": "what it predicted at the position before, from {passes} parallel pass{es} over the row",
    "scan": "what it predicted at the position before, exactly, position by position",
    "zeros": "nothing: the signal was 0",
    "carry": "what it predicted on the batch before, which is about other texts (the published way)",
}
HEADINGS = {
    "differences": "Held-out loss",
    "convergence": "Held-out loss while training",
    "told": "What the model is told",
    "calibration": "Does it know its coming loss?",
    "signal": "The signal while training",
    "training": "Training losses",
    "cost": "Cost",
}
"""Section of each figure; the tables of that section stand below it."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a comparison. Without findings, as in an intermediate file, it holds curves and no comparison.

    Raises ValueError for findings that `analysis.analyse` didn't make.
    """

    found: ConfidenceExperimentResults

    def __post_init__(self):
        wanted = {"losses", "differences", "quality", "advantage", "told_error"}
        if self.findings and (missing := sorted(wanted - self.findings.keys())):
            raise ValueError(f"findings lack {missing}; wanted those of this experiment")

    @property
    def findings(self) -> Mapping[str, Any]:
        return self.found.findings

    @property
    def results(self) -> dict[str, list[TrainingResult]]:
        """By model that has begun to train, the results of its seeds."""
        return trained(self.found)

    # --- In words -----------------------------------------------------------------------------------------------------

    @property
    def verdicts(self) -> Verdicts:
        return Verdicts(claims.verdicts(self.findings) if self.findings else [])

    def answer(self) -> str:
        """Whether the confidence signal helps, in a line."""
        answer = claims.answer(self.verdicts.items) if self.findings else "This run is not finished"
        return f"Does the confidence signal help? {answer}."

    def plainly(self) -> list[str]:
        """Why the confidence signal helps or doesn't, with the numbers; how far an unfinished run is."""
        if not self.findings:
            steps = [f"{ARMS[name]} {len(found[0].token_loss_history)}" for name, found in self.results.items()]
            return [
                f"Nothing is compared yet. Steps so far: {', '.join(steps) or 'none'} (of "
                f"{self.found.config.training_steps}; at equal FLOPs, more)."
            ]
        f, found = self.findings, self.verdicts.items

        def told(name: str) -> str:
            return f"{number(f['losses'][name]['mean'], 4)} (difference {difference(f['differences'][name])})"

        seeds = f["losses"][OWN]["n"]
        unit = f"Brackets are 95% intervals over {seeds} seeds." if seeds > 1 else "One seed has no interval."
        return [
            claims.reason(found),
            f"Next-token loss on held-out text, told its own predictions: {number(f['losses'][OWN]['mean'], 4)} nats. "
            f"Told something else: {', '.join(f'{NAMES[name]} {told(name)}' for name in TOLD)}. "
            f"{'; '.join(f'{NAMES[name]}: {told(name)}' for name in f['differences'] if name not in TOLD)}.",
            "A difference is the loss of ConfidenceAwareGPT, told its own predictions, less the other one: below 0 "
            f"speaks for the signal. {unit} MiniGPT is neither told its confidence nor trained to predict it, so the "
            "difference from it is due to both.",
        ]

    def described(self) -> str:
        """What was trained on what, in a few sentences."""
        c, data = self.found.config, self.found.data
        told = TRAINED_UNDER[c.feedback].format(passes=c.jacobi_passes, es="es" if c.jacobi_passes > 1 else "")
        sizes = f"d {c.embed_dim}, {c.num_layers} layers, {c.num_heads} heads, context {c.max_seq_len}"
        tokens = (
            f"{data['training_tokens']:,} tokens to train on, vocabulary {data['vocabulary']:,}; "
            f"{data['evaluated_tokens']:,} tokens of other documents are evaluated" if data else "unknown tokens"
        )  # fmt: skip
        return (
            f"All models: {sizes}; {c.training_steps:,} steps of {c.batch_size} rows; {self._seeds}, each with the "
            f"same initialisation and batches for all. Data: {self._corpus}, {tokens}. Loss at "
            f"{'every position' if c.lookahead == 'all' else 'the last position of a row'}; the confidence loss has "
            f"weight {c.confidence_alpha:g} and trains {'the head alone' if c.detach_head else 'the whole model'}. "
            f"While it trained, ConfidenceAwareGPT was told {told}."
        )

    @property
    def _corpus(self) -> str:
        return "the bundled corpus" if self.found.config.dataset == "bundled" else self.found.config.dataset

    @property
    def _seeds(self) -> str:
        count = len(self.found.config.seeds)
        return f"{count} seed{'s' if count > 1 else ''}"

    def improvements(self) -> list[str]:
        """How much lower the mean of the final held-out losses is than MiniGPT's, relative to it."""
        if not self.findings:
            return []
        losses = {name: _values(found, "final_eval_loss").mean() for name, found in self.results.items()}
        own = losses.pop(CONFIDENCE)
        return [
            f"Relative improvement of the held-out loss over {NAMES[name]}: {1 - own / loss:+.2%}."
            for name, loss in losses.items()
        ]

    def headline(self) -> str:
        """The summary that fits a terminal."""
        parts = [TITLE, self.answer(), "\n".join(self.plainly()), self._final_table().text()]
        parts.append("\n".join(self.improvements()))
        if self.findings:
            parts += [self._losses_table().text(), self.verdicts.text()]
        return "\n\n".join(filter(None, parts)) + "\n"

    def text(self) -> str:
        """The headline, what was trained, and all tables."""
        text = f"{self.headline()}\n{self.described()}\n"
        for title, found in self.sections().items():
            text += f"\n\n== {title} ==\n\n" + "\n\n".join(table.text() for table in found) + "\n"
        return text

    # --- Tables -------------------------------------------------------------------------------------------------------

    def sections(self) -> dict[str, list[Table]]:
        """All tables by section title, one of `HEADINGS`."""
        found = {HEADINGS["differences"]: [self._final_table()]}
        if self.findings:
            found[HEADINGS["differences"]].insert(0, self._losses_table())
            found[HEADINGS["calibration"]] = [self._quality_table(), *self._advantage_tables()]
        found[HEADINGS["cost"]] = [self._cost_table()]
        return found

    def _losses_table(self) -> Table:
        f = self.findings
        rows = [[f"told {NAMES[OWN]}", _shown(f["losses"][OWN]), "-"]]
        for name, apart in f["differences"].items():
            label = f"told {NAMES[name]}" if name in TOLD else NAMES[name]
            rows.append([label, _shown(f["losses"][name]), difference(apart)])
        caption = (
            f"Held-out next-token loss in nats, {f['tokens']:,} tokens [95% interval over seeds]; the difference is "
            f"ConfidenceAwareGPT told {NAMES[OWN]}, less this row"
        )
        return Table(["model", "loss", "difference"], rows, caption)

    def _final_table(self) -> Table:
        names = ("final_train_loss", "final_eval_loss", "final_perplexity", "best_eval_loss")
        rows = [
            [ARMS[arm], *(_spread(_values(found, name)) for name in names), number(found[0].training_time, 1)]
            for arm, found in self.results.items()
        ]
        headers = ["model", "training loss", "held-out loss", "perplexity", "best held-out loss", "seconds"]
        so_far = "At the end" if self.findings else "So far"
        return Table(headers, rows, f"{so_far}: mean ± standard deviation over seeds; seconds are the share of a seed")

    def _quality_table(self) -> Table:
        quality = self.findings["quality"]
        rows = [
            [MEASURED[measure], *(_shown(by["over_seeds"][measure], 3) for by in quality.values())]
            for measure in MEASURES
        ]
        caption = (
            "Predictions of the coming loss: the head's, and of rivals that need no head [95% interval over seeds]"
        )
        return Table(["measure", *(NAMES.get(name, name) for name in quality)], rows, caption)

    def _advantage_tables(self) -> list[Table]:
        """One for each measure that is compared."""
        ahead = self.findings["advantage"]
        headers = ["the head less", "over seeds", *(f"seed {result.seed}" for result in self.results[CONFIDENCE])]
        tables = []
        for measure in next(iter(ahead.values())):
            rows = []
            for rival, measures in ahead.items():
                found = measures[measure]
                within = (with_interval(one["difference"], one["interval"], sign=True) for one in found["within_seeds"])
                rows.append([NAMES[rival], difference(found["over_seeds"], 3), *within])
            tables.append(Table(headers, rows, f"{MEASURED[measure]}, paired differences"))
        return tables

    def _cost_table(self) -> Table:
        rows = []
        for name, found in self.results.items():
            cost, steps = costs(self.found, name), len(found[0].token_loss_history)
            rows.append([
                ARMS[name], f"{cost['parameters']:,.0f}", f"{steps:,}", f"{cost['FLOPs a step']:.3e}",
                f"{cost['FLOPs in all']:.3e}", number(cost["seconds a seed"], 1),
                number(self.found.training_time[name], 1),
            ])  # fmt: skip
        headers = ["model", "parameters", "steps", "FLOPs a step", "FLOPs in all", "seconds a seed", "seconds in all"]
        caption = "FLOPs as XLA counts them, of one seed; seconds of training without evaluations, with compilation"
        return Table(headers, rows, caption)

    def figures(self) -> dict[str, Figure]:
        """(caption, PNG, what it shows in words) by short name, one of `HEADINGS`."""
        return draw(self.found)

    # --- Page ---------------------------------------------------------------------------------------------------------

    def html(self, drawn: Mapping[str, Figure]) -> str:
        """The page: whether the signal helps, verdicts, figures with their tables, how to read them, who made them."""
        blocks: list[page.Block] = [page.Heading(self.answer()), *map(page.Paragraph, self.plainly())]
        if self.findings:
            blocks.append(self._cards())
        blocks += [page.Heading("What was compared"), page.Paragraph(IDEA), page.Paragraph(self.described())]
        if self.findings:
            blocks += [page.Heading("Verdicts"), self.verdicts]
        sections = self.sections()
        for name, title in HEADINGS.items():
            if name in drawn or title in sections:
                blocks.append(page.Heading(title))
            if name in drawn:
                caption, png, alt = drawn[name]
                blocks.append(page.Picture(png, caption, alt))
            blocks += sections.get(title, [])
            if name == "differences":
                blocks += map(page.Paragraph, self.improvements())
        identity = self.found.identity or {"config": dataclasses.asdict(self.found.config)}
        blocks += page.closing((*claims.RULES, *READING), identity)
        subtitle = (
            f"Does a language model that predicts its own coming loss, and is told what it predicted, predict text "
            f"better? {self.found.config.training_steps:,} steps on {self._corpus}, {self._seeds}. "
            f"{_made(self.found.timestamp)}"
        )
        return page.render_page(TITLE, subtitle, blocks)

    def _cards(self) -> page.Cards:
        f = self.findings["differences"]
        cards = []
        for name in f:
            label = f"Against being told {NAMES[name]}" if name in TOLD else f"Against {NAMES[name]}"
            value, _, interval = difference(f[name]).partition(" ")
            remark = f"{interval} nats" if interval else "nats, without interval"
            cards.append((label, value, f"{remark}; below 0 speaks for it"))
        return page.Cards(cards)


IDEA = (
    "MiniGPT is a small decoder-only transformer. ConfidenceAwareGPT is the same transformer with one more output and "
    "one more input. The output, the confidence head, predicts a loss, in nats: the one the model will have one token "
    "later if it goes on with a next token of its own choice. The input is the number that it predicted at the "
    "position before; it scales and shifts the norms of every block. What is minimised is the next-token loss, and "
    "with a weight the squared error of the predicted one."
)
READING = (
    "Told something else: the trained model reads the same text, but in place of its own predictions it is told zeros, "
    "its predictions at the same positions of another text, or the mean of its predictions. If these are as good, it "
    "makes no use of what it predicts. If they are worse, that shows use, not yet benefit: a model that was always "
    "told its predictions is thrown off by anything else. MiniGPT, which never was, tells of the benefit.",
    "Equal steps give both models the same text. But a step of ConfidenceAwareGPT costs more, as it looks behind its "
    "own choices. At equal FLOPs MiniGPT trains for so many more steps that the floating-point operations, as the "
    "compiler counts them, are equal.",
    "Rivals of the head, which need no training: the model's own entropy, and its largest probability, each by a "
    "straight line fitted on other chunks of held-out text; and a constant, the mean loss. R squared is the explained "
    "share of the variance of the coming loss. The calibration slope and intercept are of the actual loss as a line of "
    "the predicted one. For ECE and Brier the prediction is turned into a probability that the loss is above its "
    "median. AUROC says how well a high prediction tells that the likeliest next token is wrong.",
    "An interval over seeds is Student's t: about another initialisation and order of the data, not about other text "
    "or another size of model. An interval of one seed is a bootstrap over chunks of text: it takes that head as it "
    "is. In curves the shaded band is the range of the seeds, not an interval.",
)


def _values(found: Sequence[TrainingResult], name: str) -> np.ndarray:
    """One number a seed, NaN where there is none yet."""
    return np.array([getattr(result, name) for result in found], float)


def _spread(values: np.ndarray) -> str:
    """`4.141 ± 0.111`; the mean alone for one seed."""
    if np.isnan(values).any():
        return "-"
    digits = 1 if values.mean() >= 10 else 3
    spread = f" \u00b1 {number(float(values.std(ddof=1)), digits)}" if len(values) > 1 else ""
    return number(float(values.mean()), digits) + spread


def _shown(found: Mapping[str, Any], digits: int = 4) -> str:
    return with_interval(found["mean"], found["interval"], digits)


def _made(stamp: str) -> str:
    """`20260131_235959` as a page says it."""
    return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]} {stamp[9:11]}:{stamp[11:13]} UTC"
