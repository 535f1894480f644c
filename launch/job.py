"""A job, described once for every system that runs it, and the commands that a system is given.

A system's file renders the description: `launch/tpu_vm.py`, `slurm.py`, `gke.py`, `local.py`. What is rendered is data,
so that a dry run prints what a real one does. A secret is a name until the moment when its value goes into the standard
input of a command: no value is in an argument, a script, a manifest, or anything printed.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping

from jaxlm.config import UserError, nearest
from jaxlm.run import exits
from launch import secrecy
from launch.tpus import Tpu

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
EXIT_TIMED_OUT = 124  # as `timeout` tells it
# Programs whose processes find one another (jaxlm/run/processes.py); any other would run once a process, on its own.
SEVERAL_PROCESSES = ("launch.train",)
NEVER_AGAIN = (exits.EXIT_BAD_INPUT, exits.EXIT_DIVERGED)


@dataclasses.dataclass(frozen=True)
class Gpus:
    """GPUs on the nodes of a cluster, one process each."""

    nodes: int
    per_node: int

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node


@dataclasses.dataclass(frozen=True)
class Processes:
    """Processes on this machine. cpu_devices: so many of the CPU in each. gpus: each has a GPU of its own."""

    processes: int
    cpu_devices: int | None = None
    gpus: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to run, the same for every system.

    command: one of our programs and its arguments, ("launch.train", "--experiment=...", ...). env: variables that
    anybody may see. secrets: names of variables whose values come from the caller's environment when the job starts.
    A command that ends with 0 is done; with 42 it was preempted and has saved, and starts again up to
    `max_preemptions` times; with 2 or 3 it never starts again; anything else is a failure, and starts again up to
    `max_failures` times. Of several processes the first that ends in another way than 0 decides.
    """

    name: str
    command: tuple[str, ...]
    on: Tpu | Gpus | Processes
    env: tuple[tuple[str, str], ...] = ()
    secrets: tuple[str, ...] = ()
    max_preemptions: int = 100
    max_failures: int = 3

    @property
    def workdir(self) -> str | None:
        """The run directory that the command names."""
        found = None
        for word, following in itertools.pairwise((*self.command, "")):
            name, given, value = word.partition("=")
            if name in ("--workdir", "-workdir"):  # as a program's own flags read it
                found = value if given else following
        return found


@dataclasses.dataclass(frozen=True)
class Step:
    """A command that is run as it stands. `why` is for whoever reads a dry run.

    stdin: what its standard input is given, from the values of the job's secrets by name; None is nothing. seconds: it
    is ended when it takes longer, and has failed; None is no limit.
    """

    argv: tuple[str, ...]
    why: str = ""
    stdin: Callable[[Mapping[str, str]], str] | None = None
    seconds: float | None = None


# ------------------------------------------------------------------------------------------------------ what is checked
def command(words: list[str]) -> tuple[str, ...]:
    """What stands behind `--` on a launcher's command line: a program of ours and its arguments."""
    words = words[2:] if words[:2] in (["python", "-m"], ["python3", "-m"]) else words
    if not words:
        raise UserError("the command is missing: end with -- launch.train --experiment=NAME --workdir=DIR")
    folder = os.path.dirname(os.path.abspath(__file__))
    programs = sorted(f"launch.{f[:-3]}" for f in os.listdir(folder) if f.endswith(".py") and f != "__init__.py")
    if words[0] not in programs:
        raise UserError(f"{words[0]!r} is no program of ours; {nearest(words[0], programs)}")
    return tuple(words)


