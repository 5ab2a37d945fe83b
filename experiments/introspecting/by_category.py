"""Values of the same questions under several subjects, by the questions' category: means, and changes from the base.

Categories have three to eight questions, so their intervals are wide and no p-value of three questions is below 1/4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.introspecting.subjects import BASE
from nmjax.metrics import paired, stats


def table(records: Sequence[Mapping], values: np.ndarray, subjects: Sequence[str]) -> dict[str, np.ndarray]:
    """By subject the values [N] of its questions, which come in the order of the base's; NaN where one is missing.

    `records` have an "id" and a "subject" each, `values` one number each.
    """
    order = {record["id"]: k for k, record in enumerate(r for r in records if r["subject"] == BASE)}
    found = {name: np.full(len(order), np.nan) for name in subjects}
    for record, value in zip(records, values, strict=True):
        if record["subject"] in found:
            found[record["subject"]][order[record["id"]]] = value
    return found


def mean_of(values: np.ndarray, draws: int = stats.DRAWS, seed: int = 0) -> dict:
    """{"value", "interval", "n"} of the mean of those that are defined; no interval of fewer than two."""
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return {"value": None, "interval": None, "n": 0}
    ends = stats.mean_interval(known, draws, seed) if len(known) > 1 else None
    return {
        "value": float(known.mean()),
        "interval": None if ends is None else [float(end) for end in ends],
        "n": len(known),
    }


def rate_of(values: np.ndarray, draws: int = stats.DRAWS, seed: int = 0) -> dict:
    """`mean_of` shares between 0 and 1. Where all are 0, or all 1, resampling them shows no spread; the interval is
    Wilson's then, with the questions as its trials.
    """
    found, known = mean_of(values, draws, seed), values[~np.isnan(values)]
    if len(known) and (np.all(known == 0) or np.all(known == 1)):
        found["interval"] = [float(end) for end in stats.wilson_interval(known.sum(), len(known))]
    return found


def means(
    values: np.ndarray, categories: Sequence[str], draws: int = stats.DRAWS, seed: int = 0, of=mean_of
) -> dict[str, dict]:
    """By category what `of` says of the `values [N]`, whose categories are `categories [N]`."""
    names = np.asarray(categories)
    return {name: of(values[names == name], draws, seed) for name in dict.fromkeys(categories)}


def changes(
    values: Mapping[str, np.ndarray], categories: Sequence[str], draws: int = stats.DRAWS, seed: int = 0
) -> dict[str, dict[str, dict]]:
    """By subject and category the mean of the questions' own changes from the base.

    Each has "value", "interval" (paired bootstrap over questions), "n", "p_value" (sign flips of the questions'
    changes) and "p_adjusted" (Benjamini-Hochberg over all subjects and categories).
    """
    names = np.asarray(categories)
    found: dict[str, dict[str, dict]] = {}
    for subject, own in values.items():
        if subject == BASE:
            continue
        change = own - values[BASE]
        found[subject] = means(change, categories, draws, seed)
        for category, row in found[subject].items():
            known = change[(names == category) & ~np.isnan(change)]
            row["p_value"] = float(paired.sign_flip(known, seed=seed)) if len(known) else None
    paired.adjust(row for rows in found.values() for row in rows.values())
    return found
