"""What a run of reinforcement learning says of itself: alarms, what is healthy, self-correction inside the thinking."""

import dataclasses
import json
import types

import jax.numpy as jnp
import pytest

from jaxlm import config, sharding
from jaxlm.config import UserError
from jaxlm.data.prompts import Addition, PromptFile, Prompts, heldout
from jaxlm.data.tokenizer import Bytes
from jaxlm.feedback.parts import Correct, Function, names
from jaxlm.nn.transformer import ModelConfig
from jaxlm.run import checkpoint, exits, load, loop, objectives, rl, rl_evals, rl_metrics
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.run.log import MetricsLog, Progress, read_metrics
from jaxlm.sharding import MeshConfig
from jaxlm.steps.policy import GRPO, DynamicSampling
from jaxlm.steps.update import Train
from tests.run import rewarding
from tests.sample.scripted import AUTOMATON, automaton, say

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
        train=Train(steps=24, batch_size=4, log_every=1),
        evaluation=Evaluation(every=50),
        checkpoint=Checkpointing(every=2, keep_latest=20),
        mesh=MeshConfig(fsdp=1),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ alarms
def prepared(steps=range(1, 25), **columns):
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
    assert ended is None and "ends" not in line
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
    assert ended == 4 and lines[0].endswith("; the run ends at step 40 (objective.stop_at_alarm)")
    extra = {"step": 9, "train/reward": -50.0, "train/reward/function_1": 50.0}
    assert said(p, [extra, *whole[4:]], every=2, before=whole[:4])[0] == lines
    assert said(p, [], every=2, before=whole) == (lines, 4)


def test_a_run_goes_back_to_where_the_first_alarm_has_it(experiment):
    """The one that is known first, not the one that began first, nor the last."""
    p = dataclasses.replace(experiment.objective, stop_at_alarm=True)
    courses = {"reward": lambda n: 1.0 * n, "reward/function_1": lambda n: -abs(n - 30.0)}
    lines, ended = said(p, prepared(range(2, 62, 2), entropy=lambda n: 1.0 if n <= 20 else 0.01, **courses), every=2)
    assert [line.split(":")[1].split(" since step ") for line in lines] == [
        [" entropy collapse", "20"],
        [" gold falls", "30"],
    ]
    assert ended == 20


def test_an_alarm_ends_the_run_where_that_is_wanted(experiment, tmp_path, capsys, caplog):
    e = config.override(experiment, {"objective.stop_at_alarm": True})
    assert rl.run(e, tmp_path / "run", e) == exits.EXIT_DONE
    alarm = [line for line in capsys.readouterr().err.splitlines() if "ALARM" in line]
    assert len(alarm) == 1 and alarm[0].endswith("the run ends at step 20 (objective.stop_at_alarm)")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["step"] == checkpoint.newest(tmp_path / "run") == 20 and "eval/score" in last

    run = tmp_path / "run"
    told = "ended at step 20, to go back to step 2: who reads this run, as a parent too, gets checkpoint 2"
    assert caplog.messages[-1] == told and 2 in checkpoint.steps_saved(run)
    before = (run / "metrics.jsonl").read_text()
    caplog.clear()
    assert rl.run(e, run, e) == exits.EXIT_DONE  # it has ended, and stays so
    assert (run / "metrics.jsonl").read_text() == before and caplog.messages[-1] == told
    # The next stage begins from there, and says so; so does whatever else reads the run.
    caplog.clear()
    child = dataclasses.replace(e, parent=str(run))
    assert objectives.origin_records(child)["parent"]["step"] == load.load_run(run).step == 2
    assert load.load_run(run, "latest").step == load.load_run(run, 20).step == 20
    line = f"{run} was ended to go back: its checkpoint 2 is read, not 20, the newest"
    assert [m.startswith(line) for m in caplog.messages] == [True, True]
    # It goes on from where it ended, and is then read as ever.
    on = config.override(e, {"objective.stop_at_alarm": False, "train.steps": 21})
    assert rl.run(on, run, e) == exits.EXIT_DONE
    assert checkpoint.saved(run).step == checkpoint.newest(run) == 21 and not (run / checkpoint.CHOSEN).exists()


def test_what_is_read_of_a_run_that_went_back(tmp_path, caplog):
    with checkpoint.Checkpoints(tmp_path, Checkpointing(every=2, keep_latest=3)) as kept:
        assert kept.choose(4, 9) is None  # nothing is saved
        for n in (4, 6, 8):
            kept.save(n, {"x": jnp.ones(2)})
        for back, step in ((4, 4), (7, 6), (99, 8)):
            assert kept.choose(back, 8) == step == checkpoint.saved(tmp_path).step
        loop._go_back(kept, 8, 3)
        assert caplog.messages[-1].endswith("gets checkpoint 4, the oldest that is kept (a larger "
                                            "checkpoint.keep_latest keeps more)")  # fmt: skip
        assert checkpoint.saved(tmp_path).step == 4
        kept.save(10, {"x": jnp.ones(2)})  # gone on
        kept.wait()
        assert checkpoint.saved(tmp_path).step == checkpoint.read_metadata(tmp_path)["step"] == 10


