"""A checkpoint that several processes write and verify: each hashes its own part, and what fails on one fails on all.

Orbax ends a save at three barriers, in threads of its own: every process has written its part; process 0 has sealed
the folder and given it its name; it is over. A process whose part fails does not come to the first two, and waits at
the third for the others, who wait for it at an earlier one, for as long as a save may take. So the barriers are those
of `Save`: before the first one each process hashes what it has written, and who fails says so and comes to all of them.

What is told goes through jax's coordination service, since the collectives of the devices are training's. The error
that is told first is raised on all, with its kind and what caused it, so that all end for one reason: another's own may
be no more than its vain wait for who had failed.
"""

import itertools
import json
import sys
import threading
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax._src import distributed  # no public name of jax gives the service's client
from jax.experimental import multihost_utils

from jaxlm.config import UserError
from jaxlm.run import manifest

_numbers = itertools.count()  # of the saves: every process makes all of them, in one order
VERDICT_BYTES = 512


def agree(value: int) -> int:
    """Process 0's value on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int64)))


class Save:
    """One save, on each of several processes. Orbax's `barrier_sync_fn` for it is `barrier`.

    own: called in a background thread when all files of this process are written; what it gives, plain JSON, is told to
    process 0, and what it raises fails the save.
    """

    def __init__(self, own: Callable[[], dict]):
        self._own = own
        self._folder = f"jaxlm/save/{next(_numbers)}"
        self._service = distributed.global_state.client
        self._wait = ocp.multihost.get_barrier_sync_fn()
        self._sets = 0  # of Orbax's "a save is under way": True before it, False in a `finally`
        # Orbax's thread that ends a failed save may not wait for the one that still writes: both come to the barriers.
        self._lock = threading.Lock()
        self._ahead = ["written", "sealed"]
        self._error = None

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes; when the save has failed on one, raises on each what that one has told: `UserError`
        where it was one there, else `RuntimeError`."""
        if "async_write_complete" in key:
            try:
                mine = json.dumps(self._own())
                self._service.key_value_set(f"{self._folder}/told/{jax.process_index()}", mine)
            except Exception as e:
                self._fail(e)
            self._meet("written", timeout_ms)
            self._require_success()
        elif "async_commit_complete" in key:
            self._meet("sealed", timeout_ms)
            self._require_success()
        else:
            self._sets += key.endswith("set_value_start")
            is_over = self._sets == 2
            if is_over and key.endswith("set_value_start"):
                self._come_to_what_is_left(sys.exception(), timeout_ms)
            self._wait(key=key, timeout_ms=timeout_ms)
            if is_over and key.endswith("set_value_end"):  # nobody fails after this one
                self._require_success()

    def told(self) -> list[dict]:
        """What each process has told; for process 0, once, after the first barrier."""
        out = []
        for process in range(jax.process_count()):
            try:
                out.append(json.loads(self._service.key_value_try_get(f"{self._folder}/told/{process}")))
            except jax.errors.JaxRuntimeError:  # an Orbax whose barriers have other names: process 0 does it all
                logging.warning("process %d has told nothing of what it wrote to the checkpoint", process)
        self._service.key_value_delete(f"{self._folder}/told/")
        if 0 < len(out) < jax.process_count():
            raise RuntimeError(f"{len(out)} of {jax.process_count()} processes have told what they wrote")
        return out

    def _meet(self, name: str, timeout_ms: int) -> None:
        with self._lock:
            if name not in self._ahead:
                return
            self._ahead.remove(name)
        self._wait(key=f"{self._folder}/{name}", timeout_ms=timeout_ms)

    def _come_to_what_is_left(self, error: BaseException | None, timeout_ms: int) -> None:
        if error is not None and not self._failures():
            self._fail(error)
        for name in tuple(self._ahead):
            self._meet(name, timeout_ms)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is not None:
                return
            self._error, chain, process = error, [], jax.process_index()
            while error is not None:
                chain.append(f"{type(error).__name__}: {error}")
                error = error.__cause__ or error.__context__
            is_users = isinstance(self._error, UserError)
            line = str(self._error) if is_users else chain[0]
            told = {"process": process, "is_users": is_users, "line": line, "chain": chain}
            self._service.key_value_set(f"{self._folder}/failed/{process}", json.dumps(told))

    def _failures(self) -> list[dict]:
        found = self._service.key_value_dir_get(f"{self._folder}/failed/")
        return sorted((json.loads(told) for _, told in found), key=lambda told: told["process"])

    def _require_success(self) -> None:
        if failures := self._failures():
            told = failures[0]
            kind = UserError if told["is_users"] else RuntimeError
            is_mine = told["process"] == jax.process_index()
            cause = self._error if is_mine else RuntimeError("; ".join(told["chain"]))
            raise kind(f"saving a checkpoint failed; process {told['process']}: {told['line']}") from cause


def problem(folder) -> str | None:
    """`manifest.problem`, the same on every process, each of which verifies its share of the files.

    Every process calls it, from the thread of its other collectives.
    """
    mine = manifest.problem(folder, share=(jax.process_index(), jax.process_count()))
    if jax.process_count() == 1:
        return mine
    words = np.zeros(VERDICT_BYTES // 4, np.uint32)
    text = (mine or "").encode()[:VERDICT_BYTES]
    words.view(np.uint8)[: len(text)] = np.frombuffer(text, np.uint8)
    found = np.asarray(multihost_utils.process_allgather(words), np.uint32).reshape(-1, len(words))
    said = (row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in found)
    return next((x for x in said if x), None)
