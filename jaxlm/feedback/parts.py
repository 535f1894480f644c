"""A reward as a definition: parts by name, each with its weight, that add up to one reward function.

What is no config node of its own is a `Function`: any importable `(prompts, completions, metadata) -> values`.
"""

import dataclasses
import functools
import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.feedback import shaping
from jaxlm.feedback.scoring import Reward, each, in_place, weighted_sum
from jaxlm.rl.rewards import soft_length_penalty


@dataclasses.dataclass(frozen=True)
class Correct:
    """The task's own verdict: 1 for a right answer, 0 for a wrong one, or between."""

    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Format:
    """1 for a message that is well formed: thinking, then an answer, with tool calls between where there are tools."""

    weight: float = 0.1


@dataclasses.dataclass(frozen=True)
class Steps:
    """The share of the thinking's equations that are right, new and start from the question's numbers."""

    weight: float = 0.1


@dataclasses.dataclass(frozen=True)
class Shorter:
    """From 1 at no tokens to 0 at `longest`."""

    weight: float = 0.1
    longest: int = 256


@dataclasses.dataclass(frozen=True)
class SoftLength:
    """0 up to limit - buffer tokens, then down to -1 at `limit` (DAPO's soft overlong punishment)."""

    weight: float = 1.0
    limit: int = 256
    buffer: int = 64


@dataclasses.dataclass(frozen=True)
class CosineLength:
    """Correctness that pays for short right answers and for long wrong ones; use it in the place of `Correct`."""

    weight: float = 1.0
    longest: int = 256
    right: tuple[float, float] = (2.0, 1.0)  # at no tokens, and at `longest`
    wrong: tuple[float, float] = (-10.0, 0.0)
    exceeded: float = -10.0


@dataclasses.dataclass(frozen=True)
class Learned:
    """A reward model's number, the model being that of another run."""

    run: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Function:
    """Any function of a module that can be imported: path "package.module:function". Its values are journaled."""

    path: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Chance:
    """0 or 1 by the toss of a coin that knows nothing of the completion: the control of every learning curve."""

    weight: float = 1.0
    seed: int = 0


Part = Correct | Format | Steps | Shorter | SoftLength | CosineLength | Learned | Function | Chance
ADDRESS = "address"  # metadata of a sample: what tells it from all others of a run


def name_of(part: Part) -> str:
    """What logs and errors call it."""
    words = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(part).__name__)
    return words.strip("_")


def names(parts: Sequence[Part]) -> list[str]:
    """What each is called among the others: with its place where two are of one kind."""
    taken = [name_of(p) for p in parts]
    return [name if taken.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(taken)]


def chance(*seed: int) -> Reward:
    """By the sample's address alone: asked again, it says the same."""

    def toss(prompt, completion, metadata) -> float:
        digest = hashlib.blake2b(repr((seed, metadata[ADDRESS])).encode(), digest_size=1).digest()
        return float(digest[0] & 1)

    return each(toss, "chance")


def _function(path: str) -> Reward:
    module, colon, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError) as e:
        raise UserError(f"reward function {path!r}: {e}") from e
    if not callable(found):
        raise UserError(f"reward function {path!r}: write it package.module:function")
    return found


def asked_text(prompt, metadata: dict | None = None) -> str:
    """The text whose numbers a solution may use."""
    return prompt.messages[-1].text if isinstance(prompt, Conversation) else prompt


def _soft(length: int, limit: int, buffer: int) -> float:
    return float(soft_length_penalty(length, limit, buffer))


def _one(
    part: Part, task: Reward, tokenizer: Tokenizer, tools: bool, learned: Mapping[str, Reward], journaled, seed: int
) -> Reward:
    match part:
        case Correct():
            return task
        case Format():
            return shaping.format_reward(tools, tokenizer)
        case Steps():
            return shaping.process_reward(asked_text)
        case Shorter():
            return shaping.length_reward(functools.partial(shaping.linear, longest=part.longest))
        case SoftLength():
            return shaping.length_reward(functools.partial(_soft, limit=part.limit, buffer=part.buffer))
        case CosineLength():
            return shaping.cosine_length_reward(task, part.longest, part.right, part.wrong, part.exceeded)
        case Learned():
            return learned[part.run]
        case Function():
            return journaled(part.path, _function(part.path))
        case Chance():
            return chance(part.seed, seed)


def reward(
    parts: Sequence[Part],
    task: Reward,
    tokenizer: Tokenizer,
    tools: bool = False,
    learned: Mapping[str, Reward] | None = None,
    journaled: Callable[[str, Reward], Reward] = lambda name, reward: reward,
    seed: int = 0,
    log: Callable[[dict], None] | None = None,
    ask: Callable[..., list[float | None]] = in_place,
) -> Reward:
    """The weighted sum of the parts.

    task: the task's own verdict. learned: reward models by their run. journaled: (name, function) -> the function as it
    is to be called where its values cannot be had again. seed: the run's, of which a coin's tosses are. log, ask: as
    in `weighted_sum`.
    """
    if not parts:
        raise UserError("objective.reward is empty: name a part, such as Correct")
    named = {
        name: (part.weight, _one(part, task, tokenizer, tools, learned or {}, journaled, seed))
        for name, part in zip(names(parts), parts)
    }
    return weighted_sum(named, log, ask=ask)
