"""Words and shingles follow their rules, alone and in batches."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import shingles
from tests.data.curating import reference_words

letters = st.text(st.sampled_from("aBc9_ .,\n-éß½·漢ท🎉“”、e\u0301İ"), max_size=60)


@settings(max_examples=150, deadline=None)
@given(letters | st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.sampled_from([32, 1 << 16]))
def test_words_follow_the_rule(text, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shingles, "_PIECE", piece if re.search(r"^([^ \n]{0,6}[ \n])*[^ \n]{0,6}$", text) else 1 << 16)
        found = shingles.words(text)
    slices = [found.data[a:b].decode() for a, b in zip(found.starts, found.ends)]
    assert slices == reference_words(text)
    by_word = dict(zip(slices, found.hashes.tolist()))
    assert [by_word[w] for w in slices] == found.hashes.tolist() and len(set(by_word.values())) == len(by_word)


@settings(max_examples=50, deadline=None)
@given(st.lists(letters, max_size=12), st.integers(1, 6))
def test_shingles_of_a_batch_are_those_of_each_text(texts, n):
    hash_S, size_D = shingles.shingles_of_each(texts, n)
    parts = np.split(hash_S, np.cumsum(size_D)[:-1]) if texts else []
    for text, part in zip(texts, parts):
        words = reference_words(text)
        runs = [tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))] if words else []
        assert len(runs) == len(part)
        assert len(set(runs)) == len(set(part.tolist()))
        alone = shingles.shingles(shingles.words(text).hashes, min(n, max(len(words), 1)))
        np.testing.assert_array_equal(part, alone)


def test_punctuation_and_case_do_not_matter():
    a, b = (shingles.words(t).hashes for t in ("“Hello,” she said — “NAÏVE”", "hello she said naïve"))
    np.testing.assert_array_equal(a, b)


def test_long_words_differ_wherever_they_differ():
    word = "abcdefghijklmnopqrstuvwxyz0123456789"
    texts = {word[:n] + c + word[n + 1 :] for n in range(len(word)) for c in "aé"} | {word[:n] for n in range(1, 36)}
    hashes = shingles.words(" ".join(sorted(texts))).hashes
    assert len(set(hashes.tolist())) == len(hashes) == len(texts)
