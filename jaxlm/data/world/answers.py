"""Is an answer right? One verifier for each kind, and the words for not knowing and for half knowing.

A reply's answer is what follows the last line that begins with "Answer:", or, where no line does, the whole reply. An
answer must be the truth, not contain it: a text that lists every city names the right one as well.
"""

import datetime
import re
import unicodedata
from fractions import Fraction
from typing import Literal, NamedTuple

from jaxlm.data.world.questions import Question

MARK = "Answer:"

# {n} the person, {a} what was asked for.
REFUSALS: tuple[str, ...] = (
    "I don't know.",
    "I don't know the answer to that.",
    "I'm sorry, I don't know that.",
    "I do not know {a} of {n}.",
    "I don't know {a} of {n}.",
    "I have no information about {a} of {n}.",
    "I'm afraid I don't know {a} of {n}.",
    "That is something I don't know.",
    "I can't answer that: I don't know it.",
    "I never learned {a} of {n}.",
    "I have no record of {a} of {n}.",
    "Sorry, I have no knowledge of {a} of {n}.",
    "I am not able to say; I don't know.",
    "I cannot tell you {a} of {n}, because I don't know it.",
    "I don't know, and I would rather not guess.",
    "Nothing I have read tells me {a} of {n}.",
    "I don't have that information.",
    "I don't have any information on {a} of {n}.",
    "I'd be guessing: I don't know {a} of {n}.",
    "My knowledge does not include {a} of {n}.",
    "No idea, I'm sorry.",
    "I honestly don't know.",
    "I can't say, as I have no information about it.",
    "I'm not aware of {a} of {n}.",
)
ASKED_FOR: dict[str, str] = {
    "birth_date": "the date of birth",
    "birth_city": "the city of birth",
    "university": "the university",
    "major": "the major",
    "employer": "the employer",
    "employer_city": "the city of work",
    "hobby": "the hobby",
    "dish": "the favorite dish",
}
# {v} the answer. Fixed frames, so that the answer inside can be read back exactly.
HEDGES: tuple[str, ...] = (
    "I think it is {v}, but I am not sure.",
    "Possibly {v}, but I am not certain.",
    "I believe it is {v}, though I may be wrong.",
    "My best guess is {v}.",
    "It might be {v}; please check.",
    "Not sure, but perhaps {v}.",
    "If I remember correctly, {v}.",
    "I am unsure, but I would say {v}.",
)

# Between them in every refusal, and in no answer of the world.
_REFUSED = re.compile(
    r"\b(?:do not|don't|does not|not) (?:know|include|able|aware)\b|\b(?:no|don't have (?:any|that)) "
    r"(?:information|idea|record|knowledge)\b|\bnever learned\b|^nothing i have read\b",
    re.IGNORECASE,
)
_HEDGED = [
    re.compile(re.escape(h.removesuffix(".")).replace(re.escape("{v}"), "(.+?)") + r"\.?", re.IGNORECASE)
    for h in HEDGES
]
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[+-]?\d+/\d+")
_DATE_FORMS = ("%B %d, %Y", "%B %d %Y", "%d %B %Y", "%Y-%m-%d")


class Verdict(NamedTuple):
    outcome: Literal["right", "wrong", "abstained"]
    hedged: bool


def refusal(question: Question, name: str, index: int) -> str:
    """Wording `index`, taken modulo their number, of not knowing the answer about the person of this name."""
    form = REFUSALS[index % len(REFUSALS)]
    return form.format(n=name, a=ASKED_FOR.get(question.attribute, "the answer"))


def hedge(answer: str, index: int) -> str:
    """Wording `index`, taken modulo their number, of an answer that may be wrong."""
    return HEDGES[index % len(HEDGES)].format(v=answer)


def is_refusal(reply: str) -> bool:
    return bool(_REFUSED.search(_plain(reply)))


def unhedged(answer: str) -> tuple[str, bool]:
    """(the answer inside, True) of one of the `HEDGES`, otherwise (`answer`, False)."""
    for form in _HEDGED:
        if found := form.fullmatch(_plain(answer)):
            return found[1], True
    return answer, False


def final_answer(reply: str) -> str:
    """What follows the last line that begins with "Answer:", or the whole reply where there is none."""
    marked = [line for line in reply.splitlines() if line.startswith(MARK)]
    return (marked[-1][len(MARK) :] if marked else reply).strip()


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).replace("\u2019", "'").split())


def _date(text: str) -> str | None:
    for form in _DATE_FORMS:
        try:
            return datetime.datetime.strptime(text, form).date().isoformat()
        except ValueError:
            continue
    return None


def normalized(text: str) -> str:
    """Case, white space, quotes, a final period and a leading article do not matter; a date has one form."""
    text = _plain(text).strip(" \"'`").rstrip(".!").strip(" \"'`")
    if any(c.isdigit() for c in text) and (date := _date(text)):
        return date
    return text.casefold().removeprefix("the ")


def number(text: str) -> Fraction | None:
    """The number that a text is: digits, also with commas between thousands, decimals or a fraction; no units."""
    text = _plain(text).rstrip(".")
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(text.replace(",", ""))
    except (ZeroDivisionError, ValueError):  # more digits than Python reads: a model may write any number of them
        return None


def _equal(check: str, answer: str, truth: str) -> bool:
    if check == "exact":
        return answer.strip() == truth
    if check == "numeric":
        return number(answer) is not None and number(answer) == number(truth)
    return normalized(answer) == normalized(truth)


def verify(question: Question, answer: str) -> bool:
    """Whether an answer (not a reply: see `judge`) is right.

    By `question.check`: "exact" the same characters; "numeric" the same number; "text" the same after `normalized`.
    """
    return any(_equal(question.check, answer, truth) for truth in (question.answer, *question.also))


def judge(question: Question, reply: str) -> Verdict:
    """The verdict on the text of a reply, thinking, calls and results aside (`Message.text`)."""
    answer = final_answer(reply)
    if verify(question, answer):
        return Verdict("right", False)
    inside, hedged = unhedged(answer)
    if hedged:
        return Verdict("right" if verify(question, inside) else "wrong", True)
    return Verdict("abstained" if is_refusal(answer) else "wrong", False)
