"""The world: what its texts say is read back from them by the sentences alone, and must be what the ground truth is."""

import ast
import collections
import concurrent.futures
import contextlib
import dataclasses
import doctest
import hashlib
import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import tools
from jaxlm.config import UserError, from_json, to_json
from jaxlm.data.conversation import parse, render
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.data.world import banks, draws, graphs, sentences
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
from jaxlm.data.world.arithmetic import ASK as ASK_ARITHMETIC
from jaxlm.data.world.arithmetic import Arithmetic
from jaxlm.data.world.corpus import (
    World,
    document,
    fingerprint,
    problem,
    size,
    task_problem,
    texts,
    world_tables,
)
from jaxlm.data.world.draws import Draws, permuted
from jaxlm.data.world.graphs import Graphs
from jaxlm.data.world.people import ATTRIBUTES, AUGMENTATIONS, Augmentation, People, name_space, person, stated, tables
from jaxlm.data.world.questions import (
    FRAMES,
    NOUNS,
    QUESTIONS,
    Question,
    fact_question,
    fact_questions,
    persons,
    wordings,
)
from jaxlm.data.world.sentences import SENTENCES, side
from jaxlm.data.world.talk import (
    WorldConversations,
    conversation,
    conversations,
    index_files,
    open_book,
    recollection,
    untold,
)
from jaxlm.data.world.talk import fingerprint as talk_fingerprint
from jaxlm.data.world.words import ASK as ASK_WORDS
from jaxlm.data.world.words import Words

SMALL = World(people=People(count=60, unmentioned=30, values=12, once=0.2, never=0.2), validation=40)
MIXED = dataclasses.replace(SMALL, problems=40, questions=30)
ALL_TOOLS = WorldConversations(world=SMALL, unknown=1.5, search=1.5, tools=("calculator", "python", "search"))
PROBLEMS = World()
DATE = re.compile(r"[A-Z][a-z]+ \d+, \d{4}")


def people_of(world: World) -> list:
    t = world_tables(world)
    return [person(t, i) for i in range(world.people.count + world.people.unmentioned)]


# ------------------------------------------------------------------------------------------- reading a text back
class Reader:
    """Reads sentences by the templates alone: (attribute, wording, value, who is named)."""

    def __init__(self, world: World):
        self.values = world_tables(world).values
        slots = {"S": "(?P<who>{n}|She|He)", "s": "(?P<who>{n}|she|he)", "o": "(?P<who>{n}|her|him)"}
        slots |= {"P": "(?P<who>{n}'s|Her|His)", "p": "(?P<who>{n}'s|her|his)"}
        slots |= {"he": "(?:she|he)", "his": "(?:her|his)", "him": "(?:her|him)", "v": "(?P<v>.+)"}
        name = r"[A-Z]\w+(?: [A-Z]\w+){1,2}"
        slots = {k: v.replace("{n}", name) for k, v in slots.items()}
        escaped = re.compile(r"\\\{(\w+)\\\}")
        self.patterns = [
            (attribute, i, re.compile(escaped.sub(lambda m: slots[m[1]], re.escape(template))))
            for attribute, bank in SENTENCES.items()
            for i, template in enumerate(bank)
        ]

    def sentence(self, text: str) -> tuple[str, int, str, str]:
        found = []
        for attribute, i, pattern in self.patterns:
            m = pattern.fullmatch(text)
            if m and (
                m["v"] in self.values.get(attribute, ()) or (attribute == "birth_date" and DATE.fullmatch(m["v"]))
            ):
                found.append((attribute, i, m["v"], m["who"].removesuffix("'s")))
        assert len(found) == 1, (text, found)
        return found[0]

    def text(self, text: str) -> list[tuple[str, int, str, str]]:
        return [self.sentence(s) for s in re.findall(r"[^.]+\.", text.replace(". ", ".\n")) for s in [s.strip()]]


def biographies(world: World, prefix: str):
    return [(i, text) for i, text in texts(world) if i.startswith(prefix)]


# ------------------------------------------------------------------------------------------------------- draws
def test_draws_belong_to_their_item():
    first = Draws(1, draws.PEOPLE, 7)
    values = [first.bits() for _ in range(100)]  # several blocks
    other = Draws(1, draws.PEOPLE, 8)
    mixed, again = [], Draws(1, draws.PEOPLE, 7)
    for _ in range(100):
        mixed.append(again.bits())
        other.bits()
    assert mixed == values and len(set(values)) == 100
    for different in (Draws(2, draws.PEOPLE, 7), Draws(1, draws.NAMES, 7), Draws(1, draws.PEOPLE, 7, 1)):
        assert different.bits() != values[0]
    assert Draws(1, draws.PEOPLE, 7).bits() == values[0]  # the longer index before it leaves nothing behind


