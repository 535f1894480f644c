"""Runs every hostile program in the sandbox and looks whether the host is as it was.

    python -m tests.tools.hostile                    # all of them, in the way this machine isolates
    python -m tests.tools.hostile --only=memory      # those whose name has this in it
    python -m tests.tools.hostile --mode=bubblewrap  # or namespaces
    python -m tests.tools.hostile --list

After each program nothing of it may run, and the victims planted on the host must be untouched; before and after all of
them, files, mounts, listening sockets, shared memory, the clock and the host's name are compared. Exit code 1 and a
line each for what got through.
"""

import argparse
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from jaxlm.tools import isolation
from jaxlm.tools.isolation import IsolationError, Limits, children
from jaxlm.tools.python import Result, isolation_mode, run_in
from tests.tools.hostile_programs import filled, programs

PROJECT = Path(__file__).resolve().parents[2]
LIMITS = Limits(seconds=1.0, cpu_seconds=2, memory_mb=256, processes=24, scratch_mb=16)
SLACK_SECONDS = 15.0  # to start and to end, on a busy machine
SLACK_MB = 512  # by which memory may exceed its limit between two looks, counted anew in every fork that shares it
TOKEN_NAME = "JAXLM_HOSTILE_TOKEN"
SAMPLE = (  # quick ones, of every group that matters, for the tests
    "read: the secret by open",
    "read: the secret through the C library",
    "read: users and passwords",
    "write: every folder",
    "process: fork bomb of sleepers",
    "process: a daemon by the book",
    "signal: everyone",
    "memory: a gigabyte at once",
    "disk: a file without end",
    "output: without end",
    "net: a connection to the host",
    "rights: unshare again",
    "leak: the environment",
    "exit: breaks its own interpreter",
)


class Victims:
    """What stands on the host to be read, reached or killed."""

    def __init__(self, folder: Path):
        self.token = secrets.token_hex(16)
        os.environ[TOKEN_NAME] = self.token
        self.secret = folder / "secret.py"
        self.secret.write_text(f"token = {self.token!r}\nprint(token)\n")
        self.process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(3600)"])
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.unix, self.abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        name = "jaxlm-" + secrets.token_hex(8)
        self.unix.bind(str(folder / "socket"))
        self.abstract.bind("\0" + name)
        self.datagrams.bind("\0" + name + "-datagrams")
        for listening in (self.unix, self.abstract):
            listening.listen()
        for s in (self.tcp, self.unix, self.abstract, self.datagrams):
            s.setblocking(False)
        self.words = {
            "SECRET": str(self.secret),
            "SOCKET": str(folder / "socket"),
            "PORT": str(self.tcp.getsockname()[1]),
            "ABSTRACT": name,
            "VICTIM": str(self.process.pid),
            "PROJECT": str(PROJECT),
            "HOST": socket.gethostname(),
        }
        self.first = self.state()

    def state(self) -> dict:
        pid = self.process.pid
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return {
            "the secret": (self.secret.read_text(), sorted(p.name for p in self.secret.parent.iterdir())),
            "a process of the host": (self.process.poll(), stat[0] in "TtZX", stat[16]),  # stopped, nice
            "its limits": Path(f"/proc/{pid}/limits").read_text(),
            "its cores": os.sched_getaffinity(pid),
        }

    def harmed(self) -> list[str]:
        wrong = [f"{name} changed" for name, value in self.state().items() if value != self.first[name]]
        for name in ("tcp", "unix", "abstract"):
            with contextlib.suppress(BlockingIOError):
                getattr(self, name).accept()
                wrong.append(f"a connection to the host's {name} socket")
        with contextlib.suppress(BlockingIOError):
            self.datagrams.recv(1)
            wrong.append("a datagram to the host")
        return wrong

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for s in (self.tcp, self.unix, self.abstract, self.datagrams):
            s.close()
        os.environ.pop(TOKEN_NAME, None)


