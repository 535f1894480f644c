"""launch.collect: a checkpoint's responses in the store, ranked by programs."""

import json
import time

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message
from jaxlm.feedback.preferences import from_store
from jaxlm.feedback.records import Prompt, Response
from jaxlm.feedback.store import Store
from launch import collect
from tests.feedback.serving import chosen, server
from tests.launch.talkers import run_folder
from tests.sample.scripted import say

flags.FLAGS.set_gnu_getopt(True)


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs launch.collect with these options; returns what it printed."""
    monkeypatch.setattr(collect, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(collect, "SLOTS", 8)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["collect"])

    def run(**options):
        # Other programs imported here have another default.
        with flagsaver.flagsaver(**{"temperature": 1.0} | options):
            assert collect.main() == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that says "Ok!" or "OK!", one that says "hm", and one that prefers what it is shown first."""
    root = tmp_path_factory.mktemp("runs")
    either = say("<|im_sep|>", "O") | {"O": ("k", "K"), "k": "!", "K": "!", "!": "<|im_end|>"}
    return (
        run_folder(root / "either", either),
        run_folder(root / "hm", say("<|im_sep|>", "h", "m", "<|im_end|>")),
        run_folder(root / "judge", {"<|im_sep|>": ("A", "A", "A", "B")}),
    )


def short(prompts, completions, metadata):
    """A reward: few characters, and the answer that the prompt's metadata has."""
    return [
        1.0 if c.message.text == m["answer"] else -float(len(c.message.text)) for c, m in zip(completions, metadata)
    ]


def test_collecting_and_ranking_by_programs(call, runs, tmp_path):
    either, hm, judge = runs
    prompts, path = tmp_path / "prompts.jsonl", str(tmp_path / "f.db")
    lines = [{"messages": [{"role": "user", "content": f"hi {n}"}], "answer": "OK!"} for n in range(3)]
    prompts.write_text("\n".join(map(json.dumps, [*lines, lines[0], {"prompt": "x" * 600, "answer": ""}])))
    options = {"prompts": str(prompts), "store": path, "max_tokens": 8, "k": 3}
    printed = call(workdir=either, **options)
    assert (
        "note: 1 of 4 prompts are left out" in printed and f"9 responses of {either}@7 to 3 prompts, 0 were" in printed
    )
    assert "0 responses of" in call(workdir=either, **options)
    assert "3 responses of" in call(workdir=either, **options | {"k": 4})  # the others are there
    with Store(path) as store:
        (pid, prompt), *_ = store.prompts().items()
        found = list(store.responses(pid).values())
        assert prompt.metadata == {"answer": "OK!"} and len(found) == 4 == len({r.sampling["sample_id"] for r in found})
        assert {r.text for r in found} <= {"Ok!", "OK!"} and len({r.text for _, r in store.records(Response)}) == 2
        r = found[0]
        assert r.policy.name == f"{either}@7" and len(r.policy.hash) == 64 and r.finish_reason == "stop"
        assert len(r.tokens) == len(r.logprobs) == 4 and sum(r.logprobs) == pytest.approx(-0.6931, abs=1e-3)
        assert r.sampling["max_tokens"] == 8 and r.sampling["temperature"] == 1.0
    scorer = f"{__name__}:short"
    printed = call(workdir=hm, **options | {"k": 1}, scorer=scorer, judge=judge)
    assert (
        f"scorer {scorer}: 3 prompts ranked, 0 were, 0 without" in printed
        and "3 prompts ranked" in printed.splitlines()[-1]
    )
    with Store(path) as store:
        by_judge = [p for p in from_store(store) if p.annotator.startswith("judge ")]
        assert len(by_judge) == 3 and all(set(p.ranks) == {0} for p in by_judge)  # the place alone: all tied
        for p in from_store(store, [f"scorer {scorer}"]):
            assert [a.text for a, r in zip(p.answers, p.ranks) if r == 0] in (
                [["OK!"] * n for n in range(1, 5)] + [["hm"]]
            )
    assert "0 prompts ranked, 3 were" in call(store=path, scorer=scorer)


