"""Runs a job on TPU VMs: creates the machines, copies the code, starts the command on every host, watches, cleans up.

usage:
  python -m launch.tpu_vm --name=NAME --project=P --zone=Z --accelerator=TYPE [options] -- launch.train ARGUMENTS
  python -m launch.tpu_vm --name=NAME --project=P --zone=Z --status | --logs | --delete

What is committed is what runs: the tree of HEAD is sent to every host. The command runs there on its own, so this
program may be stopped, and the same command watches on. A slice that is preempted is deleted and made again, and the
run resumes from its --workdir, which therefore is on object storage. When the job has ended, the machines are deleted,
whatever the end was, unless --keep says otherwise.

--accelerator is a slice by name: v5p-256 (128 chips, 32 hosts), v5e-16, v6e-256. --slices joins several of them, as a
queued resource. --queued waits for capacity instead of failing without it; --spot takes what others may take back.
--env=NAME hands a variable of yours to the job over ssh's standard input, and shows it nowhere.

examples:
  python -m launch.tpu_vm --name=ppo1 --project=my-project --zone=us-east5-a --accelerator=v5p-256 --spot --queued \\
      --env=HF_TOKEN -- launch.train --experiment=ppo_tiny --set=mesh.fsdp=none \\
      --set=parent=gs://mine/sft --workdir=gs://mine/ppo1
  python -m launch.tpu_vm --name=ppo1 --project=my-project --zone=us-east5-a --logs --worker=3

Exit codes: those of the command (0 done; 2 bad definition or input; 3 diverged), its last one when a limit was reached;
1 when somebody has deleted the machines; 42 when watching was stopped, and the job goes on.
"""

import dataclasses
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from absl import flags

from jaxlm.config import UserError
from jaxlm.run import exits
from launch import cluster_flags, common, gcloud, job_flags, tpu_flags, tpus
from launch import job as jobs
from launch.gcloud import Place
from launch.job import Job, Step
from launch.supervise import say, supervise

PROJECT = flags.DEFINE_string("project", None, "Google Cloud project.")
ZONE = flags.DEFINE_string("zone", None, "Zone of the TPU, such as us-east5-a.")
QUEUED = flags.DEFINE_bool("queued", False, "Ask by a queued resource, which waits until there is capacity.")
RUNTIME = flags.DEFINE_string("runtime", None, "Software version of the machines; default: what fits the accelerator.")
REQUEST = flags.DEFINE_multi_string("request", [], "NAME=VALUE: a further option of what asks for the machines.")
KEEP = flags.DEFINE_bool("keep", False, "Leave the machines there when the job has ended; they cost until --delete.")
POLL_SECONDS = flags.DEFINE_integer("poll_seconds", 30, "How often to look whether all is well.", lower_bound=0)

# States of a TPU VM and of a queued resource that do not come back; any other but READY and ACTIVE passes.
LOST = ("PREEMPTED", "TERMINATED", "STOPPED", "HIDDEN")
LOST_REQUESTS = ("SUSPENDED", "FAILED")
GONE = "not there"
UNREACHABLE_POLLS = 5  # so often in a row, and hosts that do not answer count as failed
GRACE_POLLS = 4  # so long the other hosts have to end by themselves, once one has


class Deleted(Exception):
    """Somebody has deleted the machines of the job: they are not made again unasked."""


@dataclasses.dataclass(frozen=True)
class Host:
    """What `worker.sh state` said of a host: idle, running or exited; and with which code and when (Unix time)."""

    name: str
    state: str
    id: str = ""
    code: int = 0
    at: float = 0.0


def plan(job: Job, place: Place, keep: bool) -> str:
    """Every command of a job in order, as a dry run shows it."""

    def shown(*steps: Step) -> str:
        return "\n\n".join(jobs.show(s, job.secrets) for s in steps)

    starts = gcloud.start(job, place)
    again = "all hosts" if len(starts) == 1 else f"{len(starts)} hosts one by one, eight at a time; this is the first"
    parts = [
        f"# {job.name}: {job.on.slices} slices of {job.on.topology} chips, {job.on.hosts} hosts",
        shown(gcloud.archive(job, place), gcloud.listing(place, place.queued), gcloud.create(job, place)),
        shown(*gcloud.send(job, place), *gcloud.setup(job, place)),
        f"# ==== start it: {again}",
        shown(starts[0]),
        "# ==== every --poll_seconds, until it has ended on every host",
        shown(*([gcloud.listing(place, True)] if place.queued else []), gcloud.listing(place, False)),
        shown(*gcloud.ask(job, place)),
        f"# ==== when a host has failed, {job.max_failures} times at most: and then copy and start again",
        shown(*gcloud.log(job, place, "all"), *gcloud.stop(job, place)),
        f"# ==== when it was preempted, {job.max_preemptions} times at most: and then again from the machines on",
        shown(gcloud.delete(job, place)),
        "# ==== in the end" + (": --keep leaves the machines there" if keep else ""),
        *([] if keep else [shown(gcloud.delete(job, place))]),
    ]
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------------------------- what is done
def states(place: Place, queued: bool) -> dict[str, str] | None:
    """Name -> state of what there is in the zone; None when gcloud could not say."""
    done = jobs.run(gcloud.listing(place, queued), Job("", (), None), capture=True)
    if done.returncode:
        say(f"gcloud does not answer: {jobs.last_line(done)}")
        return None
    return dict(line.split(",")[:2] for line in done.stdout.split() if "," in line)


