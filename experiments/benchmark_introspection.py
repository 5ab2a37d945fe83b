"""What an example of introspection finetuning costs: our batched step against the published scheme in torch.

    python -m experiments.benchmark_introspection                # wants torch and peft: make parity-setup

The published scheme is `experiments.torch_introspection`: one example at a time, hooks, two passes with all logits,
eight examples a step. Ours is the step of `train`. Both go through the same examples from the same weights in float32;
before anything is timed they must agree in loss and gradient, and in the answers of an evaluation grid. The cases take
turns, so that a slow minute of the machine hits all of them; a figure is the median over the turns of the ratio of two
cases in the same turn. Compiling, and tokenising for ours, which does so once, are apart. Only ratios carry over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from safetensors.numpy import load_file
from tqdm import tqdm

import models
import nmjax
from models.checkpoint import find, save
from models.peft import WEIGHTS
from nmjax import flags as nm_flags
from nmjax.adapters import Adapter, stack_layers
from nmjax.data.introspection import read_lists
from nmjax.data.introspection_batches import Examples
from nmjax.data.introspection_chat import encode_all
from nmjax.data.introspection_records import MAGNITUDES, YES_NO, Record, layer_ranges, unit_vectors
from nmjax.data.introspection_split import SplitConfig, generate
from nmjax.report import results
from nmjax.report.tables import Table, number
from nmjax.training import lora
from nmjax.training.introspection import IntrospectionLoss, introspection_loss
from nmjax.training.loop import TrainConfig, init_state, make_optimizer, make_step

if TYPE_CHECKING:
    from experiments.torch_introspection import Study

ACCUMULATE = 8  # examples of a published step
TIMES = 5.0  # as fast as the published scheme that ours has to be
SAME = 1e-4  # of a loss, and of each leaf's largest gradient
RECIPE = TrainConfig(steps=1000, peak_lr=2e-4, weight_decay=0.01, b2=0.999)
NOTHING: dict[str, Any] = dict(kind="clean", answer=1, vector=None, layers=None, third=None, magnitude=None)
# The widths of a Qwen2.5 with its vocabulary, at a size that two processors train.
RANDOM = dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=151936, hidden_size=512, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=2, intermediate_size=2816, max_position_embeddings=1024,
    rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=True,
)  # fmt: skip


def define_flags() -> None:
    flags.DEFINE_list("models", ["checkpoints/tiny_instruct", "random"], "Checkpoints, or 'random': 8 layers, D 512.")
    flags.DEFINE_list("batches", ["16", "64"], "Batch sizes of ours; all divide --examples.")
    flags.DEFINE_integer("examples", 64, "That each case goes through in a turn.", lower_bound=ACCUMULATE)
    flags.DEFINE_list("torch_threads", sorted({"1", str(os.cpu_count())}), "That torch runs with; the faster counts.")
    flags.DEFINE_integer("lora_r", 16, "Rank of the adapter, on q, k, v and o.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Turns of every case.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of records, vectors and weights.", lower_bound=0)
    flags.DEFINE_string("output_dir", "results/benchmark", "Folder of the JSON result.")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model under an adapter that acts, and what it is trained and asked on."""

    lm: nmjax.LanguageModel
    examples: Examples
    grid: Sequence[Record]

    @property
    def adapter(self) -> Adapter:
        assert isinstance(self.lm.adapter, Adapter)
        return self.lm.adapter


@contextlib.contextmanager
def base_folder(model: str, seed: int) -> Iterator[pathlib.Path]:
    """The folder of a checkpoint, or of a random one that is removed again."""
    if model != "random":
        yield find(model)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_random(RANDOM, folder, seed)
        yield pathlib.Path(folder)


def save_random(hf: dict[str, Any], folder: str | pathlib.Path, seed: int) -> None:
    """Writes a random checkpoint of the sizes `hf`, without a tokenizer."""
    module = models.ScannedLlama(models.LlamaConfig.from_hf(hf))
    params = module.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    save(nmjax.LanguageModel(module, params), folder)


