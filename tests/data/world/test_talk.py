"""Conversations: each on its side, true, with tools that give what is shown."""

import collections
import dataclasses
import re

import pytest

from jaxlm import tools
from jaxlm.config import UserError
from jaxlm.data.world.answers import is_refusal
from jaxlm.data.world.arithmetic import Arithmetic
from jaxlm.data.world.corpus import World
from jaxlm.data.world.people import People
from jaxlm.data.world.talk import WorldConversations, conversation, conversations, index_files
from tests.data.world.worlds import ALL_TOOLS, SMALL, evaluate, people_of, run


def test_conversations_keep_their_side():
    everyone = {p.name: p for p in people_of(SMALL)}
    said = {"train": [], "heldout": []}
    for split in said:
        for i in range(300):
            for m in conversation(ALL_TOOLS, split, i).messages:
                said[split] += [(m.role, p.kind, p.text) for p in m.parts]
    asked = {s: {text for role, _, text in said[s] if role == "user"} for s in said}
    for split in said:
        whole = "\n".join(text for _, _, text in said[split])
        named = {p.split for n, p in everyone.items() if n in whole}
        assert named == {split}
    both = asked["train"] & asked["heldout"]
    assert not both


def test_conversations_say_what_is_true():
    everyone = {p.name: p for p in people_of(SMALL)}
    outcomes = collections.Counter()
    for i in range(400):
        talk = conversation(ALL_TOOLS, "train", i)
        assert talk == conversation(ALL_TOOLS, "train", i) and talk.id == f"train/{i}"
        system = next((m.text for m in talk.messages if m.role == "system"), "")
        users = [m for m in talk.messages if m.role == "user"]
        replies = [m for m in talk.messages if m.role == "assistant"]
        assert len(users) == len(replies) <= 3
        for user, reply in zip(users, replies):
            kinds = [p.kind for p in reply.parts]
            calls = [p.text for p in reply.parts if p.kind == "tool_call"]
            results = [p.text for p in reply.parts if p.kind == "tool_result"]
            assert len(calls) == len(results) <= 1 and kinds[-1] == "text"
            named = [p for n, p in everyone.items() if n in user.text]
            if calls:
                tool, argument = calls[0].split("\n", 1)
                assert tool in system
                if tool != "search":
                    assert (run(argument) if tool == "python" else str(evaluate(argument))) == results[0]
                assert reply.text in results[0]
                outcomes[tool] += 1
            elif named:
                (who,) = named
                told = {who.facts[a] for a in who.facts if who.known[a] != "never"}
                if is_refusal(reply.text):
                    assert "search" not in system
                    outcomes["unknown", who.mentioned] += 1
                else:
                    assert reply.text in told
                    outcomes["fact"] += 1
    assert set(outcomes) == {"python", "calculator", "search", "fact", ("unknown", True), ("unknown", False)}
    assert min(outcomes.values()) > 10


# --------------------------------------------------------------------------------------------- tools and work by hand
def test_the_tools_give_what_conversations_show(tmp_path):
    (tmp_path / "texts").mkdir()
    for name, text in index_files(SMALL):
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8")
    tools.build_index(tmp_path / "texts", tmp_path / "index")
    search = tools.search_tool(tmp_path / "index", k=1)
    run_tool = {"search": search.run, "calculator": tools.calculate, "python": run}
    used = collections.Counter()

    def call(tool, argument):
        used[tool] += 1
        return run_tool[tool](argument)

    for i in range(150):
        assert conversation(ALL_TOOLS, "train", i, call) == conversation(ALL_TOOLS, "train", i)
    assert min(used.values()) > 2 and len(used) == 3
    assert len(list(conversations(dataclasses.replace(ALL_TOOLS, count=5), call=call))) == 5


def test_without_tools_there_is_only_work_that_can_be_done_by_hand():
    cfg = dataclasses.replace(ALL_TOOLS, tool_share=0.0, unknown=0.0, search=0.0, facts=0.0)
    for i in range(60):
        for message in conversation(cfg, "train", i).messages:
            assert all(p.kind in ("text", "thinking") for p in message.parts)
    hard = dataclasses.replace(cfg.world, tasks=("arithmetic",), arithmetic=Arithmetic(min_digits=3))
    with pytest.raises(UserError, match="needs a tool"):
        conversation(dataclasses.replace(cfg, world=hard, identity=0.0, system=0.0), "train", 0)


def test_words_go_to_python_where_it_is_offered_and_only_short_ones_are_asked_where_it_is_not():
    words = dataclasses.replace(SMALL, tasks=("spell", "count", "reverse"))
    cfg = WorldConversations(world=words, facts=0.0, identity=0.0, system=0.0, tool_share=1.0)
    for offered in (("calculator", "python"), ("calculator",)):
        parts = [
            p
            for i in range(40)
            for m in conversation(dataclasses.replace(cfg, tools=offered), "train", i).messages
            for p in m.parts
            if m.role != "system"
        ]
        asked = [word for p in parts for word in re.findall(r'"(\w\w+)"', p.text) if "?" in p.text]
        called = [p for p in parts if p.kind == "tool_call"]
        assert asked and bool(called) == ("python" in offered)
        assert (min(map(len, asked)) < 6) and (max(map(len, asked)) >= 6) == ("python" in offered)


def test_by_hand_and_alone():
    alone = WorldConversations(world=SMALL, facts=0, problems=1, identity=0, system=0, turns=1, tool_share=0)
    for work, kinds in (("think", ["thinking", "text"]), ("text", ["text"]), ("none", ["text"])):
        cfg = dataclasses.replace(alone, work=work)
        found = [conversation(cfg, "train", i).messages[-1] for i in range(40)]
        assert [p.kind for p in max(found, key=lambda m: len(m.parts[0].text)).parts] == kinds
        assert any("Answer:" in m.text for m in found) == (work == "text")
    assert len(list(conversations(dataclasses.replace(alone, count=7)))) == 7


# ---------------------------------------------------------------------------------------------------- bad definitions
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"facts": -1.0}, "shares"),
        ({"turns": 0}, "turns"),
        ({"search": 1.0}, "search"),
        ({"facts": 0.0, "problems": 0.0, "identity": 0.0, "system": 0.0}, "shares"),
        ({"unknown": 9.0, "world": World(people=People(unmentioned=0, never=0.0))}, "nowhere"),
    ],
)
def test_bad_conversations(fields, says):
    with pytest.raises(UserError, match=says):
        for i in range(20):
            conversation(WorldConversations(**fields), "train", i)
