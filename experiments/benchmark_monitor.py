"""Pass 1 of the threshold calibration against a loop without a cache, and how long pass 2 takes.

    python -m experiments.benchmark_monitor --output_dir=results/benchmark

The loop is how the published monitor does it: for every new token the whole prefix is run anew and the signals are
taken from it. It is given what it can have: one compiled program at a fixed padded width, so nothing is compiled twice,
and the same batch. Both write the same tokens (no text ends early) and must give the same signals. The cases take
turns, so that a slow minute of the machine hits all of them; figures are medians.
"""

from __future__ import annotations

import datetime
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

import nmjax
from models import checkpoint
from nmjax import flags as nm_flags
from nmjax.forward_pass import gather
from nmjax.interventions.sites import ACTIVATIONS
from nmjax.metrics import detection
from nmjax.metrics.conformal import conformal_threshold
from nmjax.metrics.crossfit import choose_direction
from nmjax.monitor import NEVER
from nmjax.report.results import run_identity, write_json
from nmjax.report.tables import Table, number
from nmjax.rows import make_rows, row_keys
from nmjax.signals import SIGNALS, make_monitor

FLAGS = flags.FLAGS
NONE = nmjax.Intervention()


def define_flags() -> None:
    flags.DEFINE_string("model", "checkpoints/tiny", "Checkpoint: a folder, or a hub id.")
    flags.DEFINE_list("batches", ["1", "16"], "Batch sizes.")
    flags.DEFINE_integer("prompt_tokens", 256, "Length of every prompt; HaluEval's have 100 to 1,500.", lower_bound=1)
    flags.DEFINE_integer("max_tokens", 20, "Tokens generated a sample.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Turns of every case.", lower_bound=1)
    flags.DEFINE_integer("scores", 5000, "Scores of pass 2.", lower_bound=10)
    flags.DEFINE_integer("thresholds", 99, "Thresholds of pass 2.", lower_bound=1)
    flags.DEFINE_integer("draws", 2000, "Bootstrap draws of pass 2.", lower_bound=100)
    flags.DEFINE_integer("seed", 0, "Of prompts, scores and bootstrap.")
    flags.DEFINE_string("output_dir", "results/benchmark", "Folder of the JSON result.")


def watched(lm: nmjax.LanguageModel, prompts: list[list[int]], new: int) -> np.ndarray:
    """Every signal of every step [F, B, T], as pass 1 takes them."""
    monitor = make_monitor(len(prompts), pfail_cutoff=NEVER)
    out = nmjax.generate(
        lm, prompts, NONE, max_new_tokens=new, eos_token_id=[], width=len(prompts[0]), batch_size=len(prompts),
        monitor=monitor,
    )  # fmt: skip
    assert out.seen is not None
    return np.stack([[seen[name] for seen in out.seen] for name in SIGNALS])


@functools.partial(jax.jit, static_argnums=0)
def _step(module, params, rows, monitor, seen, step):
    """A pass over whole prefixes: the next tokens [B] and what the monitor has seen by now."""
    hidden, sown = module.apply(
        {"params": params}, rows.tokens, ctx=rows.context(), effects=rows.effects, mutable=[ACTIVATIONS]
    )
    logits = module.apply({"params": params}, hidden[:, -1:], method="unembed")[:, 0]
    states = gather(sown[ACTIVATIONS], "resid_post")[:, :, -1]
    token = logits.argmax(-1).astype(jnp.int32)
    seen, _ = monitor.observe(seen, logits, states, token, step, jnp.ones(len(token), bool))
    return token, seen


