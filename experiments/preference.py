"""Policies from rankings without a reward model, against their frozen parent (--set=parent=WORKDIR), and the other
losses and kinds of reward model as edits."""

from dataclasses import replace

from experiments.reward import reward_tiny
from jaxlm.config import UserError, edit, experiment, override
from jaxlm.losses.preference import Dpo, Hinge, Ipo, SimPo
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Cosine
from jaxlm.run.experiment import Experiment
from jaxlm.steps.preference import Preference
from jaxlm.steps.reward import PlackettLuce, RewardModel


@experiment
def dpo_tiny() -> Experiment:
    """DPO from rankings: --set='data.sources=Rankings(path=feedback.db)'; for a parent of sft_tiny's size."""
    return replace(
        reward_tiny(),
        objective=Preference(Dpo(beta=0.1)),
        optimizer=AdamW(lr=1e-4, b2=0.98, weight_decay=0.0, schedule=Cosine(warmup=10, final=0.0)),
    )


def _loss(e: Experiment, objective: type, loss) -> Experiment:
    if not isinstance(e.objective, objective):
        raise UserError(f"this edit changes a {objective.__name__}, the objective is {type(e.objective).__name__}")
    return override(e, {"objective.loss": loss})


@edit
def ipo(e: Experiment) -> Experiment:
    """IPO (arXiv:2310.12036): the lead is brought to 1 / (2 beta), and no further."""
    return _loss(e, Preference, Ipo())


@edit
def cdpo(e: Experiment) -> Experiment:
    """DPO that takes one label in ten to be wrong."""
    return _loss(e, Preference, Dpo(label_smoothing=0.1))


@edit
def hinge(e: Experiment) -> Experiment:
    """The hinge loss of SLiC (arXiv:2305.10425) on the log-ratios."""
    return _loss(e, Preference, Hinge())


@edit
def simpo(e: Experiment) -> Experiment:
    """SimPO (arXiv:2405.14734): log-probabilities per token, and no reference."""
    return _loss(e, Preference, SimPo())


@edit
def plackett_luce(e: Experiment) -> Experiment:
    """A reward model of whole rankings in place of all their pairs."""
    return _loss(e, RewardModel, PlackettLuce())