# ---------------------------------------------------------------------------------------------------------- the host
def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def strangers() -> set[tuple[int, str]]:
    """Processes in other PID namespaces than this one, with their start: whatever of a sandbox still runs."""
    own = os.readlink("/proc/self/ns/pid")
    found = set()
    for pid in pids():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/pid") != own:
                found.add((pid, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]))
    return found


def listening() -> set[str]:
    """Local addresses that listen, in this network namespace."""
    found = set()
    for name in ("tcp", "tcp6", "udp", "udp6", "raw"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] in ("0A", "07"):
                    found.add(f"{name} {fields[1]} {fields[9]}")
    return found


def held_by_others(address: str) -> bool:
    """Whether a process that is no child of this one, and in no sandbox, holds the socket: not our doing."""
    own, ours = os.readlink("/proc/self/ns/pid"), set(children(os.getpid()))
    for pid in pids():
        with contextlib.suppress(OSError):
            if pid not in ours and os.readlink(f"/proc/{pid}/ns/pid") == own:
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    if os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{address.split()[2]}]":
                        return True
    return False


def tree(*folders: str | Path) -> dict[str, tuple]:
    """Size, mode, owner and time of change of every file below."""
    found = {}
    for folder in folders:
        for root, _, files in os.walk(folder):
            for name in ("", *files):
                path = os.path.join(root, name)
                with contextlib.suppress(OSError):
                    s = os.lstat(path)
                    if not root.endswith("__pycache__") and name[-4:] != ".pyc" and "__pycache__" not in path:
                        found[path] = (s.st_size if name else 0, s.st_mode, s.st_uid, s.st_mtime_ns if name else 0)
    return found


def memory() -> dict[str, int]:
    """MB by the names of /proc/meminfo."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {fields[0].rstrip(":"): int(fields[1]) >> 10 for fields in lines if len(fields) == 3}


def mounts() -> dict[str, str]:
    """Mount points; what this project's own tests mount in their folders comes and goes meanwhile."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line.split()[4]: line for line in lines if "/pytest-of-" not in line}


def host() -> dict:
    """What must be the same before and after. Other programs of the machine are left out as far as can be told."""
    python = isolation.interpreter()
    owner = {os.geteuid(), 65534}
    return {
        "files of the interpreter and the project": tree(
            *python.folders, PROJECT / "jaxlm" / "tools", PROJECT / "tests" / "tools"
        )
        | {f: tuple(os.stat(f))[:7] for f in python.files},
        "temporary files of ours": sorted(
            p.name
            for p in Path(tempfile.gettempdir()).iterdir()
            if p.name.startswith(("jaxlm-python", "planted", "owned")) and p.lstat().st_uid in owner
        ),
        "shared memory files": sorted(p.name for p in Path("/dev/shm").iterdir() if p.lstat().st_uid == 65534),
        "System V objects": [Path(f"/proc/sysvipc/{n}").read_text() for n in ("shm", "msg", "sem")],
        "mounts": mounts(),
        "the host's name": tuple(os.uname()),
        "kernel settings": [Path(f"/proc/sys/kernel/{n}").read_text() for n in ("core_pattern", "hostname")],
        "kernel modules": sorted(x.split()[0] for x in Path("/proc/modules").read_text().splitlines())
        if os.path.exists("/proc/modules")
        else [],
        "the user's files": sorted(os.listdir(Path.home())) if os.access(Path.home(), os.R_OK) else [],
        "the clock": round(time.time() - time.monotonic()),
    }


class Peak(threading.Thread):
    """Looks at the memory and the threads of this process's children all the time, and keeps the largest."""

    def __init__(self, but: int):
        super().__init__(daemon=True)
        self.but, self.memory, self.threads, self.over = but, 0, 0, False

    def run(self):
        while not self.over:
            for pid in children(os.getpid()):
                if pid != self.but:
                    used, threads = isolation.usage(pid)
                    self.memory, self.threads = max(self.memory, used), max(self.threads, threads)
            time.sleep(0.02)


