"""Which checkpoint a run's parameters are, as records of feedback name it."""

from jaxlm.feedback.records import Policy
from jaxlm.run.load import Run


def policy_of(run: Run) -> Policy:
    """The hash is that of the checkpoint's manifest, and so of every byte in it."""
    return Policy(run.workdir, run.step, run.sha256)
