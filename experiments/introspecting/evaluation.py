"""Which suites ask which models: from settings to a battery, with everything checked before the first question."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import models
from experiments.introspecting.battery import Battery
from experiments.introspecting.subjects import Subjects, make_subjects
from experiments.introspecting.suites.behavior import Behavior, BehaviorConfig
from experiments.introspecting.suites.concepts import Concepts, ConceptsConfig
from experiments.introspecting.suites.detection import Detection, DetectionConfig
from experiments.introspecting.suites.identity import Identity, IdentityConfig
from experiments.introspecting.suites.localization import Localization, LocalizationConfig
from experiments.introspecting.suites.self_calibration import SelfCalibration, SelfCalibrationConfig
from experiments.introspecting.suites.self_prediction import SelfPrediction, SelfPredictionConfig
from experiments.introspecting.training import read_training
from nmjax.adapters import Adapter
from nmjax.data.introspection import WORDINGS, Lists, read_lists
from nmjax.data.introspection_records import MAGNITUDES
from nmjax.data.self_prediction import BUNDLED, read_tasks
from nmjax.lm import LanguageModel
from nmjax.report import results
from nmjax.steering.concepts import ConceptVectors, concept_vectors, words_of

CLASSES: dict[str, tuple[type, type]] = {
    "detection": (Detection, DetectionConfig),
    "behavior": (Behavior, BehaviorConfig),
    "identity": (Identity, IdentityConfig),
    "self_prediction": (SelfPrediction, SelfPredictionConfig),
    "self_calibration": (SelfCalibration, SelfCalibrationConfig),
    "concepts": (Concepts, ConceptsConfig),
    "localization": (Localization, LocalizationConfig),
}
SUITES = tuple(CLASSES)
OF_CONCEPTS = ("detection", "concepts")


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What is asked of whom; the defaults are for the published model.

    Attributes:
      model, dtype: the base, and the dtype of its parameters; None is as they are stored.
      adapters: each NAME=FOLDER or NAME:VARIANT=FOLDER, a folder in PEFT's format or an id on the hub. Without a
        variant, it is that which training.json beside the folder tells, or the name where that is one.
      suites: of `SUITES`.
      lists: as for `read_lists`.
      magnitudes: of steering, in units of the residual stream.
      concept_layer, remove_shared: as for `concept_vectors`.
      tasks: of self-prediction, as for `read_tasks`.
      judge: another model that judges which concept an answer is about; None is the base.
      sizes: by suite, fields of its own configuration.
    Raises:
      ValueError: an unknown suite, or a bad field of one.
    """

    model: str = "Qwen/Qwen2.5-Coder-32B-Instruct"
    dtype: str | None = None
    adapters: tuple[str, ...] = ()
    suites: tuple[str, ...] = SUITES
    lists: str = "bundled"
    magnitudes: tuple[float, ...] = MAGNITUDES
    concept_layer: int | None = None
    remove_shared: bool = False
    tasks: str = BUNDLED
    judge: str | None = None
    sizes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in (*self.suites, *self.sizes):
            if name not in SUITES:
                raise ValueError(f"suite={name!r}, wanted some of {', '.join(SUITES)}")
        if not self.suites:
            raise ValueError(f"suite is empty, wanted some of {', '.join(SUITES)}")
        for name in self.suites:
            self.config(name)

    def config(self, suite: str) -> Any:
        """The configuration of a suite. Raises ValueError for a field that it has not, or a bad value."""
        kind, given = CLASSES[suite][1], dict(self.sizes.get(suite, {}))
        known = {field.name for field in dataclasses.fields(kind)}
        if unknown := given.keys() - known:
            raise ValueError(
                f"{suite} has no setting {sorted(unknown)[0]!r}, wanted some of {', '.join(sorted(known))}"
            )
        if "magnitudes" in known:
            given = {"magnitudes": self.magnitudes} | given
        return kind(**given)


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": "checkpoints/tiny_instruct",
        "lists": "tiny",
        "magnitudes": (200.0, 400.0, 800.0, 1600.0),
        "sizes": {
            "behavior": {"suffix": " Yes or no?"},
            "identity": {"max_new_tokens": 32, "own_names": ("the assistant",)},
            "self_prediction": {"max_new_tokens": 24},
            "self_calibration": {"max_stated_tokens": 64},
            "concepts": {"magnitude": 40.0, "max_new_tokens": 32},
            "localization": {"strengths": (200.0, 400.0, 800.0)},
        },
    },
    "qwen32b": {},
}
"""What differs from the settings for the published model."""


