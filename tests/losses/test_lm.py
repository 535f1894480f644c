"""Chunked log-probabilities against the plain ones, and the loss terms by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses.lm import doubt_loss, lm_loss, token_logprobs
from jaxlm.nn.transformer import Precision, padded_vocab, unembed
from tests.nn.tiny import FAMILIES, doubled, lively

B, T = 3, 11


def case(tied, dtype):
    cfg = dataclasses.replace(FAMILIES["gemma2"], tied=tied, logit_softcap=3.0, precision=Precision(dtype, dtype))
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, cfg.width)), dtype)
    targets = jnp.asarray(rng.integers(0, cfg.vocab_size, (B, T)), jnp.int32)
    weights = [jnp.asarray(rng.normal(size=(B, T)), dtype) for _ in range(2)]
    params = lively(cfg)
    kept = {k: {"embed": params[k]["embed"]} if k == "backbone" else params[k] for k in params}
    return cfg, kept, hidden, targets, weights


def written_out(cfg, params, hidden, targets):
    """Log-softmax by its definition over the real vocabulary."""
    kernel = params["backbone"]["embed"]["tokens"].T if cfg.tied else params["heads"]["lm"]["kernel"]
    logits = 3.0 * jnp.tanh(jnp.einsum("btd,dv->btv", hidden, kernel[:, : cfg.vocab_size]) / 3.0)
    logsumexp = jnp.log(jnp.sum(jnp.exp(logits), -1))
    return jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] - logsumexp, logsumexp


def outcome(score, params, hidden, weights):
    def loss(params, hidden):
        outs = score(params, hidden)
        return sum(jnp.sum(o * w) for o, w in zip(outs, weights)), outs

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, hidden)


@pytest.mark.parametrize("tied", [True, False])
def test_every_chunk_size_gives_the_plain_value_and_gradient(tied):
    with doubled():
        cfg, params, hidden, targets, weights = case(tied, "float64")
        want = outcome(lambda p, h: written_out(cfg, p, h, targets), params, hidden, weights)
        for chunk in (None, 1, 4, 10, 11, 64) if tied else (None, 4):
            got = outcome(lambda p, h, c=chunk: token_logprobs(cfg, p, h, targets, c), params, hidden, weights)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11, err_msg=str(chunk))


def test_temperatures_divide_the_logits_whatever_the_chunk():
    with doubled():
        cfg, params, hidden, targets, _ = case(True, "float64")
        temperature = jnp.linspace(0.3, 2.0, hidden.shape[0] * hidden.shape[1]).reshape(targets.shape)
        logits = unembed(cfg, params, hidden)
        for given in (temperature, temperature[:, :1]):
            logprobs = jax.nn.log_softmax(logits / given[..., None])
            want = jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
            for chunk in (None, 4):
                got = token_logprobs(cfg, params, hidden, targets, chunk, given)[0]
                np.testing.assert_allclose(got, want, rtol=1e-9)


def test_single_precision():
    cfg, params, hidden, targets, weights = case(True, "float32")
    want = outcome(lambda p, h: written_out(cfg, p, h, targets), params, hidden, weights)
    got = outcome(lambda p, h: token_logprobs(cfg, p, h, targets, 4), params, hidden, weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert float(jnp.linalg.norm(a - b)) <= 1e-5 * float(jnp.linalg.norm(b))


def test_half_precision_compute_keeps_float32_scores_and_gradients():
    cfg, params, hidden, targets, weights = case(True, "float32")
    cfg = dataclasses.replace(cfg, precision=Precision(compute="bfloat16"))
    hidden = hidden.astype(jnp.bfloat16)
    (grads, dhidden), (logprobs, logsumexp) = outcome(
        lambda p, h: token_logprobs(cfg, p, h, targets, 2), params, hidden, weights
    )
    assert logprobs.dtype == logsumexp.dtype == grads["backbone"]["embed"]["tokens"].dtype == jnp.float32
    assert dhidden.dtype == jnp.bfloat16


def sizes(jaxpr):
    """Elements of every array that a jaxpr makes, inner ones too."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_the_full_logits_never_exist():
    with doubled():
        cfg, params, hidden, targets, _ = case(True, "float64")
        hidden, targets = jnp.tile(hidden, (1, 30, 1)), jnp.tile(targets, (1, 30))

        def largest(chunk):
            def loss(params, hidden):
                logprobs, logsumexp = token_logprobs(cfg, params, hidden, targets, chunk)
                return jnp.sum(logprobs) + jnp.sum(logsumexp)

            return max(sizes(jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(params, hidden).jaxpr))

        full = B * T * 30 * padded_vocab(cfg)
        assert largest(None) == full
        assert largest(7) < full / 2


def test_padded_columns_get_nothing():
    cfg, params, hidden, targets, weights = case(True, "float32")
    (grads, _), (logprobs, logsumexp) = outcome(
        lambda p, h: token_logprobs(cfg, p, h, targets, 4), params, hidden, weights
    )
    table = np.asarray(grads["backbone"]["embed"]["tokens"])
    assert table[: cfg.vocab_size].any() and not table[cfg.vocab_size :].any()
    real = unembed(cfg, params, hidden)[..., : cfg.vocab_size]
    np.testing.assert_allclose(jnp.exp(real - logsumexp[..., None]).sum(-1), 1, rtol=1e-5)
    assert (np.asarray(logprobs) < 0).all()


