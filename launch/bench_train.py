"""Training measured: one update as `launch.train` makes it, alone or beside PyTorch with the same weights.

An update is forward, backward, clipping and AdamW, on batches that are on the device already; a row is one text of
random ids. GPT-2's shape at the ladder's sizes (experiments/sizes.py), in float32, and computed in bfloat16 with all
that is kept in float32. Before anything is timed, both sides begin with the same weights and must find the same losses,
before the first update and after some; then all arms take turns of as many updates each. With several runs at once an
update is one of each of them, in one program; the first of them is the run that trains alone.

Operations are counted as `jaxlm.nn.flops` does, and held against the largest rate of a large matrix product that
either side reaches in this run.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from experiments.sizes import SIZES, gpt2
from jaxlm import config, sharding
from jaxlm.config import UserError
from jaxlm.data import loader
from jaxlm.data.prepare import Data
from jaxlm.data.trajectory import Trajectory
from jaxlm.nn.definition import Precision
from jaxlm.nn.flops import flops_per_token, parameter_count
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Constant
from jaxlm.run import replicas, train
from jaxlm.run.experiment import Experiment, validate
from jaxlm.run.log import measured_peak
from jaxlm.sharding import MeshConfig
from jaxlm.steps import state
from jaxlm.steps.update import Train
from launch.bench_rows import OURS, compared, held_bytes, in_turn, row

DTYPES = ("float32", "bfloat16")
COUNTED = "6N + 12LDT, attention not causal, looked-up embeddings left out"
BATCHES = 4  # different ones, in turn
CHECKED = 6  # updates in which both sides must find the same losses
# Of a loss, relative: at the first update, and at the later ones, by when either side's rounding has moved the weights.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (2e-3, 1e-2)}
TURN_SECONDS = 0.5  # what a turn takes of the fastest arm, so that a clock's and a switch's cost vanish in it


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a size is measured at: the vocabulary, and (rows, tokens a row) of a batch by kind of device."""

    vocabulary: int
    cpu: tuple[int, int]
    accelerator: tuple[int, int]


# The vocabulary of GPT-2's sizes is GPT-2's, as its users pad it.
SHAPES = {
    "1m": Shape(2048, (32, 128), (256, 128)),
    "10m": Shape(8192, (16, 256), (128, 256)),
    "30m": Shape(8192, (8, 256), (64, 512)),
    "124m": Shape(50304, (4, 256), (32, 1024)),
    "350m": Shape(50304, (4, 256), (16, 1024)),
    "1.3b": Shape(50304, (2, 256), (16, 1024)),
}


@dataclasses.dataclass(frozen=True)
class Load:
    """What is timed. Unset, rows and tokens a row are those of the size."""

    batches: tuple[int, ...] | None = None
    context: int | None = None
    dtypes: tuple[str, ...] = DTYPES
    settings: tuple[str, ...] = ()  # path=value in the definition of the run
    repetitions: int = 5
    compile_seconds: int = 300  # at most, for each arm under torch.compile; 0: without
    at_once: int = 1  # runs in the program of one more arm; 1: no such arm

    def __post_init__(self):
        if self.batches is not None and min(self.batches) < 1:
            raise UserError("--batch takes sizes of at least 1")
        if self.context is not None and self.context < 2:
            raise UserError("--context must be at least 2")

    def shown(self) -> dict[str, object]:
        """Its values for the table."""
        return {
            k: ", ".join(map(str, v)) if isinstance(v, tuple) else v
            for k, v in dataclasses.asdict(self).items()
            if v is not None
        }


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train. `restart` goes back to the initial weights, without moments; `steps` makes so many updates and
    gives their losses once all of them are done; `peak` is how many bytes of memory an update needs at most. Of several
    `runs` an update is one of each, and the losses are the first's."""

    restart: Callable[[], None]
    steps: Callable[[int], list[float]]
    peak: Callable[[], int]
    runs: int = 1


def usual_rows(size: str) -> tuple[int, int]:
    """Rows and tokens a row of a size on this device."""
    return SHAPES[size].cpu if jax.default_backend() == "cpu" else SHAPES[size].accelerator


