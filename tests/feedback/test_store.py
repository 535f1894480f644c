"""The feedback store: what was acknowledged is there, what is wrong is refused and changes nothing."""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message, Part, tool_call
from jaxlm.data.readers import Rejects
from jaxlm.feedback import store as stores
from jaxlm.feedback.records import (
    Alternative,
    Demonstration,
    Policy,
    Prompt,
    Ranking,
    Rating,
    Response,
    Retraction,
    conversation_hash,
    record_id,
    to_line,
)
from jaxlm.feedback.store import Store
from tests.source import ROOT


def prompt(text="Name a color.", **metadata):
    return Prompt(Conversation((Message("system", "Be brief."), Message("user", text))), metadata)


def response(of: Prompt, text: str, n: int = 0) -> Response:
    said = Message(
        "assistant", (Part("hm", "thinking"), tool_call("search", "a\nb"), Part("r", "tool_result"), Part(text))
    )
    return Response(
        *(record_id(of), said, (7, 8, 2**17), (-0.1, -1 / 3, 0.0), (True, True, False), "t" * 64),
        policy=Policy("runs/sft", 40, "c" * 64),
        sampling={"temperature": 0.7, "seed": 3, "sample_id": n, "stop_ids": [6]},
        finish_reason="stop",
    )


def filled(store: Store, text="Name a color."):
    """A prompt with three responses and one judgment of each kind; (prompt id, response ids, judgment ids)."""
    p = prompt(text, answer="blue")
    pid, *rs = store.add(p, *(response(p, t) for t in ("red", "blue", "¿?")))
    written = Message("assistant", "Teal.")
    judgments = store.add(
        Ranking(pid, tuple(rs), ((rs[1],), (rs[0], rs[2])), "ada", {"scores": [0.1, 0.2]}),
        Rating(rs[0], "helpful", 6, (1, 7), "ada"),
        Alternative(pid, written, tuple(rs), "ada"),
        Demonstration(pid, written, "ada"),
    )
    return pid, rs, judgments


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "feedback.db"


# ------------------------------------------------------------------------------------------------------------ records
def test_everything_comes_back_as_it_was_given(path):
    with Store(path) as store:
        pid, rs, (ranking, rating, *_) = filled(store)
    with Store(path, create=False) as store:
        p = store.get(pid)
        assert p == prompt(answer="blue") and list(store.responses(pid)) == rs
        found = store.get(rs[1])
        assert dataclasses.replace(found, time="") == dataclasses.replace(response(p, "blue"), time="")
        assert found.text == "blue" and found.logprobs == (-0.1, -1 / 3, 0.0) and found.policy.name == "runs/sft@40"
        assert store.get(ranking).ranks == (1, 0, 1) and store.get(rating).value == 6.0
        assert len(list(store.records())) == 8 and store.prompts() == {pid: p}
        assert [type(r).__name__ for _, r in store.records(Rating, Demonstration, prompt=pid, annotator="ada")] == [
            "Rating",
            "Demonstration",
        ]
        assert not list(store.records(annotator="bob"))


def test_the_same_sample_is_one_record_and_two_judgments_are_two(path):
    with Store(path) as store:
        pid, rs, _ = filled(store)
        again = dataclasses.replace(store.get(rs[0]), time="later")
        assert store.add(prompt(answer="blue"), again) == [pid, rs[0]] and len(list(store.records())) == 8
        assert store.add(dataclasses.replace(again, sampling={"sample_id": 9})) != [rs[0]]
        first, second = (store.add(Ranking(pid, tuple(rs), (tuple(rs),), "ada"))[0] for _ in range(2))
        assert first != second


def test_a_retracted_judgment_is_kept_and_no_longer_read(path):
    with Store(path) as store:
        pid, _, (ranking, *_) = filled(store)
        store.add(Retraction(ranking, "ada"))
        assert not list(store.records(Ranking)) and len(list(store.records())) == 7
        assert [i for i, _ in store.records(Ranking, retracted=True)] == [ranking] and store.get(ranking)
        with pytest.raises(UserError, match="only ranking, rating, alternative, demonstration can be retracted"):
            store.add(Retraction(pid, "ada"))


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ([[0], [1]], "the ranking lacks r2"),
        ([[0], [1, 2], [1]], "the ranking holds r1 more than once"),
        ([[0], [1, 2], [3]], "the ranking holds r3, which was not shown"),
        ([[0], [], [1, 2]], "a tier of a ranking is empty"),
    ],
)
def test_a_ranking_has_each_response_once(tiers, message):
    with pytest.raises(UserError, match=message):
        Ranking("p", ("r0", "r1", "r2"), tuple(tuple(f"r{i}" for i in t) for t in tiers), "ada")


