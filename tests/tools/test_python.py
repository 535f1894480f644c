import dataclasses
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxlm.config import UserError
from jaxlm.tools import isolation, python, seccomp
from jaxlm.tools.isolation import IsolationError, Limits
from jaxlm.tools.python import isolation_mode, run_in, run_python
from tests.tools import hostile

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mode():
    try:
        return isolation_mode()
    except IsolationError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    planted = hostile.Victims(tmp_path_factory.mktemp("host"))
    yield planted
    planted.close()


def test_what_comes_back(mode):
    result = run_python("import sys\nprint('a', 1 + 1)\nprint('b', file=sys.stderr)\nsys.exit(3)")
    assert (result.stdout, result.stderr, result.exit_code) == ("a 2\n", "b\n", 3)
    assert not (result.timed_out or result.truncated or result.stopped or result.ok)
    result = run_python("def f():\n    return 1 / 0\nf()")
    assert result.exit_code == 1 and 'File "/main.py", line 2, in f' in result.stderr
    assert "return 1 / 0" in result.stderr and result.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert run_python("").ok
    assert "SyntaxError" in run_python("print('\ud800')").stderr


def test_ordinary_programs_work(mode):
    code = """
import collections, decimal, fractions, heapq, itertools, json, math, random, re, sqlite3, statistics, zlib
import concurrent.futures, multiprocessing, threading, subprocess, sys, tempfile, hashlib, ssl, ctypes, lzma, bz2
def square(x):
    return x * x
if __name__ == "__main__":
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        print(sum(pool.map(square, range(10))))
    with multiprocessing.Pool(2) as pool:
        print(sum(pool.map(square, range(10))))
    with tempfile.TemporaryFile() as f:
        print(f.write(b"x" * 1000))
    print(subprocess.run([sys.executable, "-c", "print(7)"], capture_output=True, text=True).stdout.strip())
    print(hashlib.sha256(b"").hexdigest()[:8], sqlite3.connect(":memory:").execute("select 6*7").fetchone())
"""
    result = run_python(code, Limits(seconds=60, cpu_seconds=60))
    assert result.stdout.split("\n") == ["285", "285", "1000", "7", "e3b0c442 (42,)", ""], result


def test_same_output_every_time(mode):
    code = "print({str(i) for i in range(50)}, hash('x'))"
    assert run_python(code).stdout == run_python(code).stdout


@pytest.mark.parametrize("name", hostile.SAMPLE)
def test_hostile(name, mode, victims):
    result, wrong = hostile.run_one(hostile.programs()[name], victims, mode)
    assert result is not None and not wrong


def test_there_are_enough_hostile_programs():
    assert len(hostile.programs()) >= 200
    assert set(hostile.SAMPLE) <= set(hostile.programs())
    groups = {name.partition(":")[0] for name in hostile.SAMPLE}
    assert {"read", "write", "disk", "process", "signal", "memory", "output", "net", "rights"} <= groups
    assert any("ctypes" in hostile.programs()[name] for name in hostile.SAMPLE)


def test_a_breach_is_seen(victims):
    """The same look at a program that nothing isolates: a test that cannot fail shows nothing."""
    limits = dataclasses.replace(hostile.LIMITS, seconds=60.0)  # they end by themselves, on a busy machine late
    for name in ("read: the secret by open", "read: users and passwords", "read: the project"):
        result, wrong = hostile.run_one(hostile.programs()[name], victims, "unsafe", limits)
        assert wrong, result
    _, wrong = hostile.run_one("print(open('@SECRET@').read())", victims, "unsafe", limits)
    assert wrong == ["it told the secret"]
    _, wrong = hostile.run_one(
        "import os; os.kill(@VICTIM@, 19); time = __import__('time').sleep(0.1)", victims, "unsafe", limits
    )
    os.kill(victims.process.pid, signal.SIGCONT)
    assert wrong == ["a process of the host changed"]


def test_time(mode):
    result = run_python("print('before', end='')\nwhile True: pass", Limits(seconds=2))
    assert result.timed_out and result.stdout == "before" and "longer than 2 s" in result.stopped
    assert 2 <= result.seconds < 20 and result.exit_code == 128 + signal.SIGKILL
    result = run_python("while True: pass", Limits(seconds=60, cpu_seconds=1))
    assert result.timed_out and "CPU" in result.stopped and not result.ok


