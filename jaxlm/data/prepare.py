"""From a data definition to packed rows, in three stages cached by content hash: curate, tokenizer, pack.

Each stage's folder is named by the hash of everything that decides its content, and is whole or absent: a stage that
was interrupted starts again, one that was done is found. In a run over several machines each prepares its own disk.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import tqdm

from jaxlm import config, storage
from jaxlm.config import UserError, nearest
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.curate import Curation, curate, curation_fingerprint
from jaxlm.data.hf_tokenizer import HFTokenizer
from jaxlm.data.packing import PackedSet, open_packed, pack
from jaxlm.data.shards import Shards, ShardWriter, building
from jaxlm.data.sources import Document, EmbeddedPython, Files, Source, documents, fingerprint, rejects_for
from jaxlm.data.tokenizer import Bytes, Chars, Saved, SentencePiece, Tokenizer
from jaxlm.data.world.corpus import World, size

SCHEMA_VERSION = 1  # of the curated folder; part of every stage's name
HELDOUT = "heldout/"  # ids that begin so validate under `ById`


@dataclasses.dataclass(frozen=True)
class ByDocument:
    """Whole documents validate, by the hash of their text: the same text always lands on the same side.

    The document with a source's smallest hash always validates; of a source with one document its last characters do.
    """

    valid_fraction: float = 0.05


@dataclasses.dataclass(frozen=True)
class ById:
    """Documents whose id begins with `heldout/` validate, all others train: those of a `World`, and of a folder of
    files those in its folder `heldout`. A source that has no such id is split as `ByDocument` does; of a `World` this
    is told, for it then trains on less than it has.
    """

    valid_fraction: float = 0.05  # where the hash decides


@dataclasses.dataclass(frozen=True)
class ByPosition:
    """The first characters of each source train, the last validate (nanoGPT's cut): one stream without bos and eos.

    Documents follow each other after a newline.
    """

    valid_fraction: float = 0.1


Split = ByDocument | ById | ByPosition


def marks_documents(split: Split) -> bool:
    """Whether each document stands between bos and eos, and so whether a prompt begins with bos."""
    return not isinstance(split, ByPosition)


@dataclasses.dataclass(frozen=True)
class Data:
    """What a model reads. `path` set replaces `sources` by these files.

    In a `World` equal texts can be what is measured, and problems are short: a step of curation leaves it as it is
    unless the step's `only` names it.
    """

    path: str | None = None
    sources: tuple[Source, ...] = (EmbeddedPython(),)
    curation: Curation | None = Curation()
    tokenizer: SentencePiece | Bytes | Chars | HFTokenizer | Saved | None = SentencePiece()  # unset: the parent's
    split: Split = ByDocument()
    context: int = 256  # tokens that a row scores
    seed: int = 0  # of the tokenizer's sample; the order of rows follows the experiment's own seed
    workers: int = 0  # processes that curate and tokenize; 0 takes all cores. The result does not depend on it
    cache: str | None = None  # folder of the stages' results; unset takes $JAXLM_CACHE or ~/.cache/jaxlm


@dataclasses.dataclass(frozen=True)
class Curated:
    """Curated text on disk, and how it came about."""

    directory: str
    hash: str
    sources: dict[str, dict]  # name -> counts of documents, characters and bytes, rejected texts, files
    report: dict | None  # of curation

    def documents(self, name: str) -> Iterator[Document]:
        """The documents of a source, in their order."""
        for record in Shards(self.directory, self.sources[name]["files"]):
            yield Document(source=name, **json.loads(record))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that training reads. `hashes` go into the run's lineage, `reports` say what each stage did."""

    tokenizer: Tokenizer
    train: dict[str, PackedSet]
    valid: dict[str, PackedSet]
    hashes: dict[str, str]
    reports: dict
    directory: str


def cache_root(cache: str | None) -> str:
    """The folder of all cached results: as given, or $JAXLM_CACHE, or ~/.cache/jaxlm."""
    return os.path.expanduser(cache or os.environ.get("JAXLM_CACHE") or "~/.cache/jaxlm")


def stage_key(*parts) -> str:
    """Hex SHA-256 of JSON-able parts: the name of a stage's result."""
    return storage.sha256_text(json.dumps([SCHEMA_VERSION, *parts], sort_keys=True))


def cache_folder(cache: str | None, stage: str, key: str) -> Path:
    """Where the result of a stage stands, or will."""
    return Path(cache_root(cache)) / stage / key[:24]


def _sources(data: Data) -> tuple:
    sources = (Files(data.path),) if data.path is not None else data.sources
    check_sources(sources)
    return sources


def check_sources(sources: tuple) -> None:
    """`UserError` for no source, a name that is taken or cannot be a folder's, or a weight that is not above 0."""
    if not sources:
        raise UserError("data.sources is empty: name a source, or a file or folder by data.path")
    names = [s.name for s in sources]
    for source in sources:
        if names.count(source.name) > 1:
            raise UserError(f"two sources are named {source.name!r}: give each its own name")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", source.name):
            raise UserError(f"source name {source.name!r}: letters, digits, dot, dash and underscore are allowed")
        if not 0 < source.weight < float("inf"):
            raise UserError(f"the weight of source {source.name} must be above 0, got {source.weight}")


def _curation(data: Data, sources: tuple) -> Curation | None:
    """The steps with their `only` filled in: a world is seen by those alone that name it.

    Raises `UserError` where `only` names no source: the step would see nothing, and nobody would be told.
    """
    known = [s.name for s in sources]
    for step in () if data.curation is None else data.curation.steps:
        if wrong := [name for name in step.only if name not in known]:
            raise UserError(
                f"data.curation: {type(step).__name__}(only=...) names the source {wrong[0]!r}, which is not there; "
                f"{nearest(wrong[0], known)}"
            )
    names = tuple(s.name for s in sources if not isinstance(s, World))
    if data.curation is None or len(names) == len(sources):
        return data.curation
    steps = (s if s.only else dataclasses.replace(s, only=names) for s in data.curation.steps)
    steps = tuple(s for s in steps if s.only)  # none: there are only worlds
    return Curation(steps) if steps else None


def _bar(progress: bool, **options):
    """A progress bar where someone is looking."""
    return tqdm.tqdm(unit_scale=True, disable=None if progress else True, **options)


# ---------------------------------------------------------------------------------------------------------- curated
def curated(data: Data, progress: bool = True) -> Curated:
    """Stage 1: the curated text of all sources together (a text that two sources share is kept once)."""
    sources = _sources(data)
    curation = _curation(data, sources)
    steps = None if curation is None else curation_fingerprint(curation)
    key = stage_key("curated", [[s.name, type(s).__name__, fingerprint(s)] for s in sources], steps)
    folder = cache_folder(data.cache, "curated", key)
    if not folder.is_dir():
        with building(folder) as temporary:
            _curate(sources, curation, data.workers, temporary, progress)
    manifest = storage.read_json(folder / "manifest.json")
    return Curated(str(folder), key, manifest["sources"], manifest["curation"])


def _curate(sources: tuple, curation: Curation | None, workers: int, folder: Path, progress: bool) -> None:
    rejects = {s.name: rejects_for(s) for s in sources}
    read = dict.fromkeys(rejects, 0)
    counts = {name: {"documents": 0, "characters": 0, "bytes": 0, "smallest_hash": None} for name in rejects}
    # Few documents share a chunk, so that reading one chunk holds little.
    writers = {name: ShardWriter(folder, name, "group_size:16,zstd") for name in rejects}
    with _bar(progress, desc="read and curate", unit="char") as bar:

        def everything():
            for source in sources:
                for document in documents(source, rejects[source.name]):
                    read[source.name] += 1
                    bar.update(len(document.text))
                    yield document

        stream, report = everything(), None
        if curation is not None:
            stream, report = curate(stream, curation, workers)
        for document in stream:
            record = {"text": document.text, "id": document.id, "url": document.url}
            writers[document.source].write(json.dumps(record, ensure_ascii=False).encode())
            count, text_hash = counts[document.source], _text_hash(document.text)
            count["documents"] += 1
            count["characters"] += len(document.text)
            count["bytes"] += len(document.text.encode())
            count["smallest_hash"] = min(text_hash, count["smallest_hash"] or text_hash)
    for name, count in counts.items():
        if not count["documents"]:
            why = max(report["steps"], key=lambda s: s["removed"])["step"] if report and report["steps"] else None
            removed = f"; most went in the step {why}" if why else ""
            raise UserError(f"source {name}: none of its {read[name]} documents is left after curation{removed}")
        refused = rejects[name]
        count["rejected"] = {"texts": refused.rejected, "empty": refused.empty, "examples": refused.examples}
        count["files"] = writers[name].close()
    storage.write_json(
        folder / "manifest.json", {"schema_version": SCHEMA_VERSION, "sources": counts, "curation": report}
    )


# ------------------------------------------------------------------------------------------------------------ split
def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check(split: Split) -> None:
    if not 0 < split.valid_fraction < 1:
        raise UserError(f"data.split.valid_fraction must be between 0 and 1, got {split.valid_fraction}")


def _side(found: Curated, split: Split, name: str, valid: bool) -> Iterator[Document]:
    """The training or the validation documents of a source."""
    source = found.sources[name]
    if isinstance(split, ByPosition) or source["documents"] == 1:
        yield from _by_position(found, split, name, valid)
        return
    # Looking for an id reads the text once more, which packing makes hardly longer.
    if isinstance(split, ById) and any(d.id.startswith(HELDOUT) for d in found.documents(name)):
        yield from (d for d in found.documents(name) if d.id.startswith(HELDOUT) == valid)
        return
    bound = f"{int(split.valid_fraction * 2**64):016x}"
    for document in found.documents(name):
        text_hash = _text_hash(document.text)
        if valid == (text_hash < bound or text_hash == source["smallest_hash"]):
            yield document


def _by_position(found: Curated, split, name: str, valid: bool) -> Iterator[Document]:
    source = found.sources[name]
    cut = int((source["characters"] + source["documents"] - 1) * (1 - split.valid_fraction))
    place = 0
    for document in found.documents(name):
        text = document.text if place == 0 else "\n" + document.text
        here = min(max(cut - place, 0), len(text))
        if part := text[here:] if valid else text[:here]:
            yield dataclasses.replace(document, text=part)
        place += len(text)


# -------------------------------------------------------------------------------------------------------- tokenizer
def tokenizer_for(data: Data, progress: bool = True) -> Tokenizer:
    """Stage 2: the tokenizer, trained on the training side alone.

    Except for `Chars`, whose alphabet is that of the whole corpus: nothing is learned there, and a letter that only the
    validation text has could not be scored.
    """
    if isinstance(data.tokenizer, Bytes | HFTokenizer | Saved):
        return tokenizers.train(data.tokenizer, (), data.seed)
    _check(data.split)
    found = curated(data, progress)
    whole = isinstance(data.tokenizer, Chars)
    about = [] if whole else [config.to_dict(data.split), data.seed, sentencepiece.__version__]
    folder = cache_folder(
        data.cache, "tokenizer", stage_key("tokenizer", found.hash, config.to_dict(data.tokenizer), *about)
    )
    if not folder.is_dir():
        sides = (False, True) if whole else (False,)
        texts = (d.text for name in found.sources for valid in sides for d in _side(found, data.split, name, valid))
        total = sum(s["characters"] for s in found.sources.values())
        with building(folder) as temporary, _bar(progress, desc="train tokenizer", unit="char", total=total) as bar:

            def counted():
                for text in texts:
                    bar.update(len(text))
                    yield text

            tokenizers.train(data.tokenizer, counted(), data.seed).save(temporary)
    return tokenizers.load(folder)


# ----------------------------------------------------------------------------------------------------------- packed
def packed(data: Data, progress: bool = True) -> tuple[dict[str, PackedSet], dict[str, PackedSet]]:
    """Stage 3: (training sets, validation sets), one of each for every source."""
    return _packed(data, curated(data, progress), tokenizer_for(data, progress), progress)[:2]


def _packed(data: Data, found: Curated, tokenizer: Tokenizer, progress: bool):
    _check(data.split)
    key = stage_key("packed", found.hash, config.to_dict(data.split), tokenizer.hash, data.context)
    folder = cache_folder(data.cache, "packed", key)
    out = {"train": {}, "valid": {}}
    for source, (side, sets) in itertools.product(_sources(data), out.items()):
        directory, share = folder / side / source.name, data.split.valid_fraction
        if not directory.is_dir():
            valid = side == "valid"
            pack(
                _side(found, data.split, source.name, valid),
                tokenizer,
                directory,
                context=data.context,
                name=f"{source.name} ({'validation' if valid else 'training'})",
                add_bos_eos=marks_documents(data.split),
                workers=data.workers,
                at_least_a_row=not valid,
                progress=progress,
                total_bytes=int(found.sources[source.name]["bytes"] * (share if valid else 1 - share)),
            )
        sets[source.name] = open_packed(directory, source.weight)
    return out["train"], out["valid"], key, folder


def _without_heldout(data: Data) -> Iterator[str]:
    """A line for each world that `ById` is to split and that has nothing to tell it by."""
    for source in _sources(data) if isinstance(data.split, ById) else ():
        if isinstance(source, World) and not size(source)[1]:
            yield (
                f"{source.name}: a World(validation=0) has no documents for data.split=ById to hold out; "
                f"{data.split.valid_fraction:.1%} of them validate by a hash of the text, and do not train"
            )


def prepare(data: Data, progress: bool = True) -> Prepared:
    """All three stages. Raises `UserError` for whatever is wrong with the definition, the text or the disk."""
    for line in _without_heldout(data):
        print(line, file=sys.stderr)
    found = curated(data, progress)
    tokenizer = tokenizer_for(data, progress)
    train, valid, key, folder = _packed(data, found, tokenizer, progress)
    reports = {"sources": found.sources, "curation": found.report}
    hashes = {"corpus": found.hash, "tokenizer": tokenizer.hash, "packed": key}
    return Prepared(tokenizer, train, valid, hashes, reports, str(folder))
