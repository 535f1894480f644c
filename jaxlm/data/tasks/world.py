"""The world's problems and facts as conversations to answer in, verified by the world itself."""

import dataclasses

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.tasks.prompt import Prompt, Split
from jaxlm.data.world.corpus import World, problem, world_tables
from jaxlm.data.world.questions import Question, drawn_fact

ATTEMPTS = 200


@dataclasses.dataclass(frozen=True)
class WorldTask:
    """Problems of `world.tasks` in turn and, for these shares of the prompts, facts.

    A problem that needs a tool is asked only where that tool is offered.
    """

    world: World = World()
    facts: float = 0.0  # told often
    untold: float = 0.0  # told nowhere: to be found with the tool search


def question(cfg: WorldTask, split: Split, index: int, tools: tuple[str, ...]) -> Question:
    rng = np.random.default_rng([cfg.world.seed, int(split == "heldout"), index])
    if (kind := rng.random()) < cfg.facts + cfg.untold:
        return drawn_fact(world_tables(cfg.world), split, kind < cfg.facts, rng)
    for attempt in range(ATTEMPTS):
        found = problem(cfg.world, split, index if attempt == 0 else int(rng.integers(2**32))).question
        if found.within_reach(tools):
            return found
    raise UserError("every problem of this world needs a tool: offer it by data.tools, or ask for easier problems")


# ------------------------------------------------------------------------------------------------------- as a task
def size(cfg: WorldTask, split: Split) -> None:
    return None


def prompt(cfg: WorldTask, split: Split, index: int, tools: tuple[str, ...] = ()) -> Prompt:
    if min(cfg.facts, cfg.untold) < 0 or cfg.facts + cfg.untold > 1 or (cfg.untold and "search" not in tools):
        raise UserError("data.task: facts and untold are shares, together at most 1, and untold needs the tool search")
    q = question(cfg, split, index, tools)
    return Prompt(Conversation((Message("user", q.text),)), {"question": q, "answer": q.answer}, q.id)
