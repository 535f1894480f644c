"""One trial: a run that a fault befalls, started again until it ends, and compared with one that nothing befell."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxlm.config import UserError
from jaxlm.run import exits
from jaxlm.run.log import raw_metrics, read_metrics
from launch import local
from tests.faults import child
from tests.faults.definitions import RL, STAGES, STEPS

TIMED = ("seconds", "per_second", "utilization", "skipped_first")
ABORTED, KILLED = 128 + 6, 128 + 9  # as a shell tells it


class Wrong(Exception):
    """What happened and should not have; one line."""


class NotStruck(Exception):
    """The run was over before its fault came: nothing was tried."""


# ------------------------------------------------------------------------------------------------------- the processes
class Forked:
    """A process that does what a fresh one would, but for the seconds in which that would import everything.

    As `launch.local` sees it, a `subprocess.Popen`. This program never starts a device of its own, so nothing but
    modules is carried over.
    """

    def __init__(self, spec: dict, output: Path, environ: dict[str, str]):
        sys.stdout.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(target, 1), os.dup2(target, 2)
                os.environ |= environ
                code = child.main(spec)
                sys.stdout.flush(), sys.stderr.flush()
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def started(spec: dict, output: Path, processes: int = 1) -> int:
    """Runs the child as so many processes; the exit code of the first that ended badly, of the others otherwise."""
    port, found = local.free_port(), []
    try:
        for i in range(processes):
            environ = {"JAXLM_COORDINATOR": f"127.0.0.1:{port}", "JAXLM_PROCESSES": str(processes)}
            environ |= {"JAXLM_PROCESS": str(i)}
            to = output if i == 0 else output.with_suffix(f".{i}.txt")
            found.append(Forked(spec, to, environ if processes > 1 else {}))
        return local.wait(found)[1]
    finally:
        local.tell(found, 9)


# --------------------------------------------------------------------------------------------------------- how it ended
@dataclasses.dataclass(frozen=True)
class End:
    """state: hash of every array of the last checkpoint. history: what was logged of each step, without times.
    batches: hashes of each step's, which are several where a step was taken again."""

    workdir: Path
    step: int
    state: dict[str, str]
    finite: bool
    history: list[dict]
    batches: dict[int, list[str]]


def records(trace: Path) -> list[dict]:
    return [json.loads(line) for line in trace.read_text().splitlines()] if trace.exists() else []


def history(workdir: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if not any(t in k for t in TIMED)} for r in read_metrics(workdir)]


def ended(root: Path, workdir: Path, folder: Path) -> End:
    said = folder / "read.txt"
    said.unlink(missing_ok=True)
    if started({"root": str(root), "read": str(workdir)}, said):
        raise Wrong(f"the last checkpoint cannot be read: {said.read_text().splitlines()[-1]}")
    saved = json.loads(said.read_text().splitlines()[-1])
    batches: dict[int, list[str]] = {}
    for r in records(folder / "trace.jsonl"):
        if "batch" in r:
            batches.setdefault(r["batch"], []).append(r["sha256"])
    return End(workdir, saved["step"], saved["arrays"], saved["finite"], history(workdir), batches)


@functools.cache
def whole(
    root: Path,
    stage: str,
    devices: int = 1,
    processes: int = 1,
    told: tuple[int, ...] | None = None,
    settings: tuple[tuple[str, object], ...] = (),
) -> End:
    """A run that nothing befalls; `told`: with the program of poisoned ones, and told to leave these steps out.

    settings: (path, value) in the definition.
    """
    if stage != "pretrain":
        whole(root, "pretrain")  # the parent
    plain = told is None and devices == processes == 1 and not settings
    name = stage if plain else f"{stage}-{devices}x{processes}-{'' if told is None else told}-{settings}"
    name = re.sub(r"[^\w.=-]+", "_", name)
    folder = root / "references" / name
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        spec = {"stage": stage, "root": str(root), "workdir": str(folder / "run"), "devices": devices}
        spec |= {"trace": str(folder / "trace.jsonl"), "settings": {"mesh.fsdp": devices * processes} | dict(settings)}
        spec |= {"faults": [] if told is None else [{"do": "poison", "steps": list(told), "told": True}]}
        if code := started(spec, folder / "start.txt", processes):
            raise Wrong(f"the run that nothing befalls ended with {code}: {last_line(folder / 'start.txt')}")
        (folder / "done").touch()
    return ended(root, folder / "run", folder)