def test_verdicts_that_say_nothing_are_counted_and_not_asked_again(call, runs, tmp_path):
    path = str(tmp_path / "f.db")
    with Store(path) as store:
        for asked in ("one", "teal", "x" * 600):
            (pid,) = store.add(Prompt(Conversation((Message("user", asked),))))
            store.add(*(Response(pid, Message("assistant", t)) for t in ("a", "bb")))
    with server(lambda asked, n: chosen("both" if "teal" in asked["messages"][0]["content"] else "A")) as (url, seen):
        options = {"store": path, "judge_url": url, "judge_model": "m"}
        printed = call(**options, judge=runs[2])
        assert "judge m at" in printed and "2 prompts ranked, 0 were, 1 without a ranking" in printed
        # Of three pairs by each, in both orders: the address says nothing of one, the model cannot read another.
        assert "of 12 verdicts 2 were neither A nor B, and 2 missing (too long" in printed and len(seen) == 6
        assert "0 prompts ranked, 2 were, 1 without" in (printed := call(**options)) and len(seen) == 6
        assert "of 2 verdicts 2 were neither A nor B, and 0 missing" in printed
    assert len((tmp_path / "f.db.journal.jsonl").read_text().splitlines()) == 6 + 4


def fail(prompts, completions, metadata):
    raise KeyError("answer")


def hang(prompts, completions, metadata):
    time.sleep(20)
    return [0.0] * len(prompts)


def test_collecting_says_what_is_wrong(call, runs, tmp_path):
    file, path = tmp_path / "p.jsonl", str(tmp_path / "f.db")
    with Store(path) as store:
        (pid,) = store.add(Prompt(Conversation((Message("user", "hi"),))))
        store.add(*(Response(pid, Message("assistant", t)) for t in "ab"))
        before = list(store.records(retracted=True))
    for text, message in (
        ("{", "line 1: not valid JSON"),
        ('{"text": "hi"}', "line 1: a list 'messages' or a text 'prompt' or 'question' is wanted"),
        ('{"prompt": " "}', "line 1: a list 'messages'"),
        ("[]", "a JSON object is wanted"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "before the assistant's turn"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": 5}', "line 1: 'tools' is no list"),
        ("", "has no prompts"),
        (json.dumps({"prompt": "x" * 600}), "no prompt of .* fits"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            call(workdir=runs[0], prompts=str(file), store=path)
    file.write_text('{"question": "hi"}')
    for options, message in (
        ({}, "--store=FILE is missing"),
        ({"store": path}, "nothing to do"),
        ({"store": path, "workdir": runs[0]}, "go together"),
        ({"store": path, "scorer": "os"}, "module:function is wanted"),
        ({"store": path, "scorer": "os:nothing"}, "module:function is wanted"),
        ({"store": path, "scorer": "os:sep"}, "is no function"),
        ({"store": path, "scorer": f"{__name__}:fail"}, "it raised KeyError"),
        (
            {"store": path, "scorer": f"{__name__}:hang", "scorer_timeout": 0.2},
            "hang', 2 samples: no answer within 0.2 s",
        ),
        ({"store": path, "judge_url": "http://127.0.0.1:1"}, "needs --judge_model"),
        ({"store": path, "judge_url": "http://example.org", "judge_model": "m"}, "another machine"),
        ({"store": path, "workdir": runs[0], "prompts": str(file), "temperature": 0.0}, "only 1 when greedy"),
        ({"store": path, "workdir": runs[0], "prompts": "none.jsonl"}, "no such file of prompts"),
    ):
        with pytest.raises(UserError, match=message):
            call(**options)
    with Store(path) as store:
        assert list(store.records(retracted=True)) == before
