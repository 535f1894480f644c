"""Prompts to the letter, and that no example gives away what is asked."""

import doctest
import io
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.conversation import Message, Part
from jaxlm.data.prompting import Example, choose_shots, few_shot_conversation, few_shot_text, shown_reply, stop_strings
from jaxlm.data.world.answers import final_answer
from jaxlm.data.world.corpus import World, task_problem, written
from jaxlm.data.world.people import People
from jaxlm.data.world.talk import answered, worked
from tests.source import ROOT

ADD = Example("What is 2 + 3 * 4?", "14", ("3 * 4 = 12", "2 + 12 = 14"), about="2 + 3 * 4")
CITY = Example("Where was Ada born?", "Brookford")


def test_text_with_and_without_steps():
    assert few_shot_text([ADD, CITY], "What is 1 + 1?") == (
        "Question: What is 2 + 3 * 4?\nAnswer: 14\n\n"
        "Question: Where was Ada born?\nAnswer: Brookford\n\n"
        "Question: What is 1 + 1?\nAnswer:"
    )
    assert few_shot_text([ADD], "What is 1 + 1?", cot=True) == (
        "Question: What is 2 + 3 * 4?\n3 * 4 = 12\n2 + 12 = 14\nAnswer: 14\n\nQuestion: What is 1 + 1?\n"
    )
    assert few_shot_text([], "Why?") == "Question: Why?\nAnswer:"


def test_a_conversation_shows_examples_as_turns():
    c = few_shot_conversation([ADD, CITY], "What is 1 + 1?", "think", system="Be brief.")
    assert c.messages == (
        Message("system", "Be brief."),
        Message("user", "What is 2 + 3 * 4?"),
        Message("assistant", (Part("3 * 4 = 12\n2 + 12 = 14", "thinking"), Part("14"))),
        Message("user", "Where was Ada born?"),
        Message("assistant", "Brookford"),
        Message("user", "What is 1 + 1?"),
    )
    assert shown_reply(ADD, "text") == Message("assistant", "3 * 4 = 12\n2 + 12 = 14\nAnswer: 14")
    assert few_shot_conversation([ADD], "Why?").messages[1] == Message("assistant", "14")


def test_the_format_is_the_worlds():
    """A base model meets its prompts, a chat model its turns, as training wrote them."""
    world = World(people=People(count=20))
    for i, task in enumerate(world.tasks):
        p = task_problem(world, task, "train", i)
        e = Example(p.question.text, p.question.answer, p.solution)
        whole = written(p.question, p.solution)
        assert whole.startswith(few_shot_text([], e.question, cot=True))
        assert written(p.question) == f"{few_shot_text([], e.question)} {e.answer}"
        asked = few_shot_text([e], "Next?", cot=True)
        assert asked == f"{whole}\n\nQuestion: Next?\n" and not any(s in whole for s in stop_strings(True))
        assert final_answer(whole) == e.answer
        assert all(shown_reply(e, work) == worked(p, work) for work in ("think", "text", "none"))
        assert shown_reply(e) == answered(p.question)


WORDS = st.sampled_from(["a", "b", "c", "d", "e"])
EXAMPLES = st.builds(Example, question=WORDS, answer=WORDS, about=st.none() | WORDS)


def things(e: Example) -> set[str]:
    return {e.question} | ({e.about} if e.about else set())


@settings(max_examples=150, deadline=None)
@given(st.lists(EXAMPLES, max_size=12), st.integers(0, 6), EXAMPLES, st.integers(0, 3))
def test_shots_are_about_different_things_and_never_what_is_asked(pool, count, asked, seed):
    shots = choose_shots(pool, count, asked, seed)
    assert len(shots) <= count and all(s in pool for s in shots)
    seen = [asked, *shots]
    assert all(not things(a) & things(b) for i, a in enumerate(seen) for b in seen[:i])
    assert shots == choose_shots(pool, count, asked, seed)
    more = choose_shots(pool, count + 1, asked, seed)
    assert more[len(more) - len(shots) :] == shots  # the same ones, with others before them
    if len(shots) < count:  # only because nothing else was left
        taken = set().union(*map(things, seen))
        assert all(things(e) & taken for e in pool)


def test_shots_differ_with_the_question_and_the_seed():
    pool = [Example(f"q{i}", "a") for i in range(40)]
    chosen = {choose_shots(pool, 4, Example(f"asked {n}", "a"), seed) for n in range(5) for seed in range(4)}
    assert len(chosen) == 20


def test_the_guides_examples_hold():
    page = (ROOT / "docs" / "prompting.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    test = doctest.DocTestParser().get_doctest(blocks, {}, "docs/prompting.md", None, 0)
    out = io.StringIO()
    assert doctest.DocTestRunner().run(test, out=out.write).attempted == 5
    assert not out.getvalue(), out.getvalue()
