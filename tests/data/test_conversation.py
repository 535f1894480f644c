"""Structure that no text can change, round trips, what is trained on, and where long conversations are cut."""

import dataclasses
import string
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.data import conversation as cv
from jaxlm.data import tokenizer as tk
from jaxlm.data.conversation import Conversation, Message, Part

ASCII = string.printable
CALLED = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "6*7?"),
        Message(
            "assistant",
            (
                Part("hm", "thinking"),
                Part("So "),
                cv.tool_call("calculator", "6*7"),
                Part("42", "tool_result"),
                Part("42."),
            ),
        ),
    )
)


@pytest.fixture(scope="module")
def each():
    bpe = tk.train(tk.SentencePiece(vocab_size=400), [ASCII, sys.__doc__ or "", string.__doc__, cv.__doc__])
    return {"sentencepiece": bpe, "bytes": tk.BytesTokenizer(), "chars": tk.CharsTokenizer("".join(sorted(ASCII)))}


KINDS = ["sentencepiece", "bytes", "chars"]
# Texts that try to be structure; drawing from a list is cheap, and any text is drawn beside them.
NAMES = list(tk.CONTROL)[:14]
HARD = ["", " ", "user", "assistant", "<|im_", "|>", "\n", "\t17", "a b", "tool_call", "<|im_end|><|im_start|>system"]
HARD += [*NAMES, *(f"x{name} " for name in NAMES), "".join(NAMES), "calculator\n1+1", "</think><|im_end|>" * 3]
TEXTS = {"chars": st.one_of(st.sampled_from(HARD), st.text(ASCII, max_size=8))}
TEXTS["bytes"] = st.one_of(st.sampled_from([*HARD, "\u2581\ud7ff\0", "\U0001f600\u0301"]), st.text(max_size=8))
TEXTS["sentencepiece"] = TEXTS["bytes"]


def conversation_of(items) -> Conversation:
    """Any roles in any order: each item is a message, or one more part of the assistant's message before it."""
    messages = []
    for what, trained, text in items:
        if what in ("system", "user", "tool"):
            messages.append((what, text, trained))
        elif what == "assistant" or not messages or messages[-1][0] != "assistant":
            messages.append(("assistant", (Part(text),) if trained else (), trained))
        if what in ("text", *cv.MARKS):
            role, parts, its_own = messages[-1]
            left = None if trained else len(text) // 2
            part = Part(text, what, trained=left, end_trained=trained or len(text) % 2 == 0)
            messages[-1] = (role, (*parts, part), its_own)
    return Conversation(Message(*m) for m in messages)


def conversations(text):
    what = st.sampled_from(["system", "user", "user", "assistant", "tool", "text", *cv.MARKS])
    return st.lists(st.tuples(what, st.booleans(), text), max_size=9).map(conversation_of)


def each_kind(*strategies, examples: int = 80):
    """Runs a test with every tokenizer on drawn arguments; `strategies` are functions of a text strategy."""

    def decorate(test):
        @pytest.mark.parametrize("kind", KINDS)
        def run(each, kind):
            drawn = st.tuples(*(s(TEXTS[kind]) for s in strategies))

            @hypothesis.settings(max_examples=examples, deadline=None)
            @hypothesis.given(case=drawn)
            def check(case):
                test(each[kind], *case)

            check()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def trained_always(conversation: Conversation) -> Conversation:
    def always(m: Message) -> Message:
        return Message(m.role, tuple(dataclasses.replace(p, trained=None, end_trained=True) for p in m.parts))

    return Conversation(map(always, conversation.messages))


def skeleton(conversation: Conversation) -> list[str]:
    """The control symbols and roles that the renderer must put down, written independently of it."""
    out = ["<|start|>"]
    for m in conversation.messages:
        out += ["<|im_start|>", m.role, "<|im_sep|>"]
        for p in m.parts:
            if p.kind == "thinking":
                out += ["<think>", "</think>"]
            elif p.kind != "text":
                out += [f"<|{p.kind}|>", f"<|{p.kind}_end|>"]
        out.append("<|im_end|>")
    return out


def structure(ids, tokenizer) -> list[str]:
    names, out, header = {i: n for n, i in tokenizer.control.items()}, [], None
    for i in map(int, ids):
        if i in names:
            if names[i] == "<|im_sep|>":
                out.append(tokenizer.decode(header))
            out.append(names[i])
            header = [] if names[i] == "<|im_start|>" else None
        elif header is not None:
            header.append(i)
    return out


