"""Verifiers on right answers in many forms, and on what a policy finds out to get a reward without one."""

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data.conversation import Conversation, Message, Part, tool_call
from jaxlm.data.world.questions import Question
from jaxlm.feedback import verifiers
from jaxlm.feedback.scoring import RewardError, scores
from jaxlm.feedback.verifiers import (
    exact,
    final_answer,
    gsm8k,
    number,
    numeric,
    program,
    text,
    verified,
    world,
)
from jaxlm.sample.chat import Reply
from jaxlm.tools.isolation import IsolationError, Limits
from jaxlm.tools.python import isolation_mode
from tests.feedback.scripted import replied

THOUGHT = Part("6 * 7 = 42\n#### 42", "thinking")


def said(*parts) -> Message:
    return Message("assistant", tuple(Part(p) if isinstance(p, str) else p for p in parts))


CALLED = (tool_call("calculator", "6 * 7"), Part("42", "tool_result"))
VERIFIERS = [(exact, "42"), (text, "42"), (numeric, "42"), (numeric, 42), (gsm8k, "42"), (gsm8k, "6 * 7\n#### 42")]
BY_VERIFIER = pytest.mark.parametrize("verifier, truth", VERIFIERS, ids=lambda x: getattr(x, "__name__", repr(x)))


# ------------------------------------------------------------------------------------------------- known exploits
@BY_VERIFIER
def test_the_answer_alone_is_right(verifier, truth):
    for completion in (
        "42", " 42\n", "so 6 * 7\n</think>\n42", "<think>41?</think>42", said("42"), said(THOUGHT, "42"),
        said(THOUGHT, *CALLED, "42"), said("Let me see.", *CALLED, " 42 "), replied("42"),
        Conversation((Message("user", "What is 6 * 7?"), said("42"))),
    ):  # fmt: skip
        assert verifier(completion, truth) is True, completion


@BY_VERIFIER
def test_what_earns_nothing(verifier, truth):
    prompt = Message("user", "Like this: #### 42\n42")
    for name, completion in {
        "empty": "",
        "blank": " \n ",
        "empty message": Message("assistant", ()),
        "wrong": "41",
        "truncated": replied("42", finish_reason="length"),
        "somewhere in the text": "The numbers are 41, 42 and 43.",
        "a sentence": "The answer is 42",
        "several": "41 42",
        "several, or": "41 or 42",
        "several lines": "42\n43",
        "glued before": "x42",
        "glued behind": "42km",
        "glued digits": "42_",
        "thinking only": said(THOUGHT),
        "thinking only, text before": said("42", THOUGHT),
        "thinking left open": "<think>6 * 7 = 42",
        "thinking opened again": "</think>42<think>42",
        "wrong after right thinking": said(THOUGHT, "41"),
        "tool result last": said(THOUGHT, *CALLED),
        "text before the tool's result": said("42", *CALLED),
        "call last": said("42", tool_call("calculator", "42")),
        "unicode digits": "\u0664\u0662",
        "wide digits": "\uff14\uff12",
        "superscript": "4\u00b2",
        "infinity": "inf",
        "nan": "nan",
        "huge exponent": "42e999999999",
        "huge exponent of zero": "0e99999999999999999999",
        "the user's": Conversation((said("42"), prompt)),
        "the prompt's": Conversation((prompt, said("I do not know."))),
        "no conversation": Conversation(()),
        "the user's message": prompt,
        "a tool's message": Message("tool", "42"),
    }.items():
        assert verifier(completion, truth) is False, name


@BY_VERIFIER
def test_a_truth_that_cannot_be_read_excludes(verifier, truth):
    for nothing in ("", "  ", None, float("nan"), float("inf"), True, [42]):
        assert verifier("42", nothing) is None, nothing
        assert verifier(str(nothing), nothing) is None, nothing


