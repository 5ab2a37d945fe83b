"""Do measures of uncertainty tell a model's wrong answers from its right ones?

Method. The model answers questions whose answers are known, once greedily and several times at a temperature; the
greedy answer is right or wrong. Each measure (its probability, the entropy of samples and of their meanings, the
model's own verdict, see `nmjax.uncertainty`) is scored as a detector of wrong answers: AUROC and prediction-rejection
ratio with intervals, and the difference to the plain probability of the answer.

    python -m experiments.uncertainty
    python -m experiments.uncertainty --model=<folder or hub id> --questions=TruthfulQA.csv --max_new_tokens=32
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from tqdm import tqdm

import nmjax
from experiments import needs
from models import checkpoint
from nmjax import flags as nm_flags
from nmjax import paths
from nmjax.data.open_questions import FORM, OpenQuestion, read_open_questions
from nmjax.data.world import judgement_prompt
from nmjax.interventions.inputs import preface_ids
from nmjax.metrics import stats
from nmjax.report import results
from nmjax.report.uncertainty import UncertaintyPage, evaluate
from nmjax.rows import bucket
from nmjax.uncertainty import DETECTORS, SelfCheck, p_true, sample_uncertainty, self_certainty

NAME = "uncertainty"
EXAMPLES = 20  # questions shown on the page


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags say; see `define_flags`."""

    model: str = "checkpoints/tiny"
    dtype: str | None = None
    questions: str = "bundled"
    max_questions: int = 256
    form: str = FORM
    stop: str | None = None
    samples: int = 10
    max_new_tokens: int = 16
    temperature: float = 1.0
    pack: str = "none"
    dose: float = 1.0
    batch_size: int = 64
    bootstrap_draws: int = stats.DRAWS
    seed: int = 0
    output_dir: str = f"results/{NAME}"
    resume: bool = True


def define_flags() -> None:
    d = Settings()
    flags.DEFINE_string("model", d.model, "Checkpoint: a folder, or a hub id.")
    flags.DEFINE_enum("dtype", d.dtype, list(checkpoint.DTYPES), "Converts the weights; default: as stored.")
    flags.DEFINE_string(
        "questions",
        d.questions,
        "'bundled', a .jsonl file with question and answers (and wrong, a list, if known), or TruthfulQA's .csv file.",
    )
    flags.DEFINE_integer("max_questions", d.max_questions, "At most so many; 0 takes all.", lower_bound=0)
    flags.DEFINE_string("form", d.form, "The prompt for questions of a file; it holds {question}.")
    flags.DEFINE_string("stop", d.stop, "Ends an answer. Default: '.' for bundled questions, else the end of the line.")
    flags.DEFINE_integer("samples", d.samples, "Sampled answers a question.", lower_bound=2)
    flags.DEFINE_integer("max_new_tokens", d.max_new_tokens, "Longest answer.", lower_bound=1)
    flags.DEFINE_float("temperature", d.temperature, "Of sampling, times that of the pack.")
    flags.DEFINE_string("pack", d.pack, "Answer, and judge answers, under this pack: a name, or a JSON file.")
    flags.DEFINE_float("dose", d.dose, "Of the pack.")
    flags.DEFINE_integer("batch_size", d.batch_size, "Questions a batch, and rows at a time.", lower_bound=1)
    flags.DEFINE_integer("bootstrap_draws", d.bootstrap_draws, "Of the intervals.", lower_bound=100)
    flags.DEFINE_integer("seed", d.seed, "Of questions, samples and bootstrap.", lower_bound=0)
    flags.DEFINE_string("output_dir", d.output_dir, "Folder of the results.")
    flags.DEFINE_bool("resume", d.resume, "Go on with a killed run of the same plan; --noresume starts anew.")


def checks_of(source: str) -> dict[str, SelfCheck]:
    """How the model is asked for its verdict. One that was trained on the bundled world knows but one way to ask."""
    if source != "bundled":
        return {"p_true": SelfCheck()}

    def statement(prompt: str, answer: str, ideas: Sequence[str]) -> str:
        return judgement_prompt(f"{prompt} {answer}.")

    return {"p_true": SelfCheck(), "p_true_statement": SelfCheck(statement, (" yes", " no"))}


