"""A battery of calibration measures as tables and figures."""

from __future__ import annotations

from collections.abc import Sequence

from nmjax.metrics.battery import TESTED, Battery
from nmjax.report.plots import MetricPanel, ReliabilityPanel, metrics_figure, reliability_figure
from nmjax.report.tables import Table, number, p_text, with_interval

NAMES = {
    "accuracy": "accuracy",
    "confidence": "confidence",
    "overconfidence": "conf. - acc.",
    "brier_score": "Brier (top)",
    "brier_multiclass": "Brier (all)",
    "nll": "NLL (nats)",
    "entropy": "entropy (nats)",
    "ece": "ECE",
    "mce": "MCE",
    "auroc": "AUROC",
    "auprc": "AUPRC",
}
"""How a metric's key is printed."""


INTERVAL_KEYS = tuple(key for key in NAMES if key not in ("ece", "mce"))


def means_table(battery: Battery, labels: Sequence[str], keys: Sequence[str] = INTERVAL_KEYS) -> Table:
    """The metrics whose bootstrap intervals cover, with them: means over questions, AUROC and AUPRC."""
    rows = [
        [label, *(with_interval(p[key], p["intervals"][key], sign=key == "overconfidence") for key in keys)]
        for label, p in zip(labels, battery.profiles, strict=True)
    ]
    caption = "Over questions [95% bootstrap interval]"
    if {"auroc", "auprc"} & set(keys):
        caption += "; AUROC and AUPRC: of confidence, for right against wrong answers"
    return Table(["arm", *(NAMES[key] for key in keys)], rows, caption)


def more_errors_table(battery: Battery, labels: Sequence[str]) -> Table:
    """Calibration error by other definitions; plug-in values, all above 0 for a calibrated model."""
    columns = {
        "ece_15": "15 bins",
        "ece_equal_mass": "equal mass",
        "classwise_ece": "by letter",
        "smooth_ece": "smooth",
        "overconfident_part": "overconfident part",
        "underconfident_part": "underconfident part",
        "debiased_l2_squared": "L2 squared, debiased",
    }
    rows = [
        [label, *(number(p[key], 4 if key == "debiased_l2_squared" else 3) for key in columns)]
        for label, p in zip(labels, battery.profiles, strict=True)
    ]
    caption = "Calibration error by other definitions; the two parts add up to the ECE of ten bins"
    return Table(["arm", *columns.values()], rows, caption)


def held_table(battery: Battery, labels: Sequence[str]) -> Table:
    """Of the answers held at a high confidence, the share that is right, with Wilson's interval."""
    thresholds = [entry["threshold"] for entry in battery.profiles[0]["answers_held_at"]]
    rows = []
    for label, p in zip(labels, battery.profiles, strict=True):
        cells = []
        for entry in p["answers_held_at"]:
            cells += [str(entry["count"]), with_interval(entry["right"], entry["interval"])]
        rows.append([label, *cells])
    headers = [text for t in thresholds for text in (f"held at >= {t:g}", "right")]
    caption = "Answers held at a confidence, and the share of them that is right [95% interval]"
    return Table(["arm", *headers], rows, caption)


def tests_table(battery: Battery, labels: Sequence[str], baseline: str) -> Table:
    """The declared family of paired tests against the baseline: p, adjusted p and the effect's size."""
    rows = []
    for label, difference in zip(labels, battery.differences, strict=True):
        if difference is not None:
            cells = []
            for key in TESTED:
                test = difference["tests"][key]
                cells += [p_text(test["p_value"]), p_text(test["p_adjusted"])]
                if "d_z" in test:
                    cells.append(number(test["d_z"], 2, sign=True))
            rows.append([label, *cells])
    headers = []
    for key in TESTED:
        headers += [f"{NAMES[key]}: p", "adjusted"] + (["d_z"] if key != "accuracy" else [])
    family = next(d for d in battery.differences if d is not None)["family_size"]
    caption = (
        f"Paired tests against {baseline}: McNemar's for accuracy, sign flips for the others with Cohen's d_z; "
        f"'adjusted' by Benjamini and Hochberg over the {family} tests"
    )
    return Table(["arm", *headers], rows, caption)


def binned_table(battery: Battery, labels: Sequence[str]) -> Table:
    """ECE and MCE, each with its band under perfect calibration, p-value and debiased value; debiased L2."""
    rows = []
    for label, p in zip(labels, battery.profiles, strict=True):
        cells = [label]
        for key in ("ece", "mce"):
            null = p["under_perfect_calibration"][key]
            band = f"{number(null['band'][0])} to {number(null['band'][1])}"
            cells += [number(p[key]), band, p_text(null["p_value"]), number(p[f"debiased_{key}"])]
        rows.append([*cells, number(p["debiased_l2"])])
    headers = ["arm", "ECE", "if calibrated", "p", "debiased", "MCE", "if calibrated", "p", "debiased", "L2, debiased"]
    caption = "Calibration error; 'if calibrated' is where 95% of the values of a perfectly calibrated model would lie"
    return Table(headers, rows, caption)


def differences_table(
    battery: Battery, labels: Sequence[str], baseline: str, keys: Sequence[str] = tuple(NAMES)
) -> Table:
    """Every condition less the baseline, with paired intervals; a star marks those that leave out 0."""
    rows = []
    for label, difference in zip(labels, battery.differences, strict=True):
        if difference is not None:
            cells = []
            for key in keys:
                if difference[key]["interval"] is None:
                    cells.append("-")
                    continue
                low, high = difference[key]["interval"]
                star = "*" if round(low, 3) > 0 or round(high, 3) < 0 else " "  # as printed
                cells.append(with_interval(difference[key]["difference"], (low, high), sign=True) + star)
            rows.append([label, *cells])
    caption = f"Difference from {baseline} on the same questions [paired 95% interval; * leaves out 0]"
    return Table(["arm", *(NAMES[key] for key in keys)], rows, caption)


def reliability_png(battery: Battery, labels: Sequence[str]) -> bytes:
    """Reliability diagrams, one a condition."""
    panels = [
        ReliabilityPanel(
            title=label,
            bins=battery.bins[k],
            band=battery.bands[k],
            notes=[(name, number(battery.profiles[k][key])) for name, key in
                   (("acc", "accuracy"), ("conf", "confidence"), ("ECE", "ece"))],
        )
        for k, label in enumerate(labels)
    ]  # fmt: skip
    return reliability_figure(panels)


def metrics_png(battery: Battery, labels: Sequence[str]) -> bytes:
    """Every metric by condition, with intervals, or with the band under perfect calibration for ECE and MCE."""
    panels = []
    for key, name in NAMES.items():
        values = [p[key] for p in battery.profiles]
        if key in ("ece", "mce"):
            bands = [p["under_perfect_calibration"][key]["band"] for p in battery.profiles]
            panels.append(MetricPanel(name, values, None, None, [b[0] for b in bands], [b[1] for b in bands]))
        else:
            intervals = [p["intervals"][key] or (None, None) for p in battery.profiles]
            panels.append(MetricPanel(name, values, [i[0] for i in intervals], [i[1] for i in intervals]))
    return metrics_figure(panels, labels, battery.differences.index(None))
