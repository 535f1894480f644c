"""What tests of curation share: documents, what is left of them, and words by the rule, character by character."""

import unicodedata

import numpy as np

from jaxlm.data.curate import Curation, curate
from jaxlm.data.sources import Document

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


def edited(rng, words: list[str], fraction: float) -> list[str]:
    return [f"w{rng.integers(10_000)}" if rng.random() < fraction else w for w in words]


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