def test_draws_are_even():
    d = Draws(0, draws.WORDS, 0)
    counts = collections.Counter(d.below(6) for _ in range(6000))
    assert set(counts) == set(range(6)) and max(counts.values()) < 1150 and min(counts.values()) > 850
    assert sum(d.chance(0.25) for _ in range(4000)) == pytest.approx(1000, abs=120)
    assert sorted(d.shuffled(range(9))) == list(range(9))
    assert len(set(d.sample("abcdef", 4))) == 4 and len(d.sample("ab", 4)) == 2
    assert {d.between(3, 5) for _ in range(100)} == {3, 4, 5}


@given(st.integers(1, 300), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_permutations_permute(size, seed):
    assert sorted(permuted(i, size, seed, draws.NAMES) for i in range(size)) == list(range(size))


def test_streams_are_all_different():
    ids = [v for k, v in vars(draws).items() if k.isupper() and k[0] != "_" and isinstance(v, int)]
    assert sorted(ids) == list(range(len(ids)))


# ------------------------------------------------------------------------------------------------------- banks
def test_banks_have_no_doubles():
    places = banks.places()
    lists = [banks.FEMALE + banks.MALE, banks.MIDDLE, banks.last_names(), banks.ITEMS, banks.WORDS, *places.values()]
    for bank in lists:
        assert len(set(bank)) == len(bank)
        assert all(text == " ".join(text.split()) and "." not in text for text in bank)
    assert not set(banks.last_names()) & set(places["birth_city"])
    # A value inside a sentence's own words would be told by accident.
    words = {w for bank in SENTENCES.values() for s in bank for w in re.findall(r"\w+", s)}
    assert not words & {v for bank in places.values() for v in bank}


def test_sentences_name_the_person_once_and_the_value_once():
    assert tuple(SENTENCES) == ATTRIBUTES == tuple(QUESTIONS)
    everything = [s for bank in SENTENCES.values() for s in bank]
    assert len(set(everything)) == len(everything)
    for bank in SENTENCES.values():
        assert len(bank) >= 30 and len(side(bank, True)) >= 8
        assert not set(side(bank, True)) & set(side(bank, False))
        for s in bank:
            slots = re.findall(r"\{(\w+)\}", s)
            assert slots.count("v") == 1 and sum(x in ("S", "s", "P", "p", "o") for x in slots) == 1, s
            assert set(slots) <= {"v", "S", "s", "P", "p", "o", "he", "his", "him"} and s.endswith("."), s
            assert (s[0] == "{") == (s.startswith(("{S}", "{P}", "{v}"))), s


def test_questions_have_two_sides():
    everything = [q for bank in QUESTIONS.values() for q in bank]
    assert len(set(everything)) == len(everything)
    for bank in [*QUESTIONS.values(), ASK_ARITHMETIC, *ASK_WORDS.values()]:
        assert len(side(bank, True)) >= 3 and len(side(bank, False)) >= 9
        assert len(set(bank)) == len(bank)


# -------------------------------------------------------------------------------------------------- determinism
def test_any_document_alone_in_any_order():
    whole = list(texts(MIXED))
    assert sum(size(MIXED)) == len(whole) == len({i for i, _ in whole})
    tables.cache_clear(), person.cache_clear()
    order = [7, 300, 0, 371, 150, len(whole) - 1, 8]
    assert [document(MIXED, i) for i in order] == [whole[i] for i in order]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: document(MIXED, i), range(len(whole)))) == whole
    with pytest.raises(IndexError):
        document(MIXED, len(whole))


def test_a_seed_is_a_world_of_its_own():
    other = people_of(dataclasses.replace(SMALL, seed=1))
    assert not {p.name for p in other} & {p.name for p in people_of(SMALL)}


def test_golden():
    """What a world writes is for good. A change on purpose takes a higher `corpus.VERSION` and new values here."""

    def digest(lines) -> str:
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    talk = (repr(conversation(ALL_TOOLS, split, i)) for split in ("train", "heldout") for i in range(60))
    questions = (q.text + q.answer for q in fact_questions(world_tables(SMALL), "heldout"))
    problems = (repr(problem(PROBLEMS, split, i)) for split in ("train", "heldout") for i in range(60))
    found = [digest(i + text for i, text in texts(MIXED)), digest(talk), digest(questions), digest(problems)]
    assert found == GOLDEN


GOLDEN = ["421966128a2e7ffd", "c7d8f9064f865ac9", "dc4f5b00855488de", "136b0a1512389f60"]


