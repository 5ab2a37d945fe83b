"""Redraws figures, summary and page of a comparison of MiniGPT and ConfidenceAwareGPT from its stored results.

    python -m experiments.plot_confidence_results results/confidence_experiments/<time>_results.json
    python -m experiments.plot_confidence_results intermediate_results.json --prefix=so_far --results_dir=figures

An intermediate file, of a run that is not finished, gives the curves so far.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from experiments.lookahead.output import draw
from experiments.lookahead.report import Report
from experiments.lookahead.results import load_results
from nmjax import flags as nm_flags

NAME = "plot_confidence_results"


def define_flags() -> None:
    flags.DEFINE_string("results_file", None, "The results; may also be given as a word of its own.", required=True)
    flags.DEFINE_string("results_dir", None, "Folder of what is drawn; default: that of the results.")
    flags.DEFINE_string("prefix", None, "How the files' names begin; default: as the name of the results.")


def redraw(file: str, folder: str | None = None, prefix: str | None = None) -> list[pathlib.Path]:
    """Returns the paths written. Raises OSError or ValueError for a file that holds no results."""
    path = pathlib.Path(file)
    found = load_results(path)
    written = draw(found, folder or path.parent, prefix or path.stem.removesuffix("_results"))
    print(Report(found).headline())
    print("Written:\n" + "\n".join(f"  {path}" for path in written))
    return written


def main(_: Sequence[str]) -> None:
    values = flags.FLAGS
    try:
        redraw(values.results_file, values.results_dir, values.prefix)
    except (ValueError, OSError) as error:
        sys.exit(f"{NAME}: {error}")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main, positional=("results_file",))
