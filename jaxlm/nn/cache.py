"""Keys and values kept while decoding: a tuple of one dict per layer, each with its own capacity.

Legend: B batch (slots), T new tokens, S capacity, K key/value heads, C head width. A token at position p lies in entry
p % capacity, so a window layer is a ring of its last `window` tokens. One row holds one sequence, whose positions count
from 0 without gaps; a full layer's capacity must exceed the last position. Keys and values lie head by head, as
attention's products read them: otherwise XLA turns the whole cache around at each step. A model with short convolutions
also keeps, under `recent_*`, the last inputs of each.

What was fed may be taken back (`rewind`): rings and last inputs then keep `spare` tokens more than they need.
"""

import functools

import jax
import jax.numpy as jnp

from jaxlm.nn.definition import ModelConfig

AXES = {
    "k": ("batch", "kv_heads", None, "head_width"),
    "v": ("batch", "kv_heads", None, "head_width"),
    "key_positions": ("batch", None),
    "key_segments": ("batch", None),
}
RECENT = ("recent_attention", "recent_mlp")


def init_cache(cfg: ModelConfig, batch: int, capacity: int, spare: int = 0):
    """An empty cache; window layers keep min(capacity, window + spare) entries. Segment 0 marks an empty entry.

    spare: the most tokens that `rewind` will take back at once.
    """
    dtype = jnp.dtype(cfg.precision.cache or cfg.precision.compute)

    def layer(kind: str):
        window = cfg.window_of(kind)
        size = capacity if window is None else min(capacity, window + spare)
        values = (batch, cfg.key_heads, size, cfg.head_dim)
        entries = {
            "k": jnp.zeros(values, dtype),
            "v": jnp.zeros(values, dtype),
            "key_positions": jnp.zeros((batch, size), jnp.int32),
            "key_segments": jnp.zeros((batch, size), jnp.int32),
        }
        if cfg.short_conv is not None:
            entries |= {name: jnp.zeros((batch, cfg.short_conv - 1 + spare, cfg.width), dtype) for name in RECENT}
        return entries

    return tuple(layer(cfg.kind(i)) for i in range(cfg.layers))


def cache_specs(cfg: ModelConfig):
    """Logical axes of the same tree."""
    recent = {name: ("batch", None, None) for name in RECENT if cfg.short_conv is not None}
    return tuple(AXES | recent for _ in range(cfg.layers))


def _entry_axis(name: str) -> int:
    return 2 if name in ("k", "v") else 1


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


def entries(k_BTKC, v_BTKC, positions_BT, segments_BT) -> dict:
    """Keys and values of tokens as a layer's cache has them."""
    k_BKTC, v_BKTC = k_BTKC.swapaxes(1, 2), v_BTKC.swapaxes(1, 2)
    return {"k": k_BKTC, "v": v_BKTC, "key_positions": positions_BT, "key_segments": segments_BT}


def beside(layer: dict, new: dict) -> dict:
    """The entries of a layer's cache and `new` ones after them."""
    return {n: jnp.concatenate([layer[n], x.astype(layer[n].dtype)], _entry_axis(n)) for n, x in new.items()}


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

    return layer | {
        n: jax.vmap(functools.partial(put, n))(layer[n], entry_BT, x.astype(layer[n].dtype)) for n, x in new.items()
    }
