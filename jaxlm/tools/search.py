"""Search over a folder of text: a SQLite full-text index (FTS5) in one file, ranked by BM25.

Files are cut into passages at blank lines, so that a hit shows the sentence that was looked for and not a whole book.
Building again reads only the files that changed. Local disks only: SQLite cannot lie on object storage.
"""

import contextlib
import hashlib
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxlm.config import UserError

SCHEMA_VERSION = 1
APPLICATION_ID = 0x6A6C6D73  # "jlms": tells our index from any other database
PASSAGE = 1000  # characters after which the next blank line, or else the next space, ends a passage
LARGEST_FILE = 64 << 20  # bytes; longer ones are skipped and counted
MOST_WORDS = 64  # of a query
MOST_HITS = 100
SNIPPET_TOKENS = 40

_SCHEMA = f"""
CREATE TABLE files (
    path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 TEXT, first INTEGER, passages INTEGER
) WITHOUT ROWID;
CREATE VIRTUAL TABLE passages USING fts5(
    title, body, path UNINDEXED, part UNINDEXED, tokenize = 'porter unicode61 remove_diacritics 2'
);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""


class Hit(NamedTuple):
    """A passage. `path` is relative to the indexed folder; a greater `score` is a better match."""

    path: str
    title: str
    snippet: str
    score: float


class Indexed(NamedTuple):
    """What a build found and did, in files."""

    files: int  # in the index now
    passages: int
    added: int
    changed: int
    removed: int
    skipped: int  # not UTF-8 text, empty, or too large


def build_index(folder: str | os.PathLike, db_path: str | os.PathLike) -> Indexed:
    """Brings the index at `db_path` up to date with the text files below `folder`; makes it when it is not there.

    Every regular file that is UTF-8 text counts, whatever its ending; hidden ones and links are left out. All or
    nothing: a build that fails leaves the index as it was. UserError for a missing folder, one without text, or a
    `db_path` that holds something else.
    """
    folder, db_path = Path(folder), Path(db_path)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    found = {path: stat for path, stat in _walk(folder) if not _same_file(folder / path, db_path)}
    new = not db_path.exists()
    if new and not found:
        raise UserError(f"{folder} holds no files to index")
    with contextlib.suppress(OSError):
        db_path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.closing(_connect(db_path, write=True)) as db, db:
            result = _update(db, folder, found)
            if not result.files:
                raise UserError(f"{folder} holds no UTF-8 text ({result.skipped} files skipped)")
    except UserError:
        if new:
            db_path.unlink(missing_ok=True)
        raise
    except sqlite3.Error as e:
        raise UserError(f"cannot write the index {db_path}: {e}") from e
    return result


def search(db_path: str | os.PathLike, query: str, k: int = 5) -> list[Hit]:
    """The `k` passages that match the words of `query` best, best first; ties by path and place.

    Any text is a query: its words are looked for, more and rarer ones count more, and nothing in it is an operator.
    Without a word in it there are no hits. UserError for a missing index or a `k` outside 1..100.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST_HITS:
        raise UserError(f"k={k!r}: a number of hits from 1 to {MOST_HITS} is needed")
    words = list(dict.fromkeys(re.findall(r"\w+", query.lower())))[:MOST_WORDS]
    if not Path(db_path).is_file():
        raise UserError(f"no index at {db_path}: make one with build_index")
    if not words:
        return []
    match = " OR ".join(f'"{word}"' for word in words)
    # Scores are rounded before they order: the order of equal ones must not hang on the order of a sum.
    statement = (
        f"SELECT path, title, snippet(passages, 1, '', '', ' … ', {SNIPPET_TOKENS}),"
        " round(-bm25(passages, 2.0, 1.0), 9) FROM passages WHERE passages MATCH ? ORDER BY 4 DESC, path, part LIMIT ?"
    )
    try:
        with contextlib.closing(_connect(Path(db_path), write=False)) as db:
            rows = db.execute(statement, (match, k)).fetchall()
    except sqlite3.Error as e:
        raise UserError(f"cannot read the index {db_path}: {e}") from e
    return [Hit(path, title, " ".join(snippet.split()), score) for path, title, snippet, score in rows]


# ------------------------------------------------------------------------------------------------------ the folder
def _walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Regular files below the folder in a fixed order, as relative paths with `/`."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            if name.startswith(".") or path.is_symlink() or not path.is_file():
                continue
            with contextlib.suppress(OSError):  # gone since
                yield path.relative_to(folder).as_posix(), path.stat()


def _same_file(path: Path, db_path: Path) -> bool:
    """Also true of the journals that SQLite keeps beside a database."""
    return path.absolute().as_posix().startswith(db_path.absolute().as_posix())


