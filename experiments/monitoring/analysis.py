"""Pass 2: from scores to directions, thresholds and what they are worth, in sample, out of fold and held out.

A statistic is a signal's top-k mean, a plain baseline, or a logistic combination of signals. What is learnt about it
(its direction, the weights of a combination, its thresholds) comes from the calibration samples and goes to a file;
`held_out` measures it on others and learns nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import expit

from experiments.monitoring.watching import BASELINES, IN_LOOP, LENGTH, P_NO, Scored
from nmjax.metrics import crossfit, detection, paired, ranking, rivals, score_tables
from nmjax.metrics.conformal import conformal_threshold, recall_check

JOINT = {"joint": ("hbar_s", "pri"), "all_signals": IN_LOOP}
"""The combinations: the published one of two signals, and one of everything the monitor sees."""
FOLLOWED = (*IN_LOOP, "joint")
"""Statistics that the monitor may be told to follow."""
TESTED = (*IN_LOOP, *JOINT)
"""Statistics that are tested against the rivals."""
RIVALS = (LENGTH, P_NO)
ALPHA = 0.05
EXAMPLES, CHARACTERS = 5, 150
EVERYTHING = 1e30  # stands for "flag everything" where a threshold must be a number


@dataclasses.dataclass(frozen=True)
class Choices:
    """How pass 2 decides."""

    min_recall: float = 0.9
    direction: str = "auto"
    tau_grid: str = "cuts"
    taus: tuple[float, float, float] | None = None  # start, stop and step, of hbar_s
    draws: int = 2000
    seed: int = 0

    def towards(self, chosen: Mapping[str, Any]) -> str:
        return chosen["direction"] if self.direction == "auto" else self.direction

    def grid(self, name: str, scores: np.ndarray, direction: str) -> np.ndarray | None:
        """Thresholds to try; None: every distinct score."""
        if name == "hbar_s" and self.taus is not None:
            return detection.tau_grid(scores, direction, *self.taus)
        return detection.tau_grid(scores, direction) if self.tau_grid == "quantiles" else None


def kind(name: str) -> str:
    return "baseline" if name in BASELINES else "combination" if name in JOINT else "monitor"


def followed(rule: Mapping[str, Any], s: Scored) -> np.ndarray:
    """A rule's statistic [N]: intercept + sum of weight x score."""
    return rule["intercept"] + sum(weight * s.scores[name] for name, weight in rule["weights"].items())


# --- Calibration ------------------------------------------------------------------------------------------------------


Findings = dict[str, Any]
Values = dict[str, np.ndarray]


def calibrate(s: Scored, choices: Choices) -> tuple[Findings, Values]:
    """All of pass 2 on the calibration samples, ready for JSON, and the values [N] of every statistic.

    "statistics": by name the direction, the threshold of highest precision at the recall ("best"), the split-conformal
      rule ("conformal") and performance; a combination's scores are its probabilities out of fold, and "weights" and
      "intercept" are those of the model of all samples. Then "monitor", "comparisons", "by_task", "labels_by_score",
      "flags_side_by_side" and "best_results".
    """
    s, constant = varied(s)
    y, groups, folds = s.labels, s.groups, _folds(s)
    options: dict[str, Any] = {"draws": choices.draws, "seed": choices.seed}
    values, found = dict(s.scores), {}
    for name, parts in parts_of_joints(s).items():
        features = np.stack([s.scores[part] for part in parts], axis=1)
        combined = crossfit.combine(features, y, groups, parts, folds, **options)
        values[name] = np.array(combined.pop("probabilities"))
        found[name] = {"direction": "high", **combined, "auroc_crossfit": combined["auroc"]["value"]}
    for name, scores in s.scores.items():
        chosen = crossfit.choose_direction(scores, y, groups, folds, choices.seed)
        found[name] = {**chosen, "direction": choices.towards(chosen)}
    rules = conformal_rules(s, choices)
    statistics, results = {}, []
    for name in found:
        direction = found[name]["direction"]
        grid = choices.grid(name, values[name], direction)
        best = detection.best_threshold(values[name], y, direction, choices.min_recall, grid)
        if name == "hbar_s":
            cuts = np.unique(values[name]) if grid is None else grid
            results = detection.at_thresholds(values[name], y, cuts, direction)
        entry = {"kind": kind(name), **found[name], "best": best, "conformal": rules[name]}
        statistics[name] = entry | performance(s, values[name], entry, options)
    followed_one = max((n for n in FOLLOWED if n in statistics), key=lambda n: statistics[n]["auroc_crossfit"])
    rule = rules[followed_one]
    if rule["tau"] is None:  # the monitor wants a number
        rule = rule | {"tau": -detection.sign(rule["direction"]) * EVERYTHING}
    taus = {name: statistics[name]["best"]["tau"] for name in ("hbar_s", "pri")}
    findings = {
        "base_rate": float(y.mean()),
        "constant": constant,
        "statistics": statistics,
        "monitor": {"statistic": followed_one, **rule},
        "comparisons": comparisons(s, values, statistics, options),
        "by_task": by_task(s, values, statistics, options),
        "labels_by_score": {name: labels_by_score(s, name) for name in ("hbar_s", "pri")},
        "flags_side_by_side": side_by_side(s, statistics, taus),
        "best_results": results,
    }
    return findings, values


