"""The decoder's device side: a fixed set of slots, filled a few at a time and decoded all together.

A prefill computes rows of a cache, and `place` copies them to slots: one row to several, where they begin alike. Every
shape hangs on the numbers of slots and rows and on buckets, never on who is in the batch, so that a row meets the same
arithmetic whatever its neighbors are. Under `jax.set_mesh` the cache is spread (rows over the batch axes, heads over
tensor); what the host reads is whole on every device.

B slots, G slots that are filled at once, P rows of a prefill, R any of these, T tokens of a prefill (a bucket), N
longest completion (a bucket), S stop ids, V padded vocabulary, D model width.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from jaxlm import rng
from jaxlm.nn.cache import cache_specs
from jaxlm.nn.transformer import ModelConfig, apply, clear, init_cache, padded_vocab, unembed
from jaxlm.sample.logits import sample
from jaxlm.sharding import constrain, replicated, tree_shardings


@flax.struct.dataclass
class Settings:
    """How each row is sampled."""

    temperature_R: jax.Array
    top_k_R: jax.Array
    top_p_R: jax.Array
    min_p_R: jax.Array
    limit_R: jax.Array  # length of the completion at which it ends
    seed_R: jax.Array
    sample_id_R: jax.Array
    stop_ids_RS: jax.Array  # padded with -1, which no token is
    allowed_RV: jax.Array


@flax.struct.dataclass
class Slots:
    """Everything that the device keeps between two visits of the host."""

    cache: tuple
    settings: Settings
    pending_B: jax.Array  # the last token of the completion, which the model has not seen yet
    position_B: jax.Array  # where it stands
    count_B: jax.Array  # length of the completion
    finished_B: jax.Array
    ids_BN: jax.Array  # the completion, except its forced tokens, which the host knows
    logprobs_BN: jax.Array


@flax.struct.dataclass
class Fed:
    """Rows that have been prefilled: any number of slots may go on from each."""

    cache: tuple
    logits_PV: jax.Array  # of what follows the last token
    position_P: jax.Array  # where that stands


def spread(cfg: ModelConfig, slots: Slots) -> Slots:
    """The slots where they belong under the mesh that is set."""
    whole = jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), slots.replace(cache=()))
    return whole.replace(cache=jax.tree.map(constrain, slots.cache, cache_specs(cfg)))


@functools.partial(jax.jit, static_argnames=("cfg", "B", "N", "S", "capacity", "spare"))
def empty(cfg: ModelConfig, B: int, N: int, S: int, capacity: int, spare: int = 0) -> Slots:
    """Slots that have all finished. spare: as in `init_cache`."""
    zeros = functools.partial(jnp.zeros, (B,))
    settings = Settings(
        temperature_R=zeros(jnp.float32),
        top_k_R=zeros(jnp.int32),
        top_p_R=jnp.ones((B,), jnp.float32),
        min_p_R=zeros(jnp.float32),
        limit_R=zeros(jnp.int32),
        seed_R=zeros(jnp.uint32),
        sample_id_R=zeros(jnp.int32),
        stop_ids_RS=jnp.full((B, S), -1, jnp.int32),
        allowed_RV=jnp.ones((B, padded_vocab(cfg)), bool),
    )
    slots = Slots(
        cache=init_cache(cfg, B, capacity, spare),
        settings=settings,
        pending_B=zeros(jnp.int32),
        position_B=zeros(jnp.int32),
        count_B=zeros(jnp.int32),
        finished_B=jnp.ones((B,), bool),
        ids_BN=jnp.zeros((B, N), jnp.int32),
        logprobs_BN=jnp.zeros((B, N), jnp.float32),
    )
    return spread(cfg, slots)


def described(cfg: ModelConfig, mesh, B: int, N: int, S: int, capacity: int) -> Slots:
    """Shapes, dtypes and shardings of the slots under a mesh, without making them."""
    slots = jax.eval_shape(functools.partial(empty, cfg, B, N, S, capacity))
    whole = jax.tree.map(lambda _: replicated(mesh), slots.replace(cache=()))
    where = whole.replace(cache=tree_shardings(mesh, cache_specs(cfg), slots.cache))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), slots, where)


def layout(tokens_BT: jax.Array, lengths_B: jax.Array, start_B: jax.Array | None = None):
    """(positions, segments) of right-padded rows; padding stands at position 0, which learned positions always have.

    `start_B`: the position of each row's first token, 0 if not given.
    """
    index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    inside_BT = index_BT < lengths_B[:, None]
    if start_B is not None:
        index_BT = start_B[:, None] + index_BT
    return jnp.where(inside_BT, index_BT, 0), inside_BT.astype(jnp.int32)


def token_keys(s: Settings, count_R: jax.Array) -> jax.Array:
    """The key of each row's token number `count_R`."""
    return jax.vmap(lambda seed, *index: rng.stream_key(jax.random.key(seed), rng.SAMPLE, *index))(
        s.seed_R, s.sample_id_R, count_R
    )


