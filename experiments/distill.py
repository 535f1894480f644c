"""Distillation: a student of a size of its own from a teacher run, whose tokenizer it takes."""

from dataclasses import replace

from experiments.sft import sft_tiny
from experiments.sizes import SIZES
from jaxlm.config import experiment, override
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Cosine
from jaxlm.run.experiment import Experiment
from jaxlm.steps.distill import Distill


@experiment
def distill_tiny() -> Experiment:
    """A student of half the teacher's depth and width, from nothing, on sft_tiny's conversations: minutes on two CPU
    cores. The teacher is that of `objective.teacher`, by default runs/sft_tiny."""
    e = replace(
        sft_tiny(),
        model=replace(SIZES["1m"], layers=2, width=64),
        objective=Distill("runs/sft_tiny"),
        optimizer=AdamW(lr=3e-3, b2=0.98, weight_decay=0.01, schedule=Cosine(warmup=20, final=0.0)),
    )
    return override(e, {"train.steps": 600, "train.batch_size": 32})
