"""A step of reinforcement learning: where its time goes, and rewards that are asked while others are decoded."""

import collections
import contextlib
import dataclasses
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config, sharding
from jaxlm.config import UserError
from jaxlm.data import prompts
from jaxlm.data.conversation import Message
from jaxlm.data.prompts import Addition, Prompt, PromptFile, Prompts
from jaxlm.data.tokenizer import Bytes, BytesTokenizer
from jaxlm.feedback.parts import Correct, Function, Learned
from jaxlm.feedback.scoring import each
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Linear
from jaxlm.rl.kl import Adaptive
from jaxlm.rl.rewards import Replace
from jaxlm.run import exits, goodput, rl, rl_metrics, train
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.run.goodput import Clock
from jaxlm.sample import slots
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import Completion
from jaxlm.sharding import MeshConfig
from jaxlm.steps import learn, rollout
from jaxlm.steps.policy import GRPO, PPO, Critic, DynamicSampling
from jaxlm.steps.rollout import Sample
from jaxlm.steps.update import Train
from tests.run import rewarding
from tests.run.rl_runs import assert_same, said, saved

BATCH, ONE = (Function(f"tests.run.rewarding:{name}") for name in ("reward", "one"))
FAST = AdamW(lr=3e-3, weight_decay=0.0, schedule=Linear())
HELD = {"heldout_prompts": 2, "heldout_samples": 2, "preflight": "off", "slots": 4, "max_tokens": 4, "samples": 4}
OBJECTIVES = {
    "ppo": dataclasses.replace(
        PPO, epochs=2, minibatches=2, kl=Adaptive(0.1, target=0.5, horizon=40.0), critic=Critic(optimizer=FAST),
        missing_stop=Replace(-1.0), **HELD,
    ),
    "grpo": dataclasses.replace(GRPO, **HELD),
}  # fmt: skip


@pytest.fixture(autouse=True)
def behaves():
    rewarding.WAY["now"] = "length"
    rewarding.ASKED.clear(), rewarding.HEARD.clear()
    yield
    rewarding.WAY["now"] = "length"


def experiment(name: str, *reward) -> Experiment:
    return Experiment(
        model=ModelConfig(layers=1, width=16, heads=2, hidden=32),
        data=Prompts(task=Addition(digits=1), tokenizer=Bytes(), context=24),
        objective=dataclasses.replace(OBJECTIVES[name], reward=reward or (BATCH,), reward_timeout=2.0),
        optimizer=FAST,
        train=Train(steps=3, batch_size=16, log_every=1),
        evaluation=Evaluation(every=3),
        checkpoint=Checkpointing(every=1, keep_latest=3),
        mesh=MeshConfig(fsdp=1),
    )


def a_step(e: Experiment, root):
    """(trainer, a state to begin with): a step outside of a run."""
    e = train.bind(e, 288)
    mesh = sharding.make_mesh(e.mesh)
    tokenizer = rl.prepared(e.data).tokenizer
    scoring = rl.Scoring(e, tokenizer, mesh, root, 0)
    return rl.Trainer(e, mesh, tokenizer, rl._reference(e, mesh, {}), e.model, scoring), rl.begin(e, mesh, {})


# ------------------------------------------------------------------------------------------------ where the time goes
@jax.jit
def late(x):
    """x, when the device has been busy for a while."""
    busy = jax.lax.fori_loop(0, 400, lambda _, m: jnp.tanh(m @ m), jnp.ones((96, 96)))
    return jax.tree.map(lambda a: a + (busy[0, 0] * 0).astype(a.dtype), x)


@pytest.mark.parametrize(
    "name, parts",
    [
        ("ppo", {"rollout", "reward", "old_logprobs", "ref_logprobs", "values", "update", "host"}),
        ("grpo", {"rollout", "reward", "ref_logprobs", "update", "host"}),
    ],
)
def test_each_part_of_a_step_has_its_own_time_and_they_add_up(name, parts, tmp_path, monkeypatch):
    """By a clock that goes on only where work is begun; and what a part has begun on the device is done when it ends,
    though the device takes its time."""
    trainer, s = a_step(experiment(name), tmp_path)
    now, cost, begun = [0.0], collections.Counter(), []

    def costing(part: str, seconds: float, f, on_device: bool = False):
        def run(*args, **kwargs):
            now[0] += seconds
            cost[part] += seconds
            out = f(*args, **kwargs)
            if on_device:
                out = late(out)
                begun.extend(jax.tree.leaves(out))
            return out

        return run

    clock = Clock(lambda: now[0], "host")
    phase = clock.phase

    @contextlib.contextmanager
    def watched(part: str):
        with phase(part):
            yield
        assert all(x.is_deleted() or x.is_ready() for x in begun), part

    trainer.clock, clock.phase = clock, watched
    programs = {"score": ("old_logprobs", 1.0), "refer": ("ref_logprobs", 2.0), "evaluate": ("values", 4.0),
                "improve": ("update", 8.0), "improve_critic": ("update", 16.0)}  # fmt: skip
    compiled = {k: getattr(trainer.learner, k) for k in programs if name == "ppo" or "critic" not in k}
    for k, program in compiled.items():
        part, seconds = programs[k]
        trainer.learner.__dict__[k] = costing(part, seconds, program, on_device=True)
    monkeypatch.setattr(rollout, "sample", costing("rollout", 0.5, rollout.sample))
    monkeypatch.setattr(rl_metrics, "of_samples", costing("host", 128.0, rl_metrics.of_samples))
    for way, seconds in (("verdicts", 32.0), ("rewards", 64.0)):
        monkeypatch.setattr(trainer.scoring, way, costing("reward", seconds, getattr(trainer.scoring, way)))

    with trainer.clock.phase("rollout"):  # whatever happens between the steps is not theirs
        now[0] += 1000.0
    _, metrics = trainer(s, 0)
    spent = {k.removeprefix("seconds/"): v for k, v in metrics.items() if k.startswith("seconds/")}
    assert spent == cost and set(spent) == parts
    assert begun and metrics["steps_per_second"] == 1 / sum(cost.values())
    assert metrics["responses_per_second"] == 16 / sum(cost.values())


