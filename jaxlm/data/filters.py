"""Steps of curation that look at one document by itself: HTML, URLs, language, length, symbols, repetition, PII.

Each step is a config node; `filter_for(step)` gives its function `(text, url) -> text or Removed`. Thresholds follow
Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A) and FineWeb (Penedo et al. 2024, arXiv:2406.17557); a threshold
that is `None` is not applied. They were made for web prose: leave source code out of them with `only`.
"""

import dataclasses
import functools
import ipaddress
import re
import urllib.parse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data.shingles import shingles, words


class Removed(NamedTuple):
    reason: str  # a few words, the same for all documents that fall to one rule
    detail: str  # what was found in this one


Filter = Callable[[str, str | None], "str | Removed"]


@dataclasses.dataclass(frozen=True)
class HtmlText:
    """The main text of HTML, without menus and scripts (resiliparse, as in DCLM, arXiv:2406.11794).

    A document without HTML tags near its beginning is left as it is. Needs the `curate` extra.
    """

    main_content: bool = True  # leave out navigation, headers and footers
    only: tuple[str, ...] = ()  # names of the sources it applies to; none: all


@dataclasses.dataclass(frozen=True)
class UrlBlock:
    """Removes documents whose URL is on a listed domain or below it; a document without URL stays."""

    domains: str  # a file: one domain a line, # starts a comment; the lines of a hosts file work too
    only: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Language:
    """Keeps documents in the given languages (py3langid, ISO 639-1 codes). Needs the `curate` extra."""

    languages: tuple[str, ...] = ("en",)
    min_probability: float = 0.65  # FineWeb's
    sample_characters: int = 2000  # from the document's beginning; the language rarely changes after it
    only: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Length:
    """Removes documents that are too short or too long."""

    min_characters: int | None = 64
    max_characters: int | None = None
    min_words: int | None = None  # Gopher: 50
    max_words: int | None = None  # Gopher: 100,000
    only: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Symbols:
    """Gopher's quality rules and FineWeb's two rules about lines; words are what stands between spaces."""

    min_mean_word_length: float | None = 3.0
    max_mean_word_length: float | None = 10.0
    max_symbols_per_word: float | None = 0.1  # of # and of ellipses, each
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic_words: float | None = 0.8
    min_stop_words: int | None = 2  # of eight common English words; unset for other languages
    min_punctuated_lines: float | None = 0.12  # FineWeb: lines that end a sentence
    max_short_lines: float | None = 0.67  # FineWeb: lines of fewer than 30 characters
    only: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Gopher's repetition rules (table A1): fractions of lines, paragraphs and characters that were there before.

    The second and later occurrences count, overlaps once. For n-grams the fraction is of the characters in words; the
    top n-gram counts only when it occurs twice. FineWeb lowers `max_duplicate_line_characters` to 0.1.
    """

    max_duplicate_lines: float | None = 0.30
    max_duplicate_paragraphs: float | None = 0.30
    max_duplicate_line_characters: float | None = 0.20
    max_duplicate_paragraph_characters: float | None = 0.20
    max_top_ngram: tuple[float, ...] = (0.20, 0.18, 0.16)  # for n = 2, 3, 4
    max_duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)  # for n = 5, 6, ..., 10
    only: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MaskPII:
    """Replaces e-mail addresses and public IPv4 addresses, as FineWeb does, by ones reserved for examples.

    Private, loopback and reserved addresses say nothing about a person and stay.
    """

    email: str | None = "email@example.com"
    ip: str | None = "192.0.2.1"
    only: tuple[str, ...] = ()


def missing_extra(step: str, package: str) -> UserError:
    return UserError(f"the curation step {step} needs {package}: pip install -e '.[curate]' (or pip install {package})")


@functools.singledispatch
def filter_for(step) -> Filter:
    """The function of a step. Loads what it needs (a list, a model) once, so `UserError` comes from here."""
    raise TypeError(f"no filter for {type(step).__name__}")


# ------------------------------------------------------------------------------------------------- the web's rules
_TAG = re.compile(r"<(?:!doctype\s+html|html|head|body|div|p|a|span|br|table|h1|article|section)\b", re.IGNORECASE)


@filter_for.register
def _(step: HtmlText) -> Filter:
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError:
        raise missing_extra("HtmlText", "resiliparse") from None

    def extract(text, url):
        if not _TAG.search(text, 0, 4096):
            return text
        out = extract_plain_text(text, preserve_formatting=True, main_content=step.main_content, alt_texts=False)
        return out if out.strip() else Removed("no text in the HTML", f"{len(text)} characters of markup")

    return extract


@filter_for.register
def _(step: UrlBlock) -> Filter:
    try:
        lines = storage.path(step.domains).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"UrlBlock: cannot read the list of domains {step.domains}: {e}") from e
    entries = (line.split("#")[0].split() for line in lines)
    blocked = {e[-1].lower().strip(".").removeprefix("*.") for e in entries if e}
    if not blocked:
        raise UserError(f"UrlBlock: there is no domain in {step.domains}")

    def check(text, url):
        if not url:
            return text
        try:
            host = urllib.parse.urlsplit(url if "//" in url else f"//{url}").hostname or ""
        except ValueError:
            return Removed("malformed URL", url[:100])
        labels = host.lower().strip(".").split(".")
        for i in range(len(labels)):
            if (domain := ".".join(labels[i:])) in blocked:
                return Removed("blocked domain", domain)
        return text

    return check


@filter_for.register
def _(step: Language) -> Filter:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise missing_extra("Language", "py3langid") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    known = {str(c) for c in identifier.nb_classes}
    if unknown := [c for c in step.languages if c not in known]:
        raise UserError(f"Language: unknown language {unknown[0]!r}; py3langid knows {' '.join(sorted(known))}")

    def check(text, url):
        language, probability = identifier.classify(text[: step.sample_characters])
        if language in step.languages and probability >= step.min_probability:
            return text
        reason = "language not certain" if language in step.languages else "another language"
        return Removed(reason, f"{language} with probability {probability:.2f}")

    return check


# ----------------------------------------------------------------------------------------------------------- rules
@filter_for.register
def _(step: Length) -> Filter:
    count_words = step.min_words is not None or step.max_words is not None

    def check(text, url):
        n = len(text)
        if step.min_characters is not None and n < step.min_characters:
            return Removed("too few characters", f"{n} characters, fewer than {step.min_characters}")
        if step.max_characters is not None and n > step.max_characters:
            return Removed("too many characters", f"{n} characters, more than {step.max_characters}")
        if count_words:
            n = len(text.split())
            if step.min_words is not None and n < step.min_words:
                return Removed("too few words", f"{n} words, fewer than {step.min_words}")
            if step.max_words is not None and n > step.max_words:
                return Removed("too many words", f"{n} words, more than {step.max_words}")
        return text

    return check


_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_NO_LETTERS = bytes(c for c in range(128) if not chr(c).isalpha() and not chr(c).isspace())
_ELLIPSES = ("...", "…")


@filter_for.register
def _(step: Symbols) -> Filter:
    def measures(text):
        """(rule, value, lower bound, upper bound), cheap ones first."""
        tokens = text.split()
        n, lines = max(len(tokens), 1), [s for s in text.split("\n") if s.strip()]
        m = max(len(lines), 1)
        mean = sum(map(len, tokens)) / n
        yield "mean word length", mean, step.min_mean_word_length, step.max_mean_word_length
        yield "hashes per word", text.count("#") / n, None, step.max_symbols_per_word
        yield "ellipses per word", sum(map(text.count, _ELLIPSES)) / n, None, step.max_symbols_per_word
        bullets = sum(s.lstrip().startswith(("•", "‣", "▪", "* ", "- ")) for s in lines)
        yield "lines with a bullet", bullets / m, None, step.max_bullet_lines
        yield (
            "lines that trail off",
            sum(s.rstrip().endswith(_ELLIPSES) for s in lines) / m,
            None,
            step.max_ellipsis_lines,
        )
        # With everything but letters and spaces deleted, the words that are left are those that held a letter.
        alphabetic = len(text.encode("utf-8", "replace").translate(None, _NO_LETTERS).split()) / n
        yield "words with a letter", alphabetic, step.min_alphabetic_words, None
        if step.min_stop_words is not None:
            have = set(text.lower().split())
            yield "stop words", float(sum(w in have for w in _STOP_WORDS)), step.min_stop_words, None
        ended = sum(s.rstrip().endswith((".", "!", "?", '"', "'", "”", "’", "。", "！", "？")) for s in lines) / m
        yield "lines that end a sentence", ended, step.min_punctuated_lines, None
        yield "short lines", sum(len(s) < 30 for s in lines) / m, None, step.max_short_lines

    def check(text, url):
        for rule, value, low, high in measures(text):
            if low is not None and value < low:
                return Removed(f"too few: {rule}", f"{value:.3g} is less than {low:g}")
            if high is not None and value > high:
                return Removed(f"too many: {rule}", f"{value:.3g} is more than {high:g}")
        return text

    return check


def repeated(parts: list[str]) -> tuple[int, int]:
    """How many parts were there before, and how many characters they hold."""
    seen, count, characters = set(), 0, 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        else:
            seen.add(part)
    return count, characters


def top_ngram_fraction(gram_S: np.ndarray, length_W: np.ndarray, n: int) -> float:
    """Share of the words' characters that the most frequent n-gram takes; 0 when none occurs twice."""
    order = np.argsort(gram_S, kind="stable")
    first = np.flatnonzero(np.append(True, np.diff(gram_S[order]) != 0))
    counts = np.diff(first, append=order.size)
    most = counts.max(initial=0)
    if most < 2:
        return 0.0
    at = order[first[counts == most]]  # one occurrence of each n-gram that is as frequent as any
    sizes = sum(length_W[at + i] for i in range(n))
    return float(most * sizes.max() / length_W.sum())