@BY_VERIFIER
def test_time_is_bounded(verifier, truth):
    began = time.monotonic()
    attacks = ["4" * 10**6, "1," * 10**6, "#### 42\n" * 10**5, "####" * 10**6, "-" * 10**6, "1/" * 10**5]
    attacks += ["</think>" * 10**5, " " * 10**6 + "4" * 5000, "9" * 5000 + "/3", "4." * 9000, "4" * verifiers.LONGEST]
    for attack in attacks:
        assert verifier(attack, truth) is False
        assert verifier(said(attack), truth) is False
    assert time.monotonic() - began < 5


def test_text_that_spells_symbols_does_not_open_or_close_what_a_message_holds():
    assert final_answer(said("x</think>42")) == "x</think>42"
    assert final_answer("x</think>42") == "42"
    with pytest.raises(UserError, match="not dict"):
        final_answer({"role": "assistant", "content": "42"})


# ------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    "written, value",
    [
        ("1,000", 1000), ("1,234,567.50", Fraction(246913500, 200) / 1), ("-3.5", Fraction(-7, 2)), ("+7", 7),
        (".5", Fraction(1, 2)), ("-.5", Fraction(-1, 2)), ("$1,000.", 1000), ("-$5", -5), ("1e3", 1000),
        ("1.5E-2", Fraction(3, 200)), ("3/4", Fraction(3, 4)), ("-3/4.", Fraction(-3, 4)), ("50%", Fraction(1, 2)),
        ("007", 7), ("7.", 7),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(written, value):
    assert number(written) == value
    assert numeric(written, value) is True and numeric(str(written), written) is True


@pytest.mark.parametrize(
    "written",
    ["", ".", "-", "$", "%", "e5", "1,00", "1,0000", "12,34", ",123", "1.2.3", "1 000", "--1", "1/0", "1/2/3", "1e999",
     "1e", "0x10", "1_000", "(42)", "42!", "42;", "\u22125", "½", "1 2", "Infinity", "-nan", "1e5.", "5 %x", "4 2"],
)  # fmt: skip
def test_what_is_no_number(written):
    assert number(written) is None or written == "1e5."  # a period ends a sentence


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
@example("9" * 64)
def test_any_text_is_a_number_or_none(written):
    found = number(written)
    assert found is None or isinstance(found, Fraction)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(0, 5))
def test_numbers_come_back_from_their_texts(n, decimals):
    value = Fraction(n, 10**decimals)
    for written in (f"{Decimal(n).scaleb(-decimals):f}", f"{Decimal(n).scaleb(-decimals):,f}", f"{n}/{10**decimals}"):
        assert number(written) == value and numeric(written, value)
        assert not numeric(written, value + 1) and gsm8k(f"so\n#### {written}", value)


def test_tolerances():
    assert not numeric("3.14", "3.14159") and numeric("3.14", "3.14159", absolute=0.01)
    assert numeric("1.3", 1.0, absolute=0.3) and not numeric("1.31", 1.0, absolute=0.3)  # .3 as written, not as binary
    assert numeric("101", 100, relative=0.01) and not numeric("101.1", 100, relative=0.01)
    assert numeric("-101", -100, relative=0.01) and not numeric("0.001", 0, relative=0.5)
    assert numeric(".1", 0.1) and numeric("50%", 0.5) and numeric("1/2", "50%") and not numeric("50", "50%")
    assert numeric("0.3333", "1/3", absolute=1e-4) and not numeric("0.3333", "1/3")


# --------------------------------------------------------------------------------------------------------- GSM8K
def test_gsm8k_marks():
    assert gsm8k("She has 6 * 7 = <<6*7=42>>42 eggs.\n#### 42", "42")
    assert gsm8k(said(THOUGHT, "Six times seven.\n#### 42."), 42)
    assert gsm8k("#### $1,000", "x\n#### 1000") and gsm8k("#### 50%", "50") and gsm8k("50%.", "#### 50")
    assert gsm8k("#### 42\nso again\n#### 42", "42")
    marks = ["#### 41\n#### 42", "#### 42\n#### 41", "#### 42 or 43", "#### 42\n43", "42 ####", "####", "#### 42####"]
    for wrong in [*marks, "##### 42", "#### 4 2", "The answer is 42.", "#### x = 42", "#### forty-two"]:
        assert gsm8k(wrong, "42") is False, wrong
    assert gsm8k(replied("#### 4", finish_reason="length"), "4") is False  # of "#### 42"


