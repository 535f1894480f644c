"""Slices by their users' names, and chips by their datasheets."""

import importlib.util

import pytest

from jaxlm.config import UserError
from jaxlm.run import topology


@pytest.mark.parametrize(
    "name, shape, chips",
    [
        ("v5e-16", "4x4", 16),
        ("v5litepod-16", "4x4", 16),
        ("V6E-256", "16x16", 256),
        ("v5p-8", "2x2x1", 4),
        ("v5p-1024", "8x8x8", 512),
        ("v5p-2048", "8x8x16", 1024),
    ],
)
def test_names(name, shape, chips):
    t = topology.parse(name, 2)
    assert (t.shape, t.chips, t.size) == (shape, chips, 2 * chips)


def test_every_shape_has_its_chips():
    for chip in topology.CHIPS.values():
        assert [topology.parse(n).chips for n in topology.names(chip)] == sorted(chip.shapes)
        for chips, shape in chip.shapes.items():
            sizes = [int(n) for n in shape.split("x")]
            assert len(sizes) == chip.dims
            assert sizes[0] * sizes[1] * (sizes[2] if chip.dims == 3 else 1) == chips


@pytest.mark.parametrize(
    "name, told",
    [
        ("v5p-100", "TensorCores, 2 a chip; nearest: v5p-64, v5p-128"),
        ("v5p-7", "nearest: v5p-8, v5p-16"),
        ("v5e-12", "v5e counts chips; nearest: v5e-8, v5e-16"),
        ("v6e-512", "nearest: v6e-128, v6e-256"),
        ("v6-256", "nearest: v6e-256"),
        ("v5p", "a generation and a size"),
        ("", "a generation and a size"),
    ],
)
def test_wrong_names_are_explained(name, told):
    with pytest.raises(UserError) as e:
        topology.parse(name)
    assert told in str(e.value) and "\n" not in str(e.value)


def test_no_slices():
    with pytest.raises(UserError, match="at least 1, got 0"):
        topology.parse("v5e-4", 0)


def test_links_add_up():
    """Two links a dimension, each both ways, are the datasheet's bandwidth."""
    assert topology.CHIPS["v5p"].link == 100e9 and topology.CHIPS["v5e"].link == 50e9
    assert topology.CHIPS["v6e"].dcn == 12.5e9 and topology.CHIPS["v5p"].dcn == 6.25e9


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu.*\[tpu\]"):
        topology.devices(topology.parse("v5e-4"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
def test_libtpu_describes_them():
    found = topology.devices(topology.parse("v6e-8", 2))
    assert len(found) == 16 and {d.slice_index for d in found} == {0, 1}
