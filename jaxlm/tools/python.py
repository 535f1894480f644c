"""Runs Python that a model has written, isolated from the host, and gives back what it printed. See `isolation.py`."""

import dataclasses
import functools
import os
import selectors
import time

from jaxlm.config import UserError
from jaxlm.tools import isolation
from jaxlm.tools.isolation import LARGEST_CODE, IsolationError, Limits, Mode

START_SECONDS = 60.0  # for the sandbox to stand, on a machine that is busy with other things
TICK = 0.02  # seconds between two looks at memory and processes
CPU_SIGNAL = 128 + 24


@dataclasses.dataclass(frozen=True)
class Result:
    """What a program did. `exit_code` is as a shell reports it: 128 + the signal's number when a signal ended it."""

    stdout: str
    stderr: str
    exit_code: int
    timed_out: bool  # by the wall clock or by CPU time
    truncated: bool  # it was stopped because it printed too much
    seconds: float  # wall clock, from its start to its end
    stopped: str = ""  # why it was stopped, in a few words; empty when it ended by itself

    @property
    def ok(self) -> bool:
        return self.exit_code == 0 and not self.stopped


def run_python(code: str, limits: Limits | None = None, unsafe: bool = False) -> Result:
    """Runs `code` as a program of its own, and leaves nothing of it behind.

    It may import the standard library, write to its own `/tmp`, start threads and processes; it has no network, no
    input, and sees no file of the host but the interpreter's. The order of sets and of hashes is the same every time.

    Raises IsolationError where the machine offers neither bubblewrap nor user namespaces. With `unsafe=True` the code
    then runs as this user, able to read and write this user's files, under limits of time and size only.
    """
    return run_in(isolation_mode(unsafe), code, limits or Limits())


@functools.cache
def isolation_mode(unsafe: bool = False) -> Mode:
    """How `run_python` will isolate, tried once a process: the first way in which a test program finds itself alone."""
    reasons = []
    for mode in isolation.candidates():
        try:
            result = run_in(mode, _ALONE, Limits(seconds=30, cpu_seconds=30))
        except IsolationError as e:
            reasons.append(f"{mode}: {e}")
            continue
        if result.stdout == "alone\n":
            return mode
        reasons.append(f"{mode}: {(result.stdout + result.stderr).strip()[-300:] or result.exit_code}")
    if unsafe:
        return "unsafe"
    raise IsolationError(
        "this machine does not let model-written Python be isolated ("
        + "; ".join(reasons)
        + "): install bubblewrap, allow user namespaces, or run it as this user by --unsafe_python where a program has "
        "that flag (launch.chat, launch.eval, launch.best_of_n), unsafe=True in Python"
    )


# Fails closed: a sandbox that starts but does not isolate is as good as none.
_ALONE = """
import os, socket, sys
problems = [p for p in ("/etc", "/proc", "/sys", "/home", "/var", "/run", "/boot") if os.path.exists(p)]
try:
    socket.socket(socket.AF_INET)
    problems.append("a network socket")
except OSError:
    pass
try:
    open("/x", "w")
    problems.append("a writable root")
except OSError:
    pass
open("x", "w").close()
if os.getppid() != 1 or os.getuid() == 0:
    problems.append("other processes or root")
print(problems or "alone", flush=True)
"""


def run_in(mode: Mode, code: str, limits: Limits) -> Result:
    """`run_python` in a given mode, whether or not this machine isolates in it."""
    source = code.encode("utf-8", "surrogatepass")
    if len(source) > LARGEST_CODE:
        raise UserError(f"a program of {len(source)} bytes; the largest that is run has {LARGEST_CODE}")
    started = isolation.start(source, limits, mode)
    try:
        return _watch(started, limits)
    finally:
        started.close()


def _watch(started: isolation.Started, limits: Limits) -> Result:
    """Collects output until nothing is left that could print, and stops a program that takes more than its share."""
    process = started.process
    out, err, status = bytearray(), bytearray(), bytearray()
    kept = {process.stdout.fileno(): out, process.stderr.fileno(): err, started.status: status}
    began = ticked = time.monotonic()
    start = None  # of the program itself
    stopped, given_up = "", 0.0
    with selectors.DefaultSelector() as selector:
        for fd in kept:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            # When the launcher is gone so is all else; another holder of the pipes can only be a fork of the caller.
            over = process.poll() is not None
            ready = selector.select(TICK)
            if over and not ready:
                break
            for key, _ in ready:
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fd)
                if len(kept[key.fd]) <= limits.output_bytes:
                    kept[key.fd] += data
            now = time.monotonic()
            if stopped:
                if now > given_up:
                    raise IsolationError("the sandbox did not end when it was killed")
                continue
            if start is None:
                start = now if b"started\n" in status else None
                if now - began > START_SECONDS:
                    raise IsolationError(f"the sandbox did not stand within {START_SECONDS:g} s")
            elif now - start > limits.seconds:
                stopped = f"it ran longer than {limits.seconds:g} s"
            elif now - ticked > TICK:
                ticked = now
                stopped = _excess(process.pid, limits)
            if max(len(out), len(err)) > limits.output_bytes:
                stopped = f"it printed more than {limits.output_bytes} bytes"
            if stopped:
                started.kill()
                given_up = now + 30
    code = process.wait()
    code = code if code >= 0 else 128 - code
    told = status.decode("utf-8", "replace").partition("error: ")[2].strip()
    if start is None or told:
        detail = told or err.decode("utf-8", "replace").strip().rpartition("\n")[2] or f"exit {code}"
        raise IsolationError(f"cannot set up the sandbox: {detail}")
    if code == CPU_SIGNAL and not stopped:
        stopped = f"it used more than {limits.cpu_seconds} s of CPU time"
    return Result(
        stdout=bytes(out[: limits.output_bytes]).decode("utf-8", "replace"),
        stderr=bytes(err[: limits.output_bytes]).decode("utf-8", "replace"),
        exit_code=code,
        timed_out="longer" in stopped or "CPU" in stopped,
        truncated="printed" in stopped,
        seconds=time.monotonic() - start,
        stopped=stopped,
    )


def _excess(pid: int, limits: Limits) -> str:
    """What all processes of a program together take too much of; empty while they do not."""
    memory, threads = isolation.usage(pid)
    if memory > limits.memory_mb << 20:
        return f"it used more than {limits.memory_mb} MB of memory"
    if threads > limits.processes + 4:  # where the kernel does not hold it to its number: the sandbox's own come on top
        return f"it had more than {limits.processes} processes and threads"
    return ""