def duplicate_ngram_fraction(gram_S: np.ndarray, length_W: np.ndarray, n: int) -> float:
    """Share of the words' characters inside n-grams that occurred before, overlaps counted once."""
    order = np.argsort(gram_S, kind="stable")
    again = order[1:][np.diff(gram_S[order]) == 0]
    if not again.size:
        return 0.0
    edge = np.zeros(length_W.size + 1, np.int64)
    np.add.at(edge, again, 1)
    np.add.at(edge, again + n, -1)
    return float(length_W[np.cumsum(edge[:-1]) > 0].sum() / length_W.sum())


@filter_for.register
def _(step: Repetition) -> Filter:
    def measures(text):
        """(rule, value, upper bound)"""
        size = max(len(text), 1)
        paragraphs = [p for p in re.split(r"\n{2,}", text.strip()) if p]
        count, characters = repeated(paragraphs)
        yield "duplicate paragraphs", count / max(len(paragraphs), 1), step.max_duplicate_paragraphs
        yield "characters in duplicate paragraphs", characters / size, step.max_duplicate_paragraph_characters
        lines = [s for s in text.split("\n") if s.strip()]
        count, characters = repeated(lines)
        yield "duplicate lines", count / max(len(lines), 1), step.max_duplicate_lines
        yield "characters in duplicate lines", characters / size, step.max_duplicate_line_characters
        found = words(text)
        length_W = found.ends - found.starts
        for n, bound in enumerate(step.max_top_ngram, 2):
            yield f"top {n}-gram", top_ngram_fraction(shingles(found.hashes, n), length_W, n), bound
        for n, bound in enumerate(step.max_duplicate_ngrams, 5):
            value = duplicate_ngram_fraction(shingles(found.hashes, n), length_W, n)
            yield f"duplicate {n}-grams", value, bound
            if value == 0.0:
                break  # a longer run that repeats would repeat its beginning too

    def check(text, url):
        for rule, value, bound in measures(text):
            if bound is not None and value > bound:
                return Removed(f"repetition: {rule}", f"a fraction of {value:.3g}, more than {bound:g}")
        return text

    return check


