"""The mesh, and the one table from logical axes to mesh axes.

Arrays name their dims by what they mean (`embed`, `heads`); the table says which mesh axes a meaning is spread over.
Mesh axes are Auto: shardings are given at the jit boundary, with a few constraints on activations inside.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.config import UserError, nearest

AXES = ("replica", "fsdp", "tensor", "context")
RUN = "run"  # no axis of a mesh: the name of the mapped axis where one program trains several runs

# Parameters spread `embed` over fsdp and their other dim over tensor; activations spread batch and length.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "length": ("context",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_width": (),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
    "positions": (),
    "layers": (),
    "expert": (),
    "taps": (),
    "rank": (),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. `fsdp` unset takes all devices that the others leave."""

    replica: int = 1
    fsdp: int | None = None
    tensor: int = 1
    context: int = 1


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    """A mesh over `devices` (default: all). Fewer than all may be used, but some of every process, or `UserError`.

    Of several TPU slices, each holds a part of `replica`: no other axis crosses the slow network between them.
    """
    for axis in AXES:
        if (size := getattr(cfg, axis)) is not None and size < 1:
            raise UserError(f"mesh.{axis} must be at least 1, got {size}")
    devices = list(jax.devices() if devices is None else devices)
    if len(parts := _slices(devices)) > 1:
        if cfg.replica % len(parts):
            raise UserError(f"mesh.replica {cfg.replica} must be a multiple of the {len(parts)} slices")
        one = dataclasses.replace(cfg, replica=cfg.replica // len(parts))
        whole = np.concatenate([make_mesh(one, part).devices for part in parts])
        return Mesh(whole, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    others = cfg.replica * cfg.tensor * cfg.context
    fsdp = cfg.fsdp if cfg.fsdp is not None else len(devices) // others
    shape = (cfg.replica, fsdp, cfg.tensor, cfg.context)
    used = math.prod(shape)
    if min(shape) < 1 or used > len(devices):
        raise UserError(f"mesh {dict(zip(AXES, shape))} needs {max(used, others)} devices, {len(devices)} are here")
    idle = {d.process_index for d in devices} - {d.process_index for d in devices[:used]}
    if idle and jax.process_count() > 1:
        raise UserError(
            f"mesh {dict(zip(AXES, shape))} takes {used} of {len(devices)} devices, and leaves {len(idle)} of "
            f"{jax.process_count()} processes without any; --set=mesh.fsdp=none takes all"
        )
    if len(devices) == used:
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    return Mesh(np.array(devices[:used]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: list) -> list[list]:
    """TPU devices by their slice; others are one."""
    slices: dict[int, list] = {}
    for d in devices:
        slices.setdefault((getattr(d, "slice_index", None) or 0) if d.platform == "tpu" else 0, []).append(d)
    return [slices[i] for i in sorted(slices)]


def partition_spec(axes: tuple[str | None, ...], mesh, shape: tuple[int, ...] | None = None) -> PartitionSpec:
    """The table applied to one array's logical axes; an unknown name raises.

    With `shape`, mesh axes that do not divide their dim are left off, so that a small model runs on any mesh.
    """
    spec, taken = [], set()
    for i, axis in enumerate(axes):
        if axis is not None and axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}; {nearest(axis, RULES)}")
        names = []
        for m in RULES[axis] if axis is not None else ():
            size = math.prod(mesh.shape[n] for n in [*names, m])
            if m not in taken and (shape is None or shape[i] % size == 0):
                names.append(m)
        taken.update(names)
        spec.append(tuple(names) if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*spec)


def sharding_for(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(axes, mesh, shape))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: Mesh, specs, abstract):
    """Shardings for a tree of arrays from the same tree of logical axes (tuples)."""
    return jax.tree.map(lambda a, axes: sharding_for(mesh, axes, a.shape), abstract, specs)


def mesh_here() -> AbstractMesh:
    """The mesh that what is traced here is spread over: that of `jax.set_mesh`; empty without one, and inside
    `jax.shard_map`, where each device computes for itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return AbstractMesh((), ()) if mesh.manual_axes else mesh


def constrain(x, axes: tuple[str | None, ...]):
    """Constrains an activation to the table's sharding; where there is no mesh (`mesh_here`) it is `x`."""
    mesh = mesh_here()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, mesh, x.shape))


def of_several_runs() -> bool:
    """Whether what is traced here is that of one run of several, which `run/replicas.py` maps over (axis `RUN`)."""
    try:
        return jax.lax.axis_size(RUN) > 0
    except NameError:
        return False


def cuts(axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None) -> int:
    """Into how many parts the table cuts an array of these logical axes, where this is traced: 1 without a mesh
    (`mesh_here`). `shape` as in `partition_spec`."""
    mesh = mesh_here()
    spec = () if mesh.empty else partition_spec(axes, mesh, shape)
    return math.prod(mesh.shape[name] for name in jax.tree.leaves(tuple(spec)))


def platform() -> str:
    """Of the devices that what is traced here will run on: those of the mesh, without one the default ones."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def compiler_options(mesh: Mesh) -> dict[str, str | bool]:
    """Of a training step, by the devices that it is compiled for, so that no others meet them.

    One CPU: XLA's own order saves memory and leaves few operations to run side by side. Each of a small model's is too
    small for two cores. Several devices of one CPU are left alone: they wait for each other in collectives.
    Several GPUs: what is sent between them is put beside what is computed, which XLA leaves off there unless asked.
    """
    platform, several = mesh.devices.flat[0].platform, mesh.size > 1
    if platform == "cpu" and not several:
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED"}
    if platform == "gpu" and several:
        return {"xla_gpu_enable_latency_hiding_scheduler": True}
    return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A jitted function under its mesh, with its last arguments given: to be called, or lowered for shapes alone.

    apart: nothing is sent between the devices. Otherwise, where those are several of a CPU, a call returns only when
    it is done. That client lets 32 programs a device wait, and the next one waits for room in one of the threads that
    run them, of which there is one a device: the device that is left without one never comes to the collective in
    which the others wait for it.
    """

    jitted: Callable
    mesh: Mesh
    rest: tuple = ()
    apart: bool = False

    def __call__(self, *args):
        with jax.set_mesh(self.mesh):
            out = self.jitted(*args, *self.rest)
        of_a_cpu = self.mesh.size > 1 and self.mesh.devices.flat[0].platform == "cpu"
        return jax.block_until_ready(out) if of_a_cpu and not self.apart else out

    def lower(self, *args) -> jax.stages.Lowered:
        """Of `jax.ShapeDtypeStruct`s with their shardings. Of the arguments given, too, only the shapes count."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(*args, *jax.tree.map(_described, self.rest))


def _described(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x
