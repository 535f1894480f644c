"""The decoder: continuous batching over a fixed set of slots, with the training model function and a cache.

Prompts are prefilled in length buckets, then all slots decode together in one jitted loop on the device, and a slot
whose sequence has finished takes the next prompt of the queue. A request may be given forced tokens (a tool's result)
where it stops, and goes on in its slot while the others decode.

Requests of one prompt, such as a group of GRPO's or the samples of best-of-n, have it computed once: its keys and
values, last inputs and last logits are copied to each of their slots. They stand together in the queue, and while the
next in it has a prompt that has been computed, its row is kept.

What a request gets depends on the parameters, its prompt, its `Sampling`, its sample id and what `respond` gives it,
never on the requests beside it: at the same number of slots, the same buckets and the same rows of a prefill the result
is equal bit for bit, whether the prompt was shared or not. The key of a token is `fold_in(seed, SAMPLE, sample id,
token index)`, where the index is its place in the completion, forced tokens included. Settings enter as arrays, so that
new values never recompile; weights enter as arguments (closed over, XLA folds them into constants and hides what
reading them costs).

A prefill always runs the same number of rows, unused ones empty: one fixed size keeps a row's arithmetic the same, and
a refill pays for few rows that nobody needs. For what a slot goes on with, those are G = B / 4; for prompts P, as many
different ones as G requests of the queue have on average, up to a power of two, so G where all differ. The loop returns
to the host when G more slots have finished and something waits for them (a prompt, the host's answer to a stop, or
whoever is told what has ended). With L tokens a completion, one visit and its prefill at the price of c decode steps,
visiting every k steps wastes c / k of the time and k / 2L of the slots; G slots finish in k = L / 4 steps, so that an
eighth of the slots is idle at most, and the visits cost as much at L = 32 c.

B slots, G of them filled at once, P rows of a prefill, T tokens of a prefill (a bucket), N longest completion (a
bucket), S stop ids, V padded vocabulary, D model width.
"""

import collections
import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import broadcast, sharding
from jaxlm.config import UserError
from jaxlm.nn.transformer import ModelConfig, apply, padded_vocab, unembed, unstack
from jaxlm.sample import requests
from jaxlm.sample import slots as device
from jaxlm.sample.requests import Completion, Request, Sampling, allowed_tokens, max_new_tokens

__all__ = [
    "Completion",
    "Sampling",
    "allowed_tokens",
    "bucket",
    "generate",
    "max_new_tokens",
    "next_token_distribution",
]

CHUNK = 8  # decode steps between two looks of the host, when there is something to look for
LOOK = 128  # of those, when all that it looks for is whether it shall go on: some seconds at most
MAX_SLOTS = 64
MIN_PROMPT_BUCKET, MIN_TOKENS_BUCKET, MIN_CAPACITY, MIN_STOPS_BUCKET = 16, 32, 16, 4  # powers of two

Respond = Callable[[int, list[int]], Sequence[int] | None]
OnTokens = Callable[[int, list[int]], None]
OnDone = Callable[[Mapping[int, Completion]], None]
Between = Callable[[], None]


class Decoder(NamedTuple):
    """What the host asks of the device. The state is its own: of what `slots` shows the host reads, and no more."""

    prefill: Callable[..., Any]  # (state, slot_P, tokens_PT, lengths_P, start_P) -> fed
    place: Callable[..., Any]  # (state, fed, settings, row_G, slot_G, count_G) -> state
    decode: Callable[..., Any]  # (state, idle_B, steps, leave) -> state
    slots: Callable[[Any], device.Slots]


class Kept(NamedTuple):
    """A row that has been fed, for requests that wait for a slot."""

    source: Any
    fed: Any
    row: int


def bucket(n: int, smallest: int = 1) -> int:
    """The power of two that is at least `n` and `smallest`: few shapes, so few compilations."""
    return max(smallest, 1 << max(0, n - 1).bit_length())


def slots_for(prompts: int, slots: int | None) -> int:
    """How many slots decode so many prompts, where so many are asked for; on a GPU two at least.

    There XLA makes no product of one row and a kernel: it multiplies them, writes as many numbers out and sums them,
    three times the bytes. A second row, though nothing is in it, is a product.
    """
    smallest = 2 if sharding.platform() == "gpu" else 1
    return bucket(min(prompts, MAX_SLOTS) if slots is None else slots, smallest)


