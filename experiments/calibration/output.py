"""The files of a run: JSON, summary, figures and page."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.calibration.analysis import Findings
from experiments.calibration.report import Report
from experiments.calibration.study import NAME, Study
from nmjax.metrics import calibration
from nmjax.report import results

TEXT_KEYS = ("unique_ngrams", "total_ngrams", "diversity_ratio", "repetition_rate", "avg_response_length")


def write(study: Study, findings: Findings, timing: Mapping[str, Sequence[float]], stamp: str) -> list[pathlib.Path]:
    """Write summary, figures, page and JSON; returns their paths. The JSON comes last: it stands for a whole set.

    `timing`: seconds of each batch, by what was done.
    """
    folder = pathlib.Path(study.settings.output_dir)
    seed = study.settings.seed
    identity = results.run_identity(
        NAME,
        dataclasses.asdict(study.settings),
        {"questions": seed, "bootstrap": seed, "noise": seed, "writing": seed},
        {
            **{f"model {name}": digest for name, digest in zip(study.names, study.hashes, strict=True)},
            **{
                f"{study.names[m]}, {arm.label}": arm.pack.content_hash()
                for m, examinee in enumerate(study.examinees)
                for arm in examinee.arms
            },
        },
    )
    report = Report(study, findings)
    figures = report.figures()
    written = [results.write_atomic(folder / f"calibration_summary_{stamp}.txt", report.text())]
    written += [results.write_atomic(folder / f"{name}_{stamp}.png", png) for name, (_, png, _) in figures.items()]
    written.append(
        results.write_atomic(folder / f"calibration_experiment_{stamp}.html", report.html(identity, figures))
    )
    found = result_json(study, findings, report, identity, timing)
    return [*written, results.write_json(folder / f"calibration_experiment_{stamp}.json", found)]


def result_json(
    study: Study, findings: Findings, report: Report, identity: dict, timing: Mapping[str, Sequence[float]]
) -> dict:
    """The full result; keys that the reference study has, too, carry its names."""
    written = {(entry["model"], entry["arm"]): entry for entry in findings.writing}
    return {
        "identity": identity,
        "plan": study.description,
        "num_questions": len(study.questions),
        "questions_by_subject": dict(sorted(Counter(q.subject for q in study.questions).items())),
        "left_out_as_too_long": {"questions_by_subject": study.left_out, "ood_prompts": study.ood_left_out},
        "nll_floor": calibration.NLL_FLOOR,
        "baseline": findings.baseline_label,
        "verdicts": [dataclasses.asdict(verdict) for verdict in report.verdicts.items],
        "results": [
            {
                "model_name": study.names[c.model],
                "pack_name": c.arm.label,
                "intensity": c.arm.intensity,
                "series": c.arm.series,
                "dose": c.arm.dose,
                "notes": c.arm.pack.notes(),
                "calibration": findings.after.profiles[k],
                "calibration_before_sampler": findings.before.profiles[k],
                "difference_from_baseline": findings.after.differences[k],
                "difference_from_baseline_before_sampler": findings.before.differences[k],
                "letter_mass": findings.mass[k],
                "ood_metrics": _text_metrics(written.get((study.names[c.model], c.arm.label))),
            }
            for k, c in enumerate(findings.conditions)
        ],
        "dose_response": findings.trends,
        "derivatives": findings.derivatives,
        "writing": findings.writing,
        "base_against_instruct": findings.comparison,
        "generation_time": {name: sum(seconds) for name, seconds in timing.items() if name.endswith("responses")},
        "timing": {
            name: {"seconds": sum(seconds), "first_batch": seconds[0], "median_batch": float(np.median(seconds)),
                   "batches": len(seconds)}
            for name, seconds in timing.items()
        },
    }  # fmt: skip


def _text_metrics(entry: dict | None) -> dict | None:
    """The reference study's numbers; all others stand under "writing"."""
    if entry is None:
        return None
    measures = entry["measures"]
    return {"perplexity": measures["perplexity"], **{key: measures[key] for key in TEXT_KEYS}}
