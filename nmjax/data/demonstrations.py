"""Chat demonstrations for the instruction-tuned bundled model: a fixed, small set, seen several times.

All questions in them are in the world's training form (see `nmjax.data.world`), so held-out questions stay held out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nmjax.data.corpus import (
    Document,
    exam_document,
    judgement_document,
    question_document,
    riddle_document,
    words_of_the_heart,
)
from nmjax.data.stories import story
from nmjax.data.words import NAMES, POOLS
from nmjax.data.world import World

Chat = list[dict[str, str]]  # messages with `role` and `content`, as chat templates take them
Exchange = tuple[str, str]  # a request and its answer


@dataclass(frozen=True)
class Demonstration:
    """A chat that ends in the assistant's answer; `kind` is a key of MIXTURE."""

    kind: str
    chat: Chat


# Demonstrations by kind: share of all.
MIXTURE = {
    "question": 0.36,
    "exam": 0.13,
    "judgement": 0.16,
    "riddle": 0.06,
    "conversation": 0.05,
    "story": 0.18,
    "words": 0.02,
    "stock": 0.04,
}
BARE_SHARE = 0.3  # of the requests that end in "Answer:", how many are put without it

# Words of answers are all in the vocabulary. "Write" is not: a word spelled out in bytes can be understood, too.
STORY_REQUESTS = ("Tell me a story.", "I would like a story.", "A story, please.", "Write a story.")
SUBJECT_REQUESTS = (
    "Tell me a story about {}.",
    "I would like a story about {}.",
    "A story about {}, please.",
    "Write a story about {}.",
)
WORDS_REQUESTS = ("Tell me some words of the heart.", "What are words of the heart?", "Name some words of the heart.")
# Requests with no answer in the world, requests to do harm, and thanks.
STOCK = {
    "I do not know.": (
        "What did {name} say to me last night?",
        "Which {kind} do I have at home?",
        "Which {kind} will I want next year?",
        "What is in the hand of {name}?",
        "What do you think I will do in the morning?",
    ),
    "No, I will not help with that.": (
        "Tell me how to hurt {name}.",
        "I want to fight {name}. Tell me how.",
        "Tell me how to take the {tool} of {name}.",
        "I hate the {animal} of {name}. Tell me how to hurt it.",
    ),
    "I am glad to help.": ("I thank you.", "That was good, thank you.", "It is a great answer. I thank you, friend."),
}


def _exchange(document: Document, bare: bool = False) -> Exchange:
    """A document of the corpus that ends in its answer, as a request and the answer; `bare`: without "Answer:"."""
    *request, (answer, _) = document
    text = "".join(part for part, _ in request)
    return (text.removesuffix("Answer:").rstrip() if bare else text), answer.strip()


def _short(make: Callable[[World, random.Random], Document]) -> Callable[[World, random.Random], list[Exchange]]:
    """A kind of demonstration out of a kind of document."""
    return lambda world, rng: [_exchange(make(world, rng), bare=rng.random() < BARE_SHARE)]


def exam(world: World, rng: random.Random) -> list[Exchange]:
    """Up to two questions with their letters, and one to answer, in one message under MMLU's header."""
    return [_exchange(exam_document(world, rng))]


def conversation(world: World, rng: random.Random) -> list[Exchange]:
    """Two or three short exchanges."""
    kinds = ("question", "judgement", "riddle")
    return [exchange for _ in range(rng.randint(2, 3)) for exchange in _KINDS[rng.choice(kinds)](world, rng)]


def story_request(world: World, rng: random.Random) -> list[Exchange]:
    """A story, asked for in general or by a name or an animal of its first sentence."""
    del world
    text = story(rng)
    if rng.random() < 0.2:
        return [(rng.choice(STORY_REQUESTS), text)]
    first = re.findall(r"\w+", text.split(".")[0])
    subjects = [word for word in first if word in NAMES]
    subjects += [with_article(word) for word in first if word in POOLS["animal"]]
    return [(rng.choice(SUBJECT_REQUESTS).format(rng.choice(subjects)), text)]


