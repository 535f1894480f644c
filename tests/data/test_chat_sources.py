"""Conversations out of files: every format, what is refused and with which words, and GSM8K's calls and answers."""

import dataclasses
import gzip
import json
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from jaxlm.config import UserError, from_json, to_json
from jaxlm.data import chat_sources as cs
from jaxlm.data import gsm8k
from jaxlm.data.chat_sources import (
    GSM8K,
    Alpaca,
    Messages,
    PromptResponse,
    Thoughts,
    WorldConversations,
    check_gsm8k,
    conversations,
    fingerprint,
    rejects_for,
)
from jaxlm.data.conversation import MARKS, Conversation, Message, Part, read_call, render, tool_call
from jaxlm.data.messages import describe_tools, from_messages, to_messages
from jaxlm.data.readers import Rejects
from jaxlm.data.sources import Files, documents
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.data.world import talk
from jaxlm.data.world.corpus import World
from jaxlm.data.world.people import People
from jaxlm.tools.calculator import CalculatorError


def lines(path, *records) -> str:
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    path.write_bytes(text.encode())
    return str(path)


def chat(*turns) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def call(i: str, name: str = "calculator", arguments='{"x": 1}') -> dict:
    return {"id": i, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str) -> Part:
    return Part(text, "tool_result")


ASKED = Message("user", "?")


# --------------------------------------------------------------------------------------------------- chat messages
def test_plain_messages():
    made = from_messages(
        [
            {"role": "developer", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Bo"},
            {"role": "assistant", "content": "c", "reasoning_content": "t", "weight": 0},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "d", "weight": 1, "refusal": None, "tool_calls": None},
        ]
    )
    assert made.messages == (
        Message("system", "S"),
        Message("user", "ab"),
        Message("assistant", (Part("t", "thinking"), Part("c")), trained=False),
        Message("user", ""),
        Message("assistant", "d"),
    )


USED = [
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "So", "tool_calls": [call("a"), call("b", "python", "print(2)\n")]},
    {"role": "tool", "tool_call_id": "b", "content": "B"},
    {"role": "tool", "tool_call_id": "a", "content": "A"},
    {"role": "assistant", "content": None, "tool_calls": [call("c", "f", {"é": [1]})]},
    {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "C"}, {"type": "text", "text": "D"}]},
    {"role": "assistant", "content": "done"},
    {"role": "user", "content": "thanks"},
]


def test_results_follow_their_calls_in_one_turn():
    a, b, c = tool_call("calculator", '{"x": 1}'), tool_call("python", "print(2)\n"), tool_call("f", '{"é": [1]}')
    own = Message("assistant", (Part("So"), a, result("A"), b, result("B"), c, result("CD"), Part("done")))
    assert from_messages(USED).messages == (ASKED, own, Message("user", "thanks"))
    assert read_call(b.text) == ("python", "print(2)\n")
    assert from_messages(USED, inline_tools=False).messages == (
        ASKED,
        Message("assistant", (Part("So"), a, b)),
        Message("tool", "B"),
        Message("tool", "A"),
        Message("assistant", (c,)),
        Message("tool", "CD"),
        Message("assistant", "done"),
        Message("user", "thanks"),
    )


def test_calls_of_other_shapes():
    old = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "content": "one"},
    ]
    own = (tool_call("f", "{}"), result("1"), Part("one"))
    assert from_messages(old).messages == (ASKED, Message("assistant", own))
    last = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call("a"), call("b")]}]
    assert len(from_messages(last).messages[1].parts) == 2  # what the model is to learn is the calls
    weighed = [{**m, "weight": 0} if m is USED[1] else m for m in USED]
    assert [(m.role, m.trained) for m in from_messages(weighed).messages[1:3]] == [
        ("assistant", False),
        ("assistant", True),
    ]
    spoken = [{"role": "tool", "content": "x"}, *USED[1:4], {"role": "tool", "content": "y"}]
    assert [m.role for m in from_messages(spoken).messages] == ["tool", "assistant", "tool"]


def test_tools_are_described_in_the_system_message():
    tools = [{"type": "function", "function": {"name": "f", "description": "é"}}, {"name": "g"}]
    text = 'Tools:\n{"name": "f", "description": "é"}\n{"name": "g"}'
    assert describe_tools(tools) == text
    asked = [{"role": "user", "content": "?"}]
    assert from_messages(asked, tools).messages == (Message("system", text), ASKED)
    both = from_messages([{"role": "system", "content": "S", "weight": 0}, *asked], tools)
    assert both.messages == (Message("system", f"S\n\n{text}", trained=False), ASKED)


