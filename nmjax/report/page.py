"""One self-contained HTML page from an experiment's texts, tables, figures and identity.

Nothing is loaded from anywhere: the style is inside, images are data URIs. It reads on a phone and on paper.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nmjax.report.tables import Table


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
    """A PNG with a caption; `alt` says in words what it shows."""

    png: bytes
    caption: str
    alt: str


@dataclasses.dataclass(frozen=True)
class Details:
    """Nested names and values (a run's identity, a configuration), folded away until asked for."""

    summary: str
    values: Mapping[str, Any]


Block = Heading | Paragraph | Cards | Picture | Details | Table


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


_STYLE = """
:root { --ink: #1f2933; --muted: #5f6c7b; --line: #e4e7eb; --soft: #f7f9fb; --accent: #1d5b9b; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
.subtitle { color: var(--muted); margin: 0 0 1.2rem; max-width: 75ch; }
nav { border-block: 1px solid var(--line); padding: .55rem 0; margin-bottom: 1.6rem; font-size: .92rem; }
nav a { margin-right: 1.3rem; white-space: nowrap; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
p { max-width: 75ch; margin: .6rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.card { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.card .label { color: var(--muted); font-size: .85rem; }
.card .value { font-size: 1.55rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.35; }
.card .remark { color: var(--muted); font-size: .82rem; line-height: 1.4; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--muted); font-size: .88rem; margin: .5rem 0; max-width: 90ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; min-width: 60%; }
th, td { padding: .38rem .5rem; vertical-align: top; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; } tbody tr:hover { background: var(--soft); }
tbody th { font-weight: 600; } td small { display: block; color: var(--muted); font-size: .78rem; }
details { border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; font-size: .85rem; margin: .6rem 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, Menlo, Consolas, monospace; }
@media (max-width: 640px) { main { padding: 1.4rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; }
  /* a wide figure keeps readable letters and scrolls instead */
  figure .scroll img { max-width: none; width: 900px; } }
@media print { nav { display: none; } figure, table { break-inside: avoid; } }
"""


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
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="subtitle">{html.escape(subtitle)}</p>\n'
        + (f"<nav>{contents}</nav>\n" if contents else "")
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
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
            data = base64.b64encode(png).decode("ascii")
            return (
                f'<figure><div class="scroll"><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></div>'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
        case Table():
            return _table(block)
        case Details(summary, values):
            return f"<details><summary>{html.escape(summary)}</summary>{_values(values)}</details>"
    raise TypeError(f"a page cannot show a {type(block).__name__}; wanted one of {Block}")


def _table(table: Table) -> str:
    caption = f"<figcaption>{html.escape(table.caption)}</figcaption>" if table.caption else ""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.headers)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>' + "".join(map(_cell, row[1:])) + "</tr>" for row in table.rows
    )
    return (
        f'<figure>{caption}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</figure>"
    )


def _cell(text: str) -> str:
    """A cell; the interval of `0.61 [0.58, 0.64]*` goes to a smaller second line, or wide tables would not fit."""
    if found := re.fullmatch(r"(\S+) (\[.*\])(.*)", text):
        value, interval, mark = (html.escape(part) for part in found.groups())
        return f"<td>{value}{mark.strip()}<small>{interval}</small></td>"
    return f"<td>{html.escape(text)}</td>"


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
