"""Curation as a whole: a result that neither workers nor batches change, and a report that adds up."""

import json
import re

from jaxlm.config import from_json, to_json
from jaxlm.data import curate as curation
from jaxlm.data.curate import (
    Curation,
    Decontaminate,
    ExactDuplicates,
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
from jaxlm.data.sources import Document, EmbeddedPython, documents
from tests.data.curating import PROSE, corpus, docs

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
