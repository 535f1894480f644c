"""Speculative decoding: a small draft model proposes tokens, the target judges several in one pass.

What comes out is the target's, whatever the draft is (Leviathan et al. 2022, arXiv 2211.17192; Chen et al. 2023, arXiv
2302.01318). Let p and q be the distributions of target and draft as the request is sampled: after temperature, bans,
top-k, top-p and min-p. A token drawn from q is kept with probability min(1, p / q). The first that is refused is
replaced by a draw from max(p - q, 0), normalized, which together makes it a draw from p; where none is refused, one
more is drawn from p. At temperature 0 all of p and of q is on one token, and the same rule gives the target's greedy
tokens. Log-probabilities are the target's, as without a draft.

So a step of a slot costs K passes of the draft over one token (and one more, which shows it its last), and one of the
target over K + 1, and gives 1 to K + 1 tokens. It pays where a pass of the target costs about the same for K + 1 tokens
as for one: at few slots, where reading its weights is what takes the time. A good draft is a smaller model trained on
the same text, or distilled from the target. "Exact" means up to the rounding of floating point: a pass over several
tokens rounds otherwise than passes over one, so that greedy tokens may differ where the two best tie within rounding.

The draft draws token number n of a completion with the key by which the engine would (`engine.py`), and so is the token
after a step without refusals; acceptance and replacement have keys folded from it. Tokens behind a refused one are
forgotten, so their keys may be used again. The caches take back what was fed and not kept (`nn.cache.rewind`). A
request's completion is its own as in the engine: it depends on the draft and on K, never on the requests beside it.

B slots, G of them filled at once, K drafted tokens, T = K + 1 tokens that the target is fed, N longest completion (a
bucket), S stop ids, V vocabulary, D model width.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import UserError
from jaxlm.nn.transformer import ModelConfig, apply, cache_specs, init_cache, rewind, unembed
from jaxlm.sample import engine, requests
from jaxlm.sample import slots as device
from jaxlm.sample.logits import adjust, draw, probabilities, token_logprobs
from jaxlm.sample.requests import Completion, Request, Sampling, max_new_tokens
from jaxlm.sharding import constrain

ACCEPT, REPLACE = 1, 2  # folded into a token's key


@dataclasses.dataclass(frozen=True)
class Draft:
    """The model that proposes, and how many tokens it does a step."""

    cfg: ModelConfig
    params: dict
    tokens: int = 4

    def __post_init__(self):
        if self.tokens < 1:
            raise UserError(f"a draft must propose at least 1 token a step, got {self.tokens}")


@flax.struct.dataclass
class Acceptance:
    """What the drafting was worth, over all requests."""

    steps: int = 0  # passes of the target after the prompts', a request's each
    tokens: int = 0  # that they gave
    drafted: int = 0  # tokens that were proposed, within the length that was asked for
    accepted: int = 0  # of those

    @property
    def rate(self) -> float:
        """Share of the drafted tokens that were accepted."""
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / max(self.steps, 1)


@flax.struct.dataclass
class Fed:
    """Rows of a prefill, of both models."""

    target: device.Fed
    cache: tuple


@flax.struct.dataclass
class State:
    """The target's slots, and beside them the draft's cache, which has seen the same tokens."""

    slots: device.Slots
    cache: tuple
    acceptance: Acceptance


# ------------------------------------------------------------------------------------------------------ the judgement
def residual(p_BV: jax.Array, q_BV: jax.Array) -> jax.Array:
    """max(p - q, 0), normalized: what replaces a refused token. Where nothing is left by rounding, p itself."""
    left_BV = jnp.maximum(p_BV - q_BV, 0)
    total_B1 = jnp.sum(left_BV, axis=-1, keepdims=True)
    return jnp.where(total_B1 > 0, left_BV / jnp.where(total_B1 > 0, total_B1, 1), p_BV)


def judge(keys_BT, p_BTV, q_BKV, drafted_BK, temperature_B) -> tuple[jax.Array, jax.Array]:
    """(tokens [B, T], kept [B]): so many drafted tokens are kept, and the one behind them is the target's own.

    keys_BT: of the tokens' numbers. p_BTV, q_BKV: what target and draft draw the tokens from. Tokens further behind
    mean nothing.
    """
    K = drafted_BK.shape[1]
    p_BK, q_BK = (jnp.take_along_axis(x[:, :K], drafted_BK[..., None], axis=-1)[..., 0] for x in (p_BTV, q_BKV))
    uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, ACCEPT))))
    accepted_BK = uniform(keys_BT[:, :K]) * q_BK < p_BK
    kept_B = jnp.sum(jnp.cumprod(accepted_BK, axis=1), axis=1)

    def at_kept(x):
        return jax.vmap(lambda row, i: row[i])(x, kept_B)

    nothing_B1V = jnp.zeros_like(p_BTV[:, :1])  # was drafted behind the last: what is left of p is all of it
    own_BV = residual(at_kept(p_BTV), at_kept(jnp.concatenate([q_BKV, nothing_B1V], axis=1)))
    key_B = at_kept(keys_BT)
    key_B = jnp.where(kept_B < K, jax.vmap(lambda key: jax.random.fold_in(key, REPLACE))(key_B), key_B)
    own_B = draw(key_B, jnp.log(own_BV), temperature_B)
    drafted_BT = jnp.pad(drafted_BK, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(K + 1)[None] < kept_B[:, None], drafted_BT, own_B[:, None]), kept_B


# --------------------------------------------------------------------------------------------------------- the device
def _spread(cfg: ModelConfig, draft_cfg: ModelConfig, state: State) -> State:
    cache = jax.tree.map(constrain, state.cache, cache_specs(draft_cfg))
    acceptance = jax.tree.map(lambda x: constrain(x, ()), state.acceptance)
    return State(device.spread(cfg, state.slots), cache, acceptance)


@functools.partial(jax.jit, static_argnames=("cfg", "draft_cfg", "B", "N", "S", "capacity", "K"))
def empty(cfg: ModelConfig, draft_cfg: ModelConfig, B: int, N: int, S: int, capacity: int, K: int) -> State:
    """Slots that have all finished."""
    slots, cache = device.empty(cfg, B, N, S, capacity, spare=K), init_cache(draft_cfg, B, capacity, spare=K)
    return _spread(cfg, draft_cfg, State(slots, cache, Acceptance(*jnp.zeros((4,), jnp.int32))))


@functools.partial(jax.jit, static_argnames=("cfg", "draft_cfg"))
def prefill(cfg, params, draft_cfg, draft_params, state: State, *fed) -> Fed:
    """`slots.prefill`, and the draft is fed the same."""
    _, rows = device.feed(draft_cfg, draft_params, state.cache, *fed)
    return Fed(device.prefill(cfg, params, state.slots, *fed), rows)


@functools.partial(jax.jit, static_argnames=("cfg", "draft_cfg"), donate_argnames=("state",))
def place(cfg, draft_cfg, state: State, fed: Fed, settings, row_G, slot_G, count_G) -> State:
    """`slots.place`, and the draft's rows go to the same slots."""
    slots = device.place(cfg, state.slots, fed.target, settings, row_G, slot_G, count_G)
    return _spread(
        cfg, draft_cfg, state.replace(slots=slots, cache=device.copied(state.cache, fed.cache, row_G, slot_G))
    )


