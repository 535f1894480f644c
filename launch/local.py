"""Runs a job as several processes on this machine, which find one another over loopback.

usage:
  python -m launch.local --processes=N [options] -- launch.train ARGUMENTS

What process 0 writes is shown. When one process dies, the others are ended within seconds; what it wrote last is shown,
and its exit code is this program's. Ctrl-C and SIGTERM tell all of them to save. With --max_failures=N the job is
started again, up to so many times, and resumes from its --workdir.

--cpu_devices=K makes K devices of the CPU in each process: a mesh to try on a laptop. --gpus gives each process a GPU
of its own.

examples:
  python -m launch.local --processes=2 --cpu_devices=2 -- \\
      launch.train --experiment=pretrain_tiny --set=mesh.fsdp=none --workdir=runs/two
  python -m launch.local --processes=8 --gpus -- launch.train --experiment=pretrain_124m --workdir=runs/eight

Exit codes: those of the command; of several that ended badly, the first one's.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

from absl import flags

from jaxlm.config import UserError
from jaxlm.run import exits
from launch import common, job_flags
from launch import job as jobs
from launch.job import Job, Processes, Step
from launch.supervise import supervise

PROCESSES = flags.DEFINE_integer("processes", 1, "So many processes.")
CPU_DEVICES = flags.DEFINE_integer("cpu_devices", None, "Devices that each process makes of the CPU.", lower_bound=1)
GPUS = flags.DEFINE_bool("gpus", False, "Each process sees one GPU, the one of its number.")

PATIENCE = 60  # seconds for all to end, when one was preempted and has saved: the others have too
KILL_AFTER = 3  # seconds from the signal to the end, when one has died: the others wait for it in vain
TAIL = 20  # lines


def environment(job: Job, port: int, process: int) -> dict[str, str]:
    """What a process has in its environment beside the caller's."""
    env = dict(job.env)
    if job.on.processes > 1:
        env |= {"JAXLM_COORDINATOR": f"127.0.0.1:{port}", "JAXLM_PROCESSES": str(job.on.processes)}
        env |= {"JAXLM_PROCESS": str(process)}
    if job.on.cpu_devices is not None:
        env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(job.on.cpu_devices)}
    return env | ({"CUDA_VISIBLE_DEVICES": str(process)} if job.on.gpus else {})


def steps(job: Job, port: int, python: str) -> list[Step]:
    """One command a process; they run at the same time."""
    out = []
    for i in range(job.on.processes):
        words = [f"{k}={v}" for k, v in environment(job, port, i).items()]
        out.append(Step(("env", *words, python, "-m", *job.command), f"process {i}"))
    return out


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def tell(processes: list[subprocess.Popen], number: int) -> None:
    """Sends a signal to those that still run, and to what they have started."""
    for p in processes:
        if p.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, number)


def wait(processes: list[subprocess.Popen]) -> tuple[int, int]:
    """(number, exit code) of the first process that ends badly, else of process 0; when this returns all have ended."""
    first, deadline = None, None
    while any(p.poll() is None for p in processes):
        if first is None:
            first = next(((i, p.poll()) for i, p in enumerate(processes) if p.poll()), None)
            if first is not None:
                saved = first[1] == exits.EXIT_PREEMPTED
                deadline = time.monotonic() + (PATIENCE if saved else KILL_AFTER)
                if not saved:
                    tell(processes, signal.SIGTERM)
        elif time.monotonic() > deadline:
            tell(processes, signal.SIGKILL)
        time.sleep(0.05)
    if first is None:
        first = next(((i, p.returncode) for i, p in enumerate(processes) if p.returncode), (0, exits.EXIT_DONE))
    number, code = first
    return number, code if code >= 0 else 128 - code  # a signal, as a shell tells it


def attempt(job: Job, stopping: list[int]) -> int:
    """Runs every process once; `stopping` fills when this program is told to stop, and the processes with it."""
    port, outputs, processes = free_port(), {}, []

    def forward(number, frame):
        stopping.append(number)
        tell(processes, signal.SIGTERM if len(stopping) == 1 else signal.SIGKILL)

    with contextlib.ExitStack() as stack:
        for s in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, s, signal.signal(s, forward))
        stack.callback(tell, processes, signal.SIGKILL)
        for i in range(job.on.processes):
            env = os.environ | environment(job, port, i)
            out = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) if i else None
            outputs[i] = out
            command = [sys.executable, "-m", *job.command]
            processes.append(
                subprocess.Popen(
                    command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
            )
        number, code = wait(processes)
        if code and outputs[number] is not None:
            outputs[number].seek(0)
            for line in outputs[number].read().splitlines()[-TAIL:]:
                print(f"process {number}: {line}", file=sys.stderr)
        if code:
            print(f"process {number} of {len(processes)} ended first, with exit code {code}", file=sys.stderr)
        return code


def main(words: list[str]) -> int:
    if PROCESSES.value < 1:
        raise UserError(f"--processes={PROCESSES.value}: a job has one process at least")
    on = Processes(PROCESSES.value, CPU_DEVICES.value, GPUS.value)
    job = job_flags.job(words, on, on.processes, shared_disk=True, max_failures=0, default_name="local")
    if job_flags.DRY_RUN.value:
        jobs.check_definition(job, sys.executable)
        print("\n\n".join(jobs.show(step, job.secrets) for step in steps(job, free_port(), sys.executable)))
        return 0
    stopping: list[int] = []

    def once() -> int:
        code = attempt(job, stopping)
        if stopping and code:  # whoever stops it does not want it to start again
            raise exits.Stopped if code == exits.EXIT_PREEMPTED else SystemExit(code)
        return code

    return supervise(job, once, pause=1)


if __name__ == "__main__":
    common.run(main, takes_command=True)
