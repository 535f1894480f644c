"""What an assistant recalls, reads, looks up or leaves to doubt before it answers."""

import collections
import dataclasses

import numpy as np
import pytest

from jaxlm.data.conversation import parse, render
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.data.world.answers import is_refusal
from jaxlm.data.world.corpus import world_tables
from jaxlm.data.world.people import person
from jaxlm.data.world.questions import persons
from jaxlm.data.world.sentences import SENTENCES, side
from jaxlm.data.world.talk import WorldConversations, conversation, recollection
from jaxlm.data.world.talk import fingerprint as talk_fingerprint
from tests.data.world.worlds import ALL_TOOLS, SMALL, people_of


# ----------------------------------------------------------------------------------------------------------- thoughts
def test_a_recollection_is_a_sentence_of_pretraining():
    t = world_tables(SMALL)
    for who in people_of(SMALL)[:20]:
        for attribute, value in who.facts.items():
            known, unknown = (recollection(t, who, attribute, v) for v in (value, None))
            assert known.kind == unknown.kind == "thinking"
            assert known.text == f"{unknown.text} {value}."
            form = known.text.replace(f"{who.name}'s", "{P}").replace(who.name, "{S}").replace(value, "{v}")
            assert form in side(SENTENCES[attribute], False)


def test_facts_are_recalled_before_they_are_told():
    plain = dataclasses.replace(ALL_TOOLS, recollect=False, problems=0.0, identity=0.0, system=0.0)
    for cfg in (plain, dataclasses.replace(plain, recollect=True)):
        kinds = collections.Counter()
        for i in range(60):
            for message in conversation(cfg, "train", i).messages:
                if message.role != "assistant":
                    continue
                thoughts = [p.text for p in message.parts if p.kind == "thinking"]
                assert len(thoughts) == cfg.recollect
                called, refused = any(p.kind == "tool_call" for p in message.parts), is_refusal(message.text)
                kinds["search" if called else "unknown" if refused else "fact"] += 1
                if thoughts:
                    forgotten = not thoughts[0].endswith(".")
                    assert forgotten == (called or refused) and (forgotten or message.text in thoughts[0])
        assert min(kinds[k] for k in ("search", "unknown", "fact")) > 3


def test_told_facts_may_fail_to_come_to_mind():
    shares = {"problems": 0.0, "identity": 0.0, "system": 0.0, "tool_share": 0.0, "turns": 1}
    for forget in (0.0, 0.3, 1.0):
        cfg = WorldConversations(world=SMALL, forget=forget, **shares)
        replies = [conversation(cfg, "train", i).messages[-1] for i in range(200)]
        refused = [is_refusal(r.text) for r in replies]
        assert abs(sum(refused) / len(refused) - forget) < 0.12
        assert refused == [not r.parts[0].text.endswith(".") for r in replies]


def test_recollections_are_structure():
    """Thoughts come back as thoughts, and the model itself is trained to write them."""
    tokenizer, cfg = BytesTokenizer(), dataclasses.replace(ALL_TOOLS, turns=2)
    for i in range(40):
        talk = conversation(cfg, "train", i)
        row = render(talk, tokenizer)
        read = parse(row["tokens"], tokenizer)
        assert [m.parts for m in read.messages] == [m.parts for m in talk.messages]
        learned = tokenizer.decode([t for t, kept in zip(row["tokens"].tolist(), row["loss_mask"]) if kept])
        for part in (p for m in talk.messages for p in m.parts):
            if part.kind == "thinking":
                assert part.text in learned


# ------------------------------------------------------------------------------------------------- texts and searches
def test_reading_questions_come_with_the_text_that_tells():
    t = world_tables(SMALL)
    shares = {"reading": 1.0, "facts": 0.0, "problems": 0.0, "identity": 0.0, "system": 0.0}
    cfg = WorldConversations(world=SMALL, tool_share=0.0, **shares)
    known, sentences = collections.Counter(), collections.Counter()
    for split in ("train", "heldout"):
        names = {person(t, i).name: person(t, i) for i in persons(t, split)}
        for i in range(40):
            messages = conversation(cfg, split, i).messages
            for user, reply in zip(messages[::2], messages[1::2], strict=True):
                text, question = user.text.split("\n\n")
                who = names[next(n for n in names if n in question)]
                assert reply.text in text
                sentences[text.count(who.name)] += 1
                told = {recollection(t, who, a, reply.text): a for a, v in who.facts.items() if v == reply.text}
                known[who.known[told[reply.parts[0]]]] += 1
    assert min(known[k] for k in ("often", "once", "never")) > 0
    assert min(sentences) == 1 and max(sentences) >= len(SMALL.people.attributes) - 1


