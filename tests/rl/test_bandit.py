"""The closed-form optimum: pi* is proportional to pi_ref * exp(r / beta). Three arms, exact expectations, float64.

What must reach it reaches it, and what must miss it ends where the algebra says.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses import policy, preference
from jaxlm.rl import kl, rewards
from tests.nn.tiny import doubled

REF, R, BETA = np.asarray([0.5, 0.3, 0.2]), np.asarray([0.0, 1.0, 2.0]), 0.5
OPTIMUM = REF * np.exp(R / BETA) / np.sum(REF * np.exp(R / BETA))
PPO = policy.TokenRatio()
MASK, SEGMENTS = np.ones((3, 1), bool), np.ones((3, 1), np.int32)  # an arm is a sequence of one token


def column(x):
    return jnp.asarray(x).reshape(3, 1)


def surrogate(ratio, logp, old, r):
    """Exact expectation over samples of the old policy; the baseline is the expected reward."""
    p_old = jnp.exp(old)
    advantages = r - jnp.sum(p_old * r)
    return jnp.sum(
        p_old * policy.surrogate(ratio, column(logp), column(old), column(advantages), MASK, SEGMENTS)[0].ravel()
    )


def with_kl_in_reward(logp, old, ratio=PPO):
    estimates = kl.estimate("k1", column(old), column(np.log(REF)), MASK)
    r = rewards.token_rewards(estimates, column(R), MASK, SEGMENTS, BETA).ravel()
    return surrogate(ratio, logp, old, r)


def with_kl_in_loss(logp, old, estimator, ratio=PPO):
    estimates = kl.estimate(estimator, column(logp), column(np.log(REF)), MASK).ravel()
    return surrogate(ratio, logp, old, R) + BETA * jnp.sum(jnp.exp(old) * estimates)


def dpo(logp, old):
    """All ordered pairs, each labeled one way or the other with the probability that Bradley-Terry gives."""
    values = logp - jnp.log(REF)
    gap, wins = values[:, None] - values[None, :], jax.nn.sigmoid(R[:, None] - R[None, :])
    return jnp.sum(wins * preference.pair_loss(preference.Dpo(beta=BETA), gap))


def trained(loss, steps=3000, lr=1.0, epochs=1):
    """The policy after gradient descent on the logits, `epochs` steps for each renewal of the old policy."""

    def renew(_, logits):
        old = jax.nn.log_softmax(logits)
        for _ in range(epochs):
            logits = logits - lr * jax.grad(lambda z: loss(jax.nn.log_softmax(z), old))(logits)
        return logits

    return np.asarray(jax.nn.softmax(jax.jit(lambda z: jax.lax.fori_loop(0, steps, renew, z))(jnp.log(REF))))


def test_the_optimum_itself():
    np.testing.assert_allclose(OPTIMUM, [0.0367, 0.1626, 0.8008], atol=6e-5)
    divergence = np.sum(OPTIMUM * np.log(OPTIMUM / REF))
    np.testing.assert_allclose([divergence, OPTIMUM @ R], [0.9155, 1.7641], atol=6e-5)
    assert OPTIMUM @ R - BETA * divergence == pytest.approx(1.30637, abs=6e-6)
    assert BETA * np.log(REF @ np.exp(R / BETA)) == pytest.approx(1.30637, abs=6e-6)


REACH = {
    "ppo, k1 in the reward": (with_kl_in_reward, {"epochs": 4, "lr": 0.3}),
    "reinforce, k1 in the reward": (functools.partial(with_kl_in_reward, ratio=policy.ScoreFunction()), {}),
    "cispo, k1 in the reward": (functools.partial(with_kl_in_reward, ratio=policy.ClippedWeight()), {}),
    "gspo, k2 in the loss": (functools.partial(with_kl_in_loss, estimator="k2", ratio=policy.SequenceRatio()), {}),
    "ppo, k2 in the loss": (functools.partial(with_kl_in_loss, estimator="k2"), {}),
    "dpo": (dpo, {"lr": 3.0}),
}


@pytest.mark.parametrize("name", REACH)
def test_reaches_the_optimum(name):
    loss, how = REACH[name]
    with doubled():
        np.testing.assert_allclose(trained(loss, **how), OPTIMUM, rtol=1e-9)


def test_k3_in_the_loss_ends_elsewhere():
    """Where pi * (r - E r) = beta * (pi - ref): the fixed point of the opposite KL's gradient."""
    with doubled():
        p = trained(functools.partial(with_kl_in_loss, estimator="k3"))
    np.testing.assert_allclose(p, [0.1172, 0.1324, 0.7504], atol=6e-5)
    np.testing.assert_allclose(p * (R - p @ R), BETA * (p - REF), atol=1e-9)


def test_k1_in_the_loss_does_not_regularize():
    """It runs to the best arm, by the very path that it takes without any KL."""
    with doubled():
        free = trained(lambda logp, old: surrogate(PPO, logp, old, R))
        p = trained(functools.partial(with_kl_in_loss, estimator="k1"))
    assert p[2] > 0.999 and np.argmax(R) == 2
    np.testing.assert_allclose(p, free, rtol=1e-6)
