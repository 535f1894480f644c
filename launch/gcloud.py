"""The gcloud commands that a job on TPU VMs consists of, as data: launch/tpu_vm.py runs them."""

import dataclasses
import hashlib
import shlex

from launch.job import Job, Step
from launch.tpus import GENERATIONS

# Seconds after which a command is given up: one connection that hangs must not stop the watch over all the others.
LIST_SECONDS, LOOK_SECONDS, START_SECONDS, MAKE_SECONDS = 120, 300, 900, 3600


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and how machines are asked for. commit: what of the code is sent. options: as --request gives them."""

    project: str
    zone: str
    commit: str = "HEAD"
    spot: bool = False
    queued: bool = False
    runtime: str | None = None
    options: tuple[str, ...] = ()


def gcloud(place: Place, *words: str) -> tuple[str, ...]:
    return ("gcloud", "compute", "tpus", *words, f"--project={place.project}", f"--zone={place.zone}", "--quiet")


def nodes(job: Job) -> list[str]:
    """Names of the TPU VMs: one a slice."""
    return [job.name] if job.on.slices == 1 else [f"{job.name}-{i}" for i in range(job.on.slices)]


def identity(job: Job, place: Place) -> str:
    """Tells this command of this code from another one that may run on the same machines."""
    text = repr((place.commit, job.command, job.env, job.secrets))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def create(job: Job, place: Place) -> Step:
    """For one slice it returns when the machines are there, for a request at once."""
    runtime = place.runtime or GENERATIONS[job.on.generation].runtime
    options = [f"--{o}" for o in place.options] + (["--spot"] if place.spot else [])
    kind = f"--accelerator-type={job.on.gcloud_type}"
    if not place.queued:
        words = gcloud(place, "tpu-vm", "create", job.name, kind, f"--version={runtime}", *options)
        return Step(words, "the machines", seconds=MAKE_SECONDS)
    several = [f"--node-count={job.on.slices}", f"--node-prefix={job.name}"]
    which = [f"--node-id={job.name}"] if job.on.slices == 1 else several
    words = ("queued-resources", "create", job.name, *which, kind, f"--runtime-version={runtime}", *options, "--async")
    why = "the request for machines, which waits until there is capacity"
    return Step(gcloud(place, *words), why, seconds=START_SECONDS)


def listing(place: Place, queued: bool) -> Step:
    kind, state = ("queued-resources", "state.state") if queued else ("tpu-vm", "state")
    words = gcloud(place, kind, "list", f"--format=csv[no-heading](name.basename(),{state})")
    return Step(words, "how they are", seconds=LIST_SECONDS)


def delete(job: Job, place: Place) -> Step:
    if place.queued:
        words = gcloud(place, "queued-resources", "delete", job.name, "--force")
        return Step(words, "the request and its machines", seconds=MAKE_SECONDS)
    return Step(gcloud(place, "tpu-vm", "delete", job.name), "the machines", seconds=MAKE_SECONDS)


def archive(job: Job, place: Place) -> Step:
    words = ("git", "archive", "--format=tar.gz", f"--prefix={job.name}/", f"--output=build/{job.name}.tar.gz")
    return Step((*words, place.commit), "the code, as it is committed")


def ssh(place: Place, node: str, worker: str, command: str, why: str, stdin=None, seconds=None) -> Step:
    words = gcloud(place, "tpu-vm", "ssh", node, f"--worker={worker}", f"--command={command}")
    return Step(words, why, stdin, seconds or LOOK_SECONDS)


def send(job: Job, place: Place) -> list[Step]:
    words = ("tpu-vm", "scp", f"build/{job.name}.tar.gz")
    sent = [gcloud(place, *words, f"{node}:", "--worker=all") for node in nodes(job)]
    return [Step(words, "to every host", seconds=START_SECONDS) for words in sent]


def setup(job: Job, place: Place) -> list[Step]:
    command = f"tar -xzf {job.name}.tar.gz && bash {job.name}/launch/worker.sh setup"
    why = "the environment on every host"
    return [ssh(place, node, "all", command, why, seconds=MAKE_SECONDS) for node in nodes(job)]


def start(job: Job, place: Place) -> list[Step]:
    """Starts the command on every host. Secrets go to each host by itself: connections share no standard input."""
    shown = ["env", *(f"{name}={value}" for name, value in job.env)] if job.env else []
    words = [*shown, "bash", f"{job.name}/launch/worker.sh", "start", identity(job, place), *job.command]
    workers = [str(i) for i in range(job.on.hosts_per_slice)] if job.secrets else ["all"]
    stdin = (lambda values: "".join(f"{k}={v}\n" for k, v in values.items())) if job.secrets else None
    command = shlex.join(words)
    return [ssh(place, n, w, command, "the command", stdin, START_SECONDS) for n in nodes(job) for w in workers]


def ask(job: Job, place: Place) -> list[Step]:
    script = f"{job.name}/launch/worker.sh"
    command = f"if [ -e {script} ]; then bash {script} state; else echo host idle; fi"
    return [ssh(place, node, "all", command, "how the command is, on every host") for node in nodes(job)]


def log(job: Job, place: Place, worker: str, lines: int = 50) -> list[Step]:
    command = f"bash {job.name}/launch/worker.sh log {lines}"
    return [ssh(place, node, worker, command, "the last lines of its output") for node in nodes(job)]


def stop(job: Job, place: Place) -> list[Step]:
    command = f"bash {job.name}/launch/worker.sh stop"
    return [ssh(place, node, "all", command, "ends what still runs") for node in nodes(job)]
