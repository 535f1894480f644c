"""Conversations as training data: rendered once, packed whole into rows, kept by content hash.

The rule: a conversation is never spread over two rows. One that is longer than a row is cut between its turns (see
`conversation.py`), and each row takes conversations of one source that fit together: the next one goes into the
fullest of `OPEN` unfinished rows that has room for it. Conversations in a row do not see each other, and what is scored
is their loss mask. A record is that of `packing.py` with the mask's bits between tokens and lengths.
Nothing here imports jax: workers start fast.
"""

import dataclasses
import functools
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tqdm

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import chat_sources
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.chat_sources import ChatSource, conversations, rejects_for
from jaxlm.data.conversation import Conversation, Rendered, Role, render_each
from jaxlm.data.hf_tokenizer import HFTokenizer
from jaxlm.data.packing import SCHEMA_VERSION, PackedSet, encode_row, open_packed, pack
from jaxlm.data.parallel import cores, ordered_map
from jaxlm.data.prepare import HELDOUT, Prepared, cache_folder, check_sources, stage_key
from jaxlm.data.readers import Rejects
from jaxlm.data.shards import ShardWriter, building
from jaxlm.data.sources import Source, documents, fingerprint
from jaxlm.data.tokenizer import Bytes, Saved, Tokenizer, load
from jaxlm.data.world import talk
from jaxlm.data.world.talk import WorldConversations

OPEN = 64  # unfinished rows at a time
_BATCH = 256  # conversations handed to a worker at a time
_HERE = 8  # batches of a small set, rendered here before a worker would have started


@dataclasses.dataclass(frozen=True)
class Chat:
    """Conversations to fine-tune on.

    Those of a file validate by the hash of what they say, and the first one always does; a `WorldConversations`
    validates with the persons, problems and wordings of its held-out side. What is replayed does not validate.
    """

    sources: tuple[ChatSource, ...] = (WorldConversations(),)
    train_on: tuple[Role, ...] = ("assistant",)
    valid_fraction: float = 0.05
    tokenizer: Bytes | HFTokenizer | Saved | None = None  # unset: the parent's
    context: int = 256  # tokens that a row scores: no conversation is longer
    replay: tuple[Source, ...] = ()  # text as in pretraining, so that it is not forgotten; trained on whole, as it is
    workers: int = 0  # processes that render; 0 takes all cores. The result does not depend on it
    cache: str | None = None  # folder of packed rows; unset takes $JAXLM_CACHE or ~/.cache/jaxlm


# ------------------------------------------------------------------------------------------------------------ sides
def _digest(conversation: Conversation) -> str:
    said = [[m.role, [[p.kind, p.text] for p in m.parts]] for m in conversation.messages]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def _side(chat: Chat, source: ChatSource, valid: bool, rejects) -> Iterator[Conversation]:
    """The training or the validation conversations of a source."""
    if isinstance(source, WorldConversations):
        if valid:
            heldout = dataclasses.replace(source, count=max(1, round(source.count * chat.valid_fraction)))
            yield from talk.conversations(heldout, "heldout")
        else:
            yield from conversations(source, rejects)
        return
    bound, first = f"{int(chat.valid_fraction * 2**64):016x}", None
    for one in conversations(source, rejects):
        digest = _digest(one)
        first = first or digest
        if valid == (digest < bound or digest == first):
            yield one


