"""Operations against closed forms and XLA's count; times against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import pytest

from nmjax.planning.hardware import parse
from nmjax.planning.operations import matmul_flops
from nmjax.planning.program import Collective, Work
from nmjax.planning.roofline import Assumptions, estimate, seconds


def test_operations_of_a_trained_scan_with_remat():
    L, B, D = 5, 3, 8

    def loss(weights, x):
        @jax.checkpoint
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    arguments = jax.ShapeDtypeStruct((L, D, D), jnp.float32), jax.ShapeDtypeStruct((B, D), jnp.float32)
    product = 2 * B * D * D
    forward = matmul_flops(jax.make_jaxpr(loss)(*arguments))
    assert forward == {"float32": L * product}
    both = matmul_flops(jax.make_jaxpr(jax.grad(loss))(*arguments))
    assert both == {"float32": L * 4 * product}  # forward, once more, and towards weights and inputs


def test_operations_equal_those_that_xla_counts():
    def function(a, b, c, d):
        return jnp.einsum("bik,bkj->bij", a, b), c @ d

    shapes = [((4, 6, 10), jnp.float32), ((4, 10, 3), jnp.float32), ((6, 10), jnp.bfloat16), ((10, 7), jnp.bfloat16)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    counted = matmul_flops(jax.make_jaxpr(function)(*arguments))
    assert counted == {"float32": 2 * 4 * 6 * 10 * 3, "bfloat16": 2 * 6 * 10 * 7}
    assert sum(counted.values()) == jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def test_loops_of_unknown_length_and_branches():
    def function(n, x):
        def step(carried):
            i, x = carried
            return i + 1, jax.lax.cond(i > 2, lambda x: x @ x, lambda x: x @ x @ x, x)

        return jax.lax.while_loop(lambda carried: carried[0] < n, step, (0, x))

    jaxpr = jax.make_jaxpr(function)(jnp.int32(3), jnp.ones((4, 4)))
    assert matmul_flops(jaxpr) == {"float32": 2 * 2 * 4**3}
    assert matmul_flops(jaxpr, loop=10) == {"float32": 10 * 2 * 2 * 4**3}


def test_the_time_of_a_program():
    machine = parse("a100-80g:4")
    assumed = Assumptions(matmul=0.5, bandwidth=0.5, link=0.5, latency=1e-3)
    work = Work(traffic=2039.04e9, collectives=(Collective("all-gather", 200e9, (0, 1, 2, 3), times=2),))
    found = estimate({"bfloat16": 4 * 312e12, "float32": 4 * 156e12}, work, machine, assumed)
    assert found.compute == pytest.approx(2 * (1 + 1))
    assert found.memory == pytest.approx(2)
    assert found.communication == pytest.approx(2 * (1e-3 + 150e9 / 150e9))  # 3/4 of 200 GB at half of 300 GB/s
    assert found.fastest == found.compute and found.bound == "compute"
    assert found.slowest == found.compute + found.communication


def test_a_ring_over_hosts_is_as_fast_as_its_network_cards():
    assumed, size = Assumptions(link=1.0, latency=0.0), 1e9

    def rate(machine, members):
        one = Collective("all-gather", size, members)
        return one.sent / seconds(one, parse(machine), assumed)

    assert rate("a100-80g:16", tuple(range(8))) == pytest.approx(300e9)
    assert rate("a100-80g:16", tuple(range(16))) == pytest.approx(200e9)  # eight cards of 25 GB/s a host
    assert rate("a100-80g:16", (0, 8)) == pytest.approx(25e9)
    assert rate("h100:16", tuple(range(16))) == pytest.approx(400e9)
    assert rate("v5p:16", tuple(range(16))) == pytest.approx(180e9)
    assert seconds(Collective("all-reduce", size, (3,)), parse("v5p:16"), assumed) == 0


def test_shares_are_checked():
    with pytest.raises(ValueError, match="matmul must be a share above 0 and at most 1, got 1.5"):
        Assumptions(matmul=1.5)
    with pytest.raises(ValueError, match="latency must be 0 or more seconds, got -1"):
        Assumptions(latency=-1)
