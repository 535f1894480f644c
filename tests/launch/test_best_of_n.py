"""launch.best_of_n on a model whose words are known."""

import json
import time

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.data.chat_sources import Messages, conversations
from jaxlm.feedback.store import Store
from jaxlm.tools import python
from jaxlm.tools.isolation import IsolationError
from launch import best_of_n
from tests.launch.talkers import run_folder
from tests.sample.scripted import say

flags.FLAGS.set_gnu_getopt(True)


@pytest.fixture(scope="module")
def either(tmp_path_factory):
    """Says "Ok!" or "OK!"."""
    table = say("<|im_sep|>", "O") | {"O": ("k", "K"), "k": "!", "K": "!", "!": "<|im_end|>"}
    return run_folder(tmp_path_factory.mktemp("runs") / "either", table)


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs launch.best_of_n with these options; returns what it printed."""
    monkeypatch.setattr(best_of_n, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(best_of_n.rounds, "SLOTS", 8)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])

    def run(**options):
        with flagsaver.flagsaver(**{"temperature": 1.0, "reward": None} | options):
            assert best_of_n.main() == 0
        return capsys.readouterr().out

    return run


def loud(prompts, completions, metadata):
    return [float(c.message.text.isupper()) for c in completions]


def test_the_best_are_written_with_their_control(call, either, tmp_path):
    lines = [{"prompt": f"hi {i}", "answer": "OK!"} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    options = {"workdir": either, "prompts": str(tmp_path / "prompts.jsonl"), "max_tokens": 8, "n": 6}
    printed = call(out=str(tmp_path / "a"), scorer="tests.launch.test_best_of_n:loud", **options)
    assert "6 prompts, 0 left out; KL at most 0.958 nats" in printed
    chosen, control = ([c.messages[-1].text for c in conversations(Messages(str(tmp_path / "a" / f"{n}.jsonl")))]
                       for n in ("chosen", "random"))  # fmt: skip
    assert chosen == ["OK!"] * 6 and set(control) == {"OK!", "Ok!"}
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    assert found["best"]["value"] == 1.0 and found["gain"]["value"] == pytest.approx(1 - control.count("OK!") / 6)
    before = (tmp_path / "a" / "chosen.jsonl").read_text()
    call(out=str(tmp_path / "a"), scorer=None, verifier="exact", **options)  # the same answers, by the truth
    assert [json.loads(x)["messages"] for x in before.splitlines()] == [
        json.loads(x)["messages"] for x in (tmp_path / "a" / "chosen.jsonl").read_text().splitlines()
    ]


def hang(prompts, completions, metadata):
    time.sleep(20)
    return [0.0] * len(prompts)


def test_a_scorer_that_hangs_ends_and_its_answers_stay(call, either, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    options = {"workdir": either, "prompts": str(tmp_path / "prompts.jsonl"), "max_tokens": 8, "n": 4, "verifier": None}
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no answer within 0.2 s; it stands at test_best_of_n.py:\d+ in hang"):
        call(out=str(tmp_path / "a"), scorer=f"{__name__}:hang", scorer_timeout=0.2, **options)
    assert time.monotonic() - began < 15 and not (tmp_path / "a" / "chosen.jsonl").exists()
    with Store(tmp_path / "a" / "samples.db") as store:
        before = list(store.records())
    call(out=str(tmp_path / "a"), scorer=f"{__name__}:loud", **options)
    with Store(tmp_path / "a" / "samples.db") as store:
        assert list(store.records()) == before and len(before) == 5


def test_programs_are_chosen_by_what_they_print_and_run_as_this_user_only_where_that_is_said(
    call, tmp_path, monkeypatch
):
    def no_isolation(unsafe=False):
        if not unsafe:
            raise IsolationError("nothing isolates here")
        return "unsafe"

    writes = say("<|im_sep|>", *"print(") | {"(": ("1", "2"), "1": ")", "2": ")", ")": "<|im_end|>"}
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi", "answer": "2"}\n')
    options = {"workdir": run_folder(tmp_path / "run", writes), "prompts": str(tmp_path / "prompts.jsonl")}
    options |= {"out": str(tmp_path / "a"), "n": 6, "max_tokens": 12, "scorer": None, "verifier": "program"}
    monkeypatch.setattr(python, "isolation_mode", no_isolation)
    with pytest.raises(UserError, match="nothing isolates here"):
        call(**options)
    printed = call(**options, unsafe_python=True)
    (chosen,) = conversations(Messages(str(tmp_path / "a" / "chosen.jsonl")))
    assert chosen.messages[-1].text == "print(2)" and "1 prompts, 0 left out" in printed
    assert 0.0 < json.loads((tmp_path / "a" / "results.json").read_text())["pool"]["value"] < 1.0


def test_mistakes_are_one_clear_line(call, either, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    options = {"workdir": either, "prompts": str(tmp_path / "prompts.jsonl"), "out": str(tmp_path / "b")}
    with pytest.raises(UserError, match="one of --reward"):
        call(scorer=None, verifier=None, **options)
    with pytest.raises(UserError, match="unknown 'numerc'"):
        call(scorer=None, verifier="numerc", **options)
