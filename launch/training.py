"""A training as a stage of launch.rounds, launch.tour, launch.lab and launch.curves."""

import math

from jaxlm.run import checkpoint, exits, rl
from jaxlm.run.experiment import Experiment
from jaxlm.run.log import read_metrics
from jaxlm.run.stages import make_room


def training(e: Experiment, own: Experiment, workdir, anew: bool = False) -> dict:
    """Trains, or goes on training, in `workdir`; `own` is what the definition is compared with.

    anew: a run that stands there is moved aside first. Raises `exits.Stopped` when it was stopped.
    """
    if anew:
        make_room(workdir)
    if rl.run(e, workdir, own) != exits.EXIT_DONE:
        raise exits.Stopped
    saved = checkpoint.saved(workdir)
    last = {k: v for r in read_metrics(workdir) for k, v in r.items() if k.startswith(("train/", "eval/"))}
    timed = ("second", "utilization")  # what says nothing of the model; and bins without a pair have no accuracy
    last = {k: v for k, v in last.items() if math.isfinite(v) and not any(t in k for t in timed)}
    return {"identity": saved.sha256, "steps": saved.step, "last": last}