def test_fingerprint_follows_what_decides_the_text():
    changed = dataclasses.replace(SMALL, people=dataclasses.replace(SMALL.people, never=0.1))
    same = dataclasses.replace(SMALL, name="other", weight=2.0)
    assert fingerprint(same) == fingerprint(SMALL) != fingerprint(changed)
    talk = WorldConversations(world=SMALL)
    assert talk_fingerprint(talk) == talk_fingerprint(dataclasses.replace(talk, world=same, name="x"))
    assert talk_fingerprint(talk) != talk_fingerprint(dataclasses.replace(talk, world=changed))


def test_definitions_go_through_json():
    for node in (MIXED, ALL_TOOLS):
        assert from_json(type(node), to_json(node)) == node


# ------------------------------------------------------------------------------------------------------- people
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


# -------------------------------------------------------------------------------------------------- biographies
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


def test_validation_takes_each_person_once():
    few = dataclasses.replace(SMALL, people=People(count=3), validation=200)
    assert size(few) == (15, 3) and size(dataclasses.replace(few, problems=1)) == (16, 6)
    assert len({i for i, _ in texts(few)}) == 18


def test_documents_are_mixed():
    ids = [i for i, _ in texts(MIXED)][: size(MIXED)[0]]
    kinds = collections.Counter(i.rsplit("/", i.count("/") - 1)[0] for i in ids)
    assert kinds == {"train/bio": 300, "train/problem": 40, "train/question": 30}
    who = [i.split("/")[2] for i in ids if "/bio/" in i]
    assert sum(a == b for a, b in itertools.pairwise(who)) < 20


def test_questions_in_pretraining_are_of_training_people():
    everyone = {p.name: p for p in people_of(MIXED)}
    for i, text in texts(MIXED):
        if i.startswith("train/question"):
            asked, answer = re.fullmatch(r"Question: (.+)\nAnswer: (.+)", text).groups()
            (who,) = (p for n, p in everyone.items() if n in asked)
            assert who.split == "train" and who.mentioned
            assert "often" in {who.known[a] for a, v in who.facts.items() if v == answer}


# ---------------------------------------------------------------------------------------------------- questions
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


def test_a_recollection_is_a_sentence_of_pretraining():
    t = world_tables(SMALL)
    for who in people_of(SMALL)[:20]:
        for attribute, value in who.facts.items():
            known, unknown = (recollection(t, who, attribute, v) for v in (value, None))
            assert known.kind == unknown.kind == "thinking"
            assert known.text == f"{unknown.text} {value}."
            form = known.text.replace(f"{who.name}'s", "{P}").replace(who.name, "{S}").replace(value, "{v}")
            assert form in side(SENTENCES[attribute], False)


def test_facts_are_recalled_before_they_are_told():
    plain = dataclasses.replace(ALL_TOOLS, recollect=False, problems=0.0, identity=0.0, system=0.0)
    for cfg in (plain, dataclasses.replace(plain, recollect=True)):
        kinds = collections.Counter()
        for i in range(60):
            for message in conversation(cfg, "train", i).messages:
                if message.role != "assistant":
                    continue
                thoughts = [p.text for p in message.parts if p.kind == "thinking"]
                assert len(thoughts) == cfg.recollect
                called, refused = any(p.kind == "tool_call" for p in message.parts), is_refusal(message.text)
                kinds["search" if called else "unknown" if refused else "fact"] += 1
                if thoughts:
                    forgotten = not thoughts[0].endswith(".")
                    assert forgotten == (called or refused) and (forgotten or message.text in thoughts[0])
        assert min(kinds[k] for k in ("search", "unknown", "fact")) > 3


def test_reading_questions_come_with_the_text_that_tells():
    t = world_tables(SMALL)
    shares = {"reading": 1.0, "facts": 0.0, "problems": 0.0, "identity": 0.0, "system": 0.0}
    cfg = WorldConversations(world=SMALL, tool_share=0.0, **shares)
    known, sentences = collections.Counter(), collections.Counter()
    for split in ("train", "heldout"):
        names = {person(t, i).name: person(t, i) for i in persons(t, split)}
        for i in range(40):
            messages = conversation(cfg, split, i).messages
            for user, reply in zip(messages[::2], messages[1::2], strict=True):
                text, question = user.text.split("\n\n")
                who = names[next(n for n in names if n in question)]
                assert reply.text in text
                sentences[text.count(who.name)] += 1
                told = {recollection(t, who, a, reply.text): a for a, v in who.facts.items() if v == reply.text}
                known[who.known[told[reply.parts[0]]]] += 1
    assert min(known[k] for k in ("often", "once", "never")) > 0
    assert min(sentences) == 1 and max(sentences) >= len(SMALL.people.attributes) - 1


