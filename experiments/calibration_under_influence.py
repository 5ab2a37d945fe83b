"""Calibration under the influence: what does a dose do to a model's accuracy, its confidence, and their agreement?

Method. The same four-choice questions go to the model once for every pack; all packs are rows of one compiled program.
A pack's answer is the distribution over the four letters after all its effects, the sampler's included (a colder
sampler is part of a pack), and beside it the distribution before the sampler's effects, which is what the network alone
says. For each: accuracy, confidence, Brier scores and NLL with bootstrap intervals over questions, stratified by
subject; ECE and MCE with their distribution under perfect calibration and debiased values; every pack against the
baseline within the same bootstrap draws.

    python -m experiments.calibration_under_influence --packs=none,cocaine_10,cocaine_50,cocaine_100
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

import nmjax
from models import checkpoint
from nmjax import flags as nm_flags
from nmjax import paths
from nmjax.data.questions import LETTERS, Question, format_mmlu, load_questions
from nmjax.metrics import battery, stats
from nmjax.report import calibration as report
from nmjax.report import page, results
from nmjax.report.tables import Table, number

NAME = "calibration_under_influence"
CHOICES = tuple(f" {letter}" for letter in LETTERS)
FIELDS = ("probs", "logprobs", "sober_logprobs", "removed")  # what is kept of a question's ChoiceScores

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "checkpoints/tiny", "Checkpoint: a folder, or a hub id.")
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Convert the weights; default: as they are stored.")
flags.DEFINE_list("packs", "none,cocaine_10,cocaine_50,cocaine_100", "Packs by name or path of a JSON file.")
flags.DEFINE_list("intensities", None, "Doses, one a pack; default 1.0 each.")
flags.DEFINE_string("questions", "bundled", "'bundled', a .jsonl or .csv file, or a folder of CSV files as of MMLU.")
flags.DEFINE_integer(
    "max_questions",
    1000,
    "At most so many questions, equally many a subject; 0 takes all. At 1000 accuracy is known to +-0.03 and a perfectly "
    "calibrated model shows an ECE of about 0.02; at 100 it is +-0.10 and 0.08, more than most doses do.",
    lower_bound=0,
)
flags.DEFINE_list("subjects", None, "Only these subjects.")
flags.DEFINE_integer("seed", 0, "Of the choice of questions, the bootstrap, and packs that draw noise.", lower_bound=0)
flags.DEFINE_integer("batch_size", 32, "Questions a batch; a batch has this many rows for every pack.", lower_bound=1)
flags.DEFINE_integer("bootstrap_draws", stats.DRAWS, "Draws of the bootstrap and of the consistency bands.", lower_bound=100)
flags.DEFINE_string("output_dir", f"results/{NAME}", "Folder for the results.")
flags.DEFINE_bool("resume", True, "Go on with a run of the same plan that was killed; --noresume starts anew.")


# --- The plan ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Arm:
    """A condition: a pack at a dose."""

    label: str  # unique: the pack's name, with the dose where it is not 1
    pack: nmjax.Intervention  # at its dose
    intensity: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked of whom, in fixed batches; everything that decides the numbers is in `describe()`."""

    arms: list[Arm]
    questions: list[Question]
    batch_size: int
    seed: int
    model: str
    model_hash: str
    dtype: str | None

    @property
    def batches(self) -> list[range]:
        """Indices of the questions of each batch; the last one may be short (it is run padded to full size)."""
        n = len(self.questions)
        return [range(k, min(k + self.batch_size, n)) for k in range(0, n, self.batch_size)]

    @property
    def baseline(self) -> int:
        """The arm that the others are compared with: `none` where present, else the first."""
        labels = [arm.label for arm in self.arms]
        return labels.index("none") if "none" in labels else 0

    def describe(self) -> dict:
        """The plan as JSON: a log with another description belongs to another run."""
        return {
            "experiment": NAME,
            "model": self.model_hash,
            "dtype": self.dtype,
            "packs": [[arm.label, arm.pack.content_hash()] for arm in self.arms],
            "questions": results.content_hash(self.questions),
            "num_questions": len(self.questions),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "versions": results.versions(),
        }


