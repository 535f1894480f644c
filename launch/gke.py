"""Submits a job to Google Kubernetes Engine, as a JobSet: one pod a host, one job a slice, restarted as a whole.

usage:
  python -m launch.gke --name=NAME --accelerator=TYPE --image=IMAGE [options] -- launch.train ARGUMENTS
  python -m launch.gke --name=NAME --status | --logs | --delete

It goes to the cluster that kubectl is set to, which needs JobSet 0.10 or newer and node pools of the accelerator. The
code is in the image, which launch/Dockerfile makes. A job that was preempted (exit code 42, or its node was taken) is
restarted without a limit; one that failed up to --max_failures times; bad input and divergence (2 and 3) end it.

--accelerator is a slice by name: v5p-256 (128 chips, 32 hosts), v5e-16, v6e-256; --slices joins several. --queue names
a queue of Kueue. --env=NAME becomes a Secret of the cluster, which pods refer to; its value is in no manifest.

examples:
  python -m launch.gke --name=ppo1 --accelerator=v5p-256 --spot --image=us-docker.pkg.dev/my-project/jaxlm/jaxlm:1 \\
      --env=HF_TOKEN -- launch.train --experiment=ppo_tiny --set=mesh.fsdp=none \\
      --set=parent=gs://mine/sft --workdir=gs://mine/ppo1
  python -m launch.gke --name=ppo1 --status

Exit codes: 0 submitted (or shown); 2 bad definition or input.
"""

import dataclasses
import json

from absl import flags

from jaxlm.config import UserError
from jaxlm.run import exits
from launch import cluster_flags, common, job_flags, tpu_flags, tpus
from launch import job as jobs
from launch.job import NEVER_AGAIN, Job, Step

IMAGE = flags.DEFINE_string("image", None, "Container image with the code, as launch/Dockerfile makes it.")
NAMESPACE = flags.DEFINE_string("namespace", "default", "Kubernetes namespace.")
QUEUE = flags.DEFINE_string("queue", None, "Queue of Kueue that admits the job.")

LABEL = "jobset.sigs.k8s.io/jobset-name"
CONTAINER = "job"
SAVE_SECONDS = 300  # between the signal to save and the end, where the cluster can choose


@dataclasses.dataclass(frozen=True)
class Place:
    image: str
    namespace: str = "default"
    spot: bool = False
    queue: str | None = None


def environment(job: Job) -> list[dict]:
    secret = f"{job.name}-env"
    shown = [{"name": name, "value": value} for name, value in job.env]
    return shown + [{"name": n, "valueFrom": {"secretKeyRef": {"name": secret, "key": n}}} for n in job.secrets]


def pod(job: Job, place: Place) -> dict:
    """The pod of one host."""
    selector = {
        "cloud.google.com/gke-tpu-accelerator": tpus.GENERATIONS[job.on.generation].gke,
        "cloud.google.com/gke-tpu-topology": job.on.topology,
    }
    spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    container = {
        "name": CONTAINER,
        "image": place.image,
        "command": ["python", "-m", *job.command],
        "env": environment(job),
        "resources": {"limits": {"google.com/tpu": job.on.chips_per_host}},
        "securityContext": {"privileged": True},  # a TPU's driver locks more memory than others may
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    return {
        "restartPolicy": "Never",  # one pod that starts again by itself would wait for hosts that do not
        "terminationGracePeriodSeconds": SAVE_SECONDS,
        "nodeSelector": selector | ({spot["key"]: spot["value"]} if place.spot else {}),
        "tolerations": [spot] if place.spot else [],
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],  # between the loader's processes
    }


def manifest(job: Job, place: Place) -> dict:
    """The JobSet of a job on `Tpu` slices.

    The exit codes become the reason that a slice's job fails for, and that decides: rule 0 of the pods ends the JobSet,
    the other two restart it without counting, and a failure that no rule knows counts towards maxRestarts.
    """
    codes = {"containerName": CONTAINER, "operator": "In"}
    pod_rules = [
        {"action": "FailJob", "onExitCodes": codes | {"values": list(NEVER_AGAIN)}},
        {"action": "FailJob", "onExitCodes": codes | {"values": [exits.EXIT_PREEMPTED]}},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]
    reason = {"onJobFailureReasons": ["PodFailurePolicy"]}
    never = {"name": "NeverAgain", "action": "FailJobSet", "onJobFailureMessagePatterns": ["rule at index 0$"]} | reason
    preempted = {"name": "Preempted", "action": "RestartJobSetAndIgnoreMaxRestarts"} | reason
    one_slice = {
        "parallelism": job.on.hosts_per_slice,
        "completions": job.on.hosts_per_slice,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": pod_rules},
        "template": {"spec": pod(job, place)},
    }
    metadata = {"name": job.name, "namespace": place.namespace}
    metadata |= {"labels": {"kueue.x-k8s.io/queue-name": place.queue}} if place.queue else {}
    # A slice is a node pool, and takes it alone.
    metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.max_failures,
                "restartStrategy": "BlockingRecreate",  # new hosts must not meet old ones
                "rules": [never, preempted],
            },
            "replicatedJobs": [{"name": "slice", "replicas": job.on.slices, "template": {"spec": one_slice}}],
        },
    }


