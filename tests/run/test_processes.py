"""Who a process is, by its environment; and two real ones that find each other."""

import threading
import time

import pytest

from jaxlm.config import UserError
from jaxlm.run import exits, processes
from launch import local
from launch.job import Job, Processes
from tests.source import ROOT


def environ(coordinator="127.0.0.1:5000", count="2", this="1"):
    return {"JAXLM_COORDINATOR": coordinator, "JAXLM_PROCESSES": count, "JAXLM_PROCESS": this}


def test_described():
    found = {"coordinator_address": "10.0.0.1:5000", "num_processes": 2, "process_id": 1}
    assert processes.described(environ("10.0.0.1:5000")) == found
    assert processes.described(environ())["coordinator_bind_address"] == "127.0.0.1:5000"  # not to the whole network
    assert processes.described({"PATH": "/bin"}) is None


@pytest.mark.parametrize(("wrong", "words"), [
    ({"JAXLM_COORDINATOR": "127.0.0.1:5000"}, "not set: JAXLM_PROCESSES, JAXLM_PROCESS"),
    (environ(this="2"), "counts from 0, below the second"),
    (environ(count="two"), "JAXLM_PROCESSES=two"),
    (environ("somewhere"), "JAXLM_COORDINATOR=somewhere is not host:port"),
])  # fmt: skip
def test_wrong_descriptions(wrong, words):
    with pytest.raises(UserError, match=words):
        processes.described(wrong)


def test_clusters(monkeypatch):
    srun = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    assert processes.on_cluster(srun)
    assert not processes.on_cluster(srun | {"SLURM_NTASKS": "1"})
    monkeypatch.setattr(processes, "TPU_DEVICES", ("/dev/null",))
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert processes.on_cluster({}) and processes.on_cluster({"JAX_PLATFORMS": "tpu,cpu"})
    assert not processes.on_cluster({"JAX_PLATFORMS": "cpu"})
    monkeypatch.setattr(processes, "TPU_DEVICES", ("/nonexistent/accel*",))
    assert not processes.on_cluster({})


@pytest.mark.parametrize(("variables", "clustered"), [(environ(), False), ({}, True)])
def test_the_others_end_soon_after_one_has_died(monkeypatch, variables, clustered):
    asked = []
    monkeypatch.setattr(processes, "on_cluster", lambda _: clustered)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **options: asked.append(options))
    processes.join(variables)
    assert asked[0]["heartbeat_timeout_seconds"] <= 30
    assert asked[0].get("num_processes") == (None if clustered else 2)


def test_a_hint_comes_late_and_once(capsys):
    with processes.hint("too quick to be said", 60):
        pass
    said = threading.Event()
    with pytest.MonkeyPatch.context() as m:
        m.setattr("builtins.print", lambda *a, **k: said.set())
        with processes.hint("waits", 0.01):
            assert said.wait(30)
    assert "quick" not in "".join(capsys.readouterr())


@pytest.fixture
def together(monkeypatch):
    """Runs tests/run/adding_up.py as two processes of two devices, by launch.local; gives its exit code."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    on = Processes(2, cpu_devices=2)
    return lambda *words: local.attempt(Job("local", ("tests.run.adding_up", *words), on), [])


def test_two_processes_add_up(together, capfd):
    assert together() == 0
    assert capfd.readouterr().out.strip().splitlines()[-1] == "process 0 of 2, 4 devices, sum 6.0"


def test_an_error_in_one_ends_both_at_once(together, capfd):
    """Process 0 waits for a sum that never comes, and jax would have process 1 wait for it before it ends."""
    start = time.monotonic()
    assert together("leave") == exits.EXIT_BAD_INPUT
    assert time.monotonic() - start < 60  # and not the 300 s of jax
    assert "process 1 has had enough" in capfd.readouterr().err


def test_exit_codes():
    ends = (
        UserError("x"),
        exits.Diverged("x"),
        exits.Stopped(),
        SystemExit(7),
        SystemExit("x"),
        SystemExit(),
        OSError(),
    )
    assert [exits.code_of(e) for e in ends] == [2, 3, 42, 7, 1, 0, 1]
