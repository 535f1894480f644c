"""launch.local with real processes that die, hang and save."""

import os
import signal
import subprocess
import sys
import time

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from launch import local
from launch.job import Job, Processes
from launch.supervise import supervise
from tests.source import ROOT


def run(monkeypatch, does: str, **limits) -> int:
    monkeypatch.chdir(ROOT)
    job = Job("local", ("tests.launch.dying",), Processes(does.count(",") + 1), (("DYING", does),), **limits)
    return supervise(job, lambda: local.attempt(job, []), pause=0)


@pytest.mark.parametrize(("does", "code"), [("0,0", 0), ("3", 3), ("hang,7,hang", 7), ("42,late", 42)])
def test_the_first_that_ends_badly_decides(monkeypatch, capfd, does, code):
    start = time.monotonic()
    assert run(monkeypatch, does, max_preemptions=0, max_failures=0) == code
    assert time.monotonic() - start < 30
    said = capfd.readouterr()
    if does.startswith("hang"):
        assert "process 1: the last words of 1, found at 127.0.0.1:" in said.err
        assert "process 1 of 3 ended first, with exit code 7" in said.err
    if does == "0,0":
        assert "the last words of 0" in said.out and "words of 1" not in said.out + said.err


def test_failures_and_preemptions_are_limited_apart(monkeypatch, capfd):
    assert run(monkeypatch, "42", max_preemptions=2, max_failures=0) == 42
    assert "preempted 3 times, --max_preemptions=2" in capfd.readouterr().out
    assert run(monkeypatch, "5", max_preemptions=0, max_failures=1) == 5
    assert "failed 2 times, --max_failures=1" in capfd.readouterr().out


def test_a_signal_to_the_launcher_saves_and_does_not_start_again(tmp_path):
    """The launcher is told to stop: all processes save, and it ends with 42."""
    code = (
        "import sys; from launch import common, local, job_flags; from launch.job import Job, Processes\n"
        f"env = (('DYING', 'save,save'), ('READY', {str(tmp_path)!r}))\n"
        "job = Job('local', ('tests.launch.dying',), Processes(2), env)\n"
        "job_flags.job = lambda *a, **k: job\n"
        "sys.argv = ['local', '--processes=2']\n"
        "common.run(local.main, takes_command=True)\n"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 42, err
    assert "the same command goes on" in err


def test_a_dry_run_resolves_the_definition(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags.FLAGS(["local"])
    with flagsaver.flagsaver(dry_run=True, processes=2):
        with pytest.raises(UserError, match="the command does not start: unknown experiment 'pretrain_tny'; nearest"):
            local.main(["launch.train", "--experiment=pretrain_tny", "--workdir=runs/a"])
        assert capsys.readouterr().out == ""
        assert local.main(["launch.train", "--experiment=pretrain_tiny", "--workdir=runs/a"]) == 0
        assert capsys.readouterr().out.count("--experiment=pretrain_tiny --workdir=runs/a") == 2


def test_environment():
    job = Job("local", ("launch.train",), Processes(2, cpu_devices=4), (("A", "b c"),))
    assert local.environment(job, 5000, 1) == {
        "A": "b c",
        "JAXLM_COORDINATOR": "127.0.0.1:5000",
        "JAXLM_PROCESSES": "2",
        "JAXLM_PROCESS": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
    }
    alone = Job("local", ("launch.train",), Processes(1))
    assert local.environment(alone, 5000, 0) == {} and "JAXLM_PROCESS" not in os.environ
