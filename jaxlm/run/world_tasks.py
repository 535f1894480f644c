"""The world's evaluation: questions whose truth is known exactly, put to a base model or a chat model.

Suite `world` asks each kind of question once, with or without tools; suite `shots` asks with 0, 1, 2, 4 and 8 examples
before the question, whose solutions are shown (chain of thought) or not. What is asked is of the held-out side, whose
persons, problems and wordings no fine-tuning saw; examples are of the training side.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data.chat import Chat
from jaxlm.data.conversation import Message, Part
from jaxlm.data.preferences import Preferences
from jaxlm.data.prepare import Data
from jaxlm.data.prompting import Example, choose_shots, shown_reply
from jaxlm.data.world.answers import judge, refusal, verify
from jaxlm.data.world.corpus import World, task_problem, world_tables
from jaxlm.data.world.identity import identity_question, system_question
from jaxlm.data.world.people import Split, person
from jaxlm.data.world.questions import Question, fact_questions
from jaxlm.data.world.talk import Work, WorldConversations, by_tool, recalled, recollection, tools_message, worked
from jaxlm.data.world.talk import found as searched
from jaxlm.estimates import Estimate, proportion
from jaxlm.run import evals
from jaxlm.run.ask import Asked, Said, ancestry, is_chat, replies, too_long
from jaxlm.run.experiment import Experiment
from jaxlm.run.load import Run
from jaxlm.run.report import COLORS, new_figure, save_figure
from jaxlm.tools import Counters, Tool

VERSION = 1  # of the questions, prompts and verdicts
# Task -> how often the facts were told in pretraining, and whether their person is named there at all.
FACTS = {
    "fact_often": (("often",), True),
    "fact_once": (("once",), True),
    "fact_withheld": (("never",), True),
    "fact_stranger": (("never",), False),
}
SHOTS = (0, 1, 2, 4, 8)
ITEMS = {"world": 200, "shots": 50}  # of each task
POOL = 64  # examples that shots are chosen from
SUITES = tuple(ITEMS)
_STYLES = {"none": "direct", "think": "steps"}


# --------------------------------------------------------------------------------------------------------- the items
@dataclasses.dataclass(frozen=True)
class Item:
    """A question, how it would stand as an example, and what a chat model may well reply, however that is meant."""

    question: Question
    example: Example
    references: tuple[str, ...]


def find_world(experiment: Experiment) -> WorldConversations:
    """The world that a run, or else one that it came from, was trained on, with how it talks of it."""
    for e in ancestry(experiment):
        own = isinstance(e.data, Chat | Preferences) or (isinstance(e.data, Data) and e.data.path is None)
        for source in e.data.sources if own else ():
            if isinstance(source, WorldConversations):
                return source
            if isinstance(source, World):
                return WorldConversations(world=source)
    raise UserError(
        "neither this run nor one that it came from was trained on a World: there is no truth to ask for; "
        "name the workdir of one that was with --world=DIR"
    )


def task_names(talk: WorldConversations) -> tuple[str, ...]:
    """The tasks of the suite `world`; facts in four groups, by what pretraining told."""
    return (*FACTS, *talk.world.tasks, "identity", "system")


def _texts(*messages) -> tuple[str, ...]:
    """What the model itself has to write of each."""
    return tuple("\n".join(p.text for p in m.parts if p.kind != "tool_result") for m in messages)


def _facts(talk: WorldConversations, task: str, split: Split, generator: np.random.Generator, count: int):
    t, (known, mentioned) = world_tables(talk.world), FACTS[task]
    # Persons are random already; one of many facts each is worth more than all facts of few.
    several = list(itertools.islice(fact_questions(t, split, known, mentioned), 10 * count))
    for i in generator.permutation(len(several)):
        q = several[i]
        who = person(t, q.person)
        example = Example(q.text, q.answer, about=f"{q.person}/{q.attribute}")
        thought = (recollection(t, who, q.attribute),) if talk.recollect else ()
        said = [recalled(t, who, q, talk.recollect)]
        said += [Message("assistant", (*thought, Part(refusal(q, who.name, i)))) for i in range(30)]
        said += [searched(t, who, q, recollect=talk.recollect)] if q.known == "never" else []
        yield Item(q, example, _texts(*said))


def _problems(talk: WorldConversations, task: str, split: Split, start: int) -> Iterator[Item]:
    for i in itertools.count(start):
        p = task_problem(talk.world, task, split, i)
        example = Example(p.question.text, p.question.answer, p.solution, about=p.argument)
        yield Item(p.question, example, _texts(worked(p, "text"), by_tool(p)))


def _others(talk: WorldConversations, task: str, split: Split, start: int) -> Iterator[Item]:
    for i in itertools.count(start):
        if task == "identity":
            q = identity_question(talk.assistant, talk.world.seed, split, i)
        else:
            q = system_question(talk.world.words, talk.world.seed, split, i)
        yield Item(q, Example(q.text, q.answer), (q.answer, *q.also))


def items(talk: WorldConversations, task: str, count: int, split: Split = "heldout", seed: int = 0) -> tuple[Item, ...]:
    """Up to `count` different questions of a task (see `task_names`); fewer where the world has not so many."""
    if task in FACTS:
        every = _facts(talk, task, split, np.random.default_rng([seed, list(FACTS).index(task)]), count)
    else:
        make = _problems if task in talk.world.tasks else _others
        every = itertools.islice(make(talk, task, split, seed * 1_000_000), 4 * count)
    different = {(i.question.system, i.question.text): i for i in every}
    return tuple(different.values())[:count]


def budget(run: Run, asked: Sequence[Item], work: Work = "think", chat: bool | None = None) -> int:
    """Tokens for a reply to any of these questions: a quarter more than the longest good one takes.

    A base model writes the answer, after its steps unless `work` is "none"; a chat model what it was taught.
    """
    if is_chat(run.experiment) if chat is None else chat:
        texts = {text for item in asked for text in item.references}
    else:
        texts = {_texts(shown_reply(i.example, "text" if work != "none" else "none"))[0] for i in asked}
    return 8 + 5 * max(map(len, run.tokenizer.encode_batch(list(texts))), default=0) // 4


# ------------------------------------------------------------------------------------------------------------ asking
def needed(question: Question, tools: Iterable[str]) -> str | None:
    """The tool without which no right answer is expected, if it is one of these."""
    wanted = "search" if question.kind == "fact" and question.known == "never" else question.tool
    return wanted if wanted in tools else None


def _record(question: Question, asked: Asked, said: Said, tools: Iterable[str]) -> dict:
    verdict = judge(question, said.message.text)
    record = dataclasses.asdict(question) | {"shots": len(asked.shots), "work": asked.work}
    if said.skipped is not None:
        return record | {"skipped": said.skipped}
    c = said.completion
    return record | {
        "reply": said.message.text,
        "parts": [[p.kind, p.text] for p in said.message.parts],
        "outcome": verdict.outcome,
        "hedged": verdict.hedged,
        "finish_reason": c.finish_reason,
        "tokens": len(c.ids),
        "logprob": float(sum(c.logprobs)),
        "needed": needed(question, tools),
        "called": [p.text.partition("\n")[0] for p in said.message.parts if p.kind == "tool_call"],
    }


def ask(
    run: Run,
    questions: Sequence[Question],
    *,
    shots: Sequence[Sequence[Example]] | None = None,
    work: Work | Sequence[Work] = "think",
    max_tokens: int | Sequence[int] | None = None,
    system: str | None = None,
    chat: bool | None = None,
    tools: Mapping[str, Tool] | None = None,
    counters: Counters | None = None,
) -> list[dict]:
    """One record per question: its fields, the reply and the verdict on it ("outcome", "hedged"), or "skipped".

    Args:
      shots: examples before each question; none when not given.
      work: where examples show their steps; a base model's prompt leaves room for steps unless it is "none".
      max_tokens: of each reply; half of the trained context when not given.
      system: for questions without a system message of their own.
      chat, tools, counters: see `jaxlm.run.ask.replies`. With tools, "needed" names the one that the question takes,
        and "called" those that the model called.
    """
    n = len(questions)
    works = [work] * n if isinstance(work, str) else work
    if max_tokens is None:
        max_tokens = run.experiment.data.context // 2
    limits = [max_tokens] * n if isinstance(max_tokens, int) else max_tokens
    shots = [()] * n if shots is None else shots
    asked = [
        Asked(q.text, limit, q.system if q.system is not None else system, tuple(s), w)
        for q, limit, s, w in zip(questions, limits, shots, works, strict=True)
    ]
    said = replies(run, asked, chat=chat, tools=tools, counters=counters)
    return [_record(q, a, s, tools or ()) for q, a, s in zip(questions, asked, said, strict=True)]


# ----------------------------------------------------------------------------------------------------------- metrics
def _shares(records: Sequence[dict], chance: float | None = None) -> dict[str, Estimate]:
    """Accuracy, and for facts how often the model was wrong and how often it said that it does not know."""
    outcomes = [r["outcome"] for r in records]
    out = {"accuracy": proportion([o == "right" for o in outcomes], chance)}
    if records[0]["kind"] == "fact":
        out |= {name: proportion([o == name for o in outcomes]) for name in ("wrong", "abstained")}
    return out


def metrics(records: Sequence[dict], chance: float | None = None) -> dict[str, Estimate]:
    """Of one task's records, those skipped left out; of arithmetic also by digits and steps."""
    if not (records := [r for r in records if "outcome" in r]):
        return {}
    out = _shares(records, chance)
    if records[0]["kind"] == "arithmetic":
        cells = collections.defaultdict(list)
        for r in records:
            cells[f"{r['digits']} digits, {r['steps']} steps"].append(r["outcome"] == "right")
        out |= {name: proportion(right) for name, right in sorted(cells.items())}
    return out


