"""Programs over several devices, called as often as a long run calls them."""

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
