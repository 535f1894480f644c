"""The model's promises, for a small model of every family, in float64: equalities hold to 1e-9."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, tree
from jaxlm.config import UserError
from jaxlm.nn.cache import entries, write
from jaxlm.nn.layers import linear
from jaxlm.nn.rope import LinearScaling
from jaxlm.nn.transformer import (
    ModelConfig,
    MoE,
    Precision,
    RMSNorm,
    Rope,
    abstract,
    apply,
    attention_weights,
    clear,
    init,
    init_cache,
    padded_vocab,
    rewind,
    specs,
    unembed,
    unstack,
)
from jaxlm.sharding import MeshConfig, make_mesh, sharding_for, tree_shardings
from tests.nn.tiny import FAMILIES, SMALL, assert_trees_close, doubled, lively, rows

replace = dataclasses.replace


@pytest.fixture(scope="module", autouse=True)
def double():
    with doubled():
        yield


@functools.lru_cache
def params_of(family):
    return lively(FAMILIES[family])


@functools.partial(jax.jit, static_argnums=0)
def hidden(cfg, params, *tokens):
    return apply(cfg, params, *tokens)[0]


@functools.partial(jax.jit, static_argnums=0)
def scored(cfg, params, *tokens):
    """(a scalar of all logits, its gradient)."""

    def loss(params):
        logits = unembed(cfg, params, apply(cfg, params, *tokens)[0])[..., : cfg.vocab_size]
        weight = jnp.sin(jnp.arange(logits.size, dtype=logits.dtype)).reshape(logits.shape)
        return jnp.sum(jnp.where(tokens[2][..., None] > 0, logits * weight, 0))

    return jax.value_and_grad(loss)(params)


# ------------------------------------------------------------------------------------------------- who sees whom
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_separate_ones(family):
    cfg = FAMILIES[family]
    tokens, positions, segments = (np.array(x) for x in rows([[5, 7], [5], [7]], 14))
    tokens[1, :5], tokens[2, :7] = tokens[0, :5], tokens[0, 5:12]
    got = np.asarray(hidden(cfg, params_of(family), *map(jnp.asarray, (tokens, positions, segments))))
    np.testing.assert_allclose(got[0, :5], got[1, :5], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(got[0, 5:12], got[2, :7], rtol=1e-9, atol=1e-11)
    assert np.abs(got[0, 5:10] - got[0, :5]).max() > 1e-2
    assert np.isfinite(got).all()


@pytest.mark.parametrize("family", ["gpt2", "llama3", "gemma3"])
def test_causality_by_gradient(family):
    """Every token of the row is another row of the embedding, so its gradient says who depends on it."""
    cfg = replace(FAMILIES[family], tied=False)
    tokens, positions, segments = rows([[4, 6]], 12)
    tokens = jnp.arange(12)[None]
    params = lively(cfg)

    def outcome(table):
        changed = params | {"backbone": params["backbone"] | {"embed": params["backbone"]["embed"] | {"tokens": table}}}
        return jnp.sum(hidden(cfg, changed, tokens, positions, segments)[0] * jnp.sin(jnp.arange(16.0))[None], -1)

    jacobian = jax.jit(jax.jacrev(outcome))(params["backbone"]["embed"]["tokens"])
    influence = np.abs(np.asarray(jacobian)[:, :12]).max(-1)
    same = np.asarray(segments[0])[:, None] == np.asarray(segments[0])[None]
    allowed = np.tril(same) & (np.asarray(segments[0])[:, None] > 0)
    real = np.asarray(segments[0]) > 0
    assert not influence[~allowed & real[:, None]].any()
    if family != "gemma3":  # its windows keep some of the past out
        assert (influence[allowed] > 1e-9).all()


def test_a_window_layer_sees_exactly_its_window():
    cfg = replace(FAMILIES["mistral"], layers=1)
    params = lively(cfg)
    weights = np.asarray(jax.jit(attention_weights, static_argnums=0)(cfg, params, *rows([[9, 3]], 12)))
    assert weights.shape == (1, 1, 4, 12, 12) and weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    t, s = np.indices((12, 12))
    visible = (s <= t) & (s > t - 4) & ((s < 9) == (t < 9))
    assert ((weights[0, 0] > 0) == visible).all()


# ------------------------------------------------------------------------------------------------------ the cache
def decode(cfg, params, tokens, positions, segments, pieces, capacity=24):
    """Hidden states of the rows fed through the cache in pieces of these lengths."""
    feed = jax.jit(functools.partial(apply, cfg), donate_argnums=4)
    cache, out, start = init_cache(cfg, tokens.shape[0], capacity), [], 0
    for n in pieces:
        part = [x[:, start : start + n] for x in (tokens, positions, segments)]
        h, cache, _ = feed(params, *part, cache)
        out.append(h)
        start += n
    assert start == tokens.shape[1]
    return jnp.concatenate(out, 1), cache


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("llama3", "mistral", "yarn")])
def test_cached_equals_full(family):
    """A prompt longer than the window, then token by token."""
    cfg = FAMILIES[family]
    row = rows([[14]] * 3, 14)
    got, cache = decode(cfg, params_of(family), *row, pieces=(9, 1, 1, 1, 1, 1))
    np.testing.assert_allclose(got, hidden(cfg, params_of(family), *row), rtol=1e-9, atol=1e-10)
    for i, layer in enumerate(cache):
        assert layer["k"].shape[2] == (cfg.window if cfg.kind(i) == "window" else 24)


def test_cached_equals_full_in_chunks_around_the_ring():
    cfg, params = FAMILIES["gemma3"], params_of("gemma3")
    row = rows([[14]] * 3, 14)
    got, _ = decode(cfg, params, *row, pieces=(2, 5, 2, 5))
    np.testing.assert_allclose(got, hidden(cfg, params, *row), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("side", "family"), [("left", "canon"), ("left", "gemma2"), ("right", "gemma2")])
def test_rows_of_different_lengths_share_a_cache(side, family):
    """Prompts padded on either side; then each row goes on at its own position."""
    cfg, params = FAMILIES[family], params_of(family)
    tokens, positions, segments = rows([[13], [13]], 13)
    want = hidden(cfg, params, tokens, positions, segments)
    lengths = [8, 5]
    prompt = [np.zeros((2, 8), np.int32) for _ in range(3)]
    for b, n in enumerate(lengths):
        at = slice(8 - n, 8) if side == "left" else slice(0, n)
        for whole, part in zip((tokens, positions, segments), prompt):
            part[b, at] = whole[b, :n]
    feed = jax.jit(functools.partial(apply, cfg))
    _, cache, _ = feed(params, *map(jnp.asarray, prompt), init_cache(cfg, 2, 16))
    assert (np.asarray(cache[1]["key_segments"]).sum(1) == lengths).all()  # padding was not written
    for step in range(5):
        at = [n + step for n in lengths]
        new = [jnp.stack([x[b, i] for b, i in enumerate(at)])[:, None] for x in (tokens, positions)]
        h, cache, _ = feed(params, *new, jnp.ones((2, 1), jnp.int32), cache)
        np.testing.assert_allclose(h[:, 0], [want[b, i] for b, i in enumerate(at)], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", ["gemma2", "canon"])
def test_a_finished_row_is_left_alone_and_a_cleared_one_forgets(family):
    cfg, params = FAMILIES[family], params_of(family)
    tokens, positions, segments = rows([[9], [9]], 9)
    _, cache = decode(cfg, params, tokens, positions, segments, pieces=(9,))
    feed = jax.jit(functools.partial(apply, cfg))
    idle = jnp.asarray([[0], [1]], jnp.int32)
    _, after, _ = feed(params, tokens[:, :1], jnp.full((2, 1), 9), idle, cache)
    for old, new in zip(cache, after):
        for name in old:
            np.testing.assert_array_equal(new[name][0], old[name][0])
    assert np.abs(np.asarray(after[0]["k"][1] - cache[0]["k"][1])).max() > 0
    fresh = rows([[6], [6]], 6, seed=5)
    got, _, _ = feed(params, *fresh, clear(after, jnp.asarray([True, True])))
    np.testing.assert_allclose(got, hidden(cfg, params, *fresh), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", ["gemma3", "canon"])
def test_tokens_that_were_taken_back_leave_no_trace(family):
    """Each row takes back another number of tokens, and goes on with others."""
    cfg, params, kept = FAMILIES[family], params_of(family), jnp.asarray([3, 1])
    right, wrong = rows([[14], [14]], 14), rows([[14], [14]], 14, seed=5)
    want = hidden(cfg, params, *right)
    feed = jax.jit(functools.partial(apply, cfg))
    _, cache, _ = feed(params, *(x[:, :8] for x in right), init_cache(cfg, 2, 24, spare=4))
    tokens = jnp.where(jnp.arange(5)[None] < kept[:, None], right[0][:, 8:13], wrong[0][:, 8:13])
    _, cache, _ = feed(params, tokens, *(x[:, 8:13] for x in right[1:]), cache)
    cache = jax.jit(rewind)(cache, 8 + kept, 5 - kept)
    for step in range(3):
        at = (8 + step + kept)[:, None]
        new = [jnp.take_along_axis(x, at, axis=1) for x in right]
        got, cache, _ = feed(params, *new, cache)
        np.testing.assert_allclose(got, want[jnp.arange(2)[:, None], at], rtol=1e-9, atol=1e-10)


def test_a_ring_keeps_the_newest_in_whatever_order_they_come():
    layer = init_cache(FAMILIES["gemma3"], 1, 16)[0]
    assert layer["k"].shape[2] == 3
    positions = jnp.asarray([[6, 5, 4, 3, 2, 1, 0]], jnp.int32)
    k_BTKC = jnp.zeros((1, 7, layer["k"].shape[1], layer["k"].shape[3])) + positions[:, :, None, None]
    layer = jax.jit(write)(layer, entries(layer, k_BTKC, k_BTKC, positions, jnp.ones_like(positions)))
    assert sorted(layer["key_positions"][0].tolist()) == [4, 5, 6]
    np.testing.assert_array_equal(layer["k"][0, 0, :, 0], layer["key_positions"][0])


def test_cache_dtype():
    cfg = replace(FAMILIES["llama3"], precision=Precision(cache="bfloat16"))
    cache = init_cache(cfg, 2, 8)
    assert cache[0]["k"].dtype == jnp.bfloat16
    h, cache, _ = jax.jit(functools.partial(apply, cfg))(lively(cfg), *rows([[4]] * 2, 4), cache)
    assert h.dtype == jnp.float32 and cache[0]["v"].dtype == jnp.bfloat16


# ----------------------------------------------------------------------------------- the same model run otherwise
def test_scan_and_remat_change_nothing():
    cfg = replace(FAMILIES["gemma2"], layers=5)  # of a pattern of two: whole periods and a remainder
    params, row = lively(cfg), rows([[5, 6], [12]], 12)
    want = scored(replace(cfg, scan=False), params, *row)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(want[1]))
    for changes in ({"scan": True, "remat": "full"}, {"scan": False, "remat": "dots"}):
        assert_trees_close(scored(replace(cfg, **changes), params, *row), want)


def test_attention_implementations_agree_in_the_model():
    cfg, params, row = FAMILIES["gemma2"], params_of("gemma2"), rows([[5, 6], [12]], 12)
    want = scored(cfg, params, *row)  # plain, at this length
    assert_trees_close(scored(replace(cfg, attention="blockwise"), params, *row), want)


def test_single_precision_follows_double():
    cfg, row = FAMILIES["gemma2"], rows([[5, 6], [12]], 12)
    want = scored(cfg, params_of("gemma2"), *row)
    single = replace(cfg, precision=Precision())
    got = scored(single, tree.cast(params_of("gemma2"), jnp.float32), *row)
    assert got[0].dtype == jnp.float32
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1])):
        assert float(jnp.linalg.norm(a - b)) < 1e-5 * float(jnp.linalg.norm(b))


def test_dtypes_by_role():
    cfg = replace(FAMILIES["gemma2"], precision=Precision(params="float32", compute="bfloat16"))
    params = jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    h, _, _ = jax.eval_shape(functools.partial(apply, cfg), params, *rows([[4]], 4))
    assert h.dtype == jnp.bfloat16
    assert jax.eval_shape(functools.partial(unembed, cfg), params, h).dtype == jnp.float32


def test_products_of_a_wide_result_and_of_its_gradient_are_in_the_narrow_dtype():
    """Logits are float32, what they are products of is not: nor may their gradient's factors be."""
    x, kernel = (
        jax.random.normal(jax.random.key(i), shape, jnp.float32) for i, shape in enumerate(((2, 5, 8), (8, 6)))
    )
    narrow = x.astype(jnp.bfloat16)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(linear(x, kernel, dtype=jnp.float32)))

    grad = jax.grad(loss, argnums=(0, 1))
    factors = re.findall(r"stablehlo.dot_general.*: \((.*)\) ->", jax.jit(grad).lower(narrow, kernel).as_text())
    assert len(factors) == 3 and all(f.count("bf16") == 2 for f in factors)
    got = grad(narrow, kernel)
    assert [g.dtype for g in got] == [jnp.bfloat16, jnp.float32]
    for a, b in zip(got, grad(x, kernel)):
        assert float(jnp.linalg.norm(a - b)) < 1e-2 * float(jnp.linalg.norm(b))


