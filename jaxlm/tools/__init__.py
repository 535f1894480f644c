"""What a model may call while it generates: a name, a description, and a function from text to text.

`call` never raises: a tool that fails, or that does not exist, gives the model a result that says so, since a model can
only learn from what it is told. Results are bounded in length, because they become tokens of the conversation.
"""

import collections
import dataclasses
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxlm.config import UserError, nearest
from jaxlm.tools import search
from jaxlm.tools.calculator import CalculatorError, calculate
from jaxlm.tools.isolation import IsolationError, Limits
from jaxlm.tools.python import Result, isolation_mode, run_python
from jaxlm.tools.search import build_index

__all__ = [
    "CalculatorError",
    "Counters",
    "IsolationError",
    "Limits",
    "Tool",
    "ToolResult",
    "build_index",
    "by_name",
    "calculate",
    "calculator_tool",
    "call",
    "python_tool",
    "registry",
    "run_python",
    "search",
    "search_tool",
]

NAMES = ("calculator", "python", "search")
LONGEST_RESULT = 2000  # characters


@dataclasses.dataclass(frozen=True)
class Tool:
    """`run` takes the text between the call's tokens and returns the result's text; raising means failing."""

    name: str
    description: str
    run: Callable[[str], str]


class ToolResult(NamedTuple):
    text: str
    ok: bool


class Counters:
    """Calls, failures and seconds by tool, for the metrics of a run. Threads may share one."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])

    def add(self, name: str, ok: bool, seconds: float) -> None:
        with self._lock:
            count = self._counts[name]
            count[0] += 1
            count[1] += not ok
            count[2] += seconds

    def metrics(self, prefix: str = "tools") -> dict[str, float]:
        """`tools/<name>/calls`, `.../failures`, `.../seconds`, and the same three over all as `tools/calls`."""
        with self._lock:
            counts = {name: tuple(count) for name, count in sorted(self._counts.items())}
        kinds = ("calls", "failures", "seconds")
        every = {f"{prefix}/{name}/{kind}": v for name, count in counts.items() for kind, v in zip(kinds, count)}
        totals = [math.fsum(column) for column in zip(*counts.values())] or [0, 0, 0.0]
        return {f"{prefix}/{kind}": v for kind, v in zip(kinds, totals)} | every


def registry(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Tools by name. UserError for a name that is taken or is not a word."""
    found: dict[str, Tool] = {}
    for tool in tools:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", tool.name):
            raise UserError(f"tool name {tool.name!r}: small letters, digits and _ are needed, a letter first")
        if tool.name in found:
            raise UserError(f"two tools are called {tool.name!r}")
        found[tool.name] = tool
    return found


def call(
    tools: Mapping[str, Tool],
    name: str,
    text: str,
    counters: Counters | None = None,
    longest: int = LONGEST_RESULT,
) -> ToolResult:
    """Runs one tool on `text`. Whatever goes wrong becomes a result with `ok` False that begins with "error: "."""
    start = time.monotonic()
    tool = tools.get(name)
    if tool is None:
        result = ToolResult(f"error: there is no tool {name[:40]!r}; {nearest(name, tools)}", False)
    else:
        try:
            result = ToolResult(tool.run(text), True)
            if not isinstance(result.text, str):
                raise TypeError(f"the tool returned {type(result.text).__name__}, not text")
        except ToolFailure as e:
            result = ToolResult(str(e), False)
        except (Exception, SystemExit) as e:  # a tool's own fault must not end a rollout either
            known = isinstance(e, ValueError | UserError) and str(e)
            result = ToolResult(f"error: {str(e) if known else f'{type(e).__name__}: {e}'}", False)
    if counters is not None:
        # An invented name must not become a metric of its own: there would be as many as a model can write.
        counters.add(name if tool is not None else "unknown", result.ok, time.monotonic() - start)
    return ToolResult(shorten(result.text, longest), result.ok)


