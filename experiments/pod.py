"""Definitions for TPU slices, whose programs `launch.compile` compiles on any machine. None has been trained.

Their children name the model, so that they can be compiled before there is a parent; to train one, --set=model=none and
--set=parent=WORKDIR.
"""

from dataclasses import replace

from experiments.pretrain import pretrain_124m
from experiments.reward import reward_tiny
from experiments.rl import ppo_tiny
from experiments.sft import sft_124m
from experiments.sizes import SIZES
from jaxlm.config import experiment
from jaxlm.data.preferences import Preferences
from jaxlm.data.prepare import Data
from jaxlm.data.tokenizer import SentencePiece
from jaxlm.feedback.parts import Correct
from jaxlm.losses.policy import ALGORITHMS
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Cosine
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.sharding import MeshConfig
from jaxlm.steps.policy import PolicyGradient
from jaxlm.steps.update import Train

VOCABULARY = 131_072
LARGE = replace(SIZES["70b"], vocab_size=VOCABULARY)


@experiment
def pretrain_8b() -> Experiment:
    """Llama 3's 8 B shape, 4 M tokens an update in rows of 8,192: a slice such as v6e-256."""
    return replace(
        pretrain_124m(),
        model=SIZES["8b"],
        data=Data(tokenizer=SentencePiece(vocab_size=VOCABULARY, sample_bytes=1_000_000_000), context=8192),
        optimizer=AdamW(lr=3e-4, schedule=Cosine(warmup=2000)),
        train=Train(steps=250_000, batch_size=512, accumulation=2, loss_chunk=1024),
        evaluation=Evaluation(every=1000, max_batches=16, batch_size=256),
    )


@experiment
def pretrain_70b() -> Experiment:
    """Llama 3's 70 B shape, 8 M tokens an update in rows of 8,192: a slice such as v5p-1024."""
    e = pretrain_8b()
    return replace(
        e,
        model=SIZES["70b"],
        optimizer=AdamW(lr=1.5e-4, schedule=Cosine(warmup=2000)),
        train=replace(e.train, batch_size=1024, accumulation=2),
        evaluation=replace(e.evaluation, batch_size=512),
    )


@experiment
def sft_70b() -> Experiment:
    """70 B fine-tuned on conversations of up to 8,192 tokens."""
    e = sft_124m()
    return replace(
        e,
        model=LARGE,
        data=replace(e.data, context=8192),
        train=Train(steps=1000, batch_size=512, loss_chunk=1024),
        evaluation=Evaluation(every=100, max_batches=4, batch_size=512),
    )


@experiment
def reward_70b() -> Experiment:
    """A reward model of 70 B from rankings, rows of 4,096 tokens."""
    return replace(
        reward_tiny(),
        model=LARGE,
        data=Preferences(context=4096),
        train=Train(steps=500, batch_size=512, loss_chunk=1024),
        evaluation=Evaluation(every=50, max_batches=4, batch_size=512),
        mesh=MeshConfig(),
    )


@experiment
def ppo_70b() -> Experiment:
    """PPO of 70 B against a reward model of its size, with a critic and a reference: four models on one slice.

    Layers are cut over 8 devices, so that decoding gathers an eighth of each.
    """
    e = ppo_tiny()
    return replace(
        e,
        model=LARGE,
        data=replace(e.data, context=2048),
        objective=replace(e.objective, max_tokens=1024, minibatches=2, slots=1024),
        train=Train(steps=1000, batch_size=1024, accumulation=2, loss_chunk=1024, log_every=1),
        evaluation=Evaluation(every=20, batch_size=128),
        mesh=MeshConfig(tensor=8),
    )


@experiment
def grpo_70b() -> Experiment:
    """GRPO of 70 B on checked answers, 8 to a prompt."""
    e = ppo_70b()
    objective = PolicyGradient(
        loss=ALGORITHMS["grpo"], reward=(Correct(),), samples=8, max_tokens=1024, slots=1024
    )  # fmt: skip
    return replace(e, objective=objective, train=replace(e.train, accumulation=4))
