"""TPU slices as launchers ask for them: hosts, and what gcloud and GKE call them."""

import dataclasses

from jaxlm.config import UserError
from jaxlm.run import slices as named


@dataclasses.dataclass(frozen=True)
class Generation:
    """gcloud: prefix of gcloud's accelerator types. runtime: the software that a TPU VM starts with. gke: the node
    label."""

    gcloud: str
    runtime: str
    gke: str


GENERATIONS = {
    "v4": Generation("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": Generation("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": Generation("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Generation("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice"),
}


@dataclasses.dataclass(frozen=True)
class Tpu:
    """So many slices of one size. hosts: machines of all slices together; chips: of one slice."""

    slice: named.Slice
    slices: int = 1

    @property
    def generation(self) -> str:
        return self.slice.generation

    @property
    def topology(self) -> str:
        return self.slice.shape

    @property
    def chips(self) -> int:
        return self.slice.chips

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
        return f"{GENERATIONS[self.generation].gcloud}-{self.slice.number}"


def find(name: str, slices: int = 1) -> Tpu:
    """The slice that `name` means, so many times; gcloud's v5litepod-16 is taken for v5e-16."""
    if slices < 1:
        raise UserError(f"--slices={slices}: a job runs on one slice at least")
    return Tpu(named.find(name), slices)
