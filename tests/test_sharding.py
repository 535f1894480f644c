"""Programs over several devices, called as often as a long run calls them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxlm import sharding
from jaxlm.sharding import MeshConfig, Program


def summed(mesh):
    """Long enough to be still on its way when a call of it returns that does not wait."""

    def each(x):
        return jax.lax.fori_loop(0, 20, lambda i, x: jax.lax.psum(jnp.sin(x @ x), "fsdp") / mesh.size, x)

    spread = jax.shard_map(each, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(spread)


def test_programs_do_not_queue_up_on_the_devices_of_a_cpu():
    """With more than 32 under way the client of XLA can hang: see `Program`."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=4))
    program = Program(summed(mesh), mesh)
    x = jax.device_put(np.ones((64, 64), np.float32), sharding.replicated(mesh))
    for _ in range(60):
        x = program(x)
        assert x.is_ready()


def test_each_kind_of_device_has_options_that_the_compiler_knows():
    def mesh(platform: str, size: int):
        devices = np.array([types.SimpleNamespace(platform=platform)] * size)
        return types.SimpleNamespace(size=size, devices=devices)

    found = {(p, n): sharding.compiler_options(mesh(p, n)) for p in ("cpu", "gpu", "tpu") for n in (1, 4)}
    assert [where for where, options in found.items() if options] == [("cpu", 1), ("gpu", 4)]
    for options in found.values():
        jax.jit(jnp.sin).lower(1.0).compile(options)  # an unknown name is an error, whatever it is compiled for


def test_one_of_several_runs_knows_that_it_is():
    seen = []

    def one(x):
        seen.append(sharding.of_several_runs())
        return x

    jax.vmap(one)(jnp.arange(2.0))
    jax.vmap(one, axis_name=sharding.RUN)(jnp.arange(2.0))
    assert seen == [False, True]