def test_what_is_wrong_is_refused_and_the_store_is_as_it_was(path):
    with Store(path) as store:
        pid, rs, (ranking, *_) = filled(store)
        other, *_ = filled(store, "Name a fish.")
        before = list(store.records(retracted=True))
        good = Demonstration(pid, Message("assistant", "Ok"), "ada")
        said = Message("assistant", "Ok")
        for bad, message in (
            (Ranking(other, tuple(rs), (tuple(rs),), "ada"), "is no response to the prompt"),
            (Ranking(pid, (rs[0], "gone"), ((rs[0], "gone"),), "ada"), "gone is not in the store"),
            (Rating(pid, "safe", 1, (0, 1), "ada"), "a rating is about a response"),
            (Alternative(ranking, said, (rs[0],), "ada"), "belongs to a prompt"),
            (Alternative(pid, said, (ranking,), "ada"), "is no response to the prompt"),
            (Response("gone", said), "gone is not in the store"),
            (Response(pid, Message("assistant", "\ud800")), "not valid Unicode"),
            (Response(pid, said, sampling={"x": float("nan")}), "must be plain JSON"),
        ):
            with pytest.raises(UserError, match=message):
                store.add(good, bad)  # the good one goes with the bad one
            assert list(store.records(retracted=True)) == before
    for make, message in (
        (lambda: Rating("r", "safe", 8, (1, 7), "ada"), "safe must be from 1 to 7, got 8"),
        (lambda: Rating("r", "safe", 1, (7, 1), "ada"), "the lower first"),
        (lambda: Rating("r", " ", 1, (0, 1), "ada"), "a criterion needs a name"),
        (lambda: Ranking("p", ("a",), (("a",),), "ada"), "at least two"),
        (lambda: Demonstration("p", Message("user", "hi"), "ada"), "this is a user's"),
        (lambda: Alternative("p", Message("assistant", " "), ("r",), "ada"), "is empty"),
        (lambda: Prompt(Conversation((Message("assistant", "hi"),))), "before the assistant's turn"),
        (lambda: Response("p", Message("assistant", "a"), (1,)), "all or none"),
        (lambda: Response("p", Message("assistant", "a"), (1, 2), (-1.0,), (True, True), "t"), "as many are needed"),
        (lambda: Response("p", Message("assistant", "a"), (1,), (float("nan"),), (True,), "t"), "must be finite"),
    ):
        with pytest.raises(UserError, match=message):
            make()


