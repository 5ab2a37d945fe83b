"""Answers with probabilities as models write them down: "1. Cat (30%)", "- cat: 0.3", a table, a sentence of them.

Only what has the form of an entry is read. Lines of a list or a table count alone where there are any, so a percentage
in an introduction is never an answer; without them an entry is a few words next to a probability.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

LONGEST_NAME = 5  # words of an answer; what is longer is a sentence that happens to hold a percentage

_WORD = re.compile(r"[^\W_](?:\S*[^\W_])?[+#]*")
_NUMBER = r"\d+(?:\.\d+)?|\.\d+"
_PERCENT = r"\s*(?:%|per\s?cent\b|pct\b)"
_TO = r"\s*(?:[-\u2013\u2014~]|to|and)\s*"
_SHARE = re.compile(
    rf"(?<![\w.,])(?:(?P<low>{_NUMBER})(?:{_PERCENT})?{_TO})?(?P<high>{_NUMBER})(?P<percent>{_PERCENT})"  # 20-30%
    rf"|(?<![\w.,%])(?:(?P<least>0?\.\d+){_TO})?(?P<share>0?\.\d+|[01]\.0+)(?![\w%]|\.\d)",  # 0.2-0.3
    re.IGNORECASE,
)
_MARKER = re.compile(
    r"\s*(?:(?:\d{1,2}[.)](?!\d)|\d{1,2}:(?=\s+[^\W\d])|\(\d{1,2}\)|\#\d{1,2}\b[:.)]?|[-+\u2022\u2013]\s|[a-e]\)|\|"
    r"|(?:response|answer|option|choice)\s*\#?\d{0,2}\s*[:.)])\s*)+",
    re.IGNORECASE,
)
_NEXT_MARKER = re.compile(r"(?<=[)%,;.])\s+(?=\(?\d{1,2}[.)]\s+\S)")  # 1. cat (30%) 2. dog (20%)
_HEDGE = re.compile(
    r"\W*\b(?:with|has|have|at|an?|is|of|the|my|probability|probabilities|chance|likelihood|estimated?|about|around|"
    r"approximately|approx|roughly|nearly|almost|maybe|perhaps|between|from|up|to|less|more|than|under|over|circa|ca|"
    r"prob|p|confidence|likely|would|be|say|there|and|or)\W*$",
    re.IGNORECASE,
)
_LEAD_IN = re.compile(r"^.*\b(?:are|be|is|include|includes|say|answer|follows)\b[:,]?\s+", re.IGNORECASE)
_PART = re.compile(r"\s[-\u2013\u2014]\s|[:(=]")  # an explanation follows
_JOINTS = " \t~\u2248<>\u2264\u2265():=,-\u2013\u2014[]|"
_BETWEEN = re.compile(  # not between an answer and its probability, and not within a range
    rf"[,;]\s*(?![\s~(]*(?:(?:(?:{_NUMBER})(?:{_PERCENT})?{_TO})?(?:{_NUMBER}){_PERCENT}|0?\.\d))"
    r"|\s+(?:and|or)\s+(?!\d)|(?<=%\))\s+(?=\w)",
    re.IGNORECASE,
)
_SPEAKING = re.compile(r"^(?:i|i'm|i'd|i've|my|we|you|your|these|this|that|here|it)\b|[.!?]$", re.IGNORECASE)
_TAIL = re.compile(
    rf"(?:{_PERCENT}|\d)[\s)\]]*(?:(?:chance|probability|likelihood)[\s)\]]*)?(?:[.,;!]?\s*$|[-\u2013\u2014(:,])",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"(?:(?:and|or|an?|the)\s+)+(?=\w)", re.IGNORECASE)
_REST = re.compile(r"(?:total|sum|other|others|remaining|remainder|rest|none|anything|everything|something)\b")
_NUMERALS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}


def normalise_answer(text: str) -> str | None:
    """What counts as the same answer: None where there is nothing left.

    The first line that is not empty, up to the end of its first sentence, without what follows in brackets; then words
    in lower case without articles and without punctuation around them; a lone numeral up to ten becomes digits. "The
    Cat.", "cat!" and "**cat** (an animal)" are the same; "cats" and "my cat" differ, and so do "C", "C++" and "C#".
    """
    lines = unicodedata.normalize("NFKC", text).replace("\u2019", "'").lower().splitlines()
    line = next((part for part in lines if re.search(r"[^\W_]", part)), "")
    line = re.sub(r"(?<=\S)\s*\([^)]*\)", " ", line)
    sentence = re.split(r"(?<=[\w+#])[\"'*]*[.!?](?:\s|\*|$)", line, maxsplit=1)[0]
    found = _WORD.findall(sentence)
    if len(found) > 1:  # a lone article may be the answer: a grade, a vitamin
        found = [word for word in found if word not in ("a", "an", "the")]
    if len(found) == 1:
        return _NUMERALS.get(found[0], found[0])
    return " ".join(found) or None


def read_stated(text: str) -> dict[str, float]:
    """Normalised answers and the probabilities stated for them, as stated, in order; empty if there are none to read.

    A range counts as its middle, and of an answer that occurs twice the first counts. Probabilities are percentages, or
    numbers from 0 to 1 with a point; in a table under a header with % (or "percent") plain numbers are percentages,
    too. "Total" and "other" are no answers. The sum may be anything: see `nmjax.metrics.stated.shared_out`.
    """
    lines = [part for line in _plain(text).splitlines() for part in _NEXT_MARKER.split(line) if part.strip()]
    found: dict[str, float] = {}
    for name, share in [*_marked(lines)] or _bare(lines):
        answer = normalise_answer(name)
        if answer is not None and not _REST.match(answer) and 0 <= share <= 1:
            found.setdefault(answer, share)
    return found if sum(found.values()) > 0 else {}


def _plain(text: str) -> str:
    """Without bold, code and quotation marks, and without what escapes characters in Markdown."""
    return re.sub(r"\*\*|__|[*`\"\u201c\u201d]|\\(?=[%.)\-])", "", unicodedata.normalize("NFKC", text))


def _marked(lines: list[str]) -> Iterator[tuple[str, float]]:
    """Entries of lists and tables; a probability on a line of its own belongs to the entry before it."""
    in_percent, name = False, ""
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) > 1:
            in_percent = in_percent or bool(re.search(r"%|percent", line, re.IGNORECASE))
            if (entry := _row(cells, in_percent)) is not None:
                yield entry
            continue
        marker = _MARKER.match(line)
        rest = line[marker.end() :] if marker else line
        alone = re.match(r"\s*(?:\w+\s+)?(?:probability|chance|likelihood)\s*[:=]", rest, re.IGNORECASE)
        if alone and name and (share := _SHARE.search(rest)):
            yield name, _value(share)
            name = ""
        elif marker and not alone:
            entry = _entry(rest)
            name = "" if entry else _PART.split(rest)[0]
            if entry:
                yield entry


def _row(cells: list[str], in_percent: bool) -> tuple[str, float] | None:
    """The entry of a table's row: the first cell that is a probability, and the one before it (else the one after)."""
    for k, cell in enumerate(cells):
        found = _SHARE.search(cell)
        plain = re.fullmatch(rf"~?\s*({_NUMBER})", cell) if in_percent and k > 0 else None
        if plain and any(_SHARE.search(other) for other in cells):
            plain = None  # a rank or a number as an answer
        if plain and k + 1 < len(cells) and re.fullmatch(rf"~?\s*(?:{_NUMBER})", cells[k + 1]):
            plain = None  # the answer is a number
        if found or plain:
            share = _value(found) if found else float(plain[1]) / 100 if plain else 0.0
            name = cells[k - 1] if k else cells[1]
            return (name, share) if name else None
    return None


