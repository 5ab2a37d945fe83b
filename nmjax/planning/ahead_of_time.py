"""Compiling a program for hardware that is not here, and what the compiler says about it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh

from nmjax.planning.hardware import Hardware
from nmjax.planning.operations import matmul_flops
from nmjax.planning.program import Work, read

# Which kernel multiplies matrices fastest is found out by trying, for which there is no device here. Triton's, without
# a try, are refused for some shapes; the others' are always there.
_OPTIONS = {"cuda": {"xla_gpu_enable_triton_gemm": False}, "tpu": {}}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs."""

    arguments: int
    temporaries: int
    outputs: int
    aliased: int  # of the outputs, what takes the place of arguments

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.outputs - self.aliased


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of a compiled program."""

    memory: Memory
    flops: dict[str, float]  # of its matrix products, by dtype, on all devices together
    work: Work  # what one device moves
    seconds: float  # that it took to compile


class DoesNotFit(Exception):
    """A TPU's compiler refused a program for its memory; says how much it wanted."""


def compile_for(
    function: Callable, arguments: tuple, hardware: Hardware, mesh: Mesh, loop: int | None = None
) -> Compiled:
    """Compiles a jitted function on abstract arguments for the devices of a mesh, and runs nothing.

    Args:
        function, arguments: arrays among the arguments are `jax.ShapeDtypeStruct`, with shardings on the mesh where
            the function does not say them.
        mesh: of `hardware.devices`.
        loop: how often the outermost loops run whose length the program does not say.
    Raises:
        DoesNotFit: a TPU's compiler found too little memory. That of a GPU does not look: compare `Memory.total`.
    """
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = function.trace(*arguments)  # type: ignore[attr-defined]
        lowered = traced.lower()
        try:
            compiled = lowered.compile(compiler_options=_OPTIONS[hardware.chip.platform])
        except JaxRuntimeError as error:
            if hardware.chip.platform == "tpu" and "RESOURCE_EXHAUSTED" in str(error):
                raise DoesNotFit(str(error).strip().partition("\n")[0]) from error
            raise
    seconds = time.perf_counter() - begin
    found = compiled.memory_analysis()
    memory = Memory(
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
    )
    return Compiled(memory, dict(matmul_flops(traced.jaxpr, loop)), read(compiled.as_text(), loop), seconds)