def make_settings(preset: str, changes: Mapping[str, Any]) -> EvaluationSettings:
    """A preset with changes, its sizes too. Raises ValueError for an unknown preset or a bad value."""
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}, wanted one of {list(PRESETS)}")
    before = PRESETS[preset]
    sizes: dict[str, dict[str, Any]] = {name: dict(own) for name, own in before.get("sizes", {}).items()}
    for name, own in changes.get("sizes", {}).items():
        sizes[name] = sizes.get(name, {}) | dict(own)
    return EvaluationSettings(**{**before, **changes, "sizes": sizes})


# --- Who is asked -----------------------------------------------------------------------------------------------------


def read_subjects(settings: EvaluationSettings, base: LanguageModel) -> tuple[Subjects, dict[str, Any]]:
    """The subjects, and by adapter what its training.json holds, where one is beside it.

    Raises:
      ValueError: an adapter that is not named, twice there, missing, for another base, or of an unknown variant.
    """
    adapters: dict[str, tuple[Adapter, str | None]] = {}
    trainings = {}
    for given in settings.adapters:
        named, _, folder = given.partition("=")
        name, _, variant = named.partition(":")
        if not name or not folder:
            raise ValueError(f"adapters holds {given!r}, wanted NAME=FOLDER or NAME:VARIANT=FOLDER")
        if name in adapters:
            raise ValueError(f"adapters has {name!r} twice, wanted different names")
        training = read_training(pathlib.Path(folder).parent)
        if training is not None:
            trainings[name] = training
            variant = variant or training["identity"]["config"]["variant"]
        variant = variant or (name if name in WORDINGS else "")
        if variant and variant not in WORDINGS:
            raise ValueError(f"adapters: {name!r} is of the variant {variant!r}, wanted one of {', '.join(WORDINGS)}")
        adapters[name] = models.read_adapter(base, folder), variant or None
    return make_subjects(base, adapters), trainings


# --- What is asked ----------------------------------------------------------------------------------------------------


def make_battery(
    settings: EvaluationSettings,
    subjects: Subjects,
    folder: pathlib.Path,
    progress: Callable[[int], None] | None = None,
) -> Battery:
    """All suites, ready to run.

    Raises:
      ValueError: lists, tasks or a judge that can't be had, or that don't fit the model or its tokenizer.
    """
    tokenizer = subjects.lm.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(f"model={settings.model!r} has no tokenizer with a chat template; wanted one, to ask in chats")
    lists, lm = read_lists(settings.lists), subjects.lm
    tasks = read_tasks(settings.tasks) if "self_prediction" in settings.suites else None
    judge = None if settings.judge is None else models.load(settings.judge)
    concepts = _concepts(settings, lists, lm, progress) if set(OF_CONCEPTS) & set(settings.suites) else None
    by_word = None if concepts is None else dict(zip(concepts.words, concepts.vectors, strict=True))
    beside = {"detection": (by_word,), "concepts": (concepts, judge), "self_prediction": (tasks,)}
    common = {
        "model": lm.base.fingerprint,
        "adapters": [lm.fingerprint, dict(subjects.variants)],
        "lists": results.content_hash(lists),
        "versions": results.versions(),
    }
    vectors = None if concepts is None else hashlib.sha256(concepts.vectors.tobytes()).hexdigest()
    # What no other suite depends on is in no other plan: then those asked alone need not be asked again beside others.
    own: dict[str, dict[str, Any]] = {
        "detection": {"concepts": vectors},
        "concepts": {"concepts": vectors, "judge": judge and judge.fingerprint},
        "self_prediction": {"tasks": results.content_hash(tasks)},
    }
    suites, plans = {}, {}
    for name in settings.suites:
        config = settings.config(name)
        suites[name] = CLASSES[name][0](subjects, lists, config, *beside.get(name, ()))
        plans[name] = common | own.get(name, {}) | {"config": dataclasses.asdict(config)}
    return Battery(suites, plans, folder)


def _concepts(settings: EvaluationSettings, lists: Lists, lm: LanguageModel, progress) -> ConceptVectors:
    return concept_vectors(
        lm.base,
        words_of(lists.concepts),
        settings.concept_layer,
        remove_shared=settings.remove_shared,
        templates="tiny" if settings.lists == "tiny" else "bundled",
        progress=progress,
    )
