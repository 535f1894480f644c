"""People and biographies: what the texts say is read back by the sentences alone, and must be the ground truth."""

import collections
import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.world import sentences
from jaxlm.data.world.corpus import World, fingerprint, size, texts, world_tables
from jaxlm.data.world.people import ATTRIBUTES, AUGMENTATIONS, Augmentation, People, person, stated, tables
from jaxlm.data.world.questions import fact_questions, persons
from tests.data.world.worlds import SMALL, Reader, biographies, people_of


# ------------------------------------------------------------------------------------------------------------- people
@pytest.mark.parametrize("names", ["full", "short"])
def test_names_are_unique(names):
    world = World(people=People(count=3000, unmentioned=500, names=names))
    found = [p.name for p in people_of(world)]
    assert len(set(found)) == 3500
    assert {len(n.split()) for n in found} == {3 if names == "full" else 2}


def test_the_people_are_split():
    t = world_tables(SMALL)
    everyone = people_of(SMALL)
    for mentioned in (True, False):
        train, heldout = (set(persons(t, s, mentioned)) for s in ("train", "heldout"))
        assert not train & heldout and len(train) == len(heldout)
        assert train == {p.index for p in everyone if p.mentioned == mentioned and p.split == "train"}
    assert set(persons(t)) == set(range(90))
    assert {q.person for q in fact_questions(t, "train")} == set(persons(t, "train"))


def test_facts_are_spread_and_consistent():
    everyone = people_of(World(people=People(count=2000, values=10)))
    cities = {}
    for p in everyone:
        assert tuple(p.facts) == ATTRIBUTES
        cities.setdefault(p.facts["employer"], set()).add(p.facts["employer_city"])
        assert p.known["employer"] == p.known["employer_city"]
    assert all(len(c) == 1 for c in cities.values())
    for attribute in ("birth_city", "major", "hobby"):
        counts = collections.Counter(p.facts[attribute] for p in everyone)
        assert len(counts) == 10 and max(counts.values()) < 1.4 * min(counts.values())
    # Whom the text knows often, once and never is as asked for, and does not depend on what is true.
    told = collections.Counter(k for p in everyone[:2000] for k in p.known.values())
    assert told["once"] / 16000 == pytest.approx(0.15, abs=0.01)
    assert told["never"] / 16000 == pytest.approx(0.15, abs=0.01)


def test_fewer_attributes_leave_the_others_true():
    few = People(count=30, attributes=("major", "employer_city"))
    a, b = (tables(dataclasses.replace(few, attributes=x), 0) for x in (few.attributes, ATTRIBUTES))
    for i in range(30):
        assert person(a, i).facts == {k: person(b, i).facts[k] for k in few.attributes}


# -------------------------------------------------------------------------------------------------------- biographies
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_text_states_what_it_should_and_how_often(name):
    how = AUGMENTATIONS[name]
    world = dataclasses.replace(SMALL, people=dataclasses.replace(SMALL.people, augmentation=how))
    read, everyone, stated = Reader(world), people_of(world), collections.Counter()
    orders, wordings = collections.defaultdict(set), collections.defaultdict(set)
    for i, text in biographies(world, "train/bio/"):
        who = everyone[int(i.split("/")[2])]
        statements = read.text(text)
        named = [s[3] for s in statements]
        assert named[0] == who.name
        if how.fullname:
            assert set(named) == {who.name}
        else:
            assert {n.lower() for n in named[1:]} <= set(who.pronouns)
        for attribute, wording, value, _ in statements:
            assert value == who.facts[attribute]
            assert not sentences.is_heldout(wording)
            stated[who.index, attribute] += 1
            wordings[who.index, attribute].add(wording)
        often = tuple(s[0] for s in statements if who.known[s[0]] == "often")
        orders[who.index].add(often)
    for who in everyone:
        for attribute in ATTRIBUTES:
            assert stated[who.index, attribute] == who.exposures(attribute, world.people)
            if who.known[attribute] == "often":
                assert len(wordings[who.index, attribute]) == how.wordings
    several = [len(o) for i, o in orders.items() if len(next(iter(o))) > 3]
    assert min(several) > 1 if how.permute else max(several) == 1
    assert len({len(t) for _, t in texts(world)}) > 1


@given(st.integers(0, 2**63 - 1), st.integers(2, 40), st.floats(0, 0.6), st.floats(0, 0.39), st.booleans())
@settings(max_examples=25, deadline=None)
def test_withheld_facts_and_unmentioned_people_never_appear(seed, count, never, once, fullname):
    people = People(
        count=count, unmentioned=10, values=1000, never=never, once=once, augmentation=Augmentation(fullname=fullname)
    )
    world = World(seed=seed, people=people, problems=10, questions=10, validation=min(count, 5))
    everyone = people_of(world)
    whole = "\n".join(text for _, text in texts(world))
    for who in everyone:
        assert (who.name in whole) == who.mentioned
    for i, text in texts(world):
        for who in [everyone[int(i.split("/")[2])]] if "/bio/" in i else [p for p in everyone if p.name in text]:
            for attribute, told in who.known.items():
                others = {v for a, v in who.facts.items() if a != attribute and who.known[a] != "never"}
                if told == "never" and who.facts[attribute] not in others:
                    assert not re.search(rf"\b{who.facts[attribute]}\b", text), (i, attribute)
    for who in everyone[:count]:
        assert "often" in who.known.values()


def test_passing_people_are_named_in_one_text_and_never_asked_about():
    world = dataclasses.replace(SMALL, people=dataclasses.replace(SMALL.people, passing=50), problems=7, questions=9)
    t, everyone, found = world_tables(world), people_of(world), dict(texts(world))
    without = dataclasses.replace(world, people=SMALL.people)
    assert len(found) == sum(size(world)) == sum(size(without)) + 50
    for i in range(len(everyone), len(everyone) + 50):
        who = person(t, i)
        told = stated(who, 0, t.people.attributes)
        assert [who.name in text for text in found.values()].count(True) == 1
        text = found[f"train/bio/{i}/0"]
        assert len(told) == 2 and all(text.count(who.facts[a]) == 2 for a in told)
        sentences = re.split(r"(?<=\.) ", text)
        assert len(set(sentences)) == 4 and all(who.name in x for x in sentences)
    assert max(persons(t)) < len(everyone)
    # Others are who they are without them.
    before = dict(texts(without))
    assert before == {i: text for i, text in found.items() if i in before}


def test_of_the_training_side_alone_nobody_else_is_told():
    world = dataclasses.replace(SMALL, problems=7, told="train")
    every, found = dict(texts(dataclasses.replace(world, told="all"))), dict(texts(world))
    assert found.items() < every.items() and len(found) == sum(size(world))
    others = [p.name for p in people_of(world) if p.split == "heldout" and p.mentioned]
    training = {i: text for i, text in found.items() if i.startswith("train/")}
    assert others and not any(name in text for name in others for text in training.values())
    left_out = {i.split("/")[2] for i in every.keys() - found.keys()}
    assert len(left_out) == len(others)
    assert fingerprint(world) != fingerprint(dataclasses.replace(world, told="all"))


def test_validation_is_in_heldout_sentences():
    read, everyone = Reader(SMALL), people_of(SMALL)
    found = biographies(SMALL, "heldout/bio/")
    assert len(found) == len({i for i, _ in found}) == 40
    for i, text in found:
        who = everyone[int(i.rsplit("/", 1)[1])]
        for attribute, wording, value, _ in read.text(text):
            assert sentences.is_heldout(wording) and who.known[attribute] == "often"
            assert value == who.facts[attribute]
