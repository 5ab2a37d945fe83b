"""From the records of a run to its findings: calibration, dose-response, derivatives, texts, base against instruct."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax, rel_entr, softmax

from experiments.calibration.arms import NONE, Arm
from experiments.calibration.asking import FIELDS
from experiments.calibration.study import PSYCHEDELIC, Study, main_series
from nmjax.metrics import battery, paired, stats, texts, trend
from nmjax.metrics.smooth import soft_ece

BANDWIDTH = 0.05  # of the smooth ECE that is differentiated by dose
ROUNDING = 1e-6  # of probabilities in float32: a change below it is none
EQUIVALENCE = ("accuracy", "confidence", "overconfidence", "brier_score", "entropy", "ece")
"""The profile by which a base model under a stimulant is compared with an instruction-tuned one."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """An arm of one of the models. The first model's are named after the arm alone."""

    label: str
    model: int
    arm: Arm


@dataclasses.dataclass(frozen=True)
class Answers:
    """What P conditions answered to N questions, float64."""

    probs: np.ndarray  # [P, N, 4], after all effects, renormalised over the letters
    sober_probs: np.ndarray  # [P, N, 4], before the sampler's effects
    mass: np.ndarray  # [P, N], what the letters hold of the vocabulary's probability, after all effects
    sober_mass: np.ndarray  # [P, N]
    other_mass: np.ndarray  # [P, N], what the letters' other form (with or without a space) holds, before the sampler's
    removed: np.ndarray  # [P, N], share of the letters' mass that truncation removed
    labels: np.ndarray  # [N]


@dataclasses.dataclass(frozen=True)
class Findings:
    """Everything the report says. Dictionaries are ready for JSON."""

    conditions: list[Condition]
    baseline: int
    answers: Answers
    after: battery.Battery
    before: battery.Battery
    mass: list[dict]
    trends: list[dict]  # {"model", "series", "doses", "metrics": {metric: ...}, "steps", "best": {...}, ...}
    derivatives: list[dict]  # {"model", "series", "dose", "nll", "soft_ece", ...}
    writing: list[dict]  # {"model", "arm", "measures", "against_sober", "against_psychedelic", ...}
    comparison: list[dict]  # the first model's arms against the second's `none`

    @property
    def labels(self) -> list[str]:
        return [c.label for c in self.conditions]

    @property
    def baseline_label(self) -> str:
        return self.labels[self.baseline]

    def profile(self, label: str) -> dict:
        """A condition's calibration after all effects."""
        return self.after.profiles[self.labels.index(label)]

    def equality(self, metric: str, label: str, other: str, margin: float) -> dict:
        """Whether a condition's metric is that of another one, within a margin."""
        return equality(self.after, metric, self.labels.index(label), self.labels.index(other), margin)


def analyse(study: Study, asked: list[list[dict]], slopes: list[list[dict]], written: list[list[dict]]) -> Findings:
    """All findings; every list has an entry a model, in the order of questions or prompts."""
    conditions = [
        Condition(arm.label if m == 0 else f"{study.names[m]}: {arm.label}", m, arm)
        for m, examinee in enumerate(study.examinees)
        for arm in examinee.arms
    ]
    labels = [c.label for c in conditions]
    baseline = labels.index(NONE) if NONE in labels else 0
    answers = collect(asked)
    strata = [q.subject for q in study.questions]
    draws, seed = study.settings.bootstrap_draws, study.settings.seed
    options: dict[str, Any] = {"baseline": baseline, "draws": draws, "seed": seed, "strata": strata}
    after = battery.measure(answers.probs, answers.labels, **options)
    before = battery.measure(answers.sober_probs, answers.labels, **options)
    return Findings(
        conditions=conditions,
        baseline=baseline,
        answers=answers,
        after=after,
        before=before,
        mass=[letter_mass(answers, k, draws, seed, strata) for k in range(len(conditions))],
        trends=[found for m in range(len(study.names)) for found in dose_response(study, conditions, m, after, before)],
        derivatives=[found for m, rows in enumerate(slopes) for found in derivatives(study, m, rows)],
        writing=[found for m, rows in enumerate(written) for found in writing(study, m, rows)],
        comparison=compare_models(study, conditions, answers, after) if len(study.names) > 1 else [],
    )


