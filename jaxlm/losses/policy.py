"""Policy-gradient losses as three named parts: an advantage (rl/advantage.py), a ratio with its clip, an aggregation.

The shift is the caller's: logprobs[t] scores the token at t. Everything but `logprobs`, `entropy` and `values` depends
on the batch alone; advantages, being whole-batch statistics, come ready made. Legend: B rows, T positions.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm import masked
from jaxlm.rl import kl
from jaxlm.rl.advantage import Advantage, DrGrpo, Gae, Grpo, Reinforce, Rloo


# -------------------------------------------------------------------------------------------------- ratio and clip
@dataclasses.dataclass(frozen=True)
class ScoreFunction:
    """log p * A: no ratio, no clip (Williams 1992). For one update per sample."""


@dataclasses.dataclass(frozen=True)
class TokenRatio:
    """A ratio per token, clipped to [1 - clip_low, 1 + clip_high] (PPO, arXiv:1707.06347; apart: DAPO)."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # above 1: the most that a ratio counts where A < 0 (arXiv:1912.09729)


@dataclasses.dataclass(frozen=True)
class SequenceRatio:
    """The geometric mean of a segment's ratios, clipped as one (GSPO, arXiv:2507.18071)."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4


@dataclasses.dataclass(frozen=True)
class ClippedWeight:
    """log p * A, weighted by the clipped ratio as a constant: clipped tokens keep a gradient (CISPO, arXiv:2506.13585).

    clip_low 1 is no lower bound.
    """

    clip_low: float = 1.0
    clip_high: float = 4.0  # as ScaleRL (arXiv:2510.13786): weights up to 5


Ratio = ScoreFunction | TokenRatio | SequenceRatio | ClippedWeight


# ----------------------------------------------------------------------------------------------------- aggregation
@dataclasses.dataclass(frozen=True)
class TokenMean:
    """Every token of the batch counts the same (DAPO)."""


@dataclasses.dataclass(frozen=True)
class SequenceMean:
    """Every sequence counts the same: the mean over sequences of the mean over their tokens (GRPO)."""


@dataclasses.dataclass(frozen=True)
class SequenceSum:
    """The mean over sequences of the sum over their tokens: the policy gradient as it is derived."""


@dataclasses.dataclass(frozen=True)
class FixedLength:
    """The mean over sequences of the sum over their tokens divided by `length`, the same for all (Dr. GRPO)."""

    length: float = 1024.0  # tokens that a response may have


Aggregation = TokenMean | SequenceMean | SequenceSum | FixedLength


# ------------------------------------------------------------------------------------------------ the whole config
@dataclasses.dataclass(frozen=True)
class KLTerm:
    """KL to the reference policy in the loss. By estimator `k2` it has the exact gradient on the policy's own samples,
    by `k3` (GRPO's) that of the opposite KL, by `k1` none."""

    estimator: Literal["k1", "k2", "k3"] = "k2"
    coefficient: float = 0.05


@dataclasses.dataclass(frozen=True)
class ValueTerm:
    """Half the critic's squared error, or that of its clipped move where it is larger (Ziegler et al. 2019)."""

    coefficient: float = 0.1
    clip: float | None = 0.2  # how far a value may move from the old one; None: anywhere


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """An algorithm is its first three parts; the rest is off unless set. Floats may be traced."""

    advantage: Advantage = Grpo()
    ratio: Ratio = TokenRatio()
    aggregation: Aggregation = TokenMean()
    value: ValueTerm | None = None  # a critic's
    kl: KLTerm | None = None  # in the loss; KL in the reward is rl/rewards.py
    entropy: float | None = None  # coefficient of the entropy bonus
    importance_cap: float | None = None  # of the weights old / rollout probability, such as 2; None: no correction


# A line is an algorithm. What belongs to sampling (DAPO's filter) or to the reward (its length penalty) is set there.
ALGORITHMS = {
    "reinforce": PolicyLoss(Reinforce(), ScoreFunction(), SequenceSum()),
    "rloo": PolicyLoss(Rloo(), ScoreFunction(), SequenceSum()),
    "grpo": PolicyLoss(Grpo(), TokenRatio(), SequenceMean()),
    "dr_grpo": PolicyLoss(DrGrpo(), TokenRatio(), FixedLength()),
    "dapo": PolicyLoss(Grpo(), TokenRatio(clip_high=0.28), TokenMean()),
    "gspo": PolicyLoss(Grpo(), SequenceRatio(), SequenceMean()),
    "cispo": PolicyLoss(Grpo(), ClippedWeight(), TokenMean()),
    "ppo": PolicyLoss(Gae(), TokenRatio(), TokenMean(), ValueTerm()),
}


# -------------------------------------------------------------------------------------------------------- formulas
def _count(mask):
    """True entries, as a float: it is added up and divided by."""
    return jnp.sum(mask).astype(float)


def token_weights(aggregation: Aggregation, mask_BT, segments_BT):
    """(w [B, T], weight): the aggregate of per-token losses is sum(w * loss) / weight. Depends on the batch alone.

    weight is the number of tokens under the mask, or of segments with any.
    """
    if isinstance(aggregation, TokenMean):
        return mask_BT.astype(float), _count(mask_BT)
    sequences = _count(masked.last_of_segments(mask_BT, segments_BT))
    if isinstance(aggregation, SequenceMean):
        length = masked.over_segment(mask_BT.astype(jnp.int32), mask_BT, segments_BT)
    else:
        length = aggregation.length if isinstance(aggregation, FixedLength) else 1
    return mask_BT / jnp.maximum(length, 1).astype(float), sequences


def importance_weights(old_logprobs_BT, rollout_logprobs_BT, mask_BT, cap):
    """min(p_old / p_rollout, cap) per token, 1 outside the mask, without gradient: the sampler is not quite the trainer
    (truncated importance sampling, Yao et al. 2025)."""
    ratio = jnp.exp(kl.log_ratio(old_logprobs_BT, rollout_logprobs_BT, mask_BT))
    return jax.lax.stop_gradient(jnp.minimum(ratio, cap))


def surrogate(ratio: Ratio, logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, segments_BT):
    """(loss, ratio, clipped below, clipped above), each [B, T]: a loss per token, 0 outside the mask.

    The ratio is the one that is clipped, per token or the segment's at each of its tokens. Clipped are the tokens that
    lose their gradient by it, under ClippedWeight those whose weight was cut.
    """
    logprobs = jnp.where(mask_BT, masked.wide(logprobs_BT), 0)
    advantages = jnp.where(mask_BT, masked.wide(advantages_BT), 0)
    log_rho = kl.log_ratio(logprobs, old_logprobs_BT, mask_BT)
    if isinstance(ratio, SequenceRatio):
        length = masked.over_segment(mask_BT.astype(jnp.int32), mask_BT, segments_BT)
        log_rho = jnp.where(mask_BT, masked.over_segment(log_rho, mask_BT, segments_BT) / jnp.maximum(length, 1), 0)
    rho = jnp.exp(log_rho)
    if isinstance(ratio, ScoreFunction):
        never = jnp.zeros_like(mask_BT)
        return -advantages * logprobs, rho, never, never
    low, high = 1 - ratio.clip_low, 1 + ratio.clip_high
    if isinstance(ratio, ClippedWeight):
        weight = jax.lax.stop_gradient(jnp.clip(rho, low, high))
        return -advantages * weight * logprobs, rho, mask_BT & (rho < low), mask_BT & (rho > high)
    loss = jnp.maximum(-advantages * rho, -advantages * jnp.clip(rho, low, high))
    below, above = (advantages < 0) & (rho < low), (advantages > 0) & (rho > high)
    if isinstance(ratio, TokenRatio) and ratio.dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -advantages * ratio.dual_clip), loss)
        above |= (advantages < 0) & (rho > ratio.dual_clip)
    return loss, rho, below, above