def make_arms(packs: Sequence[str], intensities: Sequence[str] | None) -> list[Arm]:
    """Load the packs at their doses. Raises ValueError for unknown or repeated packs, bad doses or a wrong count."""
    if not packs:
        raise ValueError("--packs is empty; wanted at least one pack")
    if intensities is not None and len(intensities) != len(packs):
        raise ValueError(
            f"--intensities has {len(intensities)} values ({', '.join(intensities)}) for {len(packs)} packs "
            f"({', '.join(packs)}); wanted one a pack"
        )
    arms = []
    for name, dose in zip(packs, intensities or ["1"] * len(packs), strict=True):
        try:
            intensity = float(dose)
        except ValueError:
            intensity = math.nan
        if not math.isfinite(intensity):
            raise ValueError(f"--intensities: {dose!r} for pack {name}; wanted a finite number")
        pack = nmjax.load_pack(name).at(intensity)
        label = pack.name if intensity == 1 else f"{pack.name}@{intensity:g}"
        if label in [arm.label for arm in arms]:
            raise ValueError(f"--packs holds {label} twice")
        arms.append(Arm(label, pack, intensity))
    return arms


def make_plan() -> tuple[Plan, pathlib.Path]:
    """The plan that the flags ask for, and the model's folder. Raises ValueError or OSError for bad input."""
    arms = make_arms(FLAGS.packs, FLAGS.intensities)
    questions = load_questions(FLAGS.questions, FLAGS.max_questions or None, FLAGS.seed, FLAGS.subjects)
    if len(questions) < 2:
        raise ValueError(f"there is {len(questions)} question; intervals need at least 2")
    folder = checkpoint.find(FLAGS.model)
    plan = Plan(
        arms=arms,
        questions=questions,
        batch_size=min(FLAGS.batch_size, len(questions)),
        seed=FLAGS.seed,
        model=FLAGS.model,
        model_hash=results.path_hash(folder),
        dtype=FLAGS.dtype,
    )
    return plan, folder


# --- Asking -----------------------------------------------------------------------------------------------------------


Scorer = Callable[[list[str], list[int]], Any]
"""(prompts [Q], question numbers [Q]) -> ChoiceScores of Q x P rows, question by question, packs within."""


