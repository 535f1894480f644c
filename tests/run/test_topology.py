"""Slices by their users' names, and chips by their datasheets."""

import importlib.util
import math

import pytest

from jaxlm.config import UserError
from jaxlm.run import slices, topology
from launch import tpus


@pytest.mark.parametrize(
    "name, shape, chips",
    [
        ("v5e-16", "4x4", 16),
        ("v5litepod-16", "4x4", 16),
        ("V6E-256", "16x16", 256),
        ("v5p-8", "2x2x1", 4),
        ("v5p-1024", "8x8x8", 512),
        ("v5p-2048", "8x8x16", 1024),
        ("v5p-12288", "16x16x24", 6144),
        ("v5e-1", "1x1", 1),
    ],
)
def test_names(name, shape, chips):
    t = topology.parse(name, 2)
    assert (t.shape, t.chips, t.size) == (shape, chips, 2 * chips)


def test_every_shape_has_its_chips():
    assert slices.SHAPES.keys() == slices.CORES.keys() == tpus.GENERATIONS.keys() >= topology.CHIPS.keys()
    for name, found in slices.by_name().items():
        sizes = [int(n) for n in found.shape.split("x")]
        assert slices.find(name) == found and math.prod(sizes) == found.chips
        if found.generation in topology.CHIPS:
            assert len(sizes) == topology.CHIPS[found.generation].dims == topology.parse(name).chip.dims


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
    for find in (topology.parse, tpus.find):
        with pytest.raises(UserError) as e:
            find(name)
        assert told in str(e.value) and "\n" not in str(e.value)


def test_chips_that_nothing_is_known_of():
    with pytest.raises(UserError, match="v4-8: what a v4 chip can do is not known here; v5e, v5p, v6e are"):
        topology.parse("v4-8")


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
    assert len(topology.devices(topology.parse("v5e-1"))) == 1