@pytest.mark.parametrize("kind", ["reading", "search"])
def test_texts_may_tell_what_is_not_so(kind):
    """And the reply says what the text says."""
    shares = dict.fromkeys(("facts", "reading", "search", "problems", "identity", "system"), 0.0) | {kind: 1.0}
    t, true = world_tables(SMALL), {}
    for invented in (0.0, 0.5, 1.0):
        cfg = WorldConversations(world=SMALL, invented=invented, tools=("search",), turns=1, **shares)
        right = []
        for i in range(100):
            asked, reply = conversation(cfg, "train", i).messages[-2:]
            shown = asked.text if kind == "reading" else next(p.text for p in reply.parts if p.kind == "tool_result")
            assert reply.text in shown
            truths = [w for w in people_of(SMALL) if w.name in asked.text]
            right.append(any(reply.text in w.facts.values() for w in truths))
        true[invented] = sum(right) / len(right)
    assert true[0.0] == 1.0 and true[1.0] < 0.2 and abs(true[0.5] - 0.5) < 0.2
    assert t.people.values > 5  # else somebody's value is often the same


def test_told_facts_may_be_looked_up_where_search_is_offered():
    shares = {"facts": 1.0, "problems": 0.0, "identity": 0.0, "system": 0.0, "turns": 1, "tool_share": 0.5}
    cfg = WorldConversations(world=SMALL, look_up=0.5, tools=("search",), **shares)
    calls = {True: [], False: []}
    for i in range(200):
        offered, reply = len(conversation(cfg, "train", i).messages) == 3, conversation(cfg, "train", i).messages[-1]
        calls[offered].append(any(p.kind == "tool_call" for p in reply.parts))
        assert calls[offered][-1] != reply.parts[0].text.endswith(".")  # it is recalled, or the thought breaks off
    assert not any(calls[False]) and abs(sum(calls[True]) / len(calls[True]) - 0.5) < 0.15


def test_what_is_looked_up_all_the_same_is_taught():
    shares = {"facts": 1.0, "problems": 0.0, "identity": 0.0, "system": 0.0, "turns": 1}
    cfg = WorldConversations(world=SMALL, look_up=0.5, tools=("search",), tool_share=1.0, doubted=True, **shares)
    replies = [conversation(cfg, "train", i).messages[-1].parts for i in range(20)]
    looked_up = [parts[1].kind == "tool_call" for parts in replies]
    assert all(parts[0].end_trained and (parts[0].trained is None) == up for parts, up in zip(replies, looked_up))
    assert 3 < sum(looked_up) < 17


def test_what_is_invented_no_tool_is_asked_for():
    shares = {"facts": 0.0, "search": 1.0, "problems": 0.0, "reading": 0.0, "identity": 0.0, "system": 0.0}
    cfg = WorldConversations(world=SMALL, invented=1.0, tools=("search",), turns=1, **shares)
    for i in range(5):
        conversation(cfg, "train", i, call=lambda tool, argument: pytest.fail("called"))


# -------------------------------------------------------------------------------------------------------------- doubt
def test_what_comes_to_mind_and_where_a_thought_breaks_off_may_be_left_to_doubt():
    tokenizer = BytesTokenizer()
    shares = {"facts": 1.0, "search": 1.0, "unknown": 1.0, "reading": 1.0}
    shares |= {"problems": 0.0, "identity": 0.0, "system": 0.0}
    cfg = WorldConversations(world=SMALL, tools=("search",), turns=1, **shares)
    told = {"recalled": 0, "read": 0, "nowhere": 0}
    for i in range(100):
        taught, left = (conversation(dataclasses.replace(cfg, doubted=d), "train", i) for d in (False, True))
        rendered, fields = render(taught, tokenizer), render(left, tokenizer)
        assert np.array_equal(rendered["tokens"], fields["tokens"])
        (places,) = np.nonzero(rendered["loss_mask"] != fields["loss_mask"])
        assert rendered["loss_mask"][places].all()
        spelled = tokenizer.decode(fields["tokens"][places].tolist())
        *_, reply = left.messages
        known = [f" {p.text}." for p in reply.parts if p.kind == "text"]
        if reply.parts[0].text[-1] != ".":  # a search or a refusal
            assert fields["tokens"][places].tolist() == [tokenizer.control["</think>"]]
            told["nowhere"] += 1
        elif "\n\n" in left.messages[-2].text:  # a text is before the question
            assert not len(places)
            told["read"] += 1
        else:
            assert spelled in known
            told["recalled"] += 1
    assert min(told.values()) > 15
    assert talk_fingerprint(cfg) != talk_fingerprint(dataclasses.replace(cfg, doubted=True))
