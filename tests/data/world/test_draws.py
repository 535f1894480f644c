"""Draws belong to their item and are even; banks of names, sentences and questions have no doubles."""

import collections
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.world import banks, draws
from jaxlm.data.world.arithmetic import ASK as ASK_ARITHMETIC
from jaxlm.data.world.draws import Draws, permuted
from jaxlm.data.world.people import ATTRIBUTES
from jaxlm.data.world.questions import QUESTIONS
from jaxlm.data.world.sentences import SENTENCES, side
from jaxlm.data.world.words import ASK as ASK_WORDS


# -------------------------------------------------------------------------------------------------------------- draws
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


# -------------------------------------------------------------------------------------------------------------- banks
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
