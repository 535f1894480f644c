"""Every implementation of attention against one written out query by query, in value and gradient."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.config import UserError
from jaxlm.nn import attention
from jaxlm.nn.attention import Rule
from jaxlm.nn.transformer import Precision, abstract, apply
from tests.nn.tiny import FAMILIES, doubled, rows

T, H, C = 10, 4, 4
RULES = {
    "plain": Rule(0.5),
    "window": Rule(0.5, window=3),
    "window of one": Rule(0.5, window=1),
    "softcap": Rule(0.7, softcap=1.5),
    "window and softcap": Rule(0.3, softcap=2.0, window=4),
}
IMPLEMENTATIONS = {
    "plain": attention.plain,
    "blockwise 4": lambda *a: attention.blockwise(*a, block=4),
}


def written_out(q, k, v, weight, positions, segments, rule):
    """(output, gradients of sum(output * weight) by q, k, v) by the definition, one query and head at a time."""
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        visible = [
            s
            for s in range(t + 1)
            if segments[b, s] == segments[b, t] > 0
            and (rule.window is None or positions[b, s] > positions[b, t] - rule.window)
        ]
        if not visible:
            continue
        keys, values = k[b, visible, h // group], v[b, visible, h // group]
        scores, slope = keys @ q[b, t, h] * rule.scale, 1.0
        if rule.softcap is not None:
            slope = 1 - np.tanh(scores / rule.softcap) ** 2
            scores = rule.softcap * np.tanh(scores / rule.softcap)
        p = np.exp(scores - scores.max())
        p /= p.sum()
        out[b, t, h] = p @ values
        dscores = p * (values @ weight[b, t, h] - out[b, t, h] @ weight[b, t, h]) * slope * rule.scale
        dq[b, t, h] += dscores @ keys
        dk[b, visible, h // group] += np.outer(dscores, q[b, t, h])
        dv[b, visible, h // group] += np.outer(p, weight[b, t, h])
    return out, dq, dk, dv


def inputs(kv_heads, dtype=jnp.float64):
    rng = np.random.default_rng(kv_heads)
    shapes = [(2, T, H, C), (2, T, kv_heads, C), (2, T, kv_heads, C), (2, T, H, C)]
    q, k, v, weight = (jnp.asarray(2 * rng.normal(size=s), dtype) for s in shapes)
    _, positions, segments = rows([[6, 3], [T]], T)
    return q, k, v, weight, (positions, segments)


@pytest.mark.parametrize(
    ("name", "kv_heads"), [("plain", 4), ("window", 2), ("softcap", 2), ("window of one", 1), ("window and softcap", 1)]
)
def test_equal_to_the_definition_in_value_and_gradient(name, kv_heads):
    rule = RULES[name]
    with doubled():
        q, k, v, weight, tokens = inputs(kv_heads)
        wants = written_out(*(np.asarray(x) for x in (q, k, v, weight, *tokens)), rule)

        def outcomes(q, k, v):
            def scored(q, k, v, f):
                out = jnp.where(tokens[1][:, :, None, None] > 0, f(q, k, v, tokens, tokens, rule), 0)
                return jnp.sum(out * weight), out

            results = {}
            for implementation, f in IMPLEMENTATIONS.items():
                grads, out = jax.grad(scored, argnums=(0, 1, 2), has_aux=True)(q, k, v, f)
                results[implementation] = (out, *grads)
            return results

        for implementation, gots in jax.jit(outcomes)(q, k, v).items():
            for got, want in zip(gots, wants):
                np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11, err_msg=implementation)


def test_keys_from_a_cache_may_come_in_any_order():
    """Unordered keys, some of them empty entries: the position alone says what is later."""
    with doubled():
        q, k, v, _, tokens = inputs(2)
        order = np.random.default_rng(0).permutation(T)
        shuffled = tuple(x[:, order] for x in tokens)
        rule = RULES["window and softcap"]
        loose = dataclasses.replace(rule, ordered=False)
        want = jax.jit(lambda: attention.attend(q, k, v, tokens, tokens, rule))()
        for implementation in ("plain", "blockwise"):
            attend = jax.jit(lambda *a, name=implementation: attention.attend(*a, tokens, shuffled, loose, name))
            np.testing.assert_allclose(attend(q, k[:, order], v[:, order]), want, rtol=1e-9, atol=1e-12)


def test_padding_gives_exactly_zero_and_passes_no_gradient():
    q, k, v, weight, tokens = inputs(2, jnp.float32)
    padding = np.asarray(tokens[1]) == 0

    def scored(q, k, v):
        return jnp.sum(attention.attend(q, k, v, tokens, tokens, Rule(0.5)) * weight)

    out = attention.attend(q, k, v, tokens, tokens, Rule(0.5))
    assert padding.any() and not np.asarray(out)[padding].any()
    for g in jax.jit(jax.grad(scored, argnums=(0, 1, 2)))(q, k, v):
        assert not np.asarray(g)[padding].any()
        assert np.isfinite(g).all()


def test_blocks_do_not_touch_keys_out_of_sight():
    """NaN keys after a block, or before its window, change nothing in it."""
    q, k, v, _, tokens = inputs(2, jnp.float32)
    tokens = (jnp.arange(T)[None].repeat(2, 0), jnp.ones((2, T), jnp.int32))
    rule = Rule(0.5, window=3)
    clean = attention.blockwise(q, k, v, tokens, tokens, rule, block=2)
    at = np.asarray([s < 2 or s >= 6 for s in range(T)])[None, :, None, None]
    spoiled = attention.blockwise(
        q, jnp.where(at, jnp.nan, k), jnp.where(at, jnp.nan, v), tokens, tokens, rule, block=2
    )
    np.testing.assert_array_equal(spoiled[:, 4:6], clean[:, 4:6])
    assert np.isnan(spoiled[:, 0]).all()


def test_blockwise_needs_less_memory():
    shape = jax.ShapeDtypeStruct((1, 2048, 2, 16), jnp.float32)
    tokens = (jax.ShapeDtypeStruct((1, 2048), jnp.int32),) * 2

    def temporaries(f):
        def loss(q, k, v, tokens):
            return jnp.sum(f(q, k, v, tokens, tokens, Rule(0.25)))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(attention.blockwise) < temporaries(attention.plain) / 3


def test_choice():
    def shaped(length, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, length, 4, 64), dtype)

    def pick(length, asked="auto"):
        return attention.choose(shaped(length), shaped(length), Rule(1.0), asked)

    if jax.default_backend() == "cpu":
        assert pick(64) == "plain"
        assert pick(8192) == "blockwise"
        with pytest.raises(UserError, match="no NVIDIA GPU"):
            pick(64, "cudnn")
    assert pick(64, "blockwise") == "blockwise"
    assert pick(8192, "plain") == "plain"


def test_cudnn_is_chosen_only_for_what_it_can_do(monkeypatch):
    class Client:
        platform_version = "PJRT cuda 13"

    class Device:
        platform, compute_capability, client = "gpu", "9.0", Client()

    monkeypatch.setattr(jax, "devices", lambda *a: [Device()])
    good = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)

    def refusal(softcap=None, window=None, ordered=True, **changes):
        shape = list(good.shape)
        if "head_width" in changes:
            shape[3] = changes["head_width"]
        if "length" in changes:
            shape[1] = changes["length"]
        x = jax.ShapeDtypeStruct(tuple(shape), changes.get("dtype", jnp.bfloat16))
        return attention.cudnn_refuses(x, x, Rule(1.0, softcap, window, ordered))

    assert refusal() is None and refusal(window=8) is None
    assert attention.choose(good, good, Rule(1.0)) == "cudnn"
    assert "soft cap" in refusal(softcap=2.0)
    assert "cache" in refusal(ordered=False)
    assert "float32" in refusal(dtype=jnp.float32)
    assert "odd" in refusal(length=63)
    assert "head width" in refusal(head_width=20) and "head width" in refusal(head_width=264)
    assert refusal(head_width=256) is None
    Device.compute_capability = "8.0"
    assert "head width" in refusal(head_width=256)
    Device.compute_capability = "7.5"
    assert "capability" in refusal()


@pytest.fixture
def as_on_hopper(monkeypatch):
    """JAX believes that it has such a GPU and cuDNN: enough to trace a program, not to run it."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")

    class Device:
        platform, compute_capability, client = "gpu", "9.0", type("Client", (), {"platform_version": "PJRT cuda 13"})()

    monkeypatch.setattr(jax, "devices", lambda *a: [Device()])
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)


