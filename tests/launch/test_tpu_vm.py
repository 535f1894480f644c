"""launch.tpu_vm against a stub of gcloud, whose hosts run the real worker.sh: what is called, said and given back."""

import dataclasses

import pytest

from jaxlm.config import UserError
from jaxlm.run import exits
from launch import gcloud, tpu_vm, tpus
from launch import job as jobs
from launch.job import Job
from tests.launch import stubs

JOB = Job("a", ("launch.train", "--experiment=x", "--workdir=gs://b/a"), tpus.find("v5p-16"), (("TAG", "first try"),))
PLACE = gcloud.Place("p", "z", "HEAD")
POLL = 0.02


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    return stubs.install(tmp_path / "cloud", monkeypatch, "a")


def go(job=JOB, place=PLACE, keep=False) -> int:
    return tpu_vm.go(job, place, keep, POLL)


def hosts(cloud, node="a", **what):
    stubs.does(cloud, **{f"{node}_{host}": does for host, does in what.items()})


def test_a_job_that_succeeds_leaves_nothing_behind(cloud):
    hosts(cloud, w_0="0", w_1="0")
    assert go() == 0
    made = [" ".join(c.split()[3:6]) for c in stubs.calls(cloud) if " list " not in c and "state;" not in c]
    assert made == ["tpu-vm create a", "tpu-vm scp build/a.tar.gz", "tpu-vm ssh a", "tpu-vm ssh a", "tpu-vm delete a"]
    started = (cloud / "starts").read_text()
    assert started.count("-m launch.train --experiment=x --workdir=gs://b/a") == 2
    assert "TAG=first try" in (cloud / "environment.a-w-1").read_text()


def test_keep(cloud, capfd):
    hosts(cloud, w_0="0", w_1="0")
    assert go(keep=True) == 0
    assert not stubs.calls(cloud, "delete") and "costs" in capfd.readouterr().out


def test_preempted_twice_then_done(cloud, capfd):
    hosts(cloud, w_0="preempt hang 0", w_1="hang preempt 0")
    assert go(dataclasses.replace(JOB, max_failures=0)) == 0
    assert len(stubs.calls(cloud, "tpu-vm create")) == 3 and len(stubs.calls(cloud, "tpu-vm delete")) == 3
    out = capfd.readouterr().out
    assert "a is PREEMPTED" in out and "preempted, 2 of at most 100" in out


def test_preemptions_have_a_limit_of_their_own(cloud, capfd):
    hosts(cloud, w_0="42 42", w_1="42 42")
    assert go(dataclasses.replace(JOB, max_preemptions=1)) == exits.EXIT_PREEMPTED
    assert "preempted 2 times, --max_preemptions=1" in capfd.readouterr().out
    assert len(stubs.calls(cloud, "tpu-vm create")) == 1  # the machines were there all the time


def test_one_host_fails_and_the_other_hangs(cloud, capfd):
    hosts(cloud, w_0="hang 0", w_1="7 0")
    assert go() == 0
    out = capfd.readouterr().out
    assert "a-w-1 ended with exit code 7; 1 hosts still ran, and are ended" in out
    assert "a-w-1: the last words of a-w-1" in out and "w-0: the last" not in out
    assert (cloud / "starts").read_text().count("a-w-0 starts") == 2


def test_failures_over_the_limit(cloud, capfd):
    hosts(cloud, w_0="1 1 1", w_1="1 1 1")
    assert go(dataclasses.replace(JOB, max_failures=1)) == 1
    assert (cloud / "starts").read_text().count("a-w-0 starts") == 2
    assert "failed 2 times, --max_failures=1" in capfd.readouterr().out
    assert stubs.calls(cloud)[-1].startswith("gcloud compute tpus tpu-vm delete a ")


@pytest.mark.parametrize("code", [2, 3])
def test_what_never_starts_again(cloud, code):
    hosts(cloud, w_0=str(code), w_1=str(code))
    assert go() == code
    assert (cloud / "starts").read_text().count("a-w-0 starts") == 1


