"""Which replies are right, wrong, hedged or no answer at all."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.world.answers import (
    HEDGES,
    REFUSALS,
    final_answer,
    hedge,
    is_refusal,
    judge,
    normalized,
    number,
    refusal,
    unhedged,
    verify,
)
from jaxlm.data.world.corpus import world_tables
from jaxlm.data.world.people import person
from jaxlm.data.world.questions import Question, fact_questions
from jaxlm.data.world.words import Words
from tests.data.world.worlds import SMALL


def question(check: str, answer: str, **more) -> Question:
    return Question("?", answer, check, "fact", "train", "x", **more)


@pytest.mark.parametrize(
    ("check", "truth", "right", "wrong"),
    [
        (
            "exact",
            "a-b",
            ["a-b", " a-b\n", "Answer: a-b", "so\nAnswer: a-b"],
            ["A-B", "a-b.", "a-b c", "it is a-b", ""],
        ),
        (
            "numeric",
            "1234",
            ["1234", "1,234", "1234.", "1234.0", "+1234", "Answer: 1234", "2468/2"],
            ["12345", "1234 or 1235", "1,2,3,4", "about 1234", "123 4", "", "1234/0", "$1234", "1e3"],
        ),
        (
            "text",
            "Bay City",
            ["Bay City", "bay city.", ' "Bay  City"', "the Bay City", "Answer: Bay City!"],
            ["Bay City or Rome", "Bay", "In Bay City", "Bay City, Rome", "Rome\nBay City", "", "."],
        ),
        (
            "text",
            "May 3, 1950",
            ["May 3, 1950", "3 May 1950", "1950-05-03", "May 3 1950."],
            ["May 3", "1950", "May 30, 1950", "May 3, 1950 or May 4, 1950"],
        ),
    ],
)
def test_verifiers(check, truth, right, wrong):
    q = question(check, truth)
    for reply in right:
        assert judge(q, reply) == ("right", False), reply
    for reply in wrong:
        assert judge(q, reply) == ("wrong", False), reply


def test_only_the_last_mark_counts_and_only_at_a_line_start():
    assert final_answer("Answer: 1\nno\nAnswer: 2\n") == "2"
    assert final_answer("The Answer: 1") == "The Answer: 1"
    assert verify(question("text", "a", also=("b",)), "B") and not verify(question("text", "a", also=("b",)), "c")


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_answers_take_any_text(text):
    normalized(text), number(text), is_refusal(text)
    assert judge(question("text", "Bay City"), text).outcome in ("right", "wrong", "abstained")
    assert normalized(normalized(text)) == normalized(text) or normalized(text).startswith(("the ", '"', "'", "`"))


def test_more_digits_than_python_reads_are_no_number():
    assert number("7" * 5000) is None and judge(question("numeric", "7"), "7" * 5000) == ("wrong", False)


def test_refusals_and_hedges_are_told_apart_from_answers():
    t = world_tables(SMALL)
    truths = {q.answer for s in ("train", "heldout") for q in fact_questions(t, s)}
    assert not any(map(is_refusal, truths))
    assert len(set(REFUSALS)) == len(REFUSALS) >= 20
    for q in list(fact_questions(t, "train"))[:40]:
        name = person(t, q.person).name
        for i in range(len(REFUSALS)):
            assert judge(q, refusal(q, name, i)) == ("abstained", False), refusal(q, name, i)
        for i in range(len(HEDGES)):
            assert unhedged(hedge(q.answer, i)) == (q.answer, True)
            assert judge(q, hedge(q.answer, i)) == ("right", True)
            assert judge(q, hedge("Nowhere", i)) == ("wrong", True)
            assert not is_refusal(hedge(q.answer, i))


def test_identity_and_system_messages_are_judged_right():
    from jaxlm.data.world.identity import Assistant, identity_question, system_question

    texts_of = {"train": set(), "heldout": set()}
    for split, seen in texts_of.items():
        for i in range(120):
            for q in (identity_question(Assistant(), 0, split, i), system_question(Words(), 0, split, i)):
                assert judge(q, q.answer).outcome == "right"
                assert all(judge(q, other).outcome == "right" for other in q.also)
                assert judge(q, q.answer + " or so").outcome == "wrong"
                seen.add((q.system, q.text))
                if "/name/" in q.id:
                    assert q.answer.rstrip(".").endswith("Juno" if q.kind == "identity" else q.also[-1])
                if "/capitals/" in q.id:
                    assert q.answer.isupper() and judge(q, q.answer.lower()).outcome == "wrong"
    assert not texts_of["train"] & texts_of["heldout"]