def test_told_facts_may_fail_to_come_to_mind():
    shares = {"problems": 0.0, "identity": 0.0, "system": 0.0, "tool_share": 0.0, "turns": 1}
    for forget in (0.0, 0.3, 1.0):
        cfg = WorldConversations(world=SMALL, forget=forget, **shares)
        replies = [conversation(cfg, "train", i).messages[-1] for i in range(200)]
        refused = [is_refusal(r.text) for r in replies]
        assert abs(sum(refused) / len(refused) - forget) < 0.12
        assert refused == [not r.parts[0].text.endswith(".") for r in replies]


@pytest.mark.parametrize("kind", ["reading", "search"])
def test_texts_may_tell_what_is_not_so(kind):
    """And the reply says what the text says."""
    shares = dict.fromkeys(("facts", "reading", "search", "problems", "identity", "system"), 0.0) | {kind: 1.0}
    t, true = world_tables(SMALL), {}
    for invented in (0.0, 0.5, 1.0):
        cfg = WorldConversations(world=SMALL, invented=invented, tools=("search",), turns=1, **shares)
        right = []
        for i in range(100):
            asked, reply = conversation(cfg, "train", i).messages[-2:]
            shown = asked.text if kind == "reading" else next(p.text for p in reply.parts if p.kind == "tool_result")
            assert reply.text in shown
            truths = [w for w in people_of(SMALL) if w.name in asked.text]
            right.append(any(reply.text in w.facts.values() for w in truths))
        true[invented] = sum(right) / len(right)
    assert true[0.0] == 1.0 and true[1.0] < 0.2 and abs(true[0.5] - 0.5) < 0.2
    assert t.people.values > 5  # else somebody's value is often the same


def test_told_facts_may_be_looked_up_where_search_is_offered():
    shares = {"facts": 1.0, "problems": 0.0, "identity": 0.0, "system": 0.0, "turns": 1, "tool_share": 0.5}
    cfg = WorldConversations(world=SMALL, look_up=0.5, tools=("search",), **shares)
    calls = {True: [], False: []}
    for i in range(200):
        offered, reply = len(conversation(cfg, "train", i).messages) == 3, conversation(cfg, "train", i).messages[-1]
        calls[offered].append(any(p.kind == "tool_call" for p in reply.parts))
        assert calls[offered][-1] != reply.parts[0].text.endswith(".")  # it is recalled, or the thought breaks off
    assert not any(calls[False]) and abs(sum(calls[True]) / len(calls[True]) - 0.5) < 0.15


def test_what_comes_to_mind_and_where_a_thought_breaks_off_may_be_left_to_doubt():
    tokenizer = BytesTokenizer()
    shares = {"facts": 1.0, "search": 1.0, "unknown": 1.0, "reading": 1.0}
    shares |= {"problems": 0.0, "identity": 0.0, "system": 0.0}
    cfg = WorldConversations(world=SMALL, tools=("search",), turns=1, **shares)
    told = {"recalled": 0, "read": 0, "nowhere": 0}
    for i in range(100):
        taught, left = (conversation(dataclasses.replace(cfg, doubted=d), "train", i) for d in (False, True))
        rendered, fields = render(taught, tokenizer), render(left, tokenizer)
        assert np.array_equal(rendered["tokens"], fields["tokens"])
        (places,) = np.nonzero(rendered["loss_mask"] != fields["loss_mask"])
        assert rendered["loss_mask"][places].all()
        spelled = tokenizer.decode(fields["tokens"][places].tolist())
        *_, reply = left.messages
        known = [f" {p.text}." for p in reply.parts if p.kind == "text"]
        if reply.parts[0].text[-1] != ".":  # a search or a refusal
            assert fields["tokens"][places].tolist() == [tokenizer.control["</think>"]]
            told["nowhere"] += 1
        elif "\n\n" in left.messages[-2].text:  # a text is before the question
            assert not len(places)
            told["read"] += 1
        else:
            assert spelled in known
            told["recalled"] += 1
    assert min(told.values()) > 15
    assert talk_fingerprint(cfg) != talk_fingerprint(dataclasses.replace(cfg, doubted=True))


def test_what_is_looked_up_all_the_same_is_taught():
    shares = {"facts": 1.0, "problems": 0.0, "identity": 0.0, "system": 0.0, "turns": 1}
    cfg = WorldConversations(world=SMALL, look_up=0.5, tools=("search",), tool_share=1.0, doubted=True, **shares)
    replies = [conversation(cfg, "train", i).messages[-1].parts for i in range(20)]
    looked_up = [parts[1].kind == "tool_call" for parts in replies]
    assert all(parts[0].end_trained and (parts[0].trained is None) == up for parts, up in zip(replies, looked_up))
    assert 3 < sum(looked_up) < 17


