"""What a compiled program moves: read from the text of its HLO, loops multiplied by how often they run.

XLA's own cost analysis counts the body of a loop once and is empty for a GPU that is not there. The text holds all that
is needed: every instruction with its shapes, what a fusion does inside, the length of each loop, and the groups of
devices that collectives run in. All of it is of one device.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

# Instructions that touch no memory: names for what is there.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "opt-barrier",
    "partition-id", "replica-id", "domain", "get-dimension-size",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: its opcode.
        size: bytes of the whole array: what a device has after an all-gather, or before any of the others.
        members: the devices of its first group, by their place in the mesh.
        times: how often it runs.
    """

    kind: str
    size: float
    members: tuple[int, ...]
    times: int = 1

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, in a ring."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.size
        there_and_back = 2 if self.kind == "all-reduce" else 1
        return there_and_back * self.size * (len(self.members) - 1) / len(self.members)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program, or a part of it, moves on one device."""

    traffic: float = 0.0  # bytes that kernels read from and write to the device's memory
    collectives: tuple[Collective, ...] = ()
    open_loops: int = 0  # loops whose length the program does not say, and that were counted once

    def __add__(self, other: Work) -> Work:
        return Work(
            self.traffic + other.traffic,
            self.collectives + other.collectives,
            self.open_loops + other.open_loops,
        )

    def times(self, count: int) -> Work:
        repeated = tuple(dataclasses.replace(one, times=one.times * count) for one in self.collectives)
        return Work(self.traffic * count, repeated, self.open_loops)

    @property
    def sent(self) -> float:
        return sum(one.sent * one.times for one in self.collectives)


def read(text: str, loop: int | None = None) -> Work:
    """What the program of an HLO text moves.

    Args:
        text: `compiled.as_text()`.
        loop: how often outermost loops run whose length the program does not say; None, and inner ones: once.
    Raises:
        ValueError: the text holds no entry computation.
    """
    computations, entry = _parsed(text)
    return _Reader(computations, loop).computation(entry, outermost=True)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # what follows the operands; of an instruction that has none, with what stands in their place
    root: bool

    @property
    def number(self) -> int:
        """Of a parameter its place, of a constant its value."""
        found = re.match(r"\d+", self.attributes)
        if found is None:
            raise ValueError(f"HLO: wanted a number of {self.opcode} {self.name}, got {self.attributes[:60]!r}")
        return int(found[0])


class _Computation(dict[str, _Instruction]):
    """Instructions by name, in their order."""

    @property
    def root(self) -> _Instruction:
        return next(one for one in self.values() if one.root)

    def parameter(self, number: int) -> _Instruction:
        return next(one for one in self.values() if one.opcode == "parameter" and one.number == number)

    def users(self, name: str) -> Iterable[tuple[_Instruction, int]]:
        """Who reads a value, and as which operand; a bitcast, but for the root, is the value itself."""
        for other in self.values():
            for place, operand in enumerate(other.operands):
                if operand == name:
                    if other.opcode == "bitcast" and not other.root:
                        yield from self.users(other.name)
                    else:
                        yield other, place


_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)$")


def _parsed(text: str) -> tuple[dict[str, _Computation], _Computation]:
    computations: dict[str, _Computation] = {}
    entry = inside = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            inside = computations[header[2]] = _Computation()
            entry = inside if header[1] else entry
        elif inside is not None and (found := _LINE.match(line)):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            inside[instruction.name] = instruction
    if entry is None:
        raise ValueError(f"text holds no entry computation, got {text[:60]!r}; wanted that of compiled HLO")
    return computations, entry


def _instruction(name: str, rest: str, root: bool) -> _Instruction:
    """From `SHAPE opcode(%operand, ...), attributes`; a tuple's shape stands in parentheses."""
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    opcode, inner = rest[:start], rest[start + 1 : stop]
    operands = re.findall(r"%([\w.-]+)", inner)
    return _Instruction(
        name, shape, opcode, tuple(operands), rest[stop + 1 :] if operands else inner + rest[stop:], root
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"HLO: a parenthesis does not close in {text[start : start + 60]!r}")


def size_of(shape: str) -> float:
    """Bytes of a shape, or of all in a tuple, that lie in the device's main memory."""
    return sum(size for size, main in _arrays(shape) if main)


def _arrays(shape: str) -> list[tuple[float, bool]]:
    """Bytes of each array of a shape, and whether it lies in the main memory.

    A layout with `S(1)` or the like is of another memory: a TPU's on-chip memory, or the host's.
    """
    found = []
    for dtype, dims, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or "0")[0])
        count = math.prod(int(dim) for dim in dims.split(",") if dim)
        found.append((count * bits / 8, re.search(r"S\([1-9]", layout) is None))
    return found