def group_rows(B: int) -> int:
    """How many of B slots are filled at once."""
    return max(1, B // 4)


def prompt_rows(B: int, requests: int, prompts: int, shards: int = 1) -> int:
    """Rows of a prefill for requests that have so many different prompts: as many as G of them have on average.

    shards: over which a batch is spread; each has a row, where there are G for all.
    """
    G = group_rows(B)
    return min(G, bucket(max(shards, -(-G * prompts // requests))))


def sizes(longest: int, stops: int, whole: int) -> dict[str, int]:
    """Shapes of the slots for completions of `longest` tokens at most and so many stop ids. whole: the most tokens of
    a prompt with its completion."""
    return {
        "N": bucket(longest, MIN_TOKENS_BUCKET),
        "S": bucket(stops, MIN_STOPS_BUCKET),
        "capacity": bucket(whole, MIN_CAPACITY),
    }


def _settings(cfg: ModelConfig, tokenizer, rows: Sequence[Request], G: int, S: int) -> device.Settings:
    """The requests' settings as G rows; those beyond the requests are never read."""
    column = lambda values, dtype: np.array(values + [0] * (G - len(rows)), dtype)  # noqa: E731
    allowed_of = functools.cache(functools.partial(allowed_tokens, cfg, tokenizer))  # most requests share a Sampling
    settings = [r.sampling for r in rows]
    stop_ids = np.full((G, S), -1, np.int32)
    allowed = np.ones((G, padded_vocab(cfg)), bool)
    for g, r in enumerate(rows):
        stop_ids[g, : len(r.stops)] = r.stops
        allowed[g] = allowed_of(r.sampling)
    return device.Settings(
        temperature_R=column([s.temperature for s in settings], np.float32),
        top_k_R=column([s.top_k for s in settings], np.int32),
        top_p_R=column([s.top_p for s in settings], np.float32),
        min_p_R=column([s.min_p for s in settings], np.float32),
        limit_R=column([r.longest(r.forced) for r in rows], np.int32),
        seed_R=column([s.seed for s in settings], np.uint32),
        sample_id_R=column([r.sample_id for r in rows], np.int32),
        stop_ids_RS=stop_ids,
        allowed_RV=allowed,
    )


def _place(cfg, tokenizer, decoder: Decoder, state, fed, members: list[tuple[int, int, Request]]):
    """Each (row, slot, request) goes on, in its slot, from a row of what has been fed."""
    B, S = decoder.slots(state).settings.stop_ids_RS.shape
    G = group_rows(B)
    for first in range(0, len(members), G):
        some = members[first : first + G]
        row, slot, count = np.zeros(G, np.int32), np.full(G, B, np.int32), np.zeros(G, np.int32)
        for g, (i, b, r) in enumerate(some):
            row[g], slot[g], count[g] = i, b, len(r.ids)
        settings = _settings(cfg, tokenizer, [r for _, _, r in some], G, S)
        state = decoder.place(state, fed, settings, row, slot, count)
    return state


def _prefill(cfg, tokenizer, decoder: Decoder, state, T: int, P: int, groups: list[list[tuple[int, Request]]], soon):
    """(state, what to keep) once a row for each group, of (slot, request) that share it, has been fed and placed.

    What a row is fed is what the model has not seen: a prompt, or forced tokens and the one before.
    """
    slot, tokens_PT = np.full(P, decoder.slots(state).finished_B.shape[0], np.int32), np.zeros((P, T), np.int32)
    lengths, starts = np.zeros((2, P), np.int32)
    for i, [(b, r), *_] in enumerate(groups):
        tokens = [*r.prompt, *r.ids][-r.unfed :]
        slot[i], lengths[i], starts[i] = b, len(tokens), len(r.prompt) + len(r.ids) - r.unfed
        tokens_PT[i, : len(tokens)] = tokens
    fed = decoder.prefill(state, slot, tokens_PT, lengths, starts)
    state = _place(cfg, tokenizer, decoder, state, fed, [(i, *one) for i, group in enumerate(groups) for one in group])
    return state, next((Kept(soon, fed, i) for i, [(_, r), *_] in enumerate(groups) if r.source == soon), None)


def _fill(cfg, tokenizer, decoder: Decoder, state, ready: list[tuple[int, Request]], rows, kept: Kept | None, soon):
    """(state, what to keep) with each (slot, request) fed: what several begin with once, now or, as `kept`, before.

    rows: of a prefill of prompts, and of what slots go on with. soon: the source of the request that waits for the next
    free slot.
    """
    groups: dict = {}
    for b, r in ready:
        groups.setdefault(r.source, []).append((b, r))
    if kept is not None:
        here = [(kept.row, *one) for one in groups.pop(kept.source, [])]
        state = _place(cfg, tokenizer, decoder, state, kept.fed, here)
        kept = kept if kept.source == soon else None
    by_shape: dict[tuple[int, int], list] = {}
    for group in groups.values():
        _, r = group[0]
        by_shape.setdefault((bucket(r.unfed, MIN_PROMPT_BUCKET), rows[bool(r.ids)]), []).append(group)
    for (T, P), found in sorted(by_shape.items()):
        for first in range(0, len(found), P):
            state, new = _prefill(cfg, tokenizer, decoder, state, T, P, found[first : first + P], soon)
            kept = new or kept
            if first // P % 8 == 7:  # on several devices of a CPU no more may be under way: see `sharding.Program`
                jax.block_until_ready(state)
    return state, kept


def _ask(respond: Respond | None, stopped: list[Request]) -> list:
    """What each request that stopped goes on with. Tools wait for other programs, so several run at once."""
    if respond is None or not stopped:
        return [None] * len(stopped)

    def ask() -> list:
        with concurrent.futures.ThreadPoolExecutor(min(len(stopped), max(2, os.cpu_count() or 1))) as pool:
            return list(pool.map(lambda r: respond(r.index, list(r.ids)), stopped))

    return broadcast.from_first(ask)


def generate(
    cfg: ModelConfig,
    params,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    sample_ids: Sequence[int] | None = None,
    slots: int | None = None,
    *,
    respond: Respond | None = None,
    on_tokens: OnTokens | None = None,
    on_done: OnDone | None = None,
    between: Between | None = None,
    chunk: int = CHUNK,
    mesh: jax.sharding.Mesh | None = None,
) -> list[Completion]:
    """Continues each prompt (token ids) and returns one `Completion` per prompt, in order.

    Args:
      sampling: one for all or one each.
      sample_ids: tell apart several samples of one seed (their indices when not given).
      slots: how many decode at once, a power of two (the number of prompts, at most 64, when not given).
      respond: `respond(index, ids)` is asked when the request of prompt `index`, with the completion `ids` so far,
        stops at a stop id. A list of ids is appended as forced tokens and decoding goes on; None ends the request.
        When with the list nothing more could be sampled (max_tokens, max_forced, learned positions), the list is left
        out and the request ends for its length. Asked from several threads at once, of several processes by the first
        alone.
      on_tokens: `on_tokens(index, ids)` gets the new ids of a completion, forced ones too, as they come: together
        they are the completion's.
      on_done: `on_done({index: completion})` gets those that have ended, once the others decode on; not the last ones,
        which nothing decodes beside. The sooner it returns, the sooner the host looks again.
      between: called again and again while it is decoded, after `LOOK` steps at most; what it raises ends the decoding.
        It changes nothing else. Of several processes all call it, at the same places.
      chunk: decode steps between two looks, where there are stop strings to find or `on_tokens` to call.
      mesh: where `params` are spread over devices and no mesh is set.

    Raises `UserError` for an empty prompt, an id out of range, or a prompt longer than learned positions reach.
    """
    queue = requests.make_requests(cfg, tokenizer, prompts, sampling, sample_ids)
    if not queue:
        return []
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        params = laid_out(params)
        state = device.empty(cfg, **shapes_for(queue, slots, respond))
        prefill, decode = (functools.partial(f, cfg, params) for f in (device.prefill, device.decode))
        decoder = Decoder(prefill, functools.partial(device.place, cfg), decode, slots=lambda state: state)
        return run(cfg, tokenizer, queue, decoder, state, respond, on_tokens, chunk, on_done, between)[0]


_unstack = jax.jit(unstack)


def laid_out(params):
    """The parameters as decoding reads them: each layer an array of its own.

    XLA, on a CPU and on a GPU, copies a layer out of its stack before a product reads it, at every step: three times
    the bytes. On a TPU, where memory is what `launch.compile` has promised, they stay as they are. `generate` does this
    itself; who calls it often with the same parameters may keep the result, which is passed on as it is.
    """
    done = any(isinstance(stack, tuple) for stack in params["backbone"]["blocks"].values())
    return params if done or sharding.platform() == "tpu" else _unstack(params)


def shapes_for(queue: Sequence[Request], slots: int | None, respond: Respond | None) -> dict[str, int]:
    """Shapes of the slots that decode these requests."""
    longest = [r.longest(0 if respond is None else r.sampling.max_forced) for r in queue]
    whole = max(len(r.prompt) + n for r, n in zip(queue, longest))
    return {"B": slots_for(len(queue), slots)} | sizes(max(longest), max(len(r.stops) for r in queue), whole)


def _decoded(decoder: Decoder, state, idle, steps: int, leave: int, on_way: Callable[[], None], between):
    """The state after so many steps, or once `leave` slots have finished. on_way: called while the device is at it.

    With `between` the host looks in now and then, and leaves where the device would have left.
    """
    while True:
        some = steps if between is None else min(steps, LOOK)
        state = decoder.decode(state, idle, np.int32(some), np.int32(leave))
        on_way()
        if between is None:
            return state
        finished = int(jax.device_get(decoder.slots(state).finished_B).sum())
        between()
        steps, on_way = steps - some, lambda: None
        if not steps or finished >= leave:
            return state


def run(
    cfg: ModelConfig,
    tokenizer,
    queue: list[Request],
    decoder: Decoder,
    state,
    respond,
    on_tokens,
    chunk: int,
    on_done,
    between=None,
):
    """(completions in order, last state) of the requests, decoded from an empty `state` on; arguments as `generate`'s.

    cfg: of the model whose completions they are.
    """
    B, N = decoder.slots(state).ids_BN.shape
    G, place_of = group_rows(B), {}
    for r in queue:
        place_of.setdefault(r.source, len(place_of))
    rows = prompt_rows(B, len(queue), len(place_of), sharding.cuts(("batch",))), G
    # Those that may run longest go first, so that few slots are idle in the end; those of one prompt together.
    waiting = collections.deque(sorted(queue, key=lambda r: (-r.sampling.max_tokens, place_of[r.source])))
    kept = None
    held: list[Request | None] = [None] * B
    ready: list[tuple[int, Request]] = []
    results: list[Completion | None] = [None] * len(queue)
    ended: list[int] = []  # since the last look

    def tell(r: Request, known: int):
        if on_tokens is not None and known < len(r.ids):
            on_tokens(r.index, r.ids[known:])

    while waiting or any(held):
        for b in range(B):
            if held[b] is None and waiting:
                held[b] = waiting.popleft()
                ready.append((b, held[b]))
        soon = waiting[0].source if waiting else None
        (state, kept), ready = _fill(cfg, tokenizer, decoder, state, ready, rows, kept, soon), []
        idle = np.array([r is None for r in held])
        live = B - int(idle.sum())
        leave = B - live + (min(G, live) if waiting or respond is not None or on_done is not None else live)
        looks = on_tokens is not None or any(r and r.sampling.stop_strings for r in held)
        done, ended = {i: results[i] for i in ended}, []

        def on_way(done=done):
            if on_done is not None and done:
                on_done(done)

        state = _decoded(decoder, state, idle, chunk if looks else N, leave, on_way, between)

        said = decoder.slots(state)
        count, finished, ids, logprobs = jax.device_get((said.count_B, said.finished_B, said.ids_BN, said.logprobs_BN))
        stopped = []
        for b, r in enumerate(held):
            if r is None:
                continue
            known = len(r.ids)
            new = slice(known, count[b])
            cut = requests.take(r, tokenizer, ids[b, new].tolist(), logprobs[b, new].tolist())
            tell(r, known)
            if finished[b] and not cut and r.stopped:
                stopped.append((b, r))
            elif finished[b] or cut:
                results[r.index], held[b] = requests.complete(r, tokenizer, cut), None
                ended.append(r.index)
        answers = _ask(respond, [r for _, r in stopped])
        for (b, r), answer in zip(stopped, answers, strict=True):
            known = len(r.ids)
            if answer is not None and requests.force(r, tokenizer, answer):
                tell(r, known)
                ready.append((b, r))
            else:
                results[r.index], held[b] = requests.complete(r, tokenizer, stop=answer is None), None
                ended.append(r.index)
    return results, state


@functools.partial(jax.jit, static_argnames=("cfg",))
def _next_logprobs(cfg, params, tokens_1T: jax.Array, length: jax.Array) -> jax.Array:
    hidden_1TD, _, _ = apply(cfg, params, tokens_1T, *device.layout(tokens_1T, length[None]))
    return jax.nn.log_softmax(unembed(cfg, params, hidden_1TD[0, length - 1]))


def next_token_distribution(cfg: ModelConfig, params, prompt: Sequence[int]) -> np.ndarray:
    """The model's own probabilities of the next token after `prompt` (ids), float32 [V], at temperature 1.

    Every id is there, control tokens too; padded columns are 0. Computed without the cache.
    """
    if max_new_tokens(cfg, len(prompt)) is not None and max_new_tokens(cfg, len(prompt)) < 1:
        raise UserError(f"the prompt has {len(prompt)} tokens, learned positions reach {cfg.positions.length}")
    tokens = np.zeros((1, bucket(len(prompt), MIN_PROMPT_BUCKET)), np.int32)
    tokens[0, : len(prompt)] = prompt
    return np.exp(np.asarray(_next_logprobs(cfg, params, jnp.asarray(tokens), jnp.int32(len(prompt)))))
