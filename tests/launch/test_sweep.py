"""launch.sweep from its flags to its answer, with training itself replaced by numbers that are known.

The program runs in a process of its own, for flags are global. `driver` calls it once for each scenario.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.source import ROOT

DRIVER = '''
import contextlib, io, json, re, sys
from absl import flags
from jaxlm import config, storage
from jaxlm.config import UserError
from launch import sweep

BPB = {"baseline": 2.0, "no_rope": 2.2, "muon": 1.9}
codes, trained = {}, []


class Trained:
    """Stands for the process of launch.train: writes what a run leaves behind."""

    def __init__(self, command, **_):
        assert command[1:3] == ["-m", "launch.train"], command
        flag = lambda name: [a.split("=", 1)[1] for a in command if a.startswith(f"--{name}=")]
        workdir, e = flag("workdir")[0], config.resolve(flag("experiment")[0], flag("edit"), flag("set"))
        variant, self.code = workdir.split("/")[-2], codes.get("/".join(workdir.split("/")[-2:]), 0)
        trained.append("/".join(workdir.split("/")[-2:]))
        if self.code in (0, 3):
            bound = config.override(e, {"model.vocab_size": 2048})
            storage.write_text(f"{workdir}/config.json", config.to_json(bound))
        if self.code == 0:
            value = BPB[variant] + 0.1 * e.seed + 0.001 * (e.seed % 2) * (variant != "baseline")
            record = {"step": e.train.steps, "seconds": 1.0, "eval/all/bits_per_byte": value, "eval/all/loss": 3.0}
            storage.append_jsonl(f"{workdir}/metrics.jsonl", record)
        if self.code == 2:
            print("error: no such file: corpus.txt", file=open(f"{workdir}/train.log", "a"))

    def wait(self):
        return self.code


def train_together(runs, base):
    """Stands for `replicas.train_together`: the same, of each run in turn."""
    together.append(["/".join(workdir.split("/")[-2:]) for workdir in runs])
    for workdir, e in runs.items():
        flags = [f"--experiment={base_name}", f"--workdir={workdir}", f"--set=seed={e.seed}"]
        code = Trained(["", "-m", "launch.train", *flags, "--set=model.vocab_size=2048"]).wait()
        if code:
            sweep.exits.record_diverged(workdir)
    return 0


sweep.replicas.train_together, base_name, together = train_together, "pretrain_tiny", []
sweep.subprocess.Popen = Trained
for scenario in json.load(sys.stdin):
    codes, trained[:], together[:] = scenario.get("codes", {}), [], []
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS(["sweep", *scenario["flags"]])
    out, err, failed = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = sweep.main()
        except UserError as e:
            code, failed = 2, str(e)
    print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue(), "error": failed, "trained": trained,
                      "together": together}))
'''

MODEL = ["--experiment=pretrain_tiny", "--set=model.vocab_size=2048", "--seeds=0,1,2", "--edit_grid=no_rope,muon"]
TAUGHT = ["--experiment=distill_tiny", "--set=objective.teacher=nowhere", "--set=data.tokenizer=Bytes()",
          "--set=model.vocab_size=2048", "--seeds=0,1", "--edit_grid=muon"]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    a, b = str(root / "a"), str(root / "b")
    flags = [*MODEL, f"--workdir={a}"]
    scenarios = {
        "dry": {"flags": [*flags, "--dry_run"]},
        "preempted": {"flags": flags, "codes": {"muon/seed0": 42}},
        "commands": {"flags": [*flags, "--print_commands"]},
        "resumed": {"flags": flags},
        "again": {"flags": flags},
        "other": {"flags": [*flags, "--set=optimizer.lr=1"]},
        "metric": {"flags": [*flags, "--metric=eval/all/los"]},
        "diverged": {"flags": [*MODEL, f"--workdir={b}"], "codes": {"no_rope/seed1": 3}},
        "bad_input": {"flags": [*MODEL, f"--workdir={root / 'c'}"], "codes": {"baseline/seed0": 2}},
        "seeds": {"flags": [*MODEL, "--seeds=0,0", f"--workdir={b}"]},
        "undone": {"flags": [*MODEL, "--set=optimizer.weight_decay=0.3", f"--workdir={b}", "--dry_run"]},
        "unknown": {"flags": [*MODEL, "--set=optimizer.b2=0.9", f"--workdir={b}", "--dry_run"]},
        "taught": {"flags": [*TAUGHT, f"--workdir={root / 'f'}"]},
        "taught_again": {"flags": [*TAUGHT, f"--workdir={root / 'f'}"]},
        "missing": {"flags": ["--experiment=pretrain_tiny"]},
        "at_once": {"flags": [*MODEL, "--at_once=2", f"--workdir={root / 'd'}"], "codes": {"baseline/seed1": 3}},
        "dry_at_once": {"flags": [*MODEL, "--at_once=2", f"--workdir={root / 'e'}", "--dry_run"]},
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(list(scenarios.values())), capture_output=True, text=True,
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(zip(scenarios, map(json.loads, done.stdout.splitlines()), strict=True))
    return found | {"a": root / "a", "b": root / "b"}


def test_dry_run_runs_nothing(results):
    said = results["dry"]
    assert said["code"] == 0 and not said["trained"] and "9 of 9 runs to do" in said["out"]
    assert "600 steps" in said["out"] and "FLOPs" in said["out"]


def test_preempted_then_resumed_without_repeating(results):
    assert results["preempted"]["code"] == 42
    assert results["preempted"]["trained"] == ["baseline/seed0", "no_rope/seed0", "muon/seed0"]
    rest = [f"{v}/seed{s}" for s in range(3) for v in ("baseline", "no_rope", "muon")][2:]
    assert results["resumed"]["code"] == 0 and results["resumed"]["trained"] == rest
    assert results["again"]["code"] == 0 and not results["again"]["trained"]


def test_commands_for_other_machines_are_the_unfinished_runs(results):
    lines = results["commands"]["out"].splitlines()
    assert len(lines) == 7 and all(
        line.startswith("python -m launch.train --experiment=pretrain_tiny") for line in lines
    )
    assert "--edit=muon" in lines[0] and "--set=seed=0" in lines[0] and lines[0].endswith("/runs/muon/seed0")


def test_the_answer(results):
    assert "eval/all/bits_per_byte" in results["again"]["out"]
    answer = json.loads((results["a"] / "results.json").read_text())
    rows = {r["name"]: r for r in answer["variants"]}
    assert rows["muon"]["verdict"] == "better" and rows["no_rope"]["verdict"] == "worse"
    # Paired by seed, the seeds' own spread of 0.1 does not hide a difference of 0.2.
    assert rows["no_rope"]["difference"]["mean"] == pytest.approx(0.2 + 0.001 / 3)
    assert answer["noise_floor"]["std"] == pytest.approx(0.1, rel=0.02)
    assert rows["baseline"]["steps"] == 600 and rows["baseline"]["flops"] == rows["muon"]["flops"] > 1e11
    assert (results["a"] / "table.md").exists()
    assert (results["a"] / "report" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_diverged_run_is_an_answer(results):
    assert results["diverged"]["code"] == 0
    rows = json.loads((results["b"] / "results.json").read_text())["variants"]
    assert {r["name"]: r["verdict"] for r in rows}["no_rope"] == "diverged (1 of 3)"


def test_a_finished_sweep_is_answered_though_its_teacher_is_gone(results):
    first, again = results["taught"], results["taught_again"]
    assert first["error"] is None and len(first["trained"]) == 4
    assert again["error"] is None and not again["trained"] and "muon" in again["out"]


def test_mistakes_are_one_clear_line(results):
    assert {results[name]["code"] for name in ("other", "metric", "bad_input", "seeds", "unknown", "missing")} == {2}
    assert "another definition (optimizer.lr: 0.003 -> 1.0)" in results["other"]["error"]
    assert "nearest: eval/all/loss" in results["metric"]["error"]
    assert "no such file: corpus.txt" in results["bad_input"]["error"]
    assert "each once" in results["seeds"]["error"]
    assert results["unknown"]["error"].startswith("variant muon: unknown path 'optimizer.b2'")
    assert "--workdir" in results["missing"]["error"]


def test_a_setting_over_an_edit_is_said(results):
    assert "--set=optimizer.weight_decay=0.3 comes after the edits of muon" in results["undone"]["err"]


def test_runs_at_once_are_those_of_one_program(results):
    """Three seeds of three variants, each variant with a program of its own: two of a variant at once, one alone."""
    said = results["at_once"]
    assert said["together"] == [[f"{v}/seed{s}" for s in (0, 1)] for v in ("baseline", "no_rope", "muon")]
    assert said["trained"][:3] == [f"{v}/seed2" for v in ("baseline", "no_rope", "muon")]  # first, in processes
    assert said["code"] == 0 and "baseline" in said["out"]
    assert "muon is not in one program with baseline" in said["err"] and "may only in seed, optimizer.lr" in said["err"]
    dry = results["dry_at_once"]
    assert not dry["trained"] and "9 of 9 runs to do, in 6 programs" in dry["out"]
