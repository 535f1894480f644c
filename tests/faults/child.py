"""A process of a run that a fault befalls: trains a stage's tiny definition, with the faults that it was told of.

It is told in JSON, and can be run by hand: python -m tests.faults.child '{"stage": "sft", "root": ..., ...}'. Faults
come from outside or by wrapping public functions of the library here; nothing in the library knows of them.

  stage, root, workdir   what is trained, the folder of parents and caches, and the run directory
  data                   the folder of its data, where it is not the common one
  settings               {path: value} in the definition
  allow                  names of what may differ, as --allow has them
  devices                of the CPU, in this process
  trace                  a file: a line for each batch with a hash of its tokens, one for where a fault struck, and one
                         for how long the run's clock went, where its loop has come to an end
  faults                 [{"do": ..., ...}], see `FAULTS`
"""

import collections
import contextlib
import faulthandler
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import jax
import numpy as np

from jaxlm import config
from jaxlm.config import UserError
from jaxlm.optim import optimizers
from jaxlm.run import checkpoint, exits, lineage, loop, manifest, processes, report, rl, rl_plots, train
from jaxlm.run.goodput import Clock
from jaxlm.steps import learn, update
from tests.faults import definitions

TOO_LONG = 240  # seconds: whatever hangs for so long that no watch has ended it, ends here with its stacks
EXIT_TOO_LONG = 1


class Trace:
    """What happened, in a file of JSON lines beside the run directory, and where the run is."""

    def __init__(self, file: str | None):
        self._file, self.phase, self.step, self.looping = file, "initialise", 0, False

    def write(self, **record) -> None:
        if self._file is not None and jax.process_index() == 0:
            with open(self._file, "a") as f:
                f.write(json.dumps(record) + "\n")

    def struck(self, what: str) -> None:
        if self._file is not None:  # the process that is struck tells, whichever it is
            with open(self._file, "a") as f:
                here = {"struck": what, "phase": self.phase, "step": self.step, "looping": self.looping}
                f.write(json.dumps(here) + "\n")


# --------------------------------------------------------------------------------------- what every run is watched by
def watch(trace: Trace) -> None:
    """Follows a run through its phases, and tells how long its clock has gone where the loop comes to its end."""
    phase, stop_requests, close, started = Clock.phase, loop.stop_requests, loop.Recorder.close, time.monotonic()
    began = Clock.__init__

    @contextlib.contextmanager
    def phased(self, name):
        with phase(self, name):
            before, trace.phase = trace.phase, name
            try:
                yield
            finally:
                trace.phase = before

    @contextlib.contextmanager
    def looping():
        with stop_requests() as stopping:
            trace.looping = True
            try:
                yield stopping
            finally:
                trace.looping = False

    def starting(self, *arguments, **options):
        began(self, *arguments, **options)
        nonlocal started
        started = time.monotonic()

    def closed(self, step):
        close(self, step)
        trace.write(closed=time.monotonic() - started)

    Clock.phase, loop.stop_requests, Clock.__init__, loop.Recorder.close = phased, looping, starting, closed


def note_batches(trace: Trace) -> None:
    """Notes each batch by a hash, one that a fault has a run leave out as well: so it comes after the faults."""
    batch, learned = train.Loader.batch, learn.learn

    def noted(loader, step):
        found, trace.step = batch(loader, step), step
        note(step, loader.rows(step, np.arange(found.tokens.shape[0])).tokens.tobytes())
        return found

    def noted_rollout(learner, s, columns, step):
        trace.step = step
        note(step, b"".join(np.asarray(c["tokens"], np.int32).tobytes() for c in columns))
        return learned(learner, s, columns, step)

    def note(step, content: bytes):
        trace.write(batch=step, sha256=hashlib.sha256(content).hexdigest()[:16])

    train.Loader.batch, learn.learn = noted, noted_rollout


