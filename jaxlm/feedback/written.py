"""What a model writes for its own training: questions about a passage, and whole conversations from templates.

Nothing is taken on trust: filters with names throw away what cannot be used and count what they threw away, and every
text that stays carries where it comes from.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import readers
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.world import answers
from jaxlm.data.world.questions import Question
from jaxlm.feedback.judge import Ask, Judge, address, asked, by_truth
from jaxlm.feedback.lessons import Lesson
from jaxlm.feedback.probe import plain_question
from jaxlm.sample.engine import Sampling

# {count} and {passage}. What comes back is read by `read_pairs`.
ASK_FOR_QUESTIONS = """Write {count} short questions that this text answers, each with the answer in words of the text.
Write each as two lines, "Question: ..." and "Answer: ...". A question must make sense without the text.

{passage}"""
WRITING = Sampling(temperature=0.7, max_tokens=256)
ANSWERING = Sampling(temperature=0.7, max_tokens=64)

_PAIR = re.compile(
    r"^[\W\d]*Question(?: \d+)?:[ \t]*(.+?)[ \t]*\n\W*Answer(?: \d+)?:[ \t]*(.+?)[ \t]*$", re.MULTILINE | re.IGNORECASE
)
_ABOUT_THE_TEXT = re.compile(r"\b(?:the|this) (?:text|passage|author|paragraph|document)\b", re.IGNORECASE)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


@dataclasses.dataclass
class Filtered:
    """How many texts were written, kept, and rejected by each filter; each is counted at the first that rejects it."""

    written: int = 0
    kept: int = 0
    rejected: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def first(self, filters: Mapping[str, Callable[..., bool]], *what) -> str | None:
        """The name of the first filter that rejects it, counted; None when all pass."""
        self.written += 1
        name = next((name for name, passes in filters.items() if not passes(*what)), None)
        if name is not None:
            self.rejected[name] += 1
        return name


# -------------------------------------------------------------------------------------------------------- questions
@dataclasses.dataclass(frozen=True)
class Written:
    """A question that a model wrote, the passage that it was written from, and where it comes from."""

    question: Question
    passage: str
    source: dict


def read_pairs(text: str) -> list[tuple[str, str]]:
    """The (question, answer) pairs in what a model wrote, each two lines that follow each other."""
    return _PAIR.findall(text)


def _longest(words: int) -> Callable[[str, str, str], bool]:
    return lambda question, answer, passage: len(answer.split()) <= words and len(question.split()) <= 4 * words


# Each takes question, answer and passage.
QUESTION_FILTERS: Mapping[str, Callable[[str, str, str], bool]] = {
    "is a question": lambda question, answer, passage: question.endswith("?"),
    "short": _longest(10),
    "answer in the passage": lambda question, answer, passage: _plain(answer).rstrip(".") in _plain(passage),
    "answer not in the question": lambda question, answer, _: _plain(answer).rstrip(".") not in _plain(question),
    "stands alone": lambda question, answer, passage: not _ABOUT_THE_TEXT.search(question),
}


def questions_from(
    ask: Ask,
    passages: Sequence[tuple[str, str]],
    model: str,
    count: int = 3,
    k: int = 4,
    agree: float = 0.75,
    seed: int = 0,
    judge: Judge = by_truth,
    counts: Filtered | None = None,
    writing: Sampling = WRITING,
    fits: Callable[[Conversation, int], bool] = lambda *_: True,
) -> list[Written]:
    """Questions that a model writes about passages, kept only when it answers them right with the passage at hand.

    Args:
      passages: (id, text) of each.
      model: which one it is, for the provenance.
      count: questions to ask for, for each passage.
      k, agree: of k samples with the passage before the question, at least this share must give the written answer.
      writing: of the questions; its seed is not used.
      fits: whether the model has room for a prompt and a reply of so many tokens; what does not fit is counted.
    """
    counts = Filtered() if counts is None else counts
    writing, answering = (dataclasses.replace(s, seed=seed) for s in (writing, ANSWERING))
    prompts: dict[tuple[str, str], Conversation] = {}
    for passage in passages:
        prompt = asked(ASK_FOR_QUESTIONS.format(count=count, passage=passage[1]))
        if fits(prompt, writing.max_tokens):
            prompts[passage] = prompt
        else:
            counts.written += 1
            counts.rejected["fits"] += 1
    ids = [address("write", passage_id) for passage_id, _ in prompts]
    replies = ask(list(prompts.values()), writing, sample_ids=ids) if prompts else []
    found: list[tuple[Question, str, str]] = []
    seen: set[str] = set()
    for (passage_id, passage), reply in zip(prompts, replies, strict=True):
        if not (pairs := read_pairs(reply.message.text)):
            counts.written += 1
            counts.rejected["no question and answer"] += 1
        for n, (text, answer) in enumerate(pairs):
            filters = {
                **QUESTION_FILTERS,
                "new": lambda question, *_: _plain(question) not in seen,
                "fits": lambda question, _, passage: fits(asked(with_passage(question, passage)), answering.max_tokens),
            }
            if counts.first(filters, text, answer, passage) is None:
                seen.add(_plain(text))
                found.append((plain_question(text, answer.rstrip("."), f"{passage_id}/{n}"), passage_id, passage))
    opened = ask(
        [asked(with_passage(q.text, passage)) for q, _, passage in found for _ in range(k)],
        answering,
        sample_ids=[(address("answer", q.id) + j) % 2**31 for q, _, _ in found for j in range(k)],
    )
    verdicts = judge([(found[i // k][0], r.message.text) for i, r in enumerate(opened)])
    kept = []
    for i, (question, passage_id, passage) in enumerate(found):
        agreed = sum(v.outcome == "right" for v in verdicts[i * k : (i + 1) * k]) / k
        if agreed < agree:
            counts.rejected["answered with the passage at hand"] += 1
            continue
        source = {"made_by": "questions_from", "model": model, "passage": passage_id, "seed": seed, "agreed": agreed}
        kept.append(Written(question, passage, source))
    counts.kept += len(kept)
    return kept


def with_passage(question: str, passage: str) -> str:
    """An open-book question: what answers it comes first."""
    return f"{passage}\n\n{question}"


def open_book(written: Written) -> Question:
    """The question with its passage before it, as `world.talk.open_book` does for the world's."""
    q = written.question
    return dataclasses.replace(q, text=with_passage(q.text, written.passage), id=f"{q.id}/open")


