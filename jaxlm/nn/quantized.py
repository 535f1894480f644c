"""Keys and values in eight bits, and attention's two products with keys and values of any dtype.

Legend: B batch, T query length, S key length, H query heads, K key/value heads, G = H / K, C head width.
Symmetric absmax quantization of a cache: one scale for each token and key/value head, found when the token is written,
so nothing is calibrated and no written value ever changes. vLLM calls it `int8_per_token_head`; in MaxText it is
`kv_quant_axis: dkv`. (KIVI, arXiv:2402.02750, shows why two bits need more: keys are then scaled by channel.)

The scales stay out of the products: (q . k8) * scale_k and (p * scale_v) . v8 are q . k and p . v, and eight-bit
numbers are exact in bfloat16. So no cache in float is made where the compiler turns eight bits into float as it reads
them. XLA on a CPU writes out what it converts: there the keys are met a slice at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.sharding import platform

LARGEST = 127  # -128 is left out: the range is symmetric
SLICE = 128  # keys that are converted at once on a CPU


class Quantized(NamedTuple):
    """`values * scale[..., None]`: int8 [..., C] and float32 [...]."""

    values: jax.Array
    scale: jax.Array


def quantize(x) -> Quantized:
    """x [..., C] with one scale for each of [...]; at most half a scale is lost in each value. NaN stays NaN."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / LARGEST
    values = jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None])
    return Quantized(values.astype(jnp.int8), scale)


def parts(y):
    """(values, scale or None) of keys or values, quantized or not."""
    return y if isinstance(y, Quantized) else (y, None)


def scores_BHTS(q_BTHC, k_BSKC, dtype):
    """q . k in `dtype`."""
    q_BHTC, (k_BSKC, scale_BSK) = q_BTHC.swapaxes(1, 2), parts(k_BSKC)

    def write(scores, k_BKSC, at):
        new = _per_head("BHTC,BHSC->BHTS", q_BHTC, k_BKSC, dtype)
        return new if scores is None else jax.lax.dynamic_update_slice_in_dim(scores, new, at, axis=3)

    like = jax.ShapeDtypeStruct((*q_BHTC.shape[:3], k_BSKC.shape[1]), dtype)
    return _scaled(_over_keys(write, like, k_BSKC, q_BHTC.dtype), scale_BSK)


def mixed_BHTC(weights_BHTS, v_BSKC, dtype):
    """weights . v in `dtype`, of weights in float32 or wider."""
    v_BSKC, scale_BSK = parts(v_BSKC)
    weights_BHTS = _scaled(weights_BHTS, scale_BSK).astype(dtype)

    def add(total, v_BKSC, at):
        if total is None:
            return _per_head("BHTS,BHSC->BHTC", weights_BHTS, v_BKSC, dtype)
        weights = jax.lax.dynamic_slice_in_dim(weights_BHTS, at, v_BKSC.shape[2], axis=3)
        return total + _per_head("BHTS,BHSC->BHTC", weights, v_BKSC, total.dtype)

    shape = (*weights_BHTS.shape[:3], v_BSKC.shape[3])
    like = jax.ShapeDtypeStruct(shape, jnp.promote_types(dtype, jnp.float32))
    return _over_keys(add, like, v_BSKC, dtype).astype(dtype)


def _scaled(x_BHTS, scale_BSK):
    """Scores or weights of keys, times the scale of each."""
    if scale_BSK is None:
        return x_BHTS
    scale_BKS = scale_BSK.swapaxes(1, 2)
    return x_BHTS * jnp.repeat(scale_BKS, x_BHTS.shape[1] // scale_BKS.shape[1], axis=1)[:, :, None]


def _over_keys(fold, like, y_BSKC, dtype):
    """`fold(None, y, 0)` with all of `y` [B, K, S, C] in `dtype`; or, from zeros `like` that on, `fold(result, slice,
    its first key)` over slices."""
    y_BKSC = y_BSKC.swapaxes(1, 2)
    S = y_BKSC.shape[2]
    if y_BKSC.dtype != jnp.int8 or S <= SLICE or platform() != "cpu":
        return fold(None, y_BKSC.astype(dtype), 0)

    def step(result, at, count):
        return fold(result, jax.lax.dynamic_slice_in_dim(y_BKSC, at, count, axis=2).astype(dtype), at)

    whole, rest = divmod(S, SLICE)
    zeros = jnp.zeros(like.shape, like.dtype)
    result = jax.lax.fori_loop(0, whole, lambda i, r: step(r, i * SLICE, SLICE), zeros)
    return step(result, whole * SLICE, rest) if rest else result


def _per_head(equation, x_BH, y_BKSC, dtype):
    """einsum of `x` [B, H, ...] with each head's key or value. A group dim of 1 is left out: it slows XLA on CPU."""
    H, K = x_BH.shape[1], y_BKSC.shape[1]
    if H == K:
        return jnp.einsum(equation, x_BH, y_BKSC, preferred_element_type=dtype)
    x, y, out = equation.replace("->", ",").split(",")
    grouped = f"{x.replace('H', 'HG')},{y}->{out.replace('H', 'HG')}"
    z = jnp.einsum(grouped, x_BH.reshape(-1, K, H // K, *x_BH.shape[2:]), y_BKSC, preferred_element_type=dtype)
    return z.reshape(-1, H, *z.shape[3:])