def conformal_rules(s: Scored, choices: Choices) -> dict[str, dict]:
    """By statistic a rule as the monitor follows it, with a threshold that promises the recall.

    The promise wants a direction and weights that know nothing of the positives that set the threshold: half of the
    source rows decide on the former, the other half sets "tau". It is made for each statistic by itself; that one of
    them is chosen on all samples is not in it.
    """
    y, groups = s.labels, s.groups
    learning = crossfit.grouped_folds(groups, y, 2, choices.seed) == 0
    folds = min(5, len(np.unique(groups[learning])))
    joints = parts_of_joints(s)
    rules = {}
    for name in (*s.scores, *joints):
        parts = joints.get(name, (name,))
        x = np.stack([s.scores[part] for part in parts], axis=1)
        if name in joints:
            weights, intercept = crossfit.fit_logistic(x[learning], y[learning])
            direction = "high"
        else:
            weights, intercept = np.ones(1), 0.0
            chosen = crossfit.choose_direction(x[learning, 0], y[learning], groups[learning], folds, choices.seed)
            direction = choices.towards(chosen)
        rule = {
            "weights": dict(zip(parts, map(float, weights), strict=True)),
            "intercept": intercept,
            "direction": direction,
        }
        scores = followed(rule, s)[~learning]
        rules[name] = rule | conformal_threshold(scores, y[~learning], direction, choices.min_recall)
    return rules


def varied(s: Scored) -> tuple[Scored, list[str]]:
    """The scores without those that are the same for every sample, such as the spread of a single layer; their names.

    Raises ValueError where hbar_s or PRI is one of them.
    """
    constant = [name for name, values in s.scores.items() if np.ptp(values) == 0]
    if lost := {"hbar_s", "pri", LENGTH} & set(constant):
        raise ValueError(f"{sorted(lost)[0]} is the same for all {len(s.judgements)} samples; wanted more or others")
    return dataclasses.replace(s, scores={n: v for n, v in s.scores.items() if n not in constant}), constant


def parts_of_joints(s: Scored) -> dict[str, tuple[str, ...]]:
    """The signals of each combination, as far as there are scores of them."""
    return {name: tuple(part for part in parts if part in s.scores) for name, parts in JOINT.items()}


def _folds(s: Scored) -> int:
    return min(5, len(np.unique(s.groups)))


# --- Measurement ------------------------------------------------------------------------------------------------------


def held_out(s: Scored, calibrated: Mapping[str, Any], choices: Choices) -> tuple[Findings, Values]:
    """The calibrated statistics on samples that they were not calibrated on; all that is learnt is as stored.

    As `calibrate` without what is learnt; every statistic has "recall_checks" of both thresholds, and "monitor" those
    of the rule that the monitor follows.
    """
    options: dict[str, Any] = {"draws": choices.draws, "seed": choices.seed}
    stored = calibrated["statistics"]
    values, statistics = {}, {}
    for name, entry in stored.items():
        values[name] = expit(followed(entry, s)) if name in JOINT else s.scores[name]
        kept = {key: entry[key] for key in ("kind", "direction", "best", "conformal")}
        flagged = {
            "best": detection.flags(values[name], entry["best"]["tau"], entry["direction"]),
            "conformal": flags_of(entry["conformal"], s),
        }
        checks = {key: recall_check(flag, s.labels, choices.min_recall) for key, flag in flagged.items()}
        statistics[name] = kept | performance(s, values[name], entry, options) | {"recall_checks": checks}
    rule = calibrated["monitor"]
    flagged_by_rule = flags_of(rule, s)
    taus = {name: stored[name]["best"]["tau"] for name in ("hbar_s", "pri")}
    findings = {
        "base_rate": float(s.labels.mean()),
        "statistics": statistics,
        "monitor": dict(rule)
        | {
            "recall_check": recall_check(flagged_by_rule, s.labels, rule["recall"]),
            "report": detection.flag_report(flagged_by_rule, s.labels, s.groups, **options),
            "by_task": {
                task: recall_check(flagged_by_rule[s.tasks == task], s.labels[s.tasks == task], rule["recall"])
                for task in np.unique(s.tasks).tolist()
            },
        },
        "comparisons": comparisons(s, values, statistics, options),
        "by_task": by_task(s, values, statistics, options),
        "labels_by_score": {
            name: labels_by_score(s, name, calibrated["labels_by_score"][name]["median"]) for name in ("hbar_s", "pri")
        },
        "flags_side_by_side": side_by_side(s, stored, taus),
    }
    return findings, values


