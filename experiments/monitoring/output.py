"""The files of a calibration and of a validation: JSON under the published keys, page, figures, samples."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from experiments.monitoring.analysis import Findings, Values
from experiments.monitoring.report import Report
from experiments.monitoring.study import CALIBRATE, Study, ValidationSettings
from experiments.monitoring.watching import Scored
from nmjax.report import results


def write_calibration(
    study: Study, samples: Scored, findings: Findings, values: Values, log: results.JsonlLog
) -> list[pathlib.Path]:
    """Write everything and finish the log; returns the paths. The JSON comes last: it stands for a whole set."""
    found = {**published_calibration(findings), **_common(study, samples, findings, log, study.settings)}
    stem = f"{study.model}_{results.timestamp()}_n{study.settings.n_samples}"
    return _write(Report(study, samples, findings, values), log, found, stem)


def write_validation(
    study: Study,
    samples: Scored,
    findings: Findings,
    values: Values,
    log: results.JsonlLog,
    settings: ValidationSettings,
) -> list[pathlib.Path]:
    """Write everything and finish the log; returns the paths."""
    found = {
        "model_path": study.settings.model,
        "test_data_path": study.data["dataset"],
        "calibrated_params_path": settings.calibrated_params,
        **published_validation(study, samples, findings),
        **_common(study, samples, findings, log, settings),
    }
    stem = f"{study.model}_{results.timestamp()}_validation_n{len(samples.judgements)}"
    return _write(Report(study, samples, findings, values), log, found, stem)


def load_calibration(path: str | None) -> dict[str, Any]:
    """A file that `write_calibration` wrote. Raises ValueError for another, OSError for one that cannot be read."""
    if path is None:
        raise ValueError("--calibrated_params is missing; wanted a file that calibrate_thresholds wrote")
    found = results.load_json(path)
    wanted = {"identity", "data", "statistics", "monitor", "labels_by_score", "plan"}
    if not isinstance(found, dict) or not wanted <= found.keys() or found["identity"]["experiment"] != CALIBRATE:
        raise ValueError(f"--calibrated_params={path} was not written by {CALIBRATE}; wanted the keys {sorted(wanted)}")
    return found


def published_calibration(findings: Findings) -> dict[str, Any]:
    """The keys of the published study: those of its first mode are of hbar_s, `auroc` and `pr_auc` of it as it is."""
    statistics = findings["statistics"]
    hbar, pri, joint = (statistics[name] for name in ("hbar_s", "pri", "joint"))
    return {
        "best_tau": hbar["best"]["tau"],
        "best_precision": hbar["best"]["precision"],
        "min_recall_target": hbar["best"]["min_recall"],
        "auroc": hbar["at_best"]["auroc_raw"]["value"],
        "pr_auc": hbar["average_precision_raw"],
        "all_results": [
            {key: row[key] for key in ("tau", "precision", "recall", "f1")} for row in findings["best_results"]
        ],
        "mode": hbar["best"]["mode"],
        "auroc_hbar": hbar["at_best"]["auroc"]["value"],
        "auroc_pri": pri["at_best"]["auroc"]["value"],
        "auroc_joint": joint["auroc"]["value"],
        "tau_hbar": hbar["best"]["tau"],
        "tau_pri": pri["best"]["tau"],
        "joint_model_weights": {
            "w_hbar": joint["weights"]["hbar_s"],
            "w_pri": joint["weights"]["pri"],
            "intercept": joint["intercept"],
        },
        "best_precision_hbar": hbar["best"]["precision"],
        "best_precision_pri": pri["best"]["precision"],
        "best_precision_joint": joint["best"]["precision"],
    }


def published_validation(study: Study, samples: Scored, findings: Findings) -> dict[str, Any]:
    """The keys of the published study, without its sweep for the best threshold on the test samples."""
    statistics = {f"{name}_alone": findings["statistics"][key] for name, key in (("hbar", "hbar_s"), ("pri", "pri"))}
    return {
        "n_test_samples": len(samples.judgements),
        "max_tokens": study.settings.max_tokens,
        "calibrated_thresholds": {
            "tau_hbar": statistics["hbar_alone"]["best"]["tau"],
            "tau_pri": statistics["pri_alone"]["best"]["tau"],
        },
        "auroc_and_prauc": {
            name: {"auroc": e["at_best"]["auroc"]["value"], "pr_auc": e["at_best"]["average_precision"]["value"]}
            for name, e in statistics.items()
        },
        "performance_at_calibrated_thresholds": {
            name: {key: e["at_best"][key]["value"] for key in ("precision", "recall", "f1", "flag_rate")}
            for name, e in statistics.items()
        },
        "quadrant_analysis": findings["flags_side_by_side"],
        "scores_by_sample": [
            {
                "sample_id": j.id,
                "label": j.label,
                "hbar_s": samples.scores["hbar_s"][i],
                "pri": samples.scores["pri"][i],
            }
            for i, j in enumerate(samples.judgements)
        ]
        + [{"sample_id": id, "error": reason} for id, reason in samples.failed.items()],
    }


def _common(study: Study, samples: Scored, findings: Findings, log: results.JsonlLog, settings: Any) -> dict:
    """What both files hold, and the identity of the run."""
    seeds = {"split": study.data["split_seed"], "sample": study.data["sample_seed"], "bootstrap": study.settings.seed}
    hashes = {"model": study.model_hash, "pack": study.watcher.pack.content_hash()}
    seconds = [log.done[k]["seconds"] for k in sorted(log.done)]
    return {
        "num_samples": len(samples.judgements),
        "failed": samples.failed,
        **{key: value for key, value in findings.items() if key != "best_results"},
        "data": study.data,
        "identity": results.run_identity(study.name, dataclasses.asdict(settings), seeds, hashes),
        "plan": study.description,
        "timing": {"seconds": sum(seconds), "median_batch": float(np.median(seconds)), "batches": len(seconds)},
    }


def _write(report: Report, log: results.JsonlLog, found: dict, stem: str) -> list[pathlib.Path]:
    folder = pathlib.Path(report.study.settings.output_dir)
    found["verdicts"] = [dataclasses.asdict(verdict) for verdict in report.verdicts.items]
    figures = report.figures()
    written = [results.write_atomic(folder / f"{stem}_{name}.png", png) for name, (_, png, _) in figures.items()]
    written.append(results.write_atomic(folder / f"{stem}.html", report.html(found["identity"], figures)))
    written.append(results.write_json(folder / f"{stem}.json", found))
    written.append(log.finish(folder / f"{stem}.jsonl"))
    print("\n" + report.headline())
    print("Written:\n" + "\n".join(f"  {path}" for path in written))
    return written
