"""launch.rounds in seconds: two rounds, stopped at each boundary of their stages and resumed; files, mistakes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from absl import flags

from experiments.rounds import SCALES, of_round
from jaxlm import config, storage
from jaxlm.config import UserError
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.chat import Chat
from jaxlm.data.tokenizer import Bytes, Chars
from jaxlm.data.world.corpus import World
from jaxlm.data.world.people import People
from jaxlm.data.world.talk import WorldConversations
from jaxlm.feedback import parts, preferences
from jaxlm.feedback.records import Response
from jaxlm.feedback.store import Store
from jaxlm.run import exits, stages
from jaxlm.sample import engine
from launch import rounds, rounds_page, rounds_stages
from tests import tiny_run
from tests.sample.scripted import AUTOMATON, automaton, say

flags.FLAGS.set_gnu_getopt(True)
WORLD = World(people=People(count=40, unmentioned=10, attributes=("hobby", "dish")), tasks=("spell",))
CHAT = Chat(sources=(WorldConversations(world=WORLD),), tokenizer=Bytes(), context=640)
SETS = ["demonstrations=60", "prompts=16", "responses=4", "pool=40", "heldout=8", "best_of=4", "samples=2",
        "max_tokens=16", "sft.data.context=320", "sft.train.batch_size=8", "sft.train.steps=2",
        "sft.evaluation.every=2", "sft.evaluation.batch_size=8", "reward.data.context=640", "reward.train.steps=2",
        "reward.train.batch_size=8", "reward.evaluation.every=2", "reward.evaluation.batch_size=8",
        "reward.data.valid_fraction=0.3", "ppo.data.context=320", "ppo.train.steps=2", "ppo.train.batch_size=8",
        "ppo.evaluation.every=2", "ppo.checkpoint.every=2", "ppo.objective.heldout_prompts=2",
        "ppo.objective.minibatches=1", "ppo.objective.preflight=off"]  # fmt: skip
ROUND = ("collect", "reward", "ppo", "evaluate", "report")
STAGES = ("demonstrate", "sft", "baseline", *(f"{stage}_{k}" for k in (1, 2) for stage in ROUND))


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """One that says "No idea" or "x", so that gold always tells its responses apart; and a little noise, without which
    a reward model would see the last token alone."""
    either = automaton({"<|im_sep|>": ("N", "x"), "x": "<|im_end|>"} | say(*"No idea", "<|im_end|>"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + (0.02 * rng.normal(size=x.shape)).astype(x.dtype), either)
    folder = tmp_path_factory.mktemp("parent") / "chat"
    tiny_run.make(folder, tiny_run.replaced(model=AUTOMATON, data=CHAT), params=params)
    return str(folder)


@pytest.fixture(scope="module")
def done(parent, tmp_path_factory):
    """(workdir, records) of two rounds without a stop, and of one that was asked for another, both stopped before every
    stage."""
    root = tmp_path_factory.mktemp("rounds")
    sets = [*SETS, f"sft.data.cache={root / 'cache'}", f"reward.data.cache={root / 'cache'}"]
    with pytest.MonkeyPatch.context() as m:
        # Nearly all of the time is the compiler's: one shape instead of a dozen.
        for name, size in {"MIN_PROMPT_BUCKET": 256, "MIN_TOKENS_BUCKET": 64, "MIN_CAPACITY": 512}.items():
            m.setattr(engine, name, size)
        m.setattr(rounds, "use_compilation_cache", lambda: None)
        whole = root / "whole", rounds.run(root / "whole", parent, "smoke", 2, sets)
        stopped, ran = root / "stopped", []
        m.setattr(stages, "run", stops_after_one(stages.run, ran))
        for count, mine in ((1, STAGES[: -len(ROUND)]), (2, ROUND)):
            for _ in mine[:-1]:
                with pytest.raises(exits.Stopped):
                    rounds.run(stopped, parent, "smoke", count, sets)
            records = rounds.run(stopped, parent, "smoke", count, sets)
    return whole, (stopped, records, ran), sets


def stops_after_one(run, ran: list):
    """`stages.run` that is stopped when a second stage is about to begin; `ran` gets the names of those that ran."""

    def stopping(workdir, todo, *rest):
        mine = []

        def once(stage):
            def begin(done, anew):
                if mine:
                    raise exits.Stopped
                mine.append(stage.name)
                ran.append(stage.name)
                return stage.run(done, anew)

            return dataclasses.replace(stage, run=begin)

        return run(workdir, [once(s) for s in todo], *rest)

    return stopping


def test_stopped_at_every_boundary_it_comes_out_the_same(done):
    (whole, records), (stopped, resumed, ran), _ = done
    assert tuple(records) == tuple(resumed) == STAGES and ran == list(STAGES)
    # Not of trainings: a checkpoint's hash is of its files, which hold times.
    cheap = [n for n in STAGES if not n.startswith(("sft", "reward", "ppo"))]
    assert [records[n]["identity"] for n in cheap] == [resumed[n]["identity"] for n in cheap]
    a, b = (storage.read_json(w / "results.json") for w in (whole, stopped))
    assert a == b
    for name in ("demonstrations.jsonl", "prompts.jsonl", "heldout.jsonl", "table.md"):
        assert (whole / name).read_text() == (stopped / name).read_text(), name
    for k in ("round_1", "round_2"):
        files = [[json.loads(line)["id"] for line in (w / k / "feedback.jsonl").read_text().splitlines()
                  if '"kind":"prompt"' in line] for w in (whole, stopped)]  # fmt: skip
        assert files[0] == files[1] and files[0]


def test_the_same_command_does_nothing_again(done, parent, capsys, monkeypatch):
    (whole, records), _, sets = done
    monkeypatch.setattr(rounds_stages, "training", None)
    monkeypatch.setattr(rounds_stages.rounds, "respond", None)
    assert rounds.run(whole, parent, "smoke", 2, sets) == records
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(STAGES) and all("skipped" in line for line in lines)
    with pytest.raises(UserError, match=r"holds another experiment: .*max_tokens"):
        rounds.run(whole, parent, "smoke", 2, [*sets, "max_tokens=17"])


def test_a_round_leaves_what_a_reader_needs(done):
    (whole, records), *_ = done
    r = records["evaluate_1"]["result"]
    assert {"sft", "ppo", "sft, greedy", "ppo, greedy", "best of 2"} == r["gold"].keys()
    assert r["gain"]["n"] == 8 and r["gain"]["value"] == pytest.approx(
        r["gold"]["ppo"]["value"] - r["gold"]["sft"]["value"]
    )
    assert [q["n"] for q in r["curve"]] == [1, 2] and r["curve"][0]["kl"] == 0.0
    assert {s["name"] for s in r["elo"]["standings"]} == {"sft", "round 1"}
    assert r["share"].keys() == {"value", "low", "high", "best_of_n", "kl", "beyond"}
    for name in ("report/round_1.html", "report/round_1.png", "report/elo_1.png", "results.json",
                 "round_1/reward/reward.json", "round_1/ppo/checkpoints", "feedback.db", "config.json"):  # fmt: skip
        assert (whole / name).exists(), name
    page = (whole / "report" / "round_1.html").read_text()
    assert "Transcripts" in page and "best of n" in page and page.count("data:image/png") >= 2
    assert (whole / "table.md").read_text().count("\n") == 4  # a line each round, under two of the head
    told = records["reward_1"]["result"]
    assert {"eval/all/accuracy", "eval/all/calibration_error"} <= told["last"].keys() and told["scale"]["responses"] > 0
    metrics = (whole / "round_1" / "ppo" / "metrics.jsonl").read_text()
    assert "train/reward/learned" in metrics and "train/reward/function" in metrics  # gold is logged, with weight 0


def test_a_later_round_samples_from_the_policy_before_and_learns_from_all_rankings(done):
    (whole, records), *_ = done
    collected = [records[f"collect_{k}"]["result"] for k in (1, 2)]
    with Store(whole / "feedback.db") as store:
        responses, ranked = dict(store.records(Response)), preferences.from_store(store)
    mine = [[responses[i] for i in c["responses"]] for c in collected]
    assert [{r.policy.name for r in rs} for rs in mine] == [{f"{whole}/sft@2"}, {f"{whole}/round_1/ppo@2"}]
    asked = [{r.prompt for r in rs} for rs in mine]
    assert [len(a) for a in asked] == [16, 16] and not asked[0] & asked[1]
    first, second = (
        {preferences.prompt_hash(p.prompt) for p in preferences.load(whole / f"round_{k}" / "feedback.jsonl")}
        for k in (1, 2)
    )
    assert 0 < len(first) == collected[0]["rankings"] < len(second) == collected[1]["rankings"] == len(ranked)
    assert first < second
    about = [storage.read_json(whole / f"round_{k}" / "reward" / "lineage.json") for k in (1, 2)]
    assert about[0]["hashes"]["corpus"] != about[1]["hashes"]["corpus"] and about[0]["parent"] == about[1]["parent"]
    # On one scale: over responses of round 0 to the prompts that neither has fitted.
    scales = [records[f"reward_{k}"]["result"]["scale"] for k in (1, 2)]
    assert scales[0]["responses"] == scales[1]["responses"] and scales[0]["gain"] != scales[1]["gain"]
    ppo = storage.read_json(whole / "round_2" / "ppo" / "lineage.json")
    assert ppo["parent"]["checkpoint"] == records["ppo_1"]["identity"]
    assert ppo["critic"]["checkpoint"] == records["reward_2"]["identity"][0]
    assert list(ppo["rewards"]) == [f"{whole}/round_2/reward"]


def test_a_later_round_is_measured_against_all_policies_so_far(done):
    (whole, records), *_ = done
    one, two = (records[f"evaluate_{k}"]["result"] for k in (1, 2))
    assert one["gold"]["sft"] == two["gold"]["sft"]  # the same responses of round 0
    assert {s["name"] for s in two["elo"]["standings"]} == {"sft", "round 1", "round 2"} and len(
        two["elo"]["groups"]
    ) == 1
    assert (one["elo"]["games"], two["elo"]["games"]) == (8, 3 * 8)  # each pair of players at each prompt
    assert two["kl"]["value"] != one["kl"]["value"]
    assert (whole / "report" / "elo_2.png").exists() and "Round 2" in (whole / "report" / "round_2.html").read_text()
    results = storage.read_json(whole / "results.json")
    assert list(results["rounds"]) == list(results["rewards"]) == ["1", "2"]
    assert [line[:4] for line in (whole / "table.md").read_text().splitlines()[2:]] == ["| 1 ", "| 2 "]


def test_each_round_reads_what_it_should():
    x = SCALES["tiny"]()
    first, second = (of_round(x, k, "w", "w/sft", before) for k, before in ((1, "w/sft"), (2, "w/round_1/ppo")))
    assert [e.parent for e in first] == ["w/sft", "w/sft"] and [e.parent for e in second] == ["w/sft", "w/round_1/ppo"]
    assert second[0].data.sources[0].path == "w/round_2/feedback.jsonl"
    objective = second[1].objective
    assert objective.reward[0].run == objective.critic.run == "w/round_2/reward"
    assert objective.reward[1].weight == 0.0 and "gold" in objective.reward[1].path  # gold is seen, and not maximized
    assert parts.names(objective.reward).index(objective.gold) == 1  # and what alarms watch
    small = of_round(dataclasses.replace(x, reward_parent="w/small"), 2, "w", "w/sft", "w/round_1/ppo")
    assert [e.parent for e in small] == ["w/small", "w/round_1/ppo"]
    assert len({e.seed for e in (*first, *second)}) == 2 and first[1].seed != second[1].seed
    assert second[1].data.task.path == "w/prompts.jsonl" and second[1].data.tools == x.tools
    assert config.from_json(type(x), config.to_json(x)) == x


def test_a_parent_of_reward_models_has_the_policys_tokenizer(parent, tmp_path):
    tiny_run.make(tmp_path / "other")
    tokenizers.train(Chars(), ["abc"], 0).save(tmp_path / "other" / "tokenizer")
    with pytest.raises(UserError, match=r"reward_parent .*other has another tokenizer than"):
        rounds.run(tmp_path / "w", parent, "smoke", 1, [*SETS, f"reward_parent={tmp_path / 'other'}"])
    assert not (tmp_path / "w" / "demonstrations.jsonl").exists()


def test_a_judge_may_rank_in_the_scorers_place_and_what_it_left_out_is_recorded(parent, tmp_path, monkeypatch):
    """One prompt with two answers is too long for it."""
    for name, size in {"MIN_PROMPT_BUCKET": 1024, "MIN_TOKENS_BUCKET": 64, "MIN_CAPACITY": 1024}.items():
        monkeypatch.setattr(engine, name, size)
    x = dataclasses.replace(SCALES["smoke"](), sft=None, judge=parent, tools=(), prompts=3, responses=2, max_tokens=8)
    p = rounds_stages.Place(x, x, tmp_path, parent)
    lines = [json.dumps({"prompt": asked}) + "\n" for asked in ("one", "two", "x" * 560)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    found = rounds_stages.collecting(p, 1, {})
    assert found["annotator"] == f"judge {parent}@7" and len(found["responses"]) == 6 and found["rankings"] == 2
    assert (found["unranked"], found["malformed"], found["missing"]) == (1, 0, 2)
    # Two responses may be the same, and so the two questions about them.
    assert 2 <= len((tmp_path / "round_1" / "journal.jsonl").read_text().splitlines()) <= 4
    assert rounds_stages.collecting(p, 1, {}) == found  # as a start that comes after a crash
    gold = dataclasses.replace(x, judge=None)
    assert rounds_stages._ranker(rounds_stages.Place(gold, x, tmp_path, parent), tmp_path, None)[0] == "gold"


def test_a_page_says_what_got_no_ranking(done, parent, tmp_path):
    (whole, records), *_ = done
    p, collected = rounds_stages.Place(None, None, whole, parent), records["collect_1"]["result"]
    assert (collected["unranked"], collected["malformed"], collected["missing"]) == (0, 0, 0)
    told = records | {"collect_1": {"result": collected | {"unranked": 4, "malformed": 3, "missing": 2}}}
    rounds_page.page(p, 1, {1: records["evaluate_1"]["result"]}, told).write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "4 prompts got no ranking" in page and "3 could not be read, and 2 were missing" in page


def test_what_differs_from_the_rounds_of_a_folder_is_told_with_what_to_give(tmp_path, capsys):
    x, _ = rounds.definition("smoke", ["max_tokens=16"], None)
    (tmp_path / "config.json").write_text(config.to_json(x))
    asked = ("smoke", ["max_tokens=17"], "runs/judge"), ("tiny", ["max_tokens=16"], None)
    said = []
    for scale, sets, judge in asked:
        with pytest.raises(UserError) as e:
            rounds.run(tmp_path, "parent", scale, 2, sets, judge)
        said.append(str(e.value).removeprefix(f"{tmp_path} holds another experiment: "))
    assert said[0] == (
        "max_tokens: 16 -> 17; judge: None -> 'runs/judge' (its own -> asked for); to go on there give the settings "
        "that it was begun with, otherwise choose another --workdir"
    )
    assert said[1].endswith("to go on there give --scale=smoke, otherwise choose another --workdir")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json"] and not capsys.readouterr().out
    with pytest.raises(UserError, match="responses and best_of 2"):
        rounds.run(tmp_path, "parent", "smoke", 2, ["responses=1"])


def test_mistakes_are_one_clear_line(tmp_path, parent):
    with pytest.raises(UserError, match="responses and best_of 2"):
        rounds.run(tmp_path / "w", parent, "tiny", 1, ["responses=1"])
    with pytest.raises(UserError, match="no such workdir"):
        rounds.run(tmp_path / "w2", str(tmp_path / "nowhere"), "smoke", 1, [])
