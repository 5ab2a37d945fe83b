"""The plan of the experiment: what the settings ask for, checked, loaded and cut into batches before any compute."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import nmjax
from experiments import needs
from experiments.calibration import arms as conditions
from experiments.calibration.arms import NONE, Arm
from experiments.calibration.asking import Examinee, common_beginning, encode_prompts, room_for_prefaces
from experiments.calibration.writing import Style, Writer, encode_ood
from models import checkpoint
from nmjax.data.letters import letters_of
from nmjax.data.ood import OodPrompt, load_prompts
from nmjax.data.questions import Pool, Question, read_pool, sample_by_subject, split_by_length
from nmjax.lm import LanguageModel
from nmjax.metrics import stats
from nmjax.report import results

NAME = "calibration_under_influence"
Examples = Mapping[str, tuple[Question, ...]]
BUNDLED, BUNDLED_INSTRUCT = "checkpoints/tiny", "checkpoints/tiny_instruct"
PSYCHEDELIC = "lsd"  # written under, beside the arms: the claim is that it loses less than a stimulant


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags say; see `define_flags`."""

    model: str = BUNDLED
    compare_model: str | None = None
    dtype: str | None = None
    packs: Sequence[str] = (NONE, "cocaine_10", "cocaine_50", "cocaine_100")
    intensities: Sequence[str] | None = None
    arms: Sequence[str] | None = None
    arms_of: str = "cocaine"
    doses: Sequence[str] = ("0", "0.1", "0.5", "1")
    questions: str = "bundled"
    max_questions: int = 100
    subjects: Sequence[str] | None = None
    num_fewshot: int = 0
    chat_template: bool = False
    letters: str = "auto"
    gradient_questions: int = 64
    ood: bool = True
    ood_prompts: str | None = None
    ood_per_category: int = 34
    ood_seeds: int = 2
    ood_tokens: int = 64
    ood_temperature: float = 0.7
    margin: float = 0.05
    seed: int = 0
    batch_size: int = 32
    bootstrap_draws: int = stats.DRAWS
    output_dir: str = f"results/{NAME}"
    resume: bool = True
    build_missing: bool = True


