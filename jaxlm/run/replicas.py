"""Several runs as one program: a replica axis over their states, batches, seeds and float settings.

A small model leaves an accelerator mostly idle, and the updates of other runs can fill it. Runs that differ in seeds
and in float settings of optimizer and objective alone take the same step: it is mapped over an axis of runs, and the
axis is spread over the devices. Each run is whole on its device, which computes for itself. All else is each run's own,
as `train.py` makes it: folder, order of rows, log, checkpoints. Any of them can go on alone, and what was begun alone
can go on here.

An array of R runs has them as its first dim. R runs on D devices: each device holds R / D of them, in order.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import config, sharding, storage
from jaxlm.config import UserError
from jaxlm.data.loader import Loader
from jaxlm.run import exits, goodput, lineage, loop, objectives, report, train
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.exits import Diverged
from jaxlm.run.experiment import Experiment
from jaxlm.run.goodput import Clock
from jaxlm.run.log import MetricsLog, Progress
from jaxlm.run.watchdog import Watchdog
from jaxlm.sharding import MeshConfig
from jaxlm.steps import state, update

RUNS = PartitionSpec("replica")
ALL = PartitionSpec()


# ------------------------------------------------------------------------------------------------ what fits together
def may_differ(e: Experiment) -> list[str]:
    """Paths of the settings that runs of one program need not share: they enter it as arrays."""
    nodes = {"optimizer": e.optimizer, "objective": e.objective}
    return ["seed", *(f"{name}.{path}" for name, node in nodes.items() for path in update.hyperparameters(node))]


def obstacle(e: Experiment, other: Experiment) -> str | None:
    """Why the two cannot train in one program, in a line; None where they can."""
    for one in (e, other):
        if type(one.objective) not in objectives.TASKS:
            return f"with objective {type(one.objective).__name__} every run makes its own rows, and trains alone"
        if max(one.mesh.tensor, one.mesh.context) > 1:
            return "mesh.tensor and mesh.context spread a run over devices; here each run is whole on its own"
    free = [path for path in may_differ(e) if path in may_differ(other)]
    if not (lines := [line for line in config.diff(e, other) if line.split(": ")[0] not in free]):
        return None
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return f"they differ in {'; '.join(lines[:3])}{more}, and may only in {', '.join(free)}"


def make_mesh(cfg: MeshConfig, runs: int):
    """The replica axis alone, over as many of the definition's devices as divide the number of runs."""
    if jax.process_count() > 1:
        raise UserError("runs that train in one program need one process; of several processes, each run has all")
    devices = max(d for d in range(1, sharding.make_mesh(cfg).size + 1) if runs % d == 0)
    return sharding.make_mesh(MeshConfig(replica=devices, fsdp=1))


# ------------------------------------------------------------------------------------------------------- the programs
def _stacked(floats: Sequence[dict[str, float]], where) -> dict:
    """{path: float32 [R]}"""
    return {k: jax.device_put(np.array([x[k] for x in floats], np.float32), where) for k in floats[0]}


def _floats(experiments: Sequence[Experiment], mesh) -> tuple[dict, dict]:
    """Float settings of the optimizers and of the objectives."""
    where = NamedSharding(mesh, RUNS)
    return tuple(
        _stacked([update.hyperparameters(getattr(e, name)) for e in experiments], where)
        for name in ("optimizer", "objective")
    )


def _seeds(experiments: Sequence[Experiment]) -> np.ndarray:
    return np.array([e.seed for e in experiments], np.int32)


def _on_each_device(fn, mesh, axes: Sequence[int | None]):
    """`fn` of one run as one of all: mapped over the runs of a device, the same on every device. axes: 0 for arguments
    that each run has, None for those that all share."""
    specs = tuple(ALL if axis is None else RUNS for axis in axes)
    # Nothing is sent between devices, so there is nothing to check of what is the same on all.
    each = jax.vmap(fn, axes, axis_name=sharding.RUN)
    return jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=RUNS, check_vma=False)


