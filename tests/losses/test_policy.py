"""The policy loss: masked entries never matter, coefficients are traced, microbatches add up.

The numbers themselves are in tests/rl/oracles.py.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.losses import policy
from jaxlm.rl.advantage import Gae

B, T = 4, 6
SEGMENTS = np.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0], [1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 0, 0]], np.int32)
MASK = np.asarray([[0, 1, 1, 0, 0, 1], [0, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0]], bool)
FULL = policy.PolicyLoss(
    ratio=policy.TokenRatio(dual_clip=3.0), aggregation=policy.SequenceMean(), value=policy.ValueTerm(),
    kl=policy.KLTerm("k3"), entropy=0.01, importance_cap=2.0,
)  # fmt: skip
NAMES = ("old_logprobs_BT", "rollout_logprobs_BT", "ref_logprobs_BT", "old_values_BT", "returns_BT", "advantages_BT")
LIVE = ("logprobs_BT", "entropy_BT", "values_BT")


def arrays(junk=np.nan, rows=slice(None), scale=0.3):
    rng = np.random.default_rng(0)
    drawn = {n: (scale * rng.normal(size=(B, T))).astype(np.float32) for n in (*NAMES, *LIVE)}
    drawn = {n: np.where(MASK, x, np.float32(junk))[rows] for n, x in drawn.items()}
    return {n: drawn[n] for n in LIVE}, {n: drawn[n] for n in NAMES} | {
        "mask_BT": MASK[rows],
        "segments_BT": SEGMENTS[rows],
    }


def total(cfg, live, batch):
    terms, metrics = policy.policy_loss(cfg, live["logprobs_BT"], **{k: live[k] for k in LIVE[1:]}, **batch)
    return sum(c * s / w for c, s, w in terms.values()), (terms, metrics)


def outcome(cfg, *args):
    return jax.jit(jax.value_and_grad(lambda *a: total(cfg, *a), has_aux=True))(*args)


@pytest.mark.parametrize("name", ["reinforce", "dr_grpo", "gspo", "cispo", "with everything"])
def test_masked_entries_reach_neither_value_nor_gradient(name):
    cfg = policy.ALGORITHMS.get(name, FULL)
    run = jax.jit(jax.value_and_grad(lambda *a: total(cfg, *a), has_aux=True))
    first, *others = (run(*arrays(junk)) for junk in (0.0, np.nan, np.inf, -1e30))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, first)
    (value, (terms, metrics)), gradient = first
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, terms, metrics, gradient)))
    assert gradient["logprobs_BT"][MASK].any() and not gradient["logprobs_BT"][~MASK].any()
    assert not terms.keys() & metrics.keys()


def test_microbatches_add_up():
    """Sums, weights and metrics of two halves are those of the whole; but the largest ratio is each half's own."""
    (_, (terms, metrics)), _ = outcome(FULL, *arrays())
    halves = [outcome(FULL, *arrays(rows=slice(i, None, 2)))[0][1] for i in range(2)]
    for name, (coefficient, *sums) in terms.items():
        np.testing.assert_allclose(sum(np.asarray(h[0][name][1:]) for h in halves), sums, rtol=1e-5, err_msg=name)
        assert all(float(h[0][name][0]) == float(coefficient) for h in halves)
    metrics.pop("ratio_deviation_max")
    for name, pair in metrics.items():
        parts = sum(np.asarray(h[1][name]) for h in halves)
        np.testing.assert_allclose(parts, np.asarray(pair), rtol=1e-5, atol=1e-6, err_msg=name)


def test_settings_are_traced():
    """One program for any coefficient, clip range, cap or length."""
    cfg = dataclasses.replace(FULL, aggregation=policy.FixedLength(7.0))
    floats = {path: value for path, value in config.leaves(cfg).items() if type(value) is float}
    assert {"ratio.clip_low", "ratio.dual_clip", "aggregation.length", "value.clip", "kl.coefficient", "entropy",
            "importance_cap"} <= floats.keys()  # fmt: skip
    live, batch = arrays(scale=1.0)
    traced = jax.jit(lambda hyper: total(config.replace_leaves(cfg, hyper), live, batch)[0])
    first = traced(floats)
    np.testing.assert_allclose(first, outcome(cfg, live, batch)[0][0], rtol=1e-5)
    for path in floats:
        assert float(traced(floats | {path: 0.5 * floats[path]})) != float(first), path
    assert traced._cache_size() == 1


