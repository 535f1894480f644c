"""Which checkpoint a run's parameters are, as records of feedback name it."""

from jaxlm import storage
from jaxlm.feedback.records import Policy
from jaxlm.run import manifest
from jaxlm.run.load import Run


def policy_of(run: Run) -> Policy:
    """The hash is that of the checkpoint's manifest, and so of every byte in it."""
    folder = storage.path(run.workdir) / "checkpoints" / str(run.step)
    return Policy(run.workdir, run.step, manifest.read(folder)["sha256"])
