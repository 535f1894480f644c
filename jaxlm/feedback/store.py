"""Feedback in one SQLite file, to which records are only ever added: nothing that was acknowledged is lost.

Write-ahead log with a full sync (SQLite: PRAGMA synchronous=FULL): when `add` returns, its records are on the disk,
whatever happens to the process or the machine. Several processes may write. Local disks only: WAL needs memory that
processes share, and object storage has neither that nor locks.
"""

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import readers
from jaxlm.data.readers import Rejects
from jaxlm.feedback.records import (
    JUDGMENTS,
    Alternative,
    Prompt,
    Ranking,
    Rating,
    Record,
    Response,
    Retraction,
    body,
    canonical,
    from_body,
    from_object,
    kind_of,
    record_id,
    to_line,
)

APPLICATION_ID = 0x6A6C6662  # "jlfb": tells a store from any other database
PATIENCE = 60.0  # seconds to wait for another process that writes
ENDINGS = tuple(e + c for e in readers.JSON_ENDINGS for c in ("", *readers.COMPRESSED))
MAX_BAD_FRACTION = 0.01  # of an imported file's lines


def records_in_one_table(db: sqlite3.Connection) -> None:
    """Version 1. `body` is the JSON that the id is the hash of, `target` what a rating or a retraction is about."""
    db.execute(
        "CREATE TABLE records (sequence INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, "
        "prompt TEXT, target TEXT, annotator TEXT, body TEXT NOT NULL)"
    )
    db.execute("CREATE INDEX by_prompt ON records(prompt, kind)")
    db.execute("CREATE INDEX by_kind ON records(kind)")
    db.execute("CREATE INDEX by_target ON records(target)")


# The one at n leads from version n to n + 1; each runs in a transaction of its own. Never changed, only appended to.
MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (records_in_one_table,)

_LIVE = "kind != 'retraction' AND id NOT IN (SELECT target FROM records WHERE kind = 'retraction')"


class Imported(NamedTuple):
    """Lines of an imported file: records that are new, those that were known, and those that could not be used."""

    new: int
    known: int
    rejected: int


