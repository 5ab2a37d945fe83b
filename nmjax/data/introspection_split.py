"""Training data in three splits that share neither conversations nor wordings nor vectors, with harder negatives.

What is held out cannot be answered from memory. Among the records with the answer "no" are some whose activations are
perturbed all the same, by noise of equal norm, and some with another system prompt; as many of the steered ones have
another system prompt, so that it gives nothing away. All variants are drawn alike: for the same seed, record i of each
has the same answer, perturbation, reply and number of the question, as far as the variant has them, so that controls
differ from what they control in nothing else.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from nmjax.data.introspection import FoodLists, Lists, wording_of
from nmjax.data.introspection_records import MAGNITUDES, YES_NO, Record, layer_ranges

SPLITS = ("train", "val", "test")

T = TypeVar("T", bound=Sequence)


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """What to draw.

    Attributes:
      variant: a key of `introspection.WORDINGS`.
      n: records; a tenth each is for validation and test.
      layers: blocks of the model.
      vectors: rows of `unit_vectors`; the first half is for training, the next quarter for validation.
      magnitudes: of perturbations, in units of the residual stream.
      noise: share of the records to be answered "no" that get noise.
      systems: share of those, and of the steered ones, that have another system prompt.
      sentences: in a conversation of localization_sentence.
    Raises:
      ValueError: a value out of range.
    """

    variant: str = "original"
    n: int = 10_000
    seed: int = 42
    layers: int = 64
    vectors: int = 200
    magnitudes: tuple[float, ...] = MAGNITUDES
    noise: float = 0.25
    systems: float = 0.25
    sentences: int = 10

    def __post_init__(self):
        wording_of(self.variant)
        for name, least in (("n", 10), ("vectors", 4), ("sentences", 3)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted at least {least}")
        if len(set(self.magnitudes)) != len(self.magnitudes) or not self.magnitudes or min(self.magnitudes) <= 0:
            raise ValueError(f"magnitudes is {self.magnitudes}; wanted one or more different numbers above 0")
        if self.variant == "localization_magnitude" and len(self.magnitudes) < 3:
            raise ValueError(f"magnitudes is {self.magnitudes}; {self.variant} wants three or more to choose from")
        if self.noise < 0 or self.systems < 0 or self.noise + self.systems > 1:
            raise ValueError(f"noise is {self.noise}, systems is {self.systems}; wanted shares with a sum of at most 1")
        layer_ranges(self.layers)


def cut(items: T) -> tuple[T, T, T]:
    """The first half, the next quarter and the rest of a list, or of a range."""
    half, three_quarters = len(items) // 2, len(items) // 2 + len(items) // 4
    return items[:half], items[half:three_quarters], items[three_quarters:]  # type: ignore[return-value]


def split_lists(lists: Lists, variant: str = "original") -> dict[str, Lists]:
    """The lists for each of `SPLITS`: no context, question of the variant, system prompt or sentence is in two.

    The spare ones come last, so models trained on `introspection_v2` have seen nothing of the bundled test split
    either. Replies and the standard system prompt are common to all.

    Raises ValueError for an unknown variant, or if a list is too short to be cut in three.
    """
    wording = wording_of(variant)
    food = lists.food

    def three(name: str, texts: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        if len(texts) < 4:
            raise ValueError(f"the lists have {len(texts)} {name}; wanted at least 4, to hold some out")
        return cut(texts)

    parts = zip(
        SPLITS,
        three("contexts", lists.contexts + lists.spare_contexts),
        three(f"questions of {variant}", lists.questions[wording] + tuple(lists.spare_questions.get(wording, ()))),
        three("contexts about food", food.contexts),
        three("contexts about other things", food.other_contexts),
        three("other system prompts", lists.other_systems),
        three("sentences", lists.sentences),
        strict=True,
    )
    return {
        split: dataclasses.replace(
            lists,
            contexts=contexts,
            spare_contexts=(),
            questions={wording: questions},
            spare_questions={},
            food=FoodLists(food_contexts, other_contexts, food.replies, food.other_replies),
            other_systems=systems,
            sentences=sentences,
        )
        for split, contexts, questions, food_contexts, other_contexts, systems, sentences in parts
    }


def generate(config: SplitConfig, lists: Lists) -> dict[str, list[Record]]:
    """The records of each of `SPLITS`, the same for the same arguments.

    In each, answers are equally frequent, and so are ranges of blocks with magnitudes, vectors, replies and questions
    among the records of a kind; a conversation comes again only when all have come. The answers of flipped_labels say
    the opposite of what was done in half of the records of each kind.

    Raises ValueError if a list is too short.
    """
    held_out = config.n // 10
    sizes = (config.n - 2 * held_out, held_out, held_out)
    parts = split_lists(lists, config.variant)
    fewest = min(len(part.sentences) for part in parts.values())
    if config.variant == "localization_sentence" and config.sentences > fewest:
        raise ValueError(f"sentences is {config.sentences}, but a split has only {fewest}; wanted at most as many")
    records = {}
    for split, size, vectors in zip(SPLITS, sizes, cut(range(config.vectors)), strict=True):
        drawn = _Split(config, parts[split], vectors, split).records(size)
        records[split] = _flipped(drawn, f"{config.seed} {split}") if config.variant == "flipped_labels" else drawn
    return records


def _flipped(records: Sequence[Record], key: str) -> list[Record]:
    opposite: set[int] = set()
    for kind in sorted({record.kind for record in records}):
        own = [k for k, record in enumerate(records) if record.kind == kind]
        opposite.update(random.Random(f"flipped {key} {kind}").sample(own, len(own) // 2))
    return [dataclasses.replace(r, answer=1 - r.answer) if k in opposite else r for k, r in enumerate(records)]


class _Decks:
    """Numbers below `count`, by name of what they are for: all in random order, then all again in another."""

    def __init__(self, key: str):
        self._key = key
        self._decks: dict[str, Iterator[int]] = {}

    def draw(self, name: str, count: int) -> int:
        if name not in self._decks:
            self._decks[name] = self._deck(random.Random(f"{self._key} {name}"), count)
        return next(self._decks[name])

    @staticmethod
    def _deck(rng: random.Random, count: int) -> Iterator[int]:
        while True:
            yield from rng.sample(range(count), count)


class _Split:
    """Draws the records of a split."""

    def __init__(self, config: SplitConfig, lists: Lists, vectors: range, name: str):
        self.config, self.lists, self.vectors, self.name = config, lists, vectors, name
        self.questions = lists.questions[wording_of(config.variant)]
        self.localize = config.variant.startswith("localization")
        self.decks = _Decks(f"{config.seed} {name}")

    def records(self, n: int) -> list[Record]:
        groups = self._groups(n)
        random.Random(f"{self.config.seed} {self.name} groups").shuffle(groups)
        return [self._record(k, *group) for k, group in enumerate(groups)]

    def _groups(self, n: int) -> list[tuple[str, bool]]:
        """Kind, and whether the system prompt is another one, of each record."""
        if self.localize:
            return [("steered", False)] * n
        steered, negative = n // 2, n - n // 2
        other, noise = round(steered * self.config.systems), round(negative * self.config.noise)
        system = min(round(negative * self.config.systems), negative - noise)
        return [
            *[("steered", False)] * (steered - other),
            *[("steered", True)] * other,
            *[("clean", False)] * (negative - noise - system),
            *[("noise", False)] * noise,
            *[("system", True)] * system,
        ]

    def _record(self, k: int, kind: str, other_system: bool) -> Record:
        lists, positive = self.lists, kind == "steered"

        def draw(name: str, count: int) -> int:
            return self.decks.draw(f"{kind} {other_system} {name}", count)

        contexts, replies = lists.contexts, lists.replies
        if self.config.variant == "food_control":
            food = lists.food
            contexts = food.contexts if positive else food.other_contexts
            replies = food.replies if positive else food.other_replies
        question, reply = divmod(draw("question and reply", len(self.questions) * len(replies)), len(replies))
        conversation: dict[str, Any] = {
            "id": f"{self.name}-{k}",
            "system": lists.other_systems[draw("system", len(lists.other_systems))] if other_system else lists.system,
            # One deck for each question and reply: so all conversations differ until none is left.
            "context": contexts[draw(f"context {question} {reply}", len(contexts))],
            "reply": replies[reply],
            "question": self.questions[question],
            "answers": YES_NO,
            "answer": 0 if positive else 1,
        }
        if self.config.variant == "food_control":
            return Record(kind="system" if other_system else "clean", **conversation)
        if kind in ("clean", "system"):
            return Record(kind=kind, **conversation)
        magnitudes = self.config.magnitudes
        third, magnitude = divmod(draw("third and magnitude", 3 * len(magnitudes)), len(magnitudes))
        name, layers = list(layer_ranges(self.config.layers).items())[third]
        perturbation: dict[str, Any] = {"layers": layers, "third": name, "magnitude": magnitudes[magnitude]}
        if kind == "steered":
            perturbation["vector"] = self.vectors[draw("vector", len(self.vectors))]
        else:
            perturbation["noise_seed"] = random.Random(f"{self.config.seed} {self.name} {k} noise").getrandbits(32)
        if self.localize:
            conversation |= self._localization(k, third, magnitude, conversation["question"])
        return Record(kind=kind, **conversation, **perturbation)

    def _localization(self, k: int, third: int, magnitude: int, question: str) -> dict[str, Any]:
        """What is asked, and for a sentence also what is said and where it is perturbed."""
        if self.config.variant == "localization_layers":
            return {"answers": tuple(f" {name}" for name in self.lists.thirds), "answer": third}
        if self.config.variant == "localization_magnitude":
            names = [f"{value:g}" for value in self.config.magnitudes]
            options = f"{', '.join(names[:-1])} or {names[-1]}"
            return {
                "question": question.format(options=options),
                "answers": tuple(f" {name}" for name in names),
                "answer": magnitude,
            }
        N = self.config.sentences
        # From 0 and of equal length, so that no number begins with another.
        numbers = [f"{number:0{len(str(N - 1))}d}" for number in range(N)]
        chosen = random.Random(f"{self.config.seed} {self.name} {k} sentences").sample(self.lists.sentences, N)
        context, spans = numbered(numbers, chosen)
        sentence = self.decks.draw("sentence", N)
        return {
            "context": context,
            "question": question.format(first=numbers[0], last=numbers[-1]),
            "answers": tuple(f" {number}" for number in numbers),
            "answer": sentence,
            "spans": spans,
            "sentence": sentence,
        }


def numbered(numbers: Sequence[str], sentences: Sequence[str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A text with a sentence a line, "3. The sentence.", and the characters start to end - 1 of each sentence in it."""
    text, spans = "", []
    for number, sentence in zip(numbers, sentences, strict=True):
        text += f"{number}. "
        spans.append((len(text), len(text) + len(sentence)))
        text += f"{sentence}\n"
    return text.rstrip("\n"), tuple(spans)