def step_function(experiments: Sequence[Experiment], mesh, reference=None) -> sharding.Program:
    """The jitted, donated (state [R, ...], batch [R * B, ...]) -> (state, metrics [R]), each run's rows together.

    reference: as `objectives.read_reference` gives it, one for all.
    """
    e, where = experiments[0], NamedSharding(mesh, RUNS)
    step = _on_each_device(train.step_of(e, reference), mesh, (0, 0, None, 0, 0, None, 0))

    def steps(s, batch, *rest):
        rows = jax.tree.map(lambda x: x.reshape(-1, e.train.batch_size, *x.shape[1:]), batch)
        return step(s, rows, *rest)

    options = sharding.compiler_options(mesh)
    jitted = jax.jit(steps, donate_argnums=0, out_shardings=where, compiler_options=options)
    frozen = None if reference is None else reference[1]
    rest = (frozen, *_floats(experiments, mesh), e.train.steps, jax.device_put(_seeds(experiments), where))
    return sharding.Program(jitted, mesh, rest, apart=True)


def evaluate_function(experiments: Sequence[Experiment], mesh, tokenizer, valid: dict, reference=None):
    """(params [R, ...]) -> for each run what `train.evaluate_function` gives. A batch is read once, for all."""
    e, whole = experiments[0], sharding.replicated(mesh)
    sums = jax.jit(_on_each_device(train.sums_of(e, reference), mesh, (0, None, None, 0, None)))
    token_bytes, floats = jax.device_put(tokenizer.token_bytes, whole), _floats(experiments, mesh)[1]
    frozen, summarize = None if reference is None else reference[1], objectives.task(e).summarize

    def each(found) -> list[dict[str, float]]:
        found = jax.device_get(found)
        return [summarize(jax.tree.map(lambda x, i=i: x[i], found)) for i in range(len(experiments))]

    def call(params) -> list[dict]:
        def of_all(batch):
            return sums(params, jax.device_put(batch, whole), frozen, floats, token_bytes)

        with jax.set_mesh(mesh):
            found = train.evaluated(e, None, valid, of_all, each)
        return [{name: results[i] for name, results in found.items()} for i in range(len(experiments))]

    return call


# --------------------------------------------------------------------------------------------------------- the states
def begin(experiments: Sequence[Experiment], mesh, records: dict) -> state.TrainState:
    """What `train.initial_state` gives each, made in place."""
    e = experiments[0]

    def one(seed, theirs):
        return train.started(state.create(e.model, e.optimizer, seed, e.lora, e.heads), theirs)

    made = jax.jit(jax.vmap(one, (0, None)), out_shardings=NamedSharding(mesh, RUNS))
    return made(_seeds(experiments), train.parents_params(e, mesh, records))


def abstract(e: Experiment, mesh, runs: int) -> state.TrainState:
    """Shapes, dtypes and shardings of as many states in one."""
    where, one = NamedSharding(mesh, RUNS), state.abstract(e.model, e.optimizer, mesh, e.lora, e.heads)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((runs, *x.shape), x.dtype, sharding=where), one)


def stack(states: Sequence, mesh):
    """States of one run each as one."""
    together = jax.jit(lambda *s: jax.tree.map(lambda *x: jnp.stack(x), *s), out_shardings=NamedSharding(mesh, RUNS))
    return together(*jax.device_get(list(states)))


@jax.jit
def _at(stacked, i):
    return jax.tree.map(lambda x: x[i], stacked)


