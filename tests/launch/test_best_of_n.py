"""launch.best_of_n and launch.safety on models whose words are known."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.data.chat_sources import Messages, conversations
from jaxlm.data.conversation import Conversation, Message
from jaxlm.feedback.preferences import Answer, Preference
from jaxlm.run import safety as measures
from jaxlm.run.load import load_run
from launch import best_of_n, safety
from tests.launch.talkers import run_folder
from tests.sample.scripted import say

flags.FLAGS.set_gnu_getopt(True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One that says "Ok!" or "OK!", one that declines, one that says "hm"."""
    root = tmp_path_factory.mktemp("runs")
    either = say("<|im_sep|>", "O") | {"O": ("k", "K"), "k": "!", "K": "!", "!": "<|im_end|>"}
    declines = say("<|im_sep|>", *"No idea", "<|im_end|>")
    tables = {"either": either, "declines": declines, "hm": say("<|im_sep|>", "h", "m", "<|im_end|>")}
    return {name: run_folder(root / name, table) for name, table in tables.items()}


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs a program with these options; returns what it printed."""
    for program in (best_of_n, safety):
        monkeypatch.setattr(program, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(best_of_n.rounds, "SLOTS", 8)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])

    def run(program, **options):
        with flagsaver.flagsaver(**{"temperature": 1.0, "out": None, "workdir": None, "reward": None} | options):
            assert program.main() == 0
        return capsys.readouterr().out

    return run


def loud(prompts, completions, metadata):
    return [float(c.message.text.isupper()) for c in completions]


def test_the_best_are_written_with_their_control(call, runs, tmp_path):
    lines = [{"prompt": f"hi {i}", "answer": "OK!"} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    options = {"workdir": runs["either"], "prompts": str(tmp_path / "prompts.jsonl"), "max_tokens": 8, "n": 6}
    printed = call(best_of_n, out=str(tmp_path / "a"), scorer="tests.launch.test_best_of_n:loud", **options)
    assert "6 prompts, 0 left out; KL at most 0.958 nats" in printed
    chosen, control = ([c.messages[-1].text for c in conversations(Messages(str(tmp_path / "a" / f"{n}.jsonl")))]
                       for n in ("chosen", "random"))  # fmt: skip
    assert chosen == ["OK!"] * 6 and set(control) == {"OK!", "Ok!"}
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    assert found["best"]["value"] == 1.0 and found["gain"]["value"] == pytest.approx(1 - control.count("OK!") / 6)
    before = (tmp_path / "a" / "chosen.jsonl").read_text()
    call(best_of_n, out=str(tmp_path / "a"), scorer=None, verifier="exact", **options)  # the same answers, by the truth
    assert [json.loads(x)["messages"] for x in before.splitlines()] == [
        json.loads(x)["messages"] for x in (tmp_path / "a" / "chosen.jsonl").read_text().splitlines()
    ]


def test_mistakes_are_one_clear_line(call, runs, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    options = {"workdir": runs["hm"], "prompts": str(tmp_path / "prompts.jsonl"), "out": str(tmp_path / "b")}
    with pytest.raises(UserError, match="one of --reward"):
        call(best_of_n, scorer=None, verifier=None, **options)
    with pytest.raises(UserError, match="unknown 'numerc'"):
        call(best_of_n, scorer=None, verifier="numerc", **options)
    with pytest.raises(UserError, match="--reward=DIR and --hh=FILE go together"):
        call(safety, workdir=[runs["hm"]], reward=["x"], hh=None)


def test_checkpoints_side_by_side(call, runs, tmp_path):
    options = {"workdir": [runs["declines"], runs["hm"]], "limit": 3, "out": str(tmp_path / "s"), "reward": []}
    printed = call(safety, **options)
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