# ---------------------------------------------------------------------------------------------------------- the runs
def run_one(text: str, victims: Victims, mode, limits: Limits = LIMITS) -> tuple[Result | None, list[str]]:
    """One program, and what is wrong after it."""
    before = strangers()
    start = time.monotonic()
    try:
        result = run_in(mode, filled(text, victims.words), limits)
    except IsolationError as e:
        return None, [f"the sandbox failed: {e}"]
    wrong = []
    if time.monotonic() - start > limits.seconds + SLACK_SECONDS:
        wrong.append(f"it took {time.monotonic() - start:.1f} s")
    said = result.stdout + result.stderr
    wrong += [line[:200] for line in said.splitlines() if line.startswith("BREACH")]
    if victims.token in said:
        wrong.append("it told the secret")
    if max(len(result.stdout), len(result.stderr)) > limits.output_bytes:
        wrong.append("more output than allowed")
    wrong += victims.harmed()
    left = strangers() - before
    if left:
        time.sleep(0.2)  # another sandbox of this machine may have come and gone
        left &= strangers()
    wrong += [f"left running: process {pid}" for pid, _ in sorted(left)]
    wrong += [f"a child left: {pid}" for pid in children(os.getpid()) if pid != victims.process.pid]
    return result, wrong


def run_all(names: list[str], mode, show=print) -> tuple[int, dict]:
    """Runs them one after the other; the number of those that got through, and figures."""
    texts = programs()
    wrong_programs, seconds, stopped = 0, 0.0, 0
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        os.chmod(folder, 0o755)
        victims = Victims(Path(folder))
        peak = Peak(victims.process.pid)
        try:
            before, sockets, memory_before = host(), listening(), memory()
            peak.start()
            start = time.monotonic()
            for name in names:
                peak.memory, most = 0, peak.memory
                result, wrong = run_one(texts[name], victims, mode)
                if peak.memory > (LIMITS.memory_mb + SLACK_MB) << 20:
                    wrong.append(f"it held {peak.memory >> 20} MB")
                peak.memory = max(peak.memory, most)
                wrong_programs += bool(wrong)
                stopped += bool(result and result.stopped)
                if show:
                    how = "" if result is None else result.stopped or f"exit {result.exit_code}"
                    show(f"{'BREACH' if wrong else 'ok    '} {name}: {how}")
                    for line in wrong:
                        show(f"       {line}")
            seconds = time.monotonic() - start
            peak.over = True
            peak.join()
            time.sleep(0.5)
            after, memory_after = host(), memory()
            different = [name for name in before if before[name] != after[name]]
            different += [f"listens: {a}" for a in listening() - sockets if not held_by_others(a)]
            grown = memory_after["Shmem"] - memory_before["Shmem"]
            less = memory_before["MemAvailable"] - memory_after["MemAvailable"]
            if grown > 100 or less > 2000:
                different.append(f"memory: {grown} MB more shared, {less} MB less available")
        finally:
            peak.over = True
            victims.close()
    for name in different:
        if show:
            show(f"BREACH of the host: {name} changed")
            if isinstance(before.get(name), dict):
                show(
                    f"       {[k for k in before[name] | after[name] if before[name].get(k) != after[name].get(k)][:5]}"
                )
    figures = {
        "programs": len(names),
        "seconds": round(seconds, 1),
        "stopped by a limit": stopped,
        "ended by themselves": len(names) - stopped,
        "got through": wrong_programs,
        "changes of the host": len(different),
        "peak memory of one, MB": peak.memory >> 20,
        "peak threads of one": peak.threads,
        "shared memory of the host grew by, MB": grown,
    }
    return wrong_programs + len(different), figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the programs whose name has this in it")
    parser.add_argument("--mode", choices=("bubblewrap", "namespaces"), help="default: as this machine isolates")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    arguments = parser.parse_args()
    names = [name for name in programs() if arguments.only in name]
    if arguments.list:
        print("\n".join(names))
        return 0
    mode = arguments.mode or isolation_mode()
    print(f"{len(names)} programs in {mode}, as {'root' if os.geteuid() == 0 else 'an ordinary user'}", flush=True)
    wrong, figures = run_all(names, mode, lambda line: print(line, flush=True))
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
