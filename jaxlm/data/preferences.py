"""Preferences as training data: the K answers to a prompt, each after the prompt again, packed together into one row.

The rule: a group (a prompt's answers with their ranks) is never spread over two rows; each row takes groups of one
source that fit together, by best fit as in `chat.py`. An answer is a segment: it sees its own prompt and nothing of its
neighbors, and its loss mask marks what a policy wrote. Ids that were sampled with this tokenizer are used as they are.
A prompt loses its oldest exchanges, the same for all answers, where the group is longer than a row; what does not fit
even so, and groups that rank nothing, are left out and counted. A row's last position is always padding: the model is
fed all but that one, and so sees the last token of every answer, where a reward is read.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tqdm

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import preference_sources
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.chat import fit
from jaxlm.data.conversation import prompt_ids, without_ids
from jaxlm.data.hf_tokenizer import HFTokenizer
from jaxlm.data.packing import SCHEMA_VERSION, PackedSet, encode_row, open_packed
from jaxlm.data.preference_sources import PreferenceSource
from jaxlm.data.prepare import Prepared, cache_folder, check_sources, stage_key
from jaxlm.data.shards import ShardWriter, building
from jaxlm.data.tokenizer import Bytes, Saved, Tokenizer
from jaxlm.feedback.preferences import Encoded, Kept, Preference, encode


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Rankings to learn from, by a reward model or by a policy itself.

    A part of the prompts validates, chosen by their hash: a prompt's answers are never on both sides, and stay on
    theirs when there are more.
    """

    sources: tuple[PreferenceSource, ...] = ()
    valid_fraction: float = 0.1
    tokenizer: Bytes | HFTokenizer | Saved | None = None  # unset: the parent's
    context: int = 512  # tokens of a row: all answers to a prompt, each with the prompt, fit into one
    answers: int = 16  # that a row holds at most
    cache: str | None = None  # folder of packed rows; unset takes $JAXLM_CACHE or ~/.cache/jaxlm


@dataclasses.dataclass(frozen=True)
class Group:
    """One prompt's answers: ids with the prompt's in front, and which of them a policy is scored on."""

    tokens: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]
    ranks: tuple[int, ...]


def _group(encoded: Encoded) -> Group:
    prompt = encoded.prompt
    tokens = tuple(np.array([*prompt, *ids], np.int64) for ids in encoded.answers)
    masks = tuple(np.array([*itertools.repeat(False, len(prompt)), *t], bool) for t in encoded.trained)
    return Group(tokens, masks, encoded.ranks)


def groups(
    found: Iterable[Preference], tokenizer: Tokenizer, context: int, answers: int, counts: Kept | None = None
) -> Iterator[Group]:
    """Each preference that ranks something and fits into a row, in order; the rest is counted."""
    counts = Kept() if counts is None else counts
    for p in found:
        counts.seen += 1
        if not p.pairs:
            counts.left_out["all tied"] += 1
            continue
        if len(p.answers) > answers:
            counts.left_out[f"more than {answers} answers"] += 1
            continue
        encoded = encode(p, tokenizer)
        said = sum(map(len, encoded.answers))
        if len(encoded.prompt) * len(p.answers) + said > context:
            if isinstance(p.prompt, str):
                counts.left_out["too long"] += 1
                continue
            try:
                room = (context - said) // len(p.answers)
                encoded = encoded._replace(prompt=prompt_ids(without_ids(p.prompt), tokenizer, room))
            except UserError:
                counts.left_out["too long"] += 1
                continue
        counts.kept += 1
        yield _group(encoded)


