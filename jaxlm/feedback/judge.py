"""Is an answer right? By the truth itself, or by a model that is shown the truth.

A judge takes (question, text of a reply) pairs, all at once, and gives one `Verdict` each.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.world import answers
from jaxlm.data.world.answers import Verdict
from jaxlm.data.world.questions import Question
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import Sampling

Judge = Callable[[Sequence[tuple[Question, str]]], list[Verdict]]

ASKED = """Question: {question}
True answer: {truth}
Given answer: {answer}

Is the given answer the same as the true answer? Reply yes or no."""

VERDICTS = Sampling(temperature=0.0, max_tokens=8)
_VERDICT = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


class Ask(Protocol):
    """A model to ask: `functools.partial(sample.chat.reply, cfg, params, tokenizer, slots=64)`, or anything like it."""

    def __call__(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling | Sequence[Sampling],
        *,
        sample_ids: Sequence[int],
    ) -> list[Reply]: ...


def address(*parts) -> int:
    """A number of 31 bits that belongs to these parts alone: sample ids that do not depend on who else is asked."""
    return int(hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:8], 16) >> 1


def asked(text: str, system: str | None = None) -> Conversation:
    """A conversation that ends with this question."""
    first = () if system is None else (Message("system", system),)
    return Conversation((*first, Message("user", text)))


def by_truth(pairs: Sequence[tuple[Question, str]]) -> list[Verdict]:
    """Exact, numeric or textual equality, as `question.check` says: `world.answers.judge`."""
    return [answers.judge(question, text) for question, text in pairs]


@dataclasses.dataclass
class Counts:
    """What a judge model said. A pair is asked once, however often it comes."""

    asked: int = 0
    yes: int = 0
    no: int = 0
    malformed: int = 0  # neither: the answer counts as not right


def by_model(ask: Ask, sampling: Sampling = VERDICTS, counts: Counts | None = None) -> Judge:
    """A judge for answers that no rule can compare: a model is shown question, truth and answer, and says yes or no.

    It is asked only where the rules leave something open: what they find right is right, and a refusal has abstained.
    A hedge is judged by the answer inside. A verdict that is neither yes nor no is counted, and is not right.
    """
    counts = Counts() if counts is None else counts
    known: dict[str, bool] = {}

    def judge(pairs: Sequence[tuple[Question, str]]) -> list[Verdict]:
        verdicts = by_truth(pairs)
        texts = [
            ASKED.format(question=q.text, truth=q.answer, answer=answers.unhedged(answers.final_answer(reply))[0])
            for q, reply in pairs
        ]
        open_ = [i for i, v in enumerate(verdicts) if v.outcome == "wrong"]
        new = [t for t in dict.fromkeys(texts[i] for i in open_) if t not in known]
        replies = ask([asked(t) for t in new], sampling, sample_ids=[address("judge", t) for t in new]) if new else []
        for text, reply in zip(new, replies, strict=True):
            said = _VERDICT.match(reply.message.text)
            verdict = said[1].lower() if said else "malformed"
            counts.asked += 1
            setattr(counts, verdict, getattr(counts, verdict) + 1)
            known[text] = verdict == "yes"
        for i in open_:
            if known[texts[i]]:
                verdicts[i] = verdicts[i]._replace(outcome="right")
        return verdicts

    return judge