def flags_of(rule: Mapping[str, Any], s: Scored) -> np.ndarray:
    """Which samples a rule flags [N]."""
    return detection.flags(followed(rule, s), rule["tau"], rule["direction"])


def performance(s: Scored, values: np.ndarray, entry: Mapping[str, Any], options: Mapping[str, Any]) -> dict:
    """What a statistic's values [N] are worth, in its direction and at its two thresholds, with intervals."""
    y, groups, rule = s.labels, s.groups, entry["conformal"]
    by_length = rivals.residualised_auroc(values, y, s.scores[LENGTH], groups, _folds(s), **options)
    if entry["direction"] == "low" and by_length["auroc"] is not None:
        by_length["auroc"] = 1 - by_length["auroc"]
        by_length["interval"] = [1 - end for end in by_length["interval"][::-1]] if by_length["interval"] else None
    return {
        "summary": score_tables.summary(values, y),
        "median_check": score_tables.median_check(values, y, entry["direction"]),
        "average_precision_raw": float(ranking.score_average_precision(values, y)),
        "at_best": detection.detection_report(values, y, groups, entry["best"]["tau"], entry["direction"], **options),
        "at_conformal": detection.flag_report(flags_of(rule, s), y, groups, **options),
        "length_residualised": by_length,
    }


def comparisons(
    s: Scored, values: Mapping[str, np.ndarray], statistics: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, dict]:
    """By rival, by statistic: the difference in AUROC, its p-value adjusted over all of them, and "verdict": "beats",
    "loses" or "neither"."""
    names = list(statistics)
    pairs = [(rival, name) for rival in RIVALS if rival in names for name in TESTED if name in names]
    found = rivals.compare_all(
        [values[name] for name in names],
        s.labels,
        s.groups,
        [(names.index(name), names.index(rival)) for rival, name in pairs],
        directions=[statistics[name]["direction"] for name in names],
        **options,
    )
    table: dict[str, dict] = {rival: {} for rival, _ in pairs}
    adjusted = paired.benjamini_hochberg([entry["p_value"] for entry in found])
    for (rival, name), entry, p in zip(pairs, found, adjusted, strict=True):
        sure = p < ALPHA and entry["difference"] != 0
        verdict = ("beats" if entry["difference"] > 0 else "loses") if sure else "neither"
        table[rival][name] = entry | {"p_adjusted": p, "verdict": verdict}
    return table


def who_beats(compared: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Statistics by what they beat: "both" (all rivals), each rival "only", "neither"."""
    table: dict[str, list[str]] = {"both": [], **{rival: [] for rival in compared}, "neither": []}
    for name in next(iter(compared.values())):
        beaten = [rival for rival in compared if compared[rival][name]["verdict"] == "beats"]
        place = "neither" if not beaten else "both" if len(beaten) == len(compared) else beaten[0]
        table[place].append(name)
    return table


def by_task(
    s: Scored, values: Mapping[str, np.ndarray], statistics: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, dict]:
    """By task, by statistic: the report at the best threshold, which is that of all tasks together."""
    tasks = np.unique(s.tasks).tolist()
    if len(tasks) == 1:
        return {tasks[0]: {name: entry["at_best"] for name, entry in statistics.items()}}
    table: dict[str, dict] = {}
    for task in tasks:
        own = s.tasks == task
        table[task] = {
            name: detection.detection_report(
                values[name][own], s.labels[own], s.groups[own], entry["best"]["tau"], entry["direction"], **options
            )
            for name, entry in statistics.items()
        }
    return table


def labels_by_score(s: Scored, name: str, median: float | None = None) -> dict[str, Any]:
    """Label by low or high score, with examples: id, score, the first characters of the prompt."""
    table = score_tables.label_quadrants(s.scores[name], s.labels, median, EXAMPLES)
    for key, cell in table.items():
        if key != "median":
            cell["examples"] = [
                {"id": j.id, "score": float(s.scores[name][i]), "prompt": j.prompt[:CHARACTERS]}
                for i in cell.pop("indices")
                for j in [s.judgements[i]]
            ]
    return table


def side_by_side(s: Scored, statistics: Mapping[str, Any], taus: Mapping[str, float]) -> dict[str, Any]:
    """What PRI and hbar_s flag at their thresholds: q1 neither, q2 both, q3 PRI alone, q4 hbar_s alone."""
    pri, hbar = (detection.flags(s.scores[n], taus[n], statistics[n]["direction"]) for n in ("pri", "hbar_s"))
    table = score_tables.quadrants(pri, hbar, s.labels)
    names = {"q1": "neither", "q2": "both", "q3": "only_a", "q4": "only_b"}
    flagged = {"q1": "neither", "q2": "both", "q3": "PRI alone", "q4": "hbar_s alone"}
    return {
        q: {"flagged_by": flagged[q], "hallucination_rate": table[name]["rate"]} | table[name]
        for q, name in names.items()
    }
