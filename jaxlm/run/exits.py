"""How a run ends: the exit codes of every program, and the two endings that are no errors of the user's."""

from jaxlm.config import UserError

EXIT_DONE, EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_PREEMPTED = 0, 2, 3, 42


class Diverged(Exception):
    """Training cannot go on; the message says where and why. Exit code 3."""


class Stopped(Exception):
    """Ended early in an orderly way, preempted and saved. Exit code 42: the same command goes on from here."""


def code_of(e: BaseException) -> int:
    """The exit code of a program that ends by `e`."""
    if isinstance(e, SystemExit):
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    ours = {UserError: EXIT_BAD_INPUT, Diverged: EXIT_DIVERGED, Stopped: EXIT_PREEMPTED}
    return next((code for kind, code in ours.items() if isinstance(e, kind)), 1)
