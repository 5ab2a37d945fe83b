"""How many operations a program's matrix products take, counted where they are written: in its jaxpr.

A jaxpr holds what a backward pass computes again, and says how long each loop is; XLA's own count takes the body of a
loop once. Elementwise work is left out: it costs memory traffic, not operations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def matmul_flops(jaxpr: core.ClosedJaxpr, loop: int | None = None) -> Counter[str]:
    """Operations of all matrix products, two a multiply-add, by the dtype of what is multiplied; of all devices.

    loop: how often outermost `while` loops run; None, and inner ones: once. Of a `cond`, the branch with the most
    operations counts.
    """
    return _of_jaxpr(jaxpr.jaxpr, loop)


def _of_jaxpr(jaxpr: core.Jaxpr, loop: int | None) -> Counter[str]:
    total: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            left: Any = equation.invars[0].aval
            product: Any = equation.outvars[0].aval
            (contracted, _), _ = params["dimension_numbers"]
            summed = math.prod(left.shape[axis] for axis in contracted)
            total[str(left.dtype)] += 2 * summed * math.prod(product.shape)
        elif name == "scan":
            total.update(_scaled(_of_jaxpr(params["jaxpr"].jaxpr, None), params["length"]))
        elif name == "while":
            total.update(_scaled(_of_jaxpr(params["body_jaxpr"].jaxpr, None), 1 if loop is None else loop))
        elif name == "cond":
            branches = [_of_jaxpr(branch.jaxpr, loop) for branch in params["branches"]]
            total.update(max(branches, key=lambda counted: sum(counted.values())))
        else:
            for inner in _inner(params):
                total.update(_of_jaxpr(inner, loop))
    return total


def _scaled(counted: Counter[str], times: int) -> Counter[str]:
    return Counter({dtype: count * times for dtype, count in counted.items()})


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The jaxprs that an equation calls. One with a rule for its derivatives has these beside it, as functions."""
    for value in params.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
