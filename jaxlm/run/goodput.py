"""Where a run's time goes, over all its restarts: what trained, what had to be paid around it, and what was lost.

Each second of a process belongs to one phase, and the seconds since the last record stand in `metrics.jsonl` as
`seconds/<phase>`. The goodput of a run (Google's ML goodput) is the share of all of them that went into steps that
count. A step that was taken again after a restart counts once: the first time was lost. What a killed process did after
its last record is in no file, and the time between two processes is not the run's. What a save does behind training's
back is told beside these, as `checkpoint/<what>_seconds` (`Checkpoints.cost`), and belongs to no phase.

A step of reinforcement learning is taken apart further, as `train/seconds/<part>` of the step that is logged. Devices
work behind the host's back, so a part ends where the host reads what the part has made (sampled tokens,
log-probabilities, the updates' metrics), which it has to do there anyway: nothing is waited for in order to be timed,
and no work of one part is left for the next to pay. What the host does while the devices work, such as packing the next
minibatch, is in the part's own time.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

import jax

from jaxlm.run.exits import Abandoned
from jaxlm.run.log import raw_metrics, read_metrics

PHASES = {
    "initialise": "before the first step: data, models, the programs' own start",
    "restore": "reading a checkpoint",
    "compile": "the first step of a process, in which its programs are compiled or read from the cache",
    "data": "waiting for a batch",
    "step": "training",
    "evaluate": "validation and samples",
    "save": "what a checkpoint holds training up for",
    "lost": "steps that had to be taken again, and what was abandoned in order to stop",
}
STEP_PARTS = {
    "rollout": "sampling the responses, calls of tools and all",
    "reward": "scoring them: what the rollout has not hidden",
    "old_logprobs": "log-probabilities by the policy before its updates, and the values of its own head",
    "ref_logprobs": "log-probabilities by the reference policy",
    "values": "values by a critic of its own",
    "update": "the gradient steps of policy and critic",
    "host": "all else: prompts, packing, advantages, metrics",
}


class Clock:
    """Gives every second to the phase it is spent in; `changed` is when the last one began, or gave a sign of life
    (monotonic seconds). A phase that is `Abandoned` was lost.

    phase: the one that is left when no other is entered.
    """

    def __init__(self, now=time.monotonic, phase: str = "initialise"):
        self._now, self._phase, self._spent = now, phase, collections.Counter()
        self._beside: dict[str, float] = {}
        self.changed = now()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, had = self._enter(name), self._spent[name]
        try:
            yield
        except Abandoned:
            self.alive()
            lost = max(self._spent[name] - had, 0.0)
            self._spent.update({name: -lost, "lost": lost})
            raise
        finally:
            self._enter(before)

    def _enter(self, name: str) -> str:
        now, before = self._now(), self._phase
        self._spent[before] += now - self.changed
        self.changed, self._phase = now, name
        return before

    def alive(self) -> None:
        """The phase goes on: a sign of life, for who watches."""
        self._enter(self._phase)

    def beside(self, values: dict[str, float]) -> None:
        """What is to be told with the times, and is none of them: seconds of what runs while the run goes on."""
        self._beside |= values

    def take(self) -> dict[str, float]:
        """{"seconds/<phase>": seconds} since this was last asked, and what was to be told beside them."""
        self.alive()
        taken, self._spent = self._spent, collections.Counter()
        beside, self._beside = self._beside, {}
        return {f"seconds/{name}": seconds for name, seconds in taken.items() if seconds} | beside


def account(workdir) -> dict[str, float]:
    """{phase: seconds} of a run, those of `PHASES` that occur; empty where nothing was recorded."""
    kept: list[tuple[int, dict[str, float]]] = []
    total: collections.Counter = collections.Counter()
    for record in raw_metrics(workdir):
        times = {k.removeprefix("seconds/"): v for k, v in record.items() if k.startswith("seconds/")}
        if not times:
            continue
        if "initialise" in times:  # another process: it goes on from the step before this one, if it has taken any
            first = record["step"] + ("compile" not in times)
            again = [t for step, t in kept if step >= first]
            kept = [(step, t) for step, t in kept if step < first]
            for lost in again:
                total["lost"] += sum(lost.get(name, 0.0) for name in ("data", "step"))
                total.update({k: v for k, v in lost.items() if k not in ("data", "step")})
        kept.append((record["step"], times))
    for _, times in kept:
        total.update(times)
    return {name: total[name] for name in PHASES if total[name]}


def step_parts(workdir) -> tuple[int, dict[str, float]]:
    """(steps, {part: seconds of a step}) of a run of reinforcement learning, those of `STEP_PARTS` that occur.

    The mean over the middle half of the logged steps by their length: as a mean it adds up to the step, and a few steps
    that had to compile, or were held up, do not count. The first step of a process is left out. (0, {}) where no step
    is left, as in any other training.
    """
    steps = [
        {name: r.get(f"train/seconds/{name}", 0.0) for name in STEP_PARTS}
        for r in read_metrics(workdir)
        if "train/seconds/rollout" in r and "train/seconds_to_first_step" not in r
    ]
    steps.sort(key=lambda parts: sum(parts.values()))
    middle = steps[len(steps) // 4 : len(steps) - len(steps) // 4]
    mean = {name: sum(parts[name] for parts in middle) / max(len(middle), 1) for name in STEP_PARTS}
    return len(middle), {name: seconds for name, seconds in mean.items() if seconds}


def text(seconds: dict[str, float]) -> str:
    """One line: the share of each phase, training first."""
    whole = sum(seconds.values())
    shares = sorted(seconds.items(), key=lambda x: (x[0] != "step", -x[1]))
    return f"{whole:.0f} s: " + ", ".join(f"{name} {s / whole:.1%}" for name, s in shares)


def tell(workdir, say: Callable[[str], None]) -> None:
    """Says where the time went, on the process that keeps the log; to be called when the log is closed."""
    if jax.process_index() == 0 and (spent := account(workdir)):
        say(text(spent))
