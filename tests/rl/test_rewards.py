"""Bad input to what runs on the host, and gradients and dtypes of what is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.rl import advantage, kl, rewards


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "1", [0.5], 1e300, np.zeros(2)], ids=repr)
def test_a_reward_that_is_no_number_is_named(wrong):
    with pytest.raises(UserError, match="reward 2 is"):
        rewards.as_scores([1.0, None, wrong])


def test_rewards_of_any_number_type():
    scores, valid = rewards.as_scores([np.float64(0.7), jnp.asarray(-0.3), np.int64(2), np.bool_(True), False])
    np.testing.assert_allclose(scores, [0.7, -0.3, 2, 1, 0], rtol=1e-6)
    assert valid.all()
    assert rewards.as_scores([])[0].shape == (0,)


def test_a_process_reward_where_nothing_was_sampled_is_refused():
    mask = np.asarray([[False, True, True]])
    for row, column in ((0, 0), (0, 3), (1, 1), (0, -1)):
        with pytest.raises(UserError, match=f"row {row}, token {column}"):
            rewards.step_rewards([0.5], [row], [column], mask)
    with pytest.raises(UserError, match="reward 0 is nan"):
        rewards.step_rewards([np.nan], [0], [1], mask)
    np.testing.assert_allclose(rewards.step_rewards([0.5, 0.25], [0, 0], [1, 1], mask), [[0, 0.75, 0]])


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
