"""Prompts that show worked examples before the question: as text for base models, as earlier turns for chat models.

With its steps an example shows how to get to an answer (chain of thought, Wei et al. 2022, arXiv 2201.11903), without
them only what an answer looks like (few-shot prompting, Brown et al. 2020, arXiv 2005.14165).

Text is what `world.corpus.written` puts into pretraining, with an empty line between examples. A chat model sees each
example as an exchange of its own, since a turn is what it was trained on; in one long user message it would have to
find out where an example ends.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from jaxlm.data.conversation import Conversation, Message, Part
from jaxlm.data.world.answers import MARK
from jaxlm.data.world.talk import Work

ASKED = "Question:"


@dataclasses.dataclass(frozen=True)
class Example:
    """A question with the lines of its solution and the answer.

    about: what it is about, where the same can be asked in other words; unset, the question itself.
    """

    question: str
    answer: str
    solution: tuple[str, ...] = ()
    about: str | None = None


def _abouts(example: Example) -> set[str]:
    return {example.question} | ({example.about} if example.about is not None else set())


def choose_shots(pool: Sequence[Example], count: int, asked: Example, seed: int = 0) -> tuple[Example, ...]:
    """`count` examples about different things, none of them what is asked; fewer where the pool has not so many.

    Which ones follows from the seed and what is asked, so that an average over questions is one over shots too. More
    shots are the same ones with others before them: accuracies at two counts differ by the added ones alone.
    """
    digest = hashlib.blake2b(asked.question.encode(), digest_size=8).digest()
    generator = np.random.default_rng([seed, int.from_bytes(digest, "big")])
    chosen: list[Example] = []
    taken = _abouts(asked)
    for i in generator.permutation(len(pool)):
        if len(chosen) == count:
            break
        if not taken & (new := _abouts(pool[i])):
            taken |= new
            chosen.append(pool[i])
    return tuple(chosen[::-1])


# ------------------------------------------------------------------------------------------------------- base models
def few_shot_text(examples: Sequence[Example], question: str, cot: bool = False) -> str:
    """The text that a base model is to continue, up to one of `stop_strings(cot)`.

    cot: the examples show their solutions and the model is to write its own before the line with the answer; otherwise
    the prompt ends with that line's beginning. It ends where tokens do: see `data/bpe.py` for where a piece may cross.
    """
    shown = []
    for e in examples:
        shown.append("\n".join([f"{ASKED} {e.question}", *(e.solution if cot else ()), f"{MARK} {e.answer}"]))
    return "\n\n".join([*shown, f"{ASKED} {question}\n{'' if cot else MARK}"])


def stop_strings(cot: bool = False) -> tuple[str, ...]:
    """What ends a base model's answer, where the end of the text does not."""
    return ("\n\n", f"\n{ASKED}") if cot else ("\n",)


# ------------------------------------------------------------------------------------------------------- chat models
def shown_reply(example: Example, work: Work = "none") -> Message:
    """The assistant's turn that an example shows; `work` says where the steps of the solution go, as in the world."""
    steps = "\n".join(example.solution)
    if work == "none" or not steps:
        return Message("assistant", example.answer)
    if work == "text":
        return Message("assistant", f"{steps}\n{MARK} {example.answer}")
    return Message("assistant", (Part(steps, "thinking"), Part(example.answer)))


def few_shot_conversation(
    examples: Sequence[Example], question: str, work: Work = "none", system: str | None = None
) -> Conversation:
    """The conversation that a chat model is to answer: each example a turn of the user and one of the assistant.

    Examples, unlike what they stand before, are dropped first when a prompt is cut to a limit.
    """
    turns = [m for e in examples for m in (Message("user", e.question), shown_reply(e, work))]
    head = () if system is None else (Message("system", system),)
    return Conversation((*head, *turns, Message("user", question)))
