"""Records of the introspection study: a conversation, what is done to the model while it reads it, and what is asked.

A perturbation acts on the residual stream of the conversation's tokens only, at the outputs of a range of blocks:
`magnitude * v` is added, in each block anew, where v is a unit vector: the same at all positions for a steered record,
another at every position for one with noise, where it is the same in all blocks, so that both add up alike. The
question is read without it.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nmjax.data.judgements import text_of
from nmjax.data.question_sources import jsonl_rows
from nmjax.report.results import dump_json

KINDS = {
    "steered": "a unit vector is added",
    "clean": "nothing is done",
    "noise": "noise of the same norm is added, which points elsewhere at every position",
    "system": "nothing is done, but the system prompt is another one",
}
YES_NO = (" yes", " no")
MAGNITUDES = (5.0, 10.0, 20.0, 30.0)


@dataclasses.dataclass(frozen=True)
class Record:
    """One example; `answers[answer]` is right, and the first of two answers says that there is something.

    Attributes:
      id: unique within its file.
      kind: a key of `KINDS`; whatever the answer that counts as right, this is what was done.
      system, context, reply: the conversation: system prompt, the user's message, the assistant's.
      question: the user's next message.
      answers: what the assistant may say next, each with the space before it.
      vector: row of `unit_vectors`, of a steered record.
      noise_seed: of a record with noise, whose vectors [T, D] are `unit_vectors(T, D, noise_seed)`, by position.
      layers: blocks start to end - 1 whose outputs are perturbed; `third`: their name.
      magnitude: in units of the residual stream.
      spans: characters start to end - 1 of the numbered sentences in `context`; `sentence`: the only one whose tokens
        are perturbed. Without, all tokens of the conversation are.
    Raises:
      ValueError: fields that do not go together.
    """

    id: str
    kind: str
    system: str
    context: str
    reply: str
    question: str
    answers: tuple[str, ...]
    answer: int
    vector: int | None = None
    noise_seed: int | None = None
    layers: tuple[int, int] | None = None
    third: str | None = None
    magnitude: float | None = None
    spans: tuple[tuple[int, int], ...] = ()
    sentence: int | None = None

    def __post_init__(self):
        def check(name: str, right: bool, wanted: str) -> None:
            if not right:
                raise ValueError(f"record {self.id!r}: {name} is {getattr(self, name)!r}; wanted {wanted}")

        perturbed = self.kind in ("steered", "noise")
        check("kind", self.kind in KINDS, f"one of {list(KINDS)}")
        check("answers", len(set(self.answers)) == len(self.answers) >= 2, "two or more different texts")
        check("answer", self.answer in range(len(self.answers)), f"0 to {len(self.answers) - 1}")
        for name, wanted in (
            ("vector", self.kind == "steered"),
            ("noise_seed", self.kind == "noise"),
            ("layers", perturbed),
            ("magnitude", perturbed),
        ):
            check(name, (getattr(self, name) is not None) == wanted, f"{'a value' if wanted else 'none'} ({self.kind})")
        check("sentence", self.sentence is None or self.sentence in range(len(self.spans)), "the index of a span")

    @property
    def conversation(self) -> tuple[str, str, str, str]:
        """All texts that the model reads."""
        return self.system, self.context, self.reply, self.question


def unit_vectors(n: int, dim: int, seed: int) -> np.ndarray:
    """Random directions: float32 [n, dim], rows of norm 1, i.i.d. uniform on the sphere.

    More rows begin with the same ones. Raises ValueError for `n` below 0 or `dim` below 1.
    """
    if n < 0 or dim < 1:
        raise ValueError(f"n is {n}, dim is {dim}; wanted at least 0 and 1")
    x = np.random.default_rng(seed).standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def layer_ranges(layers: int) -> dict[str, tuple[int, int]]:
    """Blocks start to end - 1 of the early, middle and late third of a model with so many blocks, as in the study.

    The last block is in none: what is added behind it at one position is seen from no other. Raises ValueError for
    fewer than four blocks.
    """
    if layers < 4:
        raise ValueError(f"layers is {layers}; wanted at least 4, for three ranges without the last block")
    first, second = layers // 3, 2 * layers // 3
    return {"early": (0, first), "middle": (first, second), "late": (second, layers - 1)}


# --- Files ------------------------------------------------------------------------------------------------------------


def to_jsonl(records: Iterable[Record]) -> str:
    """A line of JSON for each record."""
    return "".join(dump_json(record) + "\n" for record in records)


def read_records(path: str | os.PathLike, system: str = "You are a helpful assistant.") -> list[Record]:
    """The records of a JSONL file, of this module or in the published format, whose conversations begin with `system`.

    Raises ValueError for a row that is neither, or not as it should be (its place is named), or an id that occurs
    twice; FileNotFoundError.
    """
    found: dict[str, Record] = {}
    for number, where, row in jsonl_rows(pathlib.Path(path)):
        record = published_record(row, str(number), where, system) if "context_prompt" in row else _record(where, row)
        if record.id in found:
            raise ValueError(f"{where}: the id {record.id!r} occurs twice")
        found[record.id] = record
    return list(found.values())


def _record(where: str, row: Mapping[str, Any]) -> Record:
    fields = {field.name for field in dataclasses.fields(Record)}
    if row.keys() != fields:
        raise ValueError(f"{where} lacks {sorted(fields - row.keys())} and has {sorted(row.keys() - fields)} besides")
    texts = {name: text_of(where, row, name) for name in ("id", "kind", "system", "context", "reply", "question")}
    try:
        lists = {
            "answers": tuple(row["answers"]),
            "spans": tuple((start, end) for start, end in row["spans"]),
            "layers": None if row["layers"] is None else tuple(row["layers"]),
        }
        return Record(**{**row, **texts, **lists})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def published_record(row: Mapping[str, Any], id: str, where: str, system: str) -> Record:
    """A record out of a row in the published format.

    There "steered" is what is to be answered, unless there is a "label"; food records are "steered" without a vector.
    Raises ValueError, which begins with `where`, for fields that are missing or do not go together.
    """
    if missing := {"steered", "vector_idx", "layer_start", "layer_end", "layer_name", "magnitude"} - row.keys():
        raise ValueError(f"{where} has no field {sorted(missing)[0]!r}; it has {list(row)}")
    label = row.get("label", row["steered"])
    if not isinstance(label, bool):
        raise ValueError(f"{where}: label is {label!r}; wanted true or false")
    steered = row["vector_idx"] is not None
    tokens = [row.get(f"{name}_token") for name in ("positive", "negative")]
    try:
        return Record(
            id=id,
            kind="steered" if steered else "clean",
            system=system,
            context=text_of(where, row, "context_prompt"),
            reply=text_of(where, row, "assistant_response"),
            question=text_of(where, row, "detection_question"),
            answers=YES_NO if tokens == [None, None] else tuple(f" {token}" for token in tokens),
            answer=0 if label else 1,
            vector=row["vector_idx"],
            layers=(row["layer_start"], row["layer_end"]) if steered else None,
            third=row["layer_name"],
            magnitude=row["magnitude"],
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


# --- What is in them --------------------------------------------------------------------------------------------------


def summary(splits: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Counts by split, and of each split after the first what of it has been in an earlier one.

    "Unperturbed inputs" are the different conversations, questions included, to which nothing is done.
    """

    def parts(records: Sequence[Record]) -> dict[str, set]:
        perturbed = [record for record in records if record.magnitude is not None]
        return {
            "contexts": {record.context for record in records},
            "questions": {record.question for record in records},
            "vectors": {record.vector for record in records if record.vector is not None},
            "perturbations": {(r.vector, r.noise_seed, r.layers, r.magnitude) for r in perturbed},
            "unperturbed inputs": {record.conversation for record in records if record.magnitude is None},
        }

    counts, before = {}, parts([])
    for name, records in splits.items():
        own = parts(records)
        counts[name] = {
            "records": len(records),
            "kinds": _counted(record.kind for record in records),
            "answers": _counted(f"{record.kind}:{record.answers[record.answer]}" for record in records),
            "thirds": _counted(record.third for record in records if record.third is not None),
            "magnitudes": _counted(f"{record.magnitude:g}" for record in records if record.magnitude is not None),
            "different": {part: len(values) for part, values in own.items()},
            "seen before": {part: len(values & before[part]) for part, values in own.items()},
        }
        before = {part: values | before[part] for part, values in own.items()}
    return counts


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
