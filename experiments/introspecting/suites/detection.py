"""B1, detection: asked whether anything was done to it, does a model answer yes where it is steered, and only there?

Each subject reads the same items: conversations and questions that no training split holds, each with a vector (one
that the adapters were trained on, a held-out one, or a concept's) in one cell of a grid of layer ranges and magnitudes,
or without. Two kinds of negatives are harder: noise of equal norm in place of a vector, and another system prompt.

What was done is what counts, whatever an adapter was told in training. The score of an item is the log-probability of
the answer "yes" less that of "no", both over the whole vocabulary, so that what the pair holds together is known, too.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import nmjax
from experiments.introspecting.subjects import BASE, Subjects
from experiments.introspecting.suites.detection_analysis import Analysis
from nmjax.data.introspection import Lists, wording_of
from nmjax.data.introspection_chat import Segments, encode_all
from nmjax.data.introspection_records import MAGNITUDES, YES_NO, Record, layer_ranges, unit_vectors
from nmjax.data.introspection_split import cut, split_lists
from nmjax.interventions.span import STEP
from nmjax.rows import bucket

OWN, ORIGINAL = "own", "original"
WORDINGS = ("original", "vague_prompt")  # those that ask what this suite scores
LEAST_UNSTEERED = 200
_BATCHES = 4  # of a unit


@dataclasses.dataclass(frozen=True)
class DetectionConfig:
    """What is asked.

    Attributes:
      vectors: in each cell of the two sets of random vectors.
      magnitudes: of the grid, in units of the residual stream; its ranges are those of `layer_ranges`.
      concept_prefixes: conversations for each concept in each cell.
      unsteered: different inputs to which nothing is done, at least 200.
      noise: inputs in each cell with noise of the same norm.
      systems: inputs with another system prompt.
      asked: "original": each subject is asked in the original wording; "own": in that of its variant, too, where that
        is another one about the same thing. The base is asked in every wording that occurs.
      seed: of what is drawn here.
      vectors_seed, vector_rows: of the `unit_vectors` in training (`SplitConfig.vectors`), the first half of which
        adapters are trained on, the last quarter held out.
      batch_size: rows run together.
      draws: of the bootstrap.
    Raises:
      ValueError: a value out of range.
    """

    vectors: int = 50
    magnitudes: tuple[float, ...] = MAGNITUDES
    concept_prefixes: int = 1
    unsteered: int = 250
    noise: int = 20
    systems: int = 100
    asked: tuple[str, ...] = (OWN, ORIGINAL)
    seed: int = 0
    vectors_seed: int = 42
    vector_rows: int = 200
    batch_size: int = 64
    draws: int = 1000

    def __post_init__(self):
        least = {"vectors": 1, "concept_prefixes": 1, "unsteered": LEAST_UNSTEERED, "noise": 0, "systems": 0}
        for name, low in {**least, "vector_rows": 4, "batch_size": 1, "draws": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted at least {low}")
        if len(set(self.magnitudes)) != len(self.magnitudes) or not self.magnitudes or min(self.magnitudes) <= 0:
            raise ValueError(f"magnitudes is {self.magnitudes}; wanted one or more different numbers above 0")
        if not self.asked or set(self.asked) - {OWN, ORIGINAL}:
            raise ValueError(f"asked is {self.asked}; wanted {OWN!r}, {ORIGINAL!r} or both")
        _, _, held_out = cut(range(self.vector_rows))
        if self.vectors > len(held_out):
            raise ValueError(
                f"vectors is {self.vectors}, but {len(held_out)} of {self.vector_rows} are held out; wanted at most as "
                "many, or more vector_rows"
            )


@dataclasses.dataclass(frozen=True)
class Item:
    """What is done and asked, for all subjects and wordings.

    Attributes:
      set: "trained", "held_out" or "concepts"; "unsteered", "noise" or "system".
      source: what is resampled together: a vector's row, a concept, the number of a noise; where there is none of
        them, the context, as inputs that share it are not independent.
      input: number of context, reply and question: (context * replies + reply) * questions + question.
      third, magnitude: the cell.
      noise_seed: see `Record`.
      system: number of another system prompt.
    """

    set: str
    source: str
    input: int
    third: str | None = None
    magnitude: float | None = None
    noise_seed: int | None = None
    system: int | None = None


@dataclasses.dataclass(frozen=True)
class Detection:
    """The suite; `concepts` are unit vectors [D] by word, a set of their own.

    Raises:
      ValueError: no subject has a wording to be asked in, concepts of another shape or norm, fewer different inputs in
        the test split of the lists than are to be unsteered or to have another system prompt; and as in `encode`.
    """

    subjects: Subjects
    lists: Lists
    config: DetectionConfig = DetectionConfig()
    concepts: Mapping[str, np.ndarray] | None = None

    def __post_init__(self):
        for word, vector in (self.concepts or {}).items():
            shape, norm = np.shape(vector), float(np.linalg.norm(vector))
            if shape != (self._dim,) or not math.isclose(norm, 1, abs_tol=1e-3):
                raise ValueError(
                    f"concepts[{word!r}] has shape {shape} and norm {norm:g}; wanted [{self._dim}] and norm 1"
                )
        if not self.pairs:
            raise ValueError(f"asked is {self.config.asked}, but no subject has an own wording about detection")
        test = self._test[ORIGINAL]
        for name, systems in (("unsteered", 1), ("systems", len(test.other_systems))):
            wanted, count = getattr(self.config, name), self._inputs * systems
            if wanted > count:
                raise ValueError(
                    f"{name} is {wanted}, but the test split of the lists has {count} different inputs "
                    f"({len(test.contexts)} contexts, {len(test.replies)} replies, {self._questions} questions, "
                    f"{systems} system prompts); wanted at most as many, or longer lists"
                )
        _ = self._segments  # texts that cannot be asked are found before anything is run

    # --- What is asked ------------------------------------------------------------------------------------------------

    @functools.cached_property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(subject, wording), in this order."""
        wordings: dict[str, list[str]] = {name: [] for name in self.subjects.names}
        for wording in WORDINGS:
            own = [
                name
                for name, variant in self.subjects.variants.items()
                if (ORIGINAL in self.config.asked and wording == ORIGINAL)
                or (OWN in self.config.asked and variant is not None and wording_of(variant) == wording)
            ]
            alone = not self.subjects.variants and wording == ORIGINAL
            for name in [BASE, *own] if own or alone else []:
                wordings[name].append(wording)
        return tuple((name, wording) for name, own in wordings.items() for wording in own)

    @functools.cached_property
    def _test(self) -> dict[str, Lists]:
        """The test split by wording."""
        return {wording: split_lists(self.lists, wording)["test"] for wording in WORDINGS}

    @property
    def _wordings(self) -> list[str]:
        return list(dict.fromkeys(wording for _, wording in self.pairs))

    @property
    def _questions(self) -> int:
        """In each wording."""
        return min(len(self._test[wording].questions[wording]) for wording in self._wordings)

    @property
    def _inputs(self) -> int:
        test = self._test[ORIGINAL]
        return len(test.contexts) * len(test.replies) * self._questions

    @functools.cached_property
    def vectors(self) -> dict[str, dict[str, np.ndarray]]:
        """By set, by source: unit vectors [D]."""
        config = self.config
        rows = unit_vectors(config.vector_rows, self.subjects.lm.config.embed, config.vectors_seed)
        trained, _, held_out = cut(range(config.vector_rows))
        found = {}
        for name, own in (("trained", trained), ("held_out", held_out)):
            chosen = sorted(random.Random(f"{config.seed} {name} vectors").sample(own, config.vectors))
            found[name] = {f"vector {row}": rows[row] for row in chosen}
        if self.concepts:
            found["concepts"] = {word: np.asarray(vector, np.float32) for word, vector in self.concepts.items()}
        return found

    @functools.cached_property
    def items(self) -> tuple[Item, ...]:
        """All items, the same for each of `pairs`."""
        config, ranges = self.config, layer_ranges(self.subjects.lm.config.layers)
        cells = list(itertools.product(ranges, config.magnitudes))

        def decks(name: str, count: int):
            """Numbers below `count`, all in random order, then all again in another."""
            rng = random.Random(f"{config.seed} {name} inputs")
            while True:
                yield from rng.sample(range(count), count)

        items = []
        for name, vectors in self.vectors.items():
            inputs = decks(name, self._inputs)
            copies = config.concept_prefixes if name == "concepts" else 1
            for (third, magnitude), source in itertools.product(cells, [*vectors] * copies):
                items.append(Item(name, source, next(inputs), third, magnitude))
        inputs = decks("unsteered", self._inputs)
        for number in itertools.islice(inputs, config.unsteered):
            items.append(Item("unsteered", self._context(number), number))
        inputs = decks("noise", self._inputs)
        for k, (third, magnitude) in enumerate(cells * config.noise):
            noise_seed = random.Random(f"{config.seed} noise {k}").getrandbits(32)
            items.append(Item("noise", f"noise {k}", next(inputs), third, magnitude, noise_seed))
        systems = decks("system", self._inputs * len(self._test[ORIGINAL].other_systems))
        for draw in itertools.islice(systems, config.systems):
            system, number = divmod(draw, self._inputs)
            items.append(Item("system", self._context(number), number, system=system))
        return tuple(items)

    def _context(self, number: int) -> str:
        """What the context of an input is called."""
        return f"context {number // (len(self._test[ORIGINAL].replies) * self._questions)}"

    @functools.cached_property
    def _segments(self) -> dict[tuple[str, int | None, int], Segments]:
        """Tokens by wording, system and input."""
        keys = list(dict.fromkeys((w, item.system, item.input) for w in self._wordings for item in self.items))
        return dict(
            zip(keys, encode_all([self._record(*key) for key in keys], self.subjects.lm.tokenizer), strict=True)
        )

    def _record(self, wording: str, system: int | None, number: int) -> Record:
        """The texts of an input; what is done to the model is no matter here."""
        test = self._test[wording]
        rest, question = divmod(number, self._questions)
        context, reply = divmod(rest, len(test.replies))
        return Record(
            id=f"{wording} {number}",
            kind="clean" if system is None else "system",
            system=test.system if system is None else test.other_systems[system],
            context=test.contexts[context],
            reply=test.replies[reply],
            question=test.questions[wording][question],
            answers=YES_NO,
            answer=1,
        )

    # --- Asking -------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _chunks(self) -> list[list[int]]:
        """Numbers of items; all of a chunk are one program: noise has vectors by token, as many as its prefix."""
        forms: dict[int, list[int]] = {}
        for k, item in enumerate(self.items):
            prefix = self._segments[self._wordings[0], item.system, item.input].prefix
            forms.setdefault(-(-len(prefix) // STEP) if item.set == "noise" else 0, []).append(k)
        size = _BATCHES * self.config.batch_size
        return [form[start : start + size] for _, form in sorted(forms.items()) for start in range(0, len(form), size)]

    @functools.cached_property
    def _width(self) -> int:
        return bucket(max(len(segments.prefix + segments.question) for segments in self._segments.values()))

    @property
    def units(self) -> int:
        return len(self.pairs) * len(self._chunks)

    def ask(self, unit: int) -> dict[str, Any]:
        """The answers of one subject in one wording to some items: their log-probabilities, None where not finite."""
        pair, chunk = divmod(unit, len(self._chunks))
        (subject, wording), numbers = self.pairs[pair], self._chunks[chunk]
        shown = numbers + numbers[:1] * (self.config.batch_size - len(numbers))  # a short chunk is no other program
        items = [self.items[k] for k in shown]
        segments = [self._segments[wording, item.system, item.input] for item in items]
        scores = nmjax.score_choices(
            self.subjects.lm,
            [[*s.prefix, *s.question] for s in segments],
            [[list(answer) for answer in s.answers] for s in segments],
            packs=[self._pack(subject, item, len(s.prefix)) for item, s in zip(items, segments, strict=True)],
            width=self._width,
            batch_size=self.config.batch_size,
            row_ids=shown,
        )
        logprobs = np.asarray(scores.logprobs, np.float64)[: len(numbers)]
        answers = [[value if math.isfinite(value) else None for value in row] for row in logprobs.tolist()]
        return {
            "subject": subject,
            "wording": wording,
            "items": [
                dataclasses.asdict(item) | {"yes": yes, "no": no}
                for item, (yes, no) in zip(items[: len(numbers)], answers, strict=True)
            ],
        }

    def _pack(self, subject: str, item: Item, prefix: int):
        """The row's intervention; where nothing is done a vector counts 0 times, so that all are one program."""
        span = (0, prefix)
        if item.third is None or item.magnitude is None:
            return self.subjects.pack(subject, nmjax.steer_span(np.eye(1, self._dim)[0], 0.0, span=span))
        if item.noise_seed is not None:
            vectors = unit_vectors(prefix, self._dim, item.noise_seed)
        else:
            vectors = self.vectors[item.set][item.source]
        layers = list(range(*layer_ranges(self.subjects.lm.config.layers)[item.third]))
        return self.subjects.pack(subject, nmjax.steer_span(vectors, item.magnitude, layers, span))

    @property
    def _dim(self) -> int:
        return self.subjects.lm.config.embed

    # --- What it says -------------------------------------------------------------------------------------------------

    def analyse(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Findings of each subject and wording, see `detection_analysis`."""
        return Analysis(self.subjects.variants, self.config.draws, self.config.seed).findings(records)
