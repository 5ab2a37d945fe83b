"""What was claimed before the run, and what the held-out tokens say about it. Every rule is stated in `RULES`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.lookahead.analysis import OWN
from experiments.lookahead.arms import EQUAL_FLOPS, STANDARD, UNTOLD
from experiments.lookahead.evaluation import TOLD
from nmjax.report.tables import number, with_interval
from nmjax.report.verdicts import Verdict

NAMES = {
    OWN: "its own predictions",
    "zeros": "zeros",
    "shuffled": "another text's predictions",
    "constant": "a constant",
    UNTOLD: "the same model, trained without the signal",
    STANDARD: "MiniGPT, equal steps",
    EQUAL_FLOPS: "MiniGPT, equal FLOPs",
    "entropy": "its entropy",
    "max_prob": "its largest probability",
}
"""How what is compared is printed."""
SLOPES = (0.9, 1.1)
"""Calibration slopes that count as 1."""
RULES = (
    "The claims and their rules were fixed before the run. A difference in loss is ConfidenceAwareGPT, told its own "
    "predictions, less what it is compared with, seed by seed; so below 0 speaks for the signal. A claim that it is "
    "lower is supported where the whole 95% interval over seeds (Student's t) lies below 0, contradicted where the "
    "whole interval lies at 0 or above, else undecided. A claim of several parts is supported where all of them are "
    "and contradicted where one is. For R squared, higher is better and the signs turn.",
    "The calibration slope counts as 1 where its whole interval lies within 0.9 to 1.1, and the claim is contradicted "
    "where the whole interval lies outside. That the interval contains 1 is not enough: a wide one always does.",
    "The signal helps where the model that is told its own predictions beats both itself, told anything else, and the "
    "same model, trained alike on both losses without the signal. If it loses one of these, the answer is no. Whether "
    "the whole training pays, the second loss included, is asked against MiniGPT and answered beside it. A single seed "
    "has no interval, so nothing is decided by it.",
)
"""Paragraphs."""


def verdicts(findings: Mapping[str, Any]) -> list[Verdict]:
    """The six claims. `findings`: of `analysis.analyse`."""
    told = _together([_lower(findings["differences"][name]) for name in TOLD])
    ahead = findings["advantage"]
    known = _together([_higher(ahead[rival]["r2"]["over_seeds"]) for rival in ahead])
    return [
        Verdict(
            "Told its own predictions, ConfidenceAwareGPT predicts the next token better than told zeros, another "
            "text's predictions or a constant",
            told,
            _because(findings, TOLD),
        ),
        Verdict(
            "ConfidenceAwareGPT predicts the next token better than the same model, trained alike without the signal",
            _lower(findings["differences"].get(UNTOLD)),
            _because(findings, [UNTOLD]),
        ),
        Verdict(
            "ConfidenceAwareGPT predicts the next token better than MiniGPT at equal steps",
            _lower(findings["differences"][STANDARD]),
            _because(findings, [STANDARD]),
        ),
        Verdict(
            "ConfidenceAwareGPT predicts the next token better than MiniGPT at equal FLOPs",
            _lower(findings["differences"].get(EQUAL_FLOPS)),
            _because(findings, [EQUAL_FLOPS]),
        ),
        Verdict(
            "The confidence head knows the coming loss better than the model's entropy, its largest probability or a "
            "constant",
            known,
            _known_because(findings),
        ),
        Verdict(
            "The confidence head is calibrated: where it predicts a nat more, a nat more comes",
            _slope(findings["quality"]["head"]["over_seeds"]["calibration_slope"]),
            _slope_because(findings["quality"]["head"]["over_seeds"]),
        ),
    ]


def answer(found: Sequence[Verdict]) -> str:
    """Whether the signal helps, "Yes", "No" or "Undecided", and what MiniGPT says to the whole, from the verdicts."""
    uses, untold, equal_steps, equal_flops = (verdict.verdict for verdict in found[:4])
    helps = {"supported": "Yes", "contradicted": "No", "undecided": "Undecided"}[_together([uses, untold])]
    pays = {
        "supported": "and the whole beats MiniGPT at equal FLOPs",
        "contradicted": "and MiniGPT is as good or better at equal FLOPs",
        "undecided": "and whether the whole beats MiniGPT at equal FLOPs is undecided",
    }[equal_flops]
    if equal_steps == "contradicted":
        pays = "and MiniGPT is as good or better at equal steps"
    return f"{helps}, {pays}"


def reason(found: Sequence[Verdict]) -> str:
    """Why `answer` says what it says, in three sentences."""
    uses, untold, equal_steps = (verdict.verdict for verdict in found[:3])
    itself = {
        "supported": "The trained model uses the signal: told its own predictions it predicts better than told "
        "anything else.",
        "contradicted": "The trained model gains nothing from the signal: told something else it is as good or better.",
        "undecided": "Whether the trained model gains by being told its own predictions, and not something else, is "
        "undecided.",
    }
    without = {
        "supported": "It also beats the same model, trained alike without the signal.",
        "contradicted": "The same model, trained alike without the signal, is as good or better.",
        "undecided": "Whether it beats the same model, trained alike without the signal, is undecided.",
    }
    baseline = {
        "supported": "It is better than MiniGPT, which learns nothing but the next token, after as many steps.",
        "contradicted": "MiniGPT, which learns nothing but the next token, is as good or better after as many steps.",
        "undecided": "Whether it is better than MiniGPT, which learns nothing but the next token, after as many steps "
        "is undecided.",
    }
    return f"{itself[uses]} {without[untold]} {baseline[equal_steps]}"


# --- Rules ------------------------------------------------------------------------------------------------------------


def _lower(found: Mapping[str, Any] | None) -> str:
    """Whether a difference over seeds is below 0."""
    if found is None or found["interval"] is None:
        return "undecided"
    low, high = found["interval"]
    return "supported" if high < 0 else "contradicted" if low >= 0 else "undecided"


def _higher(found: Mapping[str, Any]) -> str:
    if found["interval"] is None:
        return "undecided"
    low, high = found["interval"]
    return _lower({"interval": (-high, -low)})


def _slope(found: Mapping[str, Any]) -> str:
    if found["interval"] is None:
        return "undecided"
    low, high = found["interval"]
    if SLOPES[0] <= low and high <= SLOPES[1]:
        return "supported"
    return "contradicted" if high < SLOPES[0] or low > SLOPES[1] else "undecided"


def _together(parts: Sequence[str]) -> str:
    if all(part == "supported" for part in parts):
        return "supported"
    return "contradicted" if "contradicted" in parts else "undecided"


# --- Numbers ----------------------------------------------------------------------------------------------------------


def difference(found: Mapping[str, Any], digits: int = 4) -> str:
    return with_interval(found["mean"], found["interval"], digits, sign=True)


def _because(findings: Mapping[str, Any], names: Sequence[str]) -> str:
    """The losses of both sides, their difference, and why there is no verdict where there is none."""
    losses, differences = findings["losses"], findings["differences"]
    if missing := [name for name in names if name not in losses]:
        return f"Not trained in this run: {', '.join(NAMES[name] for name in missing)}."
    against = "; ".join(
        f"{NAMES[name]} {number(losses[name]['mean'], 4)}, difference {difference(differences[name])}" for name in names
    )
    own = number(losses[OWN]["mean"], 4)
    return f"Held-out loss, in nats: {own} against {against}.{_no_interval([differences[name] for name in names])}"


def _known_because(findings: Mapping[str, Any]) -> str:
    ahead, quality = findings["advantage"], findings["quality"]

    def r2(name: str) -> str:
        return number(quality[name]["over_seeds"]["r2"]["mean"])

    found = {rival: measures["r2"]["over_seeds"] for rival, measures in ahead.items()}
    against = "; ".join(f"{NAMES[rival]} {r2(rival)}, difference {difference(d, 3)}" for rival, d in found.items())
    return f"R squared of the coming loss: {r2('head')} against {against}.{_no_interval(list(found.values()))}"


def _slope_because(head: Mapping[str, Any]) -> str:
    slope, intercept, error = (
        head[name] for name in ("calibration_slope", "calibration_intercept", "reliability_error")
    )
    contains = ""
    if slope["interval"] is not None:
        low, high = slope["interval"]
        contains = f" The interval {'contains' if low <= 1 <= high else 'leaves out'} 1."
    return (
        f"Slope {with_interval(slope['mean'], slope['interval'])}, wanted within {SLOPES[0]} to {SLOPES[1]}; intercept "
        f"{with_interval(intercept['mean'], intercept['interval'], sign=True)}; predicted and actual loss of a bin are "
        f"{number(error['mean'])} nats apart on average.{contains}{_no_interval([slope])}"
    )


def _no_interval(found: Sequence[Mapping[str, Any]]) -> str:
    if any(one["n"] == 1 for one in found):
        return " One seed has no interval: train several to decide."
    if any(one["interval"] is None for one in found):
        return " Undefined in at least one seed, so undecided."
    return ""