# ------------------------------------------------------------------------------------------------------------- rows
def _batches(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _render(tokenizer: Tokenizer, limit: int, train_on: tuple[Role, ...], batch: list[Conversation]):
    """([(tokens, loss mask)], counts) of a batch."""
    counts = Rendered()
    fields = list(render_each(batch, tokenizer, limit, train_on, counts))
    return [(f["tokens"], f["loss_mask"]) for f in fields], counts


def _renderer(folder: str, limit: int, train_on: tuple[Role, ...]):
    return functools.partial(_render, load(folder), limit, train_on)


def fit(lengths: Iterable[int], width: int) -> Iterator[list[int]]:
    """Groups of indices whose lengths sum to at most `width`; each goes where it leaves the least room.

    Yields a group when it is full, or the fullest when more than `OPEN` are not. No length may exceed `width`.
    """
    groups: list[tuple[int, list[int]]] = []  # (room, indices)
    for index, length in enumerate(lengths):
        fitting = [g for g, (room, _) in enumerate(groups) if room >= length]
        if fitting:
            best = min(fitting, key=lambda g: groups[g][0])
            room, members = groups[best]
            groups[best] = (room - length, [*members, index])
        else:
            best = len(groups)
            groups.append((width - length, [index]))
        if groups[best][0] == 0:
            yield groups.pop(best)[1]
        elif len(groups) > OPEN:
            yield groups.pop(min(range(len(groups)), key=lambda g: groups[g][0]))[1]
    yield from (members for _, members in groups)


def _add(total: Rendered, one: Rendered) -> None:
    for field in dataclasses.fields(Rendered):
        setattr(total, field.name, getattr(total, field.name) + getattr(one, field.name))
    del total.examples[5:]


def pack_conversations(
    found: Iterable[Conversation],
    tokenizer: Tokenizer,
    out_dir,
    *,
    context: int,
    name: str = "conversations",
    train_on: tuple[Role, ...] = ("assistant",),
    workers: int = 0,
    progress: bool = False,
    rejects: Rejects | None = None,
) -> tuple[PackedSet, Rendered]:
    """Renders and packs conversations into a new folder `out_dir`, or leaves nothing there.

    Args as in `packing.pack`. rejects: what `found` was told to count its refusals in.
    Raises `UserError` when there is nothing to train on in any of them.
    """
    if context < 1:
        raise UserError(f"context must be at least 1, got {context}")
    width, total = context + 1, Rendered()
    rejects = Rejects(0.0) if rejects is None else rejects
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    with building(out_dir) as folder, tempfile.TemporaryDirectory() as saved:
        tokenizer.save(saved)
        waiting: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        about = dict.fromkeys(("rows", "tokens", "scored", "bytes", "documents"), 0)
        row_bytes = width * np.dtype(dtype).itemsize
        writer = ShardWriter(folder, "rows", f"group_size:{max(1, 8192 // row_bytes)},uncompressed")
        token_bytes = tokenizer.token_bytes

        def lengths(bar) -> Iterator[int]:
            make = functools.partial(_renderer, saved, width, train_on)
            for batch, (rendered, counts) in ordered_map(make, _batches(found, _BATCH), workers or cores(), _HERE):
                _add(total, counts)
                bar.update(len(batch))
                for fields in rendered:
                    waiting[about["documents"]] = fields
                    about["documents"] += 1
                    yield len(fields[0])

        with tqdm.tqdm(desc=f"pack {name}", unit=" conversations", disable=None if progress else True) as bar:
            for members in fit(lengths(bar), width):
                row = [waiting.pop(i) for i in members]
                tokens, mask = (np.concatenate(parts) for parts in zip(*row))
                sizes = np.array([len(t) for t, _ in row], np.uint32)
                mask[np.cumsum(sizes) - sizes] = False  # nothing stands before it that could tell it
                writer.write(encode_row(tokens, sizes, width, tokenizer.pad, dtype, mask))
                about["rows"] += 1
                about["tokens"] += len(tokens)
                about["scored"] += int(mask.sum())
                about["bytes"] += int(token_bytes[tokens].sum())
        if not about["scored"]:
            why = "too few for both sides" if not total.untrained else f"{total.untrained} have no turn of {train_on}"
            raise UserError(f"{name}: there is no conversation to train on: {(*total.examples, why)[0]}")
        about |= {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "context": context,
            "dtype": dtype,
            "masked": True,
            "tokenizer_hash": tokenizer.hash,
            "fill": about["tokens"] / (about["rows"] * width),
            "rendered": dataclasses.asdict(total),
            "rejected": {"texts": rejects.rejected, "empty": rejects.empty, "examples": rejects.examples},
        }
        storage.write_json(Path(folder) / "manifest.json", {**about, "files": writer.close()})
    return open_packed(out_dir), total


# ---------------------------------------------------------------------------------------------------------- reports
def _report(directory: Path) -> dict:
    """What a side of a source gave and what was left out of it; `rejected` as of a source of text."""
    about = storage.read_json(directory / "manifest.json")
    before = {"texts": 0, "empty": 0, "examples": []}  # of sets from before refusals were kept
    return about["rendered"] | {"rejected": about.get("rejected", before)}


def left_out(name: str, sides: dict[str, dict]) -> str | None:
    """One line on what is missing of a source, from its reports by side; None when nothing is."""
    refused = sides["train"]["rejected"]  # either side reads every line
    counts = {"lines refused": refused["texts"]}
    for what, field in (("cut", "cut"), ("too long", "too_long"), ("with nothing to train on", "untrained")):
        counts[what] = sum(side[field] for side in sides.values())
    if not any(counts.values()):
        return None
    given = sum(side["conversations"] for side in sides.values())
    examples = [*refused["examples"], *(e for side in sides.values() for e in side["examples"])]
    line = f"source {name}: {given:,} conversations; {', '.join(f'{n:,} {what}' for what, n in counts.items() if n)}"
    return line + (f"; the first: {examples[0]}" if examples else "")


# ------------------------------------------------------------------------------------------------------------- door
def prepare_chat(chat: Chat, progress: bool = True) -> Prepared:
    """Everything that training reads of a `Chat`. Raises `UserError` for whatever is wrong with it, or with a file."""
    check_sources((*chat.sources, *chat.replay))
    if not 0 < chat.valid_fraction < 1:
        raise UserError(f"data.valid_fraction must be between 0 and 1, got {chat.valid_fraction}")
    if chat.tokenizer is None:
        raise UserError("data.tokenizer is unset and there is no parent to take it from: --set=parent=WORKDIR")
    tokenizer = tokenizers.train(chat.tokenizer, (), 0)
    found = [[s.name, chat_sources.fingerprint(s)] for s in chat.sources]
    found += [["replay", s.name, fingerprint(s)] for s in chat.replay]
    corpus = stage_key("chat", found)
    key = stage_key("packed_chat", corpus, chat.valid_fraction, tokenizer.hash, chat.context, chat.train_on)
    folder = cache_folder(chat.cache, "packed_chat", key)
    sides: dict[str, dict[str, PackedSet]] = {"train": {}, "valid": {}}
    reports: dict[str, dict] = {}
    for source in chat.sources:
        for side, sets in sides.items():
            directory, valid = folder / side / source.name, side == "valid"
            if not directory.is_dir():
                rejects = rejects_for(source)
                pack_conversations(
                    _side(chat, source, valid, rejects),
                    tokenizer,
                    directory,
                    context=chat.context,
                    name=f"{source.name} ({'validation' if valid else 'training'})",
                    train_on=chat.train_on,
                    workers=chat.workers,
                    progress=progress,
                    rejects=rejects,
                )
            sets[source.name] = open_packed(directory, source.weight)
            reports.setdefault(source.name, {})[side] = _report(directory)
        if line := left_out(source.name, reports[source.name]):
            print(line, file=sys.stderr)
    for source in chat.replay:
        directory = folder / "replay" / source.name
        if not directory.is_dir():
            texts = (d for d in documents(source) if not d.id.startswith(HELDOUT))
            name = f"{source.name} (replay)"
            pack(texts, tokenizer, directory, context=chat.context, name=name, workers=chat.workers, progress=progress)
        sides["train"][source.name] = open_packed(directory, source.weight)
    hashes = {"corpus": corpus, "tokenizer": tokenizer.hash, "packed": key}
    return Prepared(tokenizer, sides["train"], sides["valid"], hashes, {"sources": reports}, str(folder))
