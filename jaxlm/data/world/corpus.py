"""The world as a source of text: a config node, and its documents one by one.

A closed world, small or of any size, in which everything is known: what is true of each person, how often the text
says it, and the answer to every question. Document i is a function of (world, i), made without the others.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Literal

from jaxlm import config
from jaxlm.config import UserError
from jaxlm.data.world import draws
from jaxlm.data.world.arithmetic import Arithmetic, Problem, arithmetic
from jaxlm.data.world.biographies import biography, heldout_biography, told_twice
from jaxlm.data.world.draws import Draws, permuted
from jaxlm.data.world.graphs import Graphs, graph
from jaxlm.data.world.people import People, Split, Tables, person, tables
from jaxlm.data.world.questions import Question, fact_question, persons
from jaxlm.data.world.words import Words, word_problem

VERSION = 2  # of what a world writes; a golden in the tests changes with it
Task = Literal["arithmetic", "graph", "spell", "count", "reverse"]


@dataclasses.dataclass(frozen=True)
class World:
    """People and problems. Everything in it follows from the fields, `name` and `weight` aside.

    Its text: every biography of every mentioned person (or of those who are `told`), one of each passing person,
    `problems` worked problems and `questions` answered questions, all in one random order (ids `train/...`); then
    `validation` documents of held-out kinds (ids `heldout/...`). Split it with `ById`, or a fact told once may be told
    in validation alone. Curation leaves it as it is.
    """

    name: str = "world"
    weight: float = 1.0
    seed: int = 0
    people: People = People()
    told: Literal["all", "train", "none"] = "all"  # whose biographies: of all mentioned people, the training side, none
    problems: int = 0  # documents with a worked problem of the training side
    questions: int = 0  # documents with a question about a person of the training side, on facts told often
    validation: int = (
        200  # at most so many documents in held-out wordings, one a person; half problems if there are any
    )
    tasks: tuple[Task, ...] = ("arithmetic", "graph", "spell", "count", "reverse")  # problems take turns in them
    arithmetic: Arithmetic = Arithmetic()
    graphs: Graphs = Graphs()
    words: Words = Words()


@functools.lru_cache(maxsize=16)
def world_tables(world: World) -> Tables:
    """What the functions on people take. `UserError` says what is wrong with a definition."""
    if min(world.problems, world.questions, world.validation) < 0:
        raise UserError("world.problems, world.questions and world.validation must be at least 0")
    if not world.tasks:
        raise UserError("world.tasks is empty: name some of arithmetic, graph, spell, count, reverse")
    t = tables(world.people, world.seed)
    if world.questions and not persons(t, "train", True):
        raise UserError("world.questions needs people on the training side: raise people.train_fraction")
    return t


def problem(world: World, split: Split, index: int) -> Problem:
    """Problem `index` of a split, of the world's tasks in turn; any index from 0 on."""
    index, at = divmod(index, len(world.tasks))
    return task_problem(world, world.tasks[at], split, index)


def task_problem(world: World, task: Task, split: Split, index: int) -> Problem:
    """Problem `index` of one task and a split."""
    if task == "arithmetic":
        return arithmetic(world.arithmetic, world.seed, split, index)
    if task == "graph":
        return graph(world.graphs, world.seed, split, index)
    return word_problem(world.words, world.seed, task, split, index)


def written(question: Question, solution: tuple[str, ...] = ()) -> str:
    """A question and its answer as plain text, for pretraining and for prompts of base models."""
    return "\n".join([f"Question: {question.text}", *solution, f"Answer: {question.answer}"])


def _asked(t: Tables, index: int) -> Question:
    """A question on a fact that is told often."""
    d, train = Draws(t.seed, draws.DOCUMENTS, index), persons(t, "train", True)
    who = person(t, d.choice(train))
    return fact_question(who, d.choice([a for a in t.people.attributes if who.known[a] == "often"]), d.below(2**32))


def _told(world: World) -> Sequence[int]:
    """The mentioned people who have biographies."""
    if world.told == "none":
        return ()
    return range(world.people.count) if world.told == "all" else persons(world_tables(world), "train", True)


def size(world: World) -> tuple[int, int]:
    """(training documents, validation documents)"""
    people = world.people
    train = len(_told(world)) * people.augmentation.exposures + people.passing + world.problems + world.questions
    return train, min(world.validation, people.count * (2 if world.problems else 1))


def document(world: World, index: int) -> tuple[str, str]:
    """(id, text) of document `index`; those from `size(world)[0]` on validate."""
    return _document(world, world_tables(world), index, *size(world))


def _document(world: World, t: Tables, index: int, train: int, validation: int) -> tuple[str, str]:
    if index >= train + validation or index < 0:
        raise IndexError(f"document {index} of {train + validation}")
    if index >= train:
        return _validation(world, t, index - train)
    index = permuted(index, train, t.seed, draws.DOCUMENTS)
    exposures, told = t.people.augmentation.exposures, _told(world)
    if index < len(told) * exposures:
        at, exposure = divmod(index, exposures)
        return f"train/bio/{told[at]}/{exposure}", biography(t, person(t, told[at]), exposure)
    index -= len(told) * exposures
    if index < world.problems:
        p = problem(world, "train", index)
        return f"train/problem/{index}", written(p.question, p.solution)
    index -= world.problems
    if index < world.questions:
        return f"train/question/{index}", written(_asked(t, index))
    who = t.people.count + t.people.unmentioned + index - world.questions
    return f"train/bio/{who}/0", told_twice(t, person(t, who))


def _validation(world: World, t: Tables, index: int) -> tuple[str, str]:
    if world.problems and index % 2:
        p = problem(world, "heldout", index // 2)
        return f"heldout/problem/{index // 2}", written(p.question, p.solution)
    who = permuted(index // 2 if world.problems else index, t.people.count, t.seed, draws.VALIDATION)
    return f"heldout/bio/{who}", heldout_biography(t, person(t, who))


def texts(world: World) -> Iterator[tuple[str, str]]:
    """(id, text) of every document, training ones first."""
    t, (train, validation) = world_tables(world), size(world)
    for index in range(train + validation):
        yield _document(world, t, index, train, validation)


def deciding(world: World) -> dict:
    """The fields that decide its text: without name and weight."""
    later = {"told": "all"}  # a field that came after texts had been read, where it changes nothing of them
    return {k: v for k, v in config.to_dict(world).items() if k not in ("name", "weight") and later.get(k) != v}


def fingerprint(world: World) -> str:
    """Hex SHA-256 of all that decides the text; not of name and weight."""
    return hashlib.sha256(json.dumps([VERSION, deciding(world)], sort_keys=True).encode()).hexdigest()
