"""Plans as text."""

from __future__ import annotations

from experiments.planning.plans import Failure, Plan, ranked
from nmjax.report.tables import Table

_GB = 1e9


def describe(plan: Plan, price: float | None = None) -> str:
    """A plan with its assumptions. GB are 10^9 bytes."""
    work, machine = plan.workload, plan.machine
    hosts = f"{machine.hosts} host{'s' if machine.hosts > 1 else ''}"
    shape = f"{work.batch} rows of {work.seq} tokens"
    if work.job == "generate":
        shape += f" and {work.new_tokens} new ones"
    lines = [f"{work.job} on {machine} ({hosts}), mesh {_mesh(plan.mesh)}: {shape}", ""]
    lines += [_memory(plan).text(), "", _times(plan).text(), ""]
    if (collectives := _collectives(plan)).rows:
        lines += [collectives.text(), ""]
    lines += [_assumptions(plan), "", _verdict(plan, price)]
    return "\n".join(lines)


def ranking(found: list[Plan | Failure], price: float | None = None) -> str:
    """The plans of a search: those that fit, best first, and why the others are out."""
    headers = ["mesh", "batch", "GB a device", "head room", "step s", "tokens/s", "bound by"]
    headers += [] if price is None else ["cost of 1M tokens"]
    rows = []
    for plan in ranked(found):
        row = [_mesh(plan.mesh), str(plan.workload.batch), _gb(plan.memory), _gb(plan.head_room), _span(plan.seconds)]
        row += [_span(plan.tokens_per_second), max(plan.stages, key=lambda stage: stage.time.slowest).time.bound]
        rows.append(row + ([] if price is None else [_span(plan.cost_per_million(price))]))
    out = []
    for one in found:
        if isinstance(one, Failure):
            out.append(f"  {_mesh(one.mesh)}, batch {one.workload.batch}: {one.reason}")
        elif not one.fits:
            out.append(f"  {_mesh(one.mesh)}, batch {one.workload.batch}: {_gb(-one.head_room)} GB a device too much")
    table = Table(headers, rows, "Those that fit, most tokens a second first").text() if rows else "None fits."
    return table + ("\n\nOut:\n" + "\n".join(out) if out else "")


def _memory(plan: Plan) -> Table:
    rows = []
    for stage in plan.stages:
        m = stage.compiled.memory
        parts = (m.arguments, m.temporaries, m.outputs, m.aliased, m.total, plan.machine.usable_memory - m.total)
        rows.append([stage.name, *map(_gb, parts)])
    chip = plan.machine.chip
    caption = f"Memory a device, GB; of {_gb(chip.memory)} are {_gb(chip.reserved)} kept for context and libraries"
    return Table(["stage", "arguments", "temporaries", "outputs", "aliased", "total", "head room"], rows, caption)


def _times(plan: Plan) -> Table:
    rows = []
    for stage in plan.stages:
        t, c = stage.time, stage.compiled
        row = [stage.name, f"{sum(c.flops.values()) / 1e12:.4g}", _gb(c.work.traffic), _gb(c.work.sent)]
        row += [f"{part:.4g}" for part in (t.compute, t.memory, t.communication)]
        rows.append([*row, _span((t.fastest, t.slowest)), t.bound, f"{c.seconds:.1f}"])
    headers = ["stage", "TFLOP of all", "GB moved", "GB sent", "compute s", "memory s", "collectives s", "in all s"]
    return Table([*headers, "bound by", "compiled in s"], rows, "Work, the last two of bytes a device; and its time")


def _collectives(plan: Plan) -> Table:
    rows = [
        [f"{stage.name} {one['kind']}", str(one["devices"]), str(one["hosts"]), str(one["runs"]), _gb(one["whole"]),
         _gb(one["sent"])]
        for stage in plan.stages
        for one in stage.collectives(plan.machine.chip.per_host)
        if one["devices"] > 1
    ]  # fmt: skip
    return Table(["collective", "devices", "hosts", "runs", "GB whole", "GB sent a device"], rows, "Collectives")


def _assumptions(plan: Plan) -> str:
    chip, assumed = plan.machine.chip, plan.assumed
    network = f", {chip.network / _GB:g} GB/s a device between hosts" if plan.machine.hosts > 1 else ""
    rates = f"{chip.flops / 1e12:g} TFLOP/s (float32 {chip.flops_float32 / 1e12:g})"
    text = (
        f"Assumed: {assumed.matmul:.0%} of {rates}, {assumed.bandwidth:.0%} of {chip.bandwidth / _GB:g} GB/s of "
        f"memory, {assumed.link:.0%} of {chip.link / _GB:g} GB/s between devices{network}, "
        f"{assumed.latency * 1e6:g} us a collective. Operations are those of the matrix products in the traced "
        "program, loops times their lengths; bytes are read from the compiled one. The time is from collectives beside "
        "everything else to everything waiting for them."
    )
    loops = sum(stage.compiled.work.open_loops for stage in plan.stages)
    return text + (f" {loops} inner loops of unknown length are counted once." if loops else "")


def _verdict(plan: Plan, price: float | None) -> str:
    fits = "Fits" if plan.fits else "DOES NOT FIT"
    room = f"{_gb(abs(plan.head_room))} GB a device {'to spare' if plan.fits else 'too much'}"
    text = f"{fits}: {room}; {_span(plan.tokens_per_second)} tokens/s"
    if price is not None:
        hourly = price * plan.machine.count
        text += f"; at {hourly:g} an hour for all, {_span(plan.cost_per_million(price))} a million tokens"
    return text


def _mesh(sizes: str | dict[str, int]) -> str:
    return sizes if isinstance(sizes, str) else ",".join(f"{axis}={size}" for axis, size in sizes.items())


def _gb(value: float) -> str:
    return f"{value / _GB:.2f}"


def _span(ends: tuple[float, float]) -> str:
    low, high = (f"{end:.4g}" if end < 1e4 else f"{end:,.0f}" for end in ends)
    return low if low == high else f"{low} to {high}"
