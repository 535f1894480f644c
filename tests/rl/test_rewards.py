"""Bad input to what runs on the host, and gradients and dtypes of what is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.rl import advantage, kl, rewards


@pytest.mark.parametrize("scores", [[], [2.0], [10.1] * 9, [1.0, float("nan")]], ids=str)
def test_reference_scores_that_do_not_differ_are_refused(scores):
    with pytest.raises(UserError, match="reference scores"):
        rewards.gain_and_bias(scores)


def test_an_advantage_that_is_not_of_sequences_is_refused():
    with pytest.raises(ValueError, match="Gae"):
        advantage.of_sequences(advantage.Gae(), [1.0], [0], [True])


def test_explained_variance():
    returns, mask = np.asarray([[1, 2, 3, np.nan]], np.float32), np.asarray([[True, True, True, False]])
    for values, want in (([1, 2, 3, 7], 1), ([0, 1, 2, np.nan], 1), ([2, 2, 2, 2], 0), ([3, 2, 1, 0], -3)):
        np.testing.assert_allclose(advantage.explained_variance(np.float32([values]), returns, mask), want, atol=1e-6)
    assert float(advantage.explained_variance(np.float32([[1, 2, 3, 4]]), np.ones((1, 4), np.float32), mask)) == 0


@pytest.mark.parametrize("name", kl.ESTIMATORS)
def test_estimators_are_wide_and_safe(name):
    """Masked NaN and infinities have no gradient; a far log-ratio gives a large number, not an infinite one."""
    mask = np.asarray([True, True, True, False, False])
    p = jnp.asarray([-1.0, -900.0, -0.5, np.nan, -np.inf], jnp.bfloat16)
    q = jnp.asarray([-1.0, -0.5, -900.0, -1.0, np.nan], jnp.bfloat16)
    values = kl.estimate(name, p, q, mask)
    assert values.dtype == jnp.float32 and np.isfinite(values).all() and not values[3:].any() and float(values[0]) == 0
    gradient = jax.grad(lambda p: jnp.sum(kl.estimate(name, p, q, mask)))(p.astype(jnp.float32))
    assert np.isfinite(gradient).all() and not gradient[3:].any()


def test_the_kl_coefficient_is_traced_and_stays_positive():
    step = jax.jit(lambda c, seen: kl.next_coefficient(kl.Adaptive(horizon=1000.0), c, seen, 64))
    c = kl.first_coefficient(kl.Adaptive())
    for seen in (0.0, 1e9, 3.0):
        up = float(step(c, seen)) > c
        assert up == (seen > 6.0)
        c = float(step(c, seen))
    assert c > 0 and step._cache_size() <= 2  # a Python float first, then as well
    assert kl.first_coefficient(kl.Fixed(0.07)) == 0.07
