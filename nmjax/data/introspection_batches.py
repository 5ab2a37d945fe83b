"""Batches of introspection records as arrays: what is read, how each row is perturbed, and what may be answered.

prefix     [_ _ p p p p]      the conversation, perturbed
rows       [_ q q q q]        the question up to the answer, behind the prefix; padded in front, as that is
rows       [_ _ q q q q a a]  one for each answer, without its last token, where some have several tokens
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from nmjax.data.introspection_chat import Segments
from nmjax.data.introspection_records import Record, unit_vectors
from nmjax.rows import left_padded

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Records with their tokens, the vectors that they name, and the model that is to be perturbed.

    `widths` of all parts of a study should be equal, so that they are one program (`with_widths`).

    Attributes:
      records, segments: in the same order.
      vectors: unit vectors [n, D]; records say which.
      layers: L, blocks of the model.
      widths: to which prefixes P and rows Q are padded.
    Raises:
      ValueError: no records, other numbers of segments or answers, or records of vectors or blocks that there are not.
    """

    records: Sequence[Record]
    segments: Sequence[Segments]
    vectors: np.ndarray
    layers: int
    widths: tuple[int, int] = (0, 0)

    def __post_init__(self):
        if not self.records or len(self.records) != len(self.segments):
            raise ValueError(
                f"{len(self.records)} records, {len(self.segments)} segments; wanted as many, at least one"
            )
        for record in self.records:
            if record.vector is not None and record.vector not in range(len(self.vectors)):
                raise ValueError(f"record {record.id!r}: vector is {record.vector}; wanted below {len(self.vectors)}")
            if record.layers is not None and not 0 <= record.layers[0] < record.layers[1] <= self.layers:
                raise ValueError(f"record {record.id!r}: layers is {record.layers}; the model has {self.layers}")
            if record.magnitude is not None and not 0 < record.magnitude < math.inf:
                raise ValueError(f"record {record.id!r}: magnitude is {record.magnitude}; wanted a number above 0")
        counts = sorted({len(one.answers) for one in self.segments})
        if len(counts) > 1:
            raise ValueError(f"records have {counts} answers; wanted as many in all")
        needed = (max(len(one.prefix) for one in self.segments), max(map(self.row_length, self.segments)))
        object.__setattr__(self, "widths", tuple(map(max, zip(self.widths, needed, strict=True))))

    @property
    def longest(self) -> int:
        """A: tokens of the longest answer."""
        return max(len(answer) for one in self.segments for answer in one.answers)

    @staticmethod
    def row_length(one: Segments) -> int:
        """Tokens of a record's longest row."""
        return len(one.question) + max(map(len, one.answers)) - 1

    def with_widths(self, *others: Examples) -> Examples:
        """The same, as wide as the widest of all."""
        prefixes, rows = zip(*(part.widths for part in (self, *others)), strict=True)
        return dataclasses.replace(self, widths=(max(prefixes), max(rows)))

    def batch(self, chosen: Sequence[int]) -> Batch:
        """The chosen records as arrays.

        Returns:
          prefix, prefix_mask [B, P]; rows, rows_mask [B, R, Q], R = 1 where all answers are single tokens and otherwise
          C, one an answer; answers, answers_mask [B, C, A], padded in front: tokens that the last A of a row predict;
          target int32 [B], the right one; vectors float32 [B, 1, D], or [B, P, D] where a record has noise, with
          coefficients [B, L], start and end [B] as in `SteerSpan`; index int32 [B], of the records.
        """
        records, segments = [self.records[k] for k in chosen], [self.segments[k] for k in chosen]
        P, Q = self.widths
        A, B, C = self.longest, len(records), len(segments[0].answers)
        prefix, prefix_mask = left_padded([one.prefix for one in segments], P)
        texts = [one.question + answer[:-1] for one in segments for answer in one.answers[: C if A > 1 else 1]]
        rows, rows_mask = left_padded(texts, Q)
        answers, answers_mask = left_padded([answer for one in segments for answer in one.answers], A)
        return {
            "prefix": prefix,
            "prefix_mask": prefix_mask,
            "rows": rows.reshape(B, -1, Q),
            "rows_mask": rows_mask.reshape(B, -1, Q),
            "answers": answers.reshape(B, C, A),
            "answers_mask": answers_mask.reshape(B, C, A),
            "target": np.asarray([record.answer for record in records], np.int32),
            "index": np.asarray(chosen, np.int32),
            **self._perturbations(records, segments),
        }

    def _perturbations(self, records: Sequence[Record], segments: Sequence[Segments]) -> Batch:
        B, D = len(records), self.vectors.shape[1]
        noisy = any(record.kind == "noise" for record in self.records)
        vectors = np.zeros((B, self.widths[0] if noisy else 1, D), np.float32)
        coefficients = np.zeros((B, self.layers), np.float32)
        spans = np.zeros((2, B), np.int32)
        for k, (record, one) in enumerate(zip(records, segments, strict=True)):
            if record.layers is None:
                continue
            coefficients[k, slice(*record.layers)] = record.magnitude
            spans[:, k] = span(one)
            if record.kind == "noise":
                start, end = span(one)
                noise = unit_vectors(end, D, record.noise_seed)  # type: ignore[arg-type]
                vectors[k, : end - start] = noise[start:]
            else:
                vectors[k] = self.vectors[record.vector]
        return {"vectors": vectors, "coefficients": coefficients, "start": spans[0], "end": spans[1]}


def span(segments: Segments) -> tuple[int, int]:
    """Positions start to end - 1 of the prefix are perturbed."""
    at = np.flatnonzero(segments.perturbed)
    return int(at[0]), int(at[-1]) + 1


def training_batches(examples: Examples, batch_size: int, seed: int) -> grain.MapDataset:
    """Batches by step, without end: every epoch goes through all records in an order of its own.

    Raises ValueError for a `batch_size` below 1 or above the number of records, or a `seed` below 0.
    """
    if not 1 <= batch_size <= len(examples.records):
        raise ValueError(f"batch_size={batch_size}; wanted 1 to {len(examples.records)}, the number of records")
    if seed < 0:
        raise ValueError(f"seed={seed}; wanted 0 or more")
    order = grain.MapDataset.source(np.arange(len(examples.records))).seed(seed).shuffle().repeat()
    return order.batch(batch_size).map(examples.batch)


def held_out_batches(examples: Examples, batch_size: int) -> list[tuple[np.ndarray, Any]]:
    """Every record once, in order: (which of a batch's rows count, the batch).

    All have `batch_size` rows: the last is filled up with its first.

    Raises ValueError for a `batch_size` below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; wanted 1 or more")
    n, found = len(examples.records), []
    for start in range(0, n, batch_size):
        chosen = list(range(start, min(start + batch_size, n)))
        counts = np.arange(batch_size) < len(chosen)
        found.append((counts, examples.batch(chosen + chosen[:1] * (batch_size - len(chosen)))))
    return found
