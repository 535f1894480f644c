"""Format by structure, length by formula, and steps by exact arithmetic."""

import dataclasses
import functools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message, Part, read_completion, tool_call
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.data.world.arithmetic import Arithmetic, arithmetic
from jaxlm.feedback.scoring import RewardError, scores
from jaxlm.feedback.shaping import (
    closed,
    cosine,
    cosine_length_reward,
    format_reward,
    length_reward,
    linear,
    numbers_in,
    process_reward,
    steps,
    thinking_steps,
    to_target,
    token_spans,
    well_formed,
)
from jaxlm.feedback.verifiers import numeric, verified
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import Completion

TOKENIZER = BytesTokenizer()
CONTROL = TOKENIZER.control
T, A = Part("6 * 7 = 42", "thinking"), Part("42")
C, R = tool_call("calculator", "6 * 7"), Part("42", "tool_result")


def said(*parts) -> Message:
    return Message("assistant", parts)


def written(*pieces: str, forced=(), finish_reason="stop") -> Reply:
    """A reply whose ids are these pieces: control symbols by name, else text; the pieces `forced` are a tool's."""
    ids, sampled = [], []
    for i, piece in enumerate(pieces):
        new = [CONTROL[piece]] if piece in CONTROL else TOKENIZER.encode(piece)
        ids += new
        sampled += [i not in forced] * len(new)
    logprobs = (-1.0,) * len(ids)
    completion = Completion(tuple(ids), logprobs, TOKENIZER.decode(ids), finish_reason, tuple(sampled))
    return Reply(read_completion(ids, TOKENIZER), completion)


# ------------------------------------------------------------------------------------------------------- the format
def test_well_formed_messages():
    assert well_formed(said(T, A)) and well_formed(said(T, A), tools=True)
    with_tools = [(T, C, R, A), (T, C, R, C, R, A), (T, C, R, T, A), (T, C, R, T, C, R, T, A)]
    assert all(well_formed(said(*parts), tools=True) and not well_formed(said(*parts)) for parts in with_tools)
    wrong = [
        (), (A,), (T,), (A, T), (T, A, T), (T, T, A), (A, T, A), (T, A, C, R), (T, A, C, R, A), (C, R, A), (T, C, A),
        (T, R, A), (T, C, R), (Part(" ", "thinking"), A), (T, Part("\n")), (T, Part("", "tool_call"), R, A),
    ]  # fmt: skip
    assert not any(well_formed(said(*parts), tools) for parts in wrong for tools in (False, True))
    assert not well_formed(Message("user", "42"))


def test_text_that_spells_the_symbols_has_no_format():
    assert not well_formed(said(Part("<think>6 * 7 = 42</think>42")))
    with pytest.raises(RewardError, match=r"reward 'format', sample 0 of 1: .* this str holds none"):
        scores(format_reward(), [""], ["<think>6 * 7</think>42"], [{}])


def test_only_what_was_closed_is_well_formed():
    good = written("<think>", "6 * 7", "</think>", "42", "<|im_end|>")
    unclosed = written("<think>", "6 * 7", "<|tool_call|>", "calculator\n6 * 7", "<|tool_call_end|>",
                       "<|tool_result|>", "42", "<|tool_result_end|>", "42", "<|im_end|>")  # fmt: skip
    stray = written("<think>", "6 * 7", "</think>", "</think>", "42", "<|im_end|>")
    cut = written("<think>", "6 * 7", "</think>", "42", finish_reason="length")
    replies = [good, unclosed, stray, cut]
    assert [closed(r, TOKENIZER) for r in replies] == [True, False, False, False]
    assert scores(format_reward(True), [""] * 4, replies, [{}] * 4) == [1.0, 1.0, 1.0, 0.0]
    assert scores(format_reward(True, TOKENIZER), [""] * 4, replies, [{}] * 4) == [1.0, 0.0, 0.0, 0.0]
    about = [{"finish_reason": "stop"}, {"finish_reason": "length"}]
    assert scores(format_reward(), [""] * 2, [good.message, Conversation((good.message,))], about) == [1.0, 0.0]


# ------------------------------------------------------------------------------------------------------- the length
def test_length_formulas():
    assert [linear(n, 10) for n in (0, 5, 10, 20)] == [1.0, 0.5, 0.0, 0.0]
    assert [to_target(n, 100, 0.01) for n in (100, 90, 150)] == pytest.approx([0.0, -0.1, -0.5])
    assert [cosine(n, 100, 2.0, 1.0) for n in (0, 50, 100, 300)] == pytest.approx([2.0, 1.5, 1.0, 1.0])
    assert cosine(25, 100, -10.0, 0.0) == pytest.approx(-5 * (1 + math.sqrt(0.5)))


