"""The sampling filters against naive numpy, and the frequencies of the draw against the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.sample import logits as functions

V = 37
filter_logits, sample, token_logprobs = map(
    jax.jit, (functions.filter_logits, functions.sample, functions.token_logprobs)
)


def naive_filter(logits, k, p, min_p):
    """One row, written out: returns the set of kept ids (logits without ties)."""
    order = np.argsort(-logits, kind="stable")
    if k > 0:
        order = order[:k]
    probabilities = np.exp(logits[order].astype(np.float64) - logits[order].max())
    probabilities /= probabilities.sum()
    kept, total = [], 0.0
    for i, probability in zip(order, probabilities):
        if kept and total >= p and p < 1:
            break
        kept.append(i)
        total += probability
    full = np.exp(logits.astype(np.float64) - logits.max())
    return {i for i in kept if full[i] >= min_p * full.max()}


def rows(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, V)).astype(np.float32) * 2


def test_filters_equal_naive_numpy():
    settings = [
        (k, p, m) for k in (0, 1, 3, V, V + 5) for p in (1e-6, 0.3, 0.9, 0.999, 1.0) for m in (0.0, 0.05, 0.5, 1.0)
    ]
    logits = rows(len(settings))
    k, p, m = (jnp.asarray(x) for x in zip(*settings))
    got = np.asarray(filter_logits(logits, k, p, m))
    for row, kept, setting in zip(logits, got, settings):
        expected = naive_filter(row, *setting)
        assert set(np.flatnonzero(np.isfinite(kept)).tolist()) == expected, setting
        assert all(kept[i] == row[i] for i in expected)  # what stays is untouched


def test_nothing_on_changes_nothing_and_masked_columns_stay_out():
    logits = rows(2)
    logits[:, 30:] = -1e30
    off = filter_logits(jnp.asarray(logits), jnp.zeros(2, int), jnp.ones(2), jnp.zeros(2))
    np.testing.assert_array_equal(off, logits)
    on = filter_logits(jnp.asarray(logits), jnp.full(2, 35), jnp.full(2, 0.999999), jnp.full(2, 1e-9))
    assert np.all(np.isneginf(np.asarray(on)[:, 30:]))


def test_logprobs_are_of_the_temperature_in_use_and_greedy_of_one():
    logits = rows(3)
    temperature = jnp.array([0.0, 1.0, 0.5])
    got = np.asarray(token_logprobs(jnp.asarray(logits), temperature))
    for row, t, values in zip(logits, (1.0, 1.0, 0.5), got):
        scaled = row.astype(np.float64) / t
        np.testing.assert_allclose(values, scaled - np.log(np.exp(scaled).sum()), atol=1e-5)


def chi_square(counts, probabilities):
    """Pearson's statistic over categories with an expectation of at least 5, the rest pooled."""
    expected = probabilities * counts.sum()
    big = expected >= 5
    observed = np.append(counts[big], counts[~big].sum())
    expected = np.append(expected[big], expected[~big].sum())
    keep = expected > 0
    return ((observed[keep] - expected[keep]) ** 2 / expected[keep]).sum(), keep.sum() - 1


@pytest.mark.parametrize(
    ("temperature", "k", "p", "m"),
    [(1.0, 0, 1.0, 0.0), (0.5, 0, 1.0, 0.0), (1.3, 8, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.5, 12, 0.9, 0.1)],
)
def test_sampling_frequencies_follow_the_distribution(temperature, k, p, m):
    N = 20_000
    logits = rows(1, seed=3)[0] / 2
    scaled = logits / np.float32(temperature)
    kept = naive_filter(scaled, k, p, m)
    weights = np.exp(scaled.astype(np.float64))
    weights[[i for i in range(V) if i not in kept]] = 0
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(N))
    full = lambda x: jnp.full((N,), x)  # noqa: E731
    ids, _ = sample(
        keys, jnp.broadcast_to(logits, (N, V)), full(temperature), full(k), full(p), full(m), jnp.ones((N, V), bool)
    )
    statistic, freedom = chi_square(np.bincount(ids, minlength=V), weights / weights.sum())
    assert freedom > 2
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)  # five deviations: a seed's bad luck does not reach it


def test_greedy_takes_the_likeliest_allowed_token_and_forbidden_ones_are_never_drawn():
    logits = jnp.asarray(rows(200, seed=4))
    best = np.argmax(np.asarray(logits), axis=-1)
    allowed = np.ones((200, V), bool)
    allowed[np.arange(200), best] = False
    keys = jax.random.split(jax.random.key(0), 200)
    zeros, ones = jnp.zeros(200), jnp.ones(200)
    ids, logprobs = sample(keys, logits, zeros, zeros.astype(int), ones, zeros, jnp.asarray(allowed))
    second = np.argsort(-np.asarray(logits), axis=-1)[:, 1]
    np.testing.assert_array_equal(ids, second)
    np.testing.assert_allclose(logprobs, np.asarray(jax.nn.log_softmax(logits))[np.arange(200), second], rtol=1e-6)
    drawn, _ = sample(keys, logits, ones, zeros.astype(int), ones, zeros, jnp.asarray(allowed))
    assert not np.any(np.asarray(drawn) == best)


def test_a_draw_is_that_of_jax_and_the_likeliest_that_of_argmax():
    logits_BV = jnp.round(4 * jax.random.normal(jax.random.key(5), (6, 50)))  # with equals
    logits_BV = logits_BV.at[4, 3].set(jnp.nan).at[5].set(functions.REMOVED)
    keys_B, off_B = jax.random.split(jax.random.key(6), 6), jnp.zeros(6)
    warm_B = jnp.asarray([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    ids_B, _ = jax.jit(functions.sample)(keys_B, logits_BV, warm_B, off_B, off_B + 1, off_B)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
    likeliest_B = jnp.argmax(logits_BV, axis=-1)
    np.testing.assert_array_equal(ids_B[:4], jnp.where(warm_B > 0, drawn_B, likeliest_B)[:4])
    np.testing.assert_array_equal(functions.likeliest(logits_BV)[4:], [0, 0])