def test_memory_of_one_and_of_all(mode):
    limits = Limits(memory_mb=128, seconds=30)
    assert "MemoryError" in run_python("x = bytearray(200 << 20)", limits).stderr
    code = """
import os, time
os.fork(), os.fork()
x = b"x" * (60 << 20)
time.sleep(60)
"""
    result = run_python(code, limits)
    assert "128 MB of memory" in result.stopped and not result.timed_out and result.seconds < 20


def test_output(mode):
    result = run_python("while True: print('x' * 100)", Limits(output_bytes=5000))
    assert result.truncated and len(result.stdout) == 5000 and "printed more" in result.stopped
    result = run_python("import os; os.write(1, b'\\xff\\xfe\\x00'); os.write(2, 'é'.encode())")
    assert result.ok and result.stdout == "\ufffd\ufffd\0" and result.stderr == "é"


def test_nothing_is_left_when_the_caller_is_killed(mode):
    code = (
        "from jaxlm.tools.python import run_python; from jaxlm.tools.isolation import Limits;"
        "run_python('import os, time\\nos.fork()\\nprint(1)\\ntime.sleep(600)', Limits(seconds=600))"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    sandboxed = set()
    deadline = time.monotonic() + 60
    while len(sandboxed) < 4 and time.monotonic() < deadline:  # the launcher, process 1, and the two of the program
        time.sleep(0.05)
        waiting, sandboxed = [caller.pid], set()
        while waiting:
            found = isolation.children(waiting.pop())
            sandboxed |= set(found)
            waiting += found
    assert len(sandboxed) >= 4
    caller.kill()
    caller.wait()
    while any(os.path.exists(f"/proc/{pid}/exe") for pid in sandboxed) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in sandboxed if os.path.exists(f"/proc/{pid}/exe")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_a_fork_of_the_caller_does_not_keep_it_alive(mode):
    """A process that the caller forks meanwhile, as data loaders do, holds a copy of the lifeline."""
    forked = []

    def fork():
        time.sleep(0.3)
        forked.append(os.fork())
        if forked[0] == 0:
            time.sleep(30)
            os._exit(0)

    thread = threading.Thread(target=fork)
    thread.start()
    start = time.monotonic()
    result = run_python("while True: pass", Limits(seconds=1))
    thread.join()
    os.kill(forked[0], signal.SIGKILL)
    os.waitpid(forked[0], 0)
    assert result.timed_out and time.monotonic() - start < 8


def test_threads_may_run_several(mode):
    results = [None] * 4

    def run(i):
        results[i] = run_python(f"import time; time.sleep(0.1); print({i})", Limits(seconds=60)).stdout

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == ["0\n", "1\n", "2\n", "3\n"]


def test_an_ordinary_user_is_isolated_as_well():
    """Root tries it as somebody else, with the system's interpreter: root's own may lie where others cannot read."""
    if os.geteuid() != 0:
        pytest.skip("this test runs as an ordinary user already")
    code = (
        "import os; from jaxlm.tools.python import run_python, isolation_mode; isolation_mode();"
        "r = run_python('import os; print(os.getuid(), os.path.exists(\"/etc\"))'); print(r.stdout, r.stderr)"
    )
    interpreter = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    try:
        done = subprocess.run(
            [interpreter or "python3", "-c", code],
            **{"cwd": ROOT, "user": 12345, "group": 12345, "extra_groups": [], "capture_output": True, "text": True},
            env={"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
        )
    except OSError as e:
        pytest.skip(f"no interpreter that another user may run: {e}")
    if any(word in done.stderr for word in ("ModuleNotFoundError", "SyntaxError", "PermissionError", "IsolationError")):
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.stdout.split() == ["65534", "False"], done.stderr


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap here")
def test_bubblewrap(mode, victims):
    for name in hostile.SAMPLE[:5]:
        result, wrong = hostile.run_one(hostile.programs()[name], victims, "bubblewrap")
        assert result is not None and not wrong


# ------------------------------------------------------------------------------------------------ refusing to run
@pytest.fixture
def fresh():
    isolation_mode.cache_clear()
    yield
    isolation_mode.cache_clear()


def test_refuses_without_isolation(fresh, monkeypatch):
    monkeypatch.setattr(isolation, "candidates", lambda: ())
    with pytest.raises(IsolationError, match="unsafe=True"):
        run_python("print(1)")
    result = run_python("import os; print(os.getcwd()); open('x', 'w').write('y')", unsafe=True)
    assert result.ok and "jaxlm-python-" in result.stdout
    assert not os.path.exists(result.stdout.strip())  # its folder is gone
    assert run_python("while True: pass", Limits(seconds=0.3), unsafe=True).timed_out


def test_refuses_a_sandbox_that_does_not_isolate(fresh, monkeypatch):
    monkeypatch.setattr(isolation, "candidates", lambda: ("unsafe",))
    with pytest.raises(IsolationError, match="/etc"):
        run_python("print(1)")


def test_unsafe_leaves_no_orphans(fresh):
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    print(os.getpid(), flush=True)
    time.sleep(600)
time.sleep(0.3)
"""
    result = run_in("unsafe", code, Limits(seconds=20))
    assert result.ok and not os.path.exists(f"/proc/{int(result.stdout)}/exe")


def test_a_sandbox_that_cannot_be_built_says_why(mode, monkeypatch):
    real = isolation.interpreter()
    monkeypatch.setattr(isolation, "interpreter", lambda: real._replace(folders=("/none/of/this",)))
    with pytest.raises(IsolationError, match="/none/of/this: No such file"):
        run_in("namespaces", "print(1)", Limits())


def test_bad_input():
    for field, value in (("seconds", 0), ("memory_mb", -1), ("processes", True), ("output_bytes", "1")):
        with pytest.raises(UserError, match=field):
            Limits(**{field: value})
    with pytest.raises(UserError, match="48"):
        Limits(memory_mb=10)
    with pytest.raises(UserError, match="needs 3"):
        Limits(processes=1)
    with pytest.raises(UserError, match="largest"):
        run_in("namespaces", "#" * (isolation.LARGEST_CODE + 1), Limits())
    assert all(f.default is not dataclasses.MISSING for f in dataclasses.fields(Limits))


# ------------------------------------------------------------------------------------------------ the call filter
def verdict(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """What a seccomp filter returns, by a machine for the few instructions that ours has."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *(arguments + (0,) * 6)[:6])
    lines = [struct.unpack_from("=HBBI", program, i) for i in range(0, len(program), 8)]
    at = a = 0
    while True:
        code, jt, jf, k = lines[at]
        at += 1
        if code == 0x20:
            (a,) = struct.unpack_from("=I", data, k)
        elif code == 0x54:
            a &= k
        elif code == 0x06:
            return k
        else:
            at += jt if {0x15: a == k, 0x35: a >= k, 0x45: bool(a & k)}[code] else jf


ALLOW, KILL, REFUSED, MISSING = 0x7FFF0000, 0x80000000, 0x50001, 0x50026


@pytest.mark.parametrize("machine", seccomp.machines())
def test_filter(machine):
    column = seccomp.machines().index(machine)
    arch, other = ((0xC000003E, 0x40000003), (0xC00000B7, 0x40000028))[column]
    program = seccomp.program(machine)
    ask = lambda number, *arguments: verdict(program, arch, number, *arguments)  # noqa: E731
    numbers = [n[column] for n in seccomp._REFUSED.values() if n[column] is not None]
    assert len(set(numbers)) == len(numbers) > 50
    assert all(ask(n) == REFUSED for n in numbers)
    clone, socket, pair, mmap = ((56, 41, 53, 9), (220, 198, 199, 222))[column]
    thread = 0x003D0F00
    assert ask(clone, 17) == ask(clone, thread) == ALLOW
    for bit in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert ask(clone, 17 | bit) == REFUSED
    assert ask(435) == MISSING and all(ask(n) == MISSING for n in (442, 447, 500, 10_000))
    for number in (socket, pair):
        assert [ask(number, family) for family in (1, 2, 10, 16, 17, 38, 40)] == [ALLOW] + [REFUSED] * 6
    flags = lambda f: ask(mmap, 0, 4096, 3, f, 0xFFFFFFFF, 0)  # noqa: E731
    assert flags(0x22) == flags(0x02) == flags(0x01) == ALLOW and flags(0x21) == flags(0x23) == REFUSED
    special = {clone, socket, pair, mmap, 435}
    assert all(ask(n) == ALLOW for n in range(442) if n not in numbers and n not in special)
    assert verdict(program, other, 0) == KILL
    if machine == "x86_64":
        assert ask(0x40000000) == ask(0x40000101) == MISSING


def test_unknown_machines_are_refused(monkeypatch):
    with pytest.raises(KeyError):
        seccomp.program("riscv64")
    isolation._filter.cache_clear()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(IsolationError, match="riscv64"):
        python.run_in("namespaces", "", Limits())
    isolation._filter.cache_clear()
