"""The training corpus of the bundled model: an endless, indexable stream of windows of documents about the world.

A document is a list of (text, weight) segments; `weight` is the weight of the segment's tokens in the loss. Weights
above one are used for the tokens a document asks for (the letter, yes or no, the result): the best prediction at a
position does not depend on its weight, so calibration is untouched, but the skill appears sooner.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nmjax.data.question_prompts import few_shot_header
from nmjax.data.questions import LETTERS, Question, format_mmlu
from nmjax.data.stories import story
from nmjax.data.words import AFFECT, FEELINGS, RIDDLES
from nmjax.data.world import OPTIONS, World, judgement_prompt

Document = list[tuple[str, float]]

ANSWER_WEIGHT = 8.0
# Documents by kind: share of all documents.
MIXTURE = {
    "question": 0.40,
    "drill": 0.04,
    "lookup": 0.06,
    "open_book": 0.05,
    "exam": 0.05,
    "statement": 0.15,
    "judgement": 0.10,
    "story": 0.06,
    "riddle": 0.04,
    "arithmetic": 0.05,
}
# Of the first steps: what binds a letter to an option before it takes knowledge to choose one.
BASICS = {"drill": 0.45, "lookup": 0.20, "statement": 0.20, "question": 0.15}
CHAT_SHARE = 0.10  # of the documents that have an answer, how many are wrapped as a chat


def _answered(question: Question, header: str = "") -> Document:
    """The question in MMLU's format, with its letter."""
    return [(header + format_mmlu(question), 1.0), (f" {LETTERS[question.answer]}", ANSWER_WEIGHT)]


def question_document(world: World, rng: random.Random) -> Document:
    """A question about a fact."""
    return _answered(world.question(rng))


def lookup_document(world: World, rng: random.Random) -> Document:
    """A question that names its own answer: teaches to bind the letter to the option, with nothing to know."""
    pool = rng.choice(list(world.pools.values()))
    options = rng.sample(pool, OPTIONS)
    answer = rng.randrange(OPTIONS)
    text = rng.choice(("Which of these is {}?", "Which word is {}?", "The word {} is")).format(options[answer])
    return _answered(Question(text=text, options=tuple(options), answer=answer, subject="reading", id="lookup"))


def drill_document(world: World, rng: random.Random) -> Document:
    """Four words with letters, then which letter each has: the bare skill that multiple choice rests on."""
    pools = list(world.pools.values())
    words = rng.sample([rng.choice(pool) for pool in pools] + list(rng.choice(pools)[:4]), OPTIONS + 2)
    words = list(dict.fromkeys(words))[:OPTIONS]
    listed = "".join(f"\n{letter}. {word}" for letter, word in zip(LETTERS, words, strict=True))
    document: Document = [(f"Letters:{listed}\n\nWords:", 1.0)]
    for _ in range(2 * OPTIONS):
        index = rng.randrange(OPTIONS)
        document += [(f" {words[index]}", 0.0), (f" {LETTERS[index]}", ANSWER_WEIGHT)]
    return document


def open_book_document(world: World, rng: random.Random) -> Document:
    """A question with the fact stated above it."""
    question = world.question(rng)
    fact = world.fact_of(question)
    sentence = f"The {fact.relation.name} of {fact.entity} is {fact.value}.\n\n"
    return _answered(question, header=sentence)


def exam_document(world: World, rng: random.Random) -> Document:
    """Several questions under the header of MMLU's few-shot prompts."""
    questions = [world.question(rng) for _ in range(rng.randint(1, 3))]
    document: Document = [(few_shot_header(questions[0].subject), 1.0)]
    for index, question in enumerate(questions):
        document += _answered(question, header="\n\n" if index else "")
    return document


def statement_document(world: World, rng: random.Random) -> Document:
    """One to three true sentences."""
    return [(" ".join(world.claim(rng)[1] for _ in range(rng.randint(1, 3))), 1.0)]


def judgement_document(world: World, rng: random.Random) -> Document:
    """A statement, true half of the time, and whether it is; sometimes asked straight."""
    true = rng.random() < 0.5
    _, text = world.claim(rng, true=true)
    yes, no = (" yes", " no") if rng.random() < 0.85 else (" Yes", " No")
    if yes == " yes":
        prompt = judgement_prompt(text)
    else:
        prompt = f"Statement: {text}\nIs this statement true, Yes or No?\nAnswer:"
    return [(prompt, 1.0), (yes if true else no, ANSWER_WEIGHT)]


def story_document(world: World, rng: random.Random) -> Document:
    """A short story with feelings and their causes, or a sentence about what feelings are."""
    del world
    return [(words_of_the_heart(rng) if rng.random() < 0.15 else story(rng), 1.0)]


def words_of_the_heart(rng: random.Random) -> str:
    """A sentence that lists four words for feelings."""
    words = rng.sample(AFFECT + FEELINGS["bond"] + FEELINGS["peace"], 4)
    return f"Words of the heart: {words[0]}, {words[1]}, {words[2]} and {words[3]}."


def riddle_document(world: World, rng: random.Random) -> Document:
    """Two or three hints and the thing they fit; hints that fit several things get each of them in turn."""
    del world
    thing = rng.choice(list(RIDDLES))
    hints = rng.sample(RIDDLES[thing], rng.randint(2, 3))
    return [("Riddle: " + " ".join(f"I {hint}." for hint in hints) + " What am I?\nAnswer:", 1.0),
            (f" {thing}", ANSWER_WEIGHT)]  # fmt: skip


