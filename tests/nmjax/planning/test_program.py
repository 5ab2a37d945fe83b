"""What a program moves, against bytes counted by hand."""

import pytest

from nmjax.planning.program import Collective, read, size_of

HLO = """HloModule jit_step, is_scheduled=true, num_partitions=8

%fused_slice (param_0: bf16[64,128,256], param_1: s32[], param_2: bf16[128,256]) -> bf16[128,256] {
  %param_0 = bf16[64,128,256]{2,1,0} parameter(0)
  %bitcast.0 = bf16[64,32768]{1,0} bitcast(%param_0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice.1 = bf16[1,32768]{1,0} dynamic-slice(%bitcast.0, %param_1, %zero), dynamic_slice_sizes={1,32768}
  %bitcast.1 = bf16[128,256]{1,0} bitcast(%slice.1)
  %param_2 = bf16[128,256]{1,0} parameter(2)
  ROOT %add.1 = bf16[128,256]{1,0} add(%bitcast.1, %param_2)
}

%fused_update (param_0: f32[64,128], param_1: f32[1,128], param_2: s32[]) -> f32[64,128] {
  %param_0 = f32[64,128]{1,0} parameter(0)
  %param_1 = f32[1,128]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  ROOT %update = f32[64,128]{1,0} dynamic-update-slice(%param_0, %param_1, %param_2, %param_2)
}

%body (carried: (s32[], bf16[64,128,256], bf16[128,256])) -> (s32[], bf16[64,128,256], bf16[128,256]) {
  %carried = (s32[], bf16[64,128,256]{2,1,0}, bf16[128,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %stack = bf16[64,128,256]{2,1,0} get-tuple-element(%carried), index=1
  %x = bf16[128,256]{1,0} get-tuple-element(%carried), index=2
  %fusion.1 = bf16[128,256]{1,0} fusion(%stack, %i, %x), kind=kLoop, calls=%fused_slice
  %gather-start = (bf16[128,256]{1,0}, bf16[512,256]{1,0}) all-gather-start(%fusion.1), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %gather-done = bf16[512,256]{1,0} all-gather-done(%gather-start)
  ROOT %next = (s32[], bf16[64,128,256]{2,1,0}, bf16[128,256]{1,0}) tuple(%i, %stack, %fusion.1)
}

%more (carried: (s32[], bf16[64,128,256], bf16[128,256])) -> pred[] {
  %carried = (s32[], bf16[64,128,256]{2,1,0}, bf16[128,256]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%scan (carried: (s32[], bf16[64,128,256], bf16[128,256])) -> pred[] {
  %carried = (s32[], bf16[64,128,256]{2,1,0}, bf16[128,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %end = s32[]{:T(128)} constant(24)
  ROOT %less = pred[] compare(%i, %end), direction=LT, metadata={op_name="lt"}
}

%cheap (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  ROOT %same = f32[10]{0} copy(%p)
}

%dear (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  %once = f32[10]{0} copy(%p)
  ROOT %twice = f32[10]{0} copy(%once)
}

ENTRY %main (stack: bf16[64,128,256], x: bf16[128,256], rows: f32[64,128], row: f32[1,128], v: f32[10], b: s32[]) -> f32[64,128] {
  %stack = bf16[64,128,256]{2,1,0} parameter(0)
  %x = bf16[128,256]{1,0} parameter(1)
  %rows = f32[64,128]{1,0} parameter(2)
  %row = f32[1,128]{1,0} parameter(3)
  %v = f32[10]{0} parameter(4)
  %b = s32[] parameter(5)
  %start = (s32[], bf16[64,128,256]{2,1,0}, /*index=2*/bf16[128,256]{1,0}) tuple(%b, %stack, %x)
  %while.1 = (s32[], bf16[64,128,256]{2,1,0}, bf16[128,256]{1,0}) while(%start), condition=%more, body=%body LENGTH
  %conditional.1 = f32[10]{0} conditional(%b, %v, %v), branch_computations={%cheap, %dear}
  %gemm = (f32[64,64]{1,0}, s8[4194304]{0}) custom-call(%rows, %rows), custom_call_target="__cublas$gemm"
  %reduce = f32[64,128]{1,0} all-reduce(%rows), channel_id=2, replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, to_apply=%add
  ROOT %fusion.2 = f32[64,128]{1,0} fusion(%reduce, %row, %b), kind=kLoop, calls=%fused_update
}
"""  # noqa: E501

LAYER = 3 * 128 * 256 * 2 + 4  # a slice of the stack is read, so is x and the counter; one result is written
DEAR = 4 * 10 * 4
GEMM = (64 * 64 + 2 * 64 * 128) * 4  # its workspace is not counted
UPDATE = 2 * 128 * 4 + 4  # the row, read and written; the other rows stay


def program(length):
    return HLO.replace("LENGTH", length)