def question_records(written: Sequence[Written]) -> list[dict]:
    """Lines of a file that `probe.read_questions` reads, with their provenance."""
    return [
        {"id": w.question.id, "question": w.question.text, "answer": w.question.answer, "source": w.source}
        for w in written
    ]


# ---------------------------------------------------------------------------------------------------- conversations
@dataclasses.dataclass(frozen=True)
class Template:
    """What a model is asked to write. `text` has {slots}, each filled with one of its values.

    writes "reply": `text` is the user's message, and the model's reply completes the conversation. writes "request":
    `text` asks the model for a user's message, which it is then asked in a fresh conversation, and replies to.
    """

    name: str
    text: str
    slots: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    writes: str = "reply"
    system: str | None = None  # a system message of the conversation that is written

    def __post_init__(self):
        if self.writes not in ("reply", "request"):
            raise UserError(f'template {self.name}: writes must be "reply" or "request", got {self.writes!r}')
        if empty := [name for name, values in self.slots.items() if not values]:
            raise UserError(f"template {self.name}: slot {empty[0]!r} has no values")
        try:
            self.text.format(**dict.fromkeys(self.slots, ""))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as e:
            raise UserError(f"template {self.name}: its text has a slot without values, or a stray brace: {e}") from e

    def filled(self, index: int) -> dict[str, str]:
        """The values of the slots for text `index`: all combinations come before one comes again."""
        values = {}
        for name, bank in self.slots.items():
            index, at = divmod(index, len(bank))
            values[name] = bank[at]
        return values


def read_templates(path) -> list[Template]:
    """Templates of a JSONL file: {"name", "text"} and optionally "slots", "writes" and "system" a line."""
    found, file = [], storage.path(path)
    if not file.is_file():
        raise UserError(f"no such file of templates: {path}")
    for where, record in readers.records(file):
        try:
            found.append(_template(record))
        except (ValueError, UserError) as e:
            raise UserError(f"{path} {where}: {e}") from None
    return found


def _template(record) -> Template:
    if isinstance(record, ValueError):
        raise record
    fields = {f.name for f in dataclasses.fields(Template)}
    if not isinstance(record, dict) or not {"name", "text"} <= record.keys() <= fields:
        raise UserError('{"name", "text"} is wanted, and of "slots", "writes" and "system" what is needed')
    slots = record.get("slots", {})
    lists = isinstance(slots, dict) and all(isinstance(v, list) for v in slots.values())
    texts = [record["name"], record["text"], record.get("system") or ""]
    texts += [x for values in slots.values() for x in values] if lists else []
    if not lists or not all(isinstance(x, str) for x in texts):
        raise UserError('"name", "text" and "system" are texts, and "slots" has lists of texts by name')
    return Template(**record)


