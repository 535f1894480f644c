"""A tiny model and packed rows of ranked answers, for the objectives that learn from what is there.

Legend: B rows, T positions (a row holds T + 1 tokens, the last one padding), S answers that a row holds at most.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import sharding
from jaxlm.data.trajectory import Trajectory
from jaxlm.nn import heads
from jaxlm.nn.transformer import ModelConfig, Precision
from jaxlm.steps import update
from jaxlm.steps.update import Train

MODEL = ModelConfig(vocab_size=50, vocab_multiple=2, layers=1, width=16, heads=2, kv_heads=1, hidden=32)
DOUBLE = dataclasses.replace(MODEL, precision=Precision("float64", "float64", "float64", "float64"))
TRAIN = Train(loss_chunk=None)
B, T, S = 8, 24, 6
# Answers of each prompt, row after row: K differs, rows differ in what they hold, some are not full.
SHAPE = [(3, 2), (2,), (4,), (2, 2), (2, 3), (2, 2), (3,), (4, 2)]


def batch(seed: int = 0) -> Trajectory:
    """Prompts of one or two tokens, answers of one or two, ranks with ties."""
    rng = np.random.default_rng(seed)
    tokens, positions, segments = (np.zeros((B, T + 1), np.int32) for _ in range(3))
    mask = np.zeros((B, T + 1), bool)
    prompt_id, rank = np.zeros((B, S), np.int32), np.zeros((B, S), np.int32)
    for b, row in enumerate(SHAPE):
        at = s = 0
        for n, k in enumerate(row, 1):
            prompt = rng.integers(0, 50, rng.integers(1, 3))
            ranks = rng.permutation(k)
            if k > 2:
                ranks[0] = ranks[1]
            for r in ranks:
                answer = rng.integers(0, 50, rng.integers(1, 3))
                length = len(prompt) + len(answer)
                where = slice(at, at + length)
                tokens[b, where], positions[b, where] = np.concatenate([prompt, answer]), np.arange(length)
                segments[b, where], mask[b, at + len(prompt) : at + length] = s + 1, True
                prompt_id[b, s], rank[b, s] = n, r
                at, s = at + length, s + 1
    return Trajectory(
        tokens=tokens, positions=positions, segments=segments, loss_mask=mask, prompt_id=prompt_id, rank=rank
    )


@functools.cache
def params(model=MODEL, names=("lm",), seed: int = 0, scale: float = 0.3):
    """Random everywhere, so that nothing hides."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * scale, x.dtype), heads.abstract(model, None, names)
    )


def answers(b: Trajectory):
    """(row, segment, its tokens, its mask, number of its prompt, rank) of each answer."""
    for row in range(B):
        for s in range(1, b.segments[row].max() + 1):
            here = b.segments[row] == s
            yield row, s, b.tokens[row][here], b.loss_mask[row][here], b.prompt_id[row, s - 1], b.rank[row, s - 1]


def gradients(loss, values, rows: Trajectory, accumulation: int = 1, dtype="float32", mesh=None):
    """(gradient, {"loss"}, metrics) of a loss of the update contract; on a mesh the rows are spread over it."""
    fn = functools.partial(update.gradients, loss, accumulation=accumulation, dtype=dtype)
    if mesh is None:
        return jax.jit(fn)(values, rows, jax.random.key(1))
    mesh = sharding.make_mesh(sharding.MeshConfig(**mesh))
    with jax.set_mesh(mesh):
        rows = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(("replica", "fsdp"))))
        return jax.jit(fn)(values, rows, jax.random.key(1))


def assert_close(a, b, rtol):
    """Within rtol of the largest entry of all: some gradients are 0 but for rounding."""
    scale = max(float(jnp.max(jnp.abs(y))) for y in jax.tree.leaves(b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=rtol * scale)


def same_on_microbatches_and_devices(loss, names, mesh, counts=(4,)):
    """So many microbatches, and 8 devices, give one gradient, in float64; it is returned. loss: of `DOUBLE`."""
    with jax.enable_x64(True):
        values, rows = params(DOUBLE, names), batch()
        whole = gradients(loss, values, rows, dtype="float64")
        others = [gradients(loss, values, rows, n, "float64") for n in counts]
        for other in (*others, gradients(loss, values, rows, dtype="float64", mesh=mesh)):
            assert_close(other[0], whole[0], 1e-9)
            assert_close(other[1], whole[1], 1e-9)
        return jax.device_get(whole)
