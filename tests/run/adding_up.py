"""A program of several processes: sums the numbers of all devices, over all of them. With an argument one leaves."""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import sharding
from jaxlm.config import UserError
from jaxlm.run import processes

with processes.joined():
    mesh = sharding.make_mesh(sharding.MeshConfig())
    spread = NamedSharding(mesh, PartitionSpec("fsdp"))
    numbers = jax.make_array_from_callback((len(jax.devices()),), spread, lambda i: jnp.arange(8.0)[i])
    if len(sys.argv) > 1 and jax.process_index() == 1:
        raise UserError("process 1 has had enough")
    total = jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))(numbers)
    who = f"process {jax.process_index()} of {jax.process_count()}, {jax.device_count()} devices"
    print(f"{who}, sum {float(total)}", flush=True)
