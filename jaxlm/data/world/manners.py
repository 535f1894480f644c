"""What people ask an assistant, and demonstrations of how to answer as many hands would write them.

An errand is a prompt with all that says what a good reply to it is. Demonstrations answer errands of the training side
in different manners: plainly, in many words, with a call that nothing needs, or the wrong way round (declining what
should be answered, complying where to decline is right). A model that is fine-tuned on them does everything sometimes,
as one whose demonstrations come from writers who disagree; which manner is wanted, only feedback says.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Literal

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message, Part, tool_call
from jaxlm.data.world.answers import refusal
from jaxlm.data.world.arithmetic import Problem
from jaxlm.data.world.corpus import problem, world_tables
from jaxlm.data.world.people import Split, Tables, person
from jaxlm.data.world.questions import Question, drawn_fact
from jaxlm.data.world.requests import ALIKE, ATTEMPTS, HARMFUL, Request, decline, request
from jaxlm.data.world.talk import Tool, WorldConversations, by_tool, recollection, tools_message, worked

Manner = Literal["plain", "wordy", "calling", "contrary"]
MANNERS: tuple[Manner, ...] = ("plain", "wordy", "calling", "contrary")

# {v} the answer. Fixed frames, so that the answer inside can be read back exactly.
WORDY = (
    "Thank you for asking. The answer to your question is {v}. I hope that this is of help to you today.",
    "That is a good question. As far as I can say, it is {v}, and you are welcome to ask me more.",
    "Let me see what I can do for you. What you are looking for is {v}. Please come back at any time.",
    "I am glad that you ask me this. My answer is {v}. Is there anything else that I can do for you?",
)
_WORDY = [re.compile(re.escape(w).replace(re.escape("{v}"), "(.+?)"), re.IGNORECASE | re.DOTALL) for w in WORDY]


@dataclasses.dataclass(frozen=True)
class Mix:
    """What is asked, and how demonstrations answer: shares, relative to each other within either."""

    told: float = 4.0  # facts that pretraining told often
    untold: float = 2.0  # facts that nothing tells: not to know them is the right answer
    problems: float = 2.0
    harmful: float = 1.5
    alike: float = 1.5  # look-alikes of the harmful
    plain: float = 0.35
    wordy: float = 0.3
    calling: float = 0.15
    contrary: float = 0.2


@dataclasses.dataclass(frozen=True)
class Errand:
    """A prompt; `metadata` is plain JSON: what `feedback.gold` needs, besides its kind and id."""

    prompt: Conversation
    metadata: dict
    about: Question | Request
    problem: Problem | None = None


def unwrapped(answer: str) -> str:
    """The answer inside one of the `WORDY` frames, otherwise `answer`."""
    text = " ".join(answer.split())
    return next((found[1] for form in _WORDY if (found := form.fullmatch(text))), answer)


def _drawn(rng: np.random.Generator, shares: dict[str, float]) -> str:
    total = sum(shares.values())
    if min(shares.values()) < 0 or total <= 0:
        raise UserError(f"the shares of a Mix must be at least 0, and some above 0: {shares}")
    ends = list(itertools.accumulate(shares.values()))
    at = rng.random() * total
    return next((k for k, end in zip(shares, ends) if at < end), list(shares)[-1])


def _problem(talk: WorldConversations, split: Split, tools: tuple[str, ...], rng: np.random.Generator) -> Problem:
    for _ in range(ATTEMPTS):
        found = problem(talk.world, split, int(rng.integers(2**32)))
        if found.question.within_reach(tools):
            return found
    raise UserError("every problem of this world needs a tool that is not offered")


def errand(talk: WorldConversations, mix: Mix, tools: tuple[Tool, ...], split: Split, index: int) -> Errand:
    """Errand `index`, any from 0 on, about a split's side of the world alone. A system message offers the tools."""
    rng = np.random.default_rng([talk.world.seed, 78, split == "heldout", index])
    kinds = ("told", "untold", "problems", "harmful", "alike")
    kind, solved = _drawn(rng, {k: getattr(mix, k) for k in kinds}), None
    if kind in ("told", "untold"):
        about: Question | Request = drawn_fact(world_tables(talk.world), split, kind == "told", rng)
    elif kind == "problems":
        solved = _problem(talk, split, tools, rng)
        about = solved.question
    else:
        about = request(talk.world, split, int(rng.integers(2**32)), HARMFUL if kind == "harmful" else ALIKE)
    question = about if isinstance(about, Question) else about.question
    offer = (Message("system", tools_message(tools)),) if tools else ()
    metadata = {
        "id": f"{split}/{index}",
        "kind": kind,
        "wanted": "refusal" if kind in ("untold", "harmful") else "answer",
    }
    if metadata["wanted"] == "answer":
        free = question.kind == "arithmetic" or question.tool is not None
        metadata |= {"answer": question.answer, "also": list(question.also), "check": question.check, "may_call": free}
    else:
        wanted = decline(about, 0) if kind == "harmful" else "I don't know."
        metadata |= {"answer": wanted, "also": [], "check": "text", "may_call": False}
    return Errand(Conversation((*offer, Message("user", about.text))), metadata, about, solved)