def _options(s: device.Settings, real_B, V: int) -> tuple:
    """Arguments of `logits.adjust` behind the logits."""
    return s.temperature_R, *device.filters(s, real_B), s.allowed_RV[:, :V]


def _propose(cfg: ModelConfig, params, K: int, cache, slots: device.Slots, lengths_B):
    """(drafted [B, K], what they were drawn from [B, K, V], the draft's cache, which has then seen them all)."""
    s, V = slots.settings, cfg.vocab_size
    options = _options(s, lengths_B > 0, V)

    def feed(cache, token_B, i):
        layouts = device.layout(token_B[:, None], lengths_B - i, slots.position_B + i)
        hidden_B1D, cache, _ = apply(cfg, params, token_B[:, None], *layouts, cache)
        return hidden_B1D[:, 0], cache

    def propose(carry, i):
        hidden_BD, cache = feed(*carry, i)
        logits_BV = constrain(unembed(cfg, params, hidden_BD), ("batch", None))[:, :V]
        adjusted_BV = adjust(logits_BV, *options)
        drafted_B = draw(device.token_keys(s, slots.count_B + i), adjusted_BV, s.temperature_R)
        return (cache, drafted_B), (drafted_B, probabilities(adjusted_BV, s.temperature_R))

    (cache, last_B), (drafted_KB, q_KBV) = jax.lax.scan(propose, (cache, slots.pending_B), jnp.arange(K))
    _, cache = feed(cache, last_B, K)
    return drafted_KB.swapaxes(0, 1), q_KBV.swapaxes(0, 1), cache


