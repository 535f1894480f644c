"""Sequences packed into rows give what they give one to a row, whatever stands in the padding."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import masked, sharding
from jaxlm.losses import policy, preference
from jaxlm.rl import advantage, kl, rewards
from tests.rl import oracles

N, LONGEST = 6, 6
FLOATS = ("logprobs", "old", "ref", "rollout", "entropy", "values", "old_values", "score")
LOSS = policy.PolicyLoss(
    ratio=policy.SequenceRatio(clip_low=0.1, clip_high=0.1),
    value=policy.ValueTerm(),
    kl=policy.KLTerm("k3"),
    entropy=0.01,
    importance_cap=1.5,
)
AGGREGATIONS = [how for how, _ in oracles.AGGREGATED]


def to_tokens(x_BS, segments_BT):
    """To every position what its segment has, 0 at padding."""
    at = jnp.clip(segments_BT - 1, 0, x_BS.shape[1] - 1)
    return jnp.where(segments_BT > 0, jnp.take_along_axis(x_BS, at, axis=1), 0)


def outcome(aggregation, batch):
    """(per batch, per token) of everything that takes segments."""
    segments, f = batch["segments"], {name: batch[name] for name in FLOATS}
    mask = batch["sampled"]
    estimates = kl.estimate("k3", f["old"], f["ref"], mask)
    r = rewards.token_rewards(estimates, f["score"], mask, segments, 0.3)
    advantages, returns = advantage.gae(r, f["old_values"], mask, segments, 0.9, 0.8)
    white = masked.whiten(advantages, mask)

    def loss(live):
        terms, metrics = policy.policy_loss(
            aggregation, live["logprobs"], mask_BT=mask, segments_BT=segments, advantages_BT=white,
            old_logprobs_BT=f["old"], rollout_logprobs_BT=f["rollout"], ref_logprobs_BT=f["ref"],
            entropy_BT=live["entropy"], values_BT=live["values"], old_values_BT=f["old_values"], returns_BT=returns,
        )  # fmt: skip
        return sum(c * s / jnp.maximum(w, 1) for c, s, w in terms.values()), (terms, metrics)

    (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)({k: f[k] for k in ("logprobs", "entropy", "values")})
    count = segments.shape[1]
    per_token = {
        "rewards": r,
        "advantages": advantages,
        "returns": returns,
        "logprob sums": to_tokens(preference.sequence_logprobs(f["logprobs"], mask, segments, count), segments),
        "at last": to_tokens(masked.at_last(f["values"], mask, segments, count), segments),
        "gradient": gradient,
    }
    explained = advantage.explained_variance(f["old_values"], returns, mask)
    weights = [policy.token_weights(how, mask, segments) for how in AGGREGATIONS]
    return (*sums, explained, [w[1] for w in weights]), per_token | {"weights": [w[0] for w in weights]}


compiled = jax.jit(functools.partial(outcome, LOSS))


def arranged(sequences, places, shape):
    """The fields as rows: sequence i at `places[i]` = (row, column, segment); NaN elsewhere."""
    batch = {
        "sampled": np.zeros(shape, bool),
        "segments": np.zeros(shape, np.int32),
    }
    batch |= {name: np.full(shape, np.nan, np.float32) for name in FLOATS}
    for sequence, (row, column, segment) in zip(sequences, places, strict=True):
        at = row, slice(column, column + len(sequence["sampled"]))
        for name, x in sequence.items():
            batch[name][at] = x
        batch["segments"][at] = segment
    return batch


def drawn(length, seed):
    rng = np.random.default_rng(seed)
    out = {name: rng.normal(size=length) for name in FLOATS} | {"score": rng.normal()}
    sampled = (rng.random(length) < 0.7) & (np.arange(length) > 0)
    for name in ("logprobs", "old", "ref", "rollout", "values", "old_values"):  # masked places never matter
        out[name][~sampled] = np.nan
    return out | {"sampled": sampled}


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=N, max_size=N),
    split=st.integers(0, N),
    gap=st.integers(0, 3),
    seed=st.integers(0, 999),
)
def test_packed_is_padded(lengths, split, gap, seed):
    sequences = [drawn(n, [seed, i]) for i, n in enumerate(lengths)]
    alone = [(i, 0, 1) for i in range(N)]
    packed, begins = [], [gap, 0]
    for i, n in enumerate(lengths):
        row = int(i >= split)
        packed.append((row, begins[row], 1 + i - split * row))
        begins[row] += n
    wide, wide_tokens = compiled(arranged(sequences, alone, (N, LONGEST)))
    tight, tight_tokens = compiled(arranged(sequences, packed, (2, N * LONGEST + 3)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), wide, tight)

    def same_places(a, b):
        for n, (ra, ca, _), (rb, cb, _) in zip(lengths, alone, packed):
            np.testing.assert_allclose(a[ra, ca : ca + n], b[rb, cb : cb + n], rtol=2e-4, atol=2e-5)
        assert np.isfinite(a).all() and np.isfinite(b).all()
        assert not b[arranged(sequences, packed, b.shape)["segments"] == 0].any()

    jax.tree.map(same_places, jax.tree.map(np.asarray, wide_tokens), jax.tree.map(np.asarray, tight_tokens))


def test_whitening_is_the_same_on_8_devices():
    x, mask = oracles.ragged()
    rows = NamedSharding(sharding.make_mesh(sharding.MeshConfig(fsdp=8)), PartitionSpec("fsdp"))
    spread = jax.jit(lambda x, mask: masked.whiten(x, mask))(*jax.device_put((x, mask), rows))
    assert len(spread.sharding.device_set) == 8
    oracles.near(spread, masked.whiten(x, mask), 1e-5)
