"""What does a model know? Each question is asked several times, the answers are judged, the question is classified.

After R-Tuning (Zhang et al. 2023, arXiv 2311.09677) and the probing of Gekhman et al. 2024 (arXiv 2405.05904): a model
knows a fact that its samples keep getting right, and does not know one that they never do.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import readers
from jaxlm.data.world import answers
from jaxlm.data.world.people import Split, Tables
from jaxlm.data.world.questions import EVERYBODY, Question, fact_questions
from jaxlm.feedback.judge import Ask, Judge, address, asked, by_truth
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import Sampling

Class = Literal["known", "unstable", "unknown"]
Group = Literal["often", "once", "withheld", "stranger", "other"]
GROUPS: tuple[Group, ...] = ("often", "once", "withheld", "stranger", "other")
CLASSES: tuple[Class, ...] = ("known", "unstable", "unknown")
SCHEMA_VERSION = 1
SAMPLING = Sampling(temperature=1.0, max_tokens=64)


@dataclasses.dataclass(frozen=True)
class Probed:
    """A question and what a model made of it: the greedy reply, and k samples.

    outcome, hedged: of the greedy reply. logprob: of all its `tokens` sampled ids with the one that ends it, in nats,
    at temperature 1. finished: it ended by itself. agreement: the share of samples that give the answer that it gives.
    answer_logprob, least_logprob: of what is answered after thoughts and calls, with the id that ends it, and of the
    least likely id of the whole reply; None in files from before there were these.
    """

    question: Question
    reply: str
    outcome: str
    hedged: bool
    logprob: float
    tokens: int
    finished: bool
    agreement: float
    samples: tuple[str, ...]
    outcomes: tuple[str, ...]  # of the samples
    answer_logprob: float | None = None
    least_logprob: float | None = None

    @property
    def right_rate(self) -> float:
        """The share of samples that are right."""
        return self.outcomes.count("right") / len(self.outcomes)

    @property
    def mean_logprob(self) -> float:
        """Nats per token of the greedy reply."""
        return self.logprob / max(self.tokens, 1)


# -------------------------------------------------------------------------------------------------------- questions
def group(question: Question) -> Group:
    """How often pretraining told the fact; of those told nowhere, whether the person was mentioned. "other": unsaid."""
    if question.known is None:
        return "other"
    if question.known != "never":
        return question.known
    return "withheld" if question.mentioned else "stranger"


def world_questions(
    t: Tables,
    split: Split,
    per_group: int,
    seed: int = 0,
    heldout_wordings: bool | None = None,
    per_fact: int = 1,
    part: tuple[float, float] = EVERYBODY,
) -> list[Question]:
    """At most `per_group` questions of each group that the world has, drawn by `seed`; arguments as `fact_questions`.

    Of facts told nowhere, as many are of people who are mentioned as of strangers, where there are both.
    """
    groups: dict[Group, list[Question]] = collections.defaultdict(list)
    for question in fact_questions(t, split, heldout_wordings=heldout_wordings, per_fact=per_fact, part=part):
        groups[group(question)].append(question)
    untold = min([per_group, *(len(groups[g]) for g in ("withheld", "stranger") if groups[g])])
    chosen = []
    for name in GROUPS:
        n = untold if name in ("withheld", "stranger") else per_group
        chosen += sorted(groups[name], key=lambda q: (address("choice", seed, q.id), q.id))[:n]
    return chosen


def plain_question(text: str, answer: str, id: str, also: Sequence[str] = ()) -> Question:
    """A question from anywhere; an answer that is a number is compared as one."""
    numeric = all(answers.number(a) is not None for a in (answer, *also))
    return Question(text, answer, "numeric" if numeric else "text", "fact", "heldout", id, tuple(also))


def read_questions(path) -> list[Question]:
    """Questions of a JSONL file: {"question": ..., "answer": ...} a line, optionally "id" and "also", a list."""
    out, file = [], storage.path(path)
    if not file.is_file():
        raise UserError(f"no such file of questions: {path}")
    for where, record in readers.records(file):
        record = record if isinstance(record, dict) else {}
        also = record.get("also") or []
        texts = [record.get("question"), record.get("answer"), *(also if isinstance(also, list) else [None])]
        if not all(isinstance(x, str) and x.strip() for x in texts):
            raise UserError(
                f'{path} {where}: {{"question": text, "answer": text}} is wanted, neither of them empty, and "also" '
                "may be a list of texts"
            )
        out.append(plain_question(texts[0], texts[1], str(record.get("id", where.replace(" ", ""))), texts[2:]))
    if not out:
        raise UserError(f"{path} has no questions")
    return out


# ---------------------------------------------------------------------------------------------------------- probing
def answer_key(question: Question, reply: str) -> str | None:
    """What two replies to a question have in common when they say the same; None of one that abstains."""
    answer, hedged = answers.unhedged(answers.final_answer(reply))
    if not hedged and answers.is_refusal(answer):
        return None
    number = answers.number(answer) if question.check == "numeric" else None
    return answers.normalized(answer) if number is None else str(number)


def _answer_logprob(reply: Reply) -> float | None:
    """Of the text at the end of a reply with the id that ends it, or of all that was said when a thought did not end.

    None where the text's ids are not known.
    """
    answer = [p.ids for p in reply.message.parts[-1:] if p.kind == "text"]
    if None in answer:
        return None
    length = sum(map(len, answer)) + (reply.completion.finish_reason == "stop")
    return math.fsum(reply.completion.logprobs[-length:])  # all of them where it is 0


def probe(
    ask: Ask,
    questions: Sequence[Question],
    k: int = 8,
    sampling: Sampling = SAMPLING,
    judge: Judge = by_truth,
) -> list[Probed]:
    """Asks each question k times by `sampling` and once greedily, all in one call, and judges the replies.

    A sample depends on the seed and the question's id, not on the questions beside it. Raises `UserError` for ids that
    are not different, since two probes are compared by id.
    """
    if k < 1 or sampling.temperature == 0:
        raise UserError(f"probing needs k of at least 1 and a temperature above 0, got {k} and {sampling.temperature}")
    if len({q.id for q in questions}) < len(questions):
        raise UserError("questions to probe need ids that are all different")
    greedy = dataclasses.replace(sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    settings = [greedy, *[sampling] * k]
    first = [address("probe", q.id) for q in questions]
    replies = ask(
        [asked(q.text, q.system) for q in questions for _ in settings],
        settings * len(questions),
        sample_ids=[(at + j) % 2**31 for at in first for j in range(k + 1)],
    )
    texts = [r.message.text for r in replies]
    verdicts = judge([(q, texts[i * (k + 1) + j]) for i, q in enumerate(questions) for j in range(k + 1)])
    out = []
    for i, question in enumerate(questions):
        mine = slice(i * (k + 1), (i + 1) * (k + 1))
        completion = replies[mine.start].completion
        keys = [answer_key(question, text) for text in texts[mine]]
        outcome, hedged = verdicts[mine.start]
        out.append(
            Probed(
                question=question,
                reply=texts[mine.start],
                outcome=outcome,
                hedged=hedged,
                logprob=math.fsum(completion.logprobs),
                tokens=sum(completion.sampled),
                finished=completion.finish_reason == "stop",
                agreement=keys[1:].count(keys[0]) / k,
                samples=tuple(texts[mine][1:]),
                outcomes=tuple(v.outcome for v in verdicts[mine][1:]),
                answer_logprob=_answer_logprob(replies[mine.start]),
                least_logprob=min(completion.logprobs, default=0.0),
            )
        )
    return out


# -------------------------------------------------------------------------------------------------------- classifying
@dataclasses.dataclass(frozen=True)
class Thresholds:
    """known: at least this share of the samples is right. unknown: at most this share is, and the greedy reply is not.

    What is neither is unstable; whatever is known or unstable was answered right at least once.
    """

    known: float = 0.75
    unknown: float = 0.1

    def __post_init__(self):
        if not 0 <= self.unknown < self.known <= 1:
            raise UserError(f"thresholds need 0 <= unknown < known <= 1, got {self.unknown} and {self.known}")


THRESHOLDS = Thresholds()


def classify(probed: Probed, thresholds: Thresholds = THRESHOLDS) -> Class:
    if probed.right_rate >= thresholds.known:
        return "known"
    return "unknown" if probed.right_rate <= thresholds.unknown and probed.outcome != "right" else "unstable"


# ------------------------------------------------------------------------------------------------------------- files
def write_probed(path, probed: Iterable[Probed]) -> None:
    """One JSON object a line; `read_probed` reads it back."""
    lines = (json.dumps({"schema_version": SCHEMA_VERSION} | dataclasses.asdict(p), ensure_ascii=False) for p in probed)
    storage.write_text(path, "".join(line + "\n" for line in lines))


def _read(path) -> Iterator[Probed]:
    for where, record in readers.records(storage.path(path)):
        try:
            if record.pop("schema_version") != SCHEMA_VERSION:
                raise ValueError(f"schema_version {SCHEMA_VERSION} is wanted")
            question = record.pop("question")
            question = Question(**question | {"also": tuple(question["also"])})
            lists = {name: tuple(record.pop(name)) for name in ("samples", "outcomes")}
            yield Probed(question=question, **record, **lists)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise UserError(f"{path} {where}: not a record of a probe: {e}") from e


def read_probed(path) -> list[Probed]:
    if not storage.path(path).is_file():
        raise UserError(f"no such file of a probe: {path}")
    return list(_read(path))