def variables(texts: list[str], environ: Mapping[str, str]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """The values of --env: (name, value) pairs that may be seen, and the names of secrets."""
    shown, secrets = {}, []
    for text in texts:
        name, given, value = text.partition("=")
        if not VARIABLE.fullmatch(name):
            raise UserError(f"--env takes NAME or NAME=VALUE, got {name!r}")
        if given and secrecy.is_secret(name, value):
            raise UserError(f"--env={name}=...: that would be seen by others; export it, and give --env={name} alone")
        if not given and name not in environ:
            raise UserError(f"--env={name}: no such variable here; export it, or give --env={name}=VALUE")
        if "\n" in (value if given else environ[name]):
            raise UserError(f"--env={name}: its value has more than one line")
        if name in shown or name in secrets:
            raise UserError(f"--env={name} is given twice")
        if given:
            shown[name] = value
        else:
            secrets.append(name)
    return tuple(shown.items()), tuple(secrets)


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise UserError(f"--name={name!r}: lower case letters, digits and dashes, from a letter on, at most 40 of them")


def check_words(flag: str, words: Iterable[str]) -> None:
    """Raises `UserError` for a word that holds what looks like a secret: it would be in scripts and manifests."""
    for word in words:
        if (name := secrecy.found(word)) is not None:
            raise UserError(
                f"{flag}: the value of {name} looks like a secret, and would be seen by others; have the program take "
                "it from a variable, and give --env=VARIABLE alone"
            )


def validate(job: Job, processes: int, shared_disk: bool) -> None:
    """Raises `UserError` for a job that cannot run on so many processes, or whose run directory would be lost.

    shared_disk: whether a folder outlives a machine and is seen by all of them.
    """
    if min(job.max_preemptions, job.max_failures) < 0:
        raise UserError("--max_preemptions and --max_failures are 0 or more")
    check_words("the command", job.command)
    if processes > 1 and job.command[0] not in SEVERAL_PROCESSES:
        known = ", ".join(SEVERAL_PROCESSES)
        raise UserError(f"{job.command[0]} runs in one process, not in {processes}; in several: {known}")
    if job.command[0] == "launch.train" and job.workdir is None:
        raise UserError("--workdir=DIR is missing behind the --: the folder that is to hold the run")
    if not shared_disk and job.workdir is not None and "://" not in job.workdir:
        raise UserError(
            f"--workdir={job.workdir} would be lost with its machine; take object storage: --workdir=gs://BUCKET/..."
        )


def check_definition(job: Job, python: str) -> None:
    """Resolves the experiment here, so that a slip costs seconds and not a pod. Raises `UserError` with its message."""
    if job.command[0] != "launch.train":
        return
    done = subprocess.run([python, "-m", *job.command, "--show"], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"the command does not start: {last.removeprefix('error: ')}")


# ------------------------------------------------------------------------------------------------- what is run or shown
def show(step: Step, secrets: tuple[str, ...]) -> str:
    """The command as one would type it, its standard input as a here-document, secrets as ***."""
    words = [shlex.quote(a) for a in step.argv]
    lines, line = [], ""
    for word in words:  # one line as far as it goes: a flag may start the next
        if line and len(line) + len(word) > 110:
            lines.append(line + " \\")
            line = "   "
        line = f"{line} {word}" if line else word
    text = "\n".join([*lines, line])
    if step.stdin is not None:
        given = step.stdin(dict.fromkeys(secrets, "***"))
        text += f" <<'END'\n{given}{'' if given.endswith(chr(10)) else chr(10)}END"
    return (f"# {step.why}\n" if step.why else "") + text


def need(tool: str, where: str) -> None:
    if shutil.which(tool) is None:
        raise UserError(f"{tool} is not installed, or not on PATH; {where}")


def run(step: Step, job: Job, *, capture: bool = False) -> subprocess.CompletedProcess:
    """Runs a command; with `capture` its output is kept, otherwise it is shown. Never raises for its exit code, which
    is `EXIT_TIMED_OUT` where it took longer than its `seconds`."""
    given = "" if step.stdin is None else step.stdin({name: os.environ[name] for name in job.secrets})
    out = subprocess.PIPE if capture else None
    # What is only listened to gets a group of its own, so that what it has started ends with it; the others share the
    # terminal's, as Ctrl-C and a question for a passphrase want it.
    process = subprocess.Popen(
        step.argv, stdin=subprocess.PIPE, text=True, stdout=out, stderr=out, start_new_session=capture
    )
    with process:
        try:
            said, error = process.communicate(given, step.seconds)
        except BaseException as e:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if capture else os.kill)(process.pid, signal.SIGKILL)
            if not isinstance(e, subprocess.TimeoutExpired):
                raise
            late = f"no answer within {step.seconds:g} s"
            return subprocess.CompletedProcess(step.argv, EXIT_TIMED_OUT, "", late)
        return subprocess.CompletedProcess(step.argv, process.returncode, said, error)


def last_line(done: subprocess.CompletedProcess) -> str:
    """The last thing that a captured command said: where tools put their reason."""
    return ((done.stderr or "").strip() or (done.stdout or "").strip() or f"exit code {done.returncode}").splitlines()[
        -1
    ]


def git_lines(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {arguments[0]}: {last_line(done)}; start from the root of a checkout")
    return done.stdout.splitlines()


def uncommitted() -> str | None:
    """What a job of the committed tree would leave out, in one line; None for a clean tree."""
    changed = [line[3:] for line in git_lines("status", "--porcelain")]
    if not changed:
        return None
    return f"{len(changed)} uncommitted files are not part of the job: {', '.join(changed[:4])}" + (
        ", ..." if len(changed) > 4 else ""
    )