def cheaper() -> None:
    """Leaves out what takes most of a tiny run's time and has no part in what is compared: drawing, and measuring the
    machine. Every program is kept for the next process, however quickly it was compiled."""
    jax.config.update("jax_disable_most_optimizations", True)
    train.peak_flops = lambda dtype: (1e12, "not measured")
    report.loss_curve = rl_plots.curves = lambda *_: None
    keep = train.use_compilation_cache

    def keep_all(folder=None):
        keep(folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    train.use_compilation_cache = keep_all


# ------------------------------------------------------------------------------------------------ what befalls a run
def _at(phase: str, entry: int, after: float, action) -> None:
    """Calls `action` so many seconds after the run entered a phase for the n-th time: there, or from another thread."""
    if phase == "initialise":
        timer = threading.Timer(after, action)
        timer.daemon = True
        timer.start()
        return
    phased, seen = Clock.phase, collections.Counter()

    @contextlib.contextmanager
    def struck(self, name):
        with phased(self, name):
            seen[name] += 1
            if (name, seen[name]) == (phase, entry):
                if after:
                    timer = threading.Timer(after, action)
                    timer.daemon = True
                    timer.start()
                else:
                    action()
            yield

    Clock.phase = struck


def signalled(trace: Trace, number: str, phase: str, entry: int, after: float = 0.0) -> None:
    """SIGKILL or SIGTERM."""

    def strike():
        trace.struck(number)
        os.kill(os.getpid(), getattr(signal, number))

    _at(phase, entry, after, strike)


def slow(trace: Trace, phase: str, seconds: float) -> None:
    """Waits so long each time the run enters a phase: what the processes tell each other takes a second to arrive."""
    phased = Clock.phase

    @contextlib.contextmanager
    def waited(self, name):
        with phased(self, name):
            if name == phase:
                time.sleep(seconds)
            yield

    Clock.phase = waited


def hang(trace: Trace, phase: str, entry: int) -> None:
    """The thread that trains never comes back."""

    def strike():
        trace.struck("hang")
        time.sleep(3600)

    _at(phase, entry, 0.0, strike)


def fill(trace: Trace, phase: str, entry: int, file: str, left: int) -> None:
    """Another program fills the disk but for so many bytes."""

    def strike():
        trace.struck("full disk")
        with open(file, "wb") as f, contextlib.suppress(OSError):
            for size in (1 << 16, 1 << 12):
                while shutil.disk_usage(file).free > left + size:
                    f.write(bytes(size))
                    f.flush()

    _at(phase, entry, 0.0, strike)


def jump(trace: Trace, phase: str, entry: int, after: float, hours: float) -> None:
    """The time of day is set."""
    now = time.time

    def strike():
        trace.struck("clock")
        time.time = lambda: now() + 3600 * hours

    _at(phase, entry, after, strike)


def poison(trace: Trace, steps: list[int], told: bool = False, value: float = np.nan) -> None:
    """A value in the batch of these steps is no number, or another one that it should not be. told: instead, the run is
    told to leave these steps out.

    A rollout has numbers that can be poisoned. The batches of the other stages are whole numbers: they get one more
    column, of ones, by which the loss is multiplied. So a run with no such step is still another program.
    """
    optimizers.FIRST = 2  # of 8 updates not 20 can go by before one is called a spike
    program_of, apply, minibatches, learned = train.step_function, update.update, learn.minibatches, learn.learn

    def step_function(e, mesh, reference=None):
        program = program_of(e, mesh, reference)

        def step(s, batch):
            n, bad = int(s.step), int(s.step) in steps
            if bad:
                trace.struck("poison")
            if bad and told:
                return s.replace(step=s.step + 1, skipped=s.skipped + 1), {"skipped": s.skipped + 1, "loss": np.nan}
            ones = np.ones(batch.tokens.shape[0], np.float32)
            ones[n % len(ones)] = value if bad else 1.0
            return program(s, batch.replace(temperature=ones))

        return step

    def updated(loss, optimizer, axes, precision, cfg, seed, s, batch, *rest):
        def of_poisoned(params, batch, key):
            terms, metrics = loss(params, batch, key)
            return {name: (c, x * batch.temperature.mean(), w) for name, (c, x, w) in terms.items()}, metrics

        return apply(of_poisoned, optimizer, axes, precision, cfg, seed, s, batch, *rest)

    def poisoned(learner, columns, step, epoch):
        found = minibatches(learner, columns, step, epoch)
        for batch in found if step in steps else ():
            row = int(np.argmax(batch.sampled_by_policy.any(1)))
            at = int(np.argmax(batch.sampled_by_policy[row]))
            for values in (batch.advantages, batch.returns):
                if values is not None:
                    values[row, at] = value
        return found

    def told_to_skip(learner, s, columns, step):
        if step not in steps:
            return learned(learner, s, columns, step)
        own, critic, n = s.policy, s.critic, learner.updates
        own = own.replace(step=own.step + n, skipped=own.skipped + n)
        if critic is not None:
            critic = critic.replace(step=critic.step + n, skipped=critic.skipped + n)
        s = s.after(own, critic=critic, step=s.step + 1, skipped=s.skipped + 1)
        return s, {"skipped": s.skipped, "updates_skipped": own.skipped}

    def struck(learner, s, columns, step):
        if step in steps:
            trace.struck("poison")
        return (told_to_skip if told else learned)(learner, s, columns, step)

    train.step_function = step_function
    update.update = updated if trace.stage not in definitions.RL else apply
    learn.minibatches, learn.learn = minibatches if told else poisoned, struck


FAULTS = {"signal": signalled, "slow": slow, "hang": hang, "fill": fill, "clock": jump, "poison": poison}


# -------------------------------------------------------------------------------------------------------- the program
def definition(spec: dict):
    root = Path(spec["root"])
    data = Path(spec.get("data") or root / "data")
    e = definitions.definition(spec["stage"], data, root / "references" / "pretrain" / "run", root / "cache")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.get("settings", {}).items()}
    return config.override(e, settings)


