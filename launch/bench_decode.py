"""Decoding measured: our sampler as it is called, alone or beside transformers' `generate` with the same weights.

Both sides do the same work in one process: the same prompts, as many new tokens (nothing stops early), greedy, the same
dtype and number of threads. Before anything is timed, the two must give the same logits. Then they run in turn, so that
what else the machine does falls on both.
"""

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sizes import SIZES
from jaxlm import tree
from jaxlm.config import UserError
from jaxlm.nn import transformer
from jaxlm.nn.definition import Precision
from jaxlm.nn.flops import flops_per_token
from jaxlm.nn.transformer import ModelConfig
from jaxlm.run.load import load_run
from jaxlm.run.log import measured_peak
from jaxlm.sample import requests
from jaxlm.sample import slots as device
from jaxlm.sample.engine import (
    MAX_SLOTS,
    MIN_PROMPT_BUCKET,
    Completion,
    Sampling,
    bucket,
    generate,
    laid_out,
    prompt_rows,
    shapes_for,
    sizes,
)
from jaxlm.sample.parity import by_cache_dtype
from launch.bench_rows import FLOPS, OURS, compared, held_bytes, in_turn, row

# Those of the experiments that the sizes stand in; a rung without one has what its neighbor has.
VOCABULARY = {"1m": 2048, "10m": 8192, "30m": 8192, "0.6b": 151_936}
LARGE_VOCABULARY = 32768
# Of logits, relative to their spread. In bfloat16 both sides round at every step, each in its own order: what is wrong
# by little shows in float32 only, and there on a CPU only, since a GPU multiplies with three bits more than bfloat16's.
# With a cache in another dtype, of how likely our tokens are.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2, "int8": 0.2}
TF32_TOLERANCE = 2e-2
CERTIFIED = 8  # rows whose log-probabilities are compared with the trainer's, where a dtype of the cache is asked for
COPY_BYTES = 1 << 28
GROUP = 8  # GRPO's samples of a prompt
GROUPS, PREFILLED = f"groups of {GROUP}", "tokens prefilled"

Arm = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[int]]]  # (prompts, new tokens of each) -> new ids
Peak = Callable[[Sequence[Sequence[int]], Sequence[int]], int]  # the same -> bytes of memory at most


