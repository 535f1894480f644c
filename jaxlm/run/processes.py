"""The processes of one run: how each learns who it is, and finds the others.

On a TPU VM, on GKE and under Slurm's srun jax asks the system. Elsewhere three variables say it: JAXLM_COORDINATOR
(host:port of process 0), JAXLM_PROCESSES (how many) and JAXLM_PROCESS (which one this is, from 0). Without any of
these a run is one process.
"""

import atexit
import contextlib
import glob
import importlib.util
import os
import sys
import threading
from collections.abc import Mapping

import jax

from jaxlm.config import UserError
from jaxlm.run import exits

VARIABLES = ("JAXLM_COORDINATOR", "JAXLM_PROCESSES", "JAXLM_PROCESS")
LOOPBACK = ("127.0.0.1", "localhost")
HINT_AFTER = 60  # seconds
LOST_AFTER = 20  # seconds without a sign of life of one process, and all the others end; jax would wait for 100
TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")


def described(environ: Mapping[str, str]) -> dict | None:
    """Arguments of `jax.distributed.initialize` from our variables, if they are set; `UserError` for wrong ones."""
    values = [environ.get(name) for name in VARIABLES]
    if not any(values):
        return None
    if unset := [name for name, value in zip(VARIABLES, values) if not value]:
        raise UserError(f"{', '.join(VARIABLES)} belong together; not set: {', '.join(unset)}")
    address, count, this = values
    if not (count.isdigit() and this.isdigit() and int(this) < int(count)):
        raise UserError(f"JAXLM_PROCESS={this} and JAXLM_PROCESSES={count}: the first counts from 0, below the second")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"JAXLM_COORDINATOR={address} is not host:port")
    found = {"coordinator_address": address, "num_processes": int(count), "process_id": int(this)}
    # By default process 0 listens to every network that the machine is in.
    return found | ({"coordinator_bind_address": address} if host in LOOPBACK else {})


def on_cluster(environ: Mapping[str, str]) -> bool:
    """Whether jax can ask the system: under srun with several tasks, or on a TPU's own machine."""
    if {"SLURM_STEP_NODELIST", "SLURM_PROCID"} <= set(environ) and int(environ.get("SLURM_NTASKS", "1")) > 1:
        return True
    if environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or "TPU_SKIP_MDS_QUERY" in environ:
        return False
    return any(glob.glob(p) for p in TPU_DEVICES) and importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def hint(text: str, seconds: float = HINT_AFTER):
    """Prints `text` once when what is inside takes longer than `seconds`."""
    timer = threading.Timer(seconds, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def joined(environ: Mapping[str, str] | None = None):
    """Makes this process one of its run's, if there are several; to be entered before anything else of jax.

    SIGTERM ends it with 42, outside the training loop too; of several processes jax's own runtime handles it. When what
    is inside raises, this process ends as soon as the error has been told. In the usual order jax would first wait for
    the others, for minutes, while they wait for what this one was to compute.
    """
    join(os.environ if environ is None else environ)
    alone = contextlib.nullcontext() if jax.distributed.is_initialized() else exits.terminable()
    try:
        with alone:
            yield
    except BaseException as e:
        if jax.process_count() > 1:
            atexit.register(_leave, exits.code_of(e))  # the last to be registered is the first to be called
        raise


def join(environ: Mapping[str, str]) -> None:
    found = described(environ)
    if found is None and not on_cluster(environ):
        return
    who = f"process {found['process_id']} of {found['num_processes']}" if found else "this process"
    where = f" at {found['coordinator_address']}" if found else ""
    late = f"{who} has waited {HINT_AFTER} s for the others{where}: do all of them run, and reach one another?"
    with hint(late):
        if found is None:
            jax.distributed.initialize(heartbeat_timeout_seconds=LOST_AFTER)
        else:
            found |= {"cluster_detection_method": "deactivate", "heartbeat_timeout_seconds": LOST_AFTER}
            jax.distributed.initialize(**found)