def make_scorer(lm: nmjax.LanguageModel, plan: Plan) -> Scorer:
    """Scores a batch of prompts under every arm in one call of one program: the width is that of the longest prompt.

    Raises ValueError if a question does not fit the model's context.
    """
    if lm.tokenizer is None:
        raise ValueError(f"--model={plan.model} has no tokenizer; wanted one, questions are text")
    longest, question = max(
        ((len(lm.encode(format_mmlu(q) + choice)), q) for q in plan.questions for choice in CHOICES), key=lambda x: x[0]
    )
    if longest > lm.config.max_positions:
        raise ValueError(
            f"question {question.id!r} has {longest} tokens with its answer; the context of --model={plan.model} is "
            f"{lm.config.max_positions}: wanted shorter questions, see --subjects"
        )
    packs = [arm.pack for arm in plan.arms]

    def score(prompts: list[str], numbers: list[int]) -> nmjax.ChoiceScores:
        rows = [prompt for prompt in prompts for _ in packs]
        # One noise stream a question, the same for all packs, wherever the batches are cut.
        row_ids = [number for number in numbers for _ in packs]
        return nmjax.score_choices(
            lm, rows, list(CHOICES), packs=packs * len(prompts), width=longest - 1, seed=plan.seed, row_ids=row_ids
        )

    return score


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the arms answered, P arms, N questions, four choices; float64."""

    probs: np.ndarray  # [P, N, 4], after all effects, renormalised over the choices
    sober_probs: np.ndarray  # [P, N, 4], before the sampler's effects
    mass: np.ndarray  # [P, N], what the letters hold of the vocabulary's probability, after all effects
    sober_mass: np.ndarray  # [P, N]
    removed: np.ndarray  # [P, N], share of the letters' mass that truncation removed
    seconds: list[float]  # of each batch; the first one compiles


def ask(plan: Plan, score: Scorer, log: results.JsonlLog) -> Answers:
    """Score the batches that `log` does not have yet, with a progress bar, and collect the answers of all."""
    arms = len(plan.arms)
    already = sum(len(plan.batches[k]) for k in log.done)
    with tqdm(total=len(plan.questions), initial=already, unit="question", desc=f"{arms} packs", file=sys.stderr) as bar:
        for k, batch in enumerate(plan.batches):
            if k in log.done:
                continue
            start = time.perf_counter()
            padded = [*batch, *[batch[-1]] * (plan.batch_size - len(batch))]
            scores = score([format_mmlu(plan.questions[i]) for i in padded], padded)
            # One float64 list a question and field, [P, ...]; exact, JSON keeps all digits.
            kept = {name: np.asarray(getattr(scores, name), dtype=np.float64) for name in FIELDS}
            kept = {name: value.reshape(plan.batch_size, arms, *value.shape[1:]) for name, value in kept.items()}
            items = [
                {"id": plan.questions[i].id, "answer": plan.questions[i].answer, **{f: kept[f][j] for f in FIELDS}}
                for j, i in enumerate(batch)
            ]
            log.append(k, {"seconds": time.perf_counter() - start, "items": items})
            bar.update(len(batch))
    records = [log.done[k] for k in range(len(plan.batches))]
    column = {
        name: np.moveaxis(np.asarray([item[name] for record in records for item in record["items"]]), 1, 0)
        for name in FIELDS
    }
    sober = np.exp(column["sober_logprobs"])
    return Answers(
        probs=_normalised(column["probs"]),
        sober_probs=_normalised(np.exp(column["sober_logprobs"] - column["sober_logprobs"].max(-1, keepdims=True))),
        mass=np.exp(column["logprobs"]).sum(-1),
        sober_mass=sober.sum(-1),
        removed=column["removed"],
        seconds=[record["seconds"] for record in records],
    )


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum(-1, keepdims=True)


# --- Analysis ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Findings:
    """The batteries after all effects and before the sampler's, and the letters' mass by arm."""

    after: battery.Battery
    before: battery.Battery
    mass: list[dict]


def analyse(plan: Plan, answers: Answers, draws: int) -> Findings:
    """Calibration of every arm and its difference from the baseline, both after and before the sampler's effects."""
    labels = np.array([q.answer for q in plan.questions])
    strata = [q.subject for q in plan.questions]
    options = {"baseline": plan.baseline, "draws": draws, "seed": plan.seed, "strata": strata}
    mass = []
    for k in range(len(plan.arms)):
        entry: dict = {}
        for name, values in (("after_all_effects", answers.mass[k]), ("before_sampler", answers.sober_mass[k])):
            low, high = stats.mean_interval(values, draws, plan.seed, strata)
            entry[name] = {"mean": values.mean(), "interval": [low, high], "min": values.min()}
        entry["removed_by_truncation"] = answers.removed[k].mean()
        mass.append(entry)
    return Findings(
        after=battery.measure(answers.probs, labels, **options),
        before=battery.measure(answers.sober_probs, labels, **options),
        mass=mass,
    )


# --- Writing ----------------------------------------------------------------------------------------------------------


def result_json(plan: Plan, findings: Findings, identity: dict, seconds: Sequence[float]) -> dict:
    """The full result; keys that the reference study has, too, carry its names."""
    rows = len(plan.questions) * len(plan.arms)
    steady = seconds[1:] if len(seconds) > 1 else seconds
    return {
        "identity": identity,
        "plan": plan.describe(),
        "num_questions": len(plan.questions),
        "questions_by_subject": dict(sorted(Counter(q.subject for q in plan.questions).items())),
        "baseline": plan.arms[plan.baseline].label,
        "results": [
            {
                "model_name": plan.model,
                "pack_name": arm.label,
                "intensity": arm.intensity,
                "notes": arm.pack.notes(),
                "calibration": findings.after.profiles[k],
                "calibration_before_sampler": findings.before.profiles[k],
                "difference_from_baseline": findings.after.differences[k],
                "difference_from_baseline_before_sampler": findings.before.differences[k],
                "letter_mass": findings.mass[k],
            }
            for k, arm in enumerate(plan.arms)
        ],
        "timing": {
            "scoring_seconds": sum(seconds),
            "first_batch_seconds": seconds[0],
            "rows": rows,
            "rows_per_second": plan.batch_size * len(plan.arms) / float(np.median(steady)),
        },
    }