def test_what_is_invented_no_tool_is_asked_for():
    shares = {"facts": 0.0, "search": 1.0, "problems": 0.0, "reading": 0.0, "identity": 0.0, "system": 0.0}
    cfg = WorldConversations(world=SMALL, invented=1.0, tools=("search",), turns=1, **shares)
    for i in range(5):
        conversation(cfg, "train", i, call=lambda tool, argument: pytest.fail("called"))


def test_recollections_are_structure():
    """Thoughts come back as thoughts, and the model itself is trained to write them."""
    tokenizer, cfg = BytesTokenizer(), dataclasses.replace(ALL_TOOLS, turns=2)
    for i in range(40):
        talk = conversation(cfg, "train", i)
        row = render(talk, tokenizer)
        read = parse(row["tokens"], tokenizer)
        assert [m.parts for m in read.messages] == [m.parts for m in talk.messages]
        learned = tokenizer.decode([t for t, kept in zip(row["tokens"].tolist(), row["loss_mask"]) if kept])
        for part in (p for m in talk.messages for p in m.parts):
            if part.kind == "thinking":
                assert part.text in learned


def test_without_tools_there_is_only_work_that_can_be_done_by_hand():
    cfg = dataclasses.replace(ALL_TOOLS, tool_share=0.0, unknown=0.0, search=0.0, facts=0.0)
    for i in range(60):
        for message in conversation(cfg, "train", i).messages:
            assert all(p.kind in ("text", "thinking") for p in message.parts)
    hard = dataclasses.replace(cfg.world, tasks=("arithmetic",), arithmetic=Arithmetic(min_digits=3))
    with pytest.raises(UserError, match="needs a tool"):
        conversation(dataclasses.replace(cfg, world=hard, identity=0.0, system=0.0), "train", 0)


def test_words_go_to_python_where_it_is_offered_and_only_short_ones_are_asked_where_it_is_not():
    words = dataclasses.replace(SMALL, tasks=("spell", "count", "reverse"))
    cfg = WorldConversations(world=words, facts=0.0, identity=0.0, system=0.0, tool_share=1.0)
    for offered in (("calculator", "python"), ("calculator",)):
        parts = [
            p
            for i in range(40)
            for m in conversation(dataclasses.replace(cfg, tools=offered), "train", i).messages
            for p in m.parts
            if m.role != "system"
        ]
        asked = [word for p in parts for word in re.findall(r'"(\w\w+)"', p.text) if "?" in p.text]
        called = [p for p in parts if p.kind == "tool_call"]
        assert asked and bool(called) == ("python" in offered)
        assert (min(map(len, asked)) < 6) and (max(map(len, asked)) >= 6) == ("python" in offered)


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


def test_the_tools_give_what_conversations_show(tmp_path):
    (tmp_path / "texts").mkdir()
    for name, text in index_files(SMALL):
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8")
    tools.build_index(tmp_path / "texts", tmp_path / "index")
    search = tools.search_tool(tmp_path / "index", k=1)
    run_tool = {"search": search.run, "calculator": tools.calculate, "python": run}
    used = collections.Counter()

    def call(tool, argument):
        used[tool] += 1
        return run_tool[tool](argument)

    for i in range(150):
        assert conversation(ALL_TOOLS, "train", i, call) == conversation(ALL_TOOLS, "train", i)
    assert min(used.values()) > 2 and len(used) == 3
    assert len(list(conversations(dataclasses.replace(ALL_TOOLS, count=5), call=call))) == 5


# ----------------------------------------------------------------------------------------------------- problems
def splits(task: str, n: int, world: World = PROBLEMS):
    return {split: [task_problem(world, task, split, i) for i in range(n)] for split in ("train", "heldout")}


def evaluate(expression: str) -> int:
    """Exact arithmetic on +, -, * and an even /; nothing negative on the way."""

    def of(node) -> int:
        if isinstance(node, ast.Constant):
            return node.value
        a, b = of(node.left), of(node.right)
        if isinstance(node.op, ast.Div):
            assert a % b == 0
            return a // b
        value = {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}[type(node.op)]
        assert value >= 0
        return value

    return of(ast.parse(expression, mode="eval").body)


def run(program: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {})
    return out.getvalue().strip()