def arrays(root: Path, end: End) -> dict[str, np.ndarray]:
    """The last checkpoint of a run, by the names of its arrays."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "arrays.npz"
        if started({"root": str(root), "read": str(end.workdir), "save": str(to)}, Path(folder) / "read.txt"):
            raise Wrong(last_line(Path(folder) / "read.txt"))
        with np.load(to) as found:
            return dict(found)


def last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").strip().splitlines() if file.exists() else []
    return lines[-1][:300] if lines else "(nothing was said)"


# ------------------------------------------------------------------------------------------------------- what differs
def same_state(mine: End, other: End) -> None:
    if mine.step != other.step:
        raise Wrong(f"it ended at step {mine.step}, not {other.step}")
    if differ := [k for k in {**other.state, **mine.state} if mine.state.get(k) != other.state.get(k)]:
        raise Wrong(f"{len(differ)} of {len(other.state)} arrays differ, the first {differ[0]}")


def same_batches(mine: End, other: End) -> None:
    """A step that was taken again has had the same batch each time."""
    if mine.batches.keys() != other.batches.keys():
        raise Wrong(f"batches of steps {sorted(mine.batches)}, not of {sorted(other.batches)}")
    if differ := [n for n, hashes in mine.batches.items() if set(hashes) != set(other.batches[n])]:
        raise Wrong(f"another batch at step {differ[0]}")


def _pairs(mine: End, other: End):
    steps = [[r["step"] for r in end.history] for end in (mine, other)]
    if steps[0] != steps[1]:
        raise Wrong(f"a log of the steps {steps[0]}, not of {steps[1]}")
    return zip(mine.history, other.history)


def same_history(mine: End, other: End) -> None:
    for one, two in _pairs(mine, other):
        if differ := [k for k in {**two, **one} if repr(one.get(k)) != repr(two.get(k))]:  # NaN is NaN
            raise Wrong(f"the logs of step {two['step']} differ in {differ[0]}: {one.get(differ[0])}")


def near_history(mine: End, other: End, tolerance: float) -> None:
    for one, two in _pairs(mine, other):
        for name in ("train/loss", "eval/all/loss", "train/reward"):
            if name in two and not math.isclose(one[name], two[name], rel_tol=tolerance, abs_tol=tolerance):
                raise Wrong(f"{name} of step {two['step']} is {one[name]:.7g}, not {two[name]:.7g}")


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a run: the seconds of its processes, those that it logged, and those that its clock had gone when
    its loop came to an end, which it did not where it was killed. struck: what the faults told of themselves."""

    code: int
    seconds: float
    logged: float
    closed: float | None
    struck: tuple[dict, ...]


def adds_up(starts: list[Start], accounted: float) -> None:
    """Every second that was logged is accounted for; a start that came to its end has logged all that its clock had
    gone, and another at most what its process had."""
    logged = sum(s.logged for s in starts)
    if not math.isclose(accounted, logged, rel_tol=1e-6, abs_tol=1e-3):
        raise Wrong(f"{accounted:.2f} s are accounted for, of {logged:.2f} s that were logged")
    for i, s in enumerate(starts, 1):
        if s.logged > s.seconds or (s.closed is not None and s.closed > s.seconds):
            raise Wrong(f"start {i} took {s.seconds:.2f} s, and logged {s.logged:.2f} s")
        if s.closed is not None and not math.isclose(s.logged, s.closed, rel_tol=0.01, abs_tol=0.2):
            raise Wrong(f"start {i} logged {s.logged:.2f} s of the {s.closed:.2f} s that its clock went")


