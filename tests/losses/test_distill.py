"""Divergences by their definition, their bounds, and columns and positions that must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses import distill
from tests.nn.tiny import doubled

KINDS = (distill.Forward(), distill.Reverse(), distill.JensenShannon(0.5), distill.JensenShannon(0.1))
B, T, V = 2, 3, 5
MASK = np.asarray([[True, True, False], [False, True, True]])


def logits(seed, junk=0.0):
    x = np.random.default_rng(seed).normal(size=(B, T, V)).astype(np.float32)
    return np.where(MASK[..., None], x, np.float32(junk))


def by_definition(kind, student, teacher, temperature):
    s, t = (np.exp(x / temperature) / np.exp(x / temperature).sum(-1, keepdims=True) for x in (student, teacher))

    def kl(p, q):
        return np.sum(p * np.log(p / q), -1)

    match kind:
        case distill.Forward():
            return kl(t, s)
        case distill.Reverse():
            return kl(s, t)
        case distill.JensenShannon(mix=m):
            return m * kl(t, m * t + (1 - m) * s) + (1 - m) * kl(s, m * t + (1 - m) * s)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_the_definition(kind):
    with doubled():
        student, teacher = np.float64(logits(0)), np.float64(logits(1))
        f = jax.jit(lambda s, t, mask, temperature: distill.divergence(kind, s, t, mask, temperature))
        for temperature in (1.0, 2.5):
            want = np.where(MASK, by_definition(kind, student, teacher, temperature), 0)
            np.testing.assert_allclose(f(student, teacher, MASK, temperature), want, rtol=1e-9, atol=1e-15)
        assert f._cache_size() == 1 and (want[MASK] > 0).all()
        np.testing.assert_allclose(f(teacher, teacher, MASK, 1.0), 0, atol=1e-14)
        chunks = [f(student[:, i : i + 1], teacher[:, i : i + 1], MASK[:, i : i + 1], 1.0) for i in range(T)]
        np.testing.assert_allclose(np.concatenate(chunks, 1), f(student, teacher, MASK, 1.0), rtol=1e-12)
        if isinstance(kind, distill.JensenShannon) and kind.mix == 0.5:
            sure = 80 * np.eye(V)[None, :2]
            np.testing.assert_allclose(f(sure, sure[:, ::-1], np.ones((1, 2), bool), 1.0), np.log(2), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS[:3], ids=repr)
def test_masked_positions_and_columns_matter_nowhere(kind):
    def loss(student, teacher):
        each = distill.divergence(kind, student, teacher, MASK, temperature=0.1)
        ((coefficient, total, weight),) = distill.distill_loss(each, MASK, 2.0).values()
        return coefficient * total / weight

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    narrow = run(logits(0), logits(1))
    assert narrow[1][0][MASK].any() and not narrow[1][1].any()  # the teacher is not trained
    for junk in (np.nan, np.inf):
        jax.tree.map(np.testing.assert_array_equal, run(logits(0, junk), logits(1, junk)), narrow)
    for masked_logit in (-np.inf, -1e38):  # the padded vocabulary; divided by the temperature it may overflow
        wide = [np.concatenate([x, np.full((B, T, 2), masked_logit, np.float32)], -1) for x in (logits(0), logits(1))]
        value, (gradient, _) = run(*wide)
        np.testing.assert_allclose(value, narrow[0], rtol=1e-5)
        np.testing.assert_allclose(gradient[..., :V], narrow[1][0], rtol=1e-4, atol=1e-6)
        assert not gradient[..., V:].any()


def test_half_precision_is_widened():
    halves = (jnp.asarray(logits(i), jnp.bfloat16) for i in (0, 1))
    each = jax.eval_shape(lambda s, t: distill.divergence(KINDS[0], s, t, MASK), *halves)
    assert each.dtype == jnp.float32
