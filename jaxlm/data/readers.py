"""Texts out of files: plain, JSON lines, Parquet, also gzip and zstd; strict UTF-8, streamed, one clear line per fault.

A fault of the container (a PNG, a truncated archive, a column that is not there) is a `UserError` at once. A fault of
one text (bad UTF-8, broken JSON) is counted by `Rejects` and becomes a `UserError` when too many texts have one.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from jaxlm.config import UserError

TEXT_ENDINGS = (".txt", ".text", ".md", ".rst", ".html", ".htm")
JSON_ENDINGS = (".jsonl", ".ndjson")
COMPRESSED = (".gz", ".zst")
KNOWN_ENDINGS = tuple(e + c for e in (*TEXT_ENDINGS, *JSON_ENDINGS) for c in ("", *COMPRESSED)) + (".parquet",)
NOT_TEXT_ENDINGS = (".json", ".csv", ".tsv", ".zip", ".tar", ".7z", ".bz2", ".xz")
EARLY = 1000  # texts before a rate of rejects is judged in mid-stream

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF-", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data (its name should end in .gz)"),
    (b"\x28\xb5\x2f\xfd", "zstd data (its name should end in .zst)"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ\x00", "xz data"),
    (b"PAR1", "a Parquet table (its name should end in .parquet)"),
    (b"\x7fELF", "a program"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\xff\xfe", "UTF-16 text (convert it: iconv -f UTF-16 -t UTF-8)"),
    (b"\xfe\xff", "UTF-16 text (convert it: iconv -f UTF-16 -t UTF-8)"),
)


class Item(NamedTuple):
    text: str
    where: str  # what follows the file's name in the id: "" or ":line"
    url: str | None


@dataclasses.dataclass
class Rejects:
    """Counts what a source gave and what was refused. `seen` counts texts that were not empty, refused ones too."""

    max_fraction: float
    seen: int = 0
    empty: int = 0
    rejected: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)  # the first five, each "file line 3: what is wrong"

    def __post_init__(self):
        if not 0 <= self.max_fraction <= 1:
            raise UserError(f"max_bad_fraction is a share of the texts, from 0 to 1, got {self.max_fraction:g}")

    def add(self, what: str) -> None:
        self.seen += 1
        self.rejected += 1
        if len(self.examples) < 5:
            self.examples.append(what)
        self.judge(max(self.seen, EARLY))

    def judge(self, of: int | None = None) -> None:
        """Raises `UserError` when more than `max_fraction` of `of` texts (all seen so far by default) were refused."""
        if self.rejected > self.max_fraction * (self.seen if of is None else of):
            raise UserError(
                f"{self.examples[0]} ({self.rejected} of {self.seen} texts refused, more than the allowed "
                f"max_bad_fraction={self.max_fraction:g})"
            )


# ---------------------------------------------------------------------------------------------------------- bytes
class _ZstdFrames(io.RawIOBase):
    """The bytes in a zstd file. `stream_reader` of zstandard ends a truncated frame without an error; this raises."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw, self._new = raw, lambda: zstandard.ZstdDecompressor().decompressobj()
        self._left = memoryview(b"")
        self._frame, self._fed = self._new(), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left:
            chunk = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._fed = self._new(), False
            if not chunk:
                chunk = self._raw.read(1 << 14)
            if not chunk:
                if self._fed:
                    raise EOFError("the compressed data ends before its end marker")
                return 0
            self._fed = True
            self._left = memoryview(self._frame.decompress(chunk))
        n = min(len(buffer), len(self._left))
        buffer[:n], self._left = self._left[:n], self._left[n:]
        return n


def _open(file, name: str) -> BinaryIO:
    """Binary, decompressed and buffered."""
    try:
        raw = file.open("rb")
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror or e}") from e
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 17)
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdFrames(raw), 1 << 17)
    return raw