def recomputed(lm: nmjax.LanguageModel, prompts: list[list[int]], new: int) -> np.ndarray:
    """The same [F, B, T] without a cache."""
    width, count = len(prompts[0]) + new, len(prompts)
    monitor = make_monitor(count, pfail_cutoff=NEVER)
    seen = monitor.start(count, new, lm.config.embed)
    texts, keys = [list(ids) for ids in prompts], row_keys(0, None, count)
    for step in range(new):
        rows = make_rows(lm, texts, [(0, 0)] * count, [NONE] * count, width, keys)
        token, seen = _step(lm.module, lm.params, rows, monitor, seen, np.int32(step))
        for ids, chosen in zip(texts, np.asarray(token), strict=True):
            ids.append(int(chosen))
    return np.stack([np.asarray(seen.signals[name]) for name in SIGNALS])


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def second_pass(rng: np.random.Generator) -> None:
    """One signal: its direction, all thresholds, the best and the conformal one, and intervals at the best."""
    labels = np.arange(FLAGS.scores) % 2
    scores, groups = rng.normal(size=FLAGS.scores) + 0.5 * labels, np.arange(FLAGS.scores) // 2
    direction = choose_direction(scores, labels, groups)["direction"]
    taus = np.quantile(scores, np.linspace(0.01, 0.99, FLAGS.thresholds))
    detection.at_thresholds(scores, labels, taus, direction)
    best = detection.best_threshold(scores, labels, direction, taus=taus)
    conformal_threshold(scores, labels, direction)
    detection.detection_report(scores, labels, groups, best["tau"], direction, draws=FLAGS.draws)


def main(_) -> None:
    lm = checkpoint.load(checkpoint.find(FLAGS.model))
    rng = np.random.default_rng(FLAGS.seed)
    rows, found = [], []
    for batch in map(int, FLAGS.batches):
        prompts = rng.integers(3, lm.config.vocab, (batch, FLAGS.prompt_tokens)).tolist()
        cases: dict[str, Callable] = {
            "pass 1": lambda prompts=prompts: watched(lm, prompts, FLAGS.max_tokens),
            "loop without cache": lambda prompts=prompts: recomputed(lm, prompts, FLAGS.max_tokens),
        }
        first = {name: timed(run) for name, run in cases.items()}
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in tqdm(range(FLAGS.repeats), desc=f"batch {batch}: turns"):
            for name, run in cases.items():
                seconds[name].append(timed(run)[0])
        apart = float(np.abs(first["pass 1"][1] - first["loop without cache"][1]).max())
        for name in cases:
            median = float(np.median(seconds[name]))
            entry: dict[str, Any] = {
                "batch": batch,
                "case": name,
                "seconds": seconds[name],
                "seconds_a_sample": median / batch,
                "first_seconds": first[name][0],
                "pass_1_is_times_as_fast": median / float(np.median(seconds["pass 1"])),
                "largest_difference": apart,
            }
            found.append(entry)
            rows.append([str(batch), name, number(1000 * entry["seconds_a_sample"], 1),
                         number(entry["pass_1_is_times_as_fast"], 1), f"{apart:.1e}"])  # fmt: skip
    headers = ["batch", "case", "ms a sample", "pass 1 is times as fast", "largest difference"]
    caption = f"{FLAGS.model}: prompts of {FLAGS.prompt_tokens} tokens, {FLAGS.max_tokens} new ones"
    print(Table(headers, rows, caption).text())
    second = [timed(lambda: second_pass(np.random.default_rng(FLAGS.seed)))[0] for _ in range(3)]
    print(
        f"Pass 2 of one signal, {FLAGS.scores} scores, {FLAGS.thresholds} thresholds, {FLAGS.draws} bootstrap draws: "
        f"{np.median(second):.2f} s"
    )
    names = ("model", "batches", "prompt_tokens", "max_tokens", "repeats", "scores", "thresholds", "draws")
    config = {name: FLAGS[name].value for name in names}
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d_%H%M%S")
    identity = run_identity("benchmark_monitor", config, {"prompts": FLAGS.seed}, {})
    path = pathlib.Path(FLAGS.output_dir) / f"benchmark_monitor_{stamp}.json"
    write_json(path, {"run": identity, "results": found, "pass_2_seconds": second})
    print(f"wrote {path}")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
