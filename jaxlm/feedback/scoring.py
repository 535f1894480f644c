"""What a reward function is, and how one is called so that no fault of it goes on into an update.

A reward function takes a batch: prompts, completions and metadata (a dict for each sample), all of one length, and
gives a value for each sample. None: this sample cannot be scored; it is left out, with an advantage of 0. A value that
is wrong, missing or infinite is never repaired: `scores` raises `RewardError`, a `UserError`, before anything is
updated or written, so that the run stands where it stood.

The time limit: the function runs in a daemon thread of its own, and `scores` waits for it no longer than that. A
thread cannot be ended from outside. One that hangs stays until the process ends, which it does not hold up; it may
still take CPU, and C code that never gives the interpreter's lock back stops the caller as well. What belongs to a
thread (an open SQLite connection, a JAX context manager) is not that of the caller; `timeout=None` calls in the
caller's own.
"""

import contextvars
import math
import numbers
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from jaxlm.config import UserError

TIMEOUT = 120.0  # seconds for a batch
_LARGEST = float(np.finfo(np.float32).max)  # what an update computes with: beyond it a reward would be infinite there
_STACK = 8  # frames of a hanging function that are looked at for one outside the standard library

# Which part of a reward, and which sample, is being scored: read when a function raises or hangs.
_AT: contextvars.ContextVar[tuple[tuple[str, ...], int | None]] = contextvars.ContextVar("_AT", default=((), None))


class RewardError(UserError):
    """A reward function raised, hung, or gave something that is no list of numbers."""


class Reward(Protocol):
    """Called by `scores` alone. It changes none of its arguments; the same arguments give the same values."""

    def __call__(self, prompts: Sequence, completions: Sequence, metadata: Sequence[dict]) -> list[float | None]: ...


def name_of(reward) -> str:
    """What errors and logs call a reward function."""
    inner = getattr(reward, "func", reward)  # of a functools.partial
    return getattr(inner, "__name__", type(inner).__name__)


def each(function: Callable[[object, object, dict], float | bool | None], name: str | None = None) -> Reward:
    """The reward function that scores one sample at a time: `function(prompt, completion, metadata)`.

    Such a one is not bound to wait for a whole batch: a run may ask it for finished samples while others are decoded.
    """

    def reward(prompts, completions, metadata):
        parts, out = _AT.get()[0], []
        for i, sample in enumerate(zip(prompts, completions, metadata, strict=True)):
            _AT.set((parts, i))
            out.append(function(*sample))
        _AT.set((parts, None))
        return out

    reward.__name__, reward.by_sample = name or name_of(function), True
    return reward


def by_sample(reward: Reward) -> bool:
    """Whether a value is known to depend on its own sample alone: of what `each` has made."""
    return getattr(reward, "by_sample", False)


def in_place(reward: Reward, prompts, completions, metadata, name: str) -> list[float | None]:
    """`scores` of a part where its sum is asked: here, within the time of the sum."""
    return scores(reward, prompts, completions, metadata, None, name)


def weighted_sum(
    parts: Mapping[str, tuple[float, Reward]],
    log: Callable[[dict[str, list[float | None]]], None] | None = None,
    name: str = "weighted_sum",
    ask: Callable[..., list[float | None]] = in_place,
) -> Reward:
    """The sum of weight times value over named rewards; None where any part gives None, as the sum is then unknown.

    log: is given the values of each part, without their weights, and of the sum as "total"; see `part_metrics`. A part
    of weight 0 is called and logged, and changes nothing. ask: how a part is asked, by the arguments of `in_place`.
    """
    if not parts:
        raise UserError("a sum of rewards needs at least one part")
    if "total" in parts:
        raise UserError("no part of a reward may be called 'total': the sum is")
    for part, (weight, _) in parts.items():
        if not math.isfinite(weight):
            raise UserError(f"reward part {part!r}: the weight must be finite, got {weight!r}")

    def reward(prompts, completions, metadata):
        values = {n: ask(r, prompts, completions, metadata, n) for n, (_, r) in parts.items()}
        counted = [(weight, values[n]) for n, (weight, _) in parts.items() if weight]
        total = [
            None if any(v[i] is None for _, v in counted) else math.fsum(w * v[i] for w, v in counted)
            for i in range(len(prompts))
        ]
        if log is not None:
            log({**values, "total": total})
        return total

    reward.__name__ = name
    return reward


def part_metrics(values: Mapping[str, Sequence[float | None]], prefix: str = "reward") -> dict[str, float]:
    """`<prefix>/<part>` the mean and `.../std` over what could be scored, `.../unscored` the share that could not."""
    out = {}
    for part, column in values.items():
        known = [v for v in column if v is not None]
        if known:
            out |= {f"{prefix}/{part}": float(np.mean(known)), f"{prefix}/{part}/std": float(np.std(known))}
        out[f"{prefix}/{part}/unscored"] = 1 - len(known) / max(len(column), 1)
    return out


