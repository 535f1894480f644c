"""launch.rank as people use it: lines in, records in the store."""

import io
import json
import os
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from jaxlm.config import UserError
from jaxlm.data import chat_sources
from jaxlm.data.chat_sources import Messages
from jaxlm.data.conversation import Conversation, Message, Part
from jaxlm.feedback.preferences import from_store
from jaxlm.feedback.records import Demonstration, Policy, Prompt, Ranking, Rating, Response, Retraction
from jaxlm.feedback.store import Store
from launch import rank
from tests.source import ROOT

flags.FLAGS.set_gnu_getopt(True)
TEXTS = ("red", "blue\x1b[2J", "teal", "")


@pytest.fixture
def path(tmp_path):
    """Two prompts with four responses, one with two, one with a single response."""
    with Store(tmp_path / "feedback.db") as store:
        for n, texts in enumerate((TEXTS, TEXTS, ("yes", "no"), ("alone",))):
            question = Message("user", f"question {n}\x07")
            (pid,) = store.add(Prompt(Conversation((Message("system", "Be brief."), question))))
            for k, text in enumerate(texts):
                said = Message("assistant", (Part("hm", "thinking"), Part(text)) if k == 0 else text)
                store.add(Response(pid, said, policy=Policy("runs/secret", k % 2, "h")))
    return str(tmp_path / "feedback.db")


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs launch.rank on these lines with these options; returns what it printed."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["rank"])

    def run(*lines, **options):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        with flagsaver.flagsaver(**options):
            assert rank.main() == 0
        return capsys.readouterr().out

    return run


# --------------------------------------------------------------------------------------------------------------- rank
def test_a_ranking_is_about_what_was_shown(call, path):
    printed = call("2 > 1 = 3 > 4", store=path, annotator="ada")
    shown = printed.split("--- 2 of 3 ---")[0]
    assert shown.startswith("--- 1 of 3 ---\n[system]\nBe brief.\n[user]\nquestion 0\ufffd\n\n(1)\n")
    assert "secret" not in printed and "\x1b" not in printed and "[thinking] hm" in shown and "(empty)" in shown
    assert "alone" not in printed and printed.endswith("1 ranked\n")
    texts = [b.split(")\n")[1].strip().split("\n")[-1] for b in shown.split("\n\n(")[1:]]
    with Store(path) as store:
        ((_, r),) = store.records(Ranking)
        said = [store.get(i).text.replace("\x1b", "\ufffd") or "(empty)" for i in r.shown]
        assert said == texts and r.ranks == (1, 0, 1, 2) and (r.annotator, r.details) == ("ada", {"seed": 0})


def test_the_order_is_the_seeds_and_the_annotators(call, path):
    def shown(**options):
        return call("quit", store=path, **({"annotator": "ada"} | options)).split("--- 1 of 3 ---")[1]

    assert shown() == shown() and len({shown(seed=s) for s in range(6)}) > 2
    assert len({shown(annotator=a) for a in "abcdef"}) > 2


def test_it_goes_on_where_it_was(call, path):
    assert "question 1" in call("1>2>3>4", store=path, annotator="ada")
    printed = call("skip", "2 > 1", store=path, annotator="ada")
    assert printed.startswith("--- 2 of 3 ---") and printed.endswith("nothing is left to rank\n1 ranked\n")
    printed = call("1=2=3=4", "no command, never read", store=path, annotator="ada")
    assert "question 1" in printed and printed.endswith("nothing is left to rank\n1 ranked\n")
    assert call(store=path, annotator="ada") == "nothing is left to rank\n0 ranked\n"
    assert call(store=path, annotator="bob").startswith("--- 1 of 3 ---")
    with Store(path) as store:
        assert sorted(p.ranks for p in from_store(store)) == [(0, 0, 0, 0), (0, 1, 2, 3), (1, 0)]
        (pid, _), *_ = store.records(Prompt)
        store.add(Response(pid, Message("assistant", "one more")))
    assert "(5)" in call(store=path, annotator="ada")  # what it was ranked with has changed


