"""The collectives of a program's text, on what the TPU's compiler made of a real step."""

import collections

import pytest

from jaxlm.run import hlo
from tests.source import ROOT

# pretrain_124m on v5e-4 with train.accumulation=32, fsdp over 4 chips, loss_chunk 128; see tests/goldens/make_hlo.py
STEP = (ROOT / "tests" / "goldens" / "hlo" / "pretrain_124m_v5e_4.txt").read_text(encoding="utf-8")
TABLE = 32768 * 768  # the embedding
KERNELS = 7_077_888  # of one of 12 layers


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{0,1,2,3}}, to_apply=%a", (0, 1, 2, 3)),
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", (0, 4)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}", (0, 1)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}", (0, 4)),
        ("replica_groups={}, to_apply=%a", tuple(range(8))),
        ("source_target_pairs={{0,3},{1,0},{2,1},{3,2}}", (0, 1, 2, 3)),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1}}", (0, 4)),
    ],
)
def test_groups(text, group):
    assert hlo.first_group(text, 8) == group


def totals(text=STEP):
    found = collections.defaultdict(float)
    for c in hlo.collectives(text, 4):
        found[c.op, c.loops] += c.bytes
    return found


def test_loops_and_bytes_of_a_real_step():
    found = totals()
    # The embedding is gathered for the look-up, and again in every one of 8 chunks of the loss, there and back.
    assert found["all-gather", (32,)] == 2 * TABLE * 3 / 4
    assert found["all-gather", (32, 8)] == 2 * 2 * TABLE * 3 / 4
    assert found["reduce-scatter", (32, 8)] == 4 * TABLE * 3 / 4
    # Gathers and scatters of the layers, each as permutations around the ring: twice there, once back at the least.
    permuted = found["collective-permute", (32, 12)]
    assert 3 * 2 * KERNELS * 3 / 4 <= permuted <= 1.15 * 3 * 2 * KERNELS * 3 / 4
    assert all(c.group == (0, 1, 2, 3) for c in hlo.collectives(STEP, 4))


def test_what_overlaps():
    found = {(c.op, c.overlaps) for c in hlo.collectives(STEP, 4)}
    assert ("collective-permute", True) in found and ("all-reduce", False) in found
    assert ("all-gather", True) in found and ("collective-permute", False) not in found


def test_how_often():
    times = {c.loops: c.times for c in hlo.collectives(STEP, 4)}
    assert times[()] == 1 and times[32, 12] == 384 and times[32, 8] == 256


def test_the_layers_are_named():
    assert {c.loops for c in hlo.collectives(STEP, 4) if "Block" in c.source} == {(32, 12)}


def test_known_turns_and_asynchronous_ones():
    text = """\
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}
  %agd = bf16[16]{0} all-gather-done(%ag)
  %ar = f32[10]{0:T(128)} all-reduce(%y), replica_groups={{0,1,2,3}}, to_apply=%add
  %rs = f32[4]{0} reduce-scatter(%z), replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add
  %alone = f32[4]{0} all-reduce(%z), replica_groups={{0},{1}}, to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    found = {c.op: (c.bytes, c.times) for c in hlo.collectives(text, 4)}
    assert found == {"all-gather": (24.0, 5), "all-reduce": (60.0, 5), "reduce-scatter": (16.0, 5)}


def test_steps_of_one_and_what_leaves_the_slice():
    """A gather that runs beside several fusions stands in each of them; between slices the host carries."""
    text = """\
%one (p: bf16[4]) -> bf16[16] {
  %ag.1 = bf16[16]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="3"}
}

%two (p: bf16[4]) -> bf16[16] {
  %ag.2 = bf16[16]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3}}, frontend_attributes={chain_id="3"}
}

ENTRY %main (a: bf16[4]) -> bf16[16] {
  %f.1 = bf16[16]{0} fusion(%a), kind=kCustom, calls=%one
  %f.2 = bf16[16]{0} fusion(%a), kind=kCustom, calls=%two
  %s = (f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=9, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
}
"""
    found = hlo.collectives(text, 8, slices=2)
    assert [(c.op, c.bytes, c.group, c.overlaps) for c in found] == [
        ("all-gather", 24.0, (0, 1, 2, 3), True),
        ("exchange", 32.0, (0, 4), True),
    ]
