"""The training state: everything that a checkpoint must hold for the run to go on as if it had not stopped."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxlm import rng, sharding
from jaxlm.nn import transformer
from jaxlm.optim import optimizers


@flax.struct.dataclass
class TrainState:
    """params: the tree of the model contract. step: updates attempted so far. skipped: those left out as non-finite.

    There is no random state: keys are folds of the seed with `step`.
    """

    params: dict
    opt_state: optax.OptState
    step: jax.Array
    skipped: jax.Array


def create(model, optimizer, seed: int) -> TrainState:
    """Parameters from the seed's INIT stream and an empty optimizer state."""
    params = transformer.init(model, rng.stream_key(jax.random.key(seed), rng.INIT))
    tx = optimizers.build(optimizer, transformer.specs(model), 0, 1, jnp.dtype(model.precision.moments))
    # Two zeros, not one twice: a donated buffer may appear only once.
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def _is_masked(x) -> bool:
    """Where an optimizer for some of the parameters has no state for this one."""
    return isinstance(x, optax.MaskedNode)


def abstract(model, optimizer, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it."""
    state = jax.eval_shape(lambda: create(model, optimizer, 0))
    whole = sharding.replicated(mesh)
    params = sharding.tree_shardings(mesh, transformer.specs(model), state.params)
    tx = optimizers.build(optimizer, transformer.specs(model), 0, 1)

    def like(leaf, p, s):
        if _is_masked(leaf):
            return leaf
        # A factored moment is smaller than its parameter and cannot take its sharding.
        return s if leaf.shape == p.shape else whole

    like_params = optax.tree.map_params(
        tx, like, state.opt_state, state.params, params, transform_non_params=lambda _: whole, is_leaf=_is_masked
    )
    shardings = TrainState(params, like_params, whole, whole)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def create_sharded(model, optimizer, seed: int, mesh: Mesh) -> TrainState:
    """`create`, made in place on the mesh: no device ever holds more than its shards."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract(model, optimizer, mesh))
    with jax.set_mesh(mesh):
        return jax.jit(lambda: create(model, optimizer, seed), out_shardings=shardings)()
