"""The calibration sweep against a straightforward loop over transformers, and what its conditions cost.

    python -m experiments.benchmark_calibration --output_dir=results/benchmark

Sixteen doses of sharper attention and a colder sampler on the same questions, without and with five worked examples;
beside them the five causes of a pack at three doses each and `none`. The loop is how the published studies do it: one
dose at a time, a hook that scales the queries, batches of eight, whole prompts. Ours runs all doses in one batch, and
what the questions of a subject share once a dose. The cases take turns, so that a slow minute of the machine hits all
of them; figures are medians. The loop needs torch (`make parity-setup`).
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.util
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

import nmjax
from experiments.calibration.arms import CAUSES, Arm, from_causes
from experiments.calibration.asking import Examinee, encode_prompts
from experiments.calibration.study import shared_beginnings, with_placebos
from models import checkpoint
from nmjax import flags as nm_flags
from nmjax.data.letters import letters_of
from nmjax.data.questions import read_pool, sample_by_subject
from nmjax.report.results import run_identity, write_json
from nmjax.report.tables import Table, number

FLAGS = flags.FLAGS
FACTOR, HEAT = 1.9, 0.7  # of queries and temperature at dose 1
LOOP_BATCH = 8
WITHOUT, LOOP = "nmjax, as many rows without", "transformers, one dose at a time"


def define_flags() -> None:
    flags.DEFINE_string("model", "checkpoints/tiny", "Checkpoint: a folder, or a hub id.")
    flags.DEFINE_string("questions", "bundled", "As in calibration_under_influence.")
    flags.DEFINE_integer("max_questions", 200, "Questions, equally many a subject.", lower_bound=2)
    flags.DEFINE_integer("conditions", 16, "Doses in one sweep.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 32, "Questions a batch of ours.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Turns of every case.", lower_bound=1)
    flags.DEFINE_bool("torch", True, "Measure the loop over transformers, if torch is installed.")
    flags.DEFINE_integer("seed", 0, "Of the questions.")
    flags.DEFINE_string("output_dir", "results/benchmark", "Folder of the JSON result.")


@dataclasses.dataclass
class Case:
    """Something to time: `run` gives the letters' probabilities [P, N, 4]."""

    name: str
    run: Callable[[], np.ndarray]
    first: float = 0.0  # seconds of the first run, compilation included
    seconds: list[float] = dataclasses.field(default_factory=list)

    def time(self) -> tuple[float, np.ndarray]:
        start = time.perf_counter()
        probs = self.run()
        return time.perf_counter() - start, probs


def sweep(heads: Sequence[Sequence[int]], count: int) -> list[Arm]:
    """`count` doses from 0 to 1.5 of sharper induction heads and a colder sampler."""
    layers = sorted({layer for layer, _ in heads})
    parts = [nmjax.scale_qk(FACTOR, layers=[at], heads=[head for layer, head in heads if layer == at]) for at in layers]
    base = nmjax.compose(*parts, nmjax.temperature(HEAT), name="sweep")
    doses = np.linspace(0, 1.5, count)
    return [Arm(f"{dose:.2f}", base.at(float(dose)), "sweep", float(dose), base) for dose in doses]


def answers(examinee: Examinee) -> np.ndarray:
    """Letter probabilities [P, N, 4] under all arms."""
    found = np.zeros((len(examinee.questions), len(examinee.arms), 4))
    examinee.forget()
    for batch, width in examinee.batches:
        for i, record in zip(batch, examinee.ask(batch, width), strict=True):
            found[i] = record["probs"]
    return found.swapaxes(0, 1)


