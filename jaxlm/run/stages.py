"""Stages in order, each done once: what a tour or a pipeline of trainings is made of.

A stage that has ended leaves `stages/<name>.json`: its result, how long it took, and a hash of what went into it, which
is the definition and what the stages before it made. Called again, a stage whose inputs are the same is skipped; one
whose inputs have changed runs again.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Sequence

from jaxlm import storage
from jaxlm.config import UserError, nearest

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Stage:
    """run: (records of the stages before by name, whether to begin anew) -> JSON-able result.

    A result may carry `identity`: what the stages after it depend on; unset, the whole result is. It is what decides
    whether they are done, so it must not hold times or other noise.
    """

    name: str
    about: str
    run: Callable[[dict[str, dict], bool], dict]


def _file(workdir, name: str):
    return storage.path(workdir) / "stages" / f"{name}.json"


def records(workdir, names: Sequence[str]) -> dict[str, dict]:
    """{name: {"stage", "inputs", "seconds", "result", "identity"}} of those that are done, whatever their inputs."""
    found = {n: storage.read_json(_file(workdir, n)) for n in names if _file(workdir, n).exists()}
    return {n: r for n, r in found.items() if r.get("schema_version") == SCHEMA_VERSION}


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

    definition: JSON-able; a change of it makes every stage run again.
    only: nothing but these, whose forerunners must be done. redo: these run again from scratch though they are done.
    Raises `UserError` for an unknown name or a forerunner that is missing, and whatever a stage raises: what was done
    before stays done.
    """
    names = [s.name for s in stages]
    for name in [*only, *redo]:
        if name not in names:
            raise UserError(f"unknown stage {name!r}; {nearest(name, names)}")
    before = records(workdir, names)
    done: dict[str, dict] = {}
    for number, stage in enumerate(stages, 1):
        inputs = _hash(
            [definition, stage.name, [done[n]["identity"] if n in done else None for n in names[: number - 1]]]
        )
        record, label = before.get(stage.name), f"[{number}/{len(stages)}] {stage.name}"
        good = record is not None and record["inputs"] == inputs
        if only and stage.name not in only:
            if good:
                done[stage.name] = record
            continue
        if good and stage.name not in redo:
            say(f"{label}: done before in {record['seconds']:.0f} s, skipped (--redo={stage.name} does it again)")
            done[stage.name] = record
            continue
        if missing := [n for n in names[: number - 1] if n not in done]:
            raise UserError(f"the stage {stage.name} needs {', '.join(missing)} first: leave --only out, or add them")
        say(f"{label}: {stage.about}")
        began = time.monotonic()
        result = stage.run(done, stage.name in redo)
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
