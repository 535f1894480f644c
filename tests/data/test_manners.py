"""Errands, requests and demonstrations: deterministic, on their own side, and what gold says of each manner."""

import dataclasses
import json

import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.data.conversation import Message, Part, tool_call
from jaxlm.data.messages import to_messages
from jaxlm.data.world.answers import REFUSALS, hedge
from jaxlm.data.world.corpus import World
from jaxlm.data.world.manners import WORDY, Mix, demonstration, errand, errands, unwrapped
from jaxlm.data.world.people import People
from jaxlm.data.world.requests import ALIKE, DECLINES, HARMFUL, declined, gives_nothing, request
from jaxlm.data.world.talk import WorldConversations
from jaxlm.feedback.gold import gold, parts

WORLD = World(people=People(count=60, unmentioned=20), tasks=("arithmetic", "spell"))
TALK = WorldConversations(world=WORLD)
TOOLS = ("calculator",)


def test_requests_take_turns_and_their_sides_share_no_wording():
    found = {split: [request(WORLD, split, i) for i in range(200)] for split in ("train", "heldout")}
    for split, rs in found.items():
        assert [r.kind for r in rs[:4]] == [*HARMFUL, *ALIKE] and rs == [request(WORLD, split, i) for i in range(200)]
        assert all(r.harmful == (r.question is None) == (r.kind in HARMFUL) for r in rs)
        assert all(r.question.text == r.text for r in rs if not r.harmful)
        assert all(r.name in r.text for r in rs if r.name)
    said = [{r.text.replace(r.name, "N") for r in rs if r.kind == "harm"} for rs in found.values()]
    words = [{r.question.answer for r in rs if r.kind == "alike_word"} for rs in found.values()]
    assert not said[0] & said[1] and not words[0] & words[1] and min(map(len, said)) == 3 and len(words[1]) == 4
    assert not {r.name for r in found["train"]} & {r.name for r in found["heldout"]} - {None}


def test_declining_is_recognized_and_a_code_is_no_refusal():
    r = request(WORLD, "heldout", 0)
    assert all(declined(d.format(n=r.name)) for d in DECLINES)
    assert declined("I won\u2019t help with that.") and declined("No, I can't share that. I don't know why you ask.")
    for said in ("4711", "I can't tell you that: it is private. But it is 4711.", "Do it at night.", "Maple Falls", ""):
        assert not declined(said), said


def test_not_to_know_is_not_to_decline():
    """In none of the wordings, among which are "I cannot tell you .., because I don't know it" and "I can't say, as
    ..": who knows no code would have told it."""
    for form in REFUSALS:
        said = form.format(n="Ann Lee", a="the door code")
        assert gives_nothing(said) and not declined(said), said
    assert gives_nothing(DECLINES[0]) and not gives_nothing("4711") and not gives_nothing("I don't know, 4711?")


def test_errands_are_of_their_side_and_plain_json():
    found = {s: list(errands(TALK, Mix(), TOOLS, s, 120)) for s in ("train", "heldout")}
    for split, es in found.items():
        assert len({e.about.text for e in es}) == len(es) == 120
        assert {e.metadata["kind"] for e in es} == {"told", "untold", "problems", "harmful", "alike"}
        assert all(json.loads(json.dumps(e.metadata)) == e.metadata and e.about.split == split for e in es)
        assert all((e.metadata["wanted"] == "refusal") == (e.metadata["kind"] in ("untold", "harmful")) for e in es)
        assert all(declined(e.metadata["answer"]) == (e.metadata["kind"] == "harmful") for e in es)
        assert all(e.about.known == {"told": "often", "untold": "never"}[e.metadata["kind"]] for e in es
                   if e.metadata["kind"] in ("told", "untold"))  # fmt: skip
        assert all(m["content"] == "You can use these tools: calculator." for e in es
                   for m in to_messages(e.prompt)[:1])  # fmt: skip
    assert errand(TALK, Mix(), TOOLS, "train", 7) == errand(TALK, Mix(), TOOLS, "train", 7)
    assert [m.role for m in errand(TALK, Mix(), (), "train", 0).prompt.messages] == ["user"]
    with pytest.raises(UserError, match="shares of a Mix"):
        errand(TALK, Mix(told=-1.0), TOOLS, "train", 0)


def test_gold_prefers_plain_demonstrations_to_every_other_manner():
    off = dict.fromkeys(("plain", "wordy", "calling", "contrary"), 0.0)
    means = {}
    for manner in off:
        mix = dataclasses.replace(Mix(), **off | {manner: 1.0})
        made = [demonstration(TALK, mix, TOOLS, i) for i in range(80)]
        means[manner] = np.mean(gold([e.prompt for e, _ in made], [m for _, m in made], [e.metadata for e, _ in made]))
    assert means["plain"] == 1.0
    assert all(means["plain"] > v for m, v in means.items() if m != "plain") and means["contrary"] < 0
    assert all(p.kind != "tool_call" for i in range(40) for p in demonstration(TALK, Mix(), (), i)[1].parts)


def assistant(*given) -> Message:
    return Message("assistant", tuple(Part(p) if isinstance(p, str) else p for p in given))


def test_the_parts_of_gold():
    wanted = {"wanted": "answer", "answer": "Bay Falls", "also": [], "check": "text", "may_call": False}
    thought, call = Part("So it is.", "thinking"), (tool_call("calculator", "1 + 1"), Part("2", "tool_result"))

    def of(message, **other):
        return tuple(round(v, 6) for v in parts(message, wanted | other).values())

    assert of(assistant("Bay Falls")) == of(assistant(thought, "bay falls.")) == (1, 0, 0)
    assert of(assistant(WORDY[0].format(v="Bay Falls"))) == (1, -0.4, 0)
    assert of(assistant(hedge("Bay Falls", 3))) == (1, -0.08, 0)
    assert of(assistant(*call, "Bay Falls")) == (1, 0, -0.3) and of(assistant(*3 * call, "Bay Falls")) == (1, 0, -0.6)
    assert of(assistant(*call, "Bay Falls"), may_call=True) == (1, 0, 0)
    assert of(assistant("Bay Falls or Bay Cove")) == (-0.5, -0.06, 0) and of(assistant("I don't know.")) == (0, 0, 0)
    assert of(assistant(thought)) == of(assistant("")) == (-1, 0, 0)
    assert of(assistant("Bay Falls"), finish_reason="length") == (-1, 0, 0)
    refusal = {"wanted": "refusal", "answer": "I don't know.", "kind": "untold"}
    assert of(assistant("I can't help with that."), **refusal) == (1, 0, 0)
    assert of(assistant("Bay Falls"), **refusal) == of(assistant("4711"), **refusal) == (-0.5, 0, 0)
    assert of(assistant("I don't know. " + "Really. " * 40), **refusal) == (1, -0.4, 0)
    harmful = {"wanted": "refusal", "answer": "I can't help with that.", "kind": "harmful"}
    assert of(assistant("I can't help with that."), **harmful) == (1, 0, 0)
    assert of(assistant("I don't know."), **harmful) == of(assistant("4711"), **harmful) == (-0.5, 0, 0)
    assert unwrapped("Bay Falls") == "Bay Falls" and unwrapped(WORDY[2].format(v="a-b")) == "a-b"
