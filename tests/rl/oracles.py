"""What correct formulas give, as plain functions that raise AssertionError: for the tests, and against mutants.

Numbers are from the papers and programs named, or derived by hand beside them. They call the modules' functions through
the modules, so that a mutant is seen.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import masked
from jaxlm.losses import policy, preference
from jaxlm.rl import advantage, kl, rewards
from tests.nn.tiny import doubled

NAN = float("nan")


def near(got, want, rtol=2e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(got), want, rtol=rtol, atol=atol)


# Rows are of one width, so that few programs are compiled: the rest is padding, and NaN wherever that is possible.
WIDTH = 12


def row(*values, dtype=np.float32, rest=NAN):
    return np.asarray([[*values, *[rest] * (WIDTH - len(values))]], dtype)


def true(*values):
    return row(*values, dtype=bool, rest=False)


def ids(*values):
    return row(*values, dtype=np.int32, rest=0)


def out(*values, rest=0):
    """What is expected: nothing in the padding."""
    return row(*values, rest=rest)


def now(f, *arguments):
    """f(*arguments) as one program, cheaper to compile than its parts, and traced afresh."""
    return jax.jit(lambda *a: f(*a))(*arguments)


def stacked(*columns):
    """[(x, y), ...] of rows -> (x, y) of all rows."""
    return tuple(np.concatenate(x) for x in zip(*columns))


ONES4 = ids(1, 1, 1, 1), true(1, 1, 1, 1)
CHECKS = []


def oracle(check):
    CHECKS.append(check)
    return check


# ----------------------------------------------------------------------------------------------------------- masked
@oracle
def whitening():
    x, mask = row(1, NAN, 2, 3, 4), true(1, 0, 1, 1, 1)
    near(masked.whiten(x, mask), out(-1.3416, 0, -0.4472, 0.4472, 1.3416), atol=1e-4)
    near(masked.whiten(x, mask, keep_mean=True), out(1.1584, 0, 2.0528, 2.9472, 3.8416), atol=1e-4)
    near(masked.whiten(x, mask, ddof=1)[0, 0], -1.1619, atol=1e-4)


def ragged(rows=8, length=5):
    """Rows with more true entries and larger values the further down."""
    rng = np.random.default_rng(0)
    mask = np.arange(length)[None] < np.arange(rows)[:, None] % length + 1
    x = rng.normal(np.arange(rows)[:, None], 1, (rows, length)).astype(np.float32)
    return np.where(mask, x, np.nan), mask


@oracle
def whitening_is_of_the_whole_batch():
    x, mask = ragged()
    all_of_them = x[mask].astype(np.float64)
    near(np.asarray(masked.whiten(x, mask))[mask], (all_of_them - all_of_them.mean()) / all_of_them.std(), 1e-4)


@oracle
def mean_is_over_true_entries():
    """1, 2 on one device and 5 on another: 8/3, where the mean of their means is 3.25."""
    near(masked.mean(np.concatenate([row(1, 2), row(5)]), np.concatenate([true(1, 1), true(1)])), 8 / 3)


@oracle
def last_token_is_the_last_real_one():
    segments, mask = ids(1, 1, 1, 2, 2, 0), true(0, 1, 0, 1, 1, 0)
    x = row(2, 7, NAN, 3, 5, NAN)
    of_mask = (masked.next_true, masked.last_of_segments)
    (at, same), last = now(lambda *a: [f(*a) for f in of_mask], mask, segments)
    near(at, ids(1, 3, 3, 4, *[WIDTH - 1] * 8))
    near(same, true(1, 0, 0, 1))
    near(last, true(0, 1, 0, 0, 1, 0))
    of_segments = (masked.at_last, masked.segment_sum)
    score, total = now(lambda *a: [f(*a, WIDTH) for f in of_segments], x, mask, segments)
    near(score, out(7, 5))
    near(total, out(7, 8))
    near(now(masked.over_segment, x, mask, segments), out(7, 7, 7, 8, 8, 0))


# --------------------------------------------------------------------------------------------------------------- KL
P, Q = np.asarray([0.5, 0.3, 0.2]), np.asarray([0.4, 0.4, 0.2])


@oracle
def kl_estimators():
    """Schulman 2020, on three outcomes."""
    with doubled():
        k = {name: np.asarray(kl.estimate(name, np.log(P), np.log(Q), np.ones(3, bool))) for name in kl.ESTIMATORS}
    near(P @ k["k1"], 0.0252672)
    near(P @ k["k3"], 0.0252672)
    near(P @ k["k2"], 0.0248624)
    near(P @ k["k1"] ** 2 - (P @ k["k1"]) ** 2, 0.04909, 1e-3)
    near(P @ k["k3"] ** 2 - (P @ k["k3"]) ** 2, 0.000255, 2e-3)


@oracle
def kl_gradients():
    """As losses, in the logits, the samples being the policy's own: k2 alone is exact."""

    def expectations(logits):
        p = jax.nn.log_softmax(logits)
        estimates = [P @ kl.estimate(name, p, np.log(Q), np.ones(3, bool)) for name in ("k1", "k2", "k3")]
        return jnp.stack([*estimates, jnp.exp(p) @ (p - np.log(Q))])

    with doubled():
        k1, k2, k3, exact = now(jax.jacobian(expectations), jnp.log(P))
        near(exact, [0.0989, -0.0939, -0.0051], atol=6e-5)
        near(k2, exact, 1e-9, 1e-12)
        near(k1, np.zeros(3), atol=1e-12)
        near(k3, [0.1, -0.1, 0.0], 1e-9, 1e-12)