WRONG = [
    ([], "must be a list that is not empty"),
    ("hello", "must be a list that is not empty"),
    (["hello"], "message 0 has no 'role'"),
    ([{"content": "x"}], "message 0 has no 'role'"),
    ([{"role": "user"}], "message 0 has no 'content'"),
    ([{"role": "bot", "content": "x"}], "unknown role 'bot'; valid: system, user, assistant, tool"),
    ([{"role": "user", "content": 3}], "'content' holds int; a string or parts of text are wanted"),
    ([{"role": "user", "content": ["x"]}], "'content' holds str"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "'content' holds image_url"),
    ([{"role": "user", "content": [{"type": "tool_result", "text": "x"}]}], "a user message holds text only"),
    ([{"role": "assistant", "content": "x", "weight": 0.5}], "message 0: weight must be 0 or 1, got 0.5"),
    ([{"role": "assistant", "content": "x", "tool_calls": 1}], "message 0: 'tool_calls' is no list"),
    ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], "a tool call without a function's name"),
    ([{"role": "assistant", "tool_calls": [call("a", "")]}], "the name of a tool must be one line"),
    ([{"role": "user", "content": "x", "tool_calls": [call("a")]}], "message 0: a user message cannot call tools"),
    ([*USED[:3], USED[6]], r"a tool call \(a\) has no result before the next message"),
    ([{"role": "tool", "tool_call_id": "a", "content": "x"}], "a tool message answers 'a', which no call has"),
]


@pytest.mark.parametrize(("messages", "said"), WRONG)
def test_wrong_messages_say_what_is_wrong(messages, said):
    with pytest.raises((ValueError, UserError), match=said):
        from_messages(messages)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 2), st.sampled_from(["", "user", "assistant", "tool", "text"])),
    lambda x: st.one_of(
        st.lists(x, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "weight", "tool_calls", "function", "name", "id"]),
            x,
            max_size=4,
        ),
    ),
    max_leaves=8,
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    messages=st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"])}, optional={
        "content": JSON, "tool_calls": JSON, "function_call": JSON, "weight": JSON, "tool_call_id": JSON
    }), max_size=3),
    tools=st.one_of(st.none(), st.lists(JSON, max_size=2)),
)  # fmt: skip
def test_any_json_is_a_conversation_or_refused(messages, tools):
    try:
        assert isinstance(from_messages(messages, tools), Conversation)
    except (ValueError, UserError) as e:
        assert "\n" not in str(e)


