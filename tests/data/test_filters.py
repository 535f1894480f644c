"""Each rule of curation: what it lets pass, what it removes, and the reason that it gives."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data import filters, shingles
from jaxlm.data.curate import (
    Curation,
    Decontaminate,
    HtmlText,
    Language,
    Length,
    MaskPII,
    Repetition,
    Symbols,
    UrlBlock,
    curate,
)
from jaxlm.data.filters import Removed, filter_for
from tests.data.curating import PROSE


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
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "exam.jsonl").write_text(json.dumps({"q": "who was the first to climb that very mountain"}))
    both = Decontaminate(sets=(*step.sets, str(tmp_path / "other" / "exam.jsonl")))
    for asked in (item, "So who was the first to climb that very mountain?"):
        assert reason(both, asked) == "in the evaluation set exam.jsonl"
    for wrong in ({"ngram": 0}, {"min_words": 0}):
        with pytest.raises(UserError, match="ngram and min_words are at least 1"):
            filter_for(Decontaminate(sets=step.sets, **wrong))
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
