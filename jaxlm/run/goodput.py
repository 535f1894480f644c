"""Where a run's time goes, over all its restarts: what trained, what had to be paid around it, and what was lost.

Each second of a process belongs to one phase, and the seconds since the last record stand in `metrics.jsonl` as
`seconds/<phase>`. The goodput of a run (Google's ML goodput) is the share of all of them that went into steps that
count. A step that was taken again after a restart counts once: the first time was lost. What a killed process did after
its last record is in no file, and the time between two processes is not the run's.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

import jax

from jaxlm.run.log import raw_metrics

PHASES = {
    "initialise": "before the first step: data, models, the programs' own start",
    "restore": "reading a checkpoint",
    "compile": "the first step of a process, in which its programs are compiled or read from the cache",
    "data": "waiting for a batch",
    "step": "training",
    "evaluate": "validation and samples",
    "save": "what a checkpoint holds training up for",
    "lost": "steps that had to be taken again",
}


class Clock:
    """Gives every second to the phase it is spent in; `changed` is when the last one began (monotonic seconds)."""

    def __init__(self, now=time.monotonic):
        self._now, self._phase, self._spent = now, "initialise", collections.Counter()
        self.changed = now()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, name: str) -> str:
        now, before = self._now(), self._phase
        self._spent[before] += now - self.changed
        self.changed, self._phase = now, name
        return before

    def take(self) -> dict[str, float]:
        """{"seconds/<phase>": seconds} since this was last asked."""
        self._enter(self._phase)
        taken, self._spent = self._spent, collections.Counter()
        return {f"seconds/{name}": seconds for name, seconds in taken.items() if seconds}


def account(workdir) -> dict[str, float]:
    """{phase: seconds} of a run, those of `PHASES` that occur; empty where nothing was recorded."""
    kept: list[tuple[int, dict[str, float]]] = []
    total: collections.Counter = collections.Counter()
    for record in raw_metrics(workdir):
        times = {k.removeprefix("seconds/"): v for k, v in record.items() if k.startswith("seconds/")}
        if not times:
            continue
        if "initialise" in times:  # another process, which goes on from the step before this one
            again = [t for step, t in kept if step >= record["step"]]
            kept = [(step, t) for step, t in kept if step < record["step"]]
            for lost in again:
                total["lost"] += sum(lost.get(name, 0.0) for name in ("data", "step"))
                total.update({k: v for k, v in lost.items() if k not in ("data", "step")})
        kept.append((record["step"], times))
    for _, times in kept:
        total.update(times)
    return {name: total[name] for name in PHASES if total[name]}


def text(seconds: dict[str, float]) -> str:
    """One line: the share of each phase, training first."""
    whole = sum(seconds.values())
    shares = sorted(seconds.items(), key=lambda x: (x[0] != "step", -x[1]))
    return f"{whole:.0f} s: " + ", ".join(f"{name} {s / whole:.1%}" for name, s in shares)


def tell(workdir, say: Callable[[str], None]) -> None:
    """Says where the time went, on the process that keeps the log; to be called when the log is closed."""
    if jax.process_index() == 0 and (spent := account(workdir)):
        say(text(spent))