def take(stacked, i: int):
    """Run i's part, on its own device."""

    def shard(x):
        return x.addressable_shards[i * len(x.addressable_shards) // len(x)].data

    local = jax.tree.map(shard, stacked)
    return _at(local, i % len(jax.tree.leaves(local)[0]))


def common_step(checkpoints: Sequence[Checkpoints]) -> int | None:
    """The newest step that all have, to go on from; newer ones are set aside. None: from the start."""
    while len(found := {c.latest() for c in checkpoints}) > 1:
        oldest = min(-1 if step is None else step for step in found)
        for c in checkpoints:
            c.go_back(oldest)
    return found.pop()


# ------------------------------------------------------------------------------------------------------------ the run
@dataclasses.dataclass(eq=False)
class Replica:
    """What each run has of its own on the host; `place` is its index along the replica axis."""

    place: int
    root: object
    checkpoints: Checkpoints
    log: MetricsLog
    recorder: loop.Recorder


class Together:
    """The recorder and the checkpoints that the loop knows, of all runs that have not diverged."""

    def __init__(self, replicas: Sequence[Replica], clock: Clock, progress: Progress):
        self.running, self.clock, self._progress = list(replicas), clock, progress
        self.first, self.cfg = replicas[0].recorder.first, replicas[0].checkpoints.cfg
        self._all, self._unread = list(replicas), []

    def note(self, step: int, metrics) -> None:
        self._unread.append((step, metrics))

    def __call__(self, step: int, metrics) -> None:
        noted = jax.device_get([x for x in self._unread if x[0] <= step])
        self._unread = [x for x in self._unread if x[0] > step]
        metrics, times, shown = jax.device_get(metrics), self.clock.take(), []
        for r in list(self.running):
            for n, earlier in noted:
                r.recorder.note(n, {k: x[r.place] for k, x in earlier.items()})
            try:
                shown.append(r.recorder.record(step, {k: x[r.place] for k, x in metrics.items()}, times))
            except Diverged as e:
                self._diverged(r, e)
        names = ("train/loss", *self._all[0].recorder.rates)
        sums = {k: math.fsum(values[k] for values in shown) for k in names if all(k in values for values in shown)}
        self._progress.update(step, sums | {"train/loss": sums["train/loss"] / len(shown)})

    def _diverged(self, r: Replica, e: Diverged) -> None:
        """The others go on, and so does its part of the program: nothing of it is kept any more."""
        self.running.remove(r)
        exits.record_diverged(r.root)
        self._progress.say(f"{r.root} has diverged: {e}")
        if not self.running:
            raise Diverged("none of the runs is left")

    def close(self, step: int) -> None:
        times = self.clock.take()
        for r in self.running:
            r.log.write(step, times)

    def save(self, step: int, stacked, metadata: dict, metrics: Sequence[float] | None, force: bool = False) -> None:
        if force or step % self.cfg.every == 0:
            for r in list(self.running):
                metric = None if metrics is None else metrics[r.place]
                try:
                    r.checkpoints.save(step, take(stacked, r.place), metadata, metric, force)
                except Diverged as e:
                    self._diverged(r, e)

    def wait(self) -> None:
        for r in self._all:
            r.checkpoints.wait()

    def cost(self) -> dict[str, float]:
        """Of all runs together."""
        each = [r.checkpoints.cost() for r in self._all]
        return {k: math.fsum(took.get(k, 0.0) for took in each) for k in {k: None for took in each for k in took}}


def _restore(experiments, roots, checkpoints, step: int, hashes: dict, mesh) -> tuple[state.TrainState, dict]:
    """(the states saved at a step, the records that all lineages share)."""
    e, alone = experiments[0], sharding.make_mesh(MeshConfig(fsdp=1))
    target, states = state.abstract(e.model, e.optimizer, alone, e.lora, e.heads), []
    for c in checkpoints:
        s, metadata = c.restore(target, step)
        lineage.check_same_data(metadata["hashes"], hashes)
        lineage.check_same_draws(metadata)
        states.append(jax.device_get(s))
    records = [storage.read_json(root / "lineage.json") for root in roots]
    for root, theirs in zip(roots, records):
        if other := [what for what in objectives.origins(e) if theirs[what] != records[0][what]]:
            raise UserError(f"{root} and {roots[0]} began with other checkpoints of their {other[0]}: train each alone")
    return stack(states, mesh), records[0]


def train_together(runs: Mapping[str, Experiment], base: Experiment | None = None) -> int:
    """Runs or resumes all, {workdir: definition}, from the newest step that all have saved.

    Returns the exit code: done, though some have diverged (`exits.has_diverged`); stopped and saved; or all have
    diverged. `UserError` where two cannot train in one program. `base` is what `diff.txt` compares with.
    """
    clock = Clock()
    train.use_compilation_cache()
    for e in runs.values():
        objectives.check_there(e)
    workdirs, experiments = list(runs), [train.inherit(e) for e in runs.values()]
    for workdir, e in zip(workdirs, experiments):
        if why := obstacle(experiments[0], e):
            raise UserError(f"{workdir} and {workdirs[0]} cannot train in one program: {why}")
    mesh, data = make_mesh(experiments[0].mesh, len(runs)), None
    for i, workdir in enumerate(workdirs):
        experiments[i], data = train.settle(experiments[i], workdir, 1, data)
    e = experiments[0]

    with contextlib.ExitStack() as closing:
        roots = [train.open_workdir(w, data.tokenizer) for w in workdirs]
        closing.enter_context(Watchdog(clock, e.train.hang_seconds, roots[0]))
        closing.enter_context(loop.memory_advice("a smaller --at_once, "))
        checkpoints = [closing.enter_context(Checkpoints(root, e.checkpoint)) for root in roots]
        found = common_step(checkpoints)
        if found is None:
            records = objectives.origin_records(e)
            s = begin(experiments, mesh, records)
            for root in roots:
                lineage.write_lineage(root, data.hashes, **records)
        else:
            with clock.phase("restore"):
                s, records = _restore(experiments, roots, checkpoints, found, data.hashes, mesh)
        reference = objectives.read_reference(e, mesh, records)
        for root, x in zip(roots, experiments):
            train.write_definition(root, x, base, data.tokenizer)

        first, skipped = found or 0, jax.device_get(s.skipped)
        per_second, peak = train.rates(e, reference, mesh.size)
        progress = Progress(e.train.steps, first, f"{len(runs)} runs on {mesh.size} devices; {peak}")
        closing.callback(progress.close)
        replicas = []
        for i, root in enumerate(roots):
            log = MetricsLog(root, e.train.tensorboard)
            closing.callback(log.close)
            recorder = loop.Recorder(
                first=first,
                rates=per_second,
                max_skipped=e.train.max_skipped,
                sinks=[log.write],
                clock=clock,
                skipped=int(skipped[i]),
                prefix=f"{root}: ",
            )
            replicas.append(Replica(i, root, checkpoints[i], log, recorder))
        together = Together(replicas, clock, progress)
        score = evaluate_function(experiments, mesh, data.tokenizer, data.valid, reference)

        def evaluate(n, s):
            results = score(s.params)
            for r in together.running:
                r.log.write(n, train.metrics_of(results[r.place]))
            means = {f"mean eval/{k}/loss": [results[r.place][k]["loss"] for r in together.running] for k in results[0]}
            progress.note(n, {k: math.fsum(v) / len(v) for k, v in means.items()})
            return [result["all"]["loss"] for result in results]

        rows, seeds = e.train.batch_size * len(runs), [x.seed for x in experiments]
        try:
            with Loader(data.train, rows, seeds, mesh, first=first) as loader:
                s, code = loop.run(
                    s,
                    step_function(experiments, mesh, reference),
                    loader.batch,
                    e.train.steps,
                    recorder=together,
                    log_every=e.train.log_every,
                    evaluate=evaluate,
                    evaluate_every=e.evaluation.every,
                    checkpoints=together,
                    metadata=lineage.metadata(data.hashes),
                )
        except Diverged:
            return exits.EXIT_DIVERGED
    goodput.tell(roots[0], progress.say)
    alone = sharding.make_mesh(MeshConfig(fsdp=1))
    for r in together.running:
        if code == exits.EXIT_DONE and (finish := objectives.task(e).finish) is not None:
            params = jax.device_put(take(s.params, r.place), sharding.replicated(alone))
            finish(experiments[r.place], alone, params, data.valid, r.root, e.train.steps)
        report.loss_curve(r.root, objectives.task(e).unit)
    return code