def solve(text: str) -> int:
    """The answer to a graph problem, from its sentences alone."""

    def pattern(template: str) -> str:
        slot = {"x": r"\d+", "m": r"\d+"} | dict.fromkeys("abc", r"[A-Z]\w+") | dict.fromkeys("ijk", "[a-z]+")
        return re.sub(r"\\\{(\w)\\\}", lambda m: f"(?P<{m[1]}>{slot[m[1]]})", re.escape(template))

    *sentences, asked = re.split(r"(?<=[.]) ", text)
    told, modulus = {}, None
    for sentence in sentences:
        if found := re.fullmatch(pattern(graphs.MODULO), sentence):
            modulus = int(found["m"])
            continue
        forms = ((kind, form) for kind, bank in graphs.TELL.items() for form in bank)
        matches = [(kind, m.groupdict()) for kind, form in forms if (m := re.fullmatch(pattern(form), sentence))]
        ((kind, got),) = matches
        assert (got["a"], got["i"]) not in told
        told[got["a"], got["i"]] = kind, got

    def value(*what: str) -> int:
        kind, got = told[what]
        first = value(got["b"], got["j"]) if "b" in got else 0
        second = value(got["c"], got["k"]) if "c" in got else 0
        x = int(got.get("x", 0))
        out = first * x if kind == "times" else first + second + x
        return out if modulus is None else out % modulus

    ((all_of, got),) = [
        (bank is graphs.ASK_ALL, m.groupdict())
        for bank in (graphs.ASK, graphs.ASK_ALL)
        for form in bank
        if (m := re.fullmatch(pattern(form), asked))
    ]
    out = sum(value(*what) for what in told if what[0] == got["a"]) if all_of else value(got["a"], got["i"])
    return out if modulus is None else out % modulus


def check_lines(p) -> None:
    """Every equation of a worked solution holds, and the last one gives the answer."""
    for line in p.solution:
        for part in line.rsplit(": ", 1)[-1].split(", "):
            if "=" in part:
                left, right = part.split(" = ")
                left = left.replace("mod", "%")
                assert (eval(left) if "%" in left else evaluate(left)) == int(right), line
    assert re.search(r"(\d+)$", p.solution[-1])[1] == p.question.answer


def test_arithmetic():
    both = splits("arithmetic", 600)
    cells = collections.Counter()
    for p in both["train"] + both["heldout"]:
        q = p.question
        (expression,) = re.findall(r"[\d(][\d +\-*/()]*[\d)]|\d", q.text)
        assert expression == p.argument and str(evaluate(expression)) == q.answer == p.result
        check_lines(p)
        assert len(p.solution) == q.steps == len(re.findall(r" [-+*/] ", expression))
        assert max(len(n) for n in re.findall(r"\d+", expression)) == q.digits
        assert (q.tool == "calculator") == (q.digits >= 3)
        cells[q.digits, q.steps] += 1
        # No parentheses that could be left out.
        for at in [i for i, c in enumerate(expression) if c == "("]:
            inside = (expression[at:j] for j in range(at + 1, len(expression) + 1))
            end = at - 1 + len(next(x for x in inside if x.count("(") == x.count(")")))
            without = expression[:at] + expression[at + 1 : end] + expression[end + 1 :]
            assert ast.dump(ast.parse(without)) != ast.dump(ast.parse(expression))
    assert set(cells.values()) == {100} and len(cells) == 12

    def content(p):
        return frozenset(re.findall(r"\d+|[-+*/]", p.argument)) if p.question.steps == 1 else p.argument

    one_step = {s: {content(p) for p in both[s] if p.question.steps == 1 and p.argument[2] in "+*"} for s in both}
    assert not one_step["train"] & one_step["heldout"]
    assert not {p.argument for p in both["train"]} & {p.argument for p in both["heldout"]}
    first = collections.Counter(re.search(r" ([-+*/]) ", p.argument)[1] for p in both["train"] if p.question.steps == 1)
    assert min(first.values()) > 30 and len(first) == 4


def test_the_same_problem_is_held_out_under_any_seed():
    heldout = {task_problem(World(seed=s), "arithmetic", "heldout", 4 * i).argument for s in (1, 2) for i in range(40)}
    train = {task_problem(World(seed=s), "arithmetic", "train", 4 * i).argument for s in (3, 4) for i in range(400)}
    assert not heldout & train


