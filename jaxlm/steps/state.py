"""The training state: everything that a checkpoint must hold for the run to go on as if it had not stopped."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxlm import rng, sharding
from jaxlm.nn import heads as trees
from jaxlm.nn.heads import LM
from jaxlm.nn.lora import LoRA
from jaxlm.optim import optimizers

WHOLE = ("backbone", "heads", "adapters")


def branches(params, names: tuple[str, ...]) -> dict:
    """These branches of a tree like the parameters."""
    return {name: params[name] for name in names}


@flax.struct.dataclass
class TrainState:
    """params: the tree of the model contract. step: updates attempted so far. skipped: those left out.

    trainable: the branches of `params` that updates change; the optimizer has a state for these alone.
    There is no random state: keys are folds of the seed with `step`.
    """

    params: dict
    opt_state: optax.OptState
    step: jax.Array
    skipped: jax.Array
    trainable: tuple[str, ...] = flax.struct.field(pytree_node=False, default=WHOLE)

    @property
    def trained(self) -> dict:
        return branches(self.params, self.trainable)


def begin(params, axes, optimizer, precision, trainable: tuple[str, ...] = WHOLE) -> TrainState:
    """These parameters, whose logical axes are `axes`, with an empty optimizer state for the trainable branches."""
    tx = optimizers.build(optimizer, branches(axes, trainable), 0, 1, jnp.dtype(precision.moments))
    opt_state = tx.init(branches(params, trainable))
    # Two zeros, not one twice: a donated buffer may appear only once.
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), trainable)


def create(model, optimizer, seed: int, lora: LoRA | None = None, heads: tuple[str, ...] = LM) -> TrainState:
    """Parameters from the seed's INIT stream and an empty optimizer state.

    With `lora`, its adapters alone train, and heads that a language model does not have.
    """
    params = trees.init(model, lora, rng.stream_key(jax.random.key(seed), rng.INIT), heads)
    trainable = WHOLE if lora is None else ("adapters",) if heads == LM else ("heads", "adapters")
    return begin(params, trees.specs(model, lora, heads), optimizer, model.precision, trainable)


def _is_masked(x) -> bool:
    """Where an optimizer for some of the parameters has no state for this one."""
    return isinstance(x, optax.MaskedNode)


def abstract(model, optimizer, mesh: Mesh, lora: LoRA | None = None, heads: tuple[str, ...] = LM) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it."""
    state = jax.eval_shape(lambda: create(model, optimizer, 0, lora, heads))
    return spread(state, trees.specs(model, lora, heads), optimizer, mesh)


def spread(state: TrainState, axes, optimizer, mesh: Mesh) -> TrainState:
    """The shapes of a state with the shardings that the logical axes of its parameters give them and their moments."""
    whole = sharding.replicated(mesh)
    params = sharding.tree_shardings(mesh, axes, state.params)
    tx = optimizers.build(optimizer, branches(axes, state.trainable), 0, 1)

    def like(leaf, p, s):
        if _is_masked(leaf):
            return leaf
        # A factored moment is smaller than its parameter and cannot take its sharding.
        return s if leaf.shape == p.shape else whole

    opt_state = optax.tree.map_params(
        tx,
        like,
        state.opt_state,
        state.trained,
        branches(params, state.trainable),
        transform_non_params=lambda _: whole,
        is_leaf=_is_masked,
    )
    shardings = TrainState(params, opt_state, whole, whole, state.trainable)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def create_sharded(
    model, optimizer, seed: int, mesh: Mesh, lora: LoRA | None = None, heads: tuple[str, ...] = LM
) -> TrainState:
    """`create`, made in place on the mesh: no device ever holds more than its shards."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract(model, optimizer, mesh, lora, heads))
    with jax.set_mesh(mesh):
        return jax.jit(lambda: create(model, optimizer, seed, lora, heads), out_shardings=shardings)()
