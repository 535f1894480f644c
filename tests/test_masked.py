"""Masked entries never matter, in value or gradient, and narrow or integer input is widened first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import masked

MASK = np.asarray([[True, False, True, True], [False, False, False, False]])
SEGMENTS = np.asarray([[1, 1, 1, 2], [1, 1, 2, 0]], np.int32)
REDUCTIONS = {
    "sum": masked.sum,
    "mean": masked.mean,
    "whiten": lambda x, mask: masked.whiten(x, mask, keep_mean=True) ** 2,
    "segment_sum": lambda x, mask: masked.segment_sum(x, mask, SEGMENTS, 3),
    "over_segment": lambda x, mask: masked.over_segment(x, mask, SEGMENTS),
    "at_last": lambda x, mask: masked.at_last(x, mask, SEGMENTS, 3),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_masked_entries_reach_neither_value_nor_gradient(name):
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    outcome = jax.jit(jax.value_and_grad(lambda x: jnp.sum(REDUCTIONS[name](x, MASK))))
    value, gradient = outcome(x)
    assert np.isfinite(value) and gradient[MASK].any() and not gradient[~MASK].any()
    for junk in (np.nan, np.inf, -1e30):
        other, slope = outcome(np.where(MASK, x, junk))
        assert float(other) == float(value)
        np.testing.assert_array_equal(slope, gradient)


def test_nothing_under_the_mask_gives_zeros():
    x, nothing = np.full((2, 4), np.nan, np.float32), np.zeros((2, 4), bool)
    reductions = REDUCTIONS | {"last_of_segments": lambda x, mask: masked.last_of_segments(mask, SEGMENTS)}
    outcome = jax.jit(lambda *a: {name: f(*a) for name, f in reductions.items()})(x, nothing)
    assert not [name for name, out in outcome.items() if out.any()]


@pytest.mark.parametrize("dtype", ["bfloat16", "int32"])
def test_whitening_is_done_in_float32(dtype):
    x = jnp.asarray([[1, 2, 3, 4]], dtype)
    white = masked.whiten(x, np.ones((1, 4), bool))
    assert white.dtype == jnp.float32
    np.testing.assert_allclose(white, [[-1.341641, -0.447214, 0.447214, 1.341641]], rtol=1e-5)


def test_padding_belongs_to_no_segment():
    """Not even where a mask says that it counts."""
    x, everything = np.ones((2, 4), np.float32), np.ones((2, 4), bool)
    sums, over, last = jax.jit(
        lambda x, mask: (
            masked.segment_sum(x, mask, SEGMENTS, 2),
            masked.over_segment(x, mask, SEGMENTS),
            masked.last_of_segments(mask, SEGMENTS),
        )
    )(x, everything)
    np.testing.assert_array_equal(sums, [[3, 1], [2, 1]])
    np.testing.assert_array_equal(over[1], [2, 2, 1, 0])
    np.testing.assert_array_equal(last[1], [False, True, True, False])
