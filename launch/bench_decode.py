"""Decoding measured: our sampler as it is called, alone or beside transformers' `generate` with the same weights.

Both sides do the same work in one process: the same prompts, as many new tokens (nothing stops early), greedy, the same
dtype and number of threads. Before anything is timed, the two must give the same logits. Then they run in turn, so that
what else the machine does falls on both.
"""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sizes import SIZES
from jaxlm import storage, tree
from jaxlm.config import UserError
from jaxlm.nn import transformer
from jaxlm.nn.definition import Precision
from jaxlm.nn.transformer import ModelConfig
from jaxlm.run.load import load_run
from jaxlm.run.report import COLORS, new_figure, save_figure
from jaxlm.sample import slots as device
from jaxlm.sample.engine import MAX_SLOTS, Completion, Sampling, bucket, generate, sizes
from jaxlm.sample.parity import by_cache_dtype

# Those of the experiments that the sizes stand in; a rung without one has what its neighbor has.
VOCABULARY = {"1m": 2048, "10m": 8192, "30m": 8192}
LARGE_VOCABULARY = 32768
# Of logits, relative to their spread. In bfloat16 both sides round at every step, each in its own order: what is wrong
# by little shows in float32 only. With a cache in another dtype, of how likely our tokens are.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2, "int8": 0.2}
CERTIFIED = 8  # rows whose log-probabilities are compared with the trainer's, where a dtype of the cache is asked for
COPY_BYTES = 1 << 28
OURS = "jaxlm"
GROUP = 8  # GRPO's samples of a prompt
GROUPS, PREFILLED = f"groups of {GROUP}", "tokens prefilled"

Arm = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[int]]]  # (prompts, new tokens of each) -> new ids


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