def collect(asked: list[list[dict]]) -> Answers:
    """Records of all models as arrays, conditions in front."""

    def column(name):
        return np.concatenate([np.moveaxis(np.asarray([row[name] for row in rows]), 1, 0) for rows in asked])

    found = {name: column(name) for name in (*FIELDS, "other_mass")}
    return Answers(
        probs=found["probs"] / found["probs"].sum(-1, keepdims=True),  # float32 sums are 1 to 1e-7 only
        sober_probs=softmax(found["sober_logprobs"], axis=-1),
        mass=np.exp(found["logprobs"]).sum(-1),
        sober_mass=np.exp(found["sober_logprobs"]).sum(-1),
        other_mass=found["other_mass"],
        removed=found["removed"],
        labels=np.array([row["answer"] for row in asked[0]]),
    )


def letter_mass(answers: Answers, k: int, draws: int, seed: int, strata: Sequence[str]) -> dict:
    """How much of the vocabulary's probability the letters hold together: the rest is not an answer."""
    entry: dict = {}
    for name, values in (("after_all_effects", answers.mass[k]), ("before_sampler", answers.sober_mass[k])):
        low, high = stats.mean_interval(values, draws, seed, strata)
        entry[name] = {"mean": values.mean(), "interval": [float(low), float(high)], "min": values.min()}
    entry["other_form"] = answers.other_mass[k].mean()
    entry["removed_by_truncation"] = answers.removed[k].mean()
    return entry


# --- Dose and response ------------------------------------------------------------------------------------------------


STEPPED = ("confidence", "ece")  # said to rise with every step of the dose
UNSAMPLED = ("confidence", "entropy")  # what a colder sampler alone moves: their trends before it, too


def dose_response(
    study: Study, conditions: Sequence[Condition], model: int, measured: battery.Battery, before: battery.Battery
) -> list[dict]:
    """For every series of a model with two doses or more, 0 included: trends, steps, and the doses that are best.

    "steps" holds for each of `STEPPED` the differences of neighbouring doses, the larger less the smaller. "best" has
    Brier's score beside NLL: bounded, so what truncation cuts to almost 0 does not decide it.
    """
    draws, seed = study.settings.bootstrap_draws, study.settings.seed
    strata = [q.subject for q in study.questions]
    found = []
    mine = [k for k, c in enumerate(conditions) if c.model == model]
    for series in dict.fromkeys(conditions[k].arm.series for k in mine):
        if series == NONE:
            continue
        by_dose = {conditions[k].arm.dose: k for k in reversed(mine) if conditions[k].arm.series in (series, NONE)}
        doses, at = np.array(sorted(by_dose)), [by_dose[dose] for dose in sorted(by_dose)]
        if len(doses) < 2:
            continue
        values = {name: x[at] for name, x in measured.questions.items()}
        metrics = {name: trend.trend(doses, x, draws, seed, strata) for name, x in values.items()}
        estimates, samples, bias = measured.of("ece")
        metrics["ece"] = trend.trend_of_samples(doses, estimates[at], samples[:, at], bias[at])
        unsampled = {name: trend.trend(doses, before.questions[name][at], draws, seed, strata) for name in UNSAMPLED}
        steps = {
            name: [difference(measured, name, k, smaller) for smaller, k in itertools.pairwise(at)] for name in STEPPED
        }
        best = {
            name: trend.peak(doses, values[name], draws, seed, strata, largest=name == "accuracy")
            for name in ("accuracy", "nll", "brier_multiclass")
        }
        found.append({
            "model": study.names[model],
            "series": series,
            "doses": doses.tolist(),
            "conditions": [conditions[k].label for k in at],
            "metrics": metrics,
            "metrics_before_sampler": unsampled,
            "steps": steps,
            "best": best,
        })  # fmt: skip
    return found


