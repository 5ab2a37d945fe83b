"""Calibration under the influence: does a dose make a model more confident without making it more right?

Method. The same four-choice questions go to the model once for every arm (a pack at a dose); all arms are rows of one
compiled program. An arm's answer is the distribution over the four letters after all its effects, the sampler's
included, and beside it the distribution before the sampler's, which is what the network alone says. Off the training
distribution the arms write, and the sober model reads what they wrote. A second, instruction-tuned model may take the
same battery. Everything is compared on the same items, with intervals, paired tests and a verdict for each of the
predictions that were made beforehand (`experiments.calibration.predictions`).

    python -m experiments.calibration_under_influence --packs=none,cocaine_10,cocaine_50,cocaine_100
    python -m experiments.calibration_under_influence --arms=temperature,qk,steering,full,placebo --doses=0.1,0.5,1
    python -m experiments.calibration_under_influence --questions=cais/mmlu --num_fewshot=5 --model=<folder or hub id>
"""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Sequence

from absl import flags
from tqdm import tqdm

from experiments.calibration.analysis import Findings, analyse
from experiments.calibration.arms import CAUSES
from experiments.calibration.output import write
from experiments.calibration.report import Report
from experiments.calibration.study import BUNDLED, BUNDLED_INSTRUCT, NAME, Settings, Study, prepare
from models import checkpoint
from nmjax import flags as nm_flags
from nmjax import paths
from nmjax.report import results


def define_flags() -> None:
    d = Settings()
    flags.DEFINE_string("model", d.model, "Checkpoint: a folder, or a hub id.")
    flags.DEFINE_string(
        "compare_model",
        d.compare_model,
        "A second checkpoint that runs the same battery: --model's instruction-tuned variant. "
        f"Default: {BUNDLED_INSTRUCT} beside {BUNDLED}, none beside any other; 'none' for none.",
    )
    flags.DEFINE_enum("dtype", d.dtype, list(checkpoint.DTYPES), "Converts the weights; default: as stored.")
    flags.DEFINE_list("packs", list(d.packs), "Packs, by name or by the path of a JSON file.")
    flags.DEFINE_list("intensities", d.intensities, "Doses, one a pack; default 1.0 each.")
    flags.DEFINE_list("arms", d.arms, f"In place of --packs: causes, some of {', '.join(CAUSES)}, each at all --doses.")
    flags.DEFINE_string("arms_of", d.arms_of, "The pack that --arms takes apart.")
    flags.DEFINE_list("doses", list(d.doses), "Doses of --arms; 0 is the arm `none`, which always runs.")
    flags.DEFINE_string(
        "questions",
        d.questions,
        "'bundled', a .jsonl or .csv file, a folder of CSVs like MMLU's, or a hub data set like cais/mmlu.",
    )
    flags.DEFINE_integer(
        "max_questions",
        d.max_questions,
        "At most so many questions, equally many a subject; 0 takes all. At 1000 accuracy is known to +-0.03, and a "
        "perfectly calibrated model shows an ECE of about 0.02; at 100 it is +-0.10 and 0.08, more than most doses do.",
        lower_bound=0,
    )
    flags.DEFINE_list("subjects", d.subjects, "Only these subjects.")
    flags.DEFINE_integer("num_fewshot", d.num_fewshot, "Worked examples in front.", lower_bound=0, upper_bound=5)
    flags.DEFINE_bool("chat_template", d.chat_template, "Ask in the tokenizer's chat template.")
    flags.DEFINE_enum(
        "letters",
        d.letters,
        ["auto", "space", "plain"],
        "Answer tokens with or without the space before; auto: with, behind 'Answer:'; without, behind a chat header.",
    )
    flags.DEFINE_integer(
        "gradient_questions", d.gradient_questions, "Questions for the derivative by dose; 0: none.", lower_bound=0
    )
    flags.DEFINE_bool("ood", d.ood, "Let the arms write off the training distribution, too.")
    flags.DEFINE_string("ood_prompts", d.ood_prompts, "JSONL file of prompts; default: the bundled ones.")
    flags.DEFINE_integer("ood_per_category", d.ood_per_category, "Prompts of each category.", lower_bound=1)
    flags.DEFINE_integer("ood_seeds", d.ood_seeds, "Responses to each prompt by each arm.", lower_bound=1)
    flags.DEFINE_integer("ood_tokens", d.ood_tokens, "Longest response.", lower_bound=2)
    flags.DEFINE_float("ood_temperature", d.ood_temperature, "Temperature of writing, times that of the pack.")
    flags.DEFINE_float(
        "margin",
        d.margin,
        "What counts as equal, fixed before the data are seen: differences below it, of shares and probabilities.",
    )
    flags.DEFINE_integer("seed", d.seed, "Of questions, bootstrap, writing and packs that draw noise.", lower_bound=0)
    flags.DEFINE_integer("batch_size", d.batch_size, "Questions a batch; each is a row for every arm.", lower_bound=1)
    flags.DEFINE_integer("bootstrap_draws", d.bootstrap_draws, "Of bootstrap and consistency bands.", lower_bound=100)
    flags.DEFINE_string("output_dir", d.output_dir, "Folder of the results.")
    flags.DEFINE_bool("resume", d.resume, "Go on with a killed run of the same plan; --noresume starts anew.")
    flags.DEFINE_bool("build_missing", d.build_missing, "Build steering vectors that packs need and the model lacks.")