def test_lengths_are_what_the_policy_sampled():
    reply = written("<think>", "abc", "</think>", "<|tool_call|>", "x", "<|tool_call_end|>", "<|tool_result|>",
                    "123456789", "<|tool_result_end|>", "42", "<|im_end|>", forced=(6, 7, 8))  # fmt: skip
    reward = length_reward(functools.partial(to_target, target=0, slope=1.0))
    assert scores(reward, ["", ""], [reply, "text"], [{}, {"tokens": 7}]) == [-11.0, -7.0]
    with pytest.raises(RewardError, match="reward 'length', sample 0 of 1: a length needs a reply, or 'tokens'"):
        scores(reward, [""], ["text"], [{}])


def test_cosine_length_reward():
    reward = cosine_length_reward(verified(numeric), 100, right=(2.0, 1.0), wrong=(-10.0, 0.0), exceeded=-10.0)
    truths = ["42", "42", "42", "42", "", "42"]
    sizes = [50, 50, 100, 100, 50, 0]
    metadata = [{"answer": t, "tokens": n} for t, n in zip(truths, sizes)]
    completions = ["42", "41", "42", "41", "42", "42"]
    assert scores(reward, [""] * 6, completions, metadata) == [1.5, -5.0, -10.0, -10.0, None, 2.0]
    about = [{"answer": "42", "tokens": 5, "finish_reason": "length"}]
    assert scores(reward, [""], ["42"], about) == [-10.0]
    with pytest.raises(UserError, match="every right value above every wrong one"):
        cosine_length_reward(verified(numeric), 100, right=(1.0, -1.0), wrong=(-10.0, 0.0), exceeded=-10.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 200), st.integers(0, 200))
def test_shorter_is_better_when_right_and_longer_when_wrong(a, b):
    a, b = sorted((a, b))
    assert cosine(a, 100, 2.0, 1.0) >= cosine(b, 100, 2.0, 1.0)
    assert cosine(a, 100, -10.0, 0.0) <= cosine(b, 100, -10.0, 0.0) + 1e-12
    assert linear(a, 100) >= linear(b, 100)


# -------------------------------------------------------------------------------------------------------- the steps
def read(trace, **kwargs):
    return [(trace[s.begin : s.end], s.right) for s in steps(trace, **kwargs)]


@pytest.mark.parametrize(
    "trace, found",
    [
        ("19 * 2 = 38, 38 mod 23 = 15", [("19 * 2 = 38", True), ("38 mod 23 = 15", True)]),
        ("first 3+4=7.\nThen 7 x 8 = 57", [("3+4=7", True), ("7 x 8 = 57", False)]),
        ("1,000 - 1 = 999; .5 is half", [("1,000 - 1 = 999", True)]),
        ("$5 + $0.50 = $5.50", [("$5 + $0.50 = $5.50", True)]),
        ("10 / 3 = 3.33", [("10 / 3 = 3.33", False)]),
        ("0.1 + 0.2 = 0.3", [("0.1 + 0.2 = 0.3", True)]),
        ("6 / 0 = 0, 6 mod 0 = 6", [("6 / 0 = 0", False), ("6 mod 0 = 6", False)]),
        ("3 - 5 = -2, -2 \u00d7 -2 = 4", [("3 - 5 = -2", True), ("-2 \u00d7 -2 = 4", True)]),
        ("4 \u2212 1 = 3", [("4 \u2212 1 = 3", True)]),
        ("(3 + 4 = 7)!", [("3 + 4 = 7", True)]),
        ("50% x 8 = 4", [("50% x 8 = 4", True)]),
        # pieces of something longer, or of a word
        ("2 + 3 * 4 = 14", []), ("2 + 3 * 4 = 12", []), ("(2 + 3) * 4 = 20", []), ("1 + 2 = 3 + 4 = 7", []),
        ("5 -3 + 2 = 4", []), ("3 + 4 = 7 * 1", []), ("3 + 4 = 7x", []), ("a3 + 4 = 7", []), ("3 + 4 = 7.5.1", []),
        ("3 + 4 = 7,000", [("3 + 4 = 7,000", False)]), ("3 + 4 =\n7", []), ("3 + 4 = \u0667", []), ("3 + x = 7", []),
    ],
)  # fmt: skip
def test_steps_of_a_trace(trace, found):
    assert read(trace) == found


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10**4), st.sampled_from("+-*/"), st.integers(-3, 3))
def test_a_step_is_right_exactly_where_it_holds(a, b, op, off):
    true = {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b)}[op]
    claimed = int(true) + off
    assert [s.right for s in steps(f"so {a} {op} {b} = {claimed}.")] == [claimed == true]