# ---------------------------------------------------------------------------------------------------------- our side
def definition(size: str, batch: int, context: int, dtype: str, settings: Sequence[str] = ()) -> Experiment:
    """The run whose update is timed: all defaults but for the shape, on one device."""
    model = dataclasses.replace(
        gpt2(SIZES[size], context), vocab_size=SHAPES[size].vocabulary, precision=Precision(compute=dtype)
    )
    e = Experiment(
        model=model,
        data=Data(context=context),
        optimizer=AdamW(schedule=Constant()),
        train=Train(batch_size=batch),
        mesh=MeshConfig(fsdp=1),
    )
    e = config.parse_sets(e, settings)
    if (e.train.batch_size, e.data.context) != (batch, context):
        raise UserError("rows and tokens a row are --batch and --context here, not --set")
    if not isinstance(e.optimizer, AdamW):
        raise UserError("--set=optimizer: both sides train with AdamW")
    validate(e, 1)
    return e


def made_rows(e: Experiment, count: int = BATCHES) -> list[np.ndarray]:
    """Batches of random ids, int32 [B, T + 1] each."""
    shape = (e.train.batch_size, e.data.context + 1)
    generator = np.random.default_rng(e.seed)
    return [generator.integers(0, e.model.vocab_size, shape).astype(np.int32) for _ in range(count)]


def packed(tokens_BT: np.ndarray, mesh) -> Trajectory:
    """A batch on the device as the loader gives it: every row one text, scored from its second token on."""
    whole = np.ones_like(tokens_BT)
    positions = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
    scored, source = whole.astype(bool), np.zeros(len(tokens_BT), np.int32)
    scored[:, 0] = False
    batch = Trajectory(tokens=tokens_BT, positions=positions, segments=whole, loss_mask=scored, source=source)
    return jax.device_put(batch, sharding.sharding_for(mesh, ("batch",)))


def ours(experiments: Mapping[str, Experiment], rows: Sequence[np.ndarray]) -> tuple[dict[str, Arm], dict]:
    """(arms by dtype, the initial parameters on the host). They share one state: what is kept is float32 in all."""
    first = next(iter(experiments.values()))
    mesh = sharding.make_mesh(first.mesh)
    batches = [packed(tokens, mesh) for tokens in rows]
    described = loader.described(first.train.batch_size, first.data.context + 1, 0, mesh)
    held: dict = {}

    def begin():
        return state.create_sharded(first.model, first.optimizer, first.seed, mesh)

    arms = {}
    for dtype, e in experiments.items():
        abstract = state.abstract(e.model, e.optimizer, mesh)
        arms[dtype] = _arm(held, begin, train.step_function(e, mesh), batches, (abstract, described))
    arms[dtype].restart()
    return arms, jax.device_get(held["state"].params)


def _arm(held: dict, begin: Callable, program, batches: Sequence, described: tuple, runs: int = 1) -> Arm:
    """An arm whose state is in `held`. described: shapes of the state and of a batch."""

    def restart():
        held.clear()  # first: the device may not hold two
        held["state"], held["done"] = begin(), 0

    def steps(count: int) -> list[float]:
        losses = []
        for _ in range(count):
            held["state"], metrics = program(held["state"], batches[held["done"] % len(batches)])
            held["done"] += 1
            losses.append(metrics["loss"])
        return [float(np.ravel(x)[0]) for x in jax.block_until_ready((losses, held["state"]))[0]]

    def peak() -> int:
        return held_bytes(program.lower(*described).compile())

    return Arm(restart, steps, peak, runs)


def at_once(e: Experiment, rows: Sequence[np.ndarray], runs: int) -> Arm:
    """Several runs in one program: `e`, and the same with other seeds on the same rows."""
    experiments = [dataclasses.replace(e, seed=e.seed + i) for i in range(runs)]
    mesh = replicas.make_mesh(e.mesh, runs)
    batches = [packed(np.tile(tokens, (runs, 1)), mesh) for tokens in rows]
    described = loader.described(runs * e.train.batch_size, e.data.context + 1, 0, mesh)
    return _arm(
        {},
        lambda: replicas.begin(experiments, mesh, {}),
        replicas.step_function(experiments, mesh),
        batches,
        (replicas.abstract(e, mesh, runs), described),
        runs,
    )


# -------------------------------------------------------------------------------------------------------- the timing
def check_equal(losses: Mapping[str, Sequence[float]], reference: Sequence[float], dtype: str) -> dict[str, str]:
    """By arm, how far its losses are from the reference's, relative: the first, and the worst of the later ones.

    `UserError` when that is too far: not the same weights, or not the same update.
    """
    shown, bounds = {}, TOLERANCE[dtype]
    for name, found in losses.items():
        off = [abs(x - y) / abs(y) for x, y in zip(found, reference, strict=True)]
        off = off[0], max(off[1:])
        for at, bound, when in zip(off, bounds, ("before the first update", f"within {len(found) - 1} updates")):
            if not at <= bound:
                raise UserError(
                    f"the two sides do not train the same model: {name} in {dtype} finds a loss that is off by "
                    f"{at:.2g} {when}; {bound:g} is allowed"
                )
        shown[name] = f"{off[0]:.1e}, then {off[1]:.1e}"
    return shown


