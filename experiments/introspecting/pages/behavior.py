"""Self-attribution on the page: who says yes more often when asked about itself, and to what."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.introspecting.pages.forests import changes_by_category
from experiments.introspecting.subjects import BASE
from nmjax.report.page import Block, Details, Paragraph, Picture
from nmjax.report.plots_comparison import ComparisonRow, comparison_figure
from nmjax.report.tables import Table, estimate, number

VERDICTS = {"equivalent": "none", "different": "a bias", "undecided": "undecided"}
PAIR_VERDICTS = {"equivalent": "similar", "different": "different", "undecided": "undecided"}
_LARGEST = 12  # questions in the table of single changes
_TOKENS = 3  # shown of each distribution


def section(findings: dict[str, Any]) -> list[Block]:
    """Tables and figures of `Behavior.analyse`."""
    adapters = [name for name in findings["subjects"] if name != BASE]
    compared = [*_biases(findings, adapters), *_changes(findings), *_largest(findings, adapters)] if adapters else []
    return [_asked(findings), *compared, *_levels(findings), _tokens(findings)]


def _asked(findings: dict[str, Any]) -> Block:
    settings = findings["settings"]
    worded = "".join(
        f" {what} {settings[name]!r}."
        for name, what in (("suffix", "Each ends in"), ("answer_prefix", "The answer is made to begin with"))
        if settings[name]
    )
    failed = sum(findings["failed"].values())
    return Paragraph(
        f"{sum(findings['categories'].values())} questions that can be answered with yes or no, in "
        f"{len(findings['categories'])} categories, without any steering.{worded} P(Yes) is the probability that the "
        "first token of the answer is a yes in any spelling. Changes are from the base, question by question; "
        "intervals are 95% and resample the questions."
        + (f" {failed} answers gave no number and are left out." if failed else "")
    )


# --- The bias ---------------------------------------------------------------------------------------------------------


def _biases(findings: dict[str, Any], adapters: Sequence[str]) -> list[Block]:
    margin = findings["settings"]["margin"]
    bias = {name: findings["bias"][name] for name in adapters if findings["bias"][name]["value"] is not None}
    pairs = {
        f"{b} \u2212 {a}": findings["bias_differences"][f"{b} - {a}"] for a, b in itertools.combinations(adapters, 2)
    }
    rows = [
        [name, number(own["self"], sign=True), number(own["control"], sign=True), estimate(own, sign=True),
         estimate(findings["bias_of_share"][name], sign=True), VERDICTS[own["equivalence"]["verdict"]]]
        for name, own in bias.items()
    ]  # fmt: skip
    blocks: list[Block] = [
        Paragraph(
            "The self-attribution bias is the change of P(Yes) on questions about the model itself "
            f"({_listed(findings['self'])}) less that on control questions ({_listed(findings['control'])}): a model "
            "that says yes to everything has none. It counts as none if its 90% interval lies within "
            f"\u00b1{margin:g}, a margin fixed beforehand; as a bias if that interval lies outside; else it is "
            "undecided."
        ),
        Table(
            ["adapter", "change, self", "change, control", "bias", "bias of yes / (yes + no)", "verdict"],
            rows,
            "Self-attribution bias. The last column of numbers asks only how yes and no share what they hold.",
        ),
    ]
    if bias:
        picture = comparison_figure([_comparison(name, own, margin) for name, own in bias.items()], "base", "adapter")
        blocks.append(
            Picture(picture, "The bias of each adapter with its 90% interval, in units of the margin.", _said(bias))
        )
    if pairs:
        table = [
            [name, estimate(own, sign=True), _ends(own), PAIR_VERDICTS[own["equivalence"]["verdict"]]]
            for name, own in pairs.items()
            if own["value"] is not None
        ]
        blocks.append(
            Table(
                ["adapters", "difference of bias", "90% interval", "verdict"],
                table,
                f"Do two adapters have a similar bias? Similar: the 90% interval lies within \u00b1{margin:g}.",
            )
        )
    return blocks


def _comparison(name: str, own: Mapping[str, Any], margin: float) -> ComparisonRow:
    low, high = own["equivalence"]["interval_90"]
    return ComparisonRow(name, own["value"], low, high, margin)


def _said(bias: Mapping[str, Mapping[str, Any]]) -> str:
    return "Self-attribution bias: " + ", ".join(f"{name} {number(own['value'])}" for name, own in bias.items())


def _ends(entry: Mapping[str, Any]) -> str:
    low, high = (number(end, sign=True) for end in entry["equivalence"]["interval_90"])
    return f"{low} to {high}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names)


# --- By category and question -----------------------------------------------------------------------------------------


def _changes(findings: dict[str, Any]) -> list[Block]:
    return changes_by_category(findings["changes"], findings["categories"], "P(Yes)")


def _largest(findings: dict[str, Any], adapters: Sequence[str]) -> list[Block]:
    """The questions on which any adapter changed most."""

    def change(question: Mapping[str, Any], name: str) -> float | None:
        own, base = question["p_yes"][name], question["p_yes"][BASE]
        return None if own is None or base is None else own - base

    def most(question: Mapping[str, Any]) -> float:
        return max((abs(change(question, name) or 0.0) for name in adapters), default=0.0)

    chosen = sorted(findings["questions"], key=most, reverse=True)[:_LARGEST]
    rows = [
        [question["prompt"], *(number(question["p_yes"][name]) for name in (BASE, *adapters))] for question in chosen
    ]
    return [Table(["question", BASE, *adapters], rows, f"P(Yes) of the {len(rows)} questions that changed most.")]


def _levels(findings: dict[str, Any]) -> list[Block]:
    """P(Yes) by category, and what belongs beside it."""
    captions = {
        "p_yes": "Mean P(Yes) by category.",
        "share": "The share of yes in what yes and no hold together; it says little where that is small (next table).",
        "mass": "What yes and no hold together of the first token's probability.",
        "p_no": "Mean P(No). Where P(Yes) does not change, P(No) may.",
        "p_as": 'Mean probability of "As", which begins "As an AI".',
    }
    return [
        Table(
            ["category", *findings["subjects"]],
            [
                [
                    f"{category.replace('_', ' ')} ({n})",
                    *(estimate(findings["means"][measure][name][category]) for name in findings["subjects"]),
                ]
                for category, n in findings["categories"].items()
            ],
            caption,
        )
        for measure, caption in captions.items()
        if any(row["value"] is not None for own in findings["means"][measure].values() for row in own.values())
    ]


def _tokens(findings: dict[str, Any]) -> Block:
    def told(top: Sequence[Sequence[Any]]) -> str:
        return ", ".join(f"{text!r} {number(math.exp(logp), 2)}" for text, _, logp in top[:_TOKENS])

    return Details(
        "The likeliest first tokens of every answer",
        {
            question["prompt"]: {name: told(question["top"][name]) for name in findings["subjects"]}
            for question in findings["questions"]
        },
    )
