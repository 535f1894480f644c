"""Addition of two numbers, as text: `12+39=` is to be followed by `15`, the sum with its units first.

So each digit hangs on what stands to its left alone, the carry too, and a small model learns it from few examples (Lee
et al. 2023, arXiv 2307.03381).

The texts to read before the reinforcement learning give a wrong sum in a known share of cases: a policy that imitates
them is right no more often than they are, though it may know better.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.tasks.prompt import Prompt, Split
from jaxlm.data.world.draws import is_heldout

VERSION = 2  # of what is written
ATTEMPTS = 10_000


@dataclasses.dataclass(frozen=True)
class Addition:
    """A share `heldout` of all pairs is kept apart; `count` texts of the others are read, `corrupted` of them wrong."""

    name: str = "addition"
    weight: float = 1.0
    digits: int = 2
    count: int = 3000
    corrupted: float = 0.5
    heldout: float = 0.1
    seed: int = 0


def pair(cfg: Addition, split: Split, index: int) -> tuple[int, int]:
    """Problem `index` of a split; a small space repeats itself."""
    if not 1 <= cfg.digits <= 15 or not 0 < cfg.heldout < 1 or not 0 <= cfg.corrupted <= 1 or cfg.count < 1:
        raise UserError(f"addition: 1 to 15 digits, heldout between 0 and 1, corrupted from 0 to 1, count >= 1: {cfg}")
    rng = np.random.default_rng([cfg.seed, int(split == "heldout"), index])
    for _ in range(ATTEMPTS):
        a, b = rng.integers(10 ** (cfg.digits - 1), 10**cfg.digits, 2).tolist()
        if is_heldout(f"{a}+{b}", cfg.heldout) == (split == "heldout"):
            return a, b
    raise UserError(f"addition of {cfg.digits} digits has no {split} problem at heldout={cfg.heldout}")


def written(total: int) -> str:
    """A sum, units first."""
    return str(total)[::-1]


def text(cfg: Addition, index: int) -> str:
    """Text `index` of the training side, right or not."""
    a, b = pair(cfg, "train", index)
    rng = np.random.default_rng([cfg.seed, 2, index])
    low, high = 2 * 10 ** (cfg.digits - 1), 2 * (10**cfg.digits - 1)
    answer = a + b
    if rng.random() < cfg.corrupted:
        other = int(rng.integers(low, high))  # of all sums but the right one
        answer = other + (other >= answer)
    return f"{a}+{b}={written(answer)}"


# ------------------------------------------------------------------------------------------------------- as a task
def size(cfg: Addition, split: Split) -> None:
    return None


def prompt(cfg: Addition, split: Split, index: int, tools: tuple[str, ...] = ()) -> Prompt:
    a, b = pair(cfg, split, index)
    return Prompt(f"{a}+{b}=", {"answer": written(a + b)}, f"{split}/{index}")


def texts(cfg: Addition) -> Iterator[tuple[str, str]]:
    return ((f"train/{i}", text(cfg, i)) for i in range(cfg.count))
