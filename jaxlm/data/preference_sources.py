"""Where preferences come from: the feedback store, lines of answers with what is better, Anthropic's HH files."""

import dataclasses

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import readers
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.messages import from_messages, to_messages
from jaxlm.data.readers import Rejects
from jaxlm.data.tokenizer import utf8
from jaxlm.feedback import preferences
from jaxlm.feedback.preferences import Answer, Kept, Preference
from jaxlm.feedback.records import canonical


@dataclasses.dataclass(frozen=True)
class Rankings:
    """What annotators said, in a feedback store or in its export as JSON lines.

    A store may grow: a run that is to be resumed while somebody ranks reads an export.
    """

    path: str
    name: str = "rankings"
    weight: float = 1.0  # of this source among the others, when batches are mixed
    annotators: tuple[str, ...] | None = None  # unset: all of them
    criterion: str | None = None  # ratings by this criterion in place of the rankings


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """JSON lines: {"prompt", "chosen", "rejected"}, or {"prompt", "answers": [...], "ranks": [...]} with 0 the best.

    A prompt is text or a list of messages, also under "messages"; an answer is text, a message, or a list of messages
    of which the last is the answer and the others go on from the prompt (all answers alike). `as_text`: prompts and
    answers are texts, and an answer goes on with its prompt as pretraining saw a document.
    """

    path: str
    name: str = "comparisons"
    weight: float = 1.0
    max_bad_fraction: float = 0.01  # of lines that cannot be used, before it is an error
    as_text: bool = False


@dataclasses.dataclass(frozen=True)
class HH:
    """Pairs of dialogues as Anthropic published them (Bai et al. 2022, arXiv 2204.05862), JSON lines, also .gz."""

    path: str
    name: str = "hh"
    weight: float = 1.0


PreferenceSource = Rankings | Comparisons | HH


# ------------------------------------------------------------------------------------------------------ comparisons
def _messages(value, role: str) -> tuple[Message, ...]:
    """Text by `role`, one message, or several."""
    if isinstance(value, str):
        return (Message(role, value),)
    return from_messages(value if isinstance(value, list) else [value]).messages


def _comparison(record, source: Comparisons) -> Preference:
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is wanted, this is {type(record).__name__}")
    if "answers" in record:
        given, ranks = record["answers"], record.get("ranks")
        if not isinstance(given, list) or not isinstance(ranks, list) or not all(type(r) is int for r in ranks):
            raise ValueError("'answers' and 'ranks' must be lists, of answers and of whole numbers")
        if len(given) < 2 or len(given) != len(ranks):
            raise ValueError(f"{len(given)} answers with {len(ranks)} ranks; two or more are wanted, and as many ranks")
        if not all(0 <= r < 1 << 31 for r in ranks):
            raise ValueError(f"'ranks' count from 0, the best, got {min(ranks)} to {max(ranks)}")
    elif {"chosen", "rejected"} <= record.keys():
        given, ranks = [record["chosen"], record["rejected"]], [0, 1]
    else:
        have = ", ".join(map(str, list(record)[:8])) or "none"
        raise ValueError(f"'chosen' and 'rejected', or 'answers' and 'ranks', are wanted; fields there: {have}")
    if source.as_text:
        texts = [record.get("prompt"), *given]
        if not all(isinstance(t, str) and t for t in texts):
            raise ValueError("with as_text, the prompt and its answers must be texts that are not empty")
        answers = tuple(Answer(Message("assistant", t)) for t in given)
        return Preference(record["prompt"], answers, tuple(ranks), source.name)
    asked = record.get("prompt", record.get("messages"))
    opening = () if asked is None else _messages(asked, "user")
    ended = [_messages(a, "assistant") for a in given]
    if any(not e or e[-1].role != "assistant" for e in ended):
        raise ValueError("an answer is the assistant's")
    if any(e[:-1] != ended[0][:-1] for e in ended):
        raise ValueError("the answers do not follow the same messages")
    prompt = Conversation((*opening, *ended[0][:-1]))
    if not prompt.messages or prompt.messages[-1].role == "assistant":
        raise ValueError("a prompt ends before the assistant's turn, and there must be one")
    for message in (*prompt.messages, *(e[-1] for e in ended)):
        for part in message.parts:
            utf8(part.text)
    return Preference(prompt, tuple(Answer(e[-1]) for e in ended), tuple(ranks), source.name)


def _comparisons(source: Comparisons) -> list[Preference]:
    file, rejects, out = storage.path(source.path), Rejects(source.max_bad_fraction), []
    if not file.is_file():
        raise UserError(f"no such file of comparisons: {source.path}")
    for where, record in readers.records(file):
        try:
            if isinstance(record, ValueError):
                raise record
            out.append(_comparison(record, source))
        except (ValueError, UserError) as e:
            rejects.add(f"{source.path} {where}: {e}")
            continue
        rejects.seen += 1
    rejects.judge()
    if not out:
        raise UserError(f"{source.path} is empty: there is no comparison in it")
    return out


# -------------------------------------------------------------------------------------------------------- the doors
def read(source: PreferenceSource) -> list[Preference]:
    """Every preference of a source, in a fixed order; `UserError` for a file that cannot be read, or holds none."""
    if isinstance(source, Comparisons):
        return _comparisons(source)
    if isinstance(source, HH):
        return preferences.read_hh(source.path)
    return preferences.load(source.path, source.annotators, source.criterion)


def split(source: PreferenceSource, found: list[Preference], valid_fraction: float):
    """(train, valid): by the prompt's hash, so that all that was ever said of a prompt is on one side.

    HH's dialogues go on from one another, and are split by how they begin.
    """
    key = preferences.opening_hash if isinstance(source, HH) else preferences.prompt_hash
    return preferences.split(found, valid_fraction, key=key)


def fingerprint(found: list[Preference]) -> str:
    """Hex SHA-256 of what training reads of these preferences: a database's file is never twice the same."""
    lines = (
        canonical(
            [
                p.prompt if isinstance(p.prompt, str) else to_messages(p.prompt),
                [[to_messages(Conversation((a.message,))), a.tokens, a.sampled, a.tokenizer] for a in p.answers],
                p.ranks,
            ]
        )
        for p in found
    )
    return storage.sha256_text("\n".join(lines))


__all__ = ["HH", "Comparisons", "Kept", "PreferenceSource", "Rankings", "fingerprint", "read", "split"]