def value_error(values_BT, old_values_BT, returns_BT, mask_BT, clip):
    """(half the squared error, whether the clipped one is the larger), both [B, T], 0 outside the mask."""
    values, old, returns = (jnp.where(mask_BT, masked.wide(x), 0) for x in (values_BT, old_values_BT, returns_BT))
    plain = 0.5 * jnp.square(values - returns)
    if clip is None:
        return plain, jnp.zeros_like(mask_BT)
    clipped = 0.5 * jnp.square(jnp.clip(values, old - clip, old + clip) - returns)
    return jnp.maximum(plain, clipped), mask_BT & (clipped > plain)


RATIO_EDGES = (0.5, 0.8, 0.9, 0.99, 1.01, 1.1, 1.25, 2.0)


def ratio_metrics(rho_BT, mask_BT):
    """Of the ratios under the mask: mean |ratio - 1|, the largest one (over microbatches their mean), a histogram."""
    tokens = _count(mask_BT)
    deviation = jnp.abs(rho_BT - 1)
    bins = zip((-jnp.inf, *RATIO_EDGES), (*RATIO_EDGES, jnp.inf), strict=True)
    return {
        "ratio_deviation": (masked.sum(deviation, mask_BT), tokens),
        "ratio_deviation_max": (jnp.max(jnp.where(mask_BT, deviation, 0)), jnp.ones(())),
    } | {
        f"ratio_histogram/{a:g}_{b:g}".replace("-inf", "0"): (_count(mask_BT & (rho_BT >= a) & (rho_BT < b)), tokens)
        for a, b in bins
    }


