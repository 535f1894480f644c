"""How a run ends: the exit codes of every program, and the two endings that are no errors of the user's."""

EXIT_DONE, EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_PREEMPTED = 0, 2, 3, 42


class Diverged(Exception):
    """Training cannot go on; the message says where and why. Exit code 3."""


class Stopped(Exception):
    """Ended early in an orderly way, preempted and saved. Exit code 42: the same command goes on from here."""
