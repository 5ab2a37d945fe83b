"""The files of a comparison: results, summary, figures and page."""

from __future__ import annotations

import pathlib

from experiments.lookahead.report import Report
from experiments.lookahead.results import ConfidenceExperimentResults, save_results
from nmjax.report import results


def write(found: ConfidenceExperimentResults, folder: str | pathlib.Path, stamp: str) -> list[pathlib.Path]:
    """Writes everything and returns the paths. The results come last: they stand for a whole set."""
    return [*draw(found, folder, stamp), save_results(found, pathlib.Path(folder) / f"{stamp}_results.json")]


def draw(found: ConfidenceExperimentResults, folder: str | pathlib.Path, prefix: str) -> list[pathlib.Path]:
    """Writes what is made from the results alone: `{prefix}_summary.txt`, `_<figure>.png` and `_report.html`."""
    folder, report = pathlib.Path(folder), Report(found)
    figures = report.figures()
    written = [results.write_atomic(folder / f"{prefix}_summary.txt", report.text())]
    written += [results.write_atomic(folder / f"{prefix}_{name}.png", png) for name, (_, png, _) in figures.items()]
    return [*written, results.write_atomic(folder / f"{prefix}_report.html", report.html(figures))]
