"""Decontamination: no training document may share a run of 13 words with an evaluation set (GPT-3, arXiv:2005.14165,
appendix C)."""

import dataclasses

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.filters import Filter, Removed, filter_for
from jaxlm.data.readers import json_records
from jaxlm.data.shingles import shingles, words
from jaxlm.data.sources import Files, files_of


@dataclasses.dataclass(frozen=True)
class Decontaminate:
    """Removes documents that share a run of `ngram` words with the named evaluation sets.

    Each set is a file, folder or glob. Of .jsonl and .parquet every string of every record counts as an item, however
    deep it lies; other files are one item each. An item with fewer words, but at least `min_words`, counts whole.
    """

    sets: tuple[str, ...]
    ngram: int = 13
    min_words: int = 8
    only: tuple[str, ...] = ()  # names of the sources it applies to; none: all


def strings_in(record) -> list[str]:
    if isinstance(record, str):
        return [record]
    if isinstance(record, dict):
        record = list(record.values())
    return [s for r in record for s in strings_in(r)] if isinstance(record, list) else []


def _items(path: str):
    for name, file in files_of(Files(path)):
        for record in json_records(file):
            for item in strings_in(record):
                yield name, item


def ngram_tables(step: Decontaminate) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Length of run -> (sorted hashes, index of the set of each), and the sets' names."""
    found: dict[int, list[tuple[np.ndarray, int]]] = {}
    names: list[str] = []
    for path in step.sets:
        before = len(names)
        for name, item in _items(path):
            if len(names) == before or names[-1] != name:  # two sets may have files of one name
                names.append(name)
            hash_W = words(item).hashes
            n = min(step.ngram, hash_W.size)
            if n >= min(step.min_words, step.ngram):
                found.setdefault(n, []).append((shingles(hash_W, n), len(names) - 1))
        if len(names) == before:
            raise UserError(f"Decontaminate: there is no text in {path}")
    if not found:
        raise UserError(f"Decontaminate: no item of {', '.join(step.sets)} has {step.min_words} words or more")
    tables = {}
    for n, parts in sorted(found.items(), reverse=True):
        keys = np.concatenate([p for p, _ in parts])
        origin = np.concatenate([np.full(p.size, i, np.int32) for p, i in parts])
        keys, first = np.unique(keys, return_index=True)
        tables[n] = (keys, origin[first])
    return tables, names


@filter_for.register
def _(step: Decontaminate) -> Filter:
    if not step.sets:
        raise UserError("Decontaminate: name at least one evaluation set in `sets`")
    if step.ngram < 1 or step.min_words < 1:
        raise UserError(f"Decontaminate: ngram and min_words are at least 1, got {step.ngram} and {step.min_words}")
    tables, names = ngram_tables(step)

    def check(text, url):
        found = words(text)
        for n, (keys, origin) in tables.items():
            run_S = shingles(found.hashes, n)
            at_S = np.minimum(np.searchsorted(keys, run_S), keys.size - 1)
            hits = np.flatnonzero(keys[at_S] == run_S)
            if hits.size:
                i = hits[0]
                shared = found.data[found.starts[i] : found.ends[i + n - 1]].decode("utf-8", "replace")
                which = names[origin[at_S[i]]]
                return Removed(f"in the evaluation set {which}", f"{n} words in a row: {' '.join(shared.split())}")
        return text

    return check