def make_setting(folder: pathlib.Path, n: int, r: int, seed: int) -> Setting:
    """n examples, half of them steered, and a grid of two vectors in all ranges and magnitudes with as many unsteered
    rows; the adapter's b is random, so that it acts. A model without a tokenizer gets that of the bundled one."""
    lm, lists = models.load(folder), read_lists("tiny")
    if lm.tokenizer is None:
        lm = dataclasses.replace(lm, tokenizer=models.load("checkpoints/tiny_instruct").tokenizer)
    vectors = unit_vectors(200, lm.config.embed, seed)
    config = SplitConfig(n=2 * n, seed=seed, layers=lm.config.layers, vectors=len(vectors), noise=0.0, systems=0.0)
    splits = generate(config, lists)
    records = splits["train"][:n]
    asked = [record for record in splits["test"] if record.kind == "clean"][0]
    cells: list[dict[str, Any]] = [
        {"kind": "steered", "vector": vector, "layers": layers, "magnitude": magnitude}
        for vector in (0, len(vectors) - 1)
        for layers in layer_ranges(lm.config.layers).values()
        for magnitude in MAGNITUDES
    ]
    grid = [dataclasses.replace(asked, id=str(k), **cell) for k, cell in enumerate(cells)]
    grid += [dataclasses.replace(record, **NOTHING) for record in records[: len(cells)]]
    adapter = lora.init(lm.module, lora.LoraConfig(r=r, dropout=0.0), jax.random.key(seed))
    rng = np.random.default_rng(seed)
    weights = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32) if path[-1].key == "b" else leaf,
        adapter.weights,
    )
    lm = lm.with_adapter(adapter.replace(weights=weights))
    return Setting(lm, Examples(records, encode_all(records, lm.tokenizer), vectors, lm.config.layers), grid)


def make_rival(setting: Setting, folder: pathlib.Path) -> Study:
    from experiments.torch_introspection import Study

    with tempfile.TemporaryDirectory() as adapter:
        models.save_adapter(setting.lm, setting.adapter, adapter)
        return Study(folder, adapter, setting.lm.tokenizer, setting.examples.vectors, YES_NO)


# --- Ours -------------------------------------------------------------------------------------------------------------


class Ours:
    """Training as `train` does it: with layers scanned, which saves memory, or unrolled, where no layer runs twice."""

    def __init__(self, setting: Setting, segments: int = 2, scanned: bool = True):
        lm, self.examples = setting.lm, setting.examples
        module, params, self.adapter = lm.module, lm.params, setting.adapter
        if scanned:
            module, params = models.ScannedLlama(lm.config), models.stack_layers(params)
            self.adapter = stack_layers(self.adapter, lm.config.layers)
        self.loss = introspection_loss(module, IntrospectionLoss(segments=segments))
        self.frozen = lora.frozen(params, self.adapter)
        optimizer = make_optimizer(RECIPE)
        self._step = jax.jit(make_step(self.loss, optimizer), donate_argnums=0)
        self.state = init_state(jax.tree.map(jnp.copy, self.adapter.weights), optimizer)

    def train(self, batch_size: int) -> None:
        """Once through all examples."""
        for start in range(0, len(self.examples.records), batch_size):
            batch = self.examples.batch(range(start, start + batch_size))
            self.state, _ = self._step(self.state, batch, self.frozen)
        jax.block_until_ready(self.state)

    def gradient(self, batch) -> tuple[float, Any]:
        """The loss of a batch, and its gradient in the adapter that training begins with."""
        value = jax.jit(jax.value_and_grad(lambda *a, frozen: self.loss(*a, frozen=frozen)[0]))
        loss, gradient = value(self.adapter.weights, batch, None, frozen=self.frozen)
        return float(loss), gradient


