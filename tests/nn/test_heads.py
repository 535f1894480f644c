"""Scalar heads: how they start, where they stand in the tree, and that they are read in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import heads, lora
from jaxlm.nn.lora import LoRA
from jaxlm.nn.transformer import ModelConfig

SMALL = ModelConfig(vocab_size=20, vocab_multiple=4, layers=1, width=16, heads=2, hidden=32)
NAMES = (("lm",), ("reward",), ("lm", "value"), ("value", "reward"))


@pytest.mark.parametrize("names", NAMES, ids="+".join)
def test_shapes_axes_and_values_have_one_structure(names):
    for cfg, adapters in ((SMALL, None), (SMALL, LoRA(rank=2))):
        params = jax.eval_shape(lambda: heads.init(cfg, adapters, jax.random.key(0), names))  # noqa: B023
        described = heads.abstract(cfg, adapters, names)
        assert params == described and set(params["heads"]) == set(names)
        specs = heads.specs(cfg, adapters, names)
        jax.tree.map(lambda x, axes: len(x.shape) == len(axes) or pytest.fail(str(axes)), described, specs)


def test_other_heads_leave_the_rest_as_it_is():
    @jax.jit
    def made(key):
        return heads.init(SMALL, None, key), heads.init(SMALL, None, key, ("reward",)), lora.init(SMALL, None, key)

    plain, scored, own = made(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, plain, own)
    jax.tree.map(np.testing.assert_array_equal, plain["backbone"], scored["backbone"])


def test_values_start_at_zero_and_rewards_with_their_std():
    """std 1 / sqrt(D + 1) (Ziegler et al. 2019)."""
    wide = ModelConfig(vocab_size=4, vocab_multiple=4, layers=1, width=20_000, heads=1)
    reward = heads.init_scalar("reward", wide, jax.random.key(0))
    assert float(jnp.std(reward["kernel"])) == pytest.approx(20_001**-0.5, rel=0.03)
    assert float(jnp.mean(reward["kernel"])) == pytest.approx(0, abs=2e-4) and float(reward["bias"]) == 0
    values = heads.apply(heads.init_scalar("value", SMALL, jax.random.key(0)), jnp.ones((2, 8, 16)))
    assert values.shape == (2, 8) and not np.any(values)


def test_half_precision_is_read_in_float32():
    hidden = jax.random.normal(jax.random.key(0), (2, 3, 16), jnp.bfloat16)
    head = {"kernel": jax.random.normal(jax.random.key(1), (16,)), "bias": jnp.float32(0.25)}
    want = np.float64(hidden) @ np.float64(head["kernel"]) + 0.25
    given = heads.apply(head, hidden)
    assert given.dtype == jnp.float32
    np.testing.assert_allclose(given, want, rtol=1e-5, atol=1e-5)
