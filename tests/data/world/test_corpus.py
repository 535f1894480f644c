"""The corpus: documents alone and in any order, what decides them, and what is refused."""

import collections
import concurrent.futures
import dataclasses
import doctest
import hashlib
import io
import itertools
import re

import pytest

from jaxlm.config import UserError, from_json, to_json
from jaxlm.data.world.arithmetic import Arithmetic
from jaxlm.data.world.corpus import World, document, fingerprint, problem, size, task_problem, texts, world_tables
from jaxlm.data.world.graphs import Graphs
from jaxlm.data.world.people import Augmentation, People, name_space, person, tables
from jaxlm.data.world.questions import fact_questions
from jaxlm.data.world.talk import WorldConversations, conversation
from jaxlm.data.world.talk import fingerprint as talk_fingerprint
from jaxlm.data.world.words import Words
from tests.data.world.worlds import ALL_TOOLS, MIXED, PROBLEMS, SMALL, people_of
from tests.source import ROOT


# -------------------------------------------------------------------------------------------------------- determinism
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


# ------------------------------------------------------------------------------------------------------ what is in it
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


def test_problems_take_turns():
    assert [problem(PROBLEMS, "train", i).question.kind for i in range(10)] == [*PROBLEMS.tasks, *PROBLEMS.tasks]
    assert problem(PROBLEMS, "train", 11) == task_problem(PROBLEMS, "graph", "train", 2)


# ---------------------------------------------------------------------------------------------------- bad definitions
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


def test_too_small_a_space_of_problems_says_so():
    tiny = World(arithmetic=Arithmetic(1, 1, 1, 1, operations=("/",), heldout=0.001))
    with pytest.raises(UserError, match="too few"):
        for i in range(20):
            task_problem(tiny, "arithmetic", "heldout", i)


def test_the_page_on_the_world_is_true():
    page = ROOT / "docs" / "world.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "docs/world.md", str(page), 0)
    assert test.examples
    out = io.StringIO()
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    doctest.DocTestRunner(optionflags=flags).run(test, out=out.write)
    assert not out.getvalue(), out.getvalue()