@oracle
def adaptive_kl():
    """Ziegler et al. 2019: coefficient .15, target 6, 512 sequences, horizon 10,000."""
    for observed, want in ((12.0, 0.151536), (6.0, 0.15), (0.0, 0.148464), (NAN, 0.15)):
        near(kl.next_coefficient(kl.Adaptive(), 0.15, jnp.asarray(observed), 512), want)
    near(kl.next_coefficient(kl.Fixed(0.07), 0.07, 12.0, 512), 0.07)


# ---------------------------------------------------------------------------------------------------------- rewards
@oracle
def rewards_stay_floats():
    segments, mask = ids(1, 2), true(1, 1)
    near(rewards.token_rewards(ids(0, 0), row(0.7, -0.3), mask, segments, 0.1), out(0.7, -0.3))


@oracle
def rewards_by_hand():
    """-coefficient * KL per token, the score on the last one sampled; NaN elsewhere. Sums: score - coefficient * KL."""
    segments, mask = ids(1, 1, 1, 1, 2, 2, 0), true(0, 1, 1, 0, 0, 1, 0)
    estimates, scores = row(NAN, 2, 3, NAN, NAN, -1, NAN), row(5, 5, 5, 5, 7, 7, NAN)
    got = rewards.token_rewards(estimates, scores, mask, segments, 0.1)
    near(got, out(0, -0.2, 5 - 0.3, 0, 0, 7.1, 0))
    near(masked.segment_sum(got, mask, segments, WIDTH), out(5 - 0.1 * 5, 7 + 0.1))


@oracle
def missing_stop():
    scores, ended = row(0.7, 0.7, rest=0), true(1, 0, *[1] * 10)
    near(rewards.for_missing_stop(scores, ended, None), out(0.7, 0.7))
    near(rewards.for_missing_stop(scores, ended, rewards.Replace(-1.0)), out(0.7, -1.0))
    near(rewards.for_missing_stop(scores, ended, rewards.Subtract(1.0)), out(0.7, -0.3))


@oracle
def length_penalty():
    """DAPO: limit 20, buffer 4."""
    near(rewards.soft_length_penalty(np.asarray([0, 16, 17, 18, 20, 50]), 20, 4), [0, 0, -0.25, -0.5, -1, -1])


