"""Identity on the page: how often answers claim to be what the model is not, and the answers side by side."""

from __future__ import annotations

from typing import Any

from experiments.introspecting.pages.forests import changes_by_category
from nmjax.report.page import Block, Details, Paragraph
from nmjax.report.tables import Table, estimate, p_text


def section(findings: dict[str, Any]) -> list[Block]:
    """Tables, figures and answers of `Identity.analyse`."""
    compared = _changes(findings) if findings["changes"] else []
    return [*_asked(findings), _rates(findings), _kinds(findings), *compared, *_answers(findings)]


def _asked(findings: dict[str, Any]) -> list[Block]:
    settings, kinds = findings["settings"], findings["kinds"]
    meaning = "; ".join(f"{kind}: {text}" for kind, text in kinds.items())
    return [
        Paragraph(
            f"{sum(findings['categories'].values())} questions about what the model is, without steering, "
            f"{settings['samples']} answers each (temperature {settings['temperature']:g}, top-p "
            f"{settings['top_p']:g}, {settings['max_new_tokens']} tokens at most). Answers of the same number share "
            "their random draws."
        ),
        Paragraph(
            "An answer is confused if it claims what the model is not. Rules look for claims in the first person "
            f"that are not denied, doubted, asked or quoted ({meaning}). They miss claims put in other words; what "
            "matters is how a rate changes. Intervals are 95% over questions, whose samples go together."
        ),
    ]


def _rates(findings: dict[str, Any]) -> Block:
    rows = []
    for name in findings["subjects"]:
        counts, rate = findings["answers"][name], findings["rates"][name]["all"]
        rows.append([
            name,
            estimate(rate),
            *(str(counts[state]) for state in ("complete", "unfinished", "empty")),
            str(counts["confused"]["unfinished"]),
            estimate(findings["with_unfinished"][name]["all"]),
        ])  # fmt: skip
    headers = ["model", "confused", "complete", "unfinished", "empty", "unfinished, confused", "confused, of both"]
    return Table(
        headers, rows, "Share of complete answers that are confused. Unfinished ones ran out of tokens and count apart."
    )


def _kinds(findings: dict[str, Any]) -> Block:
    rows = [[name, *(estimate(own[kind]) for kind in findings["kinds"])] for name, own in findings["by_kind"].items()]
    return Table(["model", *findings["kinds"]], rows, "Share of complete answers with each kind of claim.")


def _changes(findings: dict[str, Any]) -> list[Block]:
    rows = [
        [name, estimate(own, sign=True), p_text(own["p_value"]), p_text(own["p_adjusted"])]
        for name, own in findings["changes_of_all"].items()
    ]
    return [
        Table(
            ["adapter", "change", "p", "p, adjusted"],
            rows,
            "Change of the share of confused answers from the base, over all questions: sign flips of the questions' "
            "changes, adjusted for the number of adapters.",
        ),
        *changes_by_category(findings["changes"], findings["categories"], "the share of confused answers"),
        *changes_by_category(
            findings["p_yes"]["changes"], findings["categories"], "P(Yes) at the answer's first token"
        ),
    ]


def _answers(findings: dict[str, Any]) -> list[Block]:
    """All answers to each question side by side, folded: the first of every model, then the second of every model."""
    blocks: list[Block] = [Paragraph("All answers, question by question, with what they claim in brackets.")]
    for row in findings["responses"]:
        samples = max(map(len, row["answers"].values()))
        texts = {
            f"{name}, {k + 1}": _answer(own[k])
            for k in range(samples)
            for name, own in row["answers"].items()
            if k < len(own)
        }
        blocks.append(Details(row["prompt"], texts))
    return blocks


def _answer(own: dict[str, Any]) -> str:
    remarks = [*own["claims"], *(["unfinished"] if own["finish"] == "length" else [])]
    return (own["text"] or "(nothing)") + (f" [{', '.join(remarks)}]" if remarks else "")
