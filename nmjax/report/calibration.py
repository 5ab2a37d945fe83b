"""The calibration battery as tables, figures and page sections."""

from __future__ import annotations

from collections.abc import Sequence

from nmjax.metrics.battery import Battery
from nmjax.report.plots import MetricPanel, ReliabilityPanel, metrics_figure, reliability_figure
from nmjax.report.tables import Table, number, with_interval

NAMES = {
    "accuracy": "accuracy",
    "confidence": "confidence",
    "overconfidence": "conf. - acc.",
    "brier_score": "Brier (top)",
    "brier_multiclass": "Brier (all)",
    "nll": "NLL (nats)",
    "ece": "ECE",
    "mce": "MCE",
}
"""How a metric's key is printed."""


MEAN_KEYS = ("accuracy", "confidence", "overconfidence", "brier_score", "brier_multiclass", "nll")


def means_table(battery: Battery, labels: Sequence[str], keys: Sequence[str] = MEAN_KEYS) -> Table:
    """The metrics that are means over questions, with their bootstrap intervals."""
    rows = [
        [label, *(with_interval(p[key], p["intervals"][key], sign=key == "overconfidence") for key in keys)]
        for label, p in zip(labels, battery.profiles, strict=True)
    ]
    return Table(["pack", *(NAMES[key] for key in keys)], rows, "Means over questions [95% bootstrap interval]")


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
    headers = ["pack", "ECE", "if calibrated", "p", "debiased", "MCE", "if calibrated", "p", "debiased", "L2, debiased"]
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
                low, high = difference[key]["interval"]
                star = "*" if low > 0 or high < 0 else " "
                cells.append(with_interval(difference[key]["difference"], (low, high), sign=True) + star)
            rows.append([label, *cells])
    caption = f"Difference from {baseline} on the same questions [paired 95% interval; * leaves out 0]"
    return Table(["pack", *(NAMES[key] for key in keys)], rows, caption)


def p_text(p_value: float) -> str:
    """`0.034`, or `<0.001` where more decimals would say nothing."""
    return "<0.001" if p_value < 0.001 else number(p_value)


def reliability_png(battery: Battery, labels: Sequence[str]) -> bytes:
    """Reliability diagrams, one a condition."""
    panels = [
        ReliabilityPanel(
            title=label,
            bins=battery.bins[k],
            band=battery.bands[k],
            notes=[(name, number(battery.profiles[k][key])) for name, key in
                   (("accuracy", "accuracy"), ("confidence", "confidence"), ("ECE", "ece"))],
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
            intervals = [p["intervals"][key] for p in battery.profiles]
            panels.append(MetricPanel(name, values, [i[0] for i in intervals], [i[1] for i in intervals]))
    return metrics_figure(panels, labels)
