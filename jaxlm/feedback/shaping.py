"""Rewards beside the answer: of the format, of the length, and of the single steps of the reasoning.

The format is read from a message's structure, never from its text: no text makes a part. Lengths are in tokens that the
policy sampled, so a tool's result costs nothing. Steps are equations `a op b = c` in the thinking, checked exactly.
"""

import codecs
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from jaxlm.config import UserError
from jaxlm.data.conversation import SEP, Conversation, Message, render
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.feedback.scoring import Reward, each, scores
from jaxlm.feedback.verifiers import Completion, message_of, number, truncated
from jaxlm.sample.chat import Reply

# ------------------------------------------------------------------------------------------------------- the format
_LETTERS = {"thinking": "t", "tool_call": "c", "tool_result": "r", "text": "a"}


def well_formed(message: Message, tools: bool = False) -> bool:
    """One thinking part, then one text, neither of them blank.

    tools: between the first thinking and the last text there may also be calls, each followed by its result, and more
    thinking after a result; text before the end is still none.
    """
    kinds = [p.kind for p in message.parts]
    if message.role != "assistant" or any(not p.text.strip() for p in message.parts if p.kind != "tool_result"):
        return False
    if not tools:
        return kinds == ["thinking", "text"]
    # Thinking leads to calls or to the answer; several calls may come in a row.
    return re.fullmatch("t(?:(?:cr)+t?)*a", "".join(_LETTERS[k] for k in kinds)) is not None


def closed(reply: Reply, tokenizer: Tokenizer) -> bool:
    """Whether every part's closing symbol was written, and no symbol stands alone: what was sampled is what is read."""
    ids = render(Conversation((reply.message,)), tokenizer)["tokens"].tolist()
    return tuple(ids[ids.index(tokenizer.control[SEP]) + 1 :]) == reply.completion.ids


def format_reward(tools: bool = False, tokenizer: Tokenizer | None = None) -> Reward:
    """1 for a `well_formed` message that was not cut off, otherwise 0.

    tokenizer: replies must also be `closed`; a message alone does not tell whether its last symbols were written.
    """

    def one(prompt, completion, metadata) -> float:
        message = message_of(completion)
        if message is None:
            shown = type(completion).__name__
            raise UserError(f"a format is read from an assistant's message, and this {shown} holds none")
        if truncated(completion, metadata.get("finish_reason")) or not well_formed(message, tools):
            return 0.0
        return float(tokenizer is None or not isinstance(completion, Reply) or closed(completion, tokenizer))

    return each(one, "format")


# ------------------------------------------------------------------------------------------------------- the length
def sampled_tokens(completion: Completion, metadata: dict) -> int:
    """How many tokens the policy wrote: of a reply, or the metadata's "tokens" for anything else."""
    if isinstance(completion, Reply):
        return sum(completion.completion.sampled)
    if "tokens" not in metadata:
        raise UserError("a length needs a reply, or 'tokens' in the metadata")
    return metadata["tokens"]


Length = Callable[[Completion, dict], int]


def linear(length: int, longest: int) -> float:
    """From 1 at no tokens to 0 at `longest` and beyond."""
    return max(0.0, 1.0 - length / longest)


def to_target(length: int, target: int, slope: float) -> float:
    """-slope * |length - target|: the exact form of L1 (Aggarwal and Welleck 2025, arXiv 2503.04697)."""
    return -slope * abs(length - target)


def cosine(length: int, longest: int, at_zero: float, at_longest: float) -> float:
    """From one value to the other along half a cosine (Yeo et al. 2025, "Demystifying Long Chain-of-Thought
    Reasoning in LLMs", arXiv 2502.03373); beyond `longest` it stays."""
    t = min(length / longest, 1.0)
    return at_longest + 0.5 * (at_zero - at_longest) * (1.0 + math.cos(math.pi * t))


