"""Curation: each rule, sketches against true similarity, and a result that neither workers nor batches change."""

import functools
import json
import math
import re
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError, from_json, to_json
from jaxlm.data import curate as curation
from jaxlm.data import dedup, filters, parallel, shingles
from jaxlm.data.curate import (
    Curation,
    Decontaminate,
    ExactDuplicates,
    HtmlText,
    Language,
    Length,
    MaskPII,
    NearDuplicates,
    Repetition,
    Symbols,
    UrlBlock,
    curate,
    curation_fingerprint,
    format_report,
    web_curation,
)
from jaxlm.data.filters import Removed, filter_for
from jaxlm.data.sources import Document, EmbeddedPython, documents
from tests.data.tasks import make_square

PROSE = (
    "The committee met on Tuesday to discuss the plans for the new bridge. It was agreed that the old one could be "
    "kept open for people who walk, and that the engineers should have a second look at the figures.\n"
    "Several members asked what would become of the trees along the river. Nobody had an answer to that.\n"
)


def docs(texts, source="s") -> list[Document]:
    return [Document(t, source, str(i)) for i, t in enumerate(texts)]


def kept(texts, *steps, **arguments) -> list[int]:
    """Places of the texts that remain."""
    remaining, _ = curate(docs(texts), Curation(steps), **{"workers": 1, **arguments})
    return [int(d.id) for d in remaining]


# ----------------------------------------------------------------------------------------------------------- words
def reference_words(text: str) -> list[str]:
    """The rule in shingles.py, character by character."""
    out, run = [], ""
    for c in unicodedata.normalize("NFC", text).lower():
        size = len(c.encode("utf-8", "replace"))
        border = (
            not c.isalnum()
            if size == 1
            else "\x80" <= c <= "\xbf" or "\u2000" <= c <= "\u207f" or "\u3000" <= c <= "\u303f"
        )
        if size > 2 or border:
            out += [w for w in (run, "" if border else c) if w]
            run = ""
        else:
            run += c
    return out + [run] * bool(run)


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


# -------------------------------------------------------------------------------------------------------- sketches
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


# ------------------------------------------------------------------------------------------------------ duplicates
def test_exact_duplicates_up_to_case_space_and_composition():
    texts = ["One  text\n", "one text", "one, text", "cafe\u0301", "CAFÉ", "cafe"]
    assert kept(texts, ExactDuplicates()) == [0, 2, 3, 5]


def edited(rng, words: list[str], fraction: float) -> list[str]:
    return [f"w{rng.integers(10_000)}" if rng.random() < fraction else w for w in words]


@functools.lru_cache(4096)
def runs(text: str, n: int = 5) -> set:
    words = reference_words(text)
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))}


def jaccard(a: str, b: str) -> float:
    return len(runs(a) & runs(b)) / len(runs(a) | runs(b))


