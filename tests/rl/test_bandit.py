"""The closed-form optimum: pi* is proportional to pi_ref * exp(r / beta). Three arms, exact expectations, float64.

What must reach it reaches it, and what must miss it ends where the algebra says. With a coin for a reward the same
loops go back to the reference: nothing in them pays by itself.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses import policy, preference
from jaxlm.losses.policy import ALGORITHMS, KLTerm
from jaxlm.rl import advantage, kl, rewards
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


def with_kl_in_reward(logp, old, r=R, ratio=PPO):
    estimates = kl.estimate("k1", column(old), column(np.log(REF)), MASK)
    r = rewards.token_rewards(estimates, column(r), MASK, SEGMENTS, BETA).ravel()
    return surrogate(ratio, logp, old, r)


def with_kl_in_loss(logp, old, r=R, *, estimator, ratio=PPO):
    estimates = kl.estimate(estimator, column(logp), column(np.log(REF)), MASK).ravel()
    return surrogate(ratio, logp, old, r) + BETA * jnp.sum(jnp.exp(old) * estimates)


def bradley_terry(r):
    """[K, K]: the chance that the row is preferred to the column."""
    return jax.nn.sigmoid(np.asarray(r)[:, None] - np.asarray(r)[None, :])


def preferred(logp, old, r=R, *, cfg, ref=REF, wins=bradley_terry):
    """All ordered pairs, each labeled one way or the other with the probability that Bradley-Terry gives."""
    pairs = np.asarray(list(itertools.permutations(range(len(ref)), 2)))

    def of(pair):
        two = np.ones((1, 2), np.int32)
        terms, _ = preference.preference_loss(
            cfg, logp[pair][None], jnp.log(ref)[pair][None], two, np.asarray([[0, 1]]), two > 0
        )
        return sum(c * s / w for c, s, w in terms.values())

    return jnp.sum(wins(r)[pairs[:, 0], pairs[:, 1]] * jax.vmap(of)(pairs))


def trained(loss, steps=3000, lr=1.0, epochs=1, start=REF, decay=False):
    """The policy after gradient descent on the logits, `epochs` steps for each renewal of the old policy.

    decay: the learning rate falls to 0, for gradients that do not vanish at their end."""

    def renew(n, logits):
        old = jax.nn.log_softmax(logits)
        for _ in range(epochs):
            slope = jax.grad(lambda z: loss(jax.nn.log_softmax(z), old))(logits)
            logits = logits - lr * (1 - decay * n / steps) * slope
        return logits

    return np.asarray(jax.nn.softmax(jax.jit(lambda z: jax.lax.fori_loop(0, steps, renew, z))(jnp.log(start))))


def of_groups(cfg, size=3, beta=BETA, r=R, lr=0.3, steps=600, decay=True, start=REF, filtered=False):
    """The policy after training by a whole `PolicyLoss`, its own advantages made of every group of `size` samples.

    r: the outcomes of each arm, [3] or [3, outcomes], all equally likely. beta: of the KL in the reward. filtered:
    groups without spread are dropped, as dynamic sampling does. An advantage over a group's deviation does not vanish
    with what is left to win, so its steps must become small (decay).
    """
    outcomes = np.reshape(r, (3, -1))
    arm_O, each_O = np.repeat(np.arange(3), outcomes.shape[1]), outcomes.ravel()
    groups_NG = np.asarray(list(itertools.product(range(len(each_O)), repeat=size)))
    number, arms_NG, every = np.repeat(np.arange(len(groups_NG)), size), arm_O[groups_NG], np.ones(groups_NG.size, bool)
    kept_N = np.ones(len(groups_NG), bool)
    if filtered:
        kept_N = advantage.with_spread(each_O[groups_NG].ravel(), number, every)[0].reshape(groups_NG.shape)[:, 0]
    mask, segments = np.ones((size, 1), bool), np.ones((size, 1), np.int32)

    @jax.jit
    def step(logits, advantages_NG, lr):
        old = jax.nn.log_softmax(logits)
        chance_N = jnp.where(kept_N, jnp.exp(jnp.sum(old[arms_NG], axis=1)), 0)

        def loss(z):
            logp = jax.nn.log_softmax(z)

            def of(arms_G, advantages_G):
                now, then, ref = (x[arms_G][:, None] for x in (logp, old, jnp.log(REF)))
                terms, _ = policy.policy_loss(
                    cfg, now, mask_BT=mask, segments_BT=segments, advantages_BT=advantages_G[:, None],
                    old_logprobs_BT=then, ref_logprobs_BT=ref,
                )  # fmt: skip
                return sum(c * s / w for c, s, w in terms.values())

            return jnp.sum(chance_N * jax.vmap(of)(arms_NG, advantages_NG)) / jnp.sum(chance_N)

        logits = logits - lr * jax.grad(loss)(logits)
        return logits, jax.nn.log_softmax(logits)

    logits, logp = np.log(start), np.log(start)
    for n in range(steps):
        totals_O = each_O - beta * (np.asarray(logp) - np.log(REF))[arm_O]
        a = advantage.of_sequences(cfg.advantage, totals_O[groups_NG].ravel(), number, every).reshape(groups_NG.shape)
        logits, logp = step(logits, a.astype(float), lr * (1 - decay * n / steps))
    return np.exp(np.asarray(logp))


def test_the_optimum_itself():
    np.testing.assert_allclose(OPTIMUM, [0.0367, 0.1626, 0.8008], atol=6e-5)
    divergence = np.sum(OPTIMUM * np.log(OPTIMUM / REF))
    np.testing.assert_allclose([divergence, OPTIMUM @ R], [0.9155, 1.7641], atol=6e-5)
    assert OPTIMUM @ R - BETA * divergence == pytest.approx(1.30637, abs=6e-6)
    assert BETA * np.log(REF @ np.exp(R / BETA)) == pytest.approx(1.30637, abs=6e-6)


DPO = preference.Dpo(beta=BETA)
REACH = {
    "ppo, k1 in the reward": (with_kl_in_reward, {"epochs": 4, "lr": 0.3}),
    "reinforce, k1 in the reward": (functools.partial(with_kl_in_reward, ratio=policy.ScoreFunction()), {}),
    "cispo, k1 in the reward": (functools.partial(with_kl_in_reward, ratio=policy.ClippedWeight()), {}),
    "gspo, k2 in the loss": (functools.partial(with_kl_in_loss, estimator="k2", ratio=policy.SequenceRatio()), {}),
    "ppo, k2 in the loss": (functools.partial(with_kl_in_loss, estimator="k2"), {}),
    "dpo": (functools.partial(preferred, cfg=DPO), {"lr": 3.0}),
}


@pytest.mark.parametrize("name", REACH)
def test_reaches_the_optimum(name):
    loss, how = REACH[name]
    with doubled():
        np.testing.assert_allclose(trained(loss, **how), OPTIMUM, rtol=1e-9)


# Through their own advantages, with k1 in the reward: at the optimum all samples have the same total reward, so that
# every group is constant and has no advantage, whatever it is divided by. The mean of a group, or of the others in it,
# only sets the pace; RLOO's is exact, and reaches it with the KL in the loss as well.
DR_GRPO = dataclasses.replace(ALGORITHMS["dr_grpo"], aggregation=policy.FixedLength(1.0))
SMOOTH = {"lr": 2.0, "decay": False}
REACH_BY_GROUPS = {
    "rloo": (ALGORITHMS["rloo"], SMOOTH),
    "rloo, k2 in the loss": (dataclasses.replace(ALGORITHMS["rloo"], kl=KLTerm("k2", BETA)), SMOOTH | {"beta": 0.0}),
    "dr_grpo": (DR_GRPO, SMOOTH),
    "grpo": (ALGORITHMS["grpo"], {}),
    "dapo": (ALGORITHMS["dapo"], {"filtered": True}),
    "gspo": (ALGORITHMS["gspo"], {}),
    "cispo": (ALGORITHMS["cispo"], {}),
}


@pytest.mark.parametrize("name", REACH_BY_GROUPS)
def test_reaches_the_optimum_by_its_own_advantage(name):
    cfg, how = REACH_BY_GROUPS[name]
    with doubled():
        np.testing.assert_allclose(of_groups(cfg, **how), OPTIMUM, atol=1e-4)


def root(a, b, c):
    """The one between 0 and 1 of a p^2 + b p + c = 0."""
    return next(float(x) for x in np.roots([a, b, c]) if 0 < x < 1)


def grpo_k3():
    """In a group of two the advantage is +-s, s = 1 / sqrt(2), by which is better: how much does not matter. k3's
    gradient being beta (p - ref), the worst arm ends where -s p (1 - p) = beta (p - ref), the best where s does."""
    s, worst, best = 0.5**0.5, REF[0], REF[2]
    low, high = root(s, -s - BETA, BETA * worst), root(s, BETA - s, -BETA * best)
    return np.asarray([low, 1 - low - high, high])


def tilted(x):
    return REF * np.exp(x) / np.sum(REF * np.exp(x))


MISS = {
    # A group's mean holds the sample itself, so of G samples the reward counts (G - 1) / G, and the KL in the loss all.
    "dr_grpo, k2 in the loss": (
        lambda: of_groups(dataclasses.replace(DR_GRPO, kl=KLTerm("k2", BETA)), 3, beta=0.0, **SMOOTH),
        tilted(R * 2 / 3 / BETA),
    ),
    "grpo, k3 in the loss": (
        lambda: of_groups(dataclasses.replace(ALGORITHMS["grpo"], kl=KLTerm("k3", BETA)), 2, beta=0.0, **SMOOTH),
        grpo_k3(),
    ),
    # As it was published, without any KL: nothing holds it.
    "dapo": (lambda: of_groups(ALGORITHMS["dapo"], beta=0.0, lr=0.1, decay=False, filtered=True), [0, 0, 1]),
    # The optimum, but of another reward: how often an arm is preferred to one drawn evenly (arXiv:2310.12036).
    "ipo": (
        lambda: trained(functools.partial(preferred, cfg=preference.Ipo(BETA)), lr=0.1),
        tilted(np.asarray(bradley_terry(R)).mean(axis=1) / BETA),
    ),
    # Without a reference: the Gibbs policy of the reward alone. (Its gamma is 0 here; what it does is seen below.)
    "simpo": (
        lambda: trained(functools.partial(preferred, cfg=preference.SimPo(BETA, 0.0)), lr=3.0),
        np.exp(R / BETA) / np.sum(np.exp(R / BETA)),
    ),
}


@pytest.mark.parametrize("name", MISS)
def test_ends_elsewhere(name):
    train, ends = MISS[name]
    with doubled():
        p = train()
    np.testing.assert_allclose(p, ends, atol=1e-6)
    assert np.abs(p - OPTIMUM).max() > 0.02


def logit(p):
    return np.log(p / (1 - p))


def simpo_gap(p, gamma):
    """p (1 - sigmoid(h - gamma)) = (1 - p) (1 - sigmoid(-h - gamma)), solved for exp(h)."""
    a, b = 2 * p - 1, np.exp(-gamma)
    return np.log((a + np.sqrt(a**2 + 4 * p * (1 - p) * b**2)) / (2 * (1 - p) * b))


# Of one pair, the better of which is preferred with probability p: beta times the gap that is learned. The optimum's is
# the difference of their rewards, logit(p).
PAIRS = {
    "dpo": (DPO, logit),
    "cdpo": (dataclasses.replace(DPO, label_smoothing=0.1), lambda p: logit(0.8 * p + 0.1)),  # labels toned down
    "ipo": (preference.Ipo(BETA), lambda p: (2 * p - 1) / 2),  # bounded: at most 1 / (2 beta), however sure
    "hinge": (preference.Hinge(BETA), lambda p: 1.0),  # who wins more often, and not by how much
    "simpo": (preference.SimPo(BETA, 1.0), lambda p: simpo_gap(p, 1.0)),  # of log p itself, widened by gamma
}


@pytest.mark.parametrize("better_by", [0.4, 1.3])
@pytest.mark.parametrize("name", PAIRS)
def test_what_a_preference_loss_makes_of_a_pair(name, better_by):
    cfg, gap = PAIRS[name]
    ref, r = np.asarray([0.7, 0.3]), np.asarray([0.0, better_by])
    loss = functools.partial(preferred, r=r, cfg=cfg, ref=ref)
    with doubled():
        p = trained(loss, lr=0.2 if name == "ipo" else 1.0, start=ref, decay=name == "hinge")
    values = np.log(p) if name == "simpo" else np.log(p / ref)
    want = gap(1 / (1 + np.exp(-better_by)))
    assert BETA * (values[1] - values[0]) == pytest.approx(want, abs=1e-3 if name == "hinge" else 1e-6)
    assert (name == "dpo") == (abs(want - better_by) < 0.01)


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


# ------------------------------------------------------------------------------------------------------- the control
COIN = np.asarray([[0.0, 1.0]] * 3)  # for every arm
TOSSED = np.asarray(list(itertools.product([0.0, 1.0], repeat=3)))  # the arms' coins, all equally likely


def by_coin(loss):
    """The mean over all tosses; of a preference loss, the labels are tossed."""
    if "cfg" in getattr(loss, "keywords", {}):
        return functools.partial(loss, wins=lambda r: jnp.full((3, 3), 0.5))
    return lambda logp, old: jnp.mean(jax.vmap(lambda r: loss(logp, old, r))(TOSSED))


@pytest.mark.parametrize("start", [REF, OPTIMUM], ids=["reference", "optimum"])
@pytest.mark.parametrize("name", REACH)
def test_a_coin_for_a_reward_teaches_nothing(name, start):
    """From the reference it does not move; what had been learned is lost again."""
    loss, how = REACH[name]
    with doubled():
        p = trained(by_coin(loss), start=start, **how)
    np.testing.assert_allclose(p, REF, atol=1e-9)
    assert p @ R <= REF @ R + 1e-9


@pytest.mark.parametrize("name", REACH_BY_GROUPS)
def test_a_coin_for_a_reward_teaches_a_group_nothing(name):
    """The coins of a group's samples spread its advantages as any reward would; they favor no arm."""
    cfg, how = REACH_BY_GROUPS[name]
    with doubled():
        begun = of_groups(cfg, r=COIN, steps=30, **how)
        learned = of_groups(cfg, r=COIN, start=OPTIMUM, **how)
    np.testing.assert_allclose(begun, REF, atol=1e-6)
    np.testing.assert_allclose(learned, REF, atol=1e-3)


def test_tossed_coins_move_the_policy_about_but_not_up():
    """Drawn anew for each update, over 200 seeds: each strays, none of it is a gain."""

    def strayed(key):
        def renew(n, logits):
            old = jax.nn.log_softmax(logits)
            r = jax.random.bernoulli(jax.random.fold_in(key, n), shape=(3,)).astype(float)
            return logits - 0.1 * jax.grad(lambda z: with_kl_in_reward(jax.nn.log_softmax(z), old, r))(logits)

        return jax.nn.softmax(jax.lax.fori_loop(0, 500, renew, jnp.log(REF)))

    with doubled():
        p = np.asarray(jax.jit(jax.vmap(strayed))(jax.random.split(jax.random.key(0), 200)))
    gain = p @ R - REF @ R
    assert 0.02 < gain.std() < 0.2
    assert abs(gain.mean()) < 3 * gain.std() / 200**0.5 and gain.mean() < 0.02 * (OPTIMUM - REF) @ R
