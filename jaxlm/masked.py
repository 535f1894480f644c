"""Reductions under a mask. Masked entries never matter, not even when they are NaN or infinite.

Legend: B rows, T positions, S segments. Segments count from 1 within a row, 0 is padding; column s - 1 of a [B, S]
array belongs to segment s. A row that holds one sequence is the case of segments in {0, 1}.
"""

import jax
import jax.numpy as jnp


def sum(x, mask, axis=None):
    return jnp.sum(jnp.where(mask, x, 0), axis=axis)


def mean(x, mask, axis=None):
    """Mean over the true entries; 0 where there are none."""
    weight = jnp.sum(mask, axis=axis)
    return sum(x, mask, axis) / jnp.maximum(weight, 1)


def wide(x):
    """`x` as float32, or as what it is where that is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def whiten(x, mask, keep_mean: bool = False, ddof: int = 0):
    """Zero mean and unit variance over all true entries; masked entries come out 0 (Ziegler et al. 2019).

    The statistics are those of the whole array: call it on the whole batch, before it is cut. `keep_mean` scales only;
    `ddof` 1 is Bessel's correction.
    """
    x = jnp.where(mask, wide(x), 0)
    center = mean(x, mask)
    variance = sum(jnp.square(x - center), mask) / jnp.maximum(jnp.sum(mask) - ddof, 1)
    white = (x - center) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask, white + center if keep_mean else white, 0)


def last_true(mask):
    """Index of the last true entry along the last dim, int32; 0 where there is none."""
    index = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    return jnp.max(jnp.where(mask, index, 0), axis=-1)


def _by_segment(reduce, x_BT, segments_BT, count: int):
    out = jax.vmap(lambda x, s: reduce(x, s, count + 1))(x_BT, segments_BT)
    return out[:, 1:]


def segment_sum(x_BT, mask_BT, segments_BT, count: int):
    """Sums over the true entries of each segment, [B, count]; segments above `count` are left out."""
    return _by_segment(jax.ops.segment_sum, jnp.where(mask_BT, x_BT, 0), segments_BT, count)


def spread(x_BS, segments_BT):
    """[B, T]: to every position what its segment has in x_BS, 0 at padding."""
    column = jnp.clip(segments_BT - 1, 0, x_BS.shape[1] - 1)
    return jnp.where(segments_BT > 0, jnp.take_along_axis(x_BS, column, axis=1), 0)


def over_segment(x_BT, mask_BT, segments_BT):
    """[B, T]: to every position the sum over the true entries of its own segment, 0 at padding."""
    return spread(segment_sum(x_BT, mask_BT, segments_BT, x_BT.shape[1]), segments_BT)


def first_of_segments(mask_BT, segments_BT):
    """Bool [B, T]: true at the first true entry of each segment."""
    T = mask_BT.shape[1]
    index = jax.lax.broadcasted_iota(jnp.int32, mask_BT.shape, 1)
    first = _by_segment(jax.ops.segment_min, jnp.where(mask_BT, index, T), segments_BT, T)
    return mask_BT & (segments_BT > 0) & (index == spread(first, segments_BT))


def last_of_segments(mask_BT, segments_BT):
    """Bool [B, T]: true at the last true entry of each segment."""
    return first_of_segments(mask_BT[:, ::-1], segments_BT[:, ::-1])[:, ::-1]


def at_last(x_BT, mask_BT, segments_BT, count: int):
    """[B, count]: x at the last true entry of each segment, such as a score at the last real token; 0 without one."""
    return segment_sum(x_BT, last_of_segments(mask_BT, segments_BT), segments_BT, count)
