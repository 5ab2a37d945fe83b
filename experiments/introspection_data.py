"""Writes the training data of the introspection study: conversations, how the model is steered in them, what is asked.

    python -m experiments.introspection_data --variant=original --output=results/introspection/original
    python -m experiments.introspection_data --generator=v2 --lists=<folder of published lists> --output=<folder>

`--generator=split` (the default) makes train.jsonl, val.jsonl and test.jsonl that share no conversation, wording or
vector, see `nmjax.data.introspection_split`; v2 makes train.jsonl and val.jsonl in the format, and with its lists the
bytes, of the published study. summary.json, which is written last, says what is in them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from nmjax import flags as nm_flags
from nmjax.data import introspection_split, introspection_v2
from nmjax.data.introspection import WORDINGS, read_lists
from nmjax.data.introspection_records import published_record, summary, to_jsonl
from nmjax.report import results

NAME = "introspection_data"
GENERATORS = ("split", "v2")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags say; see `define_flags`."""

    variant: str = "original"
    generator: str = "split"
    lists: str = "bundled"
    seed: int = 42
    n: int = 10_000
    layers: int = 64
    vectors: int = 200
    magnitudes: tuple[float, ...] = introspection_split.SplitConfig.magnitudes
    noise: float = introspection_split.SplitConfig.noise
    systems: float = introspection_split.SplitConfig.systems
    sentences: int = introspection_split.SplitConfig.sentences
    output: str = f"results/{NAME}"


def define_flags() -> None:
    d = Settings()
    flags.DEFINE_enum("variant", d.variant, list(WORDINGS), "What is asked, and how labels are made.")
    flags.DEFINE_enum("generator", d.generator, GENERATORS, "split: disjoint splits; v2: as published.")
    flags.DEFINE_string("lists", d.lists, "'bundled', 'tiny' (for the bundled models), or a folder of published lists.")
    flags.DEFINE_integer("seed", d.seed, "Of all draws.", lower_bound=0)
    flags.DEFINE_integer("n", d.n, "Records in all files together.")
    flags.DEFINE_integer("layers", d.layers, "Blocks of the model that is to be steered.")
    flags.DEFINE_integer("vectors", d.vectors, "Random vectors; the first half is for training, in v2 all it has.")
    flags.DEFINE_list("magnitudes", [f"{m:g}" for m in d.magnitudes], "What a unit vector is multiplied by.")
    flags.DEFINE_float("noise", d.noise, "Of split: share of the negatives with noise in place of a vector.")
    flags.DEFINE_float("systems", d.systems, "Of split: share of the records with another system prompt.")
    flags.DEFINE_integer("sentences", d.sentences, "Of localization_sentence: sentences to choose from.")
    flags.DEFINE_string("output", d.output, "Folder for the files.")


def run(settings: Settings) -> list[pathlib.Path]:
    """Draws the records and writes the files; returns their paths, summary.json last.

    Raises ValueError for settings out of range and lists that can't be read, or are too short.
    """
    lists = read_lists(settings.lists)
    if settings.generator == "v2":
        rows = introspection_v2.generate(
            settings.variant,
            lists,
            settings.n,
            settings.seed,
            settings.layers,
            settings.vectors // 2,
            settings.magnitudes,
        )
        files = {name: introspection_v2.to_jsonl(part) for name, part in rows.items()}
        splits = {
            name: [published_record(row, str(k), name, lists.system) for k, row in enumerate(part)]
            for name, part in rows.items()
        }
    else:
        names = [field.name for field in dataclasses.fields(introspection_split.SplitConfig)]
        config = introspection_split.SplitConfig(**{name: getattr(settings, name) for name in names})
        splits = introspection_split.generate(config, lists)
        files = {name: to_jsonl(records) for name, records in splits.items()}
    folder = pathlib.Path(settings.output)
    for name in ("summary.json", *(f"{split}.jsonl" for split in introspection_split.SPLITS)):
        (folder / name).unlink(missing_ok=True)  # none of an earlier run is to be taken for one of this
    written = [results.write_atomic(folder / f"{name}.jsonl", text) for name, text in files.items()]
    found = {
        "settings": settings,
        "lists": results.content_hash(lists),
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written},
        "counts": summary(splits),
    }
    return [*written, results.write_json(folder / "summary.json", found)]


def main(_: Sequence[str]) -> None:
    try:
        settings = nm_flags.filled(Settings)
        settings = dataclasses.replace(settings, magnitudes=nm_flags.numbers("magnitudes", settings.magnitudes))
        written = run(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"{NAME}: {error}")
    for name, counts in results.load_json(written[-1])["counts"].items():
        print(f"{name}: {counts['records']} records")
        for what in ("kinds", "answers", "different", "seen before"):
            print(f"  {what}: {', '.join(f'{key} {value}' for key, value in counts[what].items())}")
    print("Written:\n" + "\n".join(f"  {path}" for path in written))


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
