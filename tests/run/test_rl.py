"""Whole runs of reinforcement learning: resumed equals uninterrupted bit by bit, faulty rewards leave a run intact."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
import types

import jax
import numpy as np
import pytest

from jaxlm import config, sharding, storage
from jaxlm.config import UserError
from jaxlm.data.preferences import Preferences
from jaxlm.data.prepare import Data
from jaxlm.data.prompts import Addition, Prompts
from jaxlm.data.tokenizer import Bytes, CharsTokenizer
from jaxlm.feedback.parts import Chance, Correct, Function, Learned
from jaxlm.nn import heads
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Linear
from jaxlm.rl.kl import Adaptive
from jaxlm.rl.rewards import Replace
from jaxlm.run import checkpoint, exits, goodput, lineage, load, loop, rl, rl_evals, train
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.run.log import read_metrics
from jaxlm.sharding import MeshConfig
from jaxlm.steps import learn
from jaxlm.steps.policy import DAPO, GRPO, PPO, Critic
from jaxlm.steps.reward import RewardModel
from jaxlm.steps.update import Train
from tests import tiny_run
from tests.run import rewarding
from tests.run.rl_runs import assert_explained, assert_same, said, saved, stop

STEPS = 4


REWARD = Function("tests.run.rewarding:reward")


FAST = AdamW(lr=3e-3, weight_decay=0.0, schedule=Linear())


@pytest.fixture(autouse=True)
def behaves():
    rewarding.WAY["now"] = "length"
    yield
    rewarding.WAY["now"] = "length"


@pytest.fixture(scope="module")
def experiment():
    """PPO with all that has a state: a critic, an adaptive KL; a reward that a policy can raise at once."""
    return Experiment(
        model=ModelConfig(layers=1, width=16, heads=2, hidden=32),
        data=Prompts(task=Addition(digits=1), tokenizer=Bytes(), context=24),
        objective=dataclasses.replace(
            PPO, reward=(REWARD, Correct(0.5)), samples=4, max_tokens=4, epochs=2, minibatches=2,
            kl=Adaptive(0.1, target=0.5, horizon=40.0), critic=Critic(optimizer=FAST), missing_stop=Replace(-1.0),
            heldout_prompts=4, heldout_samples=2, reward_timeout=2.0, slots=4,
        ),
        optimizer=FAST,
        train=Train(steps=STEPS, batch_size=16, log_every=1),
        evaluation=Evaluation(every=2),
        checkpoint=Checkpointing(every=2, keep_latest=3),
        mesh=MeshConfig(fsdp=1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
    rewarding.WAY["now"] = "length"
    workdir = tmp_path_factory.mktemp("rl") / "whole"
    assert rl.run(experiment, workdir, experiment) == exits.EXIT_DONE
    return workdir


# -------------------------------------------------------------------------------------------------------- a whole run
def test_a_run_leaves_what_a_reader_needs(experiment, whole):
    for name in ("config.json", "diff.txt", "environment.json", "lineage.json", "metrics.jsonl", "metrics_help.json",
                 "preflight.txt", "journal.jsonl", "report/rl.png", "samples/00000004.jsonl"):  # fmt: skip
        assert (whole / name).exists(), name
    records = read_metrics(whole)
    assert [r["step"] for r in records] == list(range(STEPS + 1))
    assert {r["step"] for r in records if "eval/pass@1" in r} == {0, 2, 4}
    assert {"eval/greedy", "eval/pass@2", "eval/majority@2", "eval/score", "eval/reward"} <= records[0].keys()
    assert "go" in (whole / "preflight.txt").read_text().splitlines()[-1]
    last = records[-1]
    wanted = """reward/function reward/correct kl/reference kl/coefficient entropy critic/value eos_rate length/mean
        value/explained_variance ratio_histogram/0.99_1.01 clip_fraction_high sampler_gap_max first/ratio_deviation_max
        groups_without_spread seconds/rollout""".split()
    assert {f"train/{n}" for n in wanted} <= last.keys()
    assert records[1]["train/kl/reference"] == 0.0 and records[1]["train/kl/coefficient"] == pytest.approx(0.1)
    assert last["train/kl/coefficient"] != records[2]["train/kl/coefficient"]
    assert all(r["train/first/ratio_deviation_max"] < 1e-5 for r in records[1:])
    assert all(r["train/sampler_gap_max"] < 1e-4 for r in records[1:])
    told = json.loads((whole / "metrics_help.json").read_text())
    assert told["train/eos_rate"]["healthy"] == [0.9, 1.0] and told["eval/pass@"]["in_words"]
    assert_explained(whole)


def test_what_others_read_of_the_workdir_is_the_policy(experiment, whole):
    run = load.load_run(whole)
    assert run.step == STEPS
    assert_same(run.params, saved(whole).params)
    assert run.encode("1+2=")[0] == run.tokenizer.bos
    child = config.override(experiment, {"parent": str(whole), "model": None, "data.tokenizer": None, "train.steps": 1})
    mesh = sharding.make_mesh(MeshConfig(fsdp=1))
    child = train.bind(train.inherit(child), run.tokenizer.vocab_size)
    begun = rl.begin(child, mesh, rl._records(child))
    assert_same(begun.params, run.params)
    assert_same(begun.critic.params["backbone"], run.params["backbone"])
    assert not np.any(begun.critic.params["heads"]["value"]["kernel"])


def test_sigterm_stops_at_once_wherever_it_comes_and_the_run_ends_bit_equal(experiment, whole, tmp_path, monkeypatch):
    """In the evaluation before the first step, in a rollout, in an evaluation, in the updates."""
    run, scored = tmp_path / "run", []

    def start(owner, name, at) -> int:
        """With SIGTERM when a function that takes the step as its last argument is called at this one."""
        original, verdicts = getattr(owner, name), rl.Scoring.verdicts

        def struck(*arguments):
            if at in (arguments[1], arguments[-1]):
                os.kill(os.getpid(), signal.SIGTERM)
                scored.clear()
            return original(*arguments)

        def asked(scoring, found, where):
            scored.append(where)
            return verdicts(scoring, found, where)

        with monkeypatch.context() as m:
            m.setattr(owner, name, struck)
            m.setattr(rl.Scoring, "verdicts", asked)
            return rl.run(experiment, run, experiment)

    assert start(rl_evals.Evaluation, "__call__", 0) == exits.EXIT_PREEMPTED
    assert checkpoint.newest(run) is None and not scored
    assert start(rl.Trainer, "roll", 1) == exits.EXIT_PREEMPTED
    assert checkpoint.newest(run) == 1 and not scored  # the rollout was not waited for
    assert start(rl_evals.Evaluation, "__call__", 2) == exits.EXIT_PREEMPTED
    assert checkpoint.newest(run) == 2 and not scored and checkpoint.read_metadata(run)[loop.OWED]
    assert "eval/score" not in read_metrics(run)[-1]
    assert start(learn, "learn", 2) == exits.EXIT_PREEMPTED  # what has begun to change the state is finished
    assert checkpoint.newest(run) == 3 and loop.OWED not in checkpoint.read_metadata(run)
    assert rl.run(experiment, run, experiment) == exits.EXIT_DONE
    assert_same(saved(run), saved(whole))
    assert said(run) == said(whole)
    assert goodput.account(run)["lost"] > 0


def test_a_last_evaluation_that_is_abandoned_is_done_when_the_run_goes_on(experiment, tmp_path, monkeypatch):
    e = config.override(experiment, {"train.steps": 1, "objective.preflight": "off"})
    evaluate = rl_evals.Evaluation.__call__

    def struck(self, n, s):
        if n == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, n, s)

    monkeypatch.setattr(rl_evals.Evaluation, "__call__", struck)
    for _ in range(2):
        assert rl.run(e, tmp_path / "run", e) == exits.EXIT_PREEMPTED
        assert checkpoint.newest(tmp_path / "run") == 1 and "eval/score" not in read_metrics(tmp_path / "run")[-1]
    monkeypatch.undo()
    assert rl.run(e, tmp_path / "run", e) == exits.EXIT_DONE
    assert "eval/score" in read_metrics(tmp_path / "run")[-1]


def test_a_beginning_is_watched_and_runs_out_of_memory_like_a_step(experiment, tmp_path, monkeypatch):
    def too_large(*_):
        assert "watchdog" in [t.name for t in threading.enumerate()]
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3000000 bytes.")

    monkeypatch.setattr(rl, "begin", too_large)
    with pytest.raises(UserError, match=r"out of memory on cpu \(asked for 3000000 bytes\): set"):
        rl.run(experiment, tmp_path / "run", experiment)


def test_an_interrupted_rollout_comes_out_the_same_with_what_was_answered(experiment, tmp_path, monkeypatch):
    """The reward is a new draw whenever it is asked: what the journal knows is not asked again."""
    rewarding.WAY["now"] = "chance"
    e = config.override(experiment, {"objective.preflight": "off"})

    def crash(*_, **__):
        raise RuntimeError("power cut")

    with monkeypatch.context() as m:
        stop(m, 3, lambda: m.setattr(learn, "credit", crash))
        with pytest.raises(RuntimeError, match="power cut"):
            rl.run(e, tmp_path / "run", e)
    assert checkpoint.newest(tmp_path / "run") == 2

    def journal():
        return [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]

    before = journal()
    again = [r for r in before if r["step"] in (2, 3) and " eval/" not in r["key"]]
    assert len(again) == 32
    assert rl.run(e, tmp_path / "run", e) == exits.EXIT_DONE
    assert journal()[: len(before)] == before
    assert not [r for r in journal()[len(before) :] if " eval/" not in r["key"]]
    own = [r["value"] for r in again if r["step"] == 3]
    assert read_metrics(tmp_path / "run")[-1]["train/reward/function"] == pytest.approx(np.mean(own))


def test_eight_devices_give_the_rewards_of_one(experiment, whole, tmp_path):
    e = config.override(experiment, {"mesh.fsdp": 4, "mesh.tensor": 2, "train.steps": 1, "objective.preflight": "off"})
    assert rl.run(e, tmp_path / "run", experiment) == exits.EXIT_DONE
    one, eight = said(whole)[1], said(tmp_path / "run")[1]
    for name in ("train/reward", "train/length/mean", "train/eos_rate"):
        assert eight[name] == one[name]
    assert eight["train/advantage_std"] == pytest.approx(one["train/advantage_std"], rel=1e-4)


# ----------------------------------------------------------------------------------------------------- faulty rewards
@pytest.fixture(scope="module")
def trained(experiment, tmp_path_factory):
    """(trainer, a function that gives the state before the first step): a step outside of a run."""
    rewarding.WAY["now"] = "length"
    e = train.bind(config.override(experiment, {"objective.reward_timeout": 0.5}), 288)
    mesh = sharding.make_mesh(MeshConfig(fsdp=1))
    tokenizer = rl.prepared(e.data).tokenizer
    scoring = rl.Scoring(e, tokenizer, mesh, tmp_path_factory.mktemp("step"), 0)
    trainer = rl.Trainer(e, mesh, tokenizer, rl._reference(e, mesh, {}), e.model, scoring)
    return trainer, lambda: rl.begin(e, mesh, {})


def test_a_faulty_reward_says_what_is_wrong_and_changes_nothing(trained):
    """The same state goes on when the function is mended, as if nothing had been."""
    trainer, begin = trained
    s = begin()
    ways = {"raises": "no such luck", "nan": "it gave nan", "hangs": "no answer within 0.5 s"}
    for way, words in ways.items():
        rewarding.WAY["now"] = way
        with pytest.raises(UserError, match=f"function.*{words}"):
            trainer(s, 0)
    assert_same(s, begin())
    rewarding.WAY["now"] = "length"
    after, metrics = trainer(s, 0)
    assert after.step == 1 and after.updates == 4 and metrics["reward"] > -1


def test_a_run_whose_reward_fails_stands_where_it_stood_and_goes_on_when_it_is_mended(
    experiment, whole, tmp_path, monkeypatch
):
    """Started again and again with a faulty reward; then with a good one it ends as if nothing had been."""
    e, workdir = config.override(experiment, {"objective.reward_timeout": 1.0}), tmp_path / "run"

    def files() -> dict[str, str]:
        found = {str(p.relative_to(workdir)): p for p in workdir.rglob("*") if p.is_file()}
        return {name: storage.sha256_file(p) for name, p in found.items() if name != "environment.json"}

    def begun(way: str, words: str) -> dict[str, str]:
        with monkeypatch.context() as m:
            stop(m, 2, lambda: rewarding.WAY.update(now=way))
            with pytest.raises(UserError, match=words) as error:
                rl.run(e, workdir, experiment)
        assert "\n" not in str(error.value) and checkpoint.newest(workdir) == 2
        rewarding.WAY["now"] = "length"
        return files()

    before = begun("raises", "part 'function/tests.*, 16 samples: it raised ValueError at rewarding.py:.*no such luck")
    assert len([name for name in before if name.startswith("checkpoints/2/")]) > 3
    assert begun("nan", "part 'function/tests.*, sample 15 of 16: it gave nan") == before
    assert begun("hangs", "no answer within 1 s; it stands at rewarding.py") == before
    assert rl.run(e, workdir, experiment) == exits.EXIT_DONE
    assert_same(saved(workdir), saved(whole))
    assert said(workdir) == said(whole)


def test_what_cannot_be_scored_teaches_nothing(trained):
    trainer, begin = trained
    rewarding.WAY["now"] = "none"
    after, metrics = trainer(begin(), 1)  # another step: the journal knows the rewards of step 0
    assert metrics["unscored"] == 1.0 and metrics["no_samples"] == 1.0 and after.step == 1
    assert_same(after.replace(step=begin().step), begin())


# ----------------------------------------------------------------------------------------------------- the other ways
def test_dynamic_sampling_fills_up_with_other_prompts(experiment):
    """Every other prompt is right half of the time: two rounds give the groups of one, each with all its samples."""
    e = train.bind(experiment, 288)
    e = dataclasses.replace(e, objective=dataclasses.replace(DAPO, samples=4, max_tokens=4, slots=4))
    mesh = sharding.make_mesh(MeshConfig(fsdp=1))
    s = rl.begin(e, mesh, {})

    def verdicts(found, n):
        return [float(x.place % 2 == 0 and x.rank < 2) for x in found]

    tokenizer = rl.prepared(e.data).tokenizer
    scoring = types.SimpleNamespace(journal=None, verdicts=verdicts, ahead=lambda n: contextlib.nullcontext())
    trainer = rl.Trainer(e, mesh, tokenizer, None, None, scoring)
    rolled = trainer.roll(s, 5)
    assert [x.place for x in rolled.samples] == [0] * 4 + [2] * 4 + [4] * 4 + [6] * 4
    assert rolled.right == [1.0, 1.0, 0.0, 0.0] * 4
    assert rolled.metrics["dropped_groups"] == 0.5 and rolled.metrics["missing_groups"] == 0.0
    assert rolled.metrics["right_before_dropping"] == 0.25
    trainer.scoring.verdicts = lambda found, n: [0.0] * len(found)  # never right: every retry is spent
    rolled = trainer.roll(s, 5)
    assert rolled.samples == [] and rolled.metrics["dropped_groups"] == rolled.metrics["missing_groups"] == 1.0


def test_the_random_reward_knows_nothing_and_says_the_same_again(experiment, whole):
    e = config.override(
        train.bind(experiment, 288), {"objective.reward": (Chance(seed=1),), "objective.missing_stop": None}
    )
    mesh = sharding.make_mesh(MeshConfig(fsdp=1))
    tokenizer = rl.prepared(e.data).tokenizer
    run = load.load_run(whole)
    scoring = rl.Scoring(e, tokenizer, mesh, "nowhere", 0)
    trainer = rl.Trainer(e, mesh, tokenizer, None, None, scoring)
    found = trainer.roll(dataclasses.replace(saved(whole), params=run.params), 0).samples
    values = scoring.rewards(found, 0)
    assert values == scoring.rewards(found, 0) and set(values) == {0.0, 1.0}
    silent = [dataclasses.replace(x, reply=found[0].reply) for x in found]
    assert scoring.rewards(silent, 0) == values  # whatever was said
    assert scoring.rewards(found, 1) != values


def test_a_preflight_that_says_no_stops_where_that_is_wanted(experiment, tmp_path):
    objective = dataclasses.replace(
        GRPO, samples=4, max_tokens=4, heldout_prompts=4, heldout_samples=2, preflight="stop"
    )
    e = dataclasses.replace(experiment, objective=objective)
    with pytest.raises(UserError, match=r"no-go: .*pass@4"):
        rl.run(e, tmp_path / "run", e)
    assert "no-go" in (tmp_path / "run" / "preflight.txt").read_text()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data": Data()}, "learns from Prompts"),
        ({"objective.samples": 3}, "no multiple of samples"),
        ({"data.context": 6}, r"prompt .*: it has \d tokens, and 2 fit: data.context=6 less objective.max_tokens=4"),
        ({"objective.reward": (Function("nowhere:f"),)}, "nowhere"),
        ({"data.tools": ("calculator",)}, "called in conversations"),
        ({"data.tokenizer": None}, "only with a parent"),
    ],
    ids=lambda c: next(iter(c)) if isinstance(c, dict) else "",
)
def test_bad_definitions_are_refused(experiment, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        rl.run(config.override(experiment, changes), tmp_path / "run", experiment)


# ------------------------------------------------------------------------------------------------------ reward models
SCALE = {"schema_version": 1, "gain": 2.0, "bias": -0.5, "step": 5, "responses": 3}


def made_reward(workdir, model):
    """(definition, parameters) of a reward model's run, with random parameters and `SCALE`."""
    ranked = Experiment(
        model=model, data=Preferences(tokenizer=Bytes(), context=64), objective=RewardModel(),
        checkpoint=Checkpointing(every=2),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype) * 0.3, heads.abstract(model, None, ("reward",))
    )
    tiny_run.make(workdir, ranked, 5, params)
    (workdir / "reward.json").write_text(json.dumps(SCALE))
    return ranked, params