# ------------------------------------------------------------------------------------------------------------- PII
_LOCAL = r"A-Za-z0-9_.!#$%&'*+/=?^`{|}~-"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_EMAIL = re.compile(rf"(?<![{_LOCAL}])[{_LOCAL}]{{1,64}}@(?:{_LABEL}\.)+[A-Za-z]{{2,24}}(?![\w-])")
_IP = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)")
# A pattern that begins with a plain character is searched for at memory speed: these two say cheaply where the ones
# above cannot match.
_MAYBE_EMAIL = re.compile(rf"@(?<=[{_LOCAL}]@)[A-Za-z0-9-]+\.")
_MAYBE_IP = re.compile(r"\.\d{1,3}\.\d{1,3}\.\d")


def _is_public(ip: str) -> bool:
    try:
        return ipaddress.IPv4Address(ip).is_global
    except ValueError:
        return False


@filter_for.register
def _(step: MaskPII) -> Filter:
    def check(text, url):
        out = text
        if step.email is not None and _MAYBE_EMAIL.search(out):
            out = _EMAIL.sub(lambda m: step.email, out)
        if step.ip is not None and _MAYBE_IP.search(out):
            out = _IP.sub(lambda m: step.ip if _is_public(m[0]) else m[0], out)
        return text if out == text else out

    return check
