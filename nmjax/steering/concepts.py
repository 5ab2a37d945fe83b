"""Directions of concepts: how a text about joy differs inside from the same text about things in general.

A concept's pairs are several wordings with the concept in them and with a general phrase in its place. As all concepts
are set against the same texts, their directions share a part that says no more than "about something particular".
`mean_cosine` measures how alike they are, `shared_direction` finds that part, and `without_shared` takes it away.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nmjax.lm import LanguageModel
from nmjax.report.results import content_hash
from nmjax.steering import io, store, vectors

TEMPLATES = pathlib.Path(__file__).resolve().parent.parent / "data" / "concept_templates.json"
SHARED_REMOVED = "_alone"  # what the name of a stored vector without the shared direction ends in


@dataclasses.dataclass(frozen=True)
class Templates:
    """Wordings with {concept} in them, and the phrase that stands there in the texts they are set against.

    Raises ValueError for fewer than two different wordings, one without {concept}, or an empty phrase.
    """

    general: str
    wordings: tuple[str, ...]

    def __post_init__(self):
        if not self.general.strip():
            raise ValueError(f"general is {self.general!r}; wanted a phrase")
        if len(set(self.wordings)) != len(self.wordings) or len(self.wordings) < 2:
            raise ValueError(f"wordings is {self.wordings}; wanted two or more different ones")
        for wording in self.wordings:
            if "{concept}" not in wording:
                raise ValueError(f"the wording {wording!r} has no {{concept}}")

    def pairs(self, concept: str) -> vectors.Pairs:
        """(about the concept, about things in general) by wording."""
        return [
            (wording.replace("{concept}", concept), wording.replace("{concept}", self.general))
            for wording in self.wordings
        ]


def read_templates(name: str = "bundled") -> Templates:
    """The templates of this package: "bundled", or "tiny" in words that the bundled models know."""
    known = json.loads(TEMPLATES.read_text(encoding="utf-8"))
    if name not in known:
        raise ValueError(f"templates={name!r}; wanted one of {list(known)}")
    return Templates(known[name]["general"], tuple(known[name]["wordings"]))


@dataclasses.dataclass(frozen=True, eq=False)
class ConceptVectors:
    """Unit vectors of C concepts, read after one block.

    Attributes:
      vectors: float32 [C, D].
      layer: the block whose output they were read from.
      cosine, cosine_without_shared: mean over all pairs of different concepts, as found and without the shared part.
      shared_norm: of the mean of the unit vectors as found; 1 if all are the same, near 1 / sqrt(C) if they are at
        right angles.
      shared_removed: whether `vectors` are those without the shared part.
    """

    words: tuple[str, ...]
    vectors: np.ndarray
    layer: int
    cosine: float
    cosine_without_shared: float
    shared_norm: float
    shared_removed: bool = False

    def of(self, word: str) -> np.ndarray:
        """The vector [D] of one concept. Raises ValueError for one that is not here."""
        if word not in self.words:
            raise ValueError(f"no vector of the concept {word!r}; there are {', '.join(self.words)}")
        return self.vectors[self.words.index(word)]


def concept_vectors(
    lm: LanguageModel,
    words: Sequence[str],
    layer: int | None = None,
    method: str = "mean_diff",
    remove_shared: bool = False,
    *,
    templates: Templates | str = "bundled",
    token: str = "mean",
    batch_size: int | None = None,
    folder: pathlib.Path | None = None,
    rebuild: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ConceptVectors:
    """The directions of concepts in the base of `lm`, built once and then read from the store.

    Each is kept with all its layers as `concept_<word>`, as found, so that `steer("concept_joy", 2.0)` finds it, too.

    Args:
      words: two or more different ones.
      layer: the block whose output is read; None = the last one of the model's first half.
      method: how a direction is made from the pairs' differences, see `vectors.direction`.
      remove_shared: without the direction that all of `words` share.
      templates: wordings, or the name of some, see `read_templates`.
      token: the "mean" over a text's tokens, or its "last" one.
      folder: of the files; None = the user's caches, by the model's fingerprint.
      rebuild: anew, even where a file of the same plan is there.
      progress: called with numbers of texts that were read or need not be; C + 1 times the wordings in all.
    Raises:
      ValueError: bad input; the message names the argument, the value seen and the value wanted.
    """
    layer = compared_layer(lm, layer)
    by_layer = concept_directions(
        lm, words, method, templates, token=token, batch_size=batch_size, folder=folder, rebuild=rebuild,
        progress=progress,
    )  # fmt: skip
    return summarise(by_layer, layer, remove_shared)


def compared_layer(lm: LanguageModel, layer: int | None = None) -> int:
    """The block whose output is read; None is the last one of the first half. Raises ValueError for one not there."""
    L = lm.config.layers
    layer = (L - 1) // 2 if layer is None else layer
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < L:
        raise ValueError(f"layer={layer!r}, wanted one of the blocks 0 to {L - 1}")
    return layer


def summarise(by_layer: Mapping[str, np.ndarray], layer: int, remove_shared: bool = False) -> ConceptVectors:
    """The vectors of one layer, out of the directions [L, D] of each word."""
    found = np.stack([directions[layer] for directions in by_layer.values()])
    alone = without_shared(found)
    return ConceptVectors(
        words=tuple(by_layer),
        vectors=alone if remove_shared else found,
        layer=layer,
        cosine=mean_cosine(found),
        cosine_without_shared=mean_cosine(alone),
        shared_norm=shared_direction(found)[1],
        shared_removed=remove_shared,
    )


def stored_name(word: str) -> str:
    """What a concept's vector is called in the store."""
    return store.CONCEPT + re.sub(r"[^A-Za-z0-9_.-]+", "-", word.strip())


