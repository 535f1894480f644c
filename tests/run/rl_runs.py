"""What tests of whole runs of reinforcement learning look at, and how they stop one in its midst."""

import jax
import numpy as np

from jaxlm import sharding
from jaxlm.run import checkpoint, load, rl, rl_metrics
from jaxlm.run.log import read_metrics
from jaxlm.sharding import MeshConfig
from jaxlm.steps import learn


def saved(workdir):
    """Every array of the newest checkpoint."""
    e = load.load_bound(workdir)
    mesh = sharding.make_mesh(MeshConfig(fsdp=1))
    target = learn.abstract(e.objective, e.optimizer, e.model, e.lora, e.model, mesh)
    with checkpoint.Checkpoints(workdir, e.checkpoint) as checkpoints:
        return jax.device_get(checkpoints.restore(target)[0])


def said(workdir):
    """The metrics that say nothing of time."""
    timed = ("seconds", "per_second", "skipped_first")
    return [{k: v for k, v in r.items() if not any(t in k for t in timed)} for r in read_metrics(workdir)]


def assert_explained(workdir):
    """Every metric of a run is one that the run says what is healthy in."""
    written = {k for r in read_metrics(workdir) for k in r} - {"step", "seconds"}
    assert not {k for k in written if rl_metrics.key_of(k) is None}


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def stop(monkeypatch, at, action, name="__call__"):
    original = getattr(rl.Trainer, name)

    def call(self, s, n):
        if n == at:
            action()
        return original(self, s, n)

    monkeypatch.setattr(rl.Trainer, name, call)