def tool_metrics(records: Sequence[dict]) -> dict[str, Estimate]:
    """Whether tools were called where one is needed, to what success, and where none is."""
    records = [r for r in records if "outcome" in r]
    need, rest = [r for r in records if r["needed"]], [r for r in records if not r["needed"]]
    out = {}
    if need:
        out["needed/called"] = proportion([r["needed"] in r["called"] for r in need])
        out["needed/accuracy"] = proportion([r["outcome"] == "right" for r in need])
    if rest:
        out["not needed/called"] = proportion([bool(r["called"]) for r in rest])
        out["not needed/accuracy"] = proportion([r["outcome"] == "right" for r in rest])
    return out


def _chance(asked: Sequence[Item], pool: Sequence[Item]) -> float | None:
    """What the commonest answer of the training side would score."""
    if not pool:
        return None
    (constant, _), *_ = collections.Counter(i.question.answer for i in pool).most_common(1)
    return float(np.mean([verify(i.question, constant) for i in asked]))


# ------------------------------------------------------------------------------------------------------------ suites
def _world(run: Run, talk: WorldConversations, chat: bool, seed: int, limit: int, tools, counters):
    by_task = {task: found for task in task_names(talk) if (found := items(talk, task, limit, seed=seed))}
    questions, works, limits = [], [], []
    for found in by_task.values():
        # A base model has room for steps where there are any to write.
        work = "think" if any(i.example.solution for i in found) else "none"
        questions += [i.question for i in found]
        works += [work] * len(found)
        limits += [budget(run, found, work, chat)] * len(found)
    told = {"chat": chat, "tools": tools, "counters": counters}
    records = iter(ask(run, questions, work=works, max_tokens=limits, **told))
    for task, found in by_task.items():
        mine = list(itertools.islice(records, len(found)))
        yield task, mine, metrics(mine, _chance(found, items(talk, task, POOL, "train")))


