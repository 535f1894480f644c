"""Alarms for reward hacking on the records of a run, and the step to go back to.

A record is a dict with "step" and metrics by name, as in metrics.jsonl; one without a finite value of the metric is
passed over. Each alarm is a pure function of the records so far: what comes later never changes an alarm that has been
raised, so the same function serves a running loop and a finished run. An alarm says what, since when (the step at
which it began), when it could first be known, and how much.

Trends are least-squares slopes over a window of records, called rising or falling when Student's t rules out the
opposite at `confidence` on one side. The residuals are taken to be independent: give evaluations on fresh samples, or
a longer window, where they are not. after: windows that end at this step or before are passed over, for a running loop
that has looked at them.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from scipy.special import ndtri, stdtr

from jaxlm.config import UserError

WINDOW = 10  # records
GOLD_WINDOW = 20  # a record is one step's samples, which say little of gold: with 10 a slow fall is missed
CONFIDENCE = 0.999  # of each window: over 60 records of pure noise some 3% of runs raise an alarm
_FLAT = 1e-9  # a slope over the window that is smaller than this share of the values is rounding


@dataclasses.dataclass(frozen=True)
class Alarm:
    what: str
    since: int  # the last step before it began
    seen: int  # the step at which the records first show it
    amount: float  # in the unit that `why` names
    why: str


Check = Callable[[Sequence[dict]], Alarm | None]


def _series(records: Sequence[dict], *names: str) -> tuple[list[int], list[np.ndarray]]:
    """Steps, and each metric's values, of the records that have a finite value of all of them."""

    def known(value) -> bool:
        return isinstance(value, int | float | np.floating) and math.isfinite(value)

    kept = [r for r in records if all(known(r.get(n)) for n in names)]
    steps = [r["step"] for r in kept]
    if any(b <= a for a, b in itertools.pairwise(steps)):
        raise UserError("the records of a run must come in order, each step once")
    return steps, [np.array([r[n] for r in kept], np.float64) for n in names]


def trend(values: Sequence[float]) -> tuple[float, float]:
    """(slope a record, probability by Student's t of so high a slope or a higher one where there is none)."""
    y = np.asarray(values, np.float64)
    n = len(y)
    if n < 3:
        raise UserError(f"a trend needs at least 3 records, got {n}")
    x = np.arange(n) - (n - 1) / 2
    slope = float(x @ y / (x @ x))
    if abs(slope) * n <= _FLAT * max(np.abs(y).max(), 1e-300):
        return 0.0, 0.5
    residual = y - y.mean() - slope * x
    error = math.sqrt(float(residual @ residual) / (n - 2) / float(x @ x))
    return slope, float(stdtr(n - 2, -slope / error)) if error > 0 else float(slope < 0)


def gold_falls(
    records: Sequence[dict],
    proxy: str = "proxy",
    gold: str = "gold",
    window: int = GOLD_WINDOW,
    confidence: float = CONFIDENCE,
    after: int = -1,
) -> Alarm | None:
    """Gold falls beyond noise over `window` records while the proxy rises, or holds: over-optimization itself.

    Where both fall, the policy is breaking down instead, and this is silent.
    since: where gold, as a mean of three records, was highest up to then. amount: by how much gold has fallen from
    that, as a mean of the window's last three.
    """
    steps, (p, g) = _series(records, proxy, gold)
    for end in range(window, len(steps) + 1):
        if steps[end - 1] <= after:
            continue
        span = slice(end - window, end)
        (_, proxy_chance), (slope, chance) = trend(p[span]), trend(g[span])
        if chance > confidence and proxy_chance < confidence:
            smooth = np.convolve(g[:end], np.ones(3) / 3, "valid")
            at = int(smooth.argmax())
            fall = float(smooth[at] - smooth[-1])
            does = "rises" if proxy_chance < 1 - confidence else "holds"
            why = f"{gold} falls by {-slope:.3g} a record over {window} records while {proxy} {does}"
            return Alarm("gold falls", steps[at + 1], steps[end - 1], fall, why)
    return None


def drift(
    records: Sequence[dict],
    name: str,
    what: str,
    healthy: Callable[[float], tuple[float, float]],
    window: int = WINDOW,
    confidence: float = CONFIDENCE,
    after: int = -1,
) -> Alarm | None:
    """A metric's mean over a window has left what is healthy for its mean over the first window, and beyond noise.

    healthy: (lowest, highest) for that first mean. Noise: the difference of the two means against their standard
    errors, normal. since: the last record before the window. amount: the difference.
    """
    steps, (y,) = _series(records, name)
    if len(y) < 2 * window:
        return None
    first = y[:window]
    low, high = healthy(float(first.mean()))
    z = -float(ndtri(1 - confidence))
    for end in range(2 * window, len(y) + 1):
        if steps[end - 1] <= after:
            continue
        now = y[end - window : end]
        change = float(now.mean() - first.mean())
        noise = math.sqrt((first.var(ddof=1) + now.var(ddof=1)) / window)
        if not low <= now.mean() <= high and abs(change) > z * noise:
            why = f"{name} went from {first.mean():.3g} to {now.mean():.3g}; {low:.3g} to {high:.3g} is healthy"
            return Alarm(what, steps[end - window - 1], steps[end - 1], change, why)
    return None


def length_drifts(records: Sequence[dict], name: str = "length", factor: float = 1.5, **kwargs) -> Alarm | None:
    """Replies have become `factor` times as long or as short; kwargs as in `drift`."""
    return drift(records, name, "length drifts", lambda first: (first / factor, first * factor), **kwargs)


def repeats(records: Sequence[dict], name: str = "repetition", more: float = 0.1, **kwargs) -> Alarm | None:
    """The share of repeated n-grams (`repetition`) has risen by more than `more`."""
    return drift(records, name, "repetition", lambda first: (-math.inf, first + more), **kwargs)


def entropy_collapses(records: Sequence[dict], name: str = "entropy", share: float = 0.3, **kwargs) -> Alarm | None:
    """The policy's entropy per token has fallen below `share` of what it was. Some fall is what learning looks like."""
    return drift(records, name, "entropy collapse", lambda first: (share * first, math.inf), **kwargs)


def repetition(ids: Sequence[Hashable], n: int = 4) -> float:
    """The share of a sequence's n-grams that came before in it: 0 for none, near 1 for a loop; 0 below n + 1 items."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


CHECKS: tuple[Check, ...] = (gold_falls, length_drifts, repeats, entropy_collapses)


def alarms(records: Sequence[dict], checks: Sequence[Check] = CHECKS) -> list[Alarm]:
    """Every alarm that the records raise, in the order in which they could be known."""
    return sorted((a for check in checks if (a := check(records)) is not None), key=lambda a: a.seen)


def early_stop(records: Sequence[dict], checks: Sequence[Check] = CHECKS) -> tuple[int, Alarm | None]:
    """(step to keep, alarm): where the alarm that was known first says that it began; without one the last step.

    By the first to be known, not by the one that began first: the choice is what a run that stops at once would make.
    Without gold in the records the others stand alone, and say nothing of a policy that fools the proxy in silence.
    """
    if not records:
        raise UserError("early stopping needs at least one record")
    raised = alarms(records, checks)
    return (raised[0].since, raised[0]) if raised else (records[-1]["step"], None)