def pack_groups(
    found: Iterable[Preference], tokenizer: Tokenizer, out_dir, *, context: int, answers: int, name: str = "preferences"
) -> tuple[PackedSet, Kept]:
    """Encodes and packs preferences into a new folder `out_dir`, or leaves nothing there.

    context, answers: tokens and answers that a row holds at most. Raises `UserError` when nothing is left to compare.
    """
    width, counts = context + 1, Kept()
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    shortest = -(-width // (answers + 1))  # as if no answer were shorter, so that no row has more than its number
    about = dict.fromkeys(("rows", "tokens", "scored", "bytes", "documents"), 0)
    with building(out_dir) as folder:
        row_bytes = width * np.dtype(dtype).itemsize
        writer = ShardWriter(folder, "rows", f"group_size:{max(1, 8192 // row_bytes)},uncompressed")
        waiting: dict[int, Group] = {}
        token_bytes = tokenizer.token_bytes

        def costs() -> Iterator[int]:
            for group in groups(found, tokenizer, context, answers, counts):
                cost = sum(max(len(t), shortest) for t in group.tokens)
                if cost > context:  # short answers, but many
                    counts.kept -= 1
                    counts.left_out["too long"] += 1
                    continue
                waiting[about["documents"]] = group
                about["documents"] += 1
                yield cost

        for members in fit(costs(), context):
            row = [waiting.pop(i) for i in members]
            tokens, mask = (np.concatenate([x for g in row for x in getattr(g, f)]) for f in ("tokens", "masks"))
            sizes, ids, ranks = (
                np.array(list(values), np.uint32)
                for values in (
                    (len(t) for g in row for t in g.tokens),
                    (n for n, g in enumerate(row, 1) for _ in g.tokens),
                    (r for g in row for r in g.ranks),
                )
            )
            writer.write(encode_row(tokens, sizes, width, tokenizer.pad, dtype, mask, (ids, ranks)))
            about["rows"] += 1
            about["tokens"] += len(tokens)
            about["scored"] += int(mask.sum())
            about["bytes"] += int(token_bytes[tokens].sum())
        if not about["rows"]:
            raise UserError(f"{name}: there is nothing to compare: {counts}")
        about |= {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "context": context,
            "dtype": dtype,
            "masked": True,
            "answers": answers,
            "tokenizer_hash": tokenizer.hash,
            "fill": about["tokens"] / (about["rows"] * width),
            "kept": {"seen": counts.seen, "kept": counts.kept, "left_out": dict(counts.left_out)},
        }
        storage.write_json(Path(folder) / "manifest.json", {**about, "files": writer.close()})
    return open_packed(out_dir), counts


# ------------------------------------------------------------------------------------------------------------- door
def prepare_preferences(data: Preferences, progress: bool = True) -> Prepared:
    """Everything that training reads of `Preferences`. Raises `UserError` for whatever is wrong with them."""
    check_sources(data.sources)
    if not 0 < data.valid_fraction < 1:
        raise UserError(f"data.valid_fraction must be between 0 and 1, got {data.valid_fraction}")
    if data.context < 1 or data.answers < 2:
        raise UserError(f"data.context must be 1 or more, data.answers 2 or more, got {data.context}, {data.answers}")
    if data.tokenizer is None:
        raise UserError("data.tokenizer is unset and there is no parent to take it from: --set=parent=WORKDIR")
    tokenizer = tokenizers.train(data.tokenizer, (), 0)
    found = {s.name: preference_sources.read(s) for s in data.sources}
    corpus = stage_key("preferences", [[name, preference_sources.fingerprint(f)] for name, f in found.items()])
    key = stage_key("packed_preferences", corpus, data.valid_fraction, tokenizer.hash, data.context, data.answers)
    folder = cache_folder(data.cache, "packed_preferences", key)
    sets: dict[str, dict[str, PackedSet]] = {"train": {}, "valid": {}}
    reports: dict[str, dict] = {}
    for source in tqdm.tqdm(data.sources, desc="pack preferences", disable=None if progress else True):
        sides = preference_sources.split(source, found[source.name], data.valid_fraction)
        for side, chosen in zip(sets, sides, strict=True):
            directory = folder / side / source.name
            if not directory.is_dir():
                what = f"{source.name} ({'validation' if side == 'valid' else 'training'})"
                if not chosen:
                    prompts = f"all of the {len(found[source.name])} are on the other side"
                    raise UserError(f"{what}: there is no preference, {prompts}: more prompts, or data.valid_fraction")
                pack_groups(chosen, tokenizer, directory, context=data.context, answers=data.answers, name=what)
            sets[side][source.name] = open_packed(directory, source.weight)
            reports.setdefault(source.name, {})[side] = storage.read_json(directory / "manifest.json")["kept"]
    hashes = {"corpus": corpus, "tokenizer": tokenizer.hash, "packed": key}
    return Prepared(tokenizer, sets["train"], sets["valid"], hashes, {"sources": reports}, str(folder))
