"""Judge models, questions from passages, and conversations that a model writes, on scripted models."""

import collections
import json

import pytest

from jaxlm.config import UserError
from jaxlm.data import chat_sources
from jaxlm.data.conversation import Message
from jaxlm.feedback import written
from jaxlm.feedback.judge import Counts, address, by_model
from jaxlm.feedback.lessons import write_lessons
from jaxlm.feedback.probe import plain_question, probe, read_questions
from jaxlm.feedback.written import FILTERS, QUESTION_FILTERS, Filtered, Template, questions_from, write_conversations
from tests.feedback.scripted import Scripted, replied


# ------------------------------------------------------------------------------------------------------------- judge
def test_a_judge_model_is_asked_only_what_is_open():
    question = plain_question("Which city?", "Paris", "q")
    pairs = [
        (question, "PARIS."),  # right by the rules
        (question, "I don't know."),  # abstained by the rules
        (question, "The French capital"),
        (question, "My best guess is the French capital."),
        (question, "Rome"),
        (question, "Rome"),  # asked once
        (question, "unclear"),
    ]

    def says(prompt, draw):
        assert draw is None and "True answer: Paris" in prompt and "Question: Which city?" in prompt
        given = prompt.split("Given answer: ")[1].split("\n")[0]
        return {"The French capital": "Yes.", "the French capital": "**yes** it is", "Rome": "No, yes is wrong"}.get(
            given, "yesterday"
        )

    counts, ask = Counts(), Scripted(says)
    judge = by_model(ask, counts=counts)
    verdicts = judge(pairs)
    assert [v.outcome for v in verdicts] == ["right", "abstained", "right", "right", "wrong", "wrong", "wrong"]
    assert [v.hedged for v in verdicts] == [False, False, False, True, False, False, False]
    assert counts == Counts(asked=4, yes=2, no=1, malformed=1)
    assert judge(pairs) == verdicts and judge([]) == [] and ask.calls == [4]
    # As the judge of a probe.
    p = probe(Scripted(lambda *_: "The French capital"), [question], k=2, judge=judge)[0]
    assert (p.outcome, p.outcomes) == ("right", ("right", "right"))


def test_addresses_are_fixed_for_good():
    assert address("probe", "fact/3/major/train2") == 1139222541
    assert all(0 <= address(i) < 2**31 for i in range(100))
    assert address("a", "b") != address("ab")


# --------------------------------------------------------------------------------------------------------- questions
PASSAGE = (
    "Ada Lovelace was born in London in 1815. She wrote long notes about the Analytical Engine of Charles Babbage."
)
WROTE = """Here you are:
1. Question: Where was Ada Lovelace born?
   Answer: London.
Question: When was Ada Lovelace born?
Answer: 1815
Question: Who built the Analytical Engine?
Answer: Charles Babbage
Question: Tell me her city
Answer: London
Question: Who was Ada Lovelace's father?
Answer: Lord Byron
Question: Was Ada Lovelace a woman of London?
Answer: London
Question: What does the text say about 1815?
Answer: Ada Lovelace
question: where was  ada lovelace born?
answer: London
Question: What is this whole sentence about the engine?
Answer: She wrote long notes about the Analytical Engine of Charles Babbage
Question: unanswered?"""


def author(prompt, draw):
    if prompt.startswith("Write 9 short questions"):
        return WROTE if PASSAGE in prompt else "I would rather not."
    passage, question = prompt.rsplit("\n\n", 1)
    assert passage == PASSAGE and draw is not None
    # Right once in two samples about the engine, which is not enough.
    return {"Where": "London", "When": "1,815"}.get(question.split()[0], "Charles Babbage" if draw < 0.5 else "Ada")


