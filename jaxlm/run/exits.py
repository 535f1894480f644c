"""How a run ends: the exit codes of every program, and the two endings that are no errors of the user's."""

import contextlib
import signal
import sys
from collections.abc import Iterator

from jaxlm import storage
from jaxlm.config import UserError

EXIT_DONE, EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_PREEMPTED = 0, 2, 3, 42
DIVERGED = "diverged.json"


class Diverged(Exception):
    """Training cannot go on; the message says where and why. Exit code 3."""


def record_diverged(workdir) -> None:
    """Writes `diverged.json`: a run among others that go on, whose end no exit code can say."""
    storage.write_json(storage.path(workdir) / DIVERGED, {"exit_code": EXIT_DIVERGED})


def has_diverged(workdir) -> bool:
    return (storage.path(workdir) / DIVERGED).exists()


class Stopped(Exception):
    """Ended early in an orderly way. Exit code 42: the same command goes on from here. Without a message of its own it
    was preempted, and has saved."""


class Abandoned(Exception):
    """A part of a run that would have taken long was left in its midst, to stop at once; what was before it stands, and
    the same command does that part again."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends what runs inside with exit code 42, wherever it is: whatever is done so far stands, and the same
    command goes on from there. A training loop inside handles the signal itself, and saves first."""

    def handle(number, frame):
        print("stopped by SIGTERM; the same command goes on from what is saved", file=sys.stderr)
        raise SystemExit(EXIT_PREEMPTED)

    try:
        old = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread: whoever runs us there handles its signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def code_of(e: BaseException) -> int:
    """The exit code of a program that ends by `e`."""
    if isinstance(e, SystemExit):
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    ours = {UserError: EXIT_BAD_INPUT, Diverged: EXIT_DIVERGED, Stopped: EXIT_PREEMPTED}
    return next((code for kind, code in ours.items() if isinstance(e, kind)), 1)