def perform(
    settings: Settings, lm: nmjax.LanguageModel, questions: Sequence[OpenQuestion], pack: nmjax.Intervention,
    log: results.JsonlLog,
) -> list[dict]:  # fmt: skip
    """Answers and measures, a dictionary a question: batches that `log` lacks are run, then the model's verdicts."""
    hidden = len(preface_ids(lm, pack.effects))
    width = bucket(max(len(lm.encode(question.prompt)) for question in questions) + hidden)
    stop = settings.stop or ("." if settings.questions == "bundled" else "\n")
    starts = range(0, len(questions), settings.batch_size)
    checks = checks_of(settings.questions)
    rows: list[dict] = []
    with tqdm(total=len(questions), unit="question", desc=f"{settings.samples} samples each") as bar:
        for k, start in enumerate(starts):
            part = range(start, min(start + settings.batch_size, len(questions)))
            if k not in log.done:
                answered = sample_uncertainty(
                    lm,
                    [questions[i].prompt for i in part],
                    samples=settings.samples,
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    packs=pack,
                    seed=settings.seed,
                    stop=stop,
                    check=None,
                    row_ids=list(part),
                    width=width,
                    batch_size=settings.batch_size,
                )
                log.append(k, answered)
            rows += log.done[k]
            bar.update(len(part))
    prompts, answers, ideas = ([row[name] for row in rows] for name in ("prompt", "answer", "samples"))
    for k, check in enumerate(checks.values(), start=len(starts)):
        if k not in log.done:
            size, seed = settings.batch_size, settings.seed
            log.append(k, p_true(lm, prompts, answers, ideas, check, pack, batch_size=size, seed=seed))
    return [
        {
            "id": question.id,
            "kind": question.kind,
            "right": question.accepts(row["answer"]),
            "answers": question.answers,
            **row,
            **{name: log.done[len(starts) + c][i] for c, name in enumerate(checks)},
            "first_certainty": self_certainty(row["mean_logprobs"][:1], lm.config.vocab),
            "answer_tokens": len(row["tokens"]),
        }
        for i, (question, row) in enumerate(zip(questions, rows, strict=True))
    ]


def run(settings: Settings, lm: nmjax.LanguageModel) -> list[pathlib.Path]:
    """Answer, measure, evaluate, report; returns the paths written. Raises ValueError for bad input."""
    questions = read_open_questions(settings.questions, settings.max_questions or None, settings.seed, settings.form)
    if len(questions) < 2:
        raise ValueError(f"there is {len(questions)} question; intervals need at least 2")
    pack = nmjax.load_pack(settings.pack).at(settings.dose)
    provided = needs.provide(lm, [pack], build_missing=True)
    config = dataclasses.asdict(settings)
    hashes = {"model": lm.fingerprint, "pack": pack.content_hash(), "questions": results.content_hash(questions)}
    free = ("model", "output_dir", "resume", "bootstrap_draws")  # what no batch depends on, or a hash says
    plan = {name: value for name, value in config.items() if name not in free}
    plan |= {"experiment": NAME, "hashes": hashes, "provided": provided, "versions": results.versions()}
    folder = pathlib.Path(settings.output_dir)
    partial = folder / f"uncertainty_records_{results.content_hash(plan)[:12]}.partial.jsonl"
    with results.JsonlLog(partial, plan, settings.resume) as log:
        if log.done:
            print(f"Going on after {len(log.done)} batches of a run that did not finish.")
        records = perform(settings, lm, questions, pack, log)
        right = [record["right"] for record in records]
        signs = DETECTORS | {"first_certainty": -1, "p_true_statement": -1, "answer_tokens": 1}
        uncertainty = {
            name: [sign * record[name] for record in records] for name, sign in signs.items() if name in records[0]
        }
        findings = evaluate(uncertainty, right, settings.bootstrap_draws, settings.seed)
        report = UncertaintyPage(
            model=settings.model if settings.pack == "none" else f"{settings.model} under {settings.pack}",
            source=settings.questions,
            samples=settings.samples,
            right=right,
            kinds=[record["kind"] for record in records],
            uncertainty=uncertainty,
            findings=findings,
            examples=[
                [r["prompt"], r["answer"], "yes" if r["right"] else "no", ", ".join(dict.fromkeys(r["samples"]))]
                for r in records[:EXAMPLES]
            ],
        )
        print("\n" + report.text())
        stamp, picture = results.timestamp(), report.figure()
        identity = results.run_identity(NAME, config, {"seed": settings.seed}, hashes)
        result = {
            "identity": identity,
            "plan": plan,
            "accuracy": sum(right) / len(right),
            "findings": findings,
            "signs": signs,
            "records": records,
        }
        written = [
            results.write_atomic(folder / f"uncertainty_summary_{stamp}.txt", report.text()),
            results.write_atomic(folder / f"uncertainty_{stamp}.png", picture),
            results.write_atomic(folder / f"uncertainty_{stamp}.html", report.html(identity, picture)),
            results.write_json(folder / f"uncertainty_{stamp}.json", result),
            log.finish(folder / f"uncertainty_records_{stamp}.jsonl"),
        ]
    print("Written:\n" + "\n".join(f"  {path}" for path in written))
    return written


def main(_: Sequence[str]) -> None:
    paths.enable_compilation_cache()
    settings = nm_flags.filled(Settings)
    try:
        run(settings, checkpoint.load(checkpoint.find(settings.model), dtype=settings.dtype))
    except (ValueError, OSError) as error:
        sys.exit(f"{NAME}: {error}")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
