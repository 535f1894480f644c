"""Several processes take one step of reinforcement learning: whatever one of them is told, all know."""

import json

import pytest

from jaxlm.run import exits, rl
from jaxlm.run.log import read_metrics
from launch import local
from launch.job import Job, Processes
from tests.run import rl_together
from tests.source import ROOT

TIMED = ("seconds", "per_second", "utilization")


def said(workdir) -> list[dict]:
    return [{k: v for k, v in r.items() if not any(t in k for t in TIMED)} for r in read_metrics(workdir)]


def verdicts(workdir) -> list[list[str]]:
    """Of the preflight: [verdict, first word of what was looked at] each."""
    return [line.split()[:2] for line in (workdir / "preflight.txt").read_text().splitlines()]


def journal(workdir) -> list[str]:
    return sorted((workdir / "journal.jsonl").read_text().splitlines())


def test_two_processes_learn_from_a_reward_model_tools_and_functions_as_one_does(tmp_path, monkeypatch):
    """With a preflight that scores by the trainer's own pass. Tool and function say something else on process 1."""
    rl_together.write(tmp_path)
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    words = ("tests.run.rl_together", str(tmp_path), str(tmp_path / "two"))
    assert local.attempt(Job("local", words, Processes(2, cpu_devices=1)), []) == exits.EXIT_DONE

    monkeypatch.setattr(rl, "by_name", rl_together.tools)
    e = rl_together.definition(tmp_path)
    assert rl.run(e, tmp_path / "one", e) == exits.EXIT_DONE
    for mine, its in zip(said(tmp_path / "two"), said(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(its, rel=1e-3, abs=1e-5)
    last = said(tmp_path / "two")[-1]
    assert last["train/reward/learned/std"] > 0 and last["train/tools/python/calls"] > 8
    assert journal(tmp_path / "two") == journal(tmp_path / "one")
    kept = [json.loads(line)["key"].split()[0] for line in journal(tmp_path / "two")]
    assert kept.count("tool") == 2 and kept.count("reward") > 16
    assert verdicts(tmp_path / "two") == verdicts(tmp_path / "one")
    assert ["ok", "sampler/trainer"] in verdicts(tmp_path / "two")