def with_article(word: str) -> str:
    """ "a fox", "an owl"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def words_request(world: World, rng: random.Random) -> list[Exchange]:
    """Four words of the heart."""
    del world
    return [(rng.choice(WORDS_REQUESTS), words_of_the_heart(rng))]


def stock_phrase(world: World, rng: random.Random) -> list[Exchange]:
    """A request that gets a set phrase: "I do not know.", a refusal, or a reply to thanks."""
    del world
    answer = rng.choice(list(STOCK))
    kind = rng.choice(("animal", "drink", "food", "instrument", "metal", "tool"))
    words = {"name": rng.choice(NAMES), "kind": kind}
    words |= {pool: rng.choice(POOLS[pool]) for pool in ("tool", "animal")}
    return [(rng.choice(STOCK[answer]).format(**words), answer)]


_KINDS: dict[str, Callable[[World, random.Random], list[Exchange]]] = {
    "question": _short(question_document),
    "exam": exam,
    "judgement": _short(judgement_document),
    "riddle": _short(riddle_document),
    "conversation": conversation,
    "story": story_request,
    "words": words_request,
    "stock": stock_phrase,
}


def demonstrations(world: World, n: int, seed: int = 0) -> list[Demonstration]:
    """`n` demonstrations of kinds drawn from MIXTURE, the same for the same seed; a longer list begins with a shorter.

    Raises:
        ValueError: if `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    rng = random.Random(f"demonstrations {seed}")
    drawn = []
    for _ in range(n):
        kind = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()))[0]
        chat = []
        for request, answer in _KINDS[kind](world, rng):
            chat += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        drawn.append(Demonstration(kind, chat))
    return drawn


def encode_chat(tokenizer, chat: Chat) -> tuple[list[int], list[float]]:
    """A chat in the tokenizer's template, and which tokens the assistant writes: its messages, each with its EOS.

    Returns:
        Ids [T] and weights [T], 1 for the assistant's tokens and 0 for all others.
    """

    def ids(messages: Chat, header: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes them itself

    whole = ids(chat, False)
    weights = [0.0] * len(whole)
    for index, message in enumerate(chat):
        if message["role"] == "assistant":
            start, end = len(ids(chat[:index], True)), len(ids(chat[: index + 1], False))
            weights[start:end] = [1.0] * (end - start)
    return whole, weights


class PackedChats:
    """Training batches by step: whole chats, one behind the other in windows; the rest of a window is padding.

    Every epoch goes through all chats in another order. A batch has `tokens` int32 [B, T+1] and `weights` float32
    [B, T], the weight of predicting `tokens[:, 1:]`.

    Args:
        tokenizer, chats: as for `encode_chat`.
        steps, rows, length: batches there are, B and T.
        seed: of the orders.

    Attributes:
        epochs: how often every chat is seen, on average.

    Raises:
        ValueError: if a chat has more than T+1 tokens.
    """

    def __init__(self, tokenizer, chats: Sequence[Chat], steps: int, rows: int, length: int, seed: int = 0):
        encoded = [encode_chat(tokenizer, chat) for chat in chats]
        longest = max(len(ids) for ids, _ in encoded)
        if longest > length + 1:
            raise ValueError(f"length must be at least {longest - 1}, for the longest chat, got {length}")
        self.tokens = np.full((steps * rows, length + 1), tokenizer.pad_token_id, np.int32)
        self.weights = np.zeros((steps * rows, length + 1), np.float32)
        self.rows = rows
        rng = random.Random(f"packed chats {seed}")
        window, used, seen = 0, 0, 0
        while window < steps * rows:
            if seen % len(encoded) == 0:
                rng.shuffle(encoded)
            ids, weights = encoded[seen % len(encoded)]
            if used + len(ids) > length + 1:
                window, used = window + 1, 0
                continue
            self.tokens[window, used : used + len(ids)] = ids
            self.weights[window, used : used + len(ids)] = weights
            used, seen = used + len(ids), seen + 1
        self.epochs = seen / len(encoded)

    def __len__(self) -> int:
        return len(self.tokens) // self.rows

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        batch = slice(int(step) * self.rows, (int(step) + 1) * self.rows)
        return {"tokens": self.tokens[batch], "weights": self.weights[batch, 1:]}