# ------------------------------------------------------------------------------------------------- while others decode
def test_a_reward_of_one_sample_is_asked_while_others_are_decoded(tmp_path, monkeypatch):
    """Decoding waits until the first reward has been asked, which without the overlap would be after it."""
    trainer, s = a_step(experiment("ppo", ONE, Correct()), tmp_path)
    decode, heard = slots.decode, []

    def waiting(*args):
        heard.append(len(heard) >= 3 and rewarding.HEARD.wait(20))  # something has ended by the third look
        return decode(*args)

    monkeypatch.setattr(slots, "decode", waiting)
    trainer.roll(s, 0)
    assert len(heard) > 3 and all(heard[3:])
    assert len(rewarding.ASKED) < 16  # the last ones are asked with all others, when they are needed


@pytest.mark.parametrize("reward, dynamic", [(BATCH, None), (ONE, DynamicSampling(1))], ids=["batch", "dropped"])
def test_a_reward_of_a_batch_or_of_groups_that_may_be_dropped_waits(reward, dynamic, tmp_path):
    """A batch is asked for at once. Of groups that are dropped only the verdict is ever asked."""
    e = config.override(experiment("grpo", reward), {"objective.dynamic": dynamic})
    trainer, s = a_step(e, tmp_path)
    trainer.roll(s, 0)
    assert not rewarding.ASKED
    assert len(trainer.scoring._known) == 16 * (1 + (dynamic is not None))


def journal(workdir) -> dict:
    lines = [json.loads(line) for line in (workdir / "journal.jsonl").read_text().splitlines()]
    found = {(r["step"], r["key"].replace(ONE.path, BATCH.path)): r["value"] for r in lines}
    assert len(found) == len(lines)  # nothing is asked twice
    return found


def one_after_another(sample, ended: list):
    """`sample`, but nothing is decoded while what has ended is scored: so it is known how much has been."""

    def sampled(*args):
        *args, done = args

        def wait(found):
            done(found).result()
            ended.extend(found)

        return sample(*args, wait)

    return sampled