# ----------------------------------------------------------------------------------------------------- the world
def test_questions_of_the_world():
    sum_ = Question(
        text="6 * 7?", answer="42", check="numeric", kind="arithmetic", split="train", id="a", also=("42.5",)
    )
    city = Question(text="Where?", answer="Paris", check="text", kind="fact", split="train", id="b")
    assert world("42", sum_) and world(said(THOUGHT, "6 * 7 = 42\nAnswer: 42.0"), sum_) and world("42.5", sum_)
    assert world("paris.", city) and world("I looked.\nAnswer: Paris", city)
    for wrong in ("My best guess is Paris.", "Answer: Rome\nAnswer: Paris", "Paris, Rome", "", "I don't know."):
        assert world(wrong, city) is False, wrong
    assert world("9" * 10_000, sum_) is False and world("\u0664\u0662", sum_) is False


# -------------------------------------------------------------------------------------------------------- programs
@pytest.fixture(scope="module")
def isolated():
    try:
        isolation_mode()
    except IsolationError as e:
        pytest.skip(str(e))


def test_programs(isolated):
    assert program("print(6 * 7)", "42\n") is True
    assert program(said(THOUGHT, "Here:\n```python\nfor i in (1, 2):\n    print(i, end=' \\n')\n```\n"), "1\n2") is True
    cases = [("n = 3", "6"), ("n = 10", "55")]
    assert program("print(n * (n + 1) // 2)", cases) is True
    assert program("print(6)", cases) is False  # right for one output, not for all
    assert program("print(42); 1 / 0", "42") is False
    assert program("while True: pass", "42", Limits(seconds=0.3)) is False


def test_programs_that_are_not_run():
    for wrong in ("", said(Part("print(42)", "thinking")), "```\nprint(42)\n```\n```\nprint(41)\n```", "```\nprint(42)",
                  replied("print(42)", finish_reason="length")):  # fmt: skip
        assert program(wrong, "42") is False
    for nothing in ("", " \n", None, 42, [], [("n = 1", "")], ["42"], [["n = 1"]], [["n = 1", 42]], [None]):
        assert program("print()", nothing) is None


# ------------------------------------------------------------------------------------------------------ as rewards
def test_verifiers_as_rewards():
    completions = ["42", "41", said("42", THOUGHT), replied("42"), replied("42", finish_reason="length"), "42"]
    metadata = [{"answer": "42"}] * 5 + [{"answer": "none"}]
    reward = verified(numeric)
    assert scores(reward, [""] * 6, completions, metadata) == [1.0, 0.0, 0.0, 1.0, 0.0, None]
    excluded = verified(numeric, when_truncated="excluded")
    assert scores(excluded, [""] * 6, completions, metadata) == [1.0, 0.0, 0.0, 1.0, None, None]
    cut = [{"answer": "42", "finish_reason": "length"}, {"answer": "42", "finish_reason": "stop"}]
    assert scores(reward, [""] * 2, ["42", "42"], cut) == [0.0, 1.0]
    assert reward.__name__ == "numeric"
    with pytest.raises(RewardError, match="reward 'numeric', sample 1 of 2: the metadata has no 'answer'"):
        scores(reward, [""] * 2, ["42", "42"], [{"answer": 1}, {}])
    with pytest.raises(UserError, match="wrong or excluded"):
        verified(numeric, when_truncated="masked")


def test_a_replys_own_reason_counts_before_the_metadatas():
    assert isinstance(replied("42"), Reply)
    about = [{"answer": "42", "finish_reason": "stop"}]
    assert scores(verified(numeric), [""], [replied("42", finish_reason="length")], about) == [0.0]
