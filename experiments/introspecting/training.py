"""Training one variant: data, adapter, loop, what is written while it runs, and its model card.

A folder holds, when it is done, `final/`, `best/` and `step_<n>/` (adapters in PEFT's format), `curves.png` and
`training.json`, which is written last: a run that was killed goes on from its newest checkpoint, and one that is done
is read from there.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from sklearn.metrics import roc_auc_score

import models
from models.adapter_card import AdapterCard, Result
from nmjax.adapters import LORA, Adapter
from nmjax.data.introspection import WORDINGS, read_lists
from nmjax.data.introspection_batches import Examples, held_out_batches, training_batches
from nmjax.data.introspection_chat import encode_all
from nmjax.data.introspection_records import Record, read_records, summary, unit_vectors
from nmjax.data.introspection_split import SPLITS, SplitConfig, generate
from nmjax.lm import LanguageModel
from nmjax.metrics import detection, stats
from nmjax.report import results
from nmjax.report.plots_training import Curve, CurvePanel, curves_figure
from nmjax.training import lora
from nmjax.training.checkpoint import Checkpoints
from nmjax.training.introspection import IntrospectionLoss, answer_logprobs, introspection_loss
from nmjax.training.loop import TrainConfig, train
from nmjax.training.sharding import gather, place, shardings, spread

NAME = "introspection_train"
SCHEDULES = ("linear", "cosine")


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """One training; the defaults are the published ones.

    Attributes:
      model, dtype: the base, and the dtype of its parameters; None is as they are stored.
      variant: a key of `nmjax.data.introspection.WORDINGS`.
      data: folder with train.jsonl, val.jsonl and, if it has one, test.jsonl, or None: records are drawn as
        `SplitConfig` says, from `lists`, `data_seed`, `n`, `vectors`, `magnitudes`, `noise`, `systems`, `sentences`.
      vectors_seed: of the unit vectors.
      lora_r: rank; None is 16, and 1 for r1_minimal. lora_alpha: None is twice the rank.
      lora_targets, lora_dropout, rslora: as in `LoraConfig`.
      loss, kl_to_base, segments: as in `IntrospectionLoss`.
      steps: None is `epochs` of the training records. Variants of equal sizes train for equally many.
      batch_size: records a step, in `accumulate` parts.
      lr, warmup, schedule: peak, steps of linear growth, and how it falls to 0 from there.
      seed: of the adapter's start, the order of records and dropout.
      eval_every, eval_records: steps between two validations, and on how many records.
      save_every: steps between two checkpoints, each with an adapter of its own.
      steps_per_call: that one compiled call scans over.
    Raises:
      ValueError: a value out of range.
    """

    model: str = "Qwen/Qwen2.5-Coder-32B-Instruct"
    dtype: str | None = None
    variant: str = "original"
    data: str | None = None
    lists: str = "bundled"
    data_seed: int = 42
    n: int = 10_000
    vectors: int = 200
    vectors_seed: int = 42
    magnitudes: tuple[float, ...] = SplitConfig.magnitudes
    noise: float = SplitConfig.noise
    systems: float = SplitConfig.systems
    sentences: int = SplitConfig.sentences
    lora_r: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    lora_dropout: float = 0.05
    rslora: bool = False
    loss: str = "pair"
    kl_to_base: float = 0.0
    segments: int = 2
    steps: int | None = None
    epochs: float = 3.0
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    warmup: int = 100
    schedule: str = "linear"
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 200
    eval_records: int = 200
    save_every: int = 500
    steps_per_call: int = 1
    mesh: str = ""
    output: str = f"results/{NAME}"

    def __post_init__(self):
        if self.variant not in WORDINGS:
            raise ValueError(f"variant={self.variant!r}, wanted one of {list(WORDINGS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}, wanted one of {list(SCHEDULES)}")
        for name in ("batch_size", "accumulate", "eval_every", "eval_records", "save_every", "steps_per_call"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, wanted 1 or more")
        for name in ("eval_every", "save_every"):
            if getattr(self, name) % self.steps_per_call:
                wanted = f"a multiple of steps_per_call={self.steps_per_call}"
                raise ValueError(f"{name}={getattr(self, name)}, wanted {wanted}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate}, wanted a divisor of batch_size={self.batch_size}")
        if self.lr <= 0 or self.epochs <= 0 or (self.steps is not None and self.steps < 1):
            raise ValueError(f"lr={self.lr}, epochs={self.epochs}, steps={self.steps}, wanted numbers above 0")
        self.lora, self.objective  # noqa: B018  they check what they are made of

    @property
    def lora(self) -> lora.LoraConfig:
        r = (1 if self.variant == "r1_minimal" else 16) if self.lora_r is None else self.lora_r
        return lora.LoraConfig(r, self.lora_alpha, self.lora_targets, self.rslora, self.lora_dropout)

    @property
    def objective(self) -> IntrospectionLoss:
        return IntrospectionLoss(self.loss, self.kl_to_base, self.segments)

    def recipe(self, records: int) -> TrainConfig:
        """Of the training loop, for so many training records. Raises ValueError for too short a run."""
        steps = self.steps or int(records * self.epochs / self.batch_size)
        steps -= steps % self.steps_per_call
        if steps <= self.warmup:
            raise ValueError(f"steps={steps} (a multiple of steps_per_call), wanted more than warmup={self.warmup}")
        return TrainConfig(
            steps=steps,
            peak_lr=self.lr,
            warmup=self.warmup,
            decay=steps - self.warmup if self.schedule == "linear" else 0,
            weight_decay=self.weight_decay,
            b2=0.999,
            clip=self.clip,
            accumulate=self.accumulate,
            scan=self.steps_per_call,
            log_every=min(self.eval_every, 10),
            watch_every=math.gcd(self.eval_every, self.save_every),
            save_every=self.save_every,
            seed=self.seed,
        )


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": "checkpoints/tiny_instruct",
        "lists": "tiny",
        "magnitudes": (200.0, 400.0, 800.0, 1600.0),
        "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "loss": "full",
        "batch_size": 32,
        "steps": 600,
        "lr": 3e-3,
        "warmup": 60,
        "eval_every": 60,
        "save_every": 300,
        "steps_per_call": 10,
    },
    "qwen32b": {},
}
"""What differs from the published settings. The bundled model's residual stream has norms of 150 to 510."""


