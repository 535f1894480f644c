"""Adapters: a start that changes nothing, one product two ways, and shapes and axes that follow the projections'."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding, tree
from jaxlm.config import UserError
from jaxlm.nn import flops, lora, transformer
from jaxlm.nn.lora import LoRA
from jaxlm.optim.optimizers import decays, matrix_dims
from tests.nn.tiny import FAMILIES, doubled, lively, rows

RANK = 3
# Windowed, an odd number of layers, grouped queries and biases: every shape that a projection has.
CFG = replace(FAMILIES["gemma2"], qkv_bias=True, attention_out_bias=True)
SINGLE = replace(CFG, precision=transformer.Precision(), init=transformer.FanInInit())


def adapted(cfg, config, seed=0):
    """Lively parameters with adapters whose both factors are random."""
    generator = np.random.default_rng(seed)
    pairs = jax.tree.map(
        lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), lora.abstract(cfg, config)["adapters"]
    )
    return lively(cfg) | {"adapters": pairs}


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params):
    batch = rows([[7, 5], [11]], 12)
    return transformer.unembed(cfg, params, transformer.apply(cfg, params, *batch)[0])


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unrolled"])
def test_attached_and_merged_are_one_model(scan):
    with doubled():
        config = LoRA(rank=RANK, alpha=1.5)
        cfg = replace(CFG, scan=scan, remat="full" if scan else "none")
        params = adapted(cfg, config)
        plain = logits(cfg, params | {"adapters": {}})
        merged, attached = logits(cfg, lora.merge(config, params)), logits(cfg, lora.attach(config, params))
        np.testing.assert_allclose(attached, merged, rtol=1e-9, atol=1e-9)
        assert np.abs(np.asarray(merged - plain)).max() > 0.1
        assert jax.tree.structure(lora.merge(config, params)) == jax.tree.structure(transformer.abstract(cfg))


def test_merged_in_float32_within_1e_5():
    cfg = SINGLE
    config = LoRA(rank=RANK, alpha=1.5)
    pairs = jax.tree.map(lambda x: 0.3 * x.astype(jnp.float32), adapted(cfg, config)["adapters"])
    params = jax.jit(transformer.init, static_argnums=0)(cfg, jax.random.key(3)) | {"adapters": pairs}
    attached, merged = logits(cfg, lora.attach(config, params)), logits(cfg, lora.merge(config, params))
    np.testing.assert_allclose(attached, merged, atol=1e-5, rtol=0)


def test_the_product_is_alpha_over_rank_times_a_times_b():
    with doubled():
        config = LoRA(rank=RANK, alpha=6.0)
        params = adapted(CFG, config)
        merged = lora.merge(config, params)
        before, after = (p["backbone"]["blocks"]["1"]["attention"] for p in (params, merged))
        pair = params["adapters"]["1"]["attention"]
        for name, equation in (("q", "ldr,lrhc->ldhc"), ("out", "lhcr,lrd->lhcd")):
            delta = 2.0 * jnp.einsum(equation, pair[name]["a"], pair[name]["b"])
            np.testing.assert_allclose(after[name]["kernel"] - before[name]["kernel"], delta, rtol=1e-9, atol=1e-12)


def test_a_fresh_start_is_the_model_bit_for_bit():
    key, config = jax.random.key(3), LoRA(rank=64)
    plain = jax.jit(transformer.init, static_argnums=0)(SINGLE, key)
    params = jax.jit(lora.init, static_argnums=(0, 1))(SINGLE, config, key)
    jax.tree.map(np.testing.assert_array_equal, params | {"adapters": {}}, plain)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(config, params), plain)
    np.testing.assert_array_equal(logits(SINGLE, lora.attach(config, params)), logits(SINGLE, plain))
    for name, x in tree.named_leaves(params["adapters"]):
        if name.endswith("/b"):
            assert not np.any(x), name
        else:
            assert float(jnp.std(x)) == pytest.approx(np.prod(x.shape[1:-1]) ** -0.5, rel=0.2), name


def test_every_projection_of_the_blocks_and_nothing_else_is_adapted():
    pairs = dict(tree.named_leaves(lora.abstract(CFG, LoRA(rank=RANK))["adapters"]))
    projections = {f"attention/{x}" for x in ("q", "k", "v", "out")} | {f"mlp/{x}" for x in ("gate", "up", "down")}
    assert set(pairs) == {f"{slot}/{p}/{leaf}" for slot in "01" for p in projections for leaf in "ab"}
    assert pairs["0/attention/out/a"].shape == (2, 4, 8, RANK) and pairs["1/attention/k/b"].shape == (1, RANK, 1, 8)
    few = lora.abstract(CFG, LoRA(rank=RANK, targets=("q", "v")))["adapters"]
    assert {name.split("/")[2] for name, _ in tree.named_leaves(few)} == {"q", "v"}
    params = adapted(SINGLE, LoRA(rank=RANK, targets=("q",)))
    merged = lora.merge(LoRA(rank=RANK, targets=("q",)), params)["backbone"]["blocks"]["0"]
    np.testing.assert_array_equal(
        merged["mlp"]["up"]["kernel"], params["backbone"]["blocks"]["0"]["mlp"]["up"]["kernel"]
    )


def test_axes_decay_and_matrices_follow_the_projections():
    specs = dict(
        tree.named_leaves(lora.specs(CFG, LoRA(rank=RANK))["adapters"], is_leaf=lambda x: isinstance(x, tuple))
    )
    shapes = dict(tree.named_leaves(lora.abstract(CFG, LoRA(rank=RANK))["adapters"]))
    assert specs["0/attention/q/a"] == ("layers", "embed", "rank")
    assert specs["0/attention/out/b"] == ("layers", "rank", "embed")
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2))
    assert sharding.partition_spec(specs["0/mlp/down/a"], mesh) == jax.sharding.PartitionSpec(None, "tensor", None)
    for name, axes in specs.items():
        assert decays(axes), name
        dims = matrix_dims(axes)
        inputs, outputs = (np.prod([shapes[name].shape[i] for i in d]) for d in (dims.reduction_axis, dims.output_axis))
        assert (outputs if name.endswith("/a") else inputs) == RANK, name


def test_unused_adapters_are_refused():
    params = adapted(SINGLE, LoRA(rank=RANK))
    with pytest.raises(ValueError, match=r"lora.attach or lora.merge"):
        logits(SINGLE, params)


def test_operations_counted_are_those_left():
    cfg = CFG
    full, some = flops.flops_per_token(cfg, 16), lora.flops_per_token(cfg, LoRA(rank=RANK), 16)
    assert lora.flops_per_token(cfg, None, 16) == full
    pairs = tree.count(lora.abstract(cfg, LoRA(rank=RANK))["adapters"])
    assert some["forward"] - full["forward"] == 2 * pairs
    assert 2 * full["forward"] + 6 * pairs <= some["train"] < full["train"] + 6 * pairs


@pytest.mark.parametrize(
    "config, words",
    [
        (LoRA(rank=0), "lora.rank must be at least 1"),
        (LoRA(targets=()), "lora.targets is empty"),
        (LoRA(targets=("q", "query")), "no projection 'query'; "),
    ],
    ids=lambda x: None if isinstance(x, LoRA) else x,
)
def test_bad_settings(config, words):
    with pytest.raises(UserError, match=words):
        lora.validate(CFG, config)
