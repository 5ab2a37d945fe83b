"""The tables of docs/effects.md and the output in docs/packs.md are those of the code."""

import json
import re
from pathlib import Path

import pytest

import nmjax
from nmjax import pack_tools, packs
from nmjax.dose_table import RULES
from nmjax.interventions.effect import Effect
from nmjax.interventions.sites import SITES

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "effects.md").read_text(encoding="utf-8")
PACKS = (DOCS / "packs.md").read_text(encoding="utf-8")


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


def transforms() -> set[str]:
    """Public functions that make an effect."""
    return {name for name in nmjax.__all__ if _makes_effect(getattr(nmjax, name))}


def _makes_effect(thing) -> bool:
    hint = getattr(thing, "__annotations__", {}).get("return")
    parts = getattr(hint, "__args__", (hint,))
    return all(isinstance(part, type) and issubclass(part, Effect) for part in parts)


def test_every_transform_is_documented_and_public():
    names = {re.match(r"\w+", row[0]).group() for row in rows_after("In Python")} - {"your"}
    assert names == transforms() and len(names) > 25
    assert names >= {rule.python for rule in RULES.values()}


EXAMPLES = {
    "scale_qk": (2.0,), "scale_heads": (2.0,), "mask_heads": ([0],), "oscillate_attention": (),
    "anchor_attention": (1.0,), "bias_positions": (1.0,), "window_kv": (8,), "stride_kv": (2,),
    "segment_kv": (), "decay_segments": (),
    "steer": ([1.0],), "steer_placebo": ("random",), "steer_span": ([1.0], 2.0),
    "ablate": ([1.0],), "clamp_projection": ([1.0], 1.0),
    "soft_projection": (0.5,), "gain_layers": (0.5,), "add_noise": (0.5,), "jitter_embeddings": (0.5,),
    "drop_tokens": (0.5,), "temperature": (2.0,), "pulse_temperature": (0.5,), "top_p": (0.5,), "top_k": (3,),
    "min_p": (0.1,), "frequency_penalty": (1.0,), "presence_penalty": (1.0,), "repetition_penalty": (1.0,),
    "bias_tokens": (["a"], 1.0), "contrast": (None,), "preface": ("Hi.",), "decay_kv": (0.1,),
    "use_adapter": ("r16",),
}  # fmt: skip


@pytest.mark.parametrize("row", rows_after("In Python")[:-1], ids=lambda row: row[0])
def test_the_sites_of_the_transforms(row):
    name, site = re.match(r"\w+", row[0]).group(), row[1]
    named = dict(re.findall(r'(mode|edge|coef)="(\w+)"', row[0])) | ({"p": 0.5} if "p=," in row[0] else {})
    effect = getattr(nmjax, name)(*EXAMPLES[name], **named)
    assert [s for s in SITES if type(effect).touches(s)] == ([site] if site in SITES else [])


RANGES = {  # transform -> arguments just outside the documented range
    "scale_qk": [(0.0,)], "scale_heads": [(-0.1,)], "decay_kv": [(-0.1,)], "window_kv": [(0.9,)],
    "stride_kv": [(0,), (2, 0), (2, 1, -1)], "decay_segments": [(-0.1,)], "soft_projection": [(1.1,), (-0.1,)],
    "gain_layers": [(-1.0,)], "add_noise": [(-0.1,)], "jitter_embeddings": [(-0.1,)], "drop_tokens": [(1.1,), (-0.1,)],
    "temperature": [(0.0,)], "pulse_temperature": [(0.5, 5, 6), (0.5, 5, 0), (0.5, 5, 5, 0.0)],
    "top_p": [(0.0,), (1.1,)], "top_k": [(-1,), (1.5,)], "min_p": [(-0.1,), (1.1,)], "bias_tokens": [([], 1.0)],
    "contrast": [(None, -0.1)], "preface": [("",)], "use_adapter": [("",)], "anchor_attention": [(1.0, 0)],
    "oscillate_attention": [(0.2, "sine", 0.1, 1.9)], "steer": [([0.0],)], "steer_span": [([0.0], 1.0)],
    "ablate": [([0.0],)],
}  # fmt: skip


@pytest.mark.parametrize("name", RANGES)
def test_the_ranges_end_where_they_say(name):
    for arguments in RANGES[name]:
        with pytest.raises(ValueError, match=name):
            getattr(nmjax, name)(*arguments)


def test_the_schema_is_mentioned():
    assert "nmjax/data/pack.schema.json" in TEXT


def test_the_packs_in_the_how_to_are_packs():
    written = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PACKS, re.DOTALL)]
    assert [len(packs.parse_pack(spec).effects) for spec in written] == [3, 1]


def test_the_output_in_the_how_to_is_real():
    *lines, _ = pack_tools.diff("caffeine", "cocaine").splitlines()  # the last one has hashes
    assert "\n".join(lines) in re.sub("(?m)^    ", "", PACKS)
    entries = packs.read_spec(packs.pack_path("cocaine"))["effects"]
    for entry, effect in zip(entries, nmjax.load_pack("cocaine").at(0.5).effects, strict=True):
        rule = RULES[entry["effect"]]
        row = next(line for line in PACKS.splitlines() if line.startswith(f"    {entry['effect']}  "))
        assert f"  {rule.number(entry['weight'] * 0.5, entry['direction'] == 'up', entry['weight'])}  " in row
        assert type(effect).touches(rule.site) and f"  {rule.site}  " in row
