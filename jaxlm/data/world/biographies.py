"""Texts about people: biographies that tell what they may, and passages that tell everything.

A biography is what pretraining reads and never states a withheld fact. A passage is for the search index and for
questions with the text at hand, and must not be pretrained on.
"""

import functools
import math

from jaxlm.data.world import draws
from jaxlm.data.world.draws import Draws
from jaxlm.data.world.people import Attribute, Person, Tables, stated


def _sentence(template: str, value: str, name: str | None, pronouns: tuple[str, str, str]) -> str:
    """`name` None: a pronoun in its place."""
    he, his, him = pronouns
    if name is not None:
        start = middle = object_ = name
        possessive = possessive_start = f"{name}'s"
    else:
        start, middle, object_, possessive, possessive_start = he.capitalize(), he, him, his, his.capitalize()
    return template.format(
        v=value, S=start, s=middle, P=possessive_start, p=possessive, o=object_, he=he, his=his, him=him
    )


@functools.cache
def _strides(n: int) -> tuple[int, ...]:
    return tuple(s for s in range(1, n) if math.gcd(s, n) == 1) or (1,)


def _templates(t: Tables, person: Person, wording: int, heldout: bool) -> dict[Attribute, str]:
    """One sentence for each attribute; those of different wordings differ in every attribute."""
    banks = t.heldout_wordings if heldout else t.wordings
    # The two sides draw apart, or a held-out wording would follow from the training ones.
    d, out = Draws(t.seed, draws.VALIDATION if heldout else draws.WORDINGS, person.index), {}
    for attribute in t.people.attributes:
        bank = banks[attribute]
        out[attribute] = bank[(d.below(len(bank)) + wording * d.choice(_strides(len(bank)))) % len(bank)]
    return out


def told(
    t: Tables, person: Person, attributes: list[Attribute], wording: int = 0, heldout: bool = False, fullname=True
) -> str:
    """Sentences that state these facts of a person, in this order; the first names the person."""
    templates = _templates(t, person, wording, heldout)
    return " ".join(
        _sentence(templates[a], person.facts[a], person.name if fullname or not i else None, person.pronouns)
        for i, a in enumerate(attributes)
    )


@functools.cache
def _plainest(wordings: tuple[str, ...]) -> str:
    """The first wording that ends with the value and has no pronoun."""
    return next(w for w in wordings if w.endswith("{v}.") and not any(x in w for x in ("{he}", "{his}", "{him}")))


def statement(t: Tables, person: Person, attribute: Attribute, value: str) -> str:
    """The sentence that states a value of an attribute in the plainest of the training wordings."""
    return _sentence(_plainest(t.wordings[attribute]), value, person.name, person.pronouns)


def biography(t: Tables, person: Person, exposure: int) -> str:
    """Biography `exposure` of 0 .. exposures - 1 of a person who is mentioned."""
    how, facts = t.people.augmentation, stated(person, exposure, t.people.attributes)
    if how.permute:
        facts = Draws(t.seed, draws.ORDERS, person.index, exposure).shuffled(facts)
    return told(t, person, facts, exposure % how.wordings, fullname=how.fullname)


def told_twice(t: Tables, person: Person) -> str:
    """What the one text about a passing person tells, and the same once more in other words.

    Nothing but the first telling says what the second will be: so that reading is learned beside recalling.
    """
    facts = stated(person, 0, t.people.attributes)
    orders = Draws(t.seed, draws.ORDERS, person.index)
    return " ".join(told(t, person, orders.shuffled(facts), wording) for wording in (0, 1))


def heldout_biography(t: Tables, person: Person) -> str:
    """The facts that are told often, in the held-out wordings: does the model know them, or only their sentences?"""
    facts = [a for a in t.people.attributes if person.known[a] == "often"]
    return told(t, person, facts, heldout=True, fullname=t.people.augmentation.fullname)


def passage(t: Tables, person: Person, attributes: tuple[Attribute, ...] | None = None) -> str:
    """These facts, or all, the withheld ones too: for a search index or a context, never for pretraining."""
    chosen = t.people.attributes if attributes is None else attributes
    return told(t, person, list(chosen), wording=-1)  # a wording that no biography has, unless they have all