def test_rewards_asked_ahead_change_nothing_even_where_a_rollout_was_interrupted(tmp_path, monkeypatch):
    """One run asks a batch at a time; the other sample by sample, and dies in a rollout of which part is scored."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    e = experiment("ppo", BATCH, Correct(0.5))
    assert rl.run(e, whole, e) == exits.EXIT_DONE
    ahead = config.override(e, {"objective.reward": (ONE, Correct(0.5))})
    ended, roll = [], rl.Trainer.roll

    def dying(*args):
        one_after_another(sample, ended)(*args)
        raise RuntimeError("power cut")

    def until(trainer, s, n):
        with monkeypatch.context() as m:
            if n == 2:
                m.setattr(rollout, "sample", dying)
            return roll(trainer, s, n)

    sample = rollout.sample
    with monkeypatch.context() as m:
        m.setattr(rl.Trainer, "roll", until)
        with pytest.raises(RuntimeError, match="power cut"):
            rl.run(ahead, run, ahead)
    before = journal(run)
    assert 0 < len(ended) < 16 and sum(step == 2 for step, _ in before) == len(ended)
    assert rl.run(ahead, run, ahead) == exits.EXIT_DONE
    assert journal(run) == journal(whole) and before.items() <= journal(run).items()
    assert_same(saved(run), saved(whole))
    assert said(run) == said(whole)
    count, parts = goodput.step_parts(run)
    assert count == 1 and set(parts) == set(goodput.STEP_PARTS)  # the first of each start is left out


def test_a_verdict_that_fails_ahead_names_the_sample_of_the_batch(tmp_path, monkeypatch):
    """Although those before it were known by then."""
    trainer, s = a_step(experiment("grpo", Correct()), tmp_path)
    counts, ended = [], []

    def failing(asked, reply, metadata):
        if metadata["address"] == "0/2/1":
            raise ValueError("no such luck")
        return 1.0

    def task(asked, replies, metadata):
        counts.append(len(asked))
        return each(failing)(asked, replies, metadata)

    trainer.scoring._task = task
    monkeypatch.setattr(rollout, "sample", one_after_another(rollout.sample, ended))
    with pytest.raises(UserError, match=r"sample 9 of 16: it raised ValueError .*no such luck"):
        trainer(s, 0)
    assert len(counts) > 3 and counts[-1] == 16 and len(ended) > 9


def test_what_fails_ahead_is_said_as_ever_and_goes_on_when_it_is_mended(tmp_path):
    e = config.override(experiment("ppo", ONE), {"objective.reward_timeout": 0.5})
    trainer, s = a_step(e, tmp_path)
    start = jax.device_get(s)
    ways = {"raises": "it raised ValueError .*no such luck", "nan": "it gave nan",
            "hangs": "no answer within 0.5 s; it stands at rewarding.py"}  # fmt: skip
    for way, words in ways.items():
        rewarding.WAY["now"] = way
        with pytest.raises(UserError, match=f"function.*sample 0 of 16: {words}"):
            trainer(s, 0)
    assert_same(jax.device_get(s), start)
    rewarding.WAY["now"] = "length"
    after, metrics = trainer(s, 0)
    assert after.step == 1 and metrics["reward"] > -1


# ------------------------------------------------------------------------------------------------- what goes wrong
def test_a_reward_model_has_all_the_time_that_it_takes_to_compile(tmp_path, monkeypatch):
    """A function is asked in a thread of its own, which a clock watches; a model in the run's own."""
    watched = {}

    def noting(name: str):
        def reward(prompts, completions, metadata):
            watched[name] = threading.current_thread() is not threading.main_thread()
            return [1.0] * len(prompts)

        return reward

    monkeypatch.setattr(rl.reward, "reward_function", lambda *_: noting("model"))
    monkeypatch.setattr(rewarding, "reward", noting("function"))
    e = experiment("grpo", Learned("nowhere"), BATCH)
    scoring = rl.Scoring(e, BytesTokenizer(), None, tmp_path, 0)
    reply = Reply(Message("assistant", "2"), Completion((50,), (0.0,), "2", "stop", (True,)))
    found = [Sample(Prompt("1+1=", {"answer": "2"}, "0"), 0, rank, (49, 50), reply, 1.0) for rank in range(2)]
    assert scoring.rewards(found, 0) == [2.0, 2.0]
    assert watched == {"model": False, "function": True}


def test_a_prompt_that_leaves_no_room_is_named_before_the_run_that_asks_it(tmp_path):
    """One that the run does not come to is let be."""
    asked = [f"{i}+1=" for i in range(40)]
    asked[17] = "4+" * 16
    lines = [json.dumps({"prompt": text, "answer": "2"}) + "\n" for text in asked]
    (tmp_path / "asked.jsonl").write_text("".join(lines))
    task = PromptFile(str(tmp_path / "asked.jsonl"), as_text=True, heldout=0.2)
    e = config.override(experiment("grpo"), {"data.task": task, "train.steps": 20})
    ids = [prompts.at(e.data, "train", e.seed, i).id for i in range(prompts.size(e.data, "train"))]
    place = ids.index("asked.jsonl:18")
    rl.check_prompts(config.override(e, {"train.steps": place // 4}), BytesTokenizer())
    words = r"prompt asked.jsonl:18: it has 33 tokens, and 20 fit: data.context=24 less objective.max_tokens=4; leave"
    with pytest.raises(UserError, match=words):
        rl.check_prompts(config.override(e, {"train.steps": place // 4 + 1}), BytesTokenizer())
    with pytest.raises(UserError, match=words):
        rl.run(e, tmp_path / "run", e)
    assert not (tmp_path / "run").exists()


def test_updates_that_a_critic_left_out_are_counted(tmp_path, monkeypatch):
    """Those of the first epoch, by returns that are no numbers; the policy has none of these in its loss."""
    trainer, s = a_step(experiment("ppo"), tmp_path)
    minibatches = learn.minibatches

    def poisoned(learner, columns, step, epoch):
        found = minibatches(learner, columns, step, epoch)
        for batch in found if epoch == 0 else ():
            batch.returns[batch.sampled_by_policy] = np.nan
        return found

    monkeypatch.setattr(learn, "minibatches", poisoned)
    for n in (0, 1):
        s, metrics = trainer(s, n)
        assert metrics["critic/updates_skipped"] == 2 * (n + 1) and metrics["updates_skipped"] == 0
    assert rl_metrics.key_of("train/critic/updates_skipped") == "critic/updates_skipped"
