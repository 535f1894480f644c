"""Conversations to token ids and back: the one place that decides their structure and what in them is trained on.

A conversation is `<|start|>`, then for each turn `<|im_start|>role<|im_sep|>body<|im_end|>`. A body is text; the
assistant's may also hold thinking, tool calls and their results, each between its two control symbols. Control ids are
put in as ids, and no tokenizer makes one out of text: no field, whatever it says, changes the structure.

What is trained on: the body and the closing id of each turn whose role is in `train_on`, except tool results with their
two symbols, which the tool wrote; never a header. `loss_mask` says it, from ids alone.

Over-long conversations are cut between turns, never inside one:
- for training, the longest beginning that fits and ends with a turn that is trained on stays: every token of it is
  trained on after exactly what came before it. When not even the first such turn fits, the conversation is refused.
- for a prompt, the leading system messages and the latest exchanges stay, and the oldest exchanges go. An exchange
  begins where a user or system message follows an assistant's or a tool's. The last one is never dropped.

Legend: T tokens of one conversation. Nothing here imports jax: packing workers start fast.
"""

import bisect
import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant", "tool"]
Kind = Literal["text", "thinking", "tool_call", "tool_result"]
ROLES, KINDS = get_args(Role), get_args(Kind)
TRAINABLE = ("system", "user", "assistant")  # a tool's words are never the model's own
START, SEP, END = "<|im_start|>", "<|im_sep|>", "<|im_end|>"
MARKS = {
    "thinking": ("<think>", "</think>"),
    "tool_call": ("<|tool_call|>", "<|tool_call_end|>"),
    "tool_result": ("<|tool_result|>", "<|tool_result_end|>"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A stretch of one kind in a message.

    ids: how exactly the text is tokenized, where that is known (`parse` fills it in): what was sampled is rendered as
    it was sampled, not encoded anew. Two parts with the same text are equal whatever their ids.
    """

    text: str
    kind: Kind = "text"
    ids: tuple[int, ...] | None = dataclasses.field(default=None, compare=False, repr=False)
    # Of a thought or a call: how many of its first characters are trained on, unset all, and whether its end is. Ids do
    # not carry it.
    trained: int | None = dataclasses.field(default=None, repr=False)
    end_trained: bool = dataclasses.field(default=True, repr=False)


def tool_call(name: str, argument: str) -> Part:
    """A call: the tool's name, a newline, and the argument just as it is, without escapes for a model to get wrong.

    A tool with several arguments takes a JSON object.
    """
    if not name or "\n" in name:
        raise UserError(f"the name of a tool must be one line that is not empty, got {name!r}")
    return Part(f"{name}\n{argument}", "tool_call")


def read_call(text: str) -> tuple[str, str]:
    """(name, argument) of a call's text; a model may also have written a name alone."""
    name, _, argument = text.partition("\n")
    return name, argument


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. `parts` is also given as a string. Neighbouring texts become one, and empty texts none."""

    role: Role
    parts: tuple[Part, ...]
    trained: bool = True  # False: context only, whatever roles are trained on. Ids do not carry it.

    def __post_init__(self):
        if self.role not in ROLES:
            raise UserError(f"unknown role {self.role!r}; valid: {', '.join(ROLES)}")
        given = (Part(self.parts),) if isinstance(self.parts, str) else tuple(self.parts)
        merged: list[Part] = []
        for part in given:
            if part.kind not in KINDS:
                raise UserError(f"unknown kind of part {part.kind!r}; valid: {', '.join(KINDS)}")
            if part.kind != "text" and self.role != "assistant":
                raise UserError(f"a {self.role} message holds text only, not {part.kind}")
            if part.kind != "text" or not merged or merged[-1].kind != "text":
                merged.append(part)
            else:
                known = merged[-1].ids is not None and part.ids is not None
                merged[-1] = Part(merged[-1].text + part.text, ids=merged[-1].ids + part.ids if known else None)
        object.__setattr__(self, "parts", tuple(p for p in merged if p.text or p.kind != "text"))

    @property
    def text(self) -> str:
        """What a reader is meant to see: without thinking, calls and results."""
        return "".join(p.text for p in self.parts if p.kind == "text")


@dataclasses.dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    source: str = dataclasses.field(default="", compare=False)  # where it comes from, as in `Document`
    id: str = dataclasses.field(default="", compare=False)

    def __post_init__(self):
        object.__setattr__(self, "messages", tuple(self.messages))


def without_ids(conversation: Conversation) -> Conversation:
    """The same, to be encoded anew: for another tokenizer than the one that the parts' ids are from."""
    messages = (
        dataclasses.replace(m, parts=tuple(Part(p.text, p.kind) for p in m.parts)) for m in conversation.messages
    )
    return dataclasses.replace(conversation, messages=tuple(messages))


class TooLong(UserError):
    """Nothing of a conversation that ends with a turn to train on fits."""


# ---------------------------------------------------------------------------------------------------------- to ids
def _control(tokenizer: Tokenizer) -> dict[str, int]:
    wanted = (START, SEP, END, *(s for pair in MARKS.values() for s in pair))
    missing = [s for s in wanted if s not in tokenizer.control]
    if missing:
        raise UserError(
            f"this tokenizer ({tokenizer.kind}) has no control symbol {missing[0]}, so it cannot render conversations; "
            "a Hugging Face tokenizer has its own chat template"
        )
    return tokenizer.control


_ROLE_IDS: weakref.WeakKeyDictionary[Tokenizer, dict[str, list[int]]] = weakref.WeakKeyDictionary()


def _role_ids(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Every header; they are encoded once, as they are in each turn."""
    if tokenizer not in _ROLE_IDS:
        _ROLE_IDS[tokenizer] = dict(zip(ROLES, tokenizer.encode_batch(ROLES)))
    return _ROLE_IDS[tokenizer]


def _known_ids(part: Part, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that a part carries, unless they would break the structure or are another tokenizer's."""
    outside = [i for i in part.ids if not 0 <= i < tokenizer.vocab_size or i in tokenizer.control.values()]
    if outside or tokenizer.decode(part.ids) != part.text:
        why = f"id {outside[0]} is a control symbol or outside the vocabulary" if outside else "they spell another text"
        raise UserError(
            f"a {part.kind} part's ids are not this tokenizer's ({why}): use without_ids; text: {part.text[:40]!r}"
        )
    return part.ids


def _turns(messages: Sequence[Message], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of each message, from `<|im_start|>` to `<|im_end|>`."""
    control, headers = _control(tokenizer), _role_ids(tokenizer)
    bodies = iter(tokenizer.encode_batch([p.text for m in messages for p in m.parts if p.ids is None]))
    out = []
    for message in messages:
        ids = [control[START], *headers[message.role], control[SEP]]
        for part in message.parts:
            body = next(bodies) if part.ids is None else _known_ids(part, tokenizer)
            around = [[control[s]] for s in MARKS[part.kind]] if part.kind in MARKS else [[], []]
            ids += [*around[0], *body, *around[1]]
        out.append([*ids, control[END]])
    return out


def _begin(tokenizer: Tokenizer) -> list[int]:
    """Every document begins so in pretraining."""
    return [] if tokenizer.bos is None else [tokenizer.bos]


def _is_trained(message: Message, train_on: Sequence[str]) -> bool:
    return message.trained and message.role in train_on


def _check_roles(train_on: Sequence[str]) -> None:
    if wrong := [r for r in train_on if r not in TRAINABLE]:
        why = "a tool's results are never trained on" if wrong[0] == "tool" else f"valid: {', '.join(TRAINABLE)}"
        raise UserError(f"train_on cannot hold {wrong[0]!r}; {why}")


def _fitting(conversation: Conversation, lengths: list[int], limit: int, train_on: Sequence[str]) -> int:
    """How many messages a training row of `limit` tokens keeps; `lengths`: tokens up to the end of each."""
    count = len(lengths)
    if not count or lengths[-1] <= limit:
        return count
    ends = [i for i, m in enumerate(conversation.messages) if _is_trained(m, train_on)]
    fitting = [i + 1 for i in ends if lengths[i] <= limit]
    if not fitting:
        shortest = f"at least {lengths[ends[0]]} tokens are needed" if ends else "none of its turns is trained on"
        name = f"{conversation.source} {conversation.id}".strip() or "conversation"
        raise TooLong(f"{name}: {lengths[-1]} tokens, and no beginning of it fits into {limit} ({shortest})")
    return fitting[-1]


def _render(conversation, tokenizer, train_on, limit) -> tuple[dict[str, np.ndarray], int]:
    """(fields, number of messages kept)"""
    _check_roles(train_on)
    turns, ids = _turns(conversation.messages, tokenizer), _begin(tokenizer)
    lengths = list(np.cumsum([len(t) for t in turns], dtype=int) + len(ids))
    kept = len(turns) if limit is None else _fitting(conversation, lengths, limit, train_on)
    tokens = np.array([*ids, *(i for turn in turns[:kept] for i in turn)], np.int32)
    return {
        "tokens": tokens,
        "positions": np.arange(len(tokens), dtype=np.int32),
        "segments": np.ones(len(tokens), np.int32),
        "loss_mask": loss_mask(tokens, tokenizer, train_on, conversation.messages),
    }, kept


def render(
    conversation: Conversation,
    tokenizer: Tokenizer,
    train_on: Sequence[str] = ("assistant",),
    limit: int | None = None,
) -> dict[str, np.ndarray]:
    """The fields of `Trajectory` for one conversation: tokens, positions, segments int32 [T] and loss_mask bool [T].

    Args:
      train_on: roles whose turns are trained on, of system, user and assistant.
      limit: most tokens; a longer conversation is cut by the rule above.

    Raises `TooLong` when nothing of it fits, and `UserError` for text that the tokenizer cannot encode.
    """
    return _render(conversation, tokenizer, train_on, limit)[0]


@dataclasses.dataclass
class Rendered:
    """Counts what `render_each` gave and what it left out."""

    conversations: int = 0  # given
    tokens: int = 0
    trained: int = 0  # tokens that the loss counts
    cut: int = 0  # given without their last messages
    messages_cut: int = 0
    too_long: int = 0  # left out: no turn to train on fits
    untrained: int = 0  # left out: nothing in it is trained on
    examples: list[str] = dataclasses.field(default_factory=list)  # the first five that were too long


def render_each(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    limit: int,
    train_on: Sequence[str] = ("assistant",),
    counts: Rendered | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """`render` of each conversation that has something to train on and fits, in order; the rest is counted."""
    _check_roles(train_on)
    counts = Rendered() if counts is None else counts
    for conversation in conversations:
        if not any(_is_trained(m, train_on) for m in conversation.messages):
            counts.untrained += 1
            continue
        try:
            fields, kept = _render(conversation, tokenizer, train_on, limit)
        except TooLong as e:
            counts.too_long += 1
            if len(counts.examples) < 5:
                counts.examples.append(str(e))
            continue
        counts.conversations += 1
        counts.tokens += len(fields["tokens"])
        counts.trained += int(fields["loss_mask"].sum())
        counts.cut += kept < len(conversation.messages)
        counts.messages_cut += len(conversation.messages) - kept
        yield fields


def _exchanges(messages: Sequence[Message]) -> tuple[int, list[int]]:
    """(number of leading system messages, where each exchange after them begins)."""
    head = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    asks = [m.role in ("system", "user") for m in messages]
    return head, [i for i in range(head, len(messages)) if i == head or (asks[i] and not asks[i - 1])]


def prompt_ids(
    conversation: Conversation, tokenizer: Tokenizer, limit: int | None = None, continue_last: bool = False
) -> list[int]:
    """Ids that end with an opened assistant turn, for generation.

    Args:
      limit: most tokens; the oldest exchanges of a longer conversation are dropped by the rule above.
      continue_last: the last message, an assistant's, is that turn; otherwise a new one is opened.

    Raises `UserError` when the system messages and the last exchange alone are longer than `limit`, and when the last
    message is an assistant's without `continue_last`, or the reverse.
    """
    messages = conversation.messages
    answered = bool(messages) and messages[-1].role == "assistant"
    if answered != continue_last:
        what = "is the assistant's own: continue_last goes on with it" if answered else "is not the assistant's"
        raise UserError(f"no prompt to {'answer' if answered else 'continue'}: the last message {what}")
    turns = _turns([*messages, *([] if continue_last else [Message("assistant", "")])], tokenizer)
    turns[-1].pop()  # leave it open
    head, begins = _exchanges(messages)
    start = [i for turn in (_begin(tokenizer), *turns[:head]) for i in turn]
    # A new turn belongs to the last exchange; without any exchange it stands alone.
    for begin in begins or [head]:
        ids = start + [i for turn in turns[begin:] for i in turn]
        if limit is None or len(ids) <= limit:
            return ids
    raise UserError(f"the prompt has {len(ids)} tokens even without its older exchanges, and {limit} fit")


# -------------------------------------------------------------------------------------------------------- from ids
class _Span(NamedTuple):
    """Where a turn stands among the ids: its body is [body, end), and `end` is its closing id."""

    role: str
    body: int
    end: int
    parts: list[tuple[str, int, int]]  # kind, [begin, end) without the two symbols


def _spans(ids: np.ndarray, tokenizer: Tokenizer, unfinished: bool) -> list[_Span]:
    control = _control(tokenizer)
    names = {i: name for name, i in control.items()}
    opening = {control[pair[0]]: (kind, control[pair[1]]) for kind, pair in MARKS.items()}
    places = iter(np.flatnonzero(np.isin(ids, list(names))).tolist())
    at, spans, size = len(_begin(tokenizer)), [], len(ids)

    def fault(place, wanted):
        found = "the end" if place >= size else names.get(int(ids[place]), f"id {int(ids[place])}")
        return UserError(f"not a conversation: {wanted} is wanted at token {place}, found {found}")

    def following() -> int:
        return next(places, size)

    if at and (not size or following() or ids[0] != tokenizer.bos):
        raise fault(0, names.get(tokenizer.bos, "the start token"))
    while at < size:
        if (place := following()) != at or ids[at] != control[START]:
            raise fault(at, START)
        sep = following()
        if sep == size or ids[sep] != control[SEP]:
            raise fault(sep, SEP)
        header = ids[at + 1 : sep].tolist()
        role = next((r for r, role_ids in _role_ids(tokenizer).items() if role_ids == header), None)
        if role is None:
            raise UserError(f"not a conversation: unknown role {tokenizer.decode(header)!r} at token {at + 1}")
        at, parts = sep + 1, []
        while True:
            place = following()
            if at < place:
                parts.append(("text", at, place))
            if place < size and ids[place] == control[END]:
                break
            if place == size and unfinished:
                break
            if place == size or role != "assistant" or ids[place] not in opening:
                raise fault(place, END)
            kind, closing = opening[int(ids[place])]
            close = following()
            if not (close == size and unfinished) and (close == size or ids[close] != closing):
                raise fault(close, MARKS[kind][1])
            parts.append((kind, place + 1, close))
            at = min(close + 1, size)
        spans.append(_Span(role, sep + 1, place, parts))
        at = place + 1
    return spans


def loss_mask(
    ids: Sequence[int] | np.ndarray,
    tokenizer: Tokenizer,
    train_on: Sequence[str] = ("assistant",),
    messages: Sequence[Message] | None = None,
    unfinished: bool = False,
) -> np.ndarray:
    """bool [T]: which ids of a rendered conversation are trained on, from their structure.

    messages: those that the ids are of, or more: they say what of them is not to be trained on. Unset, all may be.
    unfinished: the last turn may be open.
    """
    _check_roles(train_on)
    mask = np.zeros(len(ids), bool)
    for i, span in enumerate(_spans(np.asarray(ids), tokenizer, unfinished)):
        if span.role in train_on and (messages is None or messages[i].trained):
            mask[span.body : span.end + 1] = True
            for j, (kind, begin, end) in enumerate(span.parts):
                if kind == "tool_result":
                    mask[begin - 1 : end + 1] = False
                elif kind in MARKS and messages is not None:
                    part = messages[i].parts[j]
                    mask[end] &= part.end_trained
                    if part.trained is not None:
                        mask[begin + _within(ids[begin:end], part.trained, tokenizer) : end] = False
    return mask


def _within(ids, characters: int, tokenizer: Tokenizer) -> int:
    """How many of the first ids say no more than so many characters."""
    said = range(len(ids) + 1)
    return bisect.bisect_right(said, characters, key=lambda n: len(tokenizer.decode([int(i) for i in ids[:n]]))) - 1


def _part(ids, tokenizer: Tokenizer, kind: Kind = "text") -> Part:
    ids = tuple(int(i) for i in ids)
    return Part(tokenizer.decode(ids), kind, ids)


def parse(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer, unfinished: bool = False) -> Conversation:
    """The conversation that these ids are, by its control ids alone; rendering it again gives the same ids.

    unfinished: the last turn may be open, as in a prompt. Raises `UserError` with the place for anything else that
    `render` does not write.
    """
    ids = np.asarray(ids, np.int64)
    return Conversation(
        tuple(
            Message(span.role, tuple(_part(ids[begin:end], tokenizer, kind) for kind, begin, end in span.parts))
            for span in _spans(ids, tokenizer, unfinished)
        )
    )


def read_completion(ids: Iterable[int], tokenizer: Tokenizer) -> Message:
    """The assistant's message out of the ids that a model wrote after `prompt_ids`, whatever they are.

    It ends at the first control id that no body holds (`<|im_end|>`, `<|end|>`). A stretch that was not closed ends
    where the next one opens, or with the ids; a closing symbol without its opening one is passed over.
    """
    control = _control(tokenizer)
    opening = {control[pair[0]]: kind for kind, pair in MARKS.items()}
    closing = {control[pair[1]]: kind for kind, pair in MARKS.items()}
    others = set(control.values()) - opening.keys() - closing.keys()
    parts, kind, held = [], "text", []
    for i in [*map(int, ids), control[END]]:
        ends = i in others
        if ends or i in opening or closing.get(i) == kind:
            if held or kind != "text":
                parts.append(_part(held, tokenizer, kind))
            kind, held = opening.get(i, "text"), []
            if ends:
                break
        elif i not in closing:
            held.append(i)
    return Message("assistant", tuple(parts))