def rewarded(experiment, parent, run: str):
    """One step from a parent by a reward model, from which the critic starts, too."""
    return config.override(experiment, {
        "parent": str(parent), "model": None, "data.tokenizer": None, "train.steps": 1, "objective.preflight": "off",
        "objective.reward": (Learned(run),), "objective.critic": Critic(run, FAST), "objective.missing_stop": None,
        "objective.reward_timeout": 120.0,  # it compiles
    })  # fmt: skip


def test_a_reward_model_gives_the_reward_and_the_critics_beginning(experiment, whole, tmp_path):
    model = load.load_bound(whole).model
    ranked, params = made_reward(tmp_path / "reward", model)
    run = str(tmp_path / "reward")
    e = rewarded(experiment, whole, run)
    bound = train.bind(train.inherit(e), model.vocab_size)
    mesh = sharding.make_mesh(MeshConfig(fsdp=1))
    critic = rl.begin(bound, mesh, rl._records(bound)).critic.params
    np.testing.assert_allclose(critic["heads"]["value"]["kernel"], 2.0 * params["heads"]["reward"]["kernel"])
    np.testing.assert_allclose(critic["heads"]["value"]["bias"], 2.0 * params["heads"]["reward"]["bias"] - 0.5)
    assert_same(critic["backbone"], params["backbone"])

    assert rl.run(e, tmp_path / "run", e) == exits.EXIT_DONE
    record = read_metrics(tmp_path / "run")[-1]
    assert record["train/reward"] == pytest.approx(record["train/reward/learned"]) and record["train/reward_std"] > 0
    assert record["train/value/explained_variance"] != 0.0
    lineage = json.loads((tmp_path / "run" / "lineage.json").read_text())
    assert lineage["critic"]["step"] == 5 and lineage["rewards"][run]["gain"] == 2.0

    (tmp_path / "reward" / "reward.json").write_text(json.dumps(SCALE | {"gain": 3.0}))
    with pytest.raises(UserError, match="its scale set anew"):
        rl.run(config.override(e, {"train.steps": 2}), tmp_path / "run", e)
    other = config.override(e, {"objective.critic": Critic(str(tmp_path / "other"), FAST)})
    tokenizer, tiny_run.TOKENIZER = tiny_run.TOKENIZER, CharsTokenizer("0123456789+=")
    try:
        tiny_run.make(tmp_path / "other", ranked, 5, params)
    finally:
        tiny_run.TOKENIZER = tokenizer
    with pytest.raises(UserError, match="is not that of critic"):
        rl.run(other, tmp_path / "other_run", e)


