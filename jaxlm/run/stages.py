"""Stages in order, each done once: what a tour or a pipeline of trainings is made of.

A stage that has ended leaves `stages/<name>.json`: its result, how long it took, and a hash of what went into it, which
is its part of the definition and what the stages before it made. Called again, a stage whose inputs are the same is
skipped; one whose inputs have changed runs again, and begins anew where the stages before it made something else than
when it began (`stages/begun.json`).
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Collection, Sequence

from jaxlm import storage
from jaxlm.config import UserError, nearest
from jaxlm.run import exits

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Stage:
    """run: (records of the stages before by name, whether to begin anew) -> JSON-able result.
    after: the stages before it that it depends on; unset, all. reads: the keys of the definition that it depends on,
    besides; unset, all.

    A result may carry `identity`: what the stages after it depend on; unset, the whole result is. It is what decides
    whether they are done, so it must not hold times or other noise.
    """

    name: str
    about: str
    run: Callable[[dict[str, dict], bool], dict]
    reads: Collection[str] | None = None
    after: Collection[str] | None = None


def _file(workdir, name: str):
    return storage.path(workdir) / "stages" / f"{name}.json"


def _begin(workdir, name: str, made: str) -> bool:
    """Notes what the stages before it have made, as a hash; whether that was something else when it began."""
    file = _file(workdir, "begun")
    storage.make_dir(file.parent)
    begun = storage.read_json(file) if file.exists() else {}
    if (former := begun.get(name)) != made:
        storage.write_json(file, begun | {name: made})
    return former not in (None, made)


def records(workdir, names: Sequence[str]) -> dict[str, dict]:
    """{name: {"stage", "inputs", "seconds", "result", "identity"}} of those that are done, whatever their inputs."""
    found = {n: storage.read_json(_file(workdir, n)) for n in names if _file(workdir, n).exists()}
    return {n: r for n, r in found.items() if r.get("schema_version") == SCHEMA_VERSION}


def make_room(workdir) -> None:
    """Moves a run that stands in `workdir` to the first free `workdir`-1, -2, ... beside it."""
    if workdir.exists():
        aside = next(p for n in itertools.count(1) if not (p := workdir.parent / f"{workdir.name}-{n}").exists())
        workdir.rename(aside)
        print(f"the former run stands in {aside}")


def _hash(obj) -> str:
    return storage.sha256_text(json.dumps(obj, sort_keys=True))


def run(
    workdir,
    stages: Sequence[Stage],
    definition: dict,
    only: Collection[str] = (),
    redo: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, dict]:
    """Runs what is not done; returns the records of all stages that are.

    definition: JSON-able; a change of it makes every stage run again that reads what has changed.
    only: nothing but these, whose forerunners must be done. redo: these run again from scratch though they are done;
    one that was stopped on the way goes on.
    Raises `UserError` for an unknown name or a forerunner that is missing, and whatever a stage raises: what was done
    before stays done. SIGTERM during a stage ends the program with exit code 42.
    """
    names = [s.name for s in stages]
    for name in [*only, *redo]:
        if name not in names:
            raise UserError(f"unknown stage {name!r}; {nearest(name, names)}")
    before = records(workdir, names)
    done: dict[str, dict] = {}
    for number, stage in enumerate(stages, 1):
        before_it = [n for n in names[: number - 1] if stage.after is None or n in stage.after]
        made = [done[n]["identity"] if n in done else None for n in before_it]
        mine = definition if stage.reads is None else {k: definition[k] for k in stage.reads}
        inputs = _hash([mine, stage.name, made])
        record, label = before.get(stage.name), f"[{number}/{len(stages)}] {stage.name}"
        good = record is not None and record["inputs"] == inputs
        if only and stage.name not in only:
            if good:
                done[stage.name] = record
            continue
        if good and stage.name not in redo:
            say(f"{label}: done before in {record['seconds']:.0f} s, skipped (--redo={stage.name} does it again)")
            _begin(workdir, stage.name, _hash(made))
            done[stage.name] = record
            continue
        if missing := [n for n in names[: number - 1] if n not in done]:
            raise UserError(f"the stage {stage.name} needs {', '.join(missing)} first: leave --only out, or add them")
        say(f"{label}: {stage.about}")
        anew = _begin(workdir, stage.name, _hash(made)) or (stage.name in redo and record is not None)
        _file(workdir, stage.name).unlink(missing_ok=True)  # until it has ended again it is not done
        began = time.monotonic()
        with exits.terminable():
            result = stage.run(done, anew)
        result = json.loads(json.dumps(result))  # a later start reads it from the file: the same now
        identity = result.pop("identity") if "identity" in result else _hash(result)
        record = {
            "schema_version": SCHEMA_VERSION,
            "stage": stage.name,
            "inputs": inputs,
            "seconds": round(time.monotonic() - began, 3),
            "identity": identity,
            "result": result,
        }
        storage.write_json(_file(workdir, stage.name), record)
        say(f"{label}: done in {record['seconds']:.0f} s")
        done[stage.name] = record
    return done
