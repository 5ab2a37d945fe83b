"""B6 on the page: whether models say that a concept was put into them, and which one."""

from __future__ import annotations

from typing import Any

from nmjax.report.page import Block, Details, Paragraph, Picture
from nmjax.report.plots_detection import ForestRow, forest_figure
from nmjax.report.tables import Table, estimate, number, p_text


def section(findings: dict[str, Any]) -> list[Block]:
    """What was done, then a table for each question: detection, keywords, judge, choice; concepts; answers."""
    subjects = findings["subjects"]
    return [
        *_introduction(findings),
        _detection(subjects),
        _keywords(subjects),
        _judge(subjects),
        _choice(subjects, findings["options"]),
        _forest(subjects),
        _by_concept(findings),
        *(Details(f"Answers of {name}", _texts(examples)) for name, examples in findings["examples"].items()),
    ]


def _introduction(findings: dict[str, Any]) -> list[Block]:
    vectors, C = findings["vectors"], len(findings["concepts"])
    questions = ", ".join(f"\u201c{question}\u201d" for question in findings["questions"])
    n = next(iter(findings["subjects"].values()))["n"]
    when = (
        "The direction stays while the model reads the question and answers, so it also pushes the words themselves: "
        "naming the concept is no introspection here."
        if findings["steer_answers"]
        else "The question is read and answered without steering, so what is said about the concept comes from what "
        "the model remembers of the conversation."
    )
    shared = "without the shared direction" if vectors["shared_removed"] else "as found"
    return [
        Paragraph(
            f"While the model reads a conversation, the direction of one of {C} concepts is added to its activations, "
            f"{findings['magnitude']:g} times its unit vector after each block of the {findings['third']} third of the "
            f"layers. {when} It is asked {questions} in {findings['conversations']} conversations of each concept, "
            f"{n} answers in all, and the same without steering: each steered answer has an unsteered twin to compare "
            "with."
        ),
        Paragraph(
            f"The directions used are those {shared}. Two concepts have a mean cosine of {number(vectors['cosine'])} "
            f"as found and {number(vectors['cosine_without_shared'])} without the shared direction; the mean direction "
            f"has the norm {number(vectors['shared_norm'])}. Intervals are over concepts. A p-value is that of a "
            "permutation test which deals the concepts to the groups of answers at random, corrected for the tests of "
            "all models by keyword and by judge (Benjamini-Hochberg). An interval without width says that all concepts "
            "were alike, no more."
        ),
    ]


def _detection(subjects: dict[str, Any]) -> Table:
    rows = []
    for name, report in subjects.items():
        found = report["detection"]
        steered, unsteered = found["steered"], found["unsteered"]
        rows.append(
            [
                name,
                estimate(steered),
                estimate(unsteered),
                estimate(found["difference"], sign=True),
                *(f"{steered[kind]}, {unsteered[kind]}" for kind in ("yes", "no", "unclear")),
            ]
        )
    headers = ["model", "steered", "unsteered", "difference", "yes", "no", "says neither"]
    caption = (
        "Detection: share of the answers that say there is something unusual, of those that say yes or no. Counts are "
        "steered, unsteered"
    )
    return Table(headers, rows, caption)


def _keywords(subjects: dict[str, Any]) -> Table:
    rows = []
    for name, report in subjects.items():
        found = report["keywords"]
        rows.append(
            [
                name,
                *(estimate(found[kind]) for kind in ("own", "unsteered", "others")),
                *(estimate(found[f"difference_to_{kind}"], sign=True) for kind in ("unsteered", "others")),
                p_text(found["p_adjusted"]),
                f"{report['empty']['steered']}, {report['empty']['unsteered']}",
            ]
        )
    headers = [
        "model", "names the concept", "unsteered", "other concepts", "more than unsteered", "more than others", "p",
        "empty",
    ]  # fmt: skip
    caption = (
        "Identification by keyword: how often an answer holds the concept's word or an inflection of it, how often its "
        "unsteered twin does, and how often it holds the word of another concept. Empty answers, steered and "
        "unsteered, are left out"
    )
    return Table(headers, rows, caption)


def _judge(subjects: dict[str, Any]) -> Table:
    rows = []
    for name, report in subjects.items():
        steered, unsteered, gain = (report["judge"][kind] for kind in ("steered", "unsteered", "against_unsteered"))
        rows.append(
            [
                name,
                estimate(steered),
                p_text(steered["p_adjusted"]),
                estimate(unsteered),
                p_text(unsteered["p_value"]),
                estimate(gain),
                p_text(gain["p_adjusted"]),
                f"{steered['unanswered']}, {unsteered['unanswered']}",
            ]
        )
    chance = next(iter(subjects.values()))["judge"]["chance"]
    headers = [
        "model", "steered", "p", "unsteered", "p, unsteered", "gains most over unsteered", "p, gain", "not judged",
    ]  # fmt: skip
    caption = (
        "Identification by a judge, who sees question and answer and chooses among all concepts: share of the answers "
        "in which the concept is found. A judge that likes some words finds those in every answer; so beside the "
        "likeliest concept stands the one that gains most in the judge's log-probability over the unsteered twin. "
        f"Chance {chance:.3f}. Unsteered answers have nothing to find: theirs is a check of the test, uncorrected"
    )
    return Table(headers, rows, caption)


def _choice(subjects: dict[str, Any], options: int) -> Table:
    rows = []
    for name, report in subjects.items():
        found, difference = report["choice"], report.get("versus_base", {}).get("choice_against_unsteered")
        rows.append(
            [
                name,
                *(estimate(found[kind]) for kind in ("steered", "unsteered", "against_unsteered")),
                estimate(difference, sign=True),
                f"{report['failed']['steered']}, {report['failed']['unsteered']}",
            ]
        )
    headers = ["model", "steered", "unsteered", "gains most over unsteered", "difference to base", "failed"]
    caption = (
        f"Choice among {options} concepts, the right one and others drawn at random: how often the right one is the "
        "likeliest after \u201cThe answer is\u201d, steered and unsteered, and how often its word gains most in "
        f"log-probability by steering, which takes out that some words are likelier anyway. Chance {1 / options:.3f}. "
        "Failed gave no finite number, steered and unsteered, and are left out"
    )
    return Table(headers, rows, caption)


def _forest(subjects: dict[str, Any]) -> Picture:
    rows, chance = {}, 0.0
    for name, report in subjects.items():
        choice, chance = report["choice"], report["choice"]["chance"]
        rows[name] = {
            label: ForestRow(choice[kind]["value"], choice[kind]["interval"])
            for label, kind in (("likeliest", "steered"), ("gains most over unsteered", "against_unsteered"))
        }
    return Picture(
        forest_figure(rows, "share of right choices", chance),
        "How often a model's own log-probabilities find the concept.",
        "A row for each model with the share of right choices, by the likeliest word and by the word that gains most.",
    )


def _by_concept(findings: dict[str, Any]) -> Table:
    subjects = findings["subjects"]
    rows = [
        [word, *(number(report["by_concept"][k]["chosen"], 2) for report in subjects.values())]
        for k, word in enumerate(findings["concepts"])
    ]
    caption = "By concept: how often its word gains most over the unsteered twin among the options"
    return Table(["concept", *subjects], rows, caption)


def _texts(examples: dict[str, dict[str, str]]) -> dict[str, str]:
    """One answer a line, by concept and state."""
    return {
        f"{concept}, {state}": " ".join(answer.split()) or "(empty)"
        for concept, states in examples.items()
        for state, answer in states.items()
    }
