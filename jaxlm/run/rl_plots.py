"""The curves of a run of reinforcement learning, in one picture."""

import jax
from absl import logging

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.run.log import read_metrics
from jaxlm.run.report import COLORS, label_axes, new_figure, save_figure, series, smooth

# Panel -> its curves: (metric, what it is called, whether it has a point for each evaluation).
PANELS = (
    ("reward", (("train/reward", "reward", False), ("train/right", "verdict", False))),
    ("held out", (("eval/pass@1", "pass@1", True), ("eval/greedy", "greedy", True), ("eval/score", "score", True))),
    ("KL to the parent, nats per response", (("train/kl/reference", "KL", False),)),
    ("entropy, nats per token", (("train/entropy", "entropy", False),)),
    ("tokens per response", (("train/length/mean", "sampled", False), ("eval/length", "held out", True))),
    ("ratio", (("train/approximate_kl", "KL(old || new)", False), ("train/clip_fraction_high", "clipped above", False),
               ("train/clip_fraction_low", "clipped below", False))),
)  # fmt: skip


def curves(workdir):
    """Draws `report/rl.png`; returns its path. None, with a warning, where matplotlib is not installed, and on all
    processes but the first."""
    if jax.process_index() != 0:
        return None
    try:
        figure = new_figure(12, 6.5)
    except UserError as e:
        logging.warning("no curves: %s", e)
        return None
    records = read_metrics(workdir)
    for axes, (title, lines) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for color, (name, what, points) in zip(COLORS, lines):
            steps, values = series(records, name)
            if points:
                axes.plot(steps, values, "o-", color=color, markersize=4, label=what)
            elif values:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
                axes.plot(steps, smooth(values, 1 - 1 / max(1.0, len(values) / 25)), color=color, label=what)
        label_axes(axes, "step", title)
    target = storage.path(workdir) / "report" / "rl.png"
    save_figure(figure, target)
    return target
