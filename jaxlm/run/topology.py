"""TPU slices for programs to be compiled for, and what a chip of each can do. A slice is described, never attached."""

import contextlib
import dataclasses
import glob
import importlib.util
import os
import sys

from jaxlm.config import UserError
from jaxlm.run import slices as named
from jaxlm.run.slices import Slice

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation, by the name that libtpu has for it too.

    Peaks and bandwidths are the datasheet's, per chip and second.
    hbm: what libtpu's compiler says a program may take, a little less than the datasheet's. ici: of all links of a
    chip, both directions together; a torus of `dims` dimensions has two links in each. dcn: between slices.
    """

    name: str
    dims: int
    hbm: float  # bytes
    flops: float  # bfloat16
    hbm_bandwidth: float  # bytes
    ici: float  # bytes
    dcn: float  # bytes

    @property
    def link(self) -> float:
        """Bytes a second through one link in one direction."""
        return self.ici / (4 * self.dims)


# Peaks, HBM bandwidth and ICI: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e, "System architecture", 2026-11. HBM:
# what libtpu names where a program is too large. DCN: a pod's 6.4 or 25.6 Tbit/s over 256 chips; v5p 50 Gbit/s a chip.
CHIPS = {
    "v5e": Chip("v5e", 2, 15.75 * GiB, 197e12, 819e9, 400e9, 6.4e12 / 8 / 256),
    "v5p": Chip("v5p", 3, 95.73 * GiB, 459e12, 2765e9, 1200e9, 50e9 / 8),
    "v6e": Chip("v6e", 2, 31.24 * GiB, 918e12, 1638e9, 800e9, 25.6e12 / 8 / 256),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many slices of one shape."""

    slice: Slice
    chip: Chip
    slices: int

    @property
    def name(self) -> str:
        return self.slice.name

    @property
    def shape(self) -> str:
        return self.slice.shape

    @property
    def chips(self) -> int:
        """Of one slice."""
        return self.slice.chips

    @property
    def size(self) -> int:
        """Chips altogether, each a device of JAX's."""
        return self.chips * self.slices

    @property
    def about(self) -> str:
        times = f"{self.slices} slices of " if self.slices > 1 else ""
        return f"{times}{self.name}: {self.chips} chips, {self.shape}, {self.chip.hbm / GiB:.2f} GiB of HBM a chip"


def parse(name: str, slices: int = 1) -> Topology:
    """The slice that `name` means (`slices.find`), so many times; `UserError` where no chip of it is known."""
    if slices < 1:
        raise UserError(f"--slices must be at least 1, got {slices}")
    found = named.find(name)
    if found.generation not in CHIPS:
        raise UserError(
            f"{found.name}: what a {found.generation} chip can do is not known here; {', '.join(CHIPS)} are"
        )
    return Topology(found, CHIPS[found.generation], slices)


def devices(t: Topology) -> list:
    """The slices' devices, for programs to be compiled for. `UserError` where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu, and no TPU: pip install -e '.[tpu]'")
    if not any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*")):  # there a run may hold the chips
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    more = {"num_slices": t.slices} if t.slices > 1 else {}
    more |= {"chips_per_host_bounds": [1, 1, 1]} if t.chips == 1 else {}  # libtpu takes hosts of four by itself
    with _quiet():
        described = topologies.get_topology_desc(platform="tpu", topology_name=f"{t.chip.name}:{t.shape}", **more)
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
