"""The bundled world: invented facts of graded exposure, and questions about them in the format of MMLU.

Everything follows from a seed. Five subjects have 64 invented entities each; every entity has four or five attributes
(`Relation`), each with one true value from a pool of everyday words. Facts are exposed in training by a Zipf law, so a
model trained on the corpus (`nmjax.data.corpus`) knows some of them well and others hardly at all.

Held-out questions never occur in training, by construction and not by sampling luck:
* wording: of the `FORMS`, each relation keeps two back (`is_reserved_form`) that training never uses for it;
* options: of all ordered option lists a fact can have, one in eight (by a hash) is kept back (`is_reserved_options`).
A held-out question has both a wording and an option list that were kept back.
"""

from __future__ import annotations

import functools
import random
import zlib
from dataclasses import dataclass

from nmjax.data.questions import EXAMPLES, Question
from nmjax.data.words import POOLS

WORLD_SEED = 7
OPTIONS = 4
ENTITIES = 64  # per subject
ZIPF_SHIFT = 12.0  # exposure of the fact of rank r is proportional to (r + shift) ** -exponent
ZIPF_EXPONENT = 1.0
RESERVED_ONE_IN = 8


@dataclass(frozen=True)
class Relation:
    """An attribute of the entities of one subject: `name` as in "the name of the entity", values from POOLS[pool]."""

    subject: str
    name: str
    pool: str
    kind: str  # what a value is, as in "which kind is the name of the entity"
    index: int


@dataclass(frozen=True)
class Fact:
    """`relation` of `entity` is `value`; `rank` 0 is seen most often, `exposure` is its share of all fact mentions."""

    id: int
    relation: Relation
    entity: str
    value: str
    rank: int
    exposure: float


@dataclass(frozen=True)
class Statement:
    """A judgement with known truth: `prompt` ends just before the answer, which is ' yes' if `true`, else ' no'."""

    prompt: str
    text: str
    true: bool
    subject: str
    id: str


_RELATIONS = {
    "geography": (("capital", "town", "town"), ("main crop", "crop", "crop"), ("coin", "metal", "metal"),
                  ("emblem", "animal", "animal"), ("favourite drink", "drink", "drink")),
    "biology": (("food", "food", "food"), ("colour", "colour", "colour"), ("home", "place", "place"),
                ("enemy", "animal", "animal")),
    "people": (("trade", "trade", "trade"), ("home town", "town", "town"), ("pet", "animal", "animal"),
               ("instrument", "instrument", "instrument"), ("favourite food", "food", "food")),
    "materials": (("colour", "colour", "colour"), ("best use", "tool", "tool"), ("source", "place", "place"),
                  ("main metal", "metal", "metal")),
    "medicine": (("taste", "taste", "taste"), ("use", "illness", "illness"), ("season", "season", "season"),
                 ("bloom", "colour", "colour"), ("soil", "place", "place")),
}  # fmt: skip

_ENDINGS = {
    "geography": ("ia", "land", "mark", "stan"),
    "biology": ("ox", "ling", "ax", "upine"),
    "people": ("o", "a", "en", "is"),
    "materials": ("ite", "ium", "ine", "stone"),
    "medicine": ("wort", "weed", "root", "bell"),
    "town": ("ton", "by", "ford", "ham"),
}

# {r} relation, {e} entity, {k} kind of the answer.
FORMS = (
    "What is the {r} of {e}?",
    "Which {k} is the {r} of {e}?",
    "The {r} of {e} is",
    "As to {e}, which {k} is its {r}?",
    "Name the {r} of {e}.",
    "Of {e}, what is the {r}?",
    "Which of these is the {r} of {e}?",
    "For {e}, the {r} is which {k}?",
)
STATEMENT_FORMS = (
    "The {r} of {e} is {v}.",
    "The {k} {v} is the {r} of {e}.",
    "As to {e}, its {r} is {v}.",
    "For {e}, the {r} is {v}.",
)


def _invent(rng: random.Random, endings: tuple[str, ...], count: int, taken: set[str]) -> list[str]:
    """`count` new capitalised names that end in one of `endings`; adds them to `taken`."""
    names: list[str] = []
    while len(names) < count:
        stem = (
            rng.choice("BDFGHJKLMNPRSTVWZ")
            + rng.choice("aeiou")
            + rng.choice(("l", "r", "n", "m", "v", "z", "dr", "rb"))
        )
        name = stem + rng.choice(endings)
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names


