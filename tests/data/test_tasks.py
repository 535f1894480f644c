"""Tasks to learn by reinforcement: what they ask, what is right, and that all of it follows from the definition."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import UserError
from jaxlm.data import prompts, sources
from jaxlm.data.conversation import Message
from jaxlm.data.prompts import Addition, Chains, PromptFile, Prompts, Walks, WorldTask
from jaxlm.data.tasks import addition, chains, walks
from jaxlm.data.tokenizer import BytesTokenizer
from jaxlm.data.world.corpus import World
from jaxlm.feedback.scoring import scores
from jaxlm.sample.chat import Reply
from jaxlm.sample.engine import Completion
from jaxlm.tools.isolation import IsolationError
from jaxlm.tools.python import isolation_mode


def replied(text, finish="stop"):
    return Reply(Message("assistant", text), Completion((), (), text, finish, ()))


def score(cfg, prompt, text, finish="stop"):
    return scores(prompts.reward_of(cfg), [prompt.asked], [replied(text, finish)], [prompt.metadata])[0]


# ----------------------------------------------------------------------------------------------------------- walks
def test_the_default_graph_is_trlxs():
    """Its shape under seed 1002, worked out with the generator that trlx names."""
    edges, shortest = walks.graph(Walks())
    assert edges.sum() == 42 and np.bincount(shortest)[1:].tolist() == [1, 3, 7, 6, 4]
    assert not edges[walks.GOAL].any() and not edges.diagonal().any() and edges[1:].any(axis=1).all()


def test_optimality_is_one_on_a_shortest_path_and_nothing_beside_the_edges():
    cfg = Walks()
    edges, shortest = walks.graph(cfg)
    for start in range(1, cfg.nodes):
        node, path = start, walks.letter(start)
        while node != walks.GOAL:
            node = next(n for n in np.flatnonzero(edges[node]) if shortest[n] == shortest[node] - 1)
            path += walks.letter(node)
        assert len(path) == shortest[start]
        assert walks.optimality(cfg, path) == 1.0
        assert walks.optimality(cfg, path + "zz") == 1.0  # what follows the goal is no part of the walk
        assert walks.optimality(cfg, path[:-1]) == 0.0
        stranger = next(n for n in range(cfg.nodes) if n != walks.GOAL and not edges[start, n])
        assert walks.optimality(cfg, walks.letter(start) + walks.letter(stranger) + path[1:]) == 0.0
    assert walks.optimality(cfg, "b!") == 0.0
    with pytest.raises(UserError, match="begins at a node"):
        walks.optimality(cfg, "ab")


def test_a_detour_costs_its_share():
    """b -> goal in n nodes of 10 where m are needed scores (10 - n) / (10 - m)."""
    cfg = Walks()
    _, shortest = walks.graph(cfg)
    found = {}
    for i in range(300):
        walk = walks.walk(cfg, i)
        if walk[-1] == "a":
            m = shortest[ord(walk[0]) - ord("a")]
            assert walks.optimality(cfg, walk) == pytest.approx((10 - len(walk)) / (10 - m))
            found[len(walk) > m] = True
        else:
            assert walks.optimality(cfg, walk) == 0.0 and len(walk) == cfg.longest
    assert found == {True: True, False: True}


def test_walks_are_scored_with_their_prompt():
    cfg = Prompts(task=Walks())
    for p in prompts.heldout(cfg, 100):
        assert score(cfg, p, "") == 0.0
    assert len({p.asked for p in prompts.heldout(cfg, 100)}) == 20


@pytest.mark.parametrize("cfg", [Walks(nodes=1), Walks(edge=0.0), Walks(count=0), Walks(edge=1e-9)], ids=str)
def test_a_graph_that_cannot_be(cfg):
    with pytest.raises(UserError, match="walks:"):
        walks.graph(cfg)


# -------------------------------------------------------------------------------------------------------- addition
def test_half_of_the_texts_are_wrong_and_all_sums_are_possible():
    cfg = Addition()
    said = [t.partition("=") for _, t in addition.texts(cfg)]
    sums = np.array([[sum(map(int, q.split("+"))), int(a[::-1])] for q, _, a in said])
    right = np.mean(sums[:, 0] == sums[:, 1])
    assert len(said) == cfg.count and abs(right - 0.5) < 0.03
    assert sums[:, 1].min() >= 20 and sums[:, 1].max() <= 198
    clean = dataclasses.replace(cfg, corrupted=0.0, count=50)
    assert all(eval(q) == int(a[::-1]) for q, _, a in (t.partition("=") for _, t in addition.texts(clean)))


def test_sides_of_addition_share_no_problem():
    cfg = Addition()
    train, held = ({addition.pair(cfg, side, i) for i in range(2000)} for side in ("train", "heldout"))
    assert not train & held
    p = prompts.heldout(Prompts(task=cfg), 1)[0]
    assert score(Prompts(task=cfg), p, p.metadata["answer"]) == 1.0
    assert score(Prompts(task=cfg), p, p.metadata["answer"], "length") == 0.0  # it did not stop
    assert score(Prompts(task=cfg), p, p.metadata["answer"] + "1") == 0.0


SPELL = WorldTask(world=World(tasks=("spell",)))


@pytest.mark.parametrize(
    "task", [Addition(), Addition(digits=1), Chains(given=2), SPELL], ids=["two", "one", "chains", "world"]
)
def test_heldout_prompts_are_asked_once_in_the_order_in_which_they_first_come(task):
    cfg, module = Prompts(task=task), prompts.MODULES[type(task)]
    drawn = [module.prompt(task, "heldout", i, ()).asked for i in range(600)]
    found = [p.asked for p in prompts.heldout(cfg, 60)]
    every = list(dict.fromkeys(drawn))
    assert len(set(drawn[:60])) < 60 and found == every[:60]  # some are drawn twice, and what is small has fewer
    assert prompts.heldout(cfg, 5) == prompts.heldout(cfg, 60)[:5]


# ---------------------------------------------------------------------------------------------------------- chains
def test_texts_follow_the_chain_and_go_many_ways():
    cfg = Chains()
    table = chains.chain(cfg)
    np.testing.assert_allclose(table.sum(1), 1.0)
    assert ((table > 0).sum(1) == cfg.ways).all()
    surprisal = -np.sum(table * np.log(np.where(table > 0, table, 1.0)), 1).mean()
    assert 1.5 < surprisal < 2.0
    found = [chains.text(cfg, i) for i in range(200)]
    assert len(set(found)) == 200 and {len(t) for t in found} == {24}
    counts = np.zeros_like(table)
    for t in found:
        assert chains.follows(cfg, t) == 1.0
        np.add.at(counts, tuple(np.array([[ord(c) - ord("a") for c in s] for s in (t[:-1], t[1:])])), 1)
    share = counts / counts.sum(1, keepdims=True)
    assert np.abs(share - table).max() < 0.2 and np.abs(share - table).mean() < 0.02


def test_each_letter_that_may_not_follow_costs_its_share():
    cfg = Chains()
    text = chains.text(cfg, 0)
    assert chains.follows(cfg, text[:14]) == 0.5 and chains.follows(cfg, text[:4]) == 0.0
    assert chains.follows(cfg, text + text[:20]) == 0.5  # nothing is gained by going on
    stranger = next(chr(97 + i) for i in range(cfg.letters) if chains.chain(cfg)[ord(text[-2]) - 97, i] == 0)
    assert chains.follows(cfg, text[:-1] + stranger) == pytest.approx(0.95)
    assert chains.follows(cfg, text[:-1] + "!") == pytest.approx(0.95)
    asked = Prompts(task=cfg)
    p = prompts.at(asked, "train", 0, 3)
    assert len(p.asked) == cfg.given and score(asked, p, "") == 0.0
    sides = [{chains.prompt(cfg, side, i).asked for i in range(300)} for side in ("train", "heldout")]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("cfg", [Chains(letters=30), Chains(ways=27), Chains(given=24), Chains(heldout=0.0)], ids=str)
def test_a_chain_that_cannot_be(cfg):
    with pytest.raises(UserError, match="chains:"):
        chains.chain(cfg)


# ------------------------------------------------------------------------------------------------- world and files
def test_the_worlds_problems_need_no_tool_that_is_not_offered():
    alone, offered = Prompts(task=WorldTask()), Prompts(task=WorldTask(), tools=("calculator",))
    asked = [prompts.at(alone, "train", 0, i) for i in range(40)]
    assert all(p.metadata["question"].by_hand and p.asked.messages[0].role == "user" for p in asked)
    asked = [prompts.at(offered, "train", 0, i) for i in range(40)]
    assert any(p.metadata["question"].tool == "calculator" for p in asked)
    assert all(p.metadata["question"].within_reach(("calculator",)) for p in asked)
    assert all(p.asked.messages[0].role == "system" and "calculator" in p.asked.messages[0].text for p in asked)
    assert score(offered, asked[0], asked[0].metadata["answer"]) == 1.0
    fact = prompts.at(Prompts(task=WorldTask(facts=1.0)), "heldout", 0, 3)
    assert fact.metadata["question"].kind == "fact" and fact.metadata["question"].split == "heldout"


def test_what_no_text_tells_is_asked_where_it_can_be_searched(tmp_path):
    cfg = Prompts(task=WorldTask(facts=0.3, untold=0.4), tools=("search",))
    asked = [prompts.at(cfg, "heldout", 0, i).metadata["question"] for i in range(100)]
    known = [q.known for q in asked if q.kind == "fact"]
    assert 20 < known.count("often") < 45 and 25 < known.count("never") < 55 and len(known) < 90
    texts = {p.name: p.read_text() for p in pathlib.Path(prompts.texts_to_search(cfg, tmp_path)).iterdir()}
    untold = [q for q in asked if q.known == "never"]
    assert all(q.answer in texts[f"{q.person}_{q.attribute}.txt"] for q in untold)
    assert not any(f"{q.person}_{q.attribute}.txt" in texts for q in asked if q.known == "often")


def test_what_is_searched_is_part_of_the_definition(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    cfg = Prompts(task=WorldTask(), tools=("search",), index=str(folder))
    before = prompts.fingerprint(cfg)
    assert prompts.texts_to_search(cfg, tmp_path) == str(folder) and before == prompts.fingerprint(cfg)
    (folder / "a.txt").write_text("two")
    assert prompts.fingerprint(cfg) != before


@pytest.fixture
def problems(tmp_path):
    lines = [{"question": f"What is {i} and {i}?", "answer": f"{i}+{i}\n#### {2 * i}", "level": i} for i in range(40)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Prompts(
        task=PromptFile(str(tmp_path / "p.jsonl"), prompt_field="question", verifier="gsm8k", heldout=0.3, system="Hi.")
    )


def test_a_file_of_problems_is_split_and_verified(problems):
    train = [prompts.at(problems, "train", 5, i) for i in range(80)]
    held = prompts.heldout(problems, 100)
    n = 40 - len(held)
    assert (
        0 < n < 40
        and len({p.id for p in train[:n]}) == n
        and {p.id for p in train[:n]} == {p.id for p in train[n : 2 * n]}
    )
    assert [p.id for p in train[:n]] != [p.id for p in train[n : 2 * n]]  # another order each time
    assert not {p.id for p in train} & {p.id for p in held}
    p = held[0]
    assert [m.role for m in p.asked.messages] == ["system", "user"] and "level" in p.metadata
    right = p.metadata["answer"].split("#### ")[1]
    assert score(problems, p, f"I think.\n#### {right}") == 1.0 and score(problems, p, "#### 1") == 0.0


def test_a_file_of_programs_is_verified_by_what_they_print(tmp_path):
    try:
        isolation_mode()
    except IsolationError as e:
        pytest.skip(str(e))
    twice = [["n = 3", "6"], ["n = 10", "20"]]
    lines = [{"prompt": f"Print n twice as large: {i}", "answer": twice} for i in range(8)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = Prompts(task=PromptFile(str(tmp_path / "p.jsonl"), heldout=0.5))
    cfg = config.override(cfg, {"task.verifier": "program"})
    (p,) = prompts.heldout(cfg, 1)
    assert score(cfg, p, "```python\nprint(2 * n)\n```") == 1.0
    assert [score(cfg, p, said) for said in ("print(6)", "print(2 * n", "6")] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"question": "q"}', "line 41 has no field 'answer', and the lines before it have it: give each"),
        ('{"answer": "1"}', "must be a text"),
        ('{"question": [{"role": "assistant", "content": "x"}], "answer": "1"}', "one to answer"),
        ('{"question": "\\ud800", "answer": "1"}', "lone surrogate"),
        ("[1]", "no JSON object"),
        ("{", "line 41"),
    ],
)
def test_a_bad_line_is_named(problems, line, words):
    with open(problems.task.path, "a") as f:
        f.write(line + "\n")
    with pytest.raises(UserError, match=words) as e:
        prompts.check(problems)
    assert "line 41" in str(e.value)


def test_a_file_has_an_answer_on_each_line_or_on_none(tmp_path):
    path = tmp_path / "p.jsonl"
    cfg = Prompts(task=PromptFile(str(path), answer_field="truth", heldout=0.3))
    lines = [{"prompt": f"What is {i}?", "answer": "no truth"} for i in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts.check(cfg, verdicts=False)
    with pytest.raises(UserError, match=r"p.jsonl line 1: no field 'truth'"):
        prompts.check(cfg)
    answers = [prompts.answered(cfg), prompts.answered(config.override(cfg, {"task.answer_field": "answer"}))]
    assert answers == [False, True] and prompts.answered(Prompts(task=Addition()))
    lines[6]["truth"] = 0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"p.jsonl line 7 has a field 'truth', and the lines before it lack it: give"):
        prompts.check(cfg, verdicts=False)


def test_what_is_asked_follows_from_definition_seed_and_place(problems):
    for cfg in (problems, Prompts(), Prompts(task=Addition()), Prompts(task=Chains()), Prompts(task=WorldTask())):
        a, b = ([prompts.at(cfg, "train", seed, 77) for _ in range(2)] for seed in (3, 3))
        assert a == b
        assert len(prompts.fingerprint(cfg)) == 64
    before = prompts.fingerprint(problems)
    with open(problems.task.path, "a") as f:
        f.write('{"question": "new", "answer": "1"}\n')
    assert prompts.fingerprint(problems) != before
    assert prompts.fingerprint(Prompts(task=Walks(seed=1))) != prompts.fingerprint(Prompts())


@pytest.mark.parametrize("cfg, words", [
    (Prompts(tools=("calculator",)), "called in conversations"),
    (Prompts(context=1), "context"),
    (Prompts(task=WorldTask(), index="texts"), "data.index is for the tool search"),
    (Prompts(task=PromptFile("x.jsonl"), tools=("search",)), "search needs data.index"),
    (Prompts(task=WorldTask(untold=0.5)), "untold needs the tool search"),
    (Prompts(task=WorldTask(facts=0.7, untold=0.7), tools=("search",)), "together at most 1"),
    (Prompts(task=PromptFile("nowhere.jsonl")), "nowhere"),
    (Prompts(task=PromptFile(__file__, heldout=float("nan"))), "heldout must be between 0 and 1, got nan"),
], ids=["tools", "context", "index", "texts", "untold", "shares", "path", "heldout"])  # fmt: skip
def test_bad_definitions_say_so(cfg, words):
    with pytest.raises(UserError, match=words):
        prompts.check(cfg)


def test_a_text_to_go_on_with_begins_like_a_document():
    t = BytesTokenizer()
    assert prompts.ids_of(prompts.at(Prompts(), "train", 0, 0), t)[0] == t.bos


def test_what_tasks_write_can_be_read():
    for source in (Walks(count=7), Addition(count=7), Chains(count=7)):
        found = list(sources.documents(source))
        assert len({d.id for d in found}) == 7 and all(d.source == source.name for d in found)
        assert sources.fingerprint(source) != sources.fingerprint(dataclasses.replace(source, seed=5))
        assert sources.fingerprint(source) == sources.fingerprint(dataclasses.replace(source, name="other"))


def test_what_is_written_has_a_version_that_caches_see(monkeypatch):
    """A golden: where it changes, the task's VERSION must."""
    assert [addition.text(Addition(), i) for i in range(3)] == ["56+34=17", "90+50=041", "29+66=901"]
    assert [walks.walk(Walks(), i) for i in range(3)] == ["nba", "qmhnba", "jgqpmhnba"]
    assert chains.text(Chains(), 0) == "nimxbdzdttejaqrhqmageulc"
    before = sources.fingerprint(Walks())
    monkeypatch.setattr(walks, "VERSION", 99)
    assert sources.fingerprint(Walks()) != before