def filters(s: Settings, real_R: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(top_k, top_p, min_p). Rows that are not `real_R` must not switch the filters on for rows that want none (only
    speed: the values are the same)."""
    return tuple(jnp.where(real_R, x, off) for x, off in ((s.top_k_R, 0), (s.top_p_R, 1.0), (s.min_p_R, 0.0)))


def _emit(slots: Slots, settings: Settings, slot_R, count_R, logits_RV) -> Slots:
    """Samples the next token of each row and books it in its slot, as number `count_R` of the completion.

    Rows whose slot is B are of no slot: what they draw goes nowhere.
    """
    B = slots.finished_B.shape[0]
    s, real_R = settings, slot_R < B
    logits_RV = constrain(logits_RV, ("batch", None))
    keys_R = token_keys(s, count_R)
    ids_R, logprobs_R = sample(keys_R, logits_RV, s.temperature_R, *filters(s, real_R), s.allowed_RV)
    stopped_R = jnp.any(ids_R[:, None] == s.stop_ids_RS, axis=-1) | (count_R + 1 >= s.limit_R)

    def put(old, new, *place):
        return old.at[(slot_R, *place)].set(new, mode="drop")

    return slots.replace(
        pending_B=put(slots.pending_B, ids_R),
        count_B=put(slots.count_B, count_R + 1),
        finished_B=put(slots.finished_B, stopped_R),
        ids_BN=put(slots.ids_BN, ids_R, count_R),
        logprobs_BN=put(slots.logprobs_BN, logprobs_R, count_R),
    )


def feed(cfg: ModelConfig, params, cache, slot_P, tokens_PT, lengths_P, start_P):
    """(hidden [P, T, D], rows of a cache): what the slots `slot_P` hold once right-padded tokens are fed to them.

    They are fed from `start_P` on: a start of 0 begins another sequence, a later one goes on with the slot's own.
    """
    taken = jax.tree.map(lambda x: x.at[slot_P].get(mode="fill", fill_value=0), cache)
    layouts = layout(tokens_PT, lengths_P, start_P)
    hidden_PTD, rows, _ = apply(cfg, params, tokens_PT, *layouts, clear(taken, start_P == 0))
    return hidden_PTD, jax.tree.map(constrain, rows, cache_specs(cfg))


def copied(cache, rows, row_G, slot_G):
    """The cache with the rows `row_G` of `feed` in its slots `slot_G`."""
    return jax.tree.map(lambda old, new: old.at[slot_G].set(new[row_G], mode="drop"), cache, rows)


@functools.partial(jax.jit, static_argnames=("cfg",))
def prefill(cfg: ModelConfig, params, slots: Slots, slot_P, tokens_PT, lengths_P, start_P) -> Fed:
    """Computes what is fed to slots (see `feed`), for `place`. Rows that are not needed have slot B and length 0."""
    hidden_PTD, rows = feed(cfg, params, slots.cache, slot_P, tokens_PT, lengths_P, start_P)
    last_P11 = jnp.maximum(lengths_P - 1, 0)[:, None, None]
    logits_PV = unembed(cfg, params, jnp.take_along_axis(hidden_PTD, last_P11, axis=1)[:, 0])
    return Fed(rows, constrain(logits_PV, ("batch", None)), constrain(start_P + lengths_P, (None,)))


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("slots",))
def place(cfg: ModelConfig, slots: Slots, fed: Fed, settings: Settings, row_G, slot_G, count_G) -> Slots:
    """Lets the slots `slot_G` go on from the rows `row_G`, each with settings of its own, and samples what follows.

    `count_G`: length of the completion so far. Where there is no slot to fill it is B.
    """

    def put(old, new):
        return old.at[slot_G].set(new, mode="drop")

    slots = slots.replace(
        cache=copied(slots.cache, fed.cache, row_G, slot_G),
        settings=jax.tree.map(put, slots.settings, settings),
        position_B=put(slots.position_B, fed.position_P[row_G]),
    )
    return spread(cfg, _emit(slots, settings, slot_G, count_G, fed.logits_PV[row_G]))


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("slots",))
def decode(cfg: ModelConfig, params, slots: Slots, idle_B: jax.Array, steps: jax.Array, leave: jax.Array) -> Slots:
    """Up to `steps` tokens more for every slot that has not finished; ends early when `leave` slots have.

    `idle_B`: the slots in which there is nothing to go on with, whatever the device believes; they count as finished.
    """
    B = slots.finished_B.shape[0]
    slots = slots.replace(finished_B=slots.finished_B | idle_B)

    def more(carry):
        step, slots = carry
        return (step < steps) & (jnp.sum(slots.finished_B) < leave)

    def body(carry):
        step, slots = carry
        live_B = ~slots.finished_B
        layouts = slots.position_B[:, None], live_B[:, None].astype(jnp.int32)
        hidden_B1D, cache, _ = apply(cfg, params, slots.pending_B[:, None], *layouts, slots.cache)
        logits_BV = unembed(cfg, params, hidden_B1D[:, 0])
        slots = slots.replace(cache=cache, position_B=slots.position_B + live_B)
        slot_B = jnp.where(live_B, jnp.arange(B), B)
        return step + 1, spread(cfg, _emit(slots, slots.settings, slot_B, slots.count_B, logits_BV))

    return spread(cfg, jax.lax.while_loop(more, body, (jnp.int32(0), slots))[1])