class Store:
    """An open store. `Store(":memory:")` is one that is gone when it is closed."""

    def __init__(self, path: str | os.PathLike, create: bool = True):
        """create: make it when there is none. `UserError` for what is no store, and for one of a later version."""
        self.path = os.fspath(path)
        if not storage.is_local(self.path):
            raise UserError(
                f"a feedback store is an SQLite file on a local disk, got {self.path}; export it from there"
            )
        if self.path != ":memory:":
            if not create and not Path(self.path).is_file():
                raise UserError(f"no feedback store at {self.path}")
            with storage.disk_errors(self.path):
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            # Transactions are begun by hand: the module's own would begin too late to check what is there.
            self._db = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)
        try:
            with self._errors():
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # ---------------------------------------------------------------------------------------------------- the file
    @contextlib.contextmanager
    def _errors(self):
        try:
            yield
        except sqlite3.Error as e:
            raise UserError(f"feedback store {self.path}: {e}") from e

    @contextlib.contextmanager
    def _transaction(self):
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _pragma(self, name: str):
        return self._db.execute(f"PRAGMA {name}").fetchone()[0]

    def _check(self) -> int:
        """The version of what is there; 0 of an empty file."""
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        version = self._pragma("user_version")
        if tables and self._pragma("application_id") != APPLICATION_ID:
            raise UserError(f"{self.path} is an SQLite database, but not a feedback store")
        if version > len(MIGRATIONS):
            raise UserError(
                f"{self.path} has schema version {version}, this program knows versions up to {len(MIGRATIONS)}"
            )
        return version

    def _prepare(self) -> None:
        self._check()
        deadline = time.monotonic() + PATIENCE
        while True:  # SQLite does not wait for its lock when two processes switch a new file to WAL at once
            try:
                mode = self._pragma("journal_mode=WAL")
                break
            except sqlite3.OperationalError as e:
                if "locked" not in str(e) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if mode != ("memory" if self.path == ":memory:" else "wal"):
            raise UserError(f"{self.path} cannot have a write-ahead log (got {mode!r}): choose a local disk")
        self._db.execute("PRAGMA synchronous=FULL")
        while self._check() < len(MIGRATIONS):
            with self._transaction():
                if (version := self._check()) < len(MIGRATIONS):  # another process may have been first
                    MIGRATIONS[version](self._db)
                    self._db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                    self._db.execute(f"PRAGMA user_version={version + 1}")

    # -------------------------------------------------------------------------------------------------- writing
    def _row(self, id: str) -> tuple[str, str | None]:
        """(kind, prompt)"""
        row = self._db.execute("SELECT kind, prompt FROM records WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise UserError(f"{id} is not in the store")
        return row

    def _responses(self, ids, prompt: str) -> None:
        for i in ids:
            if self._row(i) != ("response", prompt):
                raise UserError(f"{i} is no response to the prompt {prompt}")

    def _place(self, record: Record) -> tuple[str | None, str | None]:
        """(prompt, target) of a record; `UserError` where what it is about is not there."""
        if isinstance(record, Prompt):
            return None, None
        if isinstance(record, Rating):
            kind, prompt = self._row(record.response)
            if kind != "response":
                raise UserError(f"a rating is about a response, {record.response} is a {kind}")
            return prompt, record.response
        if isinstance(record, Retraction):
            kind, prompt = self._row(record.of)
            if kind not in JUDGMENTS:
                raise UserError(f"only {', '.join(JUDGMENTS)} can be retracted, {record.of} is a {kind}")
            return prompt, record.of
        if (kind := self._row(record.prompt)[0]) != "prompt":
            raise UserError(f"a {kind_of(record)} belongs to a prompt, {record.prompt} is a {kind}")
        if isinstance(record, Ranking):
            self._responses(record.shown, record.prompt)
        if isinstance(record, Alternative):
            self._responses(record.better_than, record.prompt)
        return record.prompt, None

    def _put(self, record: Record) -> tuple[str, bool]:
        """(id, whether it is new)"""
        id = record_id(record)
        if self._db.execute("SELECT 1 FROM records WHERE id = ?", (id,)).fetchone():
            return id, False
        prompt, target = self._place(record)
        self._db.execute(
            "INSERT INTO records(id, kind, prompt, target, annotator, body) VALUES (?, ?, ?, ?, ?, ?)",
            (id, kind_of(record), prompt, target, getattr(record, "annotator", None), canonical(body(record))),
        )
        return id, True

    def add(self, *records: Record) -> list[str]:
        """Adds records in one transaction, all or none, and returns their ids; what is already there stays as it is.

        A record may be about those before it. `UserError` for one about something that is not there.
        """
        with self._transaction():
            return [self._put(r)[0] for r in records]

    # -------------------------------------------------------------------------------------------------- reading
    def records(
        self, *kinds: type, prompt: str | None = None, annotator: str | None = None, retracted: bool = False
    ) -> Iterator[tuple[str, Record]]:
        """(id, record), in the order in which they came; of these kinds, this prompt and this annotator, if given.

        retracted: those too, and the retractions themselves.
        """
        wheres, values = [] if retracted else [_LIVE], []
        if kinds:
            wheres.append(f"kind IN ({', '.join('?' * len(kinds))})")
            values += [k.__name__.lower() for k in kinds]
        for column, value in (("prompt", prompt), ("annotator", annotator)):
            if value is not None:
                wheres.append(f"{column} = ?")
                values.append(value)
        where = f"WHERE {' AND '.join(wheres)}" if wheres else ""
        with self._errors():
            for id, kind, text in self._db.execute(
                f"SELECT id, kind, body FROM records {where} ORDER BY sequence", values
            ):
                yield id, from_body(kind, json.loads(text))

    def get(self, id: str) -> Record:
        with self._errors():
            row = self._db.execute("SELECT kind, body FROM records WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise UserError(f"{id} is not in the store {self.path}")
        return from_body(row[0], json.loads(row[1]))

    def prompts(self) -> dict[str, Prompt]:
        return dict(self.records(Prompt))

    def responses(self, prompt: str) -> dict[str, Response]:
        return dict(self.records(Response, prompt=prompt))

    # --------------------------------------------------------------------------------------------- there and back
    def export_jsonl(self, path) -> int:
        """Writes every record, also retracted ones, a line each; `import_jsonl` reads them. Returns how many."""
        lines = [to_line(record) + "\n" for _, record in self.records(retracted=True)]
        storage.write_text(path, "".join(lines))
        return len(lines)

    def import_jsonl(self, path, rejects: Rejects | None = None) -> Imported:
        """Adds the records of a file that `export_jsonl` wrote, all in one transaction; known ones are left out.

        rejects: counts the lines that cannot be used; when they are too many, `UserError`, and the store is as it was.
        """
        file, new, known = storage.path(path), 0, 0
        rejects = Rejects(MAX_BAD_FRACTION) if rejects is None else rejects
        if not file.is_file():
            raise UserError(f"no such file: {path}")
        if not file.name.lower().endswith(
            tuple(e + c for e in readers.JSON_ENDINGS for c in ("", *readers.COMPRESSED))
        ):
            raise UserError(f"{path}: records come from {' or '.join(readers.JSON_ENDINGS)}, also .gz and .zst")
        with self._transaction():
            for where, value in readers.records(file):
                try:
                    if isinstance(value, ValueError):
                        raise value
                    is_new = self._put(from_object(value))[1]
                except (ValueError, UserError) as e:
                    rejects.add(f"{path} {where}: {e}")
                    continue
                rejects.seen += 1
                new, known = new + is_new, known + (not is_new)
            rejects.judge()
        return Imported(new, known, rejects.rejected)
