"""The description of a job: what is refused and with which words, what is shown, and the goldens of dry runs."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from jaxlm.config import UserError
from launch import job, secrecy, slurm, tpus
from launch.job import Job, Processes, Step
from tests.goldens import make_jobs
from tests.launch import stubs
from tests.source import ROOT

TRAIN = ("launch.train", "--experiment=pretrain_tiny", "--workdir=gs://b/a")


# -------------------------------------------------------------------------------------------------------- accelerators
@pytest.mark.parametrize(("name", "chips", "hosts", "topology", "gcloud"), [
    ("v5p-8", 4, 1, "2x2x1", "v5p-8"),
    ("v5p-256", 128, 32, "4x4x8", "v5p-256"),
    ("v5p-1024", 512, 128, "8x8x8", "v5p-1024"),
    ("v4-32", 16, 4, "2x2x4", "v4-32"),
    ("v5e-1", 1, 1, "1x1", "v5litepod-1"),
    ("v5e-8", 8, 1, "2x4", "v5litepod-8"),
    ("v5litepod-16", 16, 4, "4x4", "v5litepod-16"),
    ("v6e-256", 256, 64, "16x16", "v6e-256"),
])  # fmt: skip
def test_accelerators(name, chips, hosts, topology, gcloud):
    tpu = tpus.find(name)
    assert (tpu.chips, tpu.hosts, tpu.topology, tpu.gcloud_type) == (chips, hosts, topology, gcloud)
    assert tpus.find(name, 3).hosts == 3 * hosts and tpu.hosts * tpu.chips_per_host == chips


@pytest.mark.parametrize(("name", "words"), [
    ("v5p-100", ["TensorCores, 2 a chip", "nearest: v5p-64, v5p-128"]),
    ("v6e-12", ["v6e counts chips", "nearest: v6e-8, v6e-16"]),
    ("v5x-16", ["nearest:", "v5e-16"]),
    ("h100", ["unknown TPU slice 'h100'", "valid:"]),
])  # fmt: skip
def test_unknown_accelerators_are_explained(name, words):
    with pytest.raises(UserError) as e:
        tpus.find(name)
    assert all(w in str(e.value) for w in words), str(e.value)


# ---------------------------------------------------------------------------------------------------- what is refused
def test_commands():
    assert job.command(["python", "-m", *TRAIN]) == job.command(list(TRAIN)) == TRAIN
    with pytest.raises(UserError, match="the command is missing: end with --"):
        job.command([])
    with pytest.raises(UserError, match=r"'launch\.trian' is no program of ours; nearest: launch\.train"):
        job.command(["launch.trian"])
    with pytest.raises(UserError, match="'rm' is no program of ours"):
        job.command(["rm", "-rf"])
    with pytest.raises(UserError, match=r"'launch\.train\.py' is no program of ours; nearest: launch\.train"):
        job.command(["launch.train.py"])


@pytest.mark.parametrize("words", [
    ("--workdir=runs/a",), ("--workdir", "runs/a"), ("-workdir=runs/a",), ("--workdir=gs://b/a", "--workdir", "runs/a"),
])  # fmt: skip
def test_a_workdir_that_would_be_lost_however_it_is_given(words):
    with pytest.raises(UserError, match="--workdir=runs/a would be lost with its machine"):
        job.validate(Job("a", ("launch.tour", *words, "--scale=smoke"), tpus.find("v5e-1")), 1, False)


@pytest.mark.parametrize(("texts", "words"), [
    (["HF_TOKEN=hf_x"], "would be seen by others; export it, and give --env=HF_TOKEN alone"),
    (["UNSET"], "no such variable here; export it"),
    (["A-B=1"], "--env takes NAME or NAME=VALUE, got 'A-B'"),
    (["LINES_"], "more than one line"),
    (["A=1", "A=2"], "--env=A is given twice"),
])  # fmt: skip
def test_variables_that_are_refused(texts, words):
    with pytest.raises(UserError, match=re.escape(words)):
        job.variables(texts, {"LINES_": "a\nb"})


@pytest.mark.parametrize("name", [
    "HF_TOKEN", "DB_PASS", "PGPASS", "PGPASSWORD", "MYSQL_PWD", "AUTH", "SSH_PASSPHRASE", "AZURE_KEY1", "API_KEY",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "DATABASE_URL", "SLACK_WEBHOOK", "SLACK_WEBHOOK_URL", "GITHUB_PAT",
    "MY_CREDENTIALS", "apikey", "SENTRY_DSN",
])  # fmt: skip
def test_names_of_secrets(name):
    with pytest.raises(UserError, match="would be seen by others"):
        job.variables([f"{name}=abc"], {})


@pytest.mark.parametrize("value", [
    "postgres://me:abc@host/db", "https://hooks.slack.com/services/T0/B0/x", "hf_abcdefghijklmnopqrst",
    "sk-abcdefghijklmnopqrst", "AKIAABCDEFGHIJKLMNOP", "x eyJhbGciOiJI.eyJzdWIiOi",
])  # fmt: skip
def test_forms_of_secrets(value):
    with pytest.raises(UserError, match="would be seen by others"):
        job.variables([f"PLACE={value}"], {})


@pytest.mark.parametrize("text", [
    "TOKENIZERS_PARALLELISM=false", "HF_HUB_DISABLE_IMPLICIT_TOKEN=1", "XLA_FLAGS=--xla_a=1", "PROXY=http://h:80/",
    "PYTHONPATH=/a:/b", "LIBTPU_INIT_ARGS=--a=true", "AUTHOR=me", "KEYBOARD=us",
])  # fmt: skip
def test_variables_that_are_no_secrets(text):
    assert job.variables([text], {})[0] == (tuple(text.split("=", 1)),)


@pytest.mark.parametrize(("word", "name"), [
    ("--set=tools.search.token=abc", "token"),
    ("--set=objective.reward=Judge(url=x,api_key=abc)", "api_key"),
    ("--password=abc", "password"),
    ("metadata=startup-script=export HF_TOKEN=abc", "HF_TOKEN"),
    ("--set=data.path=s3://me:abc@host/x", "path"),
    ("hf_abcdefghijklmnopqrst", "a part"),
])  # fmt: skip
def test_a_secret_in_a_command_is_refused_and_not_repeated(word, name):
    described = Job("a", (*TRAIN, word), Processes(1))
    with pytest.raises(UserError, match=f"the command: the value of {name} looks like a secret") as e:
        job.validate(described, 1, False)
    assert "abc" not in str(e.value)


@pytest.mark.parametrize(
    "word", ["--judge_key=OPENAI_API_KEY", "--set=a.token=none", "--workdir=gs://b/hf_tokenizer_metaspace"]
)
def test_words_that_hold_no_secret(word):
    assert secrecy.found(word) is None


def test_no_path_of_an_experiment_looks_like_a_secret():
    def paths(node, at=""):
        for k, v in node.items() if isinstance(node, dict) else ():
            yield f"{at}{k}"
            yield from paths(v, f"{at}{k}.")

    files = sorted((ROOT / "tests" / "goldens" / "experiments").glob("*.json"))
    found = {path for file in files for path in paths(json.loads(file.read_text()))}
    assert len(found) > 100
    assert not [path for path in found if secrecy.found(f"--set={path}=8x") is not None]


def test_variables():
    assert job.variables(["A=b=c", "KEY_", "B="], {"KEY_": "x"}) == ((("A", "b=c"), ("B", "")), ("KEY_",))


@pytest.mark.parametrize(("changes", "processes", "shared", "words"), [
    ({"max_failures": -1}, 1, True, "0 or more"),
    ({"command": ("launch.sweep",)}, 2, True, "launch.sweep runs in one process, not in 2"),
    ({"command": ("launch.train",)}, 1, True, "--workdir=DIR is missing behind the --"),
    ({"command": ("launch.train", "--workdir=runs/a")}, 4, False, "would be lost with its machine"),
])  # fmt: skip
def test_jobs_that_are_refused(changes, processes, shared, words):
    described = Job(**({"name": "a", "command": TRAIN, "on": Processes(processes)} | changes))
    with pytest.raises(UserError, match=re.escape(words)):
        job.validate(described, processes, shared)


@pytest.mark.parametrize("name", ["", "A", "1a", "a_b", "a-", "a" * 41])
def test_names_that_are_refused(name):
    with pytest.raises(UserError, match="lower case"):
        job.check_name(name)


def test_missing_tool(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="gcloud is not installed, or not on PATH"):
        job.need("gcloud", "it comes with the Google Cloud SDK")


def launcher(program: str, *flags: str, path: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | {"PATH": path}
    command = [sys.executable, "-m", f"launch.{program}", *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


TOUR = ("--", "launch.tour", "--workdir=gs://b/a")


@pytest.mark.parametrize(("program", "flags", "words"), [
    ("tpu_vm", ["--name=a", "--project=p", *TOUR], "--zone is missing"),
    ("tpu_vm", ["--name=a", "--project=p", "--zone=z", "--accelerator=v5p-8", *TOUR], "gcloud is not installed"),
    ("slurm", ["--name=a", "--nodes=0", "--gpus_per_node=8", *TOUR], "--nodes=N is needed, 1 or more; got 0"),
    ("gke", ["--name=a", "--accelerator=v5p-8", *TOUR], "--image is missing"),
    ("gke", ["--name=a", "--accelerator=v5p-8", "--image=i", "--max_preemptions=3", *TOUR], "leave it out"),
    ("slurm", ["--name=a", "--logs", "--worker=3"], "--worker: under Slurm all processes write into one log"),
    ("gke", ["--name=a", "--status", "--logs"], "--status and --logs are one or the other"),
    ("local", ["--processes=0", *TOUR], "a job has one process at least"),
])  # fmt: skip
def test_bad_input_is_one_line(program, flags, words):
    done = launcher(program, *flags, path="/nonexistent")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr


def test_a_bad_definition_costs_no_machines(tmp_path, monkeypatch):
    stubs.install(tmp_path / "cloud", monkeypatch, "a")
    flags = ("--name=a", "--image=i", "--accelerator=v5p-8", "--", "launch.train", "--experiment=pretrain_tinny")
    done = launcher("gke", *flags, "--workdir=gs://b/a", path=os.environ["PATH"])
    assert done.returncode == 2 and not stubs.calls(tmp_path / "cloud")
    assert "the command does not start" in done.stderr and "nearest: pretrain_tiny" in done.stderr


# ------------------------------------------------------------------------------------------------------ what is shown
def test_a_step_is_shown_as_it_would_be_typed():
    step = Step(("tool", "--a=b c", "x"), "why", lambda values: f"K={values['K']}")
    assert job.show(step, ("K",)) == "# why\ntool '--a=b c' x <<'END'\nK=***\nEND"


def test_goldens():
    """A change of what is run shows in review: python -m tests.goldens.make_jobs"""
    written = {p.name: p.read_text(encoding="utf-8") for p in make_jobs.FOLDER.iterdir()}
    assert written == {name: text.rstrip("\n") + "\n" for name, text in make_jobs.dry_runs().items()}


def scripts(tmp_path) -> list[str]:
    """Every shell script there is or that is rendered, as files."""
    batch = tmp_path / "batch.sh"
    batch.write_text(slurm.script(make_jobs.ppo(job.Gpus(32, 8), "runs"), slurm.Place("24:00:00")))
    return [str(p) for p in (*sorted((ROOT / "launch").glob("*.sh")), *sorted(make_jobs.FOLDER.glob("*.sh")), batch)]


def test_the_shell_can_read_every_script(tmp_path):
    for path in scripts(tmp_path):
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck(tmp_path):
    done = subprocess.run(["shellcheck", "-s", "bash", *scripts(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
