"""What a stage must do at the least, and how long that takes: operations, bytes of HBM, bytes between devices.

All of it is arithmetic on the definition and the mesh: XLA's own cost analysis counts a loop's body once. The
assumptions are in `ASSUMPTIONS`, and printed with the figures.
"""

import dataclasses
import math

import numpy as np

from jaxlm.nn import flops
from jaxlm.nn.definition import ModelConfig, padded_vocab
from jaxlm.run.topology import Chip

ASSUMPTIONS = (
    "matrix products at the chip's datasheet peak; attention counted without its causal half (6N + 12LDT)",
    "HBM traffic from the definition: weights once a pass, inputs and outputs of each matrix product once, the "
    "optimizer's state read and written once; nothing else misses on-chip memory",
    "a collective takes its ring's bytes over the links of the torus dimensions that its group spans, two links a "
    "dimension where the dimension is a ring (16 chips of v5e and v6e, 4 of v5p), one where it is a line; no latency",
    "between slices, the datasheet's data-center bandwidth a chip",
    "the step takes at least the slowest of compute, HBM and asynchronous collectives, which all overlap, and then the "
    "synchronous ones, which never do; at most all collectives added to the slower of compute and HBM",
)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stage computes, over all devices.

    flops: by the convention of `nn.flops`, of the whole stage. tokens: that go through the layers together, in each of
    `microbatches`. length: keys that a query may see. update: with gradients and an optimizer. logits: made at all.
    cache: bytes of keys and values that are read once.
    """

    model: ModelConfig
    flops: float
    tokens: int
    microbatches: int
    length: int
    update: bool
    logits: bool
    cache: float = 0.0

    @property
    def recomputed(self) -> float:
        """Operations of the backward pass that the convention does not count: what remat makes again."""
        if not self.update or self.model.remat == "none":
            return 0.0
        m, tokens = self.model, self.tokens * self.microbatches
        attention = 4.0 * m.heads * m.head_dim * m.layers * self.length * tokens
        if m.remat == "dots":
            return attention
        return 2.0 * kernels(m) * m.layers * tokens + attention


def kernels(m: ModelConfig) -> int:
    """Parameters of one layer's kernels."""
    return (flops.parameter_count(m) - table(m) * tables(m)) // m.layers


def table(m: ModelConfig) -> int:
    """Parameters of the embedding, and of an untied output kernel."""
    return padded_vocab(m) * m.width


def tables(m: ModelConfig) -> int:
    return 1 if m.tied else 2


def itemsize(name: str) -> int:
    return {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}[name]


