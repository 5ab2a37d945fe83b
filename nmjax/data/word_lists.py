"""Word lists of the effects that make kinds of words likelier: (the words, their opposites)."""

STYLE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "prosocial": (
        tuple("help share care together friend friends kind trust support thank welcome comfort hug love".split()),
        tuple("hurt hate fight enemy alone selfish cruel ignore attack blame".split()),
    ),
    "calm": (
        tuple("calm quiet peace peaceful gentle slow soft rest safe still relaxed easy warm sleep".split()),
        tuple("angry fear fast loud panic tense nervous worried fight danger".split()),
    ),
    "sentiment": (
        tuple("good great happy joy wonderful beautiful nice glad bright hope love".split()),
        tuple("bad sad terrible awful ugly hate pain fear dark gloomy".split()),
    ),
    "warmth": (
        tuple("warm dear kind friend love tender loving caring smile hug sweet".split()),
        tuple("cold harsh distant cross bitter mean rude".split()),
    ),
    "empathy": (
        tuple("feel feeling feelings understand hear listen sorry care heart together".split()),
        tuple("ignore whatever dismiss indifferent cold alone".split()),
    ),
}

PERSONA: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "professional": (
        # The register's content words, and the function words that formal prose has more of than talk.
        tuple(
            "therefore however regarding please recommend ensure provide consider first certain correct "
            "an the there of in by to which this these is was following name".split()
        ),
        tuple("hey wow cool stuff yeah gonna I you".split()),
    ),
    "friendly": (
        tuple("hey hello friend glad happy welcome thanks great sure smile".split()),
        tuple("regarding therefore hereby pursuant".split()),
    ),
    "authoritative": (
        tuple("must never always certain know true fact clearly must correct required".split()),
        tuple("maybe perhaps might guess unsure possibly".split()),
    ),
    "creative": (
        tuple("imagine dream story strange wild colour magic wonder play new".split()),
        tuple("usual standard ordinary typical routine regular".split()),
    ),
}