STATE = re.compile(r"(\S+) (?:(idle)|(running) (\w+)|(exited) (\d+) ([\d.]+) (\w+))")


def parse(line: str) -> Host | None:
    if (m := STATE.fullmatch(line.strip())) is None:
        return None
    name, idle, running, running_id, _, code, at, id = m.groups()
    if idle or running:
        return Host(name, idle or running, running_id or "")
    return Host(name, "exited", id, int(code), float(at))


def hosts(job: Job, place: Place) -> list[Host] | None:
    """What every host says of the command; None when not all of them have answered."""
    found = []
    for step in gcloud.ask(job, place):
        done = jobs.run(step, job, capture=True)
        found += [h for h in map(parse, done.stdout.splitlines()) if h is not None]
    return found if len(found) == job.on.hosts else None


def every(job: Job, steps: list[Step]) -> bool:
    """Runs the steps, eight at a time; whether all went well."""
    with ThreadPoolExecutor(8) as pool:
        return not any(done.returncode for done in pool.map(lambda s: jobs.run(s, job), steps))


def lost(job: Job, place: Place) -> str | None:
    """Why the machines are not to be had any more, or None; an answer of gcloud that fails says nothing.

    Raises `Deleted` when somebody has deleted them.
    """
    for queued in [True, False] if place.queued else [False]:
        found = states(place, queued)
        for name in [] if found is None else [job.name] if queued else gcloud.nodes(job):
            state = found.get(name, GONE)
            if state == GONE and queued == place.queued:
                raise Deleted(f"somebody has deleted {name}, and the job has ended with it")
            if state in (GONE, *LOST, *LOST_REQUESTS):
                return f"{name} is {state}"
    return None


def remove(job: Job, place: Place) -> None:
    if jobs.run(gcloud.delete(job, place), job).returncode:
        say(f"{job.name} could not be deleted, and may go on costing: run this with --delete")


def acquire(job: Job, place: Place, poll: float) -> int | None:
    """Waits until the machines are there, asking for them if nobody has; an exit code when that came to nothing."""
    before, silent = None, 0
    while True:
        found = states(place, place.queued)
        silent = 0 if found is not None else silent + 1
        if silent >= UNREACHABLE_POLLS:
            return 255
        state = before if found is None else found.get(job.name, GONE)  # several slices are one request
        if state != before:
            say(f"{job.name} is {state}")
        before = state
        if state == GONE:
            if jobs.run(gcloud.create(job, place), job).returncode:
                hint = "" if place.queued else "; --queued waits for capacity"
                say(f"the machines could not be had, gcloud's reason stands above{hint}")
                return 1
        elif state in (*LOST, *LOST_REQUESTS):
            remove(job, place)
            return 1 if state == "FAILED" else exits.EXIT_PREEMPTED
        elif state in ("ACTIVE", "READY"):
            return None
        time.sleep(poll)


def watch(job: Job, place: Place, poll: float) -> int:
    """Looks again and again until the command has ended on every host, or the machines are gone; its exit code."""
    silent = waited = 0
    while True:
        if (reason := lost(job, place)) is not None:
            say(reason)
            remove(job, place)
            return exits.EXIT_PREEMPTED
        found = hosts(job, place)
        if found is None:
            silent += 1
            if silent >= UNREACHABLE_POLLS:
                say(f"not all hosts have answered {silent} times in a row")
                return 255
        else:
            silent = 0
            ended = [h for h in found if h.state != "running"]
            bad = sorted((h for h in ended if h.code or h.state == "idle"), key=lambda h: h.at)
            if not bad and len(ended) == len(found):
                return exits.EXIT_DONE
            if bad and (len(ended) == len(found) or waited >= GRACE_POLLS):
                return verdict(job, place, bad[0], len(found) - len(ended))
            waited += bool(bad)
        time.sleep(poll)


def verdict(job: Job, place: Place, first: Host, running: int) -> int:
    """The exit code of the host that ended first, whose output is shown if it is a failure; ends the others."""
    code = first.code if first.state == "exited" else 1
    also = f"; {running} hosts still ran, and are ended" if running else ""
    say(f"{first.name} ended with exit code {code}{also}")
    if code != exits.EXIT_PREEMPTED:
        worker = re.search(r"-w-(\d+)$", first.name)  # how Google names the machines of a slice
        every(job, gcloud.log(job, place, worker[1] if worker else "all"))
    every(job, gcloud.stop(job, place))
    return code