def read(spec: dict) -> int:
    """Prints the newest checkpoint's step and the hash of each of its arrays, which a file gets if one is named."""
    workdir = Path(spec["read"])
    step = checkpoint.newest(workdir)
    arrays = manifest.read(workdir / "checkpoints" / str(step))["arrays"]

    def described(text: str):
        dtype, _, shape = text.rstrip("]").partition("[")
        return jax.ShapeDtypeStruct(tuple(int(n) for n in shape.split(",") if n), dtype)

    with checkpoint.Checkpoints(workdir, checkpoint.Checkpointing(every=1, keep_latest=1000)) as found:
        state, _ = found.restore({name: described(text) for name, text in arrays.items()}, step)
    if "save" in spec:
        np.savez(spec["save"], **{name: np.asarray(x) for name, x in state.items()})
    hashes = {name: hashlib.sha256(np.asarray(x).tobytes()).hexdigest()[:16] for name, x in state.items()}
    finite = all(np.isfinite(np.asarray(x, np.float32)).all() for x in state.values())
    print(json.dumps({"step": step, "arrays": hashes, "finite": finite}), flush=True)
    return exits.EXIT_DONE


def run(spec: dict) -> int:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", spec.get("devices", 1))
    os.environ.setdefault("JAXLM_CACHE", str(Path(spec["root"]) / "cache"))
    if "read" in spec:
        return read(spec)
    trace = Trace(spec.get("trace"))
    trace.stage = spec["stage"]
    cheaper()
    watch(trace)
    with processes.joined():
        for fault in spec.get("faults", ()):
            here = fault.pop("process", 0) == int(os.environ.get("JAXLM_PROCESS", "0"))
            name = fault.pop("do")
            if here:
                FAULTS[name](trace, **fault)
        note_batches(trace)
        e = definition(spec)
        with lineage.allowing(spec["workdir"], spec.get("allow", ()), e):
            return rl.run(e, spec["workdir"], e)


def main(spec: dict) -> int:
    """The exit code, as a launch program would give it; what went wrong is on stderr."""
    faulthandler.dump_traceback_later(TOO_LONG, exit=True)
    try:
        code = run(spec)
        if jax.distributed.is_initialized():  # as at the end of a program: none leaves before the others are done
            jax.distributed.shutdown()
        return code
    except BaseException as e:
        if isinstance(e, UserError):
            print(f"error: {e}", file=sys.stderr)
        else:
            traceback.print_exc()
        return exits.code_of(e)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