def test_a_request_waits_in_the_queue_and_is_suspended_once(cloud, capfd):
    (cloud / "answers").write_text("WAITING_FOR_RESOURCES;SUSPENDED\nACCEPTED;PROVISIONING;ACTIVE\n")
    job, place = dataclasses.replace(JOB, on=tpus.find("v5p-16", 2)), dataclasses.replace(PLACE, queued=True, spot=True)
    for node in ("a_0", "a_1"):
        hosts(cloud, node, w_0="0", w_1="0")
    assert go(job, place) == 0
    out = capfd.readouterr().out
    told = [line.split(" ", 1)[1] for line in out.splitlines() if " is " in line]
    assert told == [f"a is {s}" for s in ("not there", "WAITING_FOR_RESOURCES", "SUSPENDED")] + [
        f"a is {s}" for s in ("not there", "ACCEPTED", "PROVISIONING", "ACTIVE")
    ]
    assert len(stubs.calls(cloud, "--node-count=2 --node-prefix=a")) == 2
    assert len(stubs.calls(cloud, "queued-resources delete a --force")) == 2
    assert (cloud / "starts").read_text().count("starts") == 4


def test_no_capacity(cloud, capfd):
    (cloud / "full").touch()
    assert go(dataclasses.replace(JOB, max_failures=1)) == 1
    said = capfd.readouterr()
    assert "no more capacity" in said.err and "--queued waits for capacity" in said.out