def derivatives(study: Study, model: int, rows: list[dict]) -> list[dict]:
    """d/d dose of mean NLL and of smooth ECE at every dose of every series; NLL's with an interval, if there are two
    questions or more.

    From the derivatives of the letters' log-probabilities (after all effects but truncation) by the chain rule.
    """
    if not rows:
        return []
    examinee = study.examinees[model]
    logprobs = np.asarray([row["logprobs"] for row in rows])  # [Q, G, 4]
    slopes = np.asarray([row["slopes"] for row in rows])
    labels = np.array([q.answer for q in examinee.questions[: len(rows)]])
    strata = [q.subject for q in examinee.questions[: len(rows)]]
    found = []
    for g, (series, dose) in enumerate(examinee.points):
        logs, moved = log_softmax(logprobs[:, g], axis=-1), slopes[:, g]
        probs = np.exp(logs)
        moved = moved - (probs * moved).sum(-1, keepdims=True)  # of the renormalised log-probabilities
        nll_slopes = -moved[np.arange(len(labels)), labels]
        top = probs.argmax(-1)
        confidence, correct = probs.max(-1), (top == labels).astype(np.float32)
        confidence_slope = (probs * moved)[np.arange(len(labels)), top]

        def smooth(c, correct=correct):
            return soft_ece(c, correct, BANDWIDTH)

        ece, ece_slope = jax.jvp(
            smooth, (jnp.asarray(confidence, jnp.float32),), (jnp.asarray(confidence_slope, jnp.float32),)
        )
        interval = None
        if len(rows) > 1:
            draws, seed = study.settings.bootstrap_draws, study.settings.seed
            interval = [float(end) for end in stats.mean_interval(nll_slopes, draws, seed, strata)]
        found.append({
            "model": study.names[model],
            "series": series,
            "dose": dose,
            "questions": len(rows),
            "nll": {"value": -logs[np.arange(len(labels)), labels].mean(), "derivative": nll_slopes.mean(),
                    "interval": interval},
            "soft_ece": {"value": float(ece), "derivative": float(ece_slope), "bandwidth": BANDWIDTH},
        })  # fmt: skip
    return found


# --- Texts ------------------------------------------------------------------------------------------------------------


def writing(study: Study, model: int, rows: list[dict]) -> list[dict]:
    """What was written under every arm of a model, and how it differs from what the sober model wrote."""
    if not rows:
        return []
    writer = study.writers[model]
    draws, seed = study.settings.bootstrap_draws, study.settings.seed
    prompts = [row["prompt"] for row in rows]
    responses = [[row["responses"][a]["text"] for row in rows] for a in range(len(writer.arms))]
    matched = texts.length_matched(responses)
    measured = [
        texts.measure_responses(own, prompts, draws, seed)
        | {"length_matched": texts.measure_responses(cut, prompts, draws, seed)}
        | perplexities([row["responses"][a] for row in rows], prompts, draws, seed)
        for a, (own, cut) in enumerate(zip(responses, matched, strict=True))
    ]
    sober = next(a for a, arm in enumerate(writer.arms) if arm.label == NONE)
    drugged = [a for a, arm in enumerate(writer.arms) if arm.label == PSYCHEDELIC]
    found = []
    for a, arm in enumerate(writer.arms):
        entry = {
            "model": study.names[model],
            "arm": arm.label,
            "series": arm.series,
            "dose": arm.dose,
            "measures": measured[a],
            "ended": float(np.mean([row["responses"][a]["finish_reason"] == "eos" for row in rows])),
        }
        for name, other in [("against_sober", [sober]), ("against_psychedelic", drugged)]:
            if other and other[0] != a:
                entry[name] = texts.compare_responses(measured[a], measured[other[0]], draws, seed) | {
                    "length_matched": texts.compare_responses(
                        measured[a]["length_matched"], measured[other[0]]["length_matched"], draws, seed
                    )
                }
        found.append(entry)
    return found