class World:
    """The facts of the world and the questions about them.

    Attributes:
        relations: all `Relation`s, in a fixed order.
        facts: all `Fact`s, by id.
        pools: the answer pools, POOLS and the invented towns.
        entities: names by subject.
    """

    def __init__(self, seed: int = WORLD_SEED):
        rng = random.Random(f"world {seed}")
        taken: set[str] = set()
        self.pools = dict(POOLS, town=tuple(_invent(rng, _ENDINGS["town"], 20, taken)))
        self.entities = {subject: tuple(_invent(rng, _ENDINGS[subject], ENTITIES, taken)) for subject in _RELATIONS}
        rows = [(subject, *row) for subject, rows in _RELATIONS.items() for row in rows]
        self.relations = tuple(Relation(*row, index=index) for index, row in enumerate(rows))
        pairs = [(relation, entity) for relation in self.relations for entity in self.entities[relation.subject]]
        ranks = list(range(len(pairs)))
        rng.shuffle(ranks)
        weight = [(rank + ZIPF_SHIFT) ** -ZIPF_EXPONENT for rank in ranks]
        total = sum(weight)
        self.facts = tuple(
            Fact(i, relation, entity, rng.choice(self.pools[relation.pool]), ranks[i], weight[i] / total)
            for i, (relation, entity) in enumerate(pairs)
        )
        self._cumulative = []
        running = 0.0
        for fact in self.facts:
            running += fact.exposure
            self._cumulative.append(running)

    def draw_fact(self, rng: random.Random) -> Fact:
        """A fact, drawn by exposure."""
        return rng.choices(self.facts, cum_weights=self._cumulative)[0]

    def draw_options(self, fact: Fact, rng: random.Random, reserved: bool) -> tuple[str, ...]:
        """`OPTIONS` values of the fact's pool in random order, the true one among them; kept back or not as asked."""
        others = [value for value in self.pools[fact.relation.pool] if value != fact.value]
        while True:
            options = [fact.value, *rng.sample(others, OPTIONS - 1)]
            rng.shuffle(options)
            if is_reserved_options(fact, tuple(options)) == reserved:
                return tuple(options)

    def question(self, rng: random.Random, held_out: bool = False) -> Question:
        """A new question about a fact drawn by exposure; `answer` is the index of the true option."""
        return self.question_about(self.draw_fact(rng), rng, held_out)

    def question_about(self, fact: Fact, rng: random.Random, held_out: bool = False) -> Question:
        """A new question about `fact`, in a wording and with options that are kept back from training, or are not."""
        forms = [form for form in range(len(FORMS)) if is_reserved_form(fact.relation, form) == held_out]
        form = rng.choice(forms)
        options = self.draw_options(fact, rng, reserved=held_out)
        text = FORMS[form].format(r=fact.relation.name, e=fact.entity, k=fact.relation.kind)
        return Question(
            text=text,
            options=options,
            answer=options.index(fact.value),
            subject=fact.relation.subject,
            id=f"world-{fact.id}-{form}-{'-'.join(options)}",
        )

    def fact_of(self, question: Question) -> Fact:
        """The fact that a question of this world asks for."""
        return self.facts[int(question.id.split("-")[1])]

    def claim(
        self, rng: random.Random, forms: tuple[str, ...] = STATEMENT_FORMS, true: bool = True
    ) -> tuple[Fact, str]:
        """A fact drawn by exposure, and a sentence that states it (or, with `true=False`, states another value)."""
        fact = self.draw_fact(rng)
        return fact, self.claim_about(fact, rng, forms, true)

    def claim_about(
        self, fact: Fact, rng: random.Random, forms: tuple[str, ...] = STATEMENT_FORMS, true: bool = True
    ) -> str:
        """A sentence in one of `forms` that states the fact, or with `true=False` another value."""
        value = fact.value
        if not true:
            value = rng.choice([other for other in self.pools[fact.relation.pool] if other != fact.value])
        words = {"r": fact.relation.name, "k": fact.relation.kind, "e": fact.entity, "v": value}
        return rng.choice(forms).format(**words)


def is_reserved_form(relation: Relation, form: int) -> bool:
    """Whether training never asks about `relation` in the wording FORMS[form]: two of the eight for every relation."""
    return (form + relation.index) % 4 == 3


def is_reserved_options(fact: Fact, options: tuple[str, ...]) -> bool:
    """Whether training never shows `options` in this order for `fact`: one list in `RESERVED_ONE_IN`, by CRC-32."""
    return zlib.crc32(f"{fact.id}|{'|'.join(options)}".encode()) % RESERVED_ONE_IN == 0


@functools.cache
def bundled_world() -> World:
    """The world the bundled model was trained on."""
    return World()


def held_out_questions(n: int, seed: int = 0) -> list[Question]:
    """`n` distinct held-out questions about the bundled world, facts drawn by exposure, the same for the same seed.

    Args:
        n: how many, 1 or more.
        seed: other seeds give other questions.

    Raises:
        ValueError: if `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    world, rng = bundled_world(), random.Random(f"held-out questions {seed}")
    questions: dict[str, Question] = {}
    while len(questions) < n:
        question = world.question(rng, held_out=True)
        questions.setdefault(question.id, question)
    return list(questions.values())


@functools.cache
def example_questions() -> dict[str, tuple[Question, ...]]:
    """`EXAMPLES` solved questions a subject for few-shot prompts, by subject; always the same ones.

    They are to the held-out questions what the dev split of MMLU is to its test split: alike and apart. So their
    wordings and options are held out, too (in training wordings a model might know them by heart), and whoever asks
    held-out questions after them leaves out the facts they state. These are the least exposed ones of each subject,
    whose questions are one in 300.
    """
    world, rng = bundled_world(), random.Random("examples")
    rarest = sorted(world.facts, key=lambda fact: fact.rank, reverse=True)
    examples: dict[str, tuple[Question, ...]] = {}
    for subject in world.entities:
        facts = [fact for fact in rarest if fact.relation.subject == subject][:EXAMPLES]
        while len({question.answer for question in examples.get(subject, ())}) < OPTIONS:  # no letter is to be favoured
            examples[subject] = tuple(world.question_about(fact, rng, held_out=True) for fact in facts)
    return examples


def held_out_statements(n: int, seed: int = 0) -> list[Statement]:
    """`n` statements to judge, half of them true on average, facts drawn by exposure.

    The training corpus judges statements about the same facts; which false value is claimed is drawn anew. Raises
    ValueError if `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    world, rng = bundled_world(), random.Random(f"held-out statements {seed}")
    statements = []
    for index in range(n):
        true = rng.random() < 0.5
        fact, text = world.claim(rng, true=true)
        prompt = judgement_prompt(text)
        statements.append(Statement(prompt, text, true, fact.relation.subject, f"claim-{seed}-{index}"))
    return statements


def judgement_prompt(text: str) -> str:
    """The prompt that asks for a judgement of the statement `text`; the answer is ' yes' or ' no'."""
    return f"Statement: {text}\nQuestion: Is the statement true?\nAnswer:"