@pytest.mark.parametrize("cfg", [Graphs(), Graphs(2, 12, distractors=6, modulus=None, in_all=0.6)])
def test_graphs(cfg):
    both = splits("graph", 120, dataclasses.replace(PROBLEMS, graphs=cfg))
    kinds = set()
    for p in both["train"] + both["heldout"]:
        q = p.question
        check_lines(p)
        assert len(p.solution) == q.steps and run(p.argument) == q.answer == p.result
        labels = [line.split(": ")[0] for line in p.solution]
        assert len(set(labels)) == len(labels)
        assert str(solve(q.text)) == q.answer
        in_all = labels[-1].endswith("in all")
        told = len([s for s in re.split(r"(?<=[.]) ", q.text)[:-1] if "modulo" not in s])
        assert told == q.steps - in_all + cfg.distractors
        kinds.add(in_all)
        if cfg.modulus:
            assert int(q.answer) < cfg.modulus and f"modulo {cfg.modulus}" in q.text
    assert kinds == {True, False}
    steps = collections.Counter(p.question.steps for p in both["train"])
    assert max(steps.values()) - min(steps.values()) <= 1 and min(steps) == cfg.min_steps
    assert max(steps) == cfg.max_steps
    shapes = {s: {re.sub(r"^.*?: ", "", "\n".join(p.solution), flags=re.M) for p in both[s]} for s in both}
    assert not shapes["train"] & shapes["heldout"]


def test_words():
    found = {task: splits(task, 160) for task in ("spell", "count", "reverse")}
    for task, both in found.items():
        for p in both["train"] + both["heldout"]:
            q = p.question
            (word,) = (w for w in re.findall(r'"(\w+)"', q.text) if len(w) > 1)
            if task == "spell":
                assert q.answer.split("-") == list(word)
            elif task == "reverse":
                assert list(q.answer) == list(reversed(word))
            else:
                (letter,) = (w for w in re.findall(r'"(\w+)"', q.text) if len(w) == 1)
                assert int(q.answer) == sum(c == letter for c in word)
            assert run(p.argument) == p.result == q.answer
            assert len(word) == q.digits and q.by_hand == (len(word) < 6) and q.tool == "python"
    words = {s: {re.search(r'"(\w\w+)"', p.question.text)[1] for both in found.values() for p in both[s]}
             for s in ("train", "heldout")}  # fmt: skip
    assert not words["train"] & words["heldout"]
    assert words["train"] & set(banks.WORDS) and words["train"] - set(banks.WORDS)
    lengths = collections.Counter(p.question.digits for p in found["spell"]["train"])
    assert lengths == dict.fromkeys(range(3, 11), 20)
    counts = collections.Counter(p.question.answer for p in found["count"]["train"])
    assert counts["0"] > 30 and counts["1"] > 30 and counts["2"] > 20


def test_problems_take_turns():
    assert [problem(PROBLEMS, "train", i).question.kind for i in range(10)] == [*PROBLEMS.tasks, *PROBLEMS.tasks]
    assert problem(PROBLEMS, "train", 11) == task_problem(PROBLEMS, "graph", "train", 2)


# ------------------------------------------------------------------------------------------------------ answers
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


# ------------------------------------------------------------------------------------------------ conversations
def test_conversations_keep_their_side():
    everyone = {p.name: p for p in people_of(SMALL)}
    said = {"train": [], "heldout": []}
    for split in said:
        for i in range(300):
            for m in conversation(ALL_TOOLS, split, i).messages:
                said[split] += [(m.role, p.kind, p.text) for p in m.parts]
    asked = {s: {text for role, _, text in said[s] if role == "user"} for s in said}
    for split in said:
        whole = "\n".join(text for _, _, text in said[split])
        named = {p.split for n, p in everyone.items() if n in whole}
        assert named == {split}
    both = asked["train"] & asked["heldout"]
    assert not both


def test_conversations_say_what_is_true():
    everyone = {p.name: p for p in people_of(SMALL)}
    outcomes = collections.Counter()
    for i in range(400):
        talk = conversation(ALL_TOOLS, "train", i)
        assert talk == conversation(ALL_TOOLS, "train", i) and talk.id == f"train/{i}"
        system = next((m.text for m in talk.messages if m.role == "system"), "")
        users = [m for m in talk.messages if m.role == "user"]
        replies = [m for m in talk.messages if m.role == "assistant"]
        assert len(users) == len(replies) <= 3
        for user, reply in zip(users, replies):
            kinds = [p.kind for p in reply.parts]
            calls = [p.text for p in reply.parts if p.kind == "tool_call"]
            results = [p.text for p in reply.parts if p.kind == "tool_result"]
            assert len(calls) == len(results) <= 1 and kinds[-1] == "text"
            named = [p for n, p in everyone.items() if n in user.text]
            if calls:
                tool, argument = calls[0].split("\n", 1)
                assert tool in system
                if tool != "search":
                    assert (run(argument) if tool == "python" else str(evaluate(argument))) == results[0]
                assert reply.text in results[0]
                outcomes[tool] += 1
            elif named:
                (who,) = named
                told = {who.facts[a] for a in who.facts if who.known[a] != "never"}
                if is_refusal(reply.text):
                    assert "search" not in system
                    outcomes["unknown", who.mentioned] += 1
                else:
                    assert reply.text in told
                    outcomes["fact"] += 1
    assert set(outcomes) == {"python", "calculator", "search", "fact", ("unknown", True), ("unknown", False)}
    assert min(outcomes.values()) > 10


