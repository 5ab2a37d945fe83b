"""Measures of uncertainty as detectors of wrong answers: tables, a figure and a page."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from nmjax.metrics import ranking, rejection, rivals, stats
from nmjax.report import page
from nmjax.report.plots import MetricPanel, metrics_figure
from nmjax.report.tables import Table, number, with_interval

BASELINE = "nll"
"""What samples and questions must beat: the probability of the answer itself, which costs nothing more."""

TITLES = {
    "nll": "-ln p of the answer",
    "perplexity": "perplexity of the answer",
    "self_certainty": "self-certainty",
    "first_certainty": "first-token self-certainty",
    "predictive_entropy": "predictive entropy",
    "length_normalised_entropy": "length-normalised entropy",
    "lexical_similarity": "lexical similarity",
    "semantic_entropy": "semantic entropy (discrete)",
    "weighted_semantic_entropy": "semantic entropy (weighted)",
    "num_clusters": "number of clusters",
    "p_true": "P(True)",
    "p_true_statement": "P(yes) as in training",
    "answer_tokens": "tokens of the answer",
}
"""Measures and how they are printed."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One measure as a detector of wrong answers, high meaning unsure; pairs (low, high) are 95% intervals.

    Values are None where all answers are right or all are wrong. `over_baseline`: AUROC less that of `BASELINE`.
    """

    name: str
    auroc: float | None
    auroc_interval: Sequence[float] | None
    prr: float | None
    prr_interval: Sequence[float] | None
    prr_half: float | None  # with at most half of the answers rejected
    prr_half_interval: Sequence[float] | None
    over_baseline: float | None
    over_baseline_interval: Sequence[float] | None

    @property
    def tells(self) -> str:
        """Where the interval of the AUROC lies: "above" 1/2, "below" it, or on "neither" side."""
        low, high = self.auroc_interval or (0.5, 0.5)
        return "above" if low > 0.5 else "below" if high < 0.5 else "neither"


def evaluate(
    uncertainty: Mapping[str, Sequence[float]], right: Sequence[bool], draws: int = stats.DRAWS, seed: int = 0
) -> list[Finding]:
    """The measures, each [N] and high where unsure, against whether the answers are right [N]; highest AUROC first."""
    wrong, alone = 1 - np.asarray(right, dtype=np.float64), np.arange(len(right))
    baseline = np.asarray(uncertainty[BASELINE])
    found = []
    for name, scores in uncertainty.items():
        u = np.asarray(scores, dtype=np.float64)
        auroc = functools.partial(ranking.score_auroc, u, wrong)
        samples = stats.cluster_bootstrap(auroc, alone, draws, seed)
        whole, half = (rejection.prr(u, 1 - wrong, None, draws, seed, share) for share in (1.0, 0.5))
        over = rivals.compare_aurocs(u, baseline, wrong, alone, draws, seed, directions=("high", "high"))
        found.append(
            Finding(
                name, stats.defined(auroc()), stats.defined_interval(samples),
                whole["prr"], whole["interval"], half["prr"], half["interval"],
                None if name == BASELINE else over["difference"], None if name == BASELINE else over["interval"],
            )
        )  # fmt: skip
    return sorted(found, key=lambda finding: -(finding.auroc or 0))


@dataclasses.dataclass(frozen=True)
class UncertaintyPage:
    """What a reader is told about the measures on one set of questions, as text and as a page."""

    model: str
    source: str  # of the questions
    samples: int  # a prompt
    right: Sequence[bool]  # [N]
    kinds: Sequence[str]  # [N]
    uncertainty: Mapping[str, Sequence[float]]  # [N] each, as for `evaluate`
    findings: Sequence[Finding]
    examples: Sequence[Sequence[str]]  # rows of (prompt, answer, right?, samples)

    def headline(self) -> str:
        """Accuracy, and which measures tell wrong answers from right ones."""
        low, high = stats.wilson_interval(sum(self.right), len(self.right))
        accuracy = with_interval(float(np.mean(self.right)), (float(low), float(high)))
        first = f"{self.model} answers {len(self.right)} questions ({self.source}): {accuracy} right."
        if all(finding.auroc is None for finding in self.findings):
            return f"{first} All answers are of one kind, so there is nothing to tell apart."
        above = {f.name: f.over_baseline_interval for f in self.findings if f.over_baseline_interval is not None}
        lists = {
            "Above chance": [f.name for f in self.findings if f.tells == "above"],
            "Not told from chance": [f.name for f in self.findings if f.tells == "neither"],
            "Pointing the wrong way": [f.name for f in self.findings if f.tells == "below"],
            f"Better than {TITLES[BASELINE]}": [name for name, (low, _) in above.items() if low > 0],
            "Worse than it": [name for name, (_, high) in above.items() if high < 0],
        }
        told = (f"{what}: {', '.join(TITLES[name] for name in names) or 'none'}." for what, names in lists.items())
        return " ".join([first, *told])

    def table(self) -> Table:
        """One row a measure."""
        rows = [
            [
                TITLES[f.name],
                with_interval(f.auroc, f.auroc_interval),
                with_interval(f.prr, f.prr_interval),
                with_interval(f.over_baseline, f.over_baseline_interval, sign=True),
            ]
            for f in self.findings
        ]
        headers = [
            "measure",
            "AUROC of wrong answers",
            "rejection ratio (PRR)",
            f"AUROC less that of {TITLES[BASELINE]}",
        ]
        return Table(headers, rows, "Measures of uncertainty as detectors of wrong answers")

    def by_kind(self) -> Table:
        """Accuracy and mean uncertainty of the kinds of questions."""
        kinds, right = np.asarray(self.kinds), np.asarray(self.right)
        shown = [BASELINE, "semantic_entropy", "num_clusters"]
        rows = []
        for kind in sorted(set(self.kinds), key=lambda kind: (-right[kinds == kind].mean(), kind)):
            mine = kinds == kind
            means = (number(float(np.asarray(self.uncertainty[name])[mine].mean())) for name in shown)
            rows.append([kind or "all", str(int(mine.sum())), number(float(right[mine].mean())), *means])
        return Table(
            ["kind", "questions", "right", *(TITLES[name] for name in shown)], rows, "By kind of question, means"
        )

    def text(self) -> str:
        """Headline and tables."""
        return "\n\n".join([self.headline(), self.table().text(), self.by_kind().text()]) + "\n"

    def figure(self) -> bytes:
        """AUROC and rejection ratio of every measure with intervals, PNG."""

        def panel(title: str, name: str) -> MetricPanel:
            ends = [getattr(f, f"{name}_interval") or (None, None) for f in self.findings]
            low, high = zip(*ends, strict=True)
            return MetricPanel(title, [getattr(f, name) for f in self.findings], low, high)

        names = [f.name for f in self.findings]
        panels = [panel("AUROC of wrong answers", "auroc"), panel("rejection ratio (PRR)", "prr")]
        return metrics_figure(panels, [TITLES[name] for name in names], baseline=names.index(BASELINE))

    def html(self, identity: Mapping, picture: bytes) -> str:
        """The page; `picture` is what `figure` returned."""
        best = self.findings[0]
        cards = [
            ("Right answers", number(float(np.mean(self.right))), f"of {len(self.right)} questions"),
            ("Best AUROC", number(best.auroc), TITLES[best.name]),
            ("Above chance", f"{sum(f.tells == 'above' for f in self.findings)} of {len(self.findings)}", "measures"),
            ("Samples", str(self.samples), "a question"),
        ]
        blocks: list[page.Block] = [
            page.Cards(cards),
            page.Paragraph(self.headline()),
            page.Heading("Measures"),
            page.Picture(
                picture,
                f"Values with 95% intervals; the vertical line is {TITLES[BASELINE]}.",
                "AUROC and rejection ratio of the measures of uncertainty",
            ),
            self.table(),
            page.Heading("Questions"),
            self.by_kind(),
            Table(["question", "answer", "right", "samples"], self.examples, "The first questions"),
        ]
        blocks += page.closing(_READING, identity)
        return page.render_page("Uncertainty of answers", f"{self.model}. {page.made_at(identity)}", blocks)


_READING = (
    "The greedy answer to each question is right or wrong. AUROC is the probability that a wrong one has the higher "
    "uncertainty, 0.5 for a measure that says nothing. The rejection ratio is what is gained in accuracy as the most "
    "unsure answers are rejected one by one, over what could be gained: 1 for the best order, 0 for a random one. The "
    "direction of each measure is fixed by what it means, so a value below 0.5 is a measure that points the wrong way.",
    "Intervals (95%) are from a bootstrap over questions; differences of AUROC are paired, on the same draws. They are "
    "not adjusted for the number of measures.",
    "Samples mean the same where each holds the content words of the other, no more than a fifth left out. That stands "
    "in for a model of entailment: it knows no paraphrase. For answers of one word it is exact match.",
    "Self-certainty is a mean over the answer's tokens, the one that ends it included. In answers of one word that one "
    "is half of the mean, so the first token stands here alone, too.",
    "Measures that need the greedy answer alone cost one pass. Those of samples cost as many generations more.",
)