def _read(path: Path, size: int) -> str | None:
    if size > LARGEST_FILE:
        return None
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    return None if b"\0" in data or not text.strip() else text


def _title(path: str, text: str) -> str:
    """A heading, or a short first line that stands alone and is no sentence; else the file's name."""
    first, _, rest = text.lstrip().partition("\n")
    heading = re.match(r"#+\s+(\S.*)", first)
    short = len(first) <= 80 and not first.rstrip().endswith((".", "!", "?", ":", ",", ";"))
    if heading or (short and re.match(r"[ \t]*\n", rest)):
        return (heading[1] if heading else first).strip()[:200]
    return re.sub(r"[_\-.]+", " ", Path(path).stem).strip() or path


def passages(text: str, size: int = PASSAGE) -> list[str]:
    """Cuts at blank lines into pieces of about `size` characters; a paragraph much longer is cut at a space."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip()
        while len(paragraph) > 2 * size:
            cut = paragraph.rfind(" ", 0, size)
            cut = cut if cut > 0 else size
            pieces.append(paragraph[:cut])
            paragraph = paragraph[cut:].lstrip()
        if paragraph and pieces and len(pieces[-1]) + len(paragraph) < size:
            pieces[-1] += "\n\n" + paragraph
        elif paragraph:
            pieces.append(paragraph)
    return pieces


# ----------------------------------------------------------------------------------------------------- the database
def _connect(db_path: Path, write: bool) -> sqlite3.Connection:
    """Opens our index, and for writing makes one; UserError when the file is something else."""
    mode = "rwc" if write else "ro"
    db = sqlite3.connect(f"{db_path.absolute().as_uri()}?mode={mode}", uri=True, timeout=30)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if write and not tables and not application:
            db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
        elif application != APPLICATION_ID:
            raise UserError(f"{db_path} is a database of another kind, not a search index")
        elif version != SCHEMA_VERSION:
            raise UserError(f"{db_path} has schema {version}, not {SCHEMA_VERSION}: delete it and build it again")
    except sqlite3.DatabaseError as e:
        db.close()
        if "fts5" in str(e):
            raise UserError("this Python's SQLite is built without FTS5, which search needs") from e
        raise UserError(f"cannot use {db_path} as a search index: {e}") from e
    except UserError:
        db.close()
        raise
    return db


def _update(db: sqlite3.Connection, folder: Path, found: dict[str, os.stat_result]) -> Indexed:
    columns = "path, size, mtime_ns, sha256, first, passages"
    known = {row[0]: row[1:] for row in db.execute(f"SELECT {columns} FROM files")}
    added = changed = removed = 0
    for path in sorted(known.keys() - found.keys()):
        _forget(db, path, known[path])
        removed += 1
    for path, stat in found.items():
        before = known.get(path)
        if before and before[:2] == (stat.st_size, stat.st_mtime_ns):
            continue
        text = _read(folder / path, stat.st_size)
        digest = hashlib.sha256(text.encode()).hexdigest() if text is not None else None
        if before and before[2] == digest:
            db.execute("UPDATE files SET size = ?, mtime_ns = ? WHERE path = ?", (stat.st_size, stat.st_mtime_ns, path))
            continue
        if before:
            _forget(db, path, before)
        if text is not None:
            added, changed = added + (not before), changed + bool(before)
        pieces = passages(text) if text is not None else []
        (first,) = db.execute("SELECT coalesce(max(first + passages), 1) FROM files").fetchone()
        title = _title(path, text or "")
        db.executemany(
            "INSERT INTO passages(rowid, title, body, path, part) VALUES (?, ?, ?, ?, ?)",
            [(first + i, title, piece, path, i) for i, piece in enumerate(pieces)],
        )
        row = (path, stat.st_size, stat.st_mtime_ns, digest, first, len(pieces))
        db.execute(f"INSERT OR REPLACE INTO files({columns}) VALUES (?, ?, ?, ?, ?, ?)", row)
    # A file that is not text is remembered, so that it is not read again, with no passages.
    total, texts, pieces = db.execute(
        "SELECT count(*), coalesce(sum(passages > 0), 0), coalesce(sum(passages), 0) FROM files"
    ).fetchone()
    return Indexed(texts, pieces, added, changed, removed, total - texts)


def _forget(db: sqlite3.Connection, path: str, row: tuple) -> None:
    first, count = row[3:]
    db.execute("DELETE FROM passages WHERE rowid >= ? AND rowid < ?", (first, first + count))
    db.execute("DELETE FROM files WHERE path = ?", (path,))
