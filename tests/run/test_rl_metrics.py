"""What a run of reinforcement learning says of itself: alarms, what is healthy, self-correction inside the thinking."""

import dataclasses
import types

import pytest

from jaxlm import config
from jaxlm.data.prompts import Addition, Prompts
from jaxlm.data.tokenizer import Bytes
from jaxlm.feedback.parts import Correct, Function, names
from jaxlm.nn.transformer import ModelConfig
from jaxlm.run import checkpoint, exits, rl, rl_metrics
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.run.log import read_metrics
from jaxlm.sharding import MeshConfig
from jaxlm.steps.policy import GRPO
from jaxlm.steps.update import Train

RISES, FALLS = Function("tests.run.rewarding:rises"), Function("tests.run.rewarding:falls", weight=0.0)


@pytest.fixture(scope="module")
def experiment():
    """A reward that rises with the step, and beside it gold, which falls."""
    return Experiment(
        model=ModelConfig(layers=1, width=16, heads=2, hidden=32),
        data=Prompts(task=Addition(digits=1), tokenizer=Bytes(), context=24),
        objective=dataclasses.replace(
            GRPO, reward=(RISES, FALLS), gold="function_1", samples=2, max_tokens=2, reference=False,
            heldout_prompts=2, heldout_samples=2, slots=4, preflight="off",
        ),
        train=Train(steps=14, batch_size=4, log_every=1),
        evaluation=Evaluation(every=50),
        checkpoint=Checkpointing(every=4),
        mesh=MeshConfig(fsdp=1),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ alarms
def prepared(steps=range(1, 15), **columns):
    """Records of a run in which nothing changes but what is given as a function of the step."""
    quiet = {"length/mean": 9.0, "repetition": 0.0, "entropy": 1.0, "right": 0.5, "reward": 0.5}
    found = [quiet | {k: f(n) for k, f in columns.items()} for n in steps]
    return [{"step": n} | {f"train/{k}": v for k, v in r.items()} for n, r in zip(steps, found)]


def said(p, records, every=1, before=()):
    lines = []
    watch = rl_metrics.Alarms(p, every, types.SimpleNamespace(say=lines.append), before)
    for r in records:
        watch(r["step"], {k: v for k, v in r.items() if k != "step"})
    return lines, watch.ended()


def test_gold_is_what_the_definition_names(experiment):
    p = experiment.objective
    hacked = prepared(**{"reward": lambda n: 1.0 * n, "reward/function_1": lambda n: -1.0 * n})
    lines, ended = said(p, hacked)
    (line,) = lines  # once
    assert line.startswith("ALARM: gold falls since step 2: train/reward/function_1 falls by 1 a record")
    assert not ended and "ends" not in line
    assert said(dataclasses.replace(p, gold=None), hacked)[0] == []  # the verdict, which holds
    (line,) = said(dataclasses.replace(p, gold=None), prepared(reward=lambda n: 1.0 * n, right=lambda n: -1.0 * n))[0]
    assert "train/right falls" in line


@pytest.mark.parametrize(
    "name, course, what",
    [
        ("length/mean", lambda n: 9.0 if n <= 10 else 30.0, "length drifts"),
        ("repetition", lambda n: 0.0 if n <= 10 else 0.6, "repetition"),
        ("entropy", lambda n: 1.0 if n <= 10 else 0.01, "entropy collapse"),
    ],
)
def test_the_other_alarms_watch_what_a_step_logs(experiment, name, course, what):
    assert [
        line.split(" since")[0] for line in said(experiment.objective, prepared(range(1, 21), **{name: course}))[0]
    ] == [f"ALARM: {what}"]


def test_a_restarted_run_raises_what_the_uninterrupted_one_does(experiment):
    """Records of the former start count, those that a restart logs out of the rhythm do not."""
    p = dataclasses.replace(experiment.objective, stop_at_alarm=True)
    whole = prepared(range(2, 42, 2), **{"reward": lambda n: 1.0 * n, "reward/function_1": lambda n: -1.0 * n})
    lines, ended = said(p, whole, every=2)
    assert ended and lines[0].endswith("; the run ends at step 20 (objective.stop_at_alarm)")
    extra = {"step": 9, "train/reward": -50.0, "train/reward/function_1": 50.0}
    assert said(p, [extra, *whole[4:]], every=2, before=whole[:4])[0] == lines
    assert said(p, [], every=2, before=whole) == (lines, True)


def test_an_alarm_ends_the_run_where_that_is_wanted(experiment, tmp_path, capsys):
    e = config.override(experiment, {"objective.stop_at_alarm": True})
    assert rl.run(e, tmp_path / "run", e) == exits.EXIT_DONE
    alarm = [line for line in capsys.readouterr().err.splitlines() if "ALARM" in line]
    assert len(alarm) == 1 and alarm[0].endswith("the run ends at step 10 (objective.stop_at_alarm)")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["step"] == checkpoint.newest(tmp_path / "run") == 10 and "eval/score" in last

    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert rl.run(e, tmp_path / "run", e) == exits.EXIT_DONE  # it has ended, and stays so
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    on = config.override(e, {"objective.stop_at_alarm": False, "train.steps": 11})
    assert rl.run(on, tmp_path / "run", e) == exits.EXIT_DONE
    assert checkpoint.newest(tmp_path / "run") == 11


def test_parts_of_one_kind_are_told_apart():
    assert names((RISES, Correct(), FALLS)) == ["function_0", "correct", "function_2"]
