"""Tokenize and pack once: documents become rows of context + 1 tokens in ArrayRecord files, with a manifest.

The rule: a document is bos + ids + eos, the documents of a source follow each other as one stream, and row i is the
stream's tokens [i * context, (i + 1) * context], both ends included: a row begins with the last token of the one
before, which was scored there. A document that crosses a row's end goes on in the next row, without the attention and
the positions of its first part. Only the last row has padding. The rows do not depend on the number of workers.

A record holds the row's tokens (uint16, or uint32 for a vocabulary above 65,536), then, where not every token is scored
(see `chat.py`), the bits of its loss mask, then the lengths of its segments as uint32, then, where segments are answers
with ranks (see `preferences.py`), the number of each one's prompt and its rank. Legend: N rows, T = context + 1, S
answers that a row holds at most.
Nothing here imports jax: workers start fast.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tqdm

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data.parallel import cores, ordered_map
from jaxlm.data.shards import Shards, ShardWriter, building
from jaxlm.data.tokenizer import Tokenizer, load

SCHEMA_VERSION = 1
_PART = 1 << 18  # characters of a document encoded at a time
_BATCH = 1 << 20  # characters handed to a worker at a time
_HERE = 4  # batches of a small corpus, done here before a worker would have started


@dataclasses.dataclass(frozen=True)
class PackedSet:
    """Rows on disk and their counts."""

    name: str
    directory: str
    context: int
    rows: int
    tokens: int  # of the stream, bos and eos included
    scored: int  # tokens that some row scores
    bytes: int  # of UTF-8 text
    documents: int
    tokenizer_hash: str
    answers: int = 0  # S, where segments are answers with ranks
    weight: float = 1.0  # share of this set in a batch, before the shares are normalized


# ----------------------------------------------------------------------------------------------------- tokenization
@dataclasses.dataclass
class _Encoded:
    """A stretch of the token stream."""

    ids: np.ndarray
    starts: list[int]  # where documents begin
    bytes: int


def _batches(documents: Iterable, tokenizer: Tokenizer) -> Iterator[list[tuple[str, bool, bool]]]:
    """Parts of documents, (text, is the first, is the last), in batches of about `_BATCH` characters."""
    batch, size = [], 0
    for document in documents:
        text, first = document.text, True
        parts = iter(tokenizer.parts(text, _PART))
        part = next(parts, "")
        while part is not None:
            following = next(parts, None)
            batch.append((part, first, following is None))
            size += len(part)
            part, first = following, False
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, add_bos_eos: bool, dtype: str, batch: list[tuple[str, bool, bool]]) -> _Encoded:
    before = [np.array([tokenizer.bos])] if add_bos_eos and tokenizer.bos is not None else []
    after = [np.array([tokenizer.eos])] if add_bos_eos and tokenizer.eos is not None else []
    arrays, starts, length = [], [], 0
    for (_, first, last), ids in zip(batch, tokenizer.encode_arrays([text for text, _, _ in batch])):
        if first:
            starts.append(length)
        part = [*(before if first else ()), ids, *(after if last else ())]
        arrays += part
        length += sum(map(len, part))
    size = sum(len(text.encode()) for text, _, _ in batch)
    return _Encoded(np.concatenate(arrays).astype(dtype), starts, size)


def _encoder(folder: str, add_bos_eos: bool, dtype: str):
    return functools.partial(_encode, load(folder), add_bos_eos, dtype)


# ------------------------------------------------------------------------------------------------------------- rows
class _Rows:
    """Cuts the stream into rows as it comes."""

    def __init__(self, writer: ShardWriter, context: int, pad: int, dtype: str, one_segment: bool):
        self._writer, self._context, self._pad, self._one_segment = writer, context, pad, one_segment
        self._left, self._starts = np.zeros(0, dtype), np.zeros(0, np.int64)
        self.rows = self.tokens = self.scored = self.bytes = self.documents = 0

    def add(self, encoded: _Encoded) -> None:
        starts = np.array(encoded.starts, np.int64)
        self.tokens += len(encoded.ids)
        self.bytes += encoded.bytes
        self.documents += len(starts)
        if not self._one_segment:
            self._starts = np.concatenate([self._starts, starts + len(self._left)])
        self._left = np.concatenate([self._left, encoded.ids])
        whole = max(0, (len(self._left) - 1) // self._context)
        self._write(np.arange(whole) * self._context)
        cut = whole * self._context
        self._left, self._starts = self._left[cut:], self._starts[self._starts >= cut] - cut

    def finish(self) -> None:
        if len(self._left) > 1:  # one token alone was scored by the row before
            self._write(np.zeros(1, np.int64))

    def _write(self, begins: np.ndarray) -> None:
        """The rows that begin there, the last one filled up when the stream ends in it."""
        ends = np.minimum(begins + self._context + 1, len(self._left))
        firsts, lasts = np.searchsorted(self._starts, [begins + 1, ends])
        for begin, end, first, last in zip(begins, ends, firsts, lasts):
            tokens = self._left[begin:end]
            if first == last:
                lengths = np.array([end - begin], np.uint32)
            else:  # a document without tokens begins where the next one does: unique drops it
                edges = np.concatenate([[begin], np.unique(self._starts[first:last]), [end]])
                lengths = np.diff(edges).astype(np.uint32)
            self._writer.write(encode_row(tokens, lengths, self._context + 1, self._pad, tokens.dtype))
            self.scored += int(end - begin) - len(lengths)
        self.rows += len(begins)


def encode_row(tokens: np.ndarray, lengths: np.ndarray, width: int, pad: int, dtype, mask=None, about=()) -> bytes:
    """A record of at most `width` tokens: filled up with padding, the bits of the loss mask where one is given, the
    lengths of the segments, and what else there is about each segment, in arrays like the lengths.
    """
    padded = np.pad(tokens.astype(dtype), (0, width - len(tokens)), constant_values=pad)
    bits = b"" if mask is None else np.packbits(np.pad(mask, (0, width - len(mask)))).tobytes()
    return padded.tobytes() + bits + b"".join(x.astype(np.uint32).tobytes() for x in (lengths, *about))


def rows_from(
    records: list[bytes], context: int, dtype: str, masked: bool = False, answers: int = 0
) -> dict[str, np.ndarray]:
    """Unpacks N records: tokens, positions, segments int32 [N,T] and loss_mask bool [N,T], as in `Trajectory`.

    Segments count from 1 in each row, padding is 0; a segment's first token is never scored. masked: the records hold
    a loss mask; otherwise every other token is scored. answers: S, where they hold ranks: prompt_id, rank int32 [N,S].
    """
    width = context + 1
    bits = width * np.dtype(dtype).itemsize
    split = bits + (-(-width // 8) if masked else 0)
    tokens = np.empty((len(records), width), np.int32)
    starts = np.zeros((len(records), width), bool)
    starts[:, 0] = True
    mask = np.ones((len(records), width), bool)
    filled = np.full(len(records), width)
    ranked = {name: np.zeros((len(records), answers), np.int32) for name in ("prompt_id", "rank") if answers}
    for row, record in enumerate(records):
        tokens[row] = np.frombuffer(record, dtype, width)
        if masked:
            mask[row] = np.unpackbits(np.frombuffer(record, np.uint8, split - bits, bits), count=width)
        if answers:
            lengths, *about = np.frombuffer(record, np.uint32, offset=split).reshape(3, -1)
            for values, of_row in zip(ranked.values(), about):
                values[row, : len(lengths)] = of_row
            record = record[: split + 4 * len(lengths)]
        if len(record) > split + 4:
            ends = np.cumsum(np.frombuffer(record, np.uint32, offset=split))
            starts[row, ends[:-1]] = True
            filled[row] = ends[-1]
        else:
            filled[row] = np.frombuffer(record, np.uint32, offset=split)[0]
    places = np.arange(width, dtype=np.int32)[None, :]
    valid = places < filled[:, None]
    begins = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    return {
        "tokens": tokens,
        "positions": np.where(valid, places - begins, 0).astype(np.int32),
        "segments": np.where(valid, np.cumsum(starts, axis=1), 0).astype(np.int32),
        "loss_mask": valid & ~starts & mask,
    } | ranked


# ------------------------------------------------------------------------------------------------------------ doors
def pack(
    documents: Iterable,
    tokenizer: Tokenizer,
    out_dir,
    *,
    context: int,
    name: str = "text",
    add_bos_eos: bool = True,
    workers: int = 0,
    at_least_a_row: bool = True,
    progress: bool = False,
    total_bytes: int | None = None,
) -> PackedSet:
    """Tokenizes and packs `documents` (anything with `.text`) into a new folder `out_dir`, or leaves nothing there.

    Args:
      context: tokens that a row scores; a row stores one more.
      add_bos_eos: False packs one stream, a single segment a row, whose documents see each other.
      workers: processes that encode; 0 takes all cores.
      at_least_a_row: refuse documents that do not fill one row.
      total_bytes: of the documents, for the progress bar.

    Raises `UserError` when there is too little text, when the disk is full, or when `out_dir` exists.
    """
    if context < 1:
        raise UserError(f"context must be at least 1, got {context}")
    if (out_dir := Path(out_dir)).exists():
        raise UserError(f"{out_dir} exists already; packing writes a new folder")
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    row_bytes = (context + 1) * np.dtype(dtype).itemsize
    with building(out_dir) as folder, tempfile.TemporaryDirectory() as saved:
        tokenizer.save(saved)
        # Some rows share a chunk, which is read as a whole: single rows would pay 60 bytes each.
        writer = ShardWriter(folder, "rows", f"group_size:{max(1, 8192 // row_bytes)},uncompressed")
        rows = _Rows(writer, context, tokenizer.pad, dtype, one_segment=not add_bos_eos)
        quiet = None if progress else True  # None: where someone is looking
        bar = tqdm.tqdm(total=total_bytes, desc=f"pack {name}", unit="B", unit_scale=True, disable=quiet)
        with bar:
            make = functools.partial(_encoder, saved, add_bos_eos, dtype)
            for _, encoded in ordered_map(make, _batches(documents, tokenizer), workers or cores(), here=_HERE):
                rows.add(encoded)
                bar.update(encoded.bytes)
        if rows.tokens < 2:
            raise UserError(f"{name}: there is no text to pack")
        if at_least_a_row and rows.tokens <= context:
            raise UserError(
                f"{name}: a context of {context} is longer than all of the text, {rows.tokens} tokens; "
                f"the longest possible is {rows.tokens - 1} (data.context)"
            )
        rows.finish()
        about = {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "context": context,
            "dtype": dtype,
            "add_bos_eos": add_bos_eos,
            "tokenizer_hash": tokenizer.hash,
            "rows": rows.rows,
            "tokens": rows.tokens,
            "scored": rows.scored,
            "bytes": rows.bytes,
            "documents": rows.documents,
            "fill": (rows.tokens + rows.rows - 1) / (rows.rows * (context + 1)),
        }
        storage.write_json(folder / "manifest.json", {**about, "files": writer.close()})
    return open_packed(out_dir)


def read_manifest(directory) -> dict:
    """The manifest of a folder that `pack` wrote, or `UserError`."""
    path = storage.path(directory) / "manifest.json"
    if not path.exists():
        raise UserError(f"{directory} holds no packed rows: it has no manifest.json")
    manifest = storage.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version") if isinstance(manifest, dict) else None
        raise UserError(f"{path} has schema_version {found}, this jaxlm reads {SCHEMA_VERSION}")
    return manifest


def open_packed(directory, weight: float = 1.0) -> PackedSet:
    """The packed set in a folder, after checking its files against the manifest."""
    manifest = read_manifest(directory)
    Reader(directory).close()
    names = {f.name for f in dataclasses.fields(PackedSet)} - {"directory", "weight"}
    return PackedSet(directory=str(directory), weight=weight, **{k: v for k, v in manifest.items() if k in names})


class Reader:
    """Random access to the rows of a packed folder; `UserError` when its files are not those of the manifest."""

    def __init__(self, directory):
        manifest = read_manifest(directory)
        self._shards = Shards(directory, manifest["files"])
        if len(self._shards) != manifest["rows"]:
            raise UserError(f"{directory} holds {len(self._shards)} rows, its manifest says {manifest['rows']}")
        self._format = {"dtype": manifest["dtype"]} | {k: manifest[k] for k in ("masked", "answers") if k in manifest}
        self._context = manifest["context"]

    def read(self, indices) -> dict[str, np.ndarray]:
        """The rows at these indices, as `rows_from` gives them."""
        return rows_from(self._shards.read(indices), self._context, **self._format)

    def close(self) -> None:
        self._shards.close()
