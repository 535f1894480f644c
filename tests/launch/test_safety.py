"""launch.safety on models whose words are known, and the accuracy of a reward model on pairs."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.preferences import Preferences
from jaxlm.data.tokenizer import Bytes
from jaxlm.feedback.preferences import Answer, Preference
from jaxlm.nn import heads
from jaxlm.nn.transformer import ModelConfig
from jaxlm.run import reward
from jaxlm.run import safety as measures
from jaxlm.run.experiment import Experiment
from jaxlm.run.load import load_run
from jaxlm.steps.reward import RewardModel
from launch import safety
from tests import tiny_run
from tests.launch.talkers import run_folder
from tests.sample.scripted import say

flags.FLAGS.set_gnu_getopt(True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One that declines everything, one that knows nothing, and one that says "hm"."""
    root = tmp_path_factory.mktemp("runs")
    words = {"declines": "can't do", "knows nothing": "No idea", "hm": "hm"}
    return {name: run_folder(root / name, say("<|im_sep|>", *said, "<|im_end|>")) for name, said in words.items()}


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs launch.safety with these options; returns what it printed."""
    monkeypatch.setattr(safety, "use_compilation_cache", lambda: None)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])

    def run(**options):
        with flagsaver.flagsaver(**{"out": None, "workdir": [], "reward": [], "hh": None, "limit": None} | options):
            assert safety.main() == 0
        return capsys.readouterr().out

    return run


def test_checkpoints_side_by_side(call, runs, tmp_path):
    options = {"workdir": list(runs.values()), "limit": 3, "out": str(tmp_path / "s")}
    printed = call(**options)
    rows = {x.split("|")[1].strip(): x for x in printed.splitlines() if x.startswith("|")}
    assert "1.000" in rows["declines"] and rows["hm"].count("0.000 [") == 3
    found = json.loads((tmp_path / "s" / "results.json").read_text())["safety"]
    got = {k: v["tasks"]["safety"]["metrics"] for k, v in found.items()}
    assert got["declines"]["refusal"]["value"] == got["declines"]["over_refusal"]["value"] == 1.0
    assert got["knows nothing"]["refusal"]["value"] == got["knows nothing"]["over_refusal"]["value"] == 0.0
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


def hh_file(path, pairs) -> str:
    lines = [
        {side: f"\n\nHuman: hi\n\nAssistant: {said}" for side, said in zip(("chosen", "rejected"), x)} for x in pairs
    ]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return str(path)


LIKES_A = {"<|im_sep|>": ("a", "b"), "a": ("a", "<|im_end|>"), "b": ("<|im_end|>", *"cdefghi"), "d": "a"}


def test_hh_accuracy_of_policies_stands_beside_the_others(call, runs, tmp_path):
    """The second policy gives "aaaa" half of the mass at every token and "b" less per token, but more in all; it never
    begins with a "d"."""
    pairs = [("aaaa", "b"), ("b", "aaaa"), ("aaaaa", "b"), ("b", "da"), ("a", "b" * 900)]
    options = {"limit": 4, "out": str(tmp_path / "s"), "hh": hh_file(tmp_path / "hh.jsonl", pairs)}
    run_folder(tmp_path / "a", LIKES_A)
    printed = call(workdir=[runs["hm"], str(tmp_path / "a")], **options)
    head, _, *rows = [[c.strip() for c in x.split("|")[1:-1]] for x in printed.splitlines() if x.startswith("|")]
    assert head[-1] == "hh_logprob_accuracy" and head[1:5] == ["refusal", "over_refusal", "answered", "balanced"]
    assert {r[0]: r[-1][:5] for r in rows}["a"] == "0.750"
    assert "a: pairs: 4 of 4 kept" in printed
    found = json.loads((tmp_path / "s" / "results.json").read_text())["safety"]
    assert found["a"]["tasks"]["safety"]["metrics"]["hh_logprob_accuracy"]["n"] == 4
    one = [measures.likelier_accuracy(load_run(runs["hm"]), measured(x))[0].value for x in (("hm", "mh"), ("mh", "hm"))]
    assert one == [1.0, 0.0]
    with pytest.raises(UserError, match="no pair fits the context of"):
        measures.likelier_accuracy(load_run(runs["hm"]), measured(pairs[-1]))


def measured(texts: tuple[str, str]) -> list[Preference]:
    answers = tuple(Answer(Message("assistant", x)) for x in texts)
    return [Preference(Conversation((Message("user", "hi"),)), answers, (0, 1), "hh")]


def test_hh_accuracy_of_a_reward_model(call, tmp_path):
    """A model with random parameters: which of two it prefers, its reward function says one by one."""
    model = ModelConfig(vocab_size=tiny_run.TOKENIZER.vocab_size, layers=1, width=16, heads=2)
    data = Preferences(tokenizer=Bytes(), context=64)
    definition = Experiment(model, data, objective=RewardModel(), checkpoint=tiny_run.EXPERIMENT.checkpoint)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype) * 0.3, heads.abstract(model, None, ("reward",))
    )
    tiny_run.make(tmp_path / "rm", definition, 5, params)
    scale = {"schema_version": 1, "gain": 1.0, "bias": 0.0, "step": 5, "responses": 3}
    (tmp_path / "rm" / "reward.json").write_text(json.dumps(scale))
    texts = "yes no maybe never often I we you they here there then now why how who".split()
    scored = reward.reward_function(tmp_path / "rm")(["hi"] * len(texts), texts, [{}] * len(texts))
    worst_first = [texts[i] for i in np.argsort(scored)]
    right = list(zip(worst_first[1:], worst_first))  # as close as they are, so that little changes which is preferred
    assert len(set(scored)) == len(texts) == 16
    file = hh_file(tmp_path / "hh.jsonl", [*right[:12], *(x[::-1] for x in right[12:]), right[0], ("x", "y" * 90)])
    printed = call(reward=[str(tmp_path / "rm")], hh=file, out=str(tmp_path / "out"))
    assert "17 of 17 kept" in printed and "rm: accuracy 0.812" in printed and "too long 1" in printed
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["hh"]["rm"]["value"] == 13 / 16 and found["hh"]["rm"]["n"] == 16 and "safety" not in found


def test_labels():
    assert safety.labels(["r/a/ppo", "r/b/ppo"]) == ["a/ppo", "b/ppo"] and safety.labels(["r/a"]) == ["a"]
    with pytest.raises(UserError, match="twice"):
        safety.labels(["r/a", "r/a"])


def test_mistakes_are_one_clear_line(call):
    with pytest.raises(UserError, match="--reward=DIR needs --hh=FILE"):
        call(workdir=["x"], reward=["x"])
    with pytest.raises(UserError, match="--workdir=DIR is missing"):
        call()
