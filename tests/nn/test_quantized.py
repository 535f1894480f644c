"""Keys and values in eight bits: what is lost, that nothing else is, and what it takes in memory."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from jaxlm.config import UserError
from jaxlm.nn import attention
from jaxlm.nn.cache import cache_specs, entries, write
from jaxlm.nn.definition import CACHE_DTYPES
from jaxlm.nn.quantized import SLICE, Quantized, quantize
from jaxlm.nn.transformer import apply, init_cache, rewind, slot_bytes, with_cache_dtype
from launch.cache_flags import CACHE_DTYPE
from tests.nn.test_attention import RULES
from tests.nn.tiny import FAMILIES, doubled, lively, rows


def floats(x: Quantized, dtype=jnp.float32):
    return x.values.astype(dtype) * x.scale[..., None].astype(dtype)


def uneven(shape, seed=0):
    """[B, S, K, C], of a size of its own at each (row, token, head): any other's scale is wrong by far."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * np.exp(rng.uniform(-3, 1, (*shape[:-1], 1))), jnp.float32)


# ---------------------------------------------------------------------------------------------------- the numbers
def test_half_a_scale_is_lost_at_most_and_no_scale_is_shared():
    x = uneven((2, 5, 3, 8))
    q = quantize(x)
    assert q.values.dtype == jnp.int8 and q.scale.dtype == jnp.float32 and q.scale.shape == (2, 5, 3)
    np.testing.assert_allclose(q.scale, np.abs(x).max(-1) / 127, rtol=1e-6)
    assert (np.abs(q.values).max(-1) == 127).all()
    assert (np.abs(floats(q) - x) <= 0.5001 * q.scale[..., None]).all()
    assert float(jnp.abs(floats(q) - x).max()) > 0


def test_zeros_stay_zeros_and_what_is_no_number_stays_none():
    q = quantize(jnp.zeros((2, 4)).at[1, 0].set(jnp.nan))
    assert not np.asarray(q.values[0]).any() and q.scale[0] == 0
    assert np.isnan(floats(q)[1]).all()


@pytest.mark.parametrize(
    ("name", "kv_heads", "length", "keys"),
    [("plain", 4, 1, 40), ("window and softcap", 2, 3, 2 * SLICE), ("softcap", 1, 2, 2 * SLICE + 9)],
)
def test_attention_over_eight_bits_is_that_over_the_floats_they_stand_for(name, kv_heads, length, keys):
    """Scales times scores and times weights are scales times keys and values: in float64, to 1e-9."""
    with doubled():
        q, k, v = uneven((2, length, 4, 8)), *(quantize(uneven((2, keys, kv_heads, 8), i)) for i in (1, 2))
        q = q.astype(jnp.float64)
        order = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(keys), (2, 1)), axis=1), jnp.int32)
        kept = (order, (order < keys - length + 1).astype(jnp.int32))
        queries = (jnp.broadcast_to(keys - length + jnp.arange(length), (2, length)), jnp.ones((2, length), jnp.int32))
        rule = replace(RULES[name], ordered=False)
        dense = floats(k, jnp.float64), floats(v, jnp.float64)
        for implementation in ("plain", "blockwise"):
            f = jax.jit(lambda q, k, v, how=implementation: attention.attend(q, k, v, queries, kept, rule, how))
            np.testing.assert_allclose(f(q, k, v), f(q, *dense), rtol=1e-9, atol=1e-12, err_msg=implementation)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 256])  # a step of the decoder; a prompt's pass, block by block
def test_no_copy_of_the_cache_in_floats_is_made(compute, length):
    """By XLA's own account on a CPU: temporaries are less than a copy of the keys alone, even in the narrower dtype."""
    if jax.default_backend() != "cpu":
        pytest.skip("of XLA on a CPU")
    B, K, G, S, C = 4, 2, 2, 16 * SLICE, 64
    described = jax.ShapeDtypeStruct
    stored = Quantized(described((B, K, S, C), jnp.int8), described((B, K, S), jnp.float32))
    tokens = [(described((B, n), jnp.int32),) * 2 for n in (length, S)]

    def f(q, k, v, queries, keys):
        k, v = jax.tree.map(lambda x: x.swapaxes(1, 2), (k, v))
        return attention.attend(q, k, v, queries, keys, attention.Rule(0.1, ordered=False))

    compiled = jax.jit(f).lower(described((B, length, K * G, C), compute), stored, stored, *tokens).compile()
    blocks = 0 if length == 1 else B * length * K * G * C * 4 * 4 + 2 * B * K * S * C  # queries, int8 keys, cut up
    assert compiled.memory_analysis().temp_size_in_bytes < blocks + B * K * S * C * 2


# ---------------------------------------------------------------------------------------------------- in the model
def feeder(cfg):
    return jax.jit(functools.partial(apply, cfg))


def fed(cfg, params, row, pieces, spare=0, start=0, cache=None, feed=None):
    """(hidden states of the rows fed in pieces of these lengths, the cache)."""
    cache, out, feed = init_cache(cfg, row[0].shape[0], 24, spare) if cache is None else cache, [], feed or feeder(cfg)
    for n in pieces:
        h, cache, _ = feed(params, *(x[:, start : start + n] for x in row), cache)
        out.append(h)
        start += n
    return jnp.concatenate(out, 1), cache