def corpus(seed: int, originals: int = 12, size: int = 120) -> list[str]:
    """Texts, copies of them with more and more edits, and copies of copies, shuffled."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(originals):
        words = [f"w{x}" for x in rng.integers(0, 3000, rng.integers(3, size))]
        texts.append(words)
        for fraction in rng.choice([0.0, 0.005, 0.02, 0.04, 0.08, 0.2], 3):
            texts.append(edited(rng, texts[-1] if i % 2 else words, fraction))
    return [" ".join(texts[i]) for i in rng.permutation(len(texts))]


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


# ------------------------------------------------------------------------------------------------------- the rules
def verdict(step, text: str, url: str | None = None):
    return filter_for(step)(text, url)


def reason(step, text: str, url: str | None = None) -> str | None:
    out = verdict(step, text, url)
    return out.reason if isinstance(out, Removed) else None


def test_good_prose_passes_every_rule():
    for step in (Length(min_words=50), Symbols(), Repetition(), MaskPII()):
        assert verdict(step, PROSE) == PROSE


def test_length():
    assert reason(Length(), "x" * 63) == "too few characters" and reason(Length(), "x" * 64) is None
    assert reason(Length(max_characters=5), "x" * 64) == "too many characters"
    assert reason(Length(min_words=3), "word " * 2 + " " * 60) == "too few words"
    assert reason(Length(max_words=3), "word " * 40) == "too many words"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a b c d e f g h i " * 9, "too few: mean word length"),
        ("https://example.org/a/very/long/path " * 9, "too many: mean word length"),
        ("#tag the more words of that\n" * 9, "too many: hashes per word"),
        ("and so on... the end of it…\n" * 9, "too many: ellipses per word"),
        ("• this is the point of it that we make.\n" * 9, "too many: lines with a bullet"),
        (
            "this is the point of it that we make and it never quite ends...\n" * 3 + PROSE,
            "too many: lines that trail off",
        ),
        ("the sum of 1999 2000 and 2001 with 2002 2003\n" * 3, "too few: words with a letter"),
        ("Lorem ipsum dolor sit amet, consectetur adipiscing elit.\n" * 5, "too few: stop words"),
        ("the list of things that have no end to them at all and\n" * 9, "too few: lines that end a sentence"),
        ("The ending of that.\n" * 5 + "to be that", "too many: short lines"),
    ],
)
def test_symbols(text, rule):
    assert reason(Symbols(), text) == rule
    off = {f.name: None for f in Symbols.__dataclass_fields__.values() if f.name != "only"}
    assert reason(Symbols(**off), text) is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("\n\n".join([PROSE[:100]] * 3 + list(PROSE.split("\n"))), "duplicate paragraphs"),
        ("\n".join(["Home"] * 4 + ["a", "b", "c", "d"]), "duplicate lines"),
        ("\n".join([PROSE[:120]] * 2 + [f"line {i}" for i in range(9)]), "characters in duplicate lines"),
        ("buy now " * 20 + "today", "top 2-gram"),
        (" ".join(PROSE.split() * 2), "duplicate 5-grams"),
    ],
)
def test_repetition(text, rule):
    assert reason(Repetition(), text) == f"repetition: {rule}"


def reference_fractions(words: list[str], n: int) -> tuple[float, float]:
    """(top n-gram, duplicate n-gram) shares of the words' bytes, by the definitions."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    sizes = [len(w.encode()) for w in words]
    total = sum(sizes)
    counts = {g: grams.count(g) for g in grams}
    most = max(counts.values(), default=0)
    top = (
        max((sum(len(w.encode()) for w in g) for g, c in counts.items() if c == most), default=0) * most / max(total, 1)
    )
    covered = {i + k for i, g in enumerate(grams) if g in grams[:i] for k in range(n)}
    return (top if most > 1 else 0.0), sum(sizes[i] for i in covered) / max(total, 1)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dé"]), max_size=40), st.integers(2, 10))
def test_ngram_fractions_follow_their_definitions(words, n):
    found = shingles.words(" ".join(words))
    gram_S, length_W = shingles.shingles(found.hashes, n), found.ends - found.starts
    got = filters.top_ngram_fraction(gram_S, length_W, n), filters.duplicate_ngram_fraction(gram_S, length_W, n)
    assert got == pytest.approx(reference_fractions(words, n))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Write to jane.doe+x@mail.example.co.uk, please.", "Write to email@example.com, please."),
        ("<a@b.org>; b@c.de.", "<email@example.com>; email@example.com."),
        ("@decorator.name and x @ y and a@b", "@decorator.name and x @ y and a@b"),
        ("DNS 8.8.8.8, then 8.8.4.4.", "DNS 192.0.2.1, then 192.0.2.1."),
        ("home 127.0.0.1 and 192.168.0.1:80 and 10.1.2.3", "home 127.0.0.1 and 192.168.0.1:80 and 10.1.2.3"),
        ("8.8.8.8:53 x8.8.8.8 1.2.3.4.5 999.8.8.8 8.8.8", "192.0.2.1:53 x8.8.8.8 1.2.3.4.5 999.8.8.8 8.8.8"),
    ],
)
def test_mask_pii(text, wanted):
    out = verdict(MaskPII(), text)
    assert out == wanted and verdict(MaskPII(), out) == wanted
    assert verdict(MaskPII(email=None, ip=None), text) == text


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab1.@-_ :8"), max_size=40))
def test_the_quick_looks_of_mask_pii_miss_nothing(text):
    assert not filters._EMAIL.search(text) or filters._MAYBE_EMAIL.search(text)
    assert not filters._IP.search(text) or filters._MAYBE_IP.search(text)


