"""The arithmetic of a stage, against figures worked out by hand."""

import dataclasses
import types

import numpy as np
import pytest

from jaxlm.nn.definition import ModelConfig, Precision
from jaxlm.run import roofline
from jaxlm.run.roofline import Traffic, Work
from jaxlm.run.topology import CHIPS

MODEL = ModelConfig(
    vocab_size=64, vocab_multiple=1, layers=3, width=8, heads=4, kv_heads=2, head_width=2, hidden=16,
    precision=Precision(compute="bfloat16"), remat="full",
)  # fmt: skip
KERNELS = (
    8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16 + 2 * 8 + 8 / 3
)  # q and out, k and v, the MLP, norms, the last norm's share
WORK = Work(MODEL, flops=1e6, tokens=32, microbatches=2, length=8, update=True, logits=True)


def test_counts():
    assert roofline.kernels(MODEL) == int(KERNELS) and roofline.table(MODEL) == 512 and roofline.tables(MODEL) == 2


def test_least_of_fsdp():
    """Two gathers and a scatter of each layer in two microbatches, 3/4 of the bytes of bfloat16 from three others."""
    found = roofline.minimum(WORK, {"fsdp": 4, "tensor": 1})
    times = 2 * 3 * 2 * 3 / 4
    assert found == {"fsdp": Traffic(times * int(KERNELS), times * 512 * 5 / 3)}
    tied = dataclasses.replace(WORK, model=dataclasses.replace(MODEL, tied=True))
    assert roofline.minimum(tied, {"fsdp": 4})["fsdp"].outside == times * 512
    forward = dataclasses.replace(WORK, update=False, microbatches=1)
    assert roofline.minimum(forward, {"fsdp": 4})["fsdp"] == Traffic(1.5 * int(KERNELS), 1.5 * 1024)


def test_least_of_tensor():
    """Four all-reduces of the activations a layer and one more for full remat: of 16 tokens a device, 8 wide."""
    each = 2 * (2 * 1 / 2) * 16 * 8 * 2
    found = roofline.minimum(WORK, {"fsdp": 2, "tensor": 2})
    assert found["tensor"] == Traffic(5 * each, 2 * each)
    kept = dataclasses.replace(WORK, model=dataclasses.replace(MODEL, remat="none"))
    assert roofline.minimum(kept, {"fsdp": 2, "tensor": 2})["tensor"].layer == 4 * each
    assert found["fsdp"].layer == 2 * 3 * 2 / 2 / 2 * int(KERNELS)  # half of the kernels, from one other


def test_least_of_replicas_and_context():
    found = roofline.minimum(WORK, {"replica": 2, "context": 2})
    assert found["replica"] == Traffic(4 * int(KERNELS), 4 * 1024)
    keys = 2 * 16 * 2 * 2 * 2 / 2  # K and V of a row's 16 tokens, in bfloat16, half of them from the other device
    assert found["context"].layer == 2 * 3 * keys + 4 * int(KERNELS)


def test_nothing_moves_on_one_device():
    assert roofline.minimum(WORK, {"replica": 1, "fsdp": 1, "tensor": 1, "context": 1}) == {}


def slice_of(shape):
    coords = [tuple(reversed(c)) for c in np.ndindex(*reversed(shape))]
    return [types.SimpleNamespace(coords=c, slice_index=0) for c in coords]


def test_bandwidth_follows_the_torus():
    v5e, v5p = CHIPS["v5e"], CHIPS["v5p"]
    pod = slice_of((16, 16))
    assert roofline.bandwidth(tuple(range(16)), pod, v5e, "16x16") == 100e9  # a ring: two links
    assert roofline.bandwidth(tuple(range(256)), pod, v5e, "16x16") == 200e9
    assert roofline.bandwidth(tuple(range(4)), pod, v5e, "16x16") == 50e9  # a line on the ring: one
    assert roofline.bandwidth((0, 1, 2, 3), slice_of((2, 2)), v5e, "2x2") == 100e9
    cube = slice_of((4, 4, 4))
    assert roofline.bandwidth(tuple(range(64)), cube, v5p, "4x4x4") == 600e9
    far = [*slice_of((2, 2)), *(types.SimpleNamespace(coords=(0, 0), slice_index=1) for _ in range(4))]
    assert roofline.bandwidth((0, 4), far, v5e, "2x2") == v5e.dcn


def test_estimate_is_bound_by_the_slowest():
    chip = CHIPS["v5e"]
    work = dataclasses.replace(WORK, flops=4 * 197e12, model=dataclasses.replace(MODEL, remat="none"))
    e = roofline.estimate(work, chip, 4, moved=0.5 * 819e9, network=2.0)
    assert (e.compute, e.hbm, e.least, e.most) == pytest.approx((1.0, 0.5, 2.0, 3.0))
    assert e.utilization == pytest.approx((0.5, 1 / 3))
    e = roofline.estimate(work, chip, 4, moved=0.5 * 819e9, network=2.0, waiting=1.5)
    assert (e.least, e.most) == pytest.approx((2.5, 3.0))


def test_remat_makes_work_and_keeps_less():
    def with_(remat):
        return dataclasses.replace(WORK, model=dataclasses.replace(MODEL, remat=remat))

    again = [with_(r).recomputed for r in ("none", "dots", "full")]
    assert again[0] == 0 < again[1] < again[2]
    kept = [roofline.kept_activations(WORK, {"fsdp": 4}, r) for r in ("none", "dots", "full")]
    assert kept[0] > kept[1] > kept[2] == 8 * 8 * 2 * 3  # 8 tokens a device, the blocks' inputs, 3 layers
    assert dataclasses.replace(WORK, update=False).recomputed == 0


def test_decoding_reads_its_cache():
    step = dataclasses.replace(WORK, update=False, microbatches=1, cache=1e6)
    moved = roofline.hbm_bytes(step, {"fsdp": 2, "tensor": 2}, 0.0)
    without = roofline.hbm_bytes(dataclasses.replace(step, cache=0.0), {"fsdp": 2, "tensor": 2}, 0.0)
    assert moved - without == 1e6 / 4
