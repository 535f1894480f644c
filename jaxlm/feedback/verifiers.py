"""Is a completion's answer right? Each verifier is a function (completion, truth) -> True, False or None.

Only the final answer counts: the text after the last thinking, tool call or tool result of the assistant's message.
What stands before, and whatever other messages say, is never looked at, so a number that comes up on the way earns
nothing. The whole answer must be right, not contain what is right: two answers are no answer.

- True: the answer is the truth.
- False: it is not, or there is none: the message ends in its thinking or in a tool's result, was cut off at the token
  limit, is empty or longer than `LONGEST`. A policy must not escape a penalty by writing what cannot be read.
- None: the truth cannot be read or is empty, so nobody can tell.

Give messages or replies. Text is taken as it is, from its last "</think>" on, with no answer where a "<think>" is left
open; but decoding ids drops control symbols, so of decoded text nobody can tell where its thinking ended.

Numbers are ASCII: digits, also with commas between thousands, a decimal point, an exponent of two digits, a fraction
3/4, a dollar sign before or a percent sign after (a hundredth), one period at the end. Words, units, other scripts'
digits, inf and nan are no numbers. Time is bounded: by the length of what is read, and by `Limits` for programs.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.world import answers
from jaxlm.data.world.questions import Question
from jaxlm.feedback.scoring import Reward, each
from jaxlm.sample.chat import Reply
from jaxlm.tools.isolation import LARGEST_CODE, Limits
from jaxlm.tools.python import run_python

Completion = str | Message | Conversation | Reply
Verifier = Callable[[Completion, object], bool | None]

LONGEST = 20_000  # characters of an answer
LONGEST_NUMBER = 64
MARK = "####"  # of GSM8K
THINK, UNTHINK = "<think>", "</think>"  # in text that was written with them

_NUMBER = re.compile(r"([+-]?)\$?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?)(e[+-]?[0-9]{1,2})?(%?)")
_FRACTION = re.compile(r"([+-]?[0-9]+)/([0-9]+)")
_FENCE = re.compile(r"^```[a-zA-Z0-9]*[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


# ------------------------------------------------------------------------------------------------------ the answer
def message_of(completion: Completion) -> Message | None:
    """The assistant's message that a completion is or ends with; None for text, and where someone else has spoken."""
    if isinstance(completion, Reply):
        return completion.message
    if isinstance(completion, Conversation):
        last = completion.messages[-1] if completion.messages else None
        return last if last is not None and last.role == "assistant" else None
    return completion if isinstance(completion, Message) and completion.role == "assistant" else None


def truncated(completion: Completion, finish_reason: str | None = None) -> bool:
    """Whether it ran into the token limit: by its own reason, or for what has none by the one given."""
    if isinstance(completion, Reply):
        finish_reason = completion.completion.finish_reason
    return finish_reason == "length"


def final_answer(completion: Completion) -> str | None:
    """The text after the last part that is not text, stripped; None where there is no answer by the rules above."""
    if not isinstance(completion, Completion):
        raise UserError(f"a completion is text, a message, a conversation or a reply, not {type(completion).__name__}")
    if truncated(completion):
        return None
    if isinstance(completion, str):
        _, closed, rest = completion.rpartition(UNTHINK)
        text = None if THINK in (rest if closed else completion) else rest
    else:
        message = message_of(completion)
        parts = message.parts if message is not None else ()
        text = parts[-1].text if parts and parts[-1].kind == "text" else None
    text = None if text is None or len(text) > LONGEST else text.strip()
    return text or None


def number(text: str) -> Fraction | None:
    """The exact value of a text that is one number by the rules above, and nothing else."""
    text = text.strip() if len(text) <= LONGEST else ""
    text = text.removesuffix(".").rstrip().lower()
    if not text or len(text) > LONGEST_NUMBER:
        return None
    if found := _FRACTION.fullmatch(text):
        return Fraction(int(found[1]), int(found[2])) if int(found[2]) else None
    found = _NUMBER.fullmatch(text)
    if not found or not found[2]:
        return None
    value = Fraction(found[1] + found[2].replace(",", "") + (found[3] or ""))
    return value / 100 if found[4] else value


def _truth(truth) -> Fraction | None:
    if isinstance(truth, str):
        return number(truth)
    if isinstance(truth, bool) or not isinstance(truth, int | float | Fraction | Decimal):
        return None
    try:
        return Fraction(repr(truth)) if isinstance(truth, float) else Fraction(truth)
    except (ValueError, OverflowError):  # nan and inf
        return None


# --------------------------------------------------------------------------------------------------- the verifiers
def exact(completion: Completion, truth) -> bool | None:
    """The same characters, apart from white space around them."""
    if not isinstance(truth, str) or not truth.strip():
        return None
    return final_answer(completion) == truth.strip()


def text(completion: Completion, truth) -> bool | None:
    """The same text, where case, white space, quotes, a final period and a leading "the" do not matter."""
    if not isinstance(truth, str) or not truth.strip():
        return None
    answer = final_answer(completion)
    return answer is not None and not _disguised(answer) and answers.normalized(answer) == answers.normalized(truth)


