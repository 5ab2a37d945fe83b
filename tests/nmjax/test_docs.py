"""The tables of docs/effects.md say what the code does."""

import re
from pathlib import Path

import nmjax
from nmjax.interventions.sites import SITES
from nmjax.packs import RULES

TEXT = (Path(__file__).parents[2] / "docs" / "effects.md").read_text(encoding="utf-8")


def rows_after(heading: str) -> list[list[str]]:
    table = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line[:1] == "|"
    ]
    return rows[2:]


def test_sites_table_is_the_code():
    assert rows_after("Sites") == [[site, *SITES[site]] for site in SITES]


def test_dose_table_is_the_code():
    written = rows_after("Doses of packs")
    assert written == [
        [name, rule.python, rule.site, rule.value, rule.identity, ", ".join(rule.directions)]
        for name, rule in RULES.items()
    ]


def test_every_transform_is_documented_and_public():
    names = {re.match(r"\w+", row[0]).group() for row in rows_after("In Python")} - {"your"}
    assert all(callable(getattr(nmjax, name)) for name in names)
    assert names >= {rule.python for rule in RULES.values()}