class ToolFailure(Exception):
    """A failure whose text is the whole result, as the model is to read it."""


def shorten(text: str, longest: int) -> str:
    """Keeps the beginning and the end, and says how much is left out. The mark counts; the result never exceeds."""
    if len(text) <= longest:
        return text
    mark = f"\n... {len(text)} characters, the middle left out ...\n"
    if longest <= 2 * len(mark):
        return text[:longest]
    head = (longest - len(mark)) * 2 // 3
    return text[:head] + mark + text[len(text) - (longest - len(mark) - head) :]


# ------------------------------------------------------------------------------------------------------- the three
def calculator_tool() -> Tool:
    return Tool("calculator", "Computes an arithmetic expression exactly, such as 12.5% * 3,400 / (2 + 3).", calculate)


def python_tool(limits: Limits | None = None, unsafe: bool = False) -> Tool:
    """The tool `python`. Raises IsolationError now, not at the first call, where nothing isolates: see `run_python`."""
    isolation_mode(unsafe)
    limits = limits or Limits()
    description = (
        "Runs a Python program with the standard library and returns what it prints. No network, no files of this "
        f"machine; at most {limits.seconds:g} seconds and {limits.memory_mb} MB."
    )
    return Tool("python", description, lambda text: _told(run_python(_unfenced(text), limits, unsafe)))


def _unfenced(text: str) -> str:
    """The program within a Markdown fence, where models like to put it."""
    match = re.fullmatch(r"\s*```[a-zA-Z0-9]*[ \t]*\n(.*?)\n?[ \t]*```\s*", text, re.DOTALL)
    return match[1] if match else text


def _told(result: Result) -> str:
    """What a model is told of a run: its output, and on failure the error that ends it."""
    output = result.stdout.rstrip("\n")
    if result.ok:
        return output or "(the program printed nothing)"
    lines = result.stderr.strip().splitlines()
    if result.stopped:
        reason = f"error: the program was stopped: {result.stopped}"
    elif lines:
        reason = "error: " + "\n".join(lines[-8:])
    else:
        reason = f"error: the program ended with exit code {result.exit_code}"
    raise ToolFailure(f"{shorten(output, 1000)}\n{reason}" if output else reason)


def by_name(
    names: Sequence[str], index: str | os.PathLike | None, scratch: str | os.PathLike, unsafe: bool = False
) -> dict[str, Tool]:
    """Tools by name, in the order given.

    index: for search, which shows the best passage: a folder of texts, whose index goes into the folder `scratch`, or
    an index already made. unsafe: as in `run_python`.
    Raises `UserError` for an unknown name, a missing index, and where python cannot be isolated.
    """
    made = []
    for name in names:
        match name:
            case "calculator":
                made.append(calculator_tool())
            case "python":
                made.append(python_tool(unsafe=unsafe))
            case "search":
                if index is None:
                    raise UserError("the tool search needs an index: a folder of texts")
                if pathlib.Path(index).is_dir():
                    build_index(index, pathlib.Path(scratch) / "index.db")
                    index = pathlib.Path(scratch) / "index.db"
                elif not pathlib.Path(index).exists():
                    raise UserError(f"no index at {index}, and no folder of texts to make one of")
                made.append(search_tool(index, k=1))
            case _:
                raise UserError(f"unknown tool {name!r}; {nearest(name, NAMES)}")
    return registry(made)


def search_tool(db_path: str | os.PathLike, k: int = 3) -> Tool:
    """The tool `search` over an index that `build_index` has made. Raises UserError when there is none."""
    search.search(db_path, "", k)
    run = lambda query: _listed(search.search(db_path, query, k))  # noqa: E731
    return Tool("search", f"Looks words up in a collection of texts and returns the best {k} passages.", run)


def _listed(hits) -> str:
    return "\n".join(f"[{i}] {hit.title}: {hit.snippet}" for i, hit in enumerate(hits, 1)) or "(nothing found)"