# ------------------------------------------------------------------------------------------------------------ the file
WRITER = """
import sys
from jaxlm.data.conversation import Conversation, Message
from jaxlm.feedback.records import Prompt
from jaxlm.feedback.store import Store
store = Store(sys.argv[1])
for n in range(10**9):
    (id,) = store.add(Prompt(Conversation((Message("user", f"{sys.argv[2]} {n} " + "x" * 2000),))))
    print(id, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(path):
    """Two writers at a time, killed in the middle, again and again on the same file."""
    acknowledged = []
    for turn in range(3):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, path, f"{turn}/{w}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
            )
            for w in range(2)
        ]
        for w in writers:
            acknowledged += [w.stdout.readline().strip() for _ in range(20 + 7 * turn)]
        for w in writers:
            os.kill(w.pid, signal.SIGKILL)
        for w in writers:
            rest = w.stdout.read()
            acknowledged += [line for line in rest.splitlines(keepends=True) if line.endswith("\n")]
            assert w.wait() == -signal.SIGKILL
    acknowledged = {a.strip() for a in acknowledged}
    with Store(path) as store:
        there = {i for i, _ in store.records()}
        assert len(acknowledged) > 150 and acknowledged <= there
        assert store._pragma("integrity_check") == "ok" and store._pragma("journal_mode") == "wal"
        assert store._pragma("synchronous") == 2  # FULL


def _open_and_write(path, name):
    with Store(path) as store:
        return [store.add(prompt(f"{name} {n}"))[0] for n in range(10)]


def test_processes_may_make_the_same_store_at_once(path):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        ids = [i for done in pool.map(_open_and_write, [str(path)] * 4, "abcd") for i in done]
    with Store(path) as store:
        assert sorted(store.prompts()) == sorted(ids) and len(ids) == 40


def test_only_a_store_is_opened(tmp_path):
    def foreign(name):
        with sqlite3.connect(tmp_path / name) as db:
            db.execute("CREATE TABLE t (x)")
        return tmp_path / name

    (tmp_path / "text").write_text("no database, but long enough to be looked at" * 40)
    (tmp_path / "file").write_text("")
    other = foreign("other.db")
    before = other.read_bytes()
    for given, message in (
        ("gs://bucket/feedback.db", "on a local disk"),
        (tmp_path / "text", "not a database"),
        (tmp_path / "file" / "feedback.db", "a file stands where a folder is needed"),
        (tmp_path, "unable to open"),
        (other, "not a feedback store"),
    ):
        with pytest.raises(UserError, match=message):
            Store(given)
    assert before == other.read_bytes() and not (tmp_path / "other.db-wal").exists()
    with pytest.raises(UserError, match="no feedback store at"):
        Store(tmp_path / "none.db", create=False)
    assert not (tmp_path / "none.db").exists()


def test_migrations_run_in_order_each_whole_or_not_at_all(path, monkeypatch):
    with Store(path) as store:
        pid, *_ = filled(store)
        assert store._pragma("user_version") == 1

    def notes(db):
        db.execute("CREATE TABLE notes (text TEXT)")

    def failing(db):
        db.execute("DROP TABLE records")
        db.execute("nonsense")

    monkeypatch.setattr(stores, "MIGRATIONS", (*stores.MIGRATIONS, notes, failing))
    with pytest.raises(UserError, match="syntax error"):
        Store(path)
    monkeypatch.setattr(stores, "MIGRATIONS", stores.MIGRATIONS[:2])
    with Store(path) as store:
        assert store._pragma("user_version") == 2 and store.get(pid)
        assert store._db.execute("SELECT count(*) FROM notes").fetchone() == (0,)
    monkeypatch.setattr(stores, "MIGRATIONS", stores.MIGRATIONS[:1])
    with pytest.raises(UserError, match="has schema version 2, this program knows versions up to 1"):
        Store(path)


# ------------------------------------------------------------------------------------------------------ there and back
def test_export_and_import_are_exact_and_idempotent(path, tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    with Store(path) as store, Store(tmp_path / "other.db") as other:
        _, _, (ranking, *_) = filled(store)
        store.add(Retraction(ranking, "ada"))
        filled(store, "Café\u2028\x00\n🙂")
        assert store.export_jsonl(a) == 17
        assert other.import_jsonl(a) == (17, 0, 0) and other.import_jsonl(a) == (0, 17, 0)
        assert other.export_jsonl(b) == 17 and a.read_bytes() == b.read_bytes()
        assert list(store.records()) == list(other.records())
        assert store.import_jsonl(b) == (0, 17, 0)


def test_a_bad_line_is_named_and_too_many_change_nothing(path, tmp_path):
    with Store(path) as store:
        _, rs, _ = filled(store)
        lines = [to_line(r) for _, r in store.records()]
    good = [json.loads(line) for line in lines]

    def changed(n, **changes):
        return json.dumps(good[n] | changes)

    rating = [g["kind"] for g in good].index("rating")
    file = tmp_path / "in.jsonl"
    for bad, message in (
        ("{", "line 9: not valid JSON"),
        ("[]", "a JSON object is wanted"),
        (changed(0, schema_version=2), "schema_version 1 is wanted, got 2"),
        (changed(0, kind="promt"), "unknown kind 'promt'; nearest: prompt"),
        (changed(1, time="x", finish_reason=3), "field 'finish_reason': str is wanted"),
        (changed(1, tokens=[1.5]), "field 'tokens': a list of int is wanted"),
        (changed(1, message={"role": "assistant"}), "field 'message': message 0 has no 'content'"),
        (changed(rating, value=7), "is not that of what the record holds"),
        (changed(rating, value=True), "field 'value': float is wanted"),
        (changed(rating, extra=1), "a rating has no field 'extra'"),
        (json.dumps({k: v for k, v in good[rating].items() if k != "scale"}), "has no field 'scale'"),
        (to_line(Rating(rs[0][::-1], "safe", 1, (0, 1), "ada")), "is not in the store"),
    ):
        file.write_text("\n".join([*lines, bad]))
        with Store(tmp_path / "new.db") as store:
            with pytest.raises(UserError, match=r"in.jsonl line 9: ") as error:
                store.import_jsonl(file)
            assert message in str(error.value) and not list(store.records())
            rejects = Rejects(0.2)
            assert store.import_jsonl(file, rejects)[2] == 1 and message in rejects.examples[0]
        (tmp_path / "new.db").unlink()
    with Store(path) as store:
        for name, message in (("none.jsonl", "no such file"), ("in.txt", "records come from")):
            (tmp_path / "in.txt").write_text("hi")
            with pytest.raises(UserError, match=message):
                store.import_jsonl(tmp_path / name)


def test_ids_are_fixed_for_good():
    p = prompt(answer="blue")
    sampled = Response(record_id(p), Message("assistant", "x"), (1,), (-0.5,), (True,), "t")
    assert record_id(p) == "a0233a395338f7439be0f14f5d36dca0"
    assert record_id(sampled) == "dc5cb132c8fc286859513100a04bd707"
    assert conversation_hash(p.conversation) == "03f0ed9eabeacf493f88089425bcc07d"
    whole, floats = (Rating("r", "safe", v, s, "a", "t") for v, s in ((1, (0, 1)), (1.0, (0.0, 1.0))))
    assert record_id(whole) == record_id(floats)
