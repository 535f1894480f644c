"""The benchmark of learning: what both sides are given is the same, and what is made of their figures is right."""

import dataclasses
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.rl import WALK, random_reward, walks_sft
from jaxlm import config
from jaxlm.config import UserError
from jaxlm.data.prompts import Prompt, Walks
from jaxlm.data.tasks import walks
from jaxlm.data.tokenizer import CharsTokenizer
from jaxlm.interop import export, to_hf
from jaxlm.nn.transformer import ModelConfig
from jaxlm.optim.schedules import Linear, factor
from jaxlm.run import objectives, rl, train
from jaxlm.run.experiment import prepared
from jaxlm.run.load import load_run
from launch import bench, bench_rl, bench_rl_task, bench_rows, bench_trl
from launch.bench_rl import OURS, THEIRS
from launch.bench_rl_task import Load
from tests import tiny_run

flags.FLAGS.set_gnu_getopt(True)
LOAD = Load(seeds=(0,), updates=3, walks=8, pairs=4, judged=2)
LETTERS = CharsTokenizer("".join(map(walks.letter, range(21))))
MODEL = ModelConfig(layers=1, width=16, heads=2, hidden=32, vocab_multiple=1, vocab_size=LETTERS.vocab_size)
PAIRS = [{"prompt": p, "chosen": "a", "rejected": "cda"} for p in "bcdefghijklmnopqrstu"]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A workdir like one of walks_sft, with random parameters."""
    workdir = tmp_path_factory.mktemp("walks") / "parent"
    tiny_run.make(workdir, dataclasses.replace(walks_sft(), model=MODEL))
    LETTERS.save(workdir / "tokenizer")
    return str(workdir)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    return str(path)


@pytest.fixture(scope="module")
def run(parent):
    return load_run(parent)


def said(start: str, text: str, place: int = 0, ended: bool = True):
    reply = types.SimpleNamespace(message=types.SimpleNamespace(text=text))
    return types.SimpleNamespace(prompt=Prompt(start, {}, ""), place=place, ended=ended, reply=reply)


def test_of_two_walks_the_shorter_is_chosen():
    task = Walks()
    walk = next(w for w in (walks.walk(task, i) for i in range(200)) if w.endswith("a") and len(w) > 3)
    start, rest = walk[0], walk[1:]
    found = [said(start, start), said(start, rest), said(start, rest), said(start, rest)]  # no edge leads to itself
    assert bench_rl_task.paired_walks(task, found) == [{"prompt": start, "chosen": rest, "rejected": start}]
    assert not bench_rl_task.paired_walks(task, [said(start, rest), said(start, start, place=1)])
    assert not bench_rl_task.paired_walks(task, [said(start, rest), said(start, start, ended=False)])
    assert not bench_rl_task.paired_walks(task, [said(start, rest), said(start, "")])


def test_labels_are_tossed_and_nothing_else():
    both = [{"prompt": "b", "chosen": f"{i}", "rejected": f"-{i}"} for i in range(200)]
    after = bench_rl_task.tossed(both)
    assert after == bench_rl_task.tossed(both)
    assert [{p["chosen"], p["rejected"]} for p in after] == [{p["chosen"], p["rejected"]} for p in both]
    assert 70 < sum(a == b for a, b in zip(after, both)) < 130


def test_both_sides_are_given_the_same(parent, pairs):
    e = bench_rl_task.grpo(parent, Walks(), LOAD, seed=3)
    given = bench_rl_task.arguments(dataclasses.replace(e, optimizer=dataclasses.replace(e.optimizer, lr=0.25)))
    assert given["learning_rate"] == 0.25 and given["max_steps"] == 3 and given["seed"] == 3
    assert given["per_device_train_batch_size"] == e.train.batch_size and given["num_generations"] == 8
    assert given["max_completion_length"] == WALK and given["loss_type"] == "grpo" and given["beta"] == 0.0
    for step in range(5):  # what "linear" means in transformers
        assert factor(Linear(), step, 5) == pytest.approx((5 - step) / 5)
    asked = bench_rl_task.prompts_in_order(e)
    assert len(asked) == 3 * 256 // 8 and len(set(asked[:20])) == 20 and set(asked) <= set("bcdefghijklmnopqrstu")
    e = bench_rl_task.dpo(parent, pairs, LOAD, seed=0)
    assert bench_rl_task.arguments(e)["beta"] == 0.1 and bench_rl_task.arguments(e)["loss_type"] == ["sigmoid"]
    kept = bench_rl_task.training_pairs(e)
    assert 10 < len(kept) < 20 and all(p in PAIRS for p in kept)
    seen = bench_rl_task.arguments(e) | {"beta": 0.2, "optim": "adamw"}
    rows = bench_rl.settings(e, seen)
    assert rows["beta"] == "0.1 (TRL 0.2)" and rows["optim (TRL's own)"] == "adamw" and rows["max_steps"] == "3"


def test_our_side_trains_and_is_judged(parent, run, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    e = random_reward(bench_rl_task.grpo(parent, Walks(), LOAD, 0))  # even such a model is given one
    workdir = str(tmp_path / "run")
    figures = bench_rl.train_ours({"experiment": config.to_json(e), "workdir": workdir})
    assert 0 < figures["compile_seconds"] < figures["seconds"] and figures["cpu_seconds"] > 0
    assert len(figures["updates"]) == len(figures["sampling"]) == 2 and len(figures["cpu_updates"]) == 1
    assert 0 < figures["sampling"][0] < figures["updates"][0] and figures["cpu_updates"][0] > 0
    learned = load_run(workdir).params
    moved = np.abs(learned["backbone"]["embed"]["tokens"] - run.params["backbone"]["embed"]["tokens"]).max()
    assert 0 < moved < 1e-3
    scores = bench_rl_task.judged(run, learned, Walks(), LOAD)
    assert set(scores) == {"score", "greedy"} and all(0 <= v <= 1 for v in scores.values())


def test_a_row_of_a_batch_is_a_pair(parent, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    e = train.inherit(bench_rl_task.dpo(parent, pairs, LOAD, 0))
    objectives.validate(e)
    found = prepared(e.data, progress=False)
    assert found.train["comparisons"].rows == len(bench_rl_task.training_pairs(e))
    assert found.valid["comparisons"].rows + found.train["comparisons"].rows == len(PAIRS)


def test_models_that_differ_are_refused(run):
    def theirs(tokens):
        return bench_rl._logits(run.model, run.params, np.array(tokens))

    assert bench_rl.check_equal(run, theirs) == 0
    with pytest.raises(UserError, match=r"not the same model: logits differ by 0\.0002, 0\.0001 is allowed"):
        bench_rl.check_equal(run, lambda tokens: theirs(tokens) + jnp.float32(2e-4))
    for wrong in (lambda t: theirs(t)[..., :-1], lambda t: theirs(t) * jnp.nan):
        with pytest.raises(UserError, match="not the same model"):
            bench_rl.check_equal(run, wrong)


def figures(seconds, compiling, update, score):
    return {
        "seconds": seconds, "compile_seconds": compiling, "cpu_seconds": 2 * seconds, "score": score, "greedy": 1.0,
        "updates": [update, update, 100.0], "cpu_updates": [update], "sampling": [],
        "peak_bytes": 3e9,
    }  # fmt: skip


def test_ratios_are_of_one_seed_and_medians_of_updates():
    runs = {
        OURS: [figures(10.0, 6.0, 0.1, 0.9), figures(20.0, 10.0, 0.2, 0.8)],
        THEIRS: [figures(20.0, 0.0, 0.4, 0.7), figures(20.0, 0.0, 0.4, 0.7)],
    }
    t = bench_rl.timing(runs)
    assert t["times as fast"]["seconds, cold"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert t["times as fast"]["seconds, warm"]["median"] == t["times as fast"]["CPU seconds, warm"]["median"] == 1.0
    assert t["times as fast"]["seconds without compiling"] == {"median": 3.5, "min": 2.0, "max": 5.0}
    assert t["times as fast"]["ms an update"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert t[OURS]["ms an update"]["min"] == 100.0 and t[OURS]["of them compiling, warm"]["max"] == 10.0
    assert t[OURS]["GB at most"]["median"] == 3.0 and "GB at most" not in t["times as fast"]
    assert not [name for name in t[THEIRS] if "of them compiling" in name]
    q = bench_rl.quality({"score": 0.5, "greedy": 0.6}, runs, {"coin": {"score": 0.4, "greedy": 0.5, "seconds": 1.0}})
    assert q["jaxlm - TRL"]["score"] == "+0.1500" and q["coin"] == {"score": 0.4, "greedy": 0.5}
    assert q[OURS]["score"] == {"median": pytest.approx(0.85), "min": 0.8, "max": 0.9} and q["parent"]["score"] == 0.5
    one = bench_rl.quality(q["parent"], {side: found[:1] for side, found in runs.items()}, {})
    assert one["jaxlm - TRL"]["95% interval"] == "one seed"
    assert "times as fast" not in bench_rl.timing({OURS: runs[OURS]}) and "grpo" in bench_rows.table({"grpo": q})
    assert bench_rl.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4 and bench_rl.covered([]) == 0


def test_bad_input(tmp_path, monkeypatch):
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["bench"])
    tiny_run.make(tmp_path / "other")
    for options, message in (
        ({"suite": "decode", "against": "trl"}, "--against=trl is the other side of --suite=rl"),
        ({"suite": "rl", "against": "torch"}, "--against=torch is the other side of --suite=train or decode"),
        ({"suite": "rl", "parent": "nowhere"}, "no such workdir: nowhere"),
        ({"suite": "rl", "parent": str(tmp_path / "other")}, "has not read random walks letter by letter"),
    ):
        with flagsaver.flagsaver(**options), pytest.raises(UserError, match=message):
            bench.main()
    with pytest.raises(UserError, match=r"nothing ended with code 1: .*No module named launch.nothing"):
        bench_rl.in_process("launch.nothing", {}, tmp_path, "nothing")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else found("json"))
    with flagsaver.flagsaver(suite="rl", against="trl"), pytest.raises(UserError) as e:
        bench.main()
    assert str(e.value) == "--against=trl needs trl: pip install -e '.[trl]'"


def test_their_side_is_the_same_model_and_learns(parent, run, pairs, tmp_path):
    pytest.importorskip("trl")
    folder = str(tmp_path / "hf")
    export.export_hf(parent, folder)
    found = bench_trl.logits({"model": folder, "tokens": [[2, 33, 34]]})
    assert np.shape(found["logits"]) == (1, 3, LETTERS.vocab_size)
    assert bench_rl.check_equal(run, lambda t: bench_trl.logits({"model": folder, "tokens": t})["logits"]) < 1e-4
    fast = bench_trl.fast_tokenizer(LETTERS)
    assert fast("bca")["input_ids"] == [LETTERS.bos, *LETTERS.encode("bca")]
    assert fast("bca<|end|>")["input_ids"][-1] == LETTERS.eos == fast.eos_token_id
    assert fast.decode([*LETTERS.encode("cda"), LETTERS.eos], skip_special_tokens=True) == "cda"
    e = bench_rl_task.dpo(parent, pairs, LOAD, 0)
    job = {
        "kind": "dpo", "model": folder, "out": str(tmp_path / "out"), "arguments": bench_rl_task.arguments(e),
        "records": bench_rl_task.training_pairs(e), "cpu": True,
    }  # fmt: skip
    done = bench_trl.train(job)
    assert done["settings"]["learning_rate"] == e.optimizer.lr and done["settings"]["lr_scheduler_type"] == "linear"
    assert len(done["updates"]) == len(done["cpu_updates"]) == 2 and done["seconds"] > 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_update_on_the_same_walks_is_the_same(parent, run, tmp_path, monkeypatch):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    roll, rewards, seen = rl.Trainer.roll, rl.Scoring.rewards, {}
    monkeypatch.setattr(rl.Trainer, "roll", lambda self, *a: seen.setdefault("walks", roll(self, *a)))
    monkeypatch.setattr(rl.Scoring, "rewards", lambda self, *a: seen.__setitem__(a[1], rewards(self, *a)) or seen[a[1]])
    e = random_reward(bench_rl_task.grpo(parent, Walks(), dataclasses.replace(LOAD, updates=1), 0))
    assert rl.run(e, str(tmp_path / "ours")) == 0
    found, coins = seen["walks"].samples, seen[0]
    folder = str(tmp_path / "hf")
    export.export_hf(parent, folder)
    model = bench_trl._model(folder)
    given = bench_rl_task.arguments(e) | bench_trl.PLAIN | {"output_dir": str(tmp_path / "out"), "use_cpu": True}
    asked = [x.prompt.asked for x in found]
    trl.GRPOTrainer(
        model=model,
        args=trl.GRPOConfig(**given, shuffle_dataset=False),
        reward_funcs=lambda prompts, **_: coins,
        processing_class=bench_trl.fast_tokenizer(LETTERS),
        train_dataset=datasets.Dataset.from_list([{"prompt": p} for p in asked[:: e.objective.samples]]),
        rollout_func=lambda prompts, trainer: {
            "prompt_ids": [list(x.prompt_ids) for x in found],
            "completion_ids": [list(x.reply.completion.ids) for x in found],
            "logprobs": [list(x.reply.completion.logprobs) for x in found],
        },
    ).train()
    ours = to_hf.tensors(run.model, "llama", jax.device_get(load_run(tmp_path / "ours").params))
    before = to_hf.tensors(run.model, "llama", jax.device_get(run.params))
    theirs = {name: x.detach().numpy() for name, x in model.state_dict().items()}
    assert set(ours) == set(theirs)
    for name in ours:
        # Adam's first step is the sign of the gradient, but where that is as small as eps.
        assert np.abs(ours[name] - before[name]).max() > 0.9 * e.optimizer.lr, name
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=0.1 * e.optimizer.lr, err_msg=name)