def _broken(e: Exception) -> bool:
    """Whether the exception says that compressed data is damaged."""
    return isinstance(e, EOFError | zlib.error | gzip.BadGzipFile) or type(e).__name__ == "ZstdError"


def _check_is_text(head: bytes, file) -> None:
    found = next((what for magic, what in _MAGIC if head.startswith(magic)), None)
    if found is None and b"\x00" in head:
        found = f"binary data (a NUL byte at offset {head.index(0)})"
    if found:
        raise UserError(f"{file} is not UTF-8 text: it looks like {found}")


def _head(stream: BinaryIO) -> bytes:
    return stream.peek(8192)[:8192] if hasattr(stream, "peek") else b""


def _utf8_fault(e: UnicodeDecodeError, data: bytes) -> str:
    return f"not valid UTF-8 (byte 0x{data[e.start]:02x}: {e.reason})"


# ---------------------------------------------------------------------------------------------------------- kinds
def _whole(stream: BinaryIO, file, rejects: Rejects) -> Iterator[Item]:
    data = stream.read().removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        rejects.empty += 1
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        rejects.add(f"{file} line {data.count(10, 0, e.start) + 1}: {_utf8_fault(e, data)}")
        return
    rejects.seen += 1
    yield Item(text, "", None)


def _records(stream: BinaryIO, file, at: list[int]) -> Iterator[tuple[bytes, object]]:
    """(line, JSON value or the ValueError that says what is wrong with it) of every line that is not blank."""
    for number, line in enumerate(stream, 1):
        at[0] = number
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            yield line, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            yield line, ValueError(_utf8_fault(e, line))
        except (ValueError, RecursionError) as e:
            yield line, ValueError(f"not valid JSON ({str(e).split(':')[0]})")


def _text_of(line: bytes, record, text_field: str) -> str:
    """The text of a record, or `ValueError` with what is wrong."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is wanted, this is {type(record).__name__}")
    text = record.get(text_field)
    if not isinstance(text, str):
        have = ", ".join(map(str, list(record)[:8])) or "none"
        what = f"field {text_field!r} is no string" if text_field in record else f"no field {text_field!r}"
        raise ValueError(f"{what}; fields there: {have}")
    if b"\\u" in line:  # an escape can smuggle in half a surrogate pair, which no UTF-8 can hold
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("not valid UTF-8 (a lone surrogate escape)") from None
    return text


def _lines(stream: BinaryIO, file, rejects: Rejects, text_field: str, url_field: str, at: list[int]) -> Iterator[Item]:
    for line, record in _records(stream, file, at):
        try:
            text = _text_of(line, record, text_field)
        except ValueError as e:
            rejects.add(f"{file} line {at[0]}: {e}")
            continue
        if not text.strip():
            rejects.empty += 1
            continue
        rejects.seen += 1
        url = record.get(url_field)
        yield Item(text, f":{at[0]}", url if isinstance(url, str) else None)


def _parquet_table(file):
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"reading {file} needs pyarrow: pip install pyarrow") from None
    try:
        return pq.ParquetFile(file.open("rb"))
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{file} is not a readable Parquet file: {_first_line(e)}") from e


def _first_line(e: Exception) -> str:
    return str(e).splitlines()[0] if str(e) else type(e).__name__


def _parquet(file, rejects: Rejects, text_field: str, url_field: str) -> Iterator[Item]:
    table = _parquet_table(file)
    import pyarrow as pa

    names = table.schema_arrow.names
    if text_field not in names:
        raise UserError(f"{file}: no column {text_field!r}; columns there: {', '.join(names)}")
    kind = table.schema_arrow.field(text_field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)):
        raise UserError(f"{file}: column {text_field!r} holds {kind}, not strings")
    columns = [text_field] + [c for c in (url_field,) if c in names and c != text_field]
    row = 0
    for batch in _batches(file, table, columns):
        texts = batch.column(text_field)
        urls = batch.column(url_field) if len(columns) > 1 else [None] * len(texts)
        for text, url in zip(texts, urls):
            row += 1
            try:
                text = text.as_py()
            except UnicodeDecodeError as e:
                rejects.add(f"{file} row {row}: not valid UTF-8 ({e.reason})")
                continue
            if not isinstance(text, str):
                rejects.add(f"{file} row {row}: column {text_field!r} holds no string")
                continue
            if not text.strip():
                rejects.empty += 1
                continue
            rejects.seen += 1
            url = url.as_py() if url is not None else None
            yield Item(text, f":{row}", url if isinstance(url, str) else None)


def _batches(file, table, columns: list[str] | None = None) -> Iterator:
    """The rows of a Parquet table in record batches; damage becomes one line."""
    import pyarrow as pa

    row = 0
    try:
        for batch in table.iter_batches(batch_size=256, columns=columns, use_threads=False):
            yield batch
            row += batch.num_rows
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{file}: damaged Parquet data after row {row}: {_first_line(e)}") from e


def _rows(batch) -> Iterator[object]:
    """Each row as a dict, or the ValueError that says what is wrong with it."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # raised before the first row was given: one by one shows which it is
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as e:
                yield ValueError(f"not valid UTF-8 ({e.reason})")


