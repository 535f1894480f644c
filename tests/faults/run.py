"""Injects faults into runs of every stage at seeded random points, and compares each with a run that nothing befell.

usage:
  python -m tests.faults.run --trials=N [--seed=S] [--stage=NAME]... [--fault=NAME]... --output=FILE.jsonl

A soak, which interrupts and damages one longer run some 25 times:
  python -m tests.faults.run --fault=soak --output=soak.jsonl

Every pair of a stage and a fault takes its turn, the next round with the next seed. One trial again, as it was:
  python -m tests.faults.run --only=STAGE/FAULT/SEED --output=one.jsonl

In --folder stand the runs that nothing befell, what was compiled, and the run directories of trials that went wrong;
without it all of these are thrown away. Exit codes: 0 all came out as they must; 1 some did not.
"""

import collections
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from absl import flags, logging

from jaxlm.config import UserError
from launch import common
from tests.faults.definitions import STAGES
from tests.faults.faults import CLASSES, FAULTS, SOAK, Fault
from tests.faults.trial import Trial, Wrong, timed

TRIALS = flags.DEFINE_integer("trials", None, "So many trials; unset, each stage with each fault once.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the first round.")
STAGE = flags.DEFINE_multi_enum("stage", [], STAGES, "Only this stage; may be repeated.")
FAULT = flags.DEFINE_multi_enum("fault", [], [f.name for f in (*FAULTS, SOAK)], "Only this fault; may be repeated.")
ONLY = flags.DEFINE_multi_string("only", [], "STAGE/FAULT/SEED: this trial; may be repeated.")
OUTPUT = flags.DEFINE_string("output", None, "File that gets a JSON line for each trial.")
FOLDER = flags.DEFINE_string("folder", None, "Folder to work in, kept for the next time.")


def trial(stage: str, fault: Fault, seed: int, root: Path) -> dict:
    """Runs one; {"stage", "fault", "class", "seed", "at", "outcome", "expected", "ok", "codes", "seconds"}.

    ok is None where it cannot be tried on this machine.
    """
    t = Trial(root, stage, fault.name, seed)
    record = {"stage": stage, "fault": fault.name, "class": fault.kind, "seed": seed}
    with timed(record):
        try:
            fault.script(t)
            outcome, ok = "as expected", True
        except Wrong as e:
            outcome, ok = str(e), False
        except pytest.skip.Exception as e:
            outcome, ok = f"not tried: {e}", None
    if ok is not False:
        shutil.rmtree(t.folder, ignore_errors=True)
    details = {"at": t.at, "outcome": outcome, "expected": CLASSES[fault.kind], "ok": ok, "codes": t.codes}
    return record | details


def table(records: list[dict]) -> str:
    """Counts by class and fault."""
    lines = [f"{'class':12} {'fault':26} {'trials':>6} {'as expected':>11} {'wrong':>5} {'not tried':>9}"]
    counts = collections.defaultdict(collections.Counter)
    for r in records:
        for key in ((r["class"], r["fault"]), (r["class"], ""), ("all", "")):
            counts[key][r["ok"]] += 1
    for kind in (*CLASSES, "all"):
        for (k, fault), n in sorted(counts.items(), key=lambda x: x[0][1] == ""):
            if k == kind:
                lines.append(f"{kind:12} {fault:26} {n.total():6} {n[True]:11} {n[False]:5} {n[None]:9}")
    return "\n".join(lines)


def chosen() -> list[tuple[str, Fault, int]]:
    """(stage, fault, seed) of each trial."""
    if ONLY.value:
        known = {f"{s}/{f.name}": (s, f) for f in (*FAULTS, SOAK) for s in f.stages}
        parts = [text.rpartition("/") for text in ONLY.value]
        if wrong := [
            text for (pair, _, seed), text in zip(parts, ONLY.value) if pair not in known or not seed.isdigit()
        ]:
            raise UserError(f"--only={wrong[0]} is not STAGE/FAULT/SEED, such as {next(iter(known))}/0")
        return [(*known[pair], int(seed)) for pair, _, seed in parts]
    stages, faults = STAGE.value or STAGES, FAULT.value or [f.name for f in FAULTS]
    pairs = [(s, f) for f in (*FAULTS, SOAK) for s in stages if f.name in faults and s in f.stages]
    if not pairs:
        raise UserError("no such fault befalls this stage")
    turns = ((s, f, SEED.value + i) for i in itertools.count() for s, f in pairs)
    return list(itertools.islice(turns, TRIALS.value or len(pairs)))


def main() -> int:
    if OUTPUT.value is None:
        raise UserError("--output=FILE.jsonl is missing: what happened in each trial")
    logging.set_verbosity(logging.ERROR)
    todo = chosen()
    folder = FOLDER.value or tempfile.mkdtemp(prefix="faults-")
    records = []
    try:
        with open(OUTPUT.value, "w") as out:
            for stage, fault, seed in todo:
                r = trial(stage, fault, seed, Path(folder).absolute())
                records.append(r)
                print(json.dumps(r), file=out, flush=True)
                word = {True: "ok", False: "WRONG", None: "--"}[r["ok"]]
                shown = "" if r["ok"] else f": {r['outcome']}"
                print(
                    f"{word:5} {stage:8} {fault.name:26} {seed:4} {r['seconds']:6.1f} s  {r['at']}{shown}", flush=True
                )
    finally:
        if FOLDER.value is None and all(r["ok"] is not False for r in records):
            shutil.rmtree(folder, ignore_errors=True)
    print(table(records))
    wrong = [r for r in records if r["ok"] is False]
    if wrong:
        print(f"{len(wrong)} went wrong; their run directories are in {folder}/trials", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    common.run(main)
