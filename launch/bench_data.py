"""Throughput of the data pipeline on a corpus whose duplicates are known: curation, then tokenizing and packing."""

import dataclasses
import functools
import itertools
import json
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

from jaxlm.config import UserError
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
    curate,
)
from jaxlm.data.packing import pack
from jaxlm.data.parallel import cores, ordered_map
from jaxlm.data.sources import EmbeddedPython, Files, documents
from jaxlm.data.tokenizer import SentencePiece, train
from launch.bench_rows import in_turn, max_resident, peak_here, row, spread

EXACT, NEAR = 0.03, 0.07  # shares of planted copies, and of copies in which 1% of the words are others
_SELF, _CHILDREN = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
_MEAN_WORDS, _SPREAD = 450, 0.9  # log-normal lengths, about 4 kB on average, like pages of the web


def _words() -> np.ndarray:
    """The running Python's own text, cut behind each white space."""
    pieces = [re.findall(r"\S+\s*|\s+", d.text) for d in documents(EmbeddedPython())]
    return np.array(list(itertools.chain.from_iterable(pieces)), object)


def _write_part(path: str, seed: int, size: int, words: np.ndarray) -> dict[str, int]:
    """A .jsonl file of about `size` bytes: stretches of real text in which 30% of the words are others, so that two
    stretches from the same place are different documents, with the planted copies among them."""
    rng = np.random.default_rng(seed)
    counts = {"documents": 0, "exact": 0, "near": 0, "bytes": 0}
    recent: list[np.ndarray] = []

    def replaced(text, share):
        out, n = text.copy(), rng.binomial(text.size, share)
        out[rng.integers(text.size, size=n)] = words[rng.integers(words.size, size=n)]
        return out

    with open(path, "w", encoding="utf-8") as f:
        while counts["bytes"] < size:
            kind = rng.random()
            if recent and kind < EXACT:
                document = recent[rng.integers(len(recent))]
                counts["exact"] += 1
            elif recent and kind < EXACT + NEAR:
                original = recent[rng.integers(len(recent))]
                document = replaced(original, 0.01)
                counts["exact" if (document == original).all() else "near"] += 1  # a short one may have lost no word
            else:
                n = int(np.clip(rng.lognormal(np.log(_MEAN_WORDS) - _SPREAD**2 / 2, _SPREAD), 40, 50_000))
                at = rng.integers(words.size - n)
                document = replaced(words[at : at + n], 0.3)
                recent = [*recent[-999:], document]
            text = "".join(document.tolist())
            f.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            counts["documents"] += 1
            counts["bytes"] += len(text.encode())
    return counts


def _part_writer() -> Callable:
    words = _words()
    return lambda task: _write_part(*task, words)


def make_corpus(folder: str, megabytes: int, workers: int) -> dict[str, int]:
    """Writes .jsonl files of 16 MB of text; returns counts of documents, planted copies and bytes."""
    sizes = [16_000_000] * (megabytes // 16) + [megabytes % 16 * 1_000_000] * (megabytes % 16 > 0)
    tasks = [(os.path.join(folder, f"{i:05d}.jsonl"), i, size) for i, size in enumerate(sizes)]
    totals: dict[str, int] = {}
    for _, counts in ordered_map(_part_writer, tasks, workers):
        totals = {k: totals.get(k, 0) + n for k, n in counts.items()}
    return totals


def _curate_folder(workers: int, folder: str) -> dict:
    """Curates with the default steps in a process of its own, so that its memory can be told."""
    before = peak_here()
    cpu_before = _cpu_seconds()
    begin = time.perf_counter()
    remaining, report = curate(documents(Files(folder)), Curation(), workers)
    out = sum(len(d.text.encode()) for d in remaining)
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": _cpu_seconds() - cpu_before,
        "bytes_out": out,
        "megabytes_before": before,
        "megabytes_peak": peak_here(),
        "megabytes_peak_worker": max_resident(_CHILDREN) if workers > 1 else 0.0,
        "report": report,
    }


def _cpu_seconds() -> float:
    """Used so far by this process and its finished children."""
    return sum(u.ru_utime + u.ru_stime for u in (resource.getrusage(_SELF), resource.getrusage(_CHILDREN)))


def _in_a_process(function: Callable, argument):
    """`function(argument)` in a fresh process."""
    return next(ordered_map(functools.partial(_just, function), [argument], workers=2))[1]


def _just(function: Callable) -> Callable:
    return function


