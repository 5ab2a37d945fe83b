"""The predictions that were made before anything was measured, and what the findings say of each.

A prediction is *supported* or *contradicted* only by intervals (95%) that leave out the other; else it is *undecided*,
which is what small samples deserve. The doses meant are those of the main series (`study.main_series`), the model the
first one.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.calibration.analysis import Findings
from experiments.calibration.arms import NONE
from experiments.calibration.study import PSYCHEDELIC, Study, main_series
from nmjax.report.calibration import NAMES, p_text
from nmjax.report.tables import number, with_interval
from nmjax.report.verdicts import Verdict

RISE, FALL = 1, -1


def verdicts(study: Study, findings: Findings) -> list[Verdict]:
    """One verdict a prediction, in their order."""
    return [
        entropy_falls(study, findings),
        confidence_and_ece_rise(study, findings),
        accuracy_stays(study, findings),
        texts_get_worse(study, findings),
        stimulant_loses_most(study, findings),
        base_becomes_instruct(study, findings),
        there_is_a_ceiling(study, findings),
    ]


def direction(interval: Sequence[float] | None) -> int:
    """+1 for an interval above 0, -1 for one below, 0 for one that holds it or is missing."""
    if interval is None:
        return 0
    return RISE if interval[0] > 0 else FALL if interval[1] < 0 else 0


def decide(seen: Sequence[int], wanted: Sequence[int]) -> str:
    """Supported if every direction is as wanted, contradicted if one is the opposite, else undecided."""
    if all(a == b for a, b in zip(seen, wanted, strict=True)):
        return "supported"
    return "contradicted" if any(a == -b for a, b in zip(seen, wanted, strict=True)) else "undecided"


def _trend(study: Study, findings: Findings) -> dict | None:
    series = main_series(study.examinees[0].arms)
    found = (t for t in findings.trends if (t["model"], t["series"]) == (study.names[0], series))
    return next(found, None)


_NO_DOSES = "Not measured: fewer than two doses of one pack, none included."


def entropy_falls(study: Study, findings: Findings) -> Verdict:
    claim = "Entropy falls with the dose."
    trend = _trend(study, findings)
    if trend is None:
        return Verdict(claim, "undecided", _NO_DOSES)
    entropy = trend["metrics"]["entropy"]
    means = ", ".join(number(findings.profile(label)["entropy"]) for label in trend["conditions"])
    return Verdict(
        claim,
        decide([direction(entropy["interval"])], [FALL]),
        f"Slope {with_interval(entropy['slope'], entropy['interval'], sign=True)} nats per unit of dose "
        f"(p {p_text(entropy['p_value'])}); {means} nats at doses {_doses(trend)}.",
    )


def confidence_and_ece_rise(study: Study, findings: Findings) -> Verdict:
    trend = _trend(study, findings)
    claim = "Confidence and calibration error rise with every step of the dose."
    if trend is None:
        return Verdict(claim, "undecided", _NO_DOSES)
    seen, said = [], []
    for name in ("confidence", "ece"):
        found = trend["metrics"][name]
        values = [findings.profile(label)[name] for label in trend["conditions"]]
        rising = all(a < b for a, b in zip(values, values[1:], strict=False))
        # A slope above 0 with a step down in it is no support for "every step".
        seen.append(direction(found["interval"]) if rising or direction(found["interval"]) == FALL else 0)
        slope = with_interval(found["slope"], found["interval"], sign=True)
        said.append(f"{NAMES[name]} {', '.join(map(number, values))}, slope {slope}")
    return Verdict(claim, decide(seen, [RISE, RISE]), f"At doses {_doses(trend)}: {'; '.join(said)}.")


def accuracy_stays(study: Study, findings: Findings) -> Verdict:
    margin = study.settings.margin
    claim = f"Accuracy stays the same (within {margin:g}, fixed beforehand)."
    trend = _trend(study, findings)
    if trend is None:
        return Verdict(claim, "undecided", _NO_DOSES)
    tests = {label: findings.equality("accuracy", label, margin) for label in trend["conditions"] if label != NONE}
    found = [test["verdict"] for test in tests.values()]
    verdict = "undecided"
    if all(v == "equivalent" for v in found):
        verdict = "supported"
    elif "different" in found:
        verdict = "contradicted"
    said = "; ".join(
        f"{label} {with_interval(test['difference'], test['interval_90'], sign=True)}" for label, test in tests.items()
    )
    top = trend["conditions"][-1]
    held = "; ".join(
        f"{label}: " + ", ".join(_held(entry) for entry in findings.profile(label)["answers_held_at"])
        for label in dict.fromkeys([trend["conditions"][0], top])
    )
    return Verdict(
        claim, verdict, f"Difference from {findings.baseline_label} [90% interval]: {said}. Of the answers held at a "
        f"confidence, right: {held}.",
    )  # fmt: skip


def _held(entry: dict) -> str:
    if entry["right"] is None:
        return f"at {entry['threshold']:g} none"
    share = with_interval(entry["right"], entry["interval"])
    return f"at {entry['threshold']:g} {share} of {entry['count']}"


TEXT_CLAIMS = (
    ("distinct_3", "diversity at equal length", FALL),
    ("repetition_rate", "repetition", RISE),
    ("stock_phrase_rate", "stock phrases", RISE),
    ("refusal_rate", "refusals", RISE),
)


def texts_get_worse(study: Study, findings: Findings) -> Verdict:
    claim = "Off the training distribution diversity falls; repetition, stock phrases and refusals rise."
    entry = _top_writer(study, findings)
    if entry is None or "against_sober" not in entry:
        return Verdict(claim, "undecided", "Not measured: nothing was written under a dose.")
    seen, said = [], []
    for name, what, _ in TEXT_CLAIMS:
        against = entry["against_sober"]
        difference = (against["length_matched"] if name == "distinct_3" else against)[name]
        seen.append(direction(difference["interval"]))
        said.append(f"{what} {_change(difference)}")
    verdict = decide(seen, [wanted for *_, wanted in TEXT_CLAIMS])
    return Verdict(claim, verdict, f"{entry['arm']} less {NONE}: {', '.join(said)}.")


def stimulant_loses_most(study: Study, findings: Findings) -> Verdict:
    claim = f"The sober model and the psychedelic ({PSYCHEDELIC}) lose less diversity than the stimulant."
    entry = _top_writer(study, findings)
    if entry is None or not {"against_sober", "against_psychedelic"} <= entry.keys():
        return Verdict(claim, "undecided", "Not measured: nothing was written under the stimulant or the psychedelic.")
    found = [entry[key]["length_matched"]["distinct_3"] for key in ("against_sober", "against_psychedelic")]
    said = ", ".join(f"less {name} {_change(d)}" for name, d in zip((NONE, PSYCHEDELIC), found, strict=True))
    seen = [direction(d["interval"]) for d in found]
    return Verdict(
        claim, decide(seen, [FALL, FALL]), f"Distinct trigrams at equal length, {entry['arm']} {said}.",
    )  # fmt: skip


def _top_writer(study: Study, findings: Findings) -> dict | None:
    """What the first model wrote at the largest dose of the main series."""
    series = main_series(study.examinees[0].arms)
    mine = [w for w in findings.writing if (w["model"], w["series"]) == (study.names[0], series)]
    return max(mine, key=lambda entry: entry["dose"], default=None)


def _change(difference: dict) -> str:
    if difference["difference"] is None:
        return "undefined"
    return with_interval(difference["difference"], difference["interval"], sign=True)


def base_becomes_instruct(study: Study, findings: Findings) -> Verdict:
    claim = "The base model under the stimulant equals the instruction-tuned model without."
    if not findings.comparison:
        return Verdict(claim, "undecided", "Not measured: no second model (--compare_model).")
    entry = max(findings.comparison, key=lambda found: found["dose"])
    found = [test["verdict"] for test in entry["profile"].values()]
    verdict = "undecided"
    if all(v == "equivalent" for v in found):
        verdict = "supported"
    elif "different" in found:
        verdict = "contradicted"
    said = ", ".join(
        f"{NAMES[name]} {with_interval(test['difference'], test['interval_90'], sign=True)} ({test['verdict']})"
        for name, test in entry["profile"].items()
    )
    apart = entry["distance"]["total_variation"]
    sober = next((c for c in findings.comparison if c["dose"] == 0), None)
    before = "" if sober is None else f" (without a dose {with_interval(**_distance(sober))})"
    return Verdict(
        claim, verdict,
        f"{entry['left']} less {entry['right']} [90% interval], margin {study.settings.margin:g}: {said}. "
        f"The answers are {with_interval(apart['mean'], apart['interval'])} apart in total variation{before}.",
    )  # fmt: skip


def _distance(entry: dict) -> dict:
    apart = entry["distance"]["total_variation"]
    return {"value": apart["mean"], "interval": apart["interval"]}


def there_is_a_ceiling(study: Study, findings: Findings) -> Verdict:
    claim = "There is a ceiling: beyond some dose performance falls."
    trend = _trend(study, findings)
    if trend is None:
        return Verdict(claim, "undecided", _NO_DOSES)
    said = []
    for name, what in (("accuracy", "accuracy"), ("nll", "NLL")):
        best = trend["best"][name]
        low, high = best["dose_interval"]
        text = f"{what} is best at dose {best['dose']:g} [{low:g}, {high:g}]"
        if best["falls_beyond"] is not None:
            change = with_interval(best["difference"], best["interval"], sign=True)
            text += f" and changes by {change} at dose {trend['doses'][-1]:g}"
        said.append(text)
    found = [trend["best"][name]["falls_beyond"] for name in ("accuracy", "nll")]
    # At the largest dose there is no beyond: what was asked for was too little to tell.
    verdict = "supported" if any(found) else "undecided"
    if all(best["dose_interval"][0] == trend["doses"][-1] for best in trend["best"].values()):
        verdict = "contradicted"
    return Verdict(claim, verdict, "; ".join(said) + ".")


def _doses(trend: dict) -> str:
    return ", ".join(f"{dose:g}" for dose in trend["doses"])
