"""Missing completions never matter, gradients point the right way. The numbers are in tests/rl/oracles.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses import preference
from tests.nn.tiny import doubled

P, K = 3, 4
PRESENT = np.asarray([[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]], bool)
RANKS = np.asarray([[2, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], np.int32)
LENGTHS = np.asarray([[3, 2, 4, 1], [5, 0, 2, 0], [3, 0, 0, 0]], np.int32)
OFFLINE = (
    preference.Dpo(),
    preference.Dpo(label_smoothing=0.2),
    preference.Ipo(),
    preference.Hinge(),
    preference.SimPo(),
)
LOSSES = {
    "bradley_terry": lambda x: preference.bradley_terry(x, RANKS, PRESENT, margin=0.3),
    "plackett_luce": lambda x: (preference.plackett_luce(x, RANKS, PRESENT), {}),
    "best_of_k": lambda x: (preference.best_of_k(x, RANKS, PRESENT), {}),
} | {
    repr(cfg): lambda x, cfg=cfg: preference.preference_loss(cfg, x, 0.5 * x + 1, LENGTHS, RANKS, PRESENT)
    for cfg in OFFLINE
}


def values(junk):
    x = np.random.default_rng(1).normal(size=(P, K)).astype(np.float32)
    return np.where(PRESENT, x, np.float32(junk))


@pytest.mark.parametrize("name", LOSSES)
def test_missing_completions_reach_neither_value_nor_gradient(name):
    def loss(x):
        terms, metrics = LOSSES[name](x)
        ((coefficient, total, weight),) = terms.values()
        return coefficient * total / weight, (weight, metrics)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    first, *others = (run(values(junk)) for junk in (0.0, np.nan, np.inf))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, first)
    (value, (weight, _)), gradient = first
    assert np.isfinite(value) and float(weight) == 2  # the third prompt has nothing to compare
    assert np.isfinite(gradient).all() and not gradient[~PRESENT].any() and not gradient[2].any()
    assert gradient[0, 1] < 0 < gradient[0, 0]  # the best goes up, the worst down


def test_the_gradient_of_dpo_is_its_closed_form():
    """-beta * sigmoid(-beta * gap) for the chosen, the opposite for the rejected (arXiv:2305.18290, section 4)."""
    with doubled():
        x, ref = jnp.asarray([[-10.0, -12.0]]), jnp.asarray([[-11.0, -11.5]])
        ranks, present = np.asarray([[0, 1]]), np.ones((1, 2), bool)

        def loss(x, beta):
            cfg = preference.Dpo(beta=beta)
            ((_, total, _),) = preference.preference_loss(cfg, x, ref, None, ranks, present)[0].values()
            return total

        gradient = jax.jit(jax.grad(loss))
        for beta in (0.1, 0.7):
            want = -beta / (1 + np.exp(beta * 1.5))
            np.testing.assert_allclose(gradient(x, beta), [[want, -want]], rtol=1e-9)
        assert gradient._cache_size() == 1


def test_two_completions_of_plackett_luce_are_bradley_terry():
    x, present = values(0.0)[:, :2], np.ones((P, 2), bool)
    ranks = np.asarray([[0, 1], [1, 0], [3, 3]])
    losses = (lambda *a: preference.bradley_terry(*a)[0]), preference.plackett_luce, preference.best_of_k
    first, *others = jax.jit(lambda *a: [next(iter(loss(*a).values())) for loss in losses])(x, ranks, present)
    assert float(first[2]) == 2
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-5)


def test_label_smoothing_of_a_half_says_nothing():
    gap = jnp.linspace(-3.0, 3.0, 7)
    loss = preference.pair_loss(preference.Dpo(label_smoothing=0.5), gap)
    np.testing.assert_allclose(loss, loss[::-1], rtol=1e-6)
