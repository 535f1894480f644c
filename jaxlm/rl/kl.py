"""Estimators of KL(policy || reference) from the policy's own samples, and the control of its coefficient."""

import dataclasses

import jax.numpy as jnp

from jaxlm import masked

# exp beyond this is no longer a weight but an overflow on its way: as in verl, log-ratios are cut here first.
MAX_LOG_RATIO = 20.0


def log_ratio(logprobs, other_logprobs, mask):
    """log(p / other) at the true entries, 0 at the others, in float32 or wider, within +-MAX_LOG_RATIO.

    The mask comes before any exp, so that masked entries reach neither value nor gradient.
    """
    difference = masked.wide(logprobs) - masked.wide(other_logprobs)
    return jnp.clip(jnp.where(mask, difference, 0), -MAX_LOG_RATIO, MAX_LOG_RATIO)


def k1(log_ratio):
    """Unbiased, high variance. As a loss its expected gradient is zero: of use in the reward only."""
    return log_ratio


def k2(log_ratio):
    """Biased, low variance. As a loss on the policy's own samples it has the exact gradient of the KL."""
    return 0.5 * jnp.square(log_ratio)


def k3(log_ratio):
    """Unbiased, low variance, never negative. As a loss it has the gradient of KL(reference || policy)."""
    return jnp.expm1(-log_ratio) + log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def estimate(name: str, logprobs, ref_logprobs, mask):
    """Per-token estimates (Schulman, "Approximating KL divergence", 2020), of the arguments' shape, 0 where masked."""
    return ESTIMATORS[name](log_ratio(logprobs, ref_logprobs, mask))


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The coefficient stays what it is."""

    coefficient: float = 0.05


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Proportional control towards a KL per sequence (Ziegler et al. 2019, arXiv:1909.08593)."""

    initial: float = 0.15
    target: float = 6.0  # nats per sequence
    horizon: float = 10_000.0  # sequences in which an error of 20% or more changes the coefficient by a factor of e**.2


Controller = Fixed | Adaptive


def first_coefficient(controller: Controller) -> float:
    return controller.initial if isinstance(controller, Adaptive) else controller.coefficient


def next_coefficient(controller: Controller, coefficient, observed_kl, n):
    """The coefficient after `n` sequences with a mean KL of `observed_kl` nats per sequence; all three may be traced.

    A KL that is not finite changes nothing: such an update is skipped, and must not outlive itself here.
    """
    if isinstance(controller, Fixed):
        return coefficient
    error = jnp.clip(observed_kl / controller.target - 1, -0.2, 0.2)
    return coefficient * (1 + jnp.where(jnp.isfinite(observed_kl), error, 0) * n / controller.horizon)
