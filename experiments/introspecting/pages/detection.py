"""Detection on the page: who notices steering, where in the grid, what else sets it off, and what a "yes" weighs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nmjax.report.page import Block, Paragraph, Picture
from nmjax.report.plots_detection import ForestRow, curve_figure, forest_figure
from nmjax.report.plots_grid import GridPanel, grid_figure
from nmjax.report.tables import Table, estimate, number, p_text

SETS = {"trained": "vectors of the training data", "held_out": "held-out vectors", "concepts": "concept vectors"}
NEGATIVES = {"unsteered": "nothing done", "noise": "noise of equal norm", "system": "another system prompt"}
MAIN = "held_out"
_MOST_LINES = 6  # of a figure

Entry = Mapping[str, Any]


def section(findings: dict[str, Any]) -> list[Block]:
    """Tables and figures of `Detection.analyse`."""
    entries = {_label(entry): entry for entry in findings["subjects"]}
    return [
        *_asked(findings["subjects"]),
        _headline(entries),
        *_forest(entries),
        *_to_base(entries),
        *_roc(entries),
        *_cells(entries),
        *_negatives(entries),
        *_mass(entries, findings["low_mass"]),
    ]


def _label(entry: Entry) -> str:
    return entry["subject"] + (", asked vaguely" if entry["wording"] == "vague_prompt" else "")


def _sets(entries: Mapping[str, Entry]) -> list[str]:
    return [name for name in SETS if any(name in entry["detection"] for entry in entries.values())]


def _main(entries: Mapping[str, Entry]) -> str:
    """The set that is shown where there is room for one."""
    return MAIN if MAIN in _sets(entries) else _sets(entries)[0]


def _asked(subjects: Sequence[Entry]) -> list[Block]:
    sizes = {name: found["n"] for name, found in subjects[0]["sets"].items()}
    steered = ", ".join(f"{sizes[name]} with {words}" for name, words in SETS.items() if name in sizes)
    return [
        Paragraph(
            f"A conversation is read while a vector is added to the residual stream ({steered}), or not "
            f"({sizes['unsteered']} different inputs, combinations of a few contexts, replies and questions). Then the "
            "model is asked, unsteered, whether anything was done. "
            'Its answer is the likelier one of " yes" and " no". No adapter has seen these conversations and questions '
            "in training, and what counts is what was done, not what an adapter was told."
        ),
        Paragraph(
            "AUROC is the probability that yes is favoured more in a steered item than in an unsteered one: 0.5 says "
            "nothing, 1 separates them at some threshold. TPR and FPR are the shares of yes in steered and unsteered "
            "items; one who always says yes has an accuracy as high as the share of steered items, but a balanced "
            "accuracy of 0.5 and a d' of 0. d' is from log-linear rates; clipped to [.01, .99], as published, it ends "
            "at 4.653. The criterion is above 0 for a model that rather says no. Brackets hold 95% intervals: vectors "
            "and the contexts of unsteered inputs are resampled, each with all that was said about it, and those of "
            "rates are Wilson's for as many. An interval without width means that no resampling went otherwise; what "
            "that is worth is seen from the rates."
        ),
    ]


def _headline(entries: Mapping[str, Entry]) -> Table:
    columns = {
        "auroc": "AUROC",
        "d_prime_loglinear": "d'",
        "d_prime_clipped": "d', clipped",
        "criterion": "criterion",
        "tpr": "TPR",
        "fpr": "FPR",
        "balanced_accuracy": "balanced acc.",
        "accuracy": "acc.",
    }
    name = _main(entries)
    rows = [
        [label, *(estimate(entry["detection"][name][key], 2 if "prime" in key else 3) for key in columns)]
        for label, entry in entries.items()
    ]
    return Table(["model", *columns.values()], rows, f"Detection of {SETS[name]}, all ranges and magnitudes together")


def _forest(entries: Mapping[str, Entry]) -> list[Block]:
    rows = {
        label: {
            SETS[name]: ForestRow(found["auroc"]["value"], found["auroc"]["interval"])
            for name, found in entry["detection"].items()
        }
        for label, entry in entries.items()
    }
    return [
        Picture(
            forest_figure(rows, "AUROC"),
            "AUROC against unsteered inputs, by set of vectors. What holds for vectors of the training data only was "
            "learnt by heart.",
            f"AUROC with intervals of {', '.join(rows)}",
        )
    ]


def _to_base(entries: Mapping[str, Entry]) -> list[Block]:
    sets = _sets(entries)
    rows = []
    for label, entry in entries.items():
        if not entry["to_base"]:
            continue
        cells = []
        for name in sets:
            found = entry["to_base"].get(name)
            cells.append(estimate(found, sign=True))
            cells.append("-" if found is None else p_text(found["p_adjusted"]))
        rows.append([label, *cells])
    if not rows:
        return []
    headers = itertools.chain.from_iterable((SETS[name], "p") for name in sets)
    caption = (
        "AUROC less that of the base, asked the same of the same items [paired 95% interval]; p after Benjamini and "
        "Hochberg's correction over the table"
    )
    return [Table(["model", *headers], rows, caption)]


def _roc(entries: Mapping[str, Entry]) -> list[Block]:
    name = _main(entries)
    curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}  # by wording, by label
    for label, entry in entries.items():
        if (roc := entry["detection"][name]["roc"]) is not None:
            curves.setdefault(entry["wording"], {})[label] = (np.array(roc["fpr"]), np.array(roc["tpr"]))
    parts = [
        dict(list(own.items())[start : start + _MOST_LINES])
        for own in curves.values()
        for start in range(0, len(own), _MOST_LINES)
    ]
    return [
        Picture(
            curve_figure(part, "FPR", "TPR", (0, 1), "chance"),
            f"ROC for {SETS[name]}: every threshold on the answer, of which likelier-than-not is one.",
            f"ROC curves of {', '.join(part)}",
        )
        for part in parts
    ]


def _cells(entries: Mapping[str, Entry]) -> list[Block]:
    name = _main(entries)
    every = [cell for entry in entries.values() for cell in entry["detection"][name]["cells"]]
    thirds = list(dict.fromkeys(cell["third"] for cell in every))
    magnitudes = sorted({cell["magnitude"] for cell in every})
    columns = [f"{magnitude:g}" for magnitude in magnitudes]

    def grid(entry: Entry, key: str) -> list[list[Mapping[str, Any] | None]]:
        at = {(cell["third"], cell["magnitude"]): cell[key] for cell in entry["detection"][name]["cells"]}
        return [[at.get((third, magnitude)) for magnitude in magnitudes] for third in thirds]

    panels = [
        GridPanel(label, [[None if cell is None else cell["value"] for cell in row] for row in grid(entry, "auroc")])
        for label, entry in entries.items()
    ]
    blocks: list[Block] = [
        Picture(
            grid_figure(panels, thirds, columns, "magnitude"),
            f"AUROC for {SETS[name]} by the layers that are steered and the magnitude: blue above chance, red below.",
            f"AUROC by range and magnitude of {', '.join(entries)}",
        )
    ]
    for key, title in (("auroc", "AUROC"), ("tpr", "TPR")):
        rows = [
            [f"{label}: {third}", *map(estimate, row)]
            for label, entry in entries.items()
            for third, row in zip(thirds, grid(entry, key), strict=True)
        ]
        caption = f"{title} for {SETS[name]} by layers and magnitude, against the same unsteered inputs"
        blocks.append(Table(["model: layers", *columns], rows, caption))
    return blocks


def _negatives(entries: Mapping[str, Entry]) -> list[Block]:
    name = _main(entries)
    kinds = [kind for kind in NEGATIVES if any(kind in entry["sets"] for entry in entries.values())]
    rows = []
    for label, entry in entries.items():
        found = entry["detection"][name]
        aurocs = [estimate(found["auroc"] if kind == "unsteered" else found["against"].get(kind)) for kind in kinds]
        rows.append([label, *(estimate(entry["sets"][kind]["yes"]) for kind in kinds), *aurocs])
    headers = [*(f"yes: {NEGATIVES[kind]}" for kind in kinds), *(f"AUROC: {NEGATIVES[kind]}" for kind in kinds)]
    return [
        Paragraph(
            "What else sets it off? Noise adds a vector of the same norm at every position, each of them another: who "
            "says yes to it notices a disturbance, not a direction. Another system prompt is nothing but unusual."
        ),
        Table(["model", *headers], rows, f"False alarms by kind of negative, and AUROC of {SETS[name]} against each"),
    ]


def _mass(entries: Mapping[str, Entry], low: float) -> list[Block]:
    name = _main(entries)
    rows = []
    for label, entry in entries.items():
        steered, unsteered = entry["sets"][name], entry["sets"]["unsteered"]
        cells = [estimate(side[key]) for key in ("p_yes", "mass", "low_mass") for side in (steered, unsteered)]
        failed = sum(found["failed"] for found in entry["sets"].values())
        rows.append([label, *cells, str(failed)])
    titles = ("P(yes)", "mass", f"mass < {number(low, 1)}")
    headers = [f"{title}, {side}" for title in titles for side in ("steered", "unsteered")]
    return [
        Paragraph(
            "P(yes) is the share of yes in what the two answers hold of the vocabulary's probability, their mass. "
            "Where that is small the model would rather say something else, and P(yes) is a ratio of small numbers. "
            "Failed items have no finite probability; they are left out of everything."
        ),
        Table(["model", *headers, "failed"], rows, f"Probability of the answers, {SETS[name]} and unsteered inputs"),
    ]
