"""launch.gke: what its manifest says of exit codes, hosts and secrets, and what it makes of kubectl's answers."""

import dataclasses
import json

import pytest

from jaxlm.config import UserError
from launch import gke, tpus
from launch import job as jobs
from launch.job import Job
from tests.launch import stubs

JOB = Job(
    "a", ("launch.train", "--experiment=x", "--workdir=gs://b/a"), tpus.find("v6e-16", 2), (("TAG", "x"),), ("K",)
)
PLACE = gke.Place("host/image:1", queue="team")


def slice_of(manifest: dict) -> dict:
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def outcome(manifest: dict, code: int | None) -> str:
    """What Kubernetes does when a pod ends with `code`, or None for a node that was taken, by its documented rules."""
    rules = slice_of(manifest)["podFailurePolicy"]["rules"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for i, rule in enumerate(rules):
        if (code in rule["onExitCodes"]["values"]) if "onExitCodes" in rule else code is None:
            reason, message = "PodFailurePolicy", f"Container job for pod x failed, matching FailJob rule at index {i}"
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        said = any(message.endswith(p.removesuffix("$")) for p in rule.get("onJobFailureMessagePatterns", [message]))
        if reason in rule["onJobFailureReasons"] and said:
            return rule["action"]
    return "RestartJobSet"


def test_exit_codes():
    manifest = gke.manifest(dataclasses.replace(JOB, max_failures=5), PLACE)
    assert {code: outcome(manifest, code) for code in (2, 3, 42, None, 1, 137)} == {
        2: "FailJobSet",
        3: "FailJobSet",
        42: "RestartJobSetAndIgnoreMaxRestarts",
        None: "RestartJobSetAndIgnoreMaxRestarts",
        1: "RestartJobSet",
        137: "RestartJobSet",
    }
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 5


def test_hosts_and_chips():
    manifest = gke.manifest(JOB, PLACE)
    one = slice_of(manifest)
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert one["parallelism"] == one["completions"] == 4
    pod = one["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    assert "labels" not in gke.manifest(JOB, gke.Place("i"))["metadata"]


def test_a_secret_is_in_its_own_object_alone(tmp_path, monkeypatch, capfd):
    cluster = stubs.install(tmp_path / "cluster", monkeypatch, "a")
    monkeypatch.setenv("K", "very secret")
    secret, jobset = gke.steps(JOB, PLACE)
    for step in (secret, jobset):
        assert jobs.run(step, JOB).returncode == 0
        assert "very" not in jobs.show(step, JOB.secrets)
    first, _, rest = (cluster / "applied").read_text().partition("}{")
    assert json.loads(first + "}")["stringData"] == {"K": "very secret"} and "very" not in rest
    assert "very" not in "".join(stubs.calls(cluster)) + "".join(capfd.readouterr())
    assert len(gke.steps(dataclasses.replace(JOB, secrets=()), PLACE)) == 1


@pytest.mark.parametrize(("spec", "status", "expected"), [
    ({"suspend": True}, {}, "suspended: it waits until its queue admits it, 0 restarts"),
    ({}, {"restarts": 2, "restartsCountTowardsMax": 1, "replicatedJobsStatus": [{"ready": 1}]},
     "1 of 2 slices ready, 2 restarts, 1 after failures"),
    ({}, {"terminalState": "Failed", "restarts": 3, "conditions": [{"type": "Failed", "message": "reached max"}]},
     "failed, 3 restarts, 0 after failures: reached max"),
])  # fmt: skip
def test_status(tmp_path, monkeypatch, capfd, spec, status, expected):
    cluster = stubs.install(tmp_path / "cluster", monkeypatch, "a")
    jobset = {"spec": {"replicatedJobs": [{"replicas": 2}]} | spec, "status": status}
    (cluster / "jobset.json").write_text(json.dumps(jobset))
    assert gke.look("status", "0", "a", PLACE) == 0
    assert f"a: {expected}" in capfd.readouterr().out
    assert stubs.calls(cluster, "get pods --selector=jobset.sigs.k8s.io/jobset-name=a")


def test_a_job_that_is_not_there(tmp_path, monkeypatch):
    stubs.install(tmp_path / "cluster", monkeypatch, "a")
    with pytest.raises(UserError, match="no job 'a' to be seen: jobsets not found"):
        gke.look("status", "0", "a", PLACE)


def test_logs_and_delete(tmp_path, monkeypatch):
    cluster = stubs.install(tmp_path / "cluster", monkeypatch, "a")
    for asked, worker in (("logs", "3"), ("logs", "all"), ("delete", "0")):
        assert gke.look(asked, worker, "a", PLACE) == 0
    one, every, delete = (line.split("kubectl --namespace=default ")[1] for line in stubs.calls(cluster))
    assert "jobset-name=a,batch.kubernetes.io/job-completion-index=3 " in one and "completion-index" not in every
    assert delete == "delete --ignore-not-found jobset/a secret/a-env"
