"""Reinforcement learning from a policy's own samples: one definition for PPO and for the whole GRPO family.

An algorithm is a `PolicyLoss` (an advantage, a ratio with its clip, an aggregation; losses/policy.py) together with
what is done around it: where rewards come from, KL in the reward, a critic, which groups are kept, how often a rollout
is gone through. `PPO`, `GRPO` and the others below are values of one node.

Legend: B rows, T tokens scored (a row holds T + 1), [B, T + 1] arrays where a field is a `Trajectory`'s.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm import masked
from jaxlm.config import UserError
from jaxlm.data.trajectory import Trajectory
from jaxlm.feedback.parts import Correct, Part, names
from jaxlm.feedback.scoring import TIMEOUT
from jaxlm.losses import lm, policy
from jaxlm.losses.policy import ALGORITHMS, FixedLength, PolicyLoss, ScoreFunction
from jaxlm.nn import heads, transformer
from jaxlm.nn.lora import LoRA, attach
from jaxlm.optim.optimizers import AdamW, Optimizer
from jaxlm.optim.schedules import Linear
from jaxlm.rl.advantage import Gae
from jaxlm.rl.kl import Adaptive, Fixed
from jaxlm.rl.rewards import Replace, Subtract


@dataclasses.dataclass(frozen=True)
class Exclude:
    """A response without its stop token is left out: advantage 0, in no statistic of its group (overlong filtering)."""


@dataclasses.dataclass(frozen=True)
class DynamicSampling:
    """Groups whose samples are all as right as each other are dropped, and other prompts sampled in their place, at
    most `retries` times a step (DAPO). By the task's own verdict, not by the shaped reward."""

    retries: int = 2


@dataclasses.dataclass(frozen=True)
class Critic:
    """A model of its own that predicts returns, from the newest parameters of `run`: a reward model's, whose head it
    takes over, or any run with the same tokenizer, with a head that says 0 at first. Unset: the policy's parent."""

    run: str | None = None
    optimizer: Optimizer = AdamW(lr=1e-4, weight_decay=0.0, eps=1e-5, schedule=Linear(warmup=0))


@dataclasses.dataclass(frozen=True)
class ValueHead:
    """A head on the policy's own backbone, trained together with it, that says 0 at first."""


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """A step samples `train.batch_size` responses, `samples` to each prompt, and learns from them.

    `train.steps` counts rollouts; an epoch over one takes `minibatches` updates. Rewards: the sum of `reward`, after
    what `missing_stop` does to a response that ran into `max_tokens`. Unscorable samples are left out.
    """

    loss: PolicyLoss = ALGORITHMS["grpo"]
    reward: tuple[Part, ...] = (Correct(),)
    samples: int = 8
    temperature: float = 1.0
    max_tokens: int = 64
    epochs: int = 1
    minibatches: int = 1
    kl: Fixed | Adaptive | None = None  # in the reward, per token, by k1; KL in the loss is loss.kl
    missing_stop: Replace | Subtract | Exclude | None = None  # None: it is scored like any other
    whiten_rewards: bool = False  # to unit variance; their mean is kept
    whiten_advantages: bool = False
    critic: Critic | ValueHead | None = None
    process: float | None = None  # reward of a right and new step of the thinking, at its last token
    dynamic: DynamicSampling | None = None
    reference: bool = True  # score every sample with the parent, too; unset, there is no KL to log
    max_calls: int = 4  # of tools, in one response
    reward_timeout: float = TIMEOUT  # seconds for a part of the reward that is no model's, a batch
    slots: int | None = None  # responses decoded at once; unset, at most 64
    heldout_prompts: int = 64  # asked at each evaluation, greedily once and `heldout_samples` times at random
    heldout_samples: int = 8
    preflight: Literal["off", "warn", "stop"] = "warn"  # checks before the first step; stop: at a no-go
    gold: str | None = None  # part of the reward that alarms take for what is wanted; unset, the task's verdict
    stop_at_alarm: bool = False  # ends the run where it first looks like reward hacking


def _with(name: str, **around) -> PolicyGradient:
    return PolicyGradient(loss=ALGORITHMS[name], **around)


REINFORCE, RLOO, GRPO, GSPO, CISPO = (_with(n) for n in ("reinforce", "rloo", "grpo", "gspo", "cispo"))
DR_GRPO = dataclasses.replace(
    _with("dr_grpo"), loss=dataclasses.replace(ALGORITHMS["dr_grpo"], aggregation=FixedLength(64.0))
)
DAPO = _with("dapo", dynamic=DynamicSampling(), missing_stop=Exclude())
PPO = _with(
    "ppo", samples=1, epochs=4, minibatches=2, kl=Fixed(0.05), critic=Critic(), whiten_advantages=True,
    missing_stop=Replace(-1.0),
)  # fmt: skip


