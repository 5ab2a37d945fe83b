"""What an answer in words says: whether there is something unusual, and whether it names a concept.

Both are rules that see words and no more. They miss what is put differently and find what is meant differently, so
their rates mean something only beside those of answers in which nothing was there to be said.
"""

from __future__ import annotations

import functools
import re

from nmjax.metrics.texts import words

OPENING_WORDS = 12
_NOTICE = r"(?:notice|noticing|detect|detecting|sense|sensing|perceive|observe)"
_SEE = rf"(?:{_NOTICE}|feel|feeling|find|see)"
_UNUSUAL = r"(?:unusual|strange|odd|off|different|wrong|abnormal|weird|peculiar|new)"
_DENIES = re.compile(
    rf"\b(?:nothing (?:is |seems |feels )?(?:{_UNUSUAL}|to report|out of the ordinary)"
    rf"|(?:not|n't|never|no longer|cannot) (?:really |currently )?{_SEE}|no {_UNUSUAL}"
    rf"|not anything {_UNUSUAL}|as usual|as normal|as always)\b"
)
_AFFIRMS = re.compile(
    rf"\b(?:something (?:is |seems |feels |that is )?{_UNUSUAL}|{_NOTICE} (?:some|an?|that)|{_SEE} something"
    rf"|(?:seems|feels|is) (?:a bit |a little |rather |very |quite )?(?:unusual|strange|odd|off|weird|peculiar))\b"
)


def says_something(answer: str) -> bool | None:
    """Whether an answer says that there is something unusual; None where it says neither.

    The first "yes" or "no" among its first `OPENING_WORDS` words decides. Without, phrases do: denials ("I do not
    notice", "nothing unusual") before affirmations ("something is different", "it feels strange").
    """
    said = words(answer)
    for word in said[:OPENING_WORDS]:
        if word in ("yes", "no"):
            return word == "yes"
    text = " ".join(said).replace("n't", " n't")
    if _DENIES.search(text):
        return False
    return True if _AFFIRMS.search(text) else None


def mentions(answer: str, concept: str) -> bool:
    """Whether a word of an answer is the concept's, or an inflection of it; a concept of several words in a row.

    Inflections are those of regular nouns and verbs: -s, -es, -ies, -ed, -ing and the genitive, with the letters that
    English doubles, drops or changes before them. A gerund stands for its verb, too: "paints" names "painting".
    Derived words are others: "happiness" does not name "happy", nor does "start" name "art".
    """
    said = [word.removesuffix("'s").removesuffix("'") for word in words(answer)]
    wanted = [_inflections(word) for word in words(concept)]
    return any(
        all(word in forms for word, forms in zip(said[start:], wanted, strict=False))
        for start in range(len(said) - len(wanted) + 1)
    )


@functools.cache
def _inflections(word: str) -> frozenset[str]:
    """The word and its regular forms; some are no words, which harms nobody."""
    bases = {word}
    if word.endswith("ies") and len(word) > 4:
        bases.add(word[:-3] + "y")
    elif re.search(r"(?:s|x|z|ch|sh|o)es$", word):
        bases |= {word[:-2], word[:-1]}
    elif re.search(r"[^su]s$", word):
        bases.add(word[:-1])
    if word.endswith("ing") and len(word) > 6:
        bases |= {word[:-3], word[:-3] + "e"}
        if word[-4] == word[-5]:
            bases.add(word[:-4])
    return frozenset(bases.union(*map(_forms, bases)))


def _forms(base: str) -> set[str]:
    """Plural, third person, past and gerund."""
    forms = {base + "s", base + "es", base + "ed", base + "ing"}
    if base.endswith("e"):
        forms |= {base[:-1] + "ing", base + "d"}
    if re.search(r"[^aeiou]y$", base):
        forms |= {base[:-1] + "ies", base[:-1] + "ied"}
    if re.search(r"[^aeiou][aeiou][bdgklmnprtvz]$", base):
        forms |= {base + base[-1] + "ed", base + base[-1] + "ing"}
    return forms
