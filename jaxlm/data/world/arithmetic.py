"""Multi-step arithmetic with worked solutions: trees of +, -, * and exact /, graded by digits and steps.

No value on the way is negative or a fraction. The cells of (digits, steps) come in turn, so a run of problems holds
each equally often. With one step the operations are equally likely; with more, division, which must come out even, is
rarer.
"""

import dataclasses
from typing import Literal

from jaxlm.config import UserError
from jaxlm.data.world import draws
from jaxlm.data.world.draws import Draws, is_heldout
from jaxlm.data.world.people import Split
from jaxlm.data.world.questions import Question
from jaxlm.data.world.sentences import side

Operation = Literal["+", "-", "*", "/"]
ATTEMPTS = 2000

# {x} the expression.
ASK = (
    "What is {x}?",
    "Calculate {x}.",
    "Work out {x}.",
    "How much is {x}?",
    "Compute {x}.",
    "{x} = ?",
    "Please calculate {x}.",
    "Evaluate {x}.",
    "What does {x} equal?",
    "Find the value of {x}.",
    "Solve: {x}",
    "Can you tell me what {x} is?",
    "I need the result of {x}.",
    "What do you get for {x}?",
    "Give the value of {x}.",
    "What is the result of {x}?",
)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Numbers of `min_digits` to `max_digits` digits, `min_steps` to `max_steps` operations."""

    min_digits: int = 1
    max_digits: int = 4
    min_steps: int = 1
    max_steps: int = 3
    operations: tuple[Operation, ...] = ("+", "-", "*", "/")
    calculator_digits: int = 3  # numbers with so many digits are worked with the calculator
    heldout: float = 0.1  # share of all problems, by their expression


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A question and how it is solved: by hand, a line for each step, and by one call of a tool."""

    question: Question
    solution: tuple[str, ...]
    tool: str
    argument: str
    result: str


_RANK = {"+": 1, "-": 1, "*": 2, "/": 2}


def _number(d: Draws, digits: int) -> int:
    return d.between(1 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def _tree(d: Draws, cfg: Arithmetic, digits: int, steps: int):
    """(value, tree): a number, or (operation, left, right, value)."""
    if steps == 0:
        value = _number(d, digits)
        return value, value
    operation = d.choice(cfg.operations)
    if operation == "/":
        # The dividend is a number, so that the division comes out even; the rest goes into the divisor's place.
        divisor = d.between(2, 9)
        low, high = -(-(10 ** (digits - 1)) // divisor), (10**digits - 1) // divisor
        quotient = d.between(max(low, 1), max(high, 1))
        value, tree = quotient, ("/", quotient * divisor, divisor, quotient)
        if steps == 1:
            return value, tree
        left = (value, tree)
        right = _tree(d, cfg, digits, steps - 2)
        operation = d.choice([o for o in cfg.operations if o != "/"])
    else:
        before = d.below(steps)
        left, right = _tree(d, cfg, digits, before), _tree(d, cfg, digits, steps - 1 - before)
        if d.bits() & 1:
            left, right = right, left
    if operation == "-" and left[0] < right[0]:
        left, right = right, left
    value = {"+": left[0] + right[0], "-": left[0] - right[0], "*": left[0] * right[0]}[operation]
    return value, (operation, left[1], right[1], value)


def _text(tree) -> str:
    """With the parentheses that are needed and no others."""
    if isinstance(tree, int):
        return str(tree)
    operation, left, right, _ = tree
    a, b = _text(left), _text(right)
    if not isinstance(left, int) and _RANK[left[0]] < _RANK[operation]:
        a = f"({a})"
    if not isinstance(right, int) and _RANK[right[0]] <= _RANK[operation]:
        b = f"({b})"
    return f"{a} {operation} {b}"


def _content(tree) -> str:
    """What makes it the same problem: 3 + 4 is 4 + 3."""
    if isinstance(tree, int):
        return str(tree)
    operation, *sides = tree[:3]
    contents = [_content(x) for x in sides]
    return f"({operation.join(sorted(contents) if operation in '+*' else contents)})"


def _solution(tree) -> list[str]:
    """Operations in the order in which they are worked, each with its result."""
    if isinstance(tree, int):
        return []
    operation, left, right, value = tree
    a, b = (x if isinstance(x, int) else x[3] for x in (left, right))
    return [*_solution(left), *_solution(right), f"{a} {operation} {b} = {value}"]


def _check(cfg: Arithmetic) -> None:
    if not 1 <= cfg.min_digits <= cfg.max_digits or not 1 <= cfg.min_steps <= cfg.max_steps:
        raise UserError(f"arithmetic: digits and steps must be at least 1, and each min at most its max: {cfg}")
    if not set(cfg.operations) - ({"/"} if cfg.max_steps > 1 else set()):
        raise UserError(f"arithmetic.operations={cfg.operations}: name some of + - * /, with several steps not / alone")
    if not 0 < cfg.heldout < 1:
        raise UserError(f"arithmetic.heldout must be between 0 and 1, got {cfg.heldout}")


def arithmetic(cfg: Arithmetic, seed: int, split: Split, index: int) -> Problem:
    """Problem `index` of a split. The same expression is never on both sides; a small space repeats itself."""
    _check(cfg)
    heldout = split == "heldout"
    d = Draws(seed, draws.ARITHMETIC, index, heldout)
    cell = index % ((cfg.max_digits - cfg.min_digits + 1) * (cfg.max_steps - cfg.min_steps + 1))
    more_steps, more_digits = divmod(cell, cfg.max_digits - cfg.min_digits + 1)
    digits, steps = cfg.min_digits + more_digits, cfg.min_steps + more_steps
    for _ in range(ATTEMPTS):
        value, tree = _tree(d, cfg, digits, steps)
        if is_heldout(f"arithmetic {_content(tree)}", cfg.heldout) == heldout:
            break
    else:
        raise UserError(
            f"arithmetic with {digits} digits and {steps} steps has too few problems for a {split} side at "
            f"heldout={cfg.heldout}: raise min_digits, min_steps or heldout"
        )
    expression = _text(tree)
    question = Question(
        text=d.choice(side(ASK, heldout)).format(x=expression),
        answer=str(value),
        check="numeric",
        kind="arithmetic",
        split=split,
        id=f"arithmetic/{split}/{index}",
        digits=digits,
        steps=steps,
        tool="calculator" if digits >= cfg.calculator_digits else None,
        by_hand=digits < cfg.calculator_digits,
    )
    return Problem(question, tuple(_solution(tree)), "calculator", expression, str(value))
