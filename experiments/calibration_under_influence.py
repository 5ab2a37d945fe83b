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
from scipy.special import softmax
from tqdm import tqdm

import nmjax
from experiments import needs
from models import checkpoint
from nmjax import flags as nm_flags
from nmjax import paths
from nmjax.data.questions import LETTERS, Question, format_mmlu, load_questions
from nmjax.metrics import battery, stats
from nmjax.report import results
from nmjax.report.calibration import CalibrationReport, metrics_png, reliability_png

NAME = "calibration_under_influence"
CHOICES = tuple(f" {letter}" for letter in LETTERS)
FIELDS = ("probs", "logprobs", "sober_logprobs", "removed")  # what is kept of a question's ChoiceScores


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags say; see `define_flags`."""

    model: str = "checkpoints/tiny"
    dtype: str | None = None
    packs: Sequence[str] = ("none", "cocaine_10", "cocaine_50", "cocaine_100")
    intensities: Sequence[str] | None = None
    questions: str = "bundled"
    max_questions: int = 1000
    subjects: Sequence[str] | None = None
    seed: int = 0
    batch_size: int = 32
    bootstrap_draws: int = stats.DRAWS
    output_dir: str = f"results/{NAME}"
    resume: bool = True
    build_missing: bool = True


def define_flags() -> None:
    d = Settings()
    flags.DEFINE_string("model", d.model, "Checkpoint: a folder, or a hub id.")
    flags.DEFINE_enum("dtype", d.dtype, ["float32", "bfloat16", "float16"], "Converts the weights; default: as stored.")
    flags.DEFINE_list("packs", list(d.packs), "Packs, by name or by the path of a JSON file.")
    flags.DEFINE_list("intensities", d.intensities, "Doses, one a pack; default 1.0 each.")
    flags.DEFINE_string("questions", d.questions, "'bundled', a .jsonl or .csv file, or a folder of CSVs like MMLU's.")
    flags.DEFINE_integer(
        "max_questions",
        d.max_questions,
        "At most so many questions, equally many a subject; 0 takes all. At 1000 accuracy is known to +-0.03, and a "
        "perfectly calibrated model shows an ECE of about 0.02; at 100 it is +-0.10 and 0.08, more than most doses do.",
        lower_bound=0,
    )
    flags.DEFINE_list("subjects", d.subjects, "Only these subjects.")
    flags.DEFINE_integer("seed", d.seed, "Of the questions, the bootstrap and packs that draw noise.", lower_bound=0)
    flags.DEFINE_integer("batch_size", d.batch_size, "Questions a batch; each is a row for every pack.", lower_bound=1)
    flags.DEFINE_integer("bootstrap_draws", d.bootstrap_draws, "Of bootstrap and consistency bands.", lower_bound=100)
    flags.DEFINE_string("output_dir", d.output_dir, "Folder of the results.")
    flags.DEFINE_bool("resume", d.resume, "Go on with a killed run of the same plan; --noresume starts anew.")
    flags.DEFINE_bool("build_missing", d.build_missing, "Build steering vectors that packs need and the model lacks.")


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
    provided: dict = dataclasses.field(default_factory=dict)  # steering vectors and induction heads that packs use

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
            "provided": self.provided,
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
    arms: list[Arm] = []
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


def make_plan(settings: Settings) -> tuple[Plan, pathlib.Path]:
    """The plan that the settings ask for, and the model's folder. Raises ValueError or OSError for bad input."""
    arms = make_arms(settings.packs, settings.intensities)
    questions = load_questions(settings.questions, settings.max_questions or None, settings.seed, settings.subjects)
    if len(questions) < 2:
        raise ValueError(f"there is {len(questions)} question; intervals need at least 2")
    folder = checkpoint.find(settings.model)
    plan = Plan(
        arms=arms,
        questions=questions,
        batch_size=min(settings.batch_size, len(questions)),
        seed=settings.seed,
        model=settings.model,
        model_hash=results.path_hash(folder),
        dtype=settings.dtype,
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
    with tqdm(total=len(plan.questions), initial=already, unit="question", desc=f"{arms} packs") as bar:
        for k, batch in enumerate(plan.batches):
            if k in log.done:
                continue
            start = time.perf_counter()
            padded = [*batch, *[batch[-1]] * (plan.batch_size - len(batch))]
            scores = score([format_mmlu(plan.questions[i]) for i in padded], padded)
            fields = {name: np.asarray(getattr(scores, name)) for name in FIELDS}
            kept = {name: x.reshape(plan.batch_size, arms, *x.shape[1:]) for name, x in fields.items()}
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
    return Answers(
        probs=column["probs"] / column["probs"].sum(-1, keepdims=True),  # float32 sums are 1 to 1e-7 only
        sober_probs=softmax(column["sober_logprobs"], axis=-1),
        mass=np.exp(column["logprobs"]).sum(-1),
        sober_mass=np.exp(column["sober_logprobs"]).sum(-1),
        removed=column["removed"],
        seconds=[record["seconds"] for record in records],
    )


# --- Analysis ---------------------------------------------------------------------------------------------------------


def analyse(plan: Plan, answers: Answers, draws: int) -> CalibrationReport:
    """Calibration of every arm and its difference from the baseline, both after and before the sampler's effects."""
    labels = np.array([q.answer for q in plan.questions])
    strata = [q.subject for q in plan.questions]
    options: dict = {"baseline": plan.baseline, "draws": draws, "seed": plan.seed, "strata": strata}
    mass = []
    for k in range(len(plan.arms)):
        entry: dict = {}
        for name, values in (("after_all_effects", answers.mass[k]), ("before_sampler", answers.sober_mass[k])):
            low, high = stats.mean_interval(values, draws, plan.seed, strata)
            entry[name] = {"mean": values.mean(), "interval": [low, high], "min": values.min()}
        mass.append(entry | {"removed_by_truncation": answers.removed[k].mean()})
    return CalibrationReport(
        model=plan.model,
        labels=[arm.label for arm in plan.arms],
        baseline=plan.baseline,
        num_questions=len(plan.questions),
        num_subjects=len(set(strata)),
        draws=draws,
        after=battery.measure(answers.probs, labels, **options),
        before=battery.measure(answers.sober_probs, labels, **options),
        mass=mass,
    )


# --- Writing ----------------------------------------------------------------------------------------------------------


def result_json(plan: Plan, report: CalibrationReport, identity: dict, seconds: Sequence[float]) -> dict:
    """The full result; keys that the reference study has, too, carry its names."""
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
                "calibration": report.after.profiles[k],
                "calibration_before_sampler": report.before.profiles[k],
                "difference_from_baseline": report.after.differences[k],
                "difference_from_baseline_before_sampler": report.before.differences[k],
                "letter_mass": report.mass[k],
            }
            for k, arm in enumerate(plan.arms)
        ],
        "timing": {
            "scoring_seconds": sum(seconds),
            "first_batch_seconds": seconds[0],
            "rows": len(plan.questions) * len(plan.arms),
            "rows_per_second": plan.batch_size * len(plan.arms) / float(np.median(steady)),
        },
    }


