"""The only training loop: it calls `step(state, batch)` and knows no algorithm."""

import contextlib
import dataclasses
import itertools
import math
import re
import signal
import time
from collections.abc import Callable, Iterator

import jax
from absl import logging
from jax.experimental import multihost_utils

from jaxlm.config import UserError
from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.exits import EXIT_DONE, EXIT_PREEMPTED, Abandoned, Diverged
from jaxlm.run.goodput import Clock

OWED = "evaluation_owed"  # in a checkpoint's metadata


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM or a first Ctrl-C has come; a second one stops at once.

    Of several processes all have to ask equally often, and at the same places: they get the same answer.
    """
    seen = []
    if jax.process_count() > 1:  # the runtime has handlers of its own, and agrees on a question that none has passed
        asked = itertools.count(1)

        def agreed() -> bool:
            if not seen and multihost_utils.reached_preemption_sync_point(next(asked)):
                seen.append(signal.SIGTERM)
            return bool(seen)

        yield agreed
        return

    def handle(number, frame):
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    try:
        old = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever runs us there handles its signals
        old = {}
    try:
        yield lambda: bool(seen)
    finally:
        for s, h in old.items():
            signal.signal(s, h)


@contextlib.contextmanager
def memory_advice(first: str = ""):
    """What a device says when its memory does not suffice becomes a `UserError` that names what to change, `first` of
    all."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        asked = re.search(r"allocat\w+ (\d[\d.]*\s?\w*)", str(error))
        raise UserError(
            f"out of memory on {jax.local_devices()[0].device_kind}{f' (asked for {asked[1]})' if asked else ''}: set "
            f"{first}train.accumulation to 2 or more, model.remat=full, a smaller train.loss_chunk, "
            "train.batch_size or data.context, or spread the model over more devices (mesh.fsdp, mesh.tensor)"
        ) from error


@dataclasses.dataclass
class Recorder:
    """Turns a step's metrics into log lines: rates since the last line, the time to the first step, divergence.

    first: the step from which this process goes on. rates: what a step counts towards each metric per second, such as
    {"train/tokens_per_second": tokens in a batch}. max_skipped: so many updates in a row left out mean that the
    run has diverged. sinks: functions (step, {name: value}), the log first. clock: where the time goes; rates
    are over what went into steps and waiting for their batches. prefix: of what is said, where several run.
    """

    first: int
    rates: dict[str, float]
    max_skipped: int
    sinks: list[Callable[[int, dict[str, float]], None]]
    clock: Clock = dataclasses.field(default_factory=Clock)
    skipped: int = 0
    bad_run: int = 0
    unread: list = dataclasses.field(default_factory=list)
    prefix: str = ""

    def __post_init__(self):
        self.step, self.began = self.first, time.perf_counter()

    def note(self, step: int, metrics) -> None:
        """Of every step, also of those without a line of their own: kept on the device until the next line."""
        self.unread.append((step, {k: metrics[k] for k in ("skipped", "gradient_norm") if k in metrics}))

    def _left_out(self, step: int) -> list[tuple[int, dict[str, float]]]:
        """What was noted of each step up to this one, since the last line, that was left out."""
        noted = jax.device_get([x for x in self.unread if x[0] <= step])
        self.unread = [x for x in self.unread if x[0] > step]  # those are still on their way
        counts = [self.skipped, *(int(m["skipped"]) for _, m in noted)]
        return [
            (n, {f"train/{k}": float(v) for k, v in m.items()})
            for (n, m), before, after in zip(noted, counts, counts[1:])
            if after > before
        ]

    def __call__(self, step: int, metrics) -> None:
        self.record(step, jax.device_get(metrics), self.clock.take())

    def record(self, step: int, metrics, times: dict[str, float]) -> dict[str, float]:
        """A step's line, which is returned; `times` as `Clock.take` gives them, since the last."""
        values, steps = {f"train/{k}": float(v) for k, v in metrics.items()}, step - self.step
        if self.step == self.first:  # this interval holds the compilation: it says nothing about speed
            values["train/seconds_to_first_step"] = time.perf_counter() - self.began
        else:
            busy = times["seconds/step"] + times.get("seconds/data", 0.0)
            values |= {k: v * steps / busy for k, v in self.rates.items()}
        values |= times
        for n, noted in self._left_out(step):
            norm = noted.get("train/gradient_norm", math.nan)
            logging.warning("%supdate %d is left out (gradient norm %.4g)", self.prefix, n, norm)
            if n < step:  # this one's own line follows
                self.sinks[0](n, noted)
        skipped = int(values["train/skipped"])
        self.bad_run = self.bad_run + steps if skipped - self.skipped == steps else 0
        self.skipped, self.step = skipped, step
        for sink in self.sinks:
            sink(step, values)
        if self.bad_run >= self.max_skipped:
            raise Diverged(f"all of the last {self.bad_run} updates before step {step} were left out; lower the lr")
        return values

    def close(self, step: int) -> None:
        """The time since the last line, in a line of its own in the log alone."""
        self.sinks[0](step, self.clock.take())


