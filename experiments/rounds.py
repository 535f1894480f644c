"""What launch.rounds trains, at each of its scales: an assistant learns from rankings of its own answers, in rounds.

From demonstrations by many hands the policy of round 0; then, round by round, answers of the policy before, ranked, a
reward model from all rankings so far, PPO against it.
"""

from dataclasses import dataclass, replace

from experiments.reward import reward_tiny
from experiments.rl import grpo_tiny
from experiments.sft import sft_tiny
from jaxlm.config import override
from jaxlm.data.chat_sources import Messages
from jaxlm.data.preference_sources import Rankings
from jaxlm.data.prompts import PromptFile, Prompts
from jaxlm.data.world.manners import Mix
from jaxlm.data.world.talk import Tool
from jaxlm.feedback.parts import Function, Learned
from jaxlm.optim.optimizers import AdamW, Muon
from jaxlm.optim.schedules import Linear
from jaxlm.rl.kl import Fixed
from jaxlm.rl.rewards import Replace
from jaxlm.run.experiment import Experiment
from jaxlm.steps.policy import PPO, Critic

GOLD = "jaxlm.feedback.gold:gold"


@dataclass(frozen=True)
class Rounds:
    """Trainings that follow from each other; `of_round` fills in what they read.

    sft: the parent after demonstrations; none where the parent's own answers are to be ranked. reward: from
    `reward_parent` again each round, on the rankings of all rounds so far. ppo: from the policy of the round before, to
    which its KL is measured and penalized: each round is a trust region of its own, and the KL to round 0 is reported.
    """

    sft: Experiment | None
    reward: Experiment
    ppo: Experiment
    mix: Mix = Mix()
    tools: tuple[Tool, ...] = ("calculator",)  # offered with every prompt, needed or not
    demonstrations: int = 8000
    prompts: int = 400  # whose responses are ranked, new ones each round
    responses: int = 5  # to each, which are ranked together
    pool: int = 4000  # prompts that PPO draws from, those of the rankings among them
    heldout: int = 120  # prompts of the held-out side, for all evaluations
    best_of: int = 32  # responses of round 0's policy to each held-out prompt, for best-of-n
    samples: int = 4  # responses of a later policy to each held-out prompt
    max_tokens: int = 64  # of a response
    reward_parent: str | None = None  # workdir of a model, such as a smaller one; unset, round 0's policy
    judge: str | None = None  # workdir of a model that ranks in the gold scorer's place
    seed: int = 0  # added to the seed of each training, and of each sampling


def tiny() -> Rounds:
    """To see it learn on two CPU cores, from an assistant of the tour's scale `tiny`."""
    ranked = Rankings(path="feedback.jsonl")
    sft = override(
        sft_tiny(),
        {
            "data.sources": (Messages("demonstrations.jsonl", name="demonstrations"),),
            "optimizer": Muon(lr=0.005),
            "train.steps": 200,
            "train.log_every": 25,
            "evaluation.every": 100,
            "checkpoint.every": 100,
        },
    )
    reward = override(
        reward_tiny(),
        {
            "data.sources": (ranked,),
            "data.context": 768,
            "data.valid_fraction": 0.15,
            "optimizer.lr": 5e-4,
            "train.steps": 80,
            "train.batch_size": 8,
            "evaluation.every": 40,
            "evaluation.max_batches": 32,
            "checkpoint.every": 40,
        },
    )
    e = grpo_tiny()
    objective = replace(
        PPO, reward=(Learned("reward"), Function(GOLD, weight=0.0)), max_tokens=64, epochs=2, minibatches=2,
        gold="function", kl=Fixed(0.3), missing_stop=Replace(-2.0), heldout_prompts=24, heldout_samples=2,
        critic=Critic("reward", optimizer=AdamW(lr=3e-4, weight_decay=0.0, eps=1e-5, schedule=Linear())),
    )  # fmt: skip
    ppo = override(
        replace(e, data=Prompts(task=PromptFile("prompts.jsonl"), context=192), objective=objective),
        {
            "optimizer": AdamW(lr=1.5e-4, b2=0.98, weight_decay=0.0, eps=1e-5, schedule=Linear(warmup=2)),
            "train.steps": 20,
            "train.batch_size": 96,
            "evaluation.every": 20,
            "checkpoint.every": 5,
        },
    )
    return Rounds(sft=sft, reward=reward, ppo=ppo)


def smoke() -> Rounds:
    """To see that everything runs, in minutes on two CPU cores; too little to learn from."""
    t = tiny()
    short = {"train.log_every": 1, "evaluation.every": 2}
    return replace(
        t,
        sft=override(t.sft, {"train.steps": 20, "train.log_every": 5}),
        reward=override(t.reward, short | {"train.steps": 6, "evaluation.max_batches": 2}),
        ppo=override(t.ppo, short | {"train.steps": 2, "train.batch_size": 32, "objective.heldout_prompts": 4}),
        demonstrations=400,
        prompts=24,
        pool=100,
        heldout=16,
        best_of=8,
        samples=2,
    )


def demonstrated(x: Rounds, root: str, parent: str) -> Experiment:
    """Round 0's training, in the folder `root`."""
    (source,) = x.sft.data.sources
    data = replace(x.sft.data, sources=(replace(source, path=f"{root}/demonstrations.jsonl"),))
    return replace(x.sft, data=data, parent=parent, seed=x.sft.seed + x.seed)


def of_round(x: Rounds, k: int, root: str, first: str, before: str) -> tuple[Experiment, Experiment]:
    """(reward model, policy) of round k, 1 the first. first, before: workdirs of round 0's policy and of the last."""
    folder, learned, seed = f"{root}/round_{k}", f"{root}/round_{k}/reward", x.seed + 1000 * k
    (source,) = x.reward.data.sources
    data = replace(x.reward.data, sources=(replace(source, path=f"{folder}/feedback.jsonl"),))
    parent = first if x.reward_parent is None else x.reward_parent
    reward = replace(x.reward, data=data, parent=parent, seed=x.reward.seed + seed)
    objective = replace(
        x.ppo.objective,
        reward=tuple(replace(p, run=learned) if isinstance(p, Learned) else p for p in x.ppo.objective.reward),
        max_tokens=x.max_tokens,
    )
    if isinstance(objective.critic, Critic):
        objective = replace(objective, critic=replace(objective.critic, run=learned))
    task = replace(x.ppo.data.task, path=f"{root}/prompts.jsonl", prompt_field="messages")
    prompts = replace(x.ppo.data, task=task, tools=x.tools)
    return reward, replace(x.ppo, data=prompts, objective=objective, parent=before, seed=x.ppo.seed + seed)


SCALES = {"smoke": smoke, "tiny": tiny}
