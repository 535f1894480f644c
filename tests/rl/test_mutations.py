"""The suite notices each of these wrongs, which public code has had: the check beside a mutation fails on it."""

import types

import pytest

from jaxlm import masked
from jaxlm.losses import policy, preference
from jaxlm.rl import advantage, kl, rewards
from tests.rl import oracles
from tests.rl.mutate import Mutation, assert_caught, assert_harmless, mutated

MUTATIONS = (
    Mutation(
        "the KL in the reward has its sign flipped",
        rewards,
        "return scores - coefficient * kl",
        "return scores + coefficient * kl",
        oracles.rewards_by_hand,
    ),
    Mutation(
        "the KL in the loss has its sign flipped",
        policy,
        "(cfg.kl.coefficient, masked.sum(w * divergence",
        "(cfg.kl.coefficient, -masked.sum(w * divergence",
        oracles.policy_terms,
    ),
    Mutation(
        "the KL is of the reference to the policy",
        kl,
        "masked.wide(logprobs) - masked.wide(other_logprobs)",
        "masked.wide(other_logprobs) - masked.wide(logprobs)",
        oracles.kl_estimators,
    ),
    Mutation("k2 without its half", kl, "0.5 * jnp.square", "jnp.square", oracles.kl_gradients),
    Mutation(
        "the KL controller goes the wrong way",
        kl,
        "observed_kl / controller.target - 1",
        "1 - observed_kl / controller.target",
        oracles.adaptive_kl,
    ),
    Mutation(
        "the KL controller is not held to 20%",
        kl,
        "jnp.clip(observed_kl / controller.target - 1, -0.2, 0.2)",
        "observed_kl / controller.target - 1",
        oracles.adaptive_kl,
    ),
    Mutation(
        "the penalty for a missing stop goes to those who stopped",
        rewards,
        "jnp.where(has_ended, scores, other)",
        "jnp.where(has_ended, other, scores)",
        oracles.missing_stop,
    ),
    Mutation(
        "integer rewards, in the buffer",
        rewards,
        "masked.wide(jnp.where(last, scores_BT, 0))",
        "jnp.where(last, scores_BT, 0).astype(kl_BT.dtype)",
        oracles.rewards_stay_floats,
    ),
    Mutation(
        "the score goes to the last position of a segment, which a tool wrote",
        rewards,
        "    last = masked.last_of_segments(mask_BT, segments_BT)\n    kl, scores",
        "    last = masked.last_of_segments(segments_BT > 0, segments_BT)\n    kl, scores",
        oracles.rewards_by_hand,
    ),
    Mutation(
        "whitening per device",
        masked,
        "center = mean(x, mask)",
        "center = mean(x, mask, axis=1)[:, None]",
        oracles.whitening_is_of_the_whole_batch,
    ),
    Mutation(
        "the mean of per-device means",
        masked,
        "    weight = jnp.sum(mask, axis=axis)\n    return",
        "    weight = jnp.sum(mask, axis=axis)\n    if axis is None:\n"
        "        return jnp.mean(mean(x, mask, axis=1))\n    return",
        oracles.mean_is_over_true_entries,
    ),
    Mutation("whitening drops the mean it should keep", masked, "white + center if keep_mean", "white if keep_mean",
             oracles.whitening),
    Mutation(
        "masked values are multiplied by 0",
        masked,
        "return jnp.sum(jnp.where(mask, x, 0), axis=axis)",
        "return jnp.sum(x * jnp.where(mask, 1.0, 0.0), axis=axis)",
        oracles.policy_terms,
    ),
    Mutation(
        "the loss mask is lost under packing",
        masked,
        "sum(x_BT[..., None], own & mask_BT[..., None], axis=1)",
        "sum(jnp.nan_to_num(x_BT[..., None]), own, axis=1)",
        oracles.last_token_is_the_last_real_one,
    ),
    Mutation("segments are numbered from 0", masked, "jnp.arange(1, count + 1,", "jnp.arange(count,",
             oracles.last_token_is_the_last_real_one),
    Mutation(
        "the score is read at a pad",
        masked,
        "last_of_segments(mask_BT, segments_BT), segments_BT, count)",
        "last_of_segments(jnp.ones_like(mask_BT), jnp.ones_like(segments_BT)), segments_BT + 1, count)",
        oracles.last_token_is_the_last_real_one,
    ),
    Mutation(
        "GAE is carried across tool tokens",
        advantage,
        "masked.next_true(mask_BT, segments_BT)",
        "masked.next_true(jnp.ones_like(mask_BT), segments_BT)",
        oracles.gae_steps_over_tool_tokens,
    ),
    Mutation(
        "GAE discounts at tool tokens",
        advantage,
        "jnp.where(mask_BT, gamma * lam, 1.0)",
        "gamma * lam",
        oracles.gae_steps_over_tool_tokens,
    ),
    Mutation(
        "GAE goes on into the next segment",
        advantage,
        "masked.next_true(mask_BT, segments_BT)",
        "masked.next_true(mask_BT, jnp.ones_like(segments_BT))",
        oracles.gae_ends_with_its_segment,
    ),
    Mutation(
        "groups shuffled",
        advantage,
        "_, at = np.unique(np.asarray(groups_N), return_inverse=True)",
        "_, at = np.unique(np.roll(np.asarray(groups_N), 1), return_inverse=True)",
        oracles.group_advantages,
    ),
    Mutation(
        "groups taken to be contiguous",
        advantage,
        "_, at = np.unique(np.asarray(groups_N), return_inverse=True)",
        "_, at = np.unique(np.sort(np.asarray(groups_N)), return_inverse=True)",
        oracles.group_advantages,
    ),
    Mutation("a constant group is judged by its deviation", advantage, "np.where(valid & (differ > 0), above, 0)",
             "np.where(valid, above, 0)", oracles.constant_groups_get_nothing),
    Mutation(
        "what cannot be scored counts as 0",
        advantage,
        "n = _group_total(at, valid)",
        "n = _group_total(at, np.ones_like(valid))",
        oracles.unscorable_sequences_are_left_out,
    ),
    Mutation("the standard deviation is always the sample's", advantage, "np.maximum(n - choice.ddof, 1)",
             "np.maximum(n - 1, 1)", oracles.group_advantages),
    Mutation("RLOO with the sequence itself", advantage, "above *= n / np.maximum(n - 1, 1)", "above *= 1",
             oracles.group_advantages),
    Mutation("dynamic sampling keeps what has no spread", advantage, "kept = valid & (differ > 0)", "kept = valid",
             oracles.groups_without_spread_are_dropped),
    Mutation(
        "PPO takes the better of the two",
        policy,
        "loss = jnp.maximum(-advantages * rho",
        "loss = jnp.minimum(-advantages * rho",
        oracles.ppo_clip,
    ),
    Mutation("clips change places", policy, "low, high = 1 - ratio.clip_low, 1 + ratio.clip_high",
             "low, high = 1 - ratio.clip_high, 1 + ratio.clip_low", oracles.gspo),
    Mutation("dual clip where the advantage is positive", policy, "jnp.where(advantages < 0, jnp.minimum",
             "jnp.where(advantages > 0, jnp.minimum", oracles.ppo_clip),
    Mutation("GSPO multiplies the ratios", policy, "segments_BT) / jnp.maximum(length, 1), 0)", "segments_BT), 0)",
             oracles.gspo),
    Mutation("CISPO's weight has a gradient", policy, "jax.lax.stop_gradient(jnp.clip(rho, low, high))",
             "jnp.clip(rho, low, high)", oracles.cispo),
    Mutation(
        "every row is one sequence",
        policy,
        "_count(masked.last_of_segments(mask_BT, segments_BT))",
        "_count(jnp.any(mask_BT, axis=1))",
        oracles.aggregation,
    ),
    Mutation("GRPO and Dr. GRPO divide alike", policy,
             "length = aggregation.length if isinstance(aggregation, FixedLength) else 1", "length = 1",
             oracles.aggregation),
    Mutation("the correction is upside down", policy, "kl.log_ratio(old_logprobs_BT, rollout_logprobs_BT, mask_BT)",
             "kl.log_ratio(rollout_logprobs_BT, old_logprobs_BT, mask_BT)", oracles.importance_correction),
    Mutation("the correction is not cut", policy, "stop_gradient(jnp.minimum(ratio, cap))", "stop_gradient(ratio)",
             oracles.importance_correction),
    Mutation("the value loss takes the smaller error", policy, "return jnp.maximum(plain, clipped)",
             "return jnp.minimum(plain, clipped)", oracles.value_clip),
    Mutation("entropy is punished", policy, "(-cfg.entropy,", "(cfg.entropy,", oracles.policy_terms),
    Mutation(
        "prompt tokens unmasked",
        preference,
        "masked.wide(jnp.where(mask_BT, logprobs_BT, 0)), mask_BT,",
        "masked.wide(jnp.nan_to_num(logprobs_BT)), jnp.ones_like(mask_BT),",
        oracles.prompt_tokens_contribute_nothing,
    ),
    Mutation(
        "shift off by one: tokens are scored by the position before",
        preference,
        "masked.wide(jnp.where(mask_BT, logprobs_BT, 0)), mask_BT,",
        "masked.wide(jnp.nan_to_num(jnp.roll(logprobs_BT, 1, axis=1))), mask_BT,",
        oracles.prompt_tokens_contribute_nothing,
    ),
    Mutation("ties count as won", preference, "(ranks_PK[:, :, None] < ranks_PK[:, None, :])",
             "(ranks_PK[:, :, None] <= ranks_PK[:, None, :])", oracles.ties_are_skipped),
    Mutation("the worst comes first", preference, "(ranks_PK[:, :, None] < ranks_PK[:, None, :])",
             "(ranks_PK[:, :, None] > ranks_PK[:, None, :])", oracles.rankings),
    Mutation("pairs count the same, not prompts", preference, "/ jnp.maximum(k * (k - 1) / 2, 1)", "/ 1",
             oracles.prompts_count_the_same),
    Mutation("the margin helps", preference, "log_sigmoid(gap - margin)", "log_sigmoid(gap + margin)",
             oracles.reward_margin),
    Mutation("DPO without its reference", preference, "logprobs - masked.wide(ref_logprobs_PK)", "logprobs",
             oracles.preferences),
    Mutation("label smoothing on one side", preference, "- e * jax.nn.log_sigmoid(-beta * gap)", "",
             oracles.preferences),
    Mutation("SimPO sums", preference, "logprobs / jnp.maximum(lengths_PK, 1)", "logprobs", oracles.preferences),
)  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_is_noticed(mutation):
    assert_caught(mutation)


def test_the_swap_alone_breaks_nothing():
    """Else a mutant could be caught for having been swapped in. One check for each module, to save time."""
    assert_harmless({m.module: m for m in MUTATIONS}.values())


def test_a_mutant_that_is_right_is_not_caught():
    renamed = Mutation("", kl, "return 0.5 * jnp.square(log_ratio)", "return log_ratio**2 / 2", oracles.kl_gradients)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_caught(renamed)


def test_mutations_that_are_none_are_refused():
    with (
        pytest.raises(AssertionError, match="no function"),
        mutated(kl, "horizon: float = 10_000.0", "horizon: float = 1.0"),
    ):
        pass
    with pytest.raises(AssertionError, match="0 places"), mutated(kl, "what nobody wrote", ""):
        pass


def test_a_mutant_is_seen_through_tables_and_goes_away(monkeypatch):
    held = kl.ESTIMATORS["k1"]
    assert isinstance(held, types.FunctionType) and held(3.0) == 3.0
    with mutated(kl, 'only."""\n    return log_ratio', 'only."""\n    return -log_ratio'):
        assert held(3.0) == -3.0
    assert held(3.0) == 3.0