def _cells(
    run: Run, task: str, asked: Sequence[Item], pool: Sequence[Example], system: str | None, chat: bool, seed: int
) -> list[tuple]:
    """What the suite `shots` asks of a task: (task, work, count, tokens of a reply, questions, shots of each)."""
    cells = []
    for work in ("none", "think") if any(e.solution for e in pool) else ("none",):
        tokens = budget(run, asked, work, chat)
        for count in SHOTS:
            shots = [choose_shots(pool, count, i.example, seed) for i in asked]
            tried = [Asked(i.question.text, tokens, system, s, work) for i, s in zip(asked, shots)]
            # All questions or none: those that still fit would be the easier ones.
            reason = next((why for a in tried if (why := too_long(run, a, chat))), None)
            if not asked or min(map(len, shots)) < count or reason:
                reason = reason or "too few examples or questions"
                logging.warning("%s, %s: asked with less than %d shots only: %s", task, _STYLES[work], count, reason)
                break
            cells.append((task, work, count, tokens, asked, shots))
    return cells


def _shots(run: Run, talk: WorldConversations, chat: bool, seed: int, limit: int, tools, counters):
    cells, system = [], tools_message(tuple(tools)) if tools else None  # takes room as well
    for task in ("fact_often", *talk.world.tasks):
        asked, pool = items(talk, task, limit, seed=seed), [i.example for i in items(talk, task, POOL, "train")]
        cells += _cells(run, task, asked, pool, system, chat, seed)
    if not cells:
        raise UserError(f"no question of the world fits data.context {run.experiment.data.context}, even without shots")
    flat = [(i.question, s, work, tokens) for _, work, _, tokens, asked, shots in cells for i, s in zip(asked, shots)]
    questions, shots, works, limits = zip(*flat)
    told = {"chat": chat, "tools": tools, "counters": counters}
    records = iter(ask(run, questions, shots=shots, work=works, max_tokens=limits, **told))
    for task, group in itertools.groupby(cells, key=lambda cell: cell[0]):
        mine, found = [], {}
        for _, work, count, _, asked, _ in group:
            new = list(itertools.islice(records, len(asked)))
            mine += new
            found[f"{_STYLES[work]}/{count} shots"] = proportion([r["outcome"] == "right" for r in new])
        yield task, mine, found


