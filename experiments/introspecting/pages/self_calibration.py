"""What the page shows of self-calibration."""

from __future__ import annotations

from typing import Any

from nmjax.metrics.stated import ALPHA, FLOOR
from nmjax.report.page import Block, Paragraph, Picture
from nmjax.report.plots_detection import ForestRow, forest_figure
from nmjax.report.tables import Table, estimate, number, with_interval

_NAMES = {
    "kl_actual_stated": "KL(actual, stated)",
    "kl_stated_actual": "KL(stated, actual)",
    "total_variation": "total variation",
    "top1": "top 1",
    "top5": "top 5",
    "entropy": "entropy",
}
_DIVERGENCES = ("kl_actual_stated", "kl_stated_actual")
_LONGEST, _SHOWN = 20, 3  # characters of an answer, and answers, in a table


def section(findings: dict[str, Any]) -> list[Block]:
    """Tables and a forest plot of the findings of `experiments.introspecting.suites.self_calibration`."""
    subjects, n = findings["subjects"], findings["n"]
    blocks: list[Block] = [
        Paragraph(
            f"Each of {n} requests with many possible answers (name an animal, pick a number) was answered many times, "
            "sampled at temperature 1 from the whole vocabulary. Once, the model was asked which five answers it would "
            "give with which probabilities. The divergences compare that statement with how often the answers came; "
            "0 is a perfect fit. They are in nats, over the stated answers and any other as one more; the frequencies "
            f"are smoothed by {ALPHA} a piece and the statement by a share of {FLOOR} of the uniform one, so nothing "
            "is infinite."
        ),
        Paragraph(
            "Top 1: whether the answer stated as likeliest is the commonest. Top 5: share of the five commonest that "
            "are among those stated. Entropy is that of the samples, in bits, of all requests: a model that always "
            "says the same has 0. A statement that holds no list of answers with probabilities is unread and counted "
            "apart. Intervals are of 95%, over requests and samples."
        ),
    ]
    if silent := [name for name, own in subjects.items() if not own["scored"]]:
        blocks.append(Paragraph(f"Without a single statement that can be read: {', '.join(silent)}."))
    blocks.append(
        Table(
            ["model", "unread", *_NAMES.values(), "requests"],
            [
                [
                    name,
                    with_interval(own["unread"] / n, own["unread_interval"], 2),
                    *(estimate(own[m], 2) for m in _NAMES),
                    str(own["scored"]),
                ]
                for name, own in subjects.items()
            ],
            "How well statements fit samples, the mean over the requests whose statement can be read.",
        )
    )
    versus = findings["versus_base"]
    rows = {
        name: {_NAMES[m]: ForestRow(change[m]["value"], change[m]["interval"]) for m in _DIVERGENCES}
        for name, change in versus.items()
        if change[_DIVERGENCES[0]]["n"]
    }
    if rows:
        blocks.append(
            Picture(
                forest_figure(rows, "divergence less the base's, nats", chance=0.0),
                "Difference to the base, request by request, with 95% intervals. Where that is left of the line, the "
                "adapter knows its own answers better than the base knows its own.",
                "Forest plot of the difference of two divergences to the base, a line an adapter.",
            )
        )
    if rows:
        blocks += [
            Table(
                ["adapter", *_NAMES.values(), "requests"],
                [
                    [
                        name,
                        *(estimate(change[m], 2, sign=True) for m in _NAMES),
                        str(change[_DIVERGENCES[0]]["n"]),
                    ]
                    for name, change in versus.items()
                ],
                "Difference to the base, on the requests that count for both.",
            ),
            Table(
                ["statement of", *subjects],
                [[p, *(estimate(cell, 2) for cell in cells.values())] for p, cells in findings["matrix"].items()],
                "KL(actual, stated) by whose statement (rows) and whose samples (columns). A column is lowest on the "
                "diagonal where a model knows itself better than the others know it.",
            ),
        ]
    blocks += _foretold(findings["foretold"])
    blocks.append(
        Table(
            ["request", "model", "commonest answers", "stated"],
            [
                [prompt, name, _list(seen["actual"]), _list(seen["stated"]) or f"unread: {_short(seen['statement'])}"]
                for prompt, each in findings["prompts"].items()
                for name, seen in each.items()
            ],
            "The commonest answers with their shares of the samples, and the first of those stated.",
        )
    )
    return blocks


def _foretold(found: dict[str, Any]) -> list[Block]:
    """What is known of the likeliest answers, without a word about probabilities."""
    names = list(found["matrix"])
    return [
        Paragraph(
            "A model that cannot put probabilities into words may know its answers all the same. So the commonest "
            "answers of each model were also scored by their exact log-probabilities: as answers to the request, and "
            "as the beginning of what it replies when asked which answers it would give. The divergence is that of the "
            "second from the first among these answers, in nats; 0 is a perfect fit. What knows nothing finds all of "
            "them equally likely: its divergence is in the next column, and below it is some knowledge of how likely "
            "these answers are. It need not be of oneself, so the base foretells the very same answers, too; a model "
            "with ways of its own beats it at these, so it has to beat the base at the base's own answers as well."
        ),
        Table(
            ["model", "divergence", "knowing nothing", "difference", "likeliest is foretold",
             "to base, same answers", "to base, its own", "requests"],
            [
                [
                    name,
                    estimate(found["matrix"][name][name], 2),
                    estimate(found["uniform"][name], 2),
                    estimate(found["versus_uniform"][name], 2, sign=True),
                    estimate(found["top1"][name], 2),
                    estimate(found["advantage"].get(name), 2, sign=True),
                    estimate(found["versus_base"].get(name), 2, sign=True),
                    number(found["matrix"][name][name]["n"], 0),
                ]
                for name in names
            ],
            "Foretelling one's own commonest answers by likelihood, the mean over requests with two answers or more.",
        ),
        *(
            [
                Table(
                    ["foretold by", *names],
                    [[p, *(estimate(cell, 2) for cell in found["matrix"][p].values())] for p in names],
                    "The divergence by whose foretelling (rows) and whose answers (columns). A column is lowest on the "
                    "diagonal where a model foretells its own answers better than the others foretell them.",
                )
            ]
            if len(names) > 1
            else []
        ),
    ]  # fmt: skip


def _list(answers: list[dict[str, Any]]) -> str:
    return ", ".join(f"{_short(entry['answer'])} {100 * entry['share']:.0f}%" for entry in answers[:_SHOWN])


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}\u2026"
