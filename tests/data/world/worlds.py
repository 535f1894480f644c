"""Worlds that the tests share, and what reads and works out what their texts say."""

import ast
import contextlib
import dataclasses
import io
import re

from jaxlm.data.world.corpus import World, texts, world_tables
from jaxlm.data.world.people import People, person
from jaxlm.data.world.sentences import SENTENCES
from jaxlm.data.world.talk import WorldConversations

SMALL = World(people=People(count=60, unmentioned=30, values=12, once=0.2, never=0.2), validation=40)


MIXED = dataclasses.replace(SMALL, problems=40, questions=30)


ALL_TOOLS = WorldConversations(world=SMALL, unknown=1.5, search=1.5, tools=("calculator", "python", "search"))


PROBLEMS = World()


DATE = re.compile(r"[A-Z][a-z]+ \d+, \d{4}")


def people_of(world: World) -> list:
    t = world_tables(world)
    return [person(t, i) for i in range(world.people.count + world.people.unmentioned)]


# ------------------------------------------------------------------------------------------------ reading a text back
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


# -------------------------------------------------------------------------------------------------------- working out
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
