"""Where conversations come from: chat messages, Alpaca-style instructions, prompts with responses, GSM8K, the world.

A source is a config node; all but `WorldConversations` read JSON lines or Parquet, also .gz and .zst, from a file, a
folder or a glob. `conversations(source)` streams it in a fixed order. A line that cannot be used is counted and left
out, or ends it with file and line when more than `max_bad_fraction` of them cannot.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator

from jaxlm.config import UserError
from jaxlm.data import gsm8k, readers, sources
from jaxlm.data.conversation import Conversation, Message, Part
from jaxlm.data.gsm8k import Calculate
from jaxlm.data.messages import from_messages
from jaxlm.data.prepare import HELDOUT
from jaxlm.data.readers import Rejects
from jaxlm.data.tokenizer import BytesTokenizer, Tokenizer, utf8
from jaxlm.data.world import talk
from jaxlm.data.world.talk import WorldConversations
from jaxlm.tools import calculator

ENDINGS = (*(e + c for e in readers.JSON_ENDINGS for c in ("", *readers.COMPRESSED)), ".parquet")


@dataclasses.dataclass(frozen=True)
class Messages:
    """Chats as OpenAI's fine-tuning format has them, one a line: {"messages": [{"role": ..., "content": ...}, ...]}.

    See `messages.from_messages` for what a message may hold. A list `tools` of functions beside the messages is
    described to the model in the system message. The field names can be set to ShareGPT's: conversations, from, value.
    """

    path: str
    name: str = "messages"
    weight: float = 1.0  # of this source among the others, when batches are mixed
    messages_field: str = "messages"
    role_field: str = "role"
    content_field: str = "content"
    inline_tools: bool = True  # a call's result follows it in the assistant's own turn, as when the model is run
    max_bad_fraction: float = 0.01  # of lines that cannot be used, before it is an error


@dataclasses.dataclass(frozen=True)
class Alpaca:
    """One instruction a line: {"instruction": ..., "input": ..., "output": ...}; the input may be empty or absent.

    Instruction and input are the user's message, with an empty line between them (Taori et al. 2023).
    """

    path: str
    name: str = "alpaca"
    weight: float = 1.0
    system: str | None = None  # a system message for each
    max_bad_fraction: float = 0.01


@dataclasses.dataclass(frozen=True)
class PromptResponse:
    """One question and one answer a line, both strings."""

    path: str
    name: str = "prompts"
    weight: float = 1.0
    prompt_field: str = "prompt"
    response_field: str = "response"
    system: str | None = None
    max_bad_fraction: float = 0.01


@dataclasses.dataclass(frozen=True)
class GSM8K:
    """Grade-school problems with worked answers (Cobbe et al. 2021, arXiv 2110.14168), one a line.

    A mark <<48/2=24>> in an answer becomes a call of the calculator with its result; one that the calculator does not
    bear out is only dropped, so that no call shows a result that it does not have. The last line is `#### answer`.
    """

    path: str
    name: str = "gsm8k"
    weight: float = 1.0
    calculator: bool = True  # False: the marks are dropped, and the model works without a tool
    system: str | None = None
    max_bad_fraction: float = 0.01


@dataclasses.dataclass(frozen=True)
class Thoughts:
    """Text as pretraining reads it, each document a thought of the assistant on the words that it begins with.

    What a model has read it recalls best where it has read it. A few conversations teach it to recall in thoughts what
    they are about; this keeps everything else as near at hand there as in plain text, with nothing asked about it.
    What stands before a question makes it as hard to reach as a question does: hence a cue, and system messages.
    Held-out documents are left out.
    """

    text: sources.Source
    cue: int = 3  # so many first words are the user's message before it; 0: there is none
    systems: tuple[str, ...] = ()  # the documents take turns with each of these before them, and with none
    name: str = "thoughts"
    weight: float = 1.0


FileSource = Messages | Alpaca | PromptResponse | GSM8K
ChatSource = FileSource | WorldConversations | Thoughts


# ---------------------------------------------------------------------------------------------------------- records
def _string(record: dict, field: str, needed: bool = True) -> str:
    value = record.get(field)
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        have = ", ".join(map(str, list(record)[:8])) or "none"
        what = f"field {field!r} is no string" if field in record else f"no field {field!r}"
        raise ValueError(f"{what}; fields there: {have}")
    if needed and not value.strip():
        raise ValueError(f"field {field!r} is empty")
    return value


def _asked(system: str | None, question: str, *answer: Part) -> Conversation:
    first = () if system is None else (Message("system", system),)
    return Conversation((*first, Message("user", question), Message("assistant", answer)))


def _alpaca(source: Alpaca, record: dict) -> Conversation:
    instruction, given = _string(record, "instruction"), _string(record, "input", needed=False)
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    return _asked(source.system, question, Part(_string(record, "output")))


def _prompt_response(source: PromptResponse, record: dict) -> Conversation:
    question = _string(record, source.prompt_field)
    return _asked(source.system, question, Part(_string(record, source.response_field)))


def _messages(source: Messages, record: dict) -> Conversation:
    if source.messages_field not in record:
        have = ", ".join(map(str, list(record)[:8])) or "none"
        raise ValueError(f"no field {source.messages_field!r}; fields there: {have}")
    tools = record.get("tools") or record.get("functions")
    fields = (source.role_field, source.content_field)
    return from_messages(record[source.messages_field], tools, source.inline_tools, *fields)


def _gsm8k(calculate: Calculate, source: GSM8K, record: dict) -> Conversation:
    answer = gsm8k.worked(_string(record, "answer"), calculate if source.calculator else None)
    return _asked(source.system, _string(record, "question"), *answer)


def _thoughts(source: Thoughts, rejects: Rejects) -> Iterator[Conversation]:
    told = (d for d in sources.documents(source.text, rejects) if not d.id.startswith(HELDOUT))
    for document, system in zip(told, itertools.cycle((None, *source.systems))):
        cue = " ".join(document.text.split()[: source.cue])
        before = {"system": system, "user": cue}
        messages = [Message(role, text) for role, text in before.items() if text]
        thought = Message("assistant", (Part(document.text, "thinking"),))
        yield Conversation((*messages, thought), source.name, document.id)


# -------------------------------------------------------------------------------------------------------- the doors
def _files(source: FileSource):
    found = sources.files_of(sources.Files(source.path))
    named = [(name, path) for name, path in found if path.name.lower().endswith(ENDINGS)]
    if not named:
        raise UserError(
            f"{source.path} has no conversations: a chat source reads {' '.join(readers.JSON_ENDINGS)} with one JSON "
            f"object a line (also .gz and .zst) and .parquet, found {', '.join(name for name, _ in found[:3])}"
        )
    return named


def rejects_for(source: ChatSource) -> Rejects:
    """A fresh counter for `conversations`."""
    if isinstance(source, Thoughts):
        return sources.rejects_for(source.text)
    return Rejects(0.0 if isinstance(source, WorldConversations) else source.max_bad_fraction)


def conversations(
    source: ChatSource, rejects: Rejects | None = None, calculate: Calculate = calculator.calculate
) -> Iterator[Conversation]:
    """Streams the conversations of a source, in the same order every time; of the world, those of its training side.

    Args:
      source: a source node.
      rejects: pass `rejects_for(source)` to learn afterwards how many were given and refused.
      calculate: expression -> result, for GSM8K; refuses with `CalculatorError`.

    Raises `UserError` with file and line, as `sources.documents` does.
    """
    rejects = rejects_for(source) if rejects is None else rejects
    if isinstance(source, WorldConversations):
        for made in talk.conversations(source):
            rejects.seen += 1
            yield made
        if not rejects.seen:
            raise UserError(f"source {source.name}: count must be at least 1, got {source.count}")
        return
    if isinstance(source, Thoughts):
        yield from _thoughts(source, rejects)
        return
    makers = {Messages: _messages, Alpaca: _alpaca, PromptResponse: _prompt_response}
    make = {**makers, GSM8K: functools.partial(_gsm8k, calculate)}[type(source)]
    for name, path in _files(source):
        for where, record in readers.records(path):
            try:
                if isinstance(record, ValueError):
                    raise record
                if not isinstance(record, dict):
                    raise ValueError(f"a JSON object is wanted, this is {type(record).__name__}")
                made = make(source, record)
                for message in made.messages:
                    for part in message.parts:
                        utf8(part.text)
            except (ValueError, UserError) as e:
                rejects.add(f"{path} {where}: {e}")
                continue
            rejects.seen += 1
            yield dataclasses.replace(made, source=source.name, id=f"{name}:{where.split()[1]}")
    rejects.judge()
    if rejects.seen == rejects.rejected:
        raise UserError(f"{source.path} is empty: there is no conversation in it")


def fingerprint(source: ChatSource) -> str:
    """Hex SHA-256 of the files and of the fields that decide how they are read; not of name and weight.

    Of the world's conversations, of all that decides them.
    """
    if isinstance(source, WorldConversations):
        return talk.fingerprint(source)
    if isinstance(source, Thoughts):
        return hashlib.sha256(
            f"thoughts {source.cue} {source.systems} {sources.fingerprint(source.text)}".encode()
        ).hexdigest()
    fields = {k: v for k, v in dataclasses.asdict(source).items() if k not in ("name", "weight", "path")}
    digest = hashlib.sha256(repr((type(source).__name__, sorted(fields.items()))).encode())
    for name, path in _files(source):
        digest.update(f"{name}\0{sources.content_hash(path)}\0".encode())
    return digest.hexdigest()


def check_gsm8k(path: str, calculate: Calculate = calculator.calculate, tokenizer: Tokenizer | None = None) -> dict:
    """Whether every problem of a file renders, its calls give what is recorded, and its answer can be verified.

    calculate: as in `conversations`. tokenizer: to render with, bytes by default. Returns counts and the lines of what
    disagrees: see `gsm8k.check`.
    """
    files = _files(GSM8K(path))
    records = ((f"{name}:{where.split()[1]}", record) for name, f in files for where, record in readers.records(f))
    return gsm8k.check(records, calculate, tokenizer or BytesTokenizer())