def test_layers_that_stand_apart_are_the_same_layers():
    cfg = replace(FAMILIES["gemma3"], layers=5)  # of a pattern of three
    params, row = lively(cfg), rows([[11]] * 3, 11)
    apart = jax.jit(unstack)(params)
    assert [len(stack) for stack in apart["backbone"]["blocks"].values()] == [2, 2, 1]
    want, _ = decode(cfg, params, *row, pieces=(9, 1, 1))
    np.testing.assert_allclose(decode(cfg, apart, *row, pieces=(9, 1, 1))[0], want, rtol=1e-12)


def test_heads_and_length_spread_over_devices_give_the_same():
    cfg = replace(FAMILIES["llama3"], layers=1)
    params, row = lively(cfg), rows([[5, 7], [12], [3], [12]], 12)
    want = scored(cfg, params, *row)
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=2, context=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, tree_shardings(mesh, specs(cfg), abstract(cfg)))
        spread = [jax.device_put(x, sharding_for(mesh, ("batch", "length"))) for x in row]
        q = placed["backbone"]["blocks"]["0"]["attention"]["q"]["kernel"]
        assert q.sharding.shard_shape(q.shape)[2] == cfg.heads // 2
        assert_trees_close(scored(cfg, placed, *spread), want)


def test_dropout():
    cfg = replace(FAMILIES["llama3"], dropout=0.3)
    params, row = params_of("llama3"), rows([[14]] * 3, 14)

    def run(key, **changes):
        f = functools.partial(apply, replace(cfg, **changes))
        return np.asarray(jax.jit(lambda p, k: f(p, *row, key=k)[0])(params, key))

    a = run(jax.random.key(1))
    np.testing.assert_allclose(run(jax.random.key(1), scan=False), a, rtol=1e-9)
    assert np.abs(run(jax.random.key(2)) - a).max() > 0.1
    np.testing.assert_array_equal(run(None), hidden(FAMILIES["llama3"], params, *row))