def attempts(job: Job, place: Place, poll: float) -> Callable[[], int]:
    """The function that runs the job once. The first call finds a command that an earlier launcher has started."""
    looking = True

    def attempt() -> int:
        nonlocal looking
        if (code := acquire(job, place, poll)) is not None:
            return code
        found = hosts(job, place) or []
        if other := [h for h in found if h.state == "running" and h.id != gcloud.identity(job, place)]:
            raise UserError(
                f"{other[0].name} runs another command or another commit; wait for it, end it by --delete, "
                "or choose another --name"
            )
        ours = found and all(h.id == gcloud.identity(job, place) for h in found)
        running, bad = [h.state == "running" for h in found], [h for h in found if h.code]
        if ours and looking and bad and not any(running):  # whoever gives the command again has seen to that
            say(f"it has ended before, with exit code {min(bad, key=lambda h: h.at).code}; it runs again")
        if ours and ((looking and (any(running) or not bad)) or all(running)):
            say("it has been started before; watching")
        elif all(every(job, steps(job, place)) for steps in (gcloud.send, gcloud.setup, gcloud.start)):
            say(f"it runs on {job.on.hosts} hosts")
        else:
            say("not every host could be set up; the reason stands above")
            return 1 if lost(job, place) is None else exits.EXIT_PREEMPTED
        looking = False
        code = watch(job, place, poll)
        if code == exits.EXIT_PREEMPTED:
            time.sleep(poll)  # the state of the machines follows the signal
        return code

    return attempt


def go(job: Job, place: Place, keep: bool, poll: float) -> int:
    os.makedirs("build", exist_ok=True)
    if jobs.run(gcloud.archive(job, place), job).returncode:
        raise UserError(f"git could not pack {place.commit}; its reason stands above")

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        code = supervise(job, attempts(job, place, poll), poll)
    except KeyboardInterrupt:
        watched = "the job and its machines go on; the same command watches again, --delete ends both"
        raise exits.Stopped(watched) from None
    except Deleted as e:
        say(f"{e}; what it had saved is in {job.workdir or 'its run directory'}")
        return 1
    except BaseException:
        delete = shlex.join(gcloud.delete(job, place).argv)
        say(f"the machines of {job.name}, if there are any, are left as they are, and cost until: {delete}")
        raise
    if keep:
        say(f"{job.name} is kept, and costs until it is deleted by --delete")
    else:
        remove(job, place)
    say({exits.EXIT_DONE: "done"}.get(code, f"ended with exit code {code}"))
    return code


def look(asked: str, worker: str, job: Job, place: Place) -> int:
    """What `asked`, one of status, logs and delete, does; worker: whose logs, a number or all."""
    if asked == "delete":
        return jobs.run(gcloud.delete(job, place), job).returncode
    if asked == "logs":
        return 0 if every(job, gcloud.log(job, place, worker)) else 1
    for queued in [True, False] if place.queued else [False]:
        found = states(place, queued) or {}
        for name in [job.name] if queued else gcloud.nodes(job):
            print(f"{'request ' if queued else ''}{name}: {found.get(name, GONE)}")
    return 0 if every(job, gcloud.ask(job, place)) else 1


def main(words: list[str]) -> int:
    name = job_flags.name()
    for flag, example in ((PROJECT, "my-project"), (ZONE, "us-east5-a")):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing: --{flag.name}={example}")
    queued = QUEUED.value or tpu_flags.SLICES.value > 1
    place = Place(PROJECT.value, ZONE.value, "HEAD", tpu_flags.SPOT.value, queued, RUNTIME.value, tuple(REQUEST.value))
    jobs.check_words("--request", place.options)
    where = "it comes with the Google Cloud SDK"
    if (asked := cluster_flags.asked()) is not None:
        jobs.need("gcloud", where)
        any_size = tpus.find("v4-8", tpu_flags.SLICES.value)
        return look(asked, cluster_flags.WORKER.value, Job(name, (), any_size), place)
    tpu = tpu_flags.chosen()
    job = job_flags.job(words, tpu, processes=tpu.hosts, shared_disk=False)
    if not job_flags.DRY_RUN.value:
        jobs.need("gcloud", where)
    jobs.check_definition(job, sys.executable)
    place = dataclasses.replace(place, commit=jobs.git_lines("rev-parse", "HEAD")[0])
    if (left_out := jobs.uncommitted()) is not None:
        job_flags.note(left_out)
    if job_flags.DRY_RUN.value:
        print(plan(job, place, KEEP.value))
        return 0
    if states(place, place.queued) is None:
        raise UserError(f"gcloud does not list what is in {place.zone} of {place.project}; its reason stands above")
    return go(job, place, KEEP.value, POLL_SECONDS.value)


if __name__ == "__main__":
    common.run(main, takes_command=True)