def write(
    plan: Plan, report: CalibrationReport, settings: Settings, seconds: Sequence[float], stamp: str
) -> list[pathlib.Path]:
    """Write summary, figures, page and JSON; returns their paths. The JSON comes last: it stands for a whole set."""
    folder = pathlib.Path(settings.output_dir)
    identity = results.run_identity(
        NAME,
        dataclasses.asdict(settings),
        {"questions": plan.seed, "bootstrap": plan.seed, "noise": plan.seed},
        {"model": plan.model_hash, **{f"pack {arm.label}": arm.pack.content_hash() for arm in plan.arms}},
    )
    reliability, metrics = reliability_png(report.after, report.labels), metrics_png(report.after, report.labels)
    page, result = report.html(identity, reliability, metrics), result_json(plan, report, identity, seconds)
    return [
        results.write_atomic(folder / f"calibration_summary_{stamp}.txt", report.text()),
        results.write_atomic(folder / f"reliability_{stamp}.png", reliability),
        results.write_atomic(folder / f"metrics_{stamp}.png", metrics),
        results.write_atomic(folder / f"calibration_experiment_{stamp}.html", page),
        results.write_json(folder / f"calibration_experiment_{stamp}.json", result),
    ]


def prepare(settings: Settings) -> tuple[Plan, Scorer, results.JsonlLog]:
    """Everything that bad input can spoil, before any question is asked: ValueError or OSError."""
    plan, folder = make_plan(settings)
    lm = checkpoint.load(folder, dtype=settings.dtype)
    provided = needs.provide(lm, [arm.pack for arm in plan.arms], settings.build_missing)
    plan = dataclasses.replace(plan, provided=provided)
    score = make_scorer(lm, plan)
    description = plan.describe()
    partial = f"calibration_records_{results.content_hash(description)[:12]}.partial.jsonl"
    return plan, score, results.JsonlLog(pathlib.Path(settings.output_dir) / partial, description, settings.resume)


def run(settings: Settings, plan: Plan, score: Scorer, log: results.JsonlLog) -> list[pathlib.Path]:
    """Ask, analyse, write; returns the paths written."""
    with log:
        if log.done:
            print(f"Going on after {len(log.done)} of {len(plan.batches)} batches of a run that did not finish.")
        answers = ask(plan, score, log)
        report = analyse(plan, answers, settings.bootstrap_draws)
        stamp = results.timestamp()
        written = write(plan, report, settings, answers.seconds, stamp)
        written.append(log.finish(log.path.with_name(f"calibration_records_{stamp}.jsonl")))
    print("\n" + report.headline())
    print("Written:\n" + "\n".join(f"  {path}" for path in written))
    return written


def main(_: Sequence[str]) -> None:
    paths.enable_compilation_cache()
    settings = nm_flags.filled(Settings)
    try:
        prepared = prepare(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"{NAME}: {error}")
    run(settings, *prepared)


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
