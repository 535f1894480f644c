"""Every fault that is tried: what befalls a run, and how the run must come out of it. To add one, add a line."""

import collections
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from jaxlm.run import exits, manifest
from jaxlm.run.goodput import account, text
from tests.faults import definitions
from tests.faults.definitions import SAVE_EVERY, STAGES, STEPS
from tests.faults.trial import ABORTED, KILLED, NotStruck, Trial, Wrong, adds_up
from tests.full_disk import small_disk


@dataclasses.dataclass(frozen=True)
class Fault:
    """script: does it to a trial, and raises `Wrong` where the run does not come out as its class must (`CLASSES`).
    phases: in which of a run it can be asked to strike."""

    name: str
    kind: str
    script: Callable[[Trial], None]
    stages: tuple[str, ...] = STAGES
    phases: tuple[str, ...] = ()


# In which phases a run can be struck: how many entries of each there are, and how many seconds one may take.
MOMENTS = {
    "initialise": (1, 2.0),
    "compile": (1, 1.0),
    "data": (STEPS, 0.02),
    "step": (STEPS, 0.1),
    "evaluate": (2, 0.2),
    "save": (STEPS // SAVE_EVERY, 0.15),
}

SOAK_STEPS, SOAK_FAULTS = 120, 25
# In which phases: up to which entry, and to how many seconds after it.
SOAK_PHASES = {
    "data": (5, 0.0),
    "step": (5, 0.1),
    "save": (2, 0.15),
    "evaluate": (1, 0.2),
    "restore": (1, 0.05),
    "compile": (1, 0.5),
}

CLASSES = {
    "interrupted": "parameters, optimizer state, log and batches bit-equal to the uninterrupted run",
    "resized": "on other devices: the same batches, losses within what another order of float32 sums gives",
    "poisoned": "exactly the poisoned steps skipped and recorded, bit-equal to a run told to skip them",
    "corrupted": "the newest step that verifies is used, the bad one quarantined; refused where none is left, until it "
    "may begin again; ends bit-equal",
    "changed": "refused in one line with exit code 2, the difference shown; goes on bit-equal when it is undone",
}


# --------------------------------------------------------------------------------------------------------- interrupted
def moment(t: Trial) -> dict:
    """A random point in the phase that is asked for, or in one of all, which take turns over the seeds."""
    phase = t.chosen(list(MOMENTS))
    entries, longest = MOMENTS[phase]
    where = {"phase": phase, "entry": t.rng.randint(1, entries), "after": round(t.rng.uniform(0, longest), 4)}
    t.at = f"{phase} {where['entry']} + {where['after']} s"
    return where


def signalled(number: str, **where) -> dict:
    return {"do": "signal", "number": number} | where


def kill(t: Trial) -> None:
    t.start(signalled("SIGKILL", **moment(t)), expect=(KILLED, exits.EXIT_DONE))
    t.struck("SIGKILL")
    t.start()
    t.same()


def kill_while_saving(t: Trial) -> None:
    """Orbax writes in the background, up to some tenths of a second from the beginning of a save."""
    entry, after = t.rng.randint(1, STEPS // SAVE_EVERY), round(t.rng.uniform(0, 0.15), 4)
    t.at = f"save {entry} + {after} s"
    t.start(signalled("SIGKILL", phase="save", entry=entry, after=after), expect=(KILLED, exits.EXIT_DONE))
    t.struck("SIGKILL")
    t.start()
    t.same()


def kill_again_and_again(t: Trial) -> None:
    """Each start is killed at another point, the first step of the resumed run and its restoring among them."""
    points = []
    # The first save stands when the second begins, so that there is something to restore.
    for phase, entries, longest in (("save", (2, 2), 0.1), ("restore", (1, 1), 0.0), ("compile", (1, 1), 0.1),
                                    ("step", (1, 2), 0.02)):  # fmt: skip
        where = {"phase": phase, "entry": t.rng.randint(*entries), "after": round(t.rng.uniform(0, longest), 4)}
        points.append(f"{phase} {where['entry']} + {where['after']} s")
        t.at = ", then ".join(points)
        t.start(signalled("SIGKILL", **where), expect=(KILLED, exits.EXIT_DONE))
        t.struck("SIGKILL")
    t.start()
    t.same()


def soak(t: Trial) -> None:
    """A longer run that is stopped, killed, hung and damaged again and again. In the end its log adds up: each step
    once, and every second of a start that came to its end, stopped or done."""
    settings = {"train.steps": SOAK_STEPS, "train.hang_seconds": 15.0}
    names, struck = ["SIGKILL", "SIGTERM", "SIGKILL", "SIGTERM", "hang", "flip", "tear"], collections.Counter()
    code = None
    while sum(struck.values()) < SOAK_FAULTS and code != exits.EXIT_DONE:
        name, (phase, (entries, longest)) = t.rng.choice(names), t.rng.choice(list(SOAK_PHASES.items()))
        phase = "step" if name == "hang" else phase  # nobody watches over what is no training yet
        entry, after = t.rng.randint(1, entries), round(t.rng.uniform(0, longest), 4)
        if name in ("flip", "tear"):
            saved = [p for p in (t.workdir / "checkpoints").glob("[0-9]*")]
            if name == "flip" and len(saved) > 1:
                newest = max(saved, key=lambda p: int(p.name))
                flip(t, newest / t.rng.choice(saved_files(newest)))
                struck[name] += 1
            elif name == "tear" and t.starts:
                tear(t)
                struck[name] += 1
            continue
        where = {"phase": phase, "entry": entry}
        fault = {"do": "hang"} | where if name == "hang" else signalled(name, **where, after=after)
        expect = {"SIGKILL": KILLED, "SIGTERM": exits.EXIT_PREEMPTED, "hang": 1}[name]
        code = t.start(fault, expect=(expect, exits.EXIT_DONE), settings=settings)
        struck[name] += bool(t.starts[-1].struck)
    t.start(settings=settings)
    accounted = account(t.workdir)
    told = ", ".join(f"{n} {name}" for name, n in sorted(struck.items()))
    t.at = f"{told}; {text(accounted)}; {sum(s.seconds for s in t.starts):.0f} s of processes"
    if not struck.total():
        raise NotStruck("the run was over before anything befell it")
    adds_up(t.starts, math.fsum(accounted.values()))
    t.same(settings=tuple(settings.items()))


def sigterm(t: Trial) -> None:
    """It ends with 42 wherever it is, and saves where it has something to save. After its last step it may be done."""
    code = t.start(signalled("SIGTERM", **moment(t)), expect=(exits.EXIT_PREEMPTED, exits.EXIT_DONE))
    struck = t.struck("SIGTERM")
    if struck["step"] < STEPS - 2 and code != exits.EXIT_PREEMPTED:
        raise Wrong(f"exit code {code}, not {exits.EXIT_PREEMPTED}, from SIGTERM in phase {struck['phase']}")
    t.start()
    t.same()


HANGS = ("data", "step", "evaluate", "save")


def hang(t: Trial) -> None:
    phase = t.chosen(HANGS)
    entry = t.rng.randint(2, 4) if phase != "evaluate" else t.rng.randint(1, 2)
    t.at = f"{phase} {entry}"
    t.start({"do": "hang", "phase": phase, "entry": entry}, expect=(1,), settings={"train.hang_seconds": 4.0})
    t.says("hung: nothing has ended for", "train.hang_seconds=4")
    if "time.sleep" not in (stacks := (t.workdir / "stacks-0.txt").read_text()) and "in strike" not in stacks:
        raise Wrong("the stacks do not show what hangs")
    t.start()
    t.same()


FILLS = ("data", "step", "save")


def full_disk(t: Trial) -> None:
    left, phase = t.rng.choice([0, 1 << 14, 1 << 17, 1_150_000, 1_300_000]), t.chosen(FILLS)
    entry = t.rng.randint(1, 3)
    t.at = f"{phase} {entry}, {left} bytes left"
    with small_disk(t.folder / "disk", "64m") as disk:
        t.workdir = Path(disk) / "run"
        filler = str(Path(disk) / "filler")
        code = t.start(
            {"do": "fill", "phase": phase, "entry": entry, "file": filler, "left": left},
            expect=(exits.EXIT_BAD_INPUT, exits.EXIT_DONE),
        )
        t.struck("full disk")
        if code:
            t.refused("the disk is full")
        Path(filler).unlink(missing_ok=True)
        t.start()
        t.same()


def clock_jumps(t: Trial) -> None:
    """The time of day is set, by hours, in the first run and in the one that goes on. Set forward at the one moment at
    which Orbax waits for a folder, it takes that for a time-out: then this start fails, and the next one goes on."""
    step, points = t.rng.randint(3, STEPS - 2), []

    def clock(entries: int) -> dict:
        phase, entry = t.phase or t.rng.choice(["data", "save", "save"]), t.rng.randint(1, entries)
        hours, after = round(t.rng.uniform(-12, 12), 1), round(t.rng.uniform(0, 0.1), 4)
        points.append(f"{hours:+} h in {phase} {entry} + {after} s")
        return {"do": "clock", "phase": phase, "entry": entry, "after": after, "hours": hours}

    code = t.start(clock(1), signalled("SIGTERM", phase="data", entry=step), expect=(exits.EXIT_PREEMPTED, 1))
    t.struck("clock")
    code = t.start(clock(1), expect=(exits.EXIT_DONE, 1)) if code != 1 else code
    t.at = ", then ".join(points)
    if code == 1:
        t.says("TimeoutError")
        t.start()
    t.same()


def lose_a_process(t: Trial, *besides: dict, lost="SIGKILL", expect=(KILLED, 1, ABORTED), latest=STEPS - 2) -> None:
    """Whichever ends first: the one that is lost, or the other, whose connection it was. besides: other faults."""
    victim, step = t.rng.randint(0, 1), t.rng.randint(2, latest)
    t.at = f"process {victim} at step {step}"
    t.start(*besides, signalled(lost, phase="data", entry=step, process=victim), processes=2, expect=expect)


def lost_process(t: Trial) -> None:
    lose_a_process(t)
    t.start(processes=2)
    t.same(processes=2)


def preempted_process(t: Trial) -> None:
    """One of them is told to stop: they agree on a step that none has passed, some steps on, and all save."""
    slowly = {"do": "slow", "phase": "data", "seconds": 0.5}
    lose_a_process(t, slowly, lost="SIGTERM", expect=(exits.EXIT_PREEMPTED,), latest=STEPS // 2)
    t.start(processes=2)
    t.same(processes=2)


# ------------------------------------------------------------------------------------------------------------- resized
def other_devices(t: Trial) -> None:
    before, after = t.rng.choice([(1, 2), (1, 4), (4, 1), (2, 4)])
    t.interrupted(t.rng.randint(2, STEPS - 2), devices=before)
    t.at += f", {before} devices, then {after}"
    t.start(devices=after)
    t.near()


def other_processes(t: Trial) -> None:
    lose_a_process(t)
    t.at += ", then one process of two devices"
    t.start(devices=2)
    t.near()


# ------------------------------------------------------------------------------------------------------------ poisoned
def poisoned(t: Trial) -> None:
    steps = sorted(t.rng.sample(range(STEPS), t.rng.randint(1, 2)))
    t.at = f"steps {steps}"
    t.start({"do": "poison", "steps": steps})
    t.skipped(tuple(steps))


def spike(t: Trial) -> None:
    """A gradient out of all proportion. What it is compared with is told by `train.skip`, as a user tells it."""
    steps = sorted(t.rng.sample(range(3, STEPS), t.rng.randint(1, 2)))
    t.at = f"steps {steps}"
    watched = {"optimizer.spike": 30.0}
    t.start({"do": "poison", "steps": steps, "value": 1e5}, settings=watched)
    told = watched | {"train.skip": tuple(n + 1 for n in steps)}
    t.skipped(tuple(steps), told=(), settings=tuple(told.items()))


def poisoned_and_interrupted(t: Trial) -> None:
    """What was skipped stays skipped, and counted, when the run is resumed."""
    step = t.rng.randint(1, STEPS - 4)
    poison = {"do": "poison", "steps": [step]}
    number, code = t.rng.choice([("SIGTERM", exits.EXIT_PREEMPTED), ("SIGKILL", KILLED)])
    t.at = f"step {step}, {number} before step {step + 2}"
    t.start(poison, signalled(number, phase="data", entry=step + 3), expect=(code,))
    t.start(poison)
    t.skipped((step,))


def never_a_number(t: Trial) -> None:
    """It ends as diverged, and its newest checkpoint is from before; with sound batches it goes on from there."""
    first = SAVE_EVERY * t.rng.randint(1, 2)
    t.at = f"from step {first} on"
    bad = {"do": "poison", "steps": list(range(first, STEPS))}
    t.start(bad, expect=(exits.EXIT_DIVERGED,), settings={"train.max_skipped": 2})
    if int(t.newest().name) != first:
        raise Wrong(f"the newest checkpoint is of step {t.newest().name}, not of {first}")
    t.start(bad | {"steps": []})
    t.skipped(())


# ----------------------------------------------------------------------------------------------------------- corrupted
def is_bookkeeping(name: str) -> bool:
    """Of Orbax's, beside the manifest: nothing is read from it."""
    return Path(name).name in manifest.BOOKKEEPING


def saved_files(step: Path) -> list[str]:
    return sorted(str(p.relative_to(step)) for p in step.rglob("*") if p.is_file())


def flip(t: Trial, file: Path) -> None:
    data, at = bytearray(file.read_bytes()), t.rng.randrange(file.stat().st_size)
    data[at] ^= 1 << t.rng.randrange(8)
    file.write_bytes(data)


def truncate(t: Trial, file: Path) -> None:
    file.write_bytes(file.read_bytes()[: t.rng.randrange(file.stat().st_size)])


def remove(t: Trial, file: Path) -> None:
    file.unlink()


def quarantined(t: Trial, step: Path) -> None:
    if not (t.workdir / "checkpoints" / "quarantine" / step.name).is_dir():
        raise Wrong(f"checkpoint {step.name} is not in quarantine")
    t.says(f"CHECKPOINT {step.name} IS BAD")


def damaged(damage: Callable[[Trial, Path], None]) -> Callable[[Trial], None]:
    def script(t: Trial) -> None:
        t.interrupted(t.rng.randint(4, STEPS - 1))  # a stage that leaves that step saves the one before: two at least
        step = t.newest()
        files = saved_files(step)
        name = files[(7 * t.turn + 5) % len(files)]
        t.at += f", {name}"
        damage(t, step / name)
        t.start()
        if not is_bookkeeping(name):
            quarantined(t, step)
        t.same()

    return script


def empty_newest_step(t: Trial) -> None:
    t.interrupted(t.rng.randint(3, STEPS - 2))
    step = t.newest().parent / str(int(t.newest().name) + 1)
    step.mkdir()
    t.start()
    quarantined(t, step)
    t.same()


def every_checkpoint_damaged(t: Trial) -> None:
    t.interrupted(t.rng.randint(3, STEPS - 1))
    for step in (p for p in t.newest().parent.iterdir() if p.name.isdigit()):
        name = t.rng.choice([n for n in saved_files(step) if not is_bookkeeping(n)])
        t.at += f", {step.name}/{name}"
        t.rng.choice([flip, truncate, remove])(t, step / name)
    for _ in range(2):
        t.start(expect=(exits.EXIT_BAD_INPUT,))
        t.refused("none of the checkpoints of", "--allow=restart")
    t.start(allow=["restart"])
    t.says("begins again at step 0")
    t.same()


def tear(t: Trial) -> None:
    """A power cut in the midst of a line of what is appended to."""
    for name in ("metrics.jsonl", "journal.jsonl"):
        if (file := t.workdir / name).exists():
            with open(file, "ab") as f:
                f.write(file.read_bytes().splitlines()[-1][: t.rng.randint(1, 30)])


def torn_log(t: Trial) -> None:
    t.interrupted(t.rng.randint(3, STEPS - 1))
    tear(t)
    t.start()
    t.same()


# ------------------------------------------------------------------------------------------------------------- changed
def data_changed(t: Trial) -> None:
    t.data = str(t.folder / "data")
    file = definitions.write_data(t.stage, t.folder / "data")
    t.interrupted(t.rng.randint(2, STEPS - 2))
    definitions.change_data(file)
    t.start(expect=(exits.EXIT_BAD_INPUT,))
    t.refused("the data has changed since the checkpoint was written")
    definitions.write_data(t.stage, t.folder / "data")
    t.start()
    t.same()


def definition_changed(t: Trial) -> None:
    path, value = [
        ("optimizer.lr", 0.5), ("seed", 1), ("train.batch_size", 32), ("data.context", 112), ("train.clip", 0.5),
    ][t.turn % 5]  # fmt: skip
    t.interrupted(t.rng.randint(2, STEPS - 2))
    t.at += f", {path}={value}"

    def files() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in t.workdir.rglob("*") if p.is_file()}

    before = files()
    t.start(expect=(exits.EXIT_BAD_INPUT,), settings={path: value})
    t.refused("holds another experiment", f"{path}: ", f"-> {value}")
    if files() != before:
        raise Wrong("the run directory was touched")
    t.start()
    t.same()


# Takes minutes, and is tried when it is asked for by name.
SOAK = Fault("soak", "interrupted", soak)
FAULTS = (
    Fault("kill", "interrupted", kill, phases=tuple(MOMENTS)),
    Fault("kill while saving", "interrupted", kill_while_saving),
    Fault("kill again and again", "interrupted", kill_again_and_again),
    Fault("SIGTERM", "interrupted", sigterm, phases=tuple(MOMENTS)),
    Fault("hang", "interrupted", hang, phases=HANGS),
    Fault("full disk", "interrupted", full_disk, phases=FILLS),
    Fault("clock jumps", "interrupted", clock_jumps, phases=("data", "save")),
    Fault("lost process", "interrupted", lost_process),
    Fault("preempted process", "interrupted", preempted_process),
    Fault("other devices", "resized", other_devices),
    Fault("other processes", "resized", other_processes),
    Fault("poisoned batch", "poisoned", poisoned),
    Fault("spike", "poisoned", spike, ("pretrain", "sft", "reward")),
    Fault("poisoned and interrupted", "poisoned", poisoned_and_interrupted),
    Fault("never a number", "poisoned", never_a_number),
    Fault("flipped bit", "corrupted", damaged(flip)),
    Fault("truncated file", "corrupted", damaged(truncate)),
    Fault("missing file", "corrupted", damaged(remove)),
    Fault("empty newest step", "corrupted", empty_newest_step),
    Fault("every checkpoint damaged", "corrupted", every_checkpoint_damaged),
    Fault("torn log", "corrupted", torn_log),
    Fault("data changed", "changed", data_changed),
    Fault("definition changed", "changed", definition_changed),
)