def test_the_first_update_is_on_policy():
    """With old log-probabilities left out or the same: ratio 1, a loss of minus the mean advantage, a live gradient."""
    live, batch = arrays()
    mean = batch["advantages_BT"][MASK].mean()
    for old in (None, live["logprobs_BT"]):
        (value, (_, metrics)), gradient = outcome(policy.ALGORITHMS["dapo"], live, batch | {"old_logprobs_BT": old})
        assert float(value) == pytest.approx(-mean, rel=1e-5)
        assert float(metrics["ratio_deviation_max"][0]) == float(metrics["approximate_kl"][0]) == 0
        want = np.where(MASK, -batch["advantages_BT"] / MASK.sum(), 0)
        np.testing.assert_allclose(gradient["logprobs_BT"], want, rtol=1e-5)


def test_extreme_ratios_stay_finite():
    """log-ratios of +-1000: exp would overflow, and its gradient under a clip be 0 * inf."""
    live, batch = arrays()
    for ratio in (policy.TokenRatio(), policy.SequenceRatio(), policy.ClippedWeight()):
        cfg = policy.PolicyLoss(ratio=ratio, kl=policy.KLTerm("k3"))
        run = jax.jit(jax.value_and_grad(lambda *a, cfg=cfg: total(cfg, *a)[0]))
        for sign in (1, -1):
            far = live["logprobs_BT"] + sign * 1000 * np.sign(batch["advantages_BT"])
            value, gradient = run(live, batch | {"old_logprobs_BT": far, "ref_logprobs_BT": far})
            assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradient.values())


def test_half_precision_input_is_widened():
    live, batch = arrays(scale=1.0)
    halves = {k: jnp.asarray(x, jnp.bfloat16) for k, x in (live | batch).items() if x.dtype == np.float32}
    halves = {k: halves[k] for k in LIVE}, batch | {k: halves[k] for k in NAMES}
    _, (terms, metrics) = jax.eval_shape(lambda *a: total(FULL, *a), *halves)
    assert all(x.dtype == jnp.float32 for _, *pair in terms.values() for x in pair)
    assert all(x.dtype == jnp.float32 for pair in metrics.values() for x in pair)


def test_the_histogram_is_of_all_tokens():
    (_, (_, metrics)), _ = outcome(FULL, *arrays(scale=1.0))
    bins = {k: float(v[0]) for k, v in metrics.items() if k.startswith("ratio_histogram/")}
    assert len(bins) == len(policy.RATIO_EDGES) + 1 and sum(bins.values()) == MASK.sum()
    assert sum(n > 0 for n in bins.values()) > 3
    assert all(re.fullmatch(r"ratio_histogram/[\d.]+_([\d.]+|inf)", name) for name in bins)


def test_what_is_missing_or_misshapen_is_named():
    live, batch = arrays()
    for name, needs in (("ref_logprobs_BT", "kl"), ("rollout_logprobs_BT", "importance_cap"), ("returns_BT", "value")):
        cfg = dataclasses.replace(policy.PolicyLoss(), **{needs: getattr(FULL, needs)})
        with pytest.raises(ValueError, match=f"needs {name}"):
            total(cfg, live, batch | {name: None})
    with pytest.raises(ValueError, match=re.escape("advantages_BT is (6,), where logprobs_BT is (4, 6)")):
        total(FULL, live, batch | {"advantages_BT": np.zeros(6, np.float32)})


def test_the_table_is_of_distinct_valid_configurations():
    assert len(set(policy.ALGORITHMS.values())) == len(policy.ALGORITHMS) == 8
    for name, cfg in policy.ALGORITHMS.items():
        config.check(cfg)
        assert (cfg.value is not None) == isinstance(cfg.advantage, Gae), name
        assert config.from_json(policy.PolicyLoss, config.to_json(cfg)) == cfg