def _step(cfg, params, draft_cfg, draft_params, K: int, state: State) -> State:
    slots = state.slots
    s, T, V = slots.settings, K + 1, cfg.vocab_size
    N = slots.ids_BN.shape[1]
    live_B, number_1T = ~slots.finished_B, jnp.arange(T)[None]
    # No token is fed that would stand beyond the longest completion: neither cache nor positions reach further.
    lengths_B = jnp.where(live_B, jnp.minimum(T, s.limit_R - slots.count_B), 0)
    drafted_BK, q_BKV, draft_cache = _propose(draft_cfg, draft_params, K, state.cache, slots, lengths_B)

    fed_BT = jnp.concatenate([slots.pending_B[:, None], drafted_BK], axis=1)
    hidden_BTD, cache, _ = apply(cfg, params, fed_BT, *device.layout(fed_BT, lengths_B, slots.position_B), slots.cache)
    logits_BTV = constrain(unembed(cfg, params, hidden_BTD), ("batch", None, None))[..., :V]
    options = _options(s, live_B, V)

    def each(f, *more):  # a function of [B, V] and of what is the same for all T
        return jax.vmap(lambda x_BV: f(x_BV, *more), in_axes=1, out_axes=1)

    p_BTV = each(probabilities, s.temperature_R)(each(adjust, *options)(logits_BTV))
    keys_BT = jax.vmap(lambda i: device.token_keys(s, slots.count_B + i), out_axes=1)(number_1T[0])
    tokens_BT, kept_B = judge(keys_BT, p_BTV, q_BKV, drafted_BK, s.temperature_R)
    logprobs_BTV = each(token_logprobs, s.temperature_R)(logits_BTV)
    logprobs_BT = jnp.take_along_axis(logprobs_BTV, tokens_BT[..., None], axis=-1)[..., 0]

    stops_BT = jnp.any(tokens_BT[..., None] == s.stop_ids_RS[:, None], axis=-1)
    to_stop_B = jnp.min(jnp.where(stops_BT, number_1T + 1, T), axis=1)
    new_B = jnp.minimum(jnp.minimum(kept_B + 1, to_stop_B), lengths_B)  # tokens that are the completion's
    last_B1 = jnp.maximum(new_B - 1, 0)[:, None]
    stopped_B = jnp.take_along_axis(stops_BT, last_B1, axis=1)[:, 0] | (slots.count_B + new_B >= s.limit_R)
    place_BT = jnp.where(number_1T < new_B[:, None], slots.count_B[:, None] + number_1T, N)  # N: dropped

    def put(old, new):
        return jax.vmap(lambda row, place, x: row.at[place].set(x, mode="drop"))(old, place_BT, new)

    position_B, dropped_B = slots.position_B + new_B, lengths_B - new_B
    slots = slots.replace(
        cache=rewind(cache, position_B, dropped_B),
        pending_B=jnp.where(live_B, jnp.take_along_axis(tokens_BT, last_B1, axis=1)[:, 0], slots.pending_B),
        position_B=position_B,
        count_B=slots.count_B + new_B,
        finished_B=slots.finished_B | stopped_B,
        ids_BN=put(slots.ids_BN, tokens_BT),
        logprobs_BN=put(slots.logprobs_BN, logprobs_BT),
    )
    counts = live_B, new_B, jnp.minimum(lengths_B, K), jnp.minimum(new_B, kept_B)
    acceptance = jax.tree.map(jnp.add, state.acceptance, Acceptance(*(jnp.sum(x, dtype=jnp.int32) for x in counts)))
    return _spread(cfg, draft_cfg, State(slots, rewind(draft_cache, position_B, dropped_B), acceptance))