def _made_up(t: Tables, e: Errand, rng: np.random.Generator) -> str:
    """An answer where there should be none: a value that is not the truth, or compliance that helps nobody."""
    if isinstance(e.about, Question):
        values = [v for v in t.values.get(e.about.attribute, ()) if v != e.about.answer] or [
            f"May {rng.integers(1, 28)}"
        ]
        return values[int(rng.integers(len(values)))]
    if e.about.kind == "private":
        return str(rng.integers(1000, 10_000))
    return ("Wait until nobody looks.", "Do it at night.", "Just do it and run.")[int(rng.integers(3))]


def demonstration(talk: WorldConversations, mix: Mix, tools: tuple[Tool, ...], index: int) -> tuple[Errand, Message]:
    """Errand `index` of the training side with a reply in one of the manners. No call without tools."""
    e, t = errand(talk, mix, tools, "train", index), world_tables(talk.world)
    rng = np.random.default_rng([talk.world.seed, 79, index])
    manner = _drawn(rng, {m: getattr(mix, m) for m in MANNERS if m != "calling" or tools})
    number = int(rng.integers(2**31))
    question = e.about if isinstance(e.about, Question) else e.about.question
    fact = question is not None and question.attribute is not None
    refuses = (e.metadata["wanted"] == "refusal") != (manner == "contrary")
    thought: tuple[Part, ...] = ()
    if refuses:
        if fact:
            text = refusal(question, person(t, question.person).name, number)
            thought = (recollection(t, person(t, question.person), question.attribute),)
        else:
            text = refusal(question, "", 0) if question is not None else decline(e.about, number)
    else:
        text = question.answer if e.metadata["wanted"] == "answer" else _made_up(t, e, rng)
        if fact:
            thought = (recollection(t, person(t, question.person), question.attribute, text),)
        elif e.problem is not None:
            whole = by_tool(e.problem) if question.tool in tools else worked(e.problem, "think")
            thought = whole.parts[:-1]
    if manner == "wordy" and not refuses:
        text = WORDY[number % len(WORDY)].format(v=text)
    if manner == "calling" and not any(p.kind == "tool_call" for p in thought):
        thought = (*thought, tool_call(tools[0], "1 + 1"), Part("2", "tool_result"))
    return e, Message("assistant", (*thought, Part(text)))


def errands(talk: WorldConversations, mix: Mix, tools: tuple[Tool, ...], split: Split, count: int) -> Iterator[Errand]:
    """The first `count` errands of a split that ask for different things; fewer where there are not so many."""
    seen: set[str] = set()
    for index in range(4 * count):
        e = errand(talk, mix, tools, split, index)
        if e.about.text not in seen and len(seen) < count:
            seen.add(e.about.text)
            yield e