@hypothesis.settings(max_examples=80, deadline=None)
@hypothesis.given(
    turns=st.lists(
        st.one_of(
            st.builds(Message, st.sampled_from(["system", "user", "tool"]), st.text(max_size=4), st.booleans()),
            st.lists(st.builds(Part, st.text(max_size=4), st.sampled_from(["text", *MARKS])), max_size=4).flatmap(
                lambda parts: st.builds(Message, st.just("assistant"), st.just(tuple(parts)), st.booleans())
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_messages_written_are_read_back(turns):
    given = Conversation(m if m.role != "tool" else dataclasses.replace(m, trained=True) for m in turns)
    for inline in (True, False):
        assert from_messages(json.loads(json.dumps(to_messages(given))), inline_tools=inline) == given


# ----------------------------------------------------------------------------------------------------------- files
def test_every_format_and_compression(tmp_path):
    record = chat(("user", "?"), ("assistant", "!"))
    text = (json.dumps(record) + "\n\n").encode()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text * 2))
    (tmp_path / "c.ndjson.zst").write_bytes(zstandard.compress(text))
    (tmp_path / "readme.md").write_text("not this one")
    lines(tmp_path / "a.jsonl", record)
    rows = [record["messages"], [{"role": "user", "content": "?"}, {"role": "assistant", "content": None}]]
    pq.write_table(pa.table({"messages": rows}), tmp_path / "d.parquet")
    source = Messages(str(tmp_path), name="mine", max_bad_fraction=0.2)
    rejects = Rejects(source.max_bad_fraction)
    got = list(conversations(source, rejects))
    assert [(c.source, c.id) for c in got] == [
        ("mine", i) for i in ("a.jsonl:1", "b.jsonl.gz:1", "b.jsonl.gz:3", "c.ndjson.zst:1", "d.parquet:1")
    ]
    assert set(got) == {Conversation((ASKED, Message("assistant", "!")))}
    assert (rejects.seen, rejects.rejected) == (6, 1)
    assert rejects.examples[0].endswith("d.parquet row 2: message 1 has no 'content'")


def test_bad_text_in_a_parquet_row_is_counted(tmp_path):
    offsets = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0")
    bad = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffc")])
    pq.write_table(pa.table({"prompt": bad, "response": ["x", "y", "z"]}), tmp_path / "a.parquet")
    source = PromptResponse(str(tmp_path / "a.parquet"), max_bad_fraction=0.5)
    rejects = Rejects(source.max_bad_fraction)
    assert [c.messages[0].text for c in conversations(source, rejects)] == ["a", "c"]
    assert rejects.examples == [f"{source.path} row 2: not valid UTF-8 (invalid start byte)"]


def test_sharegpt_by_its_field_names(tmp_path):
    path = lines(
        tmp_path / "a.jsonl", {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
    )
    source = Messages(path, messages_field="conversations", role_field="from", content_field="value")
    assert next(conversations(source)).messages == (ASKED, Message("assistant", "!"))


def test_tools_beside_the_messages(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"messages": USED, "tools": [{"type": "function", "function": {"name": "f"}}]})
    made = next(conversations(Messages(path, inline_tools=False)))
    assert [m.role for m in made.messages[:4]] == ["system", "user", "assistant", "tool"]
    assert made.messages[0].text == 'Tools:\n{"name": "f"}'


def test_alpaca_and_prompts(tmp_path):
    path = lines(
        tmp_path / "a.jsonl",
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"instruction": "Sing.", "input": "", "output": "la"},
        {"instruction": "Hum.", "output": "mm"},
    )
    said = [[m.text for m in c.messages] for c in conversations(Alpaca(path, system="S"))]
    assert said == [["S", "Add.\n\n1 1", "2"], ["S", "Sing.", "la"], ["S", "Hum.", "mm"]]
    path = lines(tmp_path / "b.jsonl", {"q": "?", "response": "!", "prompt": "no"})
    source = PromptResponse(path, prompt_field="q", system="S")
    assert next(conversations(source)).messages == (Message("system", "S"), ASKED, Message("assistant", "!"))


BAD_LINES = [
    (Messages, '{"messages": [', "not valid JSON"),
    (Messages, '{"text": "x"}', "no field 'messages'; fields there: text"),
    (Messages, '{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogate"),
    (Messages, '{"messages": [{"role": "user", "content": "x"}], "tools": [3]}', "'tools' must hold functions"),
    (Messages, '{"messages": [{"role": "user", "content": "x"}], "tools": 3}', "'tools' is no list"),
    (Messages, "[1]", "a JSON object is wanted, this is list"),
    (Alpaca, '{"instruction": "x", "input": "y"}', "no field 'output'; fields there: instruction, input"),
    (Alpaca, '{"instruction": " ", "output": "y"}', "field 'instruction' is empty"),
    (Alpaca, '{"instruction": "x", "input": 3, "output": "y"}', "field 'input' is no string"),
    (PromptResponse, '{"prompt": ["x"], "response": "y"}', "field 'prompt' is no string"),
    (PromptResponse, '{"prompt": "x", "response": ""}', "field 'response' is empty"),
    (GSM8K, '{"question": "x", "answer": "1"}', "field 'answer' does not end in #### and a number"),
    (GSM8K, '{"question": "x", "answer": "1 #### many"}', "field 'answer' does not end in #### and a number"),
]
GOOD = {
    "messages": [{"role": "user", "content": "?"}],
    **{"instruction": "i", "output": "o", "prompt": "p", "response": "r", "question": "q", "answer": "#### 1"},
}


@pytest.mark.parametrize(("kind", "line", "said"), BAD_LINES)
def test_a_bad_line_is_named_above_the_rate_and_counted_below(tmp_path, kind, line, said):
    path = lines(tmp_path / "a.jsonl", GOOD, "", line, *[GOOD] * 3)
    with pytest.raises(UserError) as caught:
        list(conversations(kind(path)))
    message = str(caught.value)
    assert f"a.jsonl line 3: {said}" in message.replace("text is not valid Unicode: ", "") and "\n" not in message
    assert "1 of 5 texts refused, more than the allowed max_bad_fraction=0.01" in message
    rejects = Rejects(0.2)
    assert [c.id for c in conversations(kind(path, max_bad_fraction=0.2), rejects)] == [
        f"a.jsonl:{n}" for n in (1, 4, 5, 6)
    ]
    assert (rejects.seen, rejects.rejected) == (5, 1)


def test_files_without_conversations(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    for path, said in [
        (tmp_path / "a.json", "reads .jsonl .ndjson with one JSON object a line .*found a.json"),
        (tmp_path / "none.jsonl", "no such file or folder"),
        (lines(tmp_path / "e.jsonl", ""), "e.jsonl is empty: there is no conversation in it"),
    ]:
        with pytest.raises(UserError, match=said):
            list(conversations(Messages(str(path))))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 99)[:-30])
    with pytest.raises(UserError, match="damaged or truncated gz data"):
        list(conversations(Alpaca(str(tmp_path / "cut.jsonl.gz"))))


def test_fingerprints_follow_content_and_how_it_is_read(tmp_path):
    path = lines(tmp_path / "a.jsonl", GOOD)
    first = fingerprint(Messages(path))
    assert first == fingerprint(Messages(path, name="other", weight=2.0))
    others = [Messages(path, inline_tools=False), Alpaca(path), Alpaca(path, system="S"), GSM8K(path)]
    others.append(GSM8K(path, calculator=False))
    assert len({first, *map(fingerprint, others)}) == 6
    lines(tmp_path / "a.jsonl", GOOD, GOOD)
    assert fingerprint(Messages(path)) != first


def test_the_world_talks():
    source = WorldConversations(name="mine", world=World(people=People(count=20)), count=5)
    made = list(conversations(source, rejects := rejects_for(source)))
    assert made == list(talk.conversations(source)) and (rejects.seen, rejects.rejected) == (5, 0)
    assert {(c.source, c.id.split("/")[0]) for c in made} == {("mine", "train")}
    assert all(render(c, BytesTokenizer())["loss_mask"].any() for c in made)
    assert fingerprint(source) == talk.fingerprint(source) != fingerprint(dataclasses.replace(source, facts=1.0))
    with pytest.raises(UserError, match="source mine: count must be at least 1, got 0"):
        list(conversations(dataclasses.replace(source, count=0)))


def test_text_comes_as_thoughts():
    text, tokenizer = World(people=People(count=10, unmentioned=2), validation=4), BytesTokenizer()
    source = Thoughts(text, cue=2, name="mine")
    made = list(conversations(source, rejects := rejects_for(source)))
    trained = [d for d in documents(text) if not d.id.startswith("heldout/")]
    assert len(made) == 50 == rejects.seen - 4
    for one, document in zip(made, trained, strict=True):
        assert one.id == document.id and one.source == "mine"
        row = render(one, tokenizer)
        learned = [t for t, kept in zip(row["tokens"].tolist(), row["loss_mask"]) if kept]
        assert document.text in tokenizer.decode(learned)
        first, *_ = one.messages
        assert first.role == "user" and document.text.startswith(f"{first.text} ") and len(first.text.split()) == 2
        assert one.messages[1:] == (Message("assistant", (Part(document.text, "thinking"),)),)
    uncued = dataclasses.replace(source, cue=0)
    assert [c.messages for c in conversations(uncued)] == [c.messages[1:] for c in made]
    offered = dataclasses.replace(source, systems=("A.", "B."))
    for i, (one, plain) in enumerate(zip(conversations(offered), made, strict=True)):
        system = (None, "A.", "B.")[i % 3]
        assert one.messages == ((Message("system", system),) if system else ()) + plain.messages
    others = (Thoughts(text, cue=2), Thoughts(dataclasses.replace(text, seed=1), cue=2), uncued, offered)
    assert fingerprint(source) == fingerprint(others[0]) and len(set(map(fingerprint, others))) == 4


def test_nodes_survive_json():
    files = (Messages("a"), Alpaca("b", system="S"), PromptResponse("c"), GSM8K("d", calculator=False))
    for node in (*files, WorldConversations(count=3), Thoughts(World(seed=1)), Thoughts(Files("e"))):
        assert from_json(type(node), to_json(node)) == node


# ------------------------------------------------------------------------------------------------------------ GSM8K
def reckon(expression: str) -> str:
    """Products and quotients, to stand in for a calculator."""
    try:
        value = Fraction(1)
        for factor in expression.split("*"):
            first, *divisors = factor.split("/")
            value *= Fraction(first)
            for divisor in divisors:
                value /= Fraction(divisor)
    except (ValueError, ZeroDivisionError) as e:
        raise CalculatorError(f"no {expression}") from e
    return str(float(value)) if value.denominator > 1 else str(value)


SOLD = "She sold 48/2 = <<48/2=24>>24 in May.\nThat is $<<24*.5=12>>12 in all.\n#### 12"


def test_marks_become_calls_with_their_results(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"question": "How much?", "answer": SOLD})
    own = (
        *(Part("She sold 48/2 = "), tool_call("calculator", "48/2"), result("24"), Part("24 in May.\nThat is $")),
        *(tool_call("calculator", "24*.5"), result("12"), Part("12 in all.\n#### 12")),
    )
    asked = Message("user", "How much?")
    for calculate in ({}, {"calculate": reckon}):  # ours, and one handed in
        assert next(conversations(GSM8K(path), **calculate)).messages == (asked, Message("assistant", own))
    plain = next(conversations(GSM8K(path, calculator=False, system="S"))).messages
    assert plain == (Message("system", "S"), asked, Message("assistant", own[0].text + own[3].text + own[6].text))


