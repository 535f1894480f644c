"""A state as what a checkpoint holds of it: arrays by their slash-joined names."""

import jax
import jax.numpy as jnp

from jaxlm import tree


def describe(x) -> str:
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def named(state) -> dict:
    """Name -> leaf; an error for a leaf that is no array, or for two leaves of one name."""
    leaves = tree.named_leaves(state)
    for name, x in leaves:
        if not hasattr(x, "shape") or not hasattr(x, "dtype") or jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            raise TypeError(f"a checkpoint holds plain arrays, but {name!r} is {type(x).__name__}")
    if len(dict(leaves)) != len(leaves):
        raise ValueError("two leaves of the state have the same name")
    return dict(leaves)


@jax.jit
def _first_bad(leaves: list):
    bad = jnp.stack([~jnp.all(jnp.isfinite(x)) for x in leaves])
    return jnp.where(bad.any(), jnp.argmax(bad), len(leaves))  # a scalar: every process has it whole


def not_finite(flat: dict) -> str | None:
    """The name of an array with a value that is not finite."""
    floats = {n: x for n, x in flat.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    return [*floats, None][int(jax.device_get(_first_bad(list(floats.values()))))] if floats else None


def nested(flat: dict) -> dict:
    out = {}
    for name, x in flat.items():
        *parents, last = name.split("/")
        node = out
        for p in parents:
            node = node.setdefault(p, {})
        node[last] = x
    return out