def kubectl(place: Place, *words: str) -> tuple[str, ...]:
    return ("kubectl", f"--namespace={place.namespace}", *words)


def steps(job: Job, place: Place) -> list[Step]:
    """The Secret, if there is something to keep, and the JobSet."""

    def secret(values) -> str:
        metadata = {"name": f"{job.name}-env", "namespace": place.namespace}
        return json.dumps({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": dict(values)})

    # Applied by the server: the client's way would keep a copy of the values in an annotation.
    words = kubectl(place, "apply", "--server-side", "--force-conflicts", "-f", "-")
    first = [Step(words, "what only pods of this namespace may read", secret)] if job.secrets else []
    text = json.dumps(manifest(job, place), indent=2)
    return [*first, Step(kubectl(place, "create", "-f", "-"), "the job", lambda _: text)]


def condition(jobset: dict) -> str:
    """One line about a JobSet as kubectl gives it."""
    status = jobset.get("status", {})
    restarts = f"{status.get('restarts', 0)} restarts, {status.get('restartsCountTowardsMax', 0)} after failures"
    if end := status.get("terminalState"):
        said = [c.get("message", "") for c in status.get("conditions", []) if c.get("type") == end]
        return f"{end.lower()}, {restarts}{': ' + said[0] if said else ''}"
    if jobset["spec"].get("suspend"):
        return f"suspended: it waits until its queue admits it, {restarts}"
    ready = sum(r.get("ready", 0) for r in status.get("replicatedJobsStatus", []))
    slices = sum(r.get("replicas", 1) for r in jobset["spec"]["replicatedJobs"])
    return f"{ready} of {slices} slices ready, {restarts}"


def look(asked: str, worker: str, name: str, place: Place) -> int:
    """What `asked`, one of status, logs and delete, does; worker: whose logs, a number or all."""
    nothing = Job(name, (), tpus.find("v4-8"))
    if asked == "delete":
        targets = (f"jobset/{name}", f"secret/{name}-env")
        return jobs.run(Step(kubectl(place, "delete", "--ignore-not-found", *targets)), nothing).returncode
    if asked == "logs":
        which = f"{LABEL}={name}" + (f",batch.kubernetes.io/job-completion-index={worker}" if worker != "all" else "")
        words = kubectl(place, "logs", f"--selector={which}", "--tail=50", "--prefix", "--max-log-requests=1000")
        return jobs.run(Step(words), nothing).returncode
    done = jobs.run(Step(kubectl(place, "get", "jobset", name, "--output=json")), nothing, capture=True)
    if done.returncode:
        raise UserError(f"no job {name!r} to be seen: {jobs.last_line(done)}")
    print(f"{name}: {condition(json.loads(done.stdout))}")
    return jobs.run(
        Step(kubectl(place, "get", "pods", f"--selector={LABEL}={name}", "--output=wide")), nothing
    ).returncode


def main(words: list[str]) -> int:
    place = Place(IMAGE.value or "", NAMESPACE.value, tpu_flags.SPOT.value, QUEUE.value)
    where = "it comes with the Google Cloud SDK"
    if (asked := cluster_flags.asked()) is not None:
        jobs.need("kubectl", where)
        return look(asked, cluster_flags.WORKER.value, job_flags.name(), place)
    tpu = tpu_flags.chosen()
    if not IMAGE.value:
        raise UserError("--image is missing: --image=HOST/PROJECT/jaxlm:TAG, made from launch/Dockerfile")
    if job_flags.MAX_PREEMPTIONS.present:
        raise UserError("--max_preemptions: the cluster restarts a preempted job without a limit; leave it out")
    job = job_flags.job(words, tpu, processes=tpu.hosts, shared_disk=False)
    if not job_flags.ready(job, steps(job, place), "kubectl", where):
        return 0
    for step in steps(job, place):
        if jobs.run(step, job).returncode:
            raise UserError("kubectl refused it, its reason stands above; an old job of this name goes by --delete")
    print(f"submitted {job.name}: {tpu.slices} slices of {tpu.hosts_per_slice} hosts; --status, --logs, --delete")
    return 0


if __name__ == "__main__":
    common.run(main, takes_command=True)
