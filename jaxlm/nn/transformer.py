"""The decoder transformer as pure functions over a plain parameter tree.

    init(cfg, key) -> params            specs(cfg), abstract(cfg): logical axes, shapes and dtypes of the same tree
    apply(cfg, params, tokens, positions, segments, cache, key) -> (hidden, cache, aux)
    unembed(cfg, params, hidden) -> logits

Legend: B batch, T length, D model width, V padded vocabulary, L layers, P period of the pattern.
`params` is `{"backbone": {"embed", "blocks", "final_norm"}, "heads", "adapters"}`. `blocks[str(i)]` stacks the layers
i, i + P, i + 2P, ... in its first dim, whether they are scanned or unrolled.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from jaxlm.nn.attention import CUDNN_FORWARD, MASKED
from jaxlm.nn.block import Block
from jaxlm.nn.cache import cache_dtype, cache_specs, clear, init_cache, rewind, slot_bytes, with_cache_dtype
from jaxlm.nn.definition import ModelConfig, MoE, Precision, padded_vocab, validate
from jaxlm.nn.flops import flops_per_token, parameter_count
from jaxlm.nn.layers import (
    FanInInit,
    GPT2Init,
    LayerNorm,
    Norm,
    RMSNorm,
    declare,
    dropout,
    embedding_init,
    kernel_init,
    linear,
)
from jaxlm.nn.rope import LearnedPositions, Rope, cos_sin
from jaxlm.sharding import constrain

__all__ = [
    "FanInInit", "GPT2Init", "LayerNorm", "LearnedPositions", "MoE", "ModelConfig", "Precision", "RMSNorm", "Rope",
    "abstract", "apply", "attention_weights", "cache_dtype", "cache_specs", "clear", "flops_per_token", "init",
    "init_cache", "padded_vocab", "parameter_count", "rewind", "slot_bytes", "specs", "unembed", "unstack",
    "with_cache_dtype",
]  # fmt: skip


def _products(primitive, *args, **params) -> bool:
    """Outputs of matmuls, and of cuDNN's attention: it holds no scores, and to JAX it is no product."""
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name == CUDNN_FORWARD or keep(primitive, *args, **params)


REMAT = {"full": jax.checkpoint_policies.nothing_saveable, "dots": _products}


class Embed(nn.Module):
    """Token embedding, its scale, and learned positions where the model has them."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT, positions_BT):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.precision.compute)
        shape = (padded_vocab(cfg), cfg.width)
        # Widths are gathered before the look-up: spread over the axis that also spreads the batch, it would replicate.
        table = constrain(declare(self, "tokens", embedding_init(cfg), shape, ("vocab", "embed")), ("vocab", None))
        x_BTD = table[tokens_BT].astype(dtype)
        if cfg.embed_scale is not None:
            x_BTD = x_BTD * jnp.asarray(cfg.embed_scale, dtype)
        if isinstance(cfg.positions, LearnedPositions):
            shape = (cfg.positions.length, cfg.width)
            table = declare(self, "positions", embedding_init(cfg), shape, ("positions", "embed"))
            x_BTD = x_BTD + constrain(table, ("positions", None))[positions_BT].astype(dtype)
        return constrain(x_BTD, ("batch", "length", None))


class Output(nn.Module):
    """The output kernel of an untied model."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self):
        cfg = self.cfg
        return declare(self, "kernel", kernel_init(cfg, cfg.width), (cfg.width, padded_vocab(cfg)), ("embed", "vocab"))


# ------------------------------------------------------------------------------------------------------ parameters
def _layers_of(cfg: ModelConfig, slot: int) -> range:
    return range(slot, cfg.layers, len(cfg.pattern))


def _boxed(cfg: ModelConfig, key):
    """All parameters, still in the boxes that carry their logical axes. Each layer's values hang on its index alone."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    x = jnp.zeros((1, 2, cfg.width), cfg.precision.compute)

    def block(kind, key):
        return Block(cfg, kind).init(key, x, tokens, tokens, _angles(cfg, tokens)[kind])["params"]

    keys = functools.partial(jax.random.fold_in, jax.random.fold_in(key, 1))
    backbone = {
        "embed": Embed(cfg).init(jax.random.fold_in(key, 0), tokens, tokens)["params"],
        "blocks": {
            str(i): jax.vmap(functools.partial(block, kind))(jax.vmap(keys)(jnp.array(_layers_of(cfg, i))))
            for i, kind in enumerate(cfg.slots)
        },
    }
    if cfg.norm_placement != "post":
        backbone["final_norm"] = Norm(cfg, "embed").init(jax.random.fold_in(key, 2), x)["params"]
    heads = {} if cfg.tied else {"lm": Output(cfg).init(jax.random.fold_in(key, 3))["params"]}
    return {"backbone": backbone, "heads": heads, "adapters": {}}


def init(cfg: ModelConfig, key):
    """Fresh parameters. Best called under `jax.jit` with the shardings of `specs(cfg)`."""
    validate(cfg)
    return meta.unbox(_boxed(cfg, key))


@functools.lru_cache(maxsize=32)
def _abstract_boxed(cfg: ModelConfig):
    validate(cfg)
    return jax.eval_shape(functools.partial(_boxed, cfg), jax.random.key(0))


def abstract(cfg: ModelConfig):
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    return meta.unbox(_abstract_boxed(cfg))


def specs(cfg: ModelConfig):
    """The parameter tree's logical axes: one tuple of names per array."""

    def names(path, box):
        stacked = any(getattr(k, "key", None) == "blocks" for k in path)
        return (("layers",) if stacked else ()) + tuple(box.names)

    boxed = _abstract_boxed(cfg)
    return jax.tree_util.tree_map_with_path(names, boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))