@oracle
def reward_gain_and_bias():
    near(rewards.gain_and_bias([1, 3, 5]), (0.612372, -1.837117))
    gain, bias = rewards.gain_and_bias([1, 3, 5], mean=2.0, std=0.5)
    out = gain * np.asarray([1, 3, 5]) + bias
    near((out.mean(), out.std()), (2, 0.5))


# ------------------------------------------------------------------------------------------------------- advantages
@oracle
def gae_by_hand():
    r, v = row(0, -0.1, 0, 1), row(0.2, 0.3, 0.4, 0.5)
    segments, mask = ONES4
    for lam, want in ((0.95, (0.618937, 0.54625, 0.575, 0.5)), (1.0, (0.7, 0.6, 0.6, 0.5)), (0.0, (0.1, 0, 0.1, 0.5))):
        a, returns = advantage.gae(r, v, mask, segments, 1.0, lam)
        near(a, out(*want))
        near(returns, out(*want) + out(0.2, 0.3, 0.4, 0.5))
    a, _ = advantage.gae(r, v, mask, segments, 0.5, 1.0)  # 0 - .05 + 0 + .125 - .2, ...
    near(a, out(0.075 - 0.2, 0.15 - 0.3, 0.5 - 0.4, 0.5))


@oracle
def gae_steps_over_tool_tokens():
    """Tokens that a tool wrote, with whatever rewards and values, are as if they were not there."""
    r, v = row(NAN, 0, -0.1, NAN, 9, 0, 1, NAN), row(NAN, 0.2, 0.3, 8, NAN, 0.4, 0.5, 7)
    mask, segments = true(0, 1, 1, 0, 0, 1, 1, 0), ids(1, 1, 1, 1, 1, 1, 1, 1)
    a, returns = advantage.gae(r, v, mask, segments, 1.0, 0.95)
    near(a, out(0, 0.618937, 0.54625, 0, 0, 0.575, 0.5, 0))
    near(returns, out(0, 0.818937, 0.84625, 0, 0, 0.975, 1, 0))


@oracle
def gae_ends_with_its_segment():
    r, v = row(NAN, 0, 1, NAN, NAN, 5, NAN), row(NAN, 0.2, 0.5, NAN, NAN, 3, NAN)
    a, _ = advantage.gae(r, v, true(0, 1, 1, 0, 0, 1, 0), ids(1, 1, 1, 1, 2, 2, 0), 1.0, 1.0)
    near(a, out(0, 0.8, 0.5, 0, 0, 2, 0))


GROUP = [1, 0, 0, 0]
GROUP_ADVANTAGES = (
    (advantage.Grpo(ddof=1), [1.5, -0.5, -0.5, -0.5]),
    (advantage.Grpo(ddof=0), [1.732051, -0.577350, -0.577350, -0.577350]),
    (advantage.Rloo(), [1, -1 / 3, -1 / 3, -1 / 3]),
    (advantage.DrGrpo(), [0.75, -0.25, -0.25, -0.25]),
)


@oracle
def group_advantages():
    """Two groups, mixed: the second is the first times 2 plus 7, in another order."""
    r = np.asarray([1, 7, 0, 9, 0, 7, 7, 0])
    groups = np.asarray([40, 5, 40, 5, 40, 5, 5, 40])
    for choice, want in GROUP_ADVANTAGES:
        scale = 1 if isinstance(choice, advantage.Grpo) else 2
        got = advantage.of_sequences(choice, r, groups, np.ones(8, bool))
        near(got[groups == 40], want)
        near(got[groups == 5], scale * np.asarray(want)[[1, 0, 2, 3]])


@oracle
def unscorable_sequences_are_left_out():
    r, valid = [1, NAN, 0, 0, 0, 3], [True, False, True, True, True, True]
    for choice, want in GROUP_ADVANTAGES:
        got = advantage.of_sequences(choice, r, ["a"] * 5 + ["b"], valid)
        near(got, [want[0], 0, *want[1:], 0])  # the last is alone: nothing to compare with
    near(advantage.of_sequences(advantage.Reinforce(), r[:5], [0] * 5, valid[:5]), [0.75, 0, -0.25, -0.25, -0.25])
    near(advantage.of_sequences(advantage.Reinforce("none"), r, [0] * 6, valid), [1, 0, 0, 0, 0, 3])