@dataclasses.dataclass(frozen=True)
class Load:
    """What is decoded: `batches` of prompts of `prompt` tokens, `new` more each; then `requests` of mixed lengths."""

    batches: tuple[int, ...] = (1, 32)
    prompt: int = 128
    new: int = 128
    repetitions: int = 5
    requests: int = 128  # 0: none
    compile_seconds: int = 300  # at most, for torch.compile; 0: without

    def __post_init__(self):
        if min((*self.batches, self.repetitions)) < 1 or max(self.batches, default=0) > MAX_SLOTS:
            raise UserError(f"--batch takes sizes from 1 to {MAX_SLOTS}, --repetitions at least 1")
        if self.prompt < 2 or self.new < 2:
            raise UserError("--prompt_tokens and --new_tokens must be at least 2")


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A vocabulary in which nothing ends a text: whatever is asked for runs to its length, as on the other side."""

    vocab_size: int
    eos = bos = pad = None
    control = {}  # noqa: RUF012  never written

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


# --------------------------------------------------------------------------------------------------------- the model
def usual_dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def made(size: str, dtype: str, cache: str | None = None) -> tuple[ModelConfig, dict]:
    """The model of a named size with random weights, all in `dtype`, keys and values in `cache` where it is given."""
    vocabulary = VOCABULARY.get(size, LARGE_VOCABULARY)
    cfg = dataclasses.replace(SIZES[size], vocab_size=vocabulary, precision=Precision(dtype, dtype, cache=cache))
    return cfg, jax.jit(lambda key: transformer.init(cfg, key))(jax.random.key(0))


def loaded(workdir: str, dtype: str, cache: str | None = None) -> tuple[ModelConfig, dict]:
    """The model of a run, cast to `dtype`, keys and values to `cache` where it is given."""
    run = load_run(workdir)
    cfg = dataclasses.replace(run.model, precision=Precision(dtype, dtype, cache=cache))
    return cfg, jax.tree.map(lambda x: x.astype(dtype), run.params)


def capacity(load: Load) -> int:
    return bucket(load.prompt + load.new)


def ours(cfg: ModelConfig, params, slots: int) -> Arm:
    """Our side, at the most `slots` at once, the work of the host included."""

    def run(prompts, limits):
        sampling = [Sampling(temperature=0.0, max_tokens=n) for n in limits]
        found: list[Completion] = generate(cfg, params, Numbers(cfg.vocab_size), prompts, sampling, slots=slots)
        return [list(c.ids) for c in found]

    return run


@jax.jit(static_argnames="cfg")
def _logits(cfg: ModelConfig, params, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    hidden_BTD, _, _ = transformer.apply(cfg, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    return transformer.unembed(cfg, params, hidden_BTD)[..., : cfg.vocab_size]


def check_equal(cfg: ModelConfig, params, logits: Callable, arms: Mapping[str, Arm], load: Load, dtype: str) -> dict:
    """Both sides' logits over a prompt and what each side goes on with; `UserError` when they are not the same.

    logits: theirs, (ids [B, T]) -> float32 [B, T, V]. Returns the largest difference relative to the logits' spread,
    and the share of greedy tokens that are the same: where two tokens are as likely, sides may go on differently.
    """
    prompts, limits = prompts_of(cfg, 2, (load.prompt,)), [load.new] * 2
    texts = {name: arm(prompts, limits) for name, arm in arms.items()}
    worst, bound = 0.0, TOLERANCE[dtype]
    if jax.default_backend() != "cpu":
        bound = max(bound, TF32_TOLERANCE)
    chosen_bound = max(bound, TOLERANCE[cfg.precision.cache or dtype])
    for name, ids in texts.items():
        tokens_BT = np.concatenate([prompts, ids], axis=1)
        mine, other = np.asarray(_logits(cfg, params, tokens_BT)), logits(tokens_BT)
        spread = float(other.std())
        worst = max(worst, float(np.abs(mine - other).max()) / spread)
        # Greedy on either side must be greedy by the other's logits, up to the difference that is allowed.
        before = other[:, load.prompt - 1 : -1]
        chosen = np.take_along_axis(before, np.asarray(ids)[..., None], axis=-1)[..., 0]
        lost = float((before.max(axis=-1) - chosen).max()) / spread
        if worst > bound or 0.5 * lost > chosen_bound:
            raise UserError(
                f"the two sides are not the same model: over what {name} wrote, logits differ by {worst:.2g} of their "
                f"spread, and its tokens are up to {lost:.2g} below the best; {bound:g} is allowed in {dtype}"
            )
    same = np.mean([np.asarray(ids) == np.asarray(texts[OURS]) for n, ids in texts.items() if n != OURS])
    return {"largest difference of logits": f"{worst:.1e}", "same greedy tokens": float(same)}


# -------------------------------------------------------------------------------------------------------- the timing
def prompts_of(cfg: ModelConfig, count: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts, with `lengths` in turn."""
    generator = np.random.default_rng([seed, count])
    return [generator.integers(0, cfg.vocab_size, lengths[i % len(lengths)]).tolist() for i in range(count)]


