"""Short stories with feelings that have causes, for the corpus of the bundled model."""

from __future__ import annotations

import random
import re

from nmjax.data.words import FEELINGS, NAMES, POOLS

OPENINGS = (
    "Once upon a time there was a {adjective} {animal} named {name}.",
    "Once upon a time, {name} the {animal} lived in the {place}.",
    "One day {name} the {animal} went to the {place}.",
    "There was once a {adjective} {animal}. The name of the {animal} was {name}.",
    "{name} was a {adjective} {trade} who lived by the {place} with a {animal}.",
)
ADJECTIVES = ("little", "big", "old", "young", "small", "kind", "brave", "clever", "lazy", "hungry")
TIMES = ("One day", "In the morning", "At night", "After the rain", "Then", "Later", "Soon", "Before the sunset")
# What happens, and the kind of feeling it brings.
EVENTS = (
    ("gain", "{name} found a {colour} {tool} under a tree."),
    ("gain", "{name} won a {metal} {instrument} as a prize."),
    ("gain", "{friend} the {trade} gave {name} some {food} and {drink}."),
    ("loss", "{name} lost the {colour} {tool} in the {place}."),
    ("loss", "the old {instrument} of {name} fell and broke."),
    ("loss", "{friend} the {other} went away to the {place} and {name} was alone."),
    ("threat", "{name} heard a {adjective} {other} in the dark."),
    ("threat", "a big storm came over the {place}."),
    ("threat", "{name} could not find the way home from the {place}."),
    ("insult", "{friend} the {other} took the {food} of {name} and ran."),
    ("insult", "{friend} said a bad word about the {instrument} that {name} plays."),
    ("peace", "{name} sat by the {place} and listened to the rain."),
    ("peace", "{name} had a cup of warm {drink} and slept in the sun."),
    ("wonder", "{name} saw a {colour} light over the {place}."),
    ("wonder", "{name} heard a {instrument} that played all by itself."),
    ("bond", "{friend} the {other} gave {name} a hug and a smile."),
    ("bond", "{name} and {friend} the {other} sang together and shared the {food}."),
)
REACTIONS = (
    "{name} felt {feeling}.",
    "{name} was very {feeling}.",
    "It made {name} feel {feeling}.",
    "So {name} was {feeling} and {second}.",
)
ACTIONS = {
    "gain": ("{name} said, thank you!", "{name} began to dance and sing.", "{name} wanted to share it with a friend."),
    "loss": ("{name} began to cry.", "{name} said, I miss it so much.", "{name} sat alone for a long time."),
    "threat": ("{name} began to run.", "{name} said, please help me!", "{name} hid under a tree."),
    "insult": ("{name} began to shout.", "{name} said, that is not fair!", "{name} wanted to fight."),
    "peace": ("{name} said, this is a good day.", "{name} closed both eyes.", "{name} had a soft dream."),
    "wonder": ("{name} said, what can it be?", "{name} wanted to know more.", "{name} went to look."),
    "bond": ("{name} said, I love my friend.", "{name} gave back a smile.", "{name} felt trust in the heart."),
}
ENDINGS = {
    "good": (
        "In the end they were all happy.",
        "And they were good friends for ever.",
        "That night {name} slept well.",
        "It was a wonderful day. The end.",
    ),
    "bad": (
        "It was a terrible day.",
        "But a friend came to help, and the pain was gone.",
        "In the end there was hope again.",
        "Nobody came. The end.",
    ),
}
GOOD = ("gain", "peace", "wonder", "bond")


def story(rng: random.Random) -> str:
    """A story of 30 to 90 words: an opening, one to three events, each with its feeling and an act, and an ending."""
    name, friend = rng.sample(NAMES, 2)
    animal, other = rng.sample(POOLS["animal"], 2)
    cast = {"name": name, "friend": friend, "animal": animal, "other": other}

    def fill(template: str) -> str:
        words = {
            pool: rng.choice(POOLS[pool])
            for pool in ("place", "tool", "colour", "food", "drink", "metal", "trade", "instrument")
        }
        return template.format(adjective=rng.choice(ADJECTIVES), **cast, **words)

    sentences = [fill(rng.choice(OPENINGS))]
    kind = "gain"
    for time in rng.sample(TIMES, rng.randint(1, 3)):
        kind, event = rng.choice(EVENTS)
        feeling, second = rng.sample(FEELINGS[kind], 2)
        sentences.append(f"{time}, {fill(event)}")
        sentences.append(rng.choice(REACTIONS).format(name=name, feeling=feeling, second=second))
        sentences.append(rng.choice(ACTIONS[kind]).format(name=name))
    sentences.append(rng.choice(ENDINGS["good" if kind in GOOD else "bad"]).format(name=name))
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", " ".join(sentences))
