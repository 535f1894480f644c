"""An assistant's turn: conversations in, messages out, through the decoder, with tools where there are any."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import jax

from jaxlm.config import UserError
from jaxlm.data.conversation import END, MARKS, Conversation, Message, prompt_ids, read_call, read_completion
from jaxlm.nn.transformer import ModelConfig
from jaxlm.sample import speculative
from jaxlm.sample.engine import (
    CHUNK,
    Between,
    Completion,
    OnDone,
    OnTokens,
    Respond,
    Sampling,
    generate,
    max_new_tokens,
)
from jaxlm.tools import Counters, Tool, call, shorten

DEFAULT = Sampling()


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the model said. `completion` holds the ids and log-probabilities that `message` was read from."""

    message: Message
    completion: Completion


def fitted(
    conversation: Conversation, tokenizer, sampling: Sampling, limit: int | None, may_call: bool = False
) -> list[int]:
    """Ids of the prompt that `reply` gives to the model: `limit` as there, `may_call` whether it has tools."""
    if limit is None:
        return prompt_ids(conversation, tokenizer)
    room = limit - sampling.max_tokens
    if may_call:
        with contextlib.suppress(UserError):  # then without room for results, if need be
            return prompt_ids(conversation, tokenizer, room - min(sampling.max_forced, limit // 4))
    return prompt_ids(conversation, tokenizer, room)


def reply(
    cfg: ModelConfig,
    params,
    tokenizer,
    conversations: Sequence[Conversation],
    sampling: Sampling | Sequence[Sampling] = DEFAULT,
    *,
    limit: int | None = None,
    sample_ids: Sequence[int] | None = None,
    slots: int | None = None,
    tools: Mapping[str, Tool] | None = None,
    counters: Counters | None = None,
    max_calls: int = 4,
    on_tokens: OnTokens | None = None,
    on_done: OnDone | None = None,
    between: Between | None = None,
    chunk: int = CHUNK,
    mesh: jax.sharding.Mesh | None = None,
    draft: speculative.Draft | None = None,
) -> list[Reply]:
    """The next assistant turn of each conversation, in order. The end of a turn stops it, and the model may think.

    Args:
      sampling, sample_ids, slots, on_tokens, on_done, between, chunk, mesh: as in `generate`.
      limit: most tokens of prompt and reply together, such as the trained context: older exchanges are dropped to fit,
        and tool results get the room that the prompt and max_tokens leave: a quarter of `limit`, if dropping gives it.
      tools: what the model may call, by name; without them it cannot write a call. A call is run when its closing
        symbol comes, its result is put in as forced tokens, and the turn goes on. Results are shortened to what is
        left of `Sampling.max_forced`. Several conversations' calls run at once, in threads.
      counters: count the calls that were run.
      max_calls: calls a turn; those beyond get an error for a result, and are not run.
      draft: a smaller model that proposes tokens; see `speculative.py`.
    """
    control = tokenizer.control
    opening, closing = ((control[m] for m in marks) for marks in zip(*(MARKS[k] for k in ("thinking", "tool_call"))))
    think, call_begins = opening
    unthink, call_ends = closing
    settings = [sampling] * len(conversations) if isinstance(sampling, Sampling) else list(sampling)

    def room(prompt: list[int], s: Sampling) -> int:
        most = [n for n in (limit, max_new_tokens(cfg, 0)) if n is not None]
        return max(0, min([s.max_forced, *(n - len(prompt) - s.max_tokens for n in most)]))

    may_call = tools is not None
    prompts = [fitted(c, tokenizer, s, limit, may_call) for c, s in zip(conversations, settings, strict=True)]
    settings = [
        dataclasses.replace(
            s,
            stop_ids=(*s.stop_ids, control[END], *([call_ends] if may_call else [])),
            control_ids=(*s.control_ids, think, unthink, *([call_begins] if may_call else [])),
            max_forced=room(p, s),
        )
        for p, s in zip(prompts, settings)
    ]
    respond = None if tools is None else _responder(tokenizer, settings, tools, counters, max_calls)
    told = {"on_tokens": on_tokens, "on_done": on_done, "between": between}
    options = told | {"respond": respond, "chunk": chunk, "mesh": mesh}
    asked = cfg, params, tokenizer, prompts, settings
    if draft is None:
        completions = generate(*asked, sample_ids, slots, **options)
    else:
        completions, _ = speculative.generate(*asked, draft, sample_ids, slots, **options)
    return [Reply(read_completion(c.ids, tokenizer), c) for c in completions]


def _responder(tokenizer, settings: Sequence[Sampling], tools, counters: Counters | None, max_calls: int) -> Respond:
    """The `respond` of `generate`: what a turn's ids say is all that it knows, so calls may come in any order."""
    (_, call_ends), around = (tuple(tokenizer.control[m] for m in MARKS[k]) for k in ("tool_call", "tool_result"))

    def result(parts) -> str:
        if sum(p.kind == "tool_result" for p in parts) >= max_calls:
            return f"error: no more than {max_calls} calls in one turn"
        if not parts or parts[-1].kind != "tool_call":
            return f"error: {MARKS['tool_call'][1]} without {MARKS['tool_call'][0]}"
        name, argument = read_call(parts[-1].text)
        return call(tools, name, argument, counters).text

    def respond(index: int, ids: list[int]) -> list[int] | None:
        if ids[-1] != call_ends:
            return None
        parts = read_completion(ids, tokenizer).parts
        forced = sum(len(p.ids) + len(around) for p in parts if p.kind == "tool_result")
        room = settings[index].max_forced - forced - len(around)
        return [around[0], *_encode_within(tokenizer, result(parts), room), around[1]]

    return respond


def _encode_within(tokenizer, text: str, room: int) -> list[int]:
    """Ids of a text, whose middle is left out where they would be more than `room`."""
    size, ids = len(text), tokenizer.encode(text)
    while len(ids) > max(room, 0):
        size = size * max(room, 0) // len(ids)
        ids = tokenizer.encode(shorten(text, size))
    return ids


def calls(message: Message) -> int:
    """How many tools the model called in a message."""
    return sum(p.kind == "tool_call" for p in message.parts)
