"""The README.md of an adapter: what it changes, on what it was trained and how, and what came of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.peft_config import PeftConfig
from nmjax.report.tables import with_interval

_ROWS = 12  # of the table of the training's course

_CARD = """---
library_name: peft
{base_line}tags:
- lora
---

# {title}

{summary}

A low-rank adapter in PEFT's format: rank {config.r}, alpha {config.alpha:g}{rslora}, {count:,} trained parameters in
{modules} linear layers ({targets}).
It adds to the base and to no other model: {base} with the fingerprint `{fingerprint}`, the first 16 hex digits of the
SHA-256 of its config and weights.

## Use

```python
import models, nmjax
lm = models.load_adapter(models.load("{loaded}"), "<this folder>")
nmjax.generate(lm, ["..."])
```

`peft.PeftModel.from_pretrained(base, "<this folder>")` reads it, too.

## Data

{data}

## Training

{command}{hyperparameters}

{history}{figures}## Results

{results}
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """One number with its interval, over n items."""

    name: str
    value: float | None  # None where it is undefined
    interval: Sequence[float] | None = None
    n: int | None = None


@dataclasses.dataclass(frozen=True)
class AdapterCard:
    """The facts of a run; `models.save_adapter` adds those of the adapter and its base.

    Attributes:
      title, summary: what it is called, and what it was trained to do, in Markdown.
      data: what it was trained on, with hashes and sizes, in Markdown.
      hyperparameters: name -> value, as the run had them.
      history: the records of `train`, each with its `step`.
      results: what was measured, each with its interval.
      level: of these intervals.
      command: the command line that makes it again.
      figures: name -> PNG, such as the learning curves; written beside the README.
    """

    title: str
    summary: str
    data: str
    hyperparameters: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    results: Sequence[Result]
    level: float = 0.95
    command: str = ""
    figures: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def write_card(
    card: AdapterCard, folder: Path, *, base: str, fingerprint: str, config: PeftConfig, count: int, modules: int
) -> None:
    """Writes README.md and the figures to `folder`.

    Args:
      base, fingerprint: of the model that the adapter is for; "" is a model without a name.
      count, modules: how many numbers are trained, and in how many linear layers.
    """
    for name, png in card.figures.items():
        (folder / f"{name}.png").write_bytes(png)
    targets = ", ".join(config.target_modules)
    if config.layers is not None:
        targets += f" of layers {', '.join(map(str, config.layers))}"
    text = _CARD.format(
        title=card.title,
        summary=card.summary,
        base_line=f"base_model: {base}\n" if base else "",
        base=base or "a model without a name",
        loaded=base or "<the base>",
        fingerprint=fingerprint,
        config=config,
        rslora=", scaled by alpha / sqrt(r)" if config.rslora else "",
        count=count,
        modules=modules,
        targets=targets,
        data=card.data,
        command=f"    {card.command}\n\nmakes it again.\n\n" if card.command else "",
        hyperparameters=_table(["hyperparameter", "value"], [[k, _said(v)] for k, v in card.hyperparameters.items()]),
        history=_history(card.history),
        figures="".join(f"![{name}]({name}.png)\n\n" for name in card.figures),
        results=_results(card),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _history(records: Sequence[Mapping[str, Any]]) -> str:
    """The first and the last records and some between, of whatever numbers any of them has."""
    if not records:
        return ""
    every = -(-len(records) // _ROWS)
    shown = [record for i, record in enumerate(records) if i % every == 0 or record is records[-1]]
    names = list(dict.fromkeys(name for record in records for name, value in record.items() if _is_number(value)))
    return _table(names, [[_said(record.get(name)) for name in names] for record in shown]) + "\n\n"


def _results(card: AdapterCard) -> str:
    rows = [
        [result.name, with_interval(result.value, result.interval), "" if result.n is None else f"{result.n:,}"]
        for result in card.results
    ]
    return _table(["what", f"value [{card.level:.0%} interval]", "n"], rows) if rows else "None yet."


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _said(value: Any) -> str:
    if value is None:
        return "-"
    if not _is_number(value):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