def unstack(params):
    """The same parameters with the layers of each stack apart, as a tuple: for `apply` with a cache alone."""

    def apart(stack):
        layers = [list(w) for w in jax.tree.leaves(stack)]
        return tuple(jax.tree.unflatten(jax.tree.structure(stack), one) for one in zip(*layers, strict=True))

    blocks = {slot: apart(stack) for slot, stack in params["backbone"]["blocks"].items()}
    return params | {"backbone": params["backbone"] | {"blocks": blocks}}


# --------------------------------------------------------------------------------------------------------- forward
def _angles(cfg: ModelConfig, positions_BT):
    """Kind of layer -> (cosine, sine) of its rotary positions, or None."""
    ropes = {kind: cfg.rope_of(kind) for kind in cfg.slots}
    tables = {
        rope: None if rope is None else cos_sin(rope, cfg.head_dim, positions_BT, jnp.dtype(cfg.precision.compute))
        for rope in ropes.values()
    }
    return {kind: tables[rope] for kind, rope in ropes.items()}


def apply(cfg: ModelConfig, params, tokens_BT, positions_BT, segments_BT, cache=None, key=None):
    """(hidden [B, T, D] after the final norm, new cache, aux).

    int32 tokens, positions (counted from 0 in each segment) and segments; segment 0 is padding. With a cache
    (`init_cache`) the new tokens also attend what it holds and are added to it; layers then run unrolled. `key` turns
    dropout on. `aux` holds scalars that a loss may add (none yet).
    """
    if params.get("adapters"):
        raise ValueError("the adapters are in no use yet: lora.attach or lora.merge first")
    embed_key = layers_key = None
    if key is not None and cfg.dropout > 0:
        embed_key, layers_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    backbone = params["backbone"]
    x = Embed(cfg).apply({"params": backbone["embed"]}, tokens_BT, positions_BT)
    x = dropout(x, cfg.dropout, embed_key)
    angles = _angles(cfg, positions_BT)

    def block(kind, weights, x, layer, cache=None):
        layer_key = None if layers_key is None else jax.random.fold_in(layers_key, layer)
        module = Block(cfg, kind)
        return module.apply({"params": weights}, x, positions_BT, segments_BT, angles[kind], cache, layer_key)

    x, cache = _run_layers(cfg, backbone["blocks"], block, x, cache)
    if cfg.norm_placement != "post":
        x = Norm(cfg, "embed").apply({"params": backbone["final_norm"]}, x)
    return x, cache, {}


def _run_layers(cfg: ModelConfig, blocks, block, x, cache):
    def at(slot, i):
        stack = blocks[str(slot)]
        return stack[i] if isinstance(stack, tuple) else jax.tree.map(lambda w: w[i], stack)

    period = len(cfg.slots)
    if cache is not None:
        new = []
        for i in range(cfg.layers):
            x, layer = block(cfg.kind(i), at(i % period, i // period), x, i, cache[i])
            new.append(layer)
        return x, tuple(new)

    def one(kind):
        def run(weights, x, layer):
            return block(kind, weights, x, layer)[0]

        if cfg.remat == "none":
            return run
        return jax.checkpoint(run, policy=REMAT[cfg.remat], prevent_cse=not cfg.scan)

    runs = {kind: one(kind) for kind in cfg.slots}
    whole, rest = divmod(cfg.layers, period)
    done = 0
    if cfg.scan and whole > 1:

        def step(x, xs):
            weights, i = xs
            for slot, kind in enumerate(cfg.slots):
                x = runs[kind](weights[slot], x, i * period + slot)
            return x, None

        stacks = [jax.tree.map(lambda w: w[:whole], blocks[str(s)]) for s in range(period)]
        x, _ = jax.lax.scan(step, x, (stacks, jnp.arange(whole)))
        done = cfg.layers - rest
    for i in range(done, cfg.layers):
        x = runs[cfg.kind(i)](at(i % period, i // period), x, i)
    return x, None


def unembed(cfg: ModelConfig, params, hidden):
    """Logits [..., V] in float32 (or wider), soft-capped; the padded columns are masked to a large negative number."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    kernel = params["backbone"]["embed"]["tokens"].T if cfg.tied else params["heads"]["lm"]["kernel"]
    logits = linear(hidden, kernel, dtype=dtype)
    if cfg.logit_softcap is not None:
        logits = cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)
    if cfg.vocab_size != logits.shape[-1]:
        column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        logits = jnp.where(column < cfg.vocab_size, logits, MASKED)
    return logits


def attention_weights(cfg: ModelConfig, params, tokens_BT, positions_BT, segments_BT):
    """Who attends to whom, to look at: float32 [L, B, H, T, T], rows summing to 1 (at padding they mean nothing)."""
    taken = []

    def watch(kind, weights, x, layer, cache):
        args = (x, positions_BT, segments_BT, angles[kind])
        (x, _), seen = Block(cfg, kind).apply({"params": weights}, *args, mutable=["intermediates"])
        taken.append(seen["intermediates"]["attention"]["weights"][0])
        return x, None

    angles = _angles(cfg, positions_BT)
    x = Embed(cfg).apply({"params": params["backbone"]["embed"]}, tokens_BT, positions_BT)
    _run_layers(cfg, params["backbone"]["blocks"], watch, x, (None,) * cfg.layers)
    return jnp.stack(taken).astype(jnp.float32)
