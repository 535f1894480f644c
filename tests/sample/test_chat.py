"""An assistant's turn with tools, by models whose calls are known in advance."""

import dataclasses
import re

import pytest

from jaxlm.data.conversation import Conversation, Message, Part, prompt_ids, read_completion, render
from jaxlm.sample.chat import calls, reply
from jaxlm.sample.engine import Sampling
from jaxlm.tools import Counters, Tool, registry
from tests.sample.scripted import AUTOMATON, TOKENIZER, automaton, say, symbol

ASK = Conversation((Message("user", "how much?"),))
DIGITS = tuple("123456789")
# "sum", then a random sum of random length in one call; " ok" after the result.
SUMS = (
    say("<|im_sep|>", "<|tool_call|>", "s", "u", "m", "\n")
    | {"\n": DIGITS, "+": DIGITS, **{d: ("+", "<|tool_call_end|>") for d in DIGITS}}
    | say("<|tool_result_end|>", " ", "o", "k", "<|im_end|>")
)


def add(text: str) -> str:
    return str(sum(map(int, text.split("+"))))


TOOLS = registry([Tool("sum", "adds", add)])


def ask(table, count=1, tools=TOOLS, **settings):
    extra = {k: settings.pop(k) for k in ("max_calls", "counters", "limit", "on_tokens", "chunk") if k in settings}
    params = automaton(table)
    return reply(AUTOMATON, params, TOKENIZER, [ASK] * count, Sampling(**settings), tools=tools, slots=4, **extra)


def kinds(message: Message) -> list[str]:
    return [p.kind for p in message.parts]


def test_calls_are_run_and_their_results_put_in():
    counters = Counters()
    replies = ask(SUMS, count=20, seed=3, counters=counters)
    for r in replies:
        (call, result, text), c = r.message.parts, r.completion
        assert call.kind == "tool_call" and re.fullmatch(r"sum\n\d(\+\d)*", call.text)
        assert result == Part(add(call.text.split("\n")[1]), "tool_result")
        assert text.text == " ok" and c.finish_reason == "stop"
        forced = TOKENIZER.decode(i for i, sampled in zip(c.ids, c.sampled) if not sampled)
        assert forced == result.text and c.sampled.count(False) == len(result.text) + 2
        assert all(p == 0 for p, sampled in zip(c.logprobs, c.sampled) if not sampled)
        assert (*prompt_ids(ASK, TOKENIZER), *c.ids) == tuple(
            render(Conversation((*ASK.messages, r.message)), TOKENIZER)["tokens"]
        )
    assert len({r.message.parts[0].text for r in replies}) > 10
    assert counters.metrics()["tools/sum/calls"] == sum(calls(r.message) for r in replies) == 20


def test_without_tools_no_call_can_be_written():
    [r] = ask(SUMS, tools=None, max_tokens=12)
    assert not calls(r.message) and symbol("<|tool_call|>") not in r.completion.ids


def test_calls_beyond_the_limit_get_an_error_and_end_with_the_tokens():
    again = SUMS | {"\n": "4", "4": "<|tool_call_end|>", "<|tool_result_end|>": "<|tool_call|>"}
    counters = Counters()
    [r] = ask(again, max_calls=2, max_tokens=22, counters=counters, temperature=0.0)
    results = [p.text for p in r.message.parts if p.kind == "tool_result"]
    assert results == ["4", "4", "error: no more than 2 calls in one turn"]
    assert counters.metrics()["tools/calls"] == 2 and calls(r.message) == 4  # the last is only begun
    assert sum(r.completion.sampled) == 22 and r.completion.finish_reason == "length"


def test_a_failing_tool_and_malformed_calls_give_error_results():
    def fail(text):
        raise RuntimeError("no luck")

    [r] = ask(SUMS, tools=registry([Tool("sum", "fails", fail)]))
    assert r.message.parts[1].text == "error: RuntimeError: no luck" and r.message.text == " ok"
    [r] = ask(SUMS, tools=registry([Tool("mul", "multiplies", add)]))
    assert r.message.parts[1].text.startswith("error: there is no tool 'sum'")
    [r] = ask(SUMS | {"<|im_sep|>": "<|tool_call_end|>"})
    assert kinds(r.message) == ["tool_result", "text"] and "without <|tool_call|>" in r.message.parts[0].text
    [r] = ask(SUMS | {"<|im_sep|>": "<|tool_call|>", "<|tool_call|>": "<|tool_call_end|>"})
    assert kinds(r.message) == ["tool_call", "tool_result", "text"] and r.message.parts[0].text == ""


def test_a_long_result_is_shortened_to_the_room_that_is_left():
    tools = registry([Tool("sum", "talks", lambda text: "begin" + "x" * 900 + "end")])
    [r] = ask(SUMS, tools=tools, max_forced=102)
    assert len(r.message.parts[1].ids) == 100 and r.message.text == " ok"
    [r] = ask(SUMS, tools=tools, limit=200, max_tokens=100)
    size = len(prompt_ids(ASK, TOKENIZER))
    assert r.message.text == " ok" and size + r.completion.sampled.count(False) == 100
    [r] = ask(SUMS, tools=tools, max_forced=1)
    assert kinds(r.message) == ["tool_call"] and r.completion.finish_reason == "length"


def test_streaming_tells_every_token_once():
    told = {}

    def on_tokens(index, ids):
        told.setdefault(index, []).append(ids)

    replies = ask(SUMS, count=6, on_tokens=on_tokens, chunk=3)
    assert all(len(pieces) > 3 for pieces in told.values())
    for i, r in enumerate(replies):
        ids = [t for piece in told[i] for t in piece]
        assert tuple(ids) == r.completion.ids and read_completion(ids, TOKENIZER) == r.message


def test_room_for_results_is_kept_by_dropping_older_exchanges():
    old = [Message("user", "x" * 60), Message("assistant", "y" * 60)]
    params = automaton(SUMS)
    talk = Conversation((*old, *ASK.messages))
    settings = Sampling(max_tokens=40)
    limit = len(prompt_ids(talk, TOKENIZER)) + 40
    assert limit // 4 < limit - len(prompt_ids(ASK, TOKENIZER)) - 40
    tools = registry([Tool("sum", "talks", lambda text: "z" * 30)])
    [r] = reply(AUTOMATON, params, TOKENIZER, [talk], settings, tools=tools, limit=limit, slots=4)
    assert r.message.parts[1].text == "z" * 30
    # A last exchange that leaves no room is asked all the same.
    [r] = reply(AUTOMATON, params, TOKENIZER, [ASK], settings, tools=tools, limit=len(prompt_ids(ASK, TOKENIZER)) + 40)
    assert r.completion.finish_reason == "length" and kinds(r.message) == ["tool_call"]
    with pytest.raises(Exception, match="fit"):
        reply(AUTOMATON, params, TOKENIZER, [talk], dataclasses.replace(settings, max_tokens=limit), limit=limit)
