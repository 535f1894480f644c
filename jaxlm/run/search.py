"""Meshes and remat policies for an experiment on a slice, ranked by arithmetic before any of them is compiled."""

import dataclasses

from jaxlm.config import UserError
from jaxlm.nn.definition import padded_vocab
from jaxlm.run import pod, roofline
from jaxlm.run.compiled import COMFORT
from jaxlm.run.experiment import Experiment
from jaxlm.run.topology import Topology
from jaxlm.sharding import MeshConfig
from jaxlm.steps.policy import PolicyGradient

REMAT = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """settings: for --set. bytes: a device would hold, by arithmetic. seconds: of a gradient step, at least and at
    most, with no more traffic than the scheme needs."""

    experiment: Experiment
    settings: tuple[str, ...]
    bytes: float
    seconds: tuple[float, float]
    fits: bool


def gradient_step(stages: list[pod.Stage]) -> pod.Stage:
    """The stage that decides how long training takes: the update of the policy, or of whatever is trained."""
    return [s for s in stages if s.work.update][-1]


def schemes(e: Experiment, chips: int, slices: int) -> list[MeshConfig]:
    """Meshes of so many chips altogether: all fsdp, or `tensor` and `context` of 2, 4 and 8 where they divide the
    heads and the rows' tokens."""
    each = chips // slices
    tensor = [n for n in (1, 2, 4, 8) if e.model.key_heads % n == 0 and each % n == 0]
    context = [n for n in (1, 2, 4, 8) if n == 1 or (e.data.context % n == 0 and e.data.context // n >= 2048)]
    return [MeshConfig(slices, None, t, c) for t in tensor for c in context if each % (t * c) == 0 and t * c <= 16]


def accumulations(e: Experiment, mesh) -> list[int]:
    """Numbers of microbatches to try: the powers of two that leave each device a row of what is cut, a batch or, in
    reinforcement learning, a minibatch of it."""
    minibatches = e.objective.minibatches if isinstance(e.objective, PolicyGradient) else 1
    rows = e.train.batch_size // (mesh.shape["replica"] * mesh.shape["fsdp"] * minibatches)
    return [2**k for k in range(max(1, rows.bit_length()))]


def candidates(e: Experiment, t: Topology, make_mesh) -> list[Candidate]:
    """Every mesh and remat policy that training would take, with the fewest microbatches that fit by arithmetic, the
    fastest first; those that fit with no number of microbatches come last. `UserError` when training takes none."""
    found, refused = [], None
    for mesh_config in schemes(e, t.size, t.slices):
        mesh = make_mesh(mesh_config)
        for remat in REMAT:
            one = None
            for accumulation in accumulations(e, mesh):
                tried = dataclasses.replace(
                    e,
                    mesh=mesh_config,
                    model=dataclasses.replace(e.model, remat=remat),
                    train=dataclasses.replace(e.train, accumulation=accumulation),
                )
                try:
                    pod.check(tried, mesh)
                except UserError as why:
                    refused = refused or why
                    continue
                one = _estimated(tried, t, mesh)
                if one.fits:
                    break
            if one is not None:
                found.append(one)
    if not found:
        raise UserError(f"no mesh of {t.size} chips can train this; of the first: {refused}")
    return sorted(found, key=lambda c: (not c.fits, sum(c.seconds) if c.fits else c.bytes))


def _estimated(e: Experiment, t: Topology, mesh) -> Candidate:
    stage = gradient_step(pod.stages(e, mesh))
    work, sizes, m = stage.work, dict(mesh.shape), e.model
    held = pod.device_bytes(stage.given) + pod.device_bytes(stage.beside)
    compute = roofline.itemsize(m.precision.compute)
    tokens = work.tokens / (sizes["replica"] * sizes["fsdp"] * sizes["context"])
    chunk = min(1.0, (e.train.loss_chunk or work.length) / work.length)
    state = pod.device_bytes(stage.donated)
    # Besides what is kept: the gradients, two layers' gathered weights, a layer's own work, and a chunk of logits.
    working = state / 3 + 2 * roofline.kernels(m) / sizes["tensor"] * compute
    working += roofline.kept_activations(work, sizes, "none") / m.layers * 2
    working += 3 * roofline.table(m) / sizes["tensor"] * compute
    if work.logits:
        working += tokens * chunk * padded_vocab(m) / sizes["tensor"] * 4 * 2
    total = held + working + roofline.kept_activations(work, sizes, m.remat)
    devices = list(mesh.devices.flat)
    network = 0.0
    for axis, traffic in roofline.minimum(work, sizes).items():
        at = mesh.axis_names.index(axis)
        group = tuple(
            n for n in range(mesh.size) if all(x == 0 for i, x in enumerate(_at(n, mesh)) if i != at)
        )  # fmt: skip
        network += traffic.total(m.layers) / roofline.bandwidth(group, devices, t.chip, t.shape)
    moved = roofline.hbm_bytes(work, sizes, state)
    seconds = roofline.estimate(work, t.chip, mesh.size, moved, network)
    settings = (
        f"mesh=MeshConfig(replica={e.mesh.replica}, tensor={e.mesh.tensor}, context={e.mesh.context})",
        f"model.remat={m.remat}",
        f"train.accumulation={e.train.accumulation}",
    )
    return Candidate(e, settings, total, (seconds.least, seconds.most), total <= COMFORT * t.chip.hbm)


def _at(n: int, mesh) -> tuple[int, ...]:
    """Place of partition n in the mesh."""
    out = []
    for size in reversed(list(mesh.shape.values())):
        n, rest = divmod(n, size)
        out.append(rest)
    return tuple(reversed(out))
