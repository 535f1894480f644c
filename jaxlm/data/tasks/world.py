"""The world's problems and facts as conversations to answer in, verified by the world itself."""

import dataclasses

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.tasks.prompt import Prompt, Split
from jaxlm.data.world.corpus import World, problem, world_tables
from jaxlm.data.world.people import person
from jaxlm.data.world.questions import Question, fact_question, persons

ATTEMPTS = 200


@dataclasses.dataclass(frozen=True)
class WorldTask:
    """Problems of `world.tasks` in turn and, for a share `facts` of the prompts, facts that are told often.

    A problem that needs a tool is asked only where that tool is offered.
    """

    world: World = World()
    facts: float = 0.0


def _fact(cfg: WorldTask, split: Split, rng: np.random.Generator) -> Question:
    t = world_tables(cfg.world)
    pool = persons(t, split, True)
    for _ in range(ATTEMPTS if pool else 0):
        who = person(t, pool[int(rng.integers(len(pool)))])
        if known := [a for a in t.people.attributes if who.known[a] == "often"]:
            return fact_question(who, known[int(rng.integers(len(known)))], int(rng.integers(2**32)))
    raise UserError(f"no {split} person has a fact that is told often: see world.people")


def question(cfg: WorldTask, split: Split, index: int, tools: tuple[str, ...]) -> Question:
    rng = np.random.default_rng([cfg.world.seed, int(split == "heldout"), index])
    if rng.random() < cfg.facts:
        return _fact(cfg, split, rng)
    for attempt in range(ATTEMPTS):
        found = problem(cfg.world, split, index if attempt == 0 else int(rng.integers(2**32))).question
        if found.tool is None or found.tool in tools:
            return found
    raise UserError("every problem of this world needs a tool: offer it by data.tools, or ask for easier problems")


# ------------------------------------------------------------------------------------------------------- as a task
def size(cfg: WorldTask, split: Split) -> None:
    return None


def prompt(cfg: WorldTask, split: Split, index: int, tools: tuple[str, ...] = ()) -> Prompt:
    q = question(cfg, split, index, tools)
    return Prompt(Conversation((Message("user", q.text),)), {"question": q, "answer": q.answer}, q.id)