def _check(cfg: PolicyLoss, shape, arrays):
    needed = {"rollout_logprobs_BT": cfg.importance_cap, "ref_logprobs_BT": cfg.kl, "entropy_BT": cfg.entropy}
    needed |= {name: cfg.value for name in ("values_BT", "old_values_BT", "returns_BT")}
    for name, x in arrays.items():
        if x is None and needed.get(name) is not None:
            raise ValueError(f"this loss needs {name}")
        if x is not None and x.shape != shape:  # [B] advantages would meet [B, T] silently where B == T
            raise ValueError(f"{name} is {x.shape}, where logprobs_BT is {shape}")


def policy_loss(
    cfg: PolicyLoss,
    logprobs_BT,
    *,
    mask_BT,
    segments_BT,
    advantages_BT,
    old_logprobs_BT=None,
    rollout_logprobs_BT=None,
    ref_logprobs_BT=None,
    entropy_BT=None,
    values_BT=None,
    old_values_BT=None,
    returns_BT=None,
):
    """({term: (coefficient, sum, weight)}, {metric: (sum, weight)}) of the loss contract, float32 or wider.

    mask: tokens that the policy sampled; leave out what could not be scored. Unset `old_logprobs`: those of `logprobs`,
    right for the first update after sampling. `rollout_logprobs` are needed for `importance_cap`, `ref_logprobs` for
    `kl`, `entropy` for the bonus, the last three for `value`. `approximate_kl` is KL(old || new) by k3 and `surprisal`
    -log p of the samples, which estimates the entropy.
    """
    _check(cfg, logprobs_BT.shape, {name: x for name, x in locals().items() if name != "cfg"})
    mask = mask_BT
    old = jax.lax.stop_gradient(logprobs_BT if old_logprobs_BT is None else old_logprobs_BT)
    w, weight = token_weights(cfg.aggregation, mask, segments_BT)
    tokens = _count(mask)
    loss, rho, below, above = surrogate(cfg.ratio, logprobs_BT, old, advantages_BT, mask, segments_BT)
    metrics = ratio_metrics(rho, mask) | {
        "clip_fraction_low": (_count(below), tokens),
        "clip_fraction_high": (_count(above), tokens),
        "approximate_kl": (masked.sum(kl.estimate("k3", old, logprobs_BT, mask), mask), tokens),
        "surprisal": (masked.sum(-masked.wide(logprobs_BT), mask), tokens),
    }
    if cfg.importance_cap is not None:
        correction = importance_weights(old, rollout_logprobs_BT, mask, cfg.importance_cap)
        loss = loss * correction
        metrics["importance_weight"] = (masked.sum(correction, mask), tokens)
        metrics["importance_capped"] = (_count(mask & (correction >= cfg.importance_cap)), tokens)
    terms = {"policy": (1.0, masked.sum(w * loss, mask), weight)}
    if cfg.kl is not None:
        divergence = kl.estimate(cfg.kl.estimator, logprobs_BT, ref_logprobs_BT, mask)
        terms["kl"] = (cfg.kl.coefficient, masked.sum(w * divergence, mask), weight)
    if cfg.entropy is not None:
        terms["entropy"] = (-cfg.entropy, masked.sum(w * masked.wide(entropy_BT), mask), weight)
    elif entropy_BT is not None:
        metrics["entropy"] = (masked.sum(masked.wide(entropy_BT), mask), tokens)
    if cfg.value is not None:
        error, clipped = value_error(values_BT, old_values_BT, returns_BT, mask, cfg.value.clip)
        terms["value"] = (cfg.value.coefficient, masked.sum(error, mask), tokens)
        metrics["value_clip_fraction"] = (_count(clipped), tokens)
    return terms, metrics