def _go_back(checkpoints: Checkpoints, step: int, back: int) -> None:
    """Of a run that ended early: the newest checkpoint is of after the fall, so another one is what the next reads."""
    found = checkpoints.choose(back, step)
    why = "" if found <= back else ", the oldest that is kept (a larger checkpoint.keep_latest keeps more)"
    if jax.process_index() == 0:
        told = "ended at step %d, to go back to step %d: who reads this run, as a parent too, gets checkpoint %d%s"
        logging.warning(told, step, back, found, why)


def run(
    state,
    step: Callable,
    batch: Callable[[int], object],
    steps: int,
    *,
    recorder: Recorder,
    log_every: int,
    evaluate: Callable[[int, object], float],
    evaluate_every: int,
    checkpoints: Checkpoints,
    metadata: dict,
    ended: Callable[[], int | None] | None = None,
    stopping: Callable[[], bool] | None = None,
    owed: bool = False,
) -> tuple[object, int]:
    """Steps from `recorder.first` to `steps`, logging, evaluating and saving on the way.

    There is a line for the first step of a process, for each step that is followed by an evaluation, a save or the end,
    and for every `log_every`-th.

    step: (state, batch) -> (state, {name: scalar array}), asynchronous. batch: global step -> batch.
    evaluate: (step, state) -> the metric by which the best checkpoint is kept, lower is better; it logs for itself.
    ended: the step to go back to, where what was logged says that the run is to end here, or None. It is then done, a
    resumed one takes no step, and the newest checkpoint up to there is what others read of it (`Checkpoints.choose`).
    stopping: says whether to stop, as `stop_requests` gives it; without it one is made. `step` and `evaluate` may ask
    it too, and raise `Abandoned`: the state before is saved, and `metadata` says that an evaluation is owed.
    owed: whether it said so: then that comes first.
    Returns (state, exit code): done, or preempted and saved. Raises `Diverged`.
    """
    n, clock = recorder.first, recorder.clock
    pending = None  # metrics of the step before: read only once the next one is on its way
    stop, last = False, True  # whether to stop, and whether there is nothing left to do
    back = (lambda: None) if ended is None else ended
    clock.beside(checkpoints.cost())

    def evaluated() -> tuple[float | None, bool]:
        """(the metric, whether it was abandoned)"""
        try:
            with clock.phase("evaluate"):
                return evaluate(n, state), False
        except Abandoned:
            return None, True

    with stop_requests() if stopping is None else contextlib.nullcontext(stopping) as stopping, clock.phase("step"):
        if owed and evaluated()[1]:
            return state, EXIT_PREEMPTED  # what is saved says that it is owed
        worked, owed = owed, False
        while n < steps and back() is None:
            with clock.phase("data"):
                rows = batch(n)
            try:
                with clock.phase("compile" if n == recorder.first else "step"):
                    state, metrics = step(state, rows)
            except Abandoned:
                stop, last = True, False
                if pending is not None:
                    recorder(*pending)
                if n > recorder.first:
                    with clock.phase("save"):
                        checkpoints.save(n, state, metadata, force=True)
                break
            n += 1
            recorder.note(n, metrics)
            if pending is not None:
                recorder(*pending)
                pending = None
            stop, last = stopping(), n == steps
            due = last or n % evaluate_every == 0
            halts = due or stop or n % checkpoints.cfg.every == 0
            if n % log_every == 0 or n == recorder.first + 1 or halts:
                pending = (n, metrics)
            # What comes now waits for every step so far: their time is theirs, and what is said of them comes first.
            if pending is not None and (halts or ended is not None):
                recorder(*pending)
                pending = None
            last |= back() is not None
            due |= last
            if halts or last:
                metric, owed = evaluated() if due else (None, False)
                stop |= owed
                with clock.phase("save"):
                    about = metadata | {OWED: True} if owed else metadata
                    checkpoints.save(n, state, about, metric, force=stop or last)
                clock.beside(checkpoints.cost())
            if stop and (owed or not last):
                break
        with clock.phase("save"):
            checkpoints.wait()
        clock.beside(checkpoints.cost())
        if worked or n > recorder.first:
            recorder.close(n)
    if back() is not None:
        _go_back(checkpoints, n, back())
    elif ended is not None:
        checkpoints.choose(None, n)
    return state, EXIT_PREEMPTED if stop and (owed or not last) else EXIT_DONE