def mass_table(plan: Plan, findings: Findings) -> Table:
    """How much of the vocabulary's probability the four letters hold."""
    rows = [
        [
            arm.label,
            number(entry["after_all_effects"]["mean"], 4),
            number(entry["after_all_effects"]["min"], 4),
            number(entry["before_sampler"]["mean"], 4),
            number(entry["before_sampler"]["min"], 4),
        ]
        for arm, entry in zip(plan.arms, findings.mass, strict=True)
    ]
    headers = ["pack", "mean", "least", "mean before sampler", "least before sampler"]
    return Table(headers, rows, "Probability mass of the four letters before renormalising")


def headline(plan: Plan, findings: Findings, draws: int) -> str:
    """The summary that the terminal shows."""
    labels = [arm.label for arm in plan.arms]
    subjects = len({q.subject for q in plan.questions})
    parts = [
        f"Calibration under the influence: {plan.model}, {len(plan.questions)} questions of {subjects} subjects, "
        f"{draws} bootstrap draws.\nProbabilities over the four letters after all effects, the sampler's included.",
        report.means_table(findings.after, labels, ("accuracy", "confidence", "brier_score", "nll")).text(),
        report.binned_table(findings.after, labels).text(),
    ]
    if len(labels) > 1:
        keys = ("accuracy", "confidence", "ece", "brier_score")
        parts.append(report.differences_table(findings.after, labels, labels[plan.baseline], keys).text())
    return "\n\n".join(parts) + "\n"


def tables(plan: Plan, findings: Findings) -> dict[str, list[Table]]:
    """All tables, by section."""
    labels = [arm.label for arm in plan.arms]
    sections = {}
    for title, measured in (("After all effects", findings.after), ("Before the sampler's effects", findings.before)):
        sections[title] = [report.means_table(measured, labels), report.binned_table(measured, labels)]
        if len(labels) > 1:
            sections[title].append(report.differences_table(measured, labels, labels[plan.baseline]))
    sections["Probability of the letters"] = [mass_table(plan, findings)]
    return sections


def html_page(plan: Plan, findings: Findings, identity: dict, reliability: bytes, metrics: bytes) -> str:
    """The page: headline numbers, diagrams, tables, and who made them."""
    labels, sections = [arm.label for arm in plan.arms], tables(plan, findings)
    first, last = findings.after.profiles[plan.baseline], findings.after.profiles[-1]
    null = last["under_perfect_calibration"]["ece"]

    def change(key: str) -> str:
        return f"{number(first[key])} \u2192 {number(last[key])}"

    span = f"{labels[plan.baseline]} \u2192 {labels[-1]}"
    blocks: list[page.Block] = [
        page.Cards(
            [
                ("Questions", str(len(plan.questions)), f"{len({q.subject for q in plan.questions})} subjects, same for all"),
                ("Accuracy", change("accuracy"), span),
                ("Mean confidence", change("confidence"), span),
                ("ECE", change("ece"), f"{span}; p {report.p_text(null['p_value'])} against perfect calibration"),
            ]
        ),
        page.Heading("Reliability"),
        page.Picture(
            reliability,
            "Accuracy against confidence in ten bins, after all effects. Points below the diagonal: more confident than "
            "right. A point outside the shaded band is miscalibration that chance does not explain.",
            f"Reliability diagrams of {', '.join(labels)}",
        ),
        page.Heading("Measures by pack"),
        page.Picture(
            metrics,
            "Points with 95% bootstrap intervals; for ECE and MCE the shaded band under perfect calibration in their "
            f"place. The vertical line is {labels[0]}.",
            "Every measure by pack",
        ),
    ]
    for title, section in sections.items():
        blocks += [page.Heading(title), *section]
    blocks += [
        page.Heading("How to read this"),
        page.Paragraph(
            "Confidence is the largest of the four letters' probabilities, renormalised over the letters. ECE is the "
            "count-weighted mean distance of confidence and accuracy over ten equal bins, MCE the largest one. Both are "
            "above 0 even for a perfectly calibrated model, hence their distribution under perfect calibration (simulated "
            "from the confidences) and debiased values (Kumar et al. 2019) in place of bootstrap intervals."
        ),
        page.Paragraph(
            "Differences are paired: all packs answered the same questions, and each bootstrap draw compares them on the "
            "same resample. Intervals of differences of ECE and MCE allow for the unknown bias of both sides and are wide. "
            "They are not corrected for the number of comparisons."
        ),
        page.Heading("Identity"),
        page.Details("Configuration, seeds, versions, hashes", identity),
    ]
    subtitle = f"{plan.model} on {len(plan.questions)} four-choice questions under {', '.join(labels)}. {identity['timestamp']}"
    return page.render_page("Calibration under the influence", subtitle, blocks)


