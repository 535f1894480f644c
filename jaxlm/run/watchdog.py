"""Ends a process that hangs: a stuck collective, driver or tool never raises, and would hold its machines for good."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

import jax

from jaxlm import storage
from jaxlm.run.goodput import Clock

EXIT_HUNG = 1  # a failure like another: whoever started it starts it again, and counts how often


class Watchdog:
    """Watches a run's clock from a thread of its own, inside `with`.

    When no phase has ended for `limit` seconds, the stacks of all threads go to stderr, and on a disk to the workdir's
    `stacks-<process>.txt` as well (what hangs may be object storage). Then `end(EXIT_HUNG)` is called, which by default
    ends the process at once: nothing that hangs could be asked to save. No limit, no watch.
    """

    def __init__(self, clock: Clock, limit: float | None, workdir, end: Callable[[int], None] = os._exit):
        self._clock, self._limit, self._end = clock, limit, end
        local = storage.is_local(workdir)
        self._file = storage.path(workdir) / f"stacks-{jax.process_index()}.txt" if local else None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def _watch(self) -> None:
        began = time.monotonic()  # what went before was not watched, however long it took
        while not self._done.wait(min(self._limit / 4, 5.0)):
            if (still := time.monotonic() - max(began, self._clock.changed)) > self._limit:
                print(
                    f"hung: nothing has ended for {still:.0f} s (train.hang_seconds={self._limit:g}); the stacks of "
                    "all threads follow; the same command goes on from the last checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                if self._file is not None:
                    with open(self._file, "w") as f:
                        faulthandler.dump_traceback(f, all_threads=True)
                return self._end(EXIT_HUNG)

    def __enter__(self) -> "Watchdog":
        if self._limit is not None:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
