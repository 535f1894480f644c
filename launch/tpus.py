"""TPU slices by the names that users know, such as v5p-256: chips, topology, hosts, and what each system calls them."""

import dataclasses
import math

from jaxlm.config import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Generation:
    """counts: what one chip adds to the number in a name: 2 where names count TensorCores, 1 where they count chips.

    gcloud: prefix of gcloud's accelerator types. runtime: the software that a TPU VM starts with. gke: the node label.
    topologies: chips along each dimension of the slices that can be asked for.
    """

    counts: int
    gcloud: str
    runtime: str
    gke: str
    topologies: tuple[str, ...]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12", "8x8x8", "8x8x12", "8x8x16")
CUBES += ("8x12x16", "8x16x16", "12x16x16", "16x16x16")
GENERATIONS = {
    "v4": Generation(2, "v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", CUBES),
    "v5e": Generation(1, "v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", FLAT),
    "v5p": Generation(2, "v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", (*CUBES, "16x16x24")),
    "v6e": Generation(1, "v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", FLAT),
}


@dataclasses.dataclass(frozen=True)
class Tpu:
    """So many slices of one size. hosts: machines of all slices together; chips: of one slice."""

    generation: str
    topology: str
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(int(n) for n in self.topology.split("x"))

    @property
    def chips_per_host(self) -> int:
        """4, but a slice of 1, or of 8 in a flat generation, is one machine."""
        return self.chips if self.chips == 1 or self.topology == "2x4" else 4

    @property
    def hosts_per_slice(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def hosts(self) -> int:
        return self.hosts_per_slice * self.slices

    @property
    def gcloud_type(self) -> str:
        g = GENERATIONS[self.generation]
        return f"{g.gcloud}-{self.chips * g.counts}"


def by_name() -> dict[str, Tpu]:
    """Every slice by its name, such as v5p-256 for 128 chips on 32 hosts."""
    slices = [Tpu(name, topology) for name, g in GENERATIONS.items() for topology in g.topologies]
    return {f"{t.generation}-{t.chips * GENERATIONS[t.generation].counts}": t for t in slices}


def find(name: str, slices: int = 1) -> Tpu:
    """The slice that `name` means, so many times; gcloud's v5litepod-16 is taken for v5e-16."""
    known = by_name()
    generation, _, number = name.replace("v5litepod-", "v5e-").partition("-")
    if slices < 1:
        raise UserError(f"--slices={slices}: a job runs on one slice at least")
    if f"{generation}-{number}" in known:
        return dataclasses.replace(known[f"{generation}-{number}"], slices=slices)
    if generation not in GENERATIONS or not number.isdigit():
        raise UserError(f"unknown accelerator {name!r}; {nearest(name, known)}")
    sizes = sorted(t.chips for t in known.values() if t.generation == generation)
    counts = GENERATIONS[generation].counts
    close = sorted(sorted(sizes, key=lambda chips: abs(chips * counts - int(number)))[:2])
    what = "TensorCores, two a chip" if counts == 2 else "chips"
    names = ", ".join(f"{generation}-{chips * counts}" for chips in close)
    raise UserError(f"unknown accelerator {name!r} ({generation} sizes count {what}); nearest: {names}")
