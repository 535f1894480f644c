"""TPU slices by the names that users know, and what a chip of each can do. A slice is described, never attached.

The names count what Google Cloud's do: chips of v5e and v6e, TensorCores of v5p, of which a chip has two.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import os
import re
import sys

from jaxlm.config import UserError, nearest

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation. Peaks and bandwidths are the datasheet's, per chip and second.

    hbm: what libtpu's compiler says a program may take, a little less than the datasheet's. ici: of all links of a
    chip, both directions together; a torus of `dims` dimensions has two links in each. dcn: between slices.
    """

    name: str
    libtpu: str  # what the compiler calls it
    cores: int  # that names count, in a chip
    dims: int
    hbm: float  # bytes
    flops: float  # bfloat16
    hbm_bandwidth: float  # bytes
    ici: float  # bytes
    dcn: float  # bytes
    shapes: dict[int, str]  # chips -> slice

    @property
    def link(self) -> float:
        """Bytes a second through one link in one direction."""
        return self.ici / (4 * self.dims)


FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
CUBES |= {1024: "8x8x16", 2048: "8x16x16"}  # what libtpu describes; there are larger ones

# Peaks, HBM bandwidth and ICI: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e, "System architecture", 2026-11. HBM:
# what libtpu names where a program is too large. DCN: a pod's 6.4 or 25.6 Tbit/s over 256 chips; v5p 50 Gbit/s a chip.
CHIPS = {
    "v5e": Chip("v5e", "v5e", 1, 2, 15.75 * GiB, 197e12, 819e9, 400e9, 6.4e12 / 8 / 256, FLAT),
    "v5p": Chip("v5p", "v5p", 2, 3, 95.73 * GiB, 459e12, 2765e9, 1200e9, 50e9 / 8, CUBES),
    "v6e": Chip("v6e", "v6e", 1, 2, 31.24 * GiB, 918e12, 1638e9, 800e9, 25.6e12 / 8 / 256, FLAT),
}
ALIASES = {"v5litepod": "v5e"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many slices of one shape."""

    name: str
    chip: Chip
    chips: int  # of one slice
    slices: int

    @property
    def shape(self) -> str:
        return self.chip.shapes[self.chips]

    @property
    def size(self) -> int:
        """Chips altogether, each a device of JAX's."""
        return self.chips * self.slices

    @property
    def about(self) -> str:
        times = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{times}{self.name}: {self.chips} chips, {self.shape}, {self.chip.hbm / GiB:.2f} GiB of HBM a chip"


def names(chip: Chip) -> list[str]:
    """All slices of a generation, the smallest first."""
    return [f"{chip.name}-{count * chip.cores}" for count in sorted(chip.shapes)]


def parse(name: str, slices: int = 1) -> Topology:
    """`v5e-16` (or `v5litepod-16`), `v6e-256`, `v5p-1024` (512 chips); `UserError` with the nearest for other names."""
    if slices < 1:
        raise UserError(f"--slices must be at least 1, got {slices}")
    found = re.fullmatch(r"([a-z]\w*?)-(\d+)", name.strip().lower())
    family = ALIASES.get(found[1], found[1]) if found else None
    if family not in CHIPS:
        known = [n for chip in CHIPS.values() for n in names(chip)]
        raise UserError(f"unknown topology {name!r}, a generation and a size such as v5p-128; {nearest(name, known)}")
    chip, count = CHIPS[family], int(found[2])
    if count % chip.cores or count // chip.cores not in chip.shapes:
        near = sorted(chip.shapes, key=lambda n: abs(n * chip.cores - count))[:2]
        counted = "chips" if chip.cores == 1 else f"TensorCores, {chip.cores} a chip"
        there = ", ".join(f"{family}-{n * chip.cores}" for n in sorted(near))
        raise UserError(f"there is no slice {name!r}: {family} counts {counted}; nearest: {there}")
    return Topology(f"{family}-{count}", chip, count // chip.cores, slices)


def devices(t: Topology) -> list:
    """The slices' devices, for programs to be compiled for. `UserError` where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu, and no TPU: pip install -e '.[tpu]'")
    if not any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*")):  # there a run may hold the chips
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    more = {"num_slices": t.slices} if t.slices > 1 else {}
    with _quiet():
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{t.chip.libtpu}:{t.shape}", **more)
    return list(described.devices)


@contextlib.contextmanager
def _quiet():
    """libtpu tells at length, past Python, that this is no TPU machine."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
