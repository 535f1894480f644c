"""Prompts with their answers from a file: JSON lines or Parquet, such as GSM8K's problems."""

import dataclasses
import functools
import hashlib
import os
from typing import Literal

from jaxlm import storage
from jaxlm.config import UserError
from jaxlm.data import readers, sources
from jaxlm.data.conversation import Conversation, Message
from jaxlm.data.messages import from_messages
from jaxlm.data.tasks.prompt import Prompt, Split
from jaxlm.data.tokenizer import utf8
from jaxlm.data.world.draws import is_heldout


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """One problem a line: {"prompt": text or a list of messages, "answer": text or number}; the rest of the line is
    metadata. GSM8K: prompt_field "question", verifier "gsm8k". The verifier "program": "answer" is what it prints, or a
    list of [source that comes before it, what it then prints]. Each line has an answer, or none has: then they can be
    asked all the same, and get no verdict.

    A prompt that is text is a user's message; `as_text`: one to go on with. A share of the lines, by what they ask, is
    held out.
    """

    path: str
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    verifier: Literal["exact", "text", "numeric", "gsm8k", "program"] = "exact"
    system: str | None = None
    as_text: bool = False
    heldout: float = 0.05


def _conversation(cfg: PromptFile, asked) -> str | Conversation:
    if isinstance(asked, list):
        made = from_messages(asked)
        if not made.messages or made.messages[-1].role == "assistant":
            raise ValueError("its last message must be one to answer")
        return made
    if not isinstance(asked, str) or not asked.strip():
        raise ValueError(f"field {cfg.prompt_field!r} must be a text or a list of messages")
    if cfg.as_text:
        return asked
    system = () if cfg.system is None else (Message("system", cfg.system),)
    return Conversation((*system, Message("user", asked)))


def _lines(cfg: PromptFile) -> tuple[dict[str, list[Prompt]], str, str | None]:
    """({split: prompts}, hash of the files, where the first line stands if none has an answer)"""
    if not 0 < cfg.heldout < 1:
        raise UserError(f"PromptFile: heldout must be between 0 and 1, got {cfg.heldout}")
    answered, unanswered = None, None
    out: dict[str, list[Prompt]] = {"train": [], "heldout": []}
    digest = hashlib.sha256(repr(dataclasses.astuple(cfg)[1:]).encode())
    for name, path in sources.files_of(sources.Files(cfg.path)):
        digest.update(f"{name}\0{sources.content_hash(path)}\0".encode())
        for where, record in readers.records(path):
            try:
                if not isinstance(record, dict):
                    raise record if isinstance(record, ValueError) else ValueError("it is no JSON object")
                asked = _conversation(cfg, record.get(cfg.prompt_field))
                for text in [asked] if isinstance(asked, str) else (p.text for m in asked.messages for p in m.parts):
                    utf8(text)
            except (ValueError, UserError) as e:
                raise UserError(f"{path} {where}: {e}") from e
            split = "heldout" if is_heldout(repr(record[cfg.prompt_field]), cfg.heldout) else "train"
            about = {k: v for k, v in record.items() if k != cfg.prompt_field}
            metadata = about | {"answer": record.get(cfg.answer_field)}
            has = metadata["answer"] is not None
            if answered is None:
                answered, unanswered = has, None if has else f"{path} {where}"
            elif has != answered:
                here, before = ("has a", "lack it") if has else ("has no", "have it")
                differs = f"{here} field {cfg.answer_field!r}, and the lines before it {before}"
                raise UserError(f"{path} {where} {differs}: give each line an answer, or none")
            out[split].append(Prompt(asked, metadata, f"{name}:{where.split()[1]}"))
    for split, prompts in out.items():
        if not prompts:
            raise UserError(f"{cfg.path}: no {split} prompts at heldout={cfg.heldout}; it needs more lines")
    return out, digest.hexdigest(), unanswered


@functools.lru_cache(maxsize=4)
def _read(cfg: PromptFile, stamps: tuple) -> tuple[dict[str, list[Prompt]], str, str | None]:
    return _lines(cfg)


def _stamps(cfg: PromptFile) -> tuple:
    """What changes when the files do; unknown on object storage, where they are read once."""
    files = [path for _, path in sources.files_of(sources.Files(cfg.path))]
    return tuple((str(p), os.stat(p).st_mtime_ns, os.stat(p).st_size) if storage.is_local(p) else str(p) for p in files)


def read(cfg: PromptFile) -> tuple[dict[str, list[Prompt]], str, str | None]:
    return _read(cfg, _stamps(cfg))


# ------------------------------------------------------------------------------------------------------- as a task
def size(cfg: PromptFile, split: Split) -> int:
    return len(read(cfg)[0][split])


def prompt(cfg: PromptFile, split: Split, index: int, tools: tuple[str, ...] = ()) -> Prompt:
    return read(cfg)[0][split][index]