def test_the_best_checkpoint_is_the_one_with_the_highest_gold(experiment, tmp_path):
    part = Function("tests.run.rewarding:course", weight=0.0)
    e = config.override(experiment, {"train.steps": 4, "evaluation.every": 1, "objective.reward": (RISES, part)})
    e = dataclasses.replace(e, checkpoint=Checkpointing(every=1, keep_latest=1, keep_best=1))
    rewarding.COURSE[:] = [0.0, 1.0, 3.0, 2.0]  # by step: what the first evaluation has asked, the second knows
    assert rl.run(e, tmp_path / "run", e) == exits.EXIT_DONE
    assert [r["eval/gold"] for r in read_metrics(tmp_path / "run") if "eval/gold" in r] == [0.0, 0.0, 1.0, 3.0, 2.0]
    assert checkpoint.steps_saved(tmp_path / "run") == [3, 4]


def test_prompts_need_an_answer_only_where_the_reward_asks_whether_it_is_right(experiment, tmp_path):
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(20)))
    task = PromptFile(str(tmp_path / "asked.jsonl"), as_text=True, heldout=0.4)
    changes = {"train.steps": 3, "evaluation.every": 1, "data.task": task, "objective.gold": None}
    e = config.override(experiment, changes | {"objective.reward": (Function("tests.run.rewarding:course"),)})
    e = dataclasses.replace(e, checkpoint=Checkpointing(every=1, keep_latest=1, keep_best=1))
    rewarding.COURSE[:] = [0.0, 3.0, 1.0]
    assert rl.run(e, tmp_path / "run", e) == exits.EXIT_DONE
    records = read_metrics(tmp_path / "run")
    assert [r["eval/reward"] for r in records if "eval/reward" in r] == [0.0, 0.0, 3.0, 1.0]
    assert checkpoint.steps_saved(tmp_path / "run") == [2, 3]
    verdicts = ("right", "greedy", "greedy_score", "score", "pass@1", "majority@2")
    assert not {k for r in records for k in r if k.rpartition("/")[2] in verdicts}
    for asking in ({"objective.reward": (RISES, Correct())}, {"objective.dynamic": DynamicSampling()}):
        with pytest.raises(UserError, match=r"asked.jsonl line 1: no field 'answer', which Correct, CosineLength and"):
            rl.run(config.override(e, asking), tmp_path / "other")


# --------------------------------------------------------------------------------------------------- self-correction
def test_what_becomes_of_an_answer_inside_the_thinking_is_measured(tmp_path, capsys):
    """A policy that thinks "3", then "no 4", and says "5", asked what is 3, what is 4 and what is neither."""
    wanted = [("3", "4", "7")[i % 3] for i in range(24)]
    lines = [json.dumps({"prompt": f"{i}?", "answer": a}) + "\n" for i, a in enumerate(wanted)]
    (tmp_path / "asked.jsonl").write_text("".join(lines))
    e = Experiment(
        model=AUTOMATON,
        data=Prompts(PromptFile(str(tmp_path / "asked.jsonl"), heldout=0.5), tokenizer=Bytes(), context=64),
        objective=dataclasses.replace(GRPO, max_tokens=24, heldout_prompts=24, heldout_samples=1, slots=4),
    )
    mesh, tokenizer = sharding.make_mesh(MeshConfig(fsdp=1)), rl.prepared(e.data).tokenizer
    trainer = rl.Trainer(e, mesh, tokenizer, None, None, rl.Scoring(e, tokenizer, mesh, tmp_path, 0))
    log, progress = MetricsLog(tmp_path), Progress(1)
    evaluation = rl_evals.Evaluation(e, trainer, log, progress, rl_metrics.Watch(progress), tmp_path)
    thinks = say("<|im_sep|>", "<think>", "3", "\n", "n", "o", " ", "4", "</think>", "5", "<|im_end|>")
    evaluation(0, types.SimpleNamespace(params=automaton(thinks)))

    asked = [p.metadata["answer"] for p in heldout(e.data, 24)]
    share = {a: asked.count(a) / len(asked) for a in ("3", "4", "7")}
    assert all(share.values()) and share["3"] != share["4"]
    (record,) = read_metrics(tmp_path)
    found = {k.removeprefix("eval/thinking/"): v for k, v in record.items() if k.startswith("eval/thinking/")}
    assert found == pytest.approx({"changed": 1.0, "better": share["4"], "worse": share["3"],
                                   "first_right": share["3"], "last_right": share["4"]})  # fmt: skip
    assert all(rl_metrics.key_of(k) for k in record if k.startswith("eval/"))
    assert "eval/thinking/better above worse" in capsys.readouterr().err


def test_parts_of_one_kind_are_told_apart():
    assert names((RISES, Correct(), FALLS)) == ["function_0", "correct", "function_2"]


def test_a_metric_out_of_its_range_is_said_once():
    said = []
    watch = rl_metrics.Watch(types.SimpleNamespace(say=said.append))
    for step, rate in enumerate((1.0, 0.5, 0.4, 0.95, 0.2)):
        watch(step, {"train/eos_rate": rate, "train/unknown": 5.0})
    assert [t.partition(":")[0] for t in said[1:]] == ["step 1", "step 4"]
    assert said[0].endswith("  eos_rate 0.9 to 1")
    assert "healthy: 0.9 to 1" in said[1] and "ran into max_tokens" in said[1]
    watch(5, {"eval/pass@4": 0.5, "train/reward": 1.0, "train/eos_rate": 0.1})
    assert len(said) == 4 and "reward rises, ever slower | eval/pass@ pass@1 rises" in said[3]


def test_every_metric_has_a_healthy_course():
    assert not [k for k, h in rl_metrics.HELP.items() if not h.healthy]
    lines = rl_metrics.healthy(rl_metrics.HELP).splitlines()
    assert len(lines) <= 26 and max(map(len, lines)) <= 120
