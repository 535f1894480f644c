"""Questions ask for the truth, in wordings of two sides; what answers them is at hand where it should be."""

from jaxlm.data.world.corpus import world_tables
from jaxlm.data.world.people import ATTRIBUTES, person
from jaxlm.data.world.questions import FRAMES, NOUNS, fact_question, fact_questions, wordings
from jaxlm.data.world.talk import index_files, open_book, untold
from tests.data.world.worlds import SMALL, Reader, people_of


def test_fact_questions_ask_for_the_truth():
    t = world_tables(SMALL)
    found = list(fact_questions(t, "heldout", per_fact=3))
    assert len({q.id for q in found}) == len({q.text for q in found}) == len(found) == 3 * 8 * 45
    for q in found:
        who = person(t, q.person)
        assert who.name in q.text and q.answer == who.facts[q.attribute]
        assert (q.known, q.mentioned, q.split) == (who.known[q.attribute], who.mentioned, "heldout")

    def shape(split, attribute):
        n = len(wordings(attribute, split == "heldout"))
        asked = [q for q in fact_questions(t, split, per_fact=n) if q.attribute == attribute]
        return {q.text.replace(person(t, q.person).name, "") for q in asked}

    for attribute in ATTRIBUTES:
        train, heldout = shape("train", attribute), shape("heldout", attribute)
        assert len(train) == len(wordings(attribute, False)) and len(heldout) == len(FRAMES) and not train & heldout
    known = list(fact_questions(t, "heldout", ("often", "once"), mentioned=True, heldout_wordings=False))
    assert known and all(q.known != "never" and "/train" in q.id for q in known)


def test_heldout_wordings_are_new_only_as_a_whole():
    """Each frame and each noun of a held-out wording stands in training wordings of the same attribute."""
    composed = {(f.replace("{x}", n), a): (f, n) for a, nouns in NOUNS.items() for f in FRAMES for n in nouns}
    everything = [w for a in ATTRIBUTES for side_ in (False, True) for w in wordings(a, side_)]
    assert len(set(everything)) == len(everything)
    for attribute in ATTRIBUTES:
        parts = {side_: [composed.get((w, attribute)) for w in wordings(attribute, side_)] for side_ in (False, True)}
        seen = [p for p in parts[False] if p is not None]
        for part in (0, 1):
            assert {p[part] for p in parts[True]} == {p[part] for p in seen}


def test_fact_question_wordings_come_again():
    who = person(world_tables(SMALL), 0)
    assert fact_question(who, "major", 0) == fact_question(who, "major", len(wordings("major", False)))
    assert fact_question(who, "major", 0, heldout=True).text != fact_question(who, "major", 0).text


def test_open_book_has_the_answer_at_hand():
    t, read = world_tables(SMALL), Reader(SMALL)
    for q in fact_questions(t, "heldout", ("never",)):
        told, asked = open_book(t, q).text.split("\n\n")
        assert asked == q.text and q.answer not in q.text
        assert (q.attribute, q.answer) in {(a, v) for a, _, v, _ in read.text(told)}


def test_the_index_has_what_no_text_tells():
    read, everyone, found = Reader(SMALL), people_of(SMALL), {}
    for name, text in index_files(SMALL):
        title, body = text.rstrip("\n").split("\n\n")
        index, attribute = name.removesuffix(".txt").split("_", 1)
        assert title.startswith(everyone[int(index)].name)
        assert read.text(body) == [(attribute, *read.sentence(body)[1:])]
        found[int(index), attribute] = read.sentence(body)[2]
    t = world_tables(SMALL)
    assert found == {(w.index, a): w.facts[a] for w in everyone for a in untold(t, w)}
