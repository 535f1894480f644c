"""What feedback is made of: prompts, responses and what people and programs say of them, each one JSON object.

A record's id is the hash of what it holds, so that the same record has the same id in every store. The time belongs to
what a judgment is, and not to what a response is: sampled again, it is the same one. Nothing here imports jax.
"""

import collections
import dataclasses
import datetime
import json
import math
from collections.abc import Sequence

from jaxlm import storage
from jaxlm.config import UserError, nearest
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.messages import from_messages, to_messages
from jaxlm.data.tokenizer import utf8

SCHEMA_VERSION = 1
ID_LENGTH = 32  # hex digits, 128 bits


def now() -> str:
    """UTC, to the microsecond."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise UserError(what)


def _named(kind: str, name: str) -> None:
    _require(isinstance(name, str) and bool(name.strip()), f"a {kind} needs a name, got {name!r}")


def _answers(kind: str, message: Message) -> None:
    _require(message.role == "assistant", f"a {kind} is an assistant's message, this is a {message.role}'s")


def _distinct(ids: Sequence[str], where: str) -> None:
    if twice := [i for i, n in collections.Counter(ids).items() if n > 1]:
        raise UserError(f"{where} holds {twice[0]} more than once")


def _floats(record, name: str, value):
    """Sets a field to floats: 6 and 6.0 are one value, and must have one id."""
    value = tuple(map(float, value)) if isinstance(value, tuple) else float(value)
    object.__setattr__(record, name, value)
    return value


@dataclasses.dataclass(frozen=True)
class Policy:
    """The checkpoint that a response was sampled from; `hash` is its manifest's."""

    workdir: str
    step: int
    hash: str

    @property
    def name(self) -> str:
        return f"{self.workdir}@{self.step}"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation that the assistant is to answer. metadata: plain JSON, what a scorer needs, such as the answer."""

    conversation: Conversation
    metadata: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        messages = self.conversation.messages
        _require(bool(messages) and messages[-1].role != "assistant", "a prompt must end before the assistant's turn")


@dataclasses.dataclass(frozen=True)
class Response:
    """An answer to a prompt (its id). Without `policy` nobody knows what it was sampled from, such as in a data set.

    tokens, logprobs, sampled: as in `Completion`, of the tokenizer with this hash; all four or none are there.
    sampling: the fields of `Sampling` and the sample id.
    """

    prompt: str
    message: Message
    tokens: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    sampled: tuple[bool, ...] | None = None
    tokenizer: str | None = None
    policy: Policy | None = None
    sampling: dict = dataclasses.field(default_factory=dict)
    finish_reason: str | None = None
    time: str = dataclasses.field(default_factory=now)

    def __post_init__(self):
        _answers("response", self.message)
        given = [x is not None for x in (self.tokens, self.logprobs, self.sampled, self.tokenizer)]
        _require(all(given) or not any(given), "tokens, logprobs, sampled and tokenizer belong together: all or none")
        if self.tokens is not None:
            sizes = len(self.tokens), len(self.logprobs), len(self.sampled)
            _require(
                len(set(sizes)) == 1,
                f"{sizes[0]} tokens with {sizes[1]} logprobs and {sizes[2]} marks in sampled: as many are needed",
            )
            _floats(self, "logprobs", self.logprobs)
            _require(all(map(math.isfinite, self.logprobs)), "the logprobs of a response must be finite")

    @property
    def text(self) -> str:
        return self.message.text


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Responses of a prompt from best to worst; those in one tier are tied. shown: the ids that were to be ranked.

    annotator: who ranked, a person or a program. details: plain JSON, such as a judge's probabilities or gold scores.
    """

    prompt: str
    shown: tuple[str, ...]
    tiers: tuple[tuple[str, ...], ...]
    annotator: str
    details: dict = dataclasses.field(default_factory=dict)
    time: str = dataclasses.field(default_factory=now)

    def __post_init__(self):
        _named("annotator", self.annotator)
        _distinct(self.shown, "what was shown")
        ranked = [i for tier in self.tiers for i in tier]
        _distinct(ranked, "the ranking")
        _require(len(self.shown) >= 2, f"a ranking needs at least two responses, got {len(self.shown)}")
        _require(all(self.tiers), "a tier of a ranking is empty")
        if missing := [i for i in self.shown if i not in ranked]:
            raise UserError(f"the ranking lacks {', '.join(missing)}")
        if unknown := [i for i in ranked if i not in self.shown]:
            raise UserError(f"the ranking holds {unknown[0]}, which was not shown")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The tier of each response in `shown`, 0 the best."""
        place = {i: n for n, tier in enumerate(self.tiers) for i in tier}
        return tuple(place[i] for i in self.shown)


@dataclasses.dataclass(frozen=True)
class Rating:
    """How a response does by one criterion, such as helpful, accurate or safe, from scale[0] (worst) to scale[1]."""

    response: str
    criterion: str
    value: float
    scale: tuple[float, float]
    annotator: str
    time: str = dataclasses.field(default_factory=now)

    def __post_init__(self):
        _named("annotator", self.annotator)
        _named("criterion", self.criterion)
        _require(
            len(self.scale) == 2 and all(map(math.isfinite, self.scale)) and self.scale[0] < self.scale[1],
            f"a scale is two numbers, the lower first, got {self.scale}",
        )
        low, high = _floats(self, "scale", self.scale)
        _floats(self, "value", self.value)
        _require(low <= self.value <= high, f"{self.criterion} must be from {low:g} to {high:g}, got {self.value:g}")


@dataclasses.dataclass(frozen=True)
class Alternative:
    """An answer that the annotator wrote because it is better than the responses `better_than`."""

    prompt: str
    message: Message
    better_than: tuple[str, ...]
    annotator: str
    time: str = dataclasses.field(default_factory=now)

    def __post_init__(self):
        _named("annotator", self.annotator)
        _answers("written alternative", self.message)
        _require(bool(self.message.text.strip()), "a written alternative is empty")
        _require(bool(self.better_than), "a written alternative must be better than something")
        _distinct(self.better_than, "better_than")


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """An answer that the annotator wrote to show how it is done."""

    prompt: str
    message: Message
    annotator: str
    time: str = dataclasses.field(default_factory=now)

    def __post_init__(self):
        _named("annotator", self.annotator)
        _answers("demonstration", self.message)
        _require(bool(self.message.text.strip()), "a demonstration is empty")


@dataclasses.dataclass(frozen=True)
class Retraction:
    """A judgment (its id) no longer holds. It stays in the store, and nobody reads it any more."""

    of: str
    annotator: str
    time: str = dataclasses.field(default_factory=now)

    def __post_init__(self):
        _named("annotator", self.annotator)


Judgment = Ranking | Rating | Alternative | Demonstration
Record = Prompt | Response | Judgment | Retraction
KINDS: dict[str, type] = {
    c.__name__.lower(): c for c in (Prompt, Response, Ranking, Rating, Alternative, Demonstration, Retraction)
}
JUDGMENTS = tuple(k for k, c in KINDS.items() if issubclass(c, Judgment))


# ------------------------------------------------------------------------------------------------------------ as JSON
def canonical(value) -> str:
    """JSON that is the same for the same value; `UserError` for what JSON or UTF-8 cannot hold."""
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as e:
        raise UserError(f"a record must be plain JSON: {e}") from None
    utf8(text)
    return text


def conversation_hash(conversation: Conversation) -> str:
    """What tells a prompt from others, whatever is known about it."""
    return storage.sha256_text(canonical(to_messages(conversation)))[:ID_LENGTH]


def kind_of(record: Record) -> str:
    return type(record).__name__.lower()


def _plain(value):
    if isinstance(value, Conversation):
        return to_messages(value)
    if isinstance(value, Message):
        return to_messages(Conversation((value,)))[0]
    if isinstance(value, Policy):
        return dataclasses.asdict(value)
    return value


def body(record: Record) -> dict:
    """The fields as plain JSON."""
    return {f.name: _plain(getattr(record, f.name)) for f in dataclasses.fields(record)}


def record_id(record: Record) -> str:
    content = body(record)
    if isinstance(record, Response):
        content.pop("time")
    return storage.sha256_text(f"{kind_of(record)}\0{canonical(content)}")[:ID_LENGTH]


def to_line(record: Record) -> str:
    """One line of JSON that `from_object` reads back."""
    return canonical(
        {"schema_version": SCHEMA_VERSION, "kind": kind_of(record), "id": record_id(record), **body(record)}
    )


def _tuple_of(kind: type):
    def read(value):
        wanted = isinstance(value, list) and all(type(x) is kind or (kind is float and type(x) is int) for x in value)
        _require(wanted, f"a list of {kind.__name__} is wanted, got {str(value)[:40]}")
        return tuple(map(kind, value))

    return read


def _one(kind: type):
    def read(value):
        _require(
            type(value) is kind or (kind is float and type(value) is int), f"{kind.__name__} is wanted, got {value!r}"
        )
        return kind(value)

    return read


def _optional(read):
    return lambda value: None if value is None else read(value)


def _messages(value) -> Conversation:
    try:
        return from_messages(value)
    except ValueError as e:
        raise UserError(str(e)) from None


def _message(value) -> Message:
    (message,) = _messages([value]).messages
    return message


def _policy(value) -> Policy:
    _require(
        isinstance(value, dict) and value.keys() == {"workdir", "step", "hash"}, "a policy has workdir, step, hash"
    )
    return Policy(_one(str)(value["workdir"]), _one(int)(value["step"]), _one(str)(value["hash"]))


def _tiers(value) -> tuple[tuple[str, ...], ...]:
    _require(isinstance(value, list), "tiers must be a list of lists of ids")
    return tuple(map(_tuple_of(str), value))


_FIELDS = {
    "conversation": _messages, "metadata": _one(dict), "message": _message, "tokens": _optional(_tuple_of(int)),
    "logprobs": _optional(_tuple_of(float)), "sampled": _optional(_tuple_of(bool)), "tokenizer": _optional(_one(str)),
    "policy": _optional(_policy), "sampling": _one(dict), "finish_reason": _optional(_one(str)),
    "shown": _tuple_of(str), "tiers": _tiers, "details": _one(dict), "value": _one(float), "scale": _tuple_of(float),
    "better_than": _tuple_of(str),
}  # fmt: skip


def from_body(kind: str, content: dict) -> Record:
    """The record with these fields, as `body` gives them."""
    _require(kind in KINDS, f"unknown kind {kind!r}; {nearest(str(kind), KINDS)}")
    names = [f.name for f in dataclasses.fields(KINDS[kind])]
    if missing := [n for n in names if n not in content]:
        raise UserError(f"this {kind} has no field {missing[0]!r}")
    if unknown := [n for n in content if n not in names]:
        raise UserError(f"a {kind} has no field {unknown[0]!r}; {nearest(unknown[0], names)}")
    values = {}
    for name in names:
        try:
            values[name] = _FIELDS.get(name, _one(str))(content[name])
        except UserError as e:
            raise UserError(f"field {name!r}: {e}") from None
    return KINDS[kind](**values)


def from_object(value) -> Record:
    """The record of a line; `UserError` says what is wrong with it, also when its id is not that of what it holds."""
    _require(isinstance(value, dict), f"a JSON object is wanted, this is {type(value).__name__}")
    content = dict(value)
    version, kind, given = (content.pop(name, None) for name in ("schema_version", "kind", "id"))
    _require(version == SCHEMA_VERSION, f"schema_version {SCHEMA_VERSION} is wanted, got {version!r}")
    record = from_body(kind, content)
    found = record_id(record)
    _require(given == found, f"the id {given!r} is not that of what the record holds, {found}")
    return record