FAMILY_NAMES = ("gemma3", "canon")  # grouped queries, rings and full layers in both; last inputs in the other


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_is_kept_hangs_on_the_token_alone(family):
    """However a row is cut into passes, and whatever was taken back between, the same comes out: in float64, 1e-9.

    All queries meet keys as they are kept, also those of their own pass.
    """
    with doubled():
        cfg = with_cache_dtype(FAMILIES[family], "int8")
        params, row, feed = lively(cfg), rows([[14]] * 2, 14), feeder(cfg)
        want, _ = fed(cfg, params, row, (14,), spare=3, feed=feed)
        got, _ = fed(cfg, params, row, (9, 1, 4), spare=3, feed=feed)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)

        wrong = rows([[14]] * 2, 14, seed=5)
        _, cache = fed(cfg, params, row, (9,), spare=3, feed=feed)
        mixed = (jnp.concatenate([row[0][:, :10], wrong[0][:, 10:]], axis=1), *row[1:])
        _, cache = fed(cfg, params, mixed, (4,), start=9, cache=cache, feed=feed)
        cache = jax.jit(rewind)(cache, jnp.full((2,), 10), jnp.full((2,), 3))
        again, _ = fed(cfg, params, row, (4,), start=10, cache=cache, feed=feed)
        np.testing.assert_allclose(again, want[:, 10:], rtol=1e-9, atol=1e-10)


def distance(a, b):
    """Of hidden states, relative to their spread."""
    return float(jnp.abs(a - b).mean() / jnp.std(b))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_little_is_lost_and_a_scale_that_is_wrong_shows(family):
    """Within 2% of the spread of what comes out of a pass without a cache, where float32 is within 1e-5; with scales
    that are one for all heads, one for all slots, missing, or the neighbor's, more than twice that."""
    cfg = replace(FAMILIES[family], precision=replace(FAMILIES[family].precision, params="float32", compute="float32"))
    params, row = lively(cfg), rows([[14]] * 8, 14)
    want = jax.jit(functools.partial(apply, cfg))(params, *row)[0][:, 9:]

    int8 = with_cache_dtype(cfg, "int8")
    feeds = {c: feeder(c) for c in (cfg, int8)}

    def after(cfg, change=lambda scale_BKS: scale_BKS):
        feed = feeds[cfg]
        _, cache = fed(cfg, params, row, (9,), feed=feed)

        def changed(x):
            return x._replace(scale=change(x.scale)) if isinstance(x, Quantized) else x

        cache = jax.tree.map(changed, cache, is_leaf=lambda x: isinstance(x, Quantized))
        return distance(fed(cfg, params, row, (1,) * 5, start=9, cache=cache, feed=feed)[0], want)

    lost = after(int8)
    print(f"{family}: {after(cfg):.1e} in float32, {lost:.1e} in int8")  # pytest -rP shows it
    assert after(cfg) < 1e-5 < 1e-4 < lost < 0.02
    wrong = {
        "of the slot before": lambda s: jnp.roll(s, 1, axis=2),
        "one for all slots": lambda s: jnp.broadcast_to(s.mean(2, keepdims=True), s.shape),
        "missing": jnp.ones_like,
        "of the row before": lambda s: jnp.roll(s, 1, axis=0),
    }
    if cfg.key_heads > 1:
        wrong |= {
            "of the other head": lambda s: jnp.roll(s, 1, axis=1),
            "one for all heads": lambda s: jnp.broadcast_to(s.mean(1, keepdims=True), s.shape),
        }
    found = {name: after(int8, change) for name, change in wrong.items()}
    assert min(found.values()) > 2 * 0.02, found


def test_a_ring_keeps_values_and_scales_of_the_newest():
    layer = init_cache(with_cache_dtype(FAMILIES["gemma3"], "int8"), 2, 16)[0]
    k_BTKC = uneven((2, 7, *layer["k"].values.shape[1::2]))
    positions = jnp.asarray([[6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6]], jnp.int32)
    layer = jax.jit(write)(layer, entries(layer, k_BTKC, -k_BTKC, positions, jnp.ones_like(positions)))
    at = jnp.argmax(positions[:, :, None] == layer["key_positions"][:, None], axis=1)  # [B, S]: which token lies there
    want = jax.vmap(lambda x, i: x[i])(k_BTKC, at).swapaxes(1, 2)
    for name, sign in (("k", 1), ("v", -1)):
        kept = layer[name]
        assert (jnp.abs(floats(kept) - sign * want) <= 0.5001 * kept.scale[..., None]).all()


# ---------------------------------------------------------------------------------------------------- names, bytes
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_bytes_of_a_slot(family):
    """What is told is what the arrays take, and by hand: C values and, in int8, a scale for each head of k and of v,
    a position and a segment."""
    cfg = replace(FAMILIES[family], precision=replace(FAMILIES[family].precision, compute="float32"))
    sizes = [min(16, cfg.window_of(cfg.kind(i)) or 16) for i in range(cfg.layers)]
    each = {"float32": 4 * cfg.head_dim, "bfloat16": 2 * cfg.head_dim, "int8": cfg.head_dim + 4}
    for name in (None, *CACHE_DTYPES):
        c = with_cache_dtype(cfg, name)
        cache = init_cache(c, 3, 16)
        told = slot_bytes(c, 16)
        assert 3 * told == sum(x.nbytes for x in jax.tree.leaves(cache))
        recent = 0 if cfg.short_conv is None else 2 * cfg.layers * 2 * cfg.width * (2 if name == "bfloat16" else 4)
        assert told == sum(sizes) * (2 * cfg.key_heads * each[name or "float32"] + 8) + recent
        jax.tree.map(lambda x, axes: np.testing.assert_equal(len(axes), x.ndim), cache, cache_specs(c))


def test_names():
    assert tuple(flags.FLAGS[CACHE_DTYPE.name].parser.enum_values) == CACHE_DTYPES
    cfg = FAMILIES["llama3"]
    assert with_cache_dtype(cfg, None) is cfg
    with pytest.raises(UserError, match="must be one of float32, bfloat16, int8, got 'int4'"):
        init_cache(with_cache_dtype(cfg, "int4"), 1, 8)
