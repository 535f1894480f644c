"""The flags that look at a job on a cluster, or end it."""

from absl import flags

from jaxlm.config import UserError

STATUS = flags.DEFINE_bool("status", False, "Say how the job of this name is, and exit.")
LOGS = flags.DEFINE_bool("logs", False, "Show the last lines that the job of this name has written, and exit.")
WORKER = flags.DEFINE_string("worker", "0", "Whose --logs: the number of a host, or all; not under Slurm.")
DELETE = flags.DEFINE_bool("delete", False, "End the job of this name, delete what belongs to it, and exit.")


def asked() -> str | None:
    """The one of "status", "logs" and "delete" that is asked of a job, or None for one that is to be started."""
    found = [flag.name for flag in (STATUS, LOGS, DELETE) if flag.value]
    if len(found) > 1:
        raise UserError(f"--{found[0]} and --{found[1]} are one or the other")
    return found[0] if found else None
