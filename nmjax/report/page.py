"""One self-contained HTML page from an experiment's texts, tables, figures and identity.

Nothing is loaded from anywhere: style and script are inside, images are data URIs. It reads on a phone, on paper, and
without the script, which does no more than sort tables.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nmjax.report.plots import DPI
from nmjax.report.style import SCRIPT, STYLE
from nmjax.report.tables import Table, sort_key
from nmjax.report.verdicts import MARKS, Verdict, Verdicts


@dataclasses.dataclass(frozen=True)
class Heading:
    """A section's title; it appears in the list of contents, too."""

    text: str


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Plain text, one paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Cards:
    """A few headline numbers: (label, value, remark)."""

    items: Sequence[tuple[str, str, str]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG with a caption; `alt` says in words what it shows. Raises ValueError for other bytes than a PNG's."""

    png: bytes
    caption: str
    alt: str

    def __post_init__(self):
        if not self.png.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"png begins with {self.png[:8]!r}; wanted a PNG")


@dataclasses.dataclass(frozen=True)
class Details:
    """Nested names and values (a run's identity, a configuration), folded away until asked for."""

    summary: str
    values: Mapping[str, Any]


Block = Heading | Paragraph | Cards | Picture | Details | Table | Verdicts


def closing(reading: Sequence[str], identity: Mapping[str, Any]) -> list[Block]:
    """How every page ends: how to read it, a paragraph each, and what run made it."""
    return [
        Heading("How to read this"),
        *map(Paragraph, reading),
        Heading("Identity"),
        Details("Configuration, seeds, versions, hashes", identity),
    ]


def made_at(identity: Mapping[str, Any]) -> str:
    """When a run was made, to the minute: `2026-01-31 23:59 UTC`."""
    return f"{identity['timestamp'][:16].replace('T', ' ')} UTC"


def render_page(title: str, subtitle: str, blocks: Sequence[Block]) -> str:
    """The page as HTML text; every text is escaped."""
    headings = [block.text for block in blocks if isinstance(block, Heading)]
    contents = " ".join(f'<a href="#s{k}">{html.escape(text)}</a>' for k, text in enumerate(headings))
    body, section = [], 0
    for block in blocks:
        body.append(_block(block, section))
        section += isinstance(block, Heading)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="subtitle">{html.escape(subtitle)}</p>\n'
        + (f"<nav>{contents}</nav>\n" if contents else "")
        + "\n".join(body)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _block(block: Block, section: int) -> str:
    match block:
        case Heading(text):
            return f'<h2 id="s{section}">{html.escape(text)}</h2>'
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Cards(items):
            cards = "".join(
                f'<div class="card"><div class="label">{html.escape(label)}</div>'
                f'<div class="value">{html.escape(value)}</div><div class="remark">{html.escape(remark)}</div></div>'
                for label, value, remark in items
            )
            return f'<div class="cards">{cards}</div>'
        case Picture(png, caption, alt):
            return (
                f'<figure><div class="scroll">{_image(png, alt)}</div>'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
        case Table():
            return _table(block)
        case Verdicts(items):
            return f'<ul class="verdicts">{"".join(map(_verdict, items))}</ul>'
        case Details(summary, values):
            return f"<details><summary>{html.escape(summary)}</summary>{_values(values)}</details>"
    raise TypeError(f"a page cannot show a {type(block).__name__}; wanted one of {Block}")


def _image(png: bytes, alt: str) -> str:
    """An image at 100 CSS pixels an inch, so that letters have the same size in all figures of a page."""
    dots = int.from_bytes(png[16:20], "big")  # the width, which every PNG carries there
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(alt)}" width="{round(dots * 100 / DPI)}" src="data:image/png;base64,{data}">'


def _table(table: Table) -> str:
    caption = f"<figcaption>{html.escape(table.caption)}</figcaption>" if table.caption else ""
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{html.escape(cell)}</button></th>'
        for cell in table.headers
    )
    rows = "".join(
        f'<tr><th scope="row"{_key(row[0])}>{html.escape(row[0])}</th>' + "".join(map(_cell, row[1:])) + "</tr>"
        for row in table.rows
    )
    return (
        f'<figure>{caption}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</figure>"
    )


def _key(cell: str) -> str:
    """The attribute that the script sorts by."""
    return f' data-key="{html.escape(str(sort_key(cell)))}"'


def _cell(text: str) -> str:
    """A cell; the interval of `0.61 [0.58, 0.64]*` goes to a smaller second line, or wide tables would not fit."""
    if found := re.fullmatch(r"(\S+) (\[.*\])(.*)", text):
        value, interval, mark = (html.escape(part) for part in found.groups())
        return f"<td{_key(text)}>{value}{mark.strip()}<small>{interval}</small></td>"
    return f"<td{_key(text)}>{html.escape(text)}</td>"


def _verdict(item: Verdict) -> str:
    mark = f'<span aria-hidden="true">{MARKS[item.verdict]}</span>'
    badge = f'<span class="badge {item.verdict}">{mark} {item.verdict}</span>'
    because = f'<div class="because">{html.escape(item.because)}</div>' if item.because else ""
    return f'<li>{badge}<div><div class="claim">{html.escape(item.claim)}</div>{because}</div></li>'


def _values(values: Mapping[str, Any]) -> str:
    """Nested mappings as one list of dotted names and values."""
    pairs = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in _flatten(values))
    return f"<dl>{''.join(pairs)}</dl>"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            flat.append((name, ", ".join(map(str, value))))
        else:
            flat.append((name, "-" if value is None else str(value)))
    return flat