# ------------------------------------------------------------------------------------------ the definition's knobs
def test_every_knob_changes_the_outcome():
    """On one tree of parameters that suits both sides, so a knob that nothing reads is seen."""
    base = ModelConfig(**SMALL | {"layers": 2}, pattern=("window", "full"), window=6, gated=False, tied=True)
    params, row = lively(base), rows([[8]], 8)
    want = hidden(base, params, *row)
    for changes in (
        {"window": 3},
        {"pattern": ("full", "window")},
        {"pattern": ("full",), "window": None},
        {"positions": None},
        {"positions": Rope(100.0)},
        {"positions": Rope(scaling=LinearScaling(2.0))},
        {"window_positions": Rope(3.0)},
        {"norm": RMSNorm(eps=1.0)},
        {"norm": RMSNorm(scale_offset=1.0)},
        {"attention_softcap": 0.5},
        {"attention_scale": 1.0},
        {"activation": "relu"},
        {"activation": "gelu"},
        {"embed_scale": 2.0},
    ):
        weights = params
        if changes.get("pattern") == ("full",):
            slots = params["backbone"]["blocks"]
            one = jax.tree.map(lambda a, b: jnp.stack([a[0], b[0]]), slots["0"], slots["1"])
            weights = params | {"backbone": params["backbone"] | {"blocks": {"0": one}}}
        got = hidden(replace(base, **changes), weights, *row)
        assert float(jnp.abs(got - want).max()) > 1e-6, changes
    logits = unembed(base, params, want)[..., : base.vocab_size]
    capped = unembed(replace(base, logit_softcap=2.0), params, want)[..., : base.vocab_size]
    np.testing.assert_allclose(capped, 2 * np.tanh(logits / 2), rtol=1e-9)