def timed(arms: Mapping[tuple[str, str], Arm], turn_steps: int, repetitions: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of an update, by arm and turn; all arms in turn."""
    turns = in_turn({k: functools.partial(arm.steps, turn_steps) for k, arm in arms.items()}, repetitions)
    return {k: [s / turn_steps for s in seconds] for k, seconds in turns.items()}


def measure(e: Mapping[str, Experiment], load: Load, peaks: Mapping[str, float], peer, say: Callable[[str], None]):
    """Results of one size and batch by part. e: the run by dtype. peaks: FLOP/s by dtype. peer: as in `suite`."""
    one = next(iter(e.values()))
    rows = made_rows(one)
    mine, initial = ours(e, rows)
    arms = {(dtype, OURS): arm for dtype, arm in mine.items()}
    if load.at_once > 1:
        arms |= {(dtype, f"{load.at_once} at once"): at_once(e[dtype], rows, load.at_once) for dtype in e}
    if peer is not None:
        arms |= peer.arms(one, initial, rows, tuple(e), load.compile_seconds, say)
    tokens = one.train.batch_size * one.data.context
    flops = flops_per_token(one.model, one.data.context)["train"]
    about = {
        "parameters": parameter_count(one.model),
        "rows": one.train.batch_size,
        "tokens a row": one.data.context,
        "MFLOP a token": flops / 1e6,
        "counted": COUNTED,
    }
    say("first updates")
    losses, fastest = {}, math.inf
    for key, arm in arms.items():
        arm.restart()
        losses[key] = arm.steps(CHECKED)
        began = time.perf_counter()
        arm.steps(1)
        fastest = min(fastest, time.perf_counter() - began)
    reference = next(iter(losses.values()))  # our own, in float32 where that is measured
    about["loss"] = f"{reference[0]:.4f}, after {CHECKED - 1} updates {reference[-1]:.4f}"
    results = {}
    for dtype in e:
        others = {name: found for (d, name), found in losses.items() if d == dtype and found is not reference}
        if others:
            results[f"losses, {dtype}"] = check_equal(others, reference, dtype)
    turn = max(1, math.ceil(TURN_SECONDS / fastest))
    about["updates a turn"] = turn
    say(f"{len(arms)} arms in turn, {load.repetitions} times {turn} updates each")
    seconds = timed(arms, turn, load.repetitions)
    for dtype in e:
        part = {}
        for (d, name), times in seconds.items():
            if d == dtype:
                done, memory = arms[d, name].runs * tokens, arms[d, name].peak()
                part[name] = row(times, {"tokens": done}, flops=done * flops, peak=peaks[dtype], memory=memory)
        results[dtype] = part | compared({name: s for (d, name), s in seconds.items() if d == dtype})
    return {"shape": about} | results


def suite(sizes: Sequence[str], load: Load, peer, say: Callable[[str], None]) -> dict[str, dict]:
    """Results by part. peer: `launch.bench_train_torch`, or None."""
    runs = []
    for size in sizes:
        rows, length = usual_rows(size)
        length = load.context or length
        for batch in load.batches or (rows,):  # all before anything is timed: a bad one among them costs nothing then
            runs.append((size, {d: definition(size, batch, length, d, load.settings) for d in load.dtypes}))
    train.use_compilation_cache()
    peaks: dict[str, dict[str, float]] = {}
    for dtype in load.dtypes:
        peaks[dtype] = {OURS: measured_peak(dtype)} | ({} if peer is None else {"torch": peer.peak(dtype)})
    most = {dtype: max(found.values()) for dtype, found in peaks.items()}
    results: dict[str, dict] = {
        "matrix product": {f"{d}, TFLOP per second": {n: x / 1e12 for n, x in p.items()} for d, p in peaks.items()}
    }
    for size, e in runs:
        name = size if load.batches is None or len(load.batches) == 1 else f"{size}, batch {batch_of(e)}"
        say(name)
        for part, found in measure(e, load, most, peer, say).items():
            results[f"{name}, {part}"] = found
    return results


def batch_of(e: Mapping[str, Experiment]) -> int:
    return next(iter(e.values())).train.batch_size