def length_reward(value: Callable[[int], float], length: Length = sampled_tokens) -> Reward:
    """A reward of the length alone: `value(length)`, such as `functools.partial(linear, longest=512)`.

    It pays for short wrong answers as much as for short right ones; see `cosine_length_reward`.
    """
    return each(lambda prompt, completion, metadata: value(length(completion, metadata)), "length")


def cosine_length_reward(
    correct: Reward,
    longest: int,
    right: tuple[float, float],
    wrong: tuple[float, float],
    exceeded: float,
    length: Length = sampled_tokens,
) -> Reward:
    """The cosine reward of the same paper, which stands in for correctness instead of being added to it.

    right, wrong: the values at length 0 and at `longest`, for what `correct` scores above 0 and for the rest: right
    answers earn more when they are short (right falls), wrong ones lose less when they are long (wrong rises).
    exceeded: from `longest` on, or cut off. None where `correct` gives None.
    """
    if longest < 1 or min(right) <= max(wrong):
        raise UserError("a cosine length reward needs longest >= 1, and every right value above every wrong one")

    def reward(prompts, completions, metadata):
        values = scores(correct, prompts, completions, metadata, None)
        out = []
        for value, completion, about in zip(values, completions, metadata, strict=True):
            n = length(completion, about)
            over = n >= longest or truncated(completion, about.get("finish_reason"))
            ends = right if value is not None and value > 0 else wrong
            out.append(None if value is None else exceeded if over else cosine(n, longest, *ends))
        return out

    reward.__name__ = "cosine_length"
    return reward


