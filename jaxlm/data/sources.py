"""Where text comes from: files, the running Python itself, a made-up world, a task, or Hugging Face `datasets`.

A source is a config node; `documents(source)` streams it in a fixed order with bounded memory (one document at a time;
a plain text file is one document, whatever its size), and `fingerprint(source)` hashes what it would give.
"""

import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterator
from typing import Literal

from etils import epath

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import embedded, readers
from jaxlm.data.readers import Rejects
from jaxlm.data.tasks import addition, chains, walks
from jaxlm.data.tasks.addition import Addition
from jaxlm.data.tasks.chains import Chains
from jaxlm.data.tasks.walks import Walks
from jaxlm.data.world import corpus
from jaxlm.data.world.corpus import World


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    text: str
    source: str  # the source's name
    id: str  # unique within the source: path, path:line, path:row, or a name
    url: str | None = None


@dataclasses.dataclass(frozen=True)
class Files:
    """Files of text: one file, a folder (searched recursively for known endings) or a glob (`**` goes into folders).

    Endings: .txt .md .rst .html (one document a file, byte for byte), .jsonl (one a line), .parquet (one a row); the
    first two kinds also as .gz and .zst. Anything else, named directly or by a glob, is read as one plain text.
    """

    path: str
    name: str = "files"
    weight: float = 1.0  # of this source among the others, when batches are mixed
    text_field: str = "text"
    url_field: str = "url"
    max_bad_fraction: float = 0.01  # of texts with bad UTF-8, broken JSON or no text field, before it is an error