def loop(folder: pathlib.Path, examinee: Examinee, heads: Sequence[Sequence[int]]) -> Callable[[], np.ndarray]:
    """The sweep with transformers: a hook on every layer's query projection, one dose at a time, whole prompts."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    size = examinee.lm.config.head_dim
    letters = torch.tensor(examinee.letters.ids)
    order = sorted(range(len(examinee.prompts)), key=lambda i: len(examinee.prompts[i]))
    batches = [order[k : k + LOOP_BATCH] for k in range(0, len(order), LOOP_BATCH)]

    def scaler(layer, factor):
        own = [head for at, head in heads if at == layer]

        def hook(_, __, queries):
            queries = queries.clone()
            for head in own:
                queries[..., head * size : (head + 1) * size] *= factor
            return queries

        return hook

    def run():
        found = np.zeros((len(examinee.arms), len(order), 4))
        for p, arm in enumerate(examinee.arms):
            factor = 1 + arm.dose * (FACTOR - 1)
            handles = [
                model.model.layers[layer].self_attn.q_proj.register_forward_hook(scaler(layer, factor))
                for layer in sorted({layer for layer, _ in heads})
            ]
            for batch in batches:
                rows = [examinee.prompts[i] for i in batch]
                width = max(map(len, rows))
                tokens = torch.zeros((len(rows), width), dtype=torch.long)
                mask = torch.zeros((len(rows), width), dtype=torch.long)
                for j, row in enumerate(rows):
                    tokens[j, width - len(row) :] = torch.tensor(row)
                    mask[j, width - len(row) :] = 1
                with torch.no_grad():
                    logits = model(tokens, attention_mask=mask, logits_to_keep=1).logits[:, -1]
                heat = max(0.05, 1 + arm.dose * (HEAT - 1))
                found[p, batch] = torch.softmax(logits[:, letters].double() / heat, dim=-1).numpy()
            for handle in handles:
                handle.remove()
        return found

    return run


def main(_) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # compile time is one of the figures
    from nmjax.induction import induction_heads

    folder = checkpoint.find(FLAGS.model)
    lm = checkpoint.load(folder)
    pool = read_pool(FLAGS.questions, FLAGS.seed, at_least=FLAGS.max_questions)
    questions = sample_by_subject(pool.questions, FLAGS.max_questions, FLAGS.seed)
    heads = np.argwhere(induction_heads(lm, on_empty="middle")).tolist()
    arms = sweep(heads, FLAGS.conditions)
    causes = with_placebos(from_causes(CAUSES, "cocaine", ("0.1", "0.5", "1")), lm, FLAGS.seed)
    sober = [Arm(f"none {k}", nmjax.Intervention(), "none", 0.0, nmjax.Intervention()) for k in range(len(arms))]
    with_torch = FLAGS.torch and importlib.util.find_spec("torch") is not None
    rows, found = [], []
    for shots in (0, 5):
        examples = {subject: shown[:shots] for subject, shown in pool.examples.items()} if shots else {}
        ids = encode_prompts(lm, questions, examples, chat=False)
        shared = shared_beginnings(lm, questions, ids, examples, chat=False)
        letters = letters_of(lm, chat=False)

        ours, plain, apart = (
            Examinee(FLAGS.model, lm, conditions, letters, questions, ids, shared, FLAGS.batch_size, FLAGS.seed)
            for conditions in (arms, sober, causes)
        )
        cases = [
            Case("nmjax, sweep", functools.partial(answers, ours)),
            Case(WITHOUT, functools.partial(answers, plain)),
            Case("nmjax, causes of a pack", functools.partial(answers, apart)),
        ]
        if with_torch:
            cases.append(Case(LOOP, loop(folder, ours, heads)))
        probs = {}
        for case in tqdm(cases, desc=f"{shots} shots: first run"):
            case.first, probs[case.name] = case.time()
        for _ in tqdm(range(FLAGS.repeats), desc=f"{shots} shots: turns"):
            for case in cases:
                case.seconds.append(case.time()[0])
        medians = {case.name: float(np.median(case.seconds)) for case in cases}
        ours_seconds = medians[cases[0].name]
        for case in cases:
            entry: dict[str, Any] = {
                "shots": shots,
                "case": case.name,
                "conditions": len(probs[case.name]),
                "questions": len(questions),
                "seconds": case.seconds,
                "median_seconds": medians[case.name],
                "compile_seconds": max(case.first - medians[case.name], 0.0),
                "sweep_is_times_as_fast": medians[case.name] / ours_seconds,
                "cost_of_a_row_without": medians[case.name] * len(sober) / (medians[WITHOUT] * len(probs[case.name])),
            }
            if case.name == LOOP:  # the same conditions another way
                entry["largest_difference"] = float(np.abs(probs[case.name] - probs[cases[0].name]).max())
            found.append(entry)
            same = f"{entry['largest_difference']:.1e}" if "largest_difference" in entry else "-"
            numbers = [entry[key] for key in ("sweep_is_times_as_fast", "cost_of_a_row_without")]
            rows.append([str(shots), case.name, number(entry["median_seconds"], 2), number(entry["compile_seconds"], 1),
                         *(number(x, 2) for x in numbers), same])  # fmt: skip
    headers = ["shots", "case", "seconds", "compile s", "sweep's speed / its", "cost / without", "largest difference"]
    print(Table(headers, rows, f"{FLAGS.conditions} conditions x {len(questions)} questions").text())
    if FLAGS.torch and not with_torch:
        print("torch is not installed, so there is no loop to compare with: make parity-setup")
    names = ("model", "questions", "max_questions", "conditions", "batch_size", "repeats")
    config = {name: FLAGS[name].value for name in names}
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d_%H%M%S")
    identity = run_identity("benchmark_calibration", config, {"questions": FLAGS.seed}, {})
    path = pathlib.Path(FLAGS.output_dir) / f"benchmark_calibration_{stamp}.json"
    write_json(path, {"run": identity, "results": found})
    print(f"wrote {path}")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