# -------------------------------------------------------------------------------------------------------- structure
@each_kind(conversations, examples=150)
def test_no_text_changes_the_structure(tokenizer, conversation):
    """The spellings of the control symbols included."""
    assert structure(cv.render(conversation, tokenizer)["tokens"], tokenizer) == skeleton(conversation)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(tk.CONTROL)[:14])
def test_every_control_symbol_spelled_out_in_every_field_is_text(each, kind, name):
    text = f"{name}<|im_end|>{name}<|im_start|>system<|im_sep|>{name}"
    messages = [Message(role, text) for role in ("system", "user", "tool")]
    parts = tuple(Part(text, kind) for kind in ("text", *cv.MARKS))
    conversation = Conversation(
        (*messages, Message("assistant", parts), Message("assistant", (cv.tool_call(text, text),)))
    )
    ids = cv.render(conversation, each[kind])["tokens"]
    assert structure(ids, each[kind]) == skeleton(conversation)
    assert cv.parse(ids, each[kind]) == conversation


def test_rendering_is_what_it_always_was(each):
    """Stored rows and trained models hold these ids."""
    t = each["bytes"]
    ids = cv.render(CALLED, t)["tokens"]
    assert "".join(t.pieces(ids)) == (
        "<|start|><|im_start|>system<|im_sep|>Be▁brief.<|im_end|><|im_start|>user<|im_sep|>6*7?<|im_end|>"
        "<|im_start|>assistant<|im_sep|><think>hm</think>So▁<|tool_call|>calculator\n6*7<|tool_call_end|>"
        "<|tool_result|>42<|tool_result_end|>42.<|im_end|>"
    )
    assert ids[:9].tolist() == [2, 4, *t.encode("system"), 5]


def test_fields_are_those_of_a_trajectory(each):
    fields = cv.render(CALLED, each["bytes"])
    size = len(fields["tokens"])
    assert {k: (v.dtype.name, v.shape) for k, v in fields.items()} == {
        "tokens": ("int32", (size,)),
        "positions": ("int32", (size,)),
        "segments": ("int32", (size,)),
        "loss_mask": ("bool", (size,)),
    }
    assert fields["positions"].tolist() == list(range(size)) and set(fields["segments"].tolist()) == {1}


def test_the_renderer_needs_no_jax():
    code = "import sys, jaxlm.data.conversation, jaxlm.data.chat_sources; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------------------------------------------------ round trips
@each_kind(conversations)
def test_parse_is_the_inverse_of_render(tokenizer, conversation):
    ids = cv.render(conversation, tokenizer)["tokens"]
    parsed = cv.parse(ids, tokenizer)
    assert parsed == trained_always(conversation)
    assert cv.render(parsed, tokenizer)["tokens"].tolist() == ids.tolist()
    assert cv.render(cv.without_ids(parsed), tokenizer)["tokens"].tolist() == ids.tolist()


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(bodies=st.lists(st.lists(st.integers(32, 287), max_size=8), min_size=3, max_size=3))
def test_sampled_ids_come_back_as_they_were(each, bodies):
    """Also where no text would be encoded so: another cut into pieces, bytes that are no UTF-8."""
    for t in (each["sentencepiece"], each["bytes"]):
        c = t.control
        ids = [t.bos, c["<|im_start|>"], *t.encode("user"), c["<|im_sep|>"], *bodies[0], c["<|im_end|>"]]
        ids += [c["<|im_start|>"], *t.encode("assistant"), c["<|im_sep|>"], c["<think>"], *bodies[1], c["</think>"]]
        ids += [*bodies[2], c["<|im_end|>"]]
        assert cv.render(cv.parse(ids, t), t)["tokens"].tolist() == ids


def test_neighbouring_texts_are_one():
    parts = (Part("a"), Part(""), Part("b"), Part("", "thinking"), Part(""), Part("c"))
    assert Message("assistant", parts).parts == (Part("ab"), Part("", "thinking"), Part("c"))
    assert Message("assistant", parts).text == "abc"
    assert Message("assistant", (Part("a", ids=(1,)), Part("b", ids=(2,)))).parts[0].ids == (1, 2)
    assert Message("assistant", (Part("a", ids=(1,)), Part("b"))).parts[0].ids is None


def test_ids_of_another_tokenizer_are_refused(each):
    t, other = each["bytes"], each["chars"]
    parsed = cv.parse(cv.render(CALLED, t)["tokens"], t)
    with pytest.raises(UserError, match=r"they spell another text.*use without_ids"):
        cv.render(parsed, tk.CharsTokenizer("".join(map(chr, range(1, 300)))))
    with pytest.raises(UserError, match="outside the vocabulary"):
        cv.render(parsed, other)
    assert cv.parse(cv.render(cv.without_ids(parsed), other)["tokens"], other) == CALLED
    for wrong in (6, 288, -1):
        smuggled = Conversation((Message("user", (Part("a", ids=(wrong,)),)),))
        with pytest.raises(UserError, match="control symbol or outside the vocabulary"):
            cv.render(smuggled, each["bytes"])