def test_ratings_answers_and_undo(call, path):
    lines = [
        "rate 2 helpful 6",
        "rate 1 safe 1.5",
        "better  A better one. ",
        "demo",
        "first",
        "",
        "second",
        ".",
        "undo",
    ]
    printed = call(*lines, "undo", "undo", "1>2>3>4", "undo", "help", store=path, annotator="ada")
    taken = [line for line in printed.splitlines() if line.startswith("taken back")]
    assert [line.split()[-1] for line in taken] == ["demonstration", "alternative", "rating", "ranking"]
    assert "rate 2 helpful 6    response 2 by" in printed and printed.count("--- 1 of 3 ---") == 5
    with Store(path) as store:
        ((_, rating),) = store.records(Rating)
        assert (rating.criterion, rating.value, rating.scale) == ("helpful", 6.0, (1.0, 7.0))
        assert not list(store.records(Ranking)) and len(list(store.records(Retraction, retracted=True))) == 4
        ((_, d),) = store.records(Demonstration, retracted=True)
        assert d.message.text == "first\n\nsecond"
    with pytest.raises(UserError, match="nothing to undo"):
        call("undo", store=path, annotator="bob")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 > 2 > 3", "the ranking lacks 4"),
        ("1 > 2 > 3 > 3 > 4", "response 3 is in the ranking more than once"),
        ("1 > 2 > 3 > 5", "there is no response 5: they are 1 to 4"),
        ("1 > 2 3 > 4", "a ranking is written like"),
        ("1 < 2", "a ranking is written like"),
        ("rate 2 helpful 8", "helpful must be from 1 to 7, got 8"),
        ("rate 2 helpful nan", "must be from 1 to 7"),
        ("rate 2 helpful much", "a rating is a number"),
        ("rate 5 helpful 2", "there is no response 5"),
        ("rate 2 helpfull 2", "unknown criterion 'helpfull'; nearest: helpful"),
        ("rate helpful", "a rating is written like: rate 2 helpful 7"),
        ("bettre x", "unknown 'bettre'; nearest: better"),
        ("better", "the answer has no end"),
    ],
)
def test_what_cannot_be_understood_changes_nothing(call, path, line, message):
    with Store(path) as store:
        before = list(store.records(retracted=True))
        with pytest.raises(UserError, match=message):
            call(line, "1>2>3>4", store=path, annotator="ada")
        assert list(store.records(retracted=True)) == before


def test_a_terminal_is_told_and_goes_on(path, call, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    typed = iter(["1 > 2", "", "1>2>3>4"])

    def type_(prompt):
        assert prompt == "> "
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", type_)
    monkeypatch.setattr(sys, "stdin", Terminal())
    with flagsaver.flagsaver(store=path, annotator="ada"):
        assert rank.main() == 0
    out, err = capsys.readouterr()
    assert err == "error: the ranking lacks 3, 4: every response is in it once\n" and out.endswith("1 ranked\n")


def test_there_and_back_agreement_and_written_answers(call, path, tmp_path):
    exported, sft = str(tmp_path / "all.jsonl"), str(tmp_path / "sft.jsonl")
    for who, first in (("ada", "1>2>3>4"), ("bob", "4>3>2>1")):
        call("demo Grass green.", "rate 1 safe 7", first, "1=2>3>4", "1>2", store=path, annotator=who)
    printed = call(store=path, agreement=True, export=exported, written=sft)
    assert "ada and bob" in printed and "safe 1..7" not in printed and "2 conversations in" in printed
    assert [c.messages[-1].text for c in chat_sources.conversations(Messages(sft))] == ["Grass green."] * 2
    other = str(tmp_path / "other.db")
    assert call(store=other, **{"import": exported}).startswith("25 new records, 0 were there")
    assert call(store=other, **{"import": exported}) == "0 new records, 25 were there\n"
    pairs = tmp_path / "hh.jsonl"
    pairs.write_text(
        json.dumps({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}) + "\n[]"
    )
    assert call(store=other, **{"import": str(pairs)}) == "pairs: 1 of 2 kept; left out: no pair of texts 1\n"


def test_bad_options(call, path, tmp_path):
    for options, message in (
        ({}, "--store=FILE is missing"),
        ({"store": path}, "--annotator=NAME is missing"),
        ({"store": str(tmp_path / "no.db"), "annotator": "ada"}, "no feedback store at"),
        ({"store": "gs://bucket/f.db", "annotator": "ada"}, "on a local disk"),
        ({"store": path, "annotator": "ada", "rating_scale": ["7", "1"]}, "the lower first"),
        ({"store": path, "annotator": "ada", "rating_scale": ["1", "x"]}, "is a number"),
        ({"store": str(tmp_path / "no.db"), "import": "none.jsonl"}, "no such file"),
        ({"store": path, "export": path}, "written over another"),
        ({"store": path, "export": str(tmp_path)}, "a file stands where a folder is needed, or the reverse"),
        (
            {"store": path, "export": str(tmp_path / "w.jsonl"), "written": f"{tmp_path}/./w.jsonl"},
            "written over another",
        ),
        ({"store": path, "agreement": True}, "two prompts that two annotators"),
        ({"store": path, "written": str(tmp_path / "w.jsonl")}, "no conversation came out"),
    ):
        with pytest.raises(UserError, match=message):
            call(**options)
    assert not (tmp_path / "no.db").exists()


def test_as_a_command(path):
    command = [sys.executable, "-m", "launch.rank", f"--store={path}", "--annotator=ada"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        input=b"1>2>3>4\n1>2\n1>2\n",
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.decode() == "error: the ranking lacks 3, 4: every response is in it once\n"
    with Store(path) as store:
        assert len(list(store.records(Ranking))) == 1