# -------------------------------------------------------------------------------------------------------- collectives
@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a device receives in one run of a stage: for one layer, and for everything outside the layers."""

    layer: float = 0.0
    outside: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.layer + other.layer, self.outside + other.outside)

    def total(self, layers: int) -> float:
        return self.layer * layers + self.outside


def minimum(work: Work, mesh: dict[str, int]) -> dict[str, Traffic]:
    """{mesh axis: the least that a scheme of this kind moves}; axes of size 1 are left out.

    fsdp (ZeRO-3, arXiv:1910.02054): weights gathered for the forward and again for the backward pass of each
    microbatch, gradients scattered once a microbatch, all in the compute dtype. tensor (Megatron, arXiv:1909.08053):
    two all-reduces of the activations a layer in each pass; with full remat that of attention is made again. replica:
    gradients all-reduced once a step, in float32. context: keys and values gathered in each pass, their gradients
    scattered, and the parameters' all-reduced once a step.
    """
    m, out = work.model, {}
    compute = itemsize(m.precision.compute)
    fsdp, tensor, replica, context = (mesh.get(a, 1) for a in ("fsdp", "tensor", "replica", "context"))
    tokens = work.tokens / (replica * fsdp * context)
    full = work.update and m.remat == "full"

    def share(n: int) -> float:
        return (n - 1) / n

    if fsdp > 1:
        times = work.microbatches * (3 if work.update else 1) * compute * share(fsdp)
        reads = (tables(m) if work.logits else 1) * table(m)
        if work.update:  # the look-up needs no table in the backward pass
            reads = ((3 if m.tied else 5) if work.logits else 2) * table(m) / 3
        out["fsdp"] = Traffic(times * kernels(m) / tensor, times * reads / tensor)
    if tensor > 1:
        each = work.microbatches * 2 * share(tensor) * tokens * m.width * compute
        out["tensor"] = Traffic(each * (4 + full if work.update else 2), each * (2 if work.update else 1))
    if replica > 1:
        shard = 2 * share(replica) * 4 / (fsdp * tensor) if work.update else 0.0
        out["replica"] = Traffic(shard * kernels(m), shard * tables(m) * table(m))
    if context > 1:
        keys = 2 * tokens * context * m.key_heads * m.head_dim / tensor * compute * share(context)
        shard = 2 * share(context) * 4 / (fsdp * tensor) if work.update else 0.0
        passes = 3 if work.update else 1
        out["context"] = Traffic(
            work.microbatches * passes * keys + shard * kernels(m), shard * tables(m) * table(m)
        )  # fmt: skip
    return out


def spans(group: tuple[int, ...], mesh) -> tuple[str, ...]:
    """The mesh axes over which a group of partitions lies."""
    shape = tuple(mesh.shape.values())
    at = np.array(np.unravel_index(np.array(group), shape))
    return tuple(name for name, row in zip(mesh.axis_names, at) if len(set(row.tolist())) > 1)


def bandwidth(group: tuple[int, ...], devices: list, chip: Chip, shape: str) -> float:
    """Bytes a second that each device of a group can receive. devices: of the mesh, flat; shape: of a slice."""
    members = [devices[i] for i in group]
    if len({getattr(d, "slice_index", 0) for d in members}) > 1:
        return chip.dcn
    sizes = [int(n) for n in shape.split("x")]
    wraps = {2: 16, 3: 4}[chip.dims]
    links = 0
    for dim, size in enumerate(sizes):
        there = len({d.coords[dim] for d in members})
        if there > 1:
            links += 2 if there == size and size % wraps == 0 else 1
    return chip.link * max(links, 1)


# ---------------------------------------------------------------------------------------------------- bytes and time
def hbm_bytes(work: Work, mesh: dict[str, int], state: float) -> float:
    """Read and written on one device in a run of the stage. state: bytes of what the optimizer updates, and its own."""
    m = work.model
    compute = itemsize(m.precision.compute)
    fsdp, tensor, replica, context = (mesh.get(a, 1) for a in ("fsdp", "tensor", "replica", "context"))
    remat = work.update and m.remat == "full"
    passes = 2 + remat if work.update else 1
    weights = (kernels(m) * m.layers + table(m) * (tables(m) if work.logits else 1)) / tensor
    moved = work.microbatches * passes * weights * compute * (2 if fsdp > 1 else 1)
    tokens = work.tokens * work.microbatches / (replica * fsdp * context)
    heads, keys = m.heads * m.head_dim, 2 * m.key_heads * m.head_dim
    wide = (2 if m.gated else 1) * m.hidden_width
    each = (m.width + heads + keys + heads + m.width) + (m.width + wide + m.hidden_width + m.width)
    moved += tokens * each / tensor * m.layers * compute * ((3 + remat) if work.update else 1)
    if work.logits and work.update:
        moved += tokens * padded_vocab(m) / tensor * 4 * 4
    if work.update:
        moved += 2 * state + work.microbatches * weights * compute
    return moved + work.cache / (replica * fsdp * math.gcd(tensor, m.key_heads))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds; `least` and `most` of a run of the stage, and the model's operations over what the chips could do in
    that time."""

    compute: float
    hbm: float
    network: float
    least: float
    most: float
    utilization: tuple[float, float]  # at most, at least


def estimate(work: Work, chip: Chip, devices: int, moved: float, network: float, waiting: float = 0.0) -> Estimate:
    """moved: bytes of HBM a device; network: seconds that the collectives take one after the other, and `waiting` those
    of them in which nothing else runs."""
    peak = chip.flops * devices
    compute, hbm = (work.flops + work.recomputed) / peak, moved / chip.hbm_bandwidth
    least, most = max(compute, hbm, network - waiting) + waiting, max(compute, hbm) + network
    return Estimate(compute, hbm, network, least, most, (work.flops / peak / least, work.flops / peak / most))


# ------------------------------------------------------------------------------------------------------ what is kept
def kept_activations(work: Work, mesh: dict[str, int], remat: str) -> float:
    """Bytes on one device that the forward pass of a microbatch keeps in its layers for the backward pass, about."""
    m = work.model
    compute = itemsize(m.precision.compute)
    fsdp, tensor, replica, context = (mesh.get(a, 1) for a in ("fsdp", "tensor", "replica", "context"))
    tokens = work.tokens / (replica * fsdp * context)
    heads, keys = m.heads * m.head_dim, 2 * m.key_heads * m.head_dim
    wide = (2 if m.gated else 1) * m.hidden_width
    each = m.width
    if remat == "dots":
        each += (heads + keys + wide) / tensor + 2 * m.width
    if remat == "none":  # inputs and outputs of the products, in the norms and rotations float32, and the attention's
        each += 2 * (2 * heads + 2 * keys + wide + 2 * m.hidden_width) / tensor + 6 * m.width
    return tokens * each * compute * m.layers