_RUN: dict[str, Callable] = {"world": _world, "shots": _shots}


def run_suite(
    run: Run,
    suite: str,
    talk: WorldConversations | None = None,
    out=None,
    seed: int = 0,
    limit: int | None = None,
    tools: Mapping[str, Tool] | None = None,
    chat: bool | None = None,
) -> dict:
    """`evals.run_suite` for `world` and `shots`: the same results and files, and `shots.png` under `out`.

    talk: the world and how a model was taught to talk of it; unset, the run's own (`find_world`).
    chat: see `jaxlm.run.ask.replies`. With tools the results have a task `tools`, and counts of their calls.
    """
    if suite not in _RUN:
        raise UserError(f"unknown suite {suite!r}; the world's are {', '.join(_RUN)}")
    talk = find_world(run.experiment) if talk is None else talk
    chat = is_chat(run.experiment) if chat is None else chat
    limit, counters = ITEMS[suite] if limit is None else limit, Counters()
    results = {"schema_version": evals.SCHEMA_VERSION, "suite": suite, "step": run.step, "seed": seed, "tasks": {}}
    results["form"] = "chat" if chat else "text"
    every = []
    for task, records, found in _RUN[suite](run, talk, chat, seed, limit, tools, counters):
        every += records
        if missing := [r for r in records if "skipped" in r]:
            logging.warning("%s: %d of %d items left out: %s", task, len(missing), len(records), missing[0]["skipped"])
        evals.add_task(results, task, VERSION, records, found, out)
    if tools:
        evals.add_task(results, "tools", VERSION, [], tool_metrics(every), None)
        results["tools"] = counters.metrics()
    if out is not None:
        storage.write_json(storage.path(out) / "results.json", results)
        if suite == "shots":
            try:
                plot_shots({run.workdir: results}, storage.path(out) / "shots.png")
            except UserError as error:  # without matplotlib there are results without a picture
                logging.warning("no shots.png: %s", error)
    return results


def plot_shots(results: Mapping[str, dict], path) -> None:
    """Draws accuracy over the number of shots, a panel a task, to the PNG `path`; bands are 95% intervals.

    results: label -> what the suite `shots` gave for a run. A line is a run, dashed where solutions are shown.
    """
    tasks = list(dict.fromkeys(task for r in results.values() for task in r["tasks"] if task != "tools"))
    figure = new_figure(3.1 * len(tasks), 3.2)
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks):
        for color, (label, result) in zip(itertools.cycle(COLORS), results.items()):
            lines = collections.defaultdict(list)
            for name, e in result["tasks"].get(task, {"metrics": {}})["metrics"].items():
                kind, _, count = name.removesuffix(" shots").partition("/")
                lines[kind].append((int(count), e["value"], e["low"], e["high"]))
            for kind, points in lines.items():
                x, value, low, high = zip(*sorted(points))
                style = {"color": color, "linestyle": "--" if kind == "steps" else "-", "marker": "."}
                axes.plot(x, value, label=f"{label.rpartition('/')[2]}, {kind}", **style)
                axes.fill_between(x, low, high, color=color, alpha=0.1, linewidth=0)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("shots")
        axes.set_xticks(SHOTS)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(-0.02, 1.02)
    panels[0].set_ylabel("accuracy")
    panels[-1].legend(frameon=False, fontsize=8)
    save_figure(figure, path)
