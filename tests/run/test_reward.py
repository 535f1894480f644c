"""From rankings to a reward model, to a reward function, to better answers without one; interrupted, mistaken."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import UserError
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.preference_sources import Comparisons
from jaxlm.data.preferences import Preferences
from jaxlm.data.tokenizer import Bytes, Chars
from jaxlm.losses.preference import Dpo
from jaxlm.nn import transformer
from jaxlm.nn.lora import LoRA
from jaxlm.optim.optimizers import AdamW
from jaxlm.optim.schedules import Cosine
from jaxlm.run import exits, load, reward, train
from jaxlm.run.checkpoint import Checkpointing
from jaxlm.run.experiment import Evaluation, Experiment
from jaxlm.run.log import read_metrics
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import Completion
from jaxlm.sharding import MeshConfig
from jaxlm.steps.preference import Preference
from jaxlm.steps.reward import RewardModel
from jaxlm.steps.update import Train
from tests import tiny_run
from tests.run.test_train import assert_same, crashed_and_resumed

STEPS = 20


def letters(rng) -> str:
    return "".join(rng.choice(list("ab"), 8))


def gold(text: str) -> int:
    """The rule to be learned: the more a's the better."""
    return text.count("a")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A parent run with fresh parameters, and rankings of three answers to each of 120 prompts by the rule."""
    folder = tmp_path_factory.mktemp("preferences")
    parent = tiny_run.EXPERIMENT
    params = jax.jit(lambda: transformer.init(parent.model, jax.random.key(0)))()
    tiny_run.make(folder / "parent", params=params)
    rng, lines = np.random.default_rng(0), []
    for i in range(120):
        answers = [letters(rng) for _ in range(3)]
        best = sorted({gold(a) for a in answers}, reverse=True)
        lines.append({"prompt": f"{i}", "answers": answers, "ranks": [best.index(gold(a)) for a in answers]})
    (folder / "ranked.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.fixture(scope="module")
def experiment(root):
    return Experiment(
        model=None,
        parent=str(root / "parent"),
        data=Preferences((Comparisons(str(root / "ranked.jsonl")),), 0.3, context=104, cache=str(root / "cache")),
        objective=RewardModel(),
        optimizer=AdamW(lr=5e-3, b2=0.98, weight_decay=0.0, schedule=Cosine(warmup=3)),
        train=Train(steps=STEPS, batch_size=8, log_every=5),
        evaluation=Evaluation(every=10, batch_size=16),
        checkpoint=Checkpointing(every=10),
        mesh=MeshConfig(fsdp=1),
    )


@pytest.fixture(scope="module")
def trained(experiment, root):
    assert train.train(experiment, root / "reward") == exits.EXIT_DONE
    return root / "reward"


def test_a_rule_is_learned(trained):
    *others, last = read_metrics(trained)
    assert others[0]["train/accuracy"] < 0.9  # not there from the beginning
    assert last["eval/all/accuracy"] > 0.9 and last["eval/all/rank_agreement"] > 0.8
    assert last["eval/comparisons/best_found"] > 0.85 and last["eval/all/loss"] < 0.3
    assert 0 <= last["eval/all/calibration_error"] < 0.1
    assert sum(k.startswith("eval/all/reliability/") for k in last) == 10
    lineage = json.loads((trained / "lineage.json").read_text())
    assert lineage["parent"]["step"] == 7 and len(lineage["parent"]["checkpoint"]) == 64


def said(text: str) -> Message:
    return Message("assistant", text)


def test_the_reward_function_scores_as_the_rule_and_each_sample_alone(trained):
    score, rng = reward.reward_function(trained), np.random.default_rng(1)
    texts = [letters(rng) for _ in range(30)] + [letters(rng) * i for i in range(10)]
    together = score(["new"] * 40, texts, [{}] * 40)
    assert np.corrcoef(together[:30], [gold(t) for t in texts[:30]])[0, 1] > 0.9
    for i in (0, 30, 39):  # bit for bit, whoever is beside it
        conversation = Conversation((Message("user", "new"),))
        assert score([conversation], [said(texts[i])], [{}]) == [together[i]]
    assert score([], [], []) == []
    assert score(["new", "why? " * 200, "new"], ["aa", "aa", "aa" * 200], [{}] * 3)[1:] == [None, None]


def test_padding_changes_no_score(trained):
    run, _ = reward.load_reward(trained)
    ids = [int(i) for i in np.random.default_rng(0).integers(8, 200, 16)]
    (short,) = reward.raw_scores(run, [ids])
    tokens, lengths = np.full((16, 64), 9, np.int32), np.full(16, 16, np.int32)
    tokens[0, :16] = ids
    assert float(reward.last_rewards(run.model, run.params, tokens, lengths)[0]) == pytest.approx(short, abs=1e-5)


def test_scores_are_normalized_on_held_out_answers(trained, experiment):
    scale, (run, _) = reward.read_scale(trained), reward.load_reward(trained)
    valid = train.prepared(train.inherit(experiment).data).valid["comparisons"]
    assert scale.responses == 3 * valid.documents and scale.step == STEPS
    lines = [json.loads(x) for x in (trained.parent / "ranked.jsonl").read_text().splitlines()]
    score = reward.reward_function(trained)
    prompts, texts = zip(*[(x["prompt"], a) for x in lines for a in x["answers"]], strict=True)
    everything = np.array(score(prompts, texts, [{}] * len(texts)))
    assert abs(everything.mean()) < 0.3 and 0.7 < everything.std() < 1.3  # the training side is like the other
    tokens = tuple(run.tokenizer.encode("ab"))
    reply = Reply(said("ab"), Completion(tokens, (0.0, 0.0), "ab", "length", (True, True)))
    asis, rendered = (reward.reward_function(trained, h) for h in (run.tokenizer.hash, "another"))
    assert rendered(["1"], [reply], [{}]) == score(["1"], ["ab"], [{}]) != asis(["1"], [reply], [{}])
    try:
        again = reward.set_scale(trained, prompts[:60], texts[:60])
        moved = np.array(reward.reward_function(trained)(prompts[:60], texts[:60], [{}] * 60))
        assert again.responses == 60 and abs(moved.mean()) < 1e-6 and moved.std() == pytest.approx(1, abs=1e-6)
    finally:
        (trained / reward.FILE).write_text(json.dumps({"schema_version": 1} | dataclasses.asdict(scale)))


def test_resumed_ends_bit_equal(experiment, trained, tmp_path, monkeypatch):
    def unfinished():
        with pytest.raises(UserError, match=r"no reward.json: its training is not done"):
            reward.reward_function(tmp_path / "run")

    crashed_and_resumed(experiment, tmp_path / "run", monkeypatch, at=15, between=unfinished)
    assert_same(load.load_any(tmp_path / "run").params, load.load_any(trained).params)
    assert reward.read_scale(tmp_path / "run") == reward.read_scale(trained)
    ends = [next(r for r in read_metrics(w) if r["step"] == STEPS) for w in (tmp_path / "run", trained)]
    assert ends[0]["eval/all/loss"] == ends[1]["eval/all/loss"] and ends[0]["train/loss"] == ends[1]["train/loss"]


def test_a_reward_model_is_no_language_model(experiment, trained, tmp_path):
    with pytest.raises(UserError, match="is a reward model, which predicts no tokens"):
        load.load_run(trained)
    child = dataclasses.replace(experiment, parent=str(trained), objective=Preference())
    with pytest.raises(UserError, match=r"parent .* is a reward model"):
        train.train(child, tmp_path / "child")
    with pytest.raises(UserError, match="is no reward model"):
        reward.reward_function(experiment.parent)
    assert not (tmp_path / "child").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"data.tokenizer": Chars()}, "data.tokenizer"),
        ({"objective": Preference(), "parent": None}, "unset only with a parent|needs the policy"),
        ({"data.sources": ()}, "data.sources is empty"),
    ],
    ids=["tokenizer", "no parent", "no source"],
)
def test_what_does_not_fit_is_refused_and_everything_stays(experiment, root, tmp_path, change, words):
    before = {p: p.read_bytes() for p in (root / "parent").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=words):
        train.train(config.override(experiment, change), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert {p: p.read_bytes() for p in (root / "parent").rglob("*") if p.is_file()} == before


def test_a_parent_of_another_tokenizer_is_refused(experiment, tmp_path):
    tiny_run.make(tmp_path / "other")
    tokenizers.train(Chars(), ["abc"], 0).save(tmp_path / "other" / "tokenizer")
    before = {p: p.read_bytes() for p in (tmp_path / "other").rglob("*") if p.is_file()}
    asked = config.override(experiment, {"parent": str(tmp_path / "other"), "data.tokenizer": Bytes()})
    with pytest.raises(UserError, match=r"data.tokenizer is not that of parent"):
        train.train(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert {p: p.read_bytes() for p in (tmp_path / "other").rglob("*") if p.is_file()} == before


def test_data_of_another_kind_is_refused(experiment, tmp_path):
    with pytest.raises(UserError, match="objective Distill learns from Data or Chat, and data is Preferences"):
        train.train(config.override(experiment, {"objective": train.Distill(experiment.parent)}), tmp_path / "run")


def test_adapters_and_the_head_learn_it_too(experiment, root):
    e = config.override(experiment, {"lora": LoRA(rank=4)})
    assert train.train(e, root / "adapted") == exits.EXIT_DONE
    assert read_metrics(root / "adapted")[-1]["eval/all/accuracy"] > 0.9
    run, _ = reward.load_reward(root / "adapted")
    parent = load.load_run(root / "parent").params["backbone"]
    np.testing.assert_array_equal(run.params["backbone"]["embed"]["tokens"], parent["embed"]["tokens"])
    blocks = [tree["blocks"]["0"]["mlp"]["up"]["kernel"] for tree in (run.params["backbone"], parent)]
    assert np.any(blocks[0] != blocks[1])  # merged
    lines = [json.loads(x) for x in (root / "ranked.jsonl").read_text().splitlines()[:10]]
    score = reward.reward_function(root / "adapted")
    for line in lines:
        values = score([line["prompt"]] * 3, line["answers"], [{}] * 3)
        assert line["ranks"][int(np.argmax(values))] == 0


def test_dpo_raises_the_better_answers_of_held_out_prompts(experiment, root):
    e = dataclasses.replace(experiment, objective=Preference(Dpo(beta=0.5)))
    e = config.override(e, {"train.log_every": 1, "optimizer.lr": 3e-3})
    assert train.train(e, root / "dpo") == exits.EXIT_DONE
    records = read_metrics(root / "dpo")
    assert records[0]["train/loss"] <= math.log(2) + 1e-6 and abs(records[0]["train/margin"]) < 1e-5
    first, last = (r for r in records if "eval/all/loss" in r)
    assert last["eval/all/accuracy"] > 0.8 and last["eval/all/margin"] > 0.5
    assert last["eval/all/loss"] < first["eval/all/loss"] < math.log(2)
    assert load.load_run(root / "dpo").experiment.heads == ("lm",)  # a policy as any other


def test_dpo_resumed_ends_bit_equal(experiment, tmp_path, monkeypatch):
    """Its reference is read once more, from the checkpoint that the run began with."""
    e = dataclasses.replace(experiment, objective=Preference(Dpo(beta=0.5)))
    e = config.override(e, {"train.steps": 4, "train.log_every": 1, "evaluation.every": 4, "checkpoint.every": 2})
    assert train.train(e, tmp_path / "whole") == exits.EXIT_DONE
    crashed_and_resumed(e, tmp_path / "run", monkeypatch, at=3)
    assert_same(load.load_any(tmp_path / "run").params, load.load_any(tmp_path / "whole").params)
    timed = ("seconds", "per_second", "utilization")
    a, b = (
        [{k: v for k, v in r.items() if not any(t in k for t in timed)} for r in read_metrics(tmp_path / w)]
        for w in ("run", "whole")
    )
    assert a == b and a[0]["train/loss"] != a[-1]["train/loss"]


def test_a_reference_that_has_changed_is_noticed(experiment, root, tmp_path):
    e = train.inherit(dataclasses.replace(experiment, objective=Preference()))
    records = train.objectives.origin_records(e)
    records["parent"]["checkpoint"] = "0" * 64
    with pytest.raises(UserError, match=r"checkpoint 7 of parent .* is not the one that this run began with"):
        train.objectives.read_reference(e, train.sharding.make_mesh(e.mesh), records)