def test_terms_by_hand():
    logprobs = jnp.asarray([[-1.0, -2.0, jnp.nan], [-4.0, -jnp.inf, 0.0]])
    logsumexp = jnp.asarray([[1.0, 2.0, jnp.nan], [3.0, jnp.inf, 0.0]])
    mask = jnp.asarray([[True, True, False], [True, False, False]])
    terms = lm_loss(logprobs, logsumexp, mask, 1e-4)
    assert {k: tuple(map(float, v)) for k, v in terms.items()} == {
        "cross_entropy": (1.0, 7.0, 3.0),
        "z_loss": (pytest.approx(1e-4), 14.0, 3.0),
    }
    grad = jax.grad(lambda lp: lm_loss(lp, logsumexp, mask)["cross_entropy"][1])(logprobs)
    np.testing.assert_array_equal(grad, [[-1, -1, 0], [-1, 0, 0]])


def test_the_marker_is_weighed_against_the_best_of_the_others_whatever_the_chunk():
    with doubled():
        cfg, params, hidden, targets, _ = case(True, "float64")
        p, marker = jax.nn.softmax(unembed(cfg, params, hidden)), 5
        others = jnp.delete(p, marker, axis=-1)
        want = jnp.log(p[..., marker] / (1 - p[..., marker])), 1 - jnp.max(others, -1) / jnp.sum(others, -1)
        for chunk in (None, 4):
            *_, logit, doubt = token_logprobs(cfg, params, hidden, targets, chunk, marker=marker)
            np.testing.assert_allclose(logit, want[0], rtol=1e-9)
            np.testing.assert_allclose(doubt, want[1], rtol=1e-9)
            both = token_logprobs(cfg, params, hidden, targets, chunk, entropy=True, marker=marker)
            np.testing.assert_array_equal(both[3], logit)
            np.testing.assert_allclose(both[2], jnp.sum(jax.scipy.special.entr(p), -1), rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_marker_learns_the_doubt_and_the_rest_the_language(scale):
    """Gradient descent on free logits: what comes next is a, b or c, and the best guess is wrong half of the time."""
    share, rest, marker = jnp.array([0.5, 0.3, 0.2]), 3, 3

    def terms(logits):
        z = jnp.broadcast_to(logits, (1, rest, 4))
        logprobs = jax.nn.log_softmax(z)
        total = jax.nn.logsumexp(z[..., :rest], -1)
        doubt = 1 - jnp.exp(z[..., :rest].max(-1) - total)
        mask = jnp.ones((1, rest), bool)
        term = doubt_loss(z[..., marker] - total, doubt, mask, ~mask, mask, scale)
        ce = -jnp.sum(logprobs[0, 0, :rest] * share) * rest
        return (ce + term[1]) / term[2]

    logits = jnp.zeros(4)
    step = jax.jit(lambda x: x - jax.grad(terms)(x))
    for _ in range(3000):
        logits = step(logits)
    p = jax.nn.softmax(logits)
    np.testing.assert_allclose(p[marker], scale * 0.5, atol=1e-4)
    np.testing.assert_allclose(p[:rest] / p[:rest].sum(), share, atol=1e-4)


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_where_nothing_is_scored_the_marker_alone_learns_the_doubt(scale):
    doubt, alone = jnp.array([[0.1, 0.4, 0.9]]), jnp.array([[True, True, False]])
    terms = jax.grad(lambda x: doubt_loss(x, doubt, ~alone, alone, ~alone & False, scale)[1])
    logit = jax.lax.fori_loop(0, 2000, lambda _, x: x - terms(x), jnp.zeros((1, 3)))
    np.testing.assert_allclose(jax.nn.sigmoid(logit), [[scale * 0.1, scale * 0.4, 0.5]], rtol=1e-4)


def test_doubt_counts_where_it_is_learned_and_weighs_as_the_cross_entropy():
    logit, doubt = jnp.array([[1.0, jnp.nan, 3.0, jnp.inf]]), jnp.array([[0.5, 0.1, 0.25, 0.2]])
    where, mask = jnp.array([[True, False, True, True]]), jnp.array([[True, True, True, False]])
    none = jnp.zeros_like(mask)
    assert tuple(map(float, doubt_loss(logit, doubt, where, none, mask, 2.0))) == (1.0, -(1.0 * 1.0 + 0.5 * 3.0), 3.0)
    assert float(doubt_loss(logit, doubt, where, none, mask, 3.0)[1]) == -(
        1.0 * 1.0 + 0.75 * 3.0
    )  # never above certainty
    moved = jax.grad(lambda d: doubt_loss(logit, d, where, none, mask, 2.0)[1])(doubt)
    np.testing.assert_array_equal(moved, jnp.zeros_like(doubt))