# -------------------------------------------------------------------------------------------------------- the steps
_NUMBER = r"[+-]?\$?(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30})(?:\.[0-9]{1,30})?%?"
_STEP = re.compile(
    rf"(?<![\w.,)])(?P<a>{_NUMBER}) {{0,3}}(?P<op>[-+*/x×÷−]|mod) {{0,3}}(?P<b>{_NUMBER})"
    rf" {{0,3}}= {{0,3}}(?P<c>{_NUMBER})(?![\w%]|[.,][0-9])",
    re.ASCII,
)
# Beside a step they make it a piece of something longer, such as 3 * 4 = 12 in 2 + 3 * 4 = 12.
_BEFORE = re.compile(r"(?:[-+*/×÷−^=)]|\b(?:x|mod)) *$", re.ASCII)
_AFTER = re.compile(r" *(?:[-+*/×÷−^=(]|(?:x|mod)\b)", re.ASCII)
_OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "mod": lambda a, b: a % b,
}
_SAME = {"x": "*", "×": "*", "÷": "/", "−": "-"}
LONGEST_TRACE = 100_000  # characters of a trace that are read


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation of a trace, which is `trace[begin:end]`.

    right: whether it holds exactly. grounded: whether both operands are numbers of the question or results of earlier
    right steps. repeated: the same equation came before.
    """

    begin: int
    end: int
    a: Fraction
    op: str  # + - * / mod
    b: Fraction
    result: Fraction
    right: bool
    grounded: bool
    repeated: bool

    @property
    def reward(self) -> float:
        """1 where it is right, grounded and new: equations that nothing asked for earn nothing, however right."""
        return float(self.right and self.grounded and not self.repeated)


def numbers_in(text: str) -> list[Fraction]:
    """The numbers that stand in a text by themselves, such as those of a question."""
    words = (w.strip(".,;:?!()[]\"'") for w in re.split(r"[\s+*/=×÷−]+|(?<=[0-9])-(?=[0-9])", text))
    return [n for n in map(number, words) if n is not None]


def _whole(text: str, begin: int, end: int) -> bool:
    """Whether an equation is not a piece of a longer one on its line."""
    before = text[max(0, begin - 8) : begin].rpartition("\n")[2]
    signed = text[begin] in "+-" and before.rstrip(" ")[-1:].isalnum()  # the sign is an operator: 5 -3 + 2 = 4
    return not (signed or _BEFORE.search(before) or _AFTER.match(text, end))


def steps(trace: str, given: Iterable[Fraction] | None = None) -> list[Step]:
    """The equations `a op b = c` of a trace, in order, each checked with exact fractions.

    op: + - * / x × ÷ − mod. Numbers: ASCII, with commas between thousands, decimals, dollar and percent signs. Pieces
    of longer expressions and chains (2 + 3 * 4 = 14; 1 + 2 = 3 + 4 = 7) are no steps: they claim something else.
    Division by zero is wrong. A result that was rounded is wrong: 10 / 3 = 3.33.

    given: the numbers of the question (`numbers_in`); None: every step counts as grounded.
    """
    found, seen, known = [], set(), None if given is None else set(given)
    text = trace[:LONGEST_TRACE]
    for match in _STEP.finditer(text):
        if not _whole(text, *match.span()):
            continue
        a, b, c = (number(match[name]) for name in "abc")
        if None in (a, b, c):
            continue
        op = _SAME.get(match["op"], match["op"])
        right = not (op in ("/", "mod") and b == 0) and _OPERATIONS[op](a, b) == c
        grounded = known is None or (a in known and b in known)
        # A result that nothing led to must not ground what follows.
        if known is not None and right and grounded:
            known.add(c)
        key = (op, *(sorted((a, b)) if op in "+*" else (a, b)), c)
        found.append(Step(*match.span(), a, op, b, c, right, grounded, key in seen))
        seen.add(key)
    return found


def token_spans(ids: Sequence[int], spans: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """[begin, end) in tokens of each span of characters, not empty, of the ids' text.

    A character belongs to the token that ends it.
    """
    decoder, ends = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    size = 0
    for i in ids:
        size += len(decoder.decode(tokenizer.id_bytes[i]))
        ends.append(size)
    begins = [0, *ends[:-1]]
    first = lambda at: next(k for k, e in enumerate(ends) if e > at)  # noqa: E731
    past = lambda at: len(ids) - next(k for k, b in enumerate(reversed(begins)) if b < at)  # noqa: E731
    return [(first(begin), past(end)) for begin, end in spans]


def thinking_steps(
    reply: Reply, tokenizer: Tokenizer, given: Iterable[Fraction] | None = None
) -> list[tuple[Step, int, int]]:
    """(step, begin, end) of every thinking part of a reply; the place is [begin, end) in `reply.completion.ids`.

    The step's own begin and end are characters of its part. A process reward goes to token end - 1.
    """
    if all(part.kind != "thinking" for part in reply.message.parts):
        return []  # a reply to a text has no ids of its parts
    control = set(tokenizer.control.values())
    # Without control ids: one that closes what is not open belongs to no part, and may stand in the middle of one.
    places = [i for i, token in enumerate(reply.completion.ids) if token not in control]
    out, at, ids = [], 0, tuple(reply.completion.ids[i] for i in places)
    for part in reply.message.parts:
        size = len(part.ids)
        at = next(i for i in range(at, len(ids) + 1) if ids[i : i + size] == part.ids)
        if part.kind == "thinking":
            found = steps(part.text, given)
            spans = token_spans(part.ids, [(s.begin, s.end) for s in found], tokenizer)
            out += [(s, places[at + begin], places[at + end - 1] + 1) for s, (begin, end) in zip(found, spans)]
        at += size
    return out


def process_reward(question: Callable[[object, dict], str] | None = None) -> Reward:
    """The share of a message's thinking steps that earn their reward (`Step.reward`); 0 where there are none.

    question: the text, given prompt and metadata, whose numbers ground the steps; None: any equation counts, and a
    policy may fill its thinking with true ones of no use.
    """

    def one(prompt, completion, metadata) -> float:
        message = message_of(completion)
        if message is None:
            raise UserError(f"steps are read from an assistant's message, and this {type(completion).__name__} is none")
        given = None if question is None else numbers_in(question(prompt, metadata))
        trace = "\n".join(p.text for p in message.parts if p.kind == "thinking")
        found = steps(trace, given)
        return sum(s.reward for s in found) / len(found) if found else 0.0

    return each(one, "process")