class _Reader:
    def __init__(self, computations: dict[str, _Computation], loop: int | None):
        self.computations, self.loop = computations, loop

    def computation(self, body: _Computation, outermost: bool) -> Work:
        return sum((self.instruction(one, body, outermost) for one in body.values()), Work())

    def instruction(self, one: _Instruction, body: _Computation, outermost: bool) -> Work:
        kind = one.opcode.removesuffix("-start")
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            return Work()
        if kind in COLLECTIVES:
            return Work(collectives=(_collective(kind, one, body),))
        if kind == "while":
            inside = self.computation(self.called(one, "body"), outermost=False)
            length = self.length(one)
            if length is not None:
                return inside.times(length)
            if outermost and self.loop is not None:
                return inside.times(self.loop)
            return inside + Work(open_loops=1)
        if kind == "conditional":
            found = re.findall(r"(?:true|false)_computation=(\S+)|branch_computations=\{([^}]*)\}", one.attributes)
            names = re.findall(r"[\w.-]+", " ".join(itertools.chain(*found)))
            works = [self.computation(self.computations[name], outermost) for name in names]
            return max(works, key=lambda work: work.traffic)
        if kind in ("call", "async"):
            return self.computation(self.called(one, "to_apply" if kind == "call" else "calls"), outermost)
        if kind == "fusion":
            return self.fusion(one, body)
        return Work(_plain_traffic(one, body))

    def length(self, loop: _Instruction) -> int | None:
        """How often a loop runs, if the program says so: in so many words, or as `i < constant`, as a scan does."""
        if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
            return int(known[1])
        condition = self.called(loop, "condition")
        if condition.root.opcode == "compare" and "direction=LT" in condition.root.attributes:
            end = condition[condition.root.operands[1]]
            return end.number if end.opcode == "constant" else None
        return None

    def called(self, one: _Instruction, role: str) -> _Computation:
        found = re.search(rf"\b{role}=%?([\w.-]+)", one.attributes)
        if found is None:
            raise ValueError(f"HLO: wanted {role}= of {one.opcode} {one.name}, got {one.attributes[:60]!r}")
        return self.computations[found[1]]

    def fusion(self, one: _Instruction, body: _Computation) -> Work:
        """One kernel: it reads its operands and writes its results, or only the slices that it uses of them."""
        inside = self.called(one, "calls")
        read = sum(self.read_of(inside, at, size_of(body[name].shape)) for at, name in enumerate(one.operands))
        root = inside.root
        results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        written = sum(self.written_of(result, inside) for result in results)
        moved = [_collective(inner.opcode, inner, inside) for inner in inside.values() if inner.opcode in COLLECTIVES]
        return Work(read + written, tuple(moved))

    def read_of(self, inside: _Computation, at: int, whole: float) -> float:
        """Bytes a kernel reads of a parameter: of what it only takes slices of, these."""
        parts = 0.0
        for user, place in inside.users(inside.parameter(at).name):
            if user.opcode == "fusion":
                parts += self.read_of(self.called(user, "calls"), place, whole)
            elif place == 0 and user.opcode in ("dynamic-slice", "slice", "gather"):
                parts += size_of(user.shape)
            elif place == 0 and user.opcode == "dynamic-update-slice":
                continue  # written in place, and not read
            else:
                return whole
        return min(parts, whole)

    def written_of(self, result: _Instruction, inside: _Computation) -> float:
        """Bytes a kernel writes of a result: of what it only changes a slice of, this."""
        while result.opcode == "bitcast" and result.operands[0] in inside:
            result = inside[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            return size_of(inside[result.operands[1]].shape)
        if result.opcode == "fusion":
            nested = self.called(result, "calls")
            return self.written_of(nested.root, nested)
        return size_of(result.shape)


def _plain_traffic(one: _Instruction, body: _Computation) -> float:
    if one.opcode.endswith("-start"):  # a copy in the background, from one of the first two arrays to the other
        ends = _arrays(one.shape)[:2]
        return min(size for size, _ in ends) * sum(main for _, main in ends)
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * size_of(one.shape)
    if one.opcode == "dynamic-update-slice":
        return 2 * size_of(body[one.operands[1]].shape)
    if one.opcode == "custom-call":
        shape = re.sub(r"\bs8\[\d+\]", "", one.shape)  # a workspace of a matrix product; it mostly stays in the cache
    else:
        shape = one.shape
    return size_of(shape) + sum(size_of(body[name].shape) for name in one.operands if name in body)


def _collective(kind: str, one: _Instruction, body: _Computation) -> Collective:
    members = _members(one.attributes)
    size = sum(size_of(body[name].shape) for name in one.operands)
    return Collective(kind, size * len(members) if kind == "all-gather" else size, members)


# Device numbers 0, 1, ... in an array of these dimensions, transposed: [4,8]T(1,0).
_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _members(attributes: str) -> tuple[int, ...]:
    """The first group of a collective, in each of the ways in which groups are written."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)", attributes):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(_numbers(listed[1]))
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=" + _ORDER, attributes):
        return _first(_ordered(tiled[2], tiled[3]), _numbers(tiled[1]))
    # mesh['a'=2,'b'=4] {'b'}: a mesh of all devices, and one group for each place along the axes that are not named
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + _ORDER + r"\))? \{([^}]*)\}", attributes
    ):
        sizes = {axis: int(count) for axis, count in re.findall(r"'(\w+)'=(\d+)", named[1])}
        count = math.prod(sizes.values())
        ids = (_ordered(named[2], named[3]) if named[2] else np.arange(count)).reshape(tuple(sizes.values()))
        inner = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", named[4])]
        outer = [axis for axis in range(ids.ndim) if axis not in inner]
        return _first(ids.transpose(outer + inner), [-1, math.prod(ids.shape[axis] for axis in inner)])
    raise ValueError(f"HLO: wanted replica_groups or source_target_pairs of a collective, got {attributes[:80]!r}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _ordered(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids if order is None else ids.transpose(_numbers(order))


def _first(ids: np.ndarray, groups: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in ids.reshape(groups)[0])