def concept_directions(
    lm: LanguageModel,
    words: Sequence[str],
    method: str = "mean_diff",
    templates: Templates | str = "bundled",
    *,
    token: str = "mean",
    batch_size: int | None = None,
    folder: pathlib.Path | None = None,
    rebuild: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, np.ndarray]:
    """Unit vectors float32 [L, D] by word; arguments and errors as of `concept_vectors`.

    Those that are not stored yet are built together and stored.
    """
    base = lm.base
    templates = read_templates(templates) if isinstance(templates, str) else templates
    names = [stored_name(word) for word in words]
    if isinstance(words, str) or len(words) < 2 or len(set(names)) < len(names) or store.CONCEPT in names:
        raise ValueError(f"words={words!r}, wanted two or more different words")
    folder = store.cached_folder(base) if folder is None else pathlib.Path(folder)
    files = {word: store.vector_file(folder, name) for word, name in zip(words, names, strict=True)}
    plans = {word: _plan(base, templates.pairs(word), method, token) for word in words}
    known = {} if rebuild else {w: found for w in words if (found := _stored(files[w], plans[w])) is not None}
    missing = [word for word in words if word not in known]
    n = len(templates.wordings)
    if progress is not None:
        progress(n * len(known) + (0 if missing else n))
    if missing:
        # The texts about things in general are the same for every concept, and read once.
        texts = [general for _, general in templates.pairs("")]
        texts += [about for word in missing for about, _ in templates.pairs(word)]
        read = vectors.activations(base, texts, token, batch_size, progress)
        for k, word in enumerate(missing, start=1):
            known[word], _ = vectors.direction(read[k * n : (k + 1) * n], read[:n], method)
            if not (some := known[word].any(axis=1)).all():
                raise ValueError(
                    f"the concept {word!r} has no direction in layer {some.argmin()}: its texts read like the others"
                )
            metadata = {"concept": word, "method": method, "token": token, "pairs": n, "plan": plans[word]}
            store.save_named(base, stored_name(word), known[word], metadata, folder)
    return {word: known[word] for word in words}


def _plan(lm: LanguageModel, pairs: vectors.Pairs, method: str, token: str) -> str:
    """A hash of everything that decides a concept's vector."""
    plan: dict[str, Any] = {"schema": io.SCHEMA, "model": lm.fingerprint, "method": method, "token": token}
    return content_hash(plan | {"pairs": pairs})


def _stored(path: pathlib.Path, plan: str) -> np.ndarray | None:
    """What an earlier call of the same plan stored; None where there is nothing, something else, or a damaged file."""
    try:
        found, metadata = io.load_vector(path)
    except (ValueError, FileNotFoundError):
        return None
    return found if metadata.get("plan") == plan else None


# --- What they share --------------------------------------------------------------------------------------------------


def mean_cosine(unit: np.ndarray) -> float:
    """Mean inner product of all pairs of different rows of unit vectors [C, D]. Raises ValueError for C < 2."""
    u = np.asarray(unit, np.float64)
    if u.ndim != 2 or len(u) < 2:
        raise ValueError(f"unit has shape {u.shape}, wanted [C, D] with C of at least 2")
    total = np.square(u.sum(axis=0)).sum() - np.square(u).sum()
    return float(total / (len(u) * (len(u) - 1)))


def shared_direction(unit: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean of unit vectors [C, D] as a unit vector float64 [D] (0 where there is none), and its norm."""
    mean = np.asarray(unit, np.float64).mean(axis=0)
    norm = float(np.linalg.norm(mean))
    return (mean / norm if norm > 0 else mean), norm


def without_shared(unit: np.ndarray) -> np.ndarray:
    """Unit vectors [C, D] less their part along the direction they share, as unit vectors float32 [C, D].

    Raises ValueError for a row that has no other part.
    """
    u = np.asarray(unit, np.float64)
    shared, _ = shared_direction(u)
    rest = u - (u @ shared)[:, None] * shared
    norms = np.linalg.norm(rest, axis=1, keepdims=True)
    if (norms < 1e-6).any():
        raise ValueError(f"unit: row {int(norms.argmin())} is the direction that all share; nothing of it is left")
    return (rest / norms).astype(np.float32)


def words_of(groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """All concepts of `Lists.concepts`, in order."""
    return tuple(word for group in groups.values() for word in group)