def validate(p: PolicyGradient, batch_size: int) -> None:
    """Raises `UserError` for settings that are each well typed but cannot stand together."""

    def require(ok: bool, what: str):
        if not ok:
            raise UserError(f"objective: {what}")

    counts = (p.samples, p.max_tokens, p.epochs, p.minibatches, p.heldout_prompts, p.heldout_samples)
    require(min(counts) >= 1, "samples, max_tokens, epochs, minibatches and heldout_* must be at least 1")
    require(p.temperature >= 1e-3, f"temperature must be above 0, as greedy samples teach nothing: {p.temperature}")
    require(batch_size % p.samples == 0, f"train.batch_size {batch_size} is no multiple of samples {p.samples}")
    require(
        batch_size >= p.minibatches, f"train.batch_size {batch_size} cannot be cut into {p.minibatches} minibatches"
    )
    token_level = isinstance(p.loss.advantage, Gae)
    require(token_level == (p.critic is not None), "the advantage Gae goes with a critic, and no other does")
    require(token_level == (p.loss.value is not None), "loss.value is the critic's: set both or neither")
    grouped = not token_level and type(p.loss.advantage).__name__ != "Reinforce"
    require(p.samples > 1 or not grouped, "this advantage compares the samples of a prompt: samples must be above 1")
    require(p.samples > 1 or p.dynamic is None, "dynamic sampling compares the samples of a prompt: samples above 1")
    require(p.reference or (p.kl is None and p.loss.kl is None), "a KL needs the reference: reference=true")
    require(p.dynamic is None or p.dynamic.retries >= 0, "dynamic.retries must be at least 0")
    one = p.epochs * p.minibatches == 1
    require(one or not isinstance(p.loss.ratio, ScoreFunction), "without a ratio a rollout is good for one update")
    require(bool(p.reward), "reward is empty: name a part, such as Correct")
    known = names(p.reward)
    require(p.gold is None or p.gold in known, f"gold {p.gold!r} is no part of the reward: {', '.join(known)}")
    require(p.reward_timeout > 0, "reward_timeout must be above 0 seconds")


# ------------------------------------------------------------------------------------------------------ the forward
def tail(x):
    """[B, T]: what belongs to the tokens that are scored."""
    return x[:, 1:]


def head_names(p: PolicyGradient) -> tuple[str, ...]:
    """The heads of the policy's parameters."""
    return (*heads.LM, "value") if isinstance(p.critic, ValueHead) else heads.LM


def scored(model, chunk: int | None, params, batch: Trajectory):
    """(log-probabilities of the tokens, entropies, values or None), each [B, T], at each token's temperature.

    params: with adapters in use. A value belongs to the token that is about to come.
    """
    hidden, _, _ = transformer.apply(
        model, params, batch.tokens[:, :-1], batch.positions[:, :-1], batch.segments[:, :-1]
    )
    logprobs, _, entropy = lm.token_logprobs(
        model, params, hidden, tail(batch.tokens), chunk, tail(batch.temperature), entropy=True
    )
    value = params["heads"].get("value")
    return logprobs, entropy, None if value is None else heads.apply(value, hidden)


def values(model, params, batch: Trajectory):
    """A critic's values [B, T]."""
    return heads.scalars(model, params, "value", batch.tokens[:, :-1], batch.positions[:, :-1], batch.segments[:, :-1])


def make_loss(model, lora: LoRA | None, cfg: PolicyLoss, chunk: int | None):
    """The policy's loss of the update contract. cfg: its floats may be traced; with `value`, of a head of its own.

    Dropout is off: it would make the ratio of the first update another than 1.
    """

    def loss(params, batch: Trajectory, key):
        logprobs, entropy, value = scored(model, chunk, attach(lora, params), batch)
        mask = tail(batch.sampled_by_policy)
        given = {
            "segments_BT": batch.segments,
            "advantages_BT": batch.advantages,
            "old_logprobs_BT": batch.old_logprobs,
            "rollout_logprobs_BT": batch.rollout_logprobs,
            "ref_logprobs_BT": batch.ref_logprobs,
        }
        if cfg.value is not None:
            given |= {"old_values_BT": batch.values, "returns_BT": batch.returns}
        given = {k: None if x is None else tail(x) for k, x in given.items()}
        terms, metrics = policy.policy_loss(
            cfg, logprobs, mask_BT=mask, entropy_BT=entropy, values_BT=value if cfg.value is not None else None, **given
        )
        if cfg.entropy is not None:
            metrics["entropy"] = (masked.sum(entropy, mask), jnp.sum(mask).astype(float))
        now = given["old_logprobs_BT"]
        now = jax.lax.stop_gradient(logprobs) if now is None else now
        gap = jnp.abs(now - given["rollout_logprobs_BT"])
        metrics["sampler_gap"] = (masked.sum(gap, mask), jnp.sum(mask).astype(float))
        metrics["sampler_gap_max"] = (jnp.max(jnp.where(mask, gap, 0)), jnp.ones(()))
        return terms, metrics

    return loss


def make_value_loss(model, clip: float | None):
    """A separate critic's loss of the update contract, the mean over tokens."""

    def loss(params, batch: Trajectory, key):
        mask, returns = tail(batch.sampled_by_policy), tail(batch.returns)
        error, clipped = policy.value_error(values(model, params, batch), tail(batch.values), returns, mask, clip)
        tokens = jnp.sum(mask).astype(float)
        metrics = {"clip_fraction": (jnp.sum(clipped).astype(float), tokens)}
        return {"value": (1.0, masked.sum(error, mask), tokens)}, metrics

    return loss