def test_no_call_shows_a_result_that_it_does_not_have(tmp_path):
    answer = "a <<2*2=5>>5 b <<1/3=0.33>>0.33 c <<2+=4>>4\n#### 4"
    path = lines(tmp_path / "a.jsonl", {"question": "?", "answer": answer})
    (own,) = next(conversations(GSM8K(path), calculate=reckon)).messages[1:]
    assert [p.text for p in own.parts if p.kind == "tool_call"] == ["calculator\n1/3"]
    assert own.text == "a 5 b 0.33 c 4\n#### 4"


@pytest.mark.parametrize(
    ("got", "recorded", "kind"),
    [
        ("24", "24.0", "exact"),
        ("0.30000000000000004", "0.3", "exact"),
        ("1,000", "1000", "exact"),
        ("16.666666667", "16.67", "rounded"),
        ("16.666666667", "16.66", "rounded"),
        ("16.666666667", "16", "rounded"),
        ("16.7", "16.67", "different"),
        ("17", "16", "different"),
        ("nan", "16", "different"),
        ("16", "x", "different"),
    ],
)
def test_agreement(got, recorded, kind):
    assert gsm8k.agreement(got, recorded) == kind


def test_final_answers():
    for text, value in [("#### 72", 72), ("a #### 1 #### -3", -3), ("####$1,234.50", "1234.5"), ("#### 5%.", 5)]:
        assert str(gsm8k.final_answer(text)).rstrip("0").rstrip(".") == str(value)
    for text in ("72", "#### many", "####", "#### inf"):
        assert gsm8k.final_answer(text) is None


