"""Reinforcement learning: each from the parent that its docstring names (--set=parent=WORKDIR), with a control.

The control of every learning curve is the same run with `--edit=random_reward`.
"""

from dataclasses import replace

from jaxlm.config import UserError, edit, experiment, override
from jaxlm.data.prepare import ByDocument, Data
from jaxlm.data.prompts import Addition, Prompts, Walks, WorldTask
from jaxlm.data.tokenizer import Chars
from jaxlm.data.world.arithmetic import Arithmetic
from jaxlm.data.world.corpus import World
from jaxlm.feedback.parts import Chance, Correct, Format, Learned
from jaxlm.losses.policy import ALGORITHMS, FixedLength, KLTerm
from jaxlm.nn.transformer import FanInInit, ModelConfig
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Cosine, Linear
from jaxlm.rl.advantage import Gae
from jaxlm.rl.kl import Fixed
from jaxlm.rl.rewards import Replace
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.sharding import MeshConfig
from jaxlm.steps.policy import DAPO, PPO, Critic, DynamicSampling, Exclude, PolicyGradient
from jaxlm.steps.update import Train

SMALL = ModelConfig(layers=3, width=64, heads=4, hidden=128, vocab_multiple=1, init=FanInInit(), scan=False)
MIDDLE = replace(SMALL, layers=4, width=96, hidden=256)
WALK, SUM = 10, 4  # most tokens of a response: the goal and the end after nine nodes; three digits and the end


# ------------------------------------------------------------------------------------------------------ random walks
@experiment
def walks_sft() -> Experiment:
    """Random walks to read: trlx's task, about 100 k parameters, half a minute on two CPU cores."""
    return Experiment(
        model=SMALL,
        data=Data(sources=(Walks(),), curation=None, tokenizer=Chars(), split=ByDocument(0.05), context=64),
        optimizer=AdamW(lr=3e-3, b2=0.98, weight_decay=0.01, schedule=Cosine(warmup=20, final=0.0)),
        train=Train(steps=300, batch_size=16, log_every=20),
        evaluation=Evaluation(every=100),
        checkpoint=Checkpointing(every=300),
        mesh=MeshConfig(fsdp=1),
    )


# Adam makes steps of one size of any gradient, be it nothing but the noise of rewards: by it alone the random-reward
# control drifts. An eps above the gradients leaves a step in proportion to what the samples of a rollout agree on.
@experiment
def walks_ppo() -> Experiment:
    """PPO towards short walks, from walks_sft: 256 walks a rollout, two epochs over each."""
    # With lambda below 1 a critic that still says 0 lets a positive reward count more near the end: a bias to be short.
    loss = replace(PPO.loss, advantage=Gae(lam=1.0))
    return Experiment(
        model=None,
        data=Prompts(task=Walks(), context=64),
        objective=replace(
            PPO, loss=loss, max_tokens=WALK, epochs=2, minibatches=1, kl=None, missing_stop=None,
            critic=Critic(optimizer=AdamW(lr=1e-3, weight_decay=0.0, eps=1e-5, schedule=Linear())),
            heldout_prompts=20, heldout_samples=64,
        ),
        optimizer=AdamW(lr=8e-4, b2=0.98, weight_decay=0.0, eps=1e-2, schedule=Linear()),
        train=Train(steps=100, batch_size=256, log_every=1),
        evaluation=Evaluation(every=5),
        checkpoint=Checkpointing(every=25),
        mesh=MeshConfig(fsdp=1),
    )  # fmt: skip


@experiment
def walks_grpo() -> Experiment:
    """GRPO towards short walks, from walks_sft: 32 starts with 8 walks each."""
    e = walks_ppo()
    objective = PolicyGradient(
        loss=ALGORITHMS["grpo"], samples=8, max_tokens=WALK, heldout_prompts=20, heldout_samples=64
    )
    return replace(e, objective=objective, optimizer=replace(e.optimizer, lr=6e-4), train=replace(e.train, steps=200))


# ---------------------------------------------------------------------------------------------------------- addition
@experiment
def addition_sft() -> Experiment:
    """Sums of two-digit numbers to read, half of them wrong, each time anew: about 400 k parameters."""
    e = walks_sft()
    return replace(
        e,
        model=MIDDLE,
        data=replace(e.data, sources=(Addition(count=100_000),), context=64),
        optimizer=replace(e.optimizer, lr=2e-3),
        train=Train(steps=3000, batch_size=16, log_every=50),
        evaluation=Evaluation(every=400),
        checkpoint=Checkpointing(every=400),
    )