# -------------------------------------------------------------------------------------------------------------- a trial
@dataclasses.dataclass
class Trial:
    """What a fault's script is written in. Each method raises `Wrong` where something else comes out than must."""

    root: Path
    stage: str
    name: str
    seed: int
    phase: str | None = None  # in which the fault is to strike; unset, the phases take turns over the seeds

    def __post_init__(self):
        if self.stage != "pretrain":
            whole(self.root, "pretrain")  # the parent
        asked = [self.stage, self.name, str(self.seed), *([self.phase] if self.phase else [])]
        self.folder = self.root / "trials" / "-".join(asked).replace(" ", "_")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.workdir, self.data, self.trace = self.folder / "run", None, self.folder / "trace.jsonl"
        self.rng = random.Random("/".join(asked))
        self.at, self.starts = "", []

    @property
    def is_rl(self) -> bool:
        return self.stage in RL

    @property
    def turn(self) -> int:
        """A number that goes through all residues over the seeds, and is another one for each stage."""
        return self.seed + 2 * STAGES.index(self.stage)

    @property
    def codes(self) -> list[int]:
        return [s.code for s in self.starts]

    def chosen(self, phases: Sequence[str]) -> str:
        """The phase in which the fault is to strike."""
        return self.phase or phases[self.turn % len(phases)]

    @property
    def said(self) -> str:
        """stderr and stdout of the last start, of its first process."""
        return (self.folder / f"start-{len(self.codes)}.txt").read_text(errors="replace")

    def start(self, *faults: dict, expect=(exits.EXIT_DONE,), devices=1, processes=1, settings=None, allow=()) -> int:
        """Starts or resumes the run; its exit code, which must be one of `expect`. faults, allow: as the child takes
        them."""
        settings = {"mesh.fsdp": devices * processes} | (settings or {})
        spec = {"stage": self.stage, "root": str(self.root), "workdir": str(self.workdir), "trace": str(self.trace)}
        spec |= {"data": self.data, "devices": devices, "settings": settings, "faults": list(faults)}
        spec |= {"allow": list(allow)}
        output = self.folder / f"start-{len(self.starts) + 1}.txt"
        (self.folder / f"start-{len(self.starts) + 1}.json").write_text(json.dumps(spec))
        told, lines = len(records(self.trace)), len(self._logged())
        began = time.monotonic()
        code = started(spec, output, processes)
        seconds, told = time.monotonic() - began, records(self.trace)[told:]
        closed = [r["closed"] for r in told if "closed" in r]
        struck = tuple(r for r in told if "struck" in r)
        logged = math.fsum(self._logged()[lines:])
        self.starts.append(Start(code, seconds, logged, closed[-1] if closed else None, struck))
        if code not in expect:
            raise Wrong(f"exit code {code}, not {' or '.join(map(str, expect))}: {last_line(output)}")
        return code

    def _logged(self) -> list[float]:
        """The seconds that each record of the log gives to phases."""
        with contextlib.suppress(UserError):
            found = list(raw_metrics(self.workdir))
            return [math.fsum(v for k, v in r.items() if k.startswith("seconds/")) for r in found]
        return []

    def struck(self, what: str) -> dict:
        """Where this fault struck in the last start; `NotStruck` where the run was over before."""
        found = [r for r in self.starts[-1].struck if r["struck"] == what]
        if not found:
            raise NotStruck(f"start {len(self.starts)} was over before {what} came")
        return found[-1]

    def interrupted(self, step: int, **options) -> None:
        """Starts the run, and has it stop and save after so many steps."""
        self.at = f"saved at step {step}"
        term = {"do": "signal", "number": "SIGTERM", "phase": "data", "entry": step}
        self.start(term, expect=(exits.EXIT_PREEMPTED,), **options)

    def newest(self) -> Path:
        """The folder of the newest checkpoint."""
        return max((p for p in (self.workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))

    def says(self, *words: str) -> None:
        said = self.said
        for word in words:
            if word not in said:
                raise Wrong(f"it should say {word!r}, and says: {said.strip().splitlines()[-1][:200] if said else ''}")

    def refused(self, *words: str) -> None:
        """The last start ended in one clear line and has not touched a checkpoint."""
        self.says("error: ", *words)
        if "Traceback" in self.said:
            raise Wrong("a traceback instead of one clear line")

    def end(self) -> End:
        found = ended(self.root, self.workdir, self.folder)
        times = [r["seconds"] for r in raw_metrics(self.workdir)]
        if times != sorted(times):
            raise Wrong("the log's seconds go backwards")
        return found

    def same(self, **variant) -> None:
        """Bit for bit where the uninterrupted run ended: parameters, optimizer, counters, log, and every batch."""
        mine, other = self.end(), whole(self.root, self.stage, **variant)
        same_state(mine, other)
        same_batches(mine, other)
        same_history(mine, other)

    def near(self, tolerance: float = 1e-4) -> None:
        """The same batches, and losses within what another order of float32 sums gives."""
        mine, other = self.end(), whole(self.root, self.stage)
        same_batches(mine, other)
        near_history(mine, other, tolerance)

    def skipped(self, steps: tuple[int, ...], **variant) -> None:
        """The log says of exactly these steps that they were left out, and the run went as one told to do so."""
        mine, other = self.end(), whole(self.root, self.stage, **({"told": steps} | variant))
        if self.is_rl:  # a step that was left out and is taken again has a rollout of another policy
            mine = dataclasses.replace(mine, batches={n: hashes[-1:] for n, hashes in mine.batches.items()})
        counted = [(r["step"], r["train/skipped"]) for r in mine.history if "train/skipped" in r]
        wanted = [(n, float(sum(s < n for s in steps))) for n in range(1, STEPS + 1)]
        if counted != wanted:
            raise Wrong(f"skipped by step {counted}, not {wanted}")
        if not mine.finite:
            raise Wrong("a value of the last checkpoint is not finite")
        same_state(mine, other)
        same_batches(mine, other)


@contextlib.contextmanager
def timed(record: dict):
    began = time.monotonic()
    try:
        yield
    finally:
        record["seconds"] = round(time.monotonic() - began, 2)
