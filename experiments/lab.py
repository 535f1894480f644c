"""What launch.lab trains: a small policy, reward models of its samples, and policies that those reward models reward.

After "Scaling Laws for Reward Model Overoptimization" (Gao, Schulman and Hilton 2022, arXiv 2210.10760), in miniature.
What is wanted is the gold reward: the number of a bigger network with random parameters that are never trained, less a
price for what is not in the task's language, of which samples of the policy say little. What is optimized is a proxy
that has learned from some of the gold's choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.reward import reward_tiny
from experiments.rl import SMALL, walks_grpo, walks_sft
from jaxlm.config import UserError, override
from jaxlm.data.preference_sources import Rankings
from jaxlm.data.preferences import Preferences
from jaxlm.data.prompts import Chains, Prompts
from jaxlm.feedback.parts import Correct, Learned
from jaxlm.losses.policy import ALGORITHMS
from jaxlm.nn.transformer import FanInInit, ModelConfig
from jaxlm.optim.schedules import Linear
from jaxlm.rl.kl import Adaptive, Fixed
from jaxlm.run.experiment import Experiment
from jaxlm.steps.policy import PolicyGradient
from jaxlm.steps.reward import RewardModel


@dataclass(frozen=True)
class Lab:
    """The same for every seed, which is added to those of the trainings and draws the gold's parameters."""

    policy: Experiment  # reads the task's texts
    gold: ModelConfig  # gives an answer its number at the last token
    proxy: Experiment  # learns from the gold's choices between two samples of the policy
    rl: Experiment  # the policy, rewarded by a proxy
    # What an answer without one letter that may follow costs, in deviations of the network's number.
    language: float = 5.0
    updates: float = 4.0  # of a proxy, times the root of its labels: few are seen often, many hardly twice
    kl: Fixed | Adaptive = Fixed(0.1)  # of the run with a penalty
    prompts: int = 32  # held out, for best-of-n
    samples: int = 512  # of each, among which best-of-n chooses
    window: int = 9  # records of a run that a figure is the mean of


@dataclass(frozen=True)
class Arm:
    """One seed. proxy: by the number of labels. rl: by the run's name: (number of labels, definition)."""

    policy: Experiment
    gold: Experiment
    proxy: dict[int, Experiment]
    rl: dict[str, tuple[int, Experiment]]


def small() -> Lab:
    """About 130 k parameters in the policy and in each proxy, 340 k in the gold."""
    policy = override(walks_sft(), {"data.sources": (Chains(),), "train.steps": 300})
    settings = {"data.context": 104, "optimizer.lr": 1e-3, "evaluation.every": 1000, "checkpoint.every": 1000}
    rl, around = walks_grpo(), {"heldout_prompts": 16, "heldout_samples": 4, "preflight": "off"}
    objective = PolicyGradient(loss=ALGORITHMS["rloo"], samples=8, max_tokens=28, **around)
    # All that the figures hang on is said here: another rate or size of the walks' runs is not meant for these.
    constant = replace(rl.optimizer, lr=3e-4, eps=1e-5, schedule=Linear(warmup=5, final=1.0))
    rl = replace(rl, data=Prompts(task=Chains(), context=64), objective=objective, optimizer=constant)
    return Lab(
        policy=policy,
        gold=replace(SMALL, width=96, hidden=256, init=FanInInit(scale=1.5)),
        proxy=override(reward_tiny(), settings),
        rl=override(rl, {"train.steps": 120, "train.batch_size": 128, "evaluation.every": 120, "checkpoint.every": 40}),
    )


def arm(x: Lab, labels: Sequence[int], seed: int, root: str) -> Arm:
    """The trainings of one seed, whose run directories are in the folder `root`.

    Without a penalty the proxies with the fewest and the most labels reward a policy; with it the former.
    """
    if not isinstance(x.rl.objective, PolicyGradient) or not isinstance(x.proxy.objective, RewardModel):
        raise UserError("lab: rl.objective must be a PolicyGradient, proxy.objective a RewardModel")
    policy = replace(x.policy, seed=x.policy.seed + seed)
    # No answer outgrows the context of a policy's row, and none may be unscorable.
    gold = Experiment(x.gold, Preferences(context=2 * x.rl.data.context), RewardModel(), seed=seed)

    def proxy(count: int) -> Experiment:
        data = replace(x.proxy.data, sources=(Rankings(f"{root}/labels_{count}.db"),))
        train = replace(x.proxy.train, steps=max(1, round(x.updates * count**0.5)))
        return replace(x.proxy, data=data, train=train, parent=f"{root}/policy", seed=x.proxy.seed + seed)

    def rewarded(count: int, kl) -> Experiment:
        # Of weight 0, what the gold is made of is asked and logged, and changes nothing.
        reward = (Learned(f"{root}/proxy_{count}"), Learned(f"{root}/gold", weight=0.0), Correct(weight=0.0))
        objective = replace(x.rl.objective, reward=reward, kl=kl)
        return replace(x.rl, objective=objective, parent=f"{root}/policy", seed=x.rl.seed + seed)

    rl = {f"rl_{count}": (count, rewarded(count, None)) for count in sorted({min(labels), max(labels)})}
    rl[f"rl_{min(labels)}_kl"] = (min(labels), rewarded(min(labels), x.kl))
    return Arm(policy, gold, {count: proxy(count) for count in labels}, rl)