@experiment
def addition_grpo() -> Experiment:
    """GRPO towards right sums, from addition_sft: 32 problems with 8 answers each, judged on problems held out."""
    e = walks_grpo()
    return replace(
        e,
        data=Prompts(task=Addition(), context=64),
        objective=replace(e.objective, max_tokens=SUM, heldout_prompts=256, heldout_samples=8),
        optimizer=replace(e.optimizer, lr=2e-4, eps=1e-5),
        train=Train(steps=300, batch_size=256, log_every=5),
        evaluation=Evaluation(every=25),
        checkpoint=Checkpointing(every=100),
    )


# --------------------------------------------------------------------------------------------------------- the world
@experiment
def grpo_tiny() -> Experiment:
    """Arithmetic with <think>, from a run of sft_tiny: right answers in good form, worked by hand."""
    world = World(tasks=("arithmetic",), arithmetic=Arithmetic(max_digits=2, max_steps=2))
    return Experiment(
        model=None,
        data=Prompts(task=WorldTask(world=world), context=256),
        objective=PolicyGradient(
            loss=replace(ALGORITHMS["dr_grpo"], aggregation=FixedLength(96.0), kl=KLTerm("k2", 0.01)),
            reward=(Correct(), Format(0.1)),
            max_tokens=96,
        ),
        optimizer=AdamW(lr=3e-5, b2=0.98, weight_decay=0.0, eps=1e-5, schedule=Linear(warmup=5)),
        train=Train(steps=100, batch_size=128, log_every=1),
        evaluation=Evaluation(every=20),
        checkpoint=Checkpointing(every=20),
        mesh=MeshConfig(fsdp=1),
    )


@experiment
def ppo_tiny() -> Experiment:
    """The world's questions against a reward model, from a run of sft_tiny; the model is that of `reward.0.run`, by
    default runs/reward_tiny, from which the critic starts, too."""
    e = grpo_tiny()
    run = "runs/reward_tiny"
    return replace(
        e,
        data=Prompts(task=WorldTask(facts=0.5), context=256),
        objective=replace(
            PPO, reward=(Learned(run),), max_tokens=96, kl=Fixed(0.05), missing_stop=Replace(-2.0),
            critic=Critic(run, optimizer=AdamW(lr=1e-4, weight_decay=0.0, eps=1e-5, schedule=Linear())),
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- edits
def _objective(e: Experiment) -> PolicyGradient:
    if not isinstance(e.objective, PolicyGradient):
        raise UserError("this edit changes a policy gradient, and the objective is another")
    return e.objective


def _algorithm(e: Experiment, name: str, **around) -> Experiment:
    """Another loss by its name, with the KL in the loss as it was; grouped samples in the place of a critic."""
    p = _objective(e)
    loss = replace(ALGORITHMS[name], kl=p.loss.kl, importance_cap=p.loss.importance_cap)
    grouped = {"critic": None, "samples": p.samples if p.samples > 1 else 8, "whiten_advantages": False}
    grouped |= {"epochs": 1, "minibatches": 1}
    return override(e, {"objective": replace(p, loss=loss, **(grouped | around))})


@edit
def random_reward(e: Experiment) -> Experiment:
    """The toss of a coin for a reward: nothing may improve, or the curve of the real reward proves nothing."""
    _objective(e)
    return override(e, {"objective.reward": (Chance(),), "objective.gold": None})


@edit
def reinforce(e: Experiment) -> Experiment:
    """REINFORCE with the batch's mean for a baseline."""
    return _algorithm(e, "reinforce")


@edit
def rloo(e: Experiment) -> Experiment:
    """REINFORCE with the mean of a sample's others for a baseline (arXiv:2402.14740)."""
    return _algorithm(e, "rloo")


@edit
def grpo(e: Experiment) -> Experiment:
    """Group-normalized advantages and clipped ratios (arXiv:2402.03300)."""
    return _algorithm(e, "grpo")


@edit
def dr_grpo(e: Experiment) -> Experiment:
    """GRPO without its two normalizations, lengths counting by max_tokens (arXiv:2503.20783)."""
    e = _algorithm(e, "dr_grpo")
    return override(e, {"objective.loss.aggregation": FixedLength(float(e.objective.max_tokens))})


@edit
def dapo(e: Experiment) -> Experiment:
    """Clip-higher, token mean, dynamic sampling, cut responses left out (arXiv:2503.14476)."""
    return _algorithm(e, "dapo", dynamic=DAPO.dynamic or DynamicSampling(), missing_stop=Exclude())


@edit
def gspo(e: Experiment) -> Experiment:
    """Ratios of whole sequences (arXiv:2507.18071)."""
    return _algorithm(e, "gspo")


@edit
def cispo(e: Experiment) -> Experiment:
    """Clipped importance weights that silence no token (arXiv:2506.13585)."""
    return _algorithm(e, "cispo")