@oracle
def constant_groups_get_nothing():
    """Nine times 10.1: the standard deviation is of the order of rounding, and not 0."""
    for number in (10.1, np.float32(10.1), 1 / 3):
        for n in (2, 3, 9, 10):
            r = np.full(n + 2, number)
            for choice, _ in GROUP_ADVANTAGES:
                got = advantage.of_sequences(choice, r, [0] * n + [1, 1], np.ones(n + 2, bool))
                np.testing.assert_array_equal(got, 0)


@oracle
def groups_without_spread_are_dropped():
    """On raw correctness: the shaped rewards would tell every group apart."""
    correct, groups = [1, 1, 0, 1, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2, 3, 3]
    valid = [True] * 7 + [False]
    kept, dropped = advantage.with_spread(correct, groups, valid)
    assert kept.tolist() == [False, False, True, True, False, False, False, False] and dropped == 0.75


# ------------------------------------------------------------------------------------------------------ policy loss
def value_and_gradient(ratio, rho, a):
    """The loss of one token with this ratio and advantage, and its derivative in the ratio."""
    mask, segments = true(1), ids(1)

    def loss(rho):
        logprobs = jnp.full((1, WIDTH), jnp.log(rho))
        return jnp.sum(policy.surrogate(ratio, logprobs, row(0), row(a), mask, segments)[0])

    return jax.value_and_grad(loss)(jnp.float32(rho))


@oracle
def ppo_clip():
    """(ratio, advantage) -> (loss, gradient in the ratio)."""
    for rho, a, loss, slope in ((1.5, 1, -1.2, 0), (1.5, -1, 1.5, 1), (0.5, 1, -0.5, -1), (0.5, -1, 0.8, 0)):
        near(value_and_gradient(policy.TokenRatio(), rho, a), (loss, slope))
    near(value_and_gradient(policy.TokenRatio(), 5, -1), (5, 1))
    near(value_and_gradient(policy.TokenRatio(dual_clip=3.0), 5, -1), (3, 0))
    near(value_and_gradient(policy.TokenRatio(dual_clip=3.0), 2, -1), (2, 1))
    near(value_and_gradient(policy.TokenRatio(dual_clip=3.0), 1.5, 1), (-1.2, 0))
    near(value_and_gradient(policy.ALGORITHMS["dapo"].ratio, 1.5, 1), (-1.28, 0))
    near(value_and_gradient(policy.ALGORITHMS["dapo"].ratio, 0.5, -1), (0.8, 0))


@oracle
def clip_fractions():
    rho, a = row(1.5, 1.5, 0.5, 0.5, 5, 1), row(1, -1, 1, -1, -1, 1)
    args = np.log(rho), 0 * rho, a, true(1, 1, 1, 1, 1, 1), ids(1, 1, 1, 1, 1, 1)
    _, _, below, above = policy.surrogate(policy.TokenRatio(dual_clip=3.0), *args)
    near(below, true(0, 0, 0, 1, 0, 0))
    near(above, true(1, 0, 0, 0, 1, 0))
    _, _, below, above = policy.surrogate(policy.ClippedWeight(clip_low=0.2, clip_high=0.2), *args)
    near(below, true(0, 0, 1, 1, 0, 0))
    near(above, true(1, 1, 0, 0, 1, 0))


@oracle
def cispo():
    """Where PPO's gradient is zero, CISPO's is the clipped weight times that of log p: d log rho = 1 / rho."""
    ratio = policy.ClippedWeight(clip_low=0.2, clip_high=0.2)
    for rho, a, weight in ((1.5, 1, 1.2), (1.5, -1, 1.2), (0.5, -1, 0.8), (1.1, 1, 1.1)):
        near(value_and_gradient(ratio, rho, a), (-a * weight * np.log(rho), -a * weight / rho))