def evaluate(setting: Setting, batch_size: int) -> np.ndarray:
    """Log-probabilities [n, C] of the grid's answers, all records as rows of one batch."""
    lm, examples = setting.lm, setting.examples
    segments = encode_all(setting.grid, lm.tokenizer)

    def perturbation(record: Record, prefix: int) -> nmjax.Intervention | None:
        if record.layers is None or record.magnitude is None:
            return None
        vector = examples.vectors[record.vector]
        return nmjax.compose(nmjax.steer_span(vector, record.magnitude, range(*record.layers), (0, prefix)))

    packs = [perturbation(record, len(one.prefix)) for record, one in zip(setting.grid, segments, strict=True)]
    prompts = [list(one.prefix + one.question) for one in segments]
    choices = [[list(answer) for answer in one.answers] for one in segments]
    scores = nmjax.score_choices(lm, prompts, choices, packs, batch_size=batch_size, width=sum(examples.widths))
    return np.asarray(scores.logprobs)


# --- Both -------------------------------------------------------------------------------------------------------------


def disagreements(setting: Setting, study: Study, ours: Ours, batch_size: int = ACCUMULATE) -> dict[str, float]:
    """The largest differences: of the loss of the first examples, of its gradient as a share of each leaf's largest,
    and of the differences between log-probabilities of the grid's answers."""
    count = 2 * ACCUMULATE
    loss, gradient = ours.gradient(setting.examples.batch(range(count)))
    study.model.zero_grad(set_to_none=True)
    wanted = study.accumulate(setting.examples.records[:count])
    with tempfile.TemporaryDirectory() as folder:  # so the gradient gets the names and the layout that peft has
        models.save_adapter(setting.lm, ours.adapter.replace(weights=gradient), folder)
        seen = load_file(pathlib.Path(folder) / WEIGHTS)
    trained = study.trained
    if trained.keys() != seen.keys():
        raise ValueError(f"the adapter holds {sorted(seen)}, peft trains {sorted(trained)}; wanted the same")
    apart = 0.0
    for name, leaf in trained.items():
        theirs = leaf.grad.numpy()
        apart = max(apart, float(np.abs(seen[name] - theirs).max() / np.abs(theirs).max()))
    study.model.zero_grad(set_to_none=True)
    margins = [np.diff(scores) for scores in (evaluate(setting, batch_size), study.evaluate(setting.grid))]
    return {"loss": abs(loss - wanted), "gradient": apart, "grid": float(np.abs(np.subtract(*margins)).max())}


@dataclasses.dataclass
class Case:
    """A way to go through all rows; `first` are the seconds of the first time, compilation included."""

    name: str
    run: Callable[[], Any]
    first: float = 0.0
    seconds: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)  # seconds of all threads

    def time(self) -> tuple[float, float]:
        start = time.perf_counter(), time.process_time()
        self.run()
        return time.perf_counter() - start[0], time.process_time() - start[1]


def measure(cases: Sequence[Case], repeats: int) -> None:
    """Runs every case once to compile it, then all in turns."""
    for case in tqdm(cases, desc="compile", leave=False):
        case.first, _ = case.time()
    for _ in tqdm(range(repeats), desc="measure", leave=False):
        for case in cases:
            seconds, processor = case.time()
            case.seconds.append(seconds)
            case.processor.append(processor)


def rivals(run: Callable[[], Any], threads: Sequence[int]) -> list[Case]:
    """The same in torch with each number of threads: on small arrays, or beside other programs, more can be slower."""
    import torch

    def with_threads(count: int):
        torch.set_num_threads(count)
        run()

    return [Case(f"torch, {count} threads", functools.partial(with_threads, count)) for count in threads]


def compared(cases: Sequence[Case], rows: int) -> list[dict[str, Any]]:
    """Of each case its rows a second and how many times as fast it is as the fastest in torch: the median over turns,
    and the range."""
    best = min((case for case in cases if case.name.startswith("torch")), key=lambda case: np.median(case.seconds))
    found = []
    for case in cases:
        ratio = np.array(best.seconds) / np.array(case.seconds)
        processor = np.array(best.processor) / np.array(case.processor)
        found.append(
            {
                "case": case.name,
                "rows_a_second": rows / float(np.median(case.seconds)),
                "times_as_fast": float(np.median(ratio)),
                "least": float(ratio.min()),
                "most": float(ratio.max()),
                "times_less_processor": float(np.median(processor)),
                "first_seconds": case.first,
                "seconds": case.seconds,
                "processor_seconds": case.processor,
            }
        )
    return found


