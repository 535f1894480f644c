"""Losses from rankings: a reward model's, and a policy's own (DPO and its family).

One prompt's K completions are one element of the batch. Ranks are places, lower is better; equal ranks are ties, and
what is tied is never compared. A sum over the pairs of a prompt is divided by C(K, 2), K counting what is present
(InstructGPT, arXiv:2203.02155), ties or not: a tie says nothing, so it must not make the pairs beside it weigh more. A
prompt thus counts by the share of its pairs that were told apart, and its loss at equal rewards is that share of ln 2.
Legend: B rows, T positions, P prompts, K completions of each.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm import masked


def sequence_logprobs(logprobs_BT, mask_BT, segments_BT, count: int):
    """[B, count]: each segment's sum of log-probabilities over the tokens under the mask (the response's)."""
    return masked.segment_sum(masked.wide(jnp.where(mask_BT, logprobs_BT, 0)), mask_BT, segments_BT, count)


def pairs(ranks_PK, present_PK):
    """(bool [P, K, K]: i is ranked before j; [P]: 1 / C(K, 2), 0 where nothing can be compared)."""
    both = present_PK[:, :, None] & present_PK[:, None, :]
    better = both & (ranks_PK[:, :, None] < ranks_PK[:, None, :])
    k = jnp.sum(present_PK, axis=1)
    return better, jnp.any(better, axis=(1, 2)) / jnp.maximum(k * (k - 1) / 2, 1)


def _over_pairs(loss, values_PK, ranks_PK, present_PK):
    """(sum over prompts, number of prompts with a pair, metrics) of loss(value_i - value_j) over pairs i before j."""
    better, share = pairs(ranks_PK, present_PK)
    values = jnp.where(present_PK, masked.wide(values_PK), 0)
    gap = jnp.where(better, values[:, :, None] - values[:, None, :], 0)
    total = jnp.sum(share * masked.sum(loss(gap), better, axis=(1, 2)))
    n = jnp.sum(better).astype(float)
    right = (gap > 0) + 0.5 * (gap == 0)
    metrics = {
        "accuracy": (masked.sum(right, better), n),
        "margin": (masked.sum(gap, better), n),
        "chosen": (masked.sum(values[:, :, None], better), n),
        "rejected": (masked.sum(values[:, None, :], better), n),
    }
    return total, jnp.sum(share > 0).astype(float), metrics


# ---------------------------------------------------------------------------------------------------- reward models
def bradley_terry(rewards_PK, ranks_PK, present_PK, margin=0.0):
    """(terms, metrics): mean of -log sigmoid(r_i - r_j - margin) over all pairs of a prompt, then over prompts.

    margin: a scalar or [P, K, K], by how much i should at least lead j (Llama 2, arXiv:2307.09288).
    """
    total, prompts, metrics = _over_pairs(
        lambda gap: -jax.nn.log_sigmoid(gap - margin), rewards_PK, ranks_PK, present_PK
    )
    return {"bradley_terry": (1.0, total, prompts)}, metrics


def _stages(rewards_PK, ranks_PK, present_PK):
    """[P, K]: -log of the chance that i comes first among itself and all that are ranked after it."""
    rewards = jnp.where(present_PK, masked.wide(rewards_PK), 0)
    better, _ = pairs(ranks_PK, present_PK)
    rivals = better | (jnp.eye(rewards.shape[1], dtype=bool)[None] & present_PK[:, :, None])
    # A row without rivals, being absent, keeps itself: a logsumexp over nothing has no gradient.
    rivals = rivals | ~present_PK[:, :, None]
    others = jnp.where(rivals, rewards[:, None, :], -jnp.inf)
    return jnp.where(present_PK, jax.nn.logsumexp(others, axis=-1) - rewards, 0)


def plackett_luce(rewards_PK, ranks_PK, present_PK):
    """Terms: -log of the chance of the whole ranking, best drawn first (Plackett 1975), the mean over prompts.

    Tied items are each drawn before all that are ranked after them, and not compared with one another.
    """
    share = pairs(ranks_PK, present_PK)[1]
    total = masked.sum(_stages(rewards_PK, ranks_PK, present_PK), present_PK)
    return {"plackett_luce": (1.0, total, jnp.sum(share > 0).astype(float))}


def best_of_k(rewards_PK, ranks_PK, present_PK):
    """Terms: cross-entropy of picking the best, the mean over prompts; of several best ones, the mean over them."""
    better, share = pairs(ranks_PK, present_PK)
    best = present_PK & ~jnp.any(better, axis=1)
    each = masked.mean(_stages(rewards_PK, ranks_PK, present_PK), best, axis=1)
    return {"best_of_k": (1.0, jnp.sum(each), jnp.sum(share > 0).astype(float))}


# -------------------------------------------------------------------------------------------------- policy directly
@dataclasses.dataclass(frozen=True)
class Dpo:
    """-log sigmoid(beta * gap) (arXiv:2305.18290); with label_smoothing, the chance that a label is wrong, cDPO."""

    beta: float = 0.1
    label_smoothing: float = 0.0


@dataclasses.dataclass(frozen=True)
class Ipo:
    """(gap - 1 / (2 beta))^2, on log-probability sums (arXiv:2310.12036)."""

    beta: float = 0.1


@dataclasses.dataclass(frozen=True)
class Hinge:
    """max(0, 1 - beta * gap) (SLiC, arXiv:2305.10425)."""

    beta: float = 0.1


@dataclasses.dataclass(frozen=True)
class SimPo:
    """-log sigmoid(beta * gap - gamma) of log-probabilities per token, without a reference (arXiv:2405.14734)."""

    beta: float = 2.0
    gamma: float = 1.0


Preference = Dpo | Ipo | Hinge | SimPo


def pair_loss(cfg: Preference, gap):
    """The loss of one pair, elementwise; gap: chosen minus rejected, of log p / p_ref (SimPo: of log p per token)."""
    match cfg:
        case Dpo(beta=beta, label_smoothing=e):
            return -(1 - e) * jax.nn.log_sigmoid(beta * gap) - e * jax.nn.log_sigmoid(-beta * gap)
        case Ipo(beta=beta):
            return jnp.square(gap - 1 / (2 * beta))
        case Hinge(beta=beta):
            return jax.nn.relu(1 - beta * gap)
        case SimPo(beta=beta, gamma=gamma):
            return -jax.nn.log_sigmoid(beta * gap - gamma)
    raise ValueError(f"{type(cfg).__name__} is no preference loss")


def preference_loss(cfg: Preference, logprobs_PK, ref_logprobs_PK, lengths_PK, ranks_PK, present_PK):
    """(terms, metrics) from `sequence_logprobs` of the policy and the reference; K = 2 with ranks 0, 1 is a plain pair.

    ref_logprobs is not read by SimPo, lengths (tokens of each response) by SimPo alone; either may then be None.
    Metrics are of the values that are compared: log p / p_ref, or SimPo's log p per token.
    """
    logprobs = masked.wide(logprobs_PK)
    if isinstance(cfg, SimPo):
        values = logprobs / jnp.maximum(lengths_PK, 1)
    else:
        values = logprobs - masked.wide(ref_logprobs_PK)
    total, prompts, metrics = _over_pairs(lambda gap: pair_loss(cfg, gap), values, ranks_PK, present_PK)
    return {"preference": (1.0, total, prompts)}, metrics
