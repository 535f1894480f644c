"""Reward models: from rankings, on the backbone of a parent run (--set=parent=WORKDIR), whose tokenizer they take.

The parent may be the policy's own run or a smaller one with the same tokenizer.
"""

from dataclasses import replace

from jaxlm.config import experiment
from jaxlm.data.preferences import Preferences
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Cosine
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.sharding import MeshConfig
from jaxlm.steps.reward import RewardModel
from jaxlm.steps.update import Train


@experiment
def reward_tiny() -> Experiment:
    """From what annotators ranked: --set='data.sources=Rankings(path=feedback.db)'; for a parent of sft_tiny's size.

    Comparisons of your own: --set='data.sources=Comparisons(path=pairs.jsonl)'.
    """
    return Experiment(
        model=None,
        data=Preferences(context=512),
        objective=RewardModel(),
        optimizer=AdamW(lr=3e-4, b2=0.98, weight_decay=0.01, schedule=Cosine(warmup=10, final=0.0)),
        train=Train(steps=200, batch_size=16, log_every=10),
        evaluation=Evaluation(every=50, max_batches=16, batch_size=16),
        checkpoint=Checkpointing(every=100),
        mesh=MeshConfig(fsdp=1),
    )


@experiment
def reward_hh() -> Experiment:
    """From Anthropic's HH pairs: --set='data.sources=HH(path=hh_harmless_pairs.jsonl.gz)', longer dialogues cut."""
    return replace(
        reward_tiny(),
        data=Preferences(context=1024, answers=8),
        optimizer=AdamW(lr=1e-4, weight_decay=0.01, schedule=Cosine(warmup=20, final=0.0)),
        train=Train(steps=200, batch_size=16, accumulation=2, log_every=10),
        evaluation=Evaluation(every=50, max_batches=8, batch_size=16),
    )