def test_a_secret_reaches_every_host_and_nothing_else(cloud, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_very secret")
    hosts(cloud, w_0="0", w_1="0")
    assert go(dataclasses.replace(JOB, secrets=("HF_TOKEN",))) == 0
    assert "HF_TOKEN=hf_very secret\n" in (cloud / "environment.a-w-0").read_text()
    assert "HF_TOKEN=hf_very secret\n" in (cloud / "environment.a-w-1").read_text()
    for path in (p for p in cloud.rglob("*") if p.is_file() and not p.name.startswith("environment.")):
        assert b"hf_very" not in path.read_bytes(), path
    assert "hf_very" not in "".join(capfd.readouterr())


def test_the_same_command_watches_what_runs_and_another_is_refused(cloud):
    hosts(cloud, w_0="0", w_1="0")
    assert go(keep=True) == 0
    assert go(keep=True) == 0
    assert len(stubs.calls(cloud, "scp")) == 1 and (cloud / "starts").read_text().count("starts") == 2
    assert not stubs.calls(cloud, "delete")
    hosts(cloud, w_0="hang", w_1="hang")
    for steps in (gcloud.setup, gcloud.start):
        assert tpu_vm.every(JOB, steps(dataclasses.replace(JOB, command=("launch.train", "--other")), PLACE))
    with pytest.raises(UserError, match="runs another command"):
        go()
    assert tpu_vm.every(JOB, gcloud.stop(JOB, PLACE))
    assert {h.code for h in tpu_vm.hosts(JOB, PLACE)} == {137}


def test_what_ended_badly_on_machines_that_were_kept_runs_again(cloud, capfd):
    hosts(cloud, w_0="2 0", w_1="2 0")
    assert go(keep=True) == 2
    assert go(keep=True) == 0
    assert "it has ended before, with exit code 2; it runs again" in capfd.readouterr().out
    assert (cloud / "starts").read_text().count("a-w-0 starts") == 2 and len(stubs.calls(cloud, "create")) == 1


def test_a_connection_that_hangs_is_no_answer(cloud, monkeypatch, capfd):
    monkeypatch.setattr(gcloud, "LOOK_SECONDS", 0.1)
    hosts(cloud, w_0="0", w_1="0")
    (cloud / "slow").touch()
    assert go(dataclasses.replace(JOB, max_failures=0)) == 255
    assert f"not all hosts have answered {tpu_vm.UNREACHABLE_POLLS} times in a row" in capfd.readouterr().out


def test_a_command_that_takes_too_long_ends_with_what_it_has_started():
    hanging = jobs.Step(("bash", "-c", "sleep 30 & echo begun; wait"), seconds=0.1)
    for capture in (True, False):
        done = jobs.run(hanging, JOB, capture=capture)
        assert done.returncode == jobs.EXIT_TIMED_OUT and jobs.last_line(done) == "no answer within 0.1 s"
    steps = [s for make in (gcloud.send, gcloud.setup, gcloud.start, gcloud.ask, gcloud.stop) for s in make(JOB, PLACE)]
    queued = dataclasses.replace(PLACE, queued=True)
    steps += [f(JOB, p) for f in (gcloud.create, gcloud.delete) for p in (PLACE, queued)] + gcloud.log(JOB, PLACE, "0")
    assert all(s.seconds for s in [*steps, gcloud.listing(PLACE, True)])


def raising(error):
    def watch(*_):
        raise error

    return watch


def test_whoever_stops_watching_or_finds_a_bug_hears_of_the_machines(cloud, monkeypatch, capfd):
    hosts(cloud, w_0="hang", w_1="hang")
    monkeypatch.setattr(tpu_vm, "watch", raising(KeyboardInterrupt()))
    with pytest.raises(exits.Stopped, match="the job and its machines go on; the same command watches again"):
        go()
    monkeypatch.setattr(tpu_vm, "watch", raising(OSError("no more files")))
    with pytest.raises(OSError, match="no more files"):
        go()
    said = [line for line in capfd.readouterr().out.splitlines() if "cost until" in line]
    assert len(said) == 1 and "gcloud compute tpus tpu-vm delete a --project=p --zone=z" in said[0]
    assert not stubs.calls(cloud, "delete")
    assert tpu_vm.every(JOB, gcloud.stop(JOB, PLACE))


def test_deleted_by_somebody_stays_deleted(cloud, capfd):
    hosts(cloud, w_0="hang", w_1="hang")

    def delete_soon(job, place):
        tpu_vm.every(job, gcloud.stop(job, place))
        tpu_vm.remove(job, place)

    watch = tpu_vm.watch
    with pytest.MonkeyPatch.context() as m:
        m.setattr(tpu_vm, "watch", lambda *a: (delete_soon(JOB, PLACE), watch(*a))[1])
        assert go() == 1
    assert "somebody has deleted a, and the job has ended with it; what it had saved is in gs://b/a" in (
        capfd.readouterr().out
    )
    assert len(stubs.calls(cloud, "create")) == len(stubs.calls(cloud, "delete")) == 1


def test_states_that_cannot_be_read_are_said(cloud, capfd):
    (cloud / "deaf").touch()
    assert tpu_vm.acquire(JOB, PLACE, 0) == 255
    assert "gcloud does not answer: ERROR: no active account" in capfd.readouterr().out
    assert tpu_vm.parse("a-w-0 exited 42 1700000000.5 ab12") == tpu_vm.Host("a-w-0", "exited", "ab12", 42, 1700000000.5)
    assert tpu_vm.parse("Warning: Permanently added") is None


def test_looking_at_a_job(cloud, capfd):
    hosts(cloud, w_0="0", w_1="5")
    job, place = dataclasses.replace(JOB, max_failures=0), PLACE
    assert go(job, place, keep=True) == 5
    capfd.readouterr()
    assert tpu_vm.look("status", "0", job, place) == 0
    out = capfd.readouterr().out
    assert out.startswith("a: READY\n") and "a-w-0 exited 0 " in out and "a-w-1 exited 5 " in out
    assert tpu_vm.look("logs", "1", job, place) == 0
    assert capfd.readouterr().out == "a-w-1: the last words of a-w-1\n"
    assert tpu_vm.look("delete", "0", job, place) == 0 and stubs.calls(cloud)[-1].split()[4] == "delete"