def curation_throughput(megabytes: int, workers: int = 0, repetitions: int = 1) -> dict[str, dict]:
    """Reads and curates a made corpus of `megabytes` MB with the default steps, `repetitions` times.

    Returns the corpus, with planted and removed copies; the row of the whole, with CPU seconds of all processes and the
    memory of the deciding process and of the largest worker; the same of each step, of seconds summed over processes.
    """
    workers = workers or cores()
    folder = tempfile.mkdtemp(prefix="jaxlm-bench-")
    try:
        made = make_corpus(folder, megabytes, workers)
        rounds = [_in_a_process(functools.partial(_curate_folder, workers), folder) for _ in range(repetitions)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    steps = [{s["step"]: s for s in done["report"]["steps"]} for done in rounds]
    size, seconds = made["bytes"] / 1e6, [done["seconds"] for done in rounds]
    most = {k: max(done[k] for done in rounds) for k in ("megabytes_before", "megabytes_peak", "megabytes_peak_worker")}
    return {
        "corpus": {
            "MB": size,
            "documents": made["documents"],
            "workers": workers,
            "planted, exact": made["exact"],
            "removed, exact": steps[0]["ExactDuplicates"]["removed"],
            "planted, near": made["near"],
            "removed, near": steps[0]["NearDuplicates"]["removed"],
        },
        "all steps": row(seconds, {"MB": size}, memory=most["megabytes_peak"] * 1e6)
        | {
            "CPU seconds": spread([done["cpu_seconds"] for done in rounds]),
            "minutes a GB": spread([s / size * 1e3 / 60 for s in seconds]),
            "GB before": most["megabytes_before"] / 1e3,
            "GB at most, a worker": most["megabytes_peak_worker"] / 1e3,
        },
        **{
            f"in {name}": {"seconds of all processes": spread([s[name]["seconds"] for s in steps])} for name in steps[0]
        },
    }


def step_throughput(megabytes: int, workers: int = 0, repetitions: int = 1) -> dict[str, dict]:
    """The row of every step alone, in CPU seconds of this process, on a made corpus of `megabytes` MB.

    Steps whose package is not installed are left out. `workers` make the corpus.
    """
    folder = tempfile.mkdtemp(prefix="jaxlm-bench-")
    try:
        made = make_corpus(folder, megabytes, workers or cores())
        texts = list(documents(Files(folder)))
        exam = os.path.join(folder, "exam.txt")
        with open(exam, "w", encoding="utf-8") as f:
            f.writelines(d.text[:200] for d in texts[:200])
        pages = [dataclasses.replace(d, text="<html><body><p>" + d.text.replace("\n", "</p><p>")) for d in texts]
        nodes = (Length(), Symbols(), Repetition(), MaskPII(), ExactDuplicates(), NearDuplicates())
        spent: dict[str, list[float]] = {}
        for _ in range(repetitions):
            for step in (*nodes, Decontaminate(sets=(exam,)), Language(), HtmlText()):
                try:
                    remaining, _ = curate(pages if isinstance(step, HtmlText) else texts, Curation((step,)), workers=1)
                except UserError:
                    continue
                begin = time.process_time()
                for _ in remaining:
                    pass
                spent.setdefault(type(step).__name__, []).append(time.process_time() - begin)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {name: row(seconds, {"MB": made["bytes"] / 1e6}) for name, seconds in spent.items()}


def packing_throughput(
    megabytes: int, workers: int = 0, repetitions: int = 1, vocab_size: int = 16384, context: int = 1024
) -> dict[str, dict]:
    """Trains a tokenizer on a made corpus of `megabytes` MB (a sample of at most 16 MB), then packs all of it; both
    `repetitions` times.

    Returns the corpus, and the rows of the tokenizer and of packing.
    """
    workers = workers or cores()
    folder = tempfile.mkdtemp(prefix="jaxlm-bench-")
    held: dict = {}
    try:
        corpus, out = os.path.join(folder, "corpus"), os.path.join(folder, "packed")
        os.mkdir(corpus)
        made = make_corpus(corpus, megabytes, workers)

        def texts() -> Iterator[str]:
            return (d.text for d in documents(Files(corpus)))

        def tokenizer():
            held["tokenizer"] = train(SentencePiece(vocab_size=vocab_size, sample_bytes=16_000_000), texts())

        def packing():
            shutil.rmtree(out, ignore_errors=True)
            tokens = held["tokenizer"]
            held["packed"] = pack(documents(Files(corpus)), tokens, out, context=context, workers=workers)

        seconds = in_turn({"tokenizer": tokenizer, "packing": packing}, repetitions, warm=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    packed, size = held["packed"], made["bytes"] / 1e6
    return {
        "corpus": {"MB": size, "tokens": packed.tokens, "bytes a token": packed.bytes / packed.tokens},
        "settings": {"workers": workers, "pieces": vocab_size, "tokens a row": context},
        "tokenizer": row(seconds["tokenizer"]),
        "packing": row(seconds["packing"], {"tokens": packed.tokens, "MB": size}, memory=peak_here() * 1e6),
    }
