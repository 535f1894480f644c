"""Keys and values kept while decoding: a tuple of one dict per layer, each with its own capacity.

Legend: B batch (slots), T new tokens, S capacity, K key/value heads, C head width. A token at position p lies in entry
p % capacity, so a window layer is a ring of its last `window` tokens. One row holds one sequence, whose positions count
from 0 without gaps; a full layer's capacity must exceed the last position. Keys and values lie head by head, as
attention's products read them: otherwise XLA turns the whole cache around at each step. A model with short convolutions
also keeps, under `recent_*`, the last inputs of each.

The dtype is `precision.cache`, or that of computation where it is unset. In int8, keys and values are `Quantized`, with
a scale for each entry and head; last inputs, of which there are few, are then kept as they were computed.

Every device of mesh axis `context` has all entries of its rows, and decodes them: that axis cuts what is trained and
scored alone.

What was fed may be taken back (`rewind`): rings and last inputs then keep `spare` tokens more than they need.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxlm.config import UserError
from jaxlm.nn.definition import CACHE_DTYPES, ModelConfig
from jaxlm.nn.quantized import Quantized, quantize

RECENT = ("recent_attention", "recent_mlp")


def cache_dtype(cfg: ModelConfig) -> str:
    """The name of the dtype in which keys and values are kept."""
    if cfg.precision.cache not in (None, *CACHE_DTYPES):
        raise UserError(f"model.precision.cache must be one of {', '.join(CACHE_DTYPES)}, got {cfg.precision.cache!r}")
    return cfg.precision.cache or cfg.precision.compute


def with_cache_dtype(cfg: ModelConfig, name: str | None) -> ModelConfig:
    """The model with keys and values kept in the dtype of that name; with None, as its definition has it."""
    return cfg if name is None else dataclasses.replace(cfg, precision=dataclasses.replace(cfg.precision, cache=name))


def init_cache(cfg: ModelConfig, batch: int, capacity: int, spare: int = 0):
    """An empty cache; window layers keep min(capacity, window + spare) entries. Segment 0 marks an empty entry.

    spare: the most tokens that `rewind` will take back at once.
    """
    dtype = jnp.dtype(cache_dtype(cfg))

    def stored(size: int):
        shape = (batch, cfg.key_heads, size, cfg.head_dim)
        if dtype == jnp.int8:
            return Quantized(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
        return jnp.zeros(shape, dtype)

    def layer(kind: str):
        window = cfg.window_of(kind)
        size = capacity if window is None else min(capacity, window + spare)
        entries = {
            "k": stored(size),
            "v": stored(size),
            "key_positions": jnp.zeros((batch, size), jnp.int32),
            "key_segments": jnp.zeros((batch, size), jnp.int32),
        }
        if cfg.short_conv is not None:
            recent = (batch, cfg.short_conv - 1 + spare, cfg.width)
            inputs = jnp.dtype(cfg.precision.compute) if dtype == jnp.int8 else dtype
            entries |= {name: jnp.zeros(recent, inputs) for name in RECENT}
        return entries

    return tuple(layer(cfg.kind(i)) for i in range(cfg.layers))


def cache_specs(cfg: ModelConfig):
    """Logical axes of the same tree."""
    values = ("batch", "kv_heads", None, "head_width")
    stored = Quantized(values, values[:-1]) if cache_dtype(cfg) == "int8" else values
    layer = {"k": stored, "v": stored, "key_positions": ("batch", None), "key_segments": ("batch", None)}
    if cfg.short_conv is not None:
        layer |= {name: ("batch", None, None) for name in RECENT}
    return tuple(layer for _ in range(cfg.layers))


def slot_bytes(cfg: ModelConfig, capacity: int, spare: int = 0) -> int:
    """Bytes of one slot's cache, of all layers: keys, values, scales, last inputs, positions and segments."""
    slot = jax.eval_shape(functools.partial(init_cache, cfg, 1, capacity, spare))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(slot))


def _entry_axis(name: str) -> int:
    return 2 if name in ("k", "v") else 1  # of values and of their scales


def clear(cache, rows_B):
    """Empties the rows where `rows_B` is true, as must be done before a row takes another sequence."""
    return tuple(layer | {"key_segments": jnp.where(rows_B[:, None], 0, layer["key_segments"])} for layer in cache)


def rewind(cache, positions_B, dropped_B):
    """The cache without each row's last `dropped_B` tokens, at most its `spare`: the next stands at `positions_B`."""

    def layer(old):
        kept = old["key_positions"] < positions_B[:, None]
        new = old | {"key_segments": jnp.where(kept, old["key_segments"], 0)}
        for name in RECENT:
            if name in old:  # what slides in is older than a convolution reaches
                new[name] = jax.vmap(lambda x, n: jnp.roll(x, n, axis=0))(old[name], dropped_B)
        return new

    return tuple(layer(x) for x in cache)


def entries(layer: dict, k_BTKC, v_BTKC, positions_BT, segments_BT) -> dict:
    """Keys and values of tokens as the layer's cache has them."""

    def stored(old, new_BTKC):
        new_BKTC = new_BTKC.swapaxes(1, 2)
        return quantize(new_BKTC) if isinstance(old, Quantized) else new_BKTC.astype(old.dtype)

    k, v = stored(layer["k"], k_BTKC), stored(layer["v"], v_BTKC)
    return {"k": k, "v": v, "key_positions": positions_BT, "key_segments": segments_BT}


def beside(layer: dict, new: dict) -> dict:
    """The entries of a layer's cache and `new` ones after them."""

    def join(name, old, x):
        return jnp.concatenate([old, x], _entry_axis(name))

    return {n: jax.tree.map(functools.partial(join, n), layer[n], x) for n, x in new.items()}


def write(layer: dict, new: dict) -> dict:
    """The layer's cache with the new `entries` in it. Padding is not written, nor what a ring would drop again."""
    positions_BT, segments_BT = new["key_positions"], new["key_segments"]
    capacity, T = layer["key_positions"].shape[1], positions_BT.shape[1]
    real = segments_BT > 0
    if T > 1:
        last = jnp.max(jnp.where(real, positions_BT, -1), axis=1, keepdims=True)
        real &= positions_BT > last - capacity
    beyond = capacity + jax.lax.broadcasted_iota(jnp.int32, positions_BT.shape, 1)  # out of range: dropped
    entry_BT = jnp.where(real, positions_BT % capacity, beyond)

    def put(name, old, entry_T, values):
        place = (slice(None),) * (_entry_axis(name) - 1) + (entry_T,)
        return old.at[place].set(values, mode="drop", unique_indices=True)

    def put_rows(name, old, x):
        return jax.vmap(functools.partial(put, name))(old, entry_BT, x)

    return layer | {n: jax.tree.map(functools.partial(put_rows, n), layer[n], x) for n, x in new.items()}