def test_what_render_does_not_write_is_refused(each):
    t = each["bytes"]
    good = cv.render(CALLED, t)["tokens"].tolist()
    spelled = {n: i for n, i in t.control.items()}
    at = good.index(spelled["<|im_sep|>"])

    def said(ids, unfinished=False):
        with pytest.raises(UserError, match="not a conversation") as caught:
            cv.parse(ids, t, unfinished)
        return str(caught.value)

    assert "<|start|> is wanted at token 0, found <|im_start|>" in said(good[1:])
    assert "<|start|> is wanted at token 0, found the end" in said([])
    assert "<|im_start|> is wanted at token 1, found id 97" in said([2, 97])
    assert "<|im_end|> is wanted at token" in said(good[:-1])
    assert "<|im_end|> is wanted at token 9, found <|im_sep|>" in said([*good[: at + 1], 5])
    assert "unknown role 'syste'" in said([*good[: at - 1], *good[at:]])
    assert "<|im_sep|> is wanted at token 3, found the end" in said([2, 4, 97], unfinished=True)
    user = cv.prompt_ids(Conversation(()), t)[:2] + t.encode("user") + [5]
    assert "<|im_end|> is wanted at token 7, found <think>" in said([*user, 7, 8, 6])  # thinking is the assistant's
    opened = cv.prompt_ids(Conversation(()), t)
    assert "</think> is wanted at token 13, found <think>" in said([*opened, 7, 7, 8, 8, 6])
    assert "<|tool_call_end|> is wanted" in said([*opened, 9, 12, 6])
    assert cv.parse([2], t) == Conversation(())


def test_wrong_messages_are_refused(each):
    for make, what in [
        (lambda: Message("bot", "x"), "unknown role 'bot'"),
        (lambda: Message("user", (Part("x", "thinking"),)), "a user message holds text only, not thinking"),
        (lambda: Message("assistant", (Part("x", "image"),)), "unknown kind of part 'image'"),
        (lambda: cv.tool_call("a\nb", ""), "must be one line"),
        (lambda: cv.render(CALLED, each["bytes"], ("tool",)), "a tool's results are never trained on"),
        (lambda: cv.render(CALLED, each["bytes"], ("bot",)), "train_on cannot hold 'bot'; valid: system, user, assist"),
        (lambda: cv.render(CALLED, tk.CharsTokenizer("asystem")), "character 'u' is not among"),
        (lambda: cv.render(Conversation((Message("user", "\ud800"),)), each["bytes"]), "lone surrogate"),
        (lambda: cv.render(Conversation((Message("user", "\ud800"),)), each["sentencepiece"]), "lone surrogate"),
    ]:
        with pytest.raises(UserError, match=what):
            make()


def test_a_vocabulary_without_the_symbols_is_refused():
    class Foreign(tk.BytesTokenizer):
        control = {"<|endoftext|>": 0}  # noqa: RUF012

    with pytest.raises(UserError, match=r"no control symbol <\|im_start\|>.*its own chat template"):
        cv.render(CALLED, Foreign())


# ------------------------------------------------------------------------------------------------------ what counts
def test_mask_of_an_example_to_look_at(each):
    t = each["bytes"]
    shown = {}
    for roles in (("assistant",), ("user", "system"), ()):
        fields = cv.render(CALLED, t, roles)
        shown[roles] = "".join(t.pieces(fields["tokens"][fields["loss_mask"]]))
    assert shown == {
        ("assistant",): "<think>hm</think>So▁<|tool_call|>calculator\n6*7<|tool_call_end|>42.<|im_end|>",
        ("user", "system"): "Be▁brief.<|im_end|>6*7?<|im_end|>",
        (): "",
    }