def in_turn(arms: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every call: all arms once, then all again, and so on, after one call of each that is not counted."""
    for arm in arms.values():
        arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repetitions):
        for name, arm in arms.items():
            begin = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def copy_bandwidth(size: int = COPY_BYTES) -> float:
    """Bytes per second of reading and writing `size` bytes, the better of JAX on its device and NumPy on one core."""
    x = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    source = np.zeros(size // 4, np.float32)
    target = np.empty_like(source)
    arms = {"jax": lambda: add(x).block_until_ready(), "numpy": lambda: np.copyto(target, source)}
    if jax.default_backend() != "cpu":
        arms.pop("numpy")
    return max(2 * size / min(times) for times in in_turn(arms, 5).values())


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _bytes(cfg: ModelConfig, params, batch: int, length: int, dtype: str) -> tuple[float, float]:
    """(weights, cache) bytes that one step must read: all weights but an embedding that only looks up, and the cache of
    `length` tokens of each row."""
    width = np.dtype(jnp.dtype(dtype)).itemsize
    looked_up = 0 if cfg.tied else transformer.padded_vocab(cfg) * cfg.width
    weights = (tree.count(params) - looked_up) * width
    return weights, batch * transformer.slot_bytes(cfg, length)


def fixed(cfg: ModelConfig, params, arms: Mapping[str, Arm], load: Load, batch: int, dtype: str, copy: float) -> dict:
    """All rows begin and end together. Per arm: tokens/s, ms a token (a step of the whole batch) and to the first."""
    prompts = prompts_of(cfg, batch, (load.prompt,))
    whole = {n: lambda a=a: a(prompts, [load.new] * batch) for n, a in arms.items()}
    first = {n: lambda a=a: a(prompts, [1] * batch) for n, a in arms.items()}
    starts, seconds = in_turn(first, load.repetitions), in_turn(whole, load.repetitions)
    weights, cache = _bytes(cfg, params, batch, load.prompt + load.new // 2, dtype)
    results = {}
    for name, times in seconds.items():
        results[name] = {
            "seconds": spread(times),
            "tokens per second": batch * load.new / statistics.median(times),
            "ms to the first token": 1e3 * statistics.median(starts[name]),
        }
        # Of the least disturbed rounds: what disturbs one term of a difference disturbs all of it.
        step = (min(times) - min(starts[name])) / (load.new - 1)
        if step > 0:
            results[name] |= {
                "ms a token after it": 1e3 * step,
                "GB per second": (weights + cache) / step / 1e9,
                "of the copy bandwidth": (weights + cache) / step / copy,
            }
    needed = {"MB of weights": weights / 1e6, "MB of cache": cache / 1e6}
    return {"each step reads": needed} | results | compared(seconds)


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
        name: {
            "seconds": spread(times),
            "requests per second": load.requests / statistics.median(times),
            "tokens per second": sum(limits) / statistics.median(times),
            "same greedy tokens": float(np.mean(np.concatenate(ids[name]) == mine)),
        }
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
        rate = results[name]["new tokens"] / statistics.median(times)
        results[name] |= {"seconds": spread(times), "tokens per second": rate}
    return results | {"share": {PREFILLED: results[GROUPS][PREFILLED] / results["different prompts"][PREFILLED]}}


def compared(seconds: Mapping[str, Sequence[float]]) -> dict:
    """How many times as fast as each other arm ours is, round by round; the best other arm is the one that counts."""
    others = [n for n in seconds if n != OURS]
    if not others:
        return {}
    best = min(others, key=lambda n: statistics.median(seconds[n]))
    ratios = {n: spread([t / o for t, o in zip(seconds[n], seconds[OURS])]) for n in others}
    return {
        "times as fast": {"as": best} | ratios[best],
        "times as fast as": {n: r["median"] for n, r in ratios.items()},
    }


# ---------------------------------------------------------------------------------------------------------- together
def suite(models: Mapping[str, Callable], load: Load, dtype: str, peer, say: Callable[[str], None]) -> dict[str, dict]:
    """Results by part. models: name -> () -> (definition, parameters). peer: `launch.bench_torch`, or None."""
    copy = copy_bandwidth()
    results: dict[str, dict] = {"copy": {"GB per second": copy / 1e9}}
    for name, make in models.items():
        cfg, params = make()
        if cfg.precision.cache is not None:
            say(f"{name}, the cache in {cfg.precision.cache}")
            results[f"{name}, cache"] = cached(cfg, params, load)
        theirs: dict[str, Arm] = {}
        batching = contextlib.nullcontext({})
        if peer is not None:
            theirs, logits, made = peer.arms(cfg, params, dtype, load, say)
            batching = peer.continuous(made, load, slots_of(load), say)
            checked = {OURS: ours(cfg, params, 2)} | theirs
            results[f"{name}, equal"] = check_equal(cfg, params, logits, checked, load, dtype)
        for batch in load.batches:
            say(f"{name}, batch {batch}")
            arms = {OURS: ours(cfg, params, batch)} | theirs
            results[f"{name}, batch {batch}"] = fixed(cfg, params, arms, load, batch, dtype, copy)
        if load.requests:
            say(f"{name}, {load.requests} requests of mixed lengths")
            with batching as slotted:
                results[f"{name}, mixed"] = continuous(cfg, params, slotted, theirs, load)
            say(f"{name}, {GROUPS}")
            results[f"{name}, {GROUPS}"] = grouped(cfg, params, load)
    return results


def plot(results: Mapping[str, dict], path) -> None:
    """Draws tokens/s, a panel for each part, a bar for each arm; the lines are the fastest and the slowest round."""
    parts = {k: {n: f for n, f in v.items() if isinstance(f, dict) and "seconds" in f} for k, v in results.items()}
    parts = {k: v for k, v in parts.items() if v}
    columns = min(3, len(parts))
    rows = math.ceil(len(parts) / columns)
    figure = new_figure(3.6 * columns + 0.6, 0.9 + rows * (1.0 + 0.3 * max(map(len, parts.values()))))
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (part, found) in zip(panels, parts.items()):
        for i, figures in enumerate(found.values()):
            rate, s = figures["tokens per second"], figures["seconds"]
            ends = [[rate - rate * s["median"] / s["max"]], [rate * s["median"] / s["min"] - rate]]
            axes.barh(i, rate, xerr=ends, color=COLORS[i == 0], height=0.7, error_kw={"linewidth": 0.9})
        axes.set_yticks(range(len(found)), list(found), fontsize=8)
        axes.invert_yaxis()
        axes.set_title(part, fontsize=10)
        axes.set_xlabel("tokens per second", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(figure.axes)[len(parts) :]:
        axes.set_visible(False)
    save_figure(figure, storage.path(path))
