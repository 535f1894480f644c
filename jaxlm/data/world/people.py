"""The people of the world: who they are, what is true of them, and how often each fact is told.

After the controlled biographies of "Physics of Language Models: Part 3.1" (Allen-Zhu and Li 2023, arXiv 2309.14316).
"""

import dataclasses
import functools
from typing import Literal

from jaxlm.config import UserError
from jaxlm.data.world import banks, draws
from jaxlm.data.world.draws import Draws, permuted
from jaxlm.data.world.sentences import SENTENCES, side

Attribute = Literal["birth_date", "birth_city", "university", "major", "employer", "employer_city", "hobby", "dish"]
Known = Literal["often", "once", "never"]
Split = Literal["train", "heldout"]
ATTRIBUTES: tuple[Attribute, ...] = tuple(SENTENCES)
YEARS, FIRST_YEAR, DAYS = 100, 1900, 28
PASSING_FACTS = 2  # that the text about a passing person tells


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How the biographies of one person differ. The amount of text is `exposures`, whatever the variety.

    The paper's data: `exposures=5` with wordings=1 is bioS single, wordings=5 bioS multi5, permute its +permute,
    fullname its +fullname.
    """

    exposures: int = 5  # biographies of each person; a fact told often is in every one
    wordings: int = 5  # different wordings among them; below `exposures` they come again in turn
    permute: bool = True  # each biography in an order of its own, otherwise all in the order of `attributes`
    fullname: bool = True  # the name in every sentence, otherwise a pronoun after the first


AUGMENTATIONS: dict[str, Augmentation] = {
    "single": Augmentation(wordings=1, permute=False, fullname=False),
    "single+fullname": Augmentation(wordings=1, permute=False, fullname=True),
    "single+permute": Augmentation(wordings=1, permute=True, fullname=False),
    "multi5": Augmentation(wordings=5, permute=False, fullname=False),
    "multi5+fullname": Augmentation(wordings=5, permute=False, fullname=True),
    "multi5+permute": Augmentation(wordings=5, permute=True, fullname=False),
    "multi5+permute+fullname": Augmentation(),
}


@dataclasses.dataclass(frozen=True)
class People:
    """Who there is.

    Persons 0 .. count - 1 have biographies, the `unmentioned` ones after them are named nowhere, and each of the
    `passing` ones at the end is named in one short text and never asked about. As in any large text, a name met for
    the first time is then nothing unusual: a model learns not to be sure of what it has not been told, and, since the
    text says its facts twice, to read.
    """

    count: int = 1000
    unmentioned: int = 200
    passing: int = 0
    train_fraction: float = 0.5  # of the mentioned and of the unmentioned: the first ones, for questions in training
    attributes: tuple[Attribute, ...] = ATTRIBUTES
    values: int = 100  # at most so many different values of an attribute, dates aside; chance is one in so many
    once: float = 0.15  # of a person's facts: told in one of the person's biographies
    never: float = 0.15  # of a person's facts: true, and told nowhere
    names: Literal["full", "short"] = "full"  # three words, or two
    augmentation: Augmentation = Augmentation()


@dataclasses.dataclass(frozen=True, slots=True)
class Person:
    """`facts` hold for everybody, `known` says what the pretraining text tells of them."""

    index: int
    name: str
    pronouns: tuple[str, str, str]  # she, her, her
    mentioned: bool
    split: Split
    facts: dict[Attribute, str]
    known: dict[Attribute, Known]
    once_in: dict[Attribute, int]  # the biography that tells a fact with known "once"

    def exposures(self, attribute: Attribute, people: People) -> int:
        """How many biographies state the fact."""
        return {"often": people.augmentation.exposures, "once": 1, "never": 0}[self.known[attribute]]


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """What all persons of a world share."""

    people: People
    seed: int
    values: dict[Attribute, tuple[str, ...]]
    city_of: dict[str, str]  # employer -> where it is
    units: tuple[tuple[Attribute, ...], ...]  # attributes that are told equally often
    wordings: dict[Attribute, tuple[str, ...]]
    heldout_wordings: dict[Attribute, tuple[str, ...]]
    last: tuple[str, ...]


def name_space(people: People) -> int:
    """How many different names there are."""
    middle = len(banks.MIDDLE) if people.names == "full" else 1
    return (len(banks.FEMALE) + len(banks.MALE)) * middle * len(banks.last_names())


def everybody(people: People) -> int:
    """How many people there are."""
    return people.count + people.unmentioned + people.passing


def _check(people: People, seed: int) -> None:
    p, a = people, people.augmentation
    most_wordings = min(len(side(SENTENCES[x], False)) for x in ATTRIBUTES)
    most_values = max(map(len, banks.places().values()))
    rules = (
        (0 <= seed < 2**63, f"the seed of a world must be from 0 to 2**63 - 1, got {seed}"),
        (
            p.count >= 1 and min(p.unmentioned, p.passing) >= 0,
            f"people.count must be at least 1, unmentioned and passing at least 0: {p}",
        ),
        (0 <= p.train_fraction <= 1, f"people.train_fraction must be from 0 to 1, got {p.train_fraction}"),
        (p.attributes and len(set(p.attributes)) == len(p.attributes), "people.attributes must be different, and some"),
        (2 <= p.values <= most_values, f"people.values must be from 2 to {most_values}, got {p.values}"),
        (p.once >= 0 and p.never >= 0 and p.once + p.never < 1, "people.once + people.never must be below 1"),
        (1 <= a.wordings <= most_wordings, f"augmentation.wordings must be from 1 to {most_wordings}: {a.wordings}"),
        (a.wordings <= a.exposures, f"augmentation.wordings={a.wordings} needs as many exposures, got {a.exposures}"),
        (
            everybody(p) <= name_space(p),
            f"{everybody(p)} people need as many names; names={p.names!r} has {name_space(p)}",
        ),
    )
    for holds, message in rules:
        if not holds:
            raise UserError(message)


@functools.lru_cache(maxsize=16)
def tables(people: People, seed: int) -> Tables:
    """Checks the definition; `UserError` says what is wrong with it."""
    _check(people, seed)
    chosen = {}
    for i, (attribute, bank) in enumerate(banks.places().items()):
        # Both kinds of city are drawn from the same cities.
        at = list(banks.places()).index("birth_city") if attribute == "employer_city" else i
        chosen[attribute] = tuple(Draws(seed, draws.BANKS, at).sample(bank, min(people.values, len(bank))))
    cities = chosen["employer_city"]
    city_of = {e: Draws(seed, draws.EMPLOYERS, i).choice(cities) for i, e in enumerate(chosen["employer"])}
    # Who is told the employer can infer its city from others, so both are told equally often.
    together = ("employer", "employer_city")
    pair = tuple(a for a in people.attributes if a in together)
    units = tuple((a,) for a in people.attributes if a not in together) + ((pair,) if pair else ())
    return Tables(
        people=people,
        seed=seed,
        values=chosen,
        city_of=city_of,
        units=units,
        wordings={a: side(SENTENCES[a], False) for a in ATTRIBUTES},
        heldout_wordings={a: side(SENTENCES[a], True) for a in ATTRIBUTES},
        last=banks.last_names(),
    )


def _name(t: Tables, index: int) -> tuple[str, tuple[str, str, str]]:
    code = permuted(index, name_space(t.people), t.seed, draws.NAMES)
    code, last = divmod(code, len(t.last))
    middle = ""
    if t.people.names == "full":
        code, m = divmod(code, len(banks.MIDDLE))
        middle = banks.MIDDLE[m] + " "
    female = code < len(banks.FEMALE)
    first = banks.FEMALE[code] if female else banks.MALE[code - len(banks.FEMALE)]
    return f"{first} {middle}{t.last[last]}", (("she", "her", "her") if female else ("he", "his", "him"))


def _rounded(d: Draws, share: float) -> int:
    """The whole number of `share`, rounded at random so that the mean is right."""
    return int(share) + d.chance(share - int(share))


@functools.lru_cache(maxsize=8192)
def person(t: Tables, index: int) -> Person:
    """Person `index` of 0 .. everybody(people) - 1."""
    p, d = t.people, Draws(t.seed, draws.PEOPLE, index)
    name, pronouns = _name(t, index)
    facts: dict[Attribute, str] = {}
    employer = d.choice(t.values["employer"])
    for attribute in ATTRIBUTES:  # all, so that a world with fewer attributes tells the same of its people
        if attribute == "birth_date":
            day, month, year = d.between(1, DAYS), d.choice(banks.MONTHS), FIRST_YEAR + d.below(YEARS)
            facts[attribute] = f"{month} {day}, {year}"
        elif attribute == "employer":
            facts[attribute] = employer
        elif attribute == "employer_city":
            facts[attribute] = t.city_of[employer]
        else:
            facts[attribute] = d.choice(t.values[attribute])
    facts = {a: facts[a] for a in p.attributes}
    mentioned = index < p.count
    known: dict[Attribute, Known] = dict.fromkeys(p.attributes, "never")
    once_in: dict[Attribute, int] = {}
    if mentioned:
        n = len(t.units)
        never = min(_rounded(d, p.never * n), n - 1)
        once = min(_rounded(d, p.once * n), n - 1 - never)  # at least one fact is told in every biography
        for place, unit in enumerate(d.shuffled(t.units)):
            told = "never" if place < never else "once" if place < never + once else "often"
            where = d.below(p.augmentation.exposures)
            for attribute in unit:
                known[attribute] = told
                if told == "once":
                    once_in[attribute] = where
    if index >= p.count + p.unmentioned:
        for attribute in d.shuffled(p.attributes)[:PASSING_FACTS]:
            known[attribute], once_in[attribute] = "once", 0
    first = index if mentioned else index - p.count
    of = p.count if mentioned else p.unmentioned
    split = "train" if first < round(p.train_fraction * of) else "heldout"
    return Person(index, name, pronouns, mentioned, split, facts, known, once_in)


def stated(person: Person, exposure: int, attributes: tuple[Attribute, ...]) -> list[Attribute]:
    """The facts that biography `exposure` of a person tells, in the order of `attributes`."""
    return [a for a in attributes if person.known[a] == "often" or person.once_in.get(a) == exposure]