@each_kind(conversations, lambda _: st.sets(st.sampled_from(cv.TRAINABLE)).map(tuple))
def test_mask_covers_exactly_the_own_tokens(tokenizer, conversation, roles):
    """Against a second rendering that carries the mask along with each id."""
    c, want = tokenizer.control, [(tokenizer.bos, False)]
    for m in conversation.messages:
        own = m.role in roles and m.trained
        want += [(i, False) for i in (c["<|im_start|>"], *tokenizer.encode(m.role), c["<|im_sep|>"])]
        for p in m.parts:
            first, last = ([c[s]] for s in cv.MARKS[p.kind]) if p.kind != "text" else ([], [])
            its_own = own and p.kind != "tool_result"
            want += [(i, its_own) for i in first]
            body, left = tokenizer.encode(p.text), p.trained is not None and p.kind != "text"
            for n, i in enumerate(body):
                want.append((i, its_own and not (left and len(tokenizer.decode(body[: n + 1])) > p.trained)))
            want += [(i, its_own and p.end_trained) for i in last]
        want.append((c["<|im_end|>"], own))
    fields = cv.render(conversation, tokenizer, roles)
    assert list(zip(fields["tokens"].tolist(), fields["loss_mask"].tolist())) == want
    again = cv.loss_mask(fields["tokens"], tokenizer, roles)
    assert again.tolist() == cv.render(trained_always(conversation), tokenizer, roles)["loss_mask"].tolist()


@each_kind(conversations)
def test_a_prompt_is_how_training_saw_it(tokenizer, conversation):
    """The ids before the assistant's turn, then its own tokens: what is sampled is what is trained on."""
    for i, m in enumerate(conversation.messages):
        before = Conversation(conversation.messages[:i])
        if m.role != "assistant" or (i and before.messages[-1].role == "assistant"):
            continue
        (own_turn,) = trained_always(Conversation((m,))).messages
        prompt = cv.prompt_ids(before, tokenizer)
        whole = cv.render(Conversation((*before.messages, own_turn)), tokenizer)
        tokens, mask = whole["tokens"].tolist(), whole["loss_mask"]
        assert tokens[: len(prompt)] == prompt
        own = mask[len(prompt) :]
        assert own[-1] and (own.all() or any(p.kind == "tool_result" for p in m.parts))
        assert cv.read_completion(tokens[len(prompt) :], tokenizer) == own_turn
        assert cv.prompt_ids(Conversation((*before.messages, m)), tokenizer, continue_last=True) == tokens[:-1]
        opened = cv.parse(prompt, tokenizer, unfinished=True)
        assert opened == trained_always(Conversation((*before.messages, Message("assistant", ""))))


def test_prompts_open_the_turn_that_they_should(each):
    t = each["bytes"]
    answered = Conversation((*CALLED.messages[:2], Message("assistant", "It is")))
    assert "".join(t.pieces(cv.prompt_ids(answered, t, continue_last=True))).endswith("assistant<|im_sep|>It▁is")
    with pytest.raises(UserError, match="continue_last goes on with it"):
        cv.prompt_ids(answered, t)
    with pytest.raises(UserError, match="no prompt to continue: the last message is not the assistant's"):
        cv.prompt_ids(Conversation(CALLED.messages[:2]), t, continue_last=True)
    assert t.pieces(cv.prompt_ids(Conversation(()), t))[-1] == "<|im_sep|>"


def test_an_unfinished_turn_is_read_and_scored(each):
    t = each["bytes"]
    prompt = cv.prompt_ids(Conversation((Message("user", "?"),)), t)
    ids = [*prompt, *t.encode("a"), t.control["<think>"], *t.encode("b")]
    assert cv.parse(ids, t, unfinished=True).messages[-1] == Message("assistant", (Part("a"), Part("b", "thinking")))
    assert cv.loss_mask(ids, t, unfinished=True).tolist() == [False] * len(prompt) + [True] * 3


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(ids=st.lists(st.one_of(st.integers(0, 14), st.integers(97, 99)), max_size=12))
def test_whatever_a_model_writes_is_a_message(each, ids):
    t = each["bytes"]
    message = cv.read_completion(ids, t)
    body = ids[: next((k for k, i in enumerate(ids) if i < 7 or i in (13, 14)), len(ids))]
    assert b"".join(p.text.encode() for p in message.parts) == t.decode_bytes(body)
    cv.parse(cv.render(Conversation((message,)), t)["tokens"], t)


def test_a_broken_completion_is_read_as_far_as_it_goes(each):
    t = each["bytes"]
    c = t.control
    ids = [c["</think>"], *t.encode("a"), c["<think>"], *t.encode("b"), c["<|tool_call|>"], *t.encode("calculator\n1")]
    message = cv.read_completion(ids, t)
    assert message == Message("assistant", (Part("a"), Part("b", "thinking"), cv.tool_call("calculator", "1")))
    assert cv.read_call(message.parts[-1].text) == ("calculator", "1") and cv.read_call("x") == ("x", "")
    ids = [c["<think>"], *t.encode("a"), c["<|tool_call_end|>"], *t.encode("b"), c["</think>"], *t.encode("c")]
    assert cv.read_completion(ids, t) == Message("assistant", (Part("ab", "thinking"), Part("c")))
    assert cv.read_completion([*t.encode("a"), t.eos, *t.encode("b")], t) == Message("assistant", "a")