def test_url_block(tmp_path):
    (tmp_path / "list.txt").write_text("# bad ones\n0.0.0.0 Ads.example\n*.spam.org\nlone.net # why\n\n")
    step = UrlBlock(str(tmp_path / "list.txt"))
    assert reason(step, "x", "https://ads.example/page") == "blocked domain"
    assert reason(step, "x", "http://a.b.spam.org:80/") == "blocked domain"
    assert reason(step, "x", "LONE.NET/x") == "blocked domain"
    assert reason(step, "x", "https://notspam.org/?u=spam.org") is None and reason(step, "x", None) is None
    assert reason(step, "x", "http://[bad/") == "malformed URL"
    with pytest.raises(UserError, match="cannot read the list of domains"):
        filter_for(UrlBlock(str(tmp_path / "none.txt")))


def test_decontaminate(tmp_path):
    item = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    short = "what is the name of the tallest mountain?"
    records = [{"q": item, "deep": {"choices": [short, "A"]}}, {"q": "tiny"}]
    (tmp_path / "exam.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    step = Decontaminate(sets=(str(tmp_path / "exam.jsonl"),))
    found = verdict(step, "So: NATALIA sold clips, to 48 of her friends (in April) and then she\nslept. " + PROSE)
    assert (
        found.reason == "in the evaluation set exam.jsonl" and "13 words in a row: natalia sold clips" in found.detail
    )
    assert reason(step, "Natalia sold clips to 48 of her friends in April, and then.") is None  # 12 words
    assert reason(step, "I ask: what is the name of the tallest mountain") == "in the evaluation set exam.jsonl"
    assert reason(step, PROSE) is None and reason(step, "tiny") is None and reason(step, "") is None
    with pytest.raises(UserError, match="no such file"):
        filter_for(Decontaminate(sets=(str(tmp_path / "none"),)))
    (tmp_path / "bad.jsonl").write_text('{"q": 1}\n{')
    with pytest.raises(UserError, match=r"bad.jsonl line 2: not valid JSON"):
        filter_for(Decontaminate(sets=(str(tmp_path / "bad.jsonl"),)))


def test_steps_whose_package_is_missing_say_how_to_get_it(monkeypatch):
    for step, package in ((HtmlText(), "resiliparse"), (Language(), "py3langid")):
        for name in (package, f"{package}.extract", f"{package}.extract.html2text", f"{package}.langid"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"needs {package}: pip install -e '\.\[curate\]'"):
            curate([], Curation((step,)))


def test_html_text():
    pytest.importorskip("resiliparse")
    menu = "<nav><ul><li><a href='/'>Home</a></li></ul></nav><script>var x = 1;</script>"
    page = f"<!DOCTYPE html><html><body>{menu}<main><p>{PROSE}</p><p>Second &amp; last.</p></main></body></html>"
    out = verdict(HtmlText(), page)
    assert "Second & last." in out and "committee met" in out and "Home" not in out and "var x" not in out
    assert verdict(HtmlText(), PROSE) == PROSE
    assert reason(HtmlText(), "<html><body><script>x</script></body></html>") == "no text in the HTML"


def test_language():
    pytest.importorskip("py3langid")
    assert verdict(Language(), PROSE) == PROSE
    german = "Der Ausschuss traf sich am Dienstag, um über die Pläne für die neue Brücke zu sprechen."
    assert reason(Language(), german) == "another language" and reason(Language(("de", "en")), german) is None
    with pytest.raises(UserError, match="unknown language 'klingon'"):
        filter_for(Language(("klingon",)))


# ---------------------------------------------------------------------------------------------------- the pipeline
EVERY = (Length(), MaskPII(), ExactDuplicates(), Repetition(only=("web",)), NearDuplicates(), Symbols(only=("web",)))


def mixed_documents() -> list[Document]:
    texts = [
        *corpus(3),
        "short",
        PROSE,
        PROSE.replace("bridge", "canal"),
        PROSE,
        f"{PROSE} ask me@home.org",
        "spam " * 99,
    ]
    return [Document(t, ("web", "code")[i % 2], str(i)) for i, t in enumerate(texts)]


def without_seconds(report: dict) -> dict:
    steps = [{k: v for k, v in s.items() if k != "seconds"} for s in report["steps"]]
    return {k: v for k, v in report.items() if k not in ("seconds", "steps")} | {"steps": steps}


def test_the_result_does_not_depend_on_workers(monkeypatch):
    monkeypatch.setattr(curation, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(curation, "_BATCHES_HERE", 1)
    results = []
    for workers in (1, 2):
        remaining, report = curate(mixed_documents(), Curation(EVERY), workers=workers)
        results.append((list(remaining), without_seconds(report)))
    assert results[0] == results[1]
    assert any(s["removed"] for s in results[0][1]["steps"])


def test_the_report_adds_up():
    seen = []
    remaining, report = curate(mixed_documents(), Curation(EVERY), workers=1, progress=lambda *x: seen.append(x))
    assert not report["complete"]
    remaining = list(remaining)
    assert report["complete"] and json.loads(json.dumps(report)) == report
    assert report["documents_out"] == len(remaining)
    assert report["characters_out"] == sum(len(d.text) for d in remaining)
    assert seen[-1] == (report["documents_in"], report["documents_out"], report["characters_in"])
    before = (report["documents_in"], report["characters_in"])
    for entry in report["steps"]:
        assert (entry["documents_in"], entry["characters_in"]) == before
        assert entry["documents_in"] - entry["removed"] == entry["documents_out"]
        assert sum(entry["reasons"].values()) == entry["removed"]
        assert len(entry["examples"]) == min(entry["removed"], 5)
        before = (entry["documents_out"], entry["characters_out"])
    assert before == (report["documents_out"], report["characters_out"])
    by_step = {s["step"]: s for s in report["steps"]}
    assert by_step["MaskPII"]["changed"] == 1
    example = by_step["NearDuplicates"]["examples"][0]
    assert re.search(r"near duplicate: similarity about 0.\d\d with (web|code)/\d+", example["why"]) and example["text"]
    table = format_report(report)
    assert "NearDuplicates" in table and f"{len(remaining):,} out" in table


def test_only_names_the_sources_that_a_step_sees():
    two = [Document("spam " * 99, "web", "0"), Document("spam " * 99, "code", "1")]
    remaining, _ = curate(two, Curation((Repetition(only=("web",)),)), workers=1)
    assert [d.source for d in remaining] == ["code"]
    remaining, _ = curate(two, Curation((ExactDuplicates(only=("other",)),)), workers=1)
    assert len(list(remaining)) == 2


def test_the_default_keeps_nearly_all_of_the_language_reference():
    remaining, report = curate(documents(EmbeddedPython(parts=("topics",))), Curation(), workers=1)
    assert len(list(remaining)) > 0.9 * report["documents_in"]


def test_it_streams():
    read = []

    def endless():
        for i in range(10**9):
            read.append(i)
            yield Document(f"document number {i} " + PROSE[i % 50 :], "s", str(i))

    remaining, _ = curate(endless(), Curation(), workers=1)
    assert next(remaining).id == "0"
    remaining.close()
    assert len(read) <= curation._BATCH_DOCUMENTS + 1


def test_no_steps_and_no_documents():
    remaining, report = curate(docs(["x"]), Curation(()), workers=1)
    assert [d.text for d in remaining] == ["x"]
    remaining, report = curate([], Curation(), workers=2)
    assert list(remaining) == [] and report["complete"] and "0 documents in" in format_report(report)


def test_definition_and_fingerprint(tmp_path):
    cfg = Curation((*web_curation().steps, Decontaminate(sets=("x",)), UrlBlock("y")))
    assert from_json(Curation, to_json(cfg)) == cfg
    path = tmp_path / "exam.txt"
    path.write_text(PROSE)
    cfg = Curation((Decontaminate(sets=(str(path),)),))
    first = curation_fingerprint(cfg)
    assert first == curation_fingerprint(cfg) != curation_fingerprint(Curation())
    path.write_text(PROSE + "more")
    assert curation_fingerprint(cfg) != first


# --------------------------------------------------------------------------------------------------------- workers
def test_ordered_map():
    taken = []
    items = (taken.append(i) or i for i in range(50))
    answers = parallel.ordered_map(make_square, items, workers=2, here=3)
    assert [next(answers) for _ in range(4)] == [(i, i * i) for i in range(4)]
    assert len(taken) <= 3 + 2 * 2 + 3  # bounded look-ahead
    assert [a for _, a in answers] == [i * i for i in range(4, 50)]
    assert [a for _, a in parallel.ordered_map(make_square, [1, "jax"], workers=2)] == [1, False]


def test_ordered_map_brings_errors_home():
    with pytest.raises(UserError, match="negative: -1"):
        list(parallel.ordered_map(make_square, [1, -1, 2], workers=2))
    with pytest.raises(RuntimeError, match="a worker process died: exit code 7"):
        list(parallel.ordered_map(make_square, [1, "die"], workers=2))