def characters(least: int, most: int) -> Callable[[str, str], bool]:
    """The length of the reply."""
    return lambda request, reply: least <= len(reply) <= most


def letters(least: float = 0.6) -> Callable[[str, str], bool]:
    """At least this share of the reply is letters or white space: not a table, a formula, or noise."""
    return lambda request, reply: sum(c.isalpha() or c.isspace() for c in reply) >= least * len(reply)


def varied(width: int = 4, most: float = 0.5) -> Callable[[str, str], bool]:
    """At most this share of the reply's runs of `width` words has been there before in it: no loops."""

    def passes(request: str, reply: str) -> bool:
        words = reply.split()
        runs = [tuple(words[i : i + width]) for i in range(len(words) - width + 1)]
        return not runs or 1 - len(set(runs)) / len(runs) <= most

    return passes


# Each takes the user's message and the reply.
FILTERS: Mapping[str, Callable[[str, str], bool]] = {
    "not empty": lambda request, reply: bool(request.strip() and reply.strip()),
    "length": characters(2, 4000),
    "no refusal": lambda request, reply: not answers.is_refusal(reply),
    "no echo": lambda request, reply: _plain(request) != _plain(reply),
    "letters": letters(),
    "varied": varied(),
}


def write_conversations(
    ask: Ask,
    templates: Sequence[Template],
    count: int,
    model: str,
    filters: Mapping[str, Callable[[str, str], bool]] = FILTERS,
    sampling: Sampling = WRITING,
    counts: Filtered | None = None,
    fits: Callable[[Conversation], bool] = lambda _: True,
) -> list[Lesson]:
    """Conversations that a model writes: `count` are tried, the templates in turn; those that pass all filters stay.

    "fits" (a prompt that the model has room for), "finished" (a text that ran into the token limit) and "new" (a
    conversation that is there already) always apply.
    The provenance is template, slots, number, model and seed. `lessons.write_lessons` writes them.
    """
    counts = Filtered() if counts is None else counts
    if not templates or count < 1:
        raise UserError("write_conversations needs a template, and a count of at least 1")
    if len({t.name for t in templates}) < len(templates):
        raise UserError("templates need names that are all different")
    turns = [(templates[i % len(templates)], i // len(templates)) for i in range(count)]
    jobs = [(t, number, t.filled(number)) for t, number in turns]
    requests = [t.text.format(**slots) for t, _, slots in jobs]
    fitting, finished = [True] * count, [True] * count

    def have(step: str, prompts: dict[int, Conversation]) -> dict[int, str]:
        for i, prompt in prompts.items():
            fitting[i] &= fits(prompt)
        chosen = [i for i in prompts if fitting[i]]
        ids = [address(step, jobs[i][0].name, jobs[i][1]) for i in chosen]
        replies = ask([prompts[i] for i in chosen], sampling, sample_ids=ids) if chosen else []
        for i, reply in zip(chosen, replies, strict=True):
            finished[i] &= reply.completion.finish_reason == "stop"
        return dict.fromkeys(prompts, "") | {i: r.message.text.strip() for i, r in zip(chosen, replies)}

    asking = [i for i, (t, _, _) in enumerate(jobs) if t.writes == "request"]
    for i, text in have("request", {i: asked(requests[i]) for i in asking}).items():
        requests[i] = text
    prompts = [asked(r, t.system) for r, (t, _, _) in zip(requests, jobs)]
    out, seen = [], set()
    for i, reply in have("reply", dict(enumerate(prompts))).items():
        template, number, slots = jobs[i]
        key = (_plain(requests[i]), _plain(reply))
        always = {
            "fits": lambda *_, i=i: fitting[i],
            "finished": lambda *_, i=i: finished[i],
            **filters,
            "new": lambda *_, key=key: key not in seen,
        }
        if counts.first(always, requests[i], reply) is None:
            seen.add(key)
            source = {"made_by": "write_conversations", "model": model, "template": template.name, "slots": slots}
            source |= {"number": number, "seed": sampling.seed}
            out.append(Lesson(Conversation((*prompts[i].messages, Message("assistant", reply))), source))
    counts.kept += len(out)
    return out