def test_questions_are_kept_when_they_are_answered_with_the_passage_at_hand(tmp_path):
    counts, ask = Filtered(), Scripted(author)
    passages = [("ada.txt", PASSAGE), ("empty.txt", "Nothing.")]
    kept = questions_from(ask, passages, "m@1", count=9, k=8, seed=5, counts=counts)
    assert [(w.question.text, w.question.answer) for w in kept] == [
        ("Where was Ada Lovelace born?", "London"),
        ("When was Ada Lovelace born?", "1815"),
    ]
    assert ask.calls == [2, 3 * 8]
    assert dict(counts.rejected) == {
        "is a question": 1,
        "short": 1,
        "answer in the passage": 1,
        "answer not in the question": 1,
        "stands alone": 1,
        "new": 1,
        "answered with the passage at hand": 1,
        "no question and answer": 1,
    }
    assert counts.written == 9 + 1 and counts.kept == 2 and counts.written == counts.kept + counts.rejected.total()
    assert kept[0].source == {
        "made_by": "questions_from", "model": "m@1", "passage": "ada.txt", "seed": 5, "agreed": 1.0
    }  # fmt: skip
    assert kept[1].question.check == "numeric" and kept[1].question.id == "ada.txt/1"
    assert written.open_book(kept[0]).text == f"{PASSAGE}\n\nWhere was Ada Lovelace born?"

    lines = [json.dumps(r) for r in written.question_records(kept)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    assert read_questions(tmp_path / "q.jsonl") == [w.question for w in kept]
    assert questions_from(Scripted(author), [], "m") == []
    # As often as is asked for is enough.
    shares = [
        w.source["agreed"] for w in questions_from(Scripted(author), passages, "m", count=9, k=8, seed=5, agree=0.0)
    ]
    assert shares[:2] == [1, 1] and 0 < shares[2] < 0.75
    assert len(questions_from(Scripted(author), passages, "m", count=9, k=8, seed=5, agree=shares[2])) == 3


def test_what_leaves_no_room_is_not_asked_and_is_counted():
    """A passage too long to write about, and questions too long to ask with their passage."""
    asked, counts, ask = [], Filtered(), Scripted(author)

    def fits(prompt, tokens):
        text = prompt.messages[-1].text
        asked.append((text[:5], tokens))
        return "too long" not in text and "where was" not in text.rpartition("\n")[2].casefold()

    passages = [("long.txt", "too long"), ("ada.txt", PASSAGE)]
    kept = questions_from(ask, passages, "m", count=9, k=8, seed=5, counts=counts, fits=fits)
    assert [w.question.text for w in kept] == ["When was Ada Lovelace born?"] and ask.calls == [1, 2 * 8]
    assert counts.rejected["fits"] == 2 + 1  # the question comes twice, and was not kept the first time
    assert counts.written == 9 + 1 == counts.kept + counts.rejected.total()
    assert set(asked) == {("Write", written.WRITING.max_tokens), ("Ada L", written.ANSWERING.max_tokens)}


def test_every_question_filter_refuses_something():
    right = ("Where was Ada Lovelace born?", "London", PASSAGE)
    wrong = {
        "is a question": ("Ada Lovelace was born where", "London", PASSAGE),
        "short": ("Where?", PASSAGE, PASSAGE),
        "answer in the passage": ("Where?", "Rome", PASSAGE),
        "answer not in the question": ("Is it LONDON?", "London", PASSAGE),
        "stands alone": ("Where does this passage play?", "London", PASSAGE),
    }
    assert wrong.keys() == QUESTION_FILTERS.keys()
    for name, passes in QUESTION_FILTERS.items():
        assert passes(*right) and not passes(*wrong[name]), name


# ----------------------------------------------------------------------------------------------------- conversations
def test_conversations_are_written_from_templates(tmp_path):
    templates = [
        Template("explain", "Explain {what} to {whom}.", {"what": ("rain", "snow"), "whom": ("me", "us")}),
        Template("ask", "Write a question about {what}.", {"what": ("tea", "salt")}, "request", system="Be brief."),
    ]

    def says(prompt, draw):
        if prompt == "Write a question about salt.":
            return replied("And then", finish_reason="length")
        if prompt.startswith("Write a question about"):
            return f"Why is there {prompt.split()[-1][:-1]}?"
        return {"Explain snow to us.": "I don't know."}.get(prompt, f"Because of what {prompt.lower()} says.")

    counts, ask = Filtered(), Scripted(says)
    made = write_conversations(ask, templates, 8, "m@1", counts=counts)
    assert ask.calls == [4, 8]  # all requests at once, then all replies
    requests = [x.conversation.messages[-2].text for x in made]
    assert requests == ["Explain rain to me.", "Why is there tea?", "Explain snow to me.", "Explain rain to us."]
    assert dict(counts.rejected) == {"finished": 2, "no refusal": 1, "new": 1}
    assert (counts.written, counts.kept) == (8, 4)
    assert made[1].conversation.messages[0] == Message("system", "Be brief.")
    assert made[1].source == {
        "made_by": "write_conversations", "model": "m@1", "template": "ask", "slots": {"what": "tea"}, "number": 0,
        "seed": 0,
    }  # fmt: skip
    write_lessons(tmp_path / "w.jsonl", made)
    source = chat_sources.Messages(str(tmp_path / "w.jsonl"))
    assert list(chat_sources.conversations(source)) == [x.conversation for x in made]
    sources = [json.loads(line)["source"] for line in (tmp_path / "w.jsonl").read_text().splitlines()]
    assert collections.Counter(s["template"] for s in sources) == {"explain": 3, "ask": 1}
    # One more text leaves those before it as they are.
    assert write_conversations(Scripted(says), templates, 7, "m@1") == made


def test_every_filter_refuses_something():
    wrong = {
        "not empty": ("Why?", " "),
        "length": ("Why?", "a" * 4001),
        "no refusal": ("Why?", "I don't know."),
        "no echo": ("Why  me?", "why me?"),
        "letters": ("Why?", "1 | 2 | 3 | 4"),
        "varied": ("Why?", "it is what it is " * 20),
    }
    assert wrong.keys() == FILTERS.keys()
    for name, passes in FILTERS.items():
        assert passes("Why?", "Because the sky is wide and the sea is deep.") and not passes(*wrong[name]), name


def test_bad_templates_are_one_clear_line():
    for arguments, message in (
        (("t", "Say {what}"), "a slot without values"),
        (("t", "Say {"), "stray brace"),
        (("t", "Say {what}", {"what": ()}), "slot 'what' has no values"),
        (("t", "Say", {}, "both"), '"reply" or "request"'),
    ):
        with pytest.raises(UserError, match=message):
            Template(*arguments)
    ask = Scripted(lambda *_: "x")
    with pytest.raises(UserError, match="a count of at least 1"):
        write_conversations(ask, [], 3, "m")
    with pytest.raises(UserError, match="names that are all different"):
        write_conversations(ask, [Template("t", "a"), Template("t", "b")], 3, "m")
