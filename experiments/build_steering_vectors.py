"""Builds a model's steering vectors from pairs of contrasting texts, and tests them on held-out pairs.

Method. Every text goes through the model once; what is kept is the residual stream after every block at the text's last
token. A type's direction in a layer is the mean difference of its training pairs there. Held-out pairs then decide
which layers are accepted (see `nmjax.steering.validation`). A type without an accepted layer is reported and not
saved, unless --keep_rejected asks for it.

    python -m experiments.build_steering_vectors --model=checkpoints/tiny

With --concepts, the directions of concepts are built instead, of a list of words and wordings about them; see
`nmjax.steering.concepts`. They are not tested: what is reported is how alike they are, and what they share.

    python -m experiments.build_steering_vectors --model=checkpoints/tiny --concepts=tiny
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

import nmjax
from models import checkpoint
from nmjax import flags as nm_flags
from nmjax import paths
from nmjax.data import introspection
from nmjax.report import results
from nmjax.report.concepts import ConceptPage
from nmjax.report.steering import SteeringPage, cosine_figure, separation_figure, summary_table
from nmjax.steering import concepts, io, store, vectors
from nmjax.steering.validation import SteeringReport, split_pairs, validate

NAME = "build_steering_vectors"
FORMATS = ("safetensors", "gguf")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags say; see `define_flags`."""

    model: str = "checkpoints/tiny"
    dtype: str | None = None
    types: Sequence[str] | None = None
    prompts: str | None = None
    method: str = "mean_diff"
    token: str = "mean"
    held_out: float = 0.2
    seed: int = 0
    batch_size: int | None = None
    output: str | None = None
    output_dir: str = "results/steering_vectors"
    format: str = "safetensors"
    rebuild: bool = False
    keep_rejected: bool = False
    concepts: str | None = None
    wordings: str | None = None
    layer: int | None = None
    remove_shared: bool = False


def define_flags() -> None:
    d = Settings()
    flags.DEFINE_string("model", d.model, "Checkpoint: a folder, or a hub id.")
    flags.DEFINE_enum("dtype", d.dtype, list(checkpoint.DTYPES), "Converts the weights; default: as stored.")
    flags.DEFINE_list("types", d.types, "Steering types; default: all that the prompts hold.")
    flags.DEFINE_string("prompts", d.prompts, "JSONL of steering_type, positive, negative; default: the bundled file.")
    flags.DEFINE_enum("method", d.method, list(vectors.METHODS), "How a direction is made from differences.")
    flags.DEFINE_enum("token", d.token, list(vectors.TOKENS), "The text's last token, or the mean over its tokens.")
    flags.DEFINE_float("held_out", d.held_out, "Share of the unique pairs that only test.", 0.0, 1.0)
    flags.DEFINE_integer("seed", d.seed, "Of the split and of permutations and halvings.", lower_bound=0)
    flags.DEFINE_integer("batch_size", d.batch_size, "Texts a batch; default: up to 32 that fit.", lower_bound=1)
    flags.DEFINE_string("output", d.output, "Folder of the vectors; default: where nmjax looks for this model's.")
    flags.DEFINE_string("output_dir", d.output_dir, "Folder of the report.")
    flags.DEFINE_enum("format", d.format, list(FORMATS), "File format; only safetensors is found by name.")
    flags.DEFINE_bool("rebuild", d.rebuild, "Build types anew that the same plan has built already.")
    flags.DEFINE_bool("keep_rejected", d.keep_rejected, "Save types without an accepted layer, too.")
    flags.DEFINE_string("concepts", d.concepts, "Concepts instead of types: bundled, tiny, or a file with one a line.")
    flags.DEFINE_enum("wordings", d.wordings, list(introspection.BUNDLED), "About concepts; default: tiny for tiny.")
    flags.DEFINE_integer("layer", d.layer, "Block in which concepts are compared; default: the first half's last.")
    flags.DEFINE_bool("remove_shared", d.remove_shared, "Also save concepts without the direction that they share.")


