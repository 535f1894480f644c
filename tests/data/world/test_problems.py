"""Problems: answers are worked out anew from the text alone, lines of solutions hold, and both sides are apart."""

import ast
import collections
import dataclasses
import re

import pytest

from jaxlm.data.world import banks, graphs
from jaxlm.data.world.corpus import World, task_problem
from jaxlm.data.world.graphs import Graphs
from tests.data.world.worlds import PROBLEMS, evaluate, run


def splits(task: str, n: int, world: World = PROBLEMS):
    return {split: [task_problem(world, task, split, i) for i in range(n)] for split in ("train", "heldout")}


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