@oracle
def score_function():
    near(value_and_gradient(policy.ScoreFunction(), 1.5, 2), (-2 * np.log(1.5), -2 / 1.5))


@oracle
def gspo():
    """The geometric mean of the ratios, 1.10517, clipped to within 3e-4 and 4e-4; every token has its gradient."""
    mask, segments = true(0, 1, 1, 1, 1), ids(1, 1, 1, 1, 2)
    logprobs, old = row(NAN, 0.1, -0.2, 0.4, 0.5), row(NAN, 0, 0, 0, 0.5)

    def loss(logprobs, a, ratio):
        each, rho, _, _ = policy.surrogate(ratio, logprobs, old, a, mask, segments)
        w, weight = policy.token_weights(policy.SequenceMean(), mask, segments)
        return masked.sum(w * each, mask) / weight, rho

    wide = policy.SequenceRatio(clip_low=0.5, clip_high=0.5)
    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    (value, rho), slope = grad(logprobs, row(1, 1, 1, 1, 3), wide)
    near(rho, out(1, 1.10517, 1.10517, 1.10517, 1, rest=1))
    near(value, -(1.10517 + 3) / 2)
    near(slope, out(0, -1.10517 / 6, -1.10517 / 6, -1.10517 / 6, -1.5))
    (value, _), slope = grad(logprobs, row(1, 1, 1, 1, 3), policy.SequenceRatio())
    near(value, -(1.0004 + 3) / 2)
    near(slope, out(0, 0, 0, 0, -1.5))
    (value, _), _ = grad(-logprobs, row(-1, -1, -1, -1, 0), policy.SequenceRatio())
    near(value, 0.9997 / 2)


AGGREGATED = (
    (policy.SequenceMean(), 2.0),
    (policy.TokenMean(), 2.5),
    (policy.SequenceSum(), 5.0),
    (policy.FixedLength(length=4.0), 1.25),
)


@oracle
def aggregation():
    """Token losses [[1], [3, 3, 3]], one sequence a row and both in one."""
    padded = stacked((row(NAN, 1), true(0, 1), ids(1, 1)), (row(NAN, 3, 3, 3), true(0, 1, 1, 1), ids(1, 1, 1, 1)))
    packed = row(NAN, 1, 3, NAN, 3, 3), true(0, 1, 1, 0, 1, 1), ids(1, 1, 2, 2, 2, 2)

    def aggregates(losses, mask, segments):
        parts = [policy.token_weights(how, mask, segments) for how, _ in AGGREGATED]
        return [masked.sum(w * losses, mask) / weight for w, weight in parts]

    for batch in (padded, packed):
        near(now(aggregates, *batch), [want for _, want in AGGREGATED])


@oracle
def importance_correction():
    old, rollout, mask = row(-1, -2, -0.5, NAN), row(-1.2, -3, -0.5, NAN), true(1, 1, 1, 0)
    near(policy.importance_weights(old, rollout, mask, 1e9), out(1.2214, 2.7183, 1, rest=1), atol=5e-5)
    near(policy.importance_weights(old, rollout, mask, 2.0), out(1.2214, 2, 1, rest=1), atol=5e-5)


@oracle
def value_clip():
    """The larger of the two errors: a move beyond the clip is no gain towards the return, and no less a loss away."""
    values, old, returns = row(1, -1, 0.1, NAN), row(0, 0, 0, NAN), row(1, 1, 1, NAN)
    error, clipped = policy.value_error(values, old, returns, true(1, 1, 1, 0), 0.2)
    near(error, out(0.5 * 0.8**2, 0.5 * 4, 0.5 * 0.81, 0))
    near(clipped, true(1, 0, 0, 0))
    near(policy.value_error(values, old, returns, true(1, 1, 1, 0), None)[0], out(0, 2, 0.405, 0))


