import os
import random
import sqlite3

import pytest

from jaxlm.config import UserError
from jaxlm.tools.search import Hit, build_index, passages, search

TEXTS = {
    "rivers.md": "# Rivers\n\nThe Rhine rises in the Alps.\n\nThe Danube ends in the Black Sea.\n",
    "people/ada.txt": "Ada Lovelace\n\nShe wrote the first program, for Babbage's engine.\n",
    "people/emmy.txt": "Emmy Noether proved that symmetries give conservation laws. Naïve, café.\n",
    "long.txt": "\n\n".join(f"Paragraph {i} speaks of number {i} and of nothing else at all." for i in range(200)),
}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    for name, text in TEXTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def index(folder, name="index.db"):
    build_index(folder, folder.parent / name)
    return folder.parent / name


def test_finds_what_is_there(folder):
    db = index(folder)
    hits = search(db, "Who wrote the first program?", 3)
    assert hits[0].path == "people/ada.txt" and hits[0].title == "Ada Lovelace"
    assert "Babbage" in hits[0].snippet and isinstance(hits[0], Hit)
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert search(db, "danube")[0].title == "Rivers"
    assert search(db, "NAIVE CAFE symmetry")[0].path == "people/emmy.txt"  # case, accents and endings do not matter
    found = search(db, "number 137", 1)[0]
    assert "137" in found.snippet and found.path == "long.txt" and found.title == "long"
    assert search(db, "nothingofthekind") == []


def test_same_answer_every_time(folder):
    a, b = index(folder, "a.db"), index(folder, "b.db")
    for query in ("the", "paragraph of nothing", "sea alps engine laws"):
        assert search(a, query, 50) == search(a, query, 50) == search(b, query, 50)


def test_builds_again_only_what_changed(folder, monkeypatch):
    db = folder.parent / "index.db"
    first = build_index(folder, db)
    assert (first.files, first.added, first.skipped) == (4, 4, 0)
    read = []
    monkeypatch.setattr("jaxlm.tools.search._read", lambda path, size: read.append(path.name) or path.read_text())
    assert build_index(folder, db)[2:] == (0, 0, 0, 0) and not read
    (folder / "rivers.md").write_text("# Rivers\n\nThe Elbe flows through Hamburg.\n")
    (folder / "people" / "emmy.txt").unlink()
    (folder / "new.txt").write_text("The Vistula passes Warsaw.\n")
    os.utime(folder / "long.txt", (1, 1))  # touched, not changed
    again = build_index(folder, db)
    assert (again.files, again.added, again.changed, again.removed) == (4, 1, 1, 1)
    assert sorted(read) == ["long.txt", "new.txt", "rivers.md"]
    fresh = index(folder, "fresh.db")
    for query in ("rivers Elbe", "danube", "Noether", "Vistula Warsaw", "paragraph 17", "the of and"):
        assert search(db, query, 20) == search(fresh, query, 20)


def test_any_query_is_text(folder):
    db = index(folder)
    rng = random.Random(0)
    queries = ['"', '""', "' OR 1=1 --", "AND OR NOT", "NEAR(a b)", "rhine*", "title:x", "^x", "(", "-x", "a AND", "\0"]
    queries += ["", " ", "_", "__", "\ud800 rhine", "漢字", "😀", "x" * 100_000, "rhine " * 10_000, "a" + "\u0301" * 99]
    queries += ["".join(chr(rng.randrange(0x300)) for _ in range(30)) for _ in range(100)]
    for query in queries:
        assert isinstance(search(db, query), list)
    assert search(db, 'the "Rhine" (rises)* AND', 1)[0].title == "Rivers"


def test_what_is_not_text_is_skipped(folder):
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "latin.txt").write_bytes("Müller Zürich".encode("latin-1"))
    (folder / "empty.txt").write_text(" \n")
    (folder / ".hidden").write_text("hidden words")
    (folder / "link.txt").symlink_to(folder / "rivers.md")
    (folder / "bom.txt").write_bytes("\ufeffThe Tagus reaches Lisbon.".encode())
    db = folder / "index.db"  # in the folder itself
    result = build_index(folder, db)
    assert (result.files, result.skipped) == (5, 3)
    assert build_index(folder, db).skipped == 3
    assert search(db, "tagus")[0].path == "bom.txt" and not search(db, "hidden")
    assert len(search(db, "rhine")) == 1


def test_errors_are_clear(folder, tmp_path):
    db = index(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    for broken, message in (
        (lambda: build_index(tmp_path / "none", db), "no such folder"),
        (lambda: build_index(empty, tmp_path / "x.db"), "no files"),
        (lambda: search(tmp_path / "none.db", "x"), "no index"),
        (lambda: search(db, "x", 0), "1 to 100"),
        (lambda: search(db, "x", 1.5), "1 to 100"),
    ):
        with pytest.raises(UserError, match=message):
            broken()
    assert not (tmp_path / "x.db").exists()
    (empty / "image.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(UserError, match="no UTF-8 text"):
        build_index(empty, tmp_path / "x.db")
    assert not (tmp_path / "x.db").exists()
    other = sqlite3.connect(tmp_path / "other.db")
    other.execute("CREATE TABLE t(x)")
    other.commit()
    other.close()
    (tmp_path / "garbage.db").write_bytes(b"not a database at all" * 100)
    for path, message in ((tmp_path / "other.db", "another kind"), (tmp_path / "garbage.db", "not a database")):
        before = path.read_bytes()
        with pytest.raises(UserError, match=message):
            build_index(folder, path)
        with pytest.raises(UserError, match=message):
            search(path, "x")
        assert path.read_bytes() == before
    cut = tmp_path / "cut.db"
    cut.write_bytes(db.read_bytes()[:8192])
    with pytest.raises(UserError, match="cannot"):
        search(cut, "paragraph")
    newer = sqlite3.connect(db)
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(UserError, match="schema 99"):
        search(db, "x")


def test_a_failed_build_leaves_the_index(folder, monkeypatch):
    db = index(folder)
    (folder / "new.txt").write_text("The Ebro is in Spain.")
    (folder / "rivers.md").unlink()

    def fail(text):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr("jaxlm.tools.search.passages", fail)
    with pytest.raises(UserError, match="cannot write"):
        build_index(folder, db)
    assert search(db, "rhine") and not search(db, "ebro")


def test_passages_keep_the_text():
    text = "\n\n".join(["short"] * 5 + ["word " * 700, "x" * 5000, "end"])
    cut = passages(text)
    assert "".join("".join(p.split()) for p in cut) == "".join(text.split())
    assert max(map(len, cut)) <= 2000 and len(cut) > 5
    shorter = passages(text, 100)
    assert "".join("".join(p.split()) for p in shorter) == "".join(text.split())
    assert max(map(len, shorter)) <= 200 and len(shorter) > 50