def test_a_refusal_leaves_what_was_written(experiment, whole, tmp_path):
    """A parent that has pruned the step that its child began with: who knows it as the reference finds out last."""
    parent, run = shutil.copytree(whole, tmp_path / "parent"), tmp_path / "run"
    e = config.override(experiment, {"parent": str(parent), "train.steps": 1, "objective.preflight": "off"})
    assert rl.run(e, run, e) == exits.EXIT_DONE
    shutil.rmtree(parent / "checkpoints" / str(STEPS))
    e = config.override(e, {"train.steps": 2, "optimizer.lr": 2e-3})
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    gone = pytest.raises(UserError, match=rf"has no checkpoint of step {STEPS}; it has \[")
    with lineage.allowing(run, ["optimizer"], e), gone:
        rl.run(e, run, e)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == files


def test_a_start_that_a_reward_model_refuses_leaves_no_definition(experiment, whole, tmp_path):
    """Which the setting that names another one would then differ from."""
    made_reward(tmp_path / "reward", load.load_bound(whole).model)
    damaged = next(p for p in (tmp_path / "reward" / "checkpoints" / "5" / "state").rglob("*") if p.is_file())
    damaged.write_bytes(b"")
    e = config.override(rewarded(experiment, whole, str(tmp_path / "reward")), {"objective.critic": Critic(None, FAST)})
    with pytest.raises(UserError, match=r"reward/checkpoints/5 is damaged"):
        rl.run(e, tmp_path / "run", e)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_smaller_reward_model_and_its_critic_on_one_device_and_on_eight(experiment, whole, tmp_path):
    """Half as wide as the policy, of its tokenizer: policy, reference, reward model and critic share the mesh."""
    policy = load.load_bound(whole).model
    small = dataclasses.replace(policy, width=8, hidden=16)
    _, params = made_reward(tmp_path / "reward", small)
    e = rewarded(experiment, whole, str(tmp_path / "reward"))
    e = config.override(e, {"objective.heldout_prompts": 1, "objective.epochs": 1, "objective.minibatches": 1})
    found = []
    for devices, axes in ((1, {"mesh.fsdp": 1}), (8, {"mesh.fsdp": 4, "mesh.tensor": 2})):
        run = config.override(e, axes)
        bound = train.bind(train.inherit(run), policy.vocab_size)
        s = rl.begin(bound, sharding.make_mesh(run.mesh), rl._records(bound))
        for tree, width in ((s.params, 16), (s.critic.params, 8)):
            table = tree["backbone"]["embed"]["tokens"]
            assert table.shape[1] == width and len(table.sharding.device_set) == devices
        np.testing.assert_allclose(
            s.critic.params["heads"]["value"]["kernel"], 2.0 * params["heads"]["reward"]["kernel"]
        )
        assert rl.run(run, tmp_path / f"on {devices}", run) == exits.EXIT_DONE
        found.append(read_metrics(tmp_path / f"on {devices}")[-1])
    names = "reward reward_std value/mean value/explained_variance critic/value critic/gradient_norm gradient_norm loss"
    one, eight = ({n: r[f"train/{n}"] for n in names.split()} for r in found)
    assert one["reward_std"] > 0 and one["critic/gradient_norm"] > 0 and one["value/mean"] != 0
    assert eight == pytest.approx(one, rel=1e-3, abs=1e-6)