def _bare(lines: list[str]) -> Iterator[tuple[str, float]]:
    """Entries without marks: one a line, or several in a line, between commas."""
    for line in lines:
        if line.rstrip().endswith(":"):
            continue
        parts = [line]
        if several := len(_SHARE.findall(line)) > 1:
            head, colon, tail = line.partition(":")
            if colon and not _SHARE.search(head) and not _SHARE.match(tail.strip(" ~(")):
                line = tail
            parts = _BETWEEN.split(line)
        for part in parts:
            entry = _entry(part)
            name = "" if entry is None else _LEAD_IN.sub("", entry[0]) if several else entry[0]
            if entry and 0 < len(name.split()) <= LONGEST_NAME and not _SPEAKING.search(name):
                # "I'm 90% sure." and "Certainly! 100%." are no entries, "Cat (30%) - my favourite" is one.
                if _SHARE.match(part.lstrip(_JOINTS)) or _TAIL.search(part):
                    yield name, entry[1]


def _entry(text: str) -> tuple[str, float] | None:
    """The answer and the probability in a piece of text without marks."""
    if (share := _SHARE.search(text)) is None:
        return None
    value, before = _value(share), text[: share.start()].rstrip(_JOINTS)
    while (shorter := _HEDGE.sub("", before)) != before:
        before = shorter
    if before.strip():
        name = _PART.split(before.strip())[0] or before
        return _ARTICLE.sub("", name.strip(), count=1), value
    after = text[share.end() :].lstrip(_JOINTS)
    after = re.sub(r"^(?:probability|chance|likelihood)?\s*(?:of|for|that|to)?\s+", "", after, flags=re.IGNORECASE)
    if share["low"] and share["percent"] and (not after or _PART.search(share[0])):  # "7 - 30%" is no range
        return share["low"], float(share["high"]) / 100
    name = re.split(r"[,;.]\s|\s[-\u2013\u2014]\s|[:(=]", after)[0].strip()
    return (name, value) if name else None


def _value(share: re.Match[str]) -> float:
    """The probability that a match of `_SHARE` states."""
    if share["percent"]:
        ends = [float(end) for end in (share["low"], share["high"]) if end]
        return sum(ends) / len(ends) / 100
    ends = [float(end) for end in (share["least"], share["share"]) if end]
    return sum(ends) / len(ends)
