"""Training one variant: data, adapter, loop, what is written while it runs, and its model card.

A folder holds, when it is done, `final/`, `best/` and `step_<n>/` (adapters in PEFT's format), `curves.png` and
`training.json`, which is written last: a run that was killed goes on from its newest checkpoint, and one that is done
is read from there. Until then `checkpoints/plan.json` says whose folder it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score

import models
from experiments.introspecting.training_settings import NAME, TrainingSettings
from models.adapter_card import AdapterCard, Result
from nmjax.adapters import LORA, Adapter
from nmjax.data.introspection import read_lists
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
from nmjax.training.introspection import answer_logprobs, introspection_loss
from nmjax.training.loop import train
from nmjax.training.sharding import gather, place, shardings, spread

RESULT = "training.json"


# --- Data -------------------------------------------------------------------------------------------------------------


def split_config(settings: TrainingSettings, layers: int) -> SplitConfig:
    """What records are drawn for a model of so many blocks."""
    names = ("variant", "n", "vectors", "magnitudes", "noise", "systems", "sentences")
    drawn = {name: getattr(settings, name) for name in names}
    return SplitConfig(**drawn, seed=settings.data_seed, layers=layers)


def records_of(settings: TrainingSettings, layers: int) -> dict[str, list[Record]]:
    """By split.

    Raises ValueError or FileNotFoundError for records that can't be read or drawn, or were drawn for something else.
    """
    if settings.data is None:
        return generate(split_config(settings, layers), read_lists(settings.lists))
    folder = pathlib.Path(settings.data)
    if (folder / "summary.json").exists():
        drawn = results.load_json(folder / "summary.json").get("settings", {})
        variants = {settings.variant, "original"} if settings.variant == "r1_minimal" else {settings.variant}
        for name, wanted in (("variant", variants), ("layers", {layers})):
            if name in drawn and drawn[name] not in wanted:
                wanted_text = " or ".join(map(str, sorted(wanted)))
                raise ValueError(f"data={settings.data!r} has {name}={drawn[name]!r}, wanted {wanted_text}")
    there = [split for split in SPLITS if split != "test" or (folder / "test.jsonl").exists()]
    return {split: read_records(folder / f"{split}.jsonl") for split in there}


def examples_of(settings: TrainingSettings, lm: LanguageModel, records: Mapping[str, list[Record]]):
    """`Examples` by split, all equally wide.

    Raises ValueError where they don't fit the model, its context or its tokenizer.
    """
    vectors = unit_vectors(settings.vectors, lm.config.embed, settings.vectors_seed)
    found = {
        split: Examples(part, encode_all(part, lm.tokenizer), vectors, lm.config.layers)
        for split, part in records.items()
    }
    for split, part in found.items():
        if len(part.records) < 2:
            raise ValueError(f"{split} has 1 record, wanted at least 2, for intervals")
        longest = max(len(one.prefix) + part.row_length(one) for one in part.segments)
        if longest > lm.config.max_positions:
            raise ValueError(f"{split} has a record of {longest} tokens, wanted at most {lm.config.max_positions}")
    return {split: part.with_widths(*found.values()) for split, part in found.items()}


def read_training(folder: pathlib.Path) -> dict[str, Any] | None:
    """What the folder's training.json holds, None if there is none. Raises ValueError where it is something else."""
    path = folder / RESULT
    if not path.is_file():
        return None
    found = results.load_json(path)
    fields = ("plan", "steps", "trainable", "history", "best", "test", "counts", "identity")
    if not isinstance(found, dict) or set(fields) - found.keys():
        raise ValueError(f"{path} is no result of {NAME}, wanted one with {', '.join(fields)}")
    return found


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Training:
    """A variant's training on a loaded base; making one reads the data and checks all there is to check.

    Args:
      lm: the base that `settings.model` names, with layers unrolled. Read with `host=True`, it is on the devices once.
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
        self.places = self._places()
        self.plan_file = self.folder / "checkpoints" / "plan.json"
        begun = results.load_json(self.plan_file) if self.plan_file.exists() else read_training(self.folder)
        if begun is not None and begun["plan"] != self.identity:
            raise ValueError(f"output={settings.output!r} holds another training, wanted an empty folder, or the same")

    def _places(self) -> Any:
        """Where the stacked parameters go. Raises ValueError where the mesh does not divide them, or a batch."""
        if self.mesh is None:
            return None
        place(self.batches[0], self.mesh, parts=self.settings.accumulate)
        shardings(self.start.weights, self.mesh)
        return shardings(jax.eval_shape(models.stack_layers, self.lm.params), self.mesh)

    def run(self, progress: bool = True) -> dict[str, Any]:
        """Trains, or goes on, or reads what is done; the contents of training.json.

        Raises OSError where another process is at it.
        """
        found = read_training(self.folder)
        if found is None:
            with self._claimed():
                found = self._train(progress)
        if jax.process_index() == 0:
            shutil.rmtree(self.plan_file.parent, ignore_errors=True)
        return found

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[None]:
        """The folder is this training's, and this process's; of several processes, the first one's."""
        if jax.process_index() > 0:
            yield
            return
        self.plan_file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.plan_file.with_name("lock"), "w") as file:
            results.lock(file, self.folder)
            results.write_json(self.plan_file, {"plan": self.identity})
            yield

    def _train(self, progress: bool) -> dict[str, Any]:
        settings = self.settings
        frozen = lora.frozen(models.stack_layers(self.lm.params, self.places), self.start)
        ask = _Asking(self.module, frozen, self.mesh, settings.batch_size // settings.accumulate)
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
            results.write_atomic(self.folder / "curves.png", (self.folder / "final" / "curves.png").read_bytes())
            results.write_json(self.folder / RESULT, found)
        return found


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


class _Asking:
    """Log-probabilities of the answers [n, C] to `Examples`, under adapter weights."""

    def __init__(self, module, frozen, mesh: Mesh | None, batch_size: int):
        self.mesh, self.batch_size = mesh, batch_size
        self.frozen = frozen if mesh is None else spread(frozen, shardings(frozen, mesh))
        self.program = jax.jit(lambda w, frozen, batch: answer_logprobs(module, {**frozen, LORA: w}, batch)[0])

    def __call__(self, weights, examples: Examples) -> np.ndarray:
        found = []
        if self.mesh is not None:
            weights = spread(weights, shardings(weights, self.mesh))
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
    among = log_softmax(logprobs, axis=1)
    found: dict[str, float | None] = {
        "val_loss": float(-among[np.arange(len(labels)), labels].mean()),
        "val_accuracy": float(np.mean(logprobs.argmax(1) == labels)),
        "val_pair_mass": float(np.exp(logprobs).sum(1).mean()),
    }
    if logprobs.shape[1] == 2 and len(set(labels)) == 2:
        found["val_auroc"] = float(roc_auc_score(labels == 0, logprobs[:, 0] - logprobs[:, 1]))
    return found


def held_out_results(examples: Examples, logprobs: np.ndarray) -> list[Result]:
    """For the model card: accuracy, pair mass and, of two answers, AUROC, with intervals; that of AUROC draws whole
    conversations."""
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
