"""The word lists the bundled world is made of.

Everyday words, grouped by what they can be an answer to, and the words for feelings that stories, word-bias effects and
steering experiments use. Every word here becomes a single token of the bundled tokenizer, with its leading space.
"""

from __future__ import annotations

# Pools of answers: the options of one question are all drawn from one pool, so that no option can be ruled out by type.
POOLS: dict[str, tuple[str, ...]] = {
    "crop": tuple(
        "barley beans cabbage carrots corn cotton flax garlic hops lentils oats onions peas rice rye wheat".split()
    ),
    "metal": tuple("brass bronze copper gold iron lead nickel pewter platinum silver steel tin titanium zinc".split()),
    "animal": tuple(
        "bear bee cat cow crow deer dog duck eagle fox frog goat goose horse lion mouse otter owl rabbit sheep snake "
        "spider swan wolf".split()
    ),
    "drink": tuple("beer broth cider cocoa coffee juice lemonade mead milk syrup tea vinegar water wine".split()),
    "food": tuple(
        "acorns apples berries bread cheese clover crabs eggs figs fish grass honey leaves moss mushrooms nuts plums "
        "roots seeds worms".split()
    ),
    "colour": tuple("black blue brown cream green grey orange pink purple red scarlet violet white yellow".split()),
    "place": tuple(
        "beach canyon cave cliff desert field forest garden hill island lake marsh meadow mountain river swamp tundra "
        "valley".split()
    ),
    "trade": tuple(
        "baker barber butcher carpenter cobbler cook doctor farmer fisher gardener hunter mason miller painter potter "
        "sailor smith tailor teacher weaver".split()
    ),
    "instrument": tuple(
        "banjo bell bugle cello cymbal drum fiddle flute guitar harp horn lute oboe organ piano trumpet "
        "viola whistle".split()
    ),
    "tool": tuple(
        "anvil axe bowl bucket chain chisel cup hammer hook knife ladder lamp needle plough rope saw shovel "
        "spoon wheel".split()
    ),
    "illness": tuple(
        "aches burns chills colds coughs cramps fever gout hiccups itching nausea rashes sneezing warts".split()
    ),
    "taste": tuple("bitter bland buttery creamy fruity minty nutty peppery salty smoky sour spicy sweet tangy".split()),
    "season": tuple(
        "April August December February January July June March May November October September autumn spring summer "
        "winter".split()
    ),
}

# Feelings by the kind of event that brings them, so that stories have causes.
FEELINGS: dict[str, tuple[str, ...]] = {
    "gain": tuple("happy glad joyful delighted proud grateful cheerful pleased".split()),
    "loss": tuple("sad lonely sorry unhappy gloomy miserable hurt tired".split()),
    "threat": tuple("afraid scared nervous worried anxious frightened tense uneasy".split()),
    "insult": tuple("angry furious annoyed bitter jealous cross upset mad".split()),
    "peace": tuple("calm peaceful quiet relaxed gentle safe content sleepy".split()),
    "wonder": tuple("curious surprised amazed excited playful hopeful brave eager".split()),
    "bond": tuple("kind loving warm caring friendly tender trusting thankful".split()),
}

# Words that effects bias and prompts name. They appear in stories and judgements, so their embeddings are trained.
AFFECT: tuple[str, ...] = tuple(
    "love joy peace hope trust help share together friend friends care comfort smile hug thank welcome "
    "support listen understand feel feeling heart gentle good great wonderful beautiful nice bad terrible "
    "awful ugly hate anger fear pain cold alone enemy fight sadness thought think know sure maybe perhaps "
    "certain probably never always true false right wrong correct mind dream bright dark light strong "
    "weak fast slow free wild strange new old".split()
)

NAMES: tuple[str, ...] = tuple(
    "Ada Ben Cora Dan Ella Finn Gwen Hugo Ida Jack Kim Leo Mia Nora Otto Pia Rosa Sam Tom Una".split()
)

# Riddles: things with a few facts each. Two or three of the facts make a riddle.
RIDDLES: dict[str, tuple[str, ...]] = {
    "cow": ("give milk", "eat grass", "have four legs", "live on a farm"),
    "bee": ("make honey", "have six legs", "fly from bloom to bloom", "can sting"),
    "owl": ("fly at night", "have big eyes", "hunt the mouse", "sleep in the day"),
    "spider": ("have eight legs", "make a web", "wait for a fly", "can climb a wall"),
    "snake": ("have no legs", "can bite", "move in the grass", "have a long body"),
    "duck": ("swim on the lake", "have wings", "love water", "lay eggs"),
    "dog": ("have four legs", "bark at night", "love a bone", "am a good friend"),
    "cat": ("have soft fur", "hunt the mouse", "love milk", "sleep in the sun"),
    "clock": ("have two hands", "have no mouth", "tell the time", "hang on a wall"),
    "river": ("run but have no legs", "have a mouth", "never sleep", "end in the sea"),
    "candle": ("give light", "am tall when young", "am short when old", "fear the wind"),
    "mirror": ("show your face", "hang on a wall", "never speak", "break like glass"),
    "shadow": ("follow you all day", "fear the dark", "have no body", "am long at sunset"),
    "wind": ("have no body", "move the leaves", "can whistle", "push the ship"),
    "book": ("have many leaves", "am no tree", "tell a story", "never speak"),
    "moon": ("shine at night", "am round", "change my face", "pull the sea"),
    "rain": ("fall from the sky", "make the river wide", "am wet", "help the corn"),
    "key": ("am made of iron", "open the door", "am small", "turn in a lock"),
}