def make_settings(preset: str, changes: Mapping[str, Any]) -> TrainingSettings:
    """A preset with changes. Raises ValueError for an unknown preset or a value out of range."""
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}, wanted one of {list(PRESETS)}")
    return TrainingSettings(**{**PRESETS[preset], **changes})


# --- Data -------------------------------------------------------------------------------------------------------------


def split_config(settings: TrainingSettings, layers: int) -> SplitConfig:
    """What records are drawn for a model of so many blocks."""
    names = ("variant", "n", "vectors", "magnitudes", "noise", "systems", "sentences")
    drawn = {name: getattr(settings, name) for name in names}
    return SplitConfig(**drawn, seed=settings.data_seed, layers=layers)


def records_of(settings: TrainingSettings, layers: int) -> dict[str, list[Record]]:
    """By split. Raises ValueError or FileNotFoundError for records that can't be read or drawn."""
    if settings.data is None:
        return generate(split_config(settings, layers), read_lists(settings.lists))
    folder = pathlib.Path(settings.data)
    there = [split for split in SPLITS if split != "test" or (folder / "test.jsonl").exists()]
    return {split: read_records(folder / f"{split}.jsonl") for split in there}


def examples_of(settings: TrainingSettings, lm: LanguageModel, records: Mapping[str, list[Record]]):
    """`Examples` by split, all equally wide. Raises ValueError where they don't fit the model or its tokenizer."""
    vectors = unit_vectors(settings.vectors, lm.config.embed, settings.vectors_seed)
    found = {
        split: Examples(part, encode_all(part, lm.tokenizer), vectors, lm.config.layers)
        for split, part in records.items()
    }
    return {split: part.with_widths(*found.values()) for split, part in found.items()}


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Training:
    """A variant's training on a loaded base; making one reads the data and checks all there is to check.

    Args:
      lm: the base that `settings.model` names, with layers unrolled.
    Raises:
      ValueError: data, adapter or mesh that don't fit the model, or a folder in which another training is.
    """

    settings: TrainingSettings
    lm: LanguageModel
    mesh: Mesh | None = None

    def __post_init__(self):
        settings, self.folder = self.settings, pathlib.Path(self.settings.output)
        records = records_of(settings, self.lm.config.layers)
        self.examples = examples_of(settings, self.lm, records)
        self.recipe = settings.recipe(len(records["train"]))
        self.batches = training_batches(self.examples["train"], settings.batch_size, settings.seed)
        self.module = models.ScannedLlama(self.lm.config)
        self.start = lora.init(self.module, settings.lora, jax.random.key(settings.seed))
        free = {"output", "mesh", "data", "model"}  # where things lie decides no number
        decides = {name: value for name, value in dataclasses.asdict(settings).items() if name not in free}
        self.counts = summary(records)
        self.hashes = {"base": self.lm.base.fingerprint, "records": results.content_hash(records)}
        self.identity = results.content_hash({"settings": decides, **self.hashes})
        done = self._done()
        if done is not None and done["plan"] != self.identity:
            raise ValueError(f"output={settings.output!r} holds another training, wanted an empty folder, or the same")

    def _done(self) -> dict[str, Any] | None:
        path = self.folder / "training.json"
        return results.load_json(path) if path.exists() else None

    def run(self, progress: bool = True) -> dict[str, Any]:
        """Trains, or goes on, or reads what is done; the contents of training.json."""
        done = self._done()
        if done is not None:
            return done
        settings = self.settings
        frozen = lora.frozen(models.stack_layers(self.lm.params), self.start)
        if self.mesh is not None:
            frozen = spread(frozen, shardings(frozen, self.mesh))
        ask = _Asking(self.module, frozen, self.mesh, settings.batch_size)
        val = self._first("val", settings.eval_records)

        def watch(history, weights):
            step = history[-1]["step"]
            if step % settings.eval_every == 0 or step == self.recipe.steps:
                history[-1] |= validation(val, ask(weights, val))
                best = max((r["val_accuracy"] for r in history[:-1] if "val_accuracy" in r), default=-1.0)
                if history[-1]["val_accuracy"] > best:
                    self._export("best", weights, history)
            if step % settings.save_every == 0 and step < self.recipe.steps:
                self._export(f"step_{step}", weights, history)

        state, history = train(
            introspection_loss(self.module, settings.objective),
            self.start.weights,
            self.batches,
            self.recipe,
            checkpoints=Checkpoints(self.folder / "checkpoints"),
            progress=settings.variant if progress else False,
            watch=watch,
            mesh=self.mesh,
            frozen=frozen,
            identity={"plan": self.identity},
        )
        weights = state.params if self.mesh is None else gather(state.params)
        test = self._first("test" if "test" in self.examples else "val", None)
        tested = held_out_results(test, ask(weights, test))
        self._export("final", weights, history, tested)
        return self._finish(history, tested)

    def _first(self, split: str, count: int | None) -> Examples:
        part = self.examples[split]
        return dataclasses.replace(part, records=part.records[:count], segments=part.segments[:count])

    def _export(self, name: str, weights, history, tested: Sequence[Result] = ()) -> None:
        if jax.process_index() > 0:
            return
        adapter = Adapter(jax.device_get(weights), self.start.settings, self.start.config)
        models.save_adapter(self.lm, adapter, self.folder / name, self._card(name, history, tested))

    def _card(self, name: str, history, tested: Sequence[Result]) -> AdapterCard:
        settings, train_counts = self.settings, self.counts["train"]
        drawn = f"drawn with seed {settings.data_seed} from the {settings.lists!r} lists"
        source = drawn if settings.data is None else "read from files"
        hyperparameters = dataclasses.asdict(self.settings) | {
            "lora_r": settings.lora.r,
            "lora_alpha": settings.lora.alpha,
        }
        hyperparameters |= {"steps": self.recipe.steps, "adapter of step": history[-1]["step"]}
        return AdapterCard(
            title=f"Introspection: {settings.variant} ({name})",
            summary="A LoRA adapter that was trained to tell, from a conversation that it has in its cache, whether "
            "something was done to its activations while it read it."
            if not settings.variant.startswith("localization")
            else "A LoRA adapter that was trained to tell where, or how strongly, its activations were perturbed while "
            "it read a conversation.",
            data=f"{train_counts['records']:,} records of the variant `{settings.variant}`, {source} (hash "
            f"`{self.hashes['records'][:16]}`). Kinds: {_listed(train_counts['kinds'])}. Answers: "
            f"{_listed(train_counts['answers'])}.",
            hyperparameters={k: v for k, v in hyperparameters.items() if k not in ("output", "mesh") and v is not None},
            history=history,
            results=tested,
            figures={"curves": curves(history)} if name == "final" else {},
        )

    def _finish(self, history, tested: Sequence[Result]) -> dict[str, Any]:
        validated = [record for record in history if "val_accuracy" in record]
        settings = dataclasses.asdict(self.settings)
        found = {
            "plan": self.identity,
            "steps": self.recipe.steps,
            "trainable": lora.count(self.start),
            "history": history,
            "best": max(validated, key=lambda record: record["val_accuracy"]),
            "test": {result.name: dataclasses.asdict(result) for result in tested},
            "counts": self.counts,
            "identity": results.run_identity(NAME, settings, {"seed": self.settings.seed}, self.hashes),
        }
        found = results.jsonable(found)
        if jax.process_index() == 0:
            results.write_atomic(self.folder / "curves.png", curves(history))
            results.write_json(self.folder / "training.json", found)
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return found


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