def table(found: Sequence[dict[str, Any]], caption: str) -> str:
    rows = [
        [
            one["case"],
            number(one["rows_a_second"], 1),
            f"{one['times_as_fast']:.2f} [{one['least']:.2f}, {one['most']:.2f}]",
            number(one["times_less_processor"], 2),
            number(one["first_seconds"] - min(one["seconds"]), 1),
        ]
        for one in found
    ]
    headers = ["case", "rows a second", "times as fast [range]", "times less processor time", "compile s"]
    return Table(headers, rows, caption).text()


def benchmark(
    model: str, batches: Sequence[int], threads: Sequence[int], examples: int, r: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Compares both on one model, prints it, and returns what was found.

    Raises ValueError where they do not compute the same.
    """
    with base_folder(model, seed) as folder:
        setting = make_setting(folder, examples, r, seed)
        study = make_rival(setting, folder)
    ours = Ours(setting)
    apart = disagreements(setting, study, ours)
    said = ", ".join(f"{what} {value:.1e}" for what, value in apart.items())
    if max(apart.values()) > SAME:
        raise ValueError(f"{model}: ours and torch differ by {said}; wanted at most {SAME:g}")
    print(f"{model}: the same to {said}")
    adamw = study.optimizer(lr=RECIPE.peak_lr, weight_decay=RECIPE.weight_decay)

    def published():
        for start in range(0, examples, ACCUMULATE):
            study.step(adamw, setting.examples.records[start : start + ACCUMULATE], RECIPE.clip)

    most = max(batches)
    single, unrolled = Ours(setting, segments=1), Ours(setting, scanned=False)
    training = rivals(published, threads)
    training += [Case(f"batch {size}", functools.partial(ours.train, size)) for size in batches]
    training += [Case(f"batch {size}, layers unrolled", functools.partial(unrolled.train, size)) for size in batches]
    one_segment = Case(f"batch {most}, one segment", lambda: single.train(most))
    training.append(one_segment)
    n = len(setting.grid)
    grid = rivals(lambda: study.evaluate(setting.grid), threads)
    grid.append(Case("one batch", lambda: evaluate(setting, n)))
    found: dict[str, Any] = {"model": model, "differences": apart}
    for what, cases, rows in (("training", training, examples), ("grid", grid, n)):
        measure(cases, repeats)
        found[what] = compared(cases, rows)
        print(table(found[what], f"{model}: {what}, {rows} rows a turn") + "\n")
    two_segments = next(case for case in training if case.name == f"batch {most}")
    found["one_to_two_segments"] = float(np.median(np.divide(one_segment.seconds, two_segments.seconds)))
    print(f"{model}: one segment takes {found['one_to_two_segments']:.2f} times as long as two, at batch {most}")
    return found


def main(_: Sequence[str]) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # compile time is one of the figures
    f = flags.FLAGS
    batches = sorted(int(size) for size in f.batches)
    if any(f.examples % size for size in [*batches, ACCUMULATE]):
        sys.exit(f"examples={f.examples}; wanted a multiple of {ACCUMULATE} and of batches={batches}")
    threads = [int(count) for count in f.torch_threads]
    settings = {"batches": batches, "torch_threads": threads} | {
        name: f[name].value for name in ("examples", "lora_r", "repeats", "seed")
    }
    try:
        found = [
            benchmark(model, batches, threads, f.examples, f.lora_r, f.repeats, f.seed) for model in tqdm(f.models)
        ]
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"benchmark_introspection: {error}")
    path = pathlib.Path(f.output_dir) / f"benchmark_introspection_{results.timestamp()}.json"
    identity = results.run_identity("benchmark_introspection", settings, {"records": f.seed}, {})
    results.write_json(path, {"identity": identity, "results": found})
    print(f"wrote {path}")
    for one in found:
        best = max(one["training"], key=lambda case: case["times_as_fast"])
        verdict = "yes" if best["times_as_fast"] >= TIMES else "NO"
        print(
            f"{one['model']}: {best['times_as_fast']:.1f} times as fast ({best['case']}); at least {TIMES:g}: {verdict}"
        )


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
