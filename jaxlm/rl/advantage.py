"""Advantages: per token from a critic (GAE), per sequence from the others of its group.

Group advantages are plain numpy on the host, in float64: they are made of what Python reward functions returned, groups
are ragged, and there are few numbers. GAE may be traced. Legend: B rows, T positions, N sequences.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import masked


@dataclasses.dataclass(frozen=True)
class Gae:
    """Generalized advantage estimation (arXiv:1506.02438); `lam` 1 is return minus value, 0 one-step."""

    gamma: float = 1.0
    lam: float = 0.95


@dataclasses.dataclass(frozen=True)
class Reinforce:
    """The reward itself, less the mean over the whole batch or nothing (Williams 1992)."""

    baseline: Literal["batch_mean", "none"] = "batch_mean"


@dataclasses.dataclass(frozen=True)
class Rloo:
    """The reward less the mean of the others in its group (REINFORCE leave-one-out, arXiv:2402.14740)."""


@dataclasses.dataclass(frozen=True)
class Grpo:
    """The reward less its group's mean, over its group's standard deviation (arXiv:2402.03300)."""

    ddof: Literal[0, 1] = 1


@dataclasses.dataclass(frozen=True)
class DrGrpo:
    """The reward less its group's mean (Dr. GRPO, arXiv:2503.20783): hard and easy prompts are not scaled up."""


Advantage = Gae | Reinforce | Rloo | Grpo | DrGrpo


def gae(rewards_BT, values_BT, mask_BT, segments_BT, gamma, lam):
    """(advantages, returns), both [B, T], 0 outside the mask, in float32 or wider.

    Time counts the tokens under the mask (sampled by the policy): what a tool wrote inside a response is stepped over,
    the next sampled token's value being the bootstrap, and the end of a segment is terminal. Segments are contiguous.
    Rewards and values outside the mask never matter.
    """
    rewards, values = (jnp.where(mask_BT, masked.wide(x), 0) for x in (rewards_BT, values_BT))
    at, goes_on = masked.next_true(mask_BT, segments_BT)
    bootstrap = jnp.where(goes_on, jnp.take_along_axis(values, at, axis=1), 0)
    delta = jnp.where(mask_BT, rewards + gamma * bootstrap - values, 0)
    # A[t] = delta[t] + decay[t] * A[t+1]; a token that was not sampled hands on what it was given.
    decay = jnp.where(goes_on, jnp.where(mask_BT, gamma * lam, 1.0), 0).astype(delta.dtype)

    def join(later, earlier):
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    _, handed = jax.lax.associative_scan(join, (decay, delta), reverse=True, axis=1)
    advantages = jnp.where(mask_BT, handed, 0)
    return advantages, advantages + values


def _group_total(at, x):
    return np.bincount(at, weights=x)[at]


def _range(x_N, groups_N, valid_N):
    """(group index, highest - lowest valid entry of its group), both [N]; -inf for a group without any."""
    _, at = np.unique(np.asarray(groups_N), return_inverse=True)
    high, low = np.full((2, at.max(initial=0) + 1), [[-np.inf], [np.inf]])
    np.maximum.at(high, at[valid_N], x_N[valid_N])
    np.minimum.at(low, at[valid_N], x_N[valid_N])
    return at, (high - low)[at]


def of_sequences(choice: Advantage, rewards_N, groups_N, valid_N) -> np.ndarray:
    """Float32 [N]: one advantage for all tokens of each sequence. Host.

    groups_N: any ids; sequences of one prompt share one. valid_N: whether there is a reward; without one a sequence is
    left out of its group's statistics and gets 0. A group of equal rewards gets exactly 0, by comparing its highest and
    lowest, since rounding gives it a standard deviation; so does a lone sequence.
    """
    valid = np.asarray(valid_N, bool)
    rewards = np.where(valid, np.asarray(rewards_N, np.float64), 0.0)
    if isinstance(choice, Reinforce):
        baseline = rewards.sum() / max(valid.sum(), 1) if choice.baseline == "batch_mean" else 0.0
        return np.where(valid, rewards - baseline, 0).astype(np.float32)
    at, differ = _range(rewards, groups_N, valid)
    n = _group_total(at, valid)
    above = np.where(valid, rewards - _group_total(at, rewards) / np.maximum(n, 1), 0)
    match choice:
        case Rloo():
            above *= n / np.maximum(n - 1, 1)
        case Grpo():
            variance = _group_total(at, above**2) / np.maximum(n - choice.ddof, 1)
            above /= np.sqrt(np.where(variance > 0, variance, 1))
        case DrGrpo():
            pass
        case _:
            raise ValueError(f"{type(choice).__name__} gives no advantage per sequence")
    return np.where(valid & (differ > 0), above, 0).astype(np.float32)


def with_spread(correct_N, groups_N, valid_N) -> tuple[np.ndarray, float]:
    """(bool [N], fraction of groups dropped): sequences whose group holds both better and worse ones. Host.

    The filter of dynamic sampling (DAPO, arXiv:2503.14476). `correct_N` is raw correctness: with a shaped reward, such
    as one with a length penalty, every group would pass. Sequences that are not valid are dropped too.
    """
    valid, correct = np.asarray(valid_N, bool), np.asarray(correct_N, np.float64)
    at, differ = _range(correct, groups_N, valid)
    groups = len(np.unique(at))
    kept = valid & (differ > 0)
    return kept, 1 - len(np.unique(at[kept])) / max(groups, 1)


def explained_variance(values_BT, returns_BT, mask_BT):
    """1 - Var(returns - values) / Var(returns) under the mask, over the whole batch; 0 where returns do not vary.

    1 is a perfect critic, 0 one that knows only the mean, below 0 worse than that.
    """
    values, returns = masked.wide(values_BT), masked.wide(returns_BT)

    def variance(x):
        return masked.mean(jnp.square(jnp.where(mask_BT, x, 0) - masked.mean(x, mask_BT)), mask_BT)

    total = variance(returns)
    return jnp.where(total > 0, 1 - variance(returns - values) / jnp.where(total > 0, total, 1), 0)