def perplexities(responses: Sequence[dict], prompts: Sequence[str], draws: int, seed: int) -> dict:
    """exp(mean loss of a response token), prompt excluded: under the model as drugged as it wrote, and sober.

    Before the sampler's effects and at temperature 1, so a colder sampler lowers both by choosing likelier tokens.
    Intervals by bootstrap over prompts of the ratio of summed loss and number of tokens.
    """
    ids = list(dict.fromkeys(prompts))
    member = np.array([[prompt == i for prompt in prompts] for i in ids], float)  # [prompts, responses]
    tokens = member @ np.array([r["tokens"] for r in responses], float)

    def measured(key: str) -> tuple[float, list[float]]:
        loss = member @ np.array([r[key] for r in responses])
        samples = stats.bootstrap(lambda w: np.exp(w @ loss / (w @ tokens)), len(ids), draws, seed)
        low, high = stats.percentile_interval(samples)
        return float(np.exp(loss.sum() / tokens.sum())), [float(low), float(high)]

    drugged, sober = measured("nll"), measured("sober_nll")
    return {
        "perplexity": drugged[0],
        "perplexity_interval": drugged[1],
        "perplexity_sober": sober[0],
        "perplexity_sober_interval": sober[1],
    }


# --- Base against instruct --------------------------------------------------------------------------------------------


def compare_models(
    study: Study, conditions: Sequence[Condition], answers: Answers, measured: battery.Battery
) -> list[dict]:
    """The first model's arms next to the second one's `none`: how far apart answers and profiles are, and if equal.

    Distances are means over questions of total variation (0 to 1) and Jensen-Shannon divergence (0 to ln 2 nats)
    between the two distributions over the letters. Equality is tested with the margin that was fixed beforehand; for
    entropy the margin is that share of its range, ln 4.
    """
    draws, seed = study.settings.bootstrap_draws, study.settings.seed
    strata = [q.subject for q in study.questions]
    arms = study.examinees[0].arms
    other = next((k for k, c in enumerate(conditions) if c.model == 1 and c.arm.label == NONE), None)
    if other is None:
        return []
    found = []
    for k, arm in enumerate(arms):
        if arm.series not in (NONE, main_series(arms)):
            continue
        p, q = answers.probs[k], answers.probs[other]
        middle = (p + q) / 2
        apart = {
            "total_variation": np.abs(p - q).sum(-1) / 2,
            "jensen_shannon": (rel_entr(p, middle) + rel_entr(q, middle)).sum(-1) / 2,
            "same_answer": (p.argmax(-1) == q.argmax(-1)).astype(float),
        }
        found.append({
            "left": conditions[k].label,
            "right": conditions[other].label,
            "dose": arm.dose,
            "profile": {name: equality(measured, name, k, other, study.settings.margin) for name in EQUIVALENCE},
            "distance": {
                name: {"mean": x.mean(), "interval": [float(v) for v in stats.mean_interval(x, draws, seed, strata)]}
                for name, x in apart.items()
            },
        })  # fmt: skip
    return found


def change(measured: battery.Battery, name: str, k: int, other: int) -> tuple[np.ndarray, float, tuple[float, float]]:
    """Condition `k` less another one: bootstrap draws [R], the difference, and what may be its bias."""
    estimates, samples, bias = measured.of(name)
    bounds = (-float(bias[other]), float(bias[k]))
    return samples[:, k] - samples[:, other], float(estimates[k] - estimates[other]), bounds


def difference(measured: battery.Battery, name: str, k: int, other: int) -> dict:
    """Condition `k` less another one, with its 95% interval."""
    draws, estimate, bounds = change(measured, name, k, other)
    return {"difference": estimate, "interval": list(stats.bounded_bias_interval(draws, estimate, bounds))}


def equality(measured: battery.Battery, name: str, k: int, other: int, margin: float) -> dict:
    """Condition `k` less another one: the difference, its 95% interval, and whether it is smaller than the margin.

    Where none of the N questions differs, the bootstrap has no width and knows nothing of those that were not asked:
    up to 1 - 0.05^(1/N) of them may differ, by the whole range (the binomial's one-sided bound of 95%, about 3 / N).
    """
    draws, estimate, bounds = change(measured, name, k, other)
    unit = np.log(4) if name == "entropy" else 1.0
    values = measured.questions.get(name)
    if values is not None and np.allclose(values[k], values[other], rtol=0, atol=ROUNDING):
        unseen = float(unit * (1 - 0.05 ** (1 / values.shape[1])))
        bounds = (-unseen, unseen)
    return {
        "difference": estimate,
        "interval": list(stats.bounded_bias_interval(draws, estimate, bounds)),
        **paired.equivalent(draws, float(margin * unit), estimate, bounds),
    }