def test_by_hand_and_alone():
    alone = WorldConversations(world=SMALL, facts=0, problems=1, identity=0, system=0, turns=1, tool_share=0)
    for work, kinds in (("think", ["thinking", "text"]), ("text", ["text"]), ("none", ["text"])):
        cfg = dataclasses.replace(alone, work=work)
        found = [conversation(cfg, "train", i).messages[-1] for i in range(40)]
        assert [p.kind for p in max(found, key=lambda m: len(m.parts[0].text)).parts] == kinds
        assert any("Answer:" in m.text for m in found) == (work == "text")
    assert len(list(conversations(dataclasses.replace(alone, count=7)))) == 7


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


# ------------------------------------------------------------------------------------------------ bad definitions
def people(**fields) -> World:
    return World(people=People(**fields))


@pytest.mark.parametrize(
    ("world", "says"),
    [
        (people(count=0), "count"),
        (people(once=0.6, never=0.4), "once"),
        (people(train_fraction=1.5), "train_fraction"),
        (people(attributes=()), "attributes"),
        (people(attributes=("major", "major")), "attributes"),
        (people(values=1), "values"),
        (people(count=name_space(People(names="short")), names="short"), "names"),
        (people(augmentation=Augmentation(exposures=2, wordings=5)), "exposures"),
        (people(augmentation=Augmentation(exposures=99, wordings=99)), "wordings"),
        (World(seed=-1), "seed"),
        (World(problems=-1), "problems"),
        (World(tasks=()), "tasks"),
        (World(people=People(train_fraction=0.0), questions=1), "train_fraction"),
        (World(problems=1, tasks=("arithmetic",), arithmetic=Arithmetic(min_digits=3, max_digits=2)), "digits"),
        (World(problems=1, tasks=("arithmetic",), arithmetic=Arithmetic(operations=("/",))), "operations"),
        (World(problems=1, tasks=("arithmetic",), arithmetic=Arithmetic(heldout=0.0)), "heldout"),
        (World(problems=1, tasks=("graph",), graphs=Graphs(modulus=1)), "modulus"),
        (World(problems=1, tasks=("graph",), graphs=Graphs(min_steps=1)), "steps"),
        (World(problems=1, tasks=("graph",), graphs=Graphs(distractors=99)), "distractors"),
        (World(problems=1, tasks=("graph",), graphs=Graphs(heldout=1.0)), "heldout"),
        (World(problems=1, tasks=("spell",), words=Words(min_letters=1)), "letters"),
        (World(problems=1, tasks=("spell",), words=Words(heldout=2.0)), "heldout"),
    ],
)
def test_bad_definitions(world, says):
    with pytest.raises(UserError, match=says) as caught:
        for i, _ in enumerate(texts(world)):
            assert i < 6000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"facts": -1.0}, "shares"),
        ({"turns": 0}, "turns"),
        ({"search": 1.0}, "search"),
        ({"facts": 0.0, "problems": 0.0, "identity": 0.0, "system": 0.0}, "shares"),
        ({"unknown": 9.0, "world": World(people=People(unmentioned=0, never=0.0))}, "nowhere"),
    ],
)
def test_bad_conversations(fields, says):
    with pytest.raises(UserError, match=says):
        for i in range(20):
            conversation(WorldConversations(**fields), "train", i)


def test_too_small_a_space_of_problems_says_so():
    tiny = World(arithmetic=Arithmetic(1, 1, 1, 1, operations=("/",), heldout=0.001))
    with pytest.raises(UserError, match="too few"):
        for i in range(20):
            task_problem(tiny, "arithmetic", "heldout", i)


def test_the_page_on_the_world_is_true():
    page = Path(__file__).parents[2] / "docs" / "world.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "docs/world.md", str(page), 0)
    assert test.examples
    out = io.StringIO()
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    doctest.DocTestRunner(optionflags=flags).run(test, out=out.write)
    assert not out.getvalue(), out.getvalue()


def test_fact_question_wordings_come_again():
    who = person(world_tables(SMALL), 0)
    assert fact_question(who, "major", 0) == fact_question(who, "major", len(wordings("major", False)))
    assert fact_question(who, "major", 0, heldout=True).text != fact_question(who, "major", 0).text