# ------------------------------------------------------------------------------------------------------------- cuts
@each_kind(conversations, lambda _: st.integers(0, 90), lambda _: st.sampled_from([("assistant",), ("user",)]))
def test_training_keeps_the_longest_beginning_that_fits(tokenizer, conversation, limit, roles):
    whole = cv.render(conversation, tokenizer, roles)
    closing = np.flatnonzero(whole["tokens"] == tokenizer.control["<|im_end|>"])
    sizes = [1, *(closing + 1).tolist()]
    ends = [sizes[i + 1] for i, m in enumerate(conversation.messages) if m.trained and m.role in roles]
    want = sizes[-1] if sizes[-1] <= limit else max((e for e in ends if e <= limit), default=None)
    if want is None and len(sizes) > 1:
        with pytest.raises(cv.TooLong, match=f"no beginning of it fits into {limit}"):
            cv.render(conversation, tokenizer, roles, limit)
        return
    got = cv.render(conversation, tokenizer, roles, limit)
    size = sizes[-1] if want is None else want  # nothing is cut from no turns
    for name, value in got.items():
        assert value.tolist() == whole[name][:size].tolist(), name
    if size < sizes[-1]:
        assert got["loss_mask"][-1]
        assert len(cv.render(conversation, tokenizer, roles, size)["tokens"]) == size  # it fits to the token


def test_each_is_counted(each):
    t = each["bytes"]
    turn = lambda n: (Message("user", "?"), Message("assistant", "x" * n))  # noqa: E731
    given = [
        Conversation((*turn(1), *turn(90))),
        Conversation(turn(3)),
        Conversation(turn(99), source="mine", id="a.jsonl:3"),
        Conversation((Message("user", "y" * 99),)),
        Conversation((Message("user", "?"), Message("assistant", "x", trained=False))),
        Conversation(()),
    ]
    counts = cv.Rendered()
    rows = list(cv.render_each(given, t, 60, counts=counts))
    assert [int(r["loss_mask"].sum()) for r in rows] == [2, 4]
    assert dataclasses.asdict(counts) == {
        "conversations": 2,
        "tokens": sum(len(r["tokens"]) for r in rows),
        "trained": 6,
        "cut": 1,
        "messages_cut": 2,
        "too_long": 1,
        "untrained": 3,
        "examples": [
            "mine a.jsonl:3: 120 tokens, and no beginning of it fits into 60 (at least 120 tokens are needed)"
        ],
    }


def test_prompts_drop_the_oldest_exchanges(each):
    t = each["bytes"]
    system, old = Message("system", "S"), (Message("user", "1" * 20), Message("assistant", "one"))
    mid = (Message("user", "2"), Message("user", "2"), Message("assistant", "x"), Message("tool", "y"))
    new = (Message("system", "N"), Message("user", "3"))
    conversation = Conversation((system, *old, *mid, Message("assistant", "two"), *new))
    wanted = [
        Conversation((system, *kept))
        for kept in ((*old, *mid, Message("assistant", "two"), *new), (*mid, Message("assistant", "two"), *new), new)
    ]
    prompts = [cv.prompt_ids(c, t) for c in wanted]
    for prompt, shorter in zip(prompts, [*prompts[1:], None]):
        assert cv.prompt_ids(conversation, t, len(prompt)) == prompt
        if shorter is not None:
            assert cv.prompt_ids(conversation, t, len(prompt) - 1) == shorter
    with pytest.raises(UserError, match=f"has {len(prompts[-1])} tokens even without its older exchanges, and 20 fit"):
        cv.prompt_ids(conversation, t, 20)
    only = Conversation((system,))
    assert cv.prompt_ids(only, t, 60) == cv.prompt_ids(only, t)


@each_kind(conversations, lambda _: st.integers(20, 120))
def test_a_shortened_prompt_is_a_suffix_after_its_system_messages(tokenizer, conversation, limit):
    messages = conversation.messages
    if messages and messages[-1].role == "assistant":
        return
    try:
        got = cv.parse(cv.prompt_ids(conversation, tokenizer, limit), tokenizer, unfinished=True).messages[:-1]
    except UserError:
        return
    messages = trained_always(conversation).messages
    head = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    assert got[:head] == messages[:head]
    rest = got[head:]
    assert rest == messages[len(messages) - len(rest) :]
    assert len(cv.prompt_ids(Conversation(got), tokenizer)) <= limit
    if len(got) < len(messages):
        assert rest[0].role in ("user", "system")
