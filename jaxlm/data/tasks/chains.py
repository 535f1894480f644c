"""Strings of letters from one random chain: all are as good as each other, until somebody prefers some of them.

Each of `letters` letters may be followed by `ways` others, with probabilities that are drawn once and kept. A text is
`length` letters long, a prompt its first `given` ones, and whoever has learned the chain goes on in very many ways
(about 1.7 nats a letter as it ships). The score of a text is whether it is one at all: the share of its letters after
the prompt that may follow the one before, of `length`, or of as many as there are where it is longer.
"""

import bisect
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.tasks.prompt import Prompt, Split
from jaxlm.data.world.draws import is_heldout

VERSION = 1  # of what is written
ATTEMPTS = 10_000


@dataclasses.dataclass(frozen=True)
class Chains:
    """A share `heldout` of all prompts is kept apart; `count` texts are read."""

    name: str = "chains"
    weight: float = 1.0
    letters: int = 26
    ways: int = 8
    length: int = 24
    given: int = 4
    count: int = 10_000
    heldout: float = 0.1
    seed: int = 0


@functools.lru_cache(maxsize=16)
def chain(cfg: Chains) -> np.ndarray:
    """Float64 [letters, letters]: the probability of the column's letter after the row's."""
    if not (2 <= cfg.letters <= 26 and 1 <= cfg.ways <= cfg.letters and 1 <= cfg.given < cfg.length and cfg.count >= 1):
        raise UserError(f"chains: 2 to 26 letters, at most as many ways, 1 <= given < length, count >= 1: {cfg}")
    if not 0 < cfg.heldout < 1:
        raise UserError(f"chains: heldout must be between 0 and 1, got {cfg.heldout}")
    rng = np.random.default_rng([cfg.seed % 2**64, 0])
    table = np.zeros((cfg.letters, cfg.letters))
    for row in table:
        row[rng.choice(cfg.letters, cfg.ways, replace=False)] = rng.dirichlet(np.ones(cfg.ways))
    return table


@functools.lru_cache(maxsize=16)
def _sums(cfg: Chains) -> list[list[float]]:
    return np.cumsum(chain(cfg), axis=1).tolist()


def _drawn(cfg: Chains, length: int, *place: int) -> str:
    table, rng = _sums(cfg), np.random.default_rng([cfg.seed % 2**64, *place])
    at = [int(rng.integers(cfg.letters))]
    for u in rng.random(length - 1).tolist():
        row = table[at[-1]]
        at.append(bisect.bisect_right(row, u * row[-1]))
    return "".join(chr(ord("a") + i) for i in at)


def text(cfg: Chains, index: int) -> str:
    """Text `index` of those that are read."""
    return _drawn(cfg, cfg.length, 1, index)


def follows(cfg: Chains, text: str) -> float:
    """The score of a text with its prompt, from 0 to 1."""
    allowed, at = chain(cfg) > 0, [ord(c) - ord("a") for c in text]
    inside = [0 <= i < cfg.letters for i in at]
    good = sum(
        inside[i - 1] and inside[i] and bool(allowed[at[i - 1], at[i]])
        for i in range(cfg.given, min(len(at), cfg.length))
    )
    return good / (max(len(at), cfg.length) - cfg.given)


# ------------------------------------------------------------------------------------------------------- as a task
def size(cfg: Chains, split: Split) -> None:
    return None


def prompt(cfg: Chains, split: Split, index: int, tools: tuple[str, ...] = ()) -> Prompt:
    chain(cfg)
    for attempt in range(ATTEMPTS):
        asked = _drawn(cfg, cfg.given, 2 + (split == "heldout"), index, attempt)
        if is_heldout(asked, cfg.heldout) == (split == "heldout"):
            return Prompt(asked, {}, f"{split}/{index}")
    raise UserError(f"chains: there is no {split} prompt of {cfg.given} letters at heldout={cfg.heldout}")


def texts(cfg: Chains) -> Iterator[tuple[str, str]]:
    return ((f"train/{i}", text(cfg, i)) for i in range(cfg.count))
