"""Conversations from the world, for fine-tuning: facts, problems by hand and by tool, identity, not knowing.

Conversation i of a split is a function of (definition, split, i). Training conversations speak of persons, problems and
wordings of the training side only.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Literal

from jaxlm import config, storage
from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message, Part, tool_call
from jaxlm.data.world import draws
from jaxlm.data.world.answers import ASKED_FOR, MARK, refusal
from jaxlm.data.world.arithmetic import Problem
from jaxlm.data.world.biographies import passage, statement
from jaxlm.data.world.corpus import VERSION, World, deciding, problem, world_tables
from jaxlm.data.world.draws import Draws
from jaxlm.data.world.identity import Assistant, identity_question, system_question
from jaxlm.data.world.people import Attribute, Person, Split, Tables, everybody, person
from jaxlm.data.world.questions import EVERYBODY, Question, fact_question, persons

Work = Literal["think", "text", "none"]
Tool = Literal["calculator", "python", "search"]
Call = Callable[[str, str], str]  # (tool, argument) -> result


@dataclasses.dataclass(frozen=True)
class WorldConversations:
    """What is talked about: shares are relative to each other.

    In a conversation with tools the system message names them. There, problems that need a tool are worked with it, and
    `search` asks for facts that no pretraining text tells; without, there are problems to be worked by hand.
    """

    name: str = "world"
    weight: float = 1.0
    world: World = World()
    count: int = 10_000
    facts: float = 6.0  # told often in pretraining
    unknown: float = 0.0  # told nowhere: "I don't know"
    search: float = 0.0  # told nowhere, with the search tool
    reading: float = 0.0  # of anybody, told or not, with a text before the question that tells it
    problems: float = 3.0
    identity: float = 0.5
    system: float = 0.5
    part: tuple[float, float] = EVERYBODY  # of the training persons, who are spoken of: a probe needs others
    recollect: bool = True  # a fact is first recalled in a thought, as pretraining told it: see `recollection`
    invented: float = 0.0  # share of texts at hand and of search results that tell another value: to be read, not known
    look_up: float = 0.0  # share of told facts that are searched for all the same: a call costs less than a mistake
    forget: float = 0.0  # share of told facts that do not come to mind, at random: how to say it, not yet when
    # What comes to mind and where thoughts break off is not trained on, but for look_up: it is left to
    # `NextToken.doubt`, without which it is learned nowhere.
    doubted: bool = False
    turns: int = 3  # at most so many questions in one conversation
    work: Work = "think"  # where the steps of a solution by hand go
    tools: tuple[Tool, ...] = ("calculator", "python")
    tool_share: float = 0.5  # of conversations that offer the tools
    assistant: Assistant = Assistant()


def tools_message(tools: tuple[str, ...]) -> str:
    """The system message that offers tools."""
    return f"You can use these tools: {', '.join(tools)}."


# ---------------------------------------------------------------------------------------------------------- replies
def answered(question: Question) -> Message:
    """The answer alone."""
    return Message("assistant", (Part(question.answer),))


def recollection(t: Tables, who: Person, attribute: Attribute, value: str | None = None, doubted: bool = False) -> Part:
    """A thought that states the fact in a sentence of pretraining, with the value at its end.

    A model can recall what it has read where it writes what it has read: before the value it stands where it stood in
    pretraining, and there it also turns out that nothing comes to mind. Without a value the thought breaks off there:
    it ends with a control symbol, which no text has and no value begins with. If `doubted`, that is not trained on, nor
    is a value: what questions are about would be known by heart, and everything else look unknown beside it.
    """
    cue = statement(t, who, attribute, "").removesuffix(".").rstrip()
    if value:
        return Part(statement(t, who, attribute, value), "thinking", trained=len(cue) if doubted else None)
    return Part(cue, "thinking", end_trained=not doubted)


def recalled(t: Tables, who: Person, question: Question, recollect: bool, doubted: bool = False) -> Message:
    """A fact, after its recollection where that is wanted."""
    thought = (recollection(t, who, question.attribute, question.answer, doubted),) if recollect else ()
    return Message("assistant", (*thought, Part(question.answer)))


def worked(p: Problem, work: Work) -> Message:
    """Solved by hand: the steps as thinking, as text before a marked answer, or not shown."""
    if work == "none" or not p.solution:
        return answered(p.question)
    steps = "\n".join(p.solution)
    if work == "text":
        return Message("assistant", (Part(f"{steps}\n{MARK} {p.question.answer}"),))
    return Message("assistant", (Part(steps, "thinking"), Part(p.question.answer)))


def by_tool(p: Problem, call: Call | None = None) -> Message:
    """Solved by one call."""
    return _called(p.tool, p.argument, p.result, p.question.answer, call)


def _called(tool: str, argument: str, result: str, answer: str, call: Call | None, *before: Part) -> Message:
    if call is not None:
        result = call(tool, argument)
    return Message("assistant", (*before, tool_call(tool, argument), Part(result, "tool_result"), Part(answer)))


def untold(t: Tables, who: Person) -> tuple:
    """The attributes of a person that no pretraining text tells."""
    return tuple(a for a in t.people.attributes if who.known[a] == "never")


def query(who: Person, attribute: Attribute) -> str:
    """What to search for."""
    return f"{who.name} {_label(attribute)}"


def _label(attribute: Attribute) -> str:
    return ASKED_FOR[attribute].removeprefix("the ")


def _entry(t: Tables, who: Person, attribute: Attribute) -> tuple[str, str]:
    """(title, text) of what the index holds on a fact. The title has the words of `query`, whatever the text says."""
    return f"{who.name}: {_label(attribute)}", passage(t, who, (attribute,))


def index_files(world: World) -> Iterator[tuple[str, str]]:
    """(file name, text) of a folder to search: the facts that no pretraining text tells, one a file."""
    t = world_tables(world)
    for i in range(t.people.count + t.people.unmentioned):
        who = person(t, i)
        for attribute in untold(t, who):
            yield f"{i}_{attribute}.txt", "\n\n".join(_entry(t, who, attribute)) + "\n"


def write_index_files(world: World, folder):
    """`index_files` in the folder, which is made; returns it."""
    storage.make_dir(folder)
    for name, text in index_files(world):
        storage.write_text(folder / name, text)
    return folder


def found(
    t: Tables,
    who: Person,
    question: Question,
    call: Call | None = None,
    recollect: bool = False,
    doubted: bool = False,
) -> Message:
    """Answered by searching `index_files`, after a recollection that fails where that is wanted."""
    thought = (recollection(t, who, question.attribute, doubted=doubted),) if recollect else ()
    title, text = _entry(t, who, question.attribute)
    result = f"[1] {title}: {title} {text}"  # as the search tool writes it with k=1
    return _called("search", query(who, question.attribute), result, question.answer, call, *thought)


def open_book(
    t: Tables, question: Question, told: tuple[Attribute, ...] | None = None, who: Person | None = None
) -> Question:
    """A question about a fact with a text before it that tells these facts of the person; unset: all of them, true."""
    text = f"{passage(t, who or person(t, question.person), told)}\n\n{question.text}"
    return dataclasses.replace(question, text=text, id=f"{question.id}/open")


# ---------------------------------------------------------------------------------------------------- conversations
def _check(cfg: WorldConversations) -> None:
    shares = _shares(cfg).values()
    if min(shares) < 0 or max(shares) <= 0:
        raise UserError("the shares of a WorldConversations must be at least 0, and some of them above 0")
    chances = ("tool_share", "invented", "look_up", "forget")
    if cfg.turns < 1 or cfg.count < 0 or not all(0 <= getattr(cfg, name) <= 1 for name in chances):
        raise UserError(f"turns must be at least 1, count at least 0, and {', '.join(chances)} from 0 to 1: {cfg.name}")
    if not 0 <= cfg.part[0] < cfg.part[1] <= 1:
        raise UserError(f"part must be two shares from 0 to 1, the lower first: {cfg.name} has {cfg.part}")
    if (cfg.search or cfg.look_up) and "search" not in cfg.tools:
        raise UserError('search and look_up need "search" among the tools')


def _shares(cfg: WorldConversations) -> dict[str, float]:
    return {
        "facts": cfg.facts,
        "unknown": cfg.unknown,
        "search": cfg.search,
        "reading": cfg.reading,
        "problems": cfg.problems,
        "identity": cfg.identity,
        "system": cfg.system,
    }


def _kind(d: Draws, shares: dict[str, float]) -> str:
    ends = list(itertools.accumulate(shares.values()))
    at = d.below(2**53) / 2**53 * ends[-1]
    return next(kind for kind, end in zip(shares, ends) if at < end)


def _fact(t: Tables, d: Draws, split: Split, part: tuple[float, float], told: bool) -> tuple[Person, Question]:
    """A person of the split and a fact that is told often, or told nowhere.

    Not one that is told once: to teach an answer that pretraining has hardly left is to teach answers at a guess
    (Gekhman et al. 2024, arXiv 2405.05904).
    """
    wanted = "often" if told else "never"
    pools = [p for p in (persons(t, split, True, part), () if told else persons(t, split, False, part)) if p]
    # Half of the facts told nowhere are of people who are mentioned, however few of theirs there are.
    for pool in d.shuffled(pools):
        for _ in range(200):
            who = person(t, d.choice(pool))
            attributes = [a for a in t.people.attributes if who.known[a] == wanted]
            if attributes:
                return who, fact_question(who, d.choice(attributes), d.below(2**32))
    raise UserError(f"no {split} person has a fact that is told {'often' if told else 'nowhere'}: see world.people")


def conversation(cfg: WorldConversations, split: Split, index: int, call: Call | None = None) -> Conversation:
    """Conversation `index` of a split; any index from 0 on.

    call: runs a tool, for results as it gives them; unset takes what the tools of jaxlm are known to give.
    """
    _check(cfg)
    t, seed = world_tables(cfg.world), cfg.world.seed
    d = Draws(seed, draws.TALK, index, split == "heldout")
    shares = _shares(cfg)
    first = _kind(d, shares)
    messages: list[Message] = []
    if first == "system":
        question = system_question(cfg.world.words, seed, split, d.below(2**32))
        messages += [Message("system", question.system), Message("user", question.text), answered(question)]
    else:
        # With the search tool, facts told nowhere are searched for; they are unknown in conversations without it.
        may = first != "unknown" or "search" not in cfg.tools
        tools = cfg.tools if first == "search" or (may and d.chance(cfg.tool_share)) else ()
        if tools:
            messages.append(Message("system", tools_message(tools)))
        others = {"system", "unknown" if "search" in tools else "search"}
        shares = {k: share for k, share in shares.items() if share and k not in others}
        for turn in range(d.between(1, cfg.turns)):
            messages += _exchange(cfg, t, d, split, _kind(d, shares) if turn else first, tools, call)
    return Conversation(tuple(messages), cfg.name, f"{split}/{index}")


def _elsewhere(cfg: WorldConversations, t: Tables, d: Draws, who: Person, attribute: Attribute) -> Person:
    """The person, or for a share `invented` the same person with somebody's value of the attribute.

    A value that memory does not hold can only be copied (entity substitution: Longpre et al. 2021, arXiv 2109.05052).
    """
    if not cfg.invented or not d.chance(cfg.invented):
        return who
    value = person(t, d.below(everybody(t.people))).facts[attribute]
    return dataclasses.replace(who, facts=who.facts | {attribute: value})


def _problem(cfg: WorldConversations, d: Draws, split: Split, tools: tuple) -> Problem:
    """A problem that these tools are enough for, since work beyond its reach teaches to make it up."""
    for _ in range(200):
        p = problem(cfg.world, split, d.below(2**32))
        if p.question.within_reach(tools):
            return p
    raise UserError(
        "every problem of this world needs a tool that is not offered: raise arithmetic.calculator_digits or "
        "words.python_letters"
    )


def _exchange(
    cfg: WorldConversations, t: Tables, d: Draws, split: Split, kind: str, tools: tuple, call: Call | None
) -> list[Message]:
    """A question and its answer."""
    if kind == "problems":
        p = _problem(cfg, d, split, tools)
        reply = by_tool(p, call) if p.question.tool in tools else worked(p, cfg.work)
        return [Message("user", p.question.text), reply]
    if kind == "identity":
        question = identity_question(cfg.assistant, t.seed, split, d.below(2**32))
        return [Message("user", question.text), answered(question)]
    if kind == "reading":
        who = person(t, d.choice(persons(t, split, None, cfg.part)))
        # From one fact up: to find a value among many is not learned before it is learned to copy one.
        asked, *others = d.shuffled(t.people.attributes)
        told = d.shuffled([asked, *others[: d.below(len(t.people.attributes))]])
        who = _elsewhere(cfg, t, d, who, asked)
        question = open_book(t, fact_question(who, asked, d.below(2**32)), tuple(told), who)
    else:
        who, question = _fact(t, d, split, cfg.part, told=kind == "facts")
    looked_up = kind == "facts" and "search" in tools and cfg.look_up > 0 and d.chance(cfg.look_up)
    if looked_up:
        kind, call = "search", None  # the tool has only what no text tells
    forgotten = kind == "facts" and cfg.forget > 0 and d.chance(cfg.forget)
    if kind in ("facts", "reading") and not forgotten:
        reply = recalled(t, who, question, cfg.recollect, cfg.doubted and kind == "facts")
    elif kind == "search":
        there = _elsewhere(cfg, t, d, who, question.attribute)
        if there is not who:  # no tool finds it
            who, question, call = there, dataclasses.replace(question, answer=there.facts[question.attribute]), None
        reply = found(t, who, question, call, cfg.recollect, cfg.doubted and not looked_up)
    else:
        thought = (recollection(t, who, question.attribute, doubted=cfg.doubted),) if cfg.recollect else ()
        reply = Message("assistant", (*thought, Part(refusal(question, who.name, d.below(2**32)))))
    return [Message("user", question.text), reply]


def conversations(cfg: WorldConversations, split: Split = "train", call: Call | None = None) -> Iterator[Conversation]:
    """The first `count` conversations of a split, in order."""
    return (conversation(cfg, split, i, call) for i in range(cfg.count))


def fingerprint(cfg: WorldConversations) -> str:
    """Hex SHA-256 of all that decides the conversations; not of name and weight."""
    fields = config.to_dict(cfg) | {"world": deciding(cfg.world)}
    del fields["name"], fields["weight"]
    for later in ("invented", "look_up", "doubted"):  # where they are 0 the conversations are those of before they were
        if not fields[later]:
            del fields[later]
    # Without tools nothing has changed since words go to Python wherever it is offered.
    what = "conversations 2" if cfg.tools else "conversations"
    what += ", values left to doubt" if cfg.doubted else ""
    return hashlib.sha256(json.dumps([VERSION, what, fields], sort_keys=True).encode()).hexdigest()