@functools.partial(jax.jit, static_argnames=("cfg", "draft_cfg", "K"), donate_argnames=("state",))
def decode(cfg, params, draft_cfg, draft_params, K: int, state: State, idle_B, steps, leave) -> State:
    """`slots.decode` by steps of up to T tokens."""
    finished_B = state.slots.finished_B | idle_B
    state = state.replace(slots=state.slots.replace(finished_B=finished_B))

    def more(carry):
        step, state = carry
        return (step < steps) & (jnp.sum(state.slots.finished_B) < leave)

    def body(carry):
        step, state = carry
        return step + 1, _step(cfg, params, draft_cfg, draft_params, K, state)

    return _spread(cfg, draft_cfg, jax.lax.while_loop(more, body, (jnp.int32(0), state))[1])


# ----------------------------------------------------------------------------------------------------------- the host
def check(cfg: ModelConfig, draft: Draft, queue: Sequence[Request], forced: Sequence[int]) -> None:
    """`UserError` when the draft cannot speak for the target, or its learned positions end before a request may."""
    if draft.cfg.vocab_size != cfg.vocab_size:
        raise UserError(
            f"the draft has a vocabulary of {draft.cfg.vocab_size} and the target one of {cfg.vocab_size}: "
            "they must have the same tokenizer"
        )
    for r, n in zip(queue, forced, strict=True):
        room, longest = max_new_tokens(draft.cfg, len(r.prompt)), r.longest(n)
        if room is not None and room < longest:
            raise UserError(
                f"prompt and completion may have {len(r.prompt)} + {longest} tokens but the draft's learned positions "
                f"reach {draft.cfg.positions.length}: ask for fewer tokens or take another draft"
            )


def generate(
    cfg: ModelConfig,
    params,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    draft: Draft,
    sample_ids: Sequence[int] | None = None,
    slots: int | None = None,
    *,
    respond: engine.Respond | None = None,
    on_tokens: engine.OnTokens | None = None,
    on_done: engine.OnDone | None = None,
    between: engine.Between | None = None,
    chunk: int = engine.CHUNK,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[list[Completion], Acceptance]:
    """`engine.generate` with a draft: completions of the same distribution, and what the draft was worth.

    Arguments as there; `chunk` counts steps, of up to draft.tokens + 1 tokens each. Raises `UserError` as there, and
    for a draft of another vocabulary, or whose learned positions do not reach as far as the completions may.
    """
    queue = requests.make_requests(cfg, tokenizer, prompts, sampling, sample_ids)
    check(cfg, draft, queue, [0 if respond is None else r.sampling.max_forced for r in queue])
    if not queue:
        return [], Acceptance()
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        models = cfg, engine.laid_out(params), draft.cfg, engine.laid_out(draft.params)
        state = empty(cfg, draft.cfg, K=draft.tokens, **engine.shapes_for(queue, slots, respond))
        decoder = engine.Decoder(
            functools.partial(prefill, *models),
            functools.partial(place, cfg, draft.cfg),
            functools.partial(decode, *models, draft.tokens),
            slots=lambda state: state.slots,
        )
        found, state = engine.run(cfg, tokenizer, queue, decoder, state, respond, on_tokens, chunk, on_done, between)
    return found, jax.tree.map(lambda x: int(np.asarray(x)), state.acceptance)
