"""The only training loop: it calls `step(state, batch)` and knows no algorithm."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable

import jax

from jaxlm.run.checkpoint import Checkpoints
from jaxlm.run.exits import EXIT_DONE, EXIT_PREEMPTED, Diverged


@contextlib.contextmanager
def stop_requests():
    """Yields a function that says whether SIGTERM or a first Ctrl-C has come; a second Ctrl-C stops at once."""
    seen = []

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


@dataclasses.dataclass
class Recorder:
    """Turns a step's metrics into log lines: rates since the last line, the time to the first step, divergence.

    first: the step from which this process goes on. rates: what a step counts towards each metric per second, such as
    {"train/tokens_per_second": tokens in a batch}. max_skipped: so many updates in a row left out as non-finite mean
    that the run has diverged. sinks: functions (step, {name: value}).
    """

    first: int
    rates: dict[str, float]
    max_skipped: int
    sinks: list[Callable[[int, dict[str, float]], None]]
    skipped: int = 0
    bad_run: int = 0

    def __post_init__(self):
        self.step, self.began = self.first, time.perf_counter()
        self.at = self.began

    def __call__(self, step: int, metrics) -> None:
        values = {f"train/{k}": float(v) for k, v in jax.device_get(metrics).items()}
        now, steps = time.perf_counter(), step - self.step
        if self.step == self.first:  # this interval holds the compilation: it says nothing about speed
            values["train/seconds_to_first_step"] = now - self.began
        else:
            values |= {k: v * steps / (now - self.at) for k, v in self.rates.items()}
        skipped = int(values["train/skipped"])
        self.bad_run = self.bad_run + steps if skipped - self.skipped == steps else 0
        self.skipped, self.step, self.at = skipped, step, now
        for sink in self.sinks:
            sink(step, values)
        if self.bad_run >= self.max_skipped:
            raise Diverged(f"none of the last {self.bad_run} updates before step {step} was finite; lower the lr")

    def pause(self, seconds: float) -> None:
        """Leaves time that was spent on something else out of the rates."""
        self.at += seconds


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
    ended: Callable[[], bool] | None = None,
) -> tuple[object, int]:
    """Steps from `state.step` to `steps`, logging, evaluating and saving on the way.

    step: (state, batch) -> (state, {name: scalar array}), asynchronous. batch: global step -> batch.
    evaluate: (step, state) -> the metric by which the best checkpoint is kept, lower is better; it logs for itself.
    ended: whether what was logged says that the run is to end here; it is then done, and a resumed one takes no step.
    Returns (state, exit code): done, or preempted and saved. Raises `Diverged`.
    """
    n = int(state.step)
    pending = None  # metrics of the step before: read only once the next one is on its way

    with stop_requests() as stopping:
        while n < steps and not (ended is not None and ended()):
            state, metrics = step(state, batch(n))
            n += 1
            if pending is not None:
                recorder(*pending)
                pending = None
            if n % log_every == 0 or n == recorder.first + 1 or n == steps:
                pending = (n, metrics)
            if ended is not None and pending is not None:
                recorder(*pending)
                pending = None
            last = n == steps or (ended is not None and ended())
            stop = stopping()
            due = n % evaluate_every == 0 or last
            if due or stop or n % checkpoints.cfg.every == 0:
                if pending is not None:
                    recorder(*pending)
                    pending = None
                began = time.perf_counter()
                metric = evaluate(n, state) if due else None
                checkpoints.save(n, state, metadata, metric, force=stop or last)
                recorder.pause(time.perf_counter() - began)
            if stop and not last:
                checkpoints.wait()
                return state, EXIT_PREEMPTED
    checkpoints.wait()
    return state, EXIT_DONE