# ------------------------------------------------------------------------------------------------------ the checks
def scores(
    reward: Reward,
    prompts: Sequence,
    completions: Sequence,
    metadata: Sequence[Mapping],
    timeout: float | None = TIMEOUT,
    name: str | None = None,
) -> list[float | None]:
    """The values of a batch, each a finite float or None; bool and int become float.

    timeout: seconds for the whole batch, by the rule above; None: no limit, in the caller's thread. The function gets
    lists and dicts of its own. Raises `RewardError` with the reward's name, the sample where it is known, and what was
    wrong.
    """
    name = name or name_of(reward)
    sizes = (len(prompts), len(completions), len(metadata))
    if len(set(sizes)) > 1:
        raise UserError(f"reward {name!r}: {sizes[0]} prompts, {sizes[1]} completions, {sizes[2]} metadata")
    if timeout is not None and not timeout > 0:
        raise UserError(f"reward {name!r}: the timeout must be positive seconds or None, got {timeout!r}")

    def ask(at: slice = slice(None)):
        return reward(list(prompts[at]), list(completions[at]), [dict(m) for m in metadata[at]])

    parts = (*_AT.get()[0], name)
    if timeout is None:
        token = _AT.set((parts, None))
        try:
            values = ask()
        except RewardError:
            raise
        except (Exception, SystemExit) as e:
            raise _raised(e, _AT.get(), sizes[0]) from e
        finally:
            _AT.reset(token)
        return _checked(values, sizes[0], parts)
    context = contextvars.copy_context()
    context.run(_AT.set, (parts, None))
    found: dict = {}

    def work():
        try:
            found["values"] = context.run(ask)
        except BaseException as e:  # SystemExit too must not pass for a result
            found["error"] = e

    thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
    began = time.monotonic()
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        where = _where(*context.get(_AT), sizes[0])
        raise RewardError(f"{where}: no answer within {timeout:g} s{_standing(thread)}")
    if error := found.get("error"):
        if isinstance(error, RewardError):
            raise error
        at = context.get(_AT)
        if at[1] is None and sizes[0] > 1:
            left = timeout - (time.monotonic() - began)
            at = (at[0], _culprit(reward, prompts, completions, metadata, left, name))
        raise _raised(error, at, sizes[0]) from error
    return _checked(found["values"], sizes[0], parts)


def _culprit(reward, prompts, completions, metadata, seconds: float, name: str) -> int | None:
    """The first sample on which alone a function raises that raised on the batch, if it is found in so many seconds."""
    end = time.monotonic() + seconds
    for i in range(len(prompts)):
        if (left := end - time.monotonic()) <= 0:
            return None
        try:
            scores(reward, prompts[i : i + 1], completions[i : i + 1], metadata[i : i + 1], left, name)
        except RewardError as e:
            return None if e.__cause__ is None else i
    return None


def _where(parts: tuple[str, ...], sample: int | None, size: int) -> str:
    inside = f", part {'/'.join(parts[1:])!r}" if len(parts) > 1 else ""
    which = f"{size} samples" if sample is None else f"sample {sample} of {size}"
    return f"reward {parts[0]!r}{inside}, {which}"


def _raised(error: BaseException, at: tuple, size: int) -> RewardError:
    said = " ".join(str(error).split())[:300]
    if not isinstance(error, UserError):
        last = traceback.extract_tb(error.__traceback__)[-1:]
        line = f" at {last[0].filename.rpartition('/')[2]}:{last[0].lineno}" if last else ""
        said = f"it raised {type(error).__name__}{line}{': ' if said else ''}{said}"
    return RewardError(f"{_where(*at, size)}: {said}")


def _standing(thread: threading.Thread) -> str:
    """The line that a thread is at, of the file that is not the interpreter's own where there is one."""
    frame = sys._current_frames().get(thread.ident)
    if frame is None:
        return ""
    stack = list(reversed(traceback.extract_stack(frame)))[:_STACK]
    at = next((f for f in stack if not f.filename.startswith((sys.base_prefix, "<"))), stack[0])
    return f"; it stands at {at.filename.rpartition('/')[2]}:{at.lineno} in {at.name}"


def _checked(values, size: int, parts: tuple[str, ...]) -> list[float | None]:
    if getattr(values, "ndim", None) == 1 and hasattr(values, "tolist"):  # of numpy or JAX
        values = values.tolist()
    if not isinstance(values, list | tuple):
        shown = type(values).__name__
        raise RewardError(f"{_where(parts, None, size)}: it returned {shown}; a list of {size} numbers is wanted")
    if len(values) != size:
        raise RewardError(f"{_where(parts, None, size)}: it returned {len(values)} values")
    return [_value(v, parts, i, size) for i, v in enumerate(values)]


def _value(value, parts: tuple[str, ...], sample: int, size: int) -> float | None:
    if value is None:
        return None
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    wrong = ""
    if not isinstance(value, numbers.Real):
        wrong = f"{repr(value)[:60]} ({type(value).__name__})"
    else:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        wrong = "" if abs(value) <= _LARGEST else str(value)  # which a NaN is not
    if wrong:
        raise RewardError(f"{_where(parts, sample, size)}: it gave {wrong}; a finite number or None is wanted")
    return value
