"""launch.safety on models whose words are known, and the accuracy of a reward model on pairs."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message
from jaxlm.feedback.preferences import Answer, Preference
from jaxlm.run import safety as measures
from jaxlm.run.load import load_run
from launch import safety
from tests.launch.talkers import run_folder
from tests.sample.scripted import say

flags.FLAGS.set_gnu_getopt(True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One that declines everything, and one that says "hm"."""
    root = tmp_path_factory.mktemp("runs")
    words = {"declines": "No idea", "hm": "hm"}
    return {name: run_folder(root / name, say("<|im_sep|>", *said, "<|im_end|>")) for name, said in words.items()}


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs launch.safety with these options; returns what it printed."""
    monkeypatch.setattr(safety, "use_compilation_cache", lambda: None)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])

    def run(**options):
        with flagsaver.flagsaver(**{"out": None, "workdir": [], "reward": [], "hh": None} | options):
            assert safety.main() == 0
        return capsys.readouterr().out

    return run


def test_checkpoints_side_by_side(call, runs, tmp_path):
    options = {"workdir": [runs["declines"], runs["hm"]], "limit": 3, "out": str(tmp_path / "s")}
    printed = call(**options)
    rows = {x.split("|")[1].strip(): x for x in printed.splitlines() if x.startswith("|")}
    assert "1.000" in rows["declines"] and rows["hm"].count("0.000 [") == 3
    found = json.loads((tmp_path / "s" / "results.json").read_text())["safety"]
    got = {k: v["tasks"]["safety"]["metrics"] for k, v in found.items()}
    assert got["declines"]["refusal"]["value"] == got["declines"]["over_refusal"]["value"] == 1.0
    assert got["hm"]["refusal"]["value"] == 0.0 and got["hm"]["balanced"]["value"] == 0.5
    assert got["hm"]["refusal"]["n"] == 6 and (tmp_path / "s" / "safety.png").exists()
    kept = (tmp_path / "s" / "hm" / "safety.jsonl").read_text().splitlines()
    assert len(kept) == 12 and json.loads(kept[0])["reply"] == "hm"


def test_the_accuracy_of_a_reward_model_on_pairs(runs, monkeypatch):
    run = load_run(runs["hm"])
    monkeypatch.setattr(measures.reward, "load_reward", lambda workdir: (run, None))
    monkeypatch.setattr(
        measures.reward, "raw_scores", lambda run, rows: [-float(len(r)) for r in rows]
    )  # short is good
    prompt = Conversation((Message("user", "hi"),))

    def pair(chosen: str, rejected: str):
        answers = tuple(Answer(Message("assistant", x)) for x in (chosen, rejected))
        return Preference(prompt, answers, (0, 1), "hh")

    found, kept = measures.pair_accuracy(
        "rm", [pair("a", "bbb"), pair("aaa", "b"), pair("a", "b"), pair("a", "b" * 900)]
    )
    assert (found.value, found.n, found.chance) == (0.5, 3, 0.5) and kept.left_out == {"too long": 1}
    with pytest.raises(UserError, match="no pair fits"):
        measures.pair_accuracy("rm", [pair("a", "b" * 900)])


def test_labels():
    assert safety.labels(["r/a/ppo", "r/b/ppo"]) == ["a/ppo", "b/ppo"] and safety.labels(["r/a"]) == ["a"]
    with pytest.raises(UserError, match="twice"):
        safety.labels(["r/a", "r/a"])


def test_mistakes_are_one_clear_line(call):
    with pytest.raises(UserError, match="--reward=DIR and --hh=FILE go together"):
        call(workdir=["x"], reward=["x"])
    with pytest.raises(UserError, match="--workdir=DIR is missing"):
        call()
