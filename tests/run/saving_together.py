"""A program of several processes that save and verify together. Arguments: folder, and what is to happen.

  saves      steps 1 to 3 are saved; 4 to 7 fail, each on one process in another moment; 8 is saved
  continues  from the newest step that verifies

Each process writes what it has seen to <what>-<process>.json.
"""

import contextlib
import errno
import faulthandler
import os
import re
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.futures import future

from jaxlm import sharding, storage
from jaxlm.config import UserError
from jaxlm.run import manifest, processes
from jaxlm.run.checkpoint import Checkpointing, Checkpoints

WRITING, HASHING, SEALING = (future.ChainedFuture, "result"), (manifest, "own"), (manifest, "write")
FAILURES = {4: (HASHING, 1), 5: (WRITING, 1), 6: (SEALING, 0), 7: (WRITING, 0)}  # by step: moment, process


def state(step: int) -> dict:
    """Each process has half of `spread`; all of them have `same`."""
    mesh = sharding.make_mesh(sharding.MeshConfig())

    def array(values, *axes):
        spread = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(values.shape, spread, lambda i: values[i])

    spread = np.random.default_rng(step).standard_normal((4, 5_000)).astype(np.float32)
    return {"params": {"spread": array(spread, "fsdp"), "same": array(np.full(8, step, np.float32))}}


def disk_full_after(done):
    """`done`, and then the disk is full."""

    def fail(*args, **kwargs):
        done(*args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fail


def record() -> list[str]:
    """The files that are hashed from now on, as step/name."""
    names, hashed = [], storage.sha256_file

    def hash_file(p) -> str:
        names.append(re.sub(r"\.orbax-checkpoint-tmp[^/]*", "", os.fspath(p).split("/checkpoints/")[1]))
        return hashed(p)

    storage.sha256_file = hash_file
    return names


def save(c: Checkpoints, step: int, moment=None, process: int = -1) -> str | None:
    """The error, if there is one."""
    with contextlib.ExitStack() as until:
        if process == jax.process_index():
            until.enter_context(mock.patch.object(*moment, disk_full_after(getattr(*moment))))
        try:
            assert c.save(step, state(step))
            c.wait()
        except UserError as e:
            return str(e)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(240, exit=True)
    folder, what = sys.argv[1:]
    manifest.SMALL_FILE = 0  # at the start process 0 looks at all small files: none is so small
    with processes.joined(), Checkpoints(f"{folder}/run", Checkpointing(every=1, keep_latest=9)) as c:
        names = record()
        seen = {"names": names}
        if what == "saves":
            seen["errors"] = [save(c, step) for step in (1, 2, 3)]
            seen["cost"] = c.cost()
            seen["errors"] += [save(c, step, *failure) for step, failure in FAILURES.items()] + [save(c, 8)]
        else:
            seen["step"] = c.latest()
        storage.write_json(Path(folder) / f"{what}-{jax.process_index()}.json", seen)
