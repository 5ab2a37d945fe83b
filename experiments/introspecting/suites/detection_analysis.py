"""What the answers of `detection` say: rates, sensitivity, AUROC and probability mass, with intervals.

Findings of each subject in each wording:

    "sets"       by set of items: "n", "failed" (no finite log-probability; left out), and with intervals "yes" (share),
                 "p_yes" (mean of P(yes) of the pair), "mass" (mean of what the pair holds of the vocabulary's
                 probability) and "low_mass" (share of items where that is below `LOW_MASS`)
    "detection"  by set of steered items, against the unsteered ones: `signal_report`, "cells", "against" the other
                 negatives (AUROC) and the "roc"
    "to_base"    by set: AUROC less that of the base in the same wording, paired by items; "p_adjusted" is for all of
                 them together
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.metrics import roc_curve

from experiments.introspecting.subjects import BASE
from nmjax.metrics import rivals, stats
from nmjax.metrics.paired import adjust
from nmjax.metrics.signal_detection import ESTIMATES, share, signal_report

STEERED = ("trained", "held_out", "concepts")
NEGATIVES = ("unsteered", "noise", "system")
LOW_MASS = 0.1
_NOTHING = {"value": None, "interval": None}


@dataclasses.dataclass(frozen=True)
class _Answers:
    """Some answers of a subject in a wording, in columns [N]; those that failed are in none."""

    items: tuple[Mapping[str, Any], ...]

    @property
    def yes(self) -> np.ndarray:
        return np.array([item["yes"] for item in self.items])

    @property
    def no(self) -> np.ndarray:
        return np.array([item["no"] for item in self.items])

    @property
    def margin(self) -> np.ndarray:
        """Nats by which yes is likelier than no: the logit of P(yes) of the pair, which never rounds to a tie."""
        return self.yes - self.no

    @property
    def source(self) -> np.ndarray:
        return np.array([item["source"] for item in self.items])

    def where(self, **values: Any) -> _Answers:
        return _Answers(
            tuple(item for item in self.items if all(item[name] == value for name, value in values.items()))
        )

    def matching(self, other: _Answers) -> _Answers:
        """The same items as answered by another subject, in the order of these; those it failed on are left out."""
        theirs = {_key(item): item for item in other.items}
        return _Answers(tuple(theirs[_key(item)] for item in self.items if _key(item) in theirs))


def _key(item: Mapping[str, Any]) -> tuple:
    return tuple(value for name, value in item.items() if name not in ("yes", "no"))


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Of records as `Detection.ask` returns them.

    Attributes:
      variants: of the adapters, by name; see `Subjects`.
      draws, seed: of the bootstrap.
    """

    variants: Mapping[str, str | None]
    draws: int
    seed: int

    def findings(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See above; all that is undefined is None."""
        asked: dict[tuple[str, str], list] = {}
        for record in records:
            asked.setdefault((record["subject"], record["wording"]), []).extend(record["items"])
        answers = {
            pair: _Answers(tuple(item for item in items if item["yes"] is not None and item["no"] is not None))
            for pair, items in asked.items()
        }
        found: list[dict[str, Any]] = []
        for (subject, wording), items in asked.items():
            own = answers[subject, wording]
            base = answers.get((BASE, wording)) if subject != BASE else None
            names = [name for name in STEERED if any(item["set"] == name for item in items)]
            found.append(
                {
                    "subject": subject,
                    "variant": self.variants.get(subject),
                    "wording": wording,
                    "sets": self._sets(items, own),
                    "detection": {name: self._detection(own, name) for name in names},
                    "to_base": {} if base is None else {name: self._difference(own, base, name) for name in names},
                }
            )
        adjust(difference for entry in found for difference in entry["to_base"].values())
        return {"subjects": found, "low_mass": LOW_MASS}

    def _sets(self, items: Sequence[Mapping[str, Any]], answers: _Answers) -> dict[str, Any]:
        sets = {}
        for name in (*STEERED, *NEGATIVES):
            n, own = sum(item["set"] == name for item in items), answers.where(set=name)
            if n == 0:
                continue
            sets[name] = {"n": n, "failed": n - len(own.items)}
            if not own.items:
                sets[name] |= dict.fromkeys(("yes", "p_yes", "mass", "low_mass"), _NOTHING)
                continue
            mass = np.exp(own.yes) + np.exp(own.no)
            sets[name] |= {
                "yes": share(own.margin > 0, own.source),
                "p_yes": self._mean(expit(own.margin), own.source),
                "mass": self._mean(mass, own.source),
                "low_mass": share(mass < LOW_MASS, own.source),
            }
        return sets

    def _mean(self, values: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
        samples = stats.cluster_bootstrap(lambda w: w @ values / w.sum(axis=1), groups, self.draws, self.seed)
        return {"value": float(values.mean()), "interval": stats.defined_interval(samples)}

    def _detection(self, answers: _Answers, name: str) -> dict[str, Any]:
        steered, unsteered = answers.where(set=name), answers.where(set="unsteered")
        cells = {(item["third"], item["magnitude"]): None for item in steered.items}
        report = self._against(steered, unsteered)
        report["cells"] = []
        for third, magnitude in cells:
            own = self._against(steered.where(third=third, magnitude=magnitude), unsteered)
            report["cells"].append(
                {"third": third, "magnitude": magnitude, "n": own["present"], "tpr": own["tpr"], "auroc": own["auroc"]}
            )
        report["against"] = {}
        for negative in NEGATIVES[1:]:
            others = answers.where(set=negative)
            if others.items:
                report["against"][negative] = self._against(steered, others)["auroc"]
        if steered.items and unsteered.items:
            fpr, tpr, _ = roc_curve(*_labelled(steered, unsteered)[1::-1])
            report["roc"] = {"fpr": fpr.tolist(), "tpr": tpr.tolist()}
        else:
            report["roc"] = None
        return report

    def _against(self, steered: _Answers, others: _Answers) -> dict[str, Any]:
        """`signal_report`, with nothing in it where a side has no answers."""
        if steered.items and others.items:
            return signal_report(*_labelled(steered, others), draws=self.draws, seed=self.seed)
        counts = {"present": len(steered.items), "absent": len(others.items)}
        return counts | dict.fromkeys(("tpr", "fpr", *ESTIMATES), _NOTHING)

    def _difference(self, own: _Answers, base: _Answers, name: str) -> dict[str, Any]:
        mine = base.matching(own)  # both without what either failed on
        pairs = [side.where(set=kind) for side in (mine, mine.matching(base)) for kind in (name, "unsteered")]
        if not all(side.items for side in pairs):
            return _NOTHING | {"p_value": None}
        (a, present, groups), (b, _, _) = _labelled(*pairs[:2]), _labelled(*pairs[2:])
        found = rivals.compare_aurocs(a, b, present, groups, self.draws, self.seed, directions=("high", "high"))
        return {"value": found["difference"], "interval": found["interval"], "p_value": found["p_value"]}


def _labelled(steered: _Answers, others: _Answers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins, what is steered, and sources, of the ones and then the others."""
    present = np.repeat([True, False], [len(steered.items), len(others.items)])
    sides = _Answers(steered.items + others.items)
    return sides.margin, present, sides.source