@dataclasses.dataclass(frozen=True)
class EmbeddedPython:
    """The running interpreter's language reference, docstrings and library source: real text on every machine."""

    name: str = "python"
    weight: float = 1.0
    parts: tuple[Literal["topics", "docstrings", "library"], ...] = ("topics", "docstrings", "library")
    max_bytes: int | None = None  # of UTF-8 text in all; unset takes everything (about 10 MB)


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A dataset of the Hugging Face hub, or a local folder of one, through `datasets` (the `hf` extra)."""

    dataset: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None  # pin it: the fingerprint sees a moved branch only when `datasets` does
    name: str = "hf"
    weight: float = 1.0
    text_field: str = "text"
    url_field: str = "url"
    max_bad_fraction: float = 0.01


Source = Files | EmbeddedPython | HuggingFace | World | Walks | Addition | Chains
TASKS = {Walks: walks, Addition: addition, Chains: chains}
MADE = (EmbeddedPython, World, *TASKS)  # here, so that no text of theirs is ever refused


# ----------------------------------------------------------------------------------------------------------- files
def _nearest_existing(path: str) -> str:
    while path and not os.path.exists(path):
        path = os.path.dirname(path)
    return path or os.curdir


def _walk(folder: epath.Path, above: tuple[str, ...] = ()) -> Iterator[epath.Path]:
    """Every file below a folder; a link to a folder that it lies in, which would have no end, is not followed."""
    here = os.path.realpath(folder)
    if here in above:
        return
    for entry in sorted(folder.iterdir(), key=lambda p: p.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, (*above, here))
        else:
            yield entry


def _glob(pattern: str, base: str) -> list[epath.Path]:
    if "://" not in pattern:
        return [storage.path(p) for p in glob.glob(pattern, recursive=True)]
    if "**" in pattern:
        raise UserError(f"a glob on object storage cannot hold **: name the folder instead of {pattern}")
    return list(storage.path(base).glob(pattern[len(base) + 1 :]))


def files_of(source: Files) -> list[tuple[str, epath.Path]]:
    """(id, path) of every file, sorted by id; `UserError` when there is none, or where a name is not UTF-8."""
    found = _found(source)
    for name, path in found:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"the name of the file {os.fspath(path)!r} is not UTF-8: rename it") from None
    return found


def content_hash(path: epath.Path) -> str:
    """Hex SHA-256 of a file; `UserError` for one that cannot be read, such as a link to nothing."""
    try:
        return storage.sha256_file(path)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e


def _found(source: Files) -> list[tuple[str, epath.Path]]:
    where = os.path.expanduser(source.path)
    root = storage.path(where)
    if not where.strip():
        raise UserError("the path of a text source is empty: name a file, a folder or a glob")
    if root.is_dir():
        found = list(_walk(root))
        known = [p for p in found if p.name.lower().endswith(readers.KNOWN_ENDINGS)]
        if not known:
            endings = sorted({os.path.splitext(p.name)[1] or p.name for p in found})[:6]
            have = f"; it holds {len(found)} files ({', '.join(endings)})" if found else "; it is empty"
            raise UserError(
                f"no text file in the folder {where}{have}. Known endings: {' '.join(readers.TEXT_ENDINGS)} .jsonl "
                ".parquet, also .gz and .zst; a glob takes any file as plain text"
            )
        return sorted((os.path.relpath(p, root).replace(os.sep, "/"), p) for p in known)
    if root.exists():
        return [(root.name, root)]
    if glob.has_magic(where):
        parts = where.split("/")
        base = "/".join(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
        base = base or ("/" if where.startswith("/") else ".")
        found = [p for p in _glob(where, base) if not p.is_dir()]
        if not found:
            raise UserError(f"no file matches {where}; nearest that exists: {_nearest_existing(base)}")
        return sorted((os.path.relpath(p, base).replace(os.sep, "/"), p) for p in found)
    nearest = _nearest_existing(where) if "://" not in where else ""
    raise UserError(f"no such file or folder: {where}" + (f"; nearest that exists: {nearest}" if nearest else ""))


def _file_documents(source: Files, rejects: Rejects) -> Iterator[Document]:
    files = files_of(source)
    given = 0
    for name, path in files:
        for item in readers.read(path, rejects, source.text_field, source.url_field):
            given += 1
            yield Document(item.text, source.name, name + item.where, item.url)
    rejects.judge()
    if not given:
        if len(files) == 1:
            raise UserError(f"{files[0][1]} is empty: there is no text in it")
        raise UserError(f"{source.path}: no text in any of its {len(files)} files")


# ------------------------------------------------------------------------------------------------------ no files
def _python_documents(source: EmbeddedPython, rejects: Rejects) -> Iterator[Document]:
    given = 0
    for name, text in embedded.texts(source.parts, source.max_bytes):
        given += 1
        rejects.seen += 1
        yield Document(text, source.name, name)
    if not given:
        raise UserError(
            f"this Python ({embedded.library_root()}) has no text for parts={source.parts} within "
            f"max_bytes={source.max_bytes}: raise the bound, take all parts, or name a file or folder"
        )


def _made_documents(source: World | Walks | Addition | Chains, rejects: Rejects) -> Iterator[Document]:
    for name, text in TASKS.get(type(source), corpus).texts(source):
        rejects.seen += 1
        yield Document(text, source.name, name)


# ---------------------------------------------------------------------------------------------------- Hugging Face
def _datasets():
    try:
        import datasets
    except ImportError:
        raise UserError("a HuggingFace source needs the datasets package: pip install datasets") from None
    return datasets


def _hf_call(source: HuggingFace, function: str, **arguments):
    try:
        return getattr(_datasets(), function)(source.dataset, source.subset, revision=source.revision, **arguments)
    except UserError:
        raise
    except Exception as e:  # the hub's client raises dozens of kinds
        subset = f" ({source.subset})" if source.subset else ""
        raise UserError(f"cannot load the dataset {source.dataset}{subset}, split {source.split}: {e}") from e


def _hf_documents(source: HuggingFace, rejects: Rejects) -> Iterator[Document]:
    rows = _hf_call(source, "load_dataset", split=source.split, streaming=True)
    for number, row in enumerate(rows):
        where = f"{source.dataset} {source.split} row {number}"
        text = row.get(source.text_field)
        if not isinstance(text, str):
            rejects.add(f"{where}: no string field {source.text_field!r}; fields there: {', '.join(row)}")
            continue
        if not text.strip():
            rejects.empty += 1
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            rejects.add(f"{where}: not valid UTF-8 (a lone surrogate)")
            continue
        rejects.seen += 1
        url = row.get(source.url_field)
        yield Document(text, source.name, f"{source.split}:{number}", url if isinstance(url, str) else None)
    rejects.judge()
    if rejects.seen == rejects.rejected:
        raise UserError(f"{source.dataset} {source.split}: there is no text in it")


# ------------------------------------------------------------------------------------------------------- the doors
def documents(source: Source, rejects: Rejects | None = None) -> Iterator[Document]:
    """Streams the documents of a source, in the same order every time.

    Args:
      source: a source node.
      rejects: pass `rejects_for(source)` to learn afterwards how many texts were given, empty and refused.

    Raises `UserError` with file and line: for a missing path, binary data, a damaged archive, a missing column, no
    text at all, and when more than `max_bad_fraction` of the texts are refused (judged at the end, and after 1,000
    texts also on the way; the texts below the rate are left out and counted).
    """
    rejects = rejects_for(source) if rejects is None else rejects
    documents_of = {
        Files: _file_documents,
        EmbeddedPython: _python_documents,
        HuggingFace: _hf_documents,
        **dict.fromkeys((World, *TASKS), _made_documents),
    }
    yield from documents_of[type(source)](source, rejects)


def rejects_for(source: Source) -> Rejects:
    """A fresh counter for `documents`."""
    return Rejects(0.0 if isinstance(source, MADE) else source.max_bad_fraction)


def fingerprint(source: Source) -> str:
    """Hex SHA-256 of what `documents(source)` reads and of the fields that decide how; not of name and weight.

    Reads every file once (about 1 GB/s). For Hugging Face it is what `datasets` itself caches by, which follows the
    data files of a local folder, and the revision of a hub's dataset.
    """
    if isinstance(source, EmbeddedPython):
        return embedded.fingerprint(source.parts, source.max_bytes)
    if isinstance(source, World):
        return corpus.fingerprint(source)
    fields = {k: v for k, v in dataclasses.asdict(source).items() if k not in ("name", "weight", "path")}
    digest = hashlib.sha256(repr(sorted(fields.items())).encode())
    if type(source) in TASKS:
        digest.update(f"{type(source).__name__} {TASKS[type(source)].VERSION}".encode())
    elif isinstance(source, Files):
        for name, path in files_of(source):
            digest.update(f"{name}\0{content_hash(path)}\0".encode())
    else:
        builder = _hf_call(source, "load_dataset_builder")
        digest.update(f"{builder.hash}\0{builder.config_id}\0{builder.info.version}".encode())
    return digest.hexdigest()