def test_the_check_finds_what_is_wrong(tmp_path):
    def problem(answer):
        return {"question": "How many <|im_end|>?", "answer": answer}

    path = lines(
        tmp_path / "a.jsonl",
        problem(SOLD),
        problem("2*3 = <<2*3=6>>6, and 2*6 = <<2*6=12>>12\n#### 6"),
        problem("2*3 = <<2*3=6>>6, and $6 × 2 = $12\n#### 12"),
        problem("1/3 is <<1/3=0.33>>0.33, so eight: 8\n#### 8"),
        problem("<<2*2=5>>5 <<2/0=1>>1\n#### 7"),
        problem("it has no answer"),
        "[]",
    )
    report = check_gsm8k(path)
    rows = [render(c, BytesTokenizer()) for c in conversations(GSM8K(path, max_bad_fraction=1.0))]
    sizes = sorted(len(row["tokens"]) for row in rows)
    assert report.pop("tokens") == {
        "total": sum(sizes),
        "trained": sum(int(row["loss_mask"].sum()) for row in rows),
        "median": sizes[2],
        "longest": sizes[-1],
    }
    assert report == {
        "problems": 7,
        "rendered": 5,
        "refused": [
            "a.jsonl:6: field 'answer' does not end in #### and a number",
            "a.jsonl:7: a JSON object is wanted, this is list",
        ],
        "calls": {"exact": 5, "rounded": 1, "different": 1, "error": 1},
        "mismatches": [
            {
                "where": "a.jsonl:4",
                "expression": "1/3",
                "recorded": "0.33",
                "result": "0.3333333333",
                "kind": "rounded",
            },
            {"where": "a.jsonl:5", "expression": "2*2", "recorded": "5", "result": "4", "kind": "different"},
            {
                "where": "a.jsonl:5",
                "expression": "2/0",
                "recorded": "1",
                "result": "a division by zero",
                "kind": "error",
            },
        ],
        "answers": {
            **{"the last call": 1, "an earlier call": 1, "an equation without a mark": 1, "only its words": 1},
            "nothing": 1,
        },
        "unsupported": ["a.jsonl:5"],
    }


def test_every_source_is_a_chat_source():
    assert set(cs.ChatSource.__args__) == {Messages, Alpaca, PromptResponse, GSM8K, Thoughts, WorldConversations}