@contextlib.contextmanager
def _opened(file):
    """Gives (stream, name without the compression's ending, [line in hand]); damage becomes one line."""
    name = file.name.lower()
    base = name.removesuffix(".gz").removesuffix(".zst")
    if base.endswith(NOT_TEXT_ENDINGS):
        wanted = "; a file with one JSON object a line is named .jsonl" if base.endswith(".json") else ""
        raise UserError(f"{file}: cannot read {os.path.splitext(base)[1]} files{wanted}")
    at = [0]
    with _open(file, name) as stream:
        try:
            _check_is_text(_head(stream), file)
            yield stream, base, at
        except Exception as e:
            if not _broken(e):
                raise
            after = f" after line {at[0]}" if base.endswith(JSON_ENDINGS) else ""
            raise UserError(f"{file}: damaged or truncated {name.rsplit('.', 1)[1]} data{after} ({e})") from e


def read(file, rejects: Rejects, text_field: str = "text", url_field: str = "url") -> Iterator[Item]:
    """The texts of one file, in order.

    Args:
      file: an `epath` path. Its ending says the kind; one that is not known is read as plain text.
      rejects: counts what is refused, and raises when it is too much (the caller judges the rest at the end).
      text_field, url_field: the names in JSON lines and Parquet.

    A plain file is one text, byte for byte (only a byte order mark is dropped); a line or a row of the others is one.
    """
    if file.name.lower().endswith(".parquet"):
        yield from _parquet(file, rejects, text_field, url_field)
        return
    with _opened(file) as (stream, base, at):
        if base.endswith(JSON_ENDINGS):
            yield from _lines(stream, file, rejects, text_field, url_field, at)
        else:
            yield from _whole(stream, file, rejects)


def records(file) -> Iterator[tuple[str, object]]:
    """(where, record) of one file, whatever its fields: ("line 3", JSON value), ("row 3", dict) of Parquet.

    A record that cannot be read is the `ValueError` that says what is wrong with it. A file of another kind is plain
    text, ("", string).
    """
    if file.name.lower().endswith(".parquet"):
        rows = (row for batch in _batches(file, _parquet_table(file)) for row in _rows(batch))
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    with _opened(file) as (stream, base, at):
        if not base.endswith(JSON_ENDINGS):
            yield from (("", item.text) for item in _whole(stream, file, Rejects(0.0)))
            return
        for _, record in _records(stream, file, at):
            yield f"line {at[0]}", record


def json_records(file) -> Iterator[object]:
    """The records of one file, none left out: the first that cannot be read is a `UserError` with file and line."""
    for where, record in records(file):
        if isinstance(record, ValueError):
            raise UserError(f"{file} {where}: {record}")
        yield record