def copy_bytes() -> int:
    """Of an array that is copied: well above all caches. An accelerator copies 256 MB in the time that a call takes."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return max(COPY_BYTES, min(1 << 32, 1 << (limit // 16).bit_length()))


def copy_bandwidth(size: int) -> float:
    """Bytes per second of reading and writing `size` bytes, the better of JAX on its device and NumPy on one core."""
    x = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    arms = {"jax": lambda: add(x).block_until_ready()}
    if jax.default_backend() == "cpu":
        source, target = np.zeros((2, size // 4), np.float32)
        arms["numpy"] = lambda: np.copyto(target, source)
    return max(2 * size / min(times) for times in in_turn(arms, 5).values())


def _bytes(cfg: ModelConfig, params, batch: int, length: int, dtype: str) -> tuple[float, float]:
    """(weights, cache) bytes that one step must read: all weights but an embedding that only looks up, and the cache of
    `length` tokens of each row."""
    width = np.dtype(jnp.dtype(dtype)).itemsize
    looked_up = 0 if cfg.tied else transformer.padded_vocab(cfg) * cfg.width
    weights = (tree.count(params) - looked_up) * width
    return weights, batch * transformer.slot_bytes(cfg, length)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the device can do at most, as measured in this run: FLOP/s of a matrix product, bytes/s of a copy."""

    flops: float
    copy: float


def peak_bytes(cfg: ModelConfig, params, slots: int) -> Peak:
    """By XLA's own account: what a prefill, or the decoding after it, is given, needs beside that and returns."""

    def peak(prompts, limits) -> int:
        sampling = [Sampling(temperature=0.0, max_tokens=n) for n in limits]
        queue = requests.make_requests(cfg, Numbers(cfg.vocab_size), prompts, sampling, None)
        shapes = shapes_for(queue, slots, None)
        B, T = shapes["B"], bucket(max(map(len, prompts)), MIN_PROMPT_BUCKET)
        P = prompt_rows(B, len(prompts), len(set(map(tuple, prompts))))
        state, weights = jax.eval_shape(lambda p: (device.empty(cfg, **shapes), laid_out(p)), params)
        scalar, rows = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((P,), jnp.int32)
        tokens, idle = jax.ShapeDtypeStruct((P, T), jnp.int32), jax.ShapeDtypeStruct((B,), bool)
        programs = (
            device.prefill.lower(cfg, weights, state, rows, tokens, rows, rows),
            device.decode.lower(cfg, weights, state, idle, scalar, scalar),
        )
        return max(held_bytes(p.compile()) for p in programs)

    return peak


