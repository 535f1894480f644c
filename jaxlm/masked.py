"""Reductions under a mask. Masked entries never matter, not even when they are NaN or infinite.

Legend: B rows, T positions, S segments. Segments are contiguous, counted from 1 within a row, and 0 is padding; column
s - 1 of a [B, S] array belongs to segment s. A row that holds one sequence is the case of segments in {0, 1}.
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


def segment_sum(x_BT, mask_BT, segments_BT, count: int):
    """Sums over the true entries of each segment, [B, count]; segments above `count` are left out."""
    # A compare and a sum, not a scatter: the same bits each time on every kind of device.
    own = segments_BT[..., None] == jnp.arange(1, count + 1, dtype=segments_BT.dtype)[None, None]
    return sum(x_BT[..., None], own & mask_BT[..., None], axis=1)


def at_last(x_BT, mask_BT, segments_BT, count: int):
    """[B, count]: x at the last true entry of each segment, such as a score at the last real token; 0 without one."""
    return segment_sum(x_BT, last_of_segments(mask_BT, segments_BT), segments_BT, count)


def over_segment(x_BT, mask_BT, segments_BT):
    """[B, T]: to every position the sum over the true entries of its own segment, 0 at padding."""

    def join(before, after):
        return before[0] | after[0], after[1] + jnp.where(after[0], 0, before[1])

    change = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 1)), constant_values=True)
    begins, ends = change[:, :-1], change[:, 1:]
    x = jnp.where(mask_BT & (segments_BT > 0), x_BT, 0)
    _, so_far = jax.lax.associative_scan(join, (begins, x), axis=1)
    _, total = jax.lax.associative_scan(join, (ends, jnp.where(ends, so_far, 0)), reverse=True, axis=1)
    return total


def next_true(mask_BT, segments_BT):
    """(int32, bool), both [B, T]: where the next true entry after t is, and whether it is of the same segment.

    Where there is none in the row, the index is the last one and the answer false.
    """
    T = mask_BT.shape[1]
    index = jax.lax.broadcasted_iota(jnp.int32, mask_BT.shape, 1)
    following = jax.lax.cummin(jnp.where(mask_BT, index, T), axis=1, reverse=True)
    following = jnp.pad(following[:, 1:], ((0, 0), (0, 1)), constant_values=T)
    at = jnp.minimum(following, T - 1)
    return at, (following < T) & (jnp.take_along_axis(segments_BT, at, axis=1) == segments_BT)


def last_of_segments(mask_BT, segments_BT):
    """Bool [B, T]: true at the last true entry of each segment."""
    return mask_BT & (segments_BT > 0) & ~next_true(mask_BT, segments_BT)[1]