def test_padded_vocabulary_has_no_probability_and_no_gradient():
    """Of an untied kernel; the loss's tests look at a tied one."""
    cfg = FAMILIES["llama3"]
    params, x = params_of("llama3"), jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 16)))
    assert padded_vocab(cfg) == 48

    def loss(params):
        logits = unembed(cfg, params, x)
        return -jax.nn.log_softmax(logits)[0, :, 3].sum(), jax.nn.softmax(logits)

    grads, probabilities = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert not np.asarray(probabilities)[..., 37:].any()
    columns = np.asarray(grads["heads"]["lm"]["kernel"]).T
    assert columns[:37].any() and not columns[37:].any()


def test_refusals():
    good = FAMILIES["llama3"]
    for changes, words in (
        ({"moe": MoE(8, 2)}, "8 experts"),
        ({"vocab_size": None}, "vocab_size"),
        ({"heads": 3}, "multiple of model.heads"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"pattern": ()}, "pattern"),
        ({"pattern": ("window",)}, "window"),
        ({"window": 4}, "window"),
        ({"dropout": 1.0}, "dropout"),
        ({"layers": 0}, "layers"),
        ({"width": 12, "kv_heads": None}, "even"),
    ):
        with pytest.raises(UserError, match=words):
            init(replace(good, **changes), jax.random.key(0))


def test_definitions_survive_json():
    for cfg in FAMILIES.values():
        config.check(cfg)
        assert config.from_json(ModelConfig, config.to_json(cfg)) == cfg