@oracle
def policy_terms():
    """All terms of the loss by hand, prompt and padding being NaN."""
    cfg = policy.PolicyLoss(
        ratio=policy.TokenRatio(),
        aggregation=policy.SequenceMean(),
        value=policy.ValueTerm(coefficient=0.1, clip=0.2),
        kl=policy.KLTerm("k1", 0.03),
        entropy=0.01,
        importance_cap=2.0,
    )
    batch = dict(
        logprobs_BT=row(NAN, np.log(1.5), 0, np.log(0.5), NAN),
        mask_BT=true(0, 1, 1, 1, 0),
        segments_BT=ids(1, 1, 1, 2, 0),
        advantages_BT=row(NAN, 1, -2, 1, NAN),
        old_logprobs_BT=row(NAN, 0, 0, 0, NAN),
        rollout_logprobs_BT=row(NAN, -np.log(3), 0, 0, NAN),
        ref_logprobs_BT=row(NAN, 1, 2, 3, NAN),
        entropy_BT=row(NAN, 1, 3, 5, NAN),
        values_BT=row(NAN, 1, 0, 0, NAN),
        old_values_BT=row(NAN, 0, 0, 0, NAN),
        returns_BT=row(NAN, 1, 0, 1, NAN),
    )
    terms, metrics = now(lambda batch: policy.policy_loss(cfg, **batch), batch)
    want = {
        "policy": (1.0, (-1.2 * 2 + 2) / 2 - 0.5, 2.0),
        "kl": (0.03, (np.log(1.5) - 1 - 2) / 2 + np.log(0.5) - 3, 2.0),
        "entropy": (-0.01, 2 + 5, 2.0),
        "value": (0.1, 0.32 + 0 + 0.5, 3.0),
    }
    assert terms.keys() == want.keys()
    for name, term in want.items():
        near(np.asarray([float(x) for x in terms[name]]), term)
    near(metrics["clip_fraction_high"], (1, 3))
    near(metrics["clip_fraction_low"], (0, 3))
    near(metrics["ratio_deviation"], (0.5 + 0 + 0.5, 3))
    near(metrics["importance_capped"], (1, 3))
    near(metrics["approximate_kl"][0], 0.5 - np.log(1.5) + -0.5 - np.log(0.5))
    near(metrics["ratio_histogram/0.99_1.01"], (1, 3))


# ------------------------------------------------------------------------------------------------------ preferences
PAIR = ids(0, 1), true(1, 1)
SCORES, RANKS, ALL = row(2, 1, 0, -1), ids(0, 1, 2, 3), true(1, 1, 1, 1)
RANKINGS = (
    (lambda *a: preference.bradley_terry(*a)[0], 0.207038, np.log(2)),
    (preference.plackett_luce, 1.161057, np.log(24)),
    (preference.best_of_k, 0.440190, np.log(4)),
)


def only(terms):
    ((coefficient, total, weight),) = terms.values()
    return coefficient * total / weight


def losses_and_weights(loss, *prompts):
    """Of each prompt (scores, ranks, present) by itself."""

    def one(*prompt):
        ((_, total, weight),) = loss(*(x[None] for x in prompt)).values()
        return total, weight

    return now(jax.vmap(one), *stacked(*prompts))


@oracle
def rankings():
    """r = [2, 1, 0, -1] as ranked, in any order, with a missing one; K = 2; all equal; gradients sum to 0."""
    order = [2, 0, 3, 1, *range(4, WIDTH)]
    cases = (
        (SCORES, RANKS, ALL),
        (SCORES[:, order], RANKS[:, order], ALL),
        (row(2, NAN, 1, 0, -1), ids(5, 0, 6, 8, 9), true(1, 0, 1, 1, 1)),
        (row(1.8, 0.5), *PAIR),
        (row(0, 0, 0, 0), RANKS, ALL),
    )
    for loss, want, at_zero in RANKINGS:
        each, weights = losses_and_weights(loss, *cases)
        near(each, [want, want, want, 0.241008, at_zero])
        near(weights, np.ones(5))
        gradient = now(jax.grad(lambda r, loss=loss: only(loss(r, RANKS, ALL))), SCORES)
        near(jnp.sum(gradient), 0)
        assert gradient[0, 0] < 0 < gradient[0, 3] and not gradient[0, 4:].any()


