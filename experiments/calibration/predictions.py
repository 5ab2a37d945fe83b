"""The predictions that were made before anything was measured, and what the findings say of each.

A prediction is *supported* or *contradicted* only by intervals (95%; for equality 90%) that leave out the other; else
it is *undecided*, which is what small samples deserve. Of several parts, all must hold for support, and one that is
the opposite contradicts. The doses meant are those of the main series (`study.main_series`), the model the first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.calibration.analysis import ROUNDING, STEPPED, Findings
from experiments.calibration.arms import NONE
from experiments.calibration.study import PSYCHEDELIC, Study, main_series
from nmjax.report.calibration import NAMES
from nmjax.report.tables import number, p_text, with_interval
from nmjax.report.verdicts import Verdict

RISE, FALL = 1, -1
FEWEST = 6
"""Questions that a verdict takes: five differences have one sign by chance in 1 of 16 samples, and so all draws."""


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


def direction(found: Mapping) -> int:
    """+1 for an "interval" above 0, -1 for one below; 0 for one that holds 0 or is None, or a "p_value" above 0.05."""
    if found["interval"] is None or found.get("p_value", 0) > 0.05:
        return 0
    low, high = found["interval"]
    return RISE if low > ROUNDING else FALL if high < -ROUNDING else 0


def decide(seen: Sequence[int], wanted: Sequence[int]) -> str:
    """Supported if every direction is as wanted, contradicted if one is the opposite, else undecided."""
    if all(a == b for a, b in zip(seen, wanted, strict=True)):
        return "supported"
    return "contradicted" if any(a == -b for a, b in zip(seen, wanted, strict=True)) else "undecided"


def decide_equal(tests: Sequence[Mapping]) -> str:
    """Supported if all are equivalent, contradicted if one differs by the margin or more, else undecided."""
    found = [test["verdict"] for test in tests]
    if all(verdict == "equivalent" for verdict in found):
        return "supported"
    return "contradicted" if "different" in found else "undecided"


def _trend(study: Study, findings: Findings) -> dict | None:
    series = main_series(study.examinees[0].arms)
    found = (t for t in findings.trends if (t["model"], t["series"]) == (study.names[0], series))
    return next(found, None) if len(study.questions) >= FEWEST else None


def _not_measured(claim: str, missing: str) -> Verdict:
    return Verdict(claim, "undecided", f"Not measured: it takes {missing}.")


_DOSES = f"{FEWEST} questions and two doses of one pack, {NONE} being one"


def entropy_falls(study: Study, findings: Findings) -> Verdict:
    claim = "Entropy falls with the dose."
    trend = _trend(study, findings)
    if trend is None:
        return _not_measured(claim, _DOSES)
    entropy, unsampled = trend["metrics"]["entropy"], trend["metrics_before_sampler"]["entropy"]
    means = ", ".join(number(findings.profile(label)["entropy"]) for label in trend["conditions"])
    return Verdict(
        claim,
        decide([direction(entropy)], [FALL]),
        f"Slope {with_interval(entropy['slope'], entropy['interval'], sign=True)} nats per unit of dose "
        f"(p {p_text(entropy['p_value'])}); {means} nats at doses {_doses(trend)}. Before the sampler's effects, slope "
        f"{with_interval(unsampled['slope'], unsampled['interval'], sign=True)}.",
    )


def confidence_and_ece_rise(study: Study, findings: Findings) -> Verdict:
    claim = "Confidence and calibration error rise with every step of the dose."
    trend = _trend(study, findings)
    if trend is None:
        return _not_measured(claim, _DOSES)
    seen, said = [], []
    for name in STEPPED:
        steps = trend["steps"][name]
        seen += [direction(found) for found in (*steps, trend["metrics"][name])]
        values = ", ".join(number(findings.profile(label)[name]) for label in trend["conditions"])
        said.append(f"{NAMES[name]} {values}, steps {', '.join(map(_change, steps))}")
    return Verdict(claim, decide(seen, [RISE] * len(seen)), f"At doses {_doses(trend)}: {'; '.join(said)}.")


def accuracy_stays(study: Study, findings: Findings) -> Verdict:
    margin = study.settings.margin
    claim = f"Accuracy stays the same (within {margin:g}, fixed beforehand)."
    trend = _trend(study, findings)
    if trend is None:
        return _not_measured(claim, _DOSES)
    first, *higher = trend["conditions"]
    tests = {label: findings.equality("accuracy", label, first, margin) for label in higher}
    said = "; ".join(
        f"{label} {with_interval(test['difference'], test['interval_90'], sign=True)}" for label, test in tests.items()
    )
    held = "; ".join(
        f"{label}: " + ", ".join(_held(entry) for entry in findings.profile(label)["answers_held_at"])
        for label in (first, higher[-1])
    )
    return Verdict(
        claim, decide_equal(list(tests.values())),
        f"Difference from {first} [90% interval]: {said}. Of the answers held at a confidence, right: {held}.",
    )  # fmt: skip


def _held(entry: dict) -> str:
    if entry["right"] is None:
        return f"at {entry['threshold']:g} none"
    share = with_interval(entry["right"], entry["interval"])
    return f"at {entry['threshold']:g} {share} of {entry['count']}"


TEXT_CLAIMS = (
    ("distinct_3", "diversity", FALL),
    ("repetition_rate", "repetition", RISE),
    ("stock_phrase_rate", "stock phrases", RISE),
    ("refusal_rate", "refusals (as written)", RISE),
)


def texts_get_worse(study: Study, findings: Findings) -> Verdict:
    claim = "Off the training distribution diversity falls; repetition, stock phrases and refusals rise."
    entry = _top_writer(study, findings)
    if entry is None or "against_sober" not in entry:
        return _not_measured(claim, "texts written under a dose (--ood)")
    against = entry["against_sober"]
    # A longer text repeats itself more and holds more phrases, whatever wrote it; a refusal stands in its opening.
    found = [(against if name == "refusal_rate" else against["length_matched"])[name] for name, *_ in TEXT_CLAIMS]
    verdict = decide([direction(test) for test in found], [wanted for *_, wanted in TEXT_CLAIMS])
    said = ", ".join(f"{what} {_change(test)}" for (_, what, _), test in zip(TEXT_CLAIMS, found, strict=True))
    return Verdict(claim, verdict, f"{entry['arm']} less {NONE}, at equal length: {said}.")


def stimulant_loses_most(study: Study, findings: Findings) -> Verdict:
    claim = f"The sober model and the psychedelic ({PSYCHEDELIC}) lose less diversity than the largest dose does."
    entry = _top_writer(study, findings)
    if entry is None or not {"against_sober", "against_psychedelic"} <= entry.keys():
        return _not_measured(claim, f"texts written under a dose and under {PSYCHEDELIC} (--ood)")
    found = [entry[key]["length_matched"]["distinct_3"] for key in ("against_sober", "against_psychedelic")]
    said = ", ".join(f"less {name} {_change(test)}" for name, test in zip((NONE, PSYCHEDELIC), found, strict=True))
    return Verdict(
        claim, decide([direction(test) for test in found], [FALL, FALL]),
        f"Distinct trigrams at equal length, {entry['arm']} {said}.",
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
    claim = "The base model at the largest dose has the calibration of the instruction-tuned one without a dose."
    entry = max(findings.comparison, key=lambda found: found["dose"], default=None)
    if entry is None or entry["dose"] == 0 or len(study.questions) < FEWEST:
        return _not_measured(claim, f"a second model (--compare_model), the arm {NONE}, a dose and {FEWEST} questions")
    said = ", ".join(
        f"{NAMES[name]} {with_interval(test['difference'], test['interval_90'], sign=True)} ({test['verdict']})"
        for name, test in entry["profile"].items()
    )
    sober = next((c for c in findings.comparison if c["dose"] == 0), None)
    before = "" if sober is None else f" (without a dose {_distance(sober)})"
    return Verdict(
        claim, decide_equal(list(entry["profile"].values())),
        f"{entry['left']} less {entry['right']} [90% interval], margin {study.settings.margin:g}: {said}. "
        f"The answers are {_distance(entry)} apart in total variation{before}.",
    )  # fmt: skip


def _distance(entry: dict) -> str:
    apart = entry["distance"]["total_variation"]
    return with_interval(apart["mean"], apart["interval"])


def there_is_a_ceiling(study: Study, findings: Findings) -> Verdict:
    claim = "There is a ceiling: beyond some dose performance falls."
    trend = _trend(study, findings)
    if trend is None:
        return _not_measured(claim, _DOSES)
    said = []
    for name, best in trend["best"].items():
        low, high = best["dose_interval"]
        text = f"{NAMES[name]} is best at dose {best['dose']:g} [{low:g}, {high:g}]"
        if best["falls_beyond"] is not None:
            text += f" and changes by {_change(best)} at dose {trend['doses'][-1]:g}"
        said.append(text)
    # A right answer that truncation cuts has whatever NLL the floor gives it. Brier's score, bounded, must agree.
    falls = {name: direction(best) == (FALL if name == "accuracy" else RISE) for name, best in trend["best"].items()}
    if falls["nll"] and not falls["brier_multiclass"]:
        said.append("a rise of NLL alone may be no more than the floor under right answers that truncation cut")
    if falls["accuracy"] or (falls["nll"] and falls["brier_multiclass"]):
        verdict = "supported"
    elif all(best["dose_interval"][0] == trend["doses"][-1] for best in trend["best"].values()):
        verdict = "contradicted"
    else:
        verdict = "undecided"  # also where the best dose is the largest: what was asked for was too little to tell
    return Verdict(claim, verdict, "; ".join(said) + ".")


def _doses(trend: dict) -> str:
    return ", ".join(f"{dose:g}" for dose in trend["doses"])