@dataclasses.dataclass(frozen=True)
class Task:
    """The unit of resume: one batch of one model."""

    kind: str  # "ask", "slopes" or "write"
    model: int
    items: list[int]
    width: int


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that decides the numbers, ready to run."""

    settings: Settings
    names: list[str]  # of the models
    hashes: list[str]
    questions: list[Question]
    left_out: dict[str, int]  # questions longer than a context, by subject
    examinees: list[Examinee]
    writers: list[Writer]  # one a model, or none
    ood_left_out: list[str]
    provided: list[dict]
    description: dict
    tasks: list[Task]

    def work(self, task: Task) -> list[dict]:
        """The records of a batch."""
        if task.kind == "ask":
            return self.examinees[task.model].ask(task.items, task.width)
        if task.kind == "slopes":
            return self.examinees[task.model].slopes(task.items, task.width)
        return self.writers[task.model].write(task.items, task.width)


def make_arms(settings: Settings) -> list[Arm]:
    """The conditions that the settings ask for. Raises ValueError for bad ones."""
    if settings.arms is None:
        return conditions.from_packs(settings.packs, settings.intensities)
    if settings.intensities is not None:
        raise ValueError("--intensities belong to --packs; wanted --doses with --arms")
    return conditions.from_causes(settings.arms, settings.arms_of, settings.doses)


def main_series(arms: Sequence[Arm]) -> str | None:
    """The series that the predictions are about: the one with most doses; the whole pack where causes are apart, and
    the psychedelic last."""
    counts: dict[str, int] = {}
    for arm in arms:
        if arm.series != NONE:
            counts[arm.series] = counts.get(arm.series, 0) + 1
    return max(counts, key=lambda name: (counts[name], name == "full", name != PSYCHEDELIC), default=None)


def arms_that_write(arms: Sequence[Arm]) -> list[Arm]:
    """Who writes: the sober model, the main series, the placebo at its largest dose, and the psychedelic."""
    chosen = [arm for arm in arms if arm.series == main_series(arms)]
    placebos = [arm for arm in arms if arm.series == "placebo"]
    if placebos and placebos[-1] not in chosen:
        chosen.append(max(placebos, key=lambda arm: arm.dose))
    wanted = [*conditions.from_packs([NONE], None), *chosen, *conditions.from_packs([PSYCHEDELIC], None)]
    return list({arm.label: arm for arm in wanted}.values())


def with_placebos(arms: Sequence[Arm], lm: nmjax.LanguageModel, seed: int) -> list[Arm]:
    """The arms with `placebo` made for this model."""
    made = []
    for arm in arms:
        if arm.series == "placebo":
            base = conditions.matched_placebo(arm.base, lm, seed)
            arm = dataclasses.replace(arm, base=base, pack=base.at(arm.dose))
        made.append(arm)
    return made


def compared(settings: Settings) -> list[str]:
    """The checkpoints: the model, and the one it is compared with, if any."""
    other = settings.compare_model
    if other is None and settings.model == BUNDLED:
        other = BUNDLED_INSTRUCT
    if other is None or other == "none":
        return [settings.model]
    if other == settings.model:
        raise ValueError(f"--compare_model={other} is --model; wanted another checkpoint, or none")
    return [settings.model, other]


def prepare(settings: Settings) -> Study:
    """Everything that bad input can spoil, before any question is asked: ValueError or OSError."""
    arms = make_arms(settings)
    if not 0 < settings.margin < 1:
        raise ValueError(f"--margin={settings.margin}; wanted a number above 0 and below 1")
    if not 0 < settings.ood_temperature < float("inf"):
        raise ValueError(f"--ood_temperature={settings.ood_temperature}; wanted a number above 0")
    writing = arms_that_write(arms) if settings.ood else []
    prompts = load_prompts(settings.ood_prompts, settings.ood_per_category) if settings.ood else []
    checkpoints = compared(settings)
    folders = [checkpoint.find(name) for name in checkpoints]
    pool = read_pool(settings.questions, settings.seed, settings.subjects, at_least=settings.max_questions or None)
    examples = worked_examples(pool, settings.num_fewshot)

    lms = [checkpoint.load(folder, dtype=settings.dtype) for folder in folders]
    names = [folder.name for folder in folders]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    for lm, name in zip(lms, checkpoints, strict=True):
        if lm.tokenizer is None:
            raise ValueError(f"{name} has no tokenizer; wanted one, questions are text")
    letters = [letters_of(lm, settings.chat_template, settings.letters) for lm in lms]
    kept, left_out = questions_that_fit(settings, lms, arms, pool, examples)
    questions = sample_by_subject(kept, settings.max_questions or None, settings.seed)
    if len(questions) < 2:
        raise ValueError(f"there is {len(questions)} question; intervals need at least 2")
    provided = [needs.provide(lm, [arm.pack for arm in [*arms, *writing]], settings.build_missing) for lm in lms]

    examinees = []
    for name, lm, form in zip(names, lms, letters, strict=True):
        ids = encode_prompts(lm, questions, examples, settings.chat_template)
        examinee = Examinee(
            name=name,
            lm=lm,
            arms=with_placebos(arms, lm, settings.seed),
            letters=form,
            questions=questions,
            prompts=ids,
            shared=shared_beginnings(lm, questions, ids, examples, settings.chat_template),
            batch_size=settings.batch_size,
            seed=settings.seed,
            differentiated=settings.gradient_questions,
        )
        examinees.append(examinee)
    writers, ood_left_out = make_writers(settings, lms, writing, prompts) if settings.ood else ([], [])
    hashes = [results.path_hash(folder) for folder in folders]
    return Study(
        settings=settings,
        names=names,
        hashes=hashes,
        questions=questions,
        left_out=left_out,
        examinees=examinees,
        writers=writers,
        ood_left_out=ood_left_out,
        provided=provided,
        description=_description(settings, hashes, provided, questions, examples, examinees, writers),
        tasks=_tasks(examinees, writers),
    )


def worked_examples(pool: Pool, count: int) -> dict[str, tuple[Question, ...]]:
    """`count` examples of every subject of the pool; {} for none. Raises ValueError for a subject that has fewer."""
    if count == 0:
        return {}
    for subject in sorted({q.subject for q in pool.questions}):
        if len(pool.examples.get(subject, ())) < count:
            raise ValueError(
                f"--num_fewshot={count}: --questions={pool.source} has {len(pool.examples.get(subject, ()))} examples "
                f"(dev) of {subject}; wanted that many"
            )
    return {subject: shown[:count] for subject, shown in pool.examples.items()}


def questions_that_fit(
    settings: Settings, lms: Sequence[LanguageModel], arms: Sequence[Arm], pool: Pool, examples: Examples
) -> tuple[list[Question], dict[str, int]]:
    """Those that every model's context holds with the arms' hidden texts, and by subject how many are too long."""
    kept, left_out = pool.questions, Counter[str]()
    for lm in lms:
        limit = lm.config.max_positions - room_for_prefaces(lm, arms)
        lengths = [len(ids) for ids in encode_prompts(lm, kept, examples, settings.chat_template)]
        kept, dropped = split_by_length(kept, lengths, limit, settings.subjects)
        left_out.update(dropped)
    return kept, dict(sorted(left_out.items()))


def make_writers(
    settings: Settings, lms: Sequence[LanguageModel], arms: Sequence[Arm], prompts: Sequence[OodPrompt]
) -> tuple[list[Writer], list[str]]:
    """A writer a model, on the prompts that fit every model's context with the response, and who doesn't."""
    style = Style(settings.ood_tokens, settings.ood_temperature, settings.ood_seeds)
    encoded = [encode_ood(lm, prompts, settings.chat_template) for lm in lms]
    limits = [lm.config.max_positions - room_for_prefaces(lm, arms) - style.tokens for lm in lms]
    fits = [all(len(ids[i]) <= n for ids, n in zip(encoded, limits, strict=True)) for i in range(len(prompts))]
    if sum(fits) < 2:
        raise ValueError(
            f"--ood_tokens={style.tokens}: so {sum(fits)} of {len(prompts)} prompts fit the context; wanted 2"
        )
    kept = list(itertools.compress(prompts, fits))
    writers = [
        Writer(lm, with_placebos(arms, lm, settings.seed), kept, list(itertools.compress(ids, fits)), style,
               settings.batch_size, settings.seed)
        for lm, ids in zip(lms, encoded, strict=True)
    ]  # fmt: skip
    return writers, [prompt.id for prompt, fit in zip(prompts, fits, strict=True) if not fit]


def shared_beginnings(
    lm: LanguageModel, questions: Sequence[Question], ids: Sequence[list[int]], examples: Examples, chat: bool
) -> dict[str, list[int]]:
    """By subject, the tokens that its prompts begin with: its worked examples, and the chat header before them."""
    found = {}
    for subject in sorted(examples) if examples else []:
        mine = [row for question, row in zip(questions, ids, strict=True) if question.subject == subject]
        if mine:
            # Were there only one question, all of it would be what they share.
            other = Question("?", ("1", "2", "3", "4"), 0, subject, "other")
            rows = [*mine, *encode_prompts(lm, [other], examples, chat)]
            found[subject] = mine[0][: common_beginning(rows)]
    return found


def _tasks(examinees: Sequence[Examinee], writers: Sequence[Writer]) -> list[Task]:
    tasks = []
    for m, examinee in enumerate(examinees):
        tasks += [Task("ask", m, batch, width) for batch, width in examinee.batches]
        tasks += [Task("slopes", m, batch, width) for batch, width in examinee.slope_batches]
        if writers:
            tasks += [Task("write", m, batch, width) for batch, width in writers[m].batches]
    return tasks


def _description(settings, hashes, provided, questions, examples, examinees, writers) -> dict:
    """The plan as JSON: a log with another description belongs to another run."""

    def arms(runner):
        return [[arm.label, arm.pack.content_hash()] for arm in runner.arms]

    return {
        "experiment": NAME,
        "models": hashes,
        "dtype": settings.dtype,
        "arms": [arms(examinee) for examinee in examinees],
        "provided": provided,
        "questions": results.content_hash(questions),
        "num_questions": len(questions),
        "examples": results.content_hash(examples),
        "num_fewshot": settings.num_fewshot,
        "chat_template": settings.chat_template,
        "letters": [dataclasses.asdict(examinee.letters) for examinee in examinees],
        "gradient_questions": settings.gradient_questions,
        "writing": [
            {
                "arms": arms(writer),
                "prompts": results.content_hash(writer.prompts),
                "style": dataclasses.asdict(writer.style),
            }
            for writer in writers
        ],
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "versions": results.versions(),
    }