def test_a_loop_counts_as_often_as_it_runs():
    known = ', backend_config={"known_trip_count":{"n":"64"},"other":"1"}'
    work = read(program(known))
    assert work.traffic == 64 * LAYER + DEAR + GEMM + UPDATE
    assert work.open_loops == 0
    assert read(program("").replace("condition=%more", "condition=%scan")).traffic == 24 * LAYER + DEAR + GEMM + UPDATE
    once = read(program(""))
    assert (once.traffic, once.open_loops) == (LAYER + DEAR + GEMM + UPDATE, 1)
    told = read(program(""), loop=7)
    assert (told.traffic, told.open_loops) == (7 * LAYER + DEAR + GEMM + UPDATE, 0)


def test_collectives_their_groups_and_what_is_sent():
    gather, reduce = read(program(""), loop=7).collectives
    assert gather == Collective("all-gather", 512 * 256 * 2, (0, 1, 2, 3), times=7)
    assert reduce == Collective("all-reduce", 64 * 128 * 4, (0, 1, 2, 3))
    assert gather.sent == 3 * 128 * 256 * 2  # three pieces of the others pass by, one at a time
    assert reduce.sent == 2 * 3 / 4 * 64 * 128 * 4
    assert read(program(""), loop=7).sent == 7 * gather.sent + reduce.sent


@pytest.mark.parametrize(
    "groups, members",
    [
        ("replica_groups={{0,3},{1,2}}", (0, 3)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", (0, 4)),
        ("replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x','z'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['x'=8,'y'=1,'z'=4], device_ids=([4,8]T(1,0)) {'x'}", tuple(range(8))),
        ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
    ],
)
def test_every_way_to_write_groups(groups, members):
    kind = "collective-permute" if "pairs" in groups else "reduce-scatter"
    text = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n  ROOT %c = f32[8]{{0}} {kind}(%p), {groups}, dimensions={{0}}\n}}\n"  # noqa: E501
    (one,) = read(text).collectives
    assert (one.members, one.size) == (members, 32)
    n = len(members)
    assert one.sent == pytest.approx(32 if kind == "collective-permute" else 32 * (n - 1) / n)


NESTED = """%take (a: bf16[64,256], i: s32[]) -> bf16[256] {
  %a = bf16[64,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = bf16[1,256]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,256}
  ROOT %flat = bf16[256]{0} bitcast(%row)
}

%view (b: bf16[16,16]) -> bf16[256] {
  %b = bf16[16,16]{1,0} parameter(0)
  ROOT %flat = bf16[256]{0} bitcast(%b)
}

%outer (i: s32[], b: bf16[16,16], a: bf16[64,256]) -> bf16[256] {
  %b = bf16[16,16]{1,0} parameter(1)
  %a = bf16[64,256]{1,0} parameter(2)
  %i = s32[] parameter(0)
  %row = bf16[256]{0} fusion(%a, %i), kind=kLoop, calls=%take
  %whole = bf16[256]{0} fusion(%b), kind=kLoop, calls=%view
  ROOT %sum = bf16[256]{0} add(%row, %whole)
}

ENTRY %main (i: s32[], b: bf16[16,16], a: bf16[64,256]) -> bf16[256] {
  %i = s32[] parameter(0)
  %b = bf16[16,16]{1,0} parameter(1)
  %a = bf16[64,256]{1,0} parameter(2)
  ROOT %c = bf16[256]{0} fusion(%i, %b, %a), kind=kOutput, calls=%outer
}
"""


def test_a_slice_in_a_fusion_in_a_fusion():
    # One row of a, all of b seen in another shape, the number of the row, and the result.
    assert read(NESTED).traffic == 512 + 512 + 4 + 512


@pytest.mark.parametrize(
    "line, moved",
    [
        # From the main memory to the memory on the chip: read once. The whole that a slice is of does not count.
        ("((s8[8192]{0:T(1024)}), s8[4096]{0:T(1024)S(1)}, s32[]) slice-start(%p)", 4096),
        ("(s8[8192]{0:T(1024)S(1)}, s8[8192]{0:T(1024)}, u32[]) copy-start(%p)", 8192),
        ("(s8[8192]{0}, s8[8192]{0}, u32[]) copy-start(%p)", 2 * 8192),
        ("s8[8192]{0} copy-done(%p)", 0),
    ],
)
def test_copies_in_the_background(line, moved):
    text = f"ENTRY %main (p: s8[8192]) -> s8[8192] {{\n  %p = s8[8192]{{0}} parameter(0)\n  ROOT %c = {line}\n}}\n"
    assert read(text).traffic == moved


def test_bytes_of_shapes():
    assert size_of("(f32[2,3]{1,0}, bf16[4], pred[5], s4[6], f8e4m3fn[7], token[])") == 24 + 8 + 5 + 3 + 7
    # On-chip memory of a TPU does not count.
    assert size_of("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}") == 0
    assert size_of("bf16[8,128]{1,0:T(8,128)(2,1)}") == 2048


def test_what_is_no_program():
    with pytest.raises(ValueError, match="text holds no entry computation, got 'nothing'"):
        read("nothing")
