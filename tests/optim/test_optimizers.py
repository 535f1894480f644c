"""Optimizers against first steps worked out by hand, and the rules that follow logical axes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.optim.optimizers import Adafactor, AdamW, Lion, Muon, build, decays, matrix_dims
from jaxlm.optim.schedules import Constant

AXES = {
    "embed": ("vocab", "embed"),
    "q": ("layers", "embed", "heads", "head_width"),
    "q_bias": ("layers", "heads", "head_width"),
    "out": ("layers", "heads", "head_width", "embed"),
    "gate": ("layers", "embed", "hidden"),
    "norm": ("layers", "embed"),
}
SHAPES = {
    "embed": (6, 4),
    "q": (2, 4, 2, 2),
    "q_bias": (2, 2, 2),
    "out": (2, 2, 2, 4),
    "gate": (2, 4, 8),
    "norm": (2, 4),
}


@pytest.fixture(scope="module")
def params():
    return {k: jax.random.normal(jax.random.key(i), s) for i, (k, s) in enumerate(SHAPES.items())}


@pytest.fixture(scope="module")
def grads():
    return {k: jax.random.normal(jax.random.key(10 + i), s) for i, (k, s) in enumerate(SHAPES.items())}


def first_update(cfg, params, grads):
    tx = build(cfg, AXES, 0, 10)
    return tx.update(grads, tx.init(params), params)[0]


def test_only_projections_and_embeddings_decay():
    assert {k for k, a in AXES.items() if decays(a)} == {"embed", "q", "out", "gate"}


def test_matrices_for_muon_are_the_projections_of_blocks():
    dims = {k: matrix_dims(a) for k, a in AXES.items() if matrix_dims(a)}
    assert {k: (d.reduction_axis, d.output_axis) for k, d in dims.items()} == {
        "q": ((1,), (2, 3)),
        "out": ((1, 2), (3,)),
        "gate": ((1,), (2,)),
    }


def test_adamw_first_step_is_the_sign_of_the_gradient_and_the_decay(params, grads):
    cfg = AdamW(lr=0.1, weight_decay=0.5, eps=1e-12, schedule=Constant())
    got = first_update(cfg, params, grads)
    for k in AXES:
        decay = 0.5 * params[k] if decays(AXES[k]) else 0.0
        np.testing.assert_allclose(got[k], -0.1 * (jnp.sign(grads[k]) + decay), rtol=1e-5, atol=1e-7)


def test_adam_epsilon_stands_outside_the_bias_corrected_root():
    """A first step where the gradient is as small as epsilon: .5 lr here, as in torch, where TensorFlow goes .03065 lr.

    Its epsilon stands beside the root before that is corrected for its bias (Kingma and Ba 2014, end of section 2), so
    it is larger by 1 / sqrt(1 - b2^t): settings copied from a program in TensorFlow need a smaller one here.
    """
    lr, b1, b2, eps, g, t = 1.0, 0.9, 0.999, 1e-5, 1e-5, 1
    m, v = (1 - b1) * g, (1 - b2) * g**2
    torch = lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)) ** 0.5 + eps)
    tensorflow = lr * (1 - b2**t) ** 0.5 / (1 - b1**t) * m / (v**0.5 + eps)
    assert torch == pytest.approx(0.5) and tensorflow == pytest.approx(0.03065, abs=5e-6)
    p, gradient = {"w": jnp.zeros(1)}, {"w": jnp.full(1, g)}

    def step(eps):
        cfg = AdamW(lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=0.0, schedule=Constant())
        tx = build(cfg, {"w": ("embed",)}, 0, 10)
        return -float(tx.update(gradient, tx.init(p), p)[0]["w"][0])

    assert step(eps) == pytest.approx(torch, rel=1e-4)
    assert step(eps / (1 - b2**t) ** 0.5) == pytest.approx(tensorflow, rel=1e-4)


def test_lion_first_step_is_the_sign(params, grads):
    got = first_update(Lion(lr=0.1, weight_decay=0.0, schedule=Constant()), params, grads)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.1 * jnp.sign(g), rtol=1e-6), got, grads)


def test_muon_orthogonalizes_each_layer_and_leaves_the_rest_to_adam(params, grads):
    rest = AdamW(lr=0.1, weight_decay=0.0, eps=1e-12, schedule=Constant())
    got = first_update(Muon(lr=1.0, schedule=Constant(), iterations=9, rest=rest), params, grads)
    for k in ("embed", "q_bias", "norm"):
        np.testing.assert_allclose(got[k], -0.1 * jnp.sign(grads[k]), rtol=1e-5)
    for k, shape, scale in [("q", (4, 4), 1.0), ("out", (4, 4), 1.0), ("gate", (4, 8), 2**0.5)]:
        for layer in range(2):
            u = np.asarray(got[k][layer]).reshape(shape) / scale
            singular = np.linalg.svd(u, compute_uv=False)
            assert singular.min() > 0.6 and singular.max() < 1.3  # the quintic's band around 1
            left, _, right = np.linalg.svd(np.asarray(grads[k][layer]).reshape(shape), full_matrices=False)
            assert np.sum(-u * (left @ right)) > 0.97 * np.linalg.norm(u) * 2


def test_adafactor_clips_the_root_mean_square_of_its_update(params, grads):
    got = first_update(Adafactor(lr=0.1, clip=1.0, schedule=Constant()), params, grads)
    for u in jax.tree.leaves(got):
        assert float(jnp.sqrt(jnp.mean(u**2))) <= 0.1001


@pytest.mark.parametrize("cfg", [AdamW(), Muon(), Lion(), Adafactor()], ids=lambda c: type(c).__name__)
def test_traced_settings_give_the_same_update_as_constants(cfg, params, grads):
    hyper = {p: v for p, v in config.leaves(cfg).items() if type(v) is float}
    tx = build(cfg, AXES, 3, 10)
    state = tx.init(params)

    @jax.jit
    def traced(hyper, step):
        return build(config.replace_leaves(cfg, hyper), AXES, step, 10).update(grads, state, params)[0]

    expected = jax.jit(lambda: tx.update(grads, state, params)[0])()
    got = traced(hyper, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-8), got, expected)


@pytest.mark.parametrize("cfg", [AdamW(), Muon(), Lion(), Adafactor()], ids=lambda c: type(c).__name__)
def test_each_optimizer_goes_down_a_quadratic(cfg, params):
    cfg = dataclasses.replace(cfg, lr=0.05, weight_decay=0.0, schedule=Constant())
    if isinstance(cfg, Muon):
        cfg = dataclasses.replace(cfg, rest=AdamW(lr=0.05, weight_decay=0.0, schedule=Constant()))
    tx = build(cfg, AXES, 0, 10)

    def step(carry, _):
        p, s = carry
        u, s = tx.update(p, s, p)  # the gradient of half the squared norm is the parameters
        return (jax.tree.map(jnp.add, p, u), s), None

    (after, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=20))(params)
    for k in AXES:
        assert float(jnp.sum(after[k] ** 2)) < 0.7 * float(jnp.sum(params[k] ** 2))