class _Asking:
    """Log-probabilities of the answers [n, C] to `Examples`, under adapter weights."""

    def __init__(self, module, frozen, mesh: Mesh | None, batch_size: int):
        self.frozen, self.mesh, self.batch_size = frozen, mesh, batch_size
        self.program = jax.jit(lambda w, frozen, batch: answer_logprobs(module, {**frozen, LORA: w}, batch)[0])

    def __call__(self, weights, examples: Examples) -> np.ndarray:
        weights, found = jax.device_get(weights), []
        for counts, batch in held_out_batches(examples, self.batch_size):
            if self.mesh is None:
                seen = self.program(weights, self.frozen, batch)
            else:
                with jax.set_mesh(self.mesh):
                    seen = gather(self.program(weights, self.frozen, place(batch, self.mesh)))
            found.append(np.asarray(seen)[counts])
        return np.concatenate(found)


def _labels(examples: Examples) -> np.ndarray:
    return np.asarray([record.answer for record in examples.records])


def validation(examples: Examples, logprobs: np.ndarray) -> dict[str, float | None]:
    """What the history keeps of log-probabilities [n, C] of the answers to validation records."""
    labels = _labels(examples)
    among = logprobs - np.logaddexp.reduce(logprobs, axis=1, keepdims=True)
    found: dict[str, float | None] = {
        "val_loss": float(-among[np.arange(len(labels)), labels].mean()),
        "val_accuracy": float(np.mean(logprobs.argmax(1) == labels)),
        "val_pair_mass": float(np.exp(logprobs).sum(1).mean()),
    }
    if logprobs.shape[1] == 2 and len(set(labels)) == 2:
        found["val_auroc"] = float(roc_auc_score(labels == 0, logprobs[:, 0] - logprobs[:, 1]))
    return found