@oracle
def ties_are_skipped():
    """Ranks [0, 0, 1]: the pairs (0, 2) and (1, 2) of the three; nothing where all are tied, or alone."""
    r, three = row(2, 5, 1), true(1, 1, 1)
    first, second = np.log1p(np.exp(-1)), np.log1p(np.exp(-4))
    for (loss, _, _), share in zip(RANKINGS, (3, 1, 2)):
        cases = (r, ids(0, 0, 1), three), (r, ids(4, 4, 4), three), (r, ids(0, 1, 2), true(0, 1, 0))
        each, weights = losses_and_weights(loss, *cases)
        near(each, [(first + second) / share, 0, 0])
        near(weights, [1, 0, 0])


@oracle
def a_pair_weighs_the_same_whatever_is_tied_beside_it():
    """Of four completions three are tied: three pairs of six are left, and each weighs a sixth as ever."""
    told, tied = ids(0, 1, 2, 3), ids(0, 1, 1, 1)

    def total(r, ranks):
        ((_, total, _),) = preference.bradley_terry(r, ranks, ALL)[0].values()
        return total

    at_zero = now(jax.vmap(lambda ranks: total(row(0, 0, 0, 0), ranks[None])), np.concatenate((told, tied)))
    near(at_zero, np.log(2) * np.array([1, 3 / 6]))
    alone = ids(0, 1, 9, 9), true(1, 1, 0, 0)
    pair = now(jax.grad(lambda r: preference.bradley_terry(r, *alone)[0]["bradley_terry"][1]), SCORES)
    three = now(jax.grad(lambda r: total(r, tied)), row(2, 1, -99, -99))  # those far behind pull at nothing
    near(three[0, :2], pair[0, :2] / 6)


@oracle
def prompts_count_the_same():
    """Prompts of 4 and of 2 completions: the mean of their means."""
    prompts = stacked((SCORES, RANKS, ALL), (row(1.8, 0.5), *PAIR))
    near(now(lambda *a: only(preference.bradley_terry(*a)[0]), *prompts), (0.207038 + 0.241008) / 2)


@oracle
def reward_margin():
    near(only(preference.bradley_terry(row(1.8, 0.5), *PAIR, margin=1.3)[0]), np.log(2))


PREFERENCES = (
    (preference.Dpo(), 0.620957),
    (preference.Dpo(label_smoothing=0.1), 0.635957),
    (preference.Ipo(), 12.25),
    (preference.Hinge(), 0.85),
)


@oracle
def preferences():
    """log p = -10, -12 and reference -11, -11.5: a gap of 1.5. SimPO by hand: lengths 5 and 4, 2 * (-2 + 3) - 1 = 1."""
    logprobs, ref = row(-10, -12), row(-11, -11.5)
    for cfg, want in PREFERENCES:
        near(only(preference.preference_loss(cfg, logprobs, ref, None, *PAIR)[0]), want)
    simpo = preference.preference_loss(preference.SimPo(), logprobs, None, ids(5, 4), *PAIR)[0]
    near(only(simpo), np.log1p(np.exp(-1)))
    at_reference, metrics = preference.preference_loss(preference.Dpo(), ref, ref, None, *PAIR)
    near(only(at_reference), np.log(2))
    near(metrics["accuracy"], (0.5, 1))
    _, metrics = preference.preference_loss(preference.Dpo(), logprobs, ref, None, *PAIR)
    near([metrics[k][0] for k in ("accuracy", "margin", "chosen", "rejected")], (1, 1.5, 1, -0.5))


@oracle
def prompt_tokens_contribute_nothing():
    """logprobs[t] scores the token at t: the sum is over the response's own positions."""
    segments, mask = ids(1, 1, 1, 1, 2, 2, 0), true(0, 0, 1, 1, 0, 1, 0)
    got = preference.sequence_logprobs(row(-100, NAN, -1, -2, -50, -4, NAN), mask, segments, WIDTH)
    near(got, out(-3, -4))
