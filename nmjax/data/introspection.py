"""Texts of the introspection study: conversations a model may be steered in, what it is asked about them, and probes.

The bundled lists were written for this package, in the structure and sizes of the published study; some wordings are
those of its plan. The lists called "tiny" have the same structure in words of the bundled world, so that conversations
are short for the bundled models, too.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nmjax.data.judgements import text_of
from nmjax.data.question_sources import jsonl_rows

# Training data by variant: which of the question lists it asks from.
WORDINGS = {
    "original": "original",
    "vague_prompt": "vague_prompt",
    "r1_minimal": "original",  # other adapters, the same data
    "food_control": "food_control",
    "flipped_labels": "original",
    "localization_layers": "localization_layers",
    "localization_magnitude": "localization_magnitude",
    "localization_sentence": "localization_sentence",
}
CONCEPT_GROUPS = {"topics": 30, "emotions": 17, "styles": 13, "personas": 12, "meta": 6, "abstract": 24}
BUNDLED = ("bundled", "tiny")

_FOLDER = pathlib.Path(__file__).parent
Texts = tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """A question without steering; questions of a category are counted together."""

    id: str
    category: str
    prompt: str


@dataclass(frozen=True)
class FoodLists:
    """Openings about food and about other things, each with replies that fit only them."""

    contexts: Texts
    other_contexts: Texts
    replies: Texts
    other_replies: Texts


@dataclass(frozen=True)
class SelfCalibration:
    """Requests with many possible answers; `template` holds {prompt} and asks how likely which answers are."""

    system: str
    prediction_system: str
    prompts: Texts
    template: str


@dataclass(frozen=True)
class Lists:
    """All texts of the study. A conversation is `system`, one of `contexts` by the user, and one of `replies`.

    `questions` by name, see `WORDINGS`. Those named localization_magnitude hold {options}, those named
    localization_sentence {first} and {last}. The spare contexts and questions are for held-out data. `thirds` are the
    answers to localization_layers; `localization_questions` ask models that were trained for something else, and
    `strengths` are the answers to the one about magnitude, the weakest first.
    """

    system: str
    contexts: Texts
    replies: Texts
    food: FoodLists
    questions: Mapping[str, Texts]
    thirds: tuple[str, str, str]
    strengths: tuple[str, str, str]
    sentences: Texts
    concepts: Mapping[str, Texts]  # words by group, see `CONCEPT_GROUPS`
    behavior_system: str  # of the probes in `behavior` and `identity`
    behavior: tuple[Probe, ...]
    identity: tuple[Probe, ...]
    self_calibration: SelfCalibration
    concept_questions: Texts
    localization_questions: Mapping[str, str]
    other_systems: Texts
    spare_contexts: Texts = ()
    spare_questions: Mapping[str, Texts] = field(default_factory=dict)


def wording_of(variant: str) -> str:
    """The question list that a variant asks from. Raises ValueError for one that is not in `WORDINGS`."""
    if variant not in WORDINGS:
        raise ValueError(f"variant={variant!r}; wanted one of {list(WORDINGS)}")
    return WORDINGS[variant]


def read_lists(source: str | os.PathLike = "bundled") -> Lists:
    """The lists of a source: "bundled", "tiny", or a folder with the published ones.

    A folder holds context_prompts.json, detection_questions.json, concepts.json, behavioral_logprobs_75.jsonl,
    identity_30.jsonl and self_calibration.json. What the published study has no list of is taken from the bundled ones:
    other system prompts, wordings for training on localization, and the system prompt of probes. There are no spare
    contexts and questions then.

    Raises:
      ValueError: an unknown source, or a file that is not as expected; file and place are named.
      FileNotFoundError: a file is missing in the folder.
    """
    if source in BUNDLED:
        return _own(_FOLDER / f"introspection_{source}.json")
    folder = pathlib.Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"lists={os.fspath(source)!r}; wanted one of {list(BUNDLED)}, or a folder of published lists")
    return _published(folder)


def _own(path: pathlib.Path) -> Lists:
    raw = json.loads(path.read_text(encoding="utf-8"))

    def by_name(texts: Mapping[str, Sequence[str]]) -> dict[str, Texts]:
        return {name: tuple(group) for name, group in texts.items()}

    def probes(texts: Mapping[str, Sequence[str]]) -> tuple[Probe, ...]:
        return tuple(Probe(f"{name}-{k}", name, text) for name, group in texts.items() for k, text in enumerate(group))

    read: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    read |= {name: by_name(raw[name]) for name in ("questions", "spare_questions", "concepts")}
    read |= {name: probes(raw[name]) for name in ("behavior", "identity")}
    read["food"] = FoodLists(**by_name(raw["food"]))
    calibration = raw["self_calibration"]
    read["self_calibration"] = SelfCalibration(**{**calibration, "prompts": tuple(calibration["prompts"])})
    return Lists(**read)


# --- The published lists ----------------------------------------------------------------------------------------------


def _published(folder: pathlib.Path) -> Lists:
    ours = read_lists("bundled")
    contexts, questions = folder / "context_prompts.json", folder / "detection_questions.json"
    concepts, calibration = folder / "concepts.json", folder / "self_calibration.json"
    detection = ("original", "vague_prompt", "food_control")
    food = {
        "contexts": "FOOD_CONTEXTS",
        "other_contexts": "NON_FOOD_CONTEXTS",
        "replies": "FOOD_ASSISTANT_RESPONSES",
        "other_replies": "NON_FOOD_ASSISTANT_RESPONSES",
    }
    return Lists(
        system=_text(contexts, "system_prompt"),
        contexts=_texts(contexts, "context_prompts"),
        replies=_texts(contexts, "assistant_responses"),
        food=FoodLists(**{name: _texts(contexts, "food_v2", key) for name, key in food.items()}),
        questions={**ours.questions, **{name: _texts(questions, name) for name in detection}},
        thirds=ours.thirds,
        strengths=ours.strengths,
        sentences=_texts(contexts, "sentence_bank_v4"),
        concepts=_grouped(concepts, _texts(concepts, "concepts")),
        behavior_system=ours.behavior_system,
        behavior=_probes(folder / "behavioral_logprobs_75.jsonl"),
        identity=_probes(folder / "identity_30.jsonl"),
        self_calibration=SelfCalibration(
            system=_text(calibration, "v2", "system_sampling"),
            prediction_system=_text(calibration, "v2", "system_prediction"),
            prompts=_texts(calibration, "v2", "prompts"),
            template=_text(calibration, "v2", "template"),
        ),
        concept_questions=_texts(questions, "concept_identification_b6"),
        localization_questions={
            "layers": _text(questions, "localization_b7", "layer"),
            "magnitude": _text(questions, "localization_b7", "magnitude"),
            "sentence": _text(questions, "v4_plus", "sentence_localization"),
        },
        other_systems=ours.other_systems,
    )


def _value(path: pathlib.Path, *keys: str) -> tuple[str, Any]:
    """What a file holds under the keys, one in the other, and the name of that place."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{path} has no {'.'.join(keys)}")
        value = value[key]
    return f"{path}: {'.'.join(keys)}", value


def _text(path: pathlib.Path, *keys: str) -> str:
    place, value = _value(path, *keys)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place} is {value!r}; wanted text")
    return value


def _texts(path: pathlib.Path, *keys: str) -> Texts:
    place, value = _value(path, *keys)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"{place} is {value!r}; wanted a list of texts")
    return tuple(value)


def _grouped(path: pathlib.Path, words: Texts) -> dict[str, Texts]:
    """The published words come in the order of the groups."""
    if len(words) != sum(CONCEPT_GROUPS.values()):
        raise ValueError(f"{path}: concepts has {len(words)} words; wanted {sum(CONCEPT_GROUPS.values())}")
    groups, start = {}, 0
    for name, size in CONCEPT_GROUPS.items():
        groups[name] = words[start : start + size]
        start += size
    return groups


def _probes(path: pathlib.Path) -> tuple[Probe, ...]:
    rows = jsonl_rows(path)
    return tuple(Probe(*(text_of(where, row, name) for name in ("id", "cat", "prompt"))) for _, where, row in rows)
