"""Checkpoints that are not used: moved aside, never deleted, each with a note that says why."""

import itertools

from etils import epath

from jaxlm import storage

SCHEMA_VERSION = 1
FOLDER = "quarantine"


def put(directory: epath.Path, step: int, why: str, damaged: bool) -> epath.Path:
    """Moves a step of `directory` to `quarantine/` below it; returns where it is then.

    damaged: whether it was a good checkpoint that now is none. The note, beside it as .json, comes first: whatever
    stops the program between the two, the step does not vanish without one.
    """
    folder = storage.make_dir(directory / FOLDER)
    names = itertools.chain([str(step)], (f"{step}-{n}" for n in itertools.count(2)))
    name = next(n for n in names if not (folder / n).exists())
    number = max((note["number"] for note in _notes(directory)), default=0) + 1
    note = {"schema_version": SCHEMA_VERSION, "number": number, "step": step, "damaged": damaged, "why": why}
    storage.write_json(folder / f"{name}.json", note)
    (directory / str(step)).rename(folder / name)
    return folder / name


def _notes(directory: epath.Path) -> list[dict]:
    """In the order in which the steps were moved; none of those of before there were notes."""
    return sorted(map(storage.read_json, (directory / FOLDER).glob("*.json")), key=lambda note: note["number"])


def damage(directory: epath.Path) -> list[str]:
    """What was wrong with each of the steps that were moved last, where that was damage; the last to be moved first."""
    last = itertools.takewhile(lambda note: note["damaged"], reversed(_notes(directory)))
    return [f"step {note['step']}: {note['why']}" for note in last]