def open_log(study: Study) -> results.JsonlLog:
    """The log of this plan in the output folder, with what an earlier run of it finished."""
    partial = f"calibration_records_{results.content_hash(study.description)[:12]}.partial.jsonl"
    return results.JsonlLog(pathlib.Path(study.settings.output_dir) / partial, study.description, study.settings.resume)


_DOING = {"ask": "questions", "slopes": "derivatives by dose", "write": "responses"}


def perform(study: Study, log: results.JsonlLog) -> None:
    """Do the tasks that `log` does not have yet, with a progress bar for each kind of each model."""
    for m, name in enumerate(study.names):
        for kind, what in _DOING.items():
            mine = [(k, task) for k, task in enumerate(study.tasks) if (task.model, task.kind) == (m, kind)]
            if not mine:
                continue
            runner = study.writers[m] if kind == "write" else study.examinees[m]
            already = sum(len(task.items) for k, task in mine if k in log.done)
            total = sum(len(task.items) for _, task in mine)
            with tqdm(
                total=total, initial=already, unit="item", desc=f"{name}: {what}, {len(runner.arms)} arms"
            ) as bar:
                for k, task in mine:
                    if k not in log.done:
                        start = time.perf_counter()
                        items = study.work(task)
                        log.append(k, {"seconds": time.perf_counter() - start, "items": items})
                        bar.update(len(task.items))


def records(study: Study, log: results.JsonlLog, kind: str, model: int) -> list[dict]:
    """Records of one kind of one model, in the order of their items."""
    found: dict[int, dict] = {}
    for k, task in enumerate(study.tasks):
        if (task.kind, task.model) == (kind, model):
            found.update(zip(task.items, log.done[k]["items"], strict=True))
    return [found[i] for i in sorted(found)]


def seconds(study: Study, log: results.JsonlLog, kind: str, model: int) -> list[float]:
    """Of each batch; the first one of a padded width compiles."""
    return [log.done[k]["seconds"] for k, task in enumerate(study.tasks) if (task.kind, task.model) == (kind, model)]


def find(study: Study, log: results.JsonlLog) -> Findings:
    """The analysis of a finished log."""
    models = range(len(study.names))
    return analyse(
        study,
        asked=[records(study, log, "ask", m) for m in models],
        slopes=[records(study, log, "slopes", m) for m in models],
        written=[
            [
                {"prompt": record["prompt"], "responses": by_arm}
                for record in records(study, log, "write", m)
                for by_arm in record["seeds"]
            ]
            for m in models
        ],
    )


def run(study: Study, log: results.JsonlLog) -> list[pathlib.Path]:
    """Ask, write, analyse, report; returns the paths written."""
    with log:
        if log.done:
            print(f"Going on after {len(log.done)} of {len(study.tasks)} batches of a run that did not finish.")
        if study.left_out:
            print(
                f"Left out as longer than the context: {sum(study.left_out.values())} questions, counted in the result."
            )
        perform(study, log)
        findings = find(study, log)
        stamp = results.timestamp()
        timing = {
            f"{study.names[m]}: {what}": seconds(study, log, kind, m)
            for m in range(len(study.names))
            for kind, what in _DOING.items()
            if seconds(study, log, kind, m)
        }
        written = write(study, findings, timing, stamp)
        written.append(log.finish(log.path.with_name(f"calibration_records_{stamp}.jsonl")))
    print("\n" + Report(study, findings).headline())
    print("Written:\n" + "\n".join(f"  {path}" for path in written))
    return written


def main(_: Sequence[str]) -> None:
    paths.enable_compilation_cache()
    settings = nm_flags.filled(Settings)
    try:
        study = prepare(settings)
        log = open_log(study)
    except (ValueError, OSError) as error:
        sys.exit(f"{NAME}: {error}")
    run(study, log)


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
