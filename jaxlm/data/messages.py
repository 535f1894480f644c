"""Conversations as chat APIs and data sets write them: lists of messages with tool calls, there and back."""

import json

from jaxlm.data.conversation import MARKS, Conversation, Message, Part, tool_call

_ROLES = {"developer": "system", "human": "user", "gpt": "assistant", "model": "assistant", "function": "tool"}


def _content(content, field: str = "content") -> tuple[Part, ...]:
    """A string, None, or a list of {"type": "text", "text": ...} and what `to_messages` writes."""
    if content is None or isinstance(content, str):
        return (Part(content or ""),)
    parts = []
    for item in content if isinstance(content, list) else [content]:
        kind = item.get("type") if isinstance(item, dict) else type(item).__name__
        if kind not in ("text", *MARKS) or not isinstance(item.get("text"), str):
            raise ValueError(f"{field!r} holds {kind}; a string or parts of text are wanted")
        parts.append(Part(item["text"], kind))
    return tuple(parts)


def _call(call) -> tuple[str | None, Part]:
    """(id, part) of one entry of `tool_calls`, or of the older `function_call`."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise ValueError("a tool call without a function's name")
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call.get("id"), tool_call(name, arguments)


def describe_tools(tools: list) -> str:
    """The text that tells a model its tools: a line of JSON for each, name, description and parameters as given."""
    if not isinstance(tools, list):
        raise ValueError("'tools' is no list")
    functions = [t.get("function", t) if isinstance(t, dict) else t for t in tools]
    if not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions):
        raise ValueError("'tools' must hold functions, each with a name")
    return "Tools:\n" + "\n".join(json.dumps(f, ensure_ascii=False) for f in functions)


class _Turns:
    """Puts results behind their calls, and what the assistant says next into the same turn."""

    def __init__(self, inline: bool):
        self.out: list[Message] = []
        self._inline = inline
        self._pending: list[tuple[str | None, int]] = []  # calls without a result: id, place in `_parts`
        self._parts: list[list[Part]] = []  # of the assistant's turn that has calls, each with what follows it
        self._trained = True

    def _flush(self) -> None:
        if self._parts:
            self.out.append(Message("assistant", tuple(p for group in self._parts for p in group), self._trained))
        self._parts = []

    def _answered(self) -> None:
        if self._pending:
            name = self._pending[0][0]
            raise ValueError(f"a tool call{f' ({name})' if name else ''} has no result before the next message")

    def assistant(self, parts: tuple[Part, ...], calls: list[tuple[str | None, Part]], trained: bool) -> None:
        self._answered()
        if trained != self._trained:
            self._flush()
        self._trained = trained
        self._parts.append(list(parts))
        for i, part in calls:
            self._parts.append([part])
            self._pending.append((i, len(self._parts) - 1))
        if not (self._inline and calls):
            self._flush()

    def tool(self, i: str | None, parts: tuple[Part, ...]) -> None:
        found = next((p for p in self._pending if i is None or p[0] in (i, None)), None)
        if found is None and i is not None:
            raise ValueError(f"a tool message answers {i!r}, which no call has")
        if found is not None:
            self._pending.remove(found)
        if found is not None and self._inline:
            self._parts[found[1]].append(Part("".join(p.text for p in parts), "tool_result"))
        else:
            self._flush()
            self.out.append(Message("tool", parts))

    def other(self, role: str, parts: tuple[Part, ...], trained: bool) -> None:
        self._answered()
        self._flush()
        self.out.append(Message(role, parts, trained))

    def finish(self) -> tuple[Message, ...]:
        self._flush()
        return tuple(self.out)


def from_messages(
    messages: list[dict],
    tools: list | None = None,
    inline_tools: bool = True,
    role_field: str = "role",
    content_field: str = "content",
) -> Conversation:
    """A conversation out of chat messages as APIs and data sets write them; `ValueError` says what is wrong.

    Args:
      messages: dicts with a role (system or developer, user, assistant, tool) and content: a string, None, or parts of
        text. The assistant's may have `reasoning_content`, which becomes thinking, and `tool_calls`, each answered by a
        tool message with its `tool_call_id` (without ids, in order); only the last calls may stay unanswered. `weight`
        0 keeps a message out of training; the assistant's turn ends where its weight changes.
      tools: functions that the system message is to describe.
      inline_tools: put each result behind its call and go on in the same turn; otherwise tools have turns of their own.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("the messages must be a list that is not empty")
    turns = _Turns(inline_tools)
    for n, m in enumerate(messages):
        if not isinstance(m, dict) or not isinstance(m.get(role_field), str):
            raise ValueError(f"message {n} has no {role_field!r}")
        role, calls = _ROLES.get(m[role_field], m[role_field]), m.get("tool_calls") or []
        if not isinstance(calls, list):
            raise ValueError(f"message {n}: 'tool_calls' is no list")
        calls = [_call(c) for c in [*calls, *([m["function_call"]] if m.get("function_call") else [])]]
        weight = 1 if m.get("weight") is None else m["weight"]
        if weight not in (0, 1):
            raise ValueError(f"message {n}: weight must be 0 or 1, got {weight!r}")
        if m.get(content_field) is None and not calls:
            raise ValueError(f"message {n} has no {content_field!r}")
        parts, trained = _content(m.get(content_field), content_field), weight == 1
        if role == "assistant":
            if isinstance(thought := m.get("reasoning_content"), str) and thought:
                parts = (Part(thought, "thinking"), *parts)
            turns.assistant(parts, calls, trained)
        elif calls:
            raise ValueError(f"message {n}: a {role} message cannot call tools")
        elif role == "tool":
            turns.tool(m.get("tool_call_id"), parts)
        else:
            turns.other(role, parts, trained)
    out = turns.finish()
    if tools:
        first = out[0].text + "\n\n" if out[0].role == "system" else ""
        rest = out[1:] if out[0].role == "system" else out
        trained = out[0].trained if out[0].role == "system" else True
        out = (Message("system", first + describe_tools(tools), trained), *rest)
    return Conversation(out)


def to_messages(conversation: Conversation) -> list[dict]:
    """Plain JSON that `from_messages` reads back: content is a string, or a list of parts where a turn holds others."""
    out = []
    for m in conversation.messages:
        plain = all(p.kind == "text" for p in m.parts)
        content = m.text if plain else [{"type": p.kind, "text": p.text} for p in m.parts]
        out.append({"role": m.role, "content": content} | ({} if m.trained else {"weight": 0}))
    return out
