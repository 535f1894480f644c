"""Conversations packed into rows: whole, isolated, with the mask that the renderer gives."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data.chat import OPEN, Chat, fit, left_out, pack_conversations, prepare_chat
from jaxlm.data.chat_sources import Messages, PromptResponse
from jaxlm.data.conversation import Conversation, Message, Part, render, tool_call
from jaxlm.data.loader import Loader
from jaxlm.data.packing import Reader
from jaxlm.data.tokenizer import Bytes, BytesTokenizer
from jaxlm.data.world.corpus import World
from jaxlm.data.world.people import People
from jaxlm.data.world.talk import WorldConversations, conversations

TOKENIZER = BytesTokenizer()


def talk(n: int) -> list[Conversation]:
    """Turns of many lengths, one with a tool and one that is context only."""
    tool = (tool_call("calculator", "1+1"), Part("2", "tool_result"), Part("two"))
    made = []
    for i in range(n):
        asked = Message("user", f"{i} " + "why? " * (i % 5 + 1))
        reply = Message("assistant", tool if i % 3 == 0 else "because " * (i % 7 + 1), trained=i % 4 != 1)
        made.append(Conversation((asked, reply, Message("user", "and?"), Message("assistant", "so"))))
    return made


@given(st.lists(st.integers(1, 40), max_size=300))
def test_groups_fit_and_hold_everything_once(lengths):
    groups = list(fit(lengths, 40))
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in g) <= 40 for g in groups)
    # Two groups that both stay less than half full would have been one, unless too many were open.
    half = [g for g in groups if sum(lengths[i] for i in g) <= 20]
    assert len(half) <= 1 or len(lengths) > OPEN


def test_rows_hold_what_was_rendered(tmp_path):
    found = talk(60)
    packed, counts = pack_conversations(found, TOKENIZER, tmp_path / "rows", context=199)
    rows = Reader(packed.directory).read(range(packed.rows))
    unpacked = {}
    for r in range(packed.rows):
        for s in range(1, rows["segments"][r].max() + 1):
            here = rows["segments"][r] == s
            assert np.array_equal(rows["positions"][r][here], np.arange(here.sum()))
            unpacked[tuple(rows["tokens"][r][here])] = rows["loss_mask"][r][here]
    for one in found:
        fields = render(one, TOKENIZER)
        assert np.array_equal(unpacked[tuple(fields["tokens"])], fields["loss_mask"])
    assert not rows["loss_mask"][rows["segments"] == 0].any()
    assert packed.scored == rows["loss_mask"].sum() == counts.trained
    assert packed.documents == counts.conversations == len(found)
    assert packed.tokens == counts.tokens


def test_workers_change_nothing(tmp_path):
    world = WorldConversations(world=World(people=People(count=20, unmentioned=4)), count=2500)
    here, there = (
        pack_conversations(conversations(world), TOKENIZER, tmp_path / str(n), context=400, workers=n)[0]
        for n in (1, 2)
    )
    a, b = (Reader(p.directory).read(range(p.rows)) for p in (here, there))
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert here.tokens > 0.9 * here.rows * 401


def write(path, records):
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return str(path)


def test_sides_of_a_file_are_apart_and_cached(tmp_path):
    records = [{"prompt": f"say {i}", "response": str(i)} for i in range(200)]
    source = PromptResponse(write(tmp_path / "a.jsonl", records + records[:1]))
    chat = Chat((source,), tokenizer=Bytes(), context=64, valid_fraction=0.2, cache=str(tmp_path / "cache"))
    made = prepare_chat(chat, progress=False)
    train, valid = made.train["prompts"], made.valid["prompts"]
    assert train.documents + valid.documents == 201 and 20 < valid.documents < 70
    said = [
        {bytes(t[t >= 32].astype(np.uint8)) for t in Reader(p.directory).read(range(p.rows))["tokens"]}
        for p in (train, valid)
    ]
    assert not said[0] & said[1]
    again = prepare_chat(dataclasses.replace(chat, workers=1), progress=False)
    assert again.hashes == made.hashes and again.directory == made.directory
    other = prepare_chat(dataclasses.replace(chat, train_on=("user", "assistant")), progress=False)
    assert other.train["prompts"].scored > train.scored
    with Loader(made.train, 4, seed=0) as loader:
        batch = loader.batch(0)
        assert batch.loss_mask.sum() < (batch.segments > 0).sum()


def test_what_is_left_out_is_kept_and_said_in_one_line(tmp_path, capsys):
    records = [{"prompt": f"say {i}", "response": str(i)} for i in range(40)]
    records[3] = {"prompt": "no answer"}
    records[5] = {"prompt": "x" * 90, "response": "a row holds 65 tokens"}
    records[7] = {"prompt": "", "response": ""}
    source = PromptResponse(write(tmp_path / "a.jsonl", records), max_bad_fraction=0.5)
    talks = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}] * n}
             for n in (1, 1, 1, 8)]  # fmt: skip
    longer = Messages(write(tmp_path / "b.jsonl", talks))
    chat = Chat((source, longer), tokenizer=Bytes(), context=64, cache=str(tmp_path / "cache"))
    made = prepare_chat(chat, progress=False)
    rejected = made.reports["sources"]["prompts"]["train"]["rejected"]
    assert rejected["texts"] == len(rejected["examples"]) > 0 and "a.jsonl line 4: " in rejected["examples"][0]
    assert rejected == made.reports["sources"]["prompts"]["valid"]["rejected"]
    first, second = capsys.readouterr().err.splitlines()
    kept = made.train["prompts"].documents + made.valid["prompts"].documents
    assert first == (
        f"source prompts: {kept} conversations; {rejected['texts']} lines refused, 1 too long; the first: "
        f"{rejected['examples'][0]}"
    )
    assert second == "source messages: 4 conversations; 1 cut"
    side = {"conversations": 2, "cut": 1, "too_long": 0, "untrained": 3, "examples": []}
    sides = {name: side | {"rejected": rejected | {"texts": 1, "examples": ["a"]}} for name in ("train", "valid")}
    line = "source a: 4 conversations; 1 lines refused, 2 cut, 6 with nothing to train on; the first: a"
    assert left_out("a", sides) == line
    nothing = side | {"cut": 0, "untrained": 0, "rejected": {"texts": 0, "empty": 4, "examples": []}}
    assert left_out("a", {"train": nothing, "valid": nothing}) is None
    # From the cache, and from sets that were packed before refusals were kept.
    again = prepare_chat(chat, progress=False)
    assert again.reports == made.reports and capsys.readouterr().err.splitlines() == [first, second]
    for manifest in (tmp_path / "cache").rglob("manifest.json"):
        about = json.loads(manifest.read_text())
        del about["rejected"]
        manifest.write_text(json.dumps(about))
    assert prepare_chat(chat, progress=False).hashes == made.hashes
    assert "conversations; 1 too long; the first: prompts " in capsys.readouterr().err


def test_the_world_validates_with_its_heldout_side(tmp_path):
    world = WorldConversations(world=World(people=People(count=20, unmentioned=4)), count=100)
    chat = Chat((world,), tokenizer=Bytes(), context=1500, valid_fraction=0.1, cache=str(tmp_path))
    made = prepare_chat(chat, progress=False)
    assert made.valid["world"].documents == 10 and made.train["world"].documents == 100


def test_replayed_text_trains_whole_and_validates_nowhere(tmp_path):
    told = World(name="told", people=People(count=20, unmentioned=4), validation=10)
    talk = WorldConversations(world=told, count=50)
    chat = Chat((talk,), tokenizer=Bytes(), context=600, replay=(told,), cache=str(tmp_path))
    made = prepare_chat(chat, progress=False)
    assert set(made.train) == {"world", "told"} and set(made.valid) == {"world"}
    replayed = made.train["told"]
    assert replayed.documents == 100  # five biographies each, none of the held-out ones
    assert replayed.scored > 0.95 * replayed.tokens
    without = prepare_chat(dataclasses.replace(chat, replay=()), progress=False)
    assert without.hashes["packed"] != made.hashes["packed"]
    with Loader(made.train, 8, seed=0) as loader:
        assert sorted(np.unique(np.asarray(loader.batch(0).source), return_counts=True)[1]) == [4, 4]
    with pytest.raises(UserError, match="two sources are named"):
        prepare_chat(dataclasses.replace(chat, replay=(dataclasses.replace(told, name="world"),)), progress=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokenizer": None}, "no parent"),
        ({"valid_fraction": 0.0}, "valid_fraction"),
        ({"sources": ()}, "empty"),
        ({"train_on": ("tool",)}, "never trained on"),
        ({"context": 8}, "no conversation to train on.*fits"),
        ({"sources": (Messages("no/such/file.jsonl"),)}, "no/such/file.jsonl"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, change, message):
    source = PromptResponse(write(tmp_path / "a.jsonl", [{"prompt": f"say {i}", "response": "one"} for i in range(20)]))
    chat = Chat((source,), tokenizer=Bytes(), context=64, cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=message):
        prepare_chat(dataclasses.replace(chat, **change), progress=False)