def write(plan: Plan, findings: Findings, identity: dict, seconds: Sequence[float], folder: pathlib.Path, stamp: str):
    """Write JSON, summary, figures and page; returns their paths. The JSON comes last: it stands for a whole set."""
    labels = [arm.label for arm in plan.arms]
    reliability, metrics = report.reliability_png(findings.after, labels), report.metrics_png(findings.after, labels)
    text = headline(plan, findings, identity["config"]["bootstrap_draws"])
    for title, section in tables(plan, findings).items():
        text += f"\n\n== {title} ==\n\n" + "\n\n".join(table.text() for table in section) + "\n"
    return [
        results.write_atomic(folder / f"calibration_summary_{stamp}.txt", text),
        results.write_atomic(folder / f"reliability_{stamp}.png", reliability),
        results.write_atomic(folder / f"metrics_{stamp}.png", metrics),
        results.write_atomic(
            folder / f"calibration_experiment_{stamp}.html", html_page(plan, findings, identity, reliability, metrics)
        ),
        results.write_json(
            folder / f"calibration_experiment_{stamp}.json", result_json(plan, findings, identity, seconds)
        ),
    ]


def main(_: Sequence[str]) -> None:
    paths.enable_compilation_cache()
    try:
        plan, model_folder = make_plan()
        score = make_scorer(checkpoint.load(model_folder, dtype=FLAGS.dtype), plan)
    except (ValueError, OSError) as error:
        sys.exit(f"{NAME}: {error}")
    folder = pathlib.Path(FLAGS.output_dir)
    log = results.JsonlLog(
        folder / f"calibration_records_{results.content_hash(plan.describe())[:12]}.partial.jsonl",
        plan.describe(),
        resume=FLAGS.resume,
    )
    with log:
        if log.done:
            print(f"Going on after {len(log.done)} of {len(plan.batches)} batches of a run that did not finish.")
        answers = ask(plan, score, log)
        findings = analyse(plan, answers, FLAGS.bootstrap_draws)
        identity = results.run_identity(
            NAME,
            {name: FLAGS[name].value for name in sorted(f.name for f in FLAGS.get_key_flags_for_module(sys.modules[__name__]))},
            {"questions": FLAGS.seed, "bootstrap": FLAGS.seed, "noise": FLAGS.seed},
            {"model": plan.model_hash, **{f"pack {arm.label}": arm.pack.content_hash() for arm in plan.arms}},
        )
        stamp = results.timestamp()
        written = write(plan, findings, identity, answers.seconds, folder, stamp)
        written.append(log.finish(folder / f"calibration_records_{stamp}.jsonl"))
    print("\n" + headline(plan, findings, FLAGS.bootstrap_draws))
    print("Written:\n" + "\n".join(f"  {path}" for path in written))


if __name__ == "__main__":
    nm_flags.run(main)