def test_the_worlds_own_work_earns_all_of_it():
    for i in range(24):
        p = arithmetic(Arithmetic(), 0, "train", i)
        found = steps("\n".join(p.solution), numbers_in(p.question.text))
        assert len(found) == len(p.solution) and all(s.right and s.grounded for s in found), p


def test_true_equations_that_nothing_asked_for_earn_nothing():
    given = numbers_in("What is (7 + 4) * 3-2? It is 50%, or $1,000.")
    assert given == [7, 4, 3, 2, Fraction(1, 2), 1000]
    trace = "7 + 4 = 11\n1 + 1 = 2\n11 * 3 = 33\n3 * 11 = 33\n33 - 2 = 30\n30 + 7 = 37"
    found = steps(trace, given)
    assert [s.right for s in found] == [True, True, True, True, False, True]
    assert [s.grounded for s in found] == [True, False, True, True, True, False]
    assert [s.repeated for s in found] == [False, False, False, True, False, False]
    assert [s.reward for s in found] == [1, 0, 1, 0, 0, 0]
    message, text_only = said(Part(trace, "thinking"), Part("31")), said(Part(trace))
    grounded = process_reward(lambda prompt, metadata: prompt)
    assert scores(grounded, ["(7 + 4) * 3 - 2"] * 2, [message, text_only], [{}] * 2) == [pytest.approx(2 / 6), 0.0]
    assert scores(process_reward(), [""], [message], [{}]) == [pytest.approx(4 / 6)]
    with pytest.raises(RewardError, match=r"reward 'process', sample 0 of 1: .* this str is none"):
        scores(grounded, [""], ["7 + 4 = 11"], [{}])


def test_steps_have_their_place_in_the_ids():
    trace = "H\u00e4lfte \U0001f600: 7 + 4 = 11, dann 11 * 3 = 34"
    reply = written("ok ", "<think>", trace, "</think>", "34", "<think>", "1 + 1 = 2", "</think>", "x", "<|im_end|>")
    found = thinking_steps(reply, TOKENIZER, [Fraction(7), Fraction(4), Fraction(3)])
    texts = [TOKENIZER.decode(reply.completion.ids[begin:end]) for _, begin, end in found]
    assert texts == ["7 + 4 = 11", "11 * 3 = 34", "1 + 1 = 2"]
    assert [s.reward for s, *_ in found] == [1.0, 0.0, 0.0]
    assert thinking_steps(written("42", "<|im_end|>"), TOKENIZER) == []


def test_steps_have_their_places_beside_symbols_that_close_nothing():
    reply = written("4", "</think>", "2", "<think>", "1 + 1 ", "<|tool_call_end|>", "= 2, and 2 * 3 = 6", "</think>",
                    "4", "</think>", "2", "<|im_end|>")  # fmt: skip
    found = thinking_steps(reply, TOKENIZER)
    texts = [TOKENIZER.decode(reply.completion.ids[begin:end]) for _, begin, end in found]
    assert texts == ["1 + 1 = 2", "2 * 3 = 6"]
    to_a_text = dataclasses.replace(reply, message=said(Part("1 + 1 = 2")))
    assert thinking_steps(to_a_text, TOKENIZER) == []


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_token_span_covers_its_characters_and_no_more(data):
    text = data.draw(st.text(st.sampled_from("ab \u00e4\u20ac\U0001f600"), min_size=1, max_size=12))
    begin = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(begin + 1, len(text)))
    # Tokens of some bytes each, cut anywhere.
    whole = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1))) if len(whole) > 1 else [])
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)])]
    [(first, past)] = token_spans(range(len(pieces)), [(begin, end)], Pieces(pieces))
    # A character belongs to the token that holds its last byte.
    holds = [i for i, piece in enumerate(pieces) for _ in piece]
    assert first == holds[len(text[: begin + 1].encode()) - 1] and past == holds[len(text[:end].encode()) - 1] + 1


@dataclasses.dataclass
class Pieces:
    id_bytes: list