@dataclasses.dataclass(frozen=True)
class Built:
    """One type: its direction float32 [L, D], what held-out pairs say, and its file (None if it was not saved)."""

    vectors: np.ndarray
    report: SteeringReport
    path: pathlib.Path | None
    reused: bool  # read from the file that an earlier run of the same plan had written


def build(
    lm: nmjax.LanguageModel,
    pairs: Mapping[str, vectors.Pairs],
    method: str = "mean_diff",
    token: str = "mean",
    held_out: float = 0.2,
    seed: int = 0,
    batch_size: int | None = None,
    folder: pathlib.Path | None = None,
    suffix: str = ".safetensors",
    rebuild: bool = False,
    keep_rejected: bool = False,
) -> dict[str, Built]:
    """The vectors of every type in `pairs`, built, tested and saved, with a progress bar.

    Args:
      folder: of the files; None = the user's caches, where `named_vector` looks.
      rebuild: False reads a type whose file was written by the same plan: model, pairs and every argument equal.
    Raises:
      ValueError: too few pairs of a type, a text that doesn't fit the model's context, or another bad argument.
    """
    folder = store.cached_folder(lm) if folder is None else folder
    options = {"method": method, "token": token, "held_out": held_out, "seed": seed}
    splits = {}
    for name, its_pairs in pairs.items():
        try:
            splits[name] = split_pairs(its_pairs, held_out, seed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    plans = {name: _plan(lm, its_pairs, options) for name, its_pairs in pairs.items()}
    files = {name: store.vector_file(folder, name, suffix) for name in pairs}
    built = {} if rebuild else {name: found for name in pairs if (found := _reuse(files[name], plans[name]))}
    texts = {name: 2 * sum(map(len, split)) for name, split in splits.items()}
    with tqdm(total=sum(texts.values()), unit="text", initial=sum(texts[name] for name in built)) as bar:
        for name, (train, held) in splits.items():
            if name in built:
                continue
            bar.set_description(name)
            flat = [pair[side] for part in (train, held) for side in (0, 1) for pair in part]
            try:
                read = vectors.activations(lm, flat, token, batch_size, progress=bar.update)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            n, m = len(train), len(held)
            directions, report = validate(
                read[:n], read[n : 2 * n], read[2 * n : 2 * n + m], read[2 * n + m :], method, seed
            )
            path = None
            if report.chosen_layer is not None or keep_rejected:
                path = io.save_vector(files[name], directions, _metadata(lm, name, report, plans[name], options))
            built[name] = Built(directions, report, path, reused=False)
    return {name: built[name] for name in pairs}


def _plan(lm: nmjax.LanguageModel, pairs: vectors.Pairs, options: dict) -> dict:
    """Everything that decides a type's vector, as JSON."""
    return {"schema": io.SCHEMA, "model": lm.fingerprint, "pairs": results.content_hash(pairs), **options}


def _metadata(lm, name: str, report: SteeringReport, plan: dict, options: dict) -> dict[str, str]:
    model_hint = getattr(lm.config, "family", "")
    return {
        "model": lm.fingerprint,
        "model_hint": model_hint,
        "steering_type": name,
        **{key: str(value) for key, value in options.items()},
        "chosen_layer": "none" if report.chosen_layer is None else str(report.chosen_layer),
        "pairs_sha256": plan["pairs"],
        "pairs": str(report.train + report.held_out),
        "plan": results.content_hash(plan),
        "report": results.dump_json(report),
        "versions": results.dump_json(results.versions()),
    }


def _reuse(path: pathlib.Path, plan: dict) -> Built | None:
    """What an earlier run of this plan wrote; None where there is nothing, something else, or a damaged file."""
    try:
        found, metadata = io.load_vector(path)
    except (ValueError, FileNotFoundError):
        return None
    if metadata.get("plan") != results.content_hash(plan):
        return None
    stored = json.loads(metadata["report"])
    arrays: dict[str, Any] = {
        key: np.asarray(value) if isinstance(value, list) else value for key, value in stored.items()
    }
    return Built(found, SteeringReport(**arrays), path, reused=True)


# --- Concepts ---------------------------------------------------------------------------------------------------------


def read_concepts(source: str) -> tuple[str, ...]:
    """The words of a bundled list, or of a file with one a line. Raises ValueError for fewer than two, or OSError."""
    if source in introspection.BUNDLED:
        return concepts.words_of(introspection.read_lists(source).concepts)
    lines = pathlib.Path(source).read_text(encoding="utf-8").splitlines()
    words = tuple(line.strip() for line in lines if line.strip())
    if len(words) < 2:
        raise ValueError(f"--concepts={source} holds {len(words)} concepts, wanted two or more")
    return words


def run_concepts(settings: Settings, lm: nmjax.LanguageModel, words: Sequence[str]) -> list[pathlib.Path]:
    """Build, save, report; returns the paths of the vectors and of the report."""
    folder = store.cached_folder(lm) if settings.output is None else pathlib.Path(settings.output)
    wordings = settings.wordings or ("tiny" if settings.concepts == "tiny" else "bundled")
    templates = concepts.read_templates(wordings)
    layer = concepts.compared_layer(lm, settings.layer)
    with tqdm(total=len(templates.wordings) * (len(words) + 1), unit="text") as bar:
        directions = concepts.concept_directions(
            lm, words, settings.method, templates, token=settings.token, batch_size=settings.batch_size,
            folder=folder, rebuild=settings.rebuild, progress=bar.update,
        )  # fmt: skip
    found = concepts.summarise(directions, layer)
    names = [concepts.stored_name(word) for word in words]
    if settings.remove_shared:
        alone = np.stack([concepts.without_shared(rows) for rows in np.stack([*directions.values()], axis=1)], axis=1)
        for word, rows in zip(words, alone, strict=True):
            names.append(concepts.stored_name(word) + concepts.SHARED_REMOVED)
            store.save_named(lm, names[-1], rows, {"concept": word, "shared": "removed"}, folder)
    page = ConceptPage(settings.model, found)
    print("\n" + page.text())
    stamp, reports = results.timestamp(), pathlib.Path(settings.output_dir)
    hashes = {"model": lm.fingerprint, "concepts": results.content_hash([list(words), dataclasses.asdict(templates)])}
    identity = results.run_identity(NAME, dataclasses.asdict(settings), {}, hashes)
    record = {**identity, "concepts": {**dataclasses.asdict(found), "vectors": names}}
    written = [
        *(store.vector_file(folder, name) for name in names),
        results.write_atomic(reports / f"concepts_summary_{stamp}.txt", page.text()),
        results.write_atomic(reports / f"concepts_{stamp}.html", page.html(identity)),
        results.write_json(reports / f"concepts_{stamp}.json", record),
    ]
    print(f"Written: {len(names)} vectors to {folder}, and\n" + "\n".join(f"  {path}" for path in written[-3:]))
    return written


# --- The command ------------------------------------------------------------------------------------------------------


def prepare(settings: Settings) -> tuple[nmjax.LanguageModel, dict[str, vectors.Pairs]]:
    """The model and the pairs of the types asked for. Raises ValueError or OSError for bad input."""
    path = vectors.PROMPTS if settings.prompts is None else settings.prompts
    pairs = vectors.read_pairs(path)
    if settings.types:
        unknown = [name for name in settings.types if name not in pairs]
        if unknown:
            raise ValueError(f"--types holds {unknown[0]!r}, wanted types that {path} holds: {', '.join(pairs)}")
        pairs = {name: pairs[name] for name in settings.types}
    for name in pairs:
        store.vector_file(pathlib.Path(), name)
    return _load(settings), pairs


def prepare_concepts(settings: Settings) -> tuple[nmjax.LanguageModel, tuple[str, ...]]:
    """The model and the words of --concepts. Raises ValueError or OSError for bad input."""
    for flag, value in (("types", settings.types), ("prompts", settings.prompts)):
        if value:
            raise ValueError(f"--{flag} is set along with --concepts={settings.concepts}; wanted one of the two")
    if settings.format != "safetensors":
        raise ValueError(f"--format={settings.format} with --concepts, wanted safetensors")
    words = read_concepts(str(settings.concepts))
    return _load(settings), words


def _load(settings: Settings) -> nmjax.LanguageModel:
    lm = checkpoint.load(checkpoint.find(settings.model), dtype=settings.dtype)
    if lm.tokenizer is None:
        raise ValueError(f"--model={settings.model} has no tokenizer; wanted one, pairs are text")
    return lm


def run(settings: Settings, lm: nmjax.LanguageModel, pairs: dict[str, vectors.Pairs]) -> list[pathlib.Path]:
    """Build, save, report; returns the paths written by this run."""
    built = build(
        lm,
        pairs,
        **{key: getattr(settings, key) for key in ("method", "token", "held_out", "seed", "batch_size")},
        folder=None if settings.output is None else pathlib.Path(settings.output),
        suffix=f".{settings.format}",
        rebuild=settings.rebuild,
        keep_rejected=settings.keep_rejected,
    )
    reports = {name: one.report for name, one in built.items()}
    print("\n" + summary_table(reports).text() + "\n")
    reused = [name for name, one in built.items() if one.reused]
    rejected = [name for name, one in built.items() if one.path is None]
    if reused:
        print(f"Built already by the same plan: {', '.join(reused)} (--rebuild builds them anew)")
    if rejected:
        print(f"Not saved, no layer is accepted: {', '.join(rejected)} (--keep_rejected saves them)")
    for name, one in built.items():
        beside = store.vector_file(store.folders(lm)[0], name)
        if one.path is not None and beside.is_file() and not beside.samefile(one.path):
            print(f"{beside} comes first: nmjax does not look at {one.path}")
    written = write(settings, lm, pairs, built)
    print("Written:\n" + "\n".join(f"  {path}" for path in written))
    return written


def write(settings: Settings, lm, pairs: dict[str, vectors.Pairs], built: dict[str, Built]) -> list[pathlib.Path]:
    """The report of all types; returns the paths of the new vectors and of the report."""
    reports = {name: one.report for name, one in built.items()}
    stamp, folder = results.timestamp(), pathlib.Path(settings.output_dir)
    hashes = {"model": lm.fingerprint} | {f"pairs {name}": results.content_hash(p) for name, p in pairs.items()}
    identity = results.run_identity(NAME, dataclasses.asdict(settings), {"seed": settings.seed}, hashes)
    layer = int(np.median([one.report.chosen_layer for one in built.values() if one.report.chosen_layer is not None]
                          or [lm.config.layers // 2]))  # fmt: skip
    directions = np.stack([one.vectors[layer] for one in built.values()])
    cosines = directions @ directions.T
    figure = separation_figure(reports)
    table = cosine_figure(list(built), cosines, f"layer {layer}") if len(built) > 1 else None
    record = {
        **identity,
        "types": {name: {"file": one.path, "reused": one.reused, "report": one.report} for name, one in built.items()},
        "cosines": {"layer": layer, "types": list(built), "values": cosines},
    }
    report = SteeringPage(settings.model, reports)
    return [
        *(one.path for one in built.values() if one.path is not None and not one.reused),
        results.write_atomic(folder / f"steering_summary_{stamp}.txt", report.text()),
        results.write_atomic(folder / f"steering_separation_{stamp}.png", figure),
        *([results.write_atomic(folder / f"steering_cosines_{stamp}.png", table)] if table else []),
        results.write_atomic(folder / f"steering_vectors_{stamp}.html", report.html(identity, figure, table)),
        results.write_json(folder / f"steering_vectors_{stamp}.json", record),
    ]


def main(_: Sequence[str]) -> None:
    paths.enable_compilation_cache()
    settings = nm_flags.filled(Settings)
    try:
        if settings.concepts is None:
            run(settings, *prepare(settings))
        else:
            run_concepts(settings, *prepare_concepts(settings))
    except (ValueError, OSError) as error:
        sys.exit(f"{NAME}: {error}")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