def test_cudnn_takes_the_rows_of_several_runs_at_once(as_on_hopper):
    """JAX's own rule for a mapped axis refuses a mask that all heads share, or, as in an evaluation, all runs."""
    _, *tokens = rows([[10, 6], [16]], 16)

    def scored(q, k):
        return jnp.sum(jnp.sin(attention.attend(q, k, k, tokens, tokens, Rule(0.1), "cudnn").astype(jnp.float32)))

    q, k = (jax.ShapeDtypeStruct((3, 2, 16, h, 8), jnp.bfloat16) for h in (4, 2))
    each = jax.vmap(jax.value_and_grad(scored, argnums=(0, 1)), axis_name=sharding.RUN)
    loss, (dq, dk) = jax.eval_shape(each, q, k)
    assert (loss.shape, dq.shape, dk.shape) == ((3,), q.shape, k.shape)


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("dots", 1), ("full", 2)])
def test_what_cudnn_has_attended_is_kept_like_a_product(as_on_hopper, remat, times):
    precision = Precision(compute="bfloat16")
    cfg = dataclasses.replace(
        FAMILIES["llama3"], layers=1, width=32, precision=precision, attention="cudnn", scan=False, remat=remat
    )

    def loss(params):
        return jnp.sum(apply(cfg, params, *rows([[8]], 8))[0].astype(jnp.float32))

    text = str(jax.make_jaxpr(jax.grad(loss))(abstract(cfg)))
    assert text.count(f"= {attention.CUDNN_FORWARD}[") == times


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU (run with JAX_PLATFORMS=cuda)")
@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_equals_plain(window):
    rng = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(rng.normal(size=(2, 256, h, 64)), jnp.bfloat16) for h in (8, 2, 2, 8))
    _, *tokens = rows([[100, 120], [256]], 256)
    rule = Rule(1 / math.sqrt(64), window=window)

    def outcome(implementation, dtype):
        def scored(q, k, v):
            out = attention.attend(q, k, v, tokens, tokens, rule, implementation)
            return jnp.sum(out * weight.astype(out.dtype)), out

        grad = jax.jit(jax.grad(scored, argnums=(0, 1, 2), has_aux=True))
        grads, out = grad(*(x.astype(dtype) for x in (q, k, v)))
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    for got, want in zip(outcome("cudnn", jnp.bfloat16), outcome("plain", jnp.float32)):
        assert np.abs(got - want).max() < 2e-2 * np.abs(want).max()