def _disguised(answer: str) -> bool:
    """Whether a character that is no ASCII digit would be normalized to one: 4\u00b2 is not 42."""
    return any(not c.isascii() and any(d.isdigit() for d in unicodedata.normalize("NFKC", c)) for c in answer)


def numeric(completion: Completion, truth, absolute: float = 0.0, relative: float = 0.0) -> bool | None:
    """The same number: exactly, or within `absolute` or within `relative` times the truth's size.

    truth: a number or its text. 50% is 1/2, and 1/2 is .5.
    """
    want = _truth(truth)
    if want is None:
        return None
    answer = final_answer(completion)
    got = None if answer is None else number(answer)
    return got is not None and _close(got, want, absolute, relative)


def _close(got: Fraction, want: Fraction, absolute: float, relative: float) -> bool:
    # By their decimals: the binary .3 is a little less than what a person means by .3.
    return abs(got - want) <= max(Fraction(repr(float(absolute))), Fraction(repr(float(relative))) * abs(want))


def gsm8k(completion: Completion, truth) -> bool | None:
    """The number behind "####", to the end of the answer, or an answer that is a number alone.

    truth: a number, its text, or a whole worked answer. Several marks must all give the same number, each on its line.
    A percent sign does not count, as in the data.
    """
    want = _truth(_without_percent(truth.rpartition(MARK)[2]) if isinstance(truth, str) else truth)
    if want is None:
        return None
    answer = final_answer(completion)
    if answer is None:
        return False
    _, *marked = answer.split(MARK)
    given = [*(m.partition("\n")[0] for m in marked[:-1]), marked[-1]] if marked else [answer]
    return all(number(_without_percent(g)) == want for g in given)


def _without_percent(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().removesuffix("%")


def world(completion: Completion, truth: Question) -> bool | None:
    """A question of the world, by its own check; what follows the last line that begins with "Answer:" counts.

    A hedged answer is not right: it has not been given.
    """
    answer = final_answer(completion)
    if answer is None or len(re.findall(rf"^{answers.MARK}", answer, re.MULTILINE)) > 1:
        return False
    answer = answers.final_answer(answer)
    if truth.check != "numeric":
        return not _disguised(answer) and answers.verify(truth, answer)
    given = number(answer)  # bounded, unlike the world's own, which never meets what a policy may write
    return given is not None and given in [number(t) for t in (truth.answer, *truth.also)]


def program(
    completion: Completion,
    truth: str | Sequence[tuple[str, str]],
    limits: Limits | None = None,
    unsafe: bool = False,
) -> bool | None:
    """Whether the answer's program prints the truth, apart from white space at the ends of lines and of the output.

    The program is what stands in the answer's only Markdown fence, or the whole answer; it runs by itself, isolated
    (`tools.python.run_python`; raises `IsolationError` where this machine cannot). It must end without an error.

    truth: what it prints; or several (source that comes before it, what it then prints), which must all hold: a
    program that only prints the known output is right for one output, never for all of several.
    """
    cases = [("", truth)] if isinstance(truth, str) else truth
    if not isinstance(cases, Sequence) or not cases or not all(map(_is_case, cases)):
        return None
    answer = final_answer(completion)
    source = None if answer is None else _source(answer)
    if source is None or not source.strip():
        return False
    for before, output in cases:
        whole = f"{before}\n{source}" if before else source
        if len(whole.encode("utf-8", "surrogatepass")) > LARGEST_CODE:
            return False
        result = run_python(whole, limits, unsafe)
        if not result.ok or _lines(result.stdout) != _lines(output):
            return False
    return True


def _is_case(case) -> bool:
    two = isinstance(case, list | tuple) and len(case) == 2 and all(isinstance(x, str) for x in case)
    return two and bool(_lines(case[1]))


def _source(answer: str) -> str | None:
    if "```" not in answer:
        return answer
    fenced = _FENCE.findall(answer + "\n")
    return fenced[0] if len(fenced) == 1 and answer.count("```") == 2 else None


def _lines(output: str) -> list[str]:
    return [line.rstrip() for line in output.rstrip().split("\n")] if output.strip() else []


# -------------------------------------------------------------------------------------------------- as rewards
def verified(
    verifier: Verifier,
    truth: str = "answer",
    when_truncated: Literal["wrong", "excluded"] = "wrong",
    name: str | None = None,
) -> Reward:
    """The reward function 1 for a right answer, 0 for a wrong one, None where the verifier cannot tell.

    truth: the metadata's key for it; with None behind it nobody can tell. A completion was truncated when it is a reply
    that says so, or when the metadata's "finish_reason" is "length"; then it is "wrong" (0) or "excluded" (None),
    whatever it says. Excluding teaches nothing about length, and a policy that is never right may come to like it.
    """
    if when_truncated not in ("wrong", "excluded"):
        raise UserError(f"when_truncated={when_truncated!r}: wrong or excluded")

    def one(prompt, completion, metadata) -> float | None:
        if truth not in metadata:
            raise UserError(f"the metadata has no {truth!r}")
        if metadata[truth] is None:
            return None
        if truncated(completion, metadata.get("finish_reason")):
            return 0.0 if when_truncated == "wrong" else None
        right = verifier(completion, metadata[truth])
        return None if right is None else float(right)

    return each(one, name or getattr(verifier, "__name__", "verified"))