def held_out_results(examples: Examples, logprobs: np.ndarray) -> list[Result]:
    """For the model card: accuracy, pair mass and, of two answers, AUROC, with intervals by conversation."""
    labels, n = _labels(examples), len(examples.records)
    low, high = stats.wilson_interval(int((logprobs.argmax(1) == labels).sum()), n)
    right = float(np.mean(logprobs.argmax(1) == labels))
    mass = np.exp(logprobs).sum(1)
    found = [
        Result("accuracy on held-out records", right, [float(low), float(high)], n),
        Result(
            "probability of all answers together", float(mass.mean()), [float(x) for x in stats.mean_interval(mass)], n
        ),
    ]
    if logprobs.shape[1] == 2 and len(set(labels)) == 2:
        places = {record.conversation: k for k, record in enumerate(examples.records)}
        groups = np.asarray([places[record.conversation] for record in examples.records])
        report = detection.detection_report(logprobs[:, 0] - logprobs[:, 1], labels == 0, groups, 0.0, "high")
        found.append(Result("AUROC on held-out records", report["auroc"]["value"], report["auroc"]["interval"], n))
    return found


def curves(history: Sequence[Mapping[str, Any]]) -> bytes:
    """The learning curves of one training, as a PNG."""

    def curve(name):
        records = [record for record in history if record.get(name) is not None]
        return Curve([r["step"] for r in records], [[r[name] for r in records]]) if records else None

    panels = [
        ("Loss, nats", {"training": "loss", "validation (among the answers)": "val_loss"}),
        ("Accuracy", {"training": "accuracy", "validation": "val_accuracy"}),
        ("Probability of all answers together", {"training": "pair_mass", "validation": "val_pair_mass"}),
        ("AUROC", {"validation": "val_auroc"}),
    ]
    drawn = [
        CurvePanel(title, {name: found for name, key in lines.items() if (found := curve(key)) is not None})
        for title, lines in panels
    ]
    return curves_figure([panel for panel in drawn if panel.curves])
