"""Duplicates: sketches against true similarity, what is removed against brute force."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import curate as curation
from jaxlm.data import dedup
from jaxlm.data.curate import Curation, ExactDuplicates, NearDuplicates, curate
from tests.data.curating import corpus, docs, edited, kept, reference_words


# ----------------------------------------------------------------------------------------------------------- sketches
def pair_of_sets(rng, size: int, jaccard: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Two sets of random hashes with about `size` members each, and their true similarity."""
    common = round(2 * size * jaccard / (1 + jaccard))
    own = size - common
    x = rng.integers(0, 2**64, common + 2 * own, dtype=np.uint64)
    return x[: common + own], np.concatenate([x[:common], x[common + own :]]), common / (common + 2 * own)


@pytest.mark.parametrize(("size", "pairs"), [(3, 300), (20, 200), (200, 100), (3000, 20)])
@pytest.mark.parametrize("jaccard", [0.3, 0.75, 0.95])
def test_entries_agree_as_often_as_the_sets_are_similar(size, pairs, jaccard):
    rng, K = np.random.default_rng(size), 120
    made = [pair_of_sets(rng, size, jaccard) for _ in range(pairs)]
    sets, true = [s for a, b, _ in made for s in (a, b)], made[0][2]
    sketch_DK = dedup.sketches(np.concatenate(sets), np.array([len(s) for s in sets]), K)
    assert (sketch_DK != 0xFFFFFFFF).all()
    agree_P = (sketch_DK[0::2] == sketch_DK[1::2]).mean(axis=1)
    sigma = math.sqrt(max(true * (1 - true), 1e-4) / K)  # of K independent entries; the sketch's own is no larger
    assert abs(agree_P.mean() - true) < 4 * sigma / math.sqrt(pairs)
    assert np.abs(agree_P - true).max() < 5 * sigma + 1 / K
    byte_DK = sketch_DK.astype(np.uint8)
    estimates = [dedup.similarity(a, b) for a, b in zip(byte_DK[0::2], byte_DK[1::2])]
    assert abs(np.mean(estimates) - true) < 4.5 * (sigma + 0.006) / math.sqrt(pairs)


def test_a_sketch_does_not_depend_on_company_order_or_repeats():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**64, 50, dtype=np.uint64), rng.integers(0, 2**64, 700, dtype=np.uint64)
    alone = dedup.sketches(a, np.array([50]), 120)[0]
    other = np.concatenate([b, rng.permutation(np.repeat(a, 3)), b[:1]])
    together = dedup.sketches(other, np.array([700, 150, 0, 1]), 120)
    np.testing.assert_array_equal(alone, together[1])
    assert (together[2] == 0xFFFFFFFF).all()


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.85])
def test_candidates_come_as_the_banding_formula_says(similarity):
    rng, pairs, step = np.random.default_rng(1), 400, NearDuplicates()
    made = [pair_of_sets(rng, 150, similarity) for _ in range(pairs)]
    sets, true = [s for a, b, _ in made for s in (a, b)], made[0][2]
    sketch_DK = dedup.sketches(np.concatenate(sets), np.array([len(s) for s in sets]), step.bands * step.rows)
    key_DB = dedup.band_keys(sketch_DK, step.bands, step.rows)
    found = (key_DB[0::2] == key_DB[1::2]).any(axis=1).mean()
    wanted = 1 - (1 - true**step.rows) ** step.bands
    assert abs(found - wanted) < 4 * math.sqrt(max(wanted * (1 - wanted), 0.01) / pairs) + 0.01
    assert len(np.unique(key_DB)) > key_DB.size / 4  # bands do not share keys


# --------------------------------------------------------------------------------------------------------- duplicates
def test_exact_duplicates_up_to_case_space_and_composition():
    texts = ["One  text\n", "one text", "one, text", "cafe\u0301", "CAFÉ", "cafe"]
    assert kept(texts, ExactDuplicates()) == [0, 2, 3, 5]


@functools.lru_cache(4096)
def runs(text: str, n: int = 5) -> set:
    words = reference_words(text)
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))}


def jaccard(a: str, b: str) -> float:
    return len(runs(a) & runs(b)) / len(runs(a) | runs(b))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_near_duplicates_agree_with_brute_force(seed):
    texts, step = corpus(seed), NearDuplicates()
    remaining = kept(texts, step)
    slack = 4.5 * math.sqrt(step.threshold * (1 - step.threshold) / (step.bands * step.rows))
    for i, text in enumerate(texts):
        best = max((jaccard(text, texts[j]) for j in remaining if j < i), default=0.0)
        if i in remaining:
            assert best < step.threshold + slack, "a near duplicate was kept"
        else:
            assert best > step.threshold - slack, "a text was removed that nothing kept is near to"


def test_recall_and_precision_over_many_edits():
    rng, step = np.random.default_rng(0), NearDuplicates()
    texts, true = [], []
    for _ in range(400):
        words = [f"w{x}" for x in rng.integers(0, 10**6, 150)]
        texts += [" ".join(words), " ".join(edited(rng, words, rng.uniform(0, 0.12)))]
        true.append(jaccard(*texts[-2:]))
    true, removed = np.array(true), ~np.isin(np.arange(1, 800, 2), kept(texts, step))
    assert removed[true > 0.85].mean() > 0.99 and (true > 0.85).sum() > 50
    assert removed[true < 0.62].mean() < 0.01 and (true < 0.62).sum() > 50
    assert set(kept(texts, step)) >= set(range(0, 800, 2))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20))
def test_duplicates_do_not_depend_on_batches(seed, one, other):
    texts = corpus(seed, originals=6, size=40)
    results = []
    for size in (one, other):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(curation, "_BATCH_DOCUMENTS", size)
            remaining, report = curate(docs(texts), Curation((ExactDuplicates(), NearDuplicates())), workers=1)
            results.append(([d.id for d in remaining], [s["examples"] for s in report["steps"]]))
    assert results[0] == results[1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 60), unique=True, max_size=20), max_size=12))
def test_key_table_is_a_dictionary(batches):
    table, wanted = dedup.KeyTable(), {}
    for batch in batches:
        new = np.array([k for k in batch if k not in wanted], np.uint64)
        table.add(new, np.arange(new.size) + len(wanted))
        wanted.update(zip(new.tolist(), range(len(wanted), len(wanted) + new.size)))
        asked = np.array([*range(70), *batch], np.uint64)
        assert table.get(asked).tolist() == [wanted.get(int(k), -1) for k in asked]


def test_texts_without_words_are_no_near_duplicates():
    assert kept(["---", "...", "!!", "漢字 漢字", "a", "a"], NearDuplicates()) == [0, 1, 2, 3, 4]