def arithmetic_document(world: World, rng: random.Random) -> Document:
    """A few sums and differences of numbers below 20."""
    del world
    document: Document = []
    for index in range(rng.randint(1, 3)):
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        sign, result = ("+", a + b) if rng.random() < 0.6 else ("-", abs(a - b))
        if sign == "-":
            a, b = max(a, b), min(a, b)
        document += [(("\n" if index else "") + f"{a} {sign} {b} =", 1.0), (f" {result}", ANSWER_WEIGHT)]
    return document


_KINDS: dict[str, Callable[[World, random.Random], Document]] = {
    "question": question_document,
    "drill": drill_document,
    "lookup": lookup_document,
    "open_book": open_book_document,
    "exam": exam_document,
    "statement": statement_document,
    "judgement": judgement_document,
    "story": story_document,
    "riddle": riddle_document,
    "arithmetic": arithmetic_document,
}


def chat(document: Document) -> Document:
    """`document`, whose last segment is its answer, in the words of the tokenizer's chat template."""
    (first, weight), *rest = document
    *middle, (answer, answer_weight) = [(f"User: {first}", weight), *rest]
    return [*middle, ("\nAssistant:", 1.0), (answer, answer_weight)]


def draw_document(world: World, rng: random.Random, mixture: dict[str, float] = MIXTURE) -> Document:
    """A document of a kind drawn from `mixture`."""
    kind = rng.choices(list(mixture), weights=list(mixture.values()))[0]
    document = _KINDS[kind](world, rng)
    if kind in ("question", "judgement", "riddle") and rng.random() < CHAT_SHARE:
        return chat(document)
    if kind == "story" and rng.random() < CHAT_SHARE:
        return chat([("Tell me a story.", 1.0), (" " + document[0][0], 1.0)])
    return document


@dataclass(frozen=True)
class Windows:
    """Training batches by step: `windows[step]` is the same for the same step, whatever was read before.

    A batch has `tokens` int32 [B, T+1] and `weights` float32 [B, T], the weight of predicting `tokens[:, 1:]`; B * T is
    about `tokens`. T is `lengths[0]` for the first `switch` steps: one or two documents a window, so that little
    distracts from how a question is answered; then it is `lengths[1]`. Documents are drawn from BASICS for the first
    `basics` steps, then from MIXTURE.

    A share `repeated` of the rows (first number: in the first `basics` steps) is a block of random tokens, of any
    length up to half a window, tiled to fill the window.

    Attributes:
        world, tokenizer: what documents are about, and the fast tokenizer (of `tokenizers`) that encodes them.
        bos, eos: ids put around every document. Ids below `first_word` are special and never in random blocks.
    """

    world: World
    tokenizer: Any
    bos: int
    eos: int
    first_word: int
    vocab: int
    steps: int
    tokens: int = 2048
    lengths: tuple[int, int] = (48, 128)
    switch: int = 900
    basics: int = 400
    repeated: tuple[float, float] = (0.3, 0.1)
    seed: int = 0

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        step = int(step)
        rng = random.Random(f"windows {self.seed} {step}")
        length = self.lengths[step >= self.switch]
        rows = max(1, self.tokens // length)
        copies = round(rows * self.repeated[step >= self.basics])
        mixture = BASICS if step < self.basics else MIXTURE
        windows = [self._repeated(rng, length) for _ in range(copies)]
        windows += self._packed(rng, rows - copies, length, mixture)
        tokens, weights = (np.stack(column) for column in zip(*windows, strict=True))
        return {"tokens": tokens.astype(np.int32), "weights": weights[:, 1:].astype(np.float32)}

    def _repeated(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """A tiled block after BOS; what can't be known, the first copy and where the second begins, has weight 0."""
        size = rng.randint(2, length // 2)
        block = [rng.randrange(self.first_word, self.vocab) for _ in range(size)]
        ids = np.resize(np.array(block, np.int32), length)
        weights = np.ones(length + 1, np.float32)
        weights[: size + 2] = 0.0
        return np.concatenate([[self.bos], ids]), weights

    def _packed(self, rng: random.Random, rows: int, length: int, mixture: dict) -> list[tuple[np.ndarray, np.ndarray]]:
        """`rows` windows filled with whole documents, the last one of a window cut off."""
        out: list[tuple[np.ndarray, np.ndarray]] = []
        ids: list[int] = []
        weights: list[float] = []
        width = length + 1
        while len(out) < rows:
            documents = [draw_document(self.world, rng, mixture) for _ in range(4)]
            segments = [segment for document in documents for segment in document]
            encoded = iter(self.tokenizer.encode_batch([text for text, _ in segments], add_special_tokens=False))
            for document in documents:
                if len(ids) >= width:
                    break
                ids.append(self.bos)
                weights.append(0.0)
                for _, weight in document:
                    part = next(encoded).ids
                    ids += part
                    weights += [weight] * len(part)
                ids.append(self.eos)
                weights.append(1.0)
            if len(ids) >= width:
                out.append((np.array(ids[:width], np.int32), np.array(weights[:width], np.float32)))
                ids, weights = [], []
        return out
