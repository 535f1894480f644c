"""The batch script of launch.slurm, run by bash with stubs of srun and scontrol; and what sbatch is given."""

import dataclasses
import os
import signal
import subprocess
import time

import pytest

from jaxlm.config import UserError
from launch import job as jobs
from launch import slurm
from launch.job import Gpus, Job
from tests.launch import stubs

JOB = Job("a", ("launch.train", "--experiment=x", "--workdir=runs/a"), Gpus(1, 2), (("TAG", "first try"),))


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    folder = stubs.install(tmp_path / "cluster", monkeypatch, "a")
    (folder / "runs" / "slurm").mkdir(parents=True)
    return folder


def script(cluster, job=JOB):
    text = slurm.script(job, slurm.Place(python=str(cluster / "bin" / "job")))
    (cluster / "script").write_text(text)
    return subprocess.Popen(
        ["bash", "script"], cwd=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(cluster, monkeypatch, job=JOB) -> tuple[int, int, str]:
    """(exit code of the last start, number of starts, all output), with Slurm's own part of starting it again."""
    starts, said = 0, ""
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    while True:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(starts))
        process = script(cluster, job)
        said += process.communicate(timeout=60)[0]
        starts += 1
        if len(stubs.calls(cluster, "scontrol requeue 123")) < starts:
            return process.returncode, starts, said


def saves_after(cluster, file: str) -> None:
    """What hangs saves as soon as `file` has something in it."""
    program = (cluster / "bin" / "job").read_text()
    waits = f"until [ -s {file} ]; do sleep 0.02; done; exit 42"
    (cluster / "bin" / "job").write_text(program.replace("exec sleep 60", waits, 1))


def test_preempted_twice_then_done(cluster, monkeypatch):
    stubs.does(cluster, task_0="42 42 0", task_1="42 42 0")
    code, starts, _ = run(cluster, monkeypatch, dataclasses.replace(JOB, max_failures=0, max_preemptions=2))
    assert (code, starts) == (0, 3)
    assert "srun --kill-on-bad-exit=1 --export=ALL bash -c" in stubs.calls(cluster)[0]
    assert "TAG=first try" in (cluster / "environment.task-1").read_text()


@pytest.mark.parametrize(("does", "limits", "expected"), [
    ("1 1 1", {"max_failures": 1}, (1, 2)),
    ("1 42 42 1 0", {"max_failures": 1, "max_preemptions": 9}, (1, 4)),
    ("42 42 42", {"max_preemptions": 1}, (42, 2)),
    ("42 1 0", {"max_failures": 1, "max_preemptions": 1}, (0, 3)),
    ("2 0", {}, (2, 1)),
    ("3 0", {}, (3, 1)),
])  # fmt: skip
def test_limits_are_counted_apart(cluster, monkeypatch, does, limits, expected):
    stubs.does(cluster, task_0=does, task_1=does)
    code, starts, said = run(cluster, monkeypatch, dataclasses.replace(JOB, **limits))
    assert (code, starts) == expected, said
    if starts == 2:
        assert "it does not start again" in said


def test_the_first_task_to_end_badly_decides(cluster, monkeypatch):
    """One diverges, and srun's signal makes the other one save and say 42, the greater number."""
    stubs.does(cluster, task_0="3", task_1="hang")
    saves_after(cluster, "runs/slurm/a-123.first")
    assert run(cluster, monkeypatch)[:2] == (3, 1)


def test_a_cancelled_job_does_not_put_itself_back(cluster, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    stubs.does(cluster, task_0="hang", task_1="hang")
    saves_after(cluster, "told")
    process = script(cluster)
    deadline = time.monotonic() + 30
    while not (cluster / "environment.task-0").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    (cluster / "told").write_text("yes")
    process.communicate(timeout=60)
    assert process.returncode == 42 and not stubs.calls(cluster, "scontrol")


def test_what_sbatch_is_given(cluster, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    job = dataclasses.replace(JOB, secrets=("HF_TOKEN",))
    *_, submit = slurm.steps(job, slurm.Place("1-00:00:00", options=("partition=gpu",)))
    done = jobs.run(submit, job, capture=True)
    assert done.stdout == "123;cluster\n"
    text = (cluster / "submitted").read_text()
    for line in ("--ntasks-per-node=2", "--gpus-per-node=2", "--time=1-00:00:00", "--signal=TERM@600", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert "#SBATCH --export=ALL,HF_TOKEN\n" in text and "#SBATCH --partition=gpu\n" in text
    assert "hf_very" not in text + "".join(stubs.calls(cluster))
    assert "#SBATCH --export=NONE\n" in slurm.script(JOB, slurm.Place())
    for limit in ("10", "9:59", "00:10:00", "0-0:10"):
        with pytest.raises(UserError, match=f"--time={limit}: every start would be told to save at once"):
            slurm.check_place(slurm.Place(limit))
    for limit in ("11", "10:01", "1:00:00", "1-0", "0-1", "0"):
        slurm.check_place(slurm.Place(limit))
    with pytest.raises(UserError, match="--sbatch: the value of HF_TOKEN looks like a secret"):
        slurm.check_place(slurm.Place(options=("export=ALL,HF_TOKEN=x",)))


def test_looking_at_a_job(cluster, capfd):
    (cluster / "runs" / "slurm" / "a-123.log").write_text("step 1\n")
    for asked in ("status", "logs", "delete"):
        assert jobs.run(slurm.look(asked, "a"), JOB).returncode == 0
    assert capfd.readouterr().out == "step 1\n"
    squeue, scancel = stubs.calls(cluster)
    assert squeue.startswith("squeue --me --name=a ") and scancel == "scancel --me --name=a"
