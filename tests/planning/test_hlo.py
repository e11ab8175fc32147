"""Reading compiled programs: loops, groups, bytes, against texts whose answers are counted by hand."""

import numpy as np
import pytest

from llm.planning.collectives import collectives, replica_groups
from llm.planning.hlo import parse
from llm.planning.traffic import moved

LOOPS = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_condition (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %count = s32[]{:T(128)} constant(5)
  %at = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %count), direction=LT
}

%inner_body (q: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %q = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%q), index=1
  %reduced = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %reduced)
}

%outer_condition (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%p), index=0
  %limit = f32[8,4]{1,0} get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%at, %at), direction=LT
}

%outer_body (q: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %q = (s32[], f32[8,4]{1,0}) parameter(0)
  %loop = (s32[], f32[8,4]{1,0}) while(%q), condition=%inner_condition, body=%inner_body, backend_config={"x":[]}
  %y = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  %gathered = f32[16,4]{1,0} all-gather(%y), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%q, %y)
}

ENTRY %main (x: f32[8,4], n: s32[]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %start = (s32[], f32[8,4]{1,0}) tuple(%n, %x)
  %once = (s32[], f32[8,4]{1,0}) while(%start), condition=%outer_condition, body=%outer_body, backend_config=KNOWN
  %moved = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,2},{2,0}}
  %arrived = f32[8,4]{1,0} collective-permute-done(%moved)
  %alone = f32[8,4]{1,0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%once), index=1
}
"""
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_loops_multiply_and_groups_lie_on_axes():
    module = parse(LOOPS.replace("KNOWN", '{"known_trip_count":{"n":"3"}}'))
    assert module.unknown == [] and module.times["inner_body"] == 15 and module.times["outer_body"] == 3
    found = {one.kind: one for one in collectives(module, MESH)}
    assert found.keys() == {"all-reduce", "all-gather", "collective-permute"}  # a group of one sends nothing
    size = 8 * 4 * 4
    # Places 0, 2, 4, 6 form a group: they differ along data and fsdp.
    assert found["all-reduce"].axes == ("data", "fsdp") and found["all-reduce"].group == (0, 2, 4, 6)
    assert found["all-reduce"].sent == 15 * 2 * size * 3 / 4
    assert found["all-gather"].axes == ("tensor",) and found["all-gather"].sent == 3 * size
    assert found["collective-permute"].axes == ("fsdp",) and found["collective-permute"].sent == size


def test_a_loop_of_unknown_length_is_named():
    module = parse(LOOPS.replace("KNOWN", "{}"))
    assert module.unknown == ["once"] and module.times["inner_body"] == 5


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={}", [range(8)]),
        ("replica_groups={{0,3},{1,2}}, x={{9}}", [[0, 3], [1, 2]]),
        ("replica_groups=[2,4]<=[8], x", [range(4), range(4, 8)]),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=[4,2]<=[2,2,2]T(2,1,0)", [[0, 4], [2, 6], [1, 5], [3, 7]]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        # Axis 1 is the four of [4,2] transposed: the places that differ in the first of the two.
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, x",
            [[0, 2, 4, 6], [1, 3, 5, 7]],
        ),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [range(8)]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_every_form_of_groups(text, groups):
    assert replica_groups(text, 8) == [list(group) for group in groups]


def test_another_form_of_groups_is_refused():
    with pytest.raises(ValueError, match="not known here: something"):
        replica_groups("replica_groups=something", 8)


ADD = LOOPS[LOOPS.index("%add") : LOOPS.index("%inner_condition")]
FUSED = (
    f"HloModule jit_step\n\n{ADD}"
    + """
%start (p: bf16[1,8]) -> (bf16[1,8], bf16[4,8]) {
  %p = bf16[1,8]{1,0} parameter(0)
  %g.1 = bf16[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="0"}
  ROOT %c = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%middle (p: bf16[1,8], g: bf16[4,8], w: f32[64,8], i: s32[]) -> (f32[2,8], bf16[4,8]) {
  %p = bf16[1,8]{1,0} parameter(0)
  %g = bf16[4,8]{1,0} parameter(1)
  %w = f32[64,8]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %g.2 = bf16[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="0"}
  %c = bf16[4,8]{1,0} custom-call(%g, %g.2), custom_call_target="AsyncCollectiveStep"
  %s = f32[2,8]{1,0} dynamic-slice(%w, %i, %i), dynamic_slice_sizes={2,8}
  ROOT %t = (f32[2,8]{1,0}, bf16[4,8]{1,0}) tuple(%s, %c)
}

%all-reduce-scatter.1 (z: f32[4,8]) -> f32[1,8] {
  %z = f32[4,8]{1,0} parameter(0)
  %r = f32[4,8]{1,0} all-reduce(%z), channel_id=8, replica_groups=[1,4]<=[4], to_apply=%add
  %o = s32[] constant(0)
  ROOT %d = f32[1,8]{1,0} dynamic-slice(%r, %o, %o), dynamic_slice_sizes={1,8}
}

%write (all: f32[64,8], new: f32[1,8], i: s32[]) -> f32[64,8] {
  %all = f32[64,8]{1,0} parameter(0)
  %new = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = f32[64,8]{1,0} dynamic-update-slice(%all, %new, %i, %i)
}

ENTRY %main (p: bf16[1,8], w: f32[64,8], z: f32[4,8], i: s32[]) -> f32[64,8] {
  %p = bf16[1,8]{1,0:T(8,128)(2,1)} parameter(0)
  %w = f32[64,8]{1,0} parameter(1)
  %z = f32[4,8]{1,0:T(8,128)S(1)} parameter(2)
  %i = s32[]{:T(128)S(6)} parameter(3)
  %f.1 = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) fusion(%p), kind=kCustom, calls=%start
  %g.0 = bf16[4,8]{1,0} get-tuple-element(%f.1), index=1
  %f.2 = (f32[2,8]{1,0:S(1)}, bf16[4,8]{1,0}) fusion(%p, %g.0, %w, %i), kind=kCustom, calls=%middle
  %f.3 = f32[1,8]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %f.4 = f32[64,8]{1,0} fusion(%w, %f.3, %i), kind=kLoop, calls=%write
}
"""
)


def test_a_collective_beside_other_work_is_counted_once():
    found = {one.kind: one for one in collectives(parse(FUSED), {"fsdp": 4})}
    assert {kind: one.sent for kind, one in found.items()} == {
        "all-gather": 3 * 8 * 2,
        "reduce-scatter": 4 * 8 * 4 * 3 / 4,
    }


def test_bytes_moved_are_those_of_slices_in_main_memory():
    gather = 8 * 2 + 4 * 8 * 2  # read and written where it starts; neither again on its way
    slice_read = 2 * 8 * 4  # its result lies on the chip, as z does
    scattered, written = 8 * 4, 8 * 4 + 8 * 4
    assert moved(parse(FUSED)) == gather + slice_read + scattered + written


def test_sizes_of_arrays():
    module = parse(
        "ENTRY %main (x: s4[3,3]) -> pred[2] {\n  %x = (s4[3,3]{1,0}, bf16[2]{0}, u64[1]{0}, f8e4m3fn[5]{0}, c64[1]) "
        "parameter(0)\n  ROOT %y = pred[2]{0} custom-call(%x)\n}\n"
    )
    arrays = module.computations["main"]["x"].arrays
    np.testing.assert_array_equal([a.bytes for a in arrays], [4.5, 4, 8, 5, 8])
