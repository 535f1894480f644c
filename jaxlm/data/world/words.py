"""Spelling words, counting their letters and turning them around: what models that read tokens are bad at.

Half of the words are English, half made up, graded by length. A word is on one side only, whatever is asked of it.
Short ones are worked by hand where Python is not offered. Where it is, all go to it: how long a word is, a reader of
tokens does not see well either.
"""

import dataclasses
import functools
from typing import Literal

from jaxlm.config import UserError
from jaxlm.data.world import banks, draws
from jaxlm.data.world.arithmetic import ATTEMPTS, Problem
from jaxlm.data.world.draws import Draws, is_heldout
from jaxlm.data.world.people import Split
from jaxlm.data.world.questions import Question
from jaxlm.data.world.sentences import side

WordTask = Literal["spell", "count", "reverse"]

# {w} the word, {c} a letter.
ASK: dict[WordTask, tuple[str, ...]] = {
    "spell": (
        'Spell the word "{w}" with hyphens between its letters.',
        'How do you spell "{w}"? Put a hyphen between letters.',
        'Write the letters of "{w}", joined by hyphens.',
        'Spell out "{w}", letter by letter, with hyphens.',
        'Please spell "{w}" with hyphens.',
        'Give the spelling of "{w}": letters with hyphens between them.',
        'Split "{w}" into letters joined by hyphens.',
        'Put hyphens between all letters of "{w}".',
        'Can you spell "{w}" for me, with hyphens?',
        'What are the letters of "{w}" in order? Use hyphens.',
        'Letter by letter, with hyphens: "{w}"',
        'I need "{w}" spelled out with hyphens.',
    ),
    "count": (
        'How many times does the letter "{c}" occur in "{w}"?',
        'How many "{c}" are in "{w}"?',
        'Count the letter "{c}" in "{w}".',
        'What is the number of "{c}" in the word "{w}"?',
        'In "{w}", how often does "{c}" appear?',
        'How often is "{c}" in "{w}"?',
        'Count how many "{c}" the word "{w}" has.',
        'Tell me how many times "{w}" contains "{c}".',
        'How many letters of "{w}" are "{c}"?',
        'The word "{w}" has how many "{c}"?',
        'Please count "{c}" in "{w}".',
        'How many times is "{c}" used to write "{w}"?',
    ),
    "reverse": (
        'Write "{w}" backwards.',
        'Reverse the word "{w}".',
        'What is "{w}" spelled backwards?',
        'Turn "{w}" around, letter by letter.',
        'Spell "{w}" in reverse.',
        'Give the letters of "{w}" in reverse order, as one word.',
        'How does "{w}" read from right to left?',
        'What do you get when you reverse "{w}"?',
        'Please reverse "{w}".',
        'Read "{w}" from the end to the beginning.',
        'Backwards, please: "{w}"',
        'If "{w}" is turned around, what does it say?',
    ),
}


@dataclasses.dataclass(frozen=True)
class Words:
    """Words of `min_letters` to `max_letters` letters, in turn."""

    min_letters: int = 3
    max_letters: int = 10
    python_letters: int = 6  # words with so many letters are not worked without Python
    heldout: float = 0.1  # share of all words


@functools.cache
def _english(letters: int) -> tuple[str, ...]:
    return tuple(w for w in banks.WORDS if len(w) == letters)


def _made_up(d: Draws, letters: int) -> str:
    out, vowel = "", bool(d.bits() & 1)
    while len(out) < letters:
        letter = d.choice(banks.VOWELS if vowel else banks.CONSONANTS)
        # Doubled now and then, so that there is something to count.
        out += letter * (2 if d.below(5) == 0 else 1)
        vowel = not vowel
    return out[:letters]


def word(cfg: Words, d: Draws, letters: int, heldout: bool) -> str:
    """A word of the side, by its own hash."""
    for _ in range(ATTEMPTS):
        bank = _english(letters)
        found = d.choice(bank) if bank and d.bits() & 1 else _made_up(d, letters)
        if is_heldout(f"word {found}", cfg.heldout) == heldout:
            return found
    raise UserError(f"words of {letters} letters have too few for both sides at heldout={cfg.heldout}: raise one")


def _letter(d: Draws, text: str) -> str:
    """A letter to count: first how often it is to occur, from the counts that the word offers, then which."""
    by_count: dict[int, list[str]] = {0: [c for c in banks.VOWELS + banks.CONSONANTS if c not in text]}
    for c in dict.fromkeys(text):
        by_count.setdefault(text.count(c), []).append(c)
    return d.choice(by_count[d.choice(sorted(by_count))])


def _solved(task: WordTask, text: str, letter: str) -> tuple[str, tuple[str, ...], str]:
    """(answer, lines of the solution, Python that prints the answer)"""
    spelled = "-".join(text)
    if task == "spell":
        return spelled, (), f'print("-".join("{text}"))'
    if task == "reverse":
        return text[::-1], (f"{text}: {spelled}", f"backwards: {spelled[::-1]}"), f'print("{text}"[::-1])'
    count, marks = 0, []
    for c in text:
        count += c == letter
        marks.append(f"{c} {count}" if c == letter else c)
    return str(count), (f"{text}: {', '.join(marks)}",), f'print("{text}".count("{letter}"))'


def word_problem(cfg: Words, seed: int, task: WordTask, split: Split, index: int) -> Problem:
    """Problem `index` of a task and split."""
    if not 2 <= cfg.min_letters <= cfg.max_letters:
        raise UserError(f"words: letters must be at least 2, and the min at most the max: {cfg}")
    if not 0 < cfg.heldout < 1:
        raise UserError(f"words.heldout must be between 0 and 1, got {cfg.heldout}")
    heldout = split == "heldout"
    d = Draws(seed, draws.WORDS, index, heldout, ("spell", "count", "reverse").index(task))
    letters = cfg.min_letters + index % (cfg.max_letters - cfg.min_letters + 1)
    text = word(cfg, d, letters, heldout)
    letter = _letter(d, text)
    answer, solution, program = _solved(task, text, letter)
    question = Question(
        text=d.choice(side(ASK[task], heldout)).format(w=text, c=letter),
        answer=answer,
        check="numeric" if task == "count" else "exact",
        kind=task,
        split=split,
        id=f"{task}/{split}/{index}",
        digits=letters,
        steps=len(solution),
        tool="python",
        by_hand=letters < cfg.python_letters,
    )
    return Problem(question, solution, "python", program, answer)
