"""A program of several processes that save and verify together. Arguments: folder, and what is to happen.

  saves      steps 1 to 3 are saved; those of FAILURES fail, each on one process in another moment; LAST is saved; then
             one fails in Orbax's thread that ends a save before its thread that writes is done, and the program ends
  continues  from the newest step that verifies

Each process writes what it has seen to <what>-<process>.json.
"""

import contextlib
import errno
import faulthandler
import os
import re
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.futures import future
from orbax.checkpoint._src.metadata import checkpoint as metadata

from jaxlm import sharding, storage
from jaxlm.run import manifest, processes
from jaxlm.run.checkpoint import Checkpointing, Checkpoints

WRITING, HASHING = (future.ChainedFuture, "result"), (manifest, "own")
SEALING = (type(storage.path("manifest.json")), "replace")  # what `storage.write_bytes` ends with
ENDING = (metadata._NonBlockingMetadataStore, "wait_until_finished")
SAVED = (ocp.CheckpointManager, "_finalize_checkpoint")
FAILURES = {  # by step: moment, process, what the system says
    4: (HASHING, 1, errno.ENOSPC),
    5: (WRITING, 1, errno.ENOSPC),
    6: (SEALING, 0, errno.ENOSPC),
    7: (WRITING, 0, errno.ENOSPC),
    8: (SEALING, 0, errno.EACCES),
    9: (WRITING, 0, errno.ENOSPC),  # and then, in vain, the other has waited for it
    10: (SAVED, 0, errno.ENOSPC),
}
LAST = 11


def state(step: int) -> dict:
    """Each process has half of `spread`; all of them have `same`."""
    mesh = sharding.make_mesh(sharding.MeshConfig())

    def array(values, *axes):
        spread = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(values.shape, spread, lambda i: values[i])

    spread = np.random.default_rng(step).standard_normal((4, 5_000)).astype(np.float32)
    return {"params": {"spread": array(spread, "fsdp"), "same": array(np.full(8, step, np.float32))}}


def failing(c: Checkpoints, step: int) -> list[tuple]:
    """(where, what stands there now), for `mock.patch.object`, on this process."""

    def after(moment, *then):
        done = getattr(*moment)

        def fail(*args, **kwargs):
            done(*args, **kwargs)
            for do in then:
                do()

        return (*moment, fail)

    def refuse(number: int):
        def fail():
            raise OSError(number, os.strerror(number))

        return fail

    def wait_until(what):
        def wait():
            while not what():
                time.sleep(0.01)

        return wait

    def give_up():
        raise RuntimeError("DEADLINE_EXCEEDED")

    def end():
        if threading.current_thread().name == "save_finalize":
            refuse(errno.EACCES)()

    me = jax.process_index()
    if step == LAST + 1:
        late = wait_until(lambda: "written" not in c._shared._ahead)
        return [after(ENDING, end), after(WRITING, late)] if me == 0 else []
    if step not in FAILURES:
        return []
    moment, process, number = FAILURES[step]
    if step == 9 and me == 1:
        return [after(WRITING, wait_until(lambda: c._shared._failures()), give_up)]
    return [after(moment, refuse(number))] if me == process else []


def record() -> list[str]:
    """The files that are hashed from now on, as step/name."""
    names, hashed = [], storage.sha256_file

    def hash_file(p) -> str:
        names.append(re.sub(r"\.orbax-checkpoint-tmp[^/]*", "", os.fspath(p).split("/checkpoints/")[1]))
        return hashed(p)

    storage.sha256_file = hash_file
    return names


def error_of(do, *args) -> str | None:
    """Its kind and what it says, if there is one."""
    try:
        do(*args)
    except Exception as e:
        return f"{type(e).__name__}: {e}"


def save(c: Checkpoints, step: int) -> None:
    with contextlib.ExitStack() as until:
        for patch in failing(c, step):
            until.enter_context(mock.patch.object(*patch))
        assert c.save(step, state(step))
        c.wait()


def saves(folder: str, seen: dict) -> None:
    with opened(folder) as c:
        seen["errors"] = [error_of(save, c, step) for step in (1, 2, 3)]
        seen["cost"] = c.cost()
        seen["errors"] += [error_of(save, c, step) for step in (*FAILURES, LAST)]
        try:
            save(c, LAST + 1)
        finally:
            for late in (t for t in threading.enumerate() if t.name == "async_save"):
                late.join()


def continues(folder: str, seen: dict) -> None:
    with opened(folder) as c:
        seen["step"] = c.latest()


def opened(folder: str) -> Checkpoints:
    return Checkpoints(f"{folder}/run", Checkpointing(every=1, keep_latest=9))


if __name__ == "__main__":
    faulthandler.dump_traceback_later(240, exit=True)
    folder, what = sys.argv[1:]
    manifest.SMALL_FILE = 0  # at the start process 0 looks at all small files: none is so small
    with processes.joined():
        seen = {"names": record()}
        seen["ended"] = error_of({"saves": saves, "continues": continues}[what], folder, seen)
        storage.write_json(Path(folder) / f"{what}-{jax.process_index()}.json", seen)