def fixed(
    cfg: ModelConfig,
    params,
    arms: Mapping[str, Arm],
    peaks: Mapping[str, Peak],
    load: Load,
    batch: int,
    dtype: str,
    limits: Limits,
) -> dict:
    """All rows begin and end together. Per arm: tokens/s, ms a token (a step of the whole batch) and to the first; of
    the steps after it bytes and operations a second, beside what the device can do."""
    prompts = prompts_of(cfg, batch, (load.prompt,))
    whole = {n: lambda a=a: a(prompts, [load.new] * batch) for n, a in arms.items()}
    first = {n: lambda a=a: a(prompts, [1] * batch) for n, a in arms.items()}
    starts, seconds = in_turn(first, load.repetitions), in_turn(whole, load.repetitions)
    weights, cache = _bytes(cfg, params, batch, load.prompt + load.new // 2, dtype)
    flops = flops_per_token(cfg, load.prompt + load.new // 2)["forward"]
    results = {}
    for name, times in seconds.items():
        memory = peaks[name](prompts, [load.new] * batch)
        results[name] = row(times, {"tokens": batch * load.new}, memory=memory)
        results[name]["ms to the first token"] = 1e3 * statistics.median(starts[name])
        # Of the least disturbed rounds: what disturbs one term of a difference disturbs all of it.
        step = (min(times) - min(starts[name])) / (load.new - 1)
        if step > 0:
            results[name] |= {
                "ms a token after it": 1e3 * step,
                "GB per second": (weights + cache) / step / 1e9,
                "of the copy bandwidth": (weights + cache) / step / limits.copy,
                FLOPS: batch * flops / step / limits.flops,
            }
    needed = {"MB of weights": weights / 1e6, "MB of cache": cache / 1e6, "MFLOP a token": flops / 1e6}
    return {"each step needs": needed} | results | compared(seconds)


def cached(cfg: ModelConfig, params, load: Load) -> dict:
    """What the cache takes, and how far log-probabilities that were sampled with it are from the trainer's."""
    name = transformer.cache_dtype(cfg)
    entries = sizes(load.new, 0, load.prompt + load.new)["capacity"]
    prompts, sampling = prompts_of(cfg, CERTIFIED, (load.prompt,)), Sampling(max_tokens=load.new)
    gap = by_cache_dtype(cfg, params, Numbers(cfg.vocab_size), prompts, sampling, (name,))[name]
    return {
        "dtype": name,
        "bytes a token": transformer.slot_bytes(cfg, entries + 1) - transformer.slot_bytes(cfg, entries),
        "MB a slot": transformer.slot_bytes(cfg, entries) / 1e6,
        "|logp - trainer's|, nats": {"max": f"{gap['max']:.1e}", "mean": f"{gap['mean']:.1e}"},
        "tokens compared": int(gap["tokens"]),
    }


def mixed(cfg: ModelConfig, load: Load) -> tuple[list[list[int]], list[int]]:
    """Requests whose prompts are half as long as `load.prompt` to as long, and whose answers are of geometric length,
    a quarter of `load.new` on average and never longer than it."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(max(1, load.prompt // 2), load.prompt + 1, load.requests).tolist()
    limits = np.clip(generator.geometric(4 / load.new if load.new > 4 else 1.0, load.requests), 1, load.new)
    return prompts_of(cfg, load.requests, lengths, seed=1), limits.tolist()


def in_batches(arm: Arm, batch: int, sort: bool) -> Arm:
    """Requests in batches that run until their longest is done; sorted, those of like length share one."""

    def run(prompts, limits):
        order = sorted(range(len(limits)), key=lambda i: -limits[i]) if sort else list(range(len(limits)))
        done: list = [None] * len(limits)
        for at in range(0, len(order), batch):
            members = order[at : at + batch]
            longest = max(limits[i] for i in members)
            ids = arm([prompts[i] for i in members], [longest] * len(members))
            for i, found in zip(members, ids):
                done[i] = found[: limits[i]]
        return done

    return run


def slots_of(load: Load) -> int:
    """How many requests of mixed lengths run at once."""
    return bucket(max(load.batches))


def continuous(
    cfg: ModelConfig, params, theirs: Mapping[str, Arm], batched: Mapping[str, Arm], load: Load
) -> dict[str, dict]:
    """Requests of mixed lengths: ours through slots, `theirs` too, `batched` as they come and sorted by length.

    All sides know how long each answer will be, and may use it: ours and `theirs` begin with the longest.
    """
    prompts, limits = mixed(cfg, load)
    batch = slots_of(load)
    arms = {OURS: ours(cfg, params, batch)} | dict(theirs)
    for name, arm in batched.items():
        arms[f"{name}, as they come"] = in_batches(arm, batch, sort=False)
        arms[f"{name}, sorted"] = in_batches(arm, batch, sort=True)
    ids = {name: arm(prompts, limits) for name, arm in arms.items()}
    if wrong := [name for name, found in ids.items() if list(map(len, found)) != limits]:
        raise UserError(f"{wrong[0]} gave answers of other lengths than were asked for: there is nothing to compare")
    seconds = in_turn({n: lambda a=a: a(prompts, limits) for n, a in arms.items()}, load.repetitions)
    mine = np.concatenate(ids[OURS])
    results = {
        name: row(times, {"requests": load.requests, "tokens": sum(limits)})
        | {"same greedy tokens": float(np.mean(np.concatenate(ids[name]) == mine))}
        for name, times in seconds.items()
    }
    asked = {"requests": load.requests, "slots": batch, "new tokens": sum(limits), "longest": max(limits)}
    return {"asked": asked} | results | compared(seconds)


def grouped(cfg: ModelConfig, params, load: Load) -> dict[str, dict]:
    """Requests in groups of GROUP that have one prompt, as GRPO samples them, beside as many with prompts of their own:
    the tokens that prefills take through the model, padding and empty rows included.

    Answers end at random, after a quarter of `load.new` on average where all tokens are as likely.
    """
    prompts, _ = mixed(cfg, load)
    arms = {"different prompts": prompts, GROUPS: [prompts[i // GROUP * GROUP] for i in range(load.requests)]}
    stops = tuple(range(max(1, 4 * cfg.vocab_size // load.new)))
    sampling = Sampling(max_tokens=load.new, stop_ids=stops)
    fed: list[int] = []

    def run(prompts):
        return generate(cfg, params, Numbers(cfg.vocab_size), prompts, sampling, slots=slots_of(load))

    def counted(cfg, params, state, slot_P, tokens_PT, *rest, prefill=device.prefill):
        fed.append(tokens_PT.size)
        return prefill(cfg, params, state, slot_P, tokens_PT, *rest)

    results = {}
    for name, asked in arms.items():
        fed.clear()
        with mock.patch.object(device, "prefill", counted):
            new = sum(len(c.ids) for c in run(asked))
        results[name] = {"new tokens": new, "prefills": len(fed), PREFILLED: sum(fed)}
    for name, times in in_turn({n: lambda p=p: run(p) for n, p in arms.items()}, load.repetitions).items():
        results[name] |= row(times, {"tokens": results[name]["new tokens"]})
    return results | {"share": {PREFILLED: results[GROUPS][PREFILLED] / results["different prompts"][PREFILLED]}}


# ---------------------------------------------------------------------------------------------------------- together
def suite(models: Mapping[str, Callable], load: Load, dtype: str, peer, say: Callable[[str], None]) -> dict[str, dict]:
    """Results by part. models: name -> () -> (definition, parameters). peer: `launch.bench_torch`, or None."""
    rates = [measured_peak(dtype)] + ([] if peer is None else [peer.peak(dtype)])
    limits = Limits(max(rates), copy_bandwidth(copy_bytes()))
    results: dict[str, dict] = {
        "copy": {"GB per second": limits.copy / 1e9},
        "matrix product": {f"{dtype}, TFLOP per second": limits.flops / 1e12},
    }
    for name, make in models.items():
        cfg, params = make()
        weights = laid_out(params)  # once, as the other side has its own where it wants them
        if cfg.precision.cache is not None:
            say(f"{name}, the cache in {cfg.precision.cache}")
            results[f"{name}, cache"] = cached(cfg, params, load)
        theirs: dict[str, Arm] = {}
        peaks: dict[str, Peak] = {}
        batching = contextlib.nullcontext({})
        if peer is not None:
            theirs, logits, made = peer.arms(cfg, params, dtype, load, say)
            peaks = {n: functools.partial(peer.generation_bytes, made, arm) for n, arm in theirs.items()}
            batching = peer.continuous(made, load, slots_of(load), say)
            checked = {OURS: ours(cfg, weights, 2)} | theirs
            results[f"{name}, equal"] = check_equal(cfg, params, logits, checked, load, dtype)
        for batch in load.batches:
            say(f"{name}, batch {batch}")
            arms = {OURS: ours(cfg, weights, batch)} | theirs
            of_all = {OURS: peak_bytes(cfg, weights, batch)} | peaks
            results[f"{name}, batch {batch}"] = fixed(cfg, weights, arms, of_all, load, batch, dtype, limits)
        if load.requests:
            say(f"{name}, {load.requests} requests of mixed lengths")
            with batching as slotted:
                results[f"{name}, mixed"] = continuous(cfg, weights, slotted, theirs, load)
            say(f"{name}, {GROUPS}")
            results[f"{name}, {GROUPS}"] = grouped(cfg, weights, load)
    return results
