"""What was answered once and cannot be asked again with the same result: tools, judges, functions of unknown ways.

A journal is one append-only file of JSON lines, each {"step", "key", "value"}. A step that was interrupted is done
again, and everything that it had asked is answered from the journal. Threads may share one.
"""

import collections
import json
import threading
from collections.abc import Callable, Mapping, Sequence

from absl import logging

from jaxlm import storage
from jaxlm.data.conversation import Conversation
from jaxlm.feedback.records import conversation_hash
from jaxlm.feedback.scoring import Reward, scores
from jaxlm.tools import Tool, ToolFailure, call

FILE = "journal.jsonl"


class Journal:
    """Of the workdir `root`, from step `first` on; without one, and on object storage, where files cannot be appended
    to, in memory. Of several processes one keeps it."""

    def __init__(self, root, first: int = 0, name: str = FILE):
        self._local, self._lock = root is not None and storage.is_local(root), threading.Lock()
        self._file = storage.path(root) / name if self._local else None
        self._keys: dict[tuple, threading.Lock] = collections.defaultdict(threading.Lock)
        self._known: dict[tuple[int, str], object] = {}
        if self._local and self._file.exists():
            self._read(first)

    def _read(self, first: int) -> None:
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            logging.warning("%s ended in a torn line, which was cut off", self._file)
            storage.write_bytes(self._file, whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                step, key, value = record["step"], record["key"], record["value"]
            except (ValueError, KeyError, TypeError):
                logging.warning(
                    "%s: line %d is damaged and left out: what it answered is asked anew", self._file, number
                )
                continue
            if step >= first:
                self._known[step, key] = value

    def get(self, step: int, key: str, make: Callable[[], object]):
        """The value of `key` at a step: as it was, or else `make()`, which runs once whoever asks at the same time.
        None from `make` is no answer, and is not kept."""
        with self._lock:
            one = self._keys[step, key]
        with one:
            if (step, key) not in self._known:
                value = make()
                if value is None:
                    return None
                self.put(step, key, value)
            return self._known[step, key]

    def has(self, step: int, key: str) -> bool:
        return (step, key) in self._known

    def put(self, step: int, key: str, value) -> None:
        """value: plain JSON."""
        with self._lock:
            if self._local:
                storage.append_jsonl(self._file, {"step": step, "key": key, "value": value})
            self._known[step, key] = value

    def forget(self, before: int) -> None:
        """Drops what earlier steps asked from memory; the file keeps it."""
        with self._lock:
            self._known = {k: v for k, v in self._known.items() if k[0] >= before}
            self._keys.clear()


def tools(journal: Journal, step: int, found: Mapping[str, Tool]) -> dict[str, Tool]:
    """The same tools, but a call's result is that of the first call with these words in this step."""

    def journaled(tool: Tool) -> Tool:
        def run(text: str) -> str:
            key = f"tool {tool.name} {storage.sha256_text(text)}"
            said, good = journal.get(step, key, lambda: list(call({tool.name: tool}, tool.name, text)))
            if not good:
                raise ToolFailure(said)
            return said

        return Tool(tool.name, tool.description, run)

    return {name: journaled(tool) for name, tool in found.items()}


def question(judge: str, asked: Conversation) -> str:
    """The key of a judge's answer. judge: what tells it from all others, such as a checkpoint's hash."""
    return f"judge {judge} {conversation_hash(asked)}"


def reward(journal: Journal, step: Callable[[], int], name: str, inner: Reward, address: str) -> Reward:
    """The same reward function, but a sample's value is the first that it was given.

    A sample is known by its metadata's `address` and the ids of its reply; only those that have no value yet are
    handed on, all at once.
    """

    def asked(prompts: Sequence, completions: Sequence, metadata: Sequence[dict]) -> list[float | None]:
        said = [storage.sha256_text(repr(c.completion.ids))[:16] for c in completions]
        keys = [f"reward {name} {m[address]} {ids}" for m, ids in zip(metadata, said, strict=True)]
        new = [i for i, key in enumerate(keys) if not journal.has(step(), key)]
        if new:
            given = scores(inner, *([x[i] for i in new] for x in (prompts, completions, metadata)), None, name)
            for i, value in zip(new, given, strict=True):
                journal.put(step(), keys[i], value)
        return [journal.get(step(), key, lambda: None) for key in keys]

    asked.__name__ = name
    return asked
